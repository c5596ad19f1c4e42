"""The verdict of a curve against a demand, declared or observed: does it hold it?

Caution is asymmetric, because shrinking a box that was needed breaks a service: OVER_SIZED is
never said here. It would take observed demand over weeks (`agent.sizing.production`); a curve with
a demand says RIGHT_SIZED with its headroom.

The evidence is one-sided per finding: RIGHT_SIZED needs a load at or above the demand that was
measured and met the SLO, UNDER_SIZED one at or below the demand that was measured and broke it.
An observed demand is no one number: UNDER_SIZED takes its low end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec

from agent.model import Confidence, Curve, Level, Ratio, Reason, Slo, Stats, Verdict
from agent.sizing import curve as curves
from agent.sizing import rules, sentences
from agent.sizing.case import Capacity, Case, Observed, Unit
from agent.sizing.curve import Point
from agent.sizing.rules import DEFAULTS, Thresholds


def judge(
    levels: Sequence[Level],
    curve: Curve,
    slo: Sequence[Slo] = (),
    *,
    expect_concurrency: float | None = None,
    expect_rps: float | None = None,
    observed: Observed | None = None,
    simulated: bool = False,
    thresholds: Thresholds = DEFAULTS,
    target: str = "URL",
    endpoint: str = "chat",
) -> Verdict:
    """The verdict of a curve, against a declared or an observed demand where there is one.

    Of a unit that is declared and observed the larger counts. Of two units the one that takes more
    of its capacity decides. Without an SLO the capacity is the knee, or the saturation throughput
    for a request rate, and latency is not judged. `target` and `endpoint` only go into the command
    that would confirm the verdict.
    """
    observed = observed or Observed({}, {})
    demand = dict(observed.demand)
    declared: dict[Unit, float | None] = {"concurrency": expect_concurrency, "rps": expect_rps}
    for unit, value in declared.items():
        if value is not None and value >= demand.get(unit, 0.0):
            demand[unit] = float(value)
            observed = _without(observed, unit)
    case = Case(
        levels=tuple(levels),
        points=tuple(curves.points(levels, thresholds)),
        curve=curve,
        slo=tuple(slo),
        demand=demand,
        observed=observed,
        evidence=curves.evidence(levels, thresholds),
        simulated=simulated,
        target=target,
        endpoint=endpoint,
        t=thresholds,
    )
    capacity, ratio = _binding(case)
    finding = _finding(case, capacity, ratio)
    return _verdict(case, finding, capacity, ratio)


def _without(observed: Observed, unit: Unit) -> Observed:
    left: dict[Unit, float] = {u: v for u, v in observed.demand.items() if u != unit}
    return msgspec.structs.replace(observed, demand=left)


# --------------------------------------------------------------------------------------- capacity


def _binding(case: Case) -> tuple[Capacity, Ratio | None]:
    """The capacity that decides, and the demand over it: of two expectations the tighter one."""
    if not case.demand:
        opened = bool(case.points) and curves.is_open(case.points[0].level)
        return _capacity(case, "rps" if opened else "concurrency"), None
    judged = [
        (cap := _capacity(case, unit), _ratio(case.demand[unit], _low(case, unit), cap))
        for unit in case.demand
    ]
    return max(judged, key=lambda pair: _tightness(case.demand[pair[0].unit], *pair))


def _low(case: Case, unit: Unit) -> float:
    """The least that the demand surely is: a declared one is what it is."""
    if case.is_declared(unit):
        return case.demand[unit]
    return min(case.observed.low.get(unit, 0.0), case.demand[unit])


def _tightness(demand: float, cap: Capacity, ratio: Ratio | None) -> tuple[bool, float]:
    """Proven broken first, then by the ratio; an unknown capacity is tighter than a known one."""
    broken = cap.hi is not None and demand >= cap.hi
    return broken, ratio.value if ratio else math.inf


def _ratio(demand: float, low: float, cap: Capacity) -> Ratio | None:
    if not cap.value:
        # Broken at the smallest load tested: the ratio is at least this, and has no upper end.
        if not cap.hi or demand < cap.hi:
            return None
        return Ratio(value=demand / cap.hi, lo=low / cap.hi)
    return Ratio(
        value=demand / cap.value,
        lo=low / cap.hi if cap.hi else None,
        hi=demand / cap.lo if cap.lo else None,
    )


def _capacity(case: Case, unit: Unit) -> Capacity:
    """K in the unit of the demand, from the SLO where there is one, else from the knee."""
    if not case.points:
        return Capacity(unit, None, None, None, "highest level tested")
    # An SLO that was not measured cannot be judged; what the server holds at all still can.
    bare = not case.slo or (case.is_slo_unmeasured and not case.demand)
    cap = _bare_capacity(case, unit) if bare else _slo_capacity(case, unit)
    ceiling = _ceiling(case) if unit == "rps" else None
    if ceiling is None or (cap.hi is not None and cap.hi <= ceiling):
        return cap
    # No rate above the saturation throughput is served, whatever the latencies were.
    if cap.value is None:
        return Capacity(unit, ceiling, cap.lo, ceiling, "throughput")
    return msgspec.structs.replace(cap, hi=ceiling)


def _slo_capacity(case: Case, unit: Unit) -> Capacity:
    found = case.curve.slo_capacity
    if found is None:
        return Capacity(unit, None, None, None, "slo")
    value = found.concurrency if unit == "concurrency" else found.rps
    high = _convert(case, _sure_break(case, found.hi), unit, +1)
    return Capacity(unit, value, _lower(case, found.lo, unit), high, "slo")


def _sure_break(case: Case, first: float | None) -> float | None:
    """The first load, from the one where the curve breaks the SLO on, that surely breaks it."""
    for point in case.points if first is not None else ():
        if point.load >= (first or 0.0) and any(
            _surely_breaks(point.level, target, case.t) for target in case.slo
        ):
            return point.load
    return None


def _bare_capacity(case: Case, unit: Unit) -> Capacity:
    """Without an SLO: up to the knee more load buys throughput; past the next level none."""
    knee = curves.knee_point(case.points, case.t)
    if knee is None or not case.curve.saturated:
        top = case.points[-1].load
        value = _convert(case, top, unit, 0)
        return Capacity(unit, value, _lower(case, top, unit), None, "highest level tested")
    if unit == "rps":
        best = max((p.rps for p in case.points if p.rps is not None), default=None)
        return Capacity(unit, best, _lower(case, knee.load, unit), None, "throughput")
    above = [p.load for p in case.points if p.load > knee.load]
    return Capacity(
        unit,
        _convert(case, knee.load, unit, 0),
        _lower(case, knee.load, unit),
        _convert(case, min(above, default=knee.load), unit, +1),
        "knee",
    )


def _ceiling(case: Case) -> float | None:
    """The most requests/s that a saturated server finished, at the upper end of its interval."""
    if not case.curve.saturated:
        return None
    return max((p.rps * (1 + p.half) for p in case.points if p.rps is not None), default=None)


def _convert(case: Case, load: float | None, unit: Unit, side: int) -> float | None:
    """A tested load in the unit of the demand; `side` -1 or +1 takes that end of its interval."""
    point = next((p for p in case.points if p.load == load), None)
    if point is None:
        return None
    opened = curves.is_open(point.level)
    if unit == ("rps" if opened else "concurrency"):
        return point.load
    value = point.concurrency if unit == "concurrency" else point.rps
    return None if value is None else value * (1 + side * point.half)


def _lower(case: Case, load: float | None, unit: Unit) -> float | None:
    """A load that held, as a lower bound in the unit of the demand.

    A closed loop holds its streams steady; requests that arrive at random do not. A request rate
    is therefore granted only up to where a Poisson number in flight stays, 95 % of the time,
    within the concurrency that was tested.
    """
    if load is None or unit == "concurrency" or curves.is_open(case.points[0].level):
        return _convert(case, load, unit, -1)
    point = next(p for p in case.points if p.load == load)
    if point.rps is None:
        return None
    steady = rules.steady_load(load, case.t.burst_z)
    known = [(0.0, 0.0), *((p.load, p.rps) for p in case.points if p.rps is not None)]
    return min(_line(known, steady), point.rps) * (1 - point.half)


def _line(known: Sequence[tuple[float, float]], at: float) -> float:
    """Linear interpolation; `at` lies inside, for an idle server (0, 0) is a measured point."""
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return known[-1][1]


# ---------------------------------------------------------------------------------------- finding


def _finding(case: Case, cap: Capacity, ratio: Ratio | None) -> str:
    """The first finding, in order of precedence, that has the evidence it needs."""
    if not case.points:
        return "INVALID_MEASUREMENT" if case.levels else "INSUFFICIENT_DATA"
    if _infeasible(case):
        return "INFEASIBLE_SLO"
    if not case.demand:
        if _end_unknown(case) and _invalid_above(case):
            return "INVALID_MEASUREMENT"
        return "CAPACITY_ONLY"
    demand = case.demand[cap.unit]
    if cap.hi is not None and _low(case, cap.unit) >= cap.hi:
        return "UNDER_SIZED"
    if cap.lo is not None and demand <= cap.lo:
        return "RIGHT_SIZED"
    if _invalid_between(case):
        return "INVALID_MEASUREMENT"
    if cap.hi is not None and (cap.value is not None or demand >= cap.hi):
        return "BORDERLINE"
    if cap.value is not None and demand <= cap.value:
        return "BORDERLINE"  # inside what was measured, outside what bursts and intervals leave
    return "INSUFFICIENT_DATA"


def _end_unknown(case: Case) -> bool:
    """Did the valid levels show neither saturation nor a broken SLO?"""
    broken = case.curve.slo_capacity is not None and case.curve.slo_capacity.hi is not None
    return not case.curve.saturated and not broken


def _invalid_above(case: Case) -> list[Level]:
    top = case.points[-1].load
    return [lv for lv in case.invalid if (curves.load_of(lv) or 0.0) > top]


def _invalid_between(case: Case) -> list[Level]:
    """Invalid levels where the answer lies: above what held and below what broke."""
    found = case.curve.slo_capacity
    knee = curves.knee_point(case.points, case.t)
    low = found.lo if found else (knee.load if knee else None)
    high = found.hi if found else None
    if low is None and high is None:
        return _invalid_above(case)
    return [
        lv for lv in case.invalid if (low or 0.0) < (curves.load_of(lv) or 0.0) < (high or math.inf)
    ]


def _infeasible(case: Case) -> bool:
    """Does one request alone already break the SLO? A few unlucky ones do not prove it."""
    found = case.curve.slo_capacity
    if found is None or found.lo is not None:
        return False
    first = case.points[0]
    if first.concurrency is None or first.concurrency > case.t.alone_concurrency:
        return False
    return any(_surely_breaks(first.level, target, case.t) for target in case.slo)


_TAIL = {"p50": 2, "p90": 10, "p95": 20, "p99": 100}


def _surely_breaks(level: Level, target: Slo, t: Thresholds) -> bool:
    """Is the target broken by more than a few unlucky requests?

    Either the typical request breaks it, or there are enough of them for the statistic to be more
    than the worst one (a p99 takes 100). Too many failures, and figures of unknown size, count.
    """
    value = curves.slo_value(level, target)
    if value is None or value < target.bound_ms:
        return False
    stats: Stats = getattr(level, f"{target.metric}_ms")
    if stats.n == 0 or stats.n >= max(t.requests_few, _TAIL.get(target.statistic, 0)):
        return True
    typical = stats.p50 if stats.p50 is not None else stats.mean
    return typical is not None and typical >= target.bound_ms


# ---------------------------------------------------------------------------------------- verdict


def _verdict(case: Case, finding: str, cap: Capacity, ratio: Ratio | None) -> Verdict:
    operating = _operating_point(case, cap)
    reasons = _reasons(case, finding, cap)
    return Verdict(
        finding=finding,
        summary=sentences.summary(case, finding, cap, ratio, reasons),
        confidence=_confidence(case, finding, operating),
        since=min((lv.started_at for lv in case.levels if lv.started_at), default=None),
        reasons=reasons,
        demand=_demand(case, cap),
        capacity=_capacity_dict(case, cap),
        ratio=ratio,
        rests_on=sentences.rests_on(case),
        stability=_stability(operating),
        questions=_questions(case),
        energy=_energy(operating),
        cost=_cost(operating),
        recommendation=sentences.recommendation(case, finding, cap, reasons),
        missing=sentences.missing(case, finding, cap),
    )


def _demand(case: Case, cap: Capacity) -> dict[str, Any]:
    if not case.demand:
        return {}
    declared = case.is_declared(cap.unit)
    return {"declared": declared, "binding": cap.unit, **dict(case.demand.items())}


def _capacity_dict(case: Case, cap: Capacity) -> dict[str, Any]:
    knee, slo = case.curve.knee, case.curve.slo_capacity
    return {
        "unit": cap.unit,
        "value": cap.value,
        "lo": cap.lo,
        "hi": cap.hi,
        "basis": cap.basis,
        "bracketed": bool(slo and slo.bracketed),
        "saturated": case.curve.saturated,
        "knee": msgspec.to_builtins(knee) if knee else None,
        "limit": case.curve.limit,
        "held": {unit: _capacity(case, unit).lo for unit in case.demand},
    }


def _operating_point(case: Case, cap: Capacity) -> Point | None:
    """The highest tested load at or under the demand; without one, what the capacity rests on."""
    if not case.points:
        return None
    below = case.points
    if case.demand:
        demand = case.demand[cap.unit]
        value = curves.rps if cap.unit == "rps" else curves.concurrency
        below = tuple(p for p in case.points if (v := value(p)) is not None and v <= demand)
    else:
        held = case.curve.slo_capacity.lo if case.curve.slo_capacity else None
        knee = curves.knee_point(case.points, case.t)
        at = held if held is not None else (knee.load if knee else math.inf)
        below = tuple(p for p in case.points if p.load <= at)
    return below[-1] if below else case.points[0]


def _reasons(case: Case, finding: str, cap: Capacity) -> list[Reason]:
    found = rules.limits(case.evidence)
    if finding == "INVALID_MEASUREMENT":
        invalid = _invalid_reasons(case)
        codes = {reason.code for reason in invalid}
        return [*invalid, *(reason for reason in found if reason.code not in codes)]
    if finding == "INFEASIBLE_SLO":
        return [*_broken_reasons(case), *found]
    return found


def _broken_reasons(case: Case) -> list[Reason]:
    """Which target one request alone broke, with what was measured."""
    first = case.points[0]
    reasons = []
    for target in case.slo:
        value = curves.slo_value(first.level, target)
        if value is not None and value >= target.bound_ms:
            because = (
                f"{target.metric} {target.statistic} is {value:.4g} ms with one request alone,"
                f" over its bound of {target.bound_ms:g} ms"
            )
            evidence = {
                "at": first.load,
                "target": curves.format_slo([target]),
                "value_ms": value,
                "bound_ms": target.bound_ms,
            }
            reasons.append(Reason("SLO_BROKEN_ALONE", because, evidence))
    return reasons


def _invalid_reasons(case: Case) -> list[Reason]:
    causes: dict[str, list[Level]] = {}
    for level in case.invalid:
        causes.setdefault(curves.invalid_because(level) or "other", []).append(level)
    return [_invalid_reason(cause, levels) for cause, levels in causes.items()]


_INVALID_CODES = {
    "client": ("CLIENT_LIMITED", "the load generator itself was the limit"),
    "foreign": ("FOREIGN_TRAFFIC", "somebody else used the server"),
    "errors": ("ERRORS", "too many requests failed"),
    "unsteady": ("UNSTEADY", "requests in flight do not match throughput and latency"),
    "other": ("INVALID", "the level was marked invalid"),
}


def _invalid_reason(cause: str, levels: list[Level]) -> Reason:
    code, words = _INVALID_CODES[cause]
    loads = sorted(curves.load_of(level) or 0.0 for level in levels)
    first = min(levels, key=lambda level: curves.load_of(level) or 0.0)
    said = sorted({r for lv in levels if lv.measurement for r in lv.measurement.reasons})
    return Reason(
        code,
        f"{words} at {len(levels)} level(s), from load {loads[0]:g} on: {_decides(first, cause)}",
        {"levels": len(levels), "from_load": loads[0], "loads": loads, "measurement": said},
    )


def _decides(level: Level, cause: str) -> str:
    """The number that made a level invalid, beside its bound, as the measurement wrote it."""
    said = level.measurement.reasons if level.measurement else []
    words = curves.CAUSES.get(cause, ())
    reason = next((r for r in said if any(word in r.lower() for word in words)), None)
    reason = reason or (said[0] if said else "no reason was recorded")
    return reason.partition(": ")[2] or reason


def _stability(point: Point | None) -> dict[str, Any]:
    """p99/p50 of TTFT and ITL at the operating point: 1 is perfectly even."""
    if point is None:
        return {}
    found: dict[str, Any] = {}
    for name, stats in (("ttft", point.level.ttft_ms), ("itl", point.level.itl_ms)):
        if stats.p99 is not None and stats.p50:
            found[f"{name}_p99_over_p50"] = stats.p99 / stats.p50
    return {"at": point.load, **found} if found else {}


def _questions(case: Case) -> dict[str, Any]:
    users = "unknown"
    if (demand := case.demand.get("concurrency")) is not None:
        users = "single" if demand <= case.t.single_user else "service"
    return {
        "trains": "unknown",
        "users": users,
        "priority": "steady experience" if case.slo else "unknown",
    }


def _energy(point: Point | None) -> dict[str, Any]:
    if point is None or point.level.energy_j_per_output_token is None:
        return {}
    return {"at": point.load, "j_per_output_token_busy": point.level.energy_j_per_output_token}


def _cost(point: Point | None) -> dict[str, Any]:
    if point is None or (usd := point.level.cost_usd_per_million_output_tokens) is None:
        return {}
    return {"at": point.load, "usd_per_million_output_tokens": usd}


# -------------------------------------------------------------------------------------- confidence

_GRADES: tuple[Literal["none", "low", "medium", "high"], ...] = ("none", "low", "medium", "high")


def _confidence(case: Case, finding: str, operating: Point | None) -> Confidence:
    """The least of what the evidence allows, with everything that holds it there."""
    if finding in ("INVALID_MEASUREMENT", "INSUFFICIENT_DATA"):
        return Confidence("none", "missing evidence")
    caps = _caps(case, finding, operating)
    grade = min((cap for cap, _ in caps), default=3)
    limited = "; ".join(text for cap, text in caps if cap == grade)
    return Confidence(_GRADES[grade], limited or "nothing found")


def _caps(case: Case, finding: str, operating: Point | None) -> list[tuple[int, str]]:
    t, found = case.t, case.curve.slo_capacity
    requests = sum(curves.sample_size(lv) for lv in operating.levels) if operating else 0
    checks = [
        (1, case.simulated, "simulated: no real server was measured"),
        (1, len(case.points) < t.levels_few, f"only {len(case.points)} valid level(s)"),
        (1, 0 < requests < t.requests_few, f"only {requests} requests at the deciding level"),
        (1, not case.slo and finding != "CAPACITY_ONLY", "no SLO: latency was not judged"),
        (1, finding == "BORDERLINE", "the interval straddles the demand"),
        (2, t.requests_few <= requests < t.requests_some, f"{requests} requests at that level"),
        (2, not requests, "the number of requests is not known"),
        (2, case.observed.from_production, "nobody chose these loads: lengths differ among them"),
        (2, not case.observed.from_production and all(len(p.levels) == 1 for p in case.points),
         "a single run, not repeated"),
        (2, all(p.level.server is None for p in case.points), "no server metrics"),
        (2, found is not None and not found.bracketed, "the SLO's edge is not bracketed"),
        (2, any(map(case.is_declared, case.demand)),
         "the demand is declared, not observed"),
        (2, not case.slo and not case.curve.saturated, "the server was not driven to its limit"),
    ]  # fmt: skip
    return [(cap, text) for cap, holds, text in checks if holds] + list(case.observed.limits)
