"""Readings and assessments as OTLP requests, ready for the outbox.

The protobuf messages are filled directly: an SDK's pipeline would aggregate anew what servers and
drivers have counted already, and stamp it with its own time. Every point carries the time of its
reading. Counters and histograms stay cumulative, as their source counts them, with the source's own
buckets, so that a request sent twice says the same twice.

Names and attributes come from the tables below: the conventions' where there are any, `servefit.*`
elsewhere. Protobuf is imported where it is used.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from agent.exporters import Batch, encodable, help_of, histogram_of, labels_of
from agent.metrics import CATALOGUE
from agent.model import Reading, StoreError, Verdict

if TYPE_CHECKING:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as MetricMessage
    from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics

Semconv = Literal["v1.41", "latest"]
Form = Literal["gauge", "counter", "updown", "histogram"]
Value = str | bool | int | float

POINTS_MAX = 2000  # of one request: some 200 kB before compression
SERIES_MAX = 50_000  # that start times are remembered of
_HOUR_NS = 3600 * 1_000_000_000
FORGET_NS = 7 * 24 * _HOUR_NS  # a series not seen for a week is gone

# ------------------------------------------------------------------------------------------ names


class Convention(msgspec.Struct, frozen=True):
    """What one of our series is called by the conventions, in each version's spelling.

    `attributes` are those that the conventions want beside the labels.
    """

    names: dict[Semconv, str]
    form: Form
    attributes: tuple[tuple[str, str], ...] = ()


def _same(name: str, form: Form, *attributes: tuple[str, str]) -> Convention:
    """A name that is the same in both versions."""
    return Convention({"v1.41": name, "latest": name}, form, attributes)


# OpenTelemetry semantic conventions 1.41 (hardware; generative AI), and for `latest` those of
# generative AI in the repository of their own, which kept the names of its server metrics.
# The keys are canonical names; of a histogram the name without _sum, _count and _bucket.
CONVENTIONS: dict[str, Convention] = {
    "gpu_memory_used_bytes": _same("hw.gpu.memory.usage", "updown"),
    "gpu_memory_total_bytes": _same("hw.gpu.memory.limit", "updown"),
    "gpu_utilization_ratio": _same("hw.gpu.utilization", "gauge", ("hw.gpu.task", "general")),
    "gpu_power_w": _same("hw.power", "gauge"),
    "gpu_energy_j": _same("hw.energy", "counter"),
    "gpu_temperature_c": _same("hw.temperature", "gauge"),
    "ttft_seconds": _same("gen_ai.server.time_to_first_token", "histogram"),
    # Of each request its mean, as the conventions define it; the gaps themselves are servefit.itl.
    "tpot_seconds": _same("gen_ai.server.time_per_output_token", "histogram"),
    "e2e_seconds": _same("gen_ai.server.request.duration", "histogram"),
}

# Labels of readings and batches as attributes; any other is called servefit.<label>.
ATTRIBUTES: dict[str, dict[Semconv, str]] = {
    label: {"v1.41": name, "latest": name}
    for label, name in {
        "gpu": "hw.id",
        "model": "gen_ai.request.model",
        "engine": "gen_ai.provider.name",
        "address": "server.address",
        "port": "server.port",
    }.items()
}
_IMPLIED = {"gpu": ("hw.type", "gpu")}  # the conventions want it beside every hw.id

_SCHEMA_URL: dict[Semconv, str] = {
    "v1.41": "https://opentelemetry.io/schemas/1.41.0",
    "latest": "",  # the new repository has not published one
}

# What our names end in, and conventions leave out: the unit is said beside the name, and back ends
# that follow Prometheus put it (and _total) at the end again.
_UNIT_ENDINGS = {
    "s": ("_unix_s", "_seconds", "_s"),
    "By": ("_bytes",),
    "1": ("_ratio",),
    "W": ("_w",),
    "J": ("_j",),
    "Cel": ("_c",),
    "Hz": ("_hz",),
}


def otlp_name(canonical: str, semconv: Semconv) -> str:
    """What a series, or a histogram, is called in OTLP.

    A unit stays in the name of ours where two series would have one name without.
    """
    if canonical in CONVENTIONS:
        return CONVENTIONS[canonical].names[semconv]
    short = _without_unit(canonical)
    is_alone = _names_without_unit()[short] == 1
    return f"servefit.{short if is_alone else canonical.removesuffix('_total')}"


def _without_unit(canonical: str) -> str:
    short = canonical.removesuffix("_total")
    for ending in _UNIT_ENDINGS.get(_entry_unit(canonical), ()):
        if short.endswith(ending):
            return short.removesuffix(ending)
    return short


def _entry_unit(canonical: str) -> str:
    entry = CATALOGUE.get(canonical) or CATALOGUE.get(f"{canonical}_sum")
    return entry.unit if entry else ""


@cache
def _names_without_unit() -> Counter[str]:
    """How many series of the catalogue, a histogram being one, have each short name."""
    parts = ((name, histogram_of(name)) for name in CATALOGUE)
    return Counter(map(_without_unit, {part[0] if part else name for name, part in parts}))


def otlp_unit(canonical: str) -> str:
    """The unit as OTLP has it.

    Numbers of things that are no shares go without: back ends that follow Prometheus call a gauge
    of unit 1 `…_ratio`.
    """
    unit = _entry_unit(canonical)
    return "" if unit == "1" and not canonical.endswith("_ratio") else unit


# ----------------------------------------------------------------------------------------- starts


class _Start(msgspec.Struct):
    """Since when one cumulative series counts, and what it said last."""

    start_ns: int
    began_ns: int | None  # what its source said of its own beginning, where it did
    value: float
    at_ns: int


_Key = tuple[str, str, tuple[tuple[str, str], ...]]  # source, canonical name, labels


class Starts:
    """Start times of cumulative series: the same from point to point until the counter is reset.

    A series starts when its server's process did, where the page tells; else when it was first
    seen. When it falls it was reset, some time after it was last seen: that is its new start.
    What cannot be derived anew is in `dump`, so that a restart of the agent looks like nothing; a
    counter that was reset while the agent was down, and has already overtaken what it had been
    when the agent first saw it, cannot be told.
    """

    def __init__(self, dumped: bytes | None = None) -> None:
        self._series: dict[_Key, _Start] = {}
        self._changed = False
        self._at_ns = self._dumped_at_ns = 0  # of the newest point; of the newest at the last dump
        if dumped is not None:
            for source, name, labels, *numbers in _load_starts(dumped):
                self._series[source, name, labels] = _Start(*numbers)

    def of(self, key: _Key, at_ns: int, value: float, began_ns: int | None) -> int:
        """The start of one point's series, never after the point itself; unix ns."""
        if began_ns is not None and began_ns > at_ns:
            began_ns = None  # that machine's clock is ahead of ours
        known = self._series.get(key)
        if known is None:
            start_ns = at_ns if began_ns is None else began_ns
            known = self._series[key] = _Start(start_ns, began_ns, value, at_ns)
            self._changed |= began_ns is None
        elif began_ns is not None and known.began_ns != began_ns:
            known.start_ns, known.began_ns = began_ns, began_ns
            self._changed = True
        elif value < known.value:
            known.start_ns = known.at_ns
            self._changed = True
        known.value, known.at_ns = value, at_ns
        self._at_ns = at_ns
        return min(known.start_ns, at_ns)

    def dump(self) -> bytes | None:
        """What a restart has to know; None where no start changed, an hour long at most."""
        if not self._changed and abs(self._at_ns - self._dumped_at_ns) < _HOUR_NS:
            return None
        self._changed, self._dumped_at_ns = False, self._at_ns
        self._forget()
        return msgspec.msgpack.encode(
            [
                (*key, one.start_ns, one.began_ns, one.value, one.at_ns)
                for key, one in self._series.items()
                if one.start_ns != one.began_ns
            ]
        )

    def _forget(self) -> None:
        """Drops what is gone, so that labels that come and go cost no memory for ever."""
        newest = max((one.at_ns for one in self._series.values()), default=0)
        kept = [item for item in self._series.items() if newest - item[1].at_ns < FORGET_NS]
        self._series = dict(kept[-SERIES_MAX:])


