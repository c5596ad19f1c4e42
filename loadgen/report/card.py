"""A result as Markdown to paste into a post or an issue: one sentence and a table.

Names stand in code spans: there nothing is markup, a link or a mention, whatever a server calls
its model. Sentences are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from agent.model import Level, Sweep
from agent.sizing import curve as curves
from agent.words import ms, printable
from loadgen.report.labels import (
    NOTHING,
    TO,
    engine_name,
    gpu_names,
    instant,
    named,
    number,
    prices_text,
    slo_text,
)
from loadgen.report.words import answer

MARKUP = re.compile(r"([\\`*_{}\[\]<>|~$&])")
# What GitHub makes links of, or tells somebody of, in plain text too. A word joiner is not seen.
LINKED = ((re.compile(r"([@#])"), "\\1\u2060"), (re.compile("://"), ":\u2060//"),
          (re.compile(r"\b(www)\."), "\\1\u2060."))  # fmt: skip


def card(sweep: Sweep) -> str:
    """The sentence and the table. Pure: the same sweep gives the same text."""
    rows = [(name, value) for name, value in _rows(sweep) if value]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"{_sentence(sweep)}\n\n| | |\n| --- | --- |\n{table}\n"


def _sentence(sweep: Sweep) -> str:
    where = gpu_names(sweep)
    what = _code(sweep.target.model) or "a model"
    head = f"**{what}{f' on {_code(where)}' if where else ''}**"
    if sweep.run.simulated:
        head += " (simulated, not measured)"
    verdict = sweep.verdict
    told = verdict.summary if verdict else next(iter(answer(sweep)), "this run was not judged.")
    return f"{head}: {_prose(told.removeprefix('Simulated: '))}"


def _rows(sweep: Sweep) -> Iterable[tuple[str, str]]:
    """What is not known has no row."""
    run, best, there = sweep.run, _best(sweep.levels), _held(sweep)
    yield "Model", _code(sweep.target.model)
    yield "Engine", _code(engine_name(sweep) or "")
    yield "GPUs", _code(gpu_names(sweep))
    yield "Workload", _workload(sweep)
    yield "Most throughput", _throughput(best) if best else ""
    yield "SLO", _prose(slo_text(sweep))
    yield "SLO capacity", _capacity(sweep)
    yield ("TTFT p95, ITL p95", _latencies(there or ([best] if best else [])))
    yield "Cost", _cost(sweep, there or ([best] if best else []))
    yield "Limited by", _limit(sweep)
    yield "Validity", _validity(sweep)
    yield "Simulated", "yes: every number is the simulated engine's" if run.simulated else ""
    made = f"servefit {_prose(run.tool_version)}, {_prose(instant(run.started_at))}"
    yield "Run", f"{_code(run.id)}, {made}"


def _best(levels: Iterable[Level]) -> Level | None:
    """The valid level with the most output; where nothing is generated, the most requests."""
    sound = filter(curves.is_valid, levels)
    return max(
        (level for level in sound if level.output_tokens_per_s or level.request_throughput),
        key=lambda lv: (lv.output_tokens_per_s or 0.0, lv.request_throughput or 0.0),
        default=None,
    )


def _held(sweep: Sweep) -> Sequence[Level]:
    """The valid levels, repeats of one load, of the highest load that surely held the SLO."""
    capacity = sweep.curve.slo_capacity
    if capacity is None or capacity.lo is None:
        return ()
    return next((p.levels for p in curves.points(sweep.levels) if p.load == capacity.lo), ())


def _throughput(level: Level) -> str:
    rate, ci, unit = level.output_tokens_per_s, level.output_tokens_per_s_ci95, "output tokens/s"
    if not rate:
        rate, ci, unit = level.request_throughput, level.request_throughput_ci95, "requests/s"
    interval = f" (95 %: {number(ci[0])}{TO}{number(ci[1])})" if ci else ""
    missed = ", where the SLO was missed" if level.slo_met is False else ""
    return f"**{number(rate)} {unit}**{interval} at {_load(level)}{missed}"


def _load(level: Level) -> str:
    load = number(curves.load_of(level))
    return f"{load} requests/s offered" if curves.is_open(level) else f"concurrency {load}"


def _capacity(sweep: Sweep) -> str:
    found = sweep.curve.slo_capacity
    if found is None:
        return ""
    opened = any(map(curves.is_open, curves.of_mode(sweep.levels)))
    value, unit = (found.rps, "requests/s") if opened else (found.concurrency, "concurrent")
    if found.lo is None:
        tried = "" if found.hi is None else f"below {number(found.hi)} {unit}: "
        return f"{tried}not surely held at the lowest load that was tried"
    if not found.bracketed:
        return f"**at least {number(value)} {unit}**: it was never surely broken"
    return (
        f"**{number(value)} {unit}**, surely held at {number(found.lo)} and broken at "
        f"{number(found.hi)}"
    )


def _latencies(levels: Sequence[Level]) -> str:
    """Of repeats of a load the worse."""
    if not levels:
        return ""
    worst = [
        max((getattr(lv, name).p95 for lv in levels if getattr(lv, name).p95 is not None),
            default=None)
        for name in ("ttft_ms", "itl_ms")
    ]  # fmt: skip
    if worst == [None, None]:
        return ""
    return f"{ms(worst[0])}, {ms(worst[1])} at {_load(levels[0])}"


def _cost(sweep: Sweep, levels: Sequence[Level]) -> str:
    """At the load of the latencies; of repeats the dearer."""
    found = [one.cost_usd_per_million_output_tokens for one in levels]
    known = [usd for usd in found if usd is not None]
    if not known:
        return ""
    within = " within the SLO" if sweep.slo else ""
    return (
        f"**{number(max(known))} USD per million output tokens**{within} at {_load(levels[0])}"
        f" ({_prose(prices_text(sweep))})"
    )


def _limit(sweep: Sweep) -> str:
    code = sweep.curve.limit
    if code is None:
        return ""
    return _code(code) if named(code) == code else f"{named(code)} ({_code(code)})"


def _validity(sweep: Sweep) -> str:
    """How many levels count, and what is said of the first that does not."""
    broken = [level for level in sweep.levels if not curves.is_valid(level)]
    text = f"{len(sweep.levels) - len(broken)} of {len(sweep.levels)} levels valid"
    if broken:
        reasons = broken[0].measurement.reasons if broken[0].measurement else []
        why = reasons[0] if reasons else "no reason was recorded"
        text += f"; {_load(broken[0])}: {_prose(why)}"
    return text + (", interrupted" if sweep.run.interrupted else "")


def _workload(sweep: Sweep) -> str:
    load = sweep.workload
    lengths = f"{load.input_tokens or NOTHING} tokens in, {load.output_tokens or NOTHING} out"
    also = (("arrival", load.arrival), ("data set", load.dataset), ("trace", load.trace))
    more = "".join(f", {name} {_code(text)}" for name, text in also if text)
    prefix = f", {load.prefix_tokens:,} tokens of shared prefix" if load.prefix_tokens else ""
    turns = f", {load.turns} turns" if load.turns else ""
    return f"{_code(load.endpoint)}, {_prose(lengths)}{more}{prefix}{turns}"


# ---------------------------------------------------------------------------------------- escaping


def _code(name: str) -> str:
    """A name in a code span; the fence is longer than any run of backticks in it.

    A pipe would end the cell of a table even there: what looks like one stands for it.
    """
    text = printable(name).strip().replace("|", "\N{DIVIDES}")
    if not text:
        return ""
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _prose(text: str) -> str:
    escaped = MARKUP.sub(r"\\\1", printable(text))
    for pattern, instead in LINKED:
        escaped = pattern.sub(instead, escaped)
    return escaped
