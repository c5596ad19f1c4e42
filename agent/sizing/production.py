"""What production itself proves of its hardware, beside what a curve says of it.

Pure. A curve tells what a server holds; weeks of minutes tell whether anything is asked of it at
all, whether the SLO broke while requests queued (that needs no sweep), whether it was kept, and
whether so much more is held than was ever asked that a smaller configuration would do.

OVER_SIZED is the finding that breaks somebody's service where it is wrong. It takes an SLO declared
for this service, a measured curve that fits without a doubt, two weeks with their weekends, and
room for the largest demand ever sampled on the smaller configuration; else it is not said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import numpy as np

from agent.model import Confidence, Reason, Recommendation, Slo, Verdict
from agent.sizing.curve import format_slo
from agent.sizing.judge import UNIT_NAMES, Unit
from agent.sizing.pattern import Distribution, Pattern
from agent.sizing.window import Window
from agent.stats import Floats, merged, quantile

HOUR_S = 3600
DAY_S = 86_400
WEEK_S = 7 * DAY_S


class Needs(msgspec.Struct, frozen=True):
    """Every number that these findings hang on. A demonstration may shorten the times; the verdict
    then says so."""

    idle_s: float = DAY_S
    """Observed at least so long for IDLE …"""
    idle_busy_max: float = 0.01
    """… and under this share of it with a request in flight."""
    right_s: float = HOUR_S
    """Observed at least so long for RIGHT_SIZED: an evening's peak is not in five minutes."""
    over_s: float = 14 * DAY_S
    """Observed at least so long for OVER_SIZED, with the weekends that so long has (two)."""
    over_ratio_max: float = 0.85
    """OVER_SIZED: the largest demand over the surely held load of the smaller configuration."""
    covered_min: float = 0.9
    """Share of those times that was really observed: gaps come."""
    hours_min: int = 3
    """Hours in which the SLO broke for UNDER_SIZED, or was kept for RIGHT_SIZED without a sweep."""
    requests_min: int = 30
    """Requests of an hour for its latency to count."""
    rejected_max: float = 0.01
    """Share of requests turned away above which the observed demand is not all of it."""


class Said(msgspec.Struct, frozen=True):
    """A statistic of the SLO in one hour, ms; it surely lies from `lo` to `hi` (null: no end)."""

    n: float
    value: float
    lo: float
    hi: float | None


class Hour(msgspec.Struct, frozen=True):
    """One hour of a service; `said` has a place for each target, null where it was not measured."""

    start_unix_s: float
    concurrency: float
    waiting: float
    preemptions: float
    kv_usage_max: float | None
    said: tuple[Said | None, ...]


class Scene(msgspec.Struct, frozen=True):
    """What was observed of a service, and how its verdict is to be made.

    `curve`: what the verdict of the judge is made from. `declared_slo`: the SLO was given for this
    service, not taken from a sweep. `replicas` share the demand evenly: capacity and demand are of
    one of them. `doubts`: why the curve may not be used to take hardware away. `weekend_s`:
    observed time on Saturdays and Sundays. `missing`: what choosing the curve found to be missing.
    """

    pattern: Pattern
    hours: tuple[Hour, ...]
    slo: tuple[Slo, ...] = ()
    declared_slo: bool = False
    curve: Literal["measured", "passive", "none"] = "none"
    replicas: int = 1
    expect_concurrency: float | None = None
    trains: bool = False
    weekend_s: float = 0.0
    doubts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    rests_on: tuple[str, ...] = ()
    target: str = "URL"
    needs: Needs = Needs()

    @property
    def seen(self) -> str:
        return span(self.pattern.covered_s)


def span(seconds: float) -> str:
    """A length of time in the unit that a person would take."""
    for unit, length in (("day", DAY_S), ("hour", HOUR_S), ("minute", 60)):
        if seconds >= 0.95 * 2 * length or (unit == "minute"):
            return f"{seconds / length:.3g} {unit}s"
    raise AssertionError


# ------------------------------------------------------------------------------------------ hours

