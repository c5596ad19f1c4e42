"""Which other configurations would hold a load, by prediction, and what they would cost.

Pure. A candidate holds it at the low end of its interval or not at all: its tokens/s there have to
be enough, its latencies at their high end within the SLO, with nobody waiting. Predictions are of
means; a statistic of the SLO is taken to lie as far above its mean as on the box that was measured
(where that does not tell, nothing is a candidate). Devices of another vendor are none: nothing
follows for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agent.model import Level, Slo, Sweep, Target, UsageError
from agent.sizing import curve as curves
from agent.sizing.curve import format_slo
from agent.sizing.engine import EngineSpec, kv_capacity_tokens, sequences_that_fit
from agent.sizing.hardware import Gpu, device, gpu, gpus
from agent.sizing.models import model, precision_in
from agent.sizing.money import HOURS_A_MONTH, Prices, Usd, hourly, saving
from agent.sizing.predict import (
    Basis,
    Deployment,
    Interval,
    PredictedLevel,
    TtftScale,
    predict,
    ttft_scale,
)
from agent.sizing.rules import DEFAULTS

if TYPE_CHECKING:
    from agent.sizing.fit import Fit

_TPS = (1, 2, 4, 8)
_REPLICAS = (1, 2, 3, 4, 6, 8, 12, 16)
# Requests at once that are tried on one engine, to find how many it takes for a rate.
_AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOO_OLD = ("Volta", "Turing")  # have no bf16, and engines give them up
_BY_THE_RACK = "NVL72"  # nobody sells one of these
_UTILIZATION = 0.9  # vLLM's own default: the part of a GPU's memory that it takes
_BLOCKS_FREE = 0.5  # a cache under this part of what would fit was made small by a flag


class Box(msgspec.Struct, frozen=True):
    """What stands there: so many engines alike, with `mean_w` of all their GPUs where known."""

    spec: EngineSpec
    replicas: int = 1
    engine: str = "vllm"
    mean_w: float | None = None

    @property
    def gpus(self) -> int:
        return self.spec.tp * self.replicas


class Need(msgspec.Struct, frozen=True):
    """What has to be held, of the whole service.

    `requests_per_s` arrive on their own, and at once there are as many as that takes, with room for
    bursts; `at_once` are there in any case. `tails`: by target, its statistic over the mean.
    `personal`: one person's, who may have a consumer's card; a data centre may not.
    """

    input_tokens: float
    output_tokens: float
    at_once: float
    slo: tuple[Slo, ...]
    tails: Mapping[str, float]
    requests_per_s: float | None = None
    personal: bool = False
    words: str = ""


class Candidate(msgspec.Struct, frozen=True):
    """A configuration that holds the load by prediction. `steps`: what differs from what is there.

    `saving`: part of today's cost saved, at least and at most; negative where it costs more.
    """

    gpu: str
    gpus: int
    tp: int
    replicas: int
    precision: str
    kv_precision: str
    max_num_seqs: int
    steps: tuple[str, ...]
    flags: str  # what to start the engine with, where flags alone differ
    category: str
    at_once: float
    output_tokens_per_s: Interval
    ttft_ms: Interval
    tpot_ms: Interval
    usd_per_month: Usd | None
    saving: tuple[float, float] | None
    outside: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        started = f" with {self.flags}" if self.flags else ""
        return f"{shape(self.gpu, self.tp, self.replicas)}{started}"


def shape(card: str, tp: int, replicas: int) -> str:
    """`1 x L40S`, or `2 replicas of 4 x H100-SXM-80GB`."""
    return f"{f'{replicas} replicas of ' if replicas > 1 else ''}{tp} x {card}"


# ------------------------------------------------------------------------------------ what is there


def card_of(at: Target) -> Gpu:
    """The device that a server runs on. Raises UsageError where that is not told, or it is none
    of the catalogue's."""
    if at.url.startswith("sim:"):
        return gpu(at.url.removeprefix("sim:").partition("/")[0])
    names = sorted({one.name for one in at.gpus})
    if not names:
        raise UsageError(
            "which GPU it runs on: a sweep on this machine, or with --agent AGENT_URL, tells"
        )
    if len(names) > 1:
        raise UsageError(f"GPUs that are alike: it has {' and '.join(names)}")
    if (card := device(names[0])) is None:
        raise UsageError(f"{names[0]!r} in the catalogue of GPUs")
    return card


