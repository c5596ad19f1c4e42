"""`agent top`: a running agent at a glance, over its HTTP addresses alone.

It asks the agent for little, for the agent is to be light: its status every time, and of the series
a few in turn. What an agent tells may come from a server that is not to be trusted, so every text
of it is made printable, is never markup, and is cut to the terminal's width.
"""

from __future__ import annotations

import http.client
import math
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from rich.console import Console, ConsoleOptions, JustifyMethod, OverflowMethod, RenderResult
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from agent.live import GpuStatus, ServerStatus, Status
from agent.model import TargetError, Verdict
from agent.when import utc
from agent.words import ms, number, printable

if TYPE_CHECKING:
    from agent.samplers.watched import SamplerStatus

T = TypeVar("T")

WINDOW_S = 900
STEP_S = 15
STALE_S = 60.0  # what began to be measured longer ago than this is not shown as now
SERIES_A_LOOK = 8
TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
TROUBLES_MAX = 6  # lines; the tables are to be seen too

Points = Sequence[tuple[float, float]]  # (unix_s of the step's beginning, value)

# --------------------------------------------------------------------------------- what is asked

OF_ALL = ("output_tokens_per_s", "gpu_power_w", "energy_j_per_output_token")
OF_SERVERS = (
    "requests_running", "requests_waiting", "kv_usage_ratio", "output_tokens_per_s",
    "ttft_mean_ms", "itl_mean_ms",
)  # fmt: skip
OF_GPUS = ("gpu_memory_used_bytes", "gpu_utilization_ratio", "gpu_power_w", "gpu_temperature_c")


class Key(NamedTuple):
    """A series, as `/api/v1/series` is asked for it."""

    metric: str
    server: str | None = None
    gpu: str | None = None


class Finding(msgspec.Struct, frozen=True):
    """The newest answer of `/api/v1/assessment`."""

    at_unix_s: float
    scope: str
    finding: str
    verdict: Verdict


class Snapshot(NamedTuple):
    """What the agent said."""

    url: str
    status: Status
    series: Mapping[Key, Points]
    finding: Finding | None
    silent: str | None = None  # why there is nothing newer, where it no longer answers

    def now(self, metric: str, **whose: str) -> float | None:
        """The newest value; None where there is none of the last minute."""
        points = self.series.get(Key(metric, **whose), ())
        if not points or points[-1][0] < self.status.now_unix_s - STALE_S:
            return None
        return points[-1][1]

    def spark(self, metric: str, **whose: str) -> str:
        return spark(self.series.get(Key(metric, **whose), ()), self.status.now_unix_s)


def wanted(status: Status) -> list[Key]:
    """The series that the view of this agent shows."""
    return [
        *(Key(metric) for metric in OF_ALL),
        *(Key(metric, server=one.name) for one in status.servers for metric in OF_SERVERS),
        *(Key(metric, gpu=one.uuid) for one in status.gpus for metric in OF_GPUS),
    ]


class _Series(msgspec.Struct):
    points: list[tuple[float, float]]


class _Fault(msgspec.Struct):
    error: str = ""


class _Answer(NamedTuple):
    code: int
    body: bytes


