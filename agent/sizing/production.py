"""What production itself proves of its hardware, beside what a curve says of it.

Pure. A curve tells what a server holds; weeks of minutes tell whether anything is asked of it at
all, whether the SLO broke while requests queued (that needs no sweep), whether it was kept, and
whether so much more is held than was ever asked that a smaller configuration would do.

OVER_SIZED is the finding that breaks somebody's service where it is wrong. It takes an SLO declared
for this service, a measured curve that fits without a doubt, two weeks with their weekends, room
for the largest demand ever sampled on the smaller configuration, by the curve and, where the engine
could be fitted, by the replay; and that found three days in a row (`agent.sizing.settle`). Else it
is not said.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from agent.model import Confidence, Ratio, Reason, Recommendation, Slo, Verdict
from agent.sizing import circumstances
from agent.sizing.case import UNIT_NAMES, Unit
from agent.sizing.curve import format_slo
from agent.sizing.scene import DAY_S, HOUR_S, WEEK_S, Hour, Said, Scene, percent, span
from agent.sizing.sentences import ACTIONS
from agent.words import ms

Rule = Callable[[Scene, Verdict | None], Verdict | None]


def conclude(scene: Scene, judged: Verdict | None) -> Verdict:
    """The verdict on a service: `judged` is that of its curve, null where there is none.

    The first rule that has its evidence decides; in order of precedence.
    """
    verdict = next(found for rule in RULES if (found := rule(scene, judged)) is not None)
    prefix = "Simulated: " if scene.simulated and "Simulated: " not in verdict.summary else ""
    return msgspec.structs.replace(
        verdict,
        summary=f"{prefix}{verdict.summary}",
        reasons=[*verdict.reasons, *circumstances.reasons(scene, verdict.finding)],
        demand={**verdict.demand, **circumstances.demand(scene)},
        ratio=_ratio(scene, verdict),
        rests_on=[
            *scene.rests_on,
            *verdict.rests_on,
            *([scene.trial.note] if scene.trial else []),
            *circumstances.shortened(scene),
        ],
        stability=circumstances.stability(scene) or verdict.stability,
        questions={**verdict.questions, **circumstances.questions(scene)},
        energy={**verdict.energy, **circumstances.energy(scene)},
        missing=list(dict.fromkeys((*verdict.missing, *scene.missing))),
    )


def _ratio(scene: Scene, verdict: Verdict) -> Ratio | None:
    """The replay's, where the observed demand is what decides."""
    if scene.trial is None or verdict.ratio is None or verdict.demand.get("declared"):
        return verdict.ratio
    return scene.trial.ratio


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
    busy = scene.busy_ratio
    if busy is None or busy >= needs.idle_busy_max or pattern.covered_s < needs.idle_s:
        return None
    watts = scene.idle_w
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
    if judged is not None and judged.finding == "INVALID_MEASUREMENT":
        return judged
    if (apart := _apart(scene)) is not None:
        mend = "mend the telemetry: `agent doctor` shows what the server tells, and how"
        return _invalid(scene, judged, apart, mend)
    if scene.wrong is not None and not _proven(scene):
        return _invalid(scene, judged, scene.wrong, "sweep it again as it is now")
    return judged if judged is not None and judged.finding == "INFEASIBLE_SLO" else None


def _invalid(scene: Scene, judged: Verdict | None, why: Reason, action: str) -> Verdict:
    return msgspec.structs.replace(
        judged or _bare(),
        finding="INVALID_MEASUREMENT",
        summary=f"The measurement does not count: {why.because}.",
        confidence=Confidence("none", "missing evidence"),
        reasons=[why],
        ratio=None,
        recommendation=Recommendation(action=action, confirm_with=_sweep(scene)),
        missing=[action],
    )


