"""How a running level stands, and how long the rest will take: for whoever watches.

Pure. Made twice a second of counts that are kept anyway, so that no token event costs more for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from agent.model import Level
from agent.sizing.curve import load_of
from loadgen.level import Plan
from loadgen.recorder import Counts, Recorder
from loadgen.search import Sample

Phase = Literal["warm-up", "measuring", "last replies"]

SAMPLES_MAX = 240
GROWS_BY = 0.75  # requests/s as load ** this, where one load only is known


class Moment(msgspec.Struct, frozen=True):
    """How a running level stands. Means are of the requests that have ended, as in a `Level`."""

    share: float  # 0 … 1 of the level is done
    elapsed_s: float
    in_flight: int
    ok: int
    failed: int
    tokens: int
    half: float | None = None  # relative half-width of the 95 % interval of its tokens/s
    half_wanted: float | None = None  # from which on it ends; None: its plan alone ends it
    phase: Phase = "measuring"
    rate: float | None = None  # tokens/s (requests/s where nothing is generated), of its window
    ttft_mean_ms: float | None = None
    itl_mean_ms: float | None = None
    errors: Mapping[str, int] = {}  # failed requests by kind
    later_s: float | None = None  # roughly, of the levels after it; None: nobody knows
    budget_left_s: float = math.inf

    @property
    def left_s(self) -> float | None:
        """Of this level, as fast as it went so far; None where it has hardly begun."""
        return self.elapsed_s * (1 / self.share - 1) if self.share > 0.02 else None


def of(
    plan: Plan, counts: Counts | Recorder, in_flight: int, elapsed_s: float, **more: Any
) -> Moment:
    """The level after `elapsed_s`. `more`: fields of the Moment that others know."""
    if plan.requests is not None:
        share = (counts.ok + counts.failed) / (plan.requests + plan.warmup_requests)
    else:
        share = elapsed_s / (plan.warmup_s + (plan.duration_s or 1.0))
    phase: Phase = "measuring" if counts.ramp_end_ns else "warm-up"
    return Moment(
        min(share, 1.0), elapsed_s, in_flight, counts.ok, counts.failed, counts.tokens,
        phase="last replies" if share >= 1 else phase,
        ttft_mean_ms=counts.ttft_sum_ns / counts.ttfts / 1e6 if counts.ttfts else None,
        itl_mean_ms=counts.itl_sum_ns / counts.gaps / 1e6 if counts.gaps else None,
        errors=dict(counts.failures),
        **more,
    )  # fmt: skip


def keep(samples: list[Sample], sample: Sample) -> None:
    """Appends it. Of a long level fewer are kept, evenly, so that a look costs no more and more."""
    if len(samples) >= SAMPLES_MAX:
        del samples[1::2]
    if len(samples) > 2:
        step_s = (samples[-1].at_s - samples[0].at_s) / SAMPLES_MAX
        if samples[-1].at_s - samples[-2].at_s < step_s:
            samples.pop()
    samples.append(sample)


def rate_of(samples: Sequence[Sample]) -> float | None:
    """Tokens/s over the samples, requests/s where nothing is generated."""
    if len(samples) < 2 or samples[-1].at_s <= samples[0].at_s:
        return None
    first, last = samples[0], samples[-1]
    done = last.tokens - first.tokens if last.tokens else last.ok - first.ok
    return done / (last.at_s - first.at_s)


def later_s(plans: Sequence[Plan], levels: Sequence[Level]) -> float | None:
    """Roughly how long `plans` will take, by the `levels` before; None where nothing is known.

    Requests/s are interpolated between loads and go on growing as they grew last; a drain takes as
    long as a request took last.
    """
    known = _requests_per_s(levels)
    e2e_s = (levels[-1].e2e_ms.mean or 0.0) / 1e3 if levels else 0.0
    total_s = 0.0
    for plan in plans:
        if plan.duration_s is not None:
            took_s = plan.warmup_s + plan.duration_s
        elif plan.mode == "rate":
            took_s = (plan.requests or 0) / plan.load
        elif known:
            requests = (plan.requests or 0) + plan.warmup_requests
            took_s = plan.warmup_s + requests / _expected_rps(known, plan.load)
        else:
            return None
        total_s += took_s + e2e_s
    return total_s


def about(seconds: float) -> str:
    """`~40 s`, `~4 min`, `~2.5 h`: an estimate, no finer than it is."""
    return f"~{roughly(seconds)}"


def roughly(seconds: float) -> str:
    """The same of a time that is known."""
    if seconds < 20:
        return f"{seconds:.0f} s"
    if seconds < 100:
        return f"{5 * round(seconds / 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _requests_per_s(levels: Sequence[Level]) -> list[tuple[float, float]]:
    """(load, requests/s), by load; of a load measured twice the newest."""
    known = {load_of(level): level.request_throughput for level in levels}
    return sorted((load, rps) for load, rps in known.items() if load and rps)


def _expected_rps(known: Sequence[tuple[float, float]], load: float) -> float:
    """Between loads as between their logarithms; beyond them as it grew over the last two."""
    loads, rates = np.log(np.array(known)).T
    at, end = math.log(load), 0 if load < known[0][0] else -1
    if loads[0] <= at <= loads[-1]:
        return math.exp(np.interp(at, loads, rates))
    grows_by = GROWS_BY
    if len(known) > 1 and end == -1:
        slope = (rates[-1] - rates[-2]) / (loads[-1] - loads[-2])
        grows_by = min(max(float(slope), 0.0), 1.0)
    return math.exp(rates[end] + grows_by * (at - loads[end]))
