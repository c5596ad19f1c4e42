"""A window of minute records in columns: what pattern and passive curve are worked out of.

Pure. Records go in one by one, in any order, and are kept as numbers of 8 bytes, so that a week of
a server takes some megabytes. A record may be longer than a minute (an hour's roll-up has the same
form); then what is said per minute here is said per record.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agent.minutes import MINUTE_S, Minute, MinuteHistogram, MinuteValue
from agent.stats import Floats, Histogram

COVERED_LEAST_S = 1e-3  # of a record; less is no time to divide by
STAMP_S = 2e-3  # so far may a window that ends with a sample end before it: stamps are milliseconds
GAUGES = frozenset(("requests_running", "requests_waiting", "kv_usage_ratio", "kv_capacity_tokens"))
HISTOGRAMS = (
    "ttft_seconds", "itl_seconds", "tpot_seconds", "e2e_seconds", "queue_seconds",
    "prompt_length_tokens", "output_length_tokens",
)  # fmt: skip
COUNTERS = frozenset((
    "requests_received_total", "requests_finished_total", "requests_aborted_total",
    "requests_rejected_total", "prompt_tokens_total", "output_tokens_total", "preemptions_total",
    "prefix_cache_queries_total", "prefix_cache_hits_total",
    *(f"{name}_{part}" for name in HISTOGRAMS for part in ("sum", "count")),
))  # fmt: skip
GPU = frozenset(("gpu_energy_j", "gpu_power_w", "gpu_throttled", "gpu_clock_event_reasons"))


class Values(NamedTuple):
    """One series of `Records`: of which of them it is, and each figure that is kept of it."""

    name: str
    labels: tuple[tuple[str, str], ...]
    of: NDArray[np.int_]
    figures: dict[str, Floats]  # a gauge's mean, min, max and last, a counter's increase


class Counts(NamedTuple):
    """One histogram of `Records`; of each record the counts as far as they are above 0."""

    name: str
    labels: tuple[tuple[str, str], ...]
    bounds: tuple[float, ...]
    of: NDArray[np.int_]
    counts: list[list[float]]


class Records(NamedTuple):
    """The minutes of one source in columns: what so many `Minute` say, in a third of the time."""

    source: str
    start_unix_s: Floats
    covered_s: Floats
    resets: Floats
    marks: list[tuple[str, ...]]
    values: list[Values]
    histograms: list[Counts]


class Column(NamedTuple):
    """One figure of one series: a gauge's mean, min, max or last, a counter's increase."""

    name: str
    figure: str


class Source:
    """One server's, or one GPU's, columns: a place for each record, NaN where it says nothing."""

    def __init__(self, places: int) -> None:
        self._empty = array("d", [math.nan]) * places
        self._columns: dict[Column, array[float]] = {}
        self._rows: dict[tuple[str, tuple[float, ...]], tuple[array[int], array[float]]] = {}
        self.covered_s: array[float] = array("d", bytes(8 * places))
        self.resets: array[float] = array("d", bytes(8 * places))
        self.marks: dict[int, set[str]] = {}

    def put(self, name: str, figure: str, place: int, value: float, *, add: bool = False) -> None:
        column = self._columns.get((name, figure))  # type: ignore[call-overload]
        if column is None:
            column = self._columns[Column(name, figure)] = self._empty[:]
        before = column[place]
        column[place] = before + value if add and before == before else value

    def put_all(
        self, name: str, figure: str, places: NDArray[np.int_], values: Floats, *, add: bool = False
    ) -> None:
        """`put` for each of them, in that order."""
        column = self._columns.setdefault(Column(name, figure), self._empty[:])
        known: Floats = np.frombuffer(column)
        if add:
            sums = np.bincount(places, values, known.size)
            known[places] = np.nan_to_num(known[places]) + sums[places]
        else:
            known[places] = values

    def put_histograms(self, one: Counts, places: NDArray[np.int_], shares: Floats) -> None:
        at, counts = self._rows.setdefault((one.name, one.bounds), (array("l"), array("f")))
        width = len(one.bounds)
        table = np.zeros((len(one.counts), width))
        for number, row in enumerate(one.counts):
            table[number, : len(row)] = row
        counts.frombytes((table * shares[:, None]).astype(np.float32).tobytes())
        at.frombytes(places.astype(np.int_).tobytes())

    def put_histogram(self, one: MinuteHistogram, place: int, share: float) -> None:
        places, counts = self._rows.setdefault((one.name, one.bounds), (array("l"), array("f")))
        places.append(place)
        counts.extend(one.counts if share == 1 else [share * count for count in one.counts])

    def has(self, name: str) -> bool:
        return any(column.name == name for column in self._columns)

    def get(self, name: str, figure: str) -> Floats:
        column = self._columns.get(Column(name, figure), self._empty)
        return np.frombuffer(column, dtype=np.float64)

    def histograms(self, name: str, places: Floats | None = None) -> Iterator[Histogram]:
        """One for each set of bounds; of all places, or of those where `places` is not 0."""
        for (known, bounds), (at, counts) in self._rows.items():
            if known != name:
                continue
            rows = np.frombuffer(counts, dtype=np.float32).reshape(-1, len(bounds))
            if places is not None:
                rows = rows[places[np.frombuffer(at, dtype=np.int_)] > 0]
            sums = rows.sum(axis=0, dtype=np.float64)
            yield Histogram(bounds, tuple(float(count) for count in sums))


class Window:
    """The records of one service between two instants.

    `servers`: the sources whose records are its servers' (replicas). `gpus`: the UUIDs of its GPUs,
    None for every GPU that is spoken of. `record_s`: how long a record is. A record across the
    beginning counts in part, as if its time were all alike; so does a whole one across the end. The
    record before the beginning, if it is given, tells what was in flight then.
    """

    def __init__(
        self,
        start_unix_s: float,
        end_unix_s: float,
        *,
        servers: Sequence[str],
        gpus: Collection[str] | None = None,
        record_s: int = MINUTE_S,
    ) -> None:
        self.start_unix_s, self.end_unix_s = start_unix_s, end_unix_s
        self.record_s = record_s
        self._wanted = None if gpus is None else frozenset(gpus)
        # place 0 is the record before the first
        self.origin_unix_s = (math.floor(start_unix_s / record_s) - 1) * record_s
        self.places = max(1, math.ceil((end_unix_s - self.origin_unix_s) / record_s))
        self.servers = {name: Source(self.places) for name in servers}
        self.gpus: dict[str, Source] = {}

    @property
    def window_s(self) -> float:
        return max(0.0, self.end_unix_s - self.start_unix_s)

    @property
    def starts_unix_s(self) -> Floats:
        return self.origin_unix_s + self.record_s * np.arange(self.places, dtype=np.float64)

    def add_all(self, minutes: Iterable[Minute]) -> Window:
        for minute in minutes:
            self.add(minute)
        return self

    def add(self, minute: Minute) -> None:
        """Takes a record; one that the window does not touch, or of another source, is left out."""
        place, rest = divmod(minute.start_unix_s - self.origin_unix_s, self.record_s)
        if rest or not 0 <= place < self.places:
            return
        share = self._share(minute.start_unix_s, minute.covered_s)
        server = self.servers.get(minute.source)
        if server is not None:
            self._add_server(server, minute, place, share)
        for value in minute.values:
            if value.name in GPU and len(value.labels) == 1:  # a part of a GPU has more labels
                self._add_gpu(value, minute.covered_s, place, share)

    def add_records(self, records: Records) -> Window:
        """`add` for each of the records."""
        starts = records.start_unix_s
        places = np.floor((starts - self.origin_unix_s) / self.record_s).astype(np.int_)
        inside = (places >= 0) & (places < self.places)
        whole = (starts - self.origin_unix_s) % self.record_s == 0
        shares = np.ones(starts.size)
        across = (starts < self.start_unix_s) | (starts + self.record_s > self.end_unix_s)
        for number in np.flatnonzero(across):
            shares[number] = self._share(int(starts[number]), float(records.covered_s[number]))
        known = _Known(records, places, inside & whole, shares)
        if (server := self.servers.get(records.source)) is not None:
            _add_to_server(server, known)
        for value in records.values:
            if value.name in GPU and len(value.labels) == 1:
                self._add_records_of_gpu(value, known)
        return self

    def _add_records_of_gpu(self, value: Values, known: _Known) -> None:
        ((label, uuid),) = value.labels
        if label != "gpu" or (self._wanted is not None and uuid not in self._wanted):
            return
        kept = known.kept[value.of]
        of = value.of[kept]
        places, shares = known.places[of], known.shares[of]
        if not of.size:
            return
        gpu = self.gpus.setdefault(uuid, Source(self.places))
        for figure, values in value.figures.items():
            if figure == "increase":
                gpu.put_all(value.name, figure, places, values[kept] * shares, add=True)
            elif figure in ("mean", "max"):
                gpu.put_all(value.name, figure, places, values[kept])
        covered_s = np.frombuffer(gpu.covered_s)
        np.maximum.at(covered_s, places, known.records.covered_s[of] * shares)

    def _share(self, start_unix_s: int, covered_s: float) -> float:
        """How much of a record lies in the window. An unfinished one ends where the window does,
        but for a part of a millisecond: it is cut by what it covers, never by a whole record."""
        begin = max(start_unix_s, self.start_unix_s)
        end = min(start_unix_s + self.record_s, self.end_unix_s)
        inside_s = max(0.0, end - begin)
        if begin > start_unix_s:
            return inside_s / self.record_s
        return 1.0 if covered_s <= inside_s + STAMP_S else inside_s / covered_s

    def _add_server(self, server: Source, minute: Minute, place: int, share: float) -> None:
        server.covered_s[place] += minute.covered_s * share
        server.resets[place] += minute.resets
        if minute.marks:
            server.marks.setdefault(place, set()).update(minute.marks)
        for value in minute.values:
            if value.labels:
                continue
            if value.name in COUNTERS:
                increase = (value.increase or 0.0) * share
                server.put(value.name, "increase", place, increase, add=True)
            elif value.name in GAUGES:
                server.put(value.name, "mean", place, value.mean)
                server.put(value.name, "min", place, value.min)
                server.put(value.name, "max", place, value.max)
                server.put(value.name, "last", place, value.last)
        if share > 0:
            for histogram in minute.histograms:
                if not histogram.labels and histogram.name in HISTOGRAMS:
                    server.put_histogram(histogram, place, share)

    def _add_gpu(self, value: MinuteValue, covered_s: float, place: int, share: float) -> None:
        ((label, uuid),) = value.labels
        if label != "gpu" or (self._wanted is not None and uuid not in self._wanted):
            return
        gpu = self.gpus.setdefault(uuid, Source(self.places))
        if value.name == "gpu_energy_j":
            gpu.put(value.name, "increase", place, (value.increase or 0.0) * share, add=True)
        else:
            gpu.put(value.name, "mean", place, value.mean)
            gpu.put(value.name, "max", place, value.max)
        gpu.covered_s[place] = max(gpu.covered_s[place], covered_s * share)

    # -------------------------------------------------------------------------- of all the servers

    def live(self, server: Source) -> Floats:
        """1 from a server's first record to its last: a replica counts while it is there."""
        known = np.flatnonzero(np.frombuffer(server.covered_s) > 0)
        live: Floats = np.zeros(self.places)
        if known.size:
            live[max(1, known[0]) : known[-1] + 1] = 1
        return live

    def weights_s(self) -> Floats:
        """How much of each record was observed: where a server is not, its service is not."""
        weights: Floats = np.full(self.places, np.inf)
        for server in self.servers.values():
            covered: Floats = np.frombuffer(server.covered_s)
            weights = np.where(self.live(server) > 0, np.minimum(weights, covered), weights)
        weights[0] = 0.0
        is_seen = np.isfinite(weights) & (weights >= COVERED_LEAST_S)
        return np.minimum(np.where(is_seen, weights, 0.0), self.record_s)

    def marked(self, *marks: str) -> Floats:
        """1 where a record of any server has one of these marks."""
        found: Floats = np.zeros(self.places)
        for server in self.servers.values():
            for place, said in server.marks.items():
                if said & set(marks):
                    found[place] = 1
        return found

    def has(self, name: str) -> bool:
        return any(server.has(name) for server in self.servers.values())

    def total(self, name: str, figure: str = "increase") -> Floats:
        """Sum over the servers, record by record; what is not known is 0 in it."""
        return sum(
            (np.nan_to_num(one.get(name, figure)) for one in self.servers.values()),
            start=np.zeros(self.places),
        )

    def in_flight(self, figure: str) -> Floats:
        """Requests running and waiting. Of several servers the `max` is at most this, the `min` at
        least: theirs need not fall together."""
        return self.total("requests_running", figure) + self.total("requests_waiting", figure)

    def kv_usage(self, figure: str) -> Floats:
        """Share of the service's KV cache in use, by capacity where it is known, NaN if unknown;
        the `max` is of the fullest server."""
        shares = np.array([one.get("kv_usage_ratio", figure) for one in self.servers.values()])
        known = ~np.isnan(shares)
        if not shares.size or not known.any():
            return np.full(self.places, np.nan)
        if figure == "max":
            best = np.where(known, shares, -np.inf).max(axis=0)
            return np.where(np.isfinite(best), best, np.nan)
        sizes = np.array([one.get("kv_capacity_tokens", "last") for one in self.servers.values()])
        if np.isnan(sizes[known]).any():
            sizes = np.ones_like(shares)
        weights = np.where(known, sizes, 0.0)
        total = weights.sum(axis=0)
        summed = (np.nan_to_num(shares) * weights).sum(axis=0)
        return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)

    def histograms(self, name: str, places: Floats | None = None) -> list[Histogram]:
        return [one for server in self.servers.values() for one in server.histograms(name, places)]


