"""The demand on trial: the engine that a sweep showed, and what of it more and less would serve."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from agent.model import (
    Level,
    ServerView,
    Slo,
    Stats,
    Sweep,
    Target,
    TargetGpu,
    UsageError,
    Workload,
)
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.curve import parse_slo
from agent.sizing.engine import EngineSpec, kv_capacity_tokens
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.replay import Replayed, capacity_ratio, replay
from agent.sizing.simulate import closed_loop
from agent.sizing.trial import (
    Trial,
    _at_speed,
    _dense,
    _share,
    fitted,
    half,
    same_settings,
    trial,
)

SPEC = EngineSpec(gpu("l4"), model("llama-3.1-8b"), precision="fp8")
SLO = parse_slo("ttft:p95<2s,itl:p95<60ms")


def level(concurrency: int) -> Level:
    seen = closed_loop(SPEC, concurrency, 200, 200, 60.0)
    return Level(
        concurrency=concurrency,
        output_tokens_per_s=seen.output_tokens_per_s,
        request_throughput=seen.request_throughput,
        ttft_ms=seen.ttft_ms,
        prompt_tokens=Stats(mean=200.0, n=9),
        output_tokens=Stats(mean=200.0, n=9),
        server=ServerView(kv_capacity_tokens=kv_capacity_tokens(SPEC), running_max=concurrency),
    )


LEVELS = [level(concurrency) for concurrency in (1, 4, 16, 48)]


def sweep(**target: Any) -> Sweep:
    known = {"model": "llama-3.1-8b-fp8", "gpus": [TargetGpu("NVIDIA L4", "G")], **target}
    return Sweep(target=Target(**known), workload=Workload(input_tokens=200), levels=LEVELS)


def test_the_engine_is_that_of_the_sweep() -> None:
    found = fitted(sweep())
    assert (found.spec.gpu.name, found.spec.precision, found.spec.tp) == ("L4", "fp8", 1)
    assert kv_capacity_tokens(found.spec) == kv_capacity_tokens(SPEC)
    assert found.rms < 0.05


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"gpus": []}, "none told"),
        ({"gpus": [TargetGpu("NVIDIA B9000", "G")]}, "NVIDIA B9000"),
        ({"model": "somebody/own"}, "somebody/own"),
        (
            {"model": "llama-3.1-8b"},
            "off the best fit",
        ),  # twice the bytes could not be read so fast
    ],
)
def test_what_is_not_known_is_not_replayed(target: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fitted(sweep(**target))


def demand(rps: float) -> Arrivals:
    rng = np.random.default_rng(3)
    at_s = np.sort(rng.uniform(0, 300, round(300 * rps)))
    lengths = [rng.integers(150, 250, at_s.size) for _ in range(2)]
    return recorded(at_s, *lengths, window_s=300.0)


def tried(rps: float, slo: list[Slo] = SLO, replicas: int = 1, **more: Any) -> Trial:
    arrivals = msgspec.structs.replace(demand(rps), **more)
    rng = np.random.default_rng(0)
    return trial(fitted(sweep()), arrivals, slo, replicas=replicas, rng=rng, requests=100)


def test_more_demand_is_less_often_served() -> None:
    slo = parse_slo("itl:p95<45ms")
    little, much = tried(0.2, slo), tried(9.0, slo)
    assert little.lo > 1 > much.hi
    for one in (little, much):
        assert one.lo <= one.value <= one.hi
        ratio = one.ratio
        assert ratio.lo is not None
        assert ratio.hi is not None
        assert ratio.lo <= ratio.value <= ratio.hi


def test_a_verdict_takes_few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an hourly verdict costs: the agent has half a percent of a core for all it does."""
    replayed: list[int] = []

    def counted(spec: EngineSpec, arrivals: Arrivals, **more: Any) -> Replayed:
        replayed.append(len(arrivals))
        return replay(spec, arrivals, **more)

    monkeypatch.setattr("agent.sizing.replay.replay", counted)
    found = tried(0.4, parse_slo("itl:p95<45ms"), replicas=2)
    assert found.smaller > 1  # all that can be asked was
    assert len(replayed) <= 40


