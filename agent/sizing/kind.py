"""The kind of hardware: what is there, how much of it the load uses, whether it is right for it.

Pure. Three questions decide which hardware is right: do I train, one user or a service, peak speed
or a steady service? Each is answered in a sentence with its numbers. Two things may be wrong with
hardware that is neither too small nor too large: it was built for training and serves one person
(TRAINING_CLASS_FOR_PERSONAL), or one of its resources binds while another one idles (MISMATCHED).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from agent.model import Level, Reason, Slo, Sweep, Target, UsageError, Verdict
from agent.sizing import candidates as others
from agent.sizing import curve as curves
from agent.sizing import money
from agent.sizing.candidates import Box, Candidate
from agent.sizing.engine import active_weight_bytes, kv_bytes
from agent.sizing.hardware import GIB, Gpu
from agent.sizing.money import Prices
from agent.sizing.pattern import Pattern
from agent.sizing.rules import DEFAULTS, Thresholds
from agent.words import number, span

DAY_S = 86_400.0

# What to look for by finding: only what surely saves, or whatever holds the load; else nothing.
CHEAPER = {
    "RIGHT_SIZED": True, "OVER_SIZED": True, "OVER_OFF_PEAK": True, "IDLE": True,
    "INSUFFICIENT_DATA": True, "UNDER_SIZED": False, "INFEASIBLE_SLO": False,
}  # fmt: skip

_BINDS = {
    "KV_MEMORY": "memory for the KV cache",
    "MEM_BANDWIDTH": "memory bandwidth",
    "COMPUTE_PREFILL": "FLOPS",
}


class Known(msgspec.Struct, frozen=True):
    """What advice is made from, beside the verdict.

    `levels`: those it was judged by, of `sweep` where there is one. `served`: what runs on which
    GPUs, as the agent saw it. `settings`: the server's own, by name. `slo`: what was judged.
    `lengths`: declared, of a prompt and an answer. `least_s`: observed so long, it is known who
    uses a box. `history`: earlier assessments, newest first, as (unix s, the verdict's `cost`).
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
    lengths: tuple[float, float] | None = None
    least_s: float = DAY_S
    history: Sequence[tuple[float, Mapping[str, Any]]] = ()
    t: Thresholds = DEFAULTS
    host_j: float | None = None  # of the machine's processors and memory, over the window
    target: str = "URL"
    served: Target | None = None

    @property
    def there(self) -> Target | None:
        return self.sweep.target if self.sweep is not None else self.served


class Place(NamedTuple):
    """The hardware that is there; `box` is null where the model is not known."""

    card: Gpu
    gpus: int
    mean_w: float | None
    box: Box | None


# ------------------------------------------------------------------------------- what is there


def place_of(known: Known, lacking: list[str]) -> Place | None:
    """The hardware; null, with what is lacking, where it is not known."""
    if (there := known.there) is None:
        lacking.append("which GPU it runs on: a sweep with --agent AGENT_URL tells")
        return None
    try:
        card = others.card_of(there)
    except UsageError as error:
        lacking.append(str(error))
        return None
    count = max(1, len(there.gpus)) * known.replicas
    energy = known.pattern.energy if known.pattern else None
    mean_w = energy.power_w.mean if energy and len(energy.gpus) == count else None
    try:
        box = others.box_of(there, known.replicas, known.settings, mean_w)
    except UsageError as error:
        lacking.append(f"the shape of the model it serves ({error})")
        box = None
    return Place(card, count, mean_w, box)


def lengths_of(known: Known) -> tuple[float, float] | None:
    """Tokens of a prompt and of an answer: as declared, else production's, else the sweep's."""
    if known.lengths is not None:
        return known.lengths
    seen = known.pattern
    prompt = seen.prompt_tokens_per_request.mean if seen else None
    answer = seen.output_tokens_per_request.mean if seen else None
    return (prompt, answer) if prompt and answer else swept_lengths(known.sweep)


def swept_lengths(sweep: Sweep | None) -> tuple[float, float] | None:
    if sweep is None:
        return None
    prompt = _mean(one.prompt_tokens.mean for one in sweep.levels)
    answer = _mean(one.output_tokens.mean for one in sweep.levels)
    prompt = prompt or curves.mean_length(sweep.workload.input_tokens)
    answer = answer or curves.mean_length(sweep.workload.output_tokens)
    return (prompt, answer) if prompt and answer else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# -------------------------------------------------------------------------- the wrong kind of it


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
    lengths, seen = lengths_of(known), known.pattern
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
    try:
        flops = spec.gpu.flops_per_s(spec.precision)
    except UsageError:
        return None
    each = max(1.0, at_once / box.replicas)
    cache = each * kv_bytes(spec.model, prompt + answer / 2, spec.kv_precision, spec.tp)
    read = active_weight_bytes(spec.model, spec.precision, each) + cache
    work = 2 * spec.model.params_active * rate * (1 + prompt / answer)
    return _Use(
        work / (box.gpus * flops),
        read * rate / each / (box.gpus * spec.gpu.bandwidth_bytes_per_s),
        kv,
    )


def mismatch(verdict: Verdict, known: Known, place: Place) -> dict[str, Any] | None:
    """One resource binds at the peak while another idles: which way to move, not just how far."""
    at_peak = verdict.finding == "UNDER_SIZED" or (
        verdict.ratio is not None and verdict.ratio.value >= known.t.binds_ratio_min
    )
    binds = next((one.code for one in verdict.reasons if one.code in _BINDS), None)
    use = _use(known, place.box)
    if not at_peak or binds is None or use is None:
        return None
    used = {"FLOPS": use.flops, "memory bandwidth": use.bandwidth}
    if use.kv is not None:
        used["memory for the KV cache"] = use.kv
    idle, share = min(used.items(), key=lambda one: one[1])
    if share >= known.t.idles_share_max or idle == _BINDS[binds]:
        return None
    return {
        "name": "MISMATCHED",
        "binds": binds,
        "idles": idle,
        "because": f"{_BINDS[binds]} binds while {100 * share:.0f} % of the {idle} are used: move"
        f" to hardware with more {_BINDS[binds]} for its {idle}, not to more of the same",
    }


def personal_reason(
    verdict: Verdict, known: Known, place: Place, found: Sequence[Candidate]
) -> Reason | None:
    """One person's inference on a device that is built for training, where a cheaper one does."""
    p99 = p99_of(verdict, known)
    if known.trains or place.card.category != "training-class" or not found:
        return None
    if p99 is None or p99 > known.t.single_user or not CHEAPER.get(verdict.finding):
        return None
    if known.pattern is not None and known.pattern.covered_s < known.least_s:
        return None
    best = next((one for one in found if one.category != "training-class"), None)
    if best is None or best.saving is None:
        return None
    how = "P99 of" if known.pattern else "declared"
    return Reason(
        "TRAINING_CLASS_FOR_PERSONAL",
        f"one person's load ({how} {p99:.3g} at once, no training declared) on {place.gpus}"
        f" x {place.card.name}, a training-class device: {best.words} would hold it by prediction,"
        f" a token every {number(best.tpot_ms.lo90)}–{number(best.tpot_ms.hi90)} ms, for"
        f" {span(100 * best.saving[0], 100 * best.saving[1])} % less",
        {
            "concurrency_p99": p99,
            "category": place.card.category,
            "candidate": best.words,
            "tpot_ms": msgspec.to_builtins(best.tpot_ms),
            "ttft_ms": msgspec.to_builtins(best.ttft_ms),
            "saving": list(best.saving),
        },
    )


def p99_of(verdict: Verdict, known: Known) -> float | None:
    """Requests at once in the busiest 1 % of the minutes, or those that are declared."""
    seen = known.pattern.concurrency.p99 if known.pattern else verdict.demand.get("concurrency")
    if seen is None:
        return None
    return max(float(seen), known.expect_concurrency or 0.0)


def questions(verdict: Verdict, known: Known, place: Place | None) -> dict[str, Any]:
    """The three questions, with a sentence and its numbers for each."""
    said = [_class(known, place), _users(verdict, known), _experience(verdict, known)]
    return {**verdict.questions, "said": said}


def _class(known: Known, place: Place | None) -> str:
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
    p99 = p99_of(verdict, known)
    if p99 is None and verdict.demand.get("rps") is not None:
        return "One user or a service? Not known: of the demand, requests/s alone are declared."
    if p99 is None:
        return "One user or a service? Not known: no demand was observed or declared."
    who = "One user" if p99 <= known.t.single_user else "A service"
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
