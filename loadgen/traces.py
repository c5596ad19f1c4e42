"""`--otlp-endpoint`: one trace per level, with a client span per request.

The spans are made after their level, from what was recorded, so that tracing costs the
measurement nothing. Their ids were chosen before, because they went out on the wire in
`traceparent`: a server that traces too hangs its own spans under ours.

Nothing here raises into a measurement: what could not be delivered is counted, and the reason kept.
Neither prompts nor replies are in a span. OpenTelemetry is imported where it is used; that costs
half a second.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec

from agent.model import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

Semconv = Literal["v1.41", "latest"]
Value = str | bool | int | float

BATCH_SPANS = 512
FLUSH_BUDGET_S = 5.0
CLOSE_BUDGET_S = 30.0
_BACKOFF_S = (0.5, 8.0)  # first and longest pause after a failure that may pass
_MAY_PASS = {408, 429, 500, 502, 503, 504}  # HTTP answers after which another try makes sense

# What we say, under the name each version of the conventions has for it. The conventions for
# generative AI moved to their own repository after 1.41; that one's metrics and cache attributes
# were renamed, these were not. A name that changes changes here and nowhere else.
_NAMES: dict[str, dict[Semconv, str]] = {
    "operation": {"v1.41": "gen_ai.operation.name", "latest": "gen_ai.operation.name"},
    "provider": {"v1.41": "gen_ai.provider.name", "latest": "gen_ai.provider.name"},
    "model": {"v1.41": "gen_ai.request.model", "latest": "gen_ai.request.model"},
    "stream": {"v1.41": "gen_ai.request.stream", "latest": "gen_ai.request.stream"},
    "first_chunk": {
        "v1.41": "gen_ai.response.time_to_first_chunk",
        "latest": "gen_ai.response.time_to_first_chunk",
    },
    "input_tokens": {"v1.41": "gen_ai.usage.input_tokens", "latest": "gen_ai.usage.input_tokens"},
    "output_tokens": {
        "v1.41": "gen_ai.usage.output_tokens",
        "latest": "gen_ai.usage.output_tokens",
    },
    "address": {"v1.41": "server.address", "latest": "server.address"},
    "port": {"v1.41": "server.port", "latest": "server.port"},
    "error": {"v1.41": "error.type", "latest": "error.type"},
}
_SCHEMA_URL: dict[Semconv, str | None] = {
    "v1.41": "https://opentelemetry.io/schemas/1.41.0",
    "latest": None,  # the new repository has not published one
}
FIRST_TOKEN_EVENT = "servefit.first_token"  # no convention names one


class LevelSpan(msgspec.Struct, frozen=True, kw_only=True):
    """One level as a span, and what all its requests have in common."""

    name: str  # e.g. "level concurrency=16"
    trace_id: int  # 128 bits, as in `traceparent`
    span_id: int  # 64 bits; the parent of every request's span
    start_unix_ns: int
    end_unix_ns: int
    model: str
    operation: str = "chat"  # chat, text_completion, embeddings
    provider: str = "openai"  # the dialect spoken, or the engine where it is known: vllm, sglang
    server_address: str | None = None
    server_port: int | None = None
    stream: bool = True
    attributes: Mapping[str, Value] = {}  # of the level itself, under servefit.*


class RequestSpan(msgspec.Struct, frozen=True, gc=False):
    """One request, as it was recorded; instants in ns since 1970."""

    span_id: int
    start_unix_ns: int
    first_token_unix_ns: int | None
    end_unix_ns: int
    status: str  # "ok" or the kind of its error: timeout, reset, http_429, …
    input_tokens: int | None
    output_tokens: int | None


class Delivery(msgspec.Struct, frozen=True):
    """What became of the spans so far, levels and requests together."""

    delivered: int
    dropped: int
    waiting: int
    why: str | None  # the last reason for a failure, where there was one

    def line(self) -> str:
        """One line for the user."""
        text = f"traces: {self.delivered} spans delivered"
        if self.waiting:
            text += f", {self.waiting} waiting"
        if self.dropped:
            text += f", {self.dropped} dropped"
        if self.why and (self.waiting or self.dropped):
            text += f" ({self.why})"
        return text


def traces_url(endpoint: str, option: str = "--otlp-endpoint") -> str:
    """The address that takes traces: `endpoint` is a base URL as OTEL_EXPORTER_OTLP_ENDPOINT is.

    Raises UsageError where it is not an http or https URL.
    """
    try:
        parts = urlsplit(endpoint)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"{option} {endpoint}: give a URL like http://127.0.0.1:4318")
    base = endpoint.rstrip("/")
    return base if parts.path.rstrip("/").endswith("/v1/traces") else f"{base}/v1/traces"


# ----------------------------------------------------------------------------------------- spans


class _Spans:
    """Makes OpenTelemetry's spans of ours, with the ids that were given out beforehand."""

    def __init__(self, resource: Mapping[str, str], semconv: Semconv, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._names = {key: names[semconv] for key, names in _NAMES.items()}
        # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME win: the user wrote them for this run.
        given = {"service.name": "servefit", "service.version": version, **resource}
        from_environment = Resource.create().attributes
        named = from_environment.get("service.name", "unknown_service")
        if str(named).startswith("unknown_service"):
            from_environment = {k: v for k, v in from_environment.items() if k != "service.name"}
        self._resource: Resource = Resource({**given, **from_environment})
        self._scope: InstrumentationScope = InstrumentationScope(
            "servefit", version, _SCHEMA_URL[semconv]
        )

    def level(self, level: LevelSpan) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind

        return ReadableSpan(
            level.name,
            context=_context(level.trace_id, level.span_id),
            resource=self._resource,
            attributes=self._of_level(level),
            kind=SpanKind.INTERNAL,
            start_time=level.start_unix_ns,
            end_time=level.end_unix_ns,
            instrumentation_scope=self._scope,
        )

    def request(self, level: LevelSpan, row: RequestSpan) -> ReadableSpan:
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        is_ok = row.status == "ok"
        first = row.first_token_unix_ns
        return ReadableSpan(
            f"{level.operation} {level.model}",
            context=_context(level.trace_id, row.span_id),
            parent=_context(level.trace_id, level.span_id),
            resource=self._resource,
            attributes=self._of_request(level, row),
            events=() if first is None else (Event(FIRST_TOKEN_EVENT, timestamp=first),),
            kind=SpanKind.CLIENT,
            # Left unset where all went well, as the conventions want it of instrumentations.
            status=Status() if is_ok else Status(StatusCode.ERROR, row.status),
            start_time=row.start_unix_ns,
            end_time=row.end_unix_ns,
            instrumentation_scope=self._scope,
        )

    def _of_level(self, level: LevelSpan) -> dict[str, Value]:
        """Nothing of gen_ai: a back end would take the level for one more call of the model."""
        values = {"address": level.server_address, "port": level.server_port}
        place = {self._names[key]: value for key, value in values.items() if value is not None}
        return {**place, "servefit.model": level.model, **level.attributes}

    def _common(self, level: LevelSpan) -> dict[str, Value]:
        values: dict[str, Value | None] = {
            "operation": level.operation,
            "provider": level.provider,
            "model": level.model,
            "address": level.server_address,
            "port": level.server_port,
        }
        return {self._names[key]: value for key, value in values.items() if value is not None}

    def _of_request(self, level: LevelSpan, row: RequestSpan) -> dict[str, Value]:
        first = row.first_token_unix_ns
        values: dict[str, Value | None] = {
            "stream": level.stream or None,  # unset means not streamed
            "first_chunk": None if first is None else (first - row.start_unix_ns) / 1e9,
            "input_tokens": row.input_tokens,
            "output_tokens": row.output_tokens,
            "error": None if row.status == "ok" else row.status,
        }
        own = {self._names[key]: value for key, value in values.items() if value is not None}
        return {**self._common(level), **own}


def _context(trace_id: int, span_id: int) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(1))


