"""What a person at a terminal reads in the end: tables, the verdict, the comparison."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from agent.model import Level, Sweep
from agent.words import ms, number, printable, verdict_lines

if TYPE_CHECKING:
    from rich.table import Table

    from loadgen.calibrate import Result, Trial
    from loadgen.compare import Change, Comparison, Outcome, Pair, Which

UNBOUNDED = 1_000  # columns of a file


def _columns(out: TextIO) -> int:
    try:
        return max(20, os.get_terminal_size(out.fileno()).columns)
    except (OSError, ValueError):
        return 80


# -------------------------------------------------------------------------------------- the words


def load_text(mode: str, load: float) -> str:
    if mode == "rate":
        return f"{load:g} requests/s"
    return f"{load:.0f} stream{'s' if load != 1 else ''}"


def level_line(level: Level) -> str:
    """One level in one line."""
    return " · ".join(level_parts(level))


def level_parts(level: Level) -> list[str]:
    """What there is to say of a level that has ended, the rate first."""
    rate, unit = _rate(level)
    parts = [f"{number(rate)} {unit}{_plus_minus(level)}"]
    if level.ttft_ms.n:
        parts.append(f"TTFT p50 {ms(level.ttft_ms.p50)} p95 {ms(level.ttft_ms.p95)}")
    if level.itl_ms.n:
        parts.append(f"ITL p50 {ms(level.itl_ms.p50)} p95 {ms(level.itl_ms.p95)}")
    if level.e2e_ms.n and not level.ttft_ms.n:
        parts.append(f"E2E p50 {ms(level.e2e_ms.p50)} p95 {ms(level.e2e_ms.p95)}")
    if level.requests:
        parts.append(f"{level.requests.ok} ok")
        parts += [f"{n} {kind}" for kind, n in sorted(level.requests.errors.items())]
        if level.requests.cancelled:
            parts.append(f"{level.requests.cancelled} cancelled")
    if level.measurement and not level.measurement.valid:
        parts.append("INVALID: " + _decides(level))
    return parts


def _rate(level: Level) -> tuple[float | None, str]:
    """The throughput and its unit: requests where nothing is generated, as of embeddings."""
    if level.output_tokens_per_s is None and level.request_throughput is not None:
        return level.request_throughput, "req/s"
    return level.output_tokens_per_s, "tok/s"


def _plus_minus(level: Level) -> str:
    rate, unit = _rate(level)
    interval = level.request_throughput_ci95 if unit == "req/s" else level.output_tokens_per_s_ci95
    if interval is None or not rate:
        return ""
    return f" ±{(interval[1] - interval[0]) / 2 / rate:.0%}"


# -------------------------------------------------------------------------------------- the table


def show(sweep: Sweep, out: TextIO | None = None) -> None:
    """Prints the closing table, the answer in plain words and the verdict."""
    from loadgen.report import words

    file = out or sys.stdout
    width = _width_of(file)
    blocks = [_wrapped(heading(sweep), width)]
    if sweep.levels:
        blocks.append(_drawn(level_table(sweep, width), file, width))
    blocks += [
        [line for text in said for line in _wrapped(text, width)]
        for said in (invalid_lines(sweep), words.answer(sweep))
    ]
    if sweep.verdict is not None:
        first, *rest = verdict_lines(sweep.verdict, action=not words.action_is_told(sweep))
        inset = [line for text in rest for line in _wrapped(text, width, indent="  ")]
        blocks.append([*_wrapped(first, width), *inset])
    file.write("\n\n".join("\n".join(block) for block in blocks if block) + "\n")


def invalid_lines(sweep: Sweep) -> list[str]:
    """Of each level that does not count, the number that decides beside its bound."""
    return [
        f"not valid, {load_text(level.mode, _load(level) or 0.0)}: {_decides(level)}"
        for level in sweep.levels
        if not _valid(level)
    ]


def _decides(level: Level) -> str:
    reasons = level.measurement.reasons if level.measurement else []
    return reasons[0] if reasons else "no reason was recorded"


def _width_of(file: TextIO) -> int:
    """As wide as the terminal; a file or a pipe has no width to fit into."""
    return _columns(file) if file.isatty() else UNBOUNDED


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width`, those after the first set in; a command is left whole, to copy."""
    text = printable(text)
    if width >= UNBOUNDED or text.startswith("confirm with: "):
        return [indent + text]
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _drawn(table: Table, file: TextIO, width: int) -> list[str]:
    """The table's lines, without the blanks that fill them up."""
    from rich.console import Console

    console = Console(file=file, highlight=False, width=width)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def escaped(text: str) -> str:
    """Text from outside: its brackets are no markup, and it steers no terminal."""
    from rich.markup import escape

    return escape(printable(text))


