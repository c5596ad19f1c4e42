"""Two runs beside each other as one HTML file, in the form of the report: what else differs first,
then both curves in one, what changed at each load with its interval, and in which words.

Text first, as in the report: the charts are drawn over it from the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from agent import model
from agent.model import Sweep
from agent.sizing import curve as curves
from loadgen.compare import (
    Change,
    Comparison,
    Load,
    Outcome,
    Pair,
    about_tests,
    is_better,
    limits,
)
from loadgen.report.labels import (
    NOTHING,
    TO,
    engine_name,
    gpu_names,
    instant,
    named,
    number,
    slo_text,
)
from loadgen.report.page import BADGE, CHARTS, charts, document, lead, scroll, titled

SCRIPTS = (*CHARTS, "beside.js", "report.js")

NAMES = {
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "tokens/s, prompts included",
    "request_throughput": "requests/s",
    "goodput_rps": "requests/s within the SLO",
    "ttft_ms": "TTFT",
    "ttft_from_due_ms": "TTFT from due",
    "ttfo_ms": "TTFO",
    "itl_ms": "ITL",
    "tpot_ms": "TPOT",
    "e2e_ms": "E2E",
}
# What the sentence speaks of: of each line the first that could be tested.
HEADLINES = (
    ("output_tokens_per_s", "request_throughput"),
    ("ttft_ms.p95", "ttft_ms.mean"),
    ("itl_ms.p95", "itl_ms.p50", "tpot_ms.mean"),
    ("e2e_ms.p95", "e2e_ms.mean"),
)
WORDS = ("rule", "load", "in words")  # columns that hold text
FOUND = {
    (True, True): ("Better and worse", "warn"),
    (True, False): ("B is better", "good"),
    (False, True): ("B is worse", "bad"),
    (False, False): ("No change told from noise", "neutral"),
}


def render(comparison: Comparison, a: Sweep, b: Sweep) -> str:
    """The whole page, of a comparison of these two. Pure: the same runs give the same bytes."""
    metrics = {change.metric for pair in comparison.pairs for change in pair.changes}
    data = {
        "a": json.loads(model.encode(a)),
        "b": json.loads(model.encode(b)),
        "pairs": json.loads(model.encode(comparison.pairs)),
        "names": {metric: name_of(metric) for metric in sorted(metrics)},
    }
    return document(f"servefit: {_title(a, b)}", _body(comparison, a, b), data, SCRIPTS)


def _body(comparison: Comparison, a: Sweep, b: Sweep) -> str:
    return "\n".join(
        (
            _header(a, b),
            _found(comparison),
            f'<div class="pair">{_differences(comparison)}{_runs(a, b)}</div>',
            lead(),
            titled("change", "What changed, with 95 % intervals", charts("change")),
            titled("latency", "Latency", charts("latency")),
            _gate(comparison.gate),
            _tables(comparison),
            _commands(a, b),
            f"<footer>servefit {escape(b.run.tool_version)}, runs {escape(a.run.id)} and "
            f"{escape(b.run.id)}. {escape(about_tests(comparison))}</footer>",
        )
    )


def name_of(metric: str) -> str:
    """`ttft_ms.p95` as `TTFT p95`."""
    group, _, statistic = metric.partition(".")
    return f"{NAMES.get(group, group)} {statistic}".strip()


# ----------------------------------------------------------------------------------- the first view


def _title(a: Sweep, b: Sweep) -> str:
    names = dict.fromkeys(one.target.model for one in (a, b))
    return " and ".join(names) + (", two runs" if len(names) == 1 else "")


def _header(a: Sweep, b: Sweep) -> str:
    simulated = BADGE if a.run.simulated or b.run.simulated else ""
    return (
        f'<header><span class="brand">servefit</span><h1><b>{escape(_title(a, b))}</b>'
        f"</h1>{simulated}</header>"
    )


def _found(comparison: Comparison) -> str:
    judged = [is_better(change) for pair in comparison.pairs for change in pair.changes]
    name, tone = FOUND[(True in judged, False in judged)]
    if not comparison.tests:
        name, tone = "Nothing could be tested", "neutral"
    return (
        f'<section class="card verdict {tone}" aria-label="What was found">'
        f'<span class="pill finding">{name}</span>'
        f'<p class="sentence">{escape(sentence(comparison))}</p>'
        f'<p class="sure">{escape(" ".join(_sure(judged, comparison)))}</p></section>'
    )


def sentence(comparison: Comparison) -> str:
    """What B does more or less than A, of the few figures that are looked at first."""
    if not any(pair.changes for pair in comparison.pairs):
        return "No load has a valid level in both runs: there is nothing to compare."
    told = [text for metrics in HEADLINES if (text := _headline(comparison.pairs, metrics))]
    return f"In B {'; '.join(told)}." if told else "Neither throughput nor latency is in both runs."


def _headline(pairs: Sequence[Pair], metrics: Sequence[str]) -> str:
    """`output tokens/s is 7.9 to 9.1 % lower at 2 of 3 loads`."""
    for metric in metrics:
        found = [
            c for pair in pairs for c in pair.changes if c.metric == metric and c.p is not None
        ]
        if found:
            return f"{name_of(metric)} {_moved(found)}"
    return ""


def _moved(found: Sequence[Change]) -> str:
    told = [one.change_percent for one in found if one.distinguishable and one.change_percent]
    if not told:
        return "is not told from A's"
    ways = (
        ("higher", [one for one in told if one > 0]),
        ("lower", [-one for one in told if one < 0]),
    )
    parts = [f"{_span(sizes)} % {way}{_at(len(sizes), len(found))}" for way, sizes in ways if sizes]
    return f"is {' and '.join(parts)}"


def _span(sizes: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{size:.1f}" for size in (min(sizes), max(sizes))))


def _at(some: int, all_: int) -> str:
    if all_ == 1:
        return ""
    return f" at {f'all {all_}' if some == all_ else f'{some} of {all_}'} loads"


def _sure(judged: Sequence[bool | None], comparison: Comparison) -> Iterator[str]:
    """How far the sentence can be relied on."""
    better, worse = judged.count(True), judged.count(False)
    yield (
        f"Of {comparison.tests} figures tested {better} are better and {worse} worse, the others "
        "are not told from noise."
    )
    yield from limits(comparison)


# ------------------------------------------------------------------------------- what they are


def _differences(comparison: Comparison) -> str:
    """First of all: a change is of what differs, and only one thing should."""
    rows = [(one.what, one.a, one.b) for one in comparison.differences]
    inside = (
        _sides("what differs", rows)
        if rows
        else '<p class="note">Nothing that the runs know of: model, engine, version, GPUs, the'
        " server's settings, SLO and workload are the same.</p>"
    )
    return titled("differs", "What differs besides", inside)


def _sides(name: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """A table of what A and B are."""
    told = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td class="text">{escape(a)}</td>'
        f'<td class="text">{escape(b)}</td></tr>'
        for what, a, b in rows
    )
    return scroll(
        name,
        '<table class="named sides"><thead><tr><td></td><th scope="col" class="run-a">A</th>'
        f'<th scope="col" class="run-b">B</th></tr></thead><tbody>{told}</tbody></table>',
    )


def _runs(a: Sweep, b: Sweep) -> str:
    facts = [_facts(a), _facts(b)]
    rows = [(name, facts[0][name], facts[1][name]) for name in facts[0]]
    known = [row for row in rows if row[1:] != (NOTHING, NOTHING)]
    return titled("runs", "The two runs", _sides("the two runs", known))


def _facts(sweep: Sweep) -> dict[str, str]:
    found = {
        "run": sweep.run.id,
        "started": instant(sweep.run.started_at),
        "model": sweep.target.model,
        "engine": engine_name(sweep),
        "GPUs": gpu_names(sweep),
        "target": sweep.target.url,
        "SLO": slo_text(sweep),
        "SLO capacity": _capacity(sweep),
        "knee": _knee(sweep),
        "limited by": named(sweep.curve.limit),
        "valid levels": f"{sum(map(curves.is_valid, sweep.levels))} of {len(sweep.levels)}",
    }
    return {name: value or NOTHING for name, value in found.items()}


def _capacity(sweep: Sweep) -> str:
    found = sweep.curve.slo_capacity
    if found is None:
        return ""
    value = found.rps if _is_open(sweep) else found.concurrency
    if found.lo is None:
        below = "" if found.hi is None else f"below {number(found.hi)}"
        return below if value is None else f"not surely {number(value)}, {below}".rstrip(", ")
    if not found.bracketed:
        return f"at least {number(value)}"
    return f"{number(value)} ({number(found.lo)}{TO}{number(found.hi)})"


def _is_open(sweep: Sweep) -> bool:
    return any(map(curves.is_open, curves.of_mode(sweep.levels)))


def _knee(sweep: Sweep) -> str:
    knee = sweep.curve.knee
    if knee is None:
        return ""
    rising = "" if sweep.curve.saturated else "≥ "
    return f"{rising}{number(knee.concurrency)}, {number(knee.output_tokens_per_s)} tokens/s"


# --------------------------------------------------------------------------------- gate and tables


def _gate(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(one.rule)}</th><td class="text">{escape(_load(one))}</td>'
        f"<td>{_percent(one.change_percent)}</td><td>{_p(one.p_adjusted)}</td>"
        f'<td class="text">{_outcome(one)}</td></tr>'
        for one in outcomes
    )
    head = _head("rule", "load", "change", "p, of the gate", "in words")
    return titled(
        "gate",
        "The gate",
        scroll("the gate", f'<table class="named">{head}<tbody>{rows}</tbody></table>'),
    )


def _outcome(one: Outcome) -> str:
    said = {True: '<b class="missed">missed</b>', False: '<span class="met">held</span>',
            None: "not decided"}[one.missed]  # fmt: skip
    return said + (f": {escape(one.note)}" if one.note else "")


def _tables(comparison: Comparison) -> str:
    """Every figure of every load: the charts' alternative in numbers and words."""
    tables = "".join(_table(pair, open_=i == 0) for i, pair in enumerate(comparison.pairs))
    only = "".join(_only(*one) for one in (("A", comparison.only_a), ("B", comparison.only_b)))
    return titled("levels", "All figures, load by load", tables + only)


