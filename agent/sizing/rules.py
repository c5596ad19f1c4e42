"""What limits the server: rules that read the saturated end of a curve, in order of precedence.

A rule is `Callable[[Evidence], Reason | None]`; the order in `LIMIT_RULES` is the policy. A rule
that lacks its evidence is silent: nothing is ever concluded from what was not measured.

How the causes are told apart. When throughput has stopped growing, either the *batch* cannot grow
(KV cache full, admission cap) or the batch grows and *no longer pays* (the engine itself is busy).
`batch_payoff` measures which: how much throughput the last real growth of the running batch
bought. A batch that still paid when it was stopped was stopped by memory or by a cap; one that had
ceased to pay is limited by prefill or by decode, whatever else happens to be full or queueing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from agent.model import Level, Reason, ServerView


class Thresholds(msgspec.Struct, frozen=True):
    """Every number that a conclusion hangs on, with what it means. Shares are 0 … 1."""

    knee_share: float = 0.95
    """The knee is the smallest level with this share of the best throughput."""
    knee_share_noisy: float = 0.90
    """Noise in the best level may lower the knee's share to this, never further."""
    growth_share_max: float = 0.10
    """Saturated: the last step bought less than this share of proportional growth …"""
    growth_share_upper_max: float = 0.30
    """… and the 95 % interval of that share ends below this."""
    assumed_error: float = 0.02
    """Relative half-width taken for a throughput that came without a 95 % interval."""
    achieved_share_min: float = 0.90
    """Open loop: finishing less than this share of the offered requests is saturation."""
    kv_full: float = 0.90
    """KV cache use (maximum) above which the cache counts as full."""
    kv_free: float = 0.80
    """KV cache use (maximum) below which the cache is clearly not the limit."""
    kv_read_min: float = 0.20
    """KV cache use (mean) under which reading it cannot be what slows decode."""
    waiting_min: float = 0.5
    """Mean queue, in requests, from which requests are said to wait …"""
    waiting_share: float = 0.05
    """… and at least this share of the running ones."""
    running_pinned: float = 0.90
    """The batch is pinned when its mean is at least this share of its maximum."""
    running_same: float = 0.02
    """Batch maxima of two levels are the same within this relative difference."""
    batch_step: float = 1.2
    """Growth of the running batch that is large enough to ask what it bought."""
    batch_pays: float = 0.20
    """A larger batch pays when it buys at least this share of proportional growth."""
    alone_concurrency: float = 1.5
    """In flight at or under this, a request has the engine (nearly) to itself."""
    prefill_steps_min: float = 3.0
    """Prefill of one request alone, in decode steps: under it, prefill is a read of the weights."""
    prefill_busy_min: float = 0.60
    """Share of the engine's time in prefill from which prefill dominates …"""
    prefill_busy_max: float = 1.50
    """… and above which the estimate contradicts itself (several engines, batched prefill)."""
    prefill_delay_min: float = 2.0
    """Queue and prefill under load, in multiples of the prefill alone: prompts wait for prompts."""
    decode_busy_prefill_max: float = 0.30
    """Decode dominates when prefill takes less than this share of the engine's time."""
    itl_growth_min: float = 2.0
    """Decode step at the end over the step alone, from which per-sequence reads dominate."""
    itl_flat: float = 1.25
    """ITL counts as flat across the saturated levels within this factor."""
    ttft_rise: float = 1.5
    """TTFT counts as rising across the saturated levels from this factor."""
    itl_growth_unsaturated: float = 3.0
    """The same, where throughput still grows: at least two thirds of a step are per-sequence."""
    batch_pays_half: float = 0.5
    """… and the last growth of the batch bought less than this share of proportional growth."""
    itl_intercept_min: float = 0.75
    """Decode step extrapolated to an empty batch over the step alone: 1 for memory reads (weights
    + batch · cache), 0 for compute (proportional to the batch)."""
    burst_z: float = 1.645
    """Standard deviations of a Poisson number in flight kept free when a request rate is judged
    by a closed loop, which has no bursts (95 % one-sided)."""
    requests_few: int = 30
    """Fewer requests than this at the deciding level: low confidence."""
    requests_some: int = 100
    """Fewer requests than this at the deciding level: at most medium confidence."""
    levels_few: int = 4
    """Fewer valid levels than this: low confidence."""
    single_user: float = 2.0
    """Concurrency, declared or P99, up to which the box serves one person and no service."""
    binds_ratio_min: float = 0.85
    """MISMATCHED: what limits the server binds from this demand over capacity …"""
    idles_share_max: float = 0.20
    """… and a resource of which less than this share is used in the busy minutes idles."""


