"""The passive curve: tokens/s and ITL against concurrency as production itself showed them.

Pure. Each usable minute is a point; minutes of about the same concurrency are one bin. A minute is
usable where it was observed whole, nothing was marked in it (restart, gap, clock, fingerprint),
requests were in flight and their number changed little. Only minutes since the fingerprint last
changed count: what another model or flag did is another curve.

Concurrency is the mean of a minute. Twelve samples tell it badly where requests are short, so it is
taken from the sums of TTFT and ITL where the server has them: each request in flight adds a second
to one of the two every second. They count only where they agree with the samples over the window.

What it cannot know: nobody chose these loads, so lengths may differ from bin to bin, and it reaches
no further than production went; nothing beyond `reaches` is said.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model import Level, Measurement, ServerView, Stats
from agent.sizing.window import Window
from agent.stats import Floats, batch_means_ci95, merged, quantile

Flags = NDArray[np.bool_]

COVERED_MIN = 0.9  # of a record
# How far the number in flight may range within a minute: over four deviations of independent
# arrivals, or three quarters of the mean where that is more, and two requests. Ramps range further.
RANGE_DEVIATIONS = 4.0
RANGE_SHARE = 0.75
RANGE_FLOOR = 2.0
UNIT_BINS = 8  # up to here a bin for each whole number, above it bins of equal ratio
BIN_RATIO = 1.2
AGREE_SHARE = 0.25  # further apart, one of two figures of the same thing is wrong
MINUTES_MIN = 2  # of a bin: fewer have no interval


class PassivePoint(msgspec.Struct, frozen=True):
    """The minutes of one bin. Rates and means are over all of their time; intervals are of 95 %,
    from the spread between minutes, which holds what their concurrency differs by, too."""

    concurrency: float  # mean in flight, running and waiting
    minutes: int
    observed_s: float
    output_tokens_per_s: float | None
    output_tokens_per_s_ci95: tuple[float, float] | None
    prompt_tokens_per_s: float | None
    request_throughput: float | None
    request_throughput_ci95: tuple[float, float] | None
    itl_ms: Stats
    itl_ms_ci95: tuple[float, float] | None
    ttft_ms: Stats
    ttft_ms_ci95: tuple[float, float] | None
    tpot_ms: Stats
    e2e_ms: Stats
    running: float
    waiting: float
    waiting_max: float
    kv_usage_mean: float | None
    kv_usage_max: float | None
    preemptions: float | None
    prefix_hit_rate: float | None
    queue_ms: float | None

    def level(self) -> Level:
        """The point as a level of a closed loop, at the nearest whole number of streams.

        Rates are carried there by Little's law, latencies being the same so near by;
        `measurement.in_flight_mean` has the concurrency that was observed.
        """
        streams = max(1, round(self.concurrency))
        there = streams / self.concurrency
        return Level(
            mode="concurrency",
            concurrency=streams,
            duration_s=self.observed_s,
            window_s=self.observed_s,
            request_throughput=_times(self.request_throughput, there),
            request_throughput_ci95=_both_times(self.request_throughput_ci95, there),
            output_tokens_per_s=_times(self.output_tokens_per_s, there),
            output_tokens_per_s_ci95=_both_times(self.output_tokens_per_s_ci95, there),
            total_tokens_per_s=_times(
                _plus(self.output_tokens_per_s, self.prompt_tokens_per_s), there
            ),
            ttft_ms=self.ttft_ms,
            itl_ms=self.itl_ms,
            tpot_ms=self.tpot_ms,
            e2e_ms=self.e2e_ms,
            measurement=Measurement(valid=True, reasons=[], in_flight_mean=self.concurrency),
            server=ServerView(
                running_mean=self.running,
                waiting_mean=self.waiting,
                waiting_max=self.waiting_max,
                kv_usage_mean=self.kv_usage_mean,
                kv_usage_max=self.kv_usage_max,
                preemptions=None if self.preemptions is None else round(self.preemptions),
                prefix_hit_rate=self.prefix_hit_rate,
                queue_ms=self.queue_ms,
                samples=self.minutes,
            ),
        )


class Passive(msgspec.Struct, frozen=True):
    """The curve, by rising concurrency. `unused`: why the other observed minutes do not count."""

    points: tuple[PassivePoint, ...]
    reaches: float | None  # the highest concurrency that a point is of
    minutes_used: int
    unused: dict[str, int]
    note: str

    def levels(self) -> list[Level]:
        """For `agent.sizing.curve`; of points that round to one number the longer observed."""
        best: dict[int, tuple[float, Level]] = {}
        for point in self.points:
            level = point.level()
            assert level.concurrency is not None
            if point.observed_s > best.get(level.concurrency, (0.0, level))[0]:
                best[level.concurrency] = (point.observed_s, level)
        return [level for _, level in best.values()]


def passive_curve(window: Window, *, minutes_min: int = MINUTES_MIN) -> Passive:
    """The curve of a window's service; bins of fewer than `minutes_min` minutes are left out."""
    usable, unused = _usable(window)
    concurrency = _concurrency(window)
    bins = _bins(concurrency)
    points = []
    for number in np.unique(bins[usable]):
        chosen = usable & (bins == number)
        if chosen.sum() >= minutes_min:
            points.append(_point(window, chosen, concurrency))
        else:
            unused["too few at this concurrency"] += int(chosen.sum())
    points.sort(key=lambda point: point.concurrency)
    reaches = points[-1].concurrency if points else None
    used = sum(point.minutes for point in points)
    return Passive(
        points=tuple(points),
        reaches=reaches,
        minutes_used=used,
        unused={why: count for why, count in unused.items() if count},
        note=_note(reaches, used),
    )


