"""Minute records: what one source said, minute by minute, from its readings as they come.

Pure: readings and two clocks in, records out. Lengths of time are of the monotonic clock, stamps
of the wall clock. A counter's increase between two samples belongs to all the time between them:
where that crosses the end of a minute it is shared out by time, so that the increases of all
minutes add up to what the counter rose, restarts included. A sample of a gauge stands for the time
half-way to its neighbours.

Nothing is invented. A counter's first sample is where counting begins. After a gap (no sample for
more than three intervals) the counters' rise is known and is shared out over the gap by time, the
rest is not: `covered_s` of its minutes falls, gauges have no value there, and the mark `gap` says
it. Where a counter falls, or `server_start_unix_s` moves, the process began anew: what came before
the last sample is counted already, what it counted since is its new value, and what it did between
its last sample and its end nobody knows.

What is known at a sample is in `dump`: an agent that died goes on from there (`load`), because the
monotonic clock outlives a process. What the counters rose by while it was dead is then a gap's, and
no minute's total lacks it. `joined` puts the parts of a minute together that was lived through
twice, as after a clock set back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from agent.metrics import CATALOGUE
from agent.model import Reading
from agent.stats import Histogram, coarsened

MINUTE_S = 60
GAP_INTERVALS = 3  # without a sample for longer than so many intervals: a gap
CLOCK_JUMP_S = 1.0  # more between the two clocks from one sample to the next is no drift
START_MOVED_S = 1.0  # a process's start is rounded by some servers
SERIES_MAX = 10_000  # of one source, each bucket being one; about 0.5 kB each
GAP_RECORDS_MAX = 240  # a longer gap's records are further apart than a minute
_FALL = 1e-9  # a sum of floats may fall by its own rounding

Labels = tuple[tuple[str, str], ...]


class MinuteValue(msgspec.Struct, frozen=True):
    """One series during one minute.

    Of a gauge `mean` is weighted by time, `min` and `max` are of the values that stood in the
    minute. Of a counter they are of its samples, and `increase` is what it rose. `n` samples were
    taken inside the minute; 0 where its ends are known from the neighbours alone.
    """

    name: str
    labels: Labels
    n: int
    mean: float
    min: float
    max: float
    last: float
    increase: float | None = None  # counters only


class MinuteHistogram(msgspec.Struct, frozen=True):
    """What a histogram rose by in one minute, per bucket; the last bound is infinite.

    One that did not rise has no record.
    """

    name: str  # without _bucket
    labels: Labels
    bounds: tuple[float, ...]
    counts: tuple[float, ...]


class Minute(msgspec.Struct, frozen=True):
    """One minute of one source.

    `covered_s`: how much of it lay between two samples that were no gap apart. `resets`: samples
    at which a counter had fallen or the process had restarted. `marks`, in order of the alphabet:
    bounds_changed, changed (the fingerprint), clock_jump, gap, restart, series_limit. An interval
    marks every minute that it touches.
    """

    source: str
    start_unix_s: int
    values: tuple[MinuteValue, ...]
    histograms: tuple[MinuteHistogram, ...]
    covered_s: float
    resets: int = 0
    marks: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------- one series


class _Series:
    """What the series below share: `take` a value, `spend` the interval before it in parts.

    `at_ns`: when its last value was sampled, -1 before the first one; `first_ns`: when the source
    first spoke of it; `offered_ns`: the sample that its newest value is of.
    """

    __slots__ = ("at_ns", "first_ns", "offered_ns")

    def __init__(self, first_ns: int) -> None:
        self.first_ns = first_ns
        self.at_ns = self.offered_ns = -1

    def could_fall(self) -> bool:
        """Whether it is a counter that stands above 0."""
        return False

    def fell(self) -> bool:
        return False

    def take(self, span_s: float, zeroed: bool) -> None:
        """Begins the interval up to the value offered. `zeroed`: it counts from 0 again."""
        raise NotImplementedError

    def spend(self, upto: float) -> None:
        """Gives the minute its part of the interval, up to that share of it."""
        raise NotImplementedError

    def settle(self) -> None:
        """The rest of the interval, and the sample itself, belong to this minute."""
        raise NotImplementedError

    def record(self) -> MinuteValue | MinuteHistogram | None:
        raise NotImplementedError

    def clear(self) -> None:
        """A new minute begins."""
        raise NotImplementedError


class _Scalar(_Series):
    __slots__ = ("area", "high", "labels", "low", "n", "name", "offered", "spent", "value")

    def __init__(self, name: str, labels: Labels, first_ns: int) -> None:
        super().__init__(first_ns)
        self.name, self.labels = name, labels
        self.value = self.offered = self.spent = 0.0
        self.clear()

    def clear(self) -> None:
        self.n = 0
        self.area = 0.0
        self.low, self.high = math.inf, -math.inf

    def _stood(self, value: float) -> None:
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value


class _Gauge(_Scalar):
    __slots__ = ("span_s", "total", "weight_s")

    def clear(self) -> None:
        super().clear()
        self.weight_s = self.total = 0.0

    def take(self, span_s: float, zeroed: bool) -> None:
        self.span_s = span_s
        self.spent = 0.0

    def spend(self, upto: float) -> None:
        if self.span_s > 0 and upto > self.spent:
            old = max(0.0, min(upto, 0.5) - self.spent)
            new = upto - self.spent - old
            self.weight_s += self.span_s * (upto - self.spent)
            self.area += self.span_s * (old * self.value + new * self.offered)
            if old > 0:
                self._stood(self.value)
            if new > 0:
                self._stood(self.offered)
        self.spent = upto

    def settle(self) -> None:
        self.spend(1.0)
        self.value = self.offered
        self.n += 1
        self.total += self.value
        self._stood(self.value)

    def record(self) -> MinuteValue | None:
        if self.low > self.high:
            return None
        mean = self.area / self.weight_s if self.weight_s > 0 else self.total / self.n
        mean = min(max(mean, self.low), self.high)
        return MinuteValue(self.name, self.labels, self.n, mean, self.low, self.high, self.value)


class _Counter(_Scalar):
    __slots__ = ("increase", "rise")

    def clear(self) -> None:
        super().clear()
        self.increase = 0.0

    def could_fall(self) -> bool:
        return self.at_ns >= 0 and self.value > 0

    def fell(self) -> bool:
        return self.at_ns >= 0 and self.offered < self.value - _FALL * abs(self.value)

    def take(self, span_s: float, zeroed: bool) -> None:
        self.spent = 0.0
        if zeroed:
            self.rise = self.offered
        else:
            self.rise = max(0.0, self.offered - self.value) if self.at_ns >= 0 else 0.0

    def spend(self, upto: float) -> None:
        self.increase += self.rise * (upto - self.spent)
        self.spent = upto

    def settle(self) -> None:
        self.spend(1.0)
        self.value = self.offered
        self.n += 1
        self.area += self.value
        self._stood(self.value)

    def record(self) -> MinuteValue | None:
        if not self.n and not self.increase:
            return None
        mean = min(max(self.area / self.n, self.low), self.high) if self.n else self.value
        low, high = (self.low, self.high) if self.n else (mean, mean)
        return MinuteValue(
            self.name, self.labels, self.n, mean, low, high, self.value, self.increase
        )


class _Buckets(_Series):
    """The buckets of one histogram; cumulative counts in, increases per bucket out."""

    __slots__ = (
        "bounds", "changed", "counts", "labels", "name", "offered", "rise", "rise_bounds",
        "spent", "total", "total_bounds",
    )  # fmt: skip

    def __init__(self, name: str, labels: Labels, first_ns: int) -> None:
        super().__init__(first_ns)
        self.name, self.labels = name, labels
        self.offered: dict[float, float] = {}
        self.bounds: tuple[float, ...] = ()
        self.counts: list[float] = []  # cumulative, of the last sample
        self.rise: list[float] = []
        self.rise_bounds: tuple[float, ...] = ()
        self.spent = 0.0
        self.changed = False
        self.clear()

    def clear(self) -> None:
        self.total: list[float] = []
        self.total_bounds: tuple[float, ...] = ()

    def could_fall(self) -> bool:
        return self.at_ns >= 0 and self.counts[-1] > 0

    def fell(self) -> bool:
        """Whether a bucket that is still there holds less than before."""
        return self.at_ns >= 0 and any(
            self.offered.get(bound, count) < count * (1 - _FALL)
            for bound, count in zip(self.bounds, self.counts, strict=True)
        )

    def take(self, span_s: float, zeroed: bool) -> None:
        offered = self.offered
        bounds = tuple(offered)
        if bounds != self.bounds:
            bounds = tuple(sorted(offered))
        counts = [offered[bound] for bound in bounds]
        self.changed = self.at_ns >= 0 and bounds != self.bounds
        if zeroed:
            self.rise_bounds, self.rise = bounds, counts
        elif not self.changed:
            then = self.counts or counts
            self.rise_bounds = bounds
            self.rise = [a - b for a, b in zip(counts, then, strict=True)]
        else:  # the same process, so what both sets of bounds have in common is known
            known = dict(zip(self.bounds, self.counts, strict=True))
            self.rise_bounds = tuple(bound for bound in bounds if bound in known)
            self.rise = [offered[bound] - known[bound] for bound in self.rise_bounds]
        self.bounds, self.counts = bounds, counts
        self.spent = 0.0

    def spend(self, upto: float) -> None:
        share, self.spent = upto - self.spent, upto
        if share <= 0 or self.rise[-1] <= 0:
            return
        if not self.total:
            self.total_bounds, self.total = self.rise_bounds, [0.0] * len(self.rise)
        rise = self.rise
        if self.total_bounds != self.rise_bounds:  # a minute has one set: what both have is exact
            both = [bound for bound in self.total_bounds if bound in self.rise_bounds]
            self.total = _only(both, self.total_bounds, self.total)
            rise = _only(both, self.rise_bounds, rise)
            self.total_bounds = tuple(both)
        self.total = [a + share * b for a, b in zip(self.total, rise, strict=True)]

    def settle(self) -> None:
        self.spend(1.0)
        self.offered = {}

    def record(self) -> MinuteHistogram | None:
        if not self.total:
            return None
        counts, below = [], 0.0
        for total in self.total:
            counts.append(max(0.0, total - below))  # a page whose buckets fall is wrong there
            below = max(below, total)
        return MinuteHistogram(self.name, self.labels, self.total_bounds, tuple(counts))


def _only(
    wanted: Sequence[float], bounds: Sequence[float], cumulative: Sequence[float]
) -> list[float]:
    return [count for bound, count in zip(bounds, cumulative, strict=True) if bound in wanted]


# What of a series outlives its process; between samples the other attributes are not read.
_OF_ALL = ("name", "labels", "first_ns", "at_ns", "offered_ns")
_OF_SCALARS = (*_OF_ALL, "value", "n", "area", "low", "high")
_SLOTS: dict[type[_Series], tuple[str, ...]] = {
    _Gauge: (*_OF_SCALARS, "weight_s", "total"),
    _Counter: (*_OF_SCALARS, "increase"),
}
_BUCKETS_SLOTS = (*_OF_ALL, "bounds", "counts", "total", "total_bounds")


class _State(msgspec.Struct, frozen=True):
    boot: str
    at: tuple[int, float]
    open: tuple[int, float, int, list[str]]
    fingerprint: str | None
    server_start: float | None
    has_forgotten: bool
    values: list[list[Any]]
    histograms: list[tuple[list[Any], list[tuple[Labels, float]]]]


_STATE = msgspec.msgpack.Encoder()
_STATE_READER = msgspec.msgpack.Decoder(_State)


def _of_slots(one: _Series, names: Sequence[str]) -> list[Any]:
    return [getattr(one, name) for name in names]


def _to_slots(one: _Series, names: Sequence[str], values: Sequence[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        if name in ("bounds", "total_bounds"):
            value = tuple(value)
        setattr(one, name, _labels(value) if name == "labels" else value)


def _labels(pairs: Iterable[Sequence[str]]) -> Labels:
    return tuple((name, value) for name, value in pairs)


class _Bucket:
    """One bucket's place: what a reading of it is offered to."""

    __slots__ = ("bound", "histogram", "offered_ns")

    def __init__(self, histogram: _Buckets, bound: float) -> None:
        self.histogram, self.bound, self.offered_ns = histogram, bound, -1


