"""What production itself proves of its hardware, beside what a curve says of it.

Pure. A curve tells what a server holds; weeks of minutes tell whether anything is asked of it at
all, whether the SLO broke while requests queued (that needs no sweep), whether it was kept, and
whether so much more is held than was ever asked that a smaller configuration would do.

OVER_SIZED is the finding that breaks somebody's service where it is wrong. It takes an SLO declared
for this service, a measured curve that fits without a doubt, two weeks with their weekends, room
for the largest demand ever sampled on the smaller configuration, by the curve and, where the engine
could be fitted, by the replay; and that said three days in a row. Else it is not said.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import numpy as np

from agent.model import Confidence, Ratio, Reason, Recommendation, Slo, Verdict
from agent.sizing.curve import format_slo
from agent.sizing.judge import UNIT_NAMES, Unit
from agent.sizing.pattern import Distribution, Pattern
from agent.sizing.trial import Trial
from agent.sizing.window import Window
from agent.stats import Floats, merged, quantile
from agent.words import ms

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
    hours_broken_max: float = 0.01
    """Share of the hours that may break the SLO: what the P99 over the hours leaves out."""
    over_exit: float = 0.92
    """What is OVER_SIZED stays so until that ratio reaches this."""
    over_daily: int = 3
    """So many verdicts, a day apart, have to find OVER_SIZED for it to be said …"""
    under_windows: int = 2
    """… and so many in a row UNDER_SIZED, where something else was said before."""
    under_exit: float = 0.95
    """What is UNDER_SIZED stays so until the demand is at most this share of the capacity."""
    off_peak_s: float = WEEK_S
    """Observed at least so long for OVER_OFF_PEAK, most hours of the week among it …"""
    off_peak_seen: float = 0.8
    """… which is this share of the time and of those hours …"""
    off_peak_ratio: float = 0.3
    """… with a demand of at least this share of the capacity at the peak …"""
    off_peak_hours: int = 56
    """… and so many hours of the week with less than 30 % of the busiest one's load."""
    little_error: float = 0.25
    """In flight and throughput · E2E further apart: the telemetry is wrong."""
    little_s: float = 3000.0
    """Asked of at least so much time in flight, over all requests …"""
    little_requests: int = 100
    """… and so many of them."""
    throttled: float = 0.05
    """Share of the busy time with clocks held down from which it is a reason."""
    retries: float = 0.05
    """Share of requests given up or turned away from which repetitions inflate the demand."""
    bursts: float = 3.0
    """Variance over mean of the arrivals per minute within their hours, for BURST_ONLY."""
    peak: float = 3.0
    """Busiest hour of the week over the mean, for DIURNAL_PEAK."""
    prefix_hits: float = 0.3
    """Share of the prompts found in the prefix cache from which the verdict hangs on it."""


class Said(msgspec.Struct, frozen=True):
    """A statistic of the SLO in one hour, ms; it surely lies from `lo` to `hi` (null: no end)."""

    n: float
    value: float
    lo: float
    hi: float | None


USUAL = Needs()


class Little(msgspec.Struct, frozen=True):
    """Time in flight of all requests, in s: by the gauges, and by how long each took (E2E)."""

    sampled_s: float
    summed_s: float
    requests: float