_HISTOGRAMS = {"ttft": "ttft_seconds", "itl": "itl_seconds", "tpot": "tpot_seconds",
               "e2e": "e2e_seconds"}  # fmt: skip
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def hours(window: Window, slo: Sequence[Slo]) -> tuple[Hour, ...]:
    """The observed clock hours of a window, in order of time."""
    weights = window.weights_s()
    of = np.floor(window.starts_unix_s / HOUR_S)
    in_flight, waiting = window.in_flight("mean"), window.total("requests_waiting", "mean")
    preemptions, kv_usage = window.total("preemptions_total"), window.kv_usage("max")
    found = []
    for hour in np.unique(of[weights > 0]):
        here = (of == hour) & (weights > 0)
        seconds = weights[here]
        fullest = kv_usage[here][~np.isnan(kv_usage[here])]
        found.append(
            Hour(
                start_unix_s=float(hour) * HOUR_S,
                concurrency=float((in_flight[here] * seconds).sum() / seconds.sum()),
                waiting=float((waiting[here] * seconds).sum() / seconds.sum()),
                preemptions=float(preemptions[here].sum()),
                kv_usage_max=float(fullest.max()) if fullest.size else None,
                said=tuple(_said(window, target, here.astype(float)) for target in slo),
            )
        )
    return tuple(found)


def _said(window: Window, target: Slo, places: Floats) -> Said | None:
    name = _HISTOGRAMS.get(target.metric)
    if name is None:
        return None
    if target.statistic == "mean":
        n = float(window.total(f"{name}_count")[places > 0].sum())
        mean = 1e3 * float(window.total(f"{name}_sum")[places > 0].sum()) / n if n > 0 else 0.0
        return Said(n, mean, mean, mean) if n > 0 else None
    share = _QUANTILES.get(target.statistic)
    histograms = merged(window.histograms(name, places))
    at = quantile(histograms, share) if share is not None else None
    if at is None:
        return None
    n = math.fsum(one.n for one in histograms)
    return Said(n, 1e3 * at.value, 1e3 * at.lo, None if at.hi is None else 1e3 * at.hi)


def weekend_s(window: Window) -> float:
    """How long Saturdays and Sundays (UTC) were observed."""
    weights = window.weights_s()
    days = np.floor(window.starts_unix_s / DAY_S).astype(int)
    is_weekend = (days + 3) % 7 >= 5  # 1970-01-01 was a Thursday
    return float(weights[is_weekend].sum())


# ---------------------------------------------------------------------------------------- verdict

Rule = Callable[[Scene, Verdict | None], Verdict | None]


def conclude(scene: Scene, judged: Verdict | None) -> Verdict:
    """The verdict on a service: `judged` is that of its curve, null where there is none.

    The first rule that has its evidence decides; in order of precedence.
    """
    verdict = next(found for rule in RULES if (found := rule(scene, judged)) is not None)
    return msgspec.structs.replace(
        verdict,
        demand={**verdict.demand, **_demand(scene)},
        rests_on=[*scene.rests_on, *verdict.rests_on, *_shortened(scene)],
        stability=_stability(scene.pattern) or verdict.stability,
        questions={**verdict.questions, **_questions(scene)},
        energy={**verdict.energy, **_energy(scene.pattern)},
        missing=list(dict.fromkeys((*verdict.missing, *scene.missing))),
    )


def _nothing_observed(scene: Scene, judged: Verdict | None) -> Verdict | None:
    if scene.pattern.covered_s > 0 and scene.pattern.concurrency.mean is not None:
        return None
    if scene.pattern.covered_s > 0:
        why = f"{scene.seen} were observed, but the server does not tell how many requests it runs"
        line = (
            "a server that tells its running requests: `agent doctor` says which flag brings them"
        )
    else:
        why = f"nothing was observed in the last {span(scene.pattern.window_s)}"
        line = (
            "minutes of this server: keep `agent run` beside it; `agent doctor` says what stops it"
        )
    return _thin(scene, judged, f"Nothing can be said: {why}.", [line])