class _Known(NamedTuple):
    """Records as a window takes them: where, which of them at all, and how much of each."""

    records: Records
    places: NDArray[np.int_]
    kept: NDArray[np.bool_]
    shares: Floats


def _add_to_server(server: Source, known: _Known) -> None:
    records, kept = known.records, known.kept
    places, shares = known.places[kept], known.shares[kept]
    covered_s, resets = np.frombuffer(server.covered_s), np.frombuffer(server.resets)
    np.add.at(covered_s, places, records.covered_s[kept] * shares)
    np.add.at(resets, places, records.resets[kept])
    for number in np.flatnonzero(kept):
        if marks := records.marks[number]:
            server.marks.setdefault(int(known.places[number]), set()).update(marks)
    for value in records.values:
        if value.labels or value.name not in GAUGES | COUNTERS:
            continue
        mine = kept[value.of]
        of = value.of[mine]
        for figure, values in value.figures.items():
            if figure == "increase":
                increases = values[mine] * known.shares[of]
                server.put_all(value.name, figure, known.places[of], increases, add=True)
            else:
                server.put_all(value.name, figure, known.places[of], values[mine])
    for one in records.histograms:
        if one.labels or one.name not in HISTOGRAMS:
            continue
        mine = kept[one.of] & (known.shares[one.of] > 0)
        of = one.of[mine]
        chosen = one._replace(of=of, counts=[one.counts[n] for n in np.flatnonzero(mine)])
        server.put_histograms(chosen, known.places[of], known.shares[of])
