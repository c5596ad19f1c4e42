"""GuideLLM's distributions: a weighted sample, a rate over time, how many at once over time.

Worked out as guidellm.schemas.base.statistics does in GuideLLM 0.8.1. Quantiles are the smallest
value whose cumulated weight reaches the quantile; nothing is interpolated; variances are of the
population.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loadgen.kept import Floats

QUANTILES = {
    "p001": 0.001, "p01": 0.01, "p05": 0.05, "p10": 0.1, "p25": 0.25, "p50": 0.5,
    "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999,
}  # fmt: skip
MERGE_S = 1e-4  # events no further apart count as one instant
_SHORTEST_S = 1e-6


def weighted(values: Floats, weights: Floats | None = None, count: int | None = None) -> Any:
    """The summary of a sample; all zero where there is none."""
    weights = np.ones(values.size) if weights is None else weights
    if count is None:
        count = round(float(weights.sum()))
    found, place = np.unique(values, return_inverse=True)
    heaps = np.bincount(place, weights, found.size) if found.size else np.empty(0)
    found, heaps = found[heaps > 0], heaps[heaps > 0]
    if not found.size:
        found, shares, count = np.zeros(1), np.ones(1), 0 if not values.size else count
    else:
        shares = heaps / heaps.sum()
    cumulated = np.cumsum(shares)
    mean = float((found * shares).sum())
    variance = float(((found - mean) ** 2 * shares).sum())
    at = np.minimum(np.searchsorted(cumulated, list(QUANTILES.values())), found.size - 1)
    quantiles = dict(zip(QUANTILES, found[at].tolist(), strict=True))
    return {
        "mean": mean,
        "median": quantiles["p50"],
        "mode": float(found[shares.argmax()]),
        "variance": variance,
        "std_dev": variance**0.5,
        "min": float(found[0]),
        "max": float(found[-1]),
        "count": count,
        "total_sum": mean * count,
        "percentiles": quantiles,
    }


def rate(at_s: Floats, amounts: Floats, window_s: tuple[float, float] | None) -> Any:
    """Events a second: each instant's amount over half the time to its two neighbours."""
    if window_s is not None:
        inside = (at_s >= window_s[0]) & (at_s <= window_s[1])
        at_s = np.concatenate([at_s[inside], window_s])
        amounts = np.concatenate([amounts[inside], [0.0, 0.0]])
    at_s, amounts = _merged(at_s, amounts)
    if at_s.size <= 1:
        return weighted(np.empty(0), count=at_s.size)
    middles = (at_s[1:] + at_s[:-1]) / 2
    lasted = np.diff(np.concatenate([at_s[:1], middles, at_s[-1:]]))
    lasted[-1] = max(lasted[-1], _SHORTEST_S)
    return weighted(amounts / lasted, lasted, round(float(amounts.sum())))


def concurrency(
    from_s: Floats, to_s: Floats, amounts: Floats, window_s: tuple[float, float] | None
) -> Any:
    """How much was under way at once, each value weighted by how long it lasted."""
    count = from_s.size
    at_s, changes = _merged(np.concatenate([from_s, to_s]), np.concatenate([amounts, -amounts]))
    if window_s is not None and at_s.size:
        before = at_s < window_s[0]
        after = at_s > window_s[1]
        at_s = np.concatenate([window_s[:1], at_s[~before & ~after], window_s[1:]])
        changes = np.concatenate([[changes[before].sum()], changes[~before & ~after], [0.0]])
    levels = np.clip(np.cumsum(changes), 0, None)
    if levels.size <= 1:
        return weighted(levels if count else np.empty(0))
    lasted = np.clip(np.diff(at_s), 0, None)
    if not (lasted > 0).any():
        return weighted(np.empty(0), count=count)
    return weighted(levels[:-1], lasted, count)


def _merged(at_s: Floats, amounts: Floats) -> tuple[Floats, Floats]:
    """Sorted instants; those within MERGE_S of the first of a group are that one."""
    instants, place = np.unique(at_s, return_inverse=True)
    sums = np.bincount(place, amounts, instants.size)
    starts: list[int] = []
    next_start = 0
    group_ends = np.searchsorted(instants, instants + MERGE_S, side="right")
    while next_start < instants.size:
        starts.append(next_start)
        next_start = int(group_ends[next_start])
    grouped: Floats = np.add.reduceat(sums, starts) if starts else np.empty(0)
    return instants[starts], grouped
