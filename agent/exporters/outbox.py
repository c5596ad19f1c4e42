"""The outbox: what goes to an OTLP back end lies in SQLite until the back end has taken it.

OpenTelemetry's own exporter drops a batch after some ten seconds of outage. Here a request is
serialised once, with its own time stamps, and kept; a `Sender` sends the oldest first and deletes
it when it is acknowledged. A process killed between the two sends it again, byte for byte, so that
a back end that de-duplicates holds each point once.

The outbox is a file of its own beside the store: the store commits about once a second and may lose
the last second to a power cut, the outbox commits once for each export and loses nothing (WAL with
synchronous=FULL); and neither can take the other down by damage or growth.

What a back end's answer means (OTLP 1.x, "OTLP/HTTP response"):

- 2xx: taken; its body may say how many points were rejected, which are counted and not repeated.
- 429, 502, 503, 504, and no answer at all: waits, as long as `Retry-After` says, else for twice as
  long each time, up to a minute.
- other 4xx and 3xx: this request will never be taken. Dropped, counted, and said in one line.
- other 5xx, 408, and a 2xx whose body is no OTLP answer (a login page says 200 too): may or may not
  pass. Tried DOUBTFUL_TRIES_MAX times, then dropped and counted.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import math
import random
import sqlite3
import ssl as tls
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.model import Reading, StoreError, UsageError

if TYPE_CHECKING:
    import aiohttp

Kind = Literal["metrics", "traces"]
KINDS: tuple[Kind, ...] = ("metrics", "traces")

BYTES_MAX = 64 * 1024 * 1024  # compressed; at 2 kB an export and four a minute, five days
COUNT_MAX = 100_000
TIMEOUT_S = 10.0  # OTLP exporters' default, for the whole exchange
BACKOFF_S = (1.0, 60.0)  # the first pause and the longest
RETRY_AFTER_S_MAX = 3600.0
DOUBTFUL_TRIES_MAX = 8

_SCHEMA = 1
_BUSY_TIMEOUT_S = 1.0
_WAL_BYTES_MAX = 4 * 1024 * 1024
_FREE_PAGES_MAX = 256  # 1 MiB, which is kept for the next export; more is given back
_ANSWER_BYTES_MAX = 64 * 1024
_WHY_CHARS_MAX = 200
_WAIT_FOR = {429, 502, 503, 504}
_TABLES = (
    "create table requests (id integer primary key autoincrement, kind text not null, "
    "created_unix_s real not null, attempts integer not null default 0, "
    "points integer not null, body blob not null)",
    "create index requests_by_kind on requests (kind, id)",
    "create table counts (kind text not null, name text not null, n integer not null, "
    "primary key (kind, name)) without rowid",
    "create table state (name text primary key, value blob not null) without rowid",
)


class Request(msgspec.Struct, frozen=True):
    """One kept request; `body` is gzip of the serialised protobuf message."""

    id: int
    kind: Kind
    created_unix_s: float
    attempts: int
    points: int
    body: bytes


class _Kept(msgspec.Struct, frozen=True):
    """How much of one kind waits."""

    n: int = 0
    bytes: int = 0


class OutboxStatus(msgspec.Struct, frozen=True):
    """How the outbox stands. The counts, in requests, are of all time: they outlive the agent."""

    pending: int
    pending_bytes: int
    oldest_unix_s: float | None  # when the oldest that waits was made
    sent: int
    dropped: int  # given up: no room, refused for good, or tried too often
    rejected_points: int  # of requests that were taken, but not whole
    last_error: str | None  # one line, of this process's time


class Outbox:
    """The file. One process has it open at a time; any of its threads may call anything here.

    `put` returns when the request is on the disk. When `bytes_max` or `count_max` is exceeded, the
    oldest requests are dropped and counted. A damaged file is set aside and a new one begun
    (`set_aside` names it). Raises StoreError, with what to do, for whatever SQLite says.
    """

    def __init__(
        self,
        path: Path,
        *,
        bytes_max: int = BYTES_MAX,
        count_max: int = COUNT_MAX,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.set_aside: Path | None = None
        self.last_error: str | None = None
        self._bytes_max = bytes_max
        self._count_max = count_max
        self._clock = clock
        self._lock = threading.Lock()
        self._unkept = dict.fromkeys(KINDS, 0)
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._db = self._opened()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self.set_aside = self._put_aside()
                self.last_error = f"the outbox was damaged; it is kept as {self.set_aside.name}"
                self._db = self._opened()
            self._kept = {kind: _Kept() for kind in KINDS}
            sql = "select kind, count(*), total(length(body)) from requests group by kind"
            for kind, n, size in self._db.execute(sql):
                self._kept[kind] = _Kept(n, int(size))

    def _opened(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
        )
        try:
            # Two senders would send everything twice. The lock dies with the process.
            db.execute("pragma locking_mode = exclusive")
            db.execute("pragma auto_vacuum = incremental")
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = full")
            db.execute(f"pragma journal_size_limit = {_WAL_BYTES_MAX}")
            found = db.execute("pragma quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"malformed: {found}")
            db.execute("begin immediate")
            version = db.execute("pragma user_version").fetchone()[0]
            if version > _SCHEMA:
                raise StoreError(
                    f"{self.path} was written by a newer servefit (schema {version}, this one "
                    f"knows {_SCHEMA}): update servefit, or move the file away"
                )
            if version < _SCHEMA:
                for table in _TABLES:
                    db.execute(table)
                db.execute(f"pragma user_version = {_SCHEMA}")
            db.execute("commit")
        except BaseException:
            db.close()
            raise
        return db

    def _put_aside(self) -> Path:
        """Renames the file and what SQLite keeps beside it, which belongs to it."""
        stamp = int(self._clock())
        for end in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + end).rename(
                    self.path.with_name(f"{self.path.name}.damaged-{stamp}{end}")
                )
        return self.path.with_name(f"{self.path.name}.damaged-{stamp}")

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._db.close()

    # ----------------------------------------------------------------------------------- queue

    def put(self, kind: Kind, message: bytes, points: int, state: bytes | None = None) -> bool:
        """Keeps one serialised message; on return it is on the disk.

        False where the message alone is over `bytes_max`: dropped and counted. `points` is what
        it holds, `state` what the encoder has to know after a restart; both are kept or neither.
        """
        # mtime=0: the same message is the same bytes.
        body = gzip.compress(message, compresslevel=6, mtime=0)
        with self._transaction() as db:
            if state is not None:
                db.execute("insert or replace into state values (?, ?)", (kind, state))
            if len(body) > self._bytes_max:
                self._count(kind, "dropped", 1)
                self.last_error = f"{kind}: a request of {len(body)} bytes is over the outbox's"
                return False
            db.execute(
                "insert into requests (kind, created_unix_s, points, body) values (?, ?, ?, ?)",
                (kind, self._clock(), points, body),
            )
            self._add(kind, 1, len(body))
            self._make_room()
        return True

    def lose(self, kind: Kind, why: str) -> None:
        """Counts as dropped what could not even be kept; only this process remembers it."""
        self._unkept[kind] += 1
        self.last_error = why

    def _make_room(self) -> None:
        """Drops the oldest until the bounds hold again; the newest, just put, always stays."""
        while (n := sum(kept.n for kept in self._kept.values())) > 1 and (
            n > self._count_max or sum(kept.bytes for kept in self._kept.values()) > self._bytes_max
        ):
            row = self._db.execute(
                "select id, kind, length(body) from requests order by id limit 1"
            ).fetchone()
            self._remove(*row)
            self._count(row[1], "dropped", 1)
            self.last_error = "the outbox is full: the oldest requests are dropped"

    def oldest(self, kind: Kind) -> Request | None:
        """The next to send; it stays until `settle` removes it."""
        with self._transaction() as db:
            row = db.execute(
                "select id, kind, created_unix_s, attempts, points, body from requests "
                "where kind = ? order by id limit 1",
                (kind,),
            ).fetchone()
        return Request(*row) if row else None

    def settle(
        self, request: Request, *, dropped: bool = False, rejected: int = 0, why: str | None = None
    ) -> None:
        """Removes a request that was taken, or (`dropped`) never will be; counts it once."""
        with self._transaction() as db:
            there = db.execute("select 1 from requests where id = ?", (request.id,)).fetchone()
            if there is None:
                return  # dropped for want of room while it was under way, and counted so
            self._remove(request.id, request.kind, len(request.body))
            self._count(request.kind, "dropped" if dropped else "sent", 1)
            if rejected:
                self._count(request.kind, "rejected_points", rejected)
            self.last_error = why if why is not None else self.last_error

    def keep(self, request: Request, why: str, *, counts: bool) -> None:
        """Leaves it for another try; `counts`: the try is one of DOUBTFUL_TRIES_MAX."""
        self.last_error = why
        if counts:
            with self._transaction() as db:
                db.execute("update requests set attempts = attempts + 1 where id = ?", [request.id])

    def state(self, kind: Kind) -> bytes | None:
        """What `put` was given as `state` last."""
        with self._transaction() as db:
            row = db.execute("select value from state where name = ?", (kind,)).fetchone()
        return bytes(row[0]) if row else None

    def _remove(self, id_: int, kind: Kind, size: int) -> None:
        self._db.execute("delete from requests where id = ?", (id_,))
        self._add(kind, -1, -size)

    def _add(self, kind: Kind, n: int, size: int) -> None:
        kept = self._kept[kind]
        self._kept[kind] = _Kept(kept.n + n, kept.bytes + size)

    def _count(self, kind: str, name: str, n: int) -> None:
        self._db.execute(
            "insert into counts values (?, ?, ?) on conflict do update set n = n + excluded.n",
            (kind, name, n),
        )

    # ---------------------------------------------------------------------------------- status

    def status(self, kind: Kind | None = None) -> OutboxStatus:
        """Of one kind, or of all."""
        chosen = (kind,) if kind else KINDS
        marks = ", ".join("?" * len(chosen))
        with self._transaction() as db:
            oldest = db.execute(
                f"select min(created_unix_s) from (select created_unix_s, min(id) from requests "
                f"where kind in ({marks}) group by kind)",
                chosen,
            ).fetchone()[0]
            sql = f"select name, sum(n) from counts where kind in ({marks}) group by name"
            counts = dict(db.execute(sql, chosen).fetchall())
            kept = [self._kept[one] for one in chosen]
        return OutboxStatus(
            pending=sum(one.n for one in kept),
            pending_bytes=sum(one.bytes for one in kept),
            oldest_unix_s=oldest,
            sent=counts.get("sent", 0),
            dropped=counts.get("dropped", 0) + sum(self._unkept[one] for one in chosen),
            rejected_points=counts.get("rejected_points", 0),
            last_error=self.last_error,
        )

    def readings(self, at_ns: int) -> list[Reading]:
        """The same as series of the catalogue, one of each per kind."""
        found = []
        for kind in KINDS:
            status, labels = self.status(kind), (("kind", kind),)
            values = {
                "agent_outbox_pending": status.pending,
                "agent_outbox_bytes": status.pending_bytes,
                "agent_outbox_sent_total": status.sent,
                "agent_outbox_dropped_total": status.dropped,
                "agent_outbox_rejected_points_total": status.rejected_points,
            }
            found += [Reading(at_ns, name, float(n), labels) for name, n in values.items()]
        return found

    # ---------------------------------------------------------------------------------- SQLite

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, of the file and of what is remembered about it."""
        with self._lock, self._guarded():
            before = dict(self._kept)
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                self._kept = before
                with suppress(sqlite3.Error):
                    self._db.execute("rollback")
                raise
            if self._kept != before and self._free_pages() > _FREE_PAGES_MAX:
                # As a script: execute() takes the first of its steps, a page, for the last.
                self._db.executescript(f"pragma incremental_vacuum({_FREE_PAGES_MAX})")

    def _free_pages(self) -> int:
        return int(self._db.execute("pragma freelist_count").fetchone()[0])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise StoreError(f"outbox {self.path}: {why}; {_advice(why)}") from error


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return any(word in str(error) for word in ("malformed", "not a database", "disk image"))


