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
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
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


def head(snapshot: Snapshot) -> Iterator[Line]:
    """All but the tables: the agent, all together, the newest finding, and what is not well."""
    status = snapshot.status
    yield Line(
        f"agent {status.version} · {snapshot.url} · up {span(status.uptime_s)} · "
        f"{utc(status.now_unix_s)}",
        "bold",
    )
    if snapshot.silent:
        yield Line(f"no longer answers; this is what it said last: {snapshot.silent}", "bold red")
    yield Line(
        f"tokens/s {snapshot.spark('output_tokens_per_s')} "
        f"{short(snapshot.now('output_tokens_per_s'))} · "
        f"power {snapshot.spark('gpu_power_w')} {short(snapshot.now('gpu_power_w'), ' W')} · "
        f"{short(snapshot.now('energy_j_per_output_token'), ' J/token')}"
    )
    yield _finding_line(snapshot)
    yield _kept_line(status)
    troubles = list(_troubles(status))
    yield from troubles[:TROUBLES_MAX]
    if len(troubles) > TROUBLES_MAX:
        yield Line(f"and {len(troubles) - TROUBLES_MAX} more that are not well", "red")


def _finding_line(snapshot: Snapshot) -> Line:
    found = snapshot.finding
    if found is None:
        return Line("no assessment yet", "dim")
    ago = span(snapshot.status.now_unix_s - found.at_unix_s)
    return Line(f"{found.finding} ({found.scope}, {ago} ago): {found.verdict.summary}", "bold")


def _kept_line(status: Status) -> Line:
    store, outbox = status.store, status.outbox
    parts = [
        f"store {size(store.bytes)}, written {span(store.writer_lag_s)} behind",
        f"outbox {outbox.pending:,} waiting, {outbox.dropped:,} dropped",
    ]
    return Line(" · ".join(parts), "dim")


def _troubles(status: Status) -> Iterator[Line]:
    for sampler in status.samplers:
        if not sampler.ok:
            yield Line(f"not well: {_sampler_text(sampler)}", "red")
    store, outbox = status.store, status.outbox
    if store.error:
        yield Line(f"not written: {store.error}", "red")
    elif not store.ready:
        yield Line("not written: the store is not ready", "red")
    if store.shedding:
        yield Line("raw readings are not kept: too little free disk", "red")
    if store.readings_dropped:
        yield Line(f"readings dropped: {store.readings_dropped:,}", "red")
    if outbox.last_error:
        yield Line(f"not exported: {outbox.last_error}", "red")
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


def _table(columns: Sequence[Column], width: int) -> Table:
    """Rich cuts columns that could wrap, and those here only; their cells say that none wraps."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    shown = fitting(columns, width)
    for column in shown:
        is_left = column.is_text or column is columns[0]
        justify: JustifyMethod = "left" if is_left else "right"
        table.add_column(
            Text(column.title, no_wrap=True), justify=justify,
            no_wrap=not column.is_text, overflow="ellipsis",
        )  # fmt: skip
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    return table


class View(NamedTuple):
    """A snapshot as rich draws it, anew for each width."""

    snapshot: Snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style in head(self.snapshot):
            yield Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")
        for rows, columns in (
            (self.snapshot.status.servers, server_columns),
            (self.snapshot.status.gpus, gpu_columns),
        ):
            yield Text("")
            if rows:
                yield _table(columns(self.snapshot), options.max_width)
        if not self.snapshot.status.servers:
            yield Text("no server is configured", style="dim")


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
