"""How a running level stands, and the estimate of the rest."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Level, Stats
from loadgen import moment
from loadgen.level import Plan
from loadgen.recorder import Counts
from loadgen.search import Sample


def level(load: int, rps: float, e2e_ms: float = 0.0) -> Level:
    return Level(concurrency=load, request_throughput=rps, e2e_ms=Stats(mean=e2e_ms, n=9))


def plan(load: int, requests: int) -> Plan:
    return Plan("concurrency", concurrency=load, requests=requests)


def test_a_moment_of_counts() -> None:
    counts = Counts(
        ok=10, failed=2, tokens=800, ramp_end_ns=1, failures={"cut": 2},
        ttft_sum_ns=500_000_000, ttfts=10, itl_sum_ns=1_000_000_000, gaps=100.0,
    )  # fmt: skip
    counted = Plan("concurrency", concurrency=4, requests=20, warmup_requests=4)
    by_requests = moment.of(counted, counts, 4, 3.0)
    assert by_requests.share == 0.5
    assert by_requests.left_s == 3.0
    assert by_requests.phase == "measuring"
    assert (by_requests.ttft_mean_ms, by_requests.itl_mean_ms) == (50.0, 10.0)
    assert by_requests.errors == {"cut": 2}
    by_time = Plan("rate", rate_rps=2.0, duration_s=10.0, warmup_s=2.0)
    assert moment.of(by_time, Counts(), 0, 1.0).phase == "warm-up"
    assert moment.of(by_time, counts, 4, 6.0).share == 0.5
    after = moment.of(by_time, counts, 4, 13.0)
    assert (after.phase, after.share, after.left_s) == ("last replies", 1.0, 0.0)
    assert moment.of(by_time, Counts(), 0, 0.1).left_s is None


@given(st.integers(2, 1_000), st.floats(0.1, 1_000))
def test_a_long_level_keeps_few_samples_and_its_rate(many: int, per_s: float) -> None:
    samples: list[Sample] = []
    for n in range(many):
        moment.keep(samples, Sample(n / 2, int(per_s * n), n, 4))
        assert len(samples) <= moment.SAMPLES_MAX
        assert samples[-1].at_s == n / 2
    assert samples[0].at_s == 0
    gaps = [b.at_s - a.at_s for a, b in pairwise(samples[:-1])]
    assert max(gaps, default=0.5) <= max(1.0, 5 * many / 2 / moment.SAMPLES_MAX)
    last = samples[-1]
    assert moment.rate_of(samples) == pytest.approx((last.tokens or last.ok) / last.at_s)


def test_a_rate_needs_two_instants() -> None:
    assert moment.rate_of([]) is None
    assert moment.rate_of([Sample(1.0, 5, 1, 1)] * 2) is None
    assert moment.rate_of([Sample(0.0, 0, 0, 1), Sample(2.0, 0, 8, 1)]) == 4.0


def test_the_rest_by_the_clock_is_what_the_plans_say() -> None:
    timed = Plan("concurrency", concurrency=4, duration_s=10.0, warmup_s=2.0)
    assert moment.later_s([timed] * 3, []) == 36.0
    assert moment.later_s([timed], [level(4, 2.0, 500.0)]) == 12.5
    assert moment.later_s([], []) == 0.0
    assert moment.later_s([Plan("rate", rate_rps=4.0, requests=40)], []) == 10.0
    assert moment.later_s([plan(4, 40)], []) is None, "nobody knows how long a request takes"


@given(st.floats(0.0, 1.0), st.floats(0.1, 100.0), st.integers(1, 500))
def test_the_rest_of_a_power_law_is_exact(power: float, first: float, load: int) -> None:
    """What grows as a power of the load is met between, at and beyond what was measured."""
    known = [level(at, first * at**power) for at in (1, 4, 16)]
    assert moment.later_s([plan(load, 100)], known) == pytest.approx(100 / (first * load**power))


def test_a_saturated_server_is_expected_to_stay_so() -> None:
    known = [level(1, 1.0), level(8, 8.0), level(16, 8.0), level(32, 7.0)]
    assert moment.later_s([plan(64, 70)], known) == pytest.approx(10.0)
    assert math.isclose(moment.later_s([plan(8, 80)], known) or 0, 10.0)


def test_an_estimate_is_no_finer_than_it_is() -> None:
    times = [moment.about(s) for s in (0.4, 19.0, 43.0, 99.0, 130.0, 5_000.0, 9_000.0)]
    assert times == ["~0 s", "~19 s", "~45 s", "~100 s", "~2 min", "~83 min", "~2.5 h"]
