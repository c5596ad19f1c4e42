"""SQLite through sqlite-utils: what was measured, kept as it comes.

Write-ahead log, one writer at a time, a transaction a level: a killed process leaves every finished
level behind. `runs.sweep` is the whole of a run as `--json` writes it; `levels` and `requests` hold
the same in columns, for plain SQL.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import platformdirs
import sqlite_utils

from agent.model import Level, StoreError, Sweep, UsageError, decode_sweep, encode

SCHEMA = 2
BUSY_TIMEOUT_S = 10.0
REQUESTS_PER_LEVEL_MAX = 20_000

_TABLES: dict[str, dict[str, Any]] = {
    "runs": {
        "id": str, "started_at": str, "command": str, "url": str, "model": str, "engine": str,
        "simulated": int, "interrupted": int, "levels": int, "finding": str, "sweep": str,
        "options": str, "state": str,
    },
    "levels": {
        "run_id": str, "level": int, "mode": str, "concurrency": int, "offered_rps": float,
        "valid": int, "duration_s": float, "requests_ok": int, "requests_failed": int,
        "output_tokens_per_s": float, "request_throughput": float, "ttft_p50_ms": float,
        "ttft_p95_ms": float, "itl_p50_ms": float, "itl_p95_ms": float, "e2e_p95_ms": float,
        "kv_usage_max": float, "waiting_max": float,
    },
    "requests": {
        "run_id": str, "level": int, "request": int, "due_ms": float, "sent_ms": float,
        "ttft_ms": float, "e2e_ms": float, "prompt_tokens": int, "output_tokens": int,
        "error": str,
    },
}  # fmt: skip
_KEYS = {"runs": "id", "levels": ("run_id", "level"), "requests": ("run_id", "level", "request")}


# What became of a run: it runs (or was killed), it is done, or its last level was cut short.
State = Literal["running", "done", "cut"]


class Kept(NamedTuple):
    """A run as it is kept; options and state are null where an older version kept it."""

    sweep: Sweep
    options: str | None
    state: State | None


def default_path() -> Path:
    """`servefit.db` in the user's data directory."""
    return Path(platformdirs.user_data_dir("servefit")) / "servefit.db"


