"""The agent's store as a connection that only reads, while the agent writes."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import sqlite_utils

from agent import schema
from agent.config import default_db
from agent.database import check_version, said
from agent.model import StoreError

BUSY_TIMEOUT_S = 5.0
_STEPS = 10_000  # of SQLite's machine, some 0.1 ms, between two looks at `give_up`


class Reader:
    """The store at `path`, read only. Raises StoreError where there is none, or none of ours.

    One thread at a time; close it, or leave its context. `give_up` is asked again and again while
    SQLite works; once it says yes, that question and all others end with a StoreError.
    """

    def __init__(
        self, path: Path | None = None, *, give_up: Callable[[], bool] | None = None
    ) -> None:
        self.path = path or default_db()
        if not self.path.exists():
            raise StoreError(
                f"no agent has written {self.path}: start `agent run`, or give another --db"
            )
        with self.guarded():
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                check_same_thread=False,
            )
            self.db = sqlite_utils.Database(connection)
            connection.set_progress_handler(give_up, _STEPS)
            try:
                self._check()
            except BaseException:
                connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.conn.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is asked inside is of one moment, however much is written meanwhile.

        Without it, what moves from an open table to its place can be missed between two looks. One
        inside another is of the other's moment.
        """
        if self.db.conn.in_transaction:
            yield
            return
        with self.guarded():
            self.db.execute("begin")
        try:
            yield
        finally:
            self.db.conn.rollback()

    def _check(self) -> None:
        if self.number("pragma application_id") != schema.APPLICATION_ID:
            raise StoreError(f"{self.path} is not an agent's store: give another --db")
        version = self.number("pragma user_version") or 0
        check_version(int(version), self.path)
        if version < len(schema.MIGRATIONS):
            raise StoreError(
                f"{self.path} was written by an older servefit: start `agent run` once, which "
                "brings it up to date"
            )

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise said(self.path, error) from error

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.guarded():
            return self.db.execute(sql, parameters).fetchall()

    def number(self, sql: str, parameters: Sequence[Any] = ()) -> float | None:
        rows = self.rows(sql, parameters)
        return rows[0][0] if rows else None
