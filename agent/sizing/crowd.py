"""Recorded requests against a curve alone: how many of them surely met, or may have met, too many.

Pure. Where neither model nor GPU is known there is no engine to replay them through, and a busiest
minute proves nothing of an SLO that one in twenty requests may miss: a queue can drain, and within
the minute there are bursts. What a curve proves of queues is one-sided. For UNDER_SIZED:

- With no more than n requests in it a server finished no more than X(n) a second, for throughput
  grows with load. A bucket that takes n requests and leaks X(n) a second is then never fuller than
  the server: whoever comes to a full one meets n - 1 others there.
- Whoever meets them waits at least as long as those did who were measured among n. Streams that
  each send when they have the last reply never bunch; requests of a trace do.

For RIGHT_SIZED, of a load of n that was measured to keep the SLO:

- Among fewer than n a request stays no longer than those that were measured, by its own length. So
  no more are in flight than came within so long before.
- Requests that come together wait for each other, which streams do not show. They wait no longer
  than in a line that X(n) a second leave, for each of those is served whole.

What a request weighs is not known: its prompt's share of the work, or its reply's. What is proven
is proven by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from agent.model import Level, Slo
from agent.sizing import curve as curves
from agent.sizing.arrivals import Arrivals
from agent.sizing.curve import Point
from agent.stats import Floats

QUEUE_S = 60.0  # of work ahead of a request: within no SLO, and without one too long
MISSES_MAX = 0.05  # of the requests, where no quantile is asked for
_Z95 = 1.96
_SHARES = (("p50", 0.5), ("p90", 0.1), ("p95", 0.05), ("p99", 0.01), ("p999", 0.001))


def overload(
    points: Sequence[Point],
    slo: Sequence[Slo],
    arrivals: Arrivals,
    lengths: tuple[float | None, float | None],
    *,
    saturated: bool,
) -> float:
    """How many times what an SLO allows is surely missed: proven broken from 1 on, else open.

    `lengths`: prompt and reply that the points are of, the trace's own where they are not known.
    """
    known = [p for p in points if p.concurrency and p.rps]
    fastest = np.maximum.accumulate([0.0, *((p.rps or 0.0) * (1 + p.half) for p in known)])[1:]
    found = []
    for column, length in zip(
        (arrivals.prompt_tokens, arrivals.output_tokens), lengths, strict=True
    ):
        mean = float(column.mean())
        rates = fastest * (length or mean) / mean  # in requests of the trace's mean length
        found.append(_overload(known, rates, slo, arrivals.at_s, column / mean, saturated))
    return min(found)


def kept(
    points: Sequence[Point],
    slo: Sequence[Slo],
    arrivals: Arrivals,
    lengths: tuple[float | None, float | None],
) -> float:
    """How many times what an SLO allows is missed at most: surely kept up to 1, else open.

    By the load that shows it best; infinite where none is known to keep the SLO. `lengths` as of
    `overload`.
    """
    columns = (arrivals.prompt_tokens, arrivals.output_tokens)
    prompts, replies = (
        column / (length or float(column.mean()))
        for column, length in zip(columns, lengths, strict=True)
    )
    known = [p for p in points if p.concurrency and p.rps and curves.surely_keeps(p, slo)]
    return min((_may_miss(p, slo, arrivals.at_s, prompts, replies) for p in known), default=np.inf)


def _may_miss(
    point: Point, slo: Sequence[Slo], at_s: Floats, prompts: Floats, replies: Floats
) -> float:
    streams, rps = max(1.0, point.concurrency or 0.0), (point.rps or 0.0) * (1 - point.half)
    weights = np.maximum(prompts, replies)
    gone_s = np.sort(at_s + weights * streams / rps)  # by Little: how long those measured stayed
    in_flight = np.arange(at_s.size) - np.searchsorted(gone_s, at_s, side="right")
    crowded = in_flight >= streams
    wait_ms = 1e3 * _waits(at_s, weights / rps)
    own = {"ttft": prompts, "ttfo": prompts, "e2e": weights}
    found = [float(crowded.mean()) / MISSES_MAX]
    for target in slo:
        took_ms = (curves.slo_value(point.level, target) or 0.0) * np.ones(at_s.size)
        if target.metric in own:
            took_ms = wait_ms + took_ms * np.maximum(1.0, own[target.metric])
        if target.statistic == "mean":
            found.append(float(took_ms.mean()) / target.bound_ms)
        else:
            missed = float((crowded | (took_ms >= target.bound_ms)).mean())
            found.append(missed / max(curves.share_allowed(target.statistic), 1e-6))
    return max(found)


def _waits(at_s: Floats, work_s: Floats) -> Floats:
    """How long each waits in one line, where each takes so long (Lindley's recursion)."""
    ahead_s = np.cumsum(work_s) - work_s - at_s
    waits: Floats = ahead_s - np.minimum.accumulate(ahead_s)
    return waits


def _overload(
    points: Sequence[Point], rates: Floats, slo: Sequence[Slo], at_s: Floats, work: Floats,
    saturated: bool,
) -> float:  # fmt: skip
    sizes = [max(1.0, p.concurrency or 0.0) for p in points]
    met = [full_share(at_s, work, *of) for of in zip(sizes, rates.tolist(), strict=True)]
    found = [_misses(points, met, target) for target in slo]
    if saturated and points:
        bound_s = max([QUEUE_S, *(t.bound_ms / 1e3 for t in slo if t.metric in ("ttft", "e2e"))])
        most = float(rates[-1])
        found.append(full_share(at_s, work, max(1.0, most * bound_s), most) / MISSES_MAX)
    return max(found, default=0.0)


def full_share(at_s: Floats, work: Floats, size: float, rate: float) -> float:
    """Share of the requests that come to a full bucket of `size`, which leaks `rate` a second."""
    level, last_s, full = 0.0, 0.0, 0
    for now_s, weight in zip(at_s.tolist(), work.tolist(), strict=True):
        level = max(0.0, level - (now_s - last_s) * rate)
        last_s = now_s
        full += level >= size - 1
        level = min(size, level + weight)
    return full / max(1, at_s.size)


def _misses(points: Sequence[Point], met: Sequence[float], target: Slo) -> float:
    """What is surely missed at least, over what is allowed: each request by the highest load that
    it surely met."""
    of = [_least(point.level, target) for point in points]
    rising = np.maximum.accumulate([0.0, *(one or 0.0 for one in of)])
    missed = sum(
        (above - below) * share for (below, above), share in zip(pairwise(rising), met, strict=True)
    )
    if target.statistic == "mean":
        return float(missed) / target.bound_ms
    return float(missed) / max(curves.share_allowed(target.statistic), 1e-6)


def _least(level: Level, target: Slo) -> float | None:
    """At least so much was it at this level: a mean in ms, else the share that missed the bound.

    A share is read off the line between the quantiles that were kept, at the low end of its
    interval; of few requests, or few quantiles, nothing may be left of it.
    """
    ends = curves.slo_interval(level, target)
    if target.statistic == "mean":
        return None if ends is None else ends[0]
    stats = getattr(level, f"{target.metric}_ms")
    known = [(value, at) for name, at in _SHARES if (value := getattr(stats, name)) is not None]
    if not known:
        return None
    values, shares = zip(*sorted(known), strict=True)
    share = float(np.interp(target.bound_ms, values, shares, right=0.0))
    n = min(stats.n, level.e2e_ms.n or stats.n) or np.inf
    return max(curves.failed_share(level), share - _Z95 * float(np.sqrt(share * (1 - share) / n)))
