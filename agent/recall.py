"""Questions to the agent's store, by a connection that only reads, while the agent writes.

A series is answered from the coarsest tier that is still as fine as the step, from a coarser one
where the finer was forgotten, and from a finer one for the newest, which no minute or hour holds
yet: a window runs to the newest reading. Counters are told as rates, over the time they were
really watched; ratios of several servers or GPUs are averaged, amounts added.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import sqlite_utils
from numpy.typing import NDArray

from agent import chunks, schema
from agent.config import default_db
from agent.database import check_version, said
from agent.metrics import CATALOGUE
from agent.minutes import Minute, MinuteHistogram, Minutes, MinuteValue
from agent.model import StoreError, Sweep, TargetGpu, UsageError, decode_sweep
from agent.sizing.window import Counts, Records, Values
from agent.stats import Floats, Histogram, merged, percentile

POINTS_WANTED = 300
POINTS_MAX = 50_000
# A reading stands for what follows it so long, where the step is finer than the sampling.
STALE_S = 15.0
# A counter's increase over a longer silence is nobody's: not spread over it.
GAP_S = 300.0
BUSY_TIMEOUT_S = 5.0
_STEPS = 10_000  # of SQLite's machine, some 0.1 ms, between two looks at `give_up`
# A source that says one of these is an inference server.
SAID_BY_SERVERS = ("requests_running", "output_tokens_total")

Tier = Literal["raw", "minute", "hour"]
Kind = Literal["gauge", "counter", "histogram"]


class Recipe(NamedTuple):
    """A figure made of counters: an increase a second, or one increase over another."""

    counter: str
    over: str | None
    unit: str
    scale: float = 1.0


RECIPES: dict[str, Recipe] = {
    "requests_per_s": Recipe("requests_finished_total", None, "{request}/s"),
    "prompt_tokens_per_s": Recipe("prompt_tokens_total", None, "{token}/s"),
    "output_tokens_per_s": Recipe("output_tokens_total", None, "{token}/s"),
    "preemptions_per_s": Recipe("preemptions_total", None, "{request}/s"),
    "prefix_hit_ratio": Recipe("prefix_cache_hits_total", "prefix_cache_queries_total", "1"),
    "energy_j_per_output_token": Recipe("gpu_energy_j", "output_tokens_total", "J/{token}"),
    **{
        f"{stage}_mean_ms": Recipe(f"{stage}_seconds_sum", f"{stage}_seconds_count", "ms", 1000.0)
        for stage in ("queue", "prefill", "decode", "ttft", "itl", "e2e")
    },
}


class Percentile(NamedTuple):
    """A quantile of a histogram of seconds, told in ms.

    Buckets are of minutes: no step is shorter, and the last minute is the last that ended. A value
    in the bucket without an upper end is told as that bucket's beginning, which it surely reached.
    """

    histogram: str
    share: float


PERCENTILES: dict[str, Percentile] = {
    f"{name}_p{round(share * 100)}_ms": Percentile(f"{name}_seconds", share)
    for name in ("ttft", "itl", "e2e")
    for share in (0.5, 0.95, 0.99)
}


class Series(msgspec.Struct, frozen=True):
    """What `/api/v1/series` answers: (unix_s of the step's beginning, value), in order of time."""

    metric: str
    unit: str
    points: list[tuple[float, float]]


class Column(msgspec.Struct, frozen=True):
    """One metric of a table: a value for each step, null where nothing is known of it."""

    unit: str
    values: list[float | None]


class Table(msgspec.Struct, frozen=True):
    """What `/api/v1/table` answers: step number n begins at `from_s` + n · `step_s` (unix, s)."""

    from_s: int
    step_s: int
    metrics: dict[str, Column]


class Which(NamedTuple):
    """Whose series are meant; null is everybody's."""

    server: str | None = None
    service: str | None = None
    gpu: str | None = None


class _Place(NamedTuple):
    """A table of minutes or hours: how its row `k` is found, and when that begins.

    `blocks`: the numbers `block.at` from ?1 to ?2, the first and the last second that is asked for.
    """

    table: str
    on: str
    start: str
    blocks: str


# What is summed up of a kind, and what a row of it always has.
_FIGURES: dict[Kind, str] = {
    "gauge": "sum(coalesce(mean, last) * max(n, 1)), sum(max(n, 1))",
    "counter": "sum(increase), sum(counted_s)",
    "histogram": "'[' || group_concat(counts) || ']'",
}
_FIGURE: dict[Kind, str] = {"gauge": "last", "counter": "increase", "histogram": "counts"}
# The same as it is kept, of each record.
_COLUMNS: dict[Kind, dict[str, str]] = {
    "gauge": {"last": "last"} | {one: f"coalesce({one}, last)" for one in ("mean", "min", "max")},
    "counter": {"increase": "increase"},
    "histogram": {"counts": "counts"},
}
_HOUR_BLOCKS = """with recursive block(at) as
    (select ?1 / 3600 union all select at + 1 from block where at < ?2 / 3600)"""
# Few hours are open, and their key is of minutes: each minute is looked up in them.
_OPEN_BLOCKS = """with recursive block(at) as
    (select max(?1 / 60, (select min(hour) * 60 from minute_open))
     union all select at + 1 from block where at < ?2 / 60)"""
# The first of a series' keys in a block, to the last.
_KEY = "(block.at << 32) + (s.id << 12)"
_BY_KEY = f"k.key between {_KEY} and {_KEY} + 4095"
_MINUTE_START = "(k.hour * 3600 + k.minute * 60)"
# Rising from record to record of a source.
_PARTS = schema.PART_MAX + 1
_NUMBER = f"(k.hour * 60 + k.minute) * {_PARTS} + k.part"
_HOURS = (_Place("hour", _BY_KEY, "k.hour * 3600", _HOUR_BLOCKS),)
_MINUTES = (
    _Place("minute", _BY_KEY, _MINUTE_START, _HOUR_BLOCKS),
    _Place(
        "minute_open",
        "k.hour = block.at / 60 and k.minute = block.at % 60 and k.series = s.id",
        _MINUTE_START,
        _OPEN_BLOCKS,
    ),
)


class _Source(NamedTuple):
    id: int
    name: str
    series: tuple[int, ...]


class _Question:
    """One question about several metrics: what it is of, and what was read for it already."""

    def __init__(
        self, metrics: Iterable[str], from_s: float, to_s: float, step: int, which: Which
    ) -> None:
        self.metrics = tuple(dict.fromkeys(metrics))
        self.from_s, self.to_s, self.step, self.which = from_s, to_s, step, which
        self.sources: dict[str, list[_Source]] = {}  # by name, as `Recall._sources_of` finds them
        self.pieces: dict[tuple[int, int], list[tuple[Tier, int, int]]] = {}
        self.rolled: dict[tuple[Tier, int, int, Kind], _Rolled] = {}
        self.counts: dict[str, _Counts] = {}  # of histograms, by their names
        self.recent: _Recent | None = None

    def names(self, *kinds: Kind) -> set[str]:
        """What it takes of these kinds. Raises UsageError for what is no metric."""
        plain = [one for one in self.metrics if one not in PERCENTILES]
        recipes = {one: _recipe_of(one) for one in plain}
        return {
            name
            for kind, name in (
                *(
                    ("histogram", PERCENTILES[one].histogram)
                    for one in set(self.metrics) - {*plain}
                ),
                *(("gauge", one) for one, recipe in recipes.items() if recipe is None),
                *(("counter", one.counter) for one in recipes.values() if one),
                *(("counter", one.over) for one in recipes.values() if one and one.over),
            )
            if kind in kinds
        }


class _Recent(NamedTuple):
    """Readings that are not packed yet, from an instant on, by series."""

    from_ms: int
    points: dict[int, _Points]


# What a tier has of each series: (bucket, figures of its kind …).
_Rolled = dict[int, list[tuple[Any, ...]]]


class _About(NamedTuple):
    """A series of the store; bounds of a histogram alone."""

    name: str
    labels: tuple[tuple[str, str], ...]
    bounds: tuple[float, ...]


# (bucket, series) → (sum, weight): of a gauge values and samples, of a counter increase and seconds
_Sums = dict[tuple[int, int], tuple[float, float]]
# By step: what each set of bounds counted.
_Counts = dict[int, list[Histogram]]
_Points = tuple[chunks.Times, chunks.Values]


class Recall:
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
        with self._guarded():
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                check_same_thread=False,
            )
            self._db = sqlite_utils.Database(connection)
            connection.set_progress_handler(give_up, _STEPS)
            try:
                self._check()
            except BaseException:
                connection.close()
                raise

    def __enter__(self) -> Recall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.conn.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is asked inside is of one moment, however much is written meanwhile.

        Without it, what moves from an open table to its place can be missed between two looks.
        """
        with self._guarded():
            self._db.execute("begin")
        try:
            yield
        finally:
            self._db.conn.rollback()

    def _check(self) -> None:
        if self._number("pragma application_id") != schema.APPLICATION_ID:
            raise StoreError(f"{self.path} is not an agent's store: give another --db")
        version = self._number("pragma user_version") or 0
        check_version(int(version), self.path)
        if version < len(schema.MIGRATIONS):
            raise StoreError(
                f"{self.path} was written by an older servefit: start `agent run` once, which "
                "brings it up to date"
            )

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise said(self.path, error) from error

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._guarded():
            return self._db.execute(sql, parameters).fetchall()

    def _number(self, sql: str, parameters: Sequence[Any] = ()) -> float | None:
        rows = self._rows(sql, parameters)
        return rows[0][0] if rows else None

    # ------------------------------------------------------------------------------------- series

    def series(
        self,
        metric: str,
        from_s: float,
        to_s: float,
        step_s: float | None = None,
        *,
        server: str | None = None,
        service: str | None = None,
        gpu: str | None = None,
    ) -> Series:
        """A metric of the catalogue, a recipe or a percentile, between two instants (unix, s).

        `step_s`: without one, about POINTS_WANTED points. Steps are multiples of the tier's own
        (1 s, 1 min, 1 h) and begin at multiples of themselves, the first at or before `from_s`; one
        without data is left out.
        Raises UsageError for what is no metric, server, service, window or step.
        """
        step = _step(from_s, to_s, step_s)
        which = Which(server, service, gpu)
        asked = _Question([metric], from_s // step * step, to_s, step, which)
        return self._series(metric, asked)

    def table(
        self,
        metrics: Sequence[str],
        from_s: float,
        to_s: float,
        step_s: float | None = None,
        *,
        server: str | None = None,
        service: str | None = None,
        gpu: str | None = None,
    ) -> Table:
        """Several series over the same steps, as a page draws them; else as `series`.

        Percentiles of one histogram share its reading, and stand in every step of their minute.
        """
        step = _step(from_s, to_s, step_s)
        first = int(from_s // step * step)
        asked = _Question(metrics, first, to_s, step, Which(server, service, gpu))
        steps = range(first, math.floor(to_s) + 1, step)
        columns = {}
        for metric in asked.metrics:
            found = self._series(metric, asked)
            values = dict(found.points)
            own = max(step, 60) if metric in PERCENTILES else step
            columns[metric] = Column(found.unit, [values.get(at // own * own) for at in steps])
        return Table(first, step, columns)

    def _series(self, metric: str, asked: _Question) -> Series:
        if metric in PERCENTILES:
            wanted = PERCENTILES[metric]
            if wanted.histogram not in asked.counts:
                asked.counts[wanted.histogram] = self._counts(wanted.histogram, asked)
            counts = asked.counts[wanted.histogram]
            return Series(metric, "ms", _percentiles(counts, wanted.share))
        recipe = _recipe_of(metric)
        if recipe is None:
            return Series(metric, CATALOGUE[metric].unit, self._gauge(metric, asked))
        return Series(metric, recipe.unit, self._recipe(recipe, asked))

    def _counts(self, name: str, asked: _Question) -> _Counts:
        """A histogram's buckets, step by step; where raw readings would answer, its minutes."""
        step = max(asked.step, 60)
        found: dict[int, list[Histogram]] = defaultdict(list)
        sql = "select id, bounds from series where name = ?"
        bounds = {series: _bounds(text) for series, text in self._rows(sql, [name])}
        for source in self._sources_of(name, asked):
            for tier, begin, end in self._pieces_of(source, asked, step):
                rolled = self._rolled(tier, begin, end, asked, "histogram")
                for series in source.series:
                    for at, text in rolled.get(series, ()):
                        found[at].append(_summed(bounds[series], text))
        return {at: merged(parts) for at, parts in found.items()}

    def _gauge(self, metric: str, asked: _Question) -> list[tuple[float, float]]:
        table: dict[int, dict[int, float]] = defaultdict(dict)
        for (bucket, series), (value, weight) in self._sums(metric, asked).items():
            if weight:
                table[bucket][series] = value / weight
        if asked.step < STALE_S:
            _carry(table, asked.step)
        combine = _COMBINED[combination(metric)]
        return [(bucket, combine(list(table[bucket].values()))) for bucket in sorted(table)]

    def _recipe(self, recipe: Recipe, asked: _Question) -> list[tuple[float, float]]:
        """Rates of several series add up; a quotient is of the summed increases."""
        increases, rates = self._increases(recipe.counter, asked)
        if recipe.over is None:
            return [(at, rates[at] * recipe.scale) for at in sorted(rates)]
        others, _ = self._increases(recipe.over, asked)
        return [
            (at, increases[at] / others[at] * recipe.scale)
            for at in sorted(increases)
            if others.get(at, 0) > 0
        ]

    def _increases(
        self, counter: str, asked: _Question
    ) -> tuple[dict[int, float], dict[int, float]]:
        """By step: what a counter rose by in all its series, and by how much a second."""
        increases: dict[int, float] = defaultdict(float)
        rates: dict[int, float] = defaultdict(float)
        for (bucket, _), (increase, seconds) in self._sums(counter, asked).items():
            if seconds > 0:
                increases[bucket] += increase
                rates[bucket] += increase / seconds
        return increases, rates

    def _sums(self, name: str, asked: _Question) -> _Sums:
        """Every tier's share of the window, source by source, added up by step."""
        is_counter = CATALOGUE[name].kind == "counter"
        sums: dict[tuple[int, int], tuple[float, float]] = {}
        for source in self._sources_of(name, asked):
            for tier, begin, end in self._pieces_of(source, asked, asked.step):
                rows = self._read(tier, source, begin, end, asked, is_counter)
                if tier == "raw" and not rows:  # shed, or forgotten: what minutes say of it
                    rows = self._read("minute", source, begin, end, asked, is_counter)
                for bucket, series, value, weight in rows:
                    had = sums.get((bucket, series), (0.0, 0.0))
                    sums[bucket, series] = (had[0] + value, had[1] + weight)
        return sums

    # ----------------------------------------------------------------------------------- whose

    def _sources_of(self, name: str, asked: _Question) -> list[_Source]:
        """The series of a name that are meant, by their sources. Raises UsageError."""
        if name not in asked.sources:
            asked.sources[name] = self._found(name, asked.which)
        return asked.sources[name]

    def _series_of(self, asked: _Question, *kinds: Kind) -> list[int]:
        """All series that a question needs of these kinds."""
        names = sorted(asked.names(*kinds))
        return [
            id_ for name in names for one in self._sources_of(name, asked) for id_ in one.series
        ]

    def _found(self, name: str, which: Which) -> list[_Source]:
        owners = self._owners(which)
        gpus = {which.gpu} if which.gpu else self._gpus_of(owners)
        of_gpu = name.startswith("gpu_")
        found: dict[tuple[int, str], list[int]] = defaultdict(list)
        sql = """select sources.id, sources.name, series.id, labels
                 from series join sources on sources.id = source where series.name = ?"""
        for source, source_name, series, labels in self._rows(sql, [name]):
            if of_gpu and gpus is not None and json.loads(labels).get("gpu") not in gpus:
                continue
            if not of_gpu and owners is not None and source_name not in owners:
                continue
            found[source, source_name].append(series)
        return [_Source(*key, tuple(series)) for key, series in sorted(found.items())]

    def _owners(self, which: Which) -> dict[str, list[str]] | None:
        """The sources of a server or service, each with its GPUs; None for everybody."""
        if which.server is None and which.service is None:
            return None
        rows = self._rows("select name, service, gpus from sources")
        owners = {
            name: json.loads(gpus)
            for name, service, gpus in rows
            if which.server in (None, name) and which.service in (None, service)
        }
        if not owners:
            kind = "server" if which.server is not None else "service"
            known = {row[0 if kind == "server" else 1] for row in rows} - {None}
            asked = which.server if which.server is not None else which.service
            raise UsageError(_unknown(kind, str(asked), sorted(known)))
        return owners

    @staticmethod
    def _gpus_of(owners: dict[str, list[str]] | None) -> set[str] | None:
        """The GPUs of servers; None where all are meant."""
        return None if owners is None else {gpu for gpus in owners.values() for gpu in gpus}

    # ------------------------------------------------------------------------------------ tiers

    def _pieces_of(
        self, source: _Source, asked: _Question, step: int
    ) -> list[tuple[Tier, int, int]]:
        key = (source.id, step)
        if key not in asked.pieces:
            first = asked.from_s // step * step
            asked.pieces[key] = list(self._pieces(source, first, asked.to_s, step))
        return asked.pieces[key]

    def _pieces(
        self, source: _Source, from_s: float, to_s: float, step: int
    ) -> Iterator[tuple[Tier, int, int]]:
        """(tier, begin, end) in whole seconds: which tier answers for which part of the window."""
        begin, end = math.floor(from_s), math.floor(to_s) + 1
        hours_end = self._hours_end(source, end)
        minutes_begin, minutes_end = self._minutes_held(source, end) or (hours_end, hours_end)
        if step >= schema.HOUR_S:
            hours_until, minutes_until = hours_end, minutes_end
        elif step >= 60:
            hours_until, minutes_until = min(minutes_begin, hours_end), minutes_end
        else:
            hours_until = min(minutes_begin, hours_end)
            minutes_until = min(self._raw_begin(), minutes_end)
        hours_until, minutes_until = min(hours_until, end), min(minutes_until, end)
        minutes_from = max(begin, hours_until, minutes_begin)  # before them there is nothing
        if hours_until > begin:
            yield "hour", begin, hours_until
        if minutes_until > minutes_from:
            yield "minute", minutes_from, minutes_until
        raw_from = max(minutes_from, minutes_until)
        if end > raw_from:
            yield "raw", raw_from, end

    def _hours_end(self, source: _Source, before_s: int) -> int:
        """The end of a source's last hour that begins before an instant; 0 without one."""
        sql = """select hour from hour_source where source = ? and hour < ?
                 order by hour desc limit 1"""
        hour = self._number(sql, [source.id, math.ceil(before_s / schema.HOUR_S)])
        return 0 if hour is None else (int(hour) + 1) * schema.HOUR_S

    def _minutes_held(self, source: _Source, before_s: int) -> tuple[int, int] | None:
        """From the beginning of the first minute to the end of the last that is finished."""
        sql = """select hour * 3600 + minute * 60 as start from minute_source
                 where source = ? and hour < ? and start < ? and (finished or ?)
                 order by hour {0}, minute {0} limit 1"""
        window = [source.id, math.ceil(before_s / schema.HOUR_S), before_s]
        first = self._number(sql.format("asc"), [*window, 1])
        last = self._number(sql.format("desc"), [*window, 0])
        if first is None:
            return None
        return int(first), int(first) if last is None else int(last) + 60

    def _raw_begin(self) -> int:
        """The first raw reading that is held, to the block; far away without any."""
        block = self._number("select min(key) >> 32 from raw")
        if block is not None:
            return int(block) * schema.RAW_BLOCK_S
        at_ms = self._number("select min(at_ms) from raw_open")
        return 2**53 if at_ms is None else int(at_ms) // 1000

    def _read(
        self, tier: Tier, source: _Source, begin: int, end: int, asked: _Question, is_counter: bool
    ) -> list[tuple[int, int, float, float]]:
        """(bucket, series, sum, weight) from one tier of a source."""
        if tier == "raw":
            return self._raw(source, begin, end, asked, is_counter)
        rolled = self._rolled(tier, begin, end, asked, "counter" if is_counter else "gauge")
        return [
            (bucket, series, value, weight)
            for series in source.series
            for bucket, value, weight in rolled.get(series, ())
        ]

    def _rolled(self, tier: Tier, begin: int, end: int, asked: _Question, kind: Kind) -> _Rolled:
        """What a tier has of all series of that kind whose turn it is there; read once, because a
        block's rows lie together."""
        key = (tier, begin, end, kind)
        if key in asked.rolled:
            return asked.rolled[key]
        step = max(asked.step, 60) if kind == "histogram" else asked.step
        series = [
            id_
            for name in sorted(asked.names(kind))
            for source in self._sources_of(name, asked)
            if {(tier, begin, end), ("raw", begin, end)} & {*self._pieces_of(source, asked, step)}
            for id_ in source.series
        ]
        found: _Rolled = defaultdict(list)
        for place in _HOURS if tier == "hour" else _MINUTES:
            same = "" if tier == "hour" else "and c.minute = k.minute and c.part = k.part"
            covered = (
                f"left join {tier}_source as c on c.hour = k.hour and c.source = s.source {same}"
            )
            sql = f"""
                {place.blocks}
                select {place.start} / {step} * {step} as bucket, s.id, {_FIGURES[kind]}
                from block cross join {_ids(series)} as s
                  cross join {place.table} as k on {place.on} {covered if kind == "counter" else ""}
                where {place.start} between ?1 and ?2 and {_FIGURE[kind]} is not null
                group by bucket, s.id"""
            for bucket, id_, *figures in self._rows(sql, [begin, end - 1]):
                found[id_].append((bucket, *figures))
        asked.rolled[key] = found
        return found

    def _raw(
        self, source: _Source, begin: int, end: int, asked: _Question, is_counter: bool
    ) -> list[tuple[int, int, float, float]]:
        """The same from raw readings; a counter's increase is spread between two readings."""
        step = asked.step
        first = begin // step * step
        edges_ms = np.arange(first, end + step, step, dtype=np.int64) * 1000
        found: dict[tuple[int, int], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        early_ms = (begin - 60) * 1000  # a counter's rise begins at the reading before
        if asked.recent is None or early_ms < asked.recent.from_ms:
            needed = self._series_of(asked, "gauge", "counter")
            asked.recent = self._recent(needed, early_ms, end * 1000)
        known = asked.recent.points
        for series, times, values in self._points(source.series, early_ms, end * 1000, known):
            sums = _spread if is_counter else _binned
            whole, weights = sums(times, values, edges_ms, begin * 1000, end * 1000)
            for at in np.flatnonzero(weights > 0):
                key = (int(edges_ms[at]) // 1000, series)
                had = found[key]
                found[key] = (had[0] + float(whole[at]), had[1] + float(weights[at]))
        return [(*key, *sums) for key, sums in found.items()]

    def _recent(self, series: Collection[int], from_ms: int, to_ms: int) -> _Recent:
        """The open table has no index: it is walked once for all that a question needs of it."""
        sql = f"""select series, at_ms, value from raw_open
                  where at_ms between ? and ? and series in (select id from {_ids(series)})
                  order by series, rowid"""
        rows = self._rows(sql, [from_ms, to_ms])
        found: dict[int, _Points] = {}
        for one, mine in itertools.groupby(rows, key=itemgetter(0)):
            _, at, value = zip(*mine, strict=True)
            found[one] = (np.array(at, np.int64), np.array(value, np.float64))
        return _Recent(from_ms, found)

    def _points(
        self, series: Collection[int], from_ms: int, to_ms: int, recent: Mapping[int, _Points]
    ) -> Iterator[tuple[int, chunks.Times, chunks.Values]]:
        """Raw readings by series and pass, each in the order they came; some may lie outside."""
        block_ms = schema.RAW_BLOCK_S * 1000
        sql = f"""
            with recursive block(at) as
              (select max(?1, (select min(key) >> 32 from raw))
               union all select at + 1 from block where at < ?2)
            select series, points
            from {_ids(series)} as s cross join block cross join raw as k on {_BY_KEY}
            order by s.id, key"""
        collected: dict[int, list[_Points]] = defaultdict(list)
        for one, data in self._rows(sql, [from_ms // block_ms, to_ms // block_ms]):
            try:
                collected[one].append(chunks.unpack(data))
            except ValueError as error:
                raise StoreError(f"database {self.path}: {error}: it is damaged") from error
        for one in series:
            if one in recent:
                collected[one].append(recent[one])
        for one, parts in collected.items():
            times, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            falls = np.flatnonzero(np.diff(times) < 0) + 1  # the clock was set back: another pass
            for some_times, some_values in zip(
                np.split(times, falls), np.split(values, falls), strict=True
            ):
                yield one, some_times, some_values

    # ------------------------------------------------------------------------------- other things

    def newest_unix_s(self, before_s: float) -> float | None:
        """The newest reading or minute up to an instant; None of an empty store."""
        at_ms = self._number("select max(at_ms) from raw_open where at_ms <= ?", [before_s * 1000])
        sql = """select hour * 3600 + minute * 60 from minute_source where hour <= ?
                 and hour * 3600 + minute * 60 <= ? order by hour desc, minute desc limit 1"""
        minute = self._number(sql, [before_s // schema.HOUR_S, before_s])
        known = [one for one in (at_ms and at_ms / 1000, minute) if one is not None]
        return max(known, default=None)

    def readings(
        self, source: str, from_s: float, to_s: float, *, gpus: Collection[str] | None = ()
    ) -> Iterator[tuple[float, str, dict[str, str], float]]:
        """Raw readings between two instants, both included: (unix s, name, labels, value).

        They are those of a source and those of these GPUs (None: of all), in order of time.
        """
        sql = """select series.id, sources.name, series.name, labels
                 from series join sources on sources.id = source order by series.id"""
        about: dict[int, tuple[str, dict[str, str]]] = {}
        for series, owner, name, text in self._rows(sql):
            labels = json.loads(text)
            gpu = labels.get("gpu")
            if owner == source or (gpu is not None and (gpus is None or gpu in gpus)):
                about[series] = (name, labels)
        found: list[tuple[int, chunks.Times, chunks.Values]] = []
        from_ms, to_ms = math.ceil(from_s * 1000), math.floor(to_s * 1000)
        recent = self._recent(about, from_ms, to_ms).points
        for series, times, values in self._points(tuple(about), from_ms, to_ms, recent):
            inside = (times >= from_ms) & (times <= to_ms)
            found.append((series, times[inside], values[inside]))
        if not found:
            return
        at_ms = np.concatenate([times for _, times, _ in found])
        all_values = np.concatenate([values for _, _, values in found])
        whose = np.repeat([series for series, _, _ in found], [times.size for _, times, _ in found])
        for place in np.argsort(at_ms, kind="stable"):
            name, labels = about[int(whose[place])]
            yield int(at_ms[place]) / 1000, name, labels, float(all_values[place])

    def minutes(
        self, source: str, from_s: float, to_s: float, names: Collection[str] | None = None
    ) -> Iterator[Minute]:
        """The minutes of a source, in order; one that was lived through in parts comes in parts.

        `names`: of these series and histograms alone, which is quicker by as much as it is less.
        Of a counter `mean`, `min` and `max` are `last`: they are not kept.
        """
        about = self._about(source, names)
        sql = """select hour, minute, part, covered_s, resets, marks from minute_source
                 where hour between ? and ? and source = (select id from sources where name = ?)
                 order by hour, minute, part"""
        first, last = int(from_s // schema.HOUR_S), int(to_s // schema.HOUR_S)
        heads: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        for hour, *head in self._rows(sql, [first, last, source]):
            heads[hour].append((hour, *head))
        for hour in sorted(heads):
            yield from self._minutes_of_hour(source, heads[hour], about, from_s, to_s)

    def records(
        self,
        source: str,
        from_s: float,
        to_s: float,
        names: Collection[str],
        gpus: Collection[str] | None = None,
    ) -> Records:
        """The minutes of a source as `minutes` tells them, in columns.

        `gpus`: of what is said of GPUs, that of these alone.
        """
        about = self._about(source, names)
        if gpus is not None:
            about = {id_: one for id_, one in about.items() if dict(one[1]).get("gpu", "") in gpus}
        window = (math.ceil(from_s), math.ceil(to_s) - 1)
        sql = f"""select {_NUMBER}, k.covered_s, k.resets, k.marks from minute_source as k
                  where k.hour between ?1 / 3600 and ?2 / 3600 and {_MINUTE_START} between ?1 and ?2
                    and k.source = (select id from sources where name = ?3)
                  order by k.hour, k.minute, k.part"""
        heads = self._rows(sql, [*window, source])
        numbers, covered_s, resets = (
            np.array([head[column] for head in heads], np.float64) for column in range(3)
        )
        values: list[Values] = []
        histograms: list[Counts] = []
        for kind in _FIGURE:
            mine = [id_ for id_, one in about.items() if _kind(one) == kind]
            for series, of, columns in self._columns(mine, kind, numbers, window):
                name, labels, bounds = about[series]
                if kind == "histogram":
                    texts = ",".join(columns["counts"])
                    counts = msgspec.json.decode(f"[{texts}]", type=list[list[float]])
                    histograms.append(Counts(name, labels, bounds, of, counts))
                else:
                    values.append(Values(name, labels, of, columns))
        return Records(
            source=source,
            start_unix_s=numbers // _PARTS * 60,
            covered_s=covered_s,
            resets=resets,
            marks=[tuple(json.loads(head[3])) if head[3] else () for head in heads],
            values=values,
            histograms=histograms,
        )

    def _columns(
        self, series: list[int], kind: Kind, numbers: Floats, window: tuple[int, int]
    ) -> Iterator[tuple[int, NDArray[np.int_], dict[str, Any]]]:
        """(series, of which records by their numbers, figures by name), in order of time."""
        figures = _COLUMNS[kind]
        form = [("series", "i8"), ("number", "f8")]
        form += [(name, "O" if name == "counts" else "f8") for name in figures]
        parts = []
        for place in _MINUTES:
            sql = f"""
                {place.blocks}
                select s.id, {_NUMBER}, {", ".join(figures.values())}
                from block cross join {_ids(series)} as s cross join {place.table} as k
                  on {place.on}
                where {place.start} between ?1 and ?2 and k.{_FIGURE[kind]} is not null"""
            with self._guarded():
                parts.append(np.fromiter(self._db.execute(sql, window), np.dtype(form)))
        rows = np.concatenate(parts)
        rows = rows[np.argsort(rows["series"], kind="stable")]
        ends = np.flatnonzero(np.diff(rows["series"])) + 1
        for mine in np.split(rows, ends) if rows.size else ():
            of = np.searchsorted(numbers, mine["number"])
            yield int(mine["series"][0]), of, {name: mine[name] for name in figures}

    def _about(self, source: str, names: Collection[str] | None) -> dict[int, _About]:
        """A source's series of these names; all, where none are given."""
        sql = """select series.id, series.name, labels, bounds
                 from series join sources on sources.id = source where sources.name = ?"""
        return {
            series: _About(name, _labels(labels), _bounds(bounds))
            for series, name, labels, bounds in self._rows(sql, [source])
            if names is None or name in names
        }

    def _minutes_of_hour(
        self,
        source: str,
        heads: list[tuple[Any, ...]],
        about: Mapping[int, _About],
        from_s: float,
        to_s: float,
    ) -> Iterator[Minute]:
        rows: dict[tuple[int, int], list[tuple[Any, ...]]] = defaultdict(list)
        for place in _MINUTES:
            sql = f"""
                {place.blocks}
                select k.minute, k.part, s.id, n, coalesce(mean, last), coalesce(min, last),
                  coalesce(max, last), last, increase, counts
                from block cross join {_ids(about)} as s
                  cross join {place.table} as k on {place.on}
                order by s.id"""
            begin = heads[0][0] * schema.HOUR_S
            for minute, part, *row in self._rows(sql, [begin, begin + schema.HOUR_S - 1]):
                rows[minute, part].append(tuple(row))
        for hour, minute, part, covered_s, resets, marks in heads:
            start = hour * schema.HOUR_S + minute * 60
            if from_s <= start < to_s:
                mine = rows[minute, part]
                yield Minute(
                    source,
                    start,
                    tuple(_value(about[row[0]], row) for row in mine if row[-1] is None),
                    tuple(_histogram(about[row[0]], row) for row in mine if row[-1] is not None),
                    covered_s,
                    resets,
                    tuple(json.loads(marks)) if marks else (),
                )

    def source_state(self, source: str) -> bytes | None:
        """What `History.add_minutes` kept with the source's newest minute."""
        rows = self._rows("select value from meta where key = ?", [schema.state_key(source)])
        return rows[0][0] if rows and isinstance(rows[0][0], bytes) else None

    def open_minutes(self) -> list[Minute]:
        """The unfinished minutes that the agent left: up to its last sample where it was stopped,
        hardly begun ones where it runs. Ask inside one `snapshot` with the finished ones.
        """
        found = []
        for one in self.sources():
            minutes = Minutes(one["name"])
            dumped = self.source_state(one["name"])
            if dumped is not None and minutes.load(dumped, boot=None):
                found.append(minutes.current())
        return [one for one in found if one is not None]

    def served(self, source: str, from_s: float, to_s: float) -> list[dict[str, Any]]:
        """Requests that arrived between two instants, one by one, where the server's spans tell
        them; in order of arrival."""
        names = (
            "at_ms", "model", "prompt_tokens", "output_tokens", "e2e_ms", "ttft_ms", "queue_ms",
            "prefill_ms", "decode_ms", "energy_j",
        )  # fmt: skip
        sql = f"""select {", ".join(names)} from served
                  where at_ms >= ? and at_ms < ?
                    and source = (select id from sources where name = ?)
                  order by at_ms, id"""
        window = [math.ceil(from_s * 1000), math.ceil(to_s * 1000)]
        return [dict(zip(names, row, strict=True)) for row in self._rows(sql, [*window, source])]

    def speakers(self, *metrics: str) -> list[str]:
        """The sources that ever said one of these metrics."""
        marks = ", ".join("?" * len(metrics))
        sql = f"""select distinct sources.name from series join sources on sources.id = source
                  where series.name in ({marks}) order by sources.name"""
        return [name for (name,) in self._rows(sql, metrics)]

    def servers(
        self, server: str | None = None, service: str | None = None
    ) -> dict[str, list[str]]:
        """The inference servers that are meant, each with its GPUs; all, where none is named.

        Raises UsageError for a server or service that there is not.
        """
        owners = self._owners(Which(server, service))
        if owners is None:
            known = set(self.speakers(*SAID_BY_SERVERS))
            owners = {one["name"]: one["gpus"] for one in self.sources() if one["name"] in known}
        return owners

    def sources(self) -> list[dict[str, Any]]:
        """Every source with its service and GPUs."""
        rows = self._rows("select name, service, gpus from sources order by name")
        return [
            {"name": name, "service": service, "gpus": json.loads(gpus)}
            for name, service, gpus in rows
        ]

    def gpus(self, uuids: Collection[str]) -> list[TargetGpu]:
        """What these GPUs are, those of which the driver told it."""
        rows = self._rows("select name, uuid, memory_bytes from gpus order by uuid")
        return [TargetGpu(*row) for row in rows if row[1] in uuids]

    def events(self, from_s: float, to_s: float) -> list[dict[str, Any]]:
        """Marks between two instants, in order of time."""
        sql = """select at_unix_s, kind, source, text, data from events
                 where at_unix_s between ? and ? order by at_unix_s, id"""
        return [
            {"at_unix_s": at, "kind": kind, "source": source, "text": text,
             "data": json.loads(data) if data else None}
            for at, kind, source, text, data in self._rows(sql, [from_s, to_s])
        ]  # fmt: skip

    def fingerprints(self, source: str) -> list[dict[str, Any]]:
        """What a server was, oldest first."""
        sql = """select since_unix_s, fingerprint, data from fingerprints
                 where source = ? order by id"""
        return [
            {"since_unix_s": since, "fingerprint": fingerprint, "data": json.loads(data)}
            for since, fingerprint, data in self._rows(sql, [source])
        ]

    def curves(self) -> list[dict[str, Any]]:
        """The curves, newest first, without the sweeps themselves."""
        names = (
            "id, key, received_unix_s, source, started_at, url, model, engine, levels, simulated"
        )
        rows = self._rows(f"select {names} from curves order by received_unix_s desc, id desc")
        return [dict(zip(names.split(", "), row, strict=True)) for row in rows]

    def curve(self, id_: int) -> Sweep:
        """One curve, whole. Raises UsageError where there is none of that id."""
        rows = self._rows("select sweep from curves where id = ?", [id_])
        if not rows:
            raise UsageError(f"no curve {id_} in {self.path}")
        return decode_sweep(rows[0][0].encode())

    def assessments(self, scope: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """What was concluded, newest first."""
        sql = """select at_unix_s, scope, finding, verdict from assessments
                 where scope = ?1 or ?1 is null order by at_unix_s desc, id desc limit ?2"""
        return [
            {"at_unix_s": at, "scope": scope, "finding": finding, "verdict": json.loads(verdict)}
            for at, scope, finding, verdict in self._rows(sql, [scope, limit])
        ]

    def findings(self, scope: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Verdicts in a row that say the same as one: what changed, newest first.

        `at_unix_s` and `verdict` are of the last of the row, `since_unix_s` of its first.
        """
        sql = """
            with marked as (
              select id, at_unix_s, scope, finding is not lag(finding) over kept as begins,
                finding is not lead(finding) over kept as ends
              from assessments where scope = ?1 or ?1 is null
              window kept as (partition by scope order by at_unix_s, id)),
            numbered as (
              select *, sum(begins) over (partition by scope order by at_unix_s, id) as run
              from marked),
            runs as (
              select max(iif(ends, id, null)) as id, max(at_unix_s) as at_unix_s,
                min(at_unix_s) as since_unix_s, count(*) as verdicts
              from numbered group by scope, run order by at_unix_s desc, 1 desc limit ?2)
            select runs.at_unix_s, since_unix_s, verdicts, scope, finding, verdict
            from runs join assessments on assessments.id = runs.id
            order by runs.at_unix_s desc, runs.id desc"""
        names = ("at_unix_s", "since_unix_s", "verdicts", "scope", "finding", "verdict")
        return [
            dict(zip(names, (*row, msgspec.Raw(verdict.encode())), strict=True))
            for *row, verdict in self._rows(sql, [scope, limit])
        ]


# ------------------------------------------------------------------------------------------ steps


def _step(from_s: float, to_s: float, step_s: float | None) -> int:
    """Whole seconds; from a minute on whole minutes, from an hour on whole hours."""
    if not (math.isfinite(from_s) and math.isfinite(to_s) and 0 <= from_s < to_s < 2**33):
        raise UsageError(
            f"a window from {from_s:g} to {to_s:g}: write two unix times, the earlier first"
        )
    if step_s is not None and not (math.isfinite(step_s) and step_s > 0):
        raise UsageError(f"a step of {step_s:g} s: write one above 0")
    step = step_s or (to_s - from_s) / POINTS_WANTED
    own = next(tier for tier in (schema.HOUR_S, 60, 1) if step >= tier or tier == 1)
    whole = math.ceil(step / own) * own
    if (to_s - from_s) / whole > POINTS_MAX:
        raise UsageError(
            f"a step of {whole} s makes more than {POINTS_MAX:,} points: write a longer one"
        )
    return whole


def _recipe_of(metric: str) -> Recipe | None:
    """How it is made of counters; None of a gauge, which is told as it is. Raises UsageError."""
    if metric in RECIPES:
        return RECIPES[metric]
    about = CATALOGUE.get(metric)
    if about is None:
        raise UsageError(_unknown("metric", metric, [*CATALOGUE, *RECIPES, *PERCENTILES]))
    return Recipe(metric, None, f"{about.unit}/s") if about.kind == "counter" else None


# ------------------------------------------------------------------------------------ arithmetic


def _summed(bounds: tuple[float, ...], text: str) -> Histogram:
    """The counts of several records, as the store writes them, in one histogram."""
    parts = msgspec.json.decode(text, type=list[list[float]])
    counts = [math.fsum(column) for column in itertools.zip_longest(*parts, fillvalue=0.0)]
    return Histogram(bounds, (*counts, *[0.0] * (len(bounds) - len(counts))))


def _percentiles(counts: _Counts, share: float) -> list[tuple[float, float]]:
    found = ((at, percentile(counts[at], share)) for at in sorted(counts))
    return [(at, seconds * 1000) for at, seconds in found if seconds is not None]


def combination(metric: str) -> Literal["mean", "max", "sum"]:
    """How a gauge of several servers or GPUs becomes one figure."""
    if metric.endswith(("_ratio", "_hz", "_mhz")):
        return "mean"
    if metric.endswith(("_c", "_throttled", "_unix_s")):
        return "max"
    return "sum"


_COMBINED: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "max": max,
    "sum": math.fsum,
}


def _carry(table: dict[int, dict[int, float]], step: int) -> None:
    """Fills the steps between a series' readings with the one before: sums are of all series."""
    last: dict[int, tuple[int, float]] = {}
    for bucket in range(min(table, default=0), max(table, default=0) + 1, step):
        real = table.get(bucket, {})
        carried = {one: value for one, (at, value) in last.items() if bucket - at <= STALE_S}
        last.update({one: (bucket, value) for one, value in real.items()})
        if carried or real:
            table[bucket] = carried | real


def _binned(
    times: chunks.Times, values: chunks.Values, edges_ms: chunks.Times, from_ms: int, to_ms: int
) -> tuple[chunks.Values, chunks.Values]:
    """Sums and numbers of the readings by step."""
    inside = (times >= from_ms) & (times < to_ms)
    where = np.searchsorted(edges_ms, times[inside], side="right") - 1
    n = edges_ms.size
    sums: chunks.Values = np.bincount(where, weights=values[inside], minlength=n).astype(np.float64)
    numbers: chunks.Values = np.bincount(where, minlength=n).astype(np.float64)
    return sums, numbers


def _spread(
    times: chunks.Times, values: chunks.Values, edges_ms: chunks.Times, from_ms: int, to_ms: int
) -> tuple[chunks.Values, chunks.Values]:
    """What a counter rose by in each step, and the seconds it was watched.

    Between two readings it is taken to rise evenly; a fall is a reset, and what it shows then has
    come since. Nothing is known of a gap longer than GAP_S.
    """
    steps_ms = np.diff(times).astype(np.float64)
    rises = np.diff(values)
    rises = np.where(rises < 0, values[1:], rises)
    known = steps_ms <= GAP_S * 1000
    zero = np.zeros(1)
    risen = np.concatenate((zero, np.cumsum(np.where(known, rises, 0.0))))
    watched_s = np.concatenate((zero, np.cumsum(np.where(known, steps_ms, 0.0)))) / 1000
    cuts = np.clip(np.append(edges_ms, edges_ms[-1] + 1), from_ms, to_ms)
    rise: chunks.Values = np.diff(np.interp(cuts, times, risen))
    seconds: chunks.Values = np.diff(np.interp(cuts, times, watched_s))
    return rise, seconds


# ------------------------------------------------------------------------------------------- rows


def _kind(about: _About) -> Kind:
    if about.bounds:
        return "histogram"
    known = CATALOGUE.get(about.name)
    return "counter" if known is not None and known.kind == "counter" else "gauge"


def _ids(series: Collection[int]) -> str:
    """Ids of series as a table."""
    return f"(select id, source from series where id in ({', '.join(str(one) for one in series)}))"


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(json.loads(text).items()))


def _bounds(text: str) -> tuple[float, ...]:
    return tuple(math.inf if one is None else one for one in json.loads(text)) if text else ()


def _value(about: _About, row: tuple[Any, ...]) -> MinuteValue:
    name, labels, _ = about
    _, n, mean, least, most, last, increase, _ = row
    return MinuteValue(name, labels, n, mean, least, most, last, increase)


def _histogram(about: _About, row: tuple[Any, ...]) -> MinuteHistogram:
    name, labels, bounds = about
    counts = json.loads(row[-1])
    whole = tuple(float(count) for count in counts) + (0.0,) * (len(bounds) - len(counts))
    return MinuteHistogram(name, labels, bounds, whole)


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"no {kind} {name!r}" + (f", nearest is {near[0]!r}" if near else "")