def _idle(scene: Scene, judged: Verdict | None) -> Verdict | None:
    needs, pattern = scene.needs, scene.pattern
    busy = _busy(pattern)
    if busy is None or busy >= needs.idle_busy_max or pattern.covered_s < needs.idle_s:
        return None
    watts = _idle_w(pattern)
    drawn = f"; idle, its GPUs draw {watts:.0f} W" if watts is not None else ""
    action = "share it, switch it off while nobody asks, or give it back"
    if scene.trains:
        action = "nothing for serving; whether training keeps it busy is not judged here"
    elif scene.expect_concurrency:
        action = f"keep it only if the {scene.expect_concurrency:g} expected requests really come"
    evidence = {"busy_ratio": busy, "covered_s": pattern.covered_s, "requests": pattern.requests}
    weeks = pattern.covered_s >= needs.covered_min * WEEK_S
    return Verdict(
        finding="IDLE",
        summary=(
            f"Hardly used: in {100 * busy:.2g} % of {scene.seen} a request was in flight{drawn}."
        ),
        confidence=Confidence(
            "high" if weeks else "medium",
            "nothing found" if weeks else f"{scene.seen} observed, no whole week",
        ),
        reasons=[Reason("IDLE", f"busy {100 * busy:.2g} % of the observed time", evidence)],
        recommendation=Recommendation(
            action=action, overturned_by="requests that come at other times than were observed"
        ),
    )


