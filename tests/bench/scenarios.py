"""Planted scenarios: services whose truth is known are observed, swept and judged.

Each is a simulated engine under days to weeks of requests, one by one, in virtual time. What an
agent would have seen of it (minutes, with the faults that telemetry has) and what a sweep would
have measured go into a store; `agent.assess` judges the store. What the right finding is comes from
the simulator alone: whether the SLO held, hour by hour, and whether it would have held on less
hardware. The worst error is OVER_SIZED where less hardware would have broken the SLO.

`python -m tests.bench.scenarios [--seed=N] [WORD …]` judges those whose names hold a word, all
without one; other seeds are other requests, and other errors of the sweep.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.assess import Assessment, assess
from agent.history import History
from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import (
    Level,
    Measurement,
    Requests,
    Run,
    ServerView,
    Slo,
    Stats,
    Sweep,
    Target,
    TargetGpu,
    Verdict,
    Workload,
)
from agent.recall import Recall
from agent.sizing.arrivals import Arrivals, recorded, times
from agent.sizing.curve import parse_slo
from agent.sizing.engine import EngineSpec, kv_capacity_tokens, prefill_seconds
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.replay import Replayed, replay
from agent.sizing.simulate import Record, VirtualLevel, closed_loop
from agent.stats import Floats
from agent.when import utc
from tests.agent.recorded import Clocks, store

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
MONDAY = 1_788_739_200  # 2026-09-07 00:00 UTC
SLO = "ttft:p95<2s,itl:p95<60ms"
SAMPLE_S = 5
TIME_BOUNDS_S = (
    0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.06, 0.08, 0.1, 0.25, 0.5,
    0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, math.inf,
)  # fmt: skip
LENGTH_BOUNDS = (1.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, math.inf)

# --------------------------------------------------------------------------------------- the truth


class Box(msgspec.Struct, frozen=True):
    """Engines alike; `shares` is how the balancer spreads requests (none: evenly, at random)."""

    gpu: str = "l4"
    model: str = "llama-3.1-8b"
    precision: str = "fp8"
    replicas: int = 1
    shares: tuple[float, ...] = ()
    blocks: int | None = None
    max_num_seqs: int = 256
    slower: float = 1.0  # what heat or a power limit takes from the data sheet

    @property
    def spec(self) -> EngineSpec:
        return EngineSpec(
            _scaled(self.gpu, 1 / self.slower),
            model(self.model),
            precision=self.precision,
            num_gpu_blocks=self.blocks,
            max_num_seqs=self.max_num_seqs,
        )

    @property
    def smaller(self) -> tuple[EngineSpec, int]:
        """What less hardware is: a replica less, or one device of half of everything."""
        if self.replicas > 1:
            return self.spec, self.replicas - 1
        blocks = self.blocks or kv_capacity_tokens(self.spec) // 16
        half = msgspec.structs.replace(
            self.spec,
            gpu=_scaled(self.gpu, 0.5 / self.slower, memory=True),
            num_gpu_blocks=blocks // 2,
        )
        return half, 1


def _scaled(name: str, by: float, memory: bool = False) -> Any:
    card = gpu(name)
    return msgspec.structs.replace(
        card,
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s * by,
        flops={precision: flops * by for precision, flops in card.flops.items()},
        memory_bytes=card.memory_bytes * (by if memory else 1),
    )


class Traffic(msgspec.Struct, frozen=True):
    """Requests of gamma lengths; `peak_rps` is the mean rate of the busiest hour of a weekday."""

    peak_rps: float
    days: float = 7
    shape: str = "office"
    weekend: float = 0.3  # of a weekday
    growth: float = 0.0  # a week
    burst: float = 0.0  # squared coefficient of variation of the minutes' rates
    surge: tuple[float, float, float] = (0, 0, 1)  # from hour, to hour, times as much
    prompt: int = 400
    output: int = 1200
    cached: float = 0.0  # of each prompt
    seed: int = 1


SHAPES: dict[str, Callable[[Floats], Floats]] = {
    "flat": lambda hour: np.ones_like(hour),
    "office": lambda hour: 0.06 + 0.94 * np.exp(-0.5 * ((hour - 13.5) / 3.2) ** 2),
    "lunch": lambda hour: 0.15 + 0.85 * (np.abs(hour - 12.5) < 1),
    "evening": lambda hour: 0.1 + 0.9 * np.exp(-0.5 * ((hour - 20.0) / 2.0) ** 2),
}


@lru_cache(maxsize=4)
def came(traffic: Traffic) -> Arrivals:
    rng = np.random.default_rng(traffic.seed)
    starts = MINUTE_S * np.arange(round(traffic.days * 24 * 60), dtype=np.float64)
    rate = traffic.peak_rps * SHAPES[traffic.shape](starts % DAY_S / HOUR_S)
    rate *= np.where(starts // DAY_S % 7 >= 5, traffic.weekend, 1.0)
    rate *= (1 + traffic.growth) ** (starts / (7 * DAY_S))
    begin, end, factor = traffic.surge
    rate *= np.where((starts >= begin * HOUR_S) & (starts < end * HOUR_S), factor, 1.0)
    if traffic.burst:
        rate *= rng.gamma(1 / traffic.burst, traffic.burst, rate.size)
    counts = rng.poisson(rate * MINUTE_S)
    at_s = np.sort(np.repeat(starts, counts) + MINUTE_S * rng.random(counts.sum()))
    lengths = [
        np.clip(rng.gamma(2.0, mean / 2.0, at_s.size), 1, 6 * mean).astype(int).clip(1)
        for mean in (traffic.prompt, traffic.output)
    ]
    cached = np.floor(lengths[0] * traffic.cached)
    return recorded(
        at_s, *lengths, cached_tokens=cached, window_s=traffic.days * DAY_S, start_unix_s=MONDAY
    )


class Served(NamedTuple):
    """What the requests of one replica saw."""

    done: Replayed
    blocks: int

    @property
    def record(self) -> Record:
        return self.done.records[0]


def served(
    spec: EngineSpec, arrivals: Arrivals, replicas: int, shares: Sequence[float] = ()
) -> list[Served]:
    rng = np.random.default_rng(7)
    went = rng.choice(replicas, len(arrivals), p=shares or None)
    return [
        Served(done := replay(spec, arrivals.only(went == one)), done.records[0].num_blocks)
        for one in range(replicas)
    ]


@lru_cache(maxsize=4)
def played(box: Box, traffic: Traffic) -> list[Served]:
    return served(box.spec, came(traffic), box.replicas, box.shares)


class Hours(NamedTuple):
    broken: int
    counted: int
    pooled: bool  # whether all requests together broke it

    @property
    def breaks(self) -> bool:
        return self.pooled or (self.broken >= 3 and self.broken > 0.01 * self.counted)


def hours(parts: Sequence[Served], slo: Sequence[Slo]) -> Hours:
    """In how many hours of at least 30 requests the SLO broke."""
    ttft = _sample(parts, lambda one: (one.record.sent_s, one.done.ttft_s, None))
    itl = _sample(parts, lambda one: _gaps(one.record))
    requests = np.bincount((ttft[0] // HOUR_S).astype(int))
    counted = np.flatnonzero(requests >= 30)
    broken: set[int] = set()
    pooled = False
    for target in slo:
        at_s, values_s, weights = ttft if target.metric == "ttft" else itl
        over = np.where(1e3 * values_s >= target.bound_ms, weights, 0.0)
        allowed = 1 - float(target.statistic[1:]) / 100
        place = (at_s // HOUR_S).astype(int)
        against = np.bincount(place, over, requests.size)
        of = np.bincount(place, weights, requests.size)
        size = min(requests.size, against.size)
        share = against[:size] / np.maximum(of[:size], 1)
        broken |= {int(hour) for hour in counted if hour < size and share[hour] > allowed}
        pooled = pooled or bool(over.sum() > allowed * weights.sum())
    return Hours(len(broken), counted.size, pooled)


def _sample(
    parts: Sequence[Served], of: Callable[[Served], tuple[Floats, Floats, Floats | None]]
) -> tuple[Floats, Floats, Floats]:
    rows = [of(one) for one in parts]
    at_s, values = (np.concatenate([row[column] for row in rows]) for column in (0, 1))
    weights = np.concatenate([np.ones(row[0].size) if row[2] is None else row[2] for row in rows])
    return at_s, np.where(np.isnan(values), 1e9, values), weights


def _gaps(record: Record) -> tuple[Floats, Floats, Floats]:
    start, end, steps, decoded = record.steps[record.steps[:, 3] > 0][:, :4].T
    odd_end, odd_gap = record.odd_gaps.T if record.odd_gaps.size else np.empty((2, 0))
    return (
        np.concatenate((end, odd_end)),
        np.concatenate(((end - start) / steps, odd_gap)),
        np.concatenate((decoded * steps, np.ones(odd_end.size))),
    )


SURE = 1.35  # the middle of a capacity over the low end that two weeks and a sweep leave open


class Truth:
    """What the simulator says of a service, whatever is seen of it; each is found when asked for.

    `now`; whether the SLO breaks at 12 % `more` and `less`, and at 0.3 of the capacity being the
    demand (`busy`); whether less hardware holds it (`smaller`), with room for 15 %
    (`smaller_safe`), and with `SURE` beyond that (`smaller_clear`); whether requests are in flight
    in under 1 % of the time (`idle`).
    """

    def __init__(self, box: Box, traffic: Traffic, targets: str) -> None:
        self.box, self.traffic, self.slo = box, traffic, parse_slo(targets)

    def __str__(self) -> str:
        """What was asked for."""
        names = "more", "less", "smaller", "smaller_safe", "smaller_clear", "busy", "idle"
        known = [f"{name} {vars(self)[name]}" for name in names if name in vars(self)]
        return ", ".join((f"{self.now.broken} of {self.now.counted} hours broken", *known))

    @cached_property
    def now(self) -> Hours:
        return hours(played(self.box, self.traffic), self.slo)

    @cached_property
    def more(self) -> bool:
        return self.now.breaks or self._breaks(1.12)

    @cached_property
    def less(self) -> bool:
        return self.now.breaks and self._breaks(0.88)

    @cached_property
    def smaller(self) -> bool:
        return not self.now.breaks and not self._breaks(1.0, smaller=True)

    @cached_property
    def smaller_safe(self) -> bool:
        return self.smaller and not self._breaks(1 / 0.85, smaller=True)

    @cached_property
    def smaller_clear(self) -> bool:
        return self.smaller_safe and not self._breaks(SURE / 0.85, smaller=True)

    @cached_property
    def busy(self) -> bool:
        fuller = _more(self.traffic, peak_rps=self.traffic.peak_rps / 0.3)  # of its own instants
        return self.now.breaks or self._broken(came(fuller), self.box.spec, self.box.replicas)

    @cached_property
    def idle(self) -> bool:
        parts = played(self.box, self.traffic)
        in_flight_s = sum(float(np.nansum(part.done.e2e_s)) for part in parts)
        return in_flight_s < 0.01 * self.traffic.days * DAY_S

    def _breaks(self, multiple: float, *, smaller: bool = False) -> bool:
        arrivals = times(came(self.traffic), multiple, 5)
        # less hardware has less to be uneven about: what is left shares evenly
        if smaller:
            return self._broken(arrivals, *self.box.smaller)
        return self._broken(arrivals, self.box.spec, self.box.replicas, self.box.shares)

    def _broken(
        self, arrivals: Arrivals, spec: EngineSpec, n: int, shares: Sequence[float] = ()
    ) -> bool:
        """Three hours that break alone break it; only else more of them have to be served."""
        few = hours(served(spec, _busy(arrivals, 0.03), n, shares), self.slo)
        return few.broken >= 3 or hours(served(spec, _busy(arrivals), n, shares), self.slo).breaks


@lru_cache(maxsize=64)
def truth(box: Box, traffic: Traffic, targets: str) -> Truth:
    return Truth(box, traffic, targets)


def _busy(arrivals: Arrivals, share: float = 0.2) -> Arrivals:
    """This share of the hours, with the most requests, which are the ones that can break."""
    if not len(arrivals):
        return arrivals
    per_hour = np.bincount(arrivals.hours)
    least = np.quantile(per_hour, 1 - share)
    return arrivals.only(per_hour[arrivals.hours] >= max(least, 1))


# ------------------------------------------------------------------------------- what an agent sees


def minutes_of(
    part: Served, source: str, traffic: Traffic, gauge_factor: float = 1.0
) -> list[Minute]:
    """One replica's minutes, as a scrape every 5 s makes them."""
    record, arrivals = part.record, part.done.arrivals
    n = round(traffic.days * 24 * 60)
    samples = SAMPLE_S * np.arange(n * MINUTE_S // SAMPLE_S, dtype=np.float64)

    def passed(instants: Floats) -> Floats:
        known = np.sort(instants[~np.isnan(instants)])
        return np.searchsorted(known, samples, side="right").astype(np.float64)

    arrived, admitted, left = map(passed, (record.sent_s, record.admitted_s, record.finished_s))
    at = np.searchsorted(record.steps[:, 1], samples, side="left")
    used = np.append(record.steps[:, 8], 0.0)[at] if record.steps.size else np.zeros(samples.size)
    busy = admitted > left
    gauges = {
        "requests_running": gauge_factor * (admitted - left),
        "requests_waiting": gauge_factor * (arrived - admitted),
        "kv_usage_ratio": np.where(busy, used / part.blocks, 0.0),
        "kv_capacity_tokens": np.full(samples.size, 16.0 * part.blocks),
    }
    firsts, ends = record.first_s, record.finished_s
    gaps_at, gaps, weights = _gaps(record)
    once = np.ones(firsts.size)
    told = {
        "ttft_seconds": (firsts, part.done.ttft_s, once, TIME_BOUNDS_S),
        "itl_seconds": (gaps_at, gaps, weights, TIME_BOUNDS_S),
        "e2e_seconds": (ends, part.done.e2e_s, once, TIME_BOUNDS_S),
        "queue_seconds": (record.admitted_s, part.done.queue_s, once, TIME_BOUNDS_S),
        "prompt_length_tokens": (ends, arrivals.prompt_tokens, once, LENGTH_BOUNDS),
        "output_length_tokens": (ends, arrivals.output_tokens, once, LENGTH_BOUNDS),
    }
    steps = record.steps
    counters = {
        "requests_received_total": _summed(record.sent_s, once, n),
        "requests_finished_total": _summed(ends, once, n),
        "prompt_tokens_total": _summed(firsts, arrivals.prompt_tokens, n),
        "output_tokens_total": _summed(firsts, once, n) + _summed(gaps_at, weights, n),
        "preemptions_total": _summed(steps[:, 1], steps[:, 9], n),
        "prefix_cache_queries_total": _summed(firsts, arrivals.prompt_tokens, n),
        "prefix_cache_hits_total": _summed(firsts, arrivals.cached_tokens, n),
    }
    histograms = {}
    for name, (instants, values, weight, bounds) in told.items():
        counters[f"{name}_sum"] = _summed(instants, values * weight, n)
        counters[f"{name}_count"] = _summed(instants, weight, n)
        histograms[name] = bounds, _counted(instants, values, weight, bounds, n)
    return list(_records(source, n, gauges, counters, histograms))


def _summed(instants: Floats, values: NDArray[Any], n: int) -> Floats:
    known = ~np.isnan(instants) & (instants < n * MINUTE_S)
    place = (instants[known] // MINUTE_S).astype(int)
    return np.bincount(place, np.asarray(values, dtype=float)[known], n)


def _counted(
    instants: Floats, values: NDArray[Any], weights: Floats, bounds: Sequence[float], n: int
) -> Floats:
    known = ~np.isnan(instants) & (instants < n * MINUTE_S)
    place = (instants[known] // MINUTE_S).astype(int)
    bucket = np.searchsorted(bounds, values[known], side="left")
    flat = np.bincount(place * len(bounds) + bucket, weights[known], n * len(bounds))
    return flat.reshape(n, len(bounds))


def _records(
    source: str, n: int, gauges: dict[str, Floats], counters: dict[str, Floats],
    histograms: dict[str, tuple[tuple[float, ...], Floats]],
) -> Iterator[Minute]:  # fmt: skip
    shaped = {name: one.reshape(n, -1) for name, one in gauges.items()}
    figures = {
        name: np.stack((one.mean(1), one.min(1), one.max(1), one[:, -1]), 1).tolist()
        for name, one in shaped.items()
    }
    rises = {name: one.tolist() for name, one in counters.items()}
    totals = {name: np.cumsum(one).tolist() for name, one in counters.items()}
    tables = {name: (bounds, table.tolist()) for name, (bounds, table) in histograms.items()}
    for at in range(n):
        values = [MinuteValue(name, (), 12, *rows[at]) for name, rows in figures.items()]
        for name, rise in rises.items():
            total = totals[name][at]
            values.append(MinuteValue(name, (), 12, total, total, total, total, rise[at]))
        told = tuple(
            MinuteHistogram(name, (), bounds, tuple(rows[at]))
            for name, (bounds, rows) in tables.items()
            if any(rows[at])
        )
        yield Minute(source, MONDAY + at * MINUTE_S, tuple(values), told, float(MINUTE_S))


# -------------------------------------------------------------------------------- what a sweep sees

LOADS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)


def swept(one: Scenario) -> Sweep:
    """A closed-loop sweep of one replica with production's mean lengths."""
    return sweep_of(one.box, one.traffic)


def sweep_of(box: Box, traffic: Traffic, loads: tuple[int, ...] = LOADS, name: str = "") -> Sweep:
    prompt, output = traffic.prompt, traffic.output
    levels = [_level(box, load, traffic) for load in loads]
    names = {"l4": "NVIDIA L4", "h100-sxm": "NVIDIA H100 80GB HBM3"}
    called = f"{name or box.model}-{box.precision}" if box.precision != "bf16" else box.model
    return Sweep(
        run=Run(id=f"{box}{prompt}{output}"[:200], started_at=utc(MONDAY - DAY_S)),
        target=Target(
            url="http://gpu:8000",
            model=called,
            engine="vllm",
            gpus=[TargetGpu(names[box.gpu], "GPU-0")],
        ),
        workload=Workload(input_tokens=prompt, output_tokens=output),
        levels=levels,
    )


@lru_cache(maxsize=256)
def _ran(box: Box, load: int, prompt: int, output: int) -> VirtualLevel:
    about_s = output * 0.05 * max(1.0, load / 64)
    return closed_loop(box.spec, load, prompt, output, max(180.0, 6 * about_s))


def _level(box: Box, load: int, traffic: Traffic) -> Level:
    prompt, output = traffic.prompt, traffic.output
    seen = _ran(box, load, prompt, output)
    rng = np.random.default_rng((traffic.seed, load))
    noise = float(np.exp(rng.normal(0, 0.01)))
    rate = seen.output_tokens_per_s * noise
    return Level(
        concurrency=load,
        started_at=utc(MONDAY - DAY_S),
        duration_s=seen.duration_s,
        window_s=seen.window_s,
        requests=Requests(seen.requests, 0, 0, {}),
        request_throughput=seen.request_throughput * noise,
        output_tokens_per_s=rate,
        output_tokens_per_s_ci95=(0.98 * rate, 1.02 * rate),
        ttft_ms=seen.ttft_ms,
        itl_ms=seen.itl_ms,
        tpot_ms=seen.tpot_ms,
        e2e_ms=seen.e2e_ms,
        prompt_tokens=Stats(mean=float(prompt), n=seen.requests),
        output_tokens=Stats(mean=float(output), n=seen.requests),
        measurement=Measurement(valid=True, reasons=[], in_flight_mean=float(load)),
        server=_view(box.spec, seen, prompt),
    )


def _view(spec: EngineSpec, seen: VirtualLevel, prompt: int) -> ServerView:
    return ServerView(
        running_mean=seen.running_mean,
        running_max=float(seen.running_max),
        waiting_mean=seen.waiting_mean,
        waiting_max=float(seen.waiting_max),
        kv_usage_mean=seen.kv_usage_mean,
        kv_usage_max=seen.kv_usage_max,
        preemptions=seen.preemptions,
        prefix_hit_rate=0.0,
        queue_ms=seen.queue_ms.mean,
        prefill_ms=1e3 * prefill_seconds(spec, prompt),
        kv_capacity_tokens=kv_capacity_tokens(spec),
        samples=100,
    )


Curve = Callable[["Scenario"], Sweep | None]


def no_sweep(_: Scenario) -> None:
    return None


def lengths(prompt: int, output: int) -> Curve:
    return lambda one: sweep_of(one.box, _more(one.traffic, prompt=prompt, output=output))


def up_to(load: int) -> Curve:
    return lambda one: sweep_of(one.box, one.traffic, tuple(x for x in LOADS if x <= load))


def invalid_from(load: int, *reasons: str) -> Curve:
    """Levels from a load on that say of themselves that they do not count."""

    def spoil(level: Level) -> Level:
        if (level.concurrency or 0) < load:
            return level
        return msgspec.structs.replace(level, measurement=Measurement(False, list(reasons)))

    def curve(one: Scenario) -> Sweep:
        sweep = swept(one)
        return msgspec.structs.replace(sweep, levels=[spoil(level) for level in sweep.levels])

    return curve


def throttled_sweep(one: Scenario) -> Sweep:
    """Measured while heat held the clocks down, which the GPU's readings show."""
    from agent.model import GpuView

    slow = msgspec.structs.replace(one.box, slower=2.0)
    sweep = sweep_of(slow, one.traffic)
    hot = [GpuView("GPU-0", clocks_throttled=True)]
    return msgspec.structs.replace(
        sweep, levels=[msgspec.structs.replace(level, gpu=hot) for level in sweep.levels]
    )


def of_another(box: Box) -> Curve:
    """A curve of other hardware, known to be of this model and no more."""

    def curve(one: Scenario) -> Sweep:
        sweep = sweep_of(box, one.traffic)
        target = msgspec.structs.replace(sweep.target, url="http://elsewhere:8000", gpus=[])
        return msgspec.structs.replace(sweep, target=target)

    return curve


def of_model(name: str) -> Curve:
    return lambda one: sweep_of(one.box, one.traffic, LOADS, name)


# ------------------------------------------------------------------------------------------ faults

Fault = Callable[[list[Minute]], list[Minute]]


def without(begin_h: float, end_h: float, every_h: float = 1e9) -> Fault:
    """No agent from one hour to another, again and again."""

    def fault(minutes: list[Minute]) -> list[Minute]:
        def is_gone(one: Minute) -> bool:
            hour = (one.start_unix_s - MONDAY) / HOUR_S % every_h
            return begin_h <= hour < end_h

        return [one for one in minutes if not is_gone(one)]

    return fault


def marked(mark: str, every: int) -> Fault:
    def fault(minutes: list[Minute]) -> list[Minute]:
        resets = 1 if mark == "restart" else 0
        return [
            msgspec.structs.replace(one, marks=(mark,), resets=resets)
            if at % every == every - 1
            else one
            for at, one in enumerate(minutes)
        ]

    return fault


def only(*kept: str) -> Fault:
    """A server whose page has no more than these."""

    def fault(minutes: list[Minute]) -> list[Minute]:
        return [
            msgspec.structs.replace(
                one,
                values=tuple(value for value in one.values if value.name in kept),
                histograms=tuple(one for one in one.histograms if one.name in kept),
            )
            for one in minutes
        ]

    return fault


GAUGES = ("requests_running", "requests_waiting", "requests_finished_total", "output_tokens_total",
          "prompt_tokens_total", "kv_usage_ratio")  # fmt: skip


def counting(name: str, share: float) -> Fault:
    """A further counter that rises with the requests received."""

    def fault(minutes: list[Minute]) -> list[Minute]:
        def more(one: Minute) -> Minute:
            received = next(v for v in one.values if v.name == "requests_received_total")
            rise = share * (received.increase or 0.0)
            extra = MinuteValue(name, (), 12, 0, 0, 0, share * received.last, rise)
            return msgspec.structs.replace(one, values=(*one.values, extra))

        return [more(one) for one in minutes]

    return fault


def doubled(minutes: list[Minute]) -> list[Minute]:
    """Gauges that count every request twice, as of two ranks that share the work."""

    def twice(value: MinuteValue) -> MinuteValue:
        if value.name not in ("requests_running", "requests_waiting"):
            return value
        return MinuteValue(value.name, (), value.n, 2 * value.mean, 2 * value.min, 2 * value.max,
                           2 * value.last)  # fmt: skip

    return [msgspec.structs.replace(one, values=tuple(map(twice, one.values))) for one in minutes]


# --------------------------------------------------------------------------------------- scenarios


class Scenario(msgspec.Struct, frozen=True):
    """`planted`: the finding that its evidence allows, where the simulator's truth is not to be
    seen in it; `also`: what may as well be said. `codes`: reasons that have to be among those."""

    name: str
    box: Box
    traffic: Traffic
    slo: str = SLO
    declared: bool = True
    curve: Curve = swept
    faults: tuple[Fault, ...] = ()
    planted: str | None = None
    also: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    days: float = 0.0  # the window; 0: all of the traffic
    expect_concurrency: float | None = None
    trains: bool = False
    changed_h: float | None = None  # when the flags changed
    changed_to: str = ""  # the model since then
    throttled: float = 0.0  # share of the time


L4, H100 = Box(), Box(gpu="h100-sxm", precision="bf16")
TWO, THREE = Box(replicas=2), Box(replicas=3)
KV = Box(blocks=2000)  # a cache of 32,000 tokens: 32 requests in the mean
CAP = Box(max_num_seqs=8)
WEEK, LONG, LITTLE = Traffic(0.2), Traffic(0.2, days=16), Traffic(0.03, days=16)
PERSON = Traffic(0.002, days=16, shape="flat")
THIN, INVALID = "INSUFFICIENT_DATA", "INVALID_MEASUREMENT"


def _more(traffic: Traffic, **fields: Any) -> Traffic:
    return msgspec.structs.replace(traffic, **fields)


SHORT = _more(WEEK, days=3)
FULL = _more(SHORT, peak_rps=0.35)  # for a box with a small cache

SCENARIOS: tuple[Scenario, ...] = (
    # it fits
    Scenario("fits", L4, WEEK),
    Scenario("fits, day and night alike", L4, _more(WEEK, shape="flat", peak_rps=0.16)),
    Scenario("fits, evenings", L4, _more(WEEK, shape="evening")),
    Scenario("fits, bursts", L4, _more(WEEK, burst=0.3, peak_rps=0.14)),
    Scenario("fits, grows", L4, _more(WEEK, days=14, growth=0.15, peak_rps=0.16)),
    Scenario("fits, prompts half cached", L4, _more(WEEK, cached=0.5),
             codes=("PREFIX_CACHE_DEPENDENT",)),
    Scenario("fits, no sweep", L4, WEEK, curve=no_sweep),
    Scenario("fits, gaps every day", L4, WEEK, faults=(without(3, 6, 24),)),
    Scenario("fits, restarts", L4, WEEK, faults=(marked("restart", 400),)),
    Scenario("fits, the clock jumps", L4, WEEK, faults=(marked("clock_jump", 300),)),
    Scenario("fits, gauges alone are told", L4, WEEK, faults=(only(*GAUGES),)),
    Scenario("fits, two replicas", TWO, _more(WEEK, peak_rps=0.38)),
    Scenario("fits, one person", L4, PERSON),
    Scenario("fits, two weeks", L4, LONG),
    Scenario("fits, trains too", H100, LITTLE, trains=True, planted="RIGHT_SIZED",
             also=("OVER_OFF_PEAK",)),
    # too small
    Scenario("too small, decode", L4, _more(SHORT, peak_rps=0.5)),
    Scenario("too small, decode, day and night", L4, _more(SHORT, shape="flat", peak_rps=0.45)),
    Scenario("too small, cache", KV, FULL, codes=("KV_MEMORY",)),
    Scenario("too small, admission cap", CAP, SHORT, codes=("ADMISSION_CAP",)),
    Scenario("too small, no sweep", KV, FULL, curve=no_sweep),
    Scenario("too small, lunch", KV, _more(FULL, shape="lunch"), codes=("DIURNAL_PEAK",)),
    Scenario("too small, bursts", KV, _more(WEEK, burst=4.0, peak_rps=0.12),
             codes=("BURST_ONLY",)),
    Scenario("too small, grew", L4, _more(WEEK, days=14, growth=0.9)),
    Scenario("too small, one day", KV, _more(WEEK, peak_rps=0.1, surge=(34, 42, 5))),
    Scenario("too small, long prompts", L4,
             _more(WEEK, prompt=6000, output=100, peak_rps=0.9, days=3)),
    Scenario("too small, gaps", KV, FULL, faults=(without(2, 9, 24),)),
    Scenario("too small, many gave up", KV, FULL,
             faults=(counting("requests_aborted_total", 0.2),), codes=("RETRY_INFLATED",)),
    Scenario("too small, two replicas", Box(replicas=2, blocks=2000), _more(WEEK, peak_rps=0.7)),
    Scenario("too small, throttled", Box(slower=1.7), SHORT,
             curve=lambda one: sweep_of(L4, one.traffic),
             throttled=0.6, codes=("THROTTLED",)),
    Scenario("too small for what is expected", L4, SHORT, expect_concurrency=80,
             planted="UNDER_SIZED"),
    # too large
    Scenario("too large, one device", H100, LITTLE),
    Scenario("too large, one person", H100, PERSON),
    Scenario("too large, three replicas", THREE, _more(LONG, peak_rps=0.3)),
    Scenario("too large by far, three replicas", THREE, _more(LONG, peak_rps=0.18)),
    Scenario("too large, two replicas", TWO, _more(LITTLE, peak_rps=0.08)),
    Scenario("too large, gaps", H100, LITTLE, faults=(without(5, 6, 24),)),
    Scenario("too large, bursts", H100, _more(LITTLE, burst=1.0)),
    # not to be taken away
    Scenario("two replicas, both needed", TWO, _more(LONG, peak_rps=0.4)),
    Scenario("two replicas, bursts need both", TWO, _more(LONG, peak_rps=0.2, burst=1.0)),
    Scenario("two replicas, a surge needed both", TWO,
             _more(LONG, peak_rps=0.15, surge=(200, 206, 3.2))),
    Scenario("two replicas, growing into both", TWO, _more(LONG, peak_rps=0.16, growth=0.6)),
    Scenario("half the cache would be too little", Box(gpu="h100-sxm", precision="bf16",
             blocks=1000), _more(LONG, peak_rps=0.25)),
    Scenario("half the speed would be too slow", L4, LITTLE),
    Scenario("uneven replicas", Box(replicas=2, shares=(0.9, 0.1)), LONG,
             planted=THIN, also=("RIGHT_SIZED", "OVER_OFF_PEAK")),
    # the evidence is thin
    Scenario("too large, but ten days", H100, LITTLE, days=10, planted=THIN),
    Scenario("too large, but weekends not observed", H100, LITTLE,
             faults=(without(5 * 24, 7 * 24, 7 * 24),), planted=THIN),
    Scenario("too large, but no SLO declared", H100, LITTLE, declared=False, planted=THIN),
    Scenario("too large, but swept with other lengths", H100, LITTLE, curve=lengths(100, 100),
             planted=THIN),
    Scenario("too large by another box's curve", L4, LITTLE,
             curve=of_another(msgspec.structs.replace(H100, precision="fp8")), planted=THIN),
    Scenario("too large, but many were turned away", H100, LITTLE,
             faults=(counting("requests_rejected_total", 0.1),), planted=THIN),
    Scenario("twenty minutes", L4, _more(WEEK, shape="flat", days=1), days=20 / 1440,
             planted=THIN),
    Scenario("no sweep, no SLO", L4, SHORT, curve=no_sweep, declared=False, planted=THIN),
    Scenario("no sweep, no histograms", L4, SHORT, curve=no_sweep, faults=(only(*GAUGES),),
             planted=THIN),
    Scenario("no sweep, hardly a request", L4, PERSON, curve=no_sweep,
             planted=THIN),
    Scenario("a sweep that ends below the demand", L4, SHORT, curve=up_to(4),
             faults=(only(*GAUGES),), planted=THIN),
    Scenario("another model since yesterday", L4, SHORT, curve=of_model("llama-3.2-3b"),
             planted="RIGHT_SIZED", also=("OVER_OFF_PEAK",)),
    # the measurement is wrong
    Scenario("flags changed since the sweep", L4, SHORT, changed_h=40, planted=INVALID),
    Scenario("client-limited sweep", L4, SHORT,
             curve=invalid_from(8, "client: loop lag p99 60 ms, bound 5 ms"), planted=INVALID),
    Scenario("foreign traffic in the sweep", L4, SHORT,
             curve=invalid_from(8, "foreign: 40 requests of others"), planted=INVALID),
    Scenario("throttled sweep", L4, SHORT, curve=throttled_sweep, throttled=1e-9, planted=INVALID),
    Scenario("gauges count twice", L4, SHORT, faults=(doubled,), planted=INVALID),
    # nobody asks, or nobody could
    Scenario("nobody asks", H100, Traffic(0.0, days=8), planted="IDLE"),
    Scenario("hardly anybody asks", H100, Traffic(0.0003, days=8, shape="flat"), planted="IDLE"),
    Scenario("nobody asks, no sweep", L4, Traffic(0.0, days=3), curve=no_sweep, planted="IDLE"),
    Scenario("one request alone is too slow", L4, SHORT, slo="itl:p95<25ms",
             planted="INFEASIBLE_SLO"),
)  # fmt: skip

QUICK = (
    "too large, two replicas", "too small, cache", "too large, but ten days", "gauges count twice",
    "nobody asks, no sweep", "twenty minutes",
)  # fmt: skip
ALL = tuple(one.name for one in SCENARIOS)

OFF_PEAK_HOURS = 56
FITS = ("RIGHT_SIZED", "OVER_OFF_PEAK")


def right(one: Scenario, known: Truth) -> tuple[str, ...]:
    """What may be said of it; the first is what should be."""
    if one.planted:
        return one.planted, *one.also
    if known.idle:
        return ("IDLE",)
    if known.now.breaks:
        return ("UNDER_SIZED",) if known.less else ("UNDER_SIZED", "BORDERLINE")
    close = ("BORDERLINE",) if known.more else ()
    is_over = (one.days or one.traffic.days) >= 14 and known.smaller_safe
    if is_over and known.smaller_clear:
        return ("OVER_SIZED",)
    off_peak = _quiet_hours(one.traffic) >= OFF_PEAK_HOURS and known.busy
    fits = FITS[::-1] if off_peak else FITS[:1]
    if is_over:  # by how little, the verdict cannot know: the high end of its D/K' has to be clear
        return "OVER_SIZED", fits[0]
    return (*fits[:1], *close) if one.curve is not no_sweep else (*FITS, *close)


def _quiet_hours(traffic: Traffic) -> int:
    """Hours of the week under 30 % of the busiest."""
    hour = np.arange(168.0)
    rate = SHAPES[traffic.shape](hour % 24 + 0.5) * np.where(hour < 120, 1.0, traffic.weekend)
    return int((rate < 0.3 * rate.max()).sum())


# ----------------------------------------------------------------------------------------- judging


class Judged(NamedTuple):
    """`is_dangerous`: OVER_SIZED where less hardware would have broken the SLO."""

    name: str
    is_thin: bool
    right: tuple[str, ...]
    verdict: Verdict
    is_right: bool
    is_dangerous: bool
    true: str
    cpu_s: float


def judged(one: Scenario, folder: Path) -> Judged:
    began = time.process_time()
    kept = folder / f"{uuid4()}.db"
    verdict = _judge(one, kept).verdict
    kept.unlink()
    known = truth(one.box, one.traffic, one.slo)
    can_be = right(one, known)
    codes = {reason.code for reason in verdict.reasons}
    return Judged(
        name=one.name,
        is_thin=one.planted == THIN,
        right=can_be,
        verdict=verdict,
        is_right=verdict.finding in can_be and codes >= set(one.codes),
        is_dangerous=verdict.finding == "OVER_SIZED" and not known.smaller,
        true=str(known),
        cpu_s=time.process_time() - began,
    )


def _judge(one: Scenario, path: Path) -> Assessment:
    """Of a service that the agent already judged each day: the newest verdict."""
    copyfile(_observed(one.box, one.traffic, one.faults, one.throttled, path.parent), path)
    clocks = Clocks(MONDAY - DAY_S)
    history = store(path, clocks)
    sources = _sources(one.box)
    sweep = one.curve(one)
    served_as = sweep.target.model if sweep else one.box.model
    if one.curve is not swept and "another model" in one.name:
        served_as = f"{one.box.model}-{one.box.precision}"
    for source in sources:
        history.add_fingerprint(source, "first", {"model": served_as, "gpu": "0.9"})
    if sweep is not None:
        mine = sweep.target.url == "http://gpu:8000"
        history.add_curve(sweep, sources[0] if mine else None).result(60)
    if one.changed_h is not None:
        clocks.wall_ns = round((MONDAY + one.changed_h * HOUR_S) * 1e9)
        history.add_fingerprint(sources[0], "second", {"model": served_as, "gpu": "0.5"})
    assert history.flush(60)
    end_s = MONDAY + one.traffic.days * DAY_S
    window_s = (one.days or min(one.traffic.days, 14)) * DAY_S

    def ask(now_s: float) -> Assessment:
        with Recall(path) as recall:
            found = assess(
                recall,
                server="chat" if len(sources) == 1 else None,
                service="chat" if len(sources) > 1 else None,
                window_s=window_s,
                slo=parse_slo(one.slo) if one.declared else (),
                expect_concurrency=one.expect_concurrency,
                trains=one.trains,
                now_s=now_s,
                urls={"chat": "http://gpu:8000"},
            )
        clocks.wall_ns = round(now_s * 1e9)
        history.add_assessment(found.scope, found.verdict).result(60)
        return found

    found = ask(end_s)
    if found.verdict.found == "OVER_SIZED":  # what takes days to be said; asked in their order
        history.submit(lambda db: db.execute("delete from assessments")).result(60)
        found = [ask(end_s - days_ago * DAY_S) for days_ago in (2, 1, 0)][-1]
    history.close()
    return found


def _sources(box: Box) -> list[str]:
    return ["chat"] if box.replicas == 1 else [f"chat-{at}" for at in range(box.replicas)]


@lru_cache(maxsize=8)
def _observed(
    box: Box, traffic: Traffic, faults: tuple[Fault, ...], throttled: float, folder: Path
) -> Path:
    """A store with its minutes; scenarios that differ in nothing else have copies of it."""
    path = folder / f"{uuid4()}.db"
    history = store(path, Clocks(MONDAY - DAY_S))
    for source, part in zip(_sources(box), played(box, traffic), strict=True):
        history.add_source(source, service="chat", gpus=[f"GPU-{source[5:] or 0}"])
        minutes = minutes_of(part, source, traffic)
        for fault in faults:
            minutes = fault(minutes)
        _write(history, source, minutes)
    if throttled:
        _write(history, "gpu", list(_hot(traffic, throttled)))
    history.close()
    return path


def _write(history: History, source: str, minutes: Sequence[Minute]) -> None:
    """Not faster than they are written: what waits is bounded."""
    for at in range(0, len(minutes), 400):
        history.add_minutes(source, minutes[at : at + 400])
        assert history.flush(60)
    assert history.state().minutes_dropped == 0


def _hot(traffic: Traffic, share: float) -> Iterator[Minute]:
    label = (("gpu", "GPU-0"),)
    for at in range(round(traffic.days * 24 * 60)):
        values = (
            MinuteValue("gpu_throttled", label, 60, share, 0, 1, 1),
            MinuteValue("gpu_clock_event_reasons", label, 60, 0x40, 0, 0x40, 0x40),
        )
        yield Minute("gpu", MONDAY + at * MINUTE_S, values, (), 60.0)


# ---------------------------------------------------------------------------------------- the table


def show(names: Sequence[str], folder: Path, *, seed: int = 1, every: bool = False) -> list[Judged]:
    """Judges those on all processors; prints those that are wrong, or every one, and the matrix."""
    found: list[Judged] = []
    workers = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
    with workers as pool:
        waiting = [pool.submit(_judged_alike, *some) for some in _alike(names, seed, folder)]
        for done in as_completed(waiting):
            some = done.result()
            found += some
            lines = [_line(one) for one in some if every or not one.is_right]
            print("\n".join(lines), end="\n" * bool(lines), flush=True)
    print("\n".join(matrix(found)))
    return found


def _alike(names: Sequence[str], seed: int, folder: Path) -> list[tuple[list[str], int, Path]]:
    """Scenarios of one service together, which is then simulated once; the longest ones first."""
    groups: dict[tuple[Box, Traffic], list[str]] = {}
    for one in SCENARIOS:
        if one.name in names:
            service = one.box, one.traffic
            groups.setdefault(service, []).append(one.name)

    def work(service: tuple[Box, Traffic]) -> float:
        box, traffic = service
        return traffic.days * box.replicas * len(groups[service])

    return [(groups[one], seed, folder) for one in sorted(groups, key=work, reverse=True)]


def _judged_alike(names: Sequence[str], seed: int, folder: Path) -> list[Judged]:
    return [
        judged(msgspec.structs.replace(one, traffic=_more(one.traffic, seed=seed)), folder)
        for one in SCENARIOS
        if one.name in names
    ]


def _line(one: Judged) -> str:
    codes = ",".join(reason.code for reason in one.verdict.reasons)
    return (
        f"{'ok   ' if one.is_right else 'WRONG'} {one.name}: {one.verdict.finding} [{codes}],"
        f" right is {' or '.join(one.right)}; true: {one.true} ({one.cpu_s:.1f} s of CPU)"
        f"\n      {one.verdict.summary}"
        + "".join(f"\n      - {line}" for line in one.verdict.missing[:3])
    )


def matrix(found: Sequence[Judged]) -> list[str]:
    """What was right against what was said, as Markdown; of several that are right, what was said
    is, if it is one of them."""
    pairs = Counter(
        (one.verdict.finding if one.verdict.finding in one.right else one.right[0],
         one.verdict.finding)
        for one in found
    )  # fmt: skip
    said = sorted({finding for _, finding in pairs})
    lines = [
        f"| right is | {' | '.join(said)} |",
        f"| --- | {' | '.join('---:' for _ in said)} |",
    ]
    for row in sorted({finding for finding, _ in pairs}):
        cells = (str(pairs[row, finding] or "") for finding in said)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def main(words: Sequence[str]) -> int:
    seed = next((int(word[7:]) for word in words if word.startswith("--seed=")), 1)
    words = [word for word in words if not word.startswith("--")]
    names = [one.name for one in SCENARIOS if not words or any(word in one.name for word in words)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = show(names, Path(folder), seed=seed, every=True)
    good = sum(one.is_right for one in found)
    dangerous = sum(one.is_dangerous for one in found)
    took = f"{time.monotonic() - began:.0f} s, {sum(one.cpu_s for one in found):.0f} s of CPU"
    print(f"\n{good} of {len(found)} right, {dangerous} dangerous; {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