DEFAULTS = Thresholds()


class Evidence(msgspec.Struct, frozen=True):
    """What the limit rules may look at: valid levels by rising load, and who cut the curve short.

    `loads` are streams or requests/s, `throughputs` output tokens/s (requests/s where a workload
    has no output tokens). `client_limited` are the loads above the highest valid level at which
    the client, not the server, was the limit.
    """

    levels: tuple[Level, ...]
    loads: tuple[float, ...]
    throughputs: tuple[float, ...]
    saturated: bool
    knee_load: float | None
    client_limited: tuple[float, ...] = ()
    thresholds: Thresholds = DEFAULTS


LimitRule = Callable[[Evidence], Reason | None]


def limits(evidence: Evidence) -> list[Reason]:
    """Every limit that the evidence proves, the first one deciding."""
    found = (rule(evidence) for rule in LIMIT_RULES)
    return [reason for reason in found if reason is not None]


def missing(evidence: Evidence) -> list[str]:
    """What would have to be measured to say more about the limit. Empty once one is proven."""
    if not evidence.levels:
        return []
    if not evidence.saturated and not evidence.client_limited:
        return ["what limits the server: throughput was still growing at the highest level tested"]
    if limits(evidence):
        return []
    end = evidence.levels[-1].server
    if end is None:
        return ["what limits the server: no server metrics (--metrics-url), so neither the KV cache"
                " nor the queue was seen"]  # fmt: skip
    lines = []
    if end.kv_usage_max is None or end.waiting_mean is None or end.running_mean is None:
        lines.append("running, waiting and KV cache use of the server, to see what limits it")
    if _alone(evidence) is None:
        lines.append("a level at concurrency 1: the cost of one request alone tells prefill from"
                     " decode")  # fmt: skip
    elif prefill_busy(evidence) is None:
        lines.append("prefill time of the server, to tell prefill from decode")
    lines.append("device counters (memory traffic, compute activity): throughput has stopped"
                 " growing, and no queue, cache or cap explains it")  # fmt: skip
    return lines


# ------------------------------------------------------------------------------------- evidence


def _reason(code: str, template: str, **evidence: Any) -> Reason:
    """A reason whose sentence can only quote numbers that stand in its evidence."""
    return Reason(code, template.format(**evidence), evidence)


def _at(evidence: Evidence, index: int) -> dict[str, Any]:
    """Where on the curve: the level's load, under the name of its unit."""
    level = evidence.levels[index]
    return {"at": evidence.loads[index], "unit": "req/s" if level.mode == "rate" else "streams"}


def _queued(server: ServerView | None, t: Thresholds) -> bool:
    """Do requests wait at this level?"""
    if server is None or server.waiting_mean is None:
        return False
    return server.waiting_mean >= max(t.waiting_min, t.waiting_share * (server.running_mean or 0))


def _no_room(level: Level) -> bool:
    """Would one more prompt not fit into the KV cache? Few, long sequences never reach 90 %."""
    server, prompt = level.server, level.prompt_tokens.mean
    if server is None or server.kv_usage_max is None or not server.kv_capacity_tokens:
        return False
    return prompt is not None and (1 - server.kv_usage_max) * server.kv_capacity_tokens < prompt


def step_ms(level: Level) -> float | None:
    """Mean time between tokens of a stream, ms: ITL, or TPOT where only that is known."""
    return level.itl_ms.mean if level.itl_ms.mean is not None else level.tpot_ms.mean


def _alone(evidence: Evidence) -> Level | None:
    """The level at which one request had the engine to itself."""
    if not evidence.levels:
        return None
    level = evidence.levels[0]
    in_flight: float | None = level.concurrency
    if level.mode == "rate":
        in_flight = level.measurement.in_flight_mean if level.measurement else None
    if in_flight is None or in_flight > evidence.thresholds.alone_concurrency:
        return None
    return level


