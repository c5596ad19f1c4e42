"""Quantiles, intervals and the few other figures that the measurements are summarised with."""

from __future__ import annotations

import math

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
