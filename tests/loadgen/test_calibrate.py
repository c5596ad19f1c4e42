"""What is concluded from a calibration, how it is kept, and a short real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Stats, UsageError
from loadgen import calibrate
from loadgen import cli as module
from loadgen.calibrate import Calibration, Figures, Part, Result, Trial, processes_for
from tests.e2e.command import loadgen

KEPT = Calibration(
    machine=calibrate.this_machine(),
    at="2026-11-23T12:00:00Z",
    bound_ms=5,
    server="c",
    token_events_per_s_max=80_000,
    token_streams=850,
    streams_max=10_000,
    requests_per_s_max=9_000,
    open_rps_max=4_000,
    us_per_event=9.6,
    us_per_request=44,
    memory_mb=210,
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("loadgen.worker.ask_for_the_processor", lambda: None)


# -------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("streams", "token_events_per_s", "requests_per_s", "cores", "processes"),
    [
        (0, 0, 0, 8, 1),
        (640, 64_000, 0, 8, 1),  # 80 % of what one holds
        (650, 65_000, 0, 8, 2),
        (320, 32_000, 1_601, 8, 2),  # half and half: they share a processor
        (10_000, 10_000, 0, 8, 1),
        (10_001, 10_000, 0, 8, 2),
        (10_000, 1_000_000, 0, 8, 8),  # never more than there are cores
        (10_000, 1_000_000, 0, 1, 1),
    ],
)
def test_processes_for(
    streams: float, token_events_per_s: float, requests_per_s: float, cores: int, processes: int
) -> None:
    got = processes_for(
        KEPT, streams=streams, token_events_per_s=token_events_per_s,
        requests_per_s=requests_per_s, cores=cores,
    )  # fmt: skip
    assert got == processes


def test_a_machine_that_was_never_calibrated_gets_a_process_per_40_000_token_events() -> None:
    def asked(events: float, rps: float = 0) -> int:
        return processes_for(
            None, streams=1, token_events_per_s=events, requests_per_s=rps, cores=64
        )

    assert [asked(40_000), asked(40_001), asked(200_000)] == [1, 2, 5]
    assert [asked(0, 1_600), asked(0, 1_601)] == [1, 2]


load_numbers = st.floats(0, 1e7)


@given(load_numbers, load_numbers, load_numbers, st.integers(1, 256), st.booleans())
def test_processes_are_within_the_cores_and_no_fewer_for_more_load(
    streams: float, events: float, rps: float, cores: int, known: bool
) -> None:
    def asked(streams: float, events: float, rps: float) -> int:
        return processes_for(
            KEPT if known else None, streams=streams, token_events_per_s=events,
            requests_per_s=rps, cores=cores,
        )  # fmt: skip

    n = asked(streams, events, rps)
    assert 1 <= n <= cores
    assert min(asked(2 * streams, events, rps), asked(streams, 2 * events, rps)) >= n
    assert asked(streams, events, 2 * rps) >= n


# ----------------------------------------------------------------------------------------- search


@given(st.integers(0, 20_000), st.integers(1, 16_000))
async def test_the_search_ends_close_under_the_limit(limit: int, start: int) -> None:
    tried = []

    async def holds(load: int) -> bool:
        tried.append(load)
        return load <= limit

    found = await calibrate.largest(start, 4, 16_000, 40, holds)
    assert len(set(tried)) == len(tried)
    assert found <= limit
    if 4 <= limit < 16_000:
        # Of small whole numbers there may be none between.
        assert found * calibrate.CLOSE_ENOUGH >= limit or found + 1 > limit - 1
    if limit >= 16_000:
        assert found == 16_000


@given(st.integers(0, 20_000), st.integers(1, 16_000), st.integers(1, 6))
async def test_the_search_keeps_to_its_steps(limit: int, start: int, steps: int) -> None:
    tried = []

    async def holds(load: int) -> bool:
        tried.append(load)
        return load <= limit

    found = await calibrate.largest(start, 4, 16_000, steps, holds)
    assert len(tried) <= steps
    assert found == max((load for load in tried if load <= limit), default=0)


# ---------------------------------------------------------------------------------------- verdicts

STREAMS = Part("tokens", 50, 10, 64, seconds=1.6)
OPEN = Part("arrivals", 5, 0, 1, seconds=2, stream=False, open_loop=True)
FAST = Part("requests", 0, 0, 1, seconds=2, stream=False, judged=False)


def stats(mean: float, p99: float) -> Stats:
    return Stats(mean=mean, p99=p99, n=100)


def trial(**changes: Any) -> Trial:
    side = Figures(
        ttft_ms=stats(50, 65), itl_ms=stats(10, 13), reply_ms=stats(680, 700),
        tokens_per_s=100 * STREAMS.pace, requests_per_s=147,
    )  # fmt: skip
    base = Trial(
        part="tokens", what="100 streams", load=100, true=side, reported=side, failed=0, held=100,
        send_lag_p99_ms=0.5, client_cpu=0.2, us_per_event=10, own_lag_p99_ms=0.1, reasons=[],
    )  # fmt: skip
    reported = msgspec.structs.replace(side, **changes.pop("reported", {}))
    true = msgspec.structs.replace(side, **changes.pop("true", {}))
    return msgspec.structs.replace(base, true=true, reported=reported, **changes)


@pytest.mark.parametrize(
    ("part", "changes", "reasons"),
    [
        (STREAMS, {}, []),
        (STREAMS, {"reported": {"ttft_ms": stats(54.9, 69.9)}}, []),
        (STREAMS, {"reported": {"ttft_ms": stats(56, 66)}}, ["TTFT mean is off by +6 ms"]),
        (STREAMS, {"reported": {"ttft_ms": stats(44, 66)}}, ["TTFT mean is off by -6 ms"]),
        (STREAMS, {"reported": {"ttft_ms": stats(50, 80)}}, ["TTFT p99 is off by +15 ms"]),
        (STREAMS, {"reported": {"itl_ms": stats(10, 20)}}, ["ITL p99 is off by +7 ms"]),
        (STREAMS, {"reported": {"itl_ms": Stats()}}, ["ITL p99 was not measured"]),
        (STREAMS, {"reported": {"tokens_per_s": 9_000}}, ["tokens/s are off by -4.4%"]),
        (STREAMS, {"true": {"tokens_per_s": 7_000}, "reported": {"tokens_per_s": 7_000}},
         ["server and client together reached 74% of the pace asked for"]),
        (STREAMS, {"true": {"tokens_per_s": 0}}, ["the server sent nothing"]),
        (STREAMS, {"held": 99}, ["99 of 100 streams were held"]),
        (STREAMS, {"failed": 3}, ["3 requests failed"]),
        (OPEN, {"held": 1}, []),
        (OPEN, {"send_lag_p99_ms": 6.0}, ["requests were sent 6.00 ms late (p99)"]),
        (OPEN, {"reported": {"reply_ms": stats(690, 700)}}, ["reply mean is off by +10 ms"]),
        (FAST, {"reported": {"reply_ms": stats(690, 700)}, "held": 1}, []),
        (FAST, {"failed": 3}, ["3 requests failed"]),
    ],
)  # fmt: skip
def test_why_a_trial_was_too_much(part: Part, changes: dict[str, Any], reasons: list[str]) -> None:
    assert calibrate.reasons_against(part, trial(**changes), 5.0) == reasons


def test_the_conclusion_says_what_was_found_in_words() -> None:
    lines = calibrate.conclusion(Result(1, KEPT, [], []))
    assert lines[0] == (
        "One process measures 80,000 token events/s (850 streams) with TTFT and ITL within 5 ms "
        "of the truth, for 9.60 µs of CPU each."
    )
    assert "10,000 streams open, in 210 MB" in lines[1]
    assert "a schedule of 4,000 requests/s" in lines[2]
    slow = msgspec.structs.replace(KEPT, server="python")
    assert "install cc" in calibrate.conclusion(Result(1, slow, [], []))[0]


def test_the_conclusion_where_nothing_was_held() -> None:
    failed = msgspec.structs.replace(trial(load=4), reasons=["TTFT mean is off by +9 ms"])
    lines = calibrate.conclusion(Result(1, None, [failed], []))
    assert lines[0] == "Nothing: even 4 streams were too much here (TTFT mean is off by +9 ms)."


# ----------------------------------------------------------------------------------------- keeping


def test_what_is_kept_is_loaded_again() -> None:
    assert calibrate.load() is None
    path = calibrate.save(KEPT)
    assert calibrate.load() == KEPT
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("field", ["host", "cpu_model", "python", "tool_version"])
def test_another_machine_or_version_is_none(field: str) -> None:
    other = msgspec.structs.replace(KEPT.machine, **{field: "another"})
    calibrate.save(msgspec.structs.replace(KEPT, machine=other))
    assert calibrate.load() is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"machine":', "\xff"])
def test_a_file_that_is_none_of_ours_is_none(text: str) -> None:
    path = calibrate.save(KEPT)
    path.write_bytes(text.encode("latin-1"))
    assert calibrate.load() is None


def test_a_calibration_of_nothing_is_none() -> None:
    """It would be divided by."""
    calibrate.save(msgspec.structs.replace(KEPT, token_events_per_s_max=0))
    assert calibrate.load() is None


def test_a_data_directory_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    assert calibrate.load() is None
    with pytest.raises(UsageError, match="XDG_DATA_HOME"):
        calibrate.save(KEPT)


# --------------------------------------------------------------------------------------- for real


def test_a_short_one_against_the_slow_server(tmp_path: Path) -> None:
    """Without a compiler, and with a bound that most machines keep whatever else they do."""
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    done = loadgen(
        tmp_path, "calibrate", "--quick", "--bound", "100ms", "--json", "-",
        env={"PATH": str(nothing), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert any("no C compiler" in note for note in result["notes"])
    assert "16 streams × 94.1 tokens/s" in done.stderr
    first = result["trials"][0]
    assert first["true"]["ttft_ms"]["mean"] == pytest.approx(50, abs=20)
    assert first["reported"]["ttft_ms"]["mean"] == pytest.approx(
        first["true"]["ttft_ms"]["mean"], abs=20
    )
    assert first["us_per_event"] > 0
    found = result["calibration"]
    assert done.returncode == (0 if found else 3)
    if found:  # else the machine was too busy for its own bounds, and that was said
        assert found["server"] == "python"
        assert 500 < found["token_events_per_s_max"] < 4_000
        parts = {"tokens", "slow streams", "requests", "arrivals"}
        assert {one["part"] for one in result["trials"]} == parts
    assert not list(tmp_path.rglob("calibration-*.json"))  # a quick look is not kept


@pytest.mark.parametrize("quick", [False, True])
def test_what_was_found_is_kept_unless_it_was_a_quick_look(
    quick: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run(self: calibrate.Calibrator) -> Result:
        return Result(1, KEPT, [trial()], [])

    monkeypatch.setattr(calibrate.Calibrator, "run", run)
    assert module._guarded(["calibrate", *(["--quick"] if quick else [])]) == 0
    out, said = capsys.readouterr()
    assert "100 streams" in out
    assert "One process measures 80,000 token events/s" in out
    assert ("kept in" in said) is not quick
    assert calibrate.load() == (None if quick else KEPT)


def test_where_nothing_is_held_nothing_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Within a nanosecond of the truth is too much to ask."""
    code = module._guarded(["calibrate", "--quick", "--bound", "0.000001ms"])
    out, _ = capsys.readouterr()
    assert code == 3
    assert "Nothing: even" in out
    assert calibrate.load() is None


def test_a_bound_that_is_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert module._guarded(["calibrate", "--bound", "soon"]) == 2
    assert "--bound 'soon'" in capsys.readouterr().err
