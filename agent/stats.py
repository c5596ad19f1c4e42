"""Quantiles, intervals and the few other figures that the measurements are summarised with."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
