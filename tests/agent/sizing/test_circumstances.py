"""What stands beside a finding: each reason with its evidence, and silent without it."""

from __future__ import annotations

import pytest

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.sizing.pattern import pattern
from agent.sizing.production import conclude
from agent.sizing.scene import Heat, Needs, Scene, hours
from agent.sizing.window import Window
from tests.agent.sizing.weeks import (
    BOUNDS,
    DAY,
    FAST,
    MONDAY,
    SLO,
    SLOW,
    codes,
    days,
    hour,
    judged,
    measured,
)


@pytest.mark.parametrize(
    ("heat", "code"),
    [
        (Heat(0.5, 0x40), "THROTTLED"), (Heat(0.5, 0x4), "POWER_CAPPED"),
        (Heat(0.01, 0x40), None), (None, None),
    ],
)  # fmt: skip
def test_clocks_that_are_held_down(heat: Heat | None, code: str | None) -> None:
    found = codes(measured(days(7, 12), heat=heat))
    assert found & {"THROTTLED", "POWER_CAPPED"} == ({code} if code else set())


def bursty(quiet: float, loud: float) -> list[Minute]:
    """Minutes of two hours: each fifth one loud. As many requests as in flight."""
    minutes = []
    for at in range(120):
        n = loud if at % 5 == 0 else quiet
        values = (
            MinuteValue("requests_running", (), 12, 40, 0, 40, 40),
            MinuteValue("requests_received_total", (), 12, 0, 0, 0, 0, n),
        )
        histograms = (MinuteHistogram("ttft_seconds", (), BOUNDS, SLOW),)
        minutes.append(Minute("chat", MONDAY + 60 * at, values, histograms, 60.0))
    return minutes


@pytest.mark.parametrize(("loud", "fires"), [(100, True), (12, False)])
def test_bursts(loud: float, fires: bool) -> None:
    minutes = bursty(10, loud)
    window = Window(MONDAY, MONDAY + 7200, servers=["chat"]).add_all(minutes)
    one = Scene(pattern(window), hours(window, SLO), SLO, True, "measured")
    found = conclude(one, judged(one))
    assert found.finding == "UNDER_SIZED"
    assert ("BURST_ONLY" in codes(found)) == fires


@pytest.mark.parametrize(("night", "fires"), [(1.0, True), (30.0, False)])
def test_a_peak_of_the_day(night: float, fires: bool) -> None:
    minutes = [
        hour(at, 40 if at % 24 in (11, 12) else night, ttft=SLOW if at % 24 in (11, 12) else FAST)
        for at in range(7 * 24)
    ]
    found = measured(minutes)
    assert found.finding == "UNDER_SIZED"
    assert ("DIURNAL_PEAK" in codes(found)) == fires


@pytest.mark.parametrize(("aborted", "fires"), [(20.0, True), (1.0, False)])
def test_requests_that_were_given_up(aborted: float, fires: bool) -> None:
    found = measured(days(7, 40, ttft=SLOW, requests_aborted_total=aborted))
    assert found.finding == "UNDER_SIZED"
    assert ("RETRY_INFLATED" in codes(found)) == fires


@pytest.mark.parametrize(("hits", "fires"), [(60.0, True), (10.0, False)])
def test_what_hangs_on_the_prefix_cache(hits: float, fires: bool) -> None:
    cache = {"prefix_cache_queries_total": 100.0, "prefix_cache_hits_total": hits}
    found = measured(days(7, 12, **cache))
    assert ("PREFIX_CACHE_DEPENDENT" in codes(found)) == fires


# ------------------------------------------------------------------------------------ in numbers


def test_the_evidence_stands_beside_every_finding() -> None:
    found = measured(days(7, 12), trains=True)
    assert found.demand["declared"] is False
    assert found.demand["concurrency"] == 12
    assert found.demand["observed"]["concurrency"]["max"] == 12
    assert found.demand["covered_s"] == 7 * DAY
    assert found.demand["observed"]["hours_of_week"] == {
        "observed": 168, "concurrency_p99": 12, "concurrency_max": 12,
    }  # fmt: skip
    assert found.questions == {
        "trains": "yes", "users": "service", "priority": "steady experience",
    }  # fmt: skip
    assert found.stability["ttft_p99_over_p50"] > 1
    assert "observed 12 concurrent requests" in found.summary
    assert "declared" not in found.summary


def test_shortened_times_are_told() -> None:
    found = measured(days(1, 5), needs=Needs(over_s=DAY))
    assert found.finding == "OVER_SIZED"
    assert any("OVER: 24 hours of observation were enough" in line for line in found.rests_on)
    assert not any("as configured" in line for line in measured(days(1, 5)).rests_on)
