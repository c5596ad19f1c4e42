"""What the agent's store holds, for whoever asks: series, minutes, requests, curves, verdicts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent import chunks, schema
from agent.metrics import CATALOGUE
from agent.minutes import Minute, MinuteHistogram, Minutes, MinuteValue
from agent.model import Sweep, TargetGpu, UsageError, decode_sweep
from agent.places import (
    COLUMNS,
    FIGURE,
    MINUTE_START,
    MINUTES,
    NUMBER,
    PARTS,
    Kind,
    bounds,
    ids,
    labels,
)
from agent.question import (
    PERCENTILES,
    Column,
    Question,
    Series,
    Table,
    Which,
    owners,
    points,
    recent,
    whole_step,
)
from agent.reader import Reader
from agent.sizing.window import Counts, Records, Values
from agent.stats import Floats

# A source that says one of these is an inference server.
SAID_BY_SERVERS = ("requests_running", "output_tokens_total")


class _About(NamedTuple):
    """A series of the store; bounds of a histogram alone."""

    name: str
    labels: tuple[tuple[str, str], ...]
    bounds: tuple[float, ...]


class Recall(Reader):
    """Answers from the store; see `Reader` for how it is opened, and what is raised."""

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
        step = whole_step(from_s, to_s, step_s)
        which = Which(server, service, gpu)
        asked = Question(self, [metric], from_s // step * step, to_s, step, which)
        return asked.series(metric)

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
        step = whole_step(from_s, to_s, step_s)
        first = int(from_s // step * step)
        asked = Question(self, metrics, first, to_s, step, Which(server, service, gpu))
        steps = range(first, math.floor(to_s) + 1, step)
        columns = {}
        for metric in asked.metrics:
            found = asked.series(metric)
            values = dict(found.points)
            own = max(step, 60) if metric in PERCENTILES else step
            columns[metric] = Column(found.unit, [values.get(at // own * own) for at in steps])
        return Table(first, step, columns)

    # ------------------------------------------------------------------------------- other things

    def newest_unix_s(self, before_s: float) -> float | None:
        """The newest reading or minute up to an instant; None of an empty store."""
        at_ms = self.number("select max(at_ms) from raw_open where at_ms <= ?", [before_s * 1000])
        sql = """select hour * 3600 + minute * 60 from minute_source where hour <= ?
                 and hour * 3600 + minute * 60 <= ? order by hour desc, minute desc limit 1"""
        minute = self.number(sql, [before_s // schema.HOUR_S, before_s])
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
        for series, owner, name, text in self.rows(sql):
            said = json.loads(text)
            gpu = said.get("gpu")
            if owner == source or (gpu is not None and (gpus is None or gpu in gpus)):
                about[series] = (name, said)
        found: list[tuple[int, chunks.Times, chunks.Values]] = []
        from_ms, to_ms = math.ceil(from_s * 1000), math.floor(to_s * 1000)
        known = recent(self, about, from_ms, to_ms).points
        for series, times, values in points(self, tuple(about), from_ms, to_ms, known):
            inside = (times >= from_ms) & (times <= to_ms)
            found.append((series, times[inside], values[inside]))
        if not found:
            return
        at_ms = np.concatenate([times for _, times, _ in found])
        all_values = np.concatenate([values for _, _, values in found])
        whose = np.repeat([series for series, _, _ in found], [times.size for _, times, _ in found])
        for place in np.argsort(at_ms, kind="stable"):
            name, said = about[int(whose[place])]
            yield int(at_ms[place]) / 1000, name, said, float(all_values[place])

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
        for hour, *head in self.rows(sql, [first, last, source]):
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
        sql = f"""select {NUMBER}, k.covered_s, k.resets, k.marks from minute_source as k
                  where k.hour between ?1 / 3600 and ?2 / 3600 and {MINUTE_START} between ?1 and ?2
                    and k.source = (select id from sources where name = ?3)
                  order by k.hour, k.minute, k.part"""
        values: list[Values] = []
        histograms: list[Counts] = []
        with self.snapshot():  # a minute that ends meanwhile has values and no head
            heads = self.rows(sql, [*window, source])
            numbers, covered_s, resets = (
                np.array([head[column] for head in heads], np.float64) for column in range(3)
            )
            for kind in FIGURE:
                mine = [id_ for id_, one in about.items() if _kind(one) == kind]
                for series, of, columns in self._columns(mine, kind, numbers, window):
                    name, told, ends = about[series]
                    if kind == "histogram":
                        texts = ",".join(columns["counts"])
                        counts = msgspec.json.decode(f"[{texts}]", type=list[list[float]])
                        histograms.append(Counts(name, told, ends, of, counts))
                    else:
                        values.append(Values(name, told, of, columns))
        return Records(
            source=source,
            start_unix_s=numbers // PARTS * 60,
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
        figures = COLUMNS[kind]
        form = [("series", "i8"), ("number", "f8")]
        form += [(name, "O" if name == "counts" else "f8") for name in figures]
        parts = []
        for place in MINUTES:
            sql = f"""
                {place.blocks}
                select s.id, {NUMBER}, {", ".join(figures.values())}
                from block cross join {ids(series)} as s cross join {place.table} as k
                  on {place.on}
                where {place.start} between ?1 and ?2 and k.{FIGURE[kind]} is not null"""
            with self.guarded():
                parts.append(np.fromiter(self.db.execute(sql, window), np.dtype(form)))
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
            series: _About(name, labels(texts), bounds(ends))
            for series, name, texts, ends in self.rows(sql, [source])
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
        for place in MINUTES:
            sql = f"""
                {place.blocks}
                select k.minute, k.part, s.id, n, coalesce(mean, last), coalesce(min, last),
                  coalesce(max, last), last, increase, counts
                from block cross join {ids(about)} as s
                  cross join {place.table} as k on {place.on}
                order by s.id"""
            begin = heads[0][0] * schema.HOUR_S
            for minute, part, *row in self.rows(sql, [begin, begin + schema.HOUR_S - 1]):
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
        rows = self.rows("select value from meta where key = ?", [schema.state_key(source)])
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
        return [dict(zip(names, row, strict=True)) for row in self.rows(sql, [*window, source])]

    def speakers(self, *metrics: str) -> list[str]:
        """The sources that ever said one of these metrics."""
        marks = ", ".join("?" * len(metrics))
        sql = f"""select distinct sources.name from series join sources on sources.id = source
                  where series.name in ({marks}) order by sources.name"""
        return [name for (name,) in self.rows(sql, metrics)]

    def servers(
        self, server: str | None = None, service: str | None = None
    ) -> dict[str, list[str]]:
        """The inference servers that are meant, each with its GPUs; all, where none is named.

        Raises UsageError for a server or service that there is not.
        """
        found = owners(self, Which(server, service))
        if found is None:
            known = set(self.speakers(*SAID_BY_SERVERS))
            found = {one["name"]: one["gpus"] for one in self.sources() if one["name"] in known}
        return found

    def sources(self) -> list[dict[str, Any]]:
        """Every source with its service and GPUs."""
        rows = self.rows("select name, service, gpus from sources order by name")
        return [
            {"name": name, "service": service, "gpus": json.loads(gpus)}
            for name, service, gpus in rows
        ]

    def gpus(self, uuids: Collection[str]) -> list[TargetGpu]:
        """What these GPUs are, those of which the driver told it."""
        rows = self.rows("select name, uuid, memory_bytes from gpus order by uuid")
        return [TargetGpu(*row) for row in rows if row[1] in uuids]

    def events(self, from_s: float, to_s: float) -> list[dict[str, Any]]:
        """Marks between two instants, in order of time."""
        sql = """select at_unix_s, kind, source, text, data from events
                 where at_unix_s between ? and ? order by at_unix_s, id"""
        return [
            {"at_unix_s": at, "kind": kind, "source": source, "text": text,
             "data": json.loads(data) if data else None}
            for at, kind, source, text, data in self.rows(sql, [from_s, to_s])
        ]  # fmt: skip

    def fingerprints(self, source: str) -> list[dict[str, Any]]:
        """What a server was, oldest first."""
        sql = """select since_unix_s, fingerprint, data from fingerprints
                 where source = ? order by id"""
        return [
            {"since_unix_s": since, "fingerprint": fingerprint, "data": json.loads(data)}
            for since, fingerprint, data in self.rows(sql, [source])
        ]

    def curves(self) -> list[dict[str, Any]]:
        """The curves, newest first, without the sweeps themselves."""
        names = (
            "id, key, received_unix_s, source, started_at, url, model, engine, levels, simulated"
        )
        rows = self.rows(f"select {names} from curves order by received_unix_s desc, id desc")
        return [dict(zip(names.split(", "), row, strict=True)) for row in rows]

    def curve(self, id_: int) -> Sweep:
        """One curve, whole. Raises UsageError where there is none of that id."""
        rows = self.rows("select sweep from curves where id = ?", [id_])
        if not rows:
            raise UsageError(f"no curve {id_} in {self.path}")
        return decode_sweep(rows[0][0].encode())

    def assessments(self, scope: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """What was concluded, newest first."""
        sql = """select at_unix_s, scope, finding, verdict from assessments
                 where scope = ?1 or ?1 is null order by at_unix_s desc, id desc limit ?2"""
        return [
            {"at_unix_s": at, "scope": scope, "finding": finding, "verdict": json.loads(verdict)}
            for at, scope, finding, verdict in self.rows(sql, [scope, limit])
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
            for *row, verdict in self.rows(sql, [scope, limit])
        ]


# ------------------------------------------------------------------------------------------- rows


def _kind(about: _About) -> Kind:
    if about.bounds:
        return "histogram"
    known = CATALOGUE.get(about.name)
    return "counter" if known is not None and known.kind == "counter" else "gauge"


def _value(about: _About, row: tuple[Any, ...]) -> MinuteValue:
    name, told, _ = about
    _, n, mean, least, most, last, increase, _ = row
    return MinuteValue(name, told, n, mean, least, most, last, increase)


def _histogram(about: _About, row: tuple[Any, ...]) -> MinuteHistogram:
    name, told, ends = about
    counts = json.loads(row[-1])
    whole = tuple(float(count) for count in counts) + (0.0,) * (len(ends) - len(counts))
    return MinuteHistogram(name, told, ends, whole)
