"""What was observed of a service, and how it is to be judged: the nouns of production's rules.

Pure. A window of minute records becomes hours with their latencies, time on weekends, the two sides
of Little's law and clocks held down. The rules (`agent.sizing.production`) read them, and `Needs`
has every number that those hang on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from agent.model import Reason, Slo
from agent.sizing.case import Unit
from agent.sizing.pattern import Pattern
from agent.sizing.trial import Trial
from agent.sizing.window import Window
from agent.stats import Floats, merged, quantile

HOUR_S = 3600
DAY_S = 86_400
WEEK_S = 7 * DAY_S


class Needs(msgspec.Struct, frozen=True):
    """Every number that these findings hang on. A demonstration may shorten the times; the verdict
    then says so."""

    idle_s: float = DAY_S
    """Observed at least so long for IDLE …"""
    idle_busy_max: float = 0.01
    """… and under this share of it with a request in flight."""
    right_s: float = HOUR_S
    """Observed at least so long for RIGHT_SIZED: an evening's peak is not in five minutes."""
    over_s: float = 14 * DAY_S
    """Observed at least so long for OVER_SIZED, with the weekends that so long has (two)."""
    over_ratio_max: float = 0.85
    """OVER_SIZED: the largest demand over the surely held load of the smaller configuration."""
    covered_min: float = 0.9
    """Share of those times that was really observed: gaps come."""
    hours_min: int = 3
    """Hours in which the SLO broke for UNDER_SIZED, or was kept for RIGHT_SIZED without a sweep."""
    requests_min: int = 30
    """Requests of an hour for its latency to count."""
    rejected_max: float = 0.01
    """Share of requests turned away above which the observed demand is not all of it."""
    hours_broken_max: float = 0.01
    """Share of the hours that may break the SLO: what the P99 over the hours leaves out."""
    over_exit: float = 0.92
    """What is OVER_SIZED stays so until that ratio reaches this."""
    over_daily: int = 3
    """So many verdicts, a day apart, have to find OVER_SIZED for it to be said …"""
    under_windows: int = 2
    """… and so many in a row UNDER_SIZED, where something else was said before."""
    under_exit: float = 0.95
    """What is UNDER_SIZED stays so until the demand is at most this share of the capacity."""
    off_peak_s: float = WEEK_S
    """Observed at least so long for OVER_OFF_PEAK, most hours of the week among it …"""
    off_peak_seen: float = 0.8
    """… which is this share of the time and of those hours …"""
    off_peak_ratio: float = 0.3
    """… with a demand of at least this share of the capacity at the peak …"""
    off_peak_hours: int = 56
    """… and so many hours of the week with less than 30 % of the busiest one's load."""
    little_error: float = 0.25
    """In flight and throughput · E2E further apart: the telemetry is wrong."""
    little_s: float = 3000.0
    """Asked of at least so much time in flight, over all requests …"""
    little_requests: int = 100
    """… and so many of them."""
    throttled: float = 0.05
    """Share of the busy time with clocks held down from which it is a reason."""
    retries: float = 0.05
    """Share of requests given up or turned away from which repetitions inflate the demand."""
    bursts: float = 3.0
    """Variance over mean of the arrivals per minute within their hours, for BURST_ONLY."""
    peak: float = 3.0
    """Busiest hour of the week over the mean, for DIURNAL_PEAK."""
    prefix_hits: float = 0.3
    """Share of the prompts found in the prefix cache from which the verdict hangs on it."""


USUAL = Needs()


class Said(msgspec.Struct, frozen=True):
    """A statistic of the SLO in one hour, ms; it surely lies from `lo` to `hi` (null: no end)."""

    n: float
    value: float
    lo: float
    hi: float | None


class Little(msgspec.Struct, frozen=True):
    """Time in flight of all requests, in s: by the gauges, and by how long each took (E2E)."""

    sampled_s: float
    summed_s: float
    requests: float


class Heat(msgspec.Struct, frozen=True):
    """Share of the time with requests in flight in which clocks were held down, and the bits that
    the driver gave for it."""

    share: float
    bits: int


class Hour(msgspec.Struct, frozen=True):
    """One hour of a service; `said` has a place for each target, null where it was not measured."""

    start_unix_s: float
    concurrency: float
    waiting: float
    preemptions: float
    kv_usage_max: float | None
    said: tuple[Said | None, ...]


class Scene(msgspec.Struct, frozen=True):
    """What was observed of a service, and how its verdict is to be made.

    `curve`: what the verdict of the judge is made from. `declared_slo`: the SLO was given for this
    service, not taken from a sweep. `replicas` share the demand evenly: capacity and demand are of
    one of them. `doubts`: why the curve may not be used to take hardware away. `weekend_s`:
    observed time on Saturdays and Sundays. `missing`: what choosing the curve found to be missing.
    `trial`: the demand replayed, where the sweep's engine could be fitted. `held_half`: what half
    of the device surely holds, by the curve. `wrong`: why the sweep does not count.
    """

    pattern: Pattern
    hours: tuple[Hour, ...]
    slo: tuple[Slo, ...] = ()
    declared_slo: bool = False
    curve: Literal["measured", "passive", "none"] = "none"
    replicas: int = 1
    expect_concurrency: float | None = None
    trains: bool = False
    simulated: bool = False
    weekend_s: float = 0.0
    doubts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    rests_on: tuple[str, ...] = ()
    target: str = "URL"
    needs: Needs = Needs()
    trial: Trial | None = None
    held_half: dict[Unit, float | None] = {}
    little: Little | None = None
    heat: Heat | None = None
    wrong: Reason | None = None

    @property
    def seen(self) -> str:
        return span(self.pattern.covered_s)

    @property
    def busy_ratio(self) -> float | None:
        """Share of the time with a request in flight, at most: that of the minutes that had one,
        and the mean number in flight, which a time with one adds at least itself to."""
        pattern = self.pattern
        if pattern.quiet.idle_ratio is None:
            return None
        busy = 1 - pattern.quiet.idle_ratio
        mean = pattern.concurrency.mean
        return busy if mean is None else min(busy, max(mean, 0.0))

    @property
    def idle_w(self) -> float | None:
        """What its GPUs draw while nothing is asked; null where a minute of that was not seen."""
        energy = self.pattern.energy
        if energy.idle_j is None or energy.idle_s < 60:
            return None
        return energy.idle_j / energy.idle_s


