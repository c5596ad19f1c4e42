"""What a curve alone proves of recorded requests: too many met too many others, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Level, Stats
from agent.sizing import curve as curves
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.crowd import full_share, overload

SLO = curves.parse_slo("ttft:p95<1s")


def level(streams: int, rate: float, p50: float, p95: float) -> Level:
    return Level(
        concurrency=streams,
        output_tokens_per_s=100 * rate,
        request_throughput=rate,
        ttft_ms=Stats(mean=p50, p50=p50, p90=p95, p95=p95, n=2000),
    )


CURVE = curves.points([level(1, 1, 50, 60), level(8, 6, 200, 300), level(32, 10, 1500, 3000)])
FLAT = curves.points([level(1, 1, 50, 60), level(8, 6, 60, 70), level(32, 6.1, 70, 80)])


def even(rate: float, seconds: float) -> Arrivals:
    at_s = np.arange(0, seconds, 1 / rate)
    return recorded(at_s, np.full(at_s.size, 500), np.full(at_s.size, 100))


@pytest.mark.parametrize(
    ("rate", "seconds", "broken"),
    [(5, 600, False), (9, 600, False), (11, 600, True), (30, 600, True), (30, 1, False)],
)
def test_a_rate_is_too_much_once_more_meet_a_broken_load_than_the_slo_allows(
    rate: float, seconds: float, broken: bool
) -> None:
    proven = overload(CURVE, SLO, even(rate, seconds), (500, 100), saturated=False) >= 1
    assert proven == broken


def test_a_burst_that_is_few_of_the_requests_proves_nothing() -> None:
    calm, burst = even(2, 3600), even(50, 4)
    at_s = np.concatenate([calm.at_s, 1000 + burst.at_s])
    both = recorded(at_s, np.full(at_s.size, 500), np.full(at_s.size, 100))
    assert overload(CURVE, SLO, both, (500, 100), saturated=False) < 1
    assert overload(CURVE, SLO, burst, (500, 100), saturated=False) >= 1


def test_requests_weigh_what_they_are_to_the_swept_ones() -> None:
    """By prompt and by reply: what only one of them shows is not proven."""
    some = even(6, 600)
    assert overload(CURVE, SLO, some, (250, 50), saturated=False) >= 1
    assert overload(CURVE, SLO, some, (250, 100), saturated=False) < 1
    assert overload(CURVE, SLO, some, (None, None), saturated=False) < 1


def test_a_minute_of_work_ahead_is_too_much_whatever_was_measured() -> None:
    """A saturated curve whose latencies all kept the SLO, and one without an SLO."""
    for slo in (SLO, []):
        assert overload(FLAT, slo, even(12, 600), (500, 100), saturated=True) >= 1
        assert overload(FLAT, slo, even(12, 60), (500, 100), saturated=True) < 1
        assert overload(FLAT, slo, even(12, 600), (500, 100), saturated=False) < 1
        assert overload([], slo, even(12, 600), (500, 100), saturated=True) == 0


def test_a_mean_is_broken_by_what_all_met_at_least() -> None:
    slo = curves.parse_slo("ttft:mean<1s")
    assert overload(CURVE, slo, even(30, 600), (500, 100), saturated=False) >= 1
    assert overload(CURVE, slo, even(9, 600), (500, 100), saturated=False) < 1


@given(
    st.lists(st.floats(0, 50), min_size=1, max_size=40),
    st.floats(1, 20), st.floats(0.1, 20), st.floats(1, 3),
)  # fmt: skip
def test_a_faster_leak_fills_no_more_and_heavier_requests_no_less(
    gaps: list[float], size: float, rate: float, more: float
) -> None:
    at_s, work = np.cumsum(gaps), np.ones(len(gaps))
    share = full_share(at_s, work, size, rate)
    assert 0 <= share <= 1
    assert full_share(at_s, work, size, rate * more) <= share
    assert full_share(at_s, work * more, size, rate) >= share