class Heat(msgspec.Struct, frozen=True):
    """Share of the time with requests in flight in which clocks were held down, and the bits that
    the driver gave for it."""

    share: float
    bits: int


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
    `trial`: the demand replayed, where the sweep's engine could be fitted. `held_half`: what half
    of the device surely holds, by the curve. `wrong`: why the sweep does not count.
    """

    pattern: Pattern
    hours: tuple[Hour, ...]
    slo: tuple[Slo, ...] = ()
    declared_slo: bool = False
    curve: Literal["measured", "passive", "none"] = "none"
    replicas: int = 1
    expect_concurrency: float | None = None
    trains: bool = False
    simulated: bool = False
    weekend_s: float = 0.0
    doubts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    rests_on: tuple[str, ...] = ()
    target: str = "URL"
    needs: Needs = Needs()
    trial: Trial | None = None
    held_half: dict[Unit, float | None] = {}
    little: Little | None = None
    heat: Heat | None = None
    wrong: Reason | None = None

    @property
    def seen(self) -> str:
        return span(self.pattern.covered_s)


def span(seconds: float) -> str:
    """A length of time in the unit that a person would take."""
    for unit, length in (("day", DAY_S), ("hour", HOUR_S), ("minute", 60), ("second", 1)):
        if seconds >= 0.95 * 2 * length or unit == "second":
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


def little(window: Window) -> Little | None:
    """The two sides of Little's law over the minutes in which nothing was marked; null where the
    server keeps no E2E times, or requests that were given up are not in them."""
    if not (window.has("e2e_seconds_sum") and window.has("requests_running")):
        return None
    odd = window.marked("gap", "restart", "clock_jump", "changed") > 0
    steady = (window.weights_s() >= 0.9 * window.record_s) & ~odd
    in_flight = window.in_flight("mean") * window.weights_s()
    finished = float(window.total("requests_finished_total")[steady].sum())
    lost = float(window.total("requests_aborted_total")[steady].sum())
    if lost > 0.05 * finished:
        return None
    return Little(
        sampled_s=float(in_flight[steady].sum()),
        summed_s=float(window.total("e2e_seconds_sum")[steady].sum()),
        requests=float(window.total("e2e_seconds_count")[steady].sum()),
    )


def heat(window: Window) -> Heat | None:
    """How much of the busy time clocks were held down; null where no GPU tells it."""
    busy = (window.weights_s() > 0) & (window.in_flight("mean") > 0)
    shares, bits = [], 0
    for gpu in window.gpus.values():
        told = gpu.get("gpu_throttled", "mean")
        known = busy & ~np.isnan(told)
        if known.any():
            shares.append(float(told[known].mean()))
            causes = gpu.get("gpu_clock_event_reasons", "max")[known]
            for one in np.unique(causes[~np.isnan(causes)]):
                bits |= int(one)
    return Heat(max(shares), bits) if shares else None


# ---------------------------------------------------------------------------------------- verdict

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
        reasons=[*verdict.reasons, *_circumstances(scene, verdict)],
        demand={**verdict.demand, **_demand(scene)},
        ratio=_ratio(scene, verdict),
        rests_on=[
            *scene.rests_on,
            *verdict.rests_on,
            *([scene.trial.note] if scene.trial else []),
            *_shortened(scene),
        ],
        stability=_stability(scene.pattern) or verdict.stability,
        questions={**verdict.questions, **_questions(scene)},
        energy={**verdict.energy, **_energy(scene.pattern)},
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
        confidence=Confidence("none", "there is no verdict to be confident in"),
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
            f"{words}: replayed, the observed requests take {_percent(ratio.value)} of what it"
            f" holds within the SLO ({_percent(ratio.lo)} to {_percent(ratio.hi)})."
        ),
        confidence=judged.confidence if agrees else confidence,
        ratio=ratio,
        recommendation=judged.recommendation if agrees else recommendation,
        missing=[line for line in judged.missing if not line.startswith("levels up to")],
    )


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return "?"
    return f"{100 * ratio:.0f} %" if ratio < 10 else "over ten times"


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
            action=(
                base.recommendation.action
                if judged is not None and judged.finding == "UNDER_SIZED" and base.recommendation
                else "more capacity; how much, and of what, a sweep tells"
            ),
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


# ---------------------------------------------------------------------------------- circumstances


def _circumstances(scene: Scene, verdict: Verdict) -> list[Reason]:
    """What is behind the demand, or behind what was held, where there is evidence of it."""
    if verdict.finding in ("IDLE", "INVALID_MEASUREMENT", "INSUFFICIENT_DATA"):
        return []
    tight = verdict.finding in ("UNDER_SIZED", "BORDERLINE")
    found = (
        _throttled(scene),
        _prefix_cache(scene),
        *((_retries(scene), _bursts(scene), _diurnal(scene)) if tight else ()),
    )
    return [one for one in found if one is not None]


POWER_BITS = 0x4 | 0x80  # NVML: software power cap, hardware power brake


def _throttled(scene: Scene) -> Reason | None:
    hot = scene.heat
    if hot is None or hot.share < scene.needs.throttled:
        return None
    power = bool(hot.bits & POWER_BITS)
    return Reason(
        "POWER_CAPPED" if power else "THROTTLED",
        f"{'a power limit' if power else 'heat'} held the clocks down in {hot.share:.0%} of the"
        " busy time",
        {"share": hot.share, "clock_event_reasons": hot.bits},
    )


def _prefix_cache(scene: Scene) -> Reason | None:
    hits, trial = scene.pattern.prefix_hit_rate, scene.trial
    if hits is None or hits < scene.needs.prefix_hits:
        return None
    without = trial.uncached if trial is not None else None
    more = ""
    if without is not None:
        taken = _percent(1 / max(without, 1e-6))
        more = f"; computed all, the same requests would take {taken} of what it holds"
    return Reason(
        "PREFIX_CACHE_DEPENDENT",
        f"{hits:.0%} of the prompts' tokens were found in the prefix cache{more}",
        {"prefix_hit_rate": hits, "multiple_without": without},
    )


def _retries(scene: Scene) -> Reason | None:
    pattern = scene.pattern
    lost = (pattern.aborts or 0.0) + (pattern.rejections or 0.0)
    if not pattern.requests or lost < scene.needs.retries * pattern.requests:
        return None
    share = lost / pattern.requests
    return Reason(
        "RETRY_INFLATED",
        f"{share:.0%} of the requests were given up or turned away; who asks again is counted"
        " again",
        {"share": share, "aborts": pattern.aborts, "rejections": pattern.rejections},
    )


def _bursts(scene: Scene) -> Reason | None:
    within = scene.pattern.burstiness.within_hours
    if within is None or within < scene.needs.bursts:
        return None
    return Reason(
        "BURST_ONLY",
        f"arrivals come in bursts: their variance within an hour is {within:.1f} times their mean,"
        " where independent ones have 1",
        {"dispersion_within_hours": within},
    )


def _diurnal(scene: Scene) -> Reason | None:
    loads = [cell.mean for cell in scene.pattern.profile if cell.mean is not None]
    if scene.pattern.covered_s < 0.9 * DAY_S or not loads or not sum(loads):
        return None
    ratio = max(loads) / (sum(loads) / len(loads))
    if ratio < scene.needs.peak:
        return None
    return Reason(
        "DIURNAL_PEAK",
        f"the busiest hour of the week has {ratio:.1f} times the mean load",
        {"peak_over_mean": ratio},
    )


# -------------------------------------------------------------------------------------- hysteresis


class Past(msgspec.Struct, frozen=True):
    """An earlier verdict: what was said, and what its window alone had found."""

    at_unix_s: float
    finding: str
    found: str


def settled(verdict: Verdict, past: Sequence[Past], needs: Needs, now_s: float) -> Verdict:
    """The verdict that may be said, after those `past` (newest first, of the same configuration).

    OVER_SIZED takes `over_daily` windows a day apart that found it, UNDER_SIZED two in a row where
    something else was said before, and its end a demand clearly below the capacity. Until then what
    was said stays, and `found` is what this window alone says. A shortened window's days are as
    much shorter.
    """
    before = past[0].finding if past else None
    if verdict.finding == "OVER_SIZED":
        day_s = min(DAY_S, needs.over_s / 14)
        days = _days(past, now_s, day_s)
        if before == "OVER_SIZED" or days >= needs.over_daily:
            return verdict
        stays = before if before in ("RIGHT_SIZED", "OVER_OFF_PEAK") else "RIGHT_SIZED"
        often = f"found on {days} of {needs.over_daily} days in a row so far"
        return _held_back(verdict, stays, f"It fits, and may be larger than it has to be ({often})")
    if verdict.finding == "UNDER_SIZED":
        row = 1 + sum(1 for _ in _leading(past, "UNDER_SIZED"))
        if before in (None, "UNDER_SIZED", "INSUFFICIENT_DATA") or row >= needs.under_windows:
            return verdict
        return _held_back(verdict, str(before), "This window alone says it is too small, and one"
                          " alone does not change the finding")  # fmt: skip
    close = verdict.finding == "BORDERLINE" or (
        verdict.finding in ("RIGHT_SIZED", "OVER_OFF_PEAK")
        and verdict.ratio is not None
        and verdict.ratio.value > needs.under_exit
    )
    if before == "UNDER_SIZED" and close:
        return _held_back(verdict, "UNDER_SIZED", "It was too small, and is not clear of it yet")
    return verdict


def _held_back(verdict: Verdict, finding: str, words: str) -> Verdict:
    prefix = "Simulated: " if verdict.summary.startswith("Simulated: ") else ""
    summary = f"{prefix}{words}: {verdict.summary.removeprefix(prefix)}"
    return msgspec.structs.replace(verdict, finding=finding, found=verdict.finding, summary=summary)


def _leading(past: Sequence[Past], found: str) -> list[Past]:
    """The newest ones in a row whose windows found it."""
    return list(itertools.takewhile(lambda one: one.found == found, past))


def _days(past: Sequence[Past], now_s: float, day_s: float) -> int:
    """How many verdicts in a row found OVER_SIZED, counting one a day, this one included."""
    count, last_s = 1, now_s
    for one in _leading(past, "OVER_SIZED"):
        if one.at_unix_s <= last_s - 0.9 * day_s:
            count, last_s = count + 1, one.at_unix_s
    return count


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


# ------------------------------------------------------------------------------- beside the finding


def _busy(pattern: Pattern) -> float | None:
    """Share of the time with a request in flight, at most: that of the minutes that had one, and
    the mean number in flight, which a time with one adds at least itself to."""
    if pattern.quiet.idle_ratio is None:
        return None
    busy = 1 - pattern.quiet.idle_ratio
    mean = pattern.concurrency.mean
    return busy if mean is None else min(busy, max(mean, 0.0))


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
            "hours_of_week": _hours_of_week(pattern),
            "prompt_tokens_mean": pattern.prompt_tokens_per_request.mean,
            "output_tokens_mean": pattern.output_tokens_per_request.mean,
            "busy_ratio": _busy(pattern),
            "rejections": pattern.rejections,
            "preemptions": pattern.preemptions,
        },
    }


def _hours_of_week(pattern: Pattern) -> dict[str, float]:
    """Of the mean requests in flight over the observed hours of the week: what has to fit is the
    P99, so one hour in a hundred is left out as it is of the replay (design equation 8)."""
    loads = [cell.mean for cell in pattern.profile if cell.mean is not None]
    if not loads:
        return {}
    return {
        "observed": float(len(loads)),
        "concurrency_p99": float(np.quantile(loads, 0.99)),
        "concurrency_max": max(loads),
    }


def _shortened(scene: Scene) -> list[str]:
    """Times that somebody set shorter than they should be are told with every verdict."""
    return [
        f"{name.removesuffix('_s').upper()}: {span(getattr(scene.needs, name))} of observation were"
        f" enough, as configured, where {span(getattr(USUAL, name))} are usual"
        for name in ("idle_s", "right_s", "over_s", "off_peak_s")
        if getattr(scene.needs, name) < getattr(USUAL, name)
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