def test_what_a_trial_says_holds_to_the_whole_interval_of_each_replay() -> None:
    """Ends that are not asked for are left out of the search, not of the answer."""
    slo, found = parse_slo("itl:p95<45ms"), tried(1.0, parse_slo("itl:p95<45ms"))
    arrivals = _share(demand(1.0), 1, np.random.default_rng(0))
    whole = capacity_ratio(fitted(sweep()).engine, arrivals, slo)
    assert whole.lo <= found.value <= (whole.hi or np.inf)
    assert found.lo <= whole.lo
    assert found.hi >= whole.value


def test_half_the_device_is_slower_at_once() -> None:
    assert tried(0.1).smaller < 1 / 64 + 1e-9  # 80 ms a token, whatever the load
    assert half(SPEC).gpu.bandwidth_bytes_per_s == SPEC.gpu.bandwidth_bytes_per_s / 2
    assert kv_capacity_tokens(half(SPEC)) <= kv_capacity_tokens(SPEC) / 2


def test_a_replica_less_serves_less() -> None:
    found = tried(0.4, parse_slo("itl:p95<45ms"), replicas=2)
    assert 1 < found.smaller < found.lo


def test_without_the_prefix_cache_less_is_served() -> None:
    arrivals = demand(1.0)
    slo = parse_slo("ttft:p95<90ms")
    cached = tried(1.0, slo, cached_tokens=arrivals.prompt_tokens - 1)
    assert cached.uncached is not None
    assert cached.uncached < cached.value
    assert tried(1.0, slo).uncached is None


def test_no_request_or_an_slo_of_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no request came"):
        tried(0.0)
    with pytest.raises(UsageError, match="ttfo"):
        tried(0.3, parse_slo("ttfo:p95<1s"))


@pytest.mark.parametrize(("hours", "left_out"), [(3, 0), (24, 0), (300, 2)])
def test_one_hour_in_a_hundred_is_left_out_and_of_fewer_none(hours: int, left_out: int) -> None:
    """The n-th hour has n requests."""
    at_s = [3600.0 * hour + n for hour in range(hours) for n in range(hour + 1)]
    every = recorded(at_s, [10] * len(at_s), [10] * len(at_s))
    kept = _share(every, 1, np.random.default_rng(0))
    assert int(kept.hours.max()) == hours - 1 - left_out


def test_of_a_busy_service_the_densest_quarter_of_an_hour_is_replayed() -> None:
    at_s = np.concatenate((np.linspace(0, 1800, 200), np.linspace(1800, 2700, 400)))
    lengths = np.full(600, 10)
    dense = _dense(recorded(at_s, lengths, lengths, window_s=3600.0), 100)
    assert dense.at_s[0] == pytest.approx(1800, abs=10)
    assert len(dense) == pytest.approx(400, abs=5)
    many = recorded(np.linspace(0, 900, 25_000), *np.ones((2, 25_000), int), window_s=3600.0)
    with pytest.raises(UsageError, match="more than are replayed"):
        _dense(many, 100)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({"blocks": "1000"}, {"blocks": "1010"}, True),
        ({"blocks": "1000"}, {"blocks": "1200"}, False),
        ({"dtype": "fp8"}, {"dtype": "auto"}, False),
        ({"flag": "0"}, {"flag": "1"}, False),
        ({"share": "0.9"}, {"share": "0.92"}, False),
        ({"a": "x"}, {"a": "x", "b": "y"}, False),
    ],
)
def test_what_a_start_measures_of_its_memory_is_no_change(
    before: dict[str, str], now: dict[str, str], same: bool
) -> None:
    assert same_settings(before, now) == same


def test_the_fast_end_of_an_engine_at_its_data_sheet_is_that() -> None:
    found = fitted(sweep())
    full = msgspec.structs.replace(found.engine.efficiencies, eta_b=0.99)
    found.engine = msgspec.structs.replace(found.engine, efficiencies=full)
    assert _at_speed(found, 1).efficiencies.eta_b == 1.0
    assert _at_speed(found, -1).efficiencies.eta_b < 0.99