class Agent:
    """A running agent at `url`. Raises TargetError where there is none, or not for us."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        parts = urlsplit(url)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        host = parts.hostname or ""
        self._connection = (
            http.client.HTTPSConnection(
                host, parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context()
            )
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)
        )
        self._series: dict[Key, Points] = {}
        self._turn = 0

    def look(self) -> Snapshot:
        """The agent now: all series at the first look, then a few at each, in turn."""
        try:
            status = self._told(self._get("/api/v1/status"), Status)
            self._look_at_series(status)
            newest = self._get("/api/v1/assessment")
            finding = None if newest.code != 200 else self._told(newest, Finding)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TargetError(
                f"no agent answers at {self.url} ({_cause(error)}): start one with `agent run`, "
                "or give its address with --url"
            ) from error
        finally:
            self._connection.close()
        return Snapshot(self.url, status, dict(self._series), finding)

    def _look_at_series(self, status: Status) -> None:
        keys = wanted(status)
        many = min(len(keys), SERIES_A_LOOK) if self._series else len(keys)
        self._series = {key: self._series[key] for key in keys if key in self._series}
        for key in [keys[(self._turn + n) % len(keys)] for n in range(many)]:
            whose = {name: value for name, value in key._asdict().items() if value is not None}
            now_s = status.now_unix_s
            window = {"from": f"{now_s - WINDOW_S:.3f}", "to": f"{now_s:.3f}", "step": f"{STEP_S}"}
            answer = self._get(f"/api/v1/series?{urlencode(whose | window)}")
            if answer.code == 503:  # its store is busy: no more of this now
                return
            if answer.code == 200:
                self._series[key] = self._told(answer, _Series).points
            self._turn += 1

    def _get(self, path: str) -> _Answer:
        self._connection.request("GET", self._prefix + path, headers=self._headers)
        with self._connection.getresponse() as response:
            return _Answer(response.status, response.read(ANSWER_BYTES_MAX))

    def _told(self, answer: _Answer, kind: type[T]) -> T:
        """The answer as what it should be; TargetError says what it is instead."""
        if answer.code == 401:
            raise TargetError(
                f"the agent at {self.url} wants its token, and not another: give --token-file FILE"
            )
        if answer.code != 200:
            said = _Fault()
            with suppress(ValueError, RecursionError):
                said = msgspec.json.decode(answer.body, type=_Fault)
            raise TargetError(
                f"{self.url} answers {answer.code}"
                + (f" ({said.error[:200]})" if said.error else "")
                + ": is it an agent of this version? Else give its address with --url"
            )
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (ValueError, RecursionError) as error:  # the former is msgspec's, and bad UTF-8
            raise TargetError(
                f"{self.url} is no agent of this version ({error}): give its address with --url"
            ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {TIMEOUT_S:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


# -------------------------------------------------------------------------------------- the words

SPARK_CELLS = 12
BARS = "▁▂▃▄▅▆▇█"


def spark(points: Points, now_s: float) -> str:
    """The last WINDOW_S in SPARK_CELLS bars from 0 to the largest; a dot where nothing is."""
    cells: list[list[float]] = [[] for _ in range(SPARK_CELLS)]
    for at_s, value in points:
        cell = math.floor((at_s - now_s + WINDOW_S) / WINDOW_S * SPARK_CELLS)
        if 0 <= cell < SPARK_CELLS:
            cells[cell].append(value)
    means = [sum(values) / len(values) if values else None for values in cells]
    most = max((mean for mean in means if mean is not None), default=0.0)
    return "".join("·" if mean is None else _bar(mean, most) for mean in means)


def _bar(value: float, most: float) -> str:
    share = value / most if most > 0 else 0.0
    return BARS[min(len(BARS) - 1, max(0, math.ceil(share * len(BARS)) - 1))]


def short(value: float | None, unit: str = "") -> str:
    """A number that never takes more than seven cells, whatever a server says."""
    if value is None:
        return "–"
    return (number(value) if abs(value) < 1e6 else f"{value:.1e}") + unit


def count(value: float | None, unit: str = "") -> str:
    """Of requests or degrees: whole where it is whole."""
    is_whole = value is not None and 0 <= value < 1e6 and value % 1 == 0
    return f"{value:,.0f}{unit}" if is_whole else short(value, unit)


def percent(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.0%}" if abs(ratio) <= 10 else short(100 * ratio, "%")


def latency(value_ms: float | None) -> str:
    return ms(value_ms) if value_ms is None or value_ms < 1e6 else short(value_ms / 1000, " s")


def size(value: float | None) -> str:
    """Bytes in the largest unit of which there is at least one."""
    if value is None:
        return "–"
    unit = max(n for n in range(5) if n == 0 or value >= 1024**n)
    return short(value / 1024**unit, f" {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}")


def span(seconds: float) -> str:
    """`43 s`, `12 min`, `5 h`, `3 d`: roughly how long."""
    units = (("d", 86_400), ("h", 3600), ("min", 60))
    for unit, length_s in units:
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def numbers(of: Iterable[int]) -> str:
    """`0–3,6`."""
    runs: list[list[int]] = []
    for one in sorted(of):
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ",".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# ------------------------------------------------------------------------------------- the lines


class Line(NamedTuple):
    text: str
    style: str = ""
    rows_max: int = 1  # it may take; cut behind them


def head(snapshot: Snapshot) -> Iterator[Line]:
    """All but the tables: the agent, all together, the newest finding, and what is not well."""
    status = snapshot.status
    yield Line(
        f"agent {status.version} · {utc(status.now_unix_s)} · up {span(status.uptime_s)} · "
        f"{snapshot.url}",
        "bold",
    )
    if snapshot.silent:
        said = f"no longer answers; this is what it said last: {snapshot.silent}"
        yield Line(said, "bold red", rows_max=2)
    yield Line(" · ".join(_all_together(snapshot)), rows_max=2)
    if simulated := [one.name for one in status.servers if one.simulated]:
        yield Line(f"simulated, no hardware is behind it: {', '.join(simulated)}", rows_max=2)
    yield _finding_line(snapshot)
    yield _kept_line(status)
    troubles = list(_troubles(status))
    yield from troubles[:TROUBLES_MAX]
    if len(troubles) > TROUBLES_MAX:
        yield Line(f"and {len(troubles) - TROUBLES_MAX} more that are not well", "red")


def _all_together(snapshot: Snapshot) -> Iterator[str]:
    """Of all servers and GPUs; of what was never measured nothing is said."""

    def now(metric: str, unit: str = "") -> str:
        return short(snapshot.now(metric), unit)

    tokens = snapshot.spark("output_tokens_per_s")
    yield f"{span(WINDOW_S)}: tokens/s {tokens} {now('output_tokens_per_s')}"
    if snapshot.series.get(Key("gpu_power_w")):
        yield f"power {snapshot.spark('gpu_power_w')} {now('gpu_power_w', ' W')}"
    if snapshot.series.get(Key("energy_j_per_output_token")):
        yield now("energy_j_per_output_token", " J/token")


def _finding_line(snapshot: Snapshot) -> Line:
    found = snapshot.finding
    if found is None:
        return Line("no assessment yet", "dim")
    ago = span(snapshot.status.now_unix_s - found.at_unix_s)
    return Line(f"{found.finding} ({found.scope}, {ago} ago): {found.verdict.summary}", "bold", 3)


def _kept_line(status: Status) -> Line:
    store, outbox = status.store, status.outbox
    parts = [
        f"store {size(store.bytes)}, written {span(store.writer_lag_s)} behind",
        f"outbox {outbox.pending:,} waiting, {outbox.dropped:,} dropped",
    ]
    return Line(" · ".join(parts), "dim", rows_max=2)


def _troubles(status: Status) -> Iterator[Line]:
    for sampler in status.samplers:
        if not sampler.ok:
            yield Line(f"not well: {_sampler_text(sampler)}", "red", rows_max=2)
    store, outbox = status.store, status.outbox
    if store.error:
        yield Line(f"not written: {store.error}", "red", rows_max=2)
    elif not store.ready:
        yield Line("not written: the store is not ready", "red")
    if store.shedding:
        yield Line("raw readings are not kept: too little free disk", "red")
    if store.readings_dropped:
        yield Line(f"readings dropped: {store.readings_dropped:,}", "red")
    if outbox.last_error:
        yield Line(f"not exported: {outbox.last_error}", "red", rows_max=2)
    yield from (Line(f"note: {note}") for note in status.notes)


def _sampler_text(sampler: SamplerStatus) -> str:
    came = "nothing yet" if sampler.age_s is None else f"last sample {span(sampler.age_s)} ago"
    failed = f"{sampler.errors:,} error{'s' if sampler.errors != 1 else ''}"
    return f"{sampler.name}, {came}, {failed}" + (f": {sampler.line}" if sampler.line else "")


# ------------------------------------------------------------------------------------- the tables

TEXT_WIDTH_MIN, GAP = 6, 2


class Column(NamedTuple):
    """A column of a table; the highest `rank` goes first where there is no room for all."""

    title: str
    rank: int
    cells: Sequence[str]
    is_text: bool = False  # cut where there is no room for it; a number never is

    @property
    def width_min(self) -> int:
        width = max(Text(cell).cell_len for cell in (self.title, *self.cells))
        return min(width, TEXT_WIDTH_MIN) if self.is_text else width


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns there is room for, in their order."""
    kept = list(columns)
    while len(kept) > 1 and sum(column.width_min + GAP for column in kept) - GAP > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    return kept