def _only(name: str, loads: Sequence[Load]) -> str:
    if not loads:
        return ""
    return f'<p class="note">Only in {name}: {escape(", ".join(map(_load, loads)))}.</p>'


def _table(pair: Pair, *, open_: bool) -> str:
    a, b = pair.repeats
    repeats = "" if (a, b) == (1, 1) else f", {a} valid levels in A and {b} in B"
    remarks = "".join(
        f'<p class="note"><b class="badge bad">not valid</b> {escape(why)}</p>'
        for why in pair.invalid
    )
    inside = remarks
    if pair.changes:
        rows = "".join(map(_row, pair.changes))
        head = _head("", "A", "B", "change", "95 % interval", "p adjusted", "in words")
        inside += scroll(
            escape(_load(pair)), f'<table class="named">{head}<tbody>{rows}</tbody></table>'
        )
    return (
        f'<details class="card load"{" open" if open_ else ""}>'
        f"<summary>{escape(_load(pair))}{repeats}: {_count(pair)}</summary>{inside}</details>"
    )


def _count(pair: Pair) -> str:
    judged = [is_better(change) for change in pair.changes]
    if not judged:
        return "not valid in both"
    parts = [(judged.count(True), "better"), (judged.count(False), "worse")]
    return ", ".join(f"{n} {word}" for n, word in parts if n) or "nothing told from noise"


