"""The observed demand on trial: replayed through the fitted engine, as it is and on less of it.

Pure. Design equation 8: the sweep gives the engine its speed (`agent.sizing.fit`), the observed
requests are its load (`agent.sizing.replay`), and capacity over demand is the largest multiple of
them that holds. Twice more with an engine as slow, and as fast, as the fit leaves open; and, for
whoever would take hardware away, with a replica less (of one server: half the device).

A model is no measurement. What it is not known for (another device, no levels that fit, lengths
that were not swept) is refused with its reason, and the verdict then rests on the curve alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from agent.model import Level, Ratio, Slo, Sweep, UsageError
from agent.sizing import curve as curves
from agent.sizing import fit
from agent.sizing.arrivals import Arrivals, busiest, times
from agent.sizing.engine import Efficiencies, EngineSpec, kv_capacity_tokens
from agent.sizing.hardware import device, gpu
from agent.sizing.models import model, precision_in
from agent.sizing.replay import Ends, Multiple, capacity_ratio, excess, replay

REQUESTS = 5000  # of a replay: the busiest hours, or the densest part of one …
PART_S = 900.0  # … which is at least so long: a queue takes time to build up
REQUESTS_MOST = 20_000  # of such a part
REQUESTS_WHOLE = 40_000  # where they are replayed once: a second or two
HOURS_LEFT_OUT = 0.01  # the busiest ones, so that a P99 over the hours is judged
_Z90 = 1.645
_ROUGH = 0.03  # least relative error of a rate by the law
_BLOCK = 16
METRICS = ("ttft", "itl", "tpot", "e2e")


class Trial(msgspec.Struct, frozen=True):
    """Capacity over demand, K/D: the fitted engine's, and between the slowest and the fastest that
    the sweep leaves open. `smaller`: of less hardware, at its slowest. `uncached`: if no prompt
    were found in the prefix cache; null where none was."""

    value: float
    lo: float
    hi: float
    smaller: float
    uncached: float | None
    requests: int
    note: str

    @property
    def ratio(self) -> Ratio:
        """Demand over capacity."""
        return Ratio(*(1 / max(one, 1e-6) for one in (self.value, self.hi, self.lo)))


def fitted(sweep: Sweep) -> fit.Fit:
    """The engine that a sweep measured. Raises UsageError where it cannot be told, or not fitted.

    Cache and admission cap are those that the server showed, where it showed them.
    """
    found = fit.fit(
        sweep.levels,
        _spec(sweep),
        input_tokens=curves.mean_length(sweep.workload.input_tokens),
        output_tokens=curves.mean_length(sweep.workload.output_tokens),
    )
    if found.why_not:
        raise UsageError(found.why_not)
    return found


def _spec(sweep: Sweep) -> EngineSpec:
    names = [one.name for one in sweep.target.gpus]
    card = device(names[0]) if names else None
    if sweep.target.url.startswith("sim:"):
        card = gpu(sweep.target.url.removeprefix("sim:").partition("/")[0])
    if card is None:
        raise UsageError(f"the catalogue does not know the GPU ({', '.join(names) or 'none told'})")
    try:
        shape = model(sweep.target.model)
    except UsageError:
        name = sweep.target.model or "one without a name"
        raise UsageError(f"the table of models does not have {name}") from None
    points = curves.points(sweep.levels)
    shown = [p.level.server for p in points if p.level.server is not None]
    tokens = next((one.kv_capacity_tokens for one in shown if one.kv_capacity_tokens), None)
    seen = curves.evidence(sweep.levels)
    cap = max((one.running_max or 0 for one in shown), default=0)
    is_capped = curves.analyse(sweep.levels).limit == "ADMISSION_CAP" and seen.saturated
    return EngineSpec(
        card,
        shape,
        precision=precision_in(sweep.target.model) or "bf16",
        tp=max(1, len(names)),
        num_gpu_blocks=tokens // _BLOCK if tokens else None,
        max_num_seqs=max(1, round(cap)) if is_capped else 256,
    )


def half(spec: EngineSpec) -> EngineSpec:
    """A device of half of everything: bandwidth, arithmetic, KV cache."""
    card = spec.gpu
    return msgspec.structs.replace(
        spec,
        gpu=msgspec.structs.replace(
            card,
            bandwidth_bytes_per_s=card.bandwidth_bytes_per_s / 2,
            flops={precision: flops / 2 for precision, flops in card.flops.items()},
        ),
        num_gpu_blocks=max(1, kv_capacity_tokens(spec) // _BLOCK // 2),
    )


def trial(
    found: fit.Fit,
    arrivals: Arrivals,
    slo: Sequence[Slo],
    *,
    even: Arrivals | None = None,
    replicas: int,
    rng: np.random.Generator,
    requests: int = REQUESTS,
) -> Trial:
    """What so many replicas serve of these requests, and less hardware.

    `even`: the same demand as gently as its minutes allow, for the upper end. A replica gets each
    request with the same chance: a balancer that does better has a little in hand. About thirty
    replays, less than 40: 1 to 3.5 s of one core, a thousandth of an hourly verdict's hour. Raises
    UsageError where nothing arrived, or an SLO is asked for that no replay tells.
    """
    unknown = [one.metric for one in slo if one.metric not in METRICS]
    if unknown:
        raise UsageError(f"a replay does not tell {', '.join(unknown)}")
    left = replicas - 1 or 1
    slow, fast = (_at_speed(found, side) for side in (-1, 1))
    within = _behind_front(found, slo)
    share = _dense(_share(arrivals, replicas, rng), requests)

    def most(spec: EngineSpec, some: Arrivals, about: float | None, ends: Ends) -> Multiple:
        at_once = max(requests, int(np.bincount(some.hours).max(initial=0)))
        return capacity_ratio(spec, some, within, requests=at_once, about=about, ends=ends)

    middle = most(found.engine, share, None, "none")
    gentle = share if even is None else _dense(_share(even, replicas, rng), requests)
    low = most(slow, share, middle.value, "low")
    high = most(fast, gentle, middle.value, "none")
    lo = min(low.lo, middle.value)
    part = left / replicas if replicas > 1 else 0.5
    smaller = lo * part  # it holds no more than that, and is asked only where that may be enough
    if smaller > 1:
        fewer = share if replicas == 1 else _dense(_share(arrivals, left, rng), requests)
        smaller = most(slow if replicas > 1 else half(slow), fewer, smaller, "low").lo
    uncached = None
    if share.cached_tokens.any():
        bare = msgspec.structs.replace(share, cached_tokens=np.zeros_like(share.cached_tokens))
        uncached = most(found.engine, bare, middle.value, "none").value
    return Trial(
        value=middle.value,
        lo=lo,
        hi=max(high.value, middle.value),
        smaller=smaller,
        uncached=uncached,
        requests=middle.requests,
        note=(
            f"a replay of {middle.requests} observed requests of the busiest hours through"
            f" {found.spec.model.name} on {found.spec.gpu.name}, fitted to the sweep"
            f" (rates {found.rms:.1%} off)"
        ),
    )


def whole(
    found: fit.Fit, arrivals: Arrivals, slo: Sequence[Slo], side: int, multiple: float = 1.0,
    apart: float = 1.0,
) -> float:  # fmt: skip
    """How many times what the SLO allows is missed over all of these requests: over 1 it is broken.

    By the slowest (-1) or the fastest (+1) engine that the sweep leaves open, `apart` times slower
    or faster at least. `trial` judges the busiest part, and each hour of it, which says of a whole
    recording neither that it breaks the SLO nor, where the longest requests came at another time,
    that it holds. Of more requests than are replayed the others count as met for the fastest, and
    not at all for the slowest.
    """
    every = times(arrivals, multiple, 0)
    some = _dense(busiest(every, REQUESTS_WHOLE), REQUESTS_WHOLE)
    done = replay(_at_speed(found, side, apart), some)
    of = len(every) if side > 0 else len(some)
    return max(excess(done, target, of) for target in _behind_front(found, slo))


def _share(arrivals: Arrivals, replicas: int, rng: np.random.Generator) -> Arrivals:
    """What one of so many replicas gets, without the busiest hour in a hundred; of fewer hours
    none is left out."""
    mine = arrivals.only(rng.random(len(arrivals)) < 1 / replicas)
    tokens = np.bincount(mine.hours, mine.prompt_tokens + mine.output_tokens)
    most = np.quantile(tokens, 1 - HOURS_LEFT_OUT, method="higher") if tokens.size else 0.0
    return mine.only(tokens[mine.hours] <= most)


def _dense(arrivals: Arrivals, most: int) -> Arrivals:
    """Of a service whose busiest hour is more than a replay takes, the densest part of it.

    Raises UsageError where even that is too much.
    """
    if len(arrivals) <= most or int(np.bincount(arrivals.hours).max()) <= most:
        return arrivals
    ends = np.searchsorted(arrivals.at_s, arrivals.at_s + PART_S)
    counts = ends - np.arange(len(arrivals))
    first = int(np.argmax(counts))
    if counts[first] > REQUESTS_MOST:
        raise UsageError(
            f"{counts[first]:,} requests in {PART_S:.0f} s are more than are replayed here"
        )
    return arrivals.only(np.arange(first, min(len(arrivals), first + max(most, counts[first]))))


def _at_speed(found: fit.Fit, side: int, apart: float = 1.0) -> EngineSpec:
    """The engine at the slow (-1) or the fast (+1) end of what its sweep leaves open (90 %).

    No faster than its data sheet.
    """
    faster = max(apart, math.exp(_Z90 * max(found.rms, _ROUGH))) ** side
    known = found.engine.efficiencies
    at_speed = Efficiencies(
        t0_s=known.t0_s / faster,
        eta_b=min(1.0, known.eta_b * faster),
        eta_c=min(1.0, known.eta_c * faster),
        eta_p=min(1.0, known.eta_p * faster),
    )
    return msgspec.structs.replace(found.engine, efficiencies=at_speed)


def _behind_front(found: fit.Fit, slo: Sequence[Slo]) -> tuple[Slo, ...]:
    """The SLO as the engine has to keep it: what a client sees before the engine is taken off."""
    single = [p for p in found.points if p.load.concurrency <= 1 and p.ttft_s]
    if not single:
        return tuple(slo)
    law_s = math.exp(float(fit.Work(found.engine, [single[0].load]).log_ttft(
        fit.logs(found.engine.efficiencies))[0]))  # fmt: skip
    front_ms = max(0.0, 1e3 * ((single[0].ttft_s or 0.0) - law_s))
    return tuple(
        msgspec.structs.replace(one, bound_ms=max(1e-3, one.bound_ms - front_ms))
        if one.metric in ("ttft", "e2e")
        else one
        for one in slo
    )


def same_settings(before: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """Whether two fingerprints are of one configuration.

    What a server measures of its memory at its start differs a little from start to start.
    """
    return all(_same(before.get(key), now.get(key)) for key in before.keys() | now.keys())


def _same(a: object, b: object) -> bool:
    if a == b:
        return True
    try:
        one, other = float(str(a)), float(str(b))
    except ValueError:
        return False
    return min(one, other) > 1 and max(one, other) <= 1.05 * min(one, other)


def throttled_levels(levels: Sequence[Level]) -> list[Level]:
    """The valid levels during which heat or power held a clock down."""
    valid = filter(curves.is_valid, levels)
    return [level for level in valid if any(one.clocks_throttled for one in level.gpu)]
