"""A sweep as one HTML file that opens with no network: verdict, curve, details, how to repeat it.

The page is text first: verdict, table and facts are written here, so that they can be read where
no script runs; the charts are drawn over them from the same numbers, embedded as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from agent import model
from agent.forms import costs
from agent.model import Level, Stats, Sweep, Verdict
from agent.terms import FINDINGS, REASONS
from agent.words import offer_lines
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
from loadgen.report.page import (
    BADGE,
    CHARTS,
    charts,
    document,
    lead,
    pairs,
    percent,
    scroll,
    titled,
    value_text,
)

SCRIPTS = (*CHARTS, "report.js")
TOLD = ("said", "here", "candidates")  # parts of a verdict that have a place of their own


def render(sweep: Sweep) -> str:
    """The whole report. Pure: the same sweep gives the same bytes."""
    data = {"sweep": json.loads(model.encode(sweep)), "labels": REASONS}
    return document(f"servefit: {sweep.target.model}", _body(sweep), data, SCRIPTS)


def _body(sweep: Sweep) -> str:
    return "\n".join(
        (
            _header(sweep),
            _verdict(sweep),
            _tiles(sweep),
            _lead(sweep),
            _section("latency", "Latency", _latency_note(sweep)),
            _section("server", "What the server said", _server_note(sweep)),
            _section("energy", "Power and energy", _gpu_note(sweep)),
            _table(sweep),
            _worth(sweep.verdict),
            _facts(sweep),
            _grounds(sweep.verdict),
            _command(sweep),
            f"<footer>servefit {escape(sweep.run.tool_version)}, run {escape(sweep.run.id)}. "
            "Times in ms unless said otherwise; intervals are 95 %.</footer>",
        )
    )


# ----------------------------------------------------------------------------------- the first view


def _header(sweep: Sweep) -> str:
    gpus = gpu_names(sweep)
    badges = (BADGE if sweep.run.simulated else "") + (
        ' <span class="badge warn">interrupted</span>' if sweep.run.interrupted else ""
    )
    where = f" on {escape(gpus)}" if gpus else f" at {escape(sweep.target.url)}"
    started = escape(sweep.run.started_at)
    return (
        f'<header><span class="brand">servefit</span><h1><b>{escape(sweep.target.model)}</b>'
        f"{where}</h1>{badges}"
        f'<time class="when" datetime="{started}">{escape(instant(sweep.run.started_at))}</time>'
        "</header>"
    )


def _verdict(sweep: Sweep) -> str:
    verdict = sweep.verdict
    if verdict is None:
        return (
            '<section class="card verdict neutral" aria-label="Verdict">'
            '<p class="sentence">No verdict: this run was not judged.</p></section>'
        )
    name, tone = FINDINGS.get(verdict.finding, (verdict.finding, "neutral"))
    sure = verdict.confidence
    limited = f", limited by {escape(sure.limited_by)}" if sure.limited_by else ""
    since = f" · since {escape(instant(verdict.since))}" if verdict.since else ""
    return (
        f'<section class="card verdict {tone}" aria-label="Verdict">'
        f'<span class="pill finding">{escape(name)}</span> '
        f'<code class="note">{escape(verdict.finding)}</code>{_qualifier(verdict)}'
        f'<p class="sentence">{escape(verdict.summary)}</p>'
        f'<p class="sure">Confidence <b>{escape(sure.level)}</b>{limited}{since}</p></section>'
    )


def _qualifier(verdict: Verdict) -> str:
    if not verdict.qualifier:
        return ""
    return f' <span class="pill warn">{escape(value_text(verdict.qualifier))}</span>'


def _tile(label: str, value: str, unit: str = "", sub: str = "") -> str:
    kind = "" if value[-1:].isdigit() or value.endswith("%") else ' class="word"'
    of = f' <span class="of">{escape(unit)}</span>' if unit else ""
    under = f'<dd class="sub">{escape(sub)}</dd>' if sub else ""
    return f"<div><dt>{escape(label)}</dt><dd{kind}>{escape(value)}{of}</dd>{under}</div>"


def _tiles(sweep: Sweep) -> str:
    """The few numbers that decide; only those that are known."""
    tiles = [tile for make in TILES if (tile := make(sweep))]
    return f'<dl class="card tiles">{"".join(tiles)}</dl>' if tiles else ""


def _valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid


def _most(levels: Iterable[Level]) -> Level | None:
    return max(filter(_valid, levels), key=_throughput, default=None)


def _throughput(level: Level) -> tuple[float, float]:
    """Output tokens/s; where there are none, as with embeddings, requests/s decide."""
    return level.output_tokens_per_s or 0.0, level.request_throughput or 0.0


def _working(sweep: Sweep) -> Level | None:
    """The level one would run at: the most output that keeps the SLO, or the most there is."""
    return _most(lv for lv in sweep.levels if lv.slo_met is not False) or _most(sweep.levels)


def _open_loop(sweep: Sweep) -> bool:
    """Is the axis of the charts a rate? The mode of most valid levels (else of all) decides."""
    sound = [level for level in sweep.levels if _valid(level)] or sweep.levels
    return 2 * sum(map(_is_open, sound)) > len(sound)


def _is_open(level: Level) -> bool:
    return level.mode == "rate" or level.concurrency is None


def _offered(level: Level) -> float | None:
    """The load in the unit of its mode."""
    return level.offered_rps if _is_open(level) else level.concurrency


def _load(level: Level) -> str:
    shown = number(_offered(level))
    return f"{shown} requests/s" if _is_open(level) else f"concurrency {shown}"


def _tile_best(sweep: Sweep) -> str:
    best = _most(sweep.levels)
    if best is None or not any(_throughput(best)):
        return ""
    sub = f"at {_load(best)}" + (", SLO missed" if best.slo_met is False else "")
    if best.output_tokens_per_s:
        return _tile("Most output", number(best.output_tokens_per_s), "tokens/s", sub)
    return _tile("Most answered", number(best.request_throughput), "requests/s", sub)


def _tile_knee(sweep: Sweep) -> str:
    """In an open loop the knee is named by the rate that was offered there, as in the chart."""
    knee = sweep.curve.knee
    if knee is None:
        return ""
    rising = "" if sweep.curve.saturated else "≥ "
    sub = "not yet saturated" if rising else "more load adds under 5 %"
    if knee.output_tokens_per_s:
        sub = f"{number(knee.output_tokens_per_s)} tokens/s; {sub}"
    if not _open_loop(sweep):
        return _tile("Knee", rising + number(knee.concurrency), "concurrent", sub)
    wanted = knee.output_tokens_per_s
    valid = filter(_valid, sweep.levels)
    offered = [lv for lv in valid if lv.offered_rps and lv.output_tokens_per_s]
    at = min(offered, key=lambda lv: abs((lv.output_tokens_per_s or 0.0) - wanted), default=None)
    return _tile("Knee", rising + number(at.offered_rps if at else None), "requests/s", sub)


def _tile_capacity(sweep: Sweep) -> str:
    capacity = sweep.curve.slo_capacity
    if capacity is None:
        return ""
    unit = "requests/s" if _open_loop(sweep) else "concurrent"
    value = capacity.rps if _open_loop(sweep) else capacity.concurrency
    if capacity.lo is None:
        first = "broken" if value is None else "too close to call"
        sub = f"{first} at the lowest load that was tried"
        text = "–" if capacity.hi is None else f"< {number(capacity.hi)}"
        return _tile("SLO capacity", text, unit, sub)
    if capacity.bracketed:
        sub = f"between {number(capacity.lo)} and {number(capacity.hi)}"
        return _tile("SLO capacity", number(value), unit, sub)
    sub = "a lower bound: the SLO was never broken"
    return _tile("SLO capacity", f"≥ {number(value)}", unit, sub)


def _tile_limit(sweep: Sweep) -> str:
    code = sweep.curve.limit
    return _tile("Limited by", named(code), sub=code or "") if code else ""


def _tile_ratio(sweep: Sweep) -> str:
    ratio = sweep.verdict.ratio if sweep.verdict else None
    if ratio is None:
        return ""
    known = ratio.lo is not None and ratio.hi is not None
    sub = f"95 %: {percent(ratio.lo)}{TO}{percent(ratio.hi)}" if known else ""
    return _tile("Demand of capacity", percent(ratio.value), sub=sub)


def _tile_energy(sweep: Sweep) -> str:
    best = _working(sweep)
    if best is None or best.energy_j_per_output_token is None:
        return ""
    value = number(best.energy_j_per_output_token)
    return _tile("Energy", value, "J/token", f"at {_load(best)}")


def _tile_cost(sweep: Sweep) -> str:
    best = _working(sweep)
    if best is None or best.cost_usd_per_million_output_tokens is None:
        return ""
    value = number(best.cost_usd_per_million_output_tokens)
    return _tile("Cost", value, "USD/M tokens", f"at {_load(best)}, indicative")


TILES = (
    _tile_ratio,
    _tile_capacity,
    _tile_knee,
    _tile_best,
    _tile_limit,
    _tile_energy,
    _tile_cost,
)


def _lead(sweep: Sweep) -> str:
    """The curve, and beside it why the verdict says what it says."""
    return lead(_why(sweep.verdict) if sweep.verdict else "")


def _why(verdict: Verdict) -> str:
    parts = (
        _block("Why", [_reason(reason) for reason in verdict.reasons]),
        _recommendation(verdict),
        _block("Rests on", map(escape, verdict.rests_on), "plain"),
        _block("Missing", map(_prose, verdict.missing), "plain"),
    )
    inside = "".join(parts)
    return f'<aside class="card why" aria-label="Reasons">{inside}</aside>' if inside else ""


def _block(title: str, items: Iterable[str], kind: str = "") -> str:
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f'<h2>{title}</h2><ul class="{kind}">{listed}</ul>' if listed else ""


def _prose(text: str) -> str:
    """Commands that stand between backticks as what they are."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _reason(reason: model.Reason) -> str:
    named = escape(REASONS.get(reason.code, reason.code))
    facts = "".join(
        f"<div><dt>{escape(key.replace('_', ' '))}</dt> <dd>{escape(value_text(value))}</dd></div>"
        for key, value in reason.evidence.items()
    )
    evidence = (
        f'<details><summary>evidence</summary><dl class="evidence">{facts}</dl></details>'
        if facts
        else ""
    )
    code = escape(reason.code)
    return f'<span class="pill" title="{code}">{named}</span>{escape(reason.because)}{evidence}'