def box_of(
    at: Target, replicas: int, settings: Mapping[str, str], mean_w: float | None = None
) -> Box:
    """What a target and the server's own settings (vLLM's `cache_config_info`) tell of the box.

    Raises UsageError for a GPU or a model that is not known.
    """
    card, served = card_of(at), at.model
    tp = max(1, len(at.gpus))
    spec = EngineSpec(card, model(served), precision_in(served) or "bf16", tp=tp)
    if settings.get("cache_dtype", "").startswith("fp8"):
        spec = msgspec.structs.replace(spec, kv_precision="fp8")
    if (utilization := _number(settings, "gpu_memory_utilization")) and utilization <= 1:
        spec = msgspec.structs.replace(spec, gpu_memory_utilization=utilization)
    blocks, size = _number(settings, "num_gpu_blocks"), _number(settings, "block_size")
    if blocks and size:
        spec = msgspec.structs.replace(spec, num_gpu_blocks=int(blocks), block_size=int(size))
    engine = "tensorrt-llm" if (at.engine or "").startswith("t") else "vllm"
    return Box(spec, replicas, engine, mean_w)


def _number(settings: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(settings.get(key, ""))
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def tails(slo: Iterable[Slo], levels: Sequence[Level], at_once: float) -> dict[str, float]:
    """By target, how far its statistic lies above the mean, at the load that is nearest."""
    points = [point for point in curves.points(levels) if point.concurrency]
    near = sorted(points, key=lambda one: abs(math.log((one.concurrency or 1) / max(at_once, 1))))
    found = {}
    for target in slo:
        for point in near:
            stats = getattr(point.level, f"{target.metric}_ms")
            value = getattr(stats, target.statistic)
            if value is not None and stats.mean:
                found[format_slo([target])] = max(value / stats.mean, 1.0)
                break
    return found


# --------------------------------------------------------------------------------------- candidates


class Oracle:
    """Predictions that start from the sweep of the box; without one, from published benchmarks of
    the vendor's GPUs, whose intervals are wider. Raises UsageError where the sweep does not fit."""

    def __init__(self, box: Box, sweep: Sweep | None) -> None:
        self._spec = box.spec
        self._fit = _fitted(box, sweep) if sweep is not None else None
        self.ttft = ttft_scale(self._fit.points, self._fit.spec) if self._fit else TtftScale()

    def basis(self, spec: EngineSpec) -> tuple[Basis, tuple[str, ...]]:
        """What to predict by, and the steps that lie between."""
        from agent.sizing import fit

        if self._fit is None:
            return fit.prior(spec), ("published",)
        if spec == self._spec:
            return self._fit, ()
        carried = fit.transfer(self._fit, spec)
        return carried, carried.steps


def _fitted(box: Box, sweep: Sweep) -> Fit:
    from agent.sizing import fit

    lengths = (sweep.workload.input_tokens, sweep.workload.output_tokens)
    given = [float(one) if isinstance(one, int) else None for one in lengths]
    found = fit.fit(sweep.levels, box.spec, input_tokens=given[0], output_tokens=given[1])
    if found.why_not:
        raise UsageError(f"a sweep that the capacity model describes: {found.why_not}")
    return found


def holds_now(oracle: Oracle, box: Box, need: Need) -> bool:
    """Would the box that is there hold the load, by prediction? Raises UsageError."""
    _check(need)
    deployed = Deployment(box.spec, box.replicas, box.engine)
    return held(oracle.basis(box.spec)[0], deployed, need, oracle.ttft) is not None


def candidates(
    oracle: Oracle, box: Box, need: Need, prices: Prices, *, cheaper: bool
) -> list[Candidate]:
    """What would hold the load, the cheapest first; only what surely saves where `cheaper`.

    Else what is there does not hold it, and fewer of the same are none. Of each device, and of each
    way to run the one that is there, the cheapest. Raises UsageError where a target of the SLO
    cannot be predicted.
    """
    _check(need)
    now = _month(box.spec.gpu, box.gpus, box, prices)
    asked = _Asked(oracle, box, need, prices, now, cheaper)
    found = []
    for variants in _variants(box.spec, need.personal):
        ways = [_least(asked, spec, flags) for spec, flags in variants]
        found += sorted((one for one in ways if one is not None), key=_rank)[:1]
    return sorted(found, key=_rank)


def _check(need: Need) -> None:
    names = [format_slo([target]) for target in need.slo]
    if lacking := [name for name in names if name not in need.tails]:
        raise UsageError(f"how far {lacking[0]} lies above the mean, in the sweep")


class _Asked(NamedTuple):
    oracle: Oracle
    box: Box
    need: Need
    prices: Prices
    now: Usd | None
    cheaper: bool

    def differs(self, replicas: int) -> bool:
        """Are so many of the same engine what is looked for: fewer, or more?"""
        now = self.box.replicas
        return replicas < now if self.cheaper else replicas > now


def _rank(one: Candidate) -> tuple[float, int, int]:
    cost = math.inf if one.usd_per_month is None else one.usd_per_month.typical
    return cost, len(one.steps), one.gpus


def _variants(here: EngineSpec, personal: bool) -> Iterator[list[tuple[EngineSpec, str]]]:
    """What may be tried: other flags, fewer or more of these GPUs, other GPUs of the vendor."""
    yield [(here, "")]
    for flags, changes in _flags(here):
        yield [(msgspec.structs.replace(here, **changes), flags)]
    for card in gpus().values():
        if card.vendor != here.gpu.vendor or card.arch in _TOO_OLD:
            continue
        if _BY_THE_RACK in card.interconnect:
            continue
        if card.category == "consumer" and not (personal or here.gpu.category == "consumer"):
            continue
        there: dict[str, Any] = {"gpu": card, "num_gpu_blocks": None}
        yield [
            (msgspec.structs.replace(here, tp=tp, **there), "")
            for tp in _TPS
            if not here.model.heads % tp and (card.name, tp) != (here.gpu.name, here.tp)
        ]


def _flags(here: EngineSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flags that give the box that is there more room, with what they change."""
    free: dict[str, Any] = {
        "num_gpu_blocks": None,
        "gpu_memory_utilization": max(_UTILIZATION, here.gpu_memory_utilization),
    }
    try:
        whole = kv_capacity_tokens(msgspec.structs.replace(here, **free))
    except UsageError:
        return
    if here.num_gpu_blocks and kv_capacity_tokens(here) < _BLOCKS_FREE * whole:
        yield f"all its memory for the KV cache (--gpu-memory-utilization {_UTILIZATION})", free
    if "fp8" not in here.gpu.flops:
        return
    if here.kv_precision != "fp8":
        yield "--kv-cache-dtype fp8", {"kv_precision": "fp8", "num_gpu_blocks": None}
    if here.precision in ("bf16", "fp16"):
        yield "--quantization fp8", {"precision": "fp8", "num_gpu_blocks": None}


def _month(card: Gpu, count: int, box: Box, prices: Prices) -> Usd | None:
    """A month of so many GPUs, drawing the part of their TDP that the box's own do."""
    watts = box.mean_w
    if watts is not None and (card.name, count) != (box.spec.gpu.name, box.gpus):
        now_w = box.spec.gpu.tdp_w
        watts = watts / (box.gpus * now_w) * count * card.tdp_w if now_w and card.tdp_w else None
    an_hour = hourly(card, count, prices, watts)
    return None if an_hour is None else an_hour.times(HOURS_A_MONTH)


def _least(asked: _Asked, spec: EngineSpec, flags: str) -> Candidate | None:
    """The fewest engines of this kind that hold the load, at a price that is known (and lower)."""
    for replicas in _REPLICAS:
        month = _month(spec.gpu, spec.tp * replicas, asked.box, asked.prices)
        saved = saving(asked.now, month) if asked.now and month else None
        if asked.cheaper and (saved is None or saved[0] <= 0):
            return None
        if month is None and spec.gpu != asked.box.spec.gpu:
            return None
        if spec == asked.box.spec and not asked.differs(replicas):
            continue
        try:
            basis, steps = asked.oracle.basis(spec)
            deployed = Deployment(spec, replicas, asked.box.engine)
            level = held(basis, deployed, asked.need, asked.oracle.ttft)
        except UsageError:  # it could not even be started so
            return None
        if level is not None:
            steps += ("replicas",) if replicas != asked.box.replicas else ()
            return _said(spec, replicas, flags, steps, level, month, saved)
    return None


def _said(
    spec: EngineSpec,
    replicas: int,
    flags: str,
    steps: tuple[str, ...],
    level: PredictedLevel,
    month: Usd | None,
    saved: tuple[float, float] | None,
) -> Candidate:
    return Candidate(
        gpu=spec.gpu.name,
        gpus=spec.tp * replicas,
        tp=spec.tp,
        replicas=replicas,
        precision=spec.precision,
        kv_precision=spec.kv_precision,
        max_num_seqs=spec.max_num_seqs,
        steps=steps,
        flags=flags,
        category=spec.gpu.category,
        at_once=level.concurrency,
        output_tokens_per_s=level.output_tokens_per_s,
        ttft_ms=level.ttft_ms,
        tpot_ms=level.tpot_ms,
        usd_per_month=month,
        saving=saved,
        outside=tuple(level.outside),
    )


def held(basis: Basis, deployed: Deployment, need: Need, ttft: TtftScale) -> PredictedLevel | None:
    """What is expected at the load's busiest, if that is held; else null. Raises UsageError."""
    one = msgspec.structs.replace(deployed, replicas=1)

    def at(clients: float, of: Deployment) -> PredictedLevel:
        return predict(basis, of, [clients], need.input_tokens, need.output_tokens, ttft)[0]

    share = at_once_for(
        (need.requests_per_s or 0.0) * need.output_tokens / deployed.replicas,
        lambda clients: at(clients, one).output_tokens_per_s.lo90,
    )
    if share is None:
        return None
    clients = max(1.0, share, math.ceil(need.at_once / deployed.replicas))
    level = at(clients * deployed.replicas, deployed)
    return level if level.fits and all(_keeps(level, target, need) for target in need.slo) else None


def at_once_for(tokens_per_s: float, rate: Callable[[float], float]) -> float | None:
    """Requests at once that a rate of tokens takes, bursts of random arrivals (95 %) included.

    `rate`: tokens/s at so many at once. Null where no number of them is enough.
    """
    before = (0.0, 0.0)
    for clients in _AT_ONCE:
        reached = rate(float(clients))
        if reached >= tokens_per_s:
            (x0, y0), (x1, y1) = before, (float(clients), reached)
            mean = x0 + (x1 - x0) * (tokens_per_s - y0) / (y1 - y0) if y1 > y0 else x1
            return math.ceil(mean + DEFAULTS.burst_z * math.sqrt(mean))
        before = max(before, (float(clients), reached), key=lambda one: one[1])
    return None


def _keeps(level: PredictedLevel, target: Slo, need: Need) -> bool:
    """Does the high end of the mean, times how far the statistic lies above it, keep the target?"""
    token = level.tpot_ms.hi90
    means = {
        "ttft": level.ttft_ms.hi90, "itl": token, "tpot": token,
        "e2e": level.ttft_ms.hi90 + token * (need.output_tokens - 1),
    }  # fmt: skip
    mean = means.get(target.metric)
    return mean is not None and mean * need.tails[format_slo([target])] <= target.bound_ms


def batch_limit(box: Box, need: Need, at_once: float) -> int:
    """The --max-num-seqs of one engine: twice what is there at once, where its cache has room."""
    room = sequences_that_fit(box.spec, need.input_tokens, need.output_tokens)
    wanted = 1 << math.ceil(math.log2(max(2.0, 2 * at_once / box.replicas)))
    return max(1, min(int(room), wanted))


def measured_at(levels: Sequence[Level], at_once: float) -> float | None:
    """Tokens/s of a curve at so many requests at once, between its points; null beyond them."""
    known = [(p.concurrency, p.throughput) for p in curves.points(levels) if p.concurrency]
    for (x0, y0), (x1, y1) in pairwise(sorted(known)):
        if x0 <= at_once <= x1:
            return y0 + (y1 - y0) * (at_once - x0) / (x1 - x0) if x1 > x0 else y0
    return None