def _advice(why: str) -> str:
    if "locked" in why or "busy" in why:
        return "another agent has it open: stop that one, or give this one a database of its own"
    if "full" in why or "No space" in why or "too large" in why:
        return "free some space"
    if "closed" in why:
        return "the agent is stopping"
    return "see to its permissions and to the space on its disk"


# ---------------------------------------------------------------------------------------- answers


class Answer(msgspec.Struct, frozen=True):
    """What became of one try. `wait_s`: how long the back end wants to be left alone."""

    outcome: Literal["taken", "refused", "later", "doubtful"]
    why: str | None = None
    rejected: int = 0
    wait_s: float | None = None


def answer_of(
    kind: Kind, status: int, headers: Mapping[str, str], body: bytes, now_unix_s: float
) -> Answer:
    """What a back end's answer means; see the module's table."""
    wait_s = retry_after_s(headers.get("Retry-After"), now_unix_s)
    if 200 <= status < 300:
        return _taken(kind, status, headers.get("Content-Type", ""), body)
    why = f"HTTP {status}" + _said(body, headers.get("Content-Type", ""))
    if status in _WAIT_FOR:
        return Answer("later", why, wait_s=wait_s)
    if status >= 500 or status == 408:
        return Answer("doubtful", why, wait_s=wait_s)
    return Answer("refused", why)


