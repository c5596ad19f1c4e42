"""A verdict of files alone: whose demand, at which lengths, and recorded requests replayed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from agent import files
from agent.files import judge_files, read_demand
from agent.model import Level, Stats, Sweep, Target, UsageError, Workload
from agent.sizing.curve import parse_slo
from agent.sizing.trial import Trial
from tests.agent.sizing.swept import sweep_of
from tests.agent.test_cli import Command, agent

GOLDEN = Path(__file__).parent.parent / "golden/traces"
SLO = parse_slo("ttft:mean<500ms")
LOADS = {1: (90.0, 40.0), 8: (600.0, 80.0), 32: (1700.0, 180.0), 64: (2100.0, 800.0)}


def curve(**workload: Any) -> Sweep:
    """What another tool may write: tokens/s and means."""
    levels = [
        Level(concurrency=load, output_tokens_per_s=rate, ttft_ms=Stats(mean=ttft))
        for load, (rate, ttft) in LOADS.items()
    ]
    return Sweep(levels=levels, workload=Workload(**workload))


def said(sweep: Sweep, demand: object, **more: Any) -> Any:
    data = demand if isinstance(demand, bytes) else json.dumps(demand).encode()
    return judge_files(sweep, SLO, read_demand(data, "d"), **more)


# ------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    "name", ["azure-2023-code.csv", "burstgpt-1.csv", "mooncake-conversation.jsonl"]
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_trace_is_what_loadgen_takes_for_one(name: str, pack: Any) -> None:
    asked = read_demand(pack((GOLDEN / name).read_bytes()), name)
    assert asked.arrivals is not None
    assert len(asked.arrivals) > 10
    rate = asked.demand.requests_per_s
    assert rate.mean == pytest.approx((len(asked.arrivals) - 1) / asked.arrivals.window_s)
    assert asked.demand.input_tokens.typical == pytest.approx(asked.arrivals.prompt_tokens.mean())
    assert (asked.arrivals.window_s < 60) == any("lasts" in note for note in asked.notes)


@pytest.mark.parametrize(
    ("demand", "wrong"),
    [
        ({"concurrency": {"mean": 50, "p99": 4}}, "concurrency: its mean, 50, is more than"),
        ({"concurrency": {"p99": 1e12}}, "up to 1e+09"),
        ({"concurrency": {"p99": 4}, "input_tokens": {"mean": -3}}, "input_tokens: write a number"),
        ({"concurrency": None, "window_s": 5}, "neither concurrency nor requests_per_s"),
        (b'{"timestamp": 0, "input_length": 9, "output_length": 9}\n', "have no rate"),
        (b"", "no trace that can be read"),
    ],
)
def test_what_is_no_demand(demand: object, wrong: str) -> None:
    with pytest.raises(UsageError) as error:
        said(curve(), demand)
    assert str(error.value).startswith("--demand d: ")
    assert wrong in str(error.value)


def test_what_is_not_known_may_be_null() -> None:
    found = said(curve(), {"requests_per_s": None, "concurrency": {"p99": 8}})
    assert found.finding == "RIGHT_SIZED"


# ---------------------------------------------------------------------------------------- lengths


def test_requests_follow_from_tokens() -> None:
    """2,100 tokens/s in answers of 100 are 21 requests/s; the SLO holds up to about 1,900."""
    swept = curve(input_tokens=500, output_tokens="uniform:50:150")
    assert [said(swept, {"requests_per_s": {"peak": rate}}).finding for rate in (2, 19.3, 60)] == [
        "RIGHT_SIZED", "BORDERLINE", "UNDER_SIZED"
    ]  # fmt: skip
    declared = {"requests_per_s": {"peak": 2}, "output_tokens": {"p50": 100}}
    found = said(curve(), declared)
    assert found.finding == "RIGHT_SIZED"
    assert "taken to be as long as the declared ones" in found.confidence.limited_by
    assert said(curve(), {"requests_per_s": {"peak": 2}}).finding == "INSUFFICIENT_DATA"


@pytest.mark.parametrize(
    ("at_once", "lengths", "finding"),
    [
        (4, (500, 100), "RIGHT_SIZED"),
        (400, (500, 100), "UNDER_SIZED"),
        (4, (4000, 100), "INSUFFICIENT_DATA"),
        (400, (4000, 100), "UNDER_SIZED"),
        (4, (100, 50), "RIGHT_SIZED"),
        (400, (100, 50), "INSUFFICIENT_DATA"),
        (4, (4000, 20), "INSUFFICIENT_DATA"),
        (400, (4000, 20), "INSUFFICIENT_DATA"),
    ],
)
def test_longer_requests_prove_too_small_and_shorter_ones_that_it_fits(
    at_once: int, lengths: tuple[int, int], finding: str
) -> None:
    demand = {"concurrency": {"p99": at_once}, "input_tokens": {"mean": lengths[0]},
              "output_tokens": {"mean": lengths[1]}}  # fmt: skip
    found = said(curve(input_tokens=500, output_tokens=100), demand)
    assert found.finding == finding
    if finding == "INSUFFICIENT_DATA":
        assert found.missing[0].startswith("a sweep with these lengths")
        assert f"--input-tokens {lengths[0]}" in str(found.recommendation.confirm_with)
        assert found.confidence.level == "none"
    elif lengths != (500, 100):
        assert "not as long as the swept ones" in found.confidence.limited_by


# ------------------------------------------------------------------------------------------ replay


def trace(every_s: float, tokens: tuple[int, int] = (1000, 300), n: int = 400) -> bytes:
    line = '{"timestamp": %.0f, "input_length": %d, "output_length": %d, "hash_ids": []}\n'
    return b"".join((line % (1000 * every_s * one, *tokens)).encode() for one in range(n))


@pytest.mark.parametrize(
    ("every_s", "finding"), [(2.0, "RIGHT_SIZED"), (0.01, "UNDER_SIZED")], ids=["slow", "fast"]
)
def test_recorded_requests_are_replayed_where_the_engine_is_known(
    every_s: float, finding: str
) -> None:
    found = said(sweep_of(), trace(every_s))
    assert found.finding == finding
    assert "replayed, the recorded requests take " in found.summary
    assert any("recorded requests of the busiest hours through llama" in one
               for one in found.rests_on)  # fmt: skip
    assert found.ratio.lo <= found.ratio.value <= found.ratio.hi
    bare = sweep_of(target=Target(model="of-our-own"))
    assert "replayed" not in said(bare, trace(every_s)).summary


@pytest.mark.parametrize(
    ("held", "alike", "other"),
    [
        ((0.5, 0.7), "UNDER_SIZED", "UNDER_SIZED"),
        ((0.7, 0.9), "UNDER_SIZED", "BORDERLINE"),
        ((0.9, 1.2), "BORDERLINE", "BORDERLINE"),
        ((1.05, 2.0), "BORDERLINE", "BORDERLINE"),
        ((1.2, 2.0), "RIGHT_SIZED", "BORDERLINE"),
        ((1.4, 6.0), "RIGHT_SIZED", "BORDERLINE"),
        ((1.6, 6.0), "RIGHT_SIZED", "RIGHT_SIZED"),
    ],
)
def test_an_engine_swept_with_other_lengths_has_to_have_room_to_spare(
    monkeypatch: pytest.MonkeyPatch, held: tuple[float, float], alike: str, other: str
) -> None:
    """Whatever the replay holds of the recorded requests, at the slowest and the fastest."""
    replayed = Trial(sum(held) / 2, *held, 0.5, None, 400, "of the observed requests")
    monkeypatch.setattr(files, "trial", lambda *_, **__: replayed)
    monkeypatch.setattr(files, "whole", lambda *given: 2.0 if given[3] > 0 else 0.5)
    found = [said(sweep_of(lengths=one), trace(2.0)) for one in ((1000, 300), (300, 100))]
    assert [one.finding for one in found] == [alike, other]
    assert found[1].confidence.level == "low"


def test_a_burst_inside_the_busiest_minute_is_not_told_to_fit() -> None:
    """A request a second; and 100 in one second of them are no 20 a second for a minute."""
    at_ms = [*range(0, 300_000, 1000), *(100_000 + 10 * one for one in range(100))]
    swept = curve(input_tokens=1000, output_tokens=300)
    line = '{"timestamp": %d, "input_length": 1000, "output_length": 300, "hash_ids": []}\n'
    bursty, even = (b"".join((line % at).encode() for at in some) for some in (at_ms, at_ms[:300]))
    assert said(swept, even).finding == "RIGHT_SIZED"
    found = said(swept, bursty)
    assert found.finding == "BORDERLINE"
    assert "come in bursts, and by the curve alone 5.6 times what the SLO allows" in found.summary
    assert found.confidence.level == "low"


def _of_instants(at_ms: list[float]) -> bytes:
    line = '{"timestamp": %.0f, "input_length": 1000, "output_length": 300, "hash_ids": []}\n'
    return b"".join((line % at).encode() for at in at_ms)


@pytest.mark.parametrize(
    ("seconds", "finding"), [(60, "BORDERLINE"), (600, "UNDER_SIZED")], ids=["drains", "stays"]
)
def test_a_queue_that_drains_is_not_too_small(seconds: int, finding: str) -> None:
    """A request a second for an hour; 7 a second are held, and 14 come for a minute, or for ten."""
    at_ms = sorted(
        [1000.0 * one for one in range(3600)]
        + [1e6 + 1000 * one / 13 for one in range(13 * seconds)]
    )
    found = said(curve(input_tokens=1000, output_tokens=300), _of_instants(at_ms))
    assert found.finding == finding
    if finding == "BORDERLINE":
        assert "the busiest minute brings 14" in found.summary
        assert found.missing[0].startswith("a sweep of known model and GPU")
        assert found.ratio.lo < 1 < found.ratio.value
    else:
        assert any("times as many of the requests as the SLO allows" in one
                   for one in found.rests_on)  # fmt: skip


def test_the_busiest_part_alone_proves_nothing_of_a_whole_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its busiest part has to agree with all of it, in either direction."""
    for held, missed, finding in (
        ((0.5, 0.7), 0.4, "BORDERLINE"), ((0.5, 0.7), 1.1, "UNDER_SIZED"),
        ((1.5, 2.0), 0.4, "RIGHT_SIZED"), ((1.5, 2.0), 1.1, "BORDERLINE"),
    ):  # fmt: skip
        replayed = Trial(sum(held) / 2, *held, 0.5, None, 400, "of the observed requests")
        monkeypatch.setattr(files, "trial", lambda *_, given=replayed, **__: given)
        monkeypatch.setattr(files, "whole", lambda *_, given=missed: given)
        found = said(sweep_of(), trace(2.0))
        assert found.finding == finding
        assert ("in their busiest part" in found.summary) == (finding == "BORDERLINE")


# ----------------------------------------------------------------------------------- as a command


def test_the_command_takes_a_trace_of_azure(capsys: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    levels = [{"concurrency": float(load), "output_tokens_per_s": rate, "ttft_ms": {"mean": ttft},
               "itl_ms": None} for load, (rate, ttft) in LOADS.items()]  # fmt: skip
    target = {"model": "llama-3.1-8b", "gpus": [{"name": "NVIDIA H100 80GB HBM3"}], "url": None}
    file.write_text(json.dumps({"levels": levels, "target": target}))
    given = ("assess", "--curve", str(file), "--demand", str(GOLDEN / "azure-2023-code.csv"))
    code, out, err = agent(capsys, *given, "--slo", "ttft:mean<500ms")
    assert (code, err) == (0, "")
    assert "confirm with: loadgen sweep URL " in out
    assert "requests/s alone are declared" in out
