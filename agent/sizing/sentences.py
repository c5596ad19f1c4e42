"""A curve's verdict in sentences: what was found, what it rests on, what is missing, what to do.

Pure. Nothing is decided here: the judge (`agent.sizing.judge`) hands in the finding with the
capacity and the reasons that it was made from.
"""

from __future__ import annotations

import shlex

from agent.model import Knee, Ratio, Reason, Recommendation
from agent.sizing import curve as curves
from agent.sizing import rules
from agent.sizing.case import UNIT_NAMES, Capacity, Case, Unit

ACTIONS = {
    "KV_MEMORY": "more KV-cache memory: a GPU with more memory, another GPU, a smaller or more"
    " quantised KV cache; more compute would not help",
    "ADMISSION_CAP": "raise --max-num-seqs and measure again; the hardware is not the limit",
    "COMPUTE_PREFILL": "more compute for prompts (more FLOPS, another replica) or less to compute"
    " (prefix caching, shorter prompts); more memory would not help",
    "MEM_BANDWIDTH": "more memory bandwidth or fewer bytes to read (quantised weights or KV cache,"
    " another replica); more FLOPS would not help",
    "CLIENT_LIMITED": "find out by `loadgen calibrate` what this load generator can measure, then"
    " stay within it (fewer streams), or give it more processes (--processes) or another machine",
    "FOREIGN_TRAFFIC": "measure again while nobody else uses the server",
    "ERRORS": "mend what the errors by kind and the server's log tell of, and measure again",
    "UNSTEADY": "measure again with longer levels (--duration)",
}


