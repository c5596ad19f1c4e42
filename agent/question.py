"""A question about series of the store: which tier answers for which part of its window.

A series is answered from the coarsest tier that is still as fine as the step, from a coarser one
where the finer was forgotten, and from a finer one for the newest, which no minute or hour holds
yet: a window runs to the newest reading. Counters are told as rates, over the time they were
really watched; ratios of several servers or GPUs are averaged, amounts added.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from agent import chunks, schema
from agent.metrics import CATALOGUE
from agent.model import StoreError, UsageError
from agent.places import BY_KEY, FIGURE, FIGURES, HOURS, MINUTES, Kind, bounds, ids
from agent.reader import Reader
from agent.stats import Histogram, merged, percentile

POINTS_WANTED = 300
POINTS_MAX = 50_000
# A reading stands for what follows it so long, where the step is finer than the sampling.
STALE_S = 15.0
# A counter's increase over a longer silence is nobody's: not spread over it.
GAP_S = 300.0

Tier = Literal["raw", "minute", "hour"]


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


class _Source(NamedTuple):
    id: int
    name: str
    series: tuple[int, ...]


class Recent(NamedTuple):
    """Readings that are not packed yet, from an instant on, by series."""

    from_ms: int
    points: dict[int, Points]


# What a tier has of each series: (bucket, figures of its kind …).
_Rolled = dict[int, list[tuple[Any, ...]]]


# (bucket, series) → (sum, weight): of a gauge values and samples, of a counter increase and seconds
_Sums = dict[tuple[int, int], tuple[float, float]]
# By step: what each set of bounds counted.
_Counts = dict[int, list[Histogram]]
Points = tuple[chunks.Times, chunks.Values]


class Question:
    """One question about several metrics. What was read for one of them is there for the others.

    `from_s` and `to_s` are unix seconds, `step` whole ones (`whole_step`).
    """

    def __init__(
        self,
        reader: Reader,
        metrics: Iterable[str],
        from_s: float,
        to_s: float,
        step: int,
        which: Which,
    ) -> None:
        self.metrics = tuple(dict.fromkeys(metrics))
        self._reader = reader
        self._from_s, self._to_s, self._step, self._which = from_s, to_s, step, which
        self._sources: dict[str, list[_Source]] = {}  # by the name of a series
        self._cut: dict[tuple[int, int], list[tuple[Tier, int, int]]] = {}
        self._rolled_up: dict[tuple[Tier, int, int, Kind], _Rolled] = {}
        self._histograms: dict[str, _Counts] = {}
        self._recent: Recent | None = None

    def series(self, metric: str) -> Series:
        """One of the metrics; a step without data is left out."""
        if metric in PERCENTILES:
            wanted = PERCENTILES[metric]
            if wanted.histogram not in self._histograms:
                self._histograms[wanted.histogram] = self._counts(wanted.histogram)
            counts = self._histograms[wanted.histogram]
            return Series(metric, "ms", _percentiles(counts, wanted.share))
        recipe = _recipe_of(metric)
        if recipe is None:
            return Series(metric, CATALOGUE[metric].unit, self._gauge(metric))
        return Series(metric, recipe.unit, self._recipe(recipe))

    def _names(self, *kinds: Kind) -> set[str]:
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

    def _counts(self, name: str) -> _Counts:
        """A histogram's buckets, step by step; where raw readings would answer, its minutes."""
        step = max(self._step, 60)
        found: dict[int, list[Histogram]] = defaultdict(list)
        sql = "select id, bounds from series where name = ?"
        ends = {series: bounds(text) for series, text in self._reader.rows(sql, [name])}
        for source in self._sources_of(name):
            for tier, begin, end in self._pieces_of(source, step):
                rolled = self._rolled(tier, begin, end, "histogram")
                for series in source.series:
                    for at, text in rolled.get(series, ()):
                        found[at].append(_summed(ends[series], text))
        return {at: merged(parts) for at, parts in found.items()}

    def _gauge(self, metric: str) -> list[tuple[float, float]]:
        table: dict[int, dict[int, float]] = defaultdict(dict)
        for (bucket, series), (value, weight) in self._sums(metric).items():
            if weight:
                table[bucket][series] = value / weight
        if self._step < STALE_S:
            _carry(table, self._step)
        combine = _COMBINED[combination(metric)]
        return [(bucket, combine(list(table[bucket].values()))) for bucket in sorted(table)]

    def _recipe(self, recipe: Recipe) -> list[tuple[float, float]]:
        """Rates of several series add up; a quotient is of the summed increases."""
        increases, rates = self._increases(recipe.counter)
        if recipe.over is None:
            return [(at, rates[at] * recipe.scale) for at in sorted(rates)]
        others, _ = self._increases(recipe.over)
        return [
            (at, increases[at] / others[at] * recipe.scale)
            for at in sorted(increases)
            if others.get(at, 0) > 0
        ]

    def _increases(self, counter: str) -> tuple[dict[int, float], dict[int, float]]:
        """By step: what a counter rose by in all its series, and by how much a second."""
        increases: dict[int, float] = defaultdict(float)
        rates: dict[int, float] = defaultdict(float)
        for (bucket, _), (increase, seconds) in self._sums(counter).items():
            if seconds > 0:
                increases[bucket] += increase
                rates[bucket] += increase / seconds
        return increases, rates

    def _sums(self, name: str) -> _Sums:
        """Every tier's share of the window, source by source, added up by step."""
        is_counter = CATALOGUE[name].kind == "counter"
        sums: dict[tuple[int, int], tuple[float, float]] = {}
        for source in self._sources_of(name):
            for tier, begin, end in self._pieces_of(source, self._step):
                rows = self._read(tier, source, begin, end, is_counter)
                if tier == "raw" and not rows:  # shed, or forgotten: what minutes say of it
                    rows = self._read("minute", source, begin, end, is_counter)
                for bucket, series, value, weight in rows:
                    had = sums.get((bucket, series), (0.0, 0.0))
                    sums[bucket, series] = (had[0] + value, had[1] + weight)
        return sums

    # ----------------------------------------------------------------------------------- whose

    def _sources_of(self, name: str) -> list[_Source]:
        """The series of a name that are meant, by their sources. Raises UsageError."""
        if name not in self._sources:
            self._sources[name] = self._found(name)
        return self._sources[name]

    def _series_of(self, *kinds: Kind) -> list[int]:
        """All series that a question needs of these kinds."""
        names = sorted(self._names(*kinds))
        return [id_ for name in names for one in self._sources_of(name) for id_ in one.series]

    @cached_property
    def _whose(self) -> tuple[dict[str, list[str]] | None, set[str] | None]:
        """The sources and the GPUs that are meant; null for all. Raises UsageError."""
        found = owners(self._reader, self._which)
        return found, {self._which.gpu} if self._which.gpu else _gpus_of(found)

    def _found(self, name: str) -> list[_Source]:
        whose, gpus = self._whose
        of_gpu = name.startswith("gpu_")
        found: dict[tuple[int, str], list[int]] = defaultdict(list)
        sql = """select sources.id, sources.name, series.id, labels
                 from series join sources on sources.id = source where series.name = ?"""
        for source, source_name, series, labels in self._reader.rows(sql, [name]):
            if of_gpu and gpus is not None and json.loads(labels).get("gpu") not in gpus:
                continue
            if not of_gpu and whose is not None and source_name not in whose:
                continue
            found[source, source_name].append(series)
        return [_Source(*key, tuple(series)) for key, series in sorted(found.items())]

    # ------------------------------------------------------------------------------------ tiers

    def _pieces_of(self, source: _Source, step: int) -> list[tuple[Tier, int, int]]:
        key = (source.id, step)
        if key not in self._cut:
            first = self._from_s // step * step
            self._cut[key] = list(self._pieces(source, first, self._to_s, step))
        return self._cut[key]

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
        hour = self._reader.number(sql, [source.id, math.ceil(before_s / schema.HOUR_S)])
        return 0 if hour is None else (int(hour) + 1) * schema.HOUR_S

    def _minutes_held(self, source: _Source, before_s: int) -> tuple[int, int] | None:
        """From the beginning of the first minute to the end of the last that is finished."""
        sql = """select hour * 3600 + minute * 60 as start from minute_source
                 where source = ? and hour < ? and start < ? and (finished or ?)
                 order by hour {0}, minute {0} limit 1"""
        window = [source.id, math.ceil(before_s / schema.HOUR_S), before_s]
        first = self._reader.number(sql.format("asc"), [*window, 1])
        last = self._reader.number(sql.format("desc"), [*window, 0])
        if first is None:
            return None
        return int(first), int(first) if last is None else int(last) + 60

    def _raw_begin(self) -> int:
        """The first raw reading that is held, to the block; far away without any."""
        block = self._reader.number("select min(key) >> 32 from raw")
        if block is not None:
            return int(block) * schema.RAW_BLOCK_S
        at_ms = self._reader.number("select min(at_ms) from raw_open")
        return 2**53 if at_ms is None else int(at_ms) // 1000

    def _read(
        self, tier: Tier, source: _Source, begin: int, end: int, is_counter: bool
    ) -> list[tuple[int, int, float, float]]:
        """(bucket, series, sum, weight) from one tier of a source."""
        if tier == "raw":
            return self._raw(source, begin, end, is_counter)
        rolled = self._rolled(tier, begin, end, "counter" if is_counter else "gauge")
        return [
            (bucket, series, value, weight)
            for series in source.series
            for bucket, value, weight in rolled.get(series, ())
        ]

    def _rolled(self, tier: Tier, begin: int, end: int, kind: Kind) -> _Rolled:
        """What a tier has of all series of that kind whose turn it is there; read once, because a
        block's rows lie together."""
        key = (tier, begin, end, kind)
        if key in self._rolled_up:
            return self._rolled_up[key]
        step = max(self._step, 60) if kind == "histogram" else self._step
        series = [
            id_
            for name in sorted(self._names(kind))
            for source in self._sources_of(name)
            if {(tier, begin, end), ("raw", begin, end)} & {*self._pieces_of(source, step)}
            for id_ in source.series
        ]
        found: _Rolled = defaultdict(list)
        for place in HOURS if tier == "hour" else MINUTES:
            same = "" if tier == "hour" else "and c.minute = k.minute and c.part = k.part"
            covered = (
                f"left join {tier}_source as c on c.hour = k.hour and c.source = s.source {same}"
            )
            sql = f"""
                {place.blocks}
                select {place.start} / {step} * {step} as bucket, s.id, {FIGURES[kind]}
                from block cross join {ids(series)} as s
                  cross join {place.table} as k on {place.on} {covered if kind == "counter" else ""}
                where {place.start} between ?1 and ?2 and {FIGURE[kind]} is not null
                group by bucket, s.id"""
            for bucket, id_, *figures in self._reader.rows(sql, [begin, end - 1]):
                found[id_].append((bucket, *figures))
        self._rolled_up[key] = found
        return found

    def _raw(
        self, source: _Source, begin: int, end: int, is_counter: bool
    ) -> list[tuple[int, int, float, float]]:
        """The same from raw readings; a counter's increase is spread between two readings."""
        step = self._step
        first = begin // step * step
        edges_ms = np.arange(first, end + step, step, dtype=np.int64) * 1000
        found: dict[tuple[int, int], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        early_ms = (begin - 60) * 1000  # a counter's rise begins at the reading before
        if self._recent is None or early_ms < self._recent.from_ms:
            needed = self._series_of("gauge", "counter")
            self._recent = recent(self._reader, needed, early_ms, end * 1000)
        for series, times, values in points(
            self._reader, source.series, early_ms, end * 1000, self._recent.points
        ):
            sums = _spread if is_counter else _binned
            whole, weights = sums(times, values, edges_ms, begin * 1000, end * 1000)
            for at in np.flatnonzero(weights > 0):
                key = (int(edges_ms[at]) // 1000, series)
                had = found[key]
                found[key] = (had[0] + float(whole[at]), had[1] + float(weights[at]))
        return [(*key, *sums) for key, sums in found.items()]


# ------------------------------------------------------------------------------------ whose, what


def owners(reader: Reader, which: Which) -> dict[str, list[str]] | None:
    """The sources of a server or service, each with its GPUs; None for everybody."""
    if which.server is None and which.service is None:
        return None
    rows = reader.rows("select name, service, gpus from sources")
    found = {
        name: json.loads(gpus)
        for name, service, gpus in rows
        if which.server in (None, name) and which.service in (None, service)
    }
    if not found:
        kind = "server" if which.server is not None else "service"
        known = {row[0 if kind == "server" else 1] for row in rows} - {None}
        asked = which.server if which.server is not None else which.service
        raise UsageError(_unknown(kind, str(asked), sorted(known)))
    return found


def _gpus_of(owners: dict[str, list[str]] | None) -> set[str] | None:
    """The GPUs of servers; None where all are meant."""
    return None if owners is None else {gpu for gpus in owners.values() for gpu in gpus}


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"no {kind} {name!r}" + (f", nearest is {near[0]!r}" if near else "")


def whole_step(from_s: float, to_s: float, step_s: float | None) -> int:
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


# ------------------------------------------------------------------------------------ raw readings


def recent(reader: Reader, series: Collection[int], from_ms: int, to_ms: int) -> Recent:
    """The open table has no index: it is walked once for all that a question needs of it."""
    sql = f"""select series, at_ms, value from raw_open
              where at_ms between ? and ? and series in (select id from {ids(series)})
              order by series, rowid"""
    rows = reader.rows(sql, [from_ms, to_ms])
    found: dict[int, Points] = {}
    for one, mine in itertools.groupby(rows, key=itemgetter(0)):
        _, at, value = zip(*mine, strict=True)
        found[one] = (np.array(at, np.int64), np.array(value, np.float64))
    return Recent(from_ms, found)


def points(
    reader: Reader, series: Collection[int], from_ms: int, to_ms: int, recent: Mapping[int, Points]
) -> Iterator[tuple[int, chunks.Times, chunks.Values]]:
    """Raw readings by series and pass, each in the order they came; some may lie outside."""
    block_ms = schema.RAW_BLOCK_S * 1000
    sql = f"""
        with recursive block(at) as
          (select max(?1, (select min(key) >> 32 from raw))
           union all select at + 1 from block where at < ?2)
        select series, points
        from {ids(series)} as s cross join block cross join raw as k on {BY_KEY}
        order by s.id, key"""
    collected: dict[int, list[Points]] = defaultdict(list)
    for one, data in reader.rows(sql, [from_ms // block_ms, to_ms // block_ms]):
        try:
            collected[one].append(chunks.unpack(data))
        except ValueError as error:
            raise StoreError(f"database {reader.path}: {error}: it is damaged") from error
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
