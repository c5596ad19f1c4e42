"""What a person sees while it runs, on a terminal of some size, and what a pipe gets."""

from __future__ import annotations

import io
import os
import re
import sys
import termios
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.model import Level, Measurement, Requests, Stats
from loadgen.level import Plan
from loadgen.moment import Moment
from loadgen.report.live import Progress
from loadgen.schedule import Upcoming
from tests.e2e.command import LOADGEN, SMALL, environment, loadgen
from tests.e2e.misbehaving import good, serving
from tests.screens import OnTerminal, Terminal

PLAN = Plan("concurrency", concurrency=4)
MOMENT = Moment(
    share=0.5, elapsed_s=2.0, in_flight=4, ok=10, failed=1, tokens=800, half=0.062, rate=577.0,
    ttft_mean_ms=49.5, itl_mean_ms=5.44, errors={"timeout": 1}, later_s=40.0,
)  # fmt: skip
ENDED = Level(
    concurrency=4, output_tokens_per_s=577.0, output_tokens_per_s_ci95=(508.0, 646.0),
    ttft_ms=Stats(p50=49.5, p95=55.6, n=9), itl_ms=Stats(p50=5.44, p95=10.2, n=9),
    requests=Requests(20, 1, 0, {"timeout": 1}),
)  # fmt: skip
COLOUR = re.compile(r"\x1b\[\d*m")


@pytest.fixture(autouse=True)
def _a_terminal_as_most_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")


def began(
    progress: Progress, number: int, plan: Plan = PLAN, of: int | None = 6, *, why: str = "",
    left: str = "", simulated: bool = False,
) -> None:  # fmt: skip
    progress.level_began(number, Upcoming(plan, of, why, left), simulated=simulated)


def play(progress: Progress, levels: int, of: int = 6) -> None:
    """So many levels of 1, 4, 16 … streams, the last of them still running."""
    for n in range(levels):
        rate = 184.0 * 2.5**n
        began(progress, n + 1, Plan("concurrency", concurrency=4**n), of)
        progress.level_moved(msgspec.structs.replace(MOMENT, rate=rate))
        if n < levels - 1:
            level = msgspec.structs.replace(
                ENDED, concurrency=4**n, output_tokens_per_s=rate, output_tokens_per_s_ci95=None
            )
            progress.level_ended(n + 1, level)


@pytest.fixture
def on_80() -> Iterator[Terminal]:
    with Terminal(80, 24) as terminal:
        yield terminal


# ------------------------------------------------------------------------------- on a terminal

AT_80 = [
    "note: a note",
    "[1/6] 1 stream: 184 tok/s · TTFT p50 49.5 ms p95 55.6 ms",
    "  ITL p50 5.44 ms p95 10.2 ms · 20 ok · 1 timeout",
    "[2/6] 4 streams: 460 tok/s · TTFT p50 49.5 ms p95 55.6 ms",
    "  ITL p50 5.44 ms p95 10.2 ms · 20 ok · 1 timeout",
    "[3/6] 16 streams · measuring                                  ~40 s left in all",
    "████████████░░░░░░░░░░░░ 50% · ~2 s to go · 4 in flight · 10 ok",
    "1,150 tok/s ±6% · TTFT mean 49.5 ms · ITL mean 5.44 ms",
    "1 failed: 1 timeout",
    "tok/s  ● measured  ○ now",
    "1,150 │                                                               ○",
    "      │",
    "      │",
    "      │",
    "      │                              ⣀⣀●",
    "      │           ⢀⣀⣀⣀⣀⠤⠤⠤⠤⠤⠒⠒⠒⠒⠊⠉⠉⠉⠉",
    "      │●⠤⠔⠒⠒⠒⠒⠉⠉⠉⠉⠁",
    "    0 │",
    "      └┬───────────────────────────────┬──────────────────────────────┬",
    "       1                               4                             16 streams",
]