def _load_starts(dumped: bytes) -> list[Any]:
    form = list[tuple[str, str, tuple[tuple[str, str], ...], int, int | None, float, int]]
    try:
        return list(msgspec.msgpack.decode(dumped, type=form))
    except msgspec.MsgspecError as error:
        raise StoreError(f"the outbox's start times cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------- metrics


class Message(msgspec.Struct, frozen=True):
    """One serialised request and how many points, or spans, are in it."""

    body: bytes
    points: int


class _Point(msgspec.Struct, frozen=True):
    """One data point; `buckets` (upper bound → cumulative count) and `sum` of histograms."""

    canonical: str
    key: _Key
    at_ns: int  # unix
    value: float  # of a histogram: how many were observed
    labels: dict[str, str]
    began_ns: int | None = None
    sum: float | None = None
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] | None = None


class MetricsEncoder:
    """Batches of readings → serialised ExportMetricsServiceRequests.

    `resource`: whose readings these are, as attributes (`host.name`, …); service.name and
    service.version are added. `state` is what `take_state` gave before the last restart. Not for
    several threads at once.
    """

    def __init__(
        self,
        resource: Mapping[str, str],
        *,
        semconv: Semconv = "v1.41",
        state: bytes | None = None,
    ) -> None:
        self._resource = dict(resource)
        self._semconv: Semconv = semconv
        self._starts = Starts(state)

    def encode(self, batches: Iterable[Batch], unix_ns: Callable[[int], int]) -> list[Message]:
        """One interval's requests, at most POINTS_MAX points each.

        `unix_ns` turns a reading's monotonic time into wall time. What is not a finite number, or
        not in the catalogue, is left out.
        """
        points = [point for batch in batches for point in _points(batch, unix_ns)]
        return [
            self._message(points[first : first + POINTS_MAX])
            for first in range(0, len(points), POINTS_MAX)
        ]

    def take_state(self) -> bytes | None:
        """For `Outbox.put`, with the first message of the interval; None: nothing new to keep."""
        return self._starts.dump()

    def _message(self, points: Sequence[_Point]) -> Message:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        _fill(resource.resource.attributes, _resource(self._resource))
        scope = resource.scope_metrics.add()
        _name_scope(scope.scope)
        scope.schema_url = _SCHEMA_URL[self._semconv]
        metrics: dict[str, MetricMessage] = {}
        for point in points:
            if point.canonical not in metrics:
                metrics[point.canonical] = self._metric(scope, point)
            self._add(metrics[point.canonical], point)
        return Message(request.SerializeToString(deterministic=True), len(points))

    def _metric(self, scope: ScopeMetrics, point: _Point) -> MetricMessage:
        from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE

        name, form = point.canonical, _form(point)
        metric: MetricMessage = scope.metrics.add(
            name=otlp_name(name, self._semconv), unit=otlp_unit(name), description=help_of(name)
        )
        if form == "histogram":
            metric.histogram.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
        elif form in ("counter", "updown"):
            metric.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
            metric.sum.is_monotonic = form == "counter"
        return metric

    def _add(self, metric: MetricMessage, point: _Point) -> None:
        form = _form(point)
        start_ns = 0  # of what is no count of anything since then: not given
        if form in ("counter", "histogram"):
            start_ns = self._starts.of(point.key, point.at_ns, point.value, point.began_ns)
        times = {"time_unix_nano": point.at_ns, "start_time_unix_nano": start_ns}
        into: Any
        if form == "histogram":
            into = metric.histogram.data_points.add(
                **times,
                count=int(point.value),
                sum=point.sum,
                explicit_bounds=point.bounds,
                bucket_counts=point.counts or (int(point.value),),
            )
        elif form == "gauge":
            into = metric.gauge.data_points.add(**times, as_double=point.value)
        else:
            into = metric.sum.data_points.add(**times, as_double=point.value)
        _fill(into.attributes, self._attributes(point))

    def _attributes(self, point: _Point) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for label, value in point.labels.items():
            names = ATTRIBUTES.get(label)
            found[names[self._semconv] if names else f"servefit.{label}"] = value
            if label in _IMPLIED:
                name, implied = _IMPLIED[label]
                found[name] = implied
        known = CONVENTIONS.get(point.canonical)
        return {**found, **dict(known.attributes)} if known else found


