"""`agent top` against an agent that is none: the same addresses, answers chosen by the test."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from rich.console import Console
from rich.text import Text

from agent import top
from agent.cli import main
from agent.live import GpuStatus, OutboxStatus, ServerStatus, Status, StoreStatus
from agent.model import Confidence, TargetError, Verdict, encode
from agent.samplers.watched import SamplerStatus
from agent.top import Agent, Column, Finding, Key, Snapshot, View
from tests.screens import OnTerminal

NOW_S = 1_795_442_531.0  # 2026-11-23T14:02:11Z
UUID = "GPU-0c8e2f1a-4b52-4c7e-9a55-00000000000{}"
TOKEN = "a-token-of-24-characters"

STATUS = Status(
    version="0.1.0",
    now_unix_s=NOW_S,
    started_unix_s=NOW_S - 276_000,
    uptime_s=276_000.0,
    samplers=(
        SamplerStatus("gpu", True, 0.4, 0.002, 0, None),
        SamplerStatus("chat", True, 3.1, 0.03, 2, None),
        SamplerStatus("code", False, 43.0, 5.0, 9, "http://gpu:8001/metrics: no page within 5 s"),
    ),
    store=StoreStatus(88_290_000, 0.4, True, False, 0, None),
    outbox=OutboxStatus(12, 3),
    servers=(
        ServerStatus("chat", "http://gpu:8000", None, "vllm", "meta-llama/Llama-3.1-8B-Instruct",
                     (UUID.format(0), UUID.format(1)), "process list"),
        ServerStatus("code", "http://gpu:8001", None),
    ),
    gpus=(
        GpuStatus(UUID.format(0), "NVIDIA H100 80GB HBM3", 85_520_809_984),
        GpuStatus(UUID.format(1), "NVIDIA H100 80GB HBM3", 85_520_809_984),
    ),
)  # fmt: skip
FINDING = Finding(
    NOW_S - 720, "chat", "UNDER_SIZED",
    Verdict("UNDER_SIZED", "24 requests at once do not fit", Confidence("high", "nothing")),
)  # fmt: skip
CHAT, GPU0 = {"server": "chat"}, {"gpu": UUID.format(0)}
VALUES: dict[Key, float] = {
    Key("output_tokens_per_s"): 1054.3,
    Key("gpu_power_w"): 812.4,
    Key("energy_j_per_output_token"): 0.7706,
    Key("requests_running", **CHAT): 16.0,
    Key("requests_waiting", **CHAT): 2.5,
    Key("kv_usage_ratio", **CHAT): 0.019,
    Key("output_tokens_per_s", **CHAT): 1054.3,
    Key("ttft_mean_ms", **CHAT): 56.04,
    Key("itl_mean_ms", **CHAT): 10.61,
    Key("gpu_memory_used_bytes", **GPU0): 80e9,
    Key("gpu_utilization_ratio", **GPU0): 0.97,
    Key("gpu_power_w", **GPU0): 402.0,
    Key("gpu_temperature_c", **GPU0): 61.0,
}


def series(value: float, to_s: float = NOW_S) -> list[tuple[float, float]]:
    """Sixty steps that rise evenly to `value`."""
    first = to_s // top.STEP_S * top.STEP_S - 59 * top.STEP_S
    return [(first + n * top.STEP_S, value * (n + 1) / 60) for n in range(60)]


SNAPSHOT = Snapshot(
    "http://127.0.0.1:9477", STATUS, {key: series(value) for key, value in VALUES.items()}, FINDING
)


def drawn(snapshot: Snapshot, width: int = 80, *, colour: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, no_color=not colour,
        color_system="standard" if colour else None, highlight=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(View(snapshot))
    return [line.rstrip() for line in captured.get().splitlines()]


# --------------------------------------------------------------------------------------- the view


def test_a_server_without_hardware_is_told_as_such() -> None:
    chat, code = STATUS.servers
    servers = (structs.replace(chat, simulated=True), code)
    status = structs.replace(STATUS, servers=servers)
    assert drawn(SNAPSHOT._replace(status=status))[2] == "simulated, no hardware is behind it: chat"


def test_eighty_columns() -> None:
    assert drawn(SNAPSHOT) == [
        "agent 0.1.0 · 2026-11-23T14:02:11Z · up 3 d · http://127.0.0.1:9477",
        "15 min: tokens/s ▁▂▂▃▄▄▅▆▆▇██ 1,054 · power ▁▂▂▃▄▄▅▆▆▇██ 812 W · 0.77 J/token",
        "UNDER_SIZED (chat, 12 min ago): 24 requests at once do not fit",
        "store 84.2 MiB, written 0 s behind · outbox 12 waiting, 3 dropped",
        "not well: code, last sample 43 s ago, 9 errors: http://gpu:8001/metrics: no page",
        "within 5 s",
        "",
        "server  engine  model               run  wait  KV  tok/s     TTFT      ITL  GPUs",
        "chat    vllm    Llama-3.1-8B-Inst…   16  2.50  2%  1,054  56.0 ms  10.6 ms   0–1",
        "code    –       –                     –     –   –      –        –        –     –",
        "",
        "GPU  name                                memory  use  power   temp   use, 15 min",
        "0    NVIDIA H100 80GB HB…  74.5 GiB of 79.6 GiB  97%  402 W  61 °C  ▁▂▂▃▄▄▅▆▆▇██",
        "1    NVIDIA H100 80GB HB…         – of 79.6 GiB    –      –      –  ············",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 81, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    plain = drawn(SNAPSHOT, width)
    coloured = drawn(SNAPSHOT, width, colour=True)
    assert max(map(len, plain)) <= width
    assert any(line.startswith("chat") for line in plain)
    assert "\x1b" not in "".join(plain)
    assert "\x1b[" in "".join(coloured)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in coloured] == plain


def test_what_is_old_or_unknown_is_not_shown_as_now() -> None:
    old = {key: series(value, NOW_S - 75) for key, value in VALUES.items()}
    lines = drawn(SNAPSHOT._replace(series=old))
    assert lines[1] == "15 min: tokens/s ▂▂▃▄▄▅▆▆▇██· – · power ▂▂▃▄▄▅▆▆▇██· – · –"
    cells = lines[8].split()
    assert (cells[0], cells[3:]) == ("chat", [*"––––––", "0–1", "▂▂▃▄▄▅▆▆▇██·"])
    nothing = drawn(SNAPSHOT._replace(series={}, finding=None))
    assert nothing[1:3] == ["15 min: tokens/s ············ –", "no assessment yet"]


def test_what_is_not_well_is_said_and_bounded() -> None:
    store = StoreStatus(0, 90.0, True, True, 7, "no room on the disk")
    outbox = OutboxStatus(1, 0, last_error="503 for 12 min")
    sick = structs.replace(STATUS, store=store, outbox=outbox, notes=("a clock was set back",))
    lines = drawn(SNAPSHOT._replace(status=sick), 120)
    assert lines[5:10] == [
        "not written: no room on the disk",
        "raw readings are not kept: too little free disk",
        "readings dropped: 7",
        "not exported: 503 for 12 min",
        "note: a clock was set back",
    ]
    never = SamplerStatus("gpu", False, None, None, 1, None)
    many = structs.replace(STATUS, samplers=(never,) * 20)
    lines = drawn(SNAPSHOT._replace(status=many))
    assert lines[4] == "not well: gpu, nothing yet, 1 error"
    assert lines[4 + top.TROUBLES_MAX] == "and 14 more that are not well"


def test_an_agent_with_nothing_to_watch() -> None:
    bare = structs.replace(STATUS, servers=(), gpus=(), samplers=())
    lines = drawn(SNAPSHOT._replace(status=bare, series={}))
    assert lines[-1] == "no server is configured"


HOSTILE = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["[bold red]x[/]", "[/", "\x1b[2J", "a\nb", "\u202eevil", "漢字" * 30, "[link=file:///etc]x"]
)


@given(HOSTILE, st.floats(allow_nan=False, allow_infinity=False), st.integers(20, 120))
def test_no_name_and_no_number_breaks_the_view(name: str, value: float, width: int) -> None:
    server = ServerStatus(name, "http://h", None, name, name)
    status = structs.replace(
        STATUS,
        version=name,
        samplers=(SamplerStatus(name, False, None, None, 1, name),),
        store=StoreStatus(2**62, 0, False, False, 0, name),
        servers=(server, server),
        gpus=(GpuStatus(name, name, 2**62),),
        notes=(name,),
    )
    points = {key: [(NOW_S - 15, value)] for key in top.wanted(status)}
    finding = structs.replace(FINDING, scope=name, finding=name)
    snapshot = Snapshot("http://h", status, points, finding)
    lines = drawn(snapshot, width)
    rows = sum(line.rows_max for line in top.head(snapshot))
    assert 10 <= len(lines) <= rows + 8  # the tables: a blank, titles and two rows each
    assert all(Text(line).cell_len <= max(width, 42) for line in lines)
    assert all(c.isprintable() for line in lines for c in line)


def test_the_sentence_that_decides_is_read_whole() -> None:
    summary = "24 requests at once do not fit; " + "18 were held within the SLO, " * 9
    long = structs.replace(FINDING, verdict=structs.replace(FINDING.verdict, summary=summary))
    lines = drawn(SNAPSHOT._replace(finding=long), 60)
    at = lines.index("UNDER_SIZED (chat, 12 min ago): 24 requests at once do not")
    assert lines[at + 1] == "fit; 18 were held within the SLO, 18 were held within the"
    assert len(lines[at + 2]) == 60
    assert lines[at + 2].endswith("…")
    assert lines[at + 3].startswith("store ")


def test_what_has_no_room_is_counted() -> None:
    """Of a lower terminal nothing is lost in silence."""
    servers = tuple(ServerStatus(f"s{n}", "http://h", None) for n in range(12))
    gpus = tuple(GpuStatus(f"GPU-{n}", "NVIDIA L4", 2**34) for n in range(8))
    status = structs.replace(STATUS, servers=servers, gpus=gpus, samplers=())
    console = Console(file=io.StringIO(), width=80, height=24, highlight=False)
    options = console.options.update(height=24)
    lines = console.render_lines(View(SNAPSHOT._replace(status=status)), options)
    texts = ["".join(part.text for part in line).rstrip() for line in lines]
    assert texts[13] == "and 5 more servers"
    assert texts[23] == "7    NVIDIA L4  – of 16.0 GiB    –      –     –  ············"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=2), st.integers(6, 80))
def test_tables_share_the_room(rows: list[int], room: int) -> None:
    shown = top.sharing(rows, room)
    taken = [some + 2 + (some < many) for some, many in zip(shown, rows, strict=True)]
    assert all(0 <= some <= many for some, many in zip(shown, rows, strict=True))
    assert sum(taken) <= room
    if sum(rows) + 2 * len(rows) <= room:
        assert shown == rows


def test_a_terminal_that_knows_no_block_characters() -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace") as file:
        console = Console(file=file, width=60, highlight=False)
        with console.capture() as captured:
            console.print(View(SNAPSHOT))
    text = captured.get()
    assert text.isascii()
    assert "?" not in text
    assert "15 min: tokens/s _..:;;=++*## 1,054" in text


def test_brackets_are_no_markup() -> None:
    status = structs.replace(STATUS, servers=(ServerStatus("[b]x[/b]", "http://h", None),))
    assert any(line.startswith("[b]x[/b] ") for line in drawn(SNAPSHOT._replace(status=status), 20))


@given(st.lists(st.tuples(st.integers(0, 59), st.floats(0, 1e9)), max_size=60))
def test_a_spark_has_a_place_for_each_part_of_the_window(points: list[tuple[int, float]]) -> None:
    at = [(NOW_S - 900 + 15 * n, value) for n, value in points]
    bars = top.spark(at, NOW_S)
    assert len(bars) == top.SPARK_CELLS
    for n, bar in enumerate(bars):
        assert (bar == "·") == (n not in {place // 5 for place, _ in points})
    assert not points or "█" in bars or max(value for _, value in points) == 0


def test_the_words() -> None:
    assert [top.size(n) for n in (None, 0, 1023, 2**20, 3.5 * 2**40)] == [
        "–", "0.00 B", "1,023 B", "1.00 MiB", "3.50 TiB"]  # fmt: skip
    assert [top.span(s) for s in (-3, 0, 119, 120, 7200, 172_800)] == [
        "0 s", "0 s", "119 s", "2 min", "2 h", "2 d"]  # fmt: skip
    assert [top.numbers(of) for of in ((), (3,), (2, 0, 1, 6))] == ["", "3", "0–2,6"]
    assert [top.count(n) for n in (0, 16, 2.5, 1e300)] == ["0", "16", "2.50", "1.0e+300"]
    assert [top.percent(n) for n in (0, 0.974, 1e9)] == ["0%", "97%", "1.0e+11%"]


def test_columns_go_by_their_rank() -> None:
    columns = [Column("a", 0, ["1234567890"], is_text=True), Column("b", 2, ["12"]),
               Column("c", 1, ["123"])]  # fmt: skip
    titles = {
        width: [one.title for one in top.fitting(columns, width)] for width in (15, 14, 10, 1)
    }
    assert titles == {15: ["a", "b", "c"], 14: ["a", "c"], 10: ["a"], 1: ["a"]}


# -------------------------------------------------------------------------------------- the agent


@dataclass
class Fake:
    """What answers, and what it was asked. `answers` before the regular ones; path → (code, body).

    Every series is one of VALUES, or empty.
    """

    url: str = ""
    token: str | None = None
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, target: str, authorization: str | None) -> tuple[int, bytes]:
        self.asked.append(target)
        path, _, query = target.partition("?")
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, b'{"error": "no"}'
        if path in self.answers:
            return self.answers[path]
        if path == "/api/v1/status":
            return 200, encode(STATUS)
        if path == "/api/v1/assessment":
            return 200, encode(FINDING)
        assert path == "/api/v1/series"
        asked = dict(urllib.parse.parse_qsl(query))
        assert float(asked["to"]) - float(asked["from"]) == 900
        assert asked["step"] == "15"
        key = Key(asked["metric"], asked.get("server"), asked.get("gpu"))
        points = series(VALUES[key]) if key in VALUES else []
        return 200, json.dumps({"metric": key.metric, "unit": "1", "points": points}).encode()

    def series_asked(self) -> int:
        return sum("/series?" in target for target in self.asked)


@pytest.fixture
def fake() -> Iterator[Fake]:
    one = Fake()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65_536  # head and body at once

        def do_GET(self) -> None:
            code, body = one.answer(self.path, self.headers.get("Authorization"))
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        one.url = f"http://127.0.0.1:{server.server_port}"
        yield one
        server.shutdown()
        thread.join()


def test_a_look_asks_for_all_and_then_in_turn(fake: Fake) -> None:
    agent = Agent(fake.url)
    whole = 3 + 2 * 6 + 2 * 4
    first = agent.look()
    assert fake.series_asked() == whole
    assert {key: points for key, points in first.series.items() if points} == SNAPSHOT.series
    assert (first.status, first.finding) == (STATUS, FINDING)
    fake.asked.clear()
    second = agent.look()
    assert fake.series_asked() == top.SERIES_A_LOOK < whole
    assert second.series == first.series
    agent.look()
    agent.look()
    assert len({target for target in fake.asked if "/series?" in target}) == whole


def test_a_busy_store_leaves_what_was_known(fake: Fake) -> None:
    agent = Agent(fake.url)
    first = agent.look()
    fake.answers = {
        "/api/v1/series": (503, b'{"error": "busy"}'),
        "/api/v1/assessment": (404, b'{"error": "the first comes at 15:00"}'),
    }
    fake.asked.clear()
    second = agent.look()
    assert second.series == first.series
    assert second.finding is None
    assert fake.series_asked() == 1


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (404, b"<html>", "answers 404: is it an agent"),
        (503, b'{"error": "starting"}', "answers 503 (starting)"),
        (302, b"", "answers 302"),
        (500, b'{"error": "\\xff"}', "answers 500: is it"),
        (200, b"<html>", "no agent of this version"),
        (200, b"[" * 100_000, "no agent of this version"),
        (200, b'{"version": "\xff"}', "no agent of this version"),
        (200, b'{"version": "9"}', "now_unix_s"),
    ],
)
def test_what_is_no_agent(fake: Fake, code: int, body: bytes, said: str) -> None:
    fake.answers = {"/api/v1/status": (code, body)}
    with pytest.raises(TargetError, match=re.escape(said)):
        Agent(fake.url).look()


# ------------------------------------------------------------------------------------ the command


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["top", *args])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_a_pipe_gets_one_plain_snapshot(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    expected = drawn(SNAPSHOT._replace(url=fake.url))
    code, out, err = command(capsys, "--url", fake.url)
    assert (code, out.splitlines(), err) == (0, expected, "")


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "--url", "http://127.0.0.1:9")
    assert (code, out) == (4, "")
    assert err == (
        "agent: no agent answers at http://127.0.0.1:9 (Connection refused): start one with "
        "`agent run`, or give its address with --url\n"
    )


def test_the_token(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fake.token = TOKEN
    code, _, err = command(capsys, "--url", fake.url)
    assert code == 4
    assert "--token-file FILE" in err
    file = tmp_path / "token"
    file.write_text("another-token-of-the-form")
    code, _, err = command(capsys, "--url", fake.url, "--token-file", str(file))
    assert code == 4
    assert "another-token" not in err
    file.write_text(TOKEN + "\n")
    assert command(capsys, "--url", fake.url, "--token-file", str(file))[0] == 0
    code, _, err = command(capsys, "--url", fake.url, "--token-file", str(tmp_path / "none"))
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("args", [("--interval", "0.1s"), ("--interval", "2"), ("--url", "9477")])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], args: tuple[str, str]) -> None:
    code, _, err = command(capsys, "--once", "--url", "http://127.0.0.1:9", *args)
    assert (code, err.count("\n")) == ((4, 1) if args[1] == "2" else (2, 1))


def test_the_agent_goes_and_comes_back(fake: Fake) -> None:
    """What the last snapshot said stays, with a line; the view mends itself."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 2.0
        assert isinstance(console.file, io.StringIO)
        seen.append(console.file.getvalue().rpartition("\x1b[H")[2])  # the newest frame
        fake.answers = {"/api/v1/status": (500, b"")} if len(seen) == 1 else {}
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        top.follow(Agent(fake.url), console, 2.0, sleep)
    assert ["no longer answers" in text for text in seen] == [False, True, False]
    assert all("1,054" in text for text in seen)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?1049l" in console.file.getvalue(), "the terminal is given back"