def _recommendation(verdict: Verdict) -> str:
    advice = verdict.recommendation
    if advice is None:
        return ""
    lines = offer_lines(verdict)
    lines += [f"overturned by: {advice.overturned_by}"] if advice.overturned_by else []
    rest = "".join(f"<p>{escape(line[0].upper() + line[1:])}</p>" for line in lines)
    confirm = advice.confirm_with
    check = f"<p>Confirm with <code>{escape(confirm)}</code></p>" if confirm else ""
    return f"<h2>Recommendation</h2><p><b>{escape(advice.action)}</b></p>{rest}{check}"


# ------------------------------------------------------------------------------- sections of charts


def _section(name: str, title: str, note: str | None) -> str:
    """Either the place of the charts, or the one line that says why there are none."""
    inside = f'<p class="note">{escape(note)}</p>' if note else charts(name)
    return titled(name, title, inside)


def _latency_note(sweep: Sweep) -> str | None:
    if any(stats.n or stats.mean is not None for lv in sweep.levels for stats in _latencies(lv)):
        return None
    return "No latency was measured at any level."


def _latencies(level: Level) -> tuple[Stats, ...]:
    return level.ttft_ms, level.itl_ms, level.e2e_ms


def _server_note(sweep: Sweep) -> str | None:
    if any(level.server is not None for level in sweep.levels):
        return None
    return sweep.target.server_note or "The server's own metrics were not read."