def _form(point: _Point) -> Form:
    if point.counts is not None or point.sum is not None:
        return "histogram"
    known = CONVENTIONS.get(point.canonical)
    return known.form if known else CATALOGUE[point.canonical].kind


def _points(batch: Batch, unix_ns: Callable[[int], int]) -> Iterator[_Point]:
    began_ns = _began_ns(batch)
    parts: dict[tuple[str, tuple[tuple[str, str], ...]], _Parts] = {}
    for reading in batch.readings:
        part = histogram_of(reading.name)
        if part is not None:
            labels = tuple(pair for pair in reading.labels if pair[0] != "le")
            parts.setdefault((part[0], labels), _Parts(reading)).take(part[1], reading)
        elif reading.name in CATALOGUE and math.isfinite(reading.value):
            yield _Point(
                canonical=reading.name,
                key=(batch.source, reading.name, reading.labels),
                at_ns=unix_ns(reading.at_ns),
                value=reading.value,
                labels=labels_of(batch, reading),
                began_ns=began_ns,
            )
    for (base, labels), one in parts.items():
        found = one.whole()
        if found is None:
            continue
        bounds, counts = found
        yield _Point(
            canonical=base,
            key=(batch.source, base, labels),
            at_ns=unix_ns(one.first.at_ns),
            value=float(sum(counts)),
            labels=labels_of(batch, msgspec.structs.replace(one.first, labels=labels)),
            began_ns=began_ns,
            sum=one.sum,
            bounds=bounds,
            counts=counts,
        )