def _head(*names: str) -> str:
    cells = (f'<th scope="col"{_left(name)}>{name}</th>' if name else "<td></td>" for name in names)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _left(name: str) -> str:
    return ' class="text"' if name in WORDS else ""


def _row(change: Change) -> str:
    unit = ", ms" if "_ms" in change.metric else ""
    numbers = (number(change.a), number(change.b), _percent(change.change_percent),
               _interval(change), _p(change.p_adjusted))  # fmt: skip
    cells = "".join(f"<td>{text}</td>" for text in numbers)
    return (
        f'<tr><th scope="row">{escape(name_of(change.metric))}{unit}</th>{cells}'
        f'<td class="text">{_words(change)}</td></tr>'
    )


def _words(change: Change) -> str:
    if change.note:
        return escape(change.note)
    return {True: '<span class="met">better</span>', False: '<span class="missed">worse</span>',
            None: "not told from noise"}[is_better(change)]  # fmt: skip


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{_signed(value)} %"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def _interval(change: Change) -> str:
    ends = change.ci95_percent
    return NOTHING if ends is None else f"{_signed(ends[0])} to {_signed(ends[1])} %"


def _p(p: float | None) -> str:
    return NOTHING if p is None else "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


def _load(one: Pair | Load | Outcome) -> str:
    what = "requests/s offered" if one.mode == "rate" else "concurrent"
    return f"{number(one.load)} {what}"


def _commands(a: Sweep, b: Sweep) -> str:
    blocks = "".join(
        f'<div class="card command"><b>{name}</b><pre><code>{escape(sweep.run.command)}</code>'
        f'</pre><button type="button" aria-label="Copy the command of {name}">Copy</button></div>'
        for name, sweep in (("A", a), ("B", b))
        if sweep.run.command
    )
    return titled("repeat", "Repeat them", blocks) if blocks else ""
