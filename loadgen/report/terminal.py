"""What a person at a terminal sees: progress while it runs, a table and the verdict at the end.

The progress line is written by hand: a display library that redraws from a thread would be measured
together with the server.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from agent.model import Level, Sweep, Verdict

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from loadgen.level import Plan
    from loadgen.sweep import Moment

BAR_WIDTH = 16


class Progress:
    """Tells how it goes on `out`: one line that is rewritten on a terminal, plain lines elsewhere.

    `quiet` leaves nothing but notes; `live` None: as `out` is a terminal or not.
    """

    def __init__(
        self, out: TextIO | None = None, *, quiet: bool = False, live: bool | None = None
    ) -> None:
        self._out = out or sys.stderr
        self._quiet = quiet
        self._live = self._out.isatty() if live is None else live
        self._prefix = ""
        self._drawn = 0
        self._last_tokens = 0
        self._last_s = 0.0

    def note(self, text: str) -> None:
        self._clear()
        self._print(f"note: {text}")

    def level_began(self, number: int, of: int, plan: Plan) -> None:
        self._prefix = f"[{number}/{of}] {load_text(plan.mode, plan.load)}"
        self._last_tokens, self._last_s = 0, 0.0
        if not self._quiet and not self._live:
            self._print(f"{self._prefix}: running")

    def level_moved(self, state: Moment) -> None:
        if self._quiet or not self._live:
            return
        seconds = state.elapsed_s - self._last_s
        rate = (state.tokens - self._last_tokens) / seconds if seconds > 0 else 0.0
        self._last_tokens, self._last_s = state.tokens, state.elapsed_s
        full = round(state.share * BAR_WIDTH)
        bar = "█" * full + "░" * (BAR_WIDTH - full)
        left = state.elapsed_s * (1 / state.share - 1) if state.share > 0.02 else None
        parts = [
            f"{bar} {state.share:4.0%}",
            f"{rate:,.0f} tok/s done",
            f"{state.in_flight} in flight",
            f"{state.ok} ok",
        ]
        if state.failed:
            parts.append(f"{state.failed} failed")
        if left is not None:
            parts.append(f"{left:.0f} s left")
        self._draw(f"{self._prefix} {' · '.join(parts)}")

    def level_ended(self, number: int, level: Level) -> None:
        self._clear()
        if not self._quiet:
            self._print(f"{self._prefix}: {level_line(level)}")

    def _draw(self, line: str) -> None:
        width = _columns(self._out)
        line = line[: width - 1]
        self._out.write("\r" + line + " " * max(0, self._drawn - len(line)))
        self._out.flush()
        self._drawn = len(line)

    def _clear(self) -> None:
        if self._drawn:
            self._out.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def _columns(out: TextIO) -> int:
    import os

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
    parts = [f"{number(level.output_tokens_per_s)} tok/s{_plus_minus(level)}"]
    if level.ttft_ms.n:
        parts.append(f"TTFT p50 {ms(level.ttft_ms.p50)} p95 {ms(level.ttft_ms.p95)}")
    if level.itl_ms.n:
        parts.append(f"ITL p50 {ms(level.itl_ms.p50)} p95 {ms(level.itl_ms.p95)}")
    if level.requests:
        parts.append(f"{level.requests.ok} ok")
        parts += [f"{n} {kind}" for kind, n in sorted(level.requests.errors.items())]
        if level.requests.cancelled:
            parts.append(f"{level.requests.cancelled} cancelled")
    if level.measurement and not level.measurement.valid:
        parts.append("INVALID: " + level.measurement.reasons[0])
    return " · ".join(parts)


def _plus_minus(level: Level) -> str:
    interval = level.output_tokens_per_s_ci95
    rate = level.output_tokens_per_s
    if interval is None or not rate:
        return ""
    return f" ±{(interval[1] - interval[0]) / 2 / rate:.0%}"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash where nothing was measured."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.2f} s" if value >= 10_000 else f"{number(value)} ms"


# -------------------------------------------------------------------------------------- the table


def show(sweep: Sweep, out: TextIO | None = None) -> None:
    """Prints the closing table and the verdict."""
    from rich.console import Console

    console = Console(file=out or sys.stdout, highlight=False)
    console.print(heading(sweep), markup=False)
    if sweep.levels:
        _print_table(console, level_table(sweep))
    if sweep.verdict is not None:
        for line in verdict_lines(sweep.verdict):
            console.print(line, markup=False)


def _print_table(console: Console, table: RenderableType) -> None:
    if console.is_terminal:
        console.print(table)
    else:  # a file or a pipe has no width to fit into
        console.print(table, width=200, no_wrap=True)


def heading(sweep: Sweep) -> str:
    run, target = sweep.run, sweep.target
    engine = " ".join(part for part in (target.engine, target.engine_version) if part)
    parts = [target.model, target.url, engine, f"run {run.id}"]
    text = " · ".join(part for part in parts if part)
    return f"SIMULATED · {text}" if run.simulated else text


def level_table(sweep: Sweep) -> Table:
    from rich import box
    from rich.table import Table

    title = "simulated" if sweep.run.simulated else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    rate_mode = sweep.levels[0].mode == "rate"
    has_server = any(level.server for level in sweep.levels)
    has_power = any(level.gpu for level in sweep.levels)
    columns = ["req/s asked" if rate_mode else "streams", "tok/s", "±95 %", "req/s",
               "TTFT p50", "p95", "ITL p50", "p95", "E2E p95"]  # fmt: skip
    if has_server:
        columns += ["running", "waiting", "KV max"]
    if has_power:
        columns += ["W", "J/token"]
    columns += ["failed", "valid"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for level in sweep.levels:
        table.add_row(*_cells(level, has_server=has_server, has_power=has_power),
                      style=None if _valid(level) else "dim")  # fmt: skip
    return table


def run_table(rows: Sequence[dict[str, Any]], out: TextIO | None = None) -> None:
    """The list of `loadgen runs`."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "started", "model", "target", "levels", "finding"):
        table.add_column(name, no_wrap=True, justify="right" if name == "levels" else "left")
    for row in rows:
        finding = row["finding"] or ("interrupted" if row["interrupted"] else "unfinished")
        started = str(row["started_at"])[:16].replace("T", " ")
        cells = (row["id"], started, row["model"], row["url"], str(row["levels"]), finding)
        table.add_row(*(escape(str(cell)) for cell in cells))
    _print_table(Console(file=out or sys.stdout, highlight=False), table)