def _began_ns(batch: Batch) -> int | None:
    for reading in batch.readings:
        if reading.name == "server_start_unix_s" and 0 < reading.value < 1e11:
            return int(reading.value * 1e9)
    return None


class _Parts:
    """The readings of one histogram at one instant."""

    def __init__(self, first: Reading) -> None:
        self.first = first
        self.sum: float | None = None
        self._count: float | None = None
        self._buckets: dict[float, float] = {}

    def take(self, part: str, reading: Reading) -> None:
        if not math.isfinite(reading.value):
            return
        if part == "sum":
            self.sum = reading.value
        elif part == "count":
            self._count = reading.value
        elif (bound := _bound(dict(reading.labels).get("le", ""))) is not None:
            self._buckets[bound] = reading.value

    def whole(self) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
        """Upper bounds without the last, infinite one, and how many fell into each bucket.

        A histogram without buckets is one bucket. None where buckets fall as bounds rise: a page
        that was written while it was counted, or is wrong.
        """
        total = self._buckets.get(math.inf, self._count)
        if total is None:
            return None
        bounds = sorted(bound for bound in self._buckets if bound != math.inf)
        cumulative = [*(self._buckets[bound] for bound in bounds), total]
        steps = zip([0.0, *cumulative], cumulative, strict=False)
        counts = tuple(round(after) - round(before) for before, after in steps)
        return (tuple(bounds), counts) if min(counts) >= 0 else None


def _bound(text: str) -> float | None:
    try:
        bound = float(text)
    except ValueError:
        return None
    return None if math.isnan(bound) or bound == -math.inf else bound


# ------------------------------------------------------------------------------------ assessments


def assessment(
    verdict: Verdict,
    *,
    server: str,
    start_unix_ns: int,
    end_unix_ns: int,
    resource: Mapping[str, str],
    ids: random.Random,
    semconv: Semconv = "v1.41",
) -> Message:
    """An assessment as a span of a trace of its own: the verdict in its attributes, each reason,
    with its evidence, an event.

    `server` names the server or service that was judged; the two instants are when the judging
    began and ended. The ids are drawn from `ids` once, here: sent twice it is still one span.
    """
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    request = ExportTraceServiceRequest()
    into = request.resource_spans.add()
    _fill(into.resource.attributes, _resource(resource))
    scope = into.scope_spans.add()
    _name_scope(scope.scope)
    scope.schema_url = _SCHEMA_URL[semconv]
    span = scope.spans.add(
        name="assessment",
        kind=Span.SPAN_KIND_INTERNAL,
        trace_id=ids.getrandbits(128).to_bytes(16),
        span_id=ids.getrandbits(64).to_bytes(8),
        start_time_unix_nano=start_unix_ns,
        end_time_unix_nano=end_unix_ns,
    )
    whole = msgspec.to_builtins(verdict)
    reasons = whole.pop("reasons")
    codes = [reason["code"] for reason in reasons]
    said = {"source": server, **whole, "reason_codes": codes}
    _fill(span.attributes, dict(_flat("servefit", said)))
    for reason in reasons:
        event = span.events.add(name="servefit.reason", time_unix_nano=end_unix_ns)
        _fill(event.attributes, dict(_flat("servefit.reason", reason)))
    return Message(request.SerializeToString(deterministic=True), 1)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested data as attributes with dots; what was not measured is left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}", inner)
    elif isinstance(value, list | tuple):
        if all(isinstance(one, str) for one in value):
            if value:
                yield prefix, list(value)
        else:
            yield prefix, json.dumps(value)
    elif value is not None and not (isinstance(value, float) and not math.isfinite(value)):
        yield prefix, value


# --------------------------------------------------------------------------------------- protobuf


def _resource(given: Mapping[str, str]) -> dict[str, Value]:
    from agent import __version__

    return {"service.name": "servefit", "service.version": __version__, **given}


def _name_scope(scope: Any) -> None:
    from agent import __version__

    scope.name, scope.version = "servefit", __version__


def _fill(attributes: Any, values: Mapping[str, Any]) -> None:
    """Adds attributes, sorted: the same attributes are the same bytes."""
    for name in sorted(values):
        value = values[name]
        into = attributes.add(key=encodable(name)).value
        if isinstance(value, bool):
            into.bool_value = value
        elif isinstance(value, int) and abs(value) < 2**63:
            into.int_value = value
        elif isinstance(value, int | float):
            into.double_value = float(value)
        elif isinstance(value, list):
            for one in value:
                into.array_value.values.add(string_value=encodable(one))
        else:
            into.string_value = encodable(str(value))
