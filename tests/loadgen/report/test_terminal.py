"""What a person sees, on a real pseudo-terminal of 80 columns and in a pipe."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from agent.model import Level, Measurement, Requests, Stats, Sweep
from loadgen.report import terminal
from loadgen.report.terminal import level_line, load_text, run_table, show
from tests.loadgen.report import samples
from tests.loadgen.report.test_table import some_sweeps, sweep

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Tty(io.StringIO):
    """Says that it is a terminal; its width is the one that is set."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the width of every terminal."""

    def to(columns: int) -> None:
        monkeypatch.setattr(terminal, "_columns", lambda out: columns)

    return to


# ------------------------------------------------------------------------------- closing report


@pytest.mark.parametrize("columns", [60, 80, 100, 132, 200])
def test_no_line_of_the_report_is_cut_or_wrapped(columns: int, wide: Any) -> None:
    wide(columns)
    for one in some_sweeps():
        out = Tty()
        show(one, out)
        text = ESCAPE.sub("", out.getvalue())
        assert "…" not in text.partition("─")[2].partition("\n\n")[0]
        lines = text.splitlines()
        too_long = [line for line in lines if len(line) > columns]
        words = [w for line in too_long for w in line.split() if len(w) > columns / 2]
        assert all("confirm with:" in line or words for line in too_long), too_long
        [rule] = [i for i, line in enumerate(lines) if line.strip().startswith("──")] or [0]
        if one.levels:  # a line a level, below the rule
            rows = lines[rule + 1 : rule + 1 + len(one.levels)]
            assert all(re.match(r"\s*[\d.]+ ", row) for row in rows)


def test_the_important_columns_stay_at_80(wide: Any) -> None:
    wide(80)
    for one in some_sweeps():
        if len(one.levels) > 3:
            out = Tty()
            show(one, out)
            for title in ("tok/s", "TTFT p95", "ITL p95"):
                assert title in out.getvalue()


def test_a_pipe_gets_all_columns_and_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    invalid = Level(
        concurrency=1, output_tokens_per_s=1.0, measurement=Measurement(False, ["errors: x"]),
        requests=Requests(1, 9, 0, {"cut": 9}),
    )  # fmt: skip
    out = io.StringIO()
    show(sweep(invalid), out)
    assert "\x1b" not in out.getvalue()
    assert " \n" not in out.getvalue()
    assert "E2E p95" in out.getvalue()
    assert "NO" in out.getvalue()
    assert " 9 " in out.getvalue()  # failed


def test_an_invalid_level_says_which_number_decides() -> None:
    out = io.StringIO()
    show(samples.sweep(), out)
    text = out.getvalue()
    assert "not valid, 256 streams: send lag p99 34 ms is above the bound of 5 ms\n" in text
    assert text.count("not valid") == 1
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "%" in line}
    assert (rows["192"], rows["256"]) == ("yes", "NO")
    assert text.index("not valid") < text.index("CAPACITY_ONLY")


def test_a_level_without_a_reason_is_shown_all_the_same() -> None:
    level = Level(mode="rate", offered_rps=0.5, measurement=Measurement(False, []))
    out = io.StringIO()
    show(sweep(level), out)
    assert "not valid, 0.5 requests/s: no reason was recorded" in out.getvalue()
    assert level_line(level).endswith("INVALID: no reason was recorded")


def test_markup_of_others_is_text() -> None:
    out = io.StringIO()
    show(sweep(Level(concurrency=1), model="[bold]m[/bold]\x1b[2J[/nope]", url="[red]u"), out)
    assert "[bold]m[/bold]" in out.getvalue()
    assert "[/nope]" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def row(**more: Any) -> dict[str, Any]:
    return {
        "id": "20260101-000000-abcd", "started_at": "2026-01-01T10:20:30Z", "model": "m",
        "url": "u", "levels": 3, "finding": "CAPACITY_ONLY", "interrupted": 0,
        "simulated": 0,
    } | more  # fmt: skip


def test_runs_lose_columns_and_no_letters(wide: Any) -> None:
    wide(80)
    out = Tty()
    rows = [
        row(model="meta-llama/Llama-3.1-8B-Instruct", url="http://inference.example.org:8000"),
        row(finding=None, interrupted=1),
        row(finding=None),
        row(simulated=1),
    ]
    run_table(rows, out)
    text = ESCAPE.sub("", out.getvalue())
    assert text.count("simulated") == 1
    assert "CAPACITY_ONLY (simulated)" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "interrupted" in text
    assert "unfinished" in text
    assert "20260101-000000-abcd" in text
    piped = io.StringIO()
    run_table(rows, piped)
    assert "http://inference.example.org:8000" in piped.getvalue()
    assert "2026-01-01 10:20" in piped.getvalue()


EMBEDDED = Level(
    concurrency=4, request_throughput=42.0, request_throughput_ci95=(40.0, 44.0),
    total_tokens_per_s=10752.0, e2e_ms=Stats(p50=25.0, p95=28.0, n=9),
    requests=Requests(9, 0, 0, {}),
)  # fmt: skip


@pytest.mark.parametrize("columns", [40, 80, 1000])
def test_where_nothing_is_generated_requests_and_prompts_are_shown(columns: int, wide: Any) -> None:
    wide(columns)
    out = Tty()
    show(sweep(EMBEDDED), out)
    text = ESCAPE.sub("", out.getvalue())
    for title in ("streams", "req/s", "E2E p95"):
        assert title in text
    if columns > 40:
        assert "prompt tok/s" in text
        assert "10,752" in text
    for title in ("TTFT", "ITL", " tok/s  ±"):
        assert title not in text


def test_one_level_in_one_line() -> None:
    level = Level(
        concurrency=4, output_tokens_per_s=1234.5, output_tokens_per_s_ci95=(1200.0, 1269.0),
        ttft_ms=Stats(p50=12.3, p95=45.6, n=9), requests=Requests(9, 3, 2, {"cut": 2, "a": 1}),
        measurement=Measurement(False, ["errors: many"]),
    )  # fmt: skip
    assert level_line(level) == (
        "1,234 tok/s ±3% · TTFT p50 12.3 ms p95 45.6 ms · 9 ok · 1 a · 2 cut · 2 cancelled · "
        "INVALID: errors: many"
    )
    assert level_line(Level()) == "– tok/s"
    assert level_line(EMBEDDED) == "42.0 req/s ±5% · E2E p50 25.0 ms p95 28.0 ms · 9 ok"
    assert load_text("concurrency", 1) == "1 stream"
    assert load_text("rate", 0.5) == "0.5 requests/s"


def test_samples_are_sweeps() -> None:
    assert all(isinstance(one, Sweep) for one in some_sweeps())
    assert len(some_sweeps()) >= 1