def _valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid


def _cells(level: Level, *, has_server: bool, has_power: bool) -> list[str]:
    load = level.offered_rps if level.mode == "rate" else level.concurrency
    cells = [
        f"{load:g}" if load is not None else "–",
        number(level.output_tokens_per_s),
        _plus_minus(level).strip(" ±") or "–",
        number(level.request_throughput),
        ms(level.ttft_ms.p50),
        ms(level.ttft_ms.p95),
        ms(level.itl_ms.p50),
        ms(level.itl_ms.p95),
        ms(level.e2e_ms.p95),
    ]
    if has_server:
        server = level.server
        cells += [
            number(server.running_mean) if server else "–",
            number(server.waiting_max) if server else "–",
            f"{server.kv_usage_max:.1%}" if server and server.kv_usage_max is not None else "–",
        ]
    if has_power:
        watts = [view.power_w_mean for view in level.gpu if view.power_w_mean is not None]
        cells += [number(sum(watts)) if watts else "–", number(level.energy_j_per_output_token)]
    cells.append(str(level.requests.failed) if level.requests else "–")
    cells.append("yes" if _valid(level) else "NO")
    return cells


def verdict_lines(verdict: Verdict) -> Sequence[str]:
    """The verdict with its evidence, a sentence a line."""
    lines = [f"{verdict.finding}: {verdict.summary}"]
    confidence = verdict.confidence
    lines.append(f"  confidence {confidence.level}, limited by {confidence.limited_by}")
    lines += [f"  {reason.code}: {reason.because}" for reason in verdict.reasons]
    recommendation = verdict.recommendation
    if recommendation is not None:
        lines.append(f"  do: {recommendation.action}")
        if recommendation.confirm_with:
            lines.append(f"  confirm with: {recommendation.confirm_with}")
        if recommendation.overturned_by:
            lines.append(f"  overturned by: {recommendation.overturned_by}")
    lines += [f"  missing: {text}" for text in verdict.missing]
    return lines
