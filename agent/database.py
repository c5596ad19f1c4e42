"""The file of the agent's store: who may write it, how it is opened, what SQLite says of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import sqlite_utils

from agent import schema
from agent.model import StoreError

BUSY_TIMEOUT_S = 5.0
JOURNAL_BYTES_MAX = 16 * 1024 * 1024

# SQLite's result codes, the low byte says the kind: https://www.sqlite.org/rescode.html
DAMAGED = (11, 26)  # CORRUPT, NOTADB
FULL = (13, 778)  # FULL, IOERR_WRITE (a limit on the size of files)
OF_THE_STATEMENT = (1, 6, 19, 20, 25)  # ERROR (wrong SQL), LOCKED, CONSTRAINT, MISMATCH, RANGE


class Locked(StoreError):
    """Another agent writes to the store."""


class Lock:
    """A file beside the database, held by the one process that writes; the system lets go of it.

    Raises StoreError naming the other process.
    """

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(database.name + "-lock")
        self._file: IO[str] = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            self._file.close()
            raise Locked(
                f"{database} is written by another agent, process {pid}: stop that one, or give "
                "this one another db"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def connect(path: Path) -> sqlite_utils.Database:
    """A connection that writes; transactions are begun and ended by hand."""
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    return sqlite_utils.Database(connection)


def prepare(db: sqlite_utils.Database, path: Path) -> None:
    """A new or older database gets what it lacks. Raises StoreError for one that is not ours."""
    if db.execute("select count(*) from sqlite_master").fetchone()[0] == 0:
        db.execute("pragma auto_vacuum = incremental")
        db.execute("vacuum")  # takes that over, where a killed process had begun the file
    elif pragma(db, "application_id") != schema.APPLICATION_ID:
        raise StoreError(f"{path} is a database of something else: give the agent another db")
    db.execute("pragma journal_mode = wal")
    db.execute("pragma synchronous = normal")
    db.execute(f"pragma journal_size_limit = {JOURNAL_BYTES_MAX}")
    version = pragma(db, "user_version")
    check_version(version, path)
    for number in range(version, len(schema.MIGRATIONS)):
        with transaction(db):
            for statement in schema.MIGRATIONS[number]:
                db.execute(statement)
            db.execute(f"pragma application_id = {schema.APPLICATION_ID}")
            db.execute(f"pragma user_version = {number + 1}")


def check_version(version: int, path: Path) -> None:
    """Raises StoreError for a database that a newer servefit wrote."""
    newest = len(schema.MIGRATIONS)
    if version > newest:
        raise StoreError(
            f"{path} was written by a newer servefit (schema {version}, this one knows {newest}): "
            "update servefit, or give another db"
        )


@contextlib.contextmanager
def transaction(db: sqlite_utils.Database) -> Iterator[None]:
    db.execute("begin immediate")
    try:
        yield
        db.execute("commit")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # some failures end the transaction themselves
            db.execute("rollback")
        raise


def pragma(db: sqlite_utils.Database, name: str) -> int:
    return int(db.execute(f"pragma {name}").fetchone()[0])


def said(path: Path, error: Exception) -> StoreError:
    """What SQLite or the system said, as one line with what to do."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    advice = "see to its permissions and to the space on its disk"
    if "locked" in text or "busy" in text:
        advice = "another program is writing to it: wait for that one"
    elif "full" in text or "No space" in text:
        advice = "free some space"
    elif is_damage(error):
        advice = "it is damaged or not a database: move it away"
    return StoreError(f"database {path}: {text}; {advice}, or give another db")


def is_damage(error: Exception) -> bool:
    return code(error) & 0xFF in DAMAGED or str(error).startswith("quick_check")


def code(error: Exception) -> int:
    """SQLite's result code; 1 (a plain error) of what Python's module says itself."""
    return int(getattr(error, "sqlite_errorcode", 1))


def vacuum(db: sqlite_utils.Database, pages: int | None = None) -> None:
    """Gives free pages back to the disk; None is all.

    It is a statement without columns that has a row for each page, and Python's `execute` stops at
    the first of those; a script is run to its end.
    """
    db.executescript(f"pragma incremental_vacuum({pages or 0})")


def meta(db: sqlite_utils.Database, key: str) -> Any:
    row = db.execute("select value from meta where key = ?", [key]).fetchone()
    return row[0] if row else None


def set_meta(db: sqlite_utils.Database, key: str, value: Any) -> None:
    db.execute("insert or replace into meta values (?, ?)", [key, value])


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