def server_columns(snapshot: Snapshot) -> list[Column]:
    place = {gpu.uuid: n for n, gpu in enumerate(snapshot.status.gpus)}

    def places(one: ServerStatus) -> str:
        return numbers(place[gpu] for gpu in one.gpus if gpu in place)

    def text(of: Callable[[ServerStatus], str | None]) -> list[str]:
        return [printable(of(one) or "–") for one in snapshot.status.servers]

    def now(metric: str, form: Callable[[float | None], str]) -> list[str]:
        return [form(snapshot.now(metric, server=one.name)) for one in snapshot.status.servers]

    return [
        Column("server", 0, text(lambda one: one.name), is_text=True),
        Column("engine", 6, text(lambda one: one.engine), is_text=True),
        Column("model", 5, text(lambda one: _last_part(one.model)), is_text=True),
        Column("run", 1, now("requests_running", count)),
        Column("wait", 2, now("requests_waiting", count)),
        Column("KV", 4, now("kv_usage_ratio", percent)),
        Column("tok/s", 1, now("output_tokens_per_s", short)),
        Column("TTFT", 3, now("ttft_mean_ms", latency)),
        Column("ITL", 4, now("itl_mean_ms", latency)),
        Column("GPUs", 7, text(places)),
        Column("tok/s, 15 min", 8, [snapshot.spark("output_tokens_per_s", server=one.name)
                                    for one in snapshot.status.servers]),
    ]  # fmt: skip