def _gpu_note(sweep: Sweep) -> str | None:
    powered = any(g.power_w_mean is not None for lv in sweep.levels for g in lv.gpu)
    if powered or any(lv.energy_j_per_output_token is not None for lv in sweep.levels):
        return None
    return sweep.target.gpu_note or "The GPU's power was not read."


# ------------------------------------------------------------------------------ the table of levels


class Column(NamedTuple):
    """One column: its group, its name under it, and what it shows of a level."""

    group: str
    name: str
    show: Callable[[Level], str]


def _stat(metric: str, statistic: str) -> Callable[[Level], str]:
    def show(level: Level) -> str:
        return number(getattr(getattr(level, f"{metric}_ms"), statistic))

    return show


def _of_server(field: str, shown: Callable[[Any], str] = number) -> Callable[[Level], str]:
    def show(level: Level) -> str:
        return shown(getattr(level.server, field)) if level.server else NOTHING

    return show


def _interval(level: Level) -> str:
    """The two ends of the 95 % interval of the output rate."""
    ci = level.output_tokens_per_s_ci95
    return f"{number(ci[0])}{TO}{number(ci[1])}" if ci else NOTHING


def _met(level: Level) -> str:
    return {True: "met", False: "missed", None: NOTHING}[level.slo_met]


def _requests(level: Level) -> str:
    return number(level.requests.ok) if level.requests else NOTHING


