"""Quantiles, intervals and the few other figures that the measurements are summarised with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model import Lag, Stats

Floats = NDArray[np.float64]

# Two-sided 97.5 % points of Student's t; beyond 30 degrees of freedom the normal's 1.96 is used.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t975(degrees_of_freedom: int) -> float:
    """97.5 % point of Student's t distribution; infinite without a degree of freedom."""
    if degrees_of_freedom < 1:
        return math.inf
    return _T975[degrees_of_freedom - 1] if degrees_of_freedom <= len(_T975) else 1.96


def t_two_sided(t: float, degrees_of_freedom: float) -> float:
    """Probability of a |t| at least this large under Student's t distribution.

    The finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4), rounded
    down; beyond 30 the normal distribution, as in `t975`. 1 without a degree of freedom.
    """
    if degrees_of_freedom < 1 or math.isnan(t):
        return 1.0
    if degrees_of_freedom > len(_T975):
        return math.erfc(abs(t) / math.sqrt(2))
    n = int(degrees_of_freedom)
    angle = math.atan(abs(t) / math.sqrt(n))
    cosine = math.cos(angle)
    odd = n % 2
    term = cosine if odd else 1.0
    total = term if n > 1 else 0.0
    for k in range(2 + odd, n, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    if odd:
        inside = (angle + inside) * 2 / math.pi
    return max(0.0, 1.0 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are, so that the chance of any false one is kept.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = worst
    return adjusted


def summary(sample: Floats) -> Stats:
    """Summary of a sample in its own unit; quantiles by linear interpolation (type 7)."""
    n = int(sample.size)
    if n == 0:
        return Stats()
    p50, p90, p95, p99, p999 = (
        float(q) for q in np.quantile(sample, (0.5, 0.9, 0.95, 0.99, 0.999))
    )
    std = float(sample.std(ddof=1)) if n > 1 else 0.0
    return Stats(float(sample.mean()), std, p50, p90, p95, p99, p999, float(sample.max()), n)


def lag(sample: Floats) -> Lag:
    """Median, 99th percentile and maximum of a sample of delays."""
    if sample.size == 0:
        return Lag()
    p50, p99 = (float(q) for q in np.quantile(sample, (0.5, 0.99)))
    return Lag(p50, p99, float(sample.max()))


BATCHES = (4, 20)  # at least, at most


def batches(window_ms: float, e2e_ms: float) -> int:
    """Into how many batches a steady window is cut for `batch_means_ci95`: if possible of one E2E
    time each, for requests that share a batch of the server share its speed."""
    least, most = BATCHES
    return int(min(max(window_ms / max(e2e_ms, 1e-3), least), most))


def batch_means_ci95(batch_rates: Floats) -> tuple[float, float] | None:
    """95 % interval of a steady rate from the rates of consecutive equal batches.

    Batch means (Law, Simulation Modeling and Analysis, 9.5.3): batches long enough are nearly
    independent, so their spread gives the error of their mean. None with fewer than 2 batches.
    """
    n = int(batch_rates.size)
    if n < 2:
        return None
    mean = float(batch_rates.mean())
    half = t975(n - 1) * float(batch_rates.std(ddof=1)) / math.sqrt(n)
    return max(0.0, mean - half), mean + half


# -------------------------------------------------------------------------------------- histograms


class Histogram(msgspec.Struct, frozen=True):
    """How many of a sample lay in each bucket; `counts` are per bucket, not cumulative.

    `bounds` are upper, inclusive and rising, the last one infinite. The first bucket begins at 0:
    times and lengths are never negative.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def n(self) -> float:
        return math.fsum(self.counts)


class Quantile(NamedTuple):
    """A quantile of bucketed values: the likeliest value, and between which it surely lies.

    `hi` is None where that is the bucket without an upper end; `value` is then its lower end.
    """

    value: float
    lo: float
    hi: float | None


def merged(histograms: Iterable[Histogram]) -> list[Histogram]:
    """The histogram of the union of the samples: one for each set of bounds, so nothing is lost.

    Servers of one service, or one before and after a restart, may have different bounds; only
    `coarsened` could put those into one, and would lose what the finer one knows.
    """
    sums: dict[tuple[float, ...], list[float]] = {}
    for one in histograms:
        known = sums.get(one.bounds)
        if known is None:
            sums[one.bounds] = list(one.counts)
        else:
            sums[one.bounds] = [a + b for a, b in zip(known, one.counts, strict=True)]
    return [Histogram(bounds, tuple(counts)) for bounds, counts in sorted(sums.items())]


def coarsened(histogram: Histogram, bounds: Sequence[float]) -> Histogram:
    """The same sample in those of its own bounds that `bounds` holds too; exact, less fine."""
    keep = set(bounds) | {math.inf}
    kept: list[float] = []
    counts: list[float] = []
    count = 0.0
    for bound, more in zip(histogram.bounds, histogram.counts, strict=True):
        count += more
        if bound in keep:
            kept.append(bound)
            counts.append(count)
            count = 0.0
    return Histogram(tuple(kept), tuple(counts))


def quantile(histograms: Sequence[Histogram], q: float) -> Quantile | None:
    """The q-quantile of the union of the samples; None where they hold nothing.

    The value is where the distribution function reaches q, on straight lines inside the buckets
    (Prometheus' histogram_quantile). `lo` and `hi` are the quantiles if every value lay at the
    lower, or at the upper, end of its bucket: whatever the values were, theirs lies between.
    """
    rows = [
        (low, high, count)
        for one in histograms
        for low, high, count in zip((0.0, *one.bounds), one.bounds, one.counts, strict=False)
        if count > 0
    ]
    n = math.fsum(count for _, _, count in rows)
    if n <= 0:
        return None
    lo = _reached(((min(low, high), count) for low, high, count in rows), q * n)
    hi = _reached(((high, count) for _, high, count in rows), q * n)
    if math.isinf(hi):
        return Quantile(lo, lo, None)
    return Quantile(min(max(_on_lines(rows, q * n), lo), hi), lo, hi)


def percentile(histograms: Sequence[Histogram], q: float) -> float | None:
    """`quantile`'s value alone: for one set of bounds a single walk, twenty times as quick."""
    if len(histograms) != 1:
        found = quantile(histograms, q)
        return found and found.value
    (one,) = histograms
    target = q * one.n * (1 - 1e-12)
    low, passed, reached = 0.0, 0.0, None
    for high, count in zip(one.bounds, one.counts, strict=True):
        if count > 0:
            reached = low if math.isinf(high) else high
            if passed + count >= target:
                return low + (reached - low) * max(0.0, (target - passed) / count)
            passed += count
        low = high
    return reached


def _reached(masses: Iterable[tuple[float, float]], target: float) -> float:
    """Where the sum of masses, in order of place, reaches the target."""
    total, reached = 0.0, 0.0
    for place, mass in sorted(masses):
        total, reached = total + mass, place
        if total >= target * (1 - 1e-12):
            break
    return reached


def _on_lines(rows: Sequence[tuple[float, float, float]], target: float) -> float:
    """The same with each mass spread evenly over its bucket; an endless bucket is at its start."""
    spread = [(min(low, high), low if math.isinf(high) else high, c) for low, high, c in rows]
    places = np.unique([edge for low, high, _ in spread for edge in (low, high)])
    total: Floats = np.zeros(places.size)
    for low, high, count in spread:
        if high > low:
            total += count * np.clip((places - low) / (high - low), 0.0, 1.0)
        else:
            total += count * (places >= low)
    after = int(np.searchsorted(total, target * (1 - 1e-12)))
    if after == 0 or after >= places.size:
        return float(places[min(after, places.size - 1)])
    share = (target - total[after - 1]) / (total[after] - total[after - 1])
    return float(places[after - 1] + share * (places[after] - places[after - 1]))