def _last_part(model: str | None) -> str | None:
    """Of `organisation/name`, or a path, what tells models apart."""
    return model and (model.rstrip("/").rpartition("/")[2] or model)


def gpu_columns(snapshot: Snapshot) -> list[Column]:
    gpus = snapshot.status.gpus

    def now(metric: str, form: Callable[[float | None], str]) -> list[str]:
        return [form(snapshot.now(metric, gpu=one.uuid)) for one in gpus]

    def memory(one: GpuStatus) -> str:
        used = size(snapshot.now("gpu_memory_used_bytes", gpu=one.uuid))
        return f"{used} of {size(one.memory_total_bytes)}"

    return [
        Column("GPU", 0, [str(n) for n in range(len(gpus))]),
        Column("name", 3, [printable(one.name or one.uuid) for one in gpus], is_text=True),
        Column("memory", 2, [memory(one) for one in gpus]),
        Column("use", 1, now("gpu_utilization_ratio", percent)),
        Column("power", 1, now("gpu_power_w", lambda value: short(value, " W"))),
        Column("temp", 4, now("gpu_temperature_c", lambda value: count(value, " °C"))),
        Column("use, 15 min", 5, [snapshot.spark("gpu_utilization_ratio", gpu=one.uuid)
                                  for one in gpus]),
    ]  # fmt: skip