def _failed(level: Level) -> str:
    return number(level.requests.failed) if level.requests else NOTHING


def _watts(level: Level) -> str:
    read = [gpu.power_w_mean for gpu in level.gpu]
    known = [watts for watts in read if watts is not None]
    return number(sum(known)) if known and len(known) == len(read) else NOTHING


COLUMNS = (
    Column("Output tokens/s", "", lambda lv: number(lv.output_tokens_per_s)),
    Column("Output tokens/s", "95 %", _interval),
    Column("Requests", "per s", lambda lv: number(lv.request_throughput)),
    Column("Requests", "ok", _requests),
    Column("Requests", "failed", _failed),
    Column("SLO", "", _met),
    Column("SLO", "attained", lambda lv: percent(lv.slo_attainment)),
    *(
        Column(title, stat, _stat(metric, stat))
        for metric, title in (("ttft", "TTFT, ms"), ("itl", "ITL, ms"), ("e2e", "E2E, ms"))
        for stat in ("p50", "p95", "p99")
    ),
    Column("Server", "running", _of_server("running_mean")),
    Column("Server", "waiting", _of_server("waiting_mean")),
    Column("Server", "KV max", _of_server("kv_usage_max", percent)),
    Column("Server", "preempt.", _of_server("preemptions")),
    Column("Power", "W", _watts),
    Column("Power", "J/token", lambda lv: number(lv.energy_j_per_output_token)),
    Column("Cost", "USD/M", lambda lv: number(lv.cost_usd_per_million_output_tokens)),
)


def _table(sweep: Sweep) -> str:
    """Every level, valid or not: the charts' alternative in words and numbers."""
    columns = [c for c in COLUMNS if any(c.show(lv) != NOTHING for lv in sweep.levels)]
    known = _common(sweep)
    rows = "".join(_row(level, columns, known) for level in sweep.levels)
    badge = f" {BADGE}" if sweep.run.simulated else ""
    wide = ' class="wide"' if len(columns) > 8 else ""
    table = (
        f"<table{wide}><caption><span>{_caption(sweep)}{badge}</span></caption>"
        f"<thead>{_head(sweep, columns)}</thead><tbody>{rows}</tbody></table>"
    )
    return titled("levels", "All levels", scroll("all levels", table))


def _caption(sweep: Sweep) -> str:
    bad = sum(not _valid(level) for level in sweep.levels)
    text = f"{len(sweep.levels)} load point" + ("" if len(sweep.levels) == 1 else "s")
    if bad:
        text += f", {bad} not valid: shown, but no part of the curve"
    text += f". SLO: {slo_text(sweep)}." if sweep.slo else "."
    if prices := prices_text(sweep):
        within = " within the SLO" if sweep.slo else ""
        text += f" USD/M: per million output tokens{within}; {prices}."
    return escape(" ".join((text, *(f"At every level: {note}." for note in _common(sweep)))))


def _common(sweep: Sweep) -> list[str]:
    """What is to be said of every level alike, so that it is said once."""
    reasons = [level.measurement.reasons if level.measurement else [] for level in sweep.levels]
    if len(reasons) < 2 or not all(map(_valid, sweep.levels)):
        return []
    return [note for note in reasons[0] if all(note in others for others in reasons)]