def span(seconds: float) -> str:
    """A length of time in the unit that a person would take."""
    for unit, length in (("day", DAY_S), ("hour", HOUR_S), ("minute", 60), ("second", 1)):
        if seconds >= 0.95 * 2 * length or unit == "second":
            return f"{seconds / length:.3g} {unit}s"
    raise AssertionError


def percent(ratio: float | None) -> str:
    """A load as a share of what is held."""
    if ratio is None:
        return "?"
    return f"{100 * ratio:.0f} %" if ratio < 10 else "over ten times"


# ------------------------------------------------------------------------------------------ hours

_HISTOGRAMS = {"ttft": "ttft_seconds", "itl": "itl_seconds", "tpot": "tpot_seconds",
               "e2e": "e2e_seconds"}  # fmt: skip
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def hours(window: Window, slo: Sequence[Slo]) -> tuple[Hour, ...]:
    """The observed clock hours of a window, in order of time."""
    weights = window.weights_s()
    of = np.floor(window.starts_unix_s / HOUR_S)
    in_flight, waiting = window.in_flight("mean"), window.total("requests_waiting", "mean")
    preemptions, kv_usage = window.total("preemptions_total"), window.kv_usage("max")
    found = []
    for hour in np.unique(of[weights > 0]):
        here = (of == hour) & (weights > 0)
        seconds = weights[here]
        fullest = kv_usage[here][~np.isnan(kv_usage[here])]
        found.append(
            Hour(
                start_unix_s=float(hour) * HOUR_S,
                concurrency=float((in_flight[here] * seconds).sum() / seconds.sum()),
                waiting=float((waiting[here] * seconds).sum() / seconds.sum()),
                preemptions=float(preemptions[here].sum()),
                kv_usage_max=float(fullest.max()) if fullest.size else None,
                said=tuple(_said(window, target, here.astype(float)) for target in slo),
            )
        )
    return tuple(found)


def _said(window: Window, target: Slo, places: Floats) -> Said | None:
    name = _HISTOGRAMS.get(target.metric)
    if name is None:
        return None
    if target.statistic == "mean":
        n = float(window.total(f"{name}_count")[places > 0].sum())
        mean = 1e3 * float(window.total(f"{name}_sum")[places > 0].sum()) / n if n > 0 else 0.0
        return Said(n, mean, mean, mean) if n > 0 else None
    share = _QUANTILES.get(target.statistic)
    histograms = merged(window.histograms(name, places))
    at = quantile(histograms, share) if share is not None else None
    if at is None:
        return None
    n = math.fsum(one.n for one in histograms)
    return Said(n, 1e3 * at.value, 1e3 * at.lo, None if at.hi is None else 1e3 * at.hi)


def weekend_s(window: Window) -> float:
    """How long Saturdays and Sundays (UTC) were observed."""
    weights = window.weights_s()
    days = np.floor(window.starts_unix_s / DAY_S).astype(int)
    is_weekend = (days + 3) % 7 >= 5  # 1970-01-01 was a Thursday
    return float(weights[is_weekend].sum())


def little(window: Window) -> Little | None:
    """The two sides of Little's law over the minutes in which nothing was marked; null where the
    server keeps no E2E times, or requests that were given up are not in them."""
    if not (window.has("e2e_seconds_sum") and window.has("requests_running")):
        return None
    odd = window.marked("gap", "restart", "clock_jump", "changed") > 0
    steady = (window.weights_s() >= 0.9 * window.record_s) & ~odd
    in_flight = window.in_flight("mean") * window.weights_s()
    finished = float(window.total("requests_finished_total")[steady].sum())
    lost = float(window.total("requests_aborted_total")[steady].sum())
    if lost > 0.05 * finished:
        return None
    return Little(
        sampled_s=float(in_flight[steady].sum()),
        summed_s=float(window.total("e2e_seconds_sum")[steady].sum()),
        requests=float(window.total("e2e_seconds_count")[steady].sum()),
    )


def heat(window: Window) -> Heat | None:
    """How much of the busy time clocks were held down; null where no GPU tells it."""
    busy = (window.weights_s() > 0) & (window.in_flight("mean") > 0)
    shares, bits = [], 0
    for gpu in window.gpus.values():
        told = gpu.get("gpu_throttled", "mean")
        known = busy & ~np.isnan(told)
        if known.any():
            shares.append(float(told[known].mean()))
            causes = gpu.get("gpu_clock_event_reasons", "max")[known]
            for one in np.unique(causes[~np.isnan(causes)]):
                bits |= int(one)
    return Heat(max(shares), bits) if shares else None