def prefill_busy(evidence: Evidence) -> float | None:
    """Share of the engine's time that prefill takes at the highest level; null if not known.

    Requests/s · (prefill of one request alone - one decode step). A compute-bound prefill gains
    nothing from batching, so its cost alone is its cost under load; the decode step subtracted is
    the weight read, which prefill shares with the decoding batch. It is
    wrong (too high) for short prompts, hence `prefill_steps_min`, and for several engines behind
    one address, hence `prefill_busy_max`.
    """
    alone = _alone(evidence)
    if alone is None or alone.server is None or alone.server.prefill_ms is None:
        return None
    rate = evidence.levels[-1].request_throughput
    if rate is None:
        return None
    return rate * max(0.0, alone.server.prefill_ms - (step_ms(alone) or 0.0)) / 1000


def batch_payoff(evidence: Evidence) -> float | None:
    """What the last real growth of the running batch bought, as a share of proportional growth.

    1: throughput grew as the batch did. 0: the batch grew for nothing. Null where the server's
    running count is not known at two sufficiently different batches.
    """
    t = evidence.thresholds
    seen = [
        (level.server.running_mean, throughput)
        for level, throughput in zip(evidence.levels, evidence.throughputs, strict=True)
        if level.server is not None and level.server.running_mean
    ]
    if not seen:
        return None
    largest = max(running for running, _ in seen)
    # The first level at which the batch is as large as it gets: later ones only queue or thrash.
    full = next(pair for pair in seen if pair[0] >= 0.95 * largest)
    smaller = [pair for pair in seen if pair[0] * t.batch_step <= full[0] and pair[1] > 0]
    if not smaller:
        return None
    before = max(smaller)
    return (full[1] / before[1] - 1) / (full[0] / before[0] - 1)


def _over_saturated(evidence: Evidence, value: Callable[[Level], float | None]) -> float | None:
    """A quantity at the highest level over the same at the knee."""
    if evidence.knee_load is None or evidence.knee_load >= evidence.loads[-1]:
        return None
    first = value(evidence.levels[evidence.loads.index(evidence.knee_load)])
    last = value(evidence.levels[-1])
    return last / first if first and last is not None else None


# ---------------------------------------------------------------------------------------- rules


def kv_memory(evidence: Evidence) -> Reason | None:
    """KV_MEMORY: the cache is full, and requests wait for it or are thrown out of it.

    Silent where the batch had ceased to pay before the cache was full: more memory would then buy
    a larger batch and no throughput. Preemptions are thrown-away work and count in any case.
    """
    t = evidence.thresholds
    if not evidence.saturated or (server := evidence.levels[-1].server) is None:
        return None
    if server.kv_usage_max is None:
        return None
    full = server.kv_usage_max > t.kv_full or _no_room(evidence.levels[-1])
    preemptions = server.preemptions or 0
    if not full or not (preemptions or _queued(server, t)):
        return None
    payoff = batch_payoff(evidence)
    if payoff is not None and payoff < t.batch_pays and not preemptions:
        return None
    ttft_ratio = _over_saturated(evidence, lambda level: level.ttft_ms.mean)
    itl_ratio = _over_saturated(evidence, step_ms)
    shape = ""
    if ttft_ratio and itl_ratio and ttft_ratio >= t.ttft_rise and itl_ratio <= t.itl_flat:
        shape = (
            "; past the knee TTFT rose {ttft_ratio:.1f}-fold while ITL changed {itl_ratio:.1f}-fold"
        )
    return _reason(
        "KV_MEMORY",
        "KV cache {kv_usage_max:.0%} full at {at:g} {unit}, {waiting_mean:.1f} requests waiting"
        " and {preemptions} preemptions" + shape,
        **_at(evidence, -1),
        kv_usage_max=server.kv_usage_max,
        waiting_mean=server.waiting_mean or 0.0,
        running_mean=server.running_mean,
        preemptions=preemptions,
        kv_capacity_tokens=server.kv_capacity_tokens,
        batch_payoff=payoff,
        ttft_ratio=ttft_ratio,
        itl_ratio=itl_ratio,
        thresholds={"kv_full": t.kv_full, "waiting_min": t.waiting_min, "batch_pays": t.batch_pays},
    )


