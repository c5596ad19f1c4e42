"""A verdict without a store: of a curve and a demand that stand in files.

The demand is declared in figures, or recorded requests. Requests are not compared with others:

- Where the curve tells its model and GPU, recorded requests are replayed through the engine that
  is fitted to it, with their own lengths and instants.
- Else requests a second count, and prompts or answers of other lengths than the swept ones prove
  one thing only: longer ones that something is too small, shorter ones that it fits. Recorded ones
  fit by their busiest minute and by what they may miss at most as they bunch, and are too many
  only where more of them than an SLO allows surely met a load that was measured to break it
  (`agent.sizing.crowd`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from agent.assess import LENGTHS_FACTOR, swept
from agent.model import Confidence, Level, Slo, Sweep, UsageError, Verdict
from agent.sizing import curve as curves
from agent.sizing.advice import advise
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.case import Observed
from agent.sizing.crowd import kept, overload
from agent.sizing.declared import Demand, parse_demand
from agent.sizing.judge import judge
from agent.sizing.kind import Known
from agent.sizing.scene import percent
from agent.sizing.trial import Trial, fitted, trial, whole

Side = Literal["alike", "longer", "shorter", "other", "unknown"]
# Of what a replay holds, and of its speed: near its best an engine falls off a cliff, and how fast
# it computes prompts, on which long waits hang, the rates of a sweep leave open by a tenth.
SPARE = 1.1
# Of an engine that was fitted to a sweep of other lengths: nine of ten published rates lay within
# this factor of those expected so, and latencies near a bound change faster than rates do.
LENGTHS_APART, OTHER_LENGTHS_SPARE = 1.25, 1.5
SURELY = 1.05  # times what an SLO allows: nearer to it nobody can tell
_NO_ENGINE = "nothing was replayed: no model and GPU that are known"
_REPLAYABLE = (
    "a sweep of known model and GPU, with an SLO: the requests are then replayed through it"
)
SHORT_S = 60.0  # a trace that lasts no longer has no busiest minute


class Asked(NamedTuple):
    """A demand; `arrivals`: the requests themselves, where they were recorded."""

    demand: Demand
    arrivals: Arrivals | None = None
    notes: tuple[str, ...] = ()  # what of the file was not used


def read_demand(data: bytes, name: str) -> Asked:
    """A demand, or a trace as `loadgen --trace` takes it. Raises UsageError for what is neither."""
    first = data.lstrip().partition(b"\n")[0]
    if first.startswith((b"{", b"[")) and b'"timestamp"' not in first:
        try:
            return Asked(parse_demand(data))
        except UsageError as error:
            raise UsageError(f"--demand {name}: {error}") from error
    from agent import trace  # what reads CSV and gzip is not needed of anybody else

    found = trace.read(name, "--demand", data)
    rows = found.rows
    told = msgspec.convert(trace.demand(found), Demand)
    if told.requests_per_s.high is None:
        raise UsageError(
            f"--demand {name}: {len(rows)} request(s) at one instant have no rate; give a longer"
            " trace"
        )
    notes = list(found.notes)
    if found.window_s < SHORT_S:
        notes.append(f"the trace lasts {found.window_s:.3g} s only: its busiest minute is its mean")
    return Asked(told, recorded(rows.at_s, rows.input_tokens, rows.output_tokens), tuple(notes))


def judge_files(
    sweep: Sweep,
    slo: Sequence[Slo],
    asked: Asked | None = None,
    *,
    expect_concurrency: float | None = None,
    expect_rps: float | None = None,
) -> Verdict:
    """The verdict on a curve, against a demand where there is one."""
    demand = asked.demand if asked is not None else Demand()
    side, levels = _side(sweep, demand), _with_requests(sweep, demand)
    limits = [(1, note) for note in asked.notes] if asked is not None else []
    if side in _PROVES:
        limits.append((1, "the declared prompts or answers are not as long as the swept ones"))
    elif demand.requests_per_s.high is not None and levels != sweep.levels and side == "unknown":
        limits.append((1, "the sweep's answers are taken to be as long as the declared ones"))
    if asked is not None:
        expect_concurrency, expect_rps = demand.concurrency.high, demand.requests_per_s.high
    verdict = judge(
        levels,
        curves.analyse(levels, slo),
        slo,
        expect_concurrency=expect_concurrency,
        expect_rps=expect_rps,
        observed=Observed({}, {}, limits=tuple(limits)),
        simulated=sweep.run.simulated,
        target=sweep.target.url or "URL",
        endpoint=sweep.workload.endpoint,
    )
    verdict = _replayed(verdict, sweep, slo, asked, side) or _one_sided(
        _bursts(_queues(verdict, levels, sweep, slo, asked, side), levels, sweep, slo, asked, side),
        demand,
        side,
    )
    prompt, answer = demand.input_tokens.typical, demand.output_tokens.typical
    lengths = (prompt, answer) if prompt and answer else None
    target = sweep.target.url or "URL"
    return advise(verdict, Known(levels, tuple(slo), sweep, lengths=lengths, target=target))


# ----------------------------------------------------------------------------------------- lengths


def _side(sweep: Sweep, demand: Demand) -> Side:
    """How the declared prompts and answers stand to the swept ones."""
    told = (demand.input_tokens.typical, demand.output_tokens.typical)
    pairs = list(zip(_swept(sweep), told, strict=True))
    ratios = [declared / known for known, declared in pairs if known and declared]
    longer = any(ratio > LENGTHS_FACTOR for ratio in ratios)
    shorter = any(ratio < 1 / LENGTHS_FACTOR for ratio in ratios)
    if longer or shorter:
        return "other" if longer and shorter else "longer" if longer else "shorter"
    return "alike" if len(ratios) == len(pairs) else "unknown"


def _with_requests(sweep: Sweep, demand: Demand) -> list[Level]:
    """The levels, with the requests/s that follow from their tokens/s where they lack them.

    By the length of the answers that were swept, else of those that are declared.
    """
    fixed = curves.mean_length(sweep.workload.output_tokens) or demand.output_tokens.typical

    def whole(level: Level) -> Level:
        answer = level.output_tokens.mean or fixed
        if level.request_throughput is not None or not level.output_tokens_per_s or not answer:
            return level
        rate = level.output_tokens_per_s / answer
        return msgspec.structs.replace(level, request_throughput=rate)

    return [whole(level) for level in sweep.levels]


def _queues(
    verdict: Verdict, levels: Sequence[Level], sweep: Sweep, slo: Sequence[Slo],
    asked: Asked | None, side: Side,
) -> Verdict:  # fmt: skip
    """What is left of one that is too small for its busiest minute, where queues may drain.

    An SLO is about all requests. It is proven broken where more of them than it allows surely met
    a load that was measured to break it.
    """
    if asked is None or asked.arrivals is None or verdict.finding not in _JUDGED:
        return verdict
    proven = side not in ("shorter", "other") and overload(
        curves.points(levels), slo, asked.arrivals,
        _swept(sweep) if side == "alike" else (None, None),
        saturated=bool(verdict.capacity.get("saturated")),
    )  # fmt: skip
    if proven and proven >= 1:
        return _proven(verdict, proven)
    return _open(verdict, asked.arrivals) if verdict.finding == "UNDER_SIZED" else verdict


def _swept(sweep: Sweep) -> tuple[float | None, float | None]:
    """Prompt and reply of the swept requests, as far as they are known."""
    return (
        swept(sweep, "prompt_tokens", sweep.workload.input_tokens),
        swept(sweep, "output_tokens", sweep.workload.output_tokens),
    )


def _proven(verdict: Verdict, times: float) -> Verdict:
    """Too small, by what the requests surely met."""
    line = f"at least {times:.3g} times as many of the requests as the SLO allows"
    line += " came to a load that was measured to break it"
    if verdict.finding != "UNDER_SIZED":
        verdict = _unreplayed(verdict, "UNDER_SIZED", line)
    return msgspec.structs.replace(verdict, rests_on=[*verdict.rests_on, line])


def _open(verdict: Verdict, arrivals: Arrivals) -> Verdict:
    """Too close to call: the busiest minute is too much, of all requests that is not proven."""
    ratio, most = verdict.ratio, verdict.capacity.get("hi")
    low = min(1.0, arrivals.mean_rps / most) if most else None
    line = (
        f"the busiest minute brings {verdict.demand['rps']:.3g} requests/s, and {most:.3g} are"
        f" surely not held; but what waits may be served in time, and {arrivals.mean_rps:.3g} come"
        " on average"
    )
    return msgspec.structs.replace(
        _unreplayed(verdict, "BORDERLINE", line),
        ratio=None if ratio is None else msgspec.structs.replace(ratio, lo=low),
        missing=[_REPLAYABLE, *verdict.missing],
    )


def _bursts(
    verdict: Verdict, levels: Sequence[Level], sweep: Sweep, slo: Sequence[Slo],
    asked: Asked | None, side: Side,
) -> Verdict:  # fmt: skip
    """What is left of one that fits by its busiest minute, where requests of it come together."""
    if asked is None or asked.arrivals is None or verdict.finding != "RIGHT_SIZED":
        return verdict
    lengths = (None, None) if side == "unknown" else _swept(sweep)
    missed = kept(curves.points(levels), slo, asked.arrivals, lengths)
    if missed <= 1:
        return verdict
    line = "the busiest minute is held, but requests come in bursts, and by the curve alone "
    line += (
        f"{missed:.3g} times what the SLO allows may be missed" if missed < math.inf
        else "nothing is known of those"
    )  # fmt: skip
    return _unreplayed(verdict, "BORDERLINE", line)


def _unreplayed(verdict: Verdict, finding: str, line: str) -> Verdict:
    """Another finding by what the requests themselves show, which a replay might overturn."""
    words, action = _SAID[finding]
    given = verdict.recommendation
    return msgspec.structs.replace(
        verdict,
        finding=finding,
        summary=f"{_simulated(verdict)}{words}: {line}.",
        confidence=Confidence("low", _NO_ENGINE),
        recommendation=None if given is None else msgspec.structs.replace(
            given, action=action, overturned_by=_REPLAYABLE
        ),
    )  # fmt: skip


def _simulated(verdict: Verdict) -> str:
    """What the summary of a simulated server begins with, for one that takes its place."""
    return "Simulated: " * verdict.summary.startswith("Simulated: ")


_PROVES: dict[Side, str] = {"longer": "UNDER_SIZED", "shorter": "RIGHT_SIZED", "other": ""}


def _one_sided(verdict: Verdict, demand: Demand, side: Side) -> Verdict:
    """What is left of a verdict where requests are longer, or shorter, than those of the sweep."""
    proven = (_PROVES.get(side), "INSUFFICIENT_DATA")
    if side not in _PROVES or verdict.finding not in _JUDGED or verdict.finding in proven:
        return verdict
    prompt, answer = demand.input_tokens.typical, demand.output_tokens.typical
    lengths = f" --input-tokens {prompt:.0f}" if prompt else ""
    lengths += f" --output-tokens {answer:.0f}" if answer else ""
    words = {"other": "longer in one and shorter in the other"}.get(side, side)
    recommendation = verdict.recommendation
    if recommendation is not None:
        confirm = str(recommendation.confirm_with)
        recommendation = msgspec.structs.replace(
            recommendation,
            action="measure what is missing",
            confirm_with=confirm.replace("loadgen sweep", f"loadgen sweep{lengths}", 1),
            overturned_by="a valid measurement with these lengths",
        )
    return msgspec.structs.replace(
        verdict,
        finding="INSUFFICIENT_DATA",
        summary=(
            f"{_simulated(verdict)}The sweep cannot tell: the declared requests are {words} than"
            f" the swept ones, and of those alone it would be {verdict.finding}."
        ),
        confidence=Confidence("none", "missing evidence"),
        recommendation=recommendation,
        missing=[f"a sweep with these lengths ({lengths.strip()})", *verdict.missing],
    )


# ------------------------------------------------------------------------------------------ replay

_JUDGED = ("UNDER_SIZED", "RIGHT_SIZED", "BORDERLINE", "INSUFFICIENT_DATA")


def _replayed(
    verdict: Verdict, sweep: Sweep, slo: Sequence[Slo], asked: Asked | None, side: Side
) -> Verdict | None:
    """What the replay of recorded requests says; null where nothing can be replayed.

    An SLO is about all requests: the busiest part, which the trial tells of, has to agree with the
    whole. An engine that was fitted to other lengths has to have more to spare.
    """
    if asked is None or asked.arrivals is None or not slo or verdict.finding not in _JUDGED:
        return None
    import numpy as np

    try:
        rng = np.random.default_rng(0)
        engine = fitted(sweep)
        found = trial(engine, asked.arrivals, slo, replicas=1, rng=rng)
        apart, spare = (1.0, SPARE) if side == "alike" else (LENGTHS_APART, OTHER_LENGTHS_SPARE)
        slower = max(apart, SPARE)
        finding, behind = "BORDERLINE", ""
        if found.hi * apart < 1:
            broken = whole(engine, asked.arrivals, slo, +1, 1 / apart) > SURELY
            finding = "UNDER_SIZED" if broken else finding
            behind = "" if broken else " in their busiest part, and over all of them it may be kept"
        elif found.lo > spare:
            # more users are not as bunched as these: more of them may even miss less
            holds = all(
                whole(engine, asked.arrivals, slo, -1, times, slower) <= 1 for times in (1.0, spare)
            )
            finding = "RIGHT_SIZED" if holds else finding
            behind = "" if holds else " in their busiest part, and over all of them it may break"
    except UsageError:
        return None
    return _by_replay(verdict, found, side, finding, behind)


_SAID = {
    "UNDER_SIZED": ("Too small", "more capacity; how much, and of what, the sweep's limit tells"),
    "RIGHT_SIZED": ("It fits", "keep it"),
    "BORDERLINE": (
        "Too close to call", "measure finer around the demand before buying or shrinking anything"
    ),
}  # fmt: skip


def _by_replay(verdict: Verdict, found: Trial, side: Side, finding: str, behind: str) -> Verdict:
    words, action = _SAID[finding]
    ratio, given = found.ratio, verdict.recommendation
    agrees = verdict.finding == finding
    grade: Literal["low", "medium"] = "low"
    if side == "alike" and verdict.confidence.level not in ("none", "low"):
        grade = "medium"
    limited = "a replay through the fitted engine"
    limited += "" if side == "alike" else ", which was swept with other lengths"
    return msgspec.structs.replace(
        verdict,
        finding=finding,
        summary=(
            f"{_simulated(verdict)}{words}: replayed, the recorded requests take"
            f" {percent(ratio.value)} of what it holds within the SLO ({percent(ratio.lo)} to"
            f" {percent(ratio.hi)}){behind}."
        ),
        confidence=verdict.confidence if agrees else Confidence(grade, limited),
        ratio=ratio,
        rests_on=[*verdict.rests_on, found.note.replace("observed", "recorded")],
        recommendation=given if agrees or given is None else msgspec.structs.replace(
            given, action=action, overturned_by="a sweep with these lengths that shows the other"
        ),
        missing=[line for line in verdict.missing if not line.startswith("levels up to")],
    )  # fmt: skip