class Store:
    """The runs of the load generator. Raises StoreError, with what to do, for whatever SQLite says.

    Use it as a context manager, or `close` it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        with self._guarded():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
            self._db = sqlite_utils.Database(connection)
            try:
                self._prepare()
            except BaseException:
                connection.close()
                raise

    def _prepare(self) -> None:
        self._db.enable_wal()
        self._db.execute("pragma synchronous = normal")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer servefit (schema {version}, this one knows "
                f"{SCHEMA}): update servefit, or give another --db"
            )
        if version < SCHEMA:
            self._migrate()

    def _migrate(self) -> None:
        """Makes what a new or older database lacks: tables, and columns of tables."""
        with self._db.conn:
            self._db.execute("begin immediate")  # another process may be about to do the same
            for name, columns in _TABLES.items():
                table = self._db.table(name)
                table.create(columns, pk=_KEYS[name], if_not_exists=True)
                for column in columns.keys() - table.columns_dict.keys():
                    table.add_column(column, columns[column])
            self._db.execute(f"pragma user_version = {SCHEMA}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.conn.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"database {self.path}: {_why(error)}; {_advice(error)}, or give another --db"
            ) from error

    # ---------------------------------------------------------------------------------- writing

    def save(
        self,
        sweep: Sweep,
        *,
        level: int | None = None,
        requests: Iterable[Sequence[Any]] = (),
        options: str | None = None,
        state: State | None = None,
    ) -> None:
        """Keeps the run as it stands; with `level`, that level's row and its requests too.

        `options` (JSON) and `state` are what `kept` gives back; None leaves them as they are.
        `requests`: rows of (request, due_ms, sent_ms, ttft_ms, e2e_ms, prompt_tokens,
        output_tokens, error), ms since the level's start; of a longer level only the first
        REQUESTS_PER_LEVEL_MAX are kept.
        """
        with self._guarded(), self._db.conn:
            row = _run_row(sweep)
            row |= {"options": options} if options is not None else {}
            row |= {"state": state} if state is not None else {}
            self._db.table("runs").upsert(row, pk="id")
            if level is not None:
                row = _level_row(sweep.run.id, level, sweep.levels[level])
                self._db.table("levels").upsert(row, pk=("run_id", "level"))
                self._db.execute(
                    "delete from requests where run_id = ? and level = ?", [sweep.run.id, level]
                )
                names = list(_TABLES["requests"])[2:]
                rows = (
                    {"run_id": sweep.run.id, "level": level, **dict(zip(names, row, strict=True))}
                    for _, row in zip(range(REQUESTS_PER_LEVEL_MAX), requests, strict=False)
                )
                self._db.table("requests").insert_all(rows, batch_size=500, replace=True)

    # ---------------------------------------------------------------------------------- reading

    def runs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The newest runs, newest first, without the sweep itself."""
        columns = ", ".join(
            name for name in _TABLES["runs"] if name not in ("sweep", "options", "state")
        )
        with self._guarded():
            sql = f"select {columns} from runs order by started_at desc, rowid desc limit ?"
            return list(self._db.query(sql, [limit]))

    def load(self, run: str) -> Sweep:
        """A run by its id, a unique beginning of it, or `latest`. Raises UsageError."""
        return self.kept(run).sweep

    def kept(self, run: str) -> Kept:
        """The same, with what it needs to be taken up again."""
        with self._guarded():
            columns = "id, sweep, options, state"
            if run in ("latest", "last"):
                sql = f"select {columns} from runs order by started_at desc, rowid desc limit 1"
                rows = list(self._db.query(sql))
            else:
                sql = f"select {columns} from runs where id = ? or substr(id, 1, ?) = ?"
                rows = list(self._db.query(sql, [run, len(run), run]))
        exact = [row for row in rows if row["id"] == run]
        found = exact or rows
        if not found:
            raise UsageError(f"no run {run!r} in {self.path}: `loadgen runs` lists them")
        if len(found) > 1:
            raise UsageError(f"{run!r} begins {len(found)} runs: write more of the id")
        try:
            whole = decode_sweep(str(found[0]["sweep"]).encode())
        except UsageError as error:
            raise StoreError(f"run {found[0]['id']} in {self.path}: {error}") from error
        return Kept(whole, found[0]["options"], found[0]["state"])

    def requests(self, run_id: str) -> list[dict[str, Any]]:
        """The kept requests of a run, in order."""
        with self._guarded():
            sql = "select * from requests where run_id = ? order by level, request"
            return list(self._db.query(sql, [run_id]))


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _advice(error: Exception) -> str:
    """What to do about what SQLite or the system says."""
    text = _why(error)
    if "locked" in text or "busy" in text:
        return "another program is writing to it: wait for that one"
    if any(word in text for word in ("not a database", "malformed", "no column", "no such table")):
        return "it is damaged or not ours: move it away"
    if "full" in text or "No space" in text or "too large" in text:
        return "free some space"
    return "see to its permissions and to the space on its disk"


def _run_row(sweep: Sweep) -> dict[str, Any]:
    return {
        "id": sweep.run.id,
        "started_at": sweep.run.started_at,
        "command": sweep.run.command,
        "url": sweep.target.url,
        "model": sweep.target.model,
        "engine": sweep.target.engine,
        "simulated": int(sweep.run.simulated),
        "interrupted": int(sweep.run.interrupted),
        "levels": len(sweep.levels),
        "finding": sweep.verdict.finding if sweep.verdict else None,
        "sweep": encode(sweep).decode(),
    }


def _level_row(run_id: str, index: int, level: Level) -> dict[str, Any]:
    requests, server = level.requests, level.server
    return {
        "run_id": run_id,
        "level": index,
        "mode": level.mode,
        "concurrency": level.concurrency,
        "offered_rps": level.offered_rps,
        "valid": int(level.measurement.valid) if level.measurement else None,
        "duration_s": level.duration_s,
        "requests_ok": requests.ok if requests else None,
        "requests_failed": requests.failed if requests else None,
        "output_tokens_per_s": level.output_tokens_per_s,
        "request_throughput": level.request_throughput,
        "ttft_p50_ms": level.ttft_ms.p50,
        "ttft_p95_ms": level.ttft_ms.p95,
        "itl_p50_ms": level.itl_ms.p50,
        "itl_p95_ms": level.itl_ms.p95,
        "e2e_p95_ms": level.e2e_ms.p95,
        "kv_usage_max": server.kv_usage_max if server else None,
        "waiting_max": server.waiting_max if server else None,
    }
