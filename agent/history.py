"""The agent's store: raw readings, minutes and hours in SQLite, written by one thread.

Whoever samples hands over what it has and goes on; the writer commits about once a second. What a
commit has taken in survives `kill -9`; a power cut may cost the commits since the last checkpoint
(write-ahead log, synchronous=NORMAL), never the file. Only the writer's connection checkpoints:
SQLite before 3.51.3 can damage a log that two connections checkpoint. `agent.recall` reads beside.

Stamps are the wall clock's. A clock set back lets the same minutes happen twice; each pass is a
`part` of its own, neither overwrites the other, and whoever reads adds them up. The same holds for
a minute in which the agent was restarted.

On bad days: while the disk has less free than the floor, raw is shed, oldest first, and minutes go
on; a batch that cannot be written waits, within bounds, raw dropped first; a damaged file is set
aside with its date in the name, and a new one begun. Each is an event in the store and a counter.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import sqlite_utils

from agent import database, rows, schema, tiers
from agent.config import default_db
from agent.database import Lock, Locked, transaction
from agent.minutes import Minute
from agent.model import Reading, Served, StoreError, Sweep, TargetGpu, Verdict, encode
from agent.rows import Labels
from agent.tiers import Settings
from agent.timeline import Timeline

COMMIT_EVERY_S = 1.0
RETRY_AFTER_S = 5.0
UPKEEP_EVERY_S = 30.0
# An hour is closed so long after its end: its last minutes are still on their way.
GRACE_S = 150
# Nothing is forgotten until the wall clock has stood this long: a clock that is far ahead at boot
# would make everything old.
STEADY_S = 3600.0
# What may wait for the disk: about five minutes of raw and some hours of minutes, 30 MB.
WAITING_READINGS_MAX = 60_000
WAITING_RECORDS_MAX = 2_000
# A page of labels that never repeat would make a series of each reading.
SERIES_MAX = 20_000

T = TypeVar("T")
Job = Callable[[sqlite_utils.Database], Any]


class State(msgspec.Struct, frozen=True):
    """How the store is, for `status`, `/readyz` and the agent's own metrics."""

    bytes: int  # of the database and its log
    writer_lag_s: float  # age of the oldest thing not yet written
    ready: bool  # the file was checked, where it had to be, and the writer runs
    shedding: bool  # too little free disk: raw is not kept
    readings_dropped: int
    minutes_dropped: int
    raw_shed_blocks: int  # ten minutes of one series each
    write_errors: int
    set_aside: int  # damaged files
    error: str | None  # why the last batch was not written, None when it was


class _Readings(NamedTuple):
    source: str
    readings: Sequence[Reading]
    offset_ns: int


class _Minute(NamedTuple):
    minute: Minute
    finished: bool


class _Work(NamedTuple):
    job: Job
    future: Future[Any]


# ---------------------------------------------------------------------------------------- history