def heading(sweep: Sweep) -> str:
    run, target = sweep.run, sweep.target
    engine = " ".join(part for part in (target.engine, target.engine_version) if part)
    parts = [target.model, target.url, engine, f"run {run.id}"]
    text = " · ".join(part for part in parts if part)
    return f"SIMULATED · {text}" if run.simulated else text


class Column(NamedTuple):
    """A column of the table; the highest `rank` goes first where there is no room for all."""

    title: str
    rank: int
    cell: Callable[[Level], str]


def _columns_of(levels: Sequence[Level]) -> list[Column]:
    """The columns that have something to show."""
    generates = any(_rate(level)[1] == "tok/s" for level in levels)
    streams = any(level.ttft_ms.n for level in levels)
    tokens = Column("tok/s", 0, lambda level: number(level.output_tokens_per_s))
    error = Column("±95%", 6, lambda level: _plus_minus(level).strip(" ±") or "–")
    requests = Column("req/s", 5 * generates, lambda level: number(level.request_throughput))
    prompts = Column("prompt tok/s", 2, lambda level: number(level.total_tokens_per_s))
    columns = [
        Column("req/s asked" if levels[0].mode == "rate" else "streams", 0, _load_cell),
        *((tokens, error, requests) if generates else (requests, error, prompts)),
    ]
    if streams:
        columns += [
            Column("TTFT p50", 3, lambda level: ms(level.ttft_ms.p50)),
            Column("TTFT p95", 1, lambda level: ms(level.ttft_ms.p95)),
            Column("ITL p50", 4, lambda level: ms(level.itl_ms.p50)),
            Column("ITL p95", 1, lambda level: ms(level.itl_ms.p95)),
        ]
    else:
        columns.append(Column("E2E p50", 3, lambda level: ms(level.e2e_ms.p50)))
    columns.append(Column("E2E p95", 7 if streams else 1, lambda level: ms(level.e2e_ms.p95)))
    if any(level.server for level in levels):
        columns += [
            Column("running", 8, lambda level: _server_cell(level, "running_mean")),
            Column("waiting", 4, lambda level: _server_cell(level, "waiting_max")),
            Column("KV max", 2, _kv_cell),
        ]
    if any(level.gpu for level in levels):
        columns += [
            Column("W", 5, _power_cell),
            Column("J/token", 5, lambda level: number(level.energy_j_per_output_token)),
        ]
    if any(level.requests and level.requests.failed for level in levels):
        columns.append(
            Column("failed", 1, lambda level: str(level.requests.failed if level.requests else "–"))
        )
    if not all(_valid(level) for level in levels):
        columns.append(Column("valid", 0, lambda level: "yes" if _valid(level) else "NO"))
    return columns


def _load(level: Level) -> float | None:
    return level.offered_rps if level.mode == "rate" else level.concurrency


def _load_cell(level: Level) -> str:
    load = _load(level)
    return f"{load:g}" if load is not None else "–"


def _server_cell(level: Level, name: str) -> str:
    return number(getattr(level.server, name)) if level.server else "–"


def _kv_cell(level: Level) -> str:
    usage = level.server.kv_usage_max if level.server else None
    return "–" if usage is None else f"{usage:.1%}" if usage < 0.1 else f"{usage:.0%}"


def _power_cell(level: Level) -> str:
    watts = [view.power_w_mean for view in level.gpu if view.power_w_mean is not None]
    return number(sum(watts)) if watts else "–"


