"""The outbox: what goes to an OTLP back end lies in SQLite until the back end has taken it.

OpenTelemetry's own exporter drops a batch after some ten seconds of outage. Here a request is
serialised once, with its own time stamps, and kept; a `Sender` sends the oldest first and deletes
it when it is acknowledged. A process killed between the two sends it again, byte for byte, so that
a back end that de-duplicates holds each point once.

The outbox is a file of its own beside the store: the store commits about once a second and may lose
the last second to a power cut, the outbox commits once for each export and loses nothing (WAL with
synchronous=FULL); and neither can take the other down by damage or growth.
"""

from __future__ import annotations

import gzip
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.model import Reading, StoreError

if TYPE_CHECKING:
    pass

Kind = Literal["metrics", "traces"]
KINDS: tuple[Kind, ...] = ("metrics", "traces")

BYTES_MAX = 64 * 1024 * 1024  # compressed; at 2 kB an export and four a minute, five days
COUNT_MAX = 100_000

_SCHEMA = 1
_BUSY_TIMEOUT_S = 1.0
_WAL_BYTES_MAX = 4 * 1024 * 1024
_FREE_PAGES_MAX = 256  # 1 MiB, which is kept for the next export; more is given back
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
        """Leaves it for another try; with `counts` this one is among its `attempts`."""
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