def _plateau(evidence: Evidence) -> tuple[int, float] | None:
    """Number of queued levels at the end whose batch stands at one maximum, and that maximum.

    It begins where the batch stands: just above a cap requests wait now and then, while the batch
    reaches the cap and falls from it again.
    """
    t = evidence.thresholds
    count, cap = 0, 0.0
    for level in reversed(evidence.levels):
        server = level.server
        if server is None or not server.running_max or not _queued(server, t):
            break
        cap = cap or server.running_max
        if abs(server.running_max / cap - 1) > t.running_same:
            return None  # the batch still moved while requests waited: nothing caps it
        if (server.running_mean or 0.0) < t.running_pinned * cap:
            break
        count += 1
    return (count, cap) if count else None


def admission_cap(evidence: Evidence) -> Reason | None:
    """ADMISSION_CAP: requests wait beside a free KV cache, and the batch stands at one maximum.

    A prefill-bound engine can show the same plateau; there the batch had ceased to pay. Without
    a smaller batch to compare with, at least two levels must stand at the same maximum.
    """
    t = evidence.thresholds
    if not evidence.saturated or (server := evidence.levels[-1].server) is None:
        return None
    if server.kv_usage_max is None or server.kv_usage_max >= t.kv_free:
        return None
    if _no_room(evidence.levels[-1]) or (plateau := _plateau(evidence)) is None:
        return None
    payoff = batch_payoff(evidence)
    if payoff < t.batch_pays if payoff is not None else plateau[0] < 2:
        return None
    return _reason(
        "ADMISSION_CAP",
        "the batch stands at {running_max:g} requests over {plateau_levels} level(s) while"
        " {waiting_mean:.1f} wait at {at:g} {unit} and the KV cache is only {kv_usage_max:.0%}"
        " used: the admission cap (--max-num-seqs) binds, not the hardware",
        **_at(evidence, -1),
        running_max=plateau[1],
        running_mean=server.running_mean,
        plateau_levels=plateau[0],
        waiting_mean=server.waiting_mean,
        kv_usage_max=server.kv_usage_max,
        batch_payoff=payoff,
        thresholds={"kv_free": t.kv_free, "batch_pays": t.batch_pays},
    )


def compute_prefill(evidence: Evidence) -> Reason | None:
    """COMPUTE_PREFILL: computing prompts takes most of the engine's time, and prompts wait for it.

    That TTFT grows with the prompt's length cannot be seen at one length; the cost of one prompt
    alone, times the request rate, can. Silent for prompts so short that their prefill is one read
    of the weights.
    """
    t = evidence.thresholds
    busy, alone = prefill_busy(evidence), _alone(evidence)
    if not evidence.saturated or busy is None or alone is None or alone.server is None:
        return None
    end, prefill = evidence.levels[-1], alone.server.prefill_ms
    if not t.prefill_busy_min <= busy <= t.prefill_busy_max or not prefill:
        return None
    step = step_ms(alone)
    if step and prefill < t.prefill_steps_min * step:
        return None
    if end.server is None or end.server.prefill_ms is None:
        return None
    delay = ((end.server.queue_ms or 0.0) + end.server.prefill_ms) / prefill
    if delay < t.prefill_delay_min:
        return None
    return _reason(
        "COMPUTE_PREFILL",
        "prefill takes {prefill_busy:.0%} of the engine's time at {at:g} {unit}"
        " ({request_throughput:.2f} req/s, {prefill_alone_ms:.1f} ms of prefill each when alone),"
        " and a prompt takes {delay:.1f} times as long there",
        **_at(evidence, -1),
        prefill_busy=busy,
        request_throughput=end.request_throughput,
        prefill_alone_ms=prefill,
        step_alone_ms=step,
        delay=delay,
        kv_usage_max=end.server.kv_usage_max,
        waiting_mean=end.server.waiting_mean,
        thresholds={"prefill_busy_min": t.prefill_busy_min, "delay_min": t.prefill_delay_min},
    )


def _intercept(evidence: Evidence) -> float | None:
    """Decode step at an empty batch, from the two largest batches, over the step alone."""
    alone = _alone(evidence)
    base = step_ms(alone) if alone else None
    seen = sorted(
        (level.server.running_mean, step)
        for level in evidence.levels
        if level.server is not None and level.server.running_mean and (step := step_ms(level))
    )
    if not base or not seen:
        return None
    top = seen[-1]
    lower = [pair for pair in seen if pair[0] * evidence.thresholds.batch_step <= top[0]]
    if not lower:
        return None
    below = lower[-1]
    slope = (top[1] - below[1]) / (top[0] - below[0])
    return (top[1] - slope * top[0]) / base