def test_a_sweep_at_80_columns_and_24_rows(on_80: Terminal) -> None:
    with on_80.file() as out:
        progress = Progress(out)
        progress.note("a note")
        play(progress, 3)
        assert on_80.settled() == AT_80
        assert "\x1b[" in on_80.raw
        assert not COLOUR.search(on_80.raw), "NO_COLOR"
        assert not on_80.screen.cursor.hidden
        progress.close()
        assert on_80.settled() == AT_80[:5], "nothing of it stays"


def test_a_sweep_at_120_columns_and_40_rows() -> None:
    with Terminal(120, 40) as terminal, terminal.file() as out:
        progress = Progress(out)
        progress.note("a note")
        play(progress, 3)
        lines = terminal.settled()
        assert lines[1] == (
            "[1/6] 1 stream: 184 tok/s · TTFT p50 49.5 ms p95 55.6 ms · "
            "ITL p50 5.44 ms p95 10.2 ms · 20 ok · 1 timeout"
        )
        assert lines[3].endswith("~40 s left in all")
        assert len(lines[3]) == 119
        assert lines[4:7] == AT_80[6:9]
        assert lines[-1].split() == ["1", "4", "16", "streams"]
        assert len(lines[7:]) == 12, "as high as a curve gets"
        progress.close()


@pytest.mark.parametrize("to", [(60, 24), (132, 24), (40, 24)])
def test_a_window_of_another_width_is_drawn_anew(on_80: Terminal, to: tuple[int, int]) -> None:
    with on_80.file() as out:
        progress = Progress(out)
        progress.note("a note")
        play(progress, 3)
        on_80.resize(*to)
        progress.level_moved(MOMENT)
        lines = on_80.settled()
        assert sum("[3/6]" in line for line in lines) == 1
        assert sum("to go" in line for line in lines) == 1
        assert sum("└" in line for line in lines) == 1
        assert max(map(len, lines[5:])) < to[0]
        assert any(line.endswith("~40 s left in all") for line in lines)
        progress.level_ended(3, ENDED)
        progress.close()
        lines = on_80.settled()
        assert not any("measuring" in line or "│" in line for line in lines)
        assert lines[5].startswith("[3/6] 16 streams: 577 tok/s ±12%")


def test_a_lower_window_keeps_what_was_said(on_80: Terminal) -> None:
    with on_80.file() as out:
        progress = Progress(out)
        on_80.resize(80, 10)
        play(progress, 3)
        lines = on_80.settled()
        assert lines[-4:] == AT_80[5:9], "no room for a curve"
        progress.close()
        assert on_80.settled()[-1] == AT_80[4]