def _apart(scene: Scene) -> Reason | None:
    """Whether gauges and latencies contradict each other (Little's law, design equation 6)."""
    needs, seen = scene.needs, scene.little
    if seen is None or seen.requests < needs.little_requests:
        return None
    if min(seen.sampled_s, seen.summed_s) < needs.little_s:
        return None
    ratio = seen.sampled_s / seen.summed_s
    if abs(ratio - 1) <= needs.little_error:
        return None
    return Reason(
        "TELEMETRY_INCONSISTENT",
        f"requests in flight are {ratio:.2f} times throughput x E2E over {scene.seen}; over"
        f" {needs.little_error:.0%} apart one of the two is wrong",
        {"ratio": ratio, **msgspec.structs.asdict(seen)},
    )


def _proven(scene: Scene) -> list[Hour]:
    """The hours that prove, without any sweep, that it is too small: enough of them, with a queue
    or preemptions; else none."""
    counted = sum(_counts(scene, hour) for hour in scene.hours)
    broken = [hour for hour in scene.hours if _broke(scene, hour) and _queued(hour)]
    return broken if _many(scene, len(broken), counted) else []


def _many(scene: Scene, broken: int, counted: int) -> bool:
    needs = scene.needs
    return broken >= needs.hours_min and broken > needs.hours_broken_max * counted


def _holds(scene: Scene) -> bool:
    """Whether production itself kept the SLO: in all hours that count but for one in a hundred."""
    counted = [hour for hour in scene.hours if _counts(scene, hour)]
    kept = sum(_kept_in(scene, hour) for hour in counted)
    enough = bool(scene.slo) and len(counted) >= max(scene.needs.hours_min, 24)
    return enough and len(counted) - kept <= scene.needs.hours_broken_max * len(counted)