def _taken(kind: Kind, status: int, content_type: str, body: bytes) -> Answer:
    form = content_type.partition(";")[0].strip().lower()
    doubt = Answer("doubtful", f"HTTP {status} with {form or 'a body'} that is no OTLP answer")
    try:
        if not body or form == "text/plain":
            return Answer("taken")
        if form == "application/json":
            partial = json.loads(body).get("partialSuccess") or {}
            n = partial.get("rejectedDataPoints") or partial.get("rejectedSpans") or 0
            return _partly(int(n), str(partial.get("errorMessage") or ""))
        if form == "text/html":
            return doubt
        return _partly(*_partial_success(kind, body))
    except Exception:  # whatever a decoder says of bytes that are anything at all
        return doubt


def _partial_success(kind: Kind, body: bytes) -> tuple[int, str]:
    if kind == "metrics":
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceResponse,
        )

        of_metrics = ExportMetricsServiceResponse.FromString(body).partial_success
        return of_metrics.rejected_data_points, of_metrics.error_message
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    of_traces = ExportTraceServiceResponse.FromString(body).partial_success
    return of_traces.rejected_spans, of_traces.error_message


def _partly(rejected: int, message: str) -> Answer:
    """An answer that has a message and rejects nothing is a warning, and worth its line."""
    if rejected <= 0 and not message:
        return Answer("taken")
    said = f": {_line(message)}" if message else ""
    return Answer("taken", f"rejected {max(0, rejected)} points{said}", max(0, rejected))