# -------------------------------------------------------------------------------------- delivery


class _Answer(msgspec.Struct, frozen=True):
    """How the back end took one batch."""

    taken: bool
    rejected: int = 0  # spans of a batch that was taken, but not whole
    may_pass: bool = True
    why: str | None = None


class _Exporter:
    """OpenTelemetry's exporter, and the reason why it failed, which it only logs."""

    def __init__(self, url: str, headers: Mapping[str, str] | None) -> None:
        import logging

        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self._url = url
        self._status: int | None = None
        self._rejected = 0
        self._rejected_why = ""
        session = requests.Session()
        session.hooks["response"].append(self._look_at)
        self._exporter: SpanExporter = OTLPSpanExporter(
            endpoint=url, headers=dict(headers) if headers else None, session=session
        )
        # Its log lines would land in the middle of the progress display; we say it in one line.
        logging.getLogger("opentelemetry.exporter.otlp").addHandler(logging.NullHandler())
        logging.getLogger("opentelemetry.exporter.otlp").propagate = False

    def _look_at(self, response: Any, *args: Any, **kwargs: Any) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceResponse,
        )

        self._status = int(response.status_code)
        if self._status != 200 or not response.content:
            return
        try:
            answer = ExportTraceServiceResponse.FromString(response.content)
        except Exception:  # not protobuf: the standard allows JSON, which we did not ask for
            return
        self._rejected = int(answer.partial_success.rejected_spans)
        self._rejected_why = str(answer.partial_success.error_message)

    def send(self, spans: list[ReadableSpan]) -> _Answer:
        """Blocks for as long as the exporter retries: its own time-out, 10 s by default."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._status, self._rejected, self._rejected_why = None, 0, ""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            why = f"{self._url} rejected some: {self._rejected_why}" if self._rejected else None
            return _Answer(taken=True, rejected=self._rejected, why=why)
        if self._status is None:
            return _Answer(taken=False, why=f"{self._url} does not answer")
        return _Answer(
            taken=False,
            may_pass=self._status in _MAY_PASS,
            why=f"{self._url} answered {self._status}",
        )

    def stop(self) -> None:
        """Ends a retry that is waiting."""
        self._exporter.shutdown()


class TraceSink:
    """Keeps the spans of finished levels and delivers them when told to, on a thread of its own.

    `level`, `requests` and `export_level` only remember. `flush` and `close` send, for a bounded
    time: call `flush` between levels, never during one, and `close` at the end.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        headers: Mapping[str, str] | None = None,
        resource: Mapping[str, str] | None = None,
        semconv: Semconv = "v1.41",
    ) -> None:
        """`headers` go out with every batch, beside OTEL_EXPORTER_OTLP_HEADERS.

        Raises UsageError where the endpoint is no URL or an OTEL_* variable cannot be meant.
        """
        from agent import __version__

        self._url = traces_url(endpoint)
        try:
            self._exporter = _Exporter(self._url, headers)
            self._spans = _Spans(resource or {}, semconv, __version__)
        except (ValueError, OSError) as error:
            raise UsageError(f"--otlp-endpoint: an OTEL_* variable is wrong: {error}") from error
        self._pending: deque[tuple[LevelSpan, RequestSpan | None]] = deque()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self._deadline = 0.0
        self._delivered = 0
        self._dropped = 0
        self._why: str | None = None

    def level(self, level: LevelSpan) -> None:
        """Remembers the level's own span."""
        with self._lock:
            self._pending.append((level, None))

    def requests(self, level: LevelSpan, rows: Iterable[RequestSpan]) -> None:
        """Remembers the spans of the level's requests."""
        with self._lock:
            self._pending.extend((level, row) for row in rows)

    def flush(self, budget_s: float = FLUSH_BUDGET_S) -> Delivery:
        """Sends what it can within `budget_s`; the rest waits for the next call. Never raises."""
        self._deadline = time.monotonic() + budget_s
        if self._pending and (self._worker is None or not self._worker.is_alive()):
            self._worker = threading.Thread(target=self._run, name="traces", daemon=True)
            self._worker.start()
        if self._worker is not None:
            self._worker.join(timeout=budget_s)
        return self.delivery()

    def close(self, budget_s: float = CLOSE_BUDGET_S) -> Delivery:
        """The last flush: what is not delivered within `budget_s` is dropped. Never raises.

        A back end that never took anything is not waited for as long as one that fell ill.
        """
        self.flush(budget_s if self.delivery().delivered else min(budget_s, FLUSH_BUDGET_S))
        self._stop.set()
        self._exporter.stop()
        if self._worker is not None:
            self._worker.join(timeout=1.0)
        with self._lock:
            self._dropped += len(self._pending)
            self._pending.clear()
        return self.delivery()

    def delivery(self) -> Delivery:
        """How it stands."""
        with self._lock:
            return Delivery(self._delivered, self._dropped, len(self._pending), self._why)

    def _run(self) -> None:
        """The thread: batch after batch, pausing longer after each failure that may pass."""
        pause_s, longest_s = _BACKOFF_S
        while not self._stop.is_set() and time.monotonic() < self._deadline:
            with self._lock:
                batch = list(islice(self._pending, BATCH_SPANS))
            if not batch:
                return
            if self._settle(batch, self._send(batch)):
                pause_s = _BACKOFF_S[0]
                continue
            self._stop.wait(min(pause_s, max(0.0, self._deadline - time.monotonic())))
            pause_s = min(2 * pause_s, longest_s)

    def _send(self, batch: list[tuple[LevelSpan, RequestSpan | None]]) -> _Answer:
        try:
            return self._exporter.send(
                [
                    self._spans.level(level) if row is None else self._spans.request(level, row)
                    for level, row in batch
                ]
            )
        except Exception as error:  # whatever a back end or a library does, a sweep goes on
            return _Answer(taken=False, may_pass=False, why=f"{type(error).__name__}: {error}")

    def _settle(self, batch: list[tuple[LevelSpan, RequestSpan | None]], answer: _Answer) -> bool:
        """Books the answer; False where the batch stays and is tried again."""
        with self._lock:
            self._why = answer.why or self._why
            if not answer.taken and answer.may_pass:
                return False
            lost = min(answer.rejected, len(batch)) if answer.taken else len(batch)
            for _ in range(min(len(batch), len(self._pending))):
                self._pending.popleft()
            self._delivered += len(batch) - lost
            self._dropped += lost
            return True


def export_level(sink: TraceSink, level: LevelSpan, rows: Iterable[RequestSpan]) -> None:
    """Hands a finished level to the sink: its span, then a span for each of its requests."""
    sink.level(level)
    sink.requests(level, rows)