def test_ctrl_c_ends_a_resized_terminal_quietly(fake: Fake) -> None:
    command = [sys.executable, "-m", "agent.cli", "top", "--url", fake.url, "--interval", "1s"]
    keep = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    env = {**keep, "TERM": "xterm", "NO_COLOR": "1"}
    with OnTerminal(command, env, 80, 24) as terminal:
        expected = drawn(SNAPSHOT._replace(url=fake.url))
        assert terminal.until(lambda lines: len(lines) >= len(expected)) == expected
        assert terminal.screen.cursor.hidden
        terminal.resize(40, 24)
        narrow = drawn(SNAPSHOT._replace(url=fake.url), 40)
        assert terminal.until(lambda lines: lines == narrow)
        terminal.press(b"\x03")
        terminal.ended()
    assert terminal.process.returncode == 130
    assert terminal.raw.rpartition("\x1b[?1049l")[1], "the terminal is given back"
    assert not terminal.screen.cursor.hidden
    assert not re.search("interrupted|Traceback|defect", terminal.raw)
    assert not re.search(r"\x1b\[3\dm", terminal.raw), "NO_COLOR"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_be_drawn_on_gets_one_snapshot(fake: Fake, term: str) -> None:
    command = [sys.executable, "-m", "agent.cli", "top", "--url", fake.url]
    with OnTerminal(command, {**os.environ, "TERM": term, "COLUMNS": "80"}) as terminal:
        assert terminal.ended() == drawn(SNAPSHOT._replace(url=fake.url))
    assert terminal.process.returncode == 0
    assert "\x1b" not in terminal.raw
