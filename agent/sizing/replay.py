"""Demand against capacity: the observed requests through the modelled engine, in virtual time.

Pure. `replay` tells what a trace would have seen, as a whole and by the hour; `capacity` how many
times that trace could be served within the SLO (design equation 8), with an interval. A flat margin
cannot take its place: how far the mean load must stay under what an engine writes at most depends
on how its requests bunch (`headroom`).

When does a multiple hold? The latencies of all its requests meet the SLO, and so do those of each
hour of the week that has enough of them, but for one in a hundred: a broken lunch hour must not
hide behind seven quiet nights. A request that the engine refuses misses every target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model import Ratio, Slo, UsageError
from agent.sizing import simulate
from agent.sizing.arrivals import HOUR_S, Arrivals, busiest, recorded, times
from agent.sizing.curve import share_allowed
from agent.sizing.engine import EngineSpec
from agent.sizing.simulate import Record, Virtual, VirtualLevel
from agent.stats import Floats, t975

Routing = Literal["round_robin", "least_loaded"]
Ends = Literal["both", "low", "none"]  # of an interval


class Wait(msgspec.Struct, frozen=True):
    """A target on the time before a request is first scheduled; the others are `agent.model.Slo`.

    What is asked where nobody declared an SLO: a P95 wait of 2 s.
    """

    metric: Literal["queue"] = "queue"
    statistic: Literal["mean", "p50", "p90", "p95", "p99", "max"] = "p95"
    bound_ms: float = 2000.0


Target = Slo | Wait

WEEK_H = 168
DAY_S = 86400.0
REFUSED_MS = 1e12  # of a request that the engine refuses; finite, so that 0 times it is 0
CELL_LEAST = 30  # requests of an hour of the week, to be judged by itself
CELLS_BROKEN_MAX = 0.01  # of them: the P99 over the hours of the week
BLOCKS_LEAST = 12  # of a window too short for hours
MULTIPLE_MIN, MULTIPLE_MAX = 1 / 64, 64.0
BRACKET = 1.03  # how near the last multiple that held is to the first that did not
ROUGHLY = 1.25  # the same while it is only looked for
BELOW, ABOVE = (0.97, 0.92, 0.85, 0.75, 0.6), (1.06, 1.12, 1.2, 1.35, 1.6, 2.0)  # the interval's
RESAMPLED = 400
CI = (0.025, 0.975)
REQUESTS_MOST = 40_000  # a replay, at about 20,000 to 90,000 a second


class Hour(msgspec.Struct, frozen=True):
    """An hour by the clock; its latencies are of the requests that came in it."""

    start_unix_s: float
    level: VirtualLevel


class Replayed(msgspec.Struct, frozen=True):
    """What each request saw, in the order of the arrivals; NaN where the engine refused it."""

    arrivals: Arrivals
    records: tuple[Record, ...]  # one a replica
    queue_s: Floats
    ttft_s: Floats
    e2e_s: Floats

    @property
    def level(self) -> VirtualLevel:
        """The whole replay, from the first instant of the window until all is served."""
        return simulate.level(self.records, 0.0, _past(self._last_s))

    @property
    def hours(self) -> list[Hour]:
        """Hour by hour by the clock; the last ones may be of what was still to be served."""
        start = self.arrivals.start_unix_s
        edges = [0.0]
        while edges[-1] < self._last_s:
            edges.append((math.floor((start + edges[-1]) / HOUR_S + 1e-9) + 1) * HOUR_S - start)
        if len(edges) > 1:
            edges[-1] = _past(self._last_s)
        return [
            Hour(start + lo, simulate.level(self.records, lo, hi)) for lo, hi in pairwise(edges)
        ]

    @property
    def _last_s(self) -> float:
        ends = (float(one.steps[-1, 1]) for one in self.records if one.steps.size)
        return max(self.arrivals.window_s, *ends, 0.0)


def _past(at_s: float) -> float:
    """The next instant: what came at the last one is inside."""
    return math.nextafter(at_s, math.inf)


def replay(
    spec: EngineSpec,
    arrivals: Arrivals,
    *,
    replicas: int = 1,
    routing: Routing = "round_robin",
) -> Replayed:
    """What the requests see on so many equal engines.

    They go in turns, or each to the replica with the fewest in flight (which takes longer to
    compute: all replicas are brought to each instant). Each request gets exactly its output tokens;
    one longer than the engine takes is rejected. Raises UsageError where the engine cannot be
    started, or there is none.
    """
    if replicas < 1:
        raise UsageError(f"{replicas} replicas: at least one has to be left to serve")
    engines = [Virtual(spec) for _ in range(replicas)]
    went: NDArray[np.int64] = np.arange(len(arrivals)) % replicas
    columns = (arrivals.prompt_tokens, arrivals.output_tokens, arrivals.at_s,
               arrivals.cached_tokens)  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for index, (prompt, output, at_s, cached) in enumerate(rows):
        if routing == "least_loaded":
            for engine in engines:
                engine.run_until(at_s)
            went[index] = min(range(replicas), key=lambda one: engines[one].in_flight)
        engine = engines[went[index]]
        engine.run_until(at_s)
        engine.submit(prompt, output, at_s, cached)
    for engine in engines:
        engine.drain()
    records = tuple(engine.record() for engine in engines)
    return Replayed(
        arrivals,
        records,
        queue_s=_in_order(records, went, lambda one: one.admitted_s - one.sent_s),
        ttft_s=_in_order(records, went, lambda one: one.first_s - one.sent_s),
        e2e_s=_in_order(records, went, lambda one: one.finished_s - one.sent_s),
    )


def _in_order(
    records: Sequence[Record], went: NDArray[np.int64], figure: Callable[[Record], Floats]
) -> Floats:
    values: Floats = np.empty(went.size)
    for at, record in enumerate(records):
        values[went == at] = figure(record)
    return values


# ---------------------------------------------------------------------------------- does it hold?


class _Blocks:
    """How the time of a window is cut: what may be resampled, and what is judged by itself.

    Blocks are days from 7 days on, else hours, else twelfths of the window, so that there is
    something to resample. Cells are hours of the week.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        window_s = max(arrivals.window_s, 1e-3)
        is_week = window_s >= 7 * DAY_S
        self.block_s = DAY_S if is_week else min(HOUR_S, window_s / BLOCKS_LEAST)
        self.count = max(1, math.ceil(window_s / self.block_s - 1e-9))
        self.cells = int(np.unique(arrivals.hours % WEEK_H).size)  # in which anything came
        self._start_unix_s = arrivals.start_unix_s

    def sums(self, at_s: Floats, values: Floats) -> Floats:
        """Sums of the values by block and cell; what ends after the window is in the last block."""
        block = np.minimum(at_s // self.block_s, self.count - 1).astype(np.int64)
        first = self._start_unix_s // HOUR_S
        cell = ((self._start_unix_s + at_s) // HOUR_S - first).astype(np.int64) % WEEK_H
        summed = np.bincount(block * WEEK_H + cell, values, self.count * WEEK_H)
        return summed.reshape(self.count, WEEK_H).astype(np.float64)


class _Tally(NamedTuple):
    """Of one target, by block and cell: what counts against it, and out of how many."""

    against: Floats
    of: Floats
    allowed: float

    def holds(self, weights: Floats, cells: int) -> NDArray[np.bool_]:
        """For each row of weights of the blocks."""
        against, of = weights @ self.against, weights @ self.of
        spare = self.allowed * of * (1 + 1e-9)
        pooled = against.sum(axis=1) <= spare.sum(axis=1)
        broken = ((of >= CELL_LEAST) & (against > spare)).sum(axis=1)
        held: NDArray[np.bool_] = pooled & (broken <= CELLS_BROKEN_MAX * cells)
        return held


def _tally(done: Replayed, target: Target, blocks: _Blocks) -> _Tally:
    """A quantile is met where no more than its share reaches the bound, a mean where the sum is no
    more than the bound times their number."""
    at_s, values_ms, counts = _sample(done, target.metric)
    of = blocks.sums(at_s, counts)
    if target.statistic == "mean":
        return _Tally(blocks.sums(at_s, counts * values_ms), of, target.bound_ms)
    over = blocks.sums(at_s, counts * (values_ms >= target.bound_ms))
    return _Tally(over, of, share_allowed(target.statistic))


def excess(done: Replayed, target: Target, requests: int) -> float:
    """How many times what a target allows was missed (of a mean: it over its bound); broken over 1.

    Of so many `requests` in all: those that were not replayed are taken to have met it.
    """
    _, values_ms, counts = _sample(done, target.metric)
    of = float(counts.sum()) * requests / max(1, len(done.arrivals))
    if not of:
        return 0.0
    if target.statistic == "mean":
        return float((counts * values_ms).sum()) / of / target.bound_ms
    missed = float((counts * (values_ms >= target.bound_ms)).sum()) / of
    return missed / (share_allowed(target.statistic) or 1e-9)


def _sample(done: Replayed, metric: str) -> tuple[Floats, Floats, Floats]:
    """What a target is about: instants in s, values in ms, and how often each stands."""
    if metric == "itl":
        return _gaps(done.records)
    output = done.arrivals.output_tokens
    values_s = {
        "queue": done.queue_s,
        "ttft": done.ttft_s,
        "ttfo": done.ttft_s,  # a simulated reply is an answer from its first token on
        "e2e": done.e2e_s,
        "tpot": (done.e2e_s - done.ttft_s) / np.maximum(output - 1, 1),
    }[metric]
    kept = output > (1 if metric == "tpot" else 0)
    values_ms = np.where(np.isnan(values_s), REFUSED_MS, 1e3 * values_s)[kept]
    return done.arrivals.at_s[kept], values_ms, np.ones(values_ms.size)


def _gaps(records: Sequence[Record]) -> tuple[Floats, Floats, Floats]:
    """The gaps between tokens, at the instant they ended."""
    rows = np.concatenate([one.steps[one.steps[:, 3] > 0] for one in records])
    odd = np.concatenate([one.odd_gaps for one in records])
    start, end, steps, decoded = rows[:, :4].T
    return (
        np.concatenate((end, odd[:, 0])),
        1e3 * np.concatenate(((end - start) / steps, odd[:, 1])),
        np.concatenate((decoded * steps, np.ones(len(odd)))),
    )


# ------------------------------------------------------------------------------ capacity to demand


class Multiple(msgspec.Struct, frozen=True):
    """How many times the arrivals could be served within the SLO, with its 95 % interval.

    0 where not even 1/64 of them could; `hi` is None where the most that was tried was still
    served. The interval is that of the time observed, by a block bootstrap: what another such
    window might have shown. How sure the engine's parameters are is not in it; who has an interval
    of those asks again with their ends.
    """

    value: float
    lo: float
    hi: float | None
    breaks: tuple[str, ...]  # the targets that the first multiple too many misses
    requests: int  # replayed at a multiple of 1: of the busiest hours, where there were more
    blocks: int
    replays: int

    @property
    def ratio(self) -> Ratio:
        """Demand over capacity, which is infinite where nothing can be served."""
        lo = 0.0 if self.hi is None else _inverse(self.hi)
        return Ratio(_inverse(self.value), lo, _inverse(self.lo))


def _inverse(multiple: float) -> float:
    return 1 / multiple if multiple else math.inf


class _Trials:
    """Multiples of one demand that were replayed, and what counted against each target."""

    def __init__(
        self, serve: Callable[[Arrivals], Replayed], arrivals: Arrivals, blocks: _Blocks,
        targets: Sequence[Target], seed: int,
    ) -> None:  # fmt: skip
        self._serve, self._arrivals, self._seed = serve, arrivals, seed
        self._blocks, self._targets = blocks, targets
        self.tallies: dict[float, list[_Tally]] = {}

    def at(self, multiple: float) -> list[_Tally]:
        known = self.tallies.get(multiple)
        if known is None:
            done = self._serve(times(self._arrivals, multiple, self._seed))
            known = [_tally(done, target, self._blocks) for target in self._targets]
            self.tallies[multiple] = known
        return known

    def broken(self, multiple: float) -> tuple[str, ...]:
        once = np.ones((1, self._blocks.count))
        return tuple(
            f"{target.metric}:{target.statistic}<{target.bound_ms:g}ms"
            for target, tally in zip(self._targets, self.at(multiple), strict=True)
            if not tally.holds(once, self._blocks.cells)[0]
        )

    def bracket(self, start: float, step: float, near: float = BRACKET) -> tuple[float, float]:
        """The last multiple that holds and the first that does not, at most `near` apart; 0 or
        infinite where the ends of the range are reached."""
        held, missed = 0.0, math.inf
        multiple = start
        while held == 0.0 or missed == math.inf:
            if self.broken(multiple):
                missed, multiple = multiple, max(MULTIPLE_MIN, multiple / step)
            else:
                held, multiple = multiple, min(MULTIPLE_MAX, multiple * step)
            if missed == MULTIPLE_MIN or held == MULTIPLE_MAX:
                return held, missed
        while missed / held > near:
            middle = math.sqrt(held * missed)
            if self.broken(middle):
                missed = middle
            else:
                held = middle
        return held, missed

    def interval(self, value: float, ends: Ends) -> tuple[float, float | None]:
        """Between which the multiple lies when the blocks are drawn anew.

        Each trial's latencies are kept by block, so that a resampled window costs no replay, and
        no day is put beside another that it did not follow: queues stay whole. Of few blocks the
        interval is stretched about the value, by Student's t and n blocks for n - 1. Multiples
        further off are tried only while the resampled windows do not all end before them, and on
        the sides that are asked for.
        """
        n = self._blocks.count
        weights = np.random.default_rng(self._seed).multinomial(n, np.full(n, 1 / n), RESAMPLED)
        draws = weights.astype(np.float64)
        lo, hi = self._resampled(draws)
        for factor in BELOW if ends != "none" else ():
            if lo or value * factor < MULTIPLE_MIN:
                break
            self.at(value * factor)
            lo, _ = self._resampled(draws)
        for factor in ABOVE if ends == "both" else ():
            if math.isfinite(hi) or value * factor > MULTIPLE_MAX:
                break
            self.at(value * factor)
            _, hi = self._resampled(draws)
        lo, hi = min(value, lo), max(value, hi)
        if not lo or n < 2:
            return 0.0, hi if math.isfinite(hi) else None
        stretch = t975(n - 1) / t975(10**6) * math.sqrt(n / (n - 1))
        lo, hi = (value * (end / value) ** stretch for end in (lo, hi))
        return lo, hi if math.isfinite(hi) else None

    def _resampled(self, draws: Floats) -> tuple[float, float]:
        """The ends of the interval by what was tried so far: 0 or infinite where it is not far
        enough."""
        alive = np.ones(len(draws), dtype=bool)
        held, missed = np.zeros(len(draws)), np.full(len(draws), math.inf)
        for multiple in sorted(self.tallies):
            holds = np.logical_and.reduce(
                [one.holds(draws, self._blocks.cells) for one in self.tallies[multiple]]
            )
            missed[alive & ~holds] = multiple
            alive &= holds
            held[alive] = multiple
        lo = float(np.quantile(held, CI[0], method="lower"))
        return lo, float(np.quantile(missed, CI[1], method="higher"))


def capacity_ratio(
    spec: EngineSpec,
    arrivals: Arrivals,
    slo: Sequence[Target] = (),
    *,
    replicas: int = 1,
    routing: Routing = "round_robin",
    seed: int = 0,
    requests: int = REQUESTS_MOST,
    about: float | None = None,
    ends: Ends = "both",
) -> Multiple:
    """The largest multiple of the arrivals that so many replicas serve within the SLO.

    Found by bisection to 3 %; without an SLO a P95 wait of 2 s is asked for. `requests` bounds what
    is replayed at once: of more, those of the busiest hours, at least one. `about`: where to look
    first, if that is known; else a tenth of the requests tells it. `ends`: of the interval, that
    somebody asks for; each takes up to six further replays, and what is not asked for may be its
    widest. Raises UsageError where nothing arrived, or where the engine cannot be started.
    """
    if not len(arrivals):
        raise UsageError("no request came in this window: there is nothing to serve more of")

    def serve(some: Arrivals) -> Replayed:
        return replay(spec, some, replicas=replicas, routing=routing)

    blocks, targets = _Blocks(arrivals), tuple(slo) or (Wait(),)
    if about is None:
        few = busiest(arrivals, requests // 10)
        about, _ = _Trials(serve, few, blocks, targets, seed).bracket(1.0, 2.0, ROUGHLY)
    chosen = busiest(arrivals, round(requests / max(1.0, about)))
    trials = _Trials(serve, chosen, blocks, targets, seed)
    held, missed = trials.bracket(min(max(about, MULTIPLE_MIN), MULTIPLE_MAX), ROUGHLY)
    lo, hi = trials.interval(held, ends)
    return Multiple(
        value=held,
        lo=lo,
        hi=hi,
        breaks=trials.broken(missed) if math.isfinite(missed) else (),
        requests=len(chosen),
        blocks=blocks.count,
        replays=len(trials.tallies),
    )


# ---------------------------------------------------------------------------------------- headroom


class Headroom(msgspec.Struct, frozen=True):
    """How far what an engine serves at most has to lie above the mean load, to hold the SLO.

    `value` 1.2 is what a flat margin of 20 % provides. The mean load and the capacity in requests/s
    of this trace's own lengths. `lo` and `hi` are its 95 % interval, None without an end.
    """

    value: float
    lo: float | None
    hi: float | None
    saturated_rps: float
    mean_rps: float
    capacity: Multiple


def headroom(
    spec: EngineSpec,
    arrivals: Arrivals,
    slo: Sequence[Target] = (),
    *,
    replicas: int = 1,
    seed: int = 0,
    requests: int = REQUESTS_MOST,
) -> Headroom:
    """What the engine writes at most over the largest mean load at which the SLO holds."""
    found = capacity_ratio(spec, arrivals, slo, replicas=replicas, seed=seed, requests=requests)
    most = saturated_rps(spec, busiest(arrivals, requests), replicas)
    once = most / arrivals.mean_rps
    return Headroom(
        value=once * _inverse(found.value),
        lo=None if found.hi is None else once * _inverse(found.hi),
        hi=once * _inverse(found.lo) if found.lo else None,
        saturated_rps=most,
        mean_rps=arrivals.mean_rps,
        capacity=found,
    )


def saturated_rps(spec: EngineSpec, arrivals: Arrivals, replicas: int = 1) -> float:
    """Requests/s of these lengths while there is always another one waiting.

    By the middle four fifths of those that finish, where there are enough: neither ramp nor drain.
    """
    at_once = recorded(
        np.zeros(len(arrivals)), arrivals.prompt_tokens, arrivals.output_tokens,
        cached_tokens=arrivals.cached_tokens,
    )  # fmt: skip
    done = replay(spec, at_once, replicas=replicas).e2e_s
    done = np.sort(done[~np.isnan(done)])
    if not done.size:
        return 0.0
    lo, hi = done.size // 10, done.size - 1 - done.size // 10
    if done[hi] > done[lo]:
        return float((hi - lo) / (done[hi] - done[lo]))
    return float(done.size / done[-1])


def with_margin(
    spec: EngineSpec, arrivals: Arrivals, margin: float, *, replicas: int = 1, seed: int = 0
) -> Replayed:
    """What the requests see where the capacity is their mean load and a flat margin: 0.2 for 20 %.

    Raises UsageError where nothing arrived.
    """
    if not len(arrivals):
        raise UsageError("no request came in this window: there is nothing to serve")
    multiple = saturated_rps(spec, arrivals, replicas) / (arrivals.mean_rps * (1 + margin))
    return replay(spec, times(arrivals, multiple, seed), replicas=replicas)