def _wrong_measurement(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """What is wrong with the measurement, or with one request alone, no demand can mend."""
    if judged is not None and judged.finding in ("INVALID_MEASUREMENT", "INFEASIBLE_SLO"):
        return judged
    return None


def _under(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """The SLO broke in production while requests queued, or the demand is above a swept curve."""
    if judged is not None and judged.finding == "UNDER_SIZED" and scene.curve == "measured":
        return judged
    broken = [hour for hour in scene.hours if _broke(scene, hour) and _queued(hour)]
    if len(broken) < scene.needs.hours_min:
        return None
    reasons = _broken_reasons(scene, broken)
    base = judged or _bare()
    preempted = any(hour.preemptions > 0 for hour in broken)
    days = scene.pattern.covered_s >= DAY_S
    return msgspec.structs.replace(
        base,
        finding="UNDER_SIZED",
        summary=(
            f"Too small: in {len(broken)} of {len(scene.hours)} observed hours the SLO was broken"
            f" while requests {'were preempted' if preempted else 'waited'}:"
            f" {reasons[0].because}."
        ),
        confidence=Confidence(
            "medium" if days and scene.slo else "low",
            "production shows that it breaks, not how much more is needed: that takes a sweep",
        ),
        reasons=[*reasons, *base.reasons],
        ratio=None,
        recommendation=Recommendation(
            action="more capacity; how much, and of what, a sweep tells",
            confirm_with=_sweep(scene),
            overturned_by="hours as busy as these that keep the SLO",
        ),
    )


def _over(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """So much is in hand that a smaller configuration may do."""
    if judged is None or scene.trains or scene.curve != "measured":
        return None
    if judged.finding != "RIGHT_SIZED" or (fullest := _fullest(scene, judged)) is None:
        return None
    unit, most, held, ratio = fullest
    if ratio >= scene.needs.over_ratio_max:
        return None
    smaller = f"{scene.replicas - 1} replica(s)" if scene.replicas > 1 else "half of it"
    each = " a replica" if scene.replicas > 1 else ""
    numbers = (
        f"at most {most:.3g} {UNIT_NAMES[unit]}{each} were ever seen in {scene.seen}, {held:.3g}"
        f" are surely held: {smaller} would be {100 * ratio:.0f} % full at that peak"
    )
    lacking = _lacking(scene)
    if lacking:
        return _thin(scene, judged, f"So far it looks over-sized, but nothing is to be taken away"
                     f" yet: {numbers}.", lacking)  # fmt: skip
    evidence = {"unit": unit, "most": most, "held_lo": held, "ratio_hi": ratio}
    replicas = scene.replicas > 1
    return msgspec.structs.replace(
        judged,
        finding="OVER_SIZED",
        summary=f"Larger than it has to be: {numbers}.",
        confidence=Confidence(
            "medium" if replicas and judged.confidence.level in ("medium", "high") else "low",
            "no smaller configuration was measured" if not replicas
            else judged.confidence.limited_by,
        ),
        reasons=[Reason("HEADROOM", numbers, evidence), *judged.reasons],
        recommendation=Recommendation(
            action=(
                "take one replica out of service first, and give it back only when the SLO held"
                " through a week without it" if replicas else
                "share it, or try a smaller device: measure that one with this load before this"
                " one is given back"
            ),
            saving_lo=1 / scene.replicas if replicas else None,
            saving_hi=1 / scene.replicas if replicas else None,
            confirm_with=_sweep(scene),
            overturned_by="a larger peak, longer prompts or answers, or a replica that fails",
        ),
    )  # fmt: skip


def _too_short(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """It fits what was seen, which is not enough to have seen a peak."""
    if judged is not None and judged.demand.get("declared"):
        return None
    need_s, pattern = scene.needs.right_s, scene.pattern
    if not pattern.concurrency.max:
        line = (
            f"requests: nothing was asked in {scene.seen} (IDLE takes {span(scene.needs.idle_s)})"
        )
        return _thin(scene, judged, f"Nothing was asked of it in {scene.seen}.", [line])
    if judged is None or judged.finding != "RIGHT_SIZED" or pattern.covered_s >= need_s:
        return None
    line = f"{span(need_s)} observed at least: it were {scene.seen}"
    return _thin(scene, judged, f"So far it fits, but only {scene.seen} were observed.", [line])


def _as_swept(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """What the judge said of a swept curve, or of a declared demand."""
    if judged is None or not (scene.curve == "measured" or judged.demand.get("declared")):
        return None
    return judged


def _kept(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """Without a sweep: every hour that counts kept the SLO, so what is asked is held."""
    counted = [hour for hour in scene.hours if _counts(scene, hour)]
    is_long = scene.pattern.covered_s >= scene.needs.right_s
    if not scene.slo or len(counted) < scene.needs.hours_min or not is_long:
        return None
    if not all(_kept_in(scene, hour) for hour in counted):
        return None
    peak = max(hour.concurrency for hour in counted)
    weeks = scene.pattern.covered_s >= scene.needs.covered_min * WEEK_S
    return msgspec.structs.replace(
        judged or _bare(),
        finding="RIGHT_SIZED",
        summary=(
            f"It fits what was asked: all {len(counted)} hours with enough requests kept the SLO,"
            f" at up to {peak:.3g} requests in flight over an hour. How much more it holds takes a"
            " sweep."
        ),
        confidence=Confidence(
            "medium" if weeks else "low",
            "no sweep: how far the limit is, is not known"
            + ("" if weeks else f"; {scene.seen} observed, no whole week"),
        ),
        ratio=None,
        recommendation=Recommendation(
            action="keep it",
            confirm_with=_sweep(scene),
            overturned_by="an hour that breaks the SLO, or a load beyond what was seen",
        ),
        missing=[_sweep_line(scene)],
    )


def _insufficient(scene: Scene, judged: Verdict | None) -> Verdict | None:
    missing = [_sweep_line(scene)]
    if not scene.slo:
        missing.append("an SLO ([slo] targets, or --slo): what production has to keep")
        why = "neither a measured curve nor an SLO says what it may be held against"
    elif not any(_counts(scene, hour) for hour in scene.hours):
        why = f"no hour had {scene.needs.requests_min} requests whose latency the SLO asks for"
        missing.append(f"hours of {scene.needs.requests_min} requests or more")
    elif any(_broke(scene, hour) for hour in scene.hours):
        why = "the SLO was broken, but nothing waited: what breaks it is not shown"
    else:
        why = "too few hours, or buckets too coarse, to show on which side of the SLO it is"
    return _thin(scene, judged, f"Production alone cannot tell: {why}.", missing)


# In order of precedence; the last one always has a verdict.
RULES: tuple[Rule, ...] = (
    _nothing_observed, _idle, _wrong_measurement, _under, _over, _too_short, _as_swept, _kept,
    _insufficient,
)  # fmt: skip


# --------------------------------------------------------------------------------------- evidence


def _bare() -> Verdict:
    return Verdict("INSUFFICIENT_DATA", "", Confidence("none", ""))


def _thin(scene: Scene, judged: Verdict | None, summary: str, missing: Sequence[str]) -> Verdict:
    """INSUFFICIENT_DATA, with what would end it."""
    return msgspec.structs.replace(
        judged or _bare(),
        finding="INSUFFICIENT_DATA",
        summary=summary,
        confidence=Confidence("none", "there is no verdict to be confident in"),
        recommendation=Recommendation(
            action="keep it as it is, and get what is missing", confirm_with=_sweep(scene)
        ),
        missing=list(missing),
    )


def _lacking(scene: Scene) -> list[str]:
    """Everything that OVER_SIZED still takes."""
    needs, pattern = scene.needs, scene.pattern
    lines = []
    days, need_days = pattern.covered_s / DAY_S, needs.over_s / DAY_S
    weekend_needed_s = 2 * DAY_S * math.floor(needs.over_s / WEEK_S)
    if pattern.covered_s < needs.covered_min * needs.over_s:
        more = max(1, math.ceil(need_days - days))
        lines.append(
            f"{more} more day(s): {days:.3g} were observed, to call it over-sized takes"
            f" {need_days:.3g} with two weekends (a window of {need_days:.0f}d)"
        )
    elif scene.weekend_s < needs.covered_min * weekend_needed_s:
        lines.append(
            f"two weekends: {scene.weekend_s / DAY_S:.2g} of their"
            f" {weekend_needed_s / DAY_S:.0f} days were observed"
        )
    if not scene.declared_slo:
        lines.append("an SLO declared for this service ([slo] targets, or --slo)")
    turned_away = pattern.rejections or 0.0
    if turned_away > needs.rejected_max * (pattern.requests or 0.0):
        lines.append(f"the demand of the {turned_away:.0f} requests that were turned away")
    return [*lines, *scene.doubts]


def _fullest(scene: Scene, judged: Verdict) -> tuple[Unit, float, float, float] | None:
    """How full the smaller configuration would be at the largest demand ever seen, or declared.

    (unit, demand and surely held load of one replica now, share of what would be left); of the
    unit that is fullest, and null where one of them is not known to be held.

    Smaller is one replica less; of a single server half of it, until a smaller one is measured.
    """
    share = (scene.replicas - 1) / scene.replicas if scene.replicas > 1 else 0.5
    found: list[tuple[Unit, float, float, float]] = []
    held: dict[Unit, float | None] = judged.capacity.get("held", {})
    for unit, load in held.items():
        most = _most(scene, unit)
        if not load or most is None:
            return None
        found.append((unit, most, load, most / (load * share)))
    return max(found, key=lambda one: one[3], default=None)


def _most(scene: Scene, unit: Unit) -> float | None:
    """The largest demand on one replica that was seen in the window, or is declared."""
    if unit == "rps":
        seen = scene.pattern.requests_per_s.peak
        return None if seen is None else seen / scene.replicas
    seen = scene.pattern.concurrency.max
    return None if seen is None else max(seen, scene.expect_concurrency or 0.0) / scene.replicas


def _counts(scene: Scene, hour: Hour) -> bool:
    """Whether every target was measured in this hour, of enough requests."""
    return all(one is not None and one.n >= scene.needs.requests_min for one in hour.said)


def _kept_in(scene: Scene, hour: Hour) -> bool:
    """Whether every target was surely kept, wherever in its bucket the statistic lies."""
    return all(
        one is not None and one.hi is not None and one.hi <= target.bound_ms
        for target, one in zip(scene.slo, hour.said, strict=True)
    )


def _broke(scene: Scene, hour: Hour) -> bool:
    return any(True for _ in _broken(scene, hour))


def _broken(scene: Scene, hour: Hour) -> list[tuple[Slo, Said]]:
    """The targets that this hour surely missed: whatever lies inside the histogram's bucket."""
    return [
        (target, one)
        for target, one in zip(scene.slo, hour.said, strict=True)
        if one is not None and one.n >= scene.needs.requests_min and one.lo >= target.bound_ms
    ]


def _queued(hour: Hour) -> bool:
    return hour.waiting > 0 or hour.preemptions > 0


def _broken_reasons(scene: Scene, broken: Sequence[Hour]) -> list[Reason]:
    """For each target the worst of its hours, with the numbers beside it."""
    worst: dict[str, tuple[Slo, Said, Hour]] = {}
    for hour in broken:
        for target, one in _broken(scene, hour):
            name = format_slo([target])
            if name not in worst or one.value > worst[name][1].value:
                worst[name] = (target, one, hour)
    return [
        Reason(
            "SLO_BROKEN_IN_PRODUCTION",
            f"{target.metric} {target.statistic} at least {one.lo:,.4g} ms (bound"
            f" {target.bound_ms:g} ms) of {one.n:.0f} requests in the hour from {_utc(hour)},"
            f" with {hour.waiting:.3g} waiting and {hour.preemptions:.0f} preempted",
            {
                "target": name, "hours": len(broken), "n": one.n, "value_ms": one.value,
                "at_least_ms": one.lo, "bound_ms": target.bound_ms, "from": _utc(hour),
                "concurrency": hour.concurrency, "waiting": hour.waiting,
                "preemptions": hour.preemptions, "kv_usage_max": hour.kv_usage_max,
            },
        )
        for name, (target, one, hour) in worst.items()
    ]  # fmt: skip


def _utc(hour: Hour) -> str:
    return datetime.fromtimestamp(hour.start_unix_s, UTC).strftime("%Y-%m-%dT%H:%MZ")


def _sweep(scene: Scene) -> str:
    slo = f" --slo '{format_slo(scene.slo)}'" if scene.slo else ""
    return f"loadgen sweep {scene.target}{slo} --agent AGENT_URL"


def _sweep_line(scene: Scene) -> str:
    return f"a measured curve: `{_sweep(scene)}` at a quiet hour, or `agent import SWEEP.json`"


# ------------------------------------------------------------------------------- beside the finding


def _busy(pattern: Pattern) -> float | None:
    """Share of the observed time in whose minutes a request was in flight or a token written."""
    return None if pattern.quiet.idle_ratio is None else 1 - pattern.quiet.idle_ratio


def _idle_w(pattern: Pattern) -> float | None:
    energy = pattern.energy
    if energy.idle_j is None or energy.idle_s < 60:
        return None
    return energy.idle_j / energy.idle_s


def _demand(scene: Scene) -> dict[str, Any]:
    pattern = scene.pattern
    return {
        "window_s": pattern.window_s,
        "covered_s": pattern.covered_s,
        "replicas": scene.replicas,
        "observed": {
            "requests": pattern.requests,
            "concurrency": msgspec.to_builtins(pattern.concurrency),
            "requests_per_s": msgspec.to_builtins(pattern.requests_per_s),
            "prompt_tokens_mean": pattern.prompt_tokens_per_request.mean,
            "output_tokens_mean": pattern.output_tokens_per_request.mean,
            "busy_ratio": _busy(pattern),
            "rejections": pattern.rejections,
            "preemptions": pattern.preemptions,
        },
    }


def _shortened(scene: Scene) -> list[str]:
    """Times that somebody set shorter than they should be are told with every verdict."""
    usual = Needs()
    return [
        f"{name.removesuffix('_s').upper()}: {span(getattr(scene.needs, name))} of observation were"
        f" enough, as configured, where {span(getattr(usual, name))} are usual"
        for name in ("idle_s", "right_s", "over_s")
        if getattr(scene.needs, name) < getattr(usual, name)
    ]


def _stability(pattern: Pattern) -> dict[str, Any]:
    """p99/p50 of TTFT and ITL in production: 1 is perfectly even."""
    found = {
        f"{name}_p99_over_p50": ratio
        for name, one in (("ttft", pattern.ttft_ms), ("itl", pattern.itl_ms))
        if (ratio := _evenness(one)) is not None
    }
    return {"window_s": pattern.window_s, **found} if found else {}


def _evenness(one: Distribution) -> float | None:
    if one.p99 is None or not one.p50 or one.ranges.get("p99", (0.0, None))[1] is None:
        return None
    return one.p99 / one.p50


def _questions(scene: Scene) -> dict[str, Any]:
    p99 = scene.pattern.concurrency.p99
    users = "unknown" if p99 is None else "single" if p99 <= 2 else "service"
    return {
        "trains": "yes" if scene.trains else "no",
        "users": users,
        "priority": "steady experience" if scene.slo else "unknown",
    }


def _energy(pattern: Pattern) -> dict[str, Any]:
    """Of the GPUs alone: what the rest of the machine draws is not known."""
    energy = pattern.energy
    found = {
        "j_per_output_token": energy.j_per_output_token,
        "j_per_output_token_busy": energy.j_per_output_token_busy,
        "idle_w": _idle_w(pattern),
        "mean_w": energy.power_w.mean,
        "energy_j": energy.energy_j,
    }
    return {name: value for name, value in found.items() if value is not None}
