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

from agent.minutes import MINUTE_S, Minute, MinuteHistogram, MinuteValue
from agent.stats import Floats, Histogram

COVERED_LEAST_S = 1e-3  # of a record; less is no time to divide by
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
        share = self._share(minute)
        server = self.servers.get(minute.source)
        if server is not None:
            self._add_server(server, minute, place, share)
        for value in minute.values:
            if value.name in GPU and len(value.labels) == 1:  # a part of a GPU has more labels
                self._add_gpu(value, minute.covered_s, place, share)

    def _share(self, minute: Minute) -> float:
        """How much of a record lies in the window. An unfinished one ends where the window does,
        but for a part of a millisecond: it is cut by what it covers, never by a whole record."""
        begin = max(minute.start_unix_s, self.start_unix_s)
        end = min(minute.start_unix_s + self.record_s, self.end_unix_s)
        inside_s = max(0.0, end - begin)
        if begin == minute.start_unix_s:
            return min(1.0, inside_s / minute.covered_s) if minute.covered_s > 0 else 1.0
        return inside_s / self.record_s

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
