"""What a verdict comes to: energy and money, the three questions, what to buy, try or leave.

Pure. The verdict says whether the hardware fits; this says what that costs, whether hardware of its
class is right for such work at all, and which configuration would hold the same for less (or hold
what this one does not), by prediction from the sweep of this very box. A prediction is never more
than a candidate: each comes with its interval, the command that would confirm it and what would
overturn it; and where such a change was made, it is scored against what was then measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from agent.model import Reason, Recommendation, Slo, UsageError, Verdict
from agent.sizing import candidates as others
from agent.sizing import curve as curves
from agent.sizing import money
from agent.sizing.candidates import Box, Candidate, Need, shape
from agent.sizing.curve import format_slo, parse_slo
from agent.sizing.kind import (
    CHEAPER,
    Known,
    Place,
    lengths_of,
    mismatch,
    p99_of,
    personal_reason,
    place_of,
    questions,
    swept_lengths,
)
from agent.sizing.money import ALL, HOURS_A_MONTH, Share, Usd
from agent.words import number

ALIKE = 1.25  # lengths that differ by less are the same
KEPT = 3  # candidates that stay with a verdict

# Where the SLO does not say: what a reader takes for prompt and fluent.
ASSUMED = tuple(parse_slo("ttft:p95<1000ms,tpot:p95<100ms"))
FLUENT = tuple(parse_slo("tpot:p95<100ms,itl:p95<100ms"))  # either, as it was measured

_STEPS = {
    "GPU": "another GPU of the vendor",
    "precision": "another precision",
    "parallelism": "another split over GPUs",
    "replicas": "another number of engines",
    "model": "another model",
    "engine": "another engine",
    "published": "published benchmarks, for no sweep of this box is known",
}


def advise(verdict: Verdict, known: Known) -> Verdict:
    """The verdict with what it costs, the three questions, and what to do. The finding stays."""
    lacking: list[str] = []
    place = place_of(known, lacking)
    if place is None:
        return msgspec.structs.replace(
            verdict,
            energy={**verdict.energy, **_energy(known)},
            cost={**verdict.cost, "unknown": lacking[0]},
            questions=questions(verdict, known, None),
        )
    need, found = _look(verdict, known, place, lacking)
    personal = personal_reason(verdict, known, place, found)
    more = [personal, _score(known, place)]
    advised = msgspec.structs.replace(
        verdict,
        reasons=[*verdict.reasons, *(reason for reason in more if reason is not None)],
        qualifier=verdict.qualifier or mismatch(verdict, known, place),
        energy={**verdict.energy, **_energy(known)},
        cost={**verdict.cost, **_cost(verdict, known, place), **_kept(place, found, need)},
        questions=questions(verdict, known, place),
        missing=[*verdict.missing, *(f"to compare other hardware: {one}" for one in lacking)],
    )
    if place.box is None or need is None:
        return advised
    rest = _Case(advised, known, place.box, need, found)
    return _saving(_recommended(rest, personal is not None), rest)


def _look(
    verdict: Verdict, known: Known, place: Place, lacking: list[str]
) -> tuple[Need | None, list[Candidate]]:
    """What has to be held, and what would hold it by prediction.

    Where the box that is there does not hold its load, the model has to say so too: if not of the
    busy minutes, then of the busiest; a model that says otherwise is not asked what would.
    """
    need, cheaper = _need(verdict, known), CHEAPER.get(verdict.finding)
    box, sweep = place.box, known.sweep
    if cheaper is None or need is None or box is None:
        return need, []
    try:
        oracle = others.Oracle(box, sweep)
        if not cheaper and others.holds_now(oracle, box, need):
            need = _need(verdict, known, busiest=True) or need
            if others.holds_now(oracle, box, need):
                by = "that of now" if sweep is not None else "published benchmarks"
                raise UsageError(f"a sweep with these lengths: by {by} this box holds it")
        return need, others.candidates(oracle, box, need, known.prices, cheaper=cheaper)
    except UsageError as error:
        lacking.append(str(error))
        return need, []


def _need(verdict: Verdict, known: Known, *, busiest: bool = False) -> Need | None:
    """What has to be held; null where no demand is known.

    To take hardware away, the largest demand that was ever sampled; to add some, the busy minutes'
    requests/s (P95, or the `busiest`), for how many wait at once where it is too small is its own
    doing.
    """
    lengths = lengths_of(known)
    if lengths is None:
        return None
    seen, declared = known.pattern, verdict.demand
    if seen is None:
        at_once, rate = declared.get("concurrency") or 0.0, declared.get("rps")
        words = "as declared"
    elif verdict.finding == "UNDER_SIZED":
        rate = seen.requests_per_s.peak if busiest else seen.requests_per_s.p95
        at_once = 0.0 if rate else seen.concurrency.p99 or 0.0
        words = "the busiest minute" if busiest else "the P95 of the minutes"
    else:
        rate, at_once = seen.requests_per_s.peak, seen.concurrency.max or 0.0
        words = "the most that was ever seen"
    at_once = max(at_once, known.expect_concurrency or 0.0)
    if verdict.finding == "INFEASIBLE_SLO":
        at_once = max(at_once, 1.0)
    if not (at_once or rate):
        return None
    p99 = p99_of(verdict, known)
    each = max(at_once, p99 or 0.0) / known.replicas
    slo = _asked(known, each)
    return Need(
        *lengths,
        at_once=at_once,
        slo=slo,
        tails=others.tails(slo, known.levels, each),
        requests_per_s=rate,
        personal=p99 is not None and p99 <= known.t.single_user,
        words=words,
    )


def _asked(known: Known, at_once: float) -> tuple[Slo, ...]:
    """The SLO, and where it leaves out how fast an answer is written, or all, what is assumed.

    Of a curve that has means alone, the means.
    """
    if {"itl", "tpot", "e2e"} & {one.metric for one in known.slo}:
        return known.slo
    means = [msgspec.structs.replace(one, statistic="mean") for one in (*FLUENT, ASSUMED[0])]
    measured = others.tails((*FLUENT, ASSUMED[0], *means), known.levels, at_once)

    def first(*targets: Slo) -> Slo:
        return next((one for one in targets if format_slo([one]) in measured), targets[0])

    fluent = first(*FLUENT, *means[:2])
    if known.slo:
        return (*known.slo, fluent)
    return (first(ASSUMED[0], means[2]), fluent)


# --------------------------------------------------------------------------------- energy and money


def _energy(known: Known) -> dict[str, Any]:
    """Beside what the verdict has of the GPUs: a month of them, how much of it nobody had anything
    of, and, apart, what processors and memory took."""
    found: dict[str, Any] = {}
    energy = known.pattern.energy if known.pattern else None
    if energy is not None and energy.energy_j and energy.power_w.mean is not None:
        found["kwh_per_month"] = energy.power_w.mean * HOURS_A_MONTH / 1e3
        found["idle_ratio"] = (energy.idle_j or 0.0) / energy.energy_j
    if known.pattern is not None and known.host_j is not None:
        found["host_energy_j"] = known.host_j
        if known.pattern.output_tokens:
            found["host_j_per_output_token"] = known.host_j / known.pattern.output_tokens
    return found


def _cost(verdict: Verdict, known: Known, place: Place) -> dict[str, Any]:
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
        why = "no output tokens were seen" if not rate else "nothing tells who met the SLO"
        return {"unknown": f"USD per million output tokens within the SLO: {why}"}
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


def _kept(place: Place, found: Sequence[Candidate], need: Need | None) -> dict[str, Any]:
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
    if verdict.finding == "IDLE" and given is not None:
        return _given_back(case, given)
    if verdict.finding == "OVER_SIZED" and replicas > 1 and given is not None:
        left = shape(case.box.spec.gpu.name, case.box.spec.tp, replicas - 1)
        return msgspec.structs.replace(given, configuration=left)
    if verdict.finding == "OVER_SIZED" or (personal and verdict.finding == "RIGHT_SIZED"):
        return _smaller(case, personal)
    return given


def _given_back(case: _Case, given: Recommendation) -> Recommendation:
    """What is rented saves its idle time at least, and all of it where nobody needs it."""
    known, seen = case.known, case.known.pattern
    if case.verdict.cost.get("basis") != "rental" or known.trains or known.expect_concurrency:
        return given
    if seen is None or seen.quiet.idle_ratio is None:
        return given
    return msgspec.structs.replace(given, saving_lo=seen.quiet.idle_ratio, saving_hi=1.0)


def _flag(case: _Case) -> Recommendation | None:
    """A flag comes before hardware, where it is the flag that binds."""
    given = case.verdict.recommendation
    codes = [one.code for one in case.verdict.reasons]
    if given is None:
        return None
    at_once = max(case.need.at_once, p99_of(case.verdict, case.known) or 0.0)
    if "ADMISSION_CAP" in codes:
        flag = f"--max-num-seqs {others.batch_limit(case.box, case.need, at_once)}"
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
        confirm_with=_sweep(case, case.known.target, at_once),
    )


def _is_off(known: Known, setting: str) -> bool:
    return known.settings.get(setting, "").lower() == "false"


def _bigger(case: _Case, why: str) -> Recommendation | None:
    """The same hardware with other flags first, for nothing has to be bought; else the cheapest."""
    given = case.verdict.recommendation
    if given is None or not case.found:
        return given
    free = (one for one in case.found if one.flags and one.gpus == case.box.gpus)
    best = next(free, case.found[0])
    return msgspec.structs.replace(
        _predicted(case, best, given),
        action=f"{best.words} {why}, by prediction; {given.action}",
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
    added = [one for one in case.need.slo if one not in case.known.slo]
    assumed = f"; {format_slo(added)} was assumed, for the SLO does not say" if added else ""
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
            f"{_from_to(rate)} tokens/s at {best.at_once:g} at once, in nine of ten cases"
            f" ({_signed(down)} to {_signed(up)} %: {steps}); the load is {case.need.words}"
            f"{assumed}{outside}{answers}"
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


def _score(known: Known, place: Place) -> Reason | None:
    """The newest prediction of what stands there now, from before it did, beside its sweep."""
    if place.box is None or known.measured_unix_s is None:
        return None
    key, lengths = _key(place.box), swept_lengths(known.sweep)
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


def _signed(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")