def _said(body: bytes, content_type: str) -> str:
    """What a refusal says of itself, where that is text; OTLP sends a google.rpc.Status."""
    if content_type.startswith("text/plain") and body:
        return f": {_line(body.decode('utf-8', 'replace'))}"
    if content_type.startswith("application/x-protobuf") and body:
        from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

        with suppress(Exception):
            return f": {_line(Status.FromString(body).message)}"
    return ""


def _line(text: str) -> str:
    shown = " ".join(text.split())[:_WHY_CHARS_MAX]
    return "".join(c if c.isprintable() else "�" for c in shown)


def retry_after_s(header: str | None, now_unix_s: float) -> float | None:
    """`Retry-After` in seconds from now, at most RETRY_AFTER_S_MAX; None where it says nothing."""
    if not header:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(header).timestamp() - now_unix_s
        except (ValueError, OverflowError, IndexError, TypeError):
            return None
    return min(max(0.0, wait_s), RETRY_AFTER_S_MAX) if math.isfinite(wait_s) else None


def read_headers(path: Path) -> dict[str, str]:
    """`Name: value` lines of a file; empty lines and lines with `#` in front are comments.

    Raises UsageError that names the line, and never what stands in it: these are credentials.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8 text"
        raise UsageError(f"headers file {path}: {why}") from None
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if not (colon and name.isascii() and value.isprintable()) or not _is_token(name):
            raise UsageError(f"headers file {path}, line {number}: write it as `Name: value`")
        found[name] = value
    return found


def _is_token(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in "!#$%&'*+-.^_`|~" for c in name)


# ----------------------------------------------------------------------------------------- sender


class Sender:
    """Sends one kind of the outbox's requests to one address, the oldest first.

    One per kind: a trace back end that is down holds up no metrics. `headers_file` is read before
    each turn, so that a changed credential needs no restart. `ssl`: False for no verification, or
    a context with one's own authority. `timeout_s` is for the whole exchange. Redirects are not
    followed: they would take the headers elsewhere.
    """

    def __init__(
        self,
        outbox: Outbox,
        kind: Kind,
        url: str,
        *,
        headers_file: Path | None = None,
        ssl: tls.SSLContext | bool = True,
        timeout_s: float = TIMEOUT_S,
        backoff_s: tuple[float, float] = BACKOFF_S,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.kind = kind
        self.url = url
        self._outbox = outbox
        self._headers_file = headers_file
        self._ssl = ssl
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._rng = rng or random.Random()
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._failures = 0  # in a row
        self._news = asyncio.Event()

    async def put(self, message: bytes, points: int, state: bytes | None = None) -> bool:
        """`Outbox.put`, off the event loop: a slow disk holds up nobody else.

        False where it was not kept: a full disk, say. It is counted as dropped, with its line.
        """
        try:
            kept = await asyncio.to_thread(self._outbox.put, self.kind, message, points, state)
        except StoreError as error:
            self._outbox.lose(self.kind, str(error))
            return False
        self._news.set()
        return kept

    async def run(self) -> None:
        """Sends until it is cancelled. Whatever back end or disk do, it goes on."""
        while True:
            pause_s = await self.turn()
            if pause_s is None:
                await self._news.wait()
            else:
                await asyncio.sleep(pause_s)

    async def drain(self, budget_s: float) -> int:
        """Sends for at most `budget_s`, before the agent stops; returns what is left of the kind.

        A pause that the back end asked for is kept to: what is left is sent after the next start.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(budget_s):
                while await self.turn() == 0.0:
                    pass
        return self._outbox.status(self.kind).pending

    async def turn(self) -> float | None:
        """One request: how long to wait before the next in s, None where there is none."""
        self._news.clear()
        try:
            request = await asyncio.to_thread(self._outbox.oldest, self.kind)
            if request is None:
                return None
            answer = await self._try(request)
            return await asyncio.to_thread(self._book, request, answer)
        except StoreError as error:  # a full disk, say; what was taken is sent again
            self._outbox.last_error = str(error)
            return self._pause_s(None)

    def _book(self, request: Request, answer: Answer) -> float:
        why = f"{self.kind} to {self._shown}: {answer.why}" if answer.why else None
        gives_up = answer.outcome == "doubtful" and request.attempts + 1 >= DOUBTFUL_TRIES_MAX
        if answer.outcome == "taken":
            self._outbox.settle(request, rejected=min(answer.rejected, request.points), why=why)
            self._failures = 0
            return 0.0
        if answer.outcome == "refused" or gives_up:
            tries = f" ({DOUBTFUL_TRIES_MAX} tries)" if gives_up else ""
            self._outbox.settle(request, dropped=True, why=f"{why}; request dropped{tries}")
            self._failures = 0
            return 0.0
        self._outbox.keep(request, why or "", counts=answer.outcome == "doubtful")
        return self._pause_s(answer.wait_s)

    def _pause_s(self, asked_s: float | None) -> float:
        """What the back end asked for, else twice as long each time, and never all at once.

        The jitter takes up to half away: many agents that lost one back end come back spread out.
        """
        first_s, longest_s = self._backoff_s
        pause_s = min(longest_s, first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return asked_s if asked_s is not None else pause_s * self._rng.uniform(0.5, 1.0)

    async def _try(self, request: Request) -> Answer:
        import aiohttp

        try:
            headers = read_headers(self._headers_file) if self._headers_file else {}
            async with asyncio.timeout(self._timeout_s):
                return await self._post(request, headers)
        except TimeoutError:
            return Answer("later", f"no answer within {self._timeout_s:g} s")
        except UsageError as error:
            return Answer("later", str(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer("later", _cause(error))

    async def _post(self, request: Request, headers: Mapping[str, str]) -> Answer:
        fixed = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
        async with self._connected().post(
            self.url,
            data=io.BytesIO(request.body),
            headers={**headers, **fixed},
            allow_redirects=False,
        ) as response:
            body = b""
            while len(body) < _ANSWER_BYTES_MAX and (piece := await response.content.readany()):
                body += piece
            return answer_of(self.kind, response.status, response.headers, body, self._clock())

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            from agent import __version__

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=self._ssl),
                headers={"User-Agent": f"servefit/{__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(),  # one deadline, ours
            )
        return self._session

    @property
    def _shown(self) -> str:
        """The address without user, password and query, which may hold credentials."""
        from yarl import URL

        try:
            return str(URL(self.url).with_user(None).with_query(None))
        except ValueError:
            return "the back end"

    async def close(self) -> None:
        """Gives the connection back; may be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _cause(error: Exception) -> str:
    import os

    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its TLS certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno
        return os.strerror(code).lower() if code and code > 0 else _line(str(error.os_error))
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "it closed the connection before it answered"
    if isinstance(error, aiohttp.InvalidURL):
        return "not a URL"
    return _line(str(error)) or type(error).__name__


def signal_url(endpoint: str, kind: Kind) -> str:
    """The address for one kind: `endpoint` is a base URL as OTEL_EXPORTER_OTLP_ENDPOINT is.

    An endpoint that ends in `/v1/metrics` or `/v1/traces` is taken for that kind as it is, and its
    base for the other. Raises UsageError where it is no http or https URL.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(endpoint)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment:
        raise UsageError("[export.otlp] endpoint: give a URL like http://127.0.0.1:4318")
    base = endpoint.rstrip("/")
    for known in KINDS:
        base = base.removesuffix(f"/v1/{known}")
    return f"{base}/v1/{kind}"