def level_table(sweep: Sweep, width: int) -> Table:
    """The levels, with as many columns as `width` characters hold."""
    columns = _columns_of(sweep.levels)
    while len(columns) > 1 and _width(columns, sweep.levels) > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    title = "simulated" if sweep.run.simulated else None
    table = _table(title)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for level in sweep.levels:
        style = None if _valid(level) else "dim"
        table.add_row(*(column.cell(level) for column in columns), style=style)
    return table


def _width(columns: Sequence[Column], levels: Sequence[Level]) -> int:
    """Characters that the table takes."""
    return _total([[c.title, *map(c.cell, levels)] for c in columns])


def _table(title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        title=title, title_justify="left",
    )  # fmt: skip


def _total(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a `_table` of these cells: two between each column and the next."""
    return sum(max(map(len, cells)) for cells in columns) + 2 * (len(columns) - 1)


def run_table(rows: Sequence[dict[str, Any]], out: TextIO | None = None) -> None:
    """The list of `loadgen runs`, with as many columns as there is room for."""
    file = out or sys.stdout
    width = _width_of(file)
    columns = {
        "run": [str(row["id"]) for row in rows],
        "started": [str(row["started_at"])[:16].replace("T", " ") for row in rows],
        "model": [str(row["model"]) for row in rows],
        "target": [str(row["url"]) for row in rows],
        "levels": [str(row["levels"]) for row in rows],
        "finding": [
            (row["finding"] or ("interrupted" if row["interrupted"] else "unfinished"))
            + (" (simulated)" if row["simulated"] else "")
            for row in rows
        ],
    }
    for name in ("target", "started", "model"):
        if _total([(title, *cells) for title, cells in columns.items()]) > width:
            del columns[name]
    table = _table()
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name == "levels" else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(escaped, cells))
    file.write("\n".join(_drawn(table, file, width)) + "\n")


def calibration_tables(result: Result, out: TextIO | None = None) -> None:
    """The trials of `loadgen calibrate`: what was reported, and in brackets what was true."""
    streams = [trial for trial in result.trials if trial.true.ttft_ms.n]
    requests = [trial for trial in result.trials if not trial.true.ttft_ms.n]
    _trial_table(
        ("load", "TTFT mean (true)", "TTFT p99 (true)", "ITL p99 (true)", "tok/s (true)",
         "µs/event", "held", "verdict"),
        [(trial.what, *_stream_cells(trial)) for trial in streams], streams, out,
    )  # fmt: skip
    _trial_table(
        ("load", "requests/s (true)", "reply mean (true)", "send lag p99", "µs/request", "verdict"),
        [(trial.what, *_request_cells(trial)) for trial in requests], requests, out,
    )  # fmt: skip


def _beside(told: float | None, true: float | None) -> str:
    return f"{number(told)} ({number(true)})"


def _stream_cells(trial: Trial) -> tuple[str, ...]:
    told, true = trial.reported, trial.true
    return (
        _beside(told.ttft_ms.mean, true.ttft_ms.mean),
        _beside(told.ttft_ms.p99, true.ttft_ms.p99),
        _beside(told.itl_ms.p99, true.itl_ms.p99),
        _beside(told.tokens_per_s, true.tokens_per_s),
        number(trial.us_per_event),
        f"{trial.held:,}",
    )


def _request_cells(trial: Trial) -> tuple[str, ...]:
    told, true = trial.reported, trial.true
    return (
        _beside(told.requests_per_s, true.requests_per_s),
        _beside(told.reply_ms.mean, true.reply_ms.mean),
        ms(trial.send_lag_p99_ms),
        number(trial.us_per_event),
    )


def _trial_table(
    titles: Sequence[str], cells: Sequence[Sequence[str]], trials: Sequence[Trial],
    out: TextIO | None,
) -> None:  # fmt: skip
    """The verdict says why where there is room for it."""
    if not trials:
        return
    file = out or sys.stdout
    width = _width_of(file)
    why = ["ok" if trial.ok else f"too much: {trial.reasons[0]}" for trial in trials]
    rows = [[*row, reason] for row, reason in zip(cells, why, strict=True)]
    if _total(list(zip(titles, *rows, strict=True))) > width:
        rows = [[*row, reason.partition(":")[0]] for row, reason in zip(cells, why, strict=True)]
    table = _table()
    for title in titles:
        table.add_column(title, justify="left" if title in ("load", "verdict") else "right")
    for row, trial in zip(rows, trials, strict=True):
        table.add_row(*map(escaped, row), style=None if trial.ok else "dim")
    file.write("\n".join(_drawn(table, file, width)) + "\n\n")


# -------------------------------------------------------------------------------- the comparison


def show_comparison(comparison: Comparison, out: TextIO | None = None) -> None:
    """Prints every load's figures side by side, what can be told from noise, and the gate."""
    from loadgen.compare import about_tests, limits

    file = out or sys.stdout
    width = _width_of(file)
    lines = [f"warning: {text}" for text in comparison.warnings]
    lines += [f"{name}  {_which_text(which)}" for name, which in _sides(comparison)]
    text = [part for line in lines for part in _wrapped(line, width)]
    for pair in comparison.pairs:
        text += ["", *_wrapped(_pair_title(pair), width)]
        text += [part for why in pair.invalid for part in _wrapped(f"INVALID: {why}", width, "  ")]
        if pair.changes:
            text += _drawn(_change_table(pair), file, width)
    text += [""]
    for name, loads in (("A", comparison.only_a), ("B", comparison.only_b)):
        if loads:
            words = ", ".join(load_text(load.mode, load.load) for load in loads)
            text += _wrapped(f"only in {name}: {words}", width)
    tests = [about_tests(comparison, "'better'", "'WORSE'"), *limits(comparison)]
    text += [part for line in tests for part in _wrapped(line, width)]
    text += [part for line in map(_gate_line, comparison.gate) for part in _wrapped(line, width)]
    file.write("\n".join(text) + "\n")


def _sides(comparison: Comparison) -> list[tuple[str, Which]]:
    return [("A", comparison.a), ("B", comparison.b)]


def _which_text(which: Which) -> str:
    parts = [which.model, which.url, f"run {which.run}" if which.run else "", which.started_at[:16]]
    text = " · ".join(part for part in parts if part)
    return f"SIMULATED · {text}" if which.simulated else text


def _pair_title(pair: Pair) -> str:
    a, b = pair.repeats
    repeats = "" if (a, b) == (1, 1) else f" (valid levels: {a} in A, {b} in B)"
    return f"{load_text(pair.mode, pair.load)}{repeats}"


def _change_table(pair: Pair) -> Table:
    table = _table()
    for title in ("", "A", "B", "change", "95 % interval", "p adjusted"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    table.add_column("", no_wrap=True)
    for change in pair.changes:
        table.add_row(*_change_cells(change))
    return table


def _change_cells(change: Change) -> tuple[str, ...]:
    interval = change.ci95_percent
    return (
        change.metric,
        number(change.a),
        number(change.b),
        "–" if change.change_percent is None else f"{change.change_percent:+.1f}%",
        "–" if interval is None else f"{interval[0]:+.1f} … {interval[1]:+.1f}%",
        _probability(change.p_adjusted),
        _judged(change),
    )


def _probability(p: float | None) -> str:
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _judged(change: Change) -> str:
    from loadgen.compare import is_better

    if change.note:
        return escaped(change.note)
    better = is_better(change)
    return "not told from noise" if better is None else "better" if better else "WORSE"


def _gate_line(outcome: Outcome) -> str:
    verdict = "UNDECIDED" if outcome.missed is None else "MISSED" if outcome.missed else "held"
    parts = [f"gate {verdict}: {outcome.rule} at {load_text(outcome.mode, outcome.load)}"]
    if outcome.change_percent is not None:
        parts.append(f"change {outcome.change_percent:+.1f}%")
    if outcome.p_adjusted is not None:
        parts.append(f"p {_probability(outcome.p_adjusted)} over the gate's tests")
    return ", ".join([*parts, *([outcome.note] if outcome.note else [])])


def _valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid
