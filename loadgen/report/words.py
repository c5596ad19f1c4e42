"""The answer of a sweep for who reads no table: how many at once, what stops more, what to change.

Every sentence holds its number, and none is given that was not measured: what is unknown is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agent.model import Level, Slo, SloCapacity, Sweep
from agent.sizing import curve as curves
from agent.sizing.curve import Point

# Where no SLO was given: a chat between the two that MLPerf Inference 5.0 has for Llama 2 70B,
# server (TTFT 2 s, TPOT 200 ms) and interactive (450 ms, 40 ms). There they are p99, for which a
# level of a sweep has too few requests.
ASSUMED = (Slo("ttft", "p95", 1000.0), Slo("tpot", "p95", 100.0))
WORDS_PER_TOKEN = 0.75  # of English text: OpenAI, "What are tokens and how to count them?"

STOPPED_BY = {
    "KV_MEMORY": "the memory for replies under way (KV cache)",
    "ADMISSION_CAP": "the server's setting of how many requests it works on at once, not the"
    " hardware",
    "COMPUTE_PREFILL": "the computing power that reads the prompts",
    "MEM_BANDWIDTH": "the speed of the memory that the model's weights are read from",
}
CASES = {
    "mean": "on average", "p50": "in half of the cases", "p90": "in 90 of 100 cases",
    "p95": "in 95 of 100 cases", "p99": "in 99 of 100 cases", "max": "always",
}  # fmt: skip
IN_HAND = ("to raise the capacity: ", "measure what is missing", "keep it")


def answer(sweep: Sweep) -> list[str]:
    """A few sentences; none for a single load point, that says nothing of more or fewer.

    The limits are the sweep's SLO, else assumed ones, which is said.
    """
    if len(sweep.levels) < 2:
        return []
    points = curves.points(sweep.levels)
    lines = [_how_many(sweep, points), _what_stops_more(sweep, points), _what_to_change(sweep)]
    if points and not sweep.slo:
        lines.append(
            "These limits are assumed, and --slo sets yours; they lie between the two that MLPerf "
            "Inference has for chat (2 s and 200 ms a token, 450 ms and 40 ms)."
        )
    said = [line for line in lines if line]
    return [f"Simulated: {said[0]}", *said[1:]] if sweep.run.simulated else said


def action_is_told(sweep: Sweep) -> bool:
    """Whether `answer` says what the verdict recommends."""
    return bool(len(sweep.levels) > 1 and _what_to_change(sweep))


# ------------------------------------------------------------------------------------- how many


def _how_many(sweep: Sweep, points: Sequence[Point]) -> str:
    if not points:
        return "How many it can serve at once cannot be said: no level of this sweep is valid."
    slo = sweep.slo or ASSUMED
    found = sweep.curve.slo_capacity if sweep.slo else curves.slo_capacity(points, slo)
    within = _limits(slo)
    if found is None:
        unknown = dict.fromkeys(
            target.metric.upper() for target in slo if _never_measured(points, target)
        )
        return (
            f"How many can be answered at once, each with {within}, cannot be said: "
            f"{' and '.join(unknown)} was measured at no level."
        )
    if curves.is_open(points[0].level):
        return _rate_sentence(found, within, points, slo)
    return _people_sentence(found, within, points, slo)


def _people_sentence(
    found: SloCapacity, within: str, points: Sequence[Point], slo: Sequence[Slo]
) -> str:
    if found.lo is None:
        lowest = points[0].load
        broken = _broken(points[0].level, slo)
        if broken is None:
            return _too_close(f"How many can be answered at once, each with {within},", lowest)
        who = "Not even one person alone is" if lowest <= 1 else f"Fewer than {lowest:g} people are"
        return f"{who} answered with {within}: {broken}."
    held = int(found.concurrency or found.lo)
    people = "1 person" if held == 1 else f"{held:,} people"
    if not found.bracketed:
        return f"At least {people} can be answered at once, each with {within}; more was not tried."
    return (
        f"About {people} can be answered at once, each with {within}: "
        f"{found.lo:g} were, {found.hi:g} were too many."
    )


def _rate_sentence(
    found: SloCapacity, within: str, points: Sequence[Point], slo: Sequence[Slo]
) -> str:
    if found.lo is None:
        lowest = points[0].load
        broken = _broken(points[0].level, slo)
        if broken is None:
            return _too_close(f"How many requests a second can be answered with {within}", lowest)
        return f"Not even {lowest:g} requests a second are answered with {within}: {broken}."
    what = f"{_n(found.rps or found.lo)} requests a second can be answered, each with {within}"
    if not found.bracketed:
        return f"At least {what}; more was not tried."
    return f"About {what}: {found.lo:g} were, {found.hi:g} were too many."


def _too_close(what: str, lowest: float) -> str:
    """The lowest load kept the SLO, and so few requests do not prove it."""
    return (
        f"{what} cannot be said: {lowest:g}, the lowest that was tried, kept to it, of too few "
        "requests to be sure; --requests or --duration makes them more."
    )


def _broken(level: Level, slo: Sequence[Slo]) -> str | None:
    """What the lowest load gave instead, of the first target that it broke; None: of none."""
    for target in slo:
        value = curves.slo_value(level, target)
        if value is not None and value >= target.bound_ms:
            if math.isinf(value):
                return f"{curves.failed_share(level):.0%} of the requests failed"
            return f"{_promise(target.metric, value)} is what it gave"
    return None


def _never_measured(points: Sequence[Point], target: Slo) -> bool:
    return all(curves.slo_value(point.level, target) is None for point in points)


def _limits(slo: Sequence[Slo]) -> str:
    """`the first word within 0.5 s and at least 15 words a second (in 95 of 100 cases)`"""
    cases = {target.statistic for target in slo}
    if len(cases) == 1:
        promises = " and ".join(_promise(target.metric, target.bound_ms) for target in slo)
        return f"{promises} ({CASES[cases.pop()]})"
    return " and ".join(
        f"{_promise(target.metric, target.bound_ms)} ({CASES[target.statistic]})" for target in slo
    )


def _promise(metric: str, bound_ms: float) -> str:
    if metric in ("itl", "tpot"):
        return f"at least {_n(WORDS_PER_TOKEN * 1000 / bound_ms)} words a second"
    what = {"ttft": "the first word", "ttfo": "the first word of the answer"}.get(metric)
    return f"{what or 'the whole reply'} within {bound_ms / 1000:.3g} s"


# ------------------------------------------------------------------ what stops more, what to change


def _what_stops_more(sweep: Sweep, points: Sequence[Point]) -> str:
    if not points:
        decided = [reason.because for reason in sweep.verdict.reasons] if sweep.verdict else []
        return f"What was in the way: {decided[0]}." if decided else ""
    knee, limit = sweep.curve.knee, sweep.curve.limit
    top = points[-1]
    if not sweep.curve.saturated:
        above = any((curves.load_of(level) or 0.0) > top.load for level in sweep.levels)
        where = (
            "above which this load generator was the limit"
            if limit == "CLIENT_LIMITED"
            else ("above which no level is valid" if above else "the most that was tried")
        )
        return (
            f"What stops more was not reached: at {_load(top)}, {where}, it wrote {_written(top)}, "
            "and perhaps it writes more beyond."
        )
    at = next((point for point in points if knee and point.concurrency == knee.concurrency), top)
    name = STOPPED_BY.get(limit or "", "a limit that this sweep could not prove")
    return f"More is stopped by {name}: from {_load(at)} on it writes {_written(at)} and no more."


def _load(point: Point) -> str:
    if curves.is_open(point.level):
        return f"{point.load:g} requests a second"
    return f"{point.load:g} at once"


def _written(point: Point) -> str:
    tokens = point.level.output_tokens_per_s
    if not tokens:
        return f"{_n(point.throughput)} replies a second"
    return f"{_n(tokens)} tokens ({_n(WORDS_PER_TOKEN * tokens)} words) a second in all"


def _n(value: float) -> str:
    """Three significant digits, without noughts that were not measured."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _what_to_change(sweep: Sweep) -> str:
    advice = sweep.verdict.recommendation if sweep.verdict else None
    if advice is None or advice.action in IN_HAND:
        return ""
    return f"What to do: {advice.action.removeprefix(IN_HAND[0]).rstrip('.')}."