def _note(reaches: float | None, used: int) -> str:
    if reaches is None:
        return "no steady minute under load was observed: the curve needs traffic, or a sweep"
    minutes = "minute" if used == 1 else "minutes"
    return (
        f"from {used:,} {minutes} of production, up to {_in_flight(reaches)} requests in flight;"
        " what lies beyond takes a sweep"
    )


def _in_flight(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _usable(window: Window) -> tuple[Flags, dict[str, int]]:
    """Which records count, and how many of the others fail what, the first reason counting."""
    observed = window.weights_s() > 0
    mean = window.in_flight("mean")
    ranges = window.in_flight("max") - window.in_flight("min")
    changed = np.flatnonzero(window.marked("changed"))
    reasons: dict[str, Flags] = {
        "before the last change of model, version or flags": (
            np.arange(window.places) <= changed[-1]
            if changed.size
            else np.zeros(window.places, dtype=bool)
        ),
        "a restart, a gap or a jump of the clock": (
            window.marked("restart", "gap", "clock_jump") > 0
        ),
        "not observed whole": window.weights_s() < COVERED_MIN * window.record_s,
        "nothing in flight": mean <= 0,
        "the load changed": ranges
        > np.maximum(RANGE_DEVIATIONS * np.sqrt(mean), RANGE_SHARE * mean) + RANGE_FLOOR,
    }
    usable = observed
    unused: dict[str, int] = {}
    for why, fails in reasons.items():
        unused[why] = int((usable & fails).sum())
        usable = usable & ~fails
    return usable, unused | {"too few at this concurrency": 0}


def _concurrency(window: Window) -> Floats:
    """Requests in flight, running and waiting: the mean of each record."""
    sampled, weights = window.in_flight("mean"), window.weights_s()
    if not (window.has("ttft_seconds_sum") and window.has("itl_seconds_sum")):
        return sampled
    spent_s = window.total("ttft_seconds_sum") + window.total("itl_seconds_sum")
    summed: Floats = spent_s / np.where(weights > 0, weights, 1.0)
    whole = weights >= COVERED_MIN * window.record_s
    there, here = float(sampled[whole].sum()), float(summed[whole].sum())
    agree = there > 0 and abs(here / there - 1) <= AGREE_SHARE
    return np.where(whole & (summed > 0), summed, sampled) if agree else sampled


def _bins(concurrency: Floats) -> Floats:
    """Number of the bin: whole numbers up to 8, each a fifth further beyond."""
    beyond = np.log(np.maximum(concurrency, UNIT_BINS + 0.5) / (UNIT_BINS + 0.5))
    return np.where(
        concurrency < UNIT_BINS + 0.5,
        np.maximum(1.0, np.floor(concurrency + 0.5)),
        UNIT_BINS + 1 + np.floor(beyond / math.log(BIN_RATIO)),
    )


# ------------------------------------------------------------------------------------------ points


def _point(window: Window, chosen: Flags, concurrency: Floats) -> PassivePoint:
    seconds = window.weights_s()[chosen]
    whole_s = float(seconds.sum())

    def mean(values: Floats) -> float:
        return float((values[chosen] * seconds).sum() / whole_s)

    def rate(*names: str) -> tuple[float | None, tuple[float, float] | None]:
        known = [name for name in names if window.has(name)]
        if not known:
            return None, None
        counts = window.total(known[0])[chosen]
        return float(counts.sum() / whole_s), batch_means_ci95(counts / seconds)

    def ratio(part: str, of: str) -> float | None:
        below = float(window.total(of)[chosen].sum())
        return float(window.total(part)[chosen].sum()) / below if below > 0 else None

    output, output_ci95 = rate("output_tokens_total")
    done, done_ci95 = rate("requests_finished_total", "e2e_seconds_count")
    kv_usage, kv_usage_max = window.kv_usage("mean")[chosen], window.kv_usage("max")[chosen]
    kv_known = not np.isnan(kv_usage).any()
    queue_s = ratio("queue_seconds_sum", "queue_seconds_count")
    preemptions = "preemptions_total"
    return PassivePoint(
        concurrency=mean(concurrency),
        minutes=int(chosen.sum()),
        observed_s=whole_s,
        output_tokens_per_s=output,
        output_tokens_per_s_ci95=output_ci95,
        prompt_tokens_per_s=rate("prompt_tokens_total")[0],
        request_throughput=done,
        request_throughput_ci95=done_ci95,
        itl_ms=_stats(window, "itl_seconds", chosen),
        itl_ms_ci95=_mean_ci95(window, "itl_seconds", chosen),
        ttft_ms=_stats(window, "ttft_seconds", chosen),
        ttft_ms_ci95=_mean_ci95(window, "ttft_seconds", chosen),
        tpot_ms=_stats(window, "tpot_seconds", chosen),
        e2e_ms=_stats(window, "e2e_seconds", chosen),
        running=mean(window.total("requests_running", "mean")),
        waiting=mean(window.total("requests_waiting", "mean")),
        waiting_max=float(window.total("requests_waiting", "max")[chosen].max()),
        kv_usage_mean=float((kv_usage * seconds).sum() / whole_s) if kv_known else None,
        kv_usage_max=float(kv_usage_max.max()) if kv_known else None,
        preemptions=(
            float(window.total(preemptions)[chosen].sum()) if window.has(preemptions) else None
        ),
        prefix_hit_rate=ratio("prefix_cache_hits_total", "prefix_cache_queries_total"),
        queue_ms=None if queue_s is None else 1e3 * queue_s,
    )


def _stats(window: Window, name: str, chosen: Flags) -> Stats:
    """Exact mean, quantiles read off the buckets (not where that one has no upper end), in ms."""
    n = float(window.total(f"{name}_count")[chosen].sum())
    if n <= 0:
        return Stats()
    mean = 1e3 * float(window.total(f"{name}_sum")[chosen].sum()) / n
    histograms = merged(window.histograms(name, chosen.astype(float)))

    def at(q: float) -> float | None:
        found = quantile(histograms, q)
        return None if found is None or found.hi is None else 1e3 * found.value

    return Stats(mean=mean, p50=at(0.5), p90=at(0.9), p95=at(0.95), p99=at(0.99), n=round(n))


def _mean_ci95(window: Window, name: str, chosen: Flags) -> tuple[float, float] | None:
    counts = window.total(f"{name}_count")[chosen]
    sums = window.total(f"{name}_sum")[chosen]
    return batch_means_ci95(1e3 * sums[counts > 0] / counts[counts > 0])


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _both_times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (interval[0] * factor, interval[1] * factor)


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