def _under(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """The SLO broke in production while requests queued, or the demand is above what is held."""
    if broken := _proven(scene):
        return _broke_in_production(scene, judged, broken)
    if judged is None or scene.curve != "measured":
        return None
    trial, declared = scene.trial, judged.demand.get("declared")
    broken = [hour for hour in scene.hours if _broke(scene, hour)]
    counted = sum(_counts(scene, hour) for hour in scene.hours)
    beyond = trial is not None and trial.value < 1
    if (beyond or judged.finding == "UNDER_SIZED") and _many(scene, len(broken), counted):
        return _broke_in_production(scene, judged, broken)
    if declared or trial is None:
        is_under = judged.finding == "UNDER_SIZED" and (declared or not _holds(scene))
        return judged if is_under else None
    if trial.hi >= 1 or _holds(scene):
        return None
    return _by_trial(scene, judged, "UNDER_SIZED", "Too small", "more capacity; how much, and of"
                     " what, the sweep's limit tells")  # fmt: skip


def _by_trial(scene: Scene, judged: Verdict, finding: str, words: str, action: str) -> Verdict:
    """What the replay says, in its numbers."""
    trial = scene.trial
    assert trial is not None
    ratio, agrees = trial.ratio, judged.finding == finding
    confidence = Confidence(
        "low" if judged.confidence.level in ("none", "low") else "medium",
        "a replay through the fitted engine",
    )
    recommendation = Recommendation(
        action=action,
        confirm_with=_sweep(scene),
        overturned_by="hours of this load that show the other",
    )
    return msgspec.structs.replace(
        judged,
        finding=finding,
        summary=(
            f"{words}: replayed, the observed requests take {percent(ratio.value)} of what it"
            f" holds within the SLO ({percent(ratio.lo)} to {percent(ratio.hi)})."
        ),
        confidence=judged.confidence if agrees else confidence,
        ratio=ratio,
        recommendation=judged.recommendation if agrees else recommendation,
        missing=[line for line in judged.missing if not line.startswith("levels up to")],
    )


def _broke_in_production(
    scene: Scene, judged: Verdict | None, broken: Sequence[Hour]
) -> Verdict:  # fmt: skip
    reasons = _broken_reasons(scene, broken)
    base = judged or _bare()
    beside = "while requests waited" if any(map(_queued, broken)) else "under its load"
    if any(hour.preemptions > 0 for hour in broken):
        beside = "while requests were preempted"
    days = scene.pattern.covered_s >= DAY_S
    return msgspec.structs.replace(
        base,
        finding="UNDER_SIZED",
        summary=(
            f"Too small: in {len(broken)} of {len(scene.hours)} observed hours the SLO was broken"
            f" {beside}: {reasons[0].because}."
        ),
        confidence=Confidence(
            "medium" if days and scene.slo else "low",
            "production shows that it breaks, not how much more is needed: that takes a sweep",
        ),
        reasons=[*reasons, *base.reasons],
        ratio=scene.trial.ratio if scene.trial else None,
        recommendation=Recommendation(
            action=_action(judged),
            confirm_with=_sweep(scene),
            overturned_by="hours as busy as these that keep the SLO",
        ),
    )


def _action(judged: Verdict | None) -> str:
    """What to do about what broke: for the limit that the curve shows, whatever it found itself."""
    if judged is not None and judged.capacity.get("limit") in ACTIONS:
        return ACTIONS[judged.capacity["limit"]]
    if judged is not None and judged.finding == "UNDER_SIZED" and judged.recommendation:
        return judged.recommendation.action
    return "more capacity; how much, and of what, a sweep tells"


def _over(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """So much is in hand that a smaller configuration may do."""
    if judged is None or scene.trains or scene.curve != "measured":
        return None
    if judged.finding != "RIGHT_SIZED" or (fullest := _fullest(scene, judged)) is None:
        return None
    unit, most, held, ratio = fullest
    if scene.trial is not None:
        ratio = max(ratio, 1 / max(scene.trial.smaller, 1e-6))
    if ratio >= scene.needs.over_ratio_max or _broke_at_all(scene):
        return None
    smaller = f"{scene.replicas - 1} replica(s)" if scene.replicas > 1 else "half of it"
    each = " a replica" if scene.replicas > 1 else ""
    bounds = "" if scene.replicas > 1 else " within half of the SLO's bounds and of the KV cache"
    full = f"{smaller} would be {100 * ratio:.0f} % full at that peak"
    numbers = (
        f"at most {most:.3g} {UNIT_NAMES[unit]}{each} were ever seen in {scene.seen}, {held:.3g}"
        f" are surely held{bounds}: {full}"
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
        reasons=[Reason("HEADROOM", full, evidence), *judged.reasons],
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


def _broke_at_all(scene: Scene) -> bool:
    """More than an hour that broke the SLO, whatever broke it, is no room to spare."""
    return sum(_broke(scene, hour) for hour in scene.hours) > 1


def _too_short(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """It fits what was seen, which is not enough to have seen a peak."""
    if judged is not None and judged.demand.get("declared"):
        return None
    need_s, pattern = scene.needs.right_s, scene.pattern
    if not (pattern.concurrency.max or pattern.requests or pattern.output_tokens):
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
    trial = scene.trial
    if trial is None or judged.demand.get("declared"):
        if judged.finding == "UNDER_SIZED":  # what production kept all the same
            return _thin(scene, judged, "The curve says too small, and production kept the SLO.",
                         ["a sweep that agrees with production"])  # fmt: skip
        return judged
    if trial.lo > 1 or (trial.value > 1 and _holds(scene)):
        return _by_trial(scene, judged, "RIGHT_SIZED", "It fits", "keep it")
    return _by_trial(scene, judged, "BORDERLINE", "Too close to call", "measure finer around the"
                     " demand before buying or shrinking anything")  # fmt: skip


def _off_peak(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """It fits at its peak, and through a third of the week hardly anything is asked of it."""
    fits = _as_swept(scene, judged)
    needs, quiet = scene.needs, len(scene.pattern.quiet.hours)
    seen = sum(cell.covered_s > 0 for cell in scene.pattern.profile) / (WEEK_S / HOUR_S)
    long = min(seen, scene.pattern.covered_s / needs.off_peak_s) >= needs.off_peak_seen
    if fits is None or fits.finding != "RIGHT_SIZED" or not long or quiet < needs.off_peak_hours:
        return None
    ratio = scene.trial.ratio if scene.trial else fits.ratio
    if ratio is None or ratio.value < needs.off_peak_ratio:
        return None
    if scene.trains or not scene.declared_slo or fits.demand.get("declared"):
        return None
    numbers = f"{quiet} of 168 hours of the week have under 30 % of the busiest one's load"
    base = fits.recommendation or Recommendation(action="keep it")
    return msgspec.structs.replace(
        fits,
        finding="OVER_OFF_PEAK",
        summary=f"{fits.summary} But {numbers}.",
        reasons=[Reason("OFF_PEAK", numbers, {"quiet_hours": quiet}), *fits.reasons],
        recommendation=msgspec.structs.replace(
            base,
            action=(
                "keep its size for the peak; off peak schedule: run fewer replicas, or give the"
                " quiet hours other work"
            ),
        ),
    )


def _kept(scene: Scene, judged: Verdict | None) -> Verdict | None:
    """Without a sweep: every hour that counts kept the SLO, so what is asked is held."""
    counted = [hour for hour in scene.hours if _counts(scene, hour)]
    is_long = scene.pattern.covered_s >= scene.needs.right_s
    if not scene.slo or len(counted) < scene.needs.hours_min or not is_long:
        return None
    if scene.expect_concurrency is not None and judged is None:
        return None  # more is expected than was asked, and no level tells of it
    kept = sum(_kept_in(scene, hour) for hour in counted)
    if len(counted) - kept > scene.needs.hours_broken_max * len(counted):
        return None
    peak = max(hour.concurrency for hour in counted)
    weeks = scene.pattern.covered_s >= scene.needs.covered_min * WEEK_S
    return msgspec.structs.replace(
        judged or _bare(),
        finding="RIGHT_SIZED",
        summary=(
            f"It fits what was asked: {'all' if kept == len(counted) else f'{kept} of'}"
            f" {len(counted)} hours with enough requests kept the SLO,"
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
    if scene.expect_concurrency is not None:
        why = f"no level tells of the {scene.expect_concurrency:g} requests that are expected"
    elif not scene.slo:
        missing.append("an SLO ([slo] targets, or --slo): what production has to keep")
        why = "neither a measured curve nor an SLO says what it may be held against"
    elif not any(_counts(scene, hour) for hour in scene.hours):
        why = f"no hour had {scene.needs.requests_min} requests whose latency the SLO asks for"
        missing.append(f"hours of {scene.needs.requests_min} requests or more")
    elif any(_broke(scene, hour) and _queued(hour) for hour in scene.hours):
        why = f"in under {scene.needs.hours_min} hours the SLO broke while requests waited"
        missing.append("more hours as busy as that one")
    elif any(_broke(scene, hour) for hour in scene.hours):
        why = "the SLO was broken, but nothing waited: what breaks it is not shown"
    else:
        why = "too few hours, or buckets too coarse, to show on which side of the SLO it is"
    return _thin(scene, judged, f"Production alone cannot tell: {why}.", missing)


# In order of precedence; the last one always has a verdict.
RULES: tuple[Rule, ...] = (
    _nothing_observed, _idle, _wrong_measurement, _under, _over, _too_short, _off_peak, _as_swept,
    _kept, _insufficient,
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
        confidence=Confidence("none", "missing evidence"),
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

    Smaller is one replica less; of a single server half the device, until a smaller one is
    measured: there every request takes up to twice as long, so that twice as many are in flight,
    and each has to keep half of the SLO's bounds here (`held_half`).
    """
    share = (scene.replicas - 1) / scene.replicas if scene.replicas > 1 else 0.5
    found: list[tuple[Unit, float, float, float]] = []
    held: dict[Unit, float | None] = judged.capacity.get("held", {})
    if scene.replicas == 1 and scene.slo:
        held = {unit: scene.held_half.get(unit) for unit in held}
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
    if seen is None:
        return None
    share = max(seen, scene.expect_concurrency or 0.0) / scene.replicas
    return max(share, 1.0)  # a request is whole, and may come and go between two samples


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
            f"{target.metric.upper()} {target.statistic} at least {ms(one.lo)} (bound"
            f" {ms(target.bound_ms)}) of {one.n:.0f} requests in the hour from {_utc(hour)},"
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
    return f"loadgen sweep {shlex.quote(scene.target)}{slo} --agent AGENT_URL"


def _sweep_line(scene: Scene) -> str:
    return f"a measured curve: `{_sweep(scene)}` at a quiet hour, or `agent import SWEEP.json`"