def _table(columns: Sequence[Column], width: int, rows: int, words: Mapping[int, int]) -> Table:
    """The first `rows`. Rich cuts columns that could wrap, and those here only; their cells say
    that none wraps."""
    overflow: OverflowMethod = "crop" if words else "ellipsis"
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    shown = fitting(columns, width)
    for column in shown:
        is_left = column.is_text or column is columns[0]
        justify: JustifyMethod = "left" if is_left else "right"
        table.add_column(
            Text(column.title, no_wrap=True), justify=justify,
            no_wrap=not column.is_text, overflow=overflow,
        )  # fmt: skip
    for cells in zip(*(column.cells[:rows] for column in shown), strict=True):
        texts = (cell.translate(words) for cell in cells)
        table.add_row(*(Text(text, no_wrap=True, overflow=overflow) for text in texts))
    return table


ROWS_BESIDE = 2  # of a table: the blank above, and its titles


def sharing(rows: Sequence[int], room: int) -> list[int]:
    """How many rows of each table are shown in `room` lines; the shorter ones are whole.

    A table that is not whole takes a line that says so.
    """
    shown = [0 for _ in rows]
    for turn, place in enumerate(sorted(range(len(rows)), key=lambda place: rows[place])):
        part = room // (len(rows) - turn) - ROWS_BESIDE
        shown[place] = rows[place] if rows[place] <= part else max(part - 1, 0)
        room -= min(rows[place], max(part, 0)) + ROWS_BESIDE
    return shown


# What stands for the characters that an encoding does not have, one for one.
PLAIN = str.maketrans("▁▂▃▄▅▆▇█·–…°�", "_.:;=+*#--~ ?")


class View(NamedTuple):
    """A snapshot as rich draws it, anew for each width and height."""

    snapshot: Snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        words = PLAIN if options.ascii_only else {}
        lines = [
            part
            for line in head(self.snapshot)
            for part in _wrapped(line, console, options.max_width, words)
        ]
        yield from lines
        status = self.snapshot.status
        tables = [
            (name, len(rows), columns)
            for name, rows, columns in (
                ("servers", status.servers, server_columns), ("GPUs", status.gpus, gpu_columns),
            )
            if rows
        ]  # fmt: skip
        room = 10**6 if options.height is None else options.height - len(lines)
        shown = sharing([rows for _, rows, _ in tables], room)
        for (name, rows, columns), some in zip(tables, shown, strict=True):
            yield Text("")
            yield _table(columns(self.snapshot), options.max_width, some, words)
            if some < rows:
                yield Text(f"and {rows - some:,} more {name}", style="dim", no_wrap=True)
        if not status.servers:
            yield Text("\nno server is configured", style="dim")


def _wrapped(line: Line, console: Console, width: int, words: Mapping[int, int]) -> Iterator[Text]:
    """The line in at most as many rows as it may take, words left whole where that can be."""
    text = Text(printable(line.text).translate(words))
    parts = [text.plain]
    if line.rows_max > 1:
        parts = [part.plain.rstrip() for part in text.wrap(console, width)] or parts
    whole = min(line.rows_max, len(parts)) - 1
    overflow: OverflowMethod = "crop" if words else "ellipsis"
    for part in (*parts[:whole], " ".join(parts[whole:])):
        yield Text(part.strip(), style=line.style, no_wrap=True, overflow=overflow)


# ------------------------------------------------------------------------------------ the terminal


def show_once(agent: Agent, console: Console) -> None:
    """Prints one snapshot, without the blanks that fill lines up."""
    view = View(agent.look())
    with console.capture() as drawn:
        console.print(view)
    console.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def follow(
    agent: Agent,
    console: Console,
    interval_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows the agent until KeyboardInterrupt. One that goes silent is waited for.

    Raises TargetError where there is none at the start.
    """
    view = View(agent.look())
    # The screen is drawn from a thread of rich's, twice a second: a terminal may be resized.
    with Screen(view, console=console, screen=True, refresh_per_second=2) as screen:
        while True:
            sleep(interval_s)
            try:
                view = View(agent.look())
            except TargetError as error:
                view = View(view.snapshot._replace(silent=str(error)))
            screen.update(view, refresh=True)