def _n(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def summary(
    case: Case, finding: str, cap: Capacity, ratio: Ratio | None, reasons: list[Reason]
) -> str:
    text = _sentence(case, finding, cap, ratio, reasons)
    judged = ""
    if finding not in ("INVALID_MEASUREMENT", "INSUFFICIENT_DATA"):
        if not case.slo:
            judged = " Latency was not judged: no SLO was given."
        elif case.is_slo_unmeasured:
            judged = " Latency was not judged: a statistic of the SLO was measured at no level."
    return f"{'Simulated: ' if case.simulated else ''}{text}{judged}"


def _sentence(
    case: Case, finding: str, cap: Capacity, ratio: Ratio | None, reasons: list[Reason]
) -> str:
    unit = UNIT_NAMES[cap.unit]
    if finding == "INVALID_MEASUREMENT":
        why = reasons[0].because if reasons else "no level gave a throughput"
        sure = f"; valid up to {_n(case.points[-1].load)}" if case.points else ""
        return f"The measurement does not count: {why}{sure}."
    if finding == "INFEASIBLE_SLO":
        return f"One request alone already breaks the SLO: {reasons[0].because}."
    if finding == "CAPACITY_ONLY":
        return _capacity_sentence(case, cap)
    if finding == "INSUFFICIENT_DATA" or ratio is None:
        return f"{_who(case)} cannot tell: {missing(case, finding, cap)[0]}."
    demand = _in_words(case, cap.unit)
    small = "Too small"
    if case.curve.limit == "ADMISSION_CAP":
        small += " as it is configured (the admission cap binds, not the hardware)"
    if cap.value is None:
        broken = f"the SLO was broken at {_n(cap.hi or 0)} already"
        if finding == "BORDERLINE":
            return f"Too close to call: {broken}, and only the peak of {demand} is beyond it."
        return f"{small}: {demand} are not held, {broken}."
    holds = f"{_n(cap.value)} {unit} {_basis(cap)}"
    if finding == "UNDER_SIZED":
        return f"{small}: {demand} are {_n(100 * ratio.value)} % of what the server holds, {holds}."
    if finding == "RIGHT_SIZED":
        least = "at least " if cap.hi is None else ""
        return (
            f"It fits: {demand} take {_n(100 * ratio.value)} % of what the server holds,"
            f" {least}{holds}, so {_n(max(0.0, 100 * (1 - ratio.value)))} % are in hand."
        )
    return (
        f"Too close to call: {demand} are {_n(100 * ratio.value)} % of what the server holds,"
        f" {holds}, and the measurement is not finer than that."
    )


def _in_words(case: Case, unit: Unit) -> str:
    """Such as `the declared 24 concurrent requests`; of an observed one, what figure it is."""
    kind = "declared" if case.is_declared(unit) else "observed"
    words = "" if case.is_declared(unit) else case.observed.words.get(unit, "")
    behind = f" ({words})" if words else ""
    return f"the {kind} {_n(case.demand[unit])} {UNIT_NAMES[unit]}{behind}"


def _who(case: Case) -> str:
    return "What production showed" if case.observed.from_production else "The sweep"


def _basis(cap: Capacity) -> str:
    return {
        "slo": "within the SLO",
        "knee": "before throughput stops growing",
        "throughput": "at full load",
        "highest level tested": "at the highest load tested",
    }[cap.basis]


def _capacity_sentence(case: Case, cap: Capacity) -> str:
    unit, knee = UNIT_NAMES[cap.unit], case.curve.knee
    limit = f"; the limit is {case.curve.limit}" if case.curve.limit else ""
    best = f" ({_at_knee(case, knee)} at the knee)" if knee else ""
    if cap.basis == "slo" and cap.value is None:
        lowest = _n(case.points[0].load)
        return f"The SLO is broken at the smallest load tested, {lowest} {unit}{best}{limit}."
    value = _n(cap.value) if cap.value is not None else "an unknown number of"
    least = "at least " if cap.hi is None and cap.basis != "throughput" else "up to "
    return f"Right for {least}{value} {unit} {_basis(cap)}{best}{limit}."


def _at_knee(case: Case, knee: Knee) -> str:
    if knee.output_tokens_per_s:
        return f"{_n(knee.output_tokens_per_s)} output tokens/s"
    point = curves.knee_point(case.points, case.t)
    return f"{_n(point.rps or 0.0) if point else 'no'} requests/s"


def rests_on(case: Case) -> list[str]:
    lines = []
    if case.points:
        loads = ", ".join(_n(p.load) for p in case.points)
        unit = "requests/s" if curves.is_open(case.points[0].level) else "concurrency"
        what = "load(s) seen in production" if case.observed.from_production else "valid level(s)"
        lines.append(f"{len(case.points)} {what}, {unit} {loads}")
        requests = sum(lv.requests.ok for p in case.points for lv in p.levels if lv.requests)
        if requests:
            lines.append(f"{requests} completed requests")
    if invalid := case.invalid:
        lines.append(f"not on {len(invalid)} invalid level(s)")
    if case.slo:
        lines.append(f"SLO {curves.format_slo(case.slo)}")
    if any(map(case.is_declared, case.demand)):
        lines.append("a declared demand, taken as given and as the peak")
    lines += [_in_words(case, unit) for unit in case.observed.demand]
    if case.simulated:
        lines.append("the simulated engine, not a real server")
    return lines


# ---------------------------------------------------------------------------------- what is missing


def missing(case: Case, finding: str, cap: Capacity) -> list[str]:
    lines = _missing_for_finding(case, finding, cap)
    lines += rules.missing(case.evidence)
    if case.is_slo_unmeasured and case.points:
        lines.append("a statistic the SLO asks for was measured at no valid level")
    if not case.slo:
        lines.append("an SLO (--slo), to judge latency as well as throughput")
    if not case.demand:
        lines.append("a demand: --expect-concurrency or --expect-rps, or an agent that observes it")
    if finding == "RIGHT_SIZED" and not case.observed.demand:
        lines.append(
            "to call it over-sized: demand observed over at least 14 days with two weekends, and a"
            " smaller configuration shown to hold it"
        )
    return list(dict.fromkeys(lines))


def _missing_for_finding(case: Case, finding: str, cap: Capacity) -> list[str]:
    if finding == "INVALID_MEASUREMENT":
        return ["valid levels where the capacity lies"]
    if not case.points:
        return ["at least one level with a throughput"]
    if finding != "INSUFFICIENT_DATA":
        return []
    if case.is_slo_unmeasured:
        return ["a statistic the SLO asks for was measured at no valid level"]
    found, unit = case.curve.slo_capacity, UNIT_NAMES[cap.unit]
    if found is not None and found.lo is None:
        was = "already broken" if found.concurrency is None else "too close to call"
        lowest = case.points[0]
        if not curves.is_open(lowest.level) and lowest.load <= 1:  # fewer there are not
            return [f"more requests at {_n(lowest.load)} (--duration), where the SLO was {was}"]
        return [f"a level under {_n(lowest.load)}, where the SLO was {was}"]
    if cap.value is None:
        return [f"the levels' {unit}, which were not measured"]
    return [
        f"levels up to {_in_words(case, cap.unit)}: nothing above"
        f" {_n(case.points[-1].load)} was {'seen' if case.observed.from_production else 'tested'}"
    ]


# ---------------------------------------------------------------------------------- recommendation


def recommendation(
    case: Case, finding: str, cap: Capacity, reasons: list[Reason]
) -> Recommendation:
    return Recommendation(
        action=_action(case, finding, reasons),
        confirm_with=_confirm_with(case, finding, cap),
        overturned_by=_overturned_by(finding),
    )


def _action(case: Case, finding: str, reasons: list[Reason]) -> str:
    limit = case.curve.limit
    if finding == "UNDER_SIZED":
        return ACTIONS.get(limit or "", "more capacity; what limits it is not proven, so find that"
                           " out first")  # fmt: skip
    if finding == "RIGHT_SIZED":
        return "keep it"
    if finding == "BORDERLINE":
        return "measure finer around the demand before buying or shrinking anything"
    if finding == "INFEASIBLE_SLO":
        return (
            "a faster device, a smaller or more quantised model, or a looser SLO;"
            " more replicas cannot help"
        )
    if finding == "INVALID_MEASUREMENT":
        code = reasons[0].code if reasons else ""
        return ACTIONS.get(code, "mend what made the levels invalid and measure again")
    if finding == "CAPACITY_ONLY" and limit:
        return f"to raise the capacity: {ACTIONS[limit]}"
    return "measure what is missing"


def _confirm_with(case: Case, finding: str, cap: Capacity) -> str:
    """The sweep that would confirm or overturn the verdict: the loads that decide it."""
    opened = any(map(curves.is_open, curves.of_mode(case.levels)[:1]))
    loads = ",".join(f"{load:g}" for load in _next_loads(case, cap, opened))
    parts = ["loadgen sweep", shlex.quote(case.target)]
    if case.endpoint != "chat":
        parts += ["--endpoint", shlex.quote(case.endpoint)]
    if loads:  # else sweep's own list of levels
        parts += ["--rate" if opened else "--concurrency", loads]
    if case.slo:
        parts.append(f"--slo '{curves.format_slo(case.slo)}'")
    names: dict[Unit, str] = {"concurrency": "--expect-concurrency", "rps": "--expect-rps"}
    parts += [f"{names[unit]} {_asked(case, unit):g}" for unit in case.demand]
    return " ".join([*parts, "--repeats 3"])


def _asked(case: Case, unit: Unit) -> float:
    """A demand to be typed again: what was observed is no finer than three digits."""
    demand = case.demand[unit]
    return demand if case.is_declared(unit) else float(f"{demand:.3g}")


def _next_loads(case: Case, cap: Capacity, opened: bool) -> list[float]:
    """What held, the middle of the bracket, what broke, and the demand, in the sweep's unit."""
    if not case.points:  # the same again, once what made them invalid is mended
        return sorted({curves.load_of(level) or 0.0 for level in case.invalid})
    found, top = case.curve.slo_capacity, case.points[-1].load
    knee = curves.knee_point(case.points, case.t)
    low = found.lo if found else (knee.load if knee else top)
    high = found.hi if found else None
    if low is None:
        loads = [case.points[0].load / 2, case.points[0].load]
    elif high is not None:
        loads = [low, (low + high) / 2, high]
    else:
        loads = [low, top] if case.curve.saturated else [top, 2 * top]
    unit: Unit = "rps" if opened else "concurrency"
    loads += [_asked(case, unit)] if case.demand.get(unit) else []
    if not opened:
        loads = [float(max(1, round(load))) for load in loads]
    return sorted(set(loads))


def _overturned_by(finding: str) -> str:
    return {
        "UNDER_SIZED": "a repeated level at this demand that meets the SLO, or a smaller demand",
        "RIGHT_SIZED": "an observed peak above the capacity, longer prompts or answers than were"
        " measured, or other flags, model or driver",
        "BORDERLINE": "repeats that narrow the interval to one side of the demand",
        "INFEASIBLE_SLO": "a run at concurrency 1 that meets the SLO",
        "CAPACITY_ONLY": "other prompt or answer lengths, other flags, model or driver",
    }.get(finding, "a valid measurement of the levels that matter")
