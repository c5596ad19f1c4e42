"""What a verdict comes to: energy and money, the three questions, what to buy, try or leave.

Pure. The verdict says whether the hardware fits; this says what that costs, whether hardware of its
class is right for such work at all, and which configuration would hold the same for less (or hold
what this one does not), by prediction from the sweep of this very box. A prediction is never more
than a candidate: each comes with its interval, the command that would confirm it and what would
overturn it; and where such a change was made, it is scored against what was then measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from agent.model import Level, Reason, Recommendation, Slo, Sweep, UsageError, Verdict
from agent.sizing import candidates as others
from agent.sizing import curve as curves
from agent.sizing import money
from agent.sizing.candidates import Box, Candidate, Need, shape
from agent.sizing.curve import format_slo, parse_slo
from agent.sizing.engine import active_weight_bytes, kv_bytes
from agent.sizing.hardware import GIB, Gpu
from agent.sizing.money import ALL, HOURS_A_MONTH, Prices, Share, Usd
from agent.sizing.pattern import Pattern
from agent.words import number

PERSONAL_MOST = 2.0  # P99 of the requests at once up to which a box serves one person
IDLES_MOST = 0.2  # a resource used less than this at the peak, while another binds, is idle
BINDS_FROM = 0.85  # demand over capacity from which what limits the box binds at the peak
ALIKE = 1.25  # lengths that differ by less are the same
DAY_S = 86_400.0
KEPT = 3  # candidates that stay with a verdict

# Where no SLO was given: what a reader takes for prompt and fluent.
ASSUMED = tuple(parse_slo("ttft:p95<1000ms,tpot:p95<100ms"))

_BINDS = {
    "KV_MEMORY": "memory for the KV cache",
    "MEM_BANDWIDTH": "memory bandwidth",
    "COMPUTE_PREFILL": "FLOPS",
}
_STEPS = {
    "GPU": "another GPU of the vendor",
    "precision": "another precision",
    "parallelism": "another split over GPUs",
    "replicas": "another number of engines",
    "model": "another model",
}


class Known(msgspec.Struct, frozen=True):
    """What advice is made from, beside the verdict.

    `levels`: those it was judged by, of `sweep` where there is one. `settings`: the server's own,
    by name. `slo`: what was judged. `least_s`: observed so long, it is known who uses a box.
    `history`: earlier assessments, newest first, as (unix s, the verdict's `cost`).
    """

    levels: Sequence[Level]
    slo: tuple[Slo, ...] = ()
    sweep: Sweep | None = None
    measured_unix_s: float | None = None
    pattern: Pattern | None = None
    replicas: int = 1
    settings: Mapping[str, str] = {}
    prices: Prices = msgspec.field(default_factory=money.catalogue)
    trains: bool = False
    expect_concurrency: float | None = None
    least_s: float = DAY_S
    history: Sequence[tuple[float, Mapping[str, Any]]] = ()
    target: str = "URL"


class _Place(NamedTuple):
    """The hardware that is there; `box` is null where the model is not known."""

    card: Gpu
    gpus: int
    mean_w: float | None
    box: Box | None


def advise(verdict: Verdict, known: Known) -> Verdict:
    """The verdict with what it costs, the three questions, and what to do. The finding stays."""
    lacking: list[str] = []
    place = _place(known, lacking)
    if place is None:
        return msgspec.structs.replace(
            verdict,
            energy={**verdict.energy, **_energy(known)},
            cost={**verdict.cost, "unknown": lacking[0]},
            questions=_questions(verdict, known, None),
        )
    need = _need(verdict, known)
    found = _candidates(verdict, known, place, need, lacking)
    personal = _personal(verdict, known, place, found)
    more = [personal, _score(known, place)]
    advised = msgspec.structs.replace(
        verdict,
        reasons=[*verdict.reasons, *(reason for reason in more if reason is not None)],
        qualifier=verdict.qualifier or _mismatched(verdict, known, place),
        energy={**verdict.energy, **_energy(known)},
        cost={**verdict.cost, **_cost(verdict, known, place), **_kept(place, found, need)},
        questions=_questions(verdict, known, place),
        missing=[*verdict.missing, *(f"to compare other hardware: {one}" for one in lacking)],
    )
    if place.box is None or need is None:
        return advised
    rest = _Case(advised, known, place.box, need, found)
    return _saving(_recommended(rest, personal is not None), rest)


# ----------------------------------------------------------------------------- what there is to say


def _place(known: Known, lacking: list[str]) -> _Place | None:
    """The hardware; null, with what is lacking, where it is not known."""
    if known.sweep is None:
        lacking.append("which GPU it runs on: a sweep with --agent AGENT_URL tells")
        return None
    try:
        card = others.card_of(known.sweep)
    except UsageError as error:
        lacking.append(str(error))
        return None
    count = max(1, len(known.sweep.target.gpus)) * known.replicas
    energy = known.pattern.energy if known.pattern else None
    mean_w = energy.power_w.mean if energy and len(energy.gpus) == count else None
    try:
        box = others.box_of(known.sweep, known.replicas, known.settings, mean_w)
    except UsageError as error:
        lacking.append(f"the shape of the model it serves ({error})")
        box = None
    return _Place(card, count, mean_w, box)


def _lengths(known: Known) -> tuple[float, float] | None:
    """Tokens of a prompt and of an answer: production's, else the sweep's."""
    seen = known.pattern
    prompt = seen.prompt_tokens_per_request.mean if seen else None
    answer = seen.output_tokens_per_request.mean if seen else None
    return (prompt, answer) if prompt and answer else _swept(known.sweep)


def _swept(sweep: Sweep | None) -> tuple[float, float] | None:
    if sweep is None:
        return None
    prompt = _mean(one.prompt_tokens.mean for one in sweep.levels)
    answer = _mean(one.output_tokens.mean for one in sweep.levels)
    prompt = prompt or _fixed(sweep.workload.input_tokens)
    answer = answer or _fixed(sweep.workload.output_tokens)
    return (prompt, answer) if prompt and answer else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _fixed(tokens: int | str) -> float | None:
    return float(tokens) if isinstance(tokens, int) and tokens > 0 else None


def _need(verdict: Verdict, known: Known) -> Need | None:
    """What has to be held; null where no demand is known.

    To take hardware away, the largest demand that was ever sampled; to add some, the busy minutes'
    requests/s (P95), for how many wait at once where it is too small is its own doing.
    """
    lengths = _lengths(known)
    if lengths is None:
        return None
    seen, declared = known.pattern, verdict.demand
    if seen is None:
        at_once, rate = declared.get("concurrency") or 0.0, declared.get("rps")
        words = "as declared"
    elif verdict.finding == "UNDER_SIZED":
        rate = seen.requests_per_s.p95
        at_once = 0.0 if rate else seen.concurrency.p99 or 0.0
        words = "the P95 of the minutes"
    else:
        rate, at_once = seen.requests_per_s.peak, seen.concurrency.max or 0.0
        words = "the most that was ever seen"
    at_once = max(at_once, known.expect_concurrency or 0.0)
    if verdict.finding == "INFEASIBLE_SLO":
        at_once = max(at_once, 1.0)
    if not (at_once or rate):
        return None
    slo = known.slo or ASSUMED
    alone = at_once / known.replicas
    tails = others.tails(slo, known.levels, alone)
    return Need(*lengths, at_once=at_once, slo=slo, tails=tails, requests_per_s=rate, words=words)


# What to look for: only what surely saves, or whatever holds the load.
_CHEAPER = {
    "RIGHT_SIZED": True, "OVER_SIZED": True, "OVER_OFF_PEAK": True, "IDLE": True,
    "INSUFFICIENT_DATA": True, "UNDER_SIZED": False, "INFEASIBLE_SLO": False,
}  # fmt: skip


def _candidates(
    verdict: Verdict, known: Known, place: _Place, need: Need | None, lacking: list[str]
) -> list[Candidate]:
    cheaper = _CHEAPER.get(verdict.finding)
    if cheaper is None or need is None or place.box is None or known.sweep is None:
        return []
    try:
        return others.candidates(place.box, known.sweep, need, known.prices, cheaper=cheaper)
    except UsageError as error:
        lacking.append(str(error))
        return []


# --------------------------------------------------------------------------------- energy and money


def _energy(known: Known) -> dict[str, Any]:
    """Beside what the verdict has: a month, and how much of it nobody had anything of."""
    energy = known.pattern.energy if known.pattern else None
    if energy is None or not energy.energy_j or energy.power_w.mean is None:
        return {}
    return {
        "kwh_per_month": energy.power_w.mean * HOURS_A_MONTH / 1e3,
        "idle_ratio": (energy.idle_j or 0.0) / energy.energy_j,
        "of": "the GPUs alone",
    }


def _cost(verdict: Verdict, known: Known, place: _Place) -> dict[str, Any]:
    """What is there, by the hour, the month and the million tokens that met the SLO."""
    price = known.prices.gpu.get(place.card.name)
    found: dict[str, Any] = {
        "gpu": place.card.name,
        "gpus": place.gpus,
        "basis": price.basis if price else None,
        "prices": f"{price.source} {f'({price.as_of})' if price.as_of else ''}".strip()
        if price else None,
        "usd_per_month": None,
        "usd_per_million_output_tokens": None,
    }  # fmt: skip
    an_hour = money.hourly(place.card, place.gpus, known.prices, place.mean_w)
    if an_hour is None:
        why = "the power that its GPUs draw" if price else f"a price of {place.card.name}"
        return {**found, "unknown": f"{why} is not known: see [prices] file"}
    found["usd_per_month"] = _usd(an_hour.times(HOURS_A_MONTH))
    return found | _per_million(verdict, known, an_hour)


def _usd(amount: Usd | None) -> dict[str, Any] | None:
    return None if amount is None else msgspec.to_builtins(amount)


def _per_million(verdict: Verdict, known: Known, an_hour: Usd) -> dict[str, Any]:
    """Of production with its idle time and busy alone; of a curve, at the most that it held."""
    seen = known.pattern
    if seen is None:
        return _per_million_swept(verdict, known, an_hour)
    rate = seen.output_tokens_per_s.mean
    share = money.met_share(seen, known.slo)
    if not rate or share is None:
        return {}
    whole = money.per_million(an_hour, rate, share)
    busy_ratio = 1 - (seen.quiet.idle_ratio or 0.0)
    return {
        "slo_met_ratio": msgspec.to_builtins(share),
        "usd_per_million_output_tokens": _usd(whole),
        "usd_per_million_output_tokens_busy": _usd(whole.times(busy_ratio) if whole else None),
    }


def _per_million_swept(verdict: Verdict, known: Known, an_hour: Usd) -> dict[str, Any]:
    held = verdict.capacity.get("lo") or verdict.capacity.get("value")
    points = [one for one in curves.points(known.levels) if held and one.load <= held]
    if not points or not points[-1].level.output_tokens_per_s:
        return {}
    level = points[-1].level
    met = level.slo_attainment
    share = ALL if met is None else Share(met, met, met)
    rate = level.output_tokens_per_s or 0.0
    return {
        "at": points[-1].load,
        "slo_met_ratio": msgspec.to_builtins(share),
        "usd_per_million_output_tokens_busy": _usd(money.per_million(an_hour, rate, share)),
    }


def _kept(place: _Place, found: Sequence[Candidate], need: Need | None) -> dict[str, Any]:
    """What is needed to score a prediction once its configuration stands there."""
    if place.box is None or need is None:
        return {}
    lengths = {"input_tokens": need.input_tokens, "output_tokens": need.output_tokens}
    return {
        "here": _key(place.box),
        "candidates": [
            {"configuration": one.words, **msgspec.to_builtins(one), **lengths}
            for one in found[:KEPT]
        ],
    }


# ----------------------------------------------------------------------------- the kind of hardware


class _Use(NamedTuple):
    """Parts of the data sheet that the peak's tokens take; null where not known."""

    flops: float
    bandwidth: float
    kv: float | None


def _use(known: Known, box: Box | None) -> _Use | None:
    """Of the busy minutes (P95); of a curve, at the most that was measured.

    FLOP/s: 2 · active parameters a token. Bytes/s: the weights and the cache, once a step, and a
    step gives each sequence in flight a token.
    """
    lengths, seen = _lengths(known), known.pattern
    if box is None or lengths is None:
        return None
    if seen is not None:
        rate, at_once, kv = seen.output_tokens_per_s.p95, seen.concurrency.p95, seen.kv_usage.max
    elif points := curves.points(known.levels):
        top = max(points, key=lambda one: one.throughput)
        rate, at_once = top.level.output_tokens_per_s, top.concurrency
        kv = top.level.server.kv_usage_max if top.level.server else None
    else:
        return None
    if not rate or not at_once:
        return None
    spec, (prompt, answer) = box.spec, lengths
    each = max(1.0, at_once / box.replicas)
    cache = each * kv_bytes(spec.model, prompt + answer / 2, spec.kv_precision, spec.tp)
    read = active_weight_bytes(spec.model, spec.precision, each) + cache
    work = 2 * spec.model.params_active * rate * (1 + prompt / answer)
    return _Use(
        work / (box.gpus * spec.gpu.flops_per_s(spec.precision)),
        read * rate / each / (box.gpus * spec.gpu.bandwidth_bytes_per_s),
        kv,
    )


def _mismatched(verdict: Verdict, known: Known, place: _Place) -> dict[str, Any] | None:
    """One resource binds at the peak while another idles: which way to move, not just how far."""
    at_peak = verdict.finding == "UNDER_SIZED" or (
        verdict.ratio is not None and verdict.ratio.value >= BINDS_FROM
    )
    binds = next((one.code for one in verdict.reasons if one.code in _BINDS), None)
    use = _use(known, place.box)
    if not at_peak or binds is None or use is None:
        return None
    used = {"FLOPS": use.flops, "memory bandwidth": use.bandwidth}
    if use.kv is not None:
        used["memory for the KV cache"] = use.kv
    idle, share = min(used.items(), key=lambda one: one[1])
    if share >= IDLES_MOST or idle == _BINDS[binds]:
        return None
    return {
        "name": "MISMATCHED",
        "binds": binds,
        "idles": idle,
        "because": f"{_BINDS[binds]} binds while {100 * share:.0f} % of the {idle} are used: move"
        f" to hardware with more {_BINDS[binds]} for its {idle}, not to more of the same",
    }


def _personal(
    verdict: Verdict, known: Known, place: _Place, found: Sequence[Candidate]
) -> Reason | None:
    """One person's inference on a device that is built for training, where a cheaper one does."""
    p99 = _p99(verdict, known)
    if known.trains or place.card.category != "training-class" or not found:
        return None
    if p99 is None or p99 > PERSONAL_MOST or not _CHEAPER.get(verdict.finding):
        return None
    if known.pattern is not None and known.pattern.covered_s < known.least_s:
        return None
    best = next((one for one in found if one.category != "training-class"), None)
    if best is None or best.saving is None:
        return None
    return Reason(
        "TRAINING_CLASS_FOR_PERSONAL",
        f"one person's load (P99 of {p99:.3g} at once, no training declared) on {place.gpus}"
        f" x {place.card.name}, a training-class device: {best.words} would hold it by prediction,"
        f" a token every {_from_to(best.tpot_ms)} ms, for {_percent(*best.saving)} less",
        {
            "concurrency_p99": p99,
            "category": place.card.category,
            "candidate": best.words,
            "tpot_ms": msgspec.to_builtins(best.tpot_ms),
            "ttft_ms": msgspec.to_builtins(best.ttft_ms),
            "saving": list(best.saving),
        },
    )


def _p99(verdict: Verdict, known: Known) -> float | None:
    """Requests at once in the busiest 1 % of the minutes, or those that are declared."""
    seen = known.pattern.concurrency.p99 if known.pattern else verdict.demand.get("concurrency")
    if seen is None:
        return None
    return max(float(seen), known.expect_concurrency or 0.0)


def _questions(verdict: Verdict, known: Known, place: _Place | None) -> dict[str, Any]:
    """The three questions, with a sentence and its numbers for each."""
    said = [_class(known, place), _users(verdict, known), _experience(verdict, known)]
    return {**verdict.questions, "said": said}


def _class(known: Known, place: _Place | None) -> str:
    trains = "Training is declared." if known.trains else "No training is declared."
    if place is None:
        return f"Do I train? {trains} What class of hardware this is, is not known."
    card = place.card
    flops = card.flops.get("bf16", 0.0)
    built = f"{card.memory_bytes / GIB:.0f} GiB, {card.bandwidth_bytes_per_s / 1e12:.3g} TB/s"
    built += f", {flops / 1e12:,.0f} TFLOPS in bf16" if flops else ""
    text = f"Do I train? {trains} {card.name} is {card.category} ({built})"
    use = _use(known, place.box)
    if use is None:
        return f"{text}."
    when = "the busy minutes" if known.pattern else "the most that was measured"
    return (
        f"{text}; {when} took {_share(use.flops)} of its FLOPS and"
        f" {_share(use.bandwidth)} of its bandwidth."
    )


def _users(verdict: Verdict, known: Known) -> str:
    p99 = _p99(verdict, known)
    if p99 is None:
        return "One user or a service? Not known: no demand was observed or declared."
    who = "One user" if p99 <= PERSONAL_MOST else "A service"
    how = "P99 of the minutes" if known.pattern else "declared"
    return f"One user or a service? {who}: {p99:.3g} requests at once ({how})."


def _experience(verdict: Verdict, known: Known) -> str:
    """What memory, steadiness and energy say against peak speed."""
    parts, steady = [], verdict.stability
    if (ttft := steady.get("ttft_p99_over_p50")) is not None:
        parts.append(f"TTFT p99 is {number(ttft)} times its p50")
    if (itl := steady.get("itl_p99_over_p50")) is not None:
        parts.append(f"ITL p99 {number(itl)} times")
    if known.pattern is not None and known.pattern.kv_usage.max is not None:
        parts.append(f"the KV cache was at most {_share(known.pattern.kv_usage.max)} full")
    energy = known.pattern.energy if known.pattern else None
    if energy is not None and energy.j_per_output_token_busy and energy.j_per_output_token:
        parts.append(
            f"a token takes {number(energy.j_per_output_token_busy)} J, with the idle time"
            f" {number(energy.j_per_output_token)} J"
        )
    told = ", ".join(parts) or "neither steadiness, memory nor energy were seen"
    return f"Peak speed or a steady service? {told[0].upper()}{told[1:]}."


def _share(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.01 else "under 1 %"


# ----------------------------------------------------------------------------------- recommendation


class _Case(NamedTuple):
    verdict: Verdict
    known: Known
    box: Box
    need: Need
    found: Sequence[Candidate]


def _recommended(case: _Case, personal: bool) -> Recommendation | None:
    """What to do, by the finding; as it was where nothing better is known."""
    verdict, replicas = case.verdict, case.box.replicas
    given = verdict.recommendation
    if verdict.finding == "UNDER_SIZED":
        return _flag(case) or _bigger(case, "to hold it")
    if verdict.finding == "INFEASIBLE_SLO":
        return _bigger(case, "to keep the SLO with one request")
    if verdict.finding == "OVER_SIZED" and replicas > 1 and given is not None:
        left = shape(case.box.spec.gpu.name, case.box.spec.tp, replicas - 1)
        return msgspec.structs.replace(given, configuration=left)
    if verdict.finding == "OVER_SIZED" or (personal and verdict.finding == "RIGHT_SIZED"):
        return _smaller(case, personal)
    return given


def _flag(case: _Case) -> Recommendation | None:
    """A flag comes before hardware, where it is the flag that binds."""
    given = case.verdict.recommendation
    codes = [one.code for one in case.verdict.reasons]
    if given is None:
        return None
    if "ADMISSION_CAP" in codes:
        flag = f"--max-num-seqs {others.batch_limit(case.box, case.need)}"
        bar = "none is given: how much the cap held back, only a sweep without it tells"
    elif "COMPUTE_PREFILL" in codes and _is_off(case.known, "enable_prefix_caching"):
        flag = "--enable-prefix-caching"
        bar = "none is given: how many prompts begin alike is not known"
    else:
        return None
    return msgspec.structs.replace(
        given,
        configuration=f"{_here(case.box)} with {flag}",
        error_bar=bar,
        confirm_with=_sweep(case, case.known.target),
    )


def _is_off(known: Known, setting: str) -> bool:
    return known.settings.get(setting, "").lower() == "false"


def _bigger(case: _Case, why: str) -> Recommendation | None:
    given = case.verdict.recommendation
    if given is None or not case.found:
        return given
    best = case.found[0]
    return msgspec.structs.replace(
        _predicted(case, best, given),
        action=f"{best.words} {why}, by prediction the cheapest; {given.action}",
    )


def _smaller(case: _Case, personal: bool) -> Recommendation | None:
    """One to try beside what is there; what is there goes when the other one was measured."""
    given = case.verdict.recommendation
    kinds = [one for one in case.found if not personal or one.category != "training-class"]
    if given is None or not kinds:
        return given
    action = f"try {kinds[0].words} with this load; give this one back only when that held it"
    return msgspec.structs.replace(_predicted(case, kinds[0], given), action=action)


def _predicted(case: _Case, best: Candidate, given: Recommendation) -> Recommendation:
    """A candidate as a recommendation: how sure, how to confirm it, what would overturn it."""
    rate = best.output_tokens_per_s
    down, up = rate.lo90 / rate.value - 1, rate.hi90 / rate.value - 1
    steps = " and ".join(_STEPS[step] for step in best.steps) or "other flags"
    assumed = "" if case.known.slo else f"; no SLO is known, {format_slo(ASSUMED)} was assumed"
    outside = "; its load lies outside of what was swept" if best.outside else ""
    changed = best.precision != case.box.spec.precision
    answers = "; weights in another precision answer differently: check that too" if changed else ""
    is_here = best.gpu == case.box.spec.gpu.name
    return msgspec.structs.replace(
        given,
        configuration=best.words,
        saving_lo=best.saving[0] if best.saving else None,
        saving_hi=best.saving[1] if best.saving else None,
        error_bar=(
            f"{_from_to(rate)} tokens/s at {best.at_once:g} at once ({100 * down:+.0f} to"
            f" {100 * up:+.0f} %: {steps}), in nine of ten cases{assumed}{outside}{answers}"
        ),
        confirm_with=_sweep(case, case.known.target if is_here else "URL", best.at_once),
        overturned_by=(
            f"that sweep, where it breaks {format_slo(case.need.slo)} at {best.at_once:g} at once;"
            " a larger peak, longer prompts or answers"
        ),
    )


def _sweep(case: _Case, target: str, at_once: float | None = None) -> str:
    """The sweep with the observed lengths, around the load that decides."""
    need = case.need
    most = max(1, round(at_once or need.at_once))
    loads = sorted({1, max(1, most // 2), most, 2 * most})
    slo = f" --slo '{format_slo(case.known.slo)}'" if case.known.slo else ""
    return (
        f"loadgen sweep {shlex.quote(target)} --input-tokens {max(1, round(need.input_tokens))}"
        f" --output-tokens {max(1, round(need.output_tokens))}"
        f" --concurrency {','.join(map(str, loads))}{slo} --expect-concurrency {most}"
    )


def _here(box: Box) -> str:
    return shape(box.spec.gpu.name, box.spec.tp, box.replicas)


def _saving(recommendation: Recommendation | None, case: _Case) -> Verdict:
    """The verdict with it, and its saving in USD a month where it has one."""
    verdict = msgspec.structs.replace(case.verdict, recommendation=recommendation)
    month = verdict.cost.get("usd_per_month")
    if recommendation is None or recommendation.saving_lo is None or month is None:
        return verdict
    then = next(
        (one.usd_per_month for one in case.found if one.words == recommendation.configuration), None
    )
    low, high = recommendation.saving_lo, recommendation.saving_hi or recommendation.saving_lo
    if then is None:  # the same hardware, fewer of it
        ends = [low * month["low"], high * (month["high"] or month["typical"])]
    else:
        ends = [now - after for now, after in
                ((month[end], getattr(then, end)) for end in ("low", "typical", "high"))
                if now is not None and after is not None]  # fmt: skip
    return msgspec.structs.replace(
        verdict, cost={**verdict.cost, "saving_usd_per_month": [min(ends), max(ends)]}
    )


# -------------------------------------------------------------------------------- scored afterwards


def _key(box: Box) -> dict[str, Any]:
    spec = box.spec
    return {
        "gpu": spec.gpu.name,
        "tp": spec.tp,
        "replicas": box.replicas,
        "precision": spec.precision,
        "kv_precision": spec.kv_precision,
    }


def _score(known: Known, place: _Place) -> Reason | None:
    """The newest prediction of what stands there now, from before it did, beside its sweep."""
    if place.box is None or known.measured_unix_s is None:
        return None
    key, lengths = _key(place.box), _swept(known.sweep)
    for at_s, cost in known.history:
        if at_s >= known.measured_unix_s or cost.get("here") in (None, key):
            continue
        for one in cost.get("candidates", ()):
            if all(one.get(name) == value for name, value in key.items()):
                return _scored(known, place.box, one, lengths)
    return None


def _scored(
    known: Known, box: Box, said: Mapping[str, Any], lengths: tuple[float, float] | None
) -> Reason | None:
    """Null where the sweep has no such load, or other lengths."""
    asked = (said["input_tokens"], said["output_tokens"])
    if lengths is None or not all(
        1 / ALIKE <= now / then <= ALIKE for now, then in zip(lengths, asked, strict=True)
    ):
        return None
    each = others.measured_at(known.levels, said["at_once"] / box.replicas)
    if each is None:
        return None
    rate, measured = said["output_tokens_per_s"], each * box.replicas
    inside = rate["lo90"] <= measured <= rate["hi90"]
    return Reason(
        "PREDICTION_SCORED",
        f"of {said['configuration']} {number(rate['lo90'])}–{number(rate['hi90'])} tokens/s were"
        f" predicted at {said['at_once']:g} at once, {number(measured)} were measured:"
        f" {'inside' if inside else 'outside'}",
        {
            "configuration": said["configuration"],
            "at_once": said["at_once"],
            "predicted": rate,
            "measured": measured,
            "inside": inside,
        },
    )


# ----------------------------------------------------------------------------------------- in words


def _from_to(one: Any) -> str:
    return f"{number(one.lo90)}–{number(one.hi90)}"


def _percent(low: float, high: float) -> str:
    ends = sorted({round(100 * low), round(100 * high)})
    return f"{'–'.join(map(str, ends))} %"