# ----------------------------------------------------------------------------------- the interval


class _Interval(msgspec.Struct):
    """From one sample to the next, on the wall clock as it is at its end.

    `edges`: the ends of minutes inside it. `counting_from_s`: where counters began anew within it,
    else its begin.
    """

    begin_unix_s: float
    end_unix_s: float
    length_ns: int
    edges: list[int]
    marks: set[str]
    counting_from_s: float = 0.0

    def shares(self, begin_unix_s: float) -> list[float]:
        """How much of the time from `begin_unix_s` to the end has passed at each edge."""
        span_s = self.end_unix_s - begin_unix_s
        if span_s <= 0:
            return [1.0] * len(self.edges)
        return [min(1.0, max(0.0, (edge - begin_unix_s) / span_s)) for edge in self.edges]


# ------------------------------------------------------------------------------------- the minutes


class Minutes:
    """The minutes of one source. Not thread-safe; what it holds is bounded by `series_max`.

    `dropped` counts samples not later than the one before, `refused` readings of series beyond the
    limit, `unknown` readings that are neither in the catalogue nor a bucket. A value that is not
    finite is as if the source had not said it; of a series said twice the first counts.
    """

    def __init__(
        self, source: str, *, interval_s: float = 5.0, series_max: int = SERIES_MAX
    ) -> None:
        self.source = source
        self.dropped = self.refused = self.unknown = 0
        self._gap_ns = round(GAP_INTERVALS * interval_s * 1e9)
        self._series_max = series_max
        self._places: dict[tuple[str, Labels], _Scalar | _Bucket] = {}
        self._histograms: dict[tuple[str, Labels], _Buckets] = {}
        self._fingerprint: str | None = None
        self._server_start: float | None = None
        self._at_ns = -1
        self._at_unix_s = 0.0
        self._swept_ns = -1
        self._has_forgotten = False
        self._open(0)

    def _open(self, start_unix_s: int) -> None:
        self._start_unix_s = start_unix_s
        self._covered_s = 0.0
        self._resets = 0
        self._marks: set[str] = set()

    @property
    def newest_unix_s(self) -> float | None:
        """When the newest sample was taken, an earlier agent's where that is loaded."""
        return self._at_unix_s if self._at_ns >= 0 else None

    def current(self) -> Minute | None:
        """The unfinished minute up to the last sample; None before the first."""
        return self._record()

    def dump(self, boot: str) -> bytes:
        """All that the next sample builds on. `boot`: what tells this boot's monotonic clock."""
        return _STATE.encode(
            _State(
                boot=boot,
                at=(self._at_ns, self._at_unix_s),
                open=(self._start_unix_s, self._covered_s, self._resets, sorted(self._marks)),
                fingerprint=self._fingerprint,
                server_start=self._server_start,
                has_forgotten=self._has_forgotten,
                values=[
                    _of_slots(one, _SLOTS[type(one)])
                    for one in self._places.values()
                    if isinstance(one, _Scalar)
                ],
                histograms=[
                    (
                        _of_slots(histogram, _BUCKETS_SLOTS),
                        [
                            (labels, bucket.bound)
                            for (_, labels), bucket in self._places.items()
                            if isinstance(bucket, _Bucket) and bucket.histogram is histogram
                        ],
                    )
                    for histogram in self._histograms.values()
                ],
            )
        )

    def load(self, dumped: bytes, boot: str | None) -> bool:
        """Goes on from a dump; False, and nothing is done, where it is of another boot or form.

        `boot` null: of whichever, to read its unfinished minute (`current`) and go on with nothing.
        """
        try:
            state = _STATE_READER.decode(dumped)
        except msgspec.MsgspecError:
            return False
        if boot is not None and state.boot != boot:
            return False
        self._at_ns, self._at_unix_s = state.at
        self._start_unix_s, self._covered_s, self._resets, marks = state.open
        self._marks = set(marks)
        self._fingerprint, self._server_start = state.fingerprint, state.server_start
        self._has_forgotten = state.has_forgotten
        for slots in state.values:
            kind = _Counter if len(slots) == len(_SLOTS[_Counter]) else _Gauge
            one = kind(slots[0], _labels(slots[1]), 0)
            _to_slots(one, _SLOTS[kind], slots)
            self._places[one.name, one.labels] = one
        for slots, buckets in state.histograms:
            histogram = _Buckets(slots[0], _labels(slots[1]), 0)
            _to_slots(histogram, _BUCKETS_SLOTS, slots)
            self._histograms[histogram.name, histogram.labels] = histogram
            for labels, bound in buckets:
                self._places[f"{histogram.name}_bucket", labels] = _Bucket(histogram, bound)
        return True

    def add(
        self,
        readings: Iterable[Reading],
        at_unix_s: float,
        at_monotonic_ns: int,
        *,
        fingerprint: str | None = None,
    ) -> list[Minute]:
        """Takes one sample of the source; returns the minutes that it finishes, oldest first.

        All readings count as of `at_monotonic_ns`. `fingerprint`: whatever tells model, version
        and flags; None where it is not known. Without readings the source did not answer: the open
        minute is then finished only once it is over and the last sample is a gap ago. A sample not
        later than the last is dropped.
        """
        readings = list(readings)
        if not math.isfinite(at_unix_s) or at_monotonic_ns <= self._at_ns:
            self.dropped += 1
            return []
        if not readings:
            return self._overdue(at_monotonic_ns)
        done: list[Minute] = []
        interval = self._interval(at_unix_s, at_monotonic_ns, done)
        if fingerprint is not None:
            if self._fingerprint not in (None, fingerprint):
                interval.marks.add("changed")
            self._fingerprint = fingerprint
        touched = self._offer(readings, at_monotonic_ns, interval.marks)
        anew = self._began_anew(touched, readings, interval)
        plan = [(one, self._take(one, interval, at_monotonic_ns, anew)) for one in touched]
        self._spend(plan, interval, done)
        for one in touched:
            one.at_ns = at_monotonic_ns
        self._at_ns, self._at_unix_s = at_monotonic_ns, at_unix_s
        return done

    # ------------------------------------------------------------------------------------- clocks

    def _interval(self, at_unix_s: float, at_ns: int, done: list[Minute]) -> _Interval:
        """Since the last sample. Where the clocks part, it lies on the wall clock as it is now.

        Only a clock set back beyond the open minute opens an earlier one again.
        """
        minute = math.floor(at_unix_s / MINUTE_S) * MINUTE_S
        if self._at_ns < 0:
            self._open(minute)
            return _Interval(at_unix_s, at_unix_s, 0, [], set(), at_unix_s)
        length_ns = at_ns - self._at_ns
        length_s = length_ns / 1e9
        begin_unix_s, marks = self._at_unix_s, set()
        if abs(at_unix_s - begin_unix_s - length_s) > min(CLOCK_JUMP_S, length_s / 2):
            marks.add("clock_jump")
            begin_unix_s = at_unix_s - length_s
            if minute < self._start_unix_s or begin_unix_s >= self._start_unix_s + MINUTE_S:
                self._marks |= marks
                self._finish(math.floor(begin_unix_s / MINUTE_S) * MINUTE_S, done)
        if length_ns > self._gap_ns:
            marks.add("gap")
        edges = self._edges(minute)
        return _Interval(begin_unix_s, at_unix_s, length_ns, edges, marks, begin_unix_s)

    def _edges(self, last: int) -> list[int]:
        """Ends of minutes from the open one's to `last`; further apart where they are many."""
        first = self._start_unix_s + MINUTE_S
        if last < first:
            return []
        apart = math.ceil((last - first + MINUTE_S) / MINUTE_S / GAP_RECORDS_MAX) * MINUTE_S
        return [*range(first, last, apart), last]

    def _overdue(self, at_ns: int) -> list[Minute]:
        done: list[Minute] = []
        waited_ns = at_ns - self._at_ns
        end_unix_s = self._start_unix_s + MINUTE_S
        over = self._at_unix_s + waited_ns / 1e9 >= end_unix_s
        if self._at_ns >= 0 and over and waited_ns > self._gap_ns and self._record() is not None:
            self._marks.add("gap")
            self._finish(end_unix_s, done)
        return done

    # ------------------------------------------------------------------------------------- series

    def _offer(self, readings: Sequence[Reading], at_ns: int, marks: set[str]) -> list[_Series]:
        """Lays each value at its series; the series that got one."""
        touched: list[_Series] = []
        places = self._places
        for one in readings:
            place = places.get((one.name, one.labels))
            if place is None and (place := self._new(one, at_ns, marks)) is None:
                continue
            if place.offered_ns == at_ns or not math.isfinite(one.value):
                continue
            place.offered_ns = at_ns
            if isinstance(place, _Bucket):
                histogram = place.histogram
                if histogram.offered_ns != at_ns:
                    histogram.offered_ns = at_ns
                    histogram.offered = {}
                    touched.append(histogram)
                histogram.offered[place.bound] = one.value
            else:
                place.offered = one.value
                touched.append(place)
        return [one for one in touched if not isinstance(one, _Buckets) or math.inf in one.offered]

    def _new(self, one: Reading, at_ns: int, marks: set[str]) -> _Scalar | _Bucket | None:
        bound = _bound(one)
        metric = CATALOGUE.get(one.name)
        if bound is None and (metric is None or one.name.endswith("_bucket")):
            self.unknown += 1
            return None
        if len(self._places) >= self._series_max and not self._sweep(at_ns):
            self.refused += 1
            marks.add("series_limit")
            return None
        place: _Scalar | _Bucket
        if bound is not None:
            key = one.name.removesuffix("_bucket"), _without_bound(one.labels)
            histogram = self._histograms.get(key)
            if histogram is None:
                histogram = self._histograms[key] = _Buckets(*key, at_ns)
            place = _Bucket(histogram, bound)
        else:
            kind = _Counter if metric is not None and metric.kind == "counter" else _Gauge
            place = kind(one.name, one.labels, at_ns)
        self._places[one.name, one.labels] = place
        return place

    def _sweep(self, at_ns: int) -> bool:
        """Forgets series that the source has left, at most once a sample; is there room now?"""
        if self._swept_ns == at_ns:
            return False
        self._swept_ns = at_ns
        oldest_ns = at_ns - max(self._gap_ns, 2 * MINUTE_S * 10**9)
        stale = [key for key, place in self._places.items() if place.offered_ns < oldest_ns]
        for key in stale:
            del self._places[key]
        left = {id(one.histogram) for one in self._places.values() if isinstance(one, _Bucket)}
        self._histograms = {k: one for k, one in self._histograms.items() if id(one) in left}
        self._has_forgotten |= bool(stale)  # and what comes back is not new
        return len(self._places) < self._series_max

    def _began_anew(
        self, touched: Sequence[_Series], readings: Sequence[Reading], interval: _Interval
    ) -> bool:
        """Whether the process restarted: it says so, else most of its counters fell."""
        start = next((r.value for r in readings if r.name == "server_start_unix_s"), None)
        known, self._server_start = self._server_start, start or self._server_start
        fallen = sum(one.fell() for one in touched)
        if start is not None and known is not None:
            anew = abs(start - known) > START_MOVED_S
        else:
            anew = fallen > 0 and 2 * fallen > sum(one.could_fall() for one in touched)
        if anew or fallen:
            interval.marks.add("restart")
        if anew and start is not None and interval.begin_unix_s < start < interval.end_unix_s:
            interval.counting_from_s = start
        return anew

    def _take(self, one: _Series, interval: _Interval, at_ns: int, anew: bool) -> list[float]:
        """Begins the interval of one series; its shares at the edges."""
        if one.at_ns < 0:
            # In a process that was watched before it spoke of this counter, it counted from 0.
            watched = self._at_ns >= 0 and self._server_start is not None
            lost = "gap" in interval.marks or self._has_forgotten or self.refused > 0
            length_ns, zeroed = 0, anew or (watched and not lost and one.first_ns == at_ns)
        else:
            length_ns, zeroed = at_ns - one.at_ns, anew or one.fell()
        one.take(length_ns / 1e9 if length_ns <= self._gap_ns else 0.0, zeroed)
        if isinstance(one, _Buckets) and one.changed:
            interval.marks.add("bounds_changed")
        if not interval.edges:
            return []
        if one.at_ns in (-1, self._at_ns):
            is_gauge = isinstance(one, _Gauge)
            return interval.shares(interval.begin_unix_s if is_gauge else interval.counting_from_s)
        return interval.shares(interval.end_unix_s - length_ns / 1e9)

    # ------------------------------------------------------------------------------------ records

    def _spend(
        self,
        plan: Sequence[tuple[_Series, list[float]]],
        interval: _Interval,
        done: list[Minute],
    ) -> None:
        covered_s = interval.length_ns / 1e9 if interval.length_ns <= self._gap_ns else 0.0
        passed = 0.0
        upto = interval.shares(interval.begin_unix_s)
        for index, edge in enumerate(interval.edges):
            for one, shares in plan:
                one.spend(shares[index])
            self._covered_s += covered_s * (upto[index] - passed)
            passed = upto[index]
            self._marks |= interval.marks
            self._finish(edge, done)
        for one, _ in plan:
            one.settle()
        self._covered_s += covered_s * (1.0 - passed)
        self._resets += "restart" in interval.marks
        self._marks |= interval.marks

    def _finish(self, next_unix_s: int, done: list[Minute]) -> None:
        """Gives the open minute out, if anything is known of it, and opens the next."""
        minute = self._record()
        if minute is not None:
            done.append(minute)
        for one in self._all():
            one.clear()
        self._open(next_unix_s)

    def _all(self) -> Iterable[_Series]:
        yield from (one for one in self._places.values() if isinstance(one, _Scalar))
        yield from self._histograms.values()

    def _record(self) -> Minute | None:
        records = [record for one in self._all() if (record := one.record()) is not None]
        if not records and self._covered_s == 0:
            return None
        return Minute(
            self.source,
            self._start_unix_s,
            tuple(one for one in records if isinstance(one, MinuteValue)),
            tuple(one for one in records if isinstance(one, MinuteHistogram)),
            self._covered_s,
            self._resets,
            tuple(sorted(self._marks)),
        )


