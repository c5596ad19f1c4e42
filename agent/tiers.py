"""Raw readings into chunks, minutes into hours, and what is forgotten when.

Each is a function of the database that the store's writer calls now and then; what it does once it
may do again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import sqlite_utils

from agent import chunks, schema
from agent.database import pragma, transaction, vacuum
from agent.rows import counts_text, thousandths

DAY_S = 86_400
# Pages that deletions left are used again; only what exceeds this share goes back to the disk.
SPARE_SHARE = 0.02
VACUUM_PAGES = 512
SERVED_MAX = 1_000_000  # requests that are kept one by one: 60 MB
SERVED_AT_ONCE = 20_000


class Settings(msgspec.Struct, frozen=True):
    """How long each tier is kept, and how much of the disk is left alone; None is for ever."""

    raw_s: float | None = 7.0 * DAY_S
    minutes_s: float | None = 90.0 * DAY_S
    hours_s: float | None = None
    free_bytes_min: int = 512 * 1024 * 1024


def shed(db: sqlite_utils.Database) -> int:
    """The oldest hour of raw goes, and its pages back to the disk; how many chunks that were."""
    blocks = schema.HOUR_S // schema.RAW_BLOCK_S
    with transaction(db):
        gone = db.execute(
            "delete from raw where key < (((select min(key) from raw) >> 32) + ?) << 32",
            [blocks],
        ).rowcount
        if not gone:
            gone = db.execute("delete from raw_open").rowcount
    vacuum(db)
    db.execute("pragma wal_checkpoint(truncate)").fetchall()
    return int(gone)


def pack(db: sqlite_utils.Database, before: int) -> None:
    """Raw rows of blocks before that one become chunks, in the order they came."""
    end_ms = before * schema.RAW_BLOCK_S * 1000
    cursor = db.execute(
        f"""select at_ms / {schema.RAW_BLOCK_S * 1000} as block, series, at_ms, value
            from raw_open where at_ms < ? order by block, series, rowid""",
        [end_ms],
    )
    rows = []
    for key, points in _grouped(cursor):
        times, values = zip(*points, strict=True)
        rows.append((schema.key(*key), schema.PART_MAX, chunks.pack(times, values)))
    with transaction(db):
        db.conn.executemany(
            """insert or replace into raw(key, points)
               select min(coalesce(max(key) + 1, ?1), ?1 + ?2), ?3
               from raw where key between ?1 and ?1 + ?2""",
            rows,
        )
        db.execute("delete from raw_open where at_ms < ?", [end_ms])


def close_hours(db: sqlite_utils.Database, before: int) -> None:
    """Minutes of hours before that one go to their place, and the hours are made of them."""
    sql = "select distinct hour from minute_open where hour < ? order by hour"
    for (hour,) in db.execute(sql, [before]).fetchall():
        with transaction(db):
            db.execute(schema.MOVE_MINUTES, {"hour": hour})
            db.execute("delete from minute_open where hour = ?", [hour])
            db.execute(schema.ROLL_HOUR, {"hour": hour})
            db.execute(schema.ROLL_SOURCES, {"hour": hour})
            _roll_histograms(db, hour)


def _roll_histograms(db: sqlite_utils.Database, hour: int) -> None:
    sql = """select series, counts from minute
             where key between ? and ? and counts is not null"""
    sums: dict[int, list[float]] = {}
    whole_hour = [schema.key(hour, 0), schema.key(hour + 1, 0) - 1]
    for series, kept in db.execute(sql, whole_hour).fetchall():
        counts = json.loads(kept)
        whole = sums.setdefault(series, [])
        whole.extend([0] * (len(counts) - len(whole)))
        for at, count in enumerate(counts):
            whole[at] += count
    rows = [
        (schema.key(hour, series), round(sum(whole)), counts_text(thousandths(whole)))
        for series, whole in sums.items()
    ]
    db.conn.executemany("insert or replace into hour(key, n, counts) values (?, ?, ?)", rows)


def forget(db: sqlite_utils.Database, kept: Settings, now_s: float) -> None:
    """One block or hour of each tier at a time, so that no batch waits long for it."""
    for table, block_s, kept_s in (
        ("raw", schema.RAW_BLOCK_S, kept.raw_s),
        ("minute", schema.HOUR_S, kept.minutes_s),
        ("hour", schema.HOUR_S, kept.hours_s),
    ):
        if kept_s is None:
            continue
        limit = int(now_s - kept_s) // block_s
        first = db.execute(f"select min(key) >> 32 from {table}").fetchone()[0]
        if first is not None and first < limit:
            end = schema.key(first + 1, 0)
            db.execute(f"delete from {table} where key < ?", [end])
        if table != "raw":
            db.execute(f"delete from {table}_source where hour < ?", [limit])
    _forget_served(db, kept, now_s)


def _forget_served(db: sqlite_utils.Database, kept: Settings, now_s: float) -> None:
    """Requests are kept as long as raw readings, and no more than SERVED_MAX of them."""
    newest = db.execute("select max(id) from served").fetchone()[0]
    if newest is None:
        return
    db.execute(
        "delete from served where id in (select id from served where id <= ? limit ?)",
        [newest - SERVED_MAX, SERVED_AT_ONCE],
    )
    if kept.raw_s is not None:
        db.execute(
            "delete from served where id in (select id from served where at_ms < ? limit ?)",
            [int((now_s - kept.raw_s) * 1000), SERVED_AT_ONCE],
        )


def give_back(db: sqlite_utils.Database) -> None:
    """Free pages beyond what will be used again go back to the disk, some at a time."""
    spare = pragma(db, "page_count") * SPARE_SHARE + VACUUM_PAGES
    if pragma(db, "freelist_count") > spare:
        vacuum(db, VACUUM_PAGES)


def _grouped(cursor: Iterator[Any]) -> Iterator[tuple[tuple[int, int], list[tuple[int, float]]]]:
    """Rows (block, series, at_ms, value) in order, by the first two."""
    key: tuple[int, int] | None = None
    points: list[tuple[int, float]] = []
    for block, series, at_ms, value in cursor:
        if key != (block, series):
            if key is not None:
                yield key, points
            key, points = (block, series), []
        points.append((at_ms, value))
    if key is not None:
        yield key, points