def _head(sweep: Sweep, columns: Sequence[Column]) -> str:
    groups = list(dict.fromkeys(column.group for column in columns))
    sizes = {group: sum(c.group == group for c in columns) for group in groups}
    top = "".join(
        f'<th class="group" scope="colgroup" colspan="{sizes[g]}">{escape(g)}</th>' for g in groups
    )
    names = "".join(
        f'<th scope="col"{_first(columns, i)}>{escape(c.name or _value_name(c))}</th>'
        for i, c in enumerate(columns)
    )
    load = escape(_load_name(sweep))
    return f'<tr><th scope="col" rowspan="2">{load}</th>{top}</tr><tr>{names}</tr>'


def _value_name(column: Column) -> str:
    return "met" if column.group == "SLO" else "mean"


def _load_name(sweep: Sweep) -> str:
    modes = {_is_open(level) for level in sweep.levels}
    if len(modes) != 1:
        return "Load"
    return "Offered/s" if modes.pop() else "Concurrency"


def _first(columns: Sequence[Column], index: int) -> str:
    new = index == 0 or columns[index - 1].group != columns[index].group
    return ' class="first"' if new else ""


def _row(level: Level, columns: Sequence[Column], known: Sequence[str]) -> str:
    valid = _valid(level)
    load = number(_offered(level))
    cells = "".join(_cell(level, columns, i) for i in range(len(columns)))
    kind = "" if valid else ' class="invalid"'
    return (
        f'<tr{kind}><th scope="row">{load}</th>{cells}</tr>{_under(level, known, len(columns) + 1)}'
    )


def _under(level: Level, known: Sequence[str], width: int) -> str:
    """A second row for what is to be said of a level in words."""
    tag = "" if _valid(level) else '<b class="badge bad">not valid</b> '
    remark = escape(_remark(level, known))
    if not tag and not remark:
        return ""
    return f'<tr><td class="remark" colspan="{width}"><span>{tag}{remark}</span></td></tr>'


def _cell(level: Level, columns: Sequence[Column], index: int) -> str:
    shown = escape(columns[index].show(level))
    colored = f'<span class="{shown}">{shown}</span>' if shown in ("met", "missed") else shown
    return f"<td{_first(columns, index)}>{colored}</td>"