def _bound(one: Reading) -> float | None:
    """The upper bound that a bucket's reading carries in its label `le`; None for others."""
    if not one.name.endswith("_bucket"):
        return None
    text = next((value for name, value in one.labels if name == "le"), "")
    try:
        bound = float(text)
    except ValueError:
        return None
    return None if math.isnan(bound) else bound


def _without_bound(labels: Labels) -> Labels:
    return tuple(pair for pair in labels if pair[0] != "le")


# ------------------------------------------------------------------------------------ parts of one


def joined(first: Minute, second: Minute) -> Minute:
    """Two parts of one minute of one source, in order of time: a clock set back, an agent
    restarted within it.

    Increases, histograms and what was covered add up; means are weighted by what each part
    covered. Raises ValueError where they are not of the same minute.
    """
    if (first.source, first.start_unix_s) != (second.source, second.start_unix_s):
        raise ValueError("parts of different minutes")
    weights = first.covered_s, second.covered_s
    values = {(one.name, one.labels): one for one in first.values}
    for one in second.values:
        key = one.name, one.labels
        values[key] = _joined_value(values[key], one, weights) if key in values else one
    histograms = {(one.name, one.labels): one for one in first.histograms}
    for other in second.histograms:
        key = other.name, other.labels
        known = histograms.get(key)
        histograms[key] = other if known is None else _joined_histogram(known, other)
    return Minute(
        first.source,
        first.start_unix_s,
        tuple(values.values()),
        tuple(histograms.values()),
        first.covered_s + second.covered_s,
        first.resets + second.resets,
        tuple(sorted({*first.marks, *second.marks})),
    )


def _joined_value(
    first: MinuteValue, second: MinuteValue, weights: tuple[float, float]
) -> MinuteValue:
    a, b = weights if sum(weights) > 0 else (first.n or 1, second.n or 1)
    low, high = min(first.min, second.min), max(first.max, second.max)
    known = [part for part in (first.increase, second.increase) if part is not None]
    return MinuteValue(
        first.name,
        first.labels,
        first.n + second.n,
        min(max((a * first.mean + b * second.mean) / (a + b), low), high),
        low,
        high,
        second.last,
        math.fsum(known) if known else None,
    )


def _joined_histogram(first: MinuteHistogram, second: MinuteHistogram) -> MinuteHistogram:
    a, b = (Histogram(one.bounds, one.counts) for one in (first, second))
    if a.bounds != b.bounds:
        a, b = coarsened(a, b.bounds), coarsened(b, a.bounds)
    counts = tuple(x + y for x, y in zip(a.counts, b.counts, strict=True))
    return MinuteHistogram(first.name, first.labels, a.bounds, counts)
