"""What a curve alone proves of recorded requests: too many met too many others, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Level, Stats
from agent.sizing import curve as curves
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.crowd import _waits, full_share, kept, overload

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


# ------------------------------------------------------------------------------------------- kept


def bunched(together: int, every_s: float, times: int = 100) -> Arrivals:
    """So many at once, again and again."""
    at_s = np.repeat(every_s * np.arange(times), together)
    return recorded(at_s, np.full(at_s.size, 500), np.full(at_s.size, 100))


@pytest.mark.parametrize(
    ("some", "is_kept"),
    [(even(3, 600), True), (even(5.5, 600), True), (even(7, 600), False),
     (bunched(3, 10.0), True), (bunched(40, 100.0), False)],
    ids=["few", "as measured", "more", "a few together", "many together"],
)  # fmt: skip
def test_requests_are_kept_as_far_as_a_load_was_measured_to_keep_them(
    some: Arrivals, is_kept: bool
) -> None:
    """Eight at once keep the SLO at 6 requests/s: no mean rate says that 40 together do."""
    assert (kept(CURVE, SLO, some, (500, 100)) <= 1) == is_kept


def test_long_prompts_take_as_long_as_they_are() -> None:
    """One in ten prompts is four times as long as those that took 300 ms."""
    at_s = np.arange(0, 600, 1.0)
    prompts = np.where(np.arange(at_s.size) % 10 == 0, 2000, 200)
    some = recorded(at_s, prompts, np.full(at_s.size, 100))
    assert kept(CURVE[1:2], SLO, some, (500, 100)) > 1
    assert kept(CURVE[1:2], SLO, even(1, 600), (500, 100)) <= 1


def test_nothing_is_kept_by_a_curve_that_keeps_nothing() -> None:
    assert kept(CURVE, curves.parse_slo("ttft:p95<10ms"), even(1, 60), (500, 100)) == np.inf
    assert kept([], SLO, even(1, 60), (500, 100)) == np.inf


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 5)), min_size=1, max_size=40))
def test_a_line_is_lindleys(rows: list[tuple[float, float]]) -> None:
    gaps, work = map(np.array, zip(*rows, strict=True))
    wait, expected = 0.0, [0.0]
    for gap, one in zip(gaps[1:], work, strict=False):
        wait = max(0.0, wait + one - gap)
        expected.append(wait)
    assert _waits(np.cumsum(gaps), work) == pytest.approx(expected, abs=1e-9)


@given(st.integers(2, 40), st.floats(0.2, 5), st.floats(1.1, 4))
def test_more_at_once_is_never_kept_better(n: int, every_s: float, closer: float) -> None:
    some, tighter = bunched(2, every_s, n), bunched(2, every_s / closer, n)
    assert kept(CURVE, SLO, tighter, (500, 100)) >= kept(CURVE, SLO, some, (500, 100)) - 1e-9