def _remark(level: Level, known: Sequence[str]) -> str:
    """Why a level is not valid or what else should be known of it, and its errors by kind."""
    reasons = level.measurement.reasons if level.measurement else []
    notes = [note for note in reasons if note not in known]
    if not _valid(level) and not notes:
        notes = ["no reason was recorded"]
    if level.requests and level.requests.errors:
        kinds = sorted(level.requests.errors.items())
        notes.append("errors: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds))
    return "; ".join(notes)


# ---------------------------------------------------------------------------------- run and command


def _achieved(sweep: Sweep, pick: Callable[[Level], Stats]) -> float | None:
    """Mean tokens per request over all levels, as the server counted them."""
    known = [(s.mean, s.n) for s in map(pick, sweep.levels) if s.mean is not None and s.n]
    total = sum(n for _, n in known)
    return sum(mean * n for mean, n in known) / total if total else None


def _lengths(asked: int | str, achieved: float | None) -> str:
    return f"{asked} asked" + (f", {number(achieved)} measured on average" if achieved else "")


def _workload(sweep: Sweep) -> list[tuple[str, str | None]]:
    load = sweep.workload
    sources = dict.fromkeys(level.tokens.source for level in sweep.levels if level.tokens)
    return [
        ("Endpoint", load.endpoint + ("" if load.stream else ", not streamed")),
        ("Input tokens", _lengths(load.input_tokens, _achieved(sweep, lambda v: v.prompt_tokens))),
        (
            "Output tokens",
            _lengths(load.output_tokens, _achieved(sweep, lambda v: v.output_tokens)),
        ),
        ("Tokens counted by", ", ".join(sources) or None),
        ("Arrival", load.arrival),
        ("Data set", load.dataset),
        ("Trace", load.trace),
        ("Shared prefix", f"{load.prefix_tokens:,} tokens" if load.prefix_tokens else None),
        ("Turns", str(load.turns) if load.turns else None),
    ]


def _overhead(sweep: Sweep) -> str:
    spent = sweep.run.overhead
    return (
        f"probes {spent.probe_requests:,} requests, {spent.probe_tokens:,} tokens; "
        f"warm-up {spent.warmup_requests:,} requests, {spent.warmup_tokens:,} tokens"
    )


def _memory(sweep: Sweep) -> str:
    sizes = {g.memory_total_bytes for g in sweep.target.gpus if g.memory_total_bytes}
    return ", ".join(f"{size / 2**30:.0f} GiB each" for size in sorted(sizes))


def _gpu_fact(sweep: Sweep) -> str | None:
    gpus = gpu_names(sweep)
    return (f"{gpus}, {_memory(sweep)}" if _memory(sweep) else gpus) if gpus else None


def _facts(sweep: Sweep) -> str:
    run, target = sweep.run, sweep.target
    known: list[tuple[str, str | None]] = [
        ("Target", target.url),
        ("Model", target.model),
        ("Engine", engine_name(sweep)),
        ("GPUs", _gpu_fact(sweep)),
        *_workload(sweep),
        ("SLO", slo_text(sweep) or "none"),
        ("Seed", str(run.seed)),
        ("Run", run.id),
        ("Started", instant(run.started_at)),
        ("Load generator", f"servefit {run.tool_version} on {run.host}"),
        ("Besides the levels", _overhead(sweep)),
        ("Fingerprint", target.fingerprint),
    ]
    return (
        '<section aria-labelledby="h-run"><h2 id="h-run">The run</h2>'
        f'<dl class="card facts">{pairs(known)}</dl></section>'
    )


def _worth(verdict: Verdict | None) -> str:
    """Money, the three questions, and what else would hold the load by prediction; only of
    hardware that is known by name."""
    if verdict is None or "gpu" not in verdict.cost:
        return ""
    rows = [(name, text) for name, text in costs(verdict) if text]
    said = _block("The three questions", map(escape, verdict.questions.get("said", ())), "plain")
    inside = f'<dl class="card facts">{pairs(rows)}</dl>{_candidates(verdict)}'
    questions = f'<div class="card why">{said}</div>' if said else ""
    return titled("worth", "What it costs, and what else would do", questions + inside)


def _candidates(verdict: Verdict) -> str:
    rows = "".join(map(_candidate, verdict.cost.get("candidates", ())))
    if not rows:
        return ""
    names = ("configuration", "tokens/s", "ms a token", "USD a month", "saving", "a step to")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return scroll(
        "candidates",
        '<table class="named"><caption>By prediction from this sweep, nine of ten within the'
        " ends; a candidate to test, no measurement.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
    )


def _candidate(one: Mapping[str, Any]) -> str:
    saving = one.get("saving")
    cells = (
        _ends(one["output_tokens_per_s"], "lo90", "hi90"),
        _ends(one["tpot_ms"], "lo90", "hi90"),
        _ends(one.get("usd_per_month"), "low", "high"),
        NOTHING if saving is None else f"{percent(saving[0])}{TO}{percent(saving[1])}",
        ", ".join(one.get("steps", ())) or "other flags",
    )
    told = "".join(f"<td>{escape(text)}</td>" for text in cells)
    return f'<tr><th scope="row">{escape(one["configuration"])}</th>{told}</tr>'


def _ends(interval: Mapping[str, float | None] | None, low: str, high: str) -> str:
    if interval is None:
        return NOTHING
    return f"{number(interval[low])}{TO}{number(interval[high])}"


def _grounds(verdict: Verdict | None) -> str:
    """What else the verdict carries, folded away: its inputs, for whoever wants to check it."""
    if verdict is None:
        return ""
    names = ("demand", "capacity", "stability", "questions", "energy", "cost")
    groups = [(name, getattr(verdict, name)) for name in names]
    known = [
        (f"{name}: {key}".replace("_", " "), value_text(value))
        for name, group in groups
        for key, value in group.items()
        if key not in TOLD
    ]
    if not known:
        return ""
    return (
        '<details class="card"><summary>What the verdict was computed from</summary>'
        f'<dl class="facts">{pairs(known)}</dl></details>'
    )


def _command(sweep: Sweep) -> str:
    code = f'<pre><code id="command">{escape(sweep.run.command)}</code></pre>'
    inside = f'{code}<button type="button" id="copy">Copy</button>'
    return titled("repeat", "Repeat it", f'<div class="card command">{inside}</div>')