def _ceased_to_pay(evidence: Evidence, payoff: float, itl_growth: float) -> bool:
    """Does a larger batch buy too little, because each step takes so much longer for it?

    Reads of weights and cache never stop throughput dead, they bend it. Where it still grows a
    little and nothing waits, the bend itself is the evidence, and has to be pronounced.
    """
    t = evidence.thresholds
    if evidence.saturated:
        return payoff < t.batch_pays and itl_growth >= t.itl_growth_min
    if _queued(evidence.levels[-1].server, t):
        return False
    return payoff < t.batch_pays_half and itl_growth >= t.itl_growth_unsaturated


def mem_bandwidth(evidence: Evidence) -> Reason | None:
    """MEM_BANDWIDTH: the batch grows, nothing stops it, and each decode step takes longer for it.

    The one rule that may speak before throughput has stopped growing (`_ceased_to_pay`).

    Decode step = weights + batch · cache read: a straight line that starts
    at the step of one request alone. Compute-bound decode is a line through zero instead, and a
    step lengthened by host work shows an almost empty cache; both keep this rule silent. What it
    cannot see is the memory traffic itself: that takes device counters.
    """
    t = evidence.thresholds
    alone, busy, payoff = _alone(evidence), prefill_busy(evidence), batch_payoff(evidence)
    if alone is None or busy is None or payoff is None:
        return None
    end = evidence.levels[-1]
    server, first, last = end.server, step_ms(alone), step_ms(end)
    if server is None or not first or not last or server.kv_usage_mean is None:
        return None
    if server.preemptions or busy > t.decode_busy_prefill_max:
        return None
    if not _ceased_to_pay(evidence, payoff, last / first):
        return None
    intercept = _intercept(evidence)
    if server.kv_usage_mean < t.kv_read_min or (intercept or 0.0) < t.itl_intercept_min:
        return None
    return _reason(
        "MEM_BANDWIDTH",
        "decode waits for reads of weights and KV cache: from one request alone to {at:g}"
        " {unit} the step grew from {itl_alone_ms:.2f} to {itl_ms:.2f} ms in a straight line with"
        " the batch, with {kv_usage_mean:.0%} of the KV cache in use and {prefill_busy:.0%} of the"
        " time in prefill",
        **_at(evidence, -1),
        itl_alone_ms=first,
        itl_ms=last,
        kv_usage_mean=server.kv_usage_mean,
        prefill_busy=busy,
        batch_payoff=payoff,
        itl_intercept=intercept,
        running_mean=server.running_mean,
        waiting_mean=server.waiting_mean,
        thresholds={"kv_read_min": t.kv_read_min, "itl_intercept_min": t.itl_intercept_min},
    )


def client_limited(evidence: Evidence) -> Reason | None:
    """CLIENT_LIMITED: above the last valid level the client was the limit, not the server.

    Silent where the valid levels already show the server's own end.
    """
    if evidence.saturated or not evidence.client_limited:
        return None
    return _reason(
        "CLIENT_LIMITED",
        "from {client_limited_from:g} {unit} on, the load generator itself was the limit"
        " ({levels_client_limited} level(s) invalid); the server's own limit was not reached",
        client_limited_from=min(evidence.client_limited),
        levels_client_limited=len(evidence.client_limited),
        unit="req/s" if evidence.levels and evidence.levels[0].mode == "rate" else "streams",
        highest_valid=evidence.loads[-1] if evidence.loads else None,
    )


LIMIT_RULES: tuple[LimitRule, ...] = (
    client_limited,
    kv_memory,
    admission_cap,
    compute_prefill,
    mem_bandwidth,
)
"""In order of precedence: whose fault first, then what stops the batch, then what slows it."""


def steady_load(peak: float, z: float) -> float:
    """Mean of a Poisson number whose mean + z·√mean is `peak`: room is left for bursts."""
    return ((math.sqrt(z * z + 4 * peak) - z) / 2) ** 2