def test_colour_where_it_is_wanted(on_80: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    with on_80.file() as out:
        progress = Progress(out)
        progress.note("a note")
        play(progress, 3)
        assert on_80.settled() == AT_80
        failed = on_80.screen.buffer[8][0]
        assert (failed.data, failed.fg) == ("1", "red")
        assert on_80.screen.buffer[5][0].bold
        assert not on_80.screen.buffer[9][0].bold, "a style ends with its line"
        progress.close()


def test_a_terminal_that_knows_no_block_characters(on_80: Terminal) -> None:
    with on_80.file("ascii") as out:
        progress = Progress(out)
        play(progress, 3)
        lines = on_80.settled()
        assert "?" not in "".join(lines)
        assert all(line.isascii() for line in lines)
        assert "############............ 50% | ~2 s to go | 4 in flight | 10 ok" in lines
        assert any("+-6%" in line for line in lines)
        progress.close()


def test_a_terminal_that_is_held_holds_nothing(on_80: Terminal) -> None:
    """Ctrl-S, or a link that stands: frames are left out, and what stays comes afterwards."""
    with on_80.file() as out:
        progress = Progress(out)
        play(progress, 3)
        on_80.settled()
        termios.tcflow(on_80.follower, termios.TCOOFF)
        began = time.monotonic()
        for ok in range(100):
            progress.level_moved(msgspec.structs.replace(MOMENT, ok=ok))
        assert time.monotonic() - began < 5, "a write waited"
        assert on_80.settled()[-1] == AT_80[-1]
        termios.tcflow(on_80.follower, termios.TCOON)
        progress.level_moved(msgspec.structs.replace(MOMENT, ok=4_321))
        progress.level_moved(msgspec.structs.replace(MOMENT, ok=4_321))
        lines = on_80.until(lambda lines: any("4,321 ok" in line for line in lines))
        assert sum("to go" in line for line in lines) == 1
        progress.close()


def test_a_level_that_ends_before_it_moved_leaves_its_line(on_80: Terminal) -> None:
    with on_80.file() as out:
        progress = Progress(out)
        began(progress, 1, of=None, why="the beginning")
        assert on_80.settled() == ["[1] 4 streams · starting", "the beginning"]
        invalid = Level(concurrency=4, measurement=Measurement(False, ["errors: many"]))
        progress.level_ended(1, invalid)
        assert on_80.settled() == ["[1] 4 streams: – tok/s · INVALID: errors: many"]
        progress.close()
        progress.close()


def test_levels_of_a_run_taken_up_again_are_on_the_curve(on_80: Terminal) -> None:
    with on_80.file() as out:
        before = Level(concurrency=1, output_tokens_per_s=184.0)
        progress = Progress(out, ended=[before])
        began(progress, 2)
        progress.level_moved(MOMENT)
        assert on_80.settled()[-1].split() == ["1", "4", "streams"]
        progress.close()


# ------------------------------------------------------------------------------------- elsewhere


class Tty(io.StringIO):
    """Says that it is a terminal, and is none."""

    def isatty(self) -> bool:
        return True


def told(out: io.StringIO, **settings: Any) -> str:
    progress = Progress(out, **settings)
    progress.note("a note\nof \x1b[2J two lines")
    began(progress, 1, of=2)
    for share in (0.01, 0.5, 1.0):
        progress.level_moved(msgspec.structs.replace(MOMENT, share=share))
    progress.level_ended(1, Level(concurrency=4, output_tokens_per_s=10.0))
    progress.close()
    return out.getvalue()


def test_plain_lines_where_nobody_watches() -> None:
    assert told(io.StringIO()) == (
        "note: a note of �[2J two lines\n[1/2] 4 streams: running\n[1/2] 4 streams: 10.0 tok/s\n"
    )
    assert told(Tty(), live=False) == told(io.StringIO())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert told(Tty()) == told(io.StringIO())


def test_a_log_says_why_a_load_was_chosen() -> None:
    out = io.StringIO()
    why = "between 2 (holds) and 8 (breaks)"
    began(Progress(out), 5, of=None, why=why, left="80 s of 300 s left")
    assert out.getvalue() == f"[5] 4 streams: {why} · 80 s of 300 s left\n"


def test_a_log_says_how_long_the_rest_takes() -> None:
    out = io.StringIO()
    began(Progress(out), 2, left="~40 s left in all")
    assert out.getvalue() == "[2/6] 4 streams: running · ~40 s left in all\n"


def test_what_is_simulated_says_so_while_it_runs(on_80: Terminal) -> None:
    """In the headline, whatever there is no room for, in each line that stays, and in a log."""
    ended = "[2/6] 4 streams, simulated: 577 tok/s ±12%"
    with on_80.file() as out:
        progress = Progress(out)
        began(progress, 2, simulated=True)
        progress.level_moved(MOMENT)
        head = on_80.settled()[0]
        assert head.startswith("[2/6] 4 streams, simulated · measuring ")
        assert head.endswith("~40 s left in all")
        on_80.resize(30, 24)
        progress.level_moved(MOMENT)
        assert on_80.settled()[0].startswith("[2/6] 4 streams, simulated")
        progress.level_ended(2, ENDED)
        assert on_80.settled()[0] == ended[:30]
        progress.close()
    log = io.StringIO()
    progress = Progress(log)
    began(progress, 2, simulated=True)
    progress.level_ended(2, ENDED)
    said = log.getvalue().splitlines()
    assert said[0] == "[2/6] 4 streams, simulated: running"
    assert said[1].startswith(ended)


def test_quiet_leaves_the_notes() -> None:
    assert told(io.StringIO(), quiet=True) == told(Tty(), quiet=True)
    assert told(io.StringIO(), quiet=True).count("\n") == 1


def test_a_terminal_that_cannot_be_opened_again_is_written_to_all_the_same() -> None:
    out = told(Tty())
    assert "577 tok/s ±6%" in out
    assert out.endswith("[1/2] 4 streams: 10.0 tok/s\n")


def test_a_reader_that_has_gone_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        for live in (False, True):
            progress = Progress(out, live=live)
            began(progress, 1, of=1)
            for _ in range(3):
                progress.note("nobody reads this")
                progress.level_moved(MOMENT)
            progress.close()


# ------------------------------------------------------------------------------- the real command

SLOW = partial(good, tokens=12, pause_s=0.03)


def sweep(address: str, *args: str) -> list[str]:
    return [*LOADGEN, "sweep", f"http://{address}", *SMALL, *args]


def test_a_sweep_on_a_terminal_that_is_resized(tmp_path: Path) -> None:
    with serving(SLOW) as address:
        command = sweep(address, "--concurrency", "1,2", "--duration", "2s")
        with OnTerminal(command, environment(tmp_path), 80, 60) as terminal:
            lines = terminal.until(lambda lines: any("to go" in line for line in lines))
            assert lines[-3].endswith(" left in all")
            terminal.resize(60, 60)
            terminal.until(lambda lines: any("2 streams · measuring" in line for line in lines))
            terminal.until(lambda lines: any("└" in line for line in lines))
            assert max(map(len, terminal.lines())) <= 60
            text = "\n".join(terminal.ended())
    assert terminal.process.returncode in (0, 3)
    assert not re.search("measuring|starting|[█░└]", text), "nothing of it is left"
    for line in ("[1/2] 1 stream: ", "[2/2] 2 streams: "):
        assert text.count(line) == 1
    table = [line for line in text.splitlines() if re.match(r" +[12] +\d", line)]
    assert [line.split()[0] for line in table] == ["1", "2"]


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with serving(SLOW) as address:
        command = sweep(address, "--concurrency", "1,2", "--duration", "30s")
        with OnTerminal(command, environment(tmp_path)) as terminal:
            terminal.until(lambda lines: any("tok/s" in line for line in lines))
            terminal.press(b"\x03")
            lines = terminal.ended()
    assert terminal.process.returncode == 130
    assert not terminal.screen.cursor.hidden
    assert any(line.startswith("note: interrupted: keeping what was measured") for line in lines)
    assert not re.search("measuring|to go|█", "\n".join(lines))
    assert terminal.screen.cursor.x == 0
    assert terminal.screen.cursor.y == len(lines)


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    with serving(SLOW) as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SMALL, "--concurrency", "1",
            "--requests", "3", "--repeats", "2",
        )  # fmt: skip
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("[")]
    told = [re.sub(r"[\d.]+ tok/s.*", "ended", re.sub(r"~\d+", "~N", line)) for line in said]
    assert told == [
        "[1/2] 1 stream: repeat 1 of 2", "[1/2] 1 stream: ended",
        "[2/2] 1 stream: repeat 2 of 2 · ~N s left in all", "[2/2] 1 stream: ended",
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["--no-progress", "--quiet"])
def test_no_progress_on_a_terminal_is_plain_lines(tmp_path: Path, option: str) -> None:
    with serving() as address:
        command = [*LOADGEN, "run", f"http://{address}", *SMALL, "--requests", "3", option]
        with OnTerminal(command, environment(tmp_path)) as terminal:
            terminal.ended()
    assert "\x1b[" not in COLOUR.sub("", terminal.raw)
    assert "\r" not in terminal.raw.replace("\r\n", "")
    assert ("[1/1] 1 stream: running" in terminal.raw) == (option == "--no-progress")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