class History:
    """The one writer of the store at `path`. Raises StoreError, Locked where another writes.

    `add_…` hand over and return at once; `submit` runs a function of the database inside the next
    batch, and its Future is done when that is committed. All of them may be called from any thread.
    `free_bytes` tells the free space of the disk. Close it, or leave its context: what was handed
    over is then written.
    """

    def __init__(
        self,
        path: Path | None = None,
        settings: Settings | None = None,
        *,
        timeline: Timeline | None = None,
        free_bytes: Callable[[], int] | None = None,
        upkeep_every_s: float = UPKEEP_EVERY_S,
    ) -> None:
        self.path = path or default_db()
        self.settings = settings or Settings()
        self.timeline = timeline or Timeline()
        self._free_bytes = free_bytes or self._disk_free_bytes
        self._changed = threading.Condition()
        self._readings: deque[tuple[float, _Readings]] = deque()
        self._records: deque[tuple[float, _Minute | _Work]] = deque()
        self._readings_waiting = 0
        self._asked = self._written = 0  # flushes
        self._closing = False
        self._ready = self._shedding = False
        self._counts = {"readings": 0, "minutes": 0, "shed": 0, "errors": 0, "set_aside": 0}
        self._error: str | None = None
        self._oldest_s: float | None = None  # in the batch that is being written
        self._upkeep_every_s, self._upkeep_due_s = upkeep_every_s, 0.0
        self._packed_before = 0
        # the minute that each source is still in: (start, part)
        self._unfinished: dict[str, tuple[int, int]] = {}
        self._forget_ids()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
        except OSError as error:
            raise database.said(self.path, error) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------ handing over

    def add_readings(self, source: str, readings: Sequence[Reading]) -> None:
        """Raw readings of one source. Buckets of histograms and NaN are left out.

        A histogram's finest grain is the minute: its buckets would be most of all points.
        """
        kept = [one for one in readings if one.value - one.value == 0 and not _is_bucket(one)]
        if not kept:
            return
        with self._changed:
            if self._shedding or self._closing:
                self._counts["readings"] += len(kept)
                return
            item = _Readings(source, kept, self.timeline.offset_ns)
            self._readings.append((time.monotonic(), item))
            self._readings_waiting += len(kept)
            self._bound()

    def add_minute(self, minute: Minute, *, finished: bool = True) -> None:
        """A minute of one source. An unfinished one is replaced when it comes again.

        A finished one is never replaced: the same minute again (a clock set back) is another part.
        """
        self._hand_over(_Minute(minute, finished))

    def add_minutes(
        self, source: str, minutes: Sequence[Minute], state: bytes | None = None
    ) -> None:
        """Finished minutes of one source, and what it goes on from behind them (`Minutes.dump`).

        Both are committed or neither: an agent that died counts nothing twice, and lacks nothing.
        """
        items: list[_Minute | _Work] = [_Minute(minute, True) for minute in minutes]
        if state is not None:
            key = schema.state_key(source)
            items.append(_Work(lambda db: database.set_meta(db, key, state), Future()))
        self._hand_over(*items)

    def add_event(
        self,
        kind: str,
        text: str,
        *,
        source: str | None = None,
        at_unix_s: float | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Future[None]:
        """Something that happened, as a mark beside the series."""
        at = self.timeline.now_s() if at_unix_s is None else at_unix_s
        row = (at, kind, source, text, json.dumps(data) if data else None)
        return self.submit(lambda db: _insert_event(db, row))

    def add_source(self, name: str, *, service: str | None, gpus: Sequence[str] = ()) -> None:
        """What a source belongs to: its service, and of a server the GPUs (UUID) it runs on."""
        text = json.dumps(sorted(gpus))

        def job(db: sqlite_utils.Database) -> None:
            db.execute(
                "insert into sources(name, service, gpus) values (?, ?, ?) on conflict(name) "
                "do update set service = excluded.service, gpus = excluded.gpus",
                [name, service, text],
            )

        self.submit(job)

    def add_gpus(self, gpus: Sequence[TargetGpu]) -> None:
        """What GPUs are, as the driver tells it; the newest word on each stays."""
        lines = [(one.uuid, one.name, one.memory_total_bytes) for one in gpus]

        def job(db: sqlite_utils.Database) -> None:
            db.conn.executemany("insert or replace into gpus values (?, ?, ?)", lines)

        self.submit(job)

    def add_fingerprint(
        self, source: str, fingerprint: str, data: Mapping[str, Any]
    ) -> Future[bool]:
        """What a server is (model, version, flags), kept when it is not what it was before.

        The Future tells whether it changed.
        """
        at, text = self.timeline.now_s(), json.dumps(data, sort_keys=True)

        def job(db: sqlite_utils.Database) -> bool:
            newest = db.execute(
                "select fingerprint from fingerprints where source = ? order by id desc limit 1",
                [source],
            ).fetchone()
            if newest and newest[0] == fingerprint:
                return False
            db.execute(
                "insert into fingerprints(source, since_unix_s, fingerprint, data) "
                "values (?, ?, ?, ?)",
                [source, at, fingerprint, text],
            )
            return True

        return self.submit(job)

    def add_served(self, source: str, requests: Sequence[Served]) -> Future[None]:
        """Requests one by one, of a server whose own spans tell them."""

        def job(db: sqlite_utils.Database) -> None:
            id_ = self._source_id(source)
            db.conn.executemany(
                "insert into served values (null, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [rows.served_row(id_, one) for one in requests],
            )

        return self.submit(job)

    def add_curve(self, sweep: Sweep, source: str | None = None) -> Future[int]:
        """A measured curve, of the server `source` where that is known. The Future is its id.

        The same run again replaces what was kept of it. Raises UsageError for one that says
        nothing of any load.
        """
        row = rows.curve_row(sweep, source, self.timeline.now_s())
        return self.submit(lambda db: _insert_curve(db, row))

    def add_assessment(self, scope: str, verdict: Verdict) -> Future[None]:
        """What was concluded about a server or a service."""
        row = [self.timeline.now_s(), scope, verdict.finding, encode(verdict).decode()]

        def job(db: sqlite_utils.Database) -> None:
            sql = "insert into assessments(at_unix_s, scope, finding, verdict) values (?, ?, ?, ?)"
            db.execute(sql, row)

        return self.submit(job)

    def submit(self, job: Callable[[sqlite_utils.Database], T]) -> Future[T]:
        """Runs a function of the database inside the next batch.

        It may run again where a batch has to be written again, so it must touch nothing else; what
        it raises is its Future's, and only its own writing is undone. It must not commit: no
        `insert` or `upsert` of sqlite-utils, which do.
        """
        future: Future[T] = Future()
        self._hand_over(_Work(job, future))
        return future

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until what was handed over before is committed; False where that took too long."""
        with self._changed:
            self._asked += 1
            asked = self._asked
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._written >= asked, timeout_s)

    def state(self) -> State:
        with self._changed:
            waiting = [queue[0][0] for queue in (self._readings, self._records) if queue]
            waiting += [self._oldest_s] if self._oldest_s is not None else []
            return State(
                bytes=sum(database.size(Path(f"{self.path}{end}")) for end in ("", "-wal")),
                writer_lag_s=max(0.0, time.monotonic() - min(waiting)) if waiting else 0.0,
                ready=self._ready,
                shedding=self._shedding,
                readings_dropped=self._counts["readings"],
                minutes_dropped=self._counts["minutes"],
                raw_shed_blocks=self._counts["shed"],
                write_errors=self._counts["errors"],
                set_aside=self._counts["set_aside"],
                error=self._error,
            )

    def is_alive(self) -> bool:
        """Whether the writer's thread runs."""
        return self._thread.is_alive()

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes what is waiting, within the time, and lets go of the file. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _hand_over(self, *items: _Minute | _Work) -> None:
        """What is handed over at once is in one batch."""
        with self._changed:
            if self._closing:
                for item in items:
                    self._refuse(item, "the store is closed")
                return
            self._records.extend((time.monotonic(), item) for item in items)
            self._bound()

    def _bound(self) -> None:
        """Drops the oldest of what waits beyond its bounds."""
        while self._readings_waiting > WAITING_READINGS_MAX:
            dropped = len(self._readings.popleft()[1].readings)
            self._readings_waiting -= dropped
            self._counts["readings"] += dropped
        while len(self._records) > WAITING_RECORDS_MAX:
            self._refuse(self._records.popleft()[1], self._error or "too much is waiting")

    def _refuse(self, item: _Minute | _Work, why: str) -> None:
        if isinstance(item, _Minute):
            self._counts["minutes"] += 1
        else:
            _settle(item.future, StoreError(f"database {self.path}: not written: {why}"))

    # --------------------------------------------------------------------------- opening, closing

    def _open(self) -> None:
        """Raises StoreError; a damaged file of ours is set aside instead."""
        try:
            self._use_file()
        except sqlite3.Error as error:
            if not (database.is_damage(error) and self._was_ours()):
                raise database.said(self.path, error) from error
            self._set_aside(str(error))
        except OSError as error:
            raise database.said(self.path, error) from error

    def _use_file(self) -> None:
        self._forget_ids()
        self._db = database.connect(self.path)
        try:
            database.prepare(self._db, self.path)
            self._inode = self.path.stat().st_ino
        except BaseException:
            self._db.conn.close()
            raise

    def _was_ours(self) -> bool:
        """A file that no longer opens is set aside only if it says that it was ours once.

        That is our application id in its head, or a log of SQLite's beside it.
        """
        with open(self.path, "rb") as file:
            head = file.read(100)
        ours = schema.APPLICATION_ID.to_bytes(4, "big")
        return head[68:72] == ours or database.size(Path(f"{self.path}-wal")) > 0

    def _set_aside(self, why: str) -> None:
        """The damaged file under another name, its log with it, and a new one in its place."""
        date = datetime.fromtimestamp(self.timeline.now_s(), UTC).strftime("%Y%m%dT%H%M%SZ")
        aside = self.path.with_name(f"{self.path.name}.damaged-{date}")
        for end in ("-shm", "-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{end}").rename(f"{aside}{end}")
        self._counts["set_aside"] += 1
        self._use_file()
        text = f"the store was damaged ({why}): set aside as {aside.name}, a new one begun"
        _insert_event(self._db, (self.timeline.now_s(), "store_damaged", None, text, None))

    def _check(self) -> None:
        """After an unclean stop the whole file is looked at, before anything is added to it."""
        if database.meta(self._db, "clean") == 0:
            answer = self._db.execute("pragma quick_check(1)").fetchone()[0]
            if answer != "ok":
                raise sqlite3.DatabaseError(f"quick_check: {answer.splitlines()[-1]}")
        database.set_meta(self._db, "clean", 0)

    # -------------------------------------------------------------------------------- the writer

    def _run(self) -> None:
        """The writer's thread: a batch about once a second until it is closed."""
        self._begin()
        while True:
            with self._changed:
                if self._error:
                    self._changed.wait_for(lambda: self._closing, RETRY_AFTER_S)
                else:
                    self._changed.wait_for(self._is_asked, COMMIT_EVERY_S)
                closing, asked = self._closing, self._asked
            self._look_after(self._look_at_clock)
            written = self._write_waiting()
            if not closing and (self._shedding or time.monotonic() >= self._upkeep_due_s):
                self._upkeep_due_s = time.monotonic() + self._upkeep_every_s
                for task in (self._look_at_file, self._look_at_disk, self.tidy):
                    self._look_after(task)
            with self._changed:
                if written:
                    self._written = asked
                    self._changed.notify_all()
                if closing:
                    break
        self._end()

    def _is_asked(self) -> bool:
        return self._closing or self._asked > self._written

    def _begin(self) -> None:
        try:
            self._check()
        except sqlite3.Error as error:
            self._recover(error)
        self._ready = True

    def _end(self) -> None:
        with self._changed:
            for _, item in self._records:
                self._refuse(item, self._error or "the store is closed")
            self._counts["readings"] += self._readings_waiting
        with contextlib.suppress(sqlite3.Error):
            if not self._error:
                database.set_meta(self._db, "clean", 1)
        with contextlib.suppress(sqlite3.Error):
            self._db.conn.close()
        self._lock.release()

    def _write_waiting(self) -> bool:
        """Commits what waits; what could not be written waits on."""
        with self._changed:
            readings, self._readings = self._readings, deque()
            records, self._records = self._records, deque()
            self._readings_waiting = 0
            ages = [queue[0][0] for queue in (readings, records) if queue]
            self._oldest_s = min(ages, default=None)
        if not readings and not records:
            return True
        unfinished = dict(self._unfinished)
        try:
            done = self._commit([item for _, item in readings], [item for _, item in records])
        except (sqlite3.Error, OSError) as error:
            with self._changed:
                self._readings = readings + self._readings
                self._readings_waiting += sum(len(item.readings) for _, item in readings)
                self._records = records + self._records
                self._oldest_s = None
                self._bound()
            self._unfinished = unfinished
            self._forget_ids()
            self._recover(error)
            return False
        with self._changed:
            self._oldest_s = self._error = None
        for future, result in done:
            _settle(future, result)
        return True

    def _commit(
        self, readings: list[_Readings], records: list[_Minute | _Work]
    ) -> list[tuple[Future[Any], Any]]:
        """One transaction; of the jobs in it, what they returned or raised."""
        done = []
        with transaction(self._db):
            for batch in readings:
                if isinstance(self._work(partial(self._write_readings, batch)), Exception):
                    self._counts["readings"] += len(batch.readings)
            for record in records:
                if isinstance(record, _Work):
                    done.append((record.future, self._work(partial(record.job, self._db))))
                elif isinstance(self._work(partial(self._write_minute, record)), Exception):
                    self._counts["minutes"] += 1
        return done

    def _work(self, job: Callable[[], Any]) -> Any:
        """A job's result, or what it raised, with its own writing undone.

        SQLite's trouble with the file is not the job's, and is raised. What no table takes (a label
        that is no Unicode, a number beyond 64 bits) must not hold up everything behind it.
        """
        self._db.execute("savepoint job")
        try:
            result = job()
        except Exception as error:
            if (
                isinstance(error, sqlite3.Error)
                and database.code(error) & 0xFF not in database.OF_THE_STATEMENT
            ):
                raise
            self._db.execute("rollback to job")
            self._forget_ids()
            result = error
        self._db.execute("release job")
        return result

    def _recover(self, error: Exception) -> None:
        """What can be done about a failure; what failed is tried again afterwards."""
        self._counts["errors"] += 1
        self._error = str(error)
        try:
            if database.is_damage(error):
                self._db.conn.close()
                self._set_aside(str(error))
                database.set_meta(self._db, "clean", 0)
            elif isinstance(error, sqlite3.ProgrammingError):  # closed: the last attempt failed
                self._open()
            elif database.code(error) in database.FULL:
                self._counts["shed"] += tiers.shed(self._db)
        except (sqlite3.Error, OSError, StoreError) as worse:
            self._error = str(worse)

    # ------------------------------------------------------------------------------ what is kept

    def _forget_ids(self) -> None:
        """They may be of a transaction that was undone, or of a file that is gone."""
        self._series: dict[tuple[str, str, Labels, tuple[float, ...]], int] = {}
        self._sources: dict[str, int] = {}

    def _source_id(self, name: str) -> int:
        if name not in self._sources:
            self._db.execute("insert or ignore into sources(name) values (?)", [name])
            row = self._db.execute("select id from sources where name = ?", [name]).fetchone()
            self._sources[name] = row[0]
        return self._sources[name]

    def _series_id(
        self, source: str, name: str, labels: Labels, bounds: tuple[float, ...] = ()
    ) -> int | None:
        """None where there are too many series already."""
        key = (source, name, labels, bounds)
        if key not in self._series:
            if len(self._series) >= SERIES_MAX:
                return None
            row = [
                self._source_id(source),
                name,
                rows.labels_text(labels),
                rows.bounds_text(bounds),
            ]
            self._db.execute(
                "insert or ignore into series(source, name, labels, bounds) values (?, ?, ?, ?)",
                row,
            )
            self._series[key] = self._db.execute(
                "select id from series where source = ? and name = ? and labels = ? and bounds = ?",
                row,
            ).fetchone()[0]
        found = self._series[key]
        return found if found <= schema.SERIES_ID_MAX else None

    def _write_readings(self, batch: _Readings) -> None:
        points = [
            ((one.at_ns + batch.offset_ns) // 1_000_000, series, one.value)
            for one in batch.readings
            if (series := self._series_id(batch.source, one.name, one.labels)) is not None
        ]
        self._counts["readings"] += len(batch.readings) - len(points)
        self._db.conn.executemany("insert into raw_open values (?, ?, ?)", points)

    def _write_minute(self, item: _Minute) -> None:
        minute = item.minute
        source = self._source_id(minute.source)
        hour, second = divmod(minute.start_unix_s, schema.HOUR_S)
        at = (hour, second // 60)
        part = self._part(minute, source, at)
        lines = [
            (*at, self._series_id(minute.source, one.name, one.labels), part, *rows.value_row(one))
            for one in minute.values
        ]
        lines += [
            (
                *at,
                self._series_id(minute.source, one.name, one.labels, one.bounds),
                part,
                *rows.histogram_row(one),
            )
            for one in minute.histograms
        ]
        self._db.conn.executemany(
            "insert or replace into minute_open values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [row for row in lines if row[2] is not None],
        )
        marks = json.dumps(minute.marks) if minute.marks else None
        self._db.execute(
            "insert or replace into minute_source values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                hour,
                source,
                at[1],
                part,
                minute.covered_s,
                rows.counted_s(minute),
                minute.resets,
                marks,
                int(item.finished),
            ],
        )
        if item.finished:
            self._unfinished.pop(minute.source, None)
        else:
            self._unfinished[minute.source] = (minute.start_unix_s, part)

    def _part(self, minute: Minute, source: int, at: tuple[int, int]) -> int:
        """Which part of its minute: the one it is still in, or the next."""
        start, part = self._unfinished.get(minute.source, (None, 0))
        if start == minute.start_unix_s:
            return part
        sql = """select coalesce(max(part), -1) + 1 from minute_source
                 where hour = ? and source = ? and minute = ?"""
        found = self._db.execute(sql, [at[0], source, at[1]]).fetchone()[0]
        return min(int(found), schema.PART_MAX)

    # -------------------------------------------------------------------------------------- upkeep

    def _look_after(self, task: Callable[[], None]) -> None:
        """Upkeep that fails, whatever the reason, is counted and comes again: writing goes on."""
        try:
            task()
        except Exception as error:
            self._forget_ids()
            self._recover(error)

    def _look_at_file(self) -> None:
        """A file that somebody removed or replaced takes nothing in: a new one is opened."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                return
        self._db.conn.close()
        self._use_file()
        text = "the store's file was removed while it was written: what it held is gone"
        _insert_event(self._db, (self.timeline.now_s(), "store_removed", None, text, None))

    def _look_at_clock(self) -> None:
        jumped_s = self.timeline.jumped_s()
        if jumped_s is not None:
            way = "forward" if jumped_s > 0 else "back"
            text = f"the clock was set {way} by {abs(jumped_s):.3f} s"
            row = (self.timeline.now_s(), "clock_jump", None, text, json.dumps({"by_s": jumped_s}))
            _insert_event(self._db, row)

    def _look_at_disk(self) -> None:
        free = self._free_bytes()
        is_short = free < self.settings.free_bytes_min * (1.1 if self._shedding else 1.0)
        if is_short != self._shedding:
            self._shedding = is_short
            text = f"{free:,} bytes free, {self.settings.free_bytes_min:,} are to be left: raw "
            text += "readings are shed, oldest first" if is_short else "readings are kept again"
            kind = "shedding_began" if is_short else "shedding_ended"
            with contextlib.suppress(sqlite3.OperationalError):  # of all days
                _insert_event(self._db, (self.timeline.now_s(), kind, None, text, None))
        if is_short:
            self._counts["shed"] += tiers.shed(self._db)

    def _disk_free_bytes(self) -> int:
        disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize

    def tidy(self) -> None:
        """Packs closed blocks, closes hours, and forgets one step of what is too old."""
        now_s = self.timeline.now_s()
        block = int(now_s - 10) // schema.RAW_BLOCK_S
        if block != self._packed_before:
            tiers.pack(self._db, block)
            self._packed_before = block
        tiers.close_hours(self._db, int(now_s - GRACE_S) // schema.HOUR_S)
        if self.timeline.steady_s() >= STEADY_S:
            tiers.forget(self._db, self.settings, now_s)
        tiers.give_back(self._db)


# ------------------------------------------------------------------------------------------- rows


def _is_bucket(reading: Reading) -> bool:
    return reading.name.endswith("_bucket")


def _insert_event(db: sqlite_utils.Database, row: Sequence[Any]) -> None:
    db.execute(
        "insert into events(at_unix_s, kind, source, text, data) values (?, ?, ?, ?, ?)", row
    )


def _insert_curve(db: sqlite_utils.Database, row: dict[str, Any]) -> int:
    names = ", ".join(row)
    places = ", ".join(f":{name}" for name in row)
    known = "coalesce(excluded.source, source)"  # whoever brings it again may not know whose it is
    updates = ", ".join(
        f"{name} = {known if name == 'source' else f'excluded.{name}'}"
        for name in row
        if name != "key"
    )
    db.execute(
        f"insert into curves({names}) values ({places}) on conflict(key) do update set {updates}",
        row,
    )
    found = db.execute("select id from curves where key = ?", [row["key"]]).fetchone()
    return int(found[0])


def import_curve(path: Path | None, sweep: Sweep, source: str | None = None) -> int:
    """Brings a curve into the store, whether an agent runs or not; returns its id.

    Beside a running agent this is one short transaction of a connection that never checkpoints.
    Raises StoreError, UsageError for a curve that says nothing.
    """
    path = path or default_db()
    row = rows.curve_row(sweep, source, time.time())
    try:
        with History(path) as history:
            return history.add_curve(sweep, source).result(timeout=60)
    except Locked:
        pass
    try:
        db = database.connect(path)
        try:
            db.execute("pragma wal_autocheckpoint = 0")
            with transaction(db):
                return _insert_curve(db, row)
        finally:
            db.conn.close()
    except sqlite3.Error as error:
        raise database.said(path, error) from error


def _settle(future: Future[Any], result: Any) -> None:
    """The one who waited may have stopped waiting."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
