"""The inference server's own request spans: taken on loopback, learned from, and passed on.

A metrics page tells means and buckets; a span tells when one request arrived, how long its prompt
and reply were, and where its time went. vLLM and SGLang send them by OTLP. Only OTLP over HTTP with
protobuf is taken, so the server needs OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf beside
`--otlp-traces-endpoint http://127.0.0.1:4319/v1/traces`.

A span is acknowledged when it lies in the outbox, so that the chain from server to back end has no
gap. To each request its share of the GPUs' energy is added; nothing else about a span is changed.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from agent.config import host_port, is_loopback
from agent.model import Served, UsageError

if TYPE_CHECKING:
    from aiohttp import web
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

BODY_BYTES_MAX = 4 * 1024 * 1024  # of a request, as sent and as decompressed; a span has 1 kB
TIMEOUT_S = 10.0  # to take one request, body and outbox included
AT_ONCE_MAX = 4
RETRY_AFTER_S = 5
LATELY_MAX = 10_000  # requests that are known again when they come a second time
ENERGY_ATTRIBUTE = "servefit.energy_j"

# ------------------------------------------------------------------------------------------ spans


# What vLLM 0.32, SGLang 0.5 and TensorRT-LLM call it (vllm/tracing/utils.py, class SpanAttributes,
# which the others took over), and the conventions' names behind.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "model": ("gen_ai.response.model", "gen_ai.request.model"),
    "prompt_tokens": ("gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens"),
    "output_tokens": ("gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens"),
    "queue_s": ("gen_ai.latency.time_in_queue",),
    "prefill_s": ("gen_ai.latency.time_in_model_prefill",),
    "decode_s": ("gen_ai.latency.time_in_model_decode",),
    "ttft_s": ("gen_ai.latency.time_to_first_token",),
}
_TYPES: dict[str, type] = {
    "model": str,
    "prompt_tokens": int,
    "output_tokens": int,
    **dict.fromkeys(("queue_s", "prefill_s", "decode_s", "ttft_s"), float),
}


def served(span: Any) -> Served | None:
    """The request that a span is of; None where it is of something else.

    A request's span is told by its output tokens. A client's span of the same request, which may
    come from beside the server, is not the server's word and left alone.
    """
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    known = {
        a.key: getattr(a.value, a.value.WhichOneof("value") or "", None) for a in span.attributes
    }
    values = {name: _first(known, name) for name in _ATTRIBUTES}
    if values["output_tokens"] is None or span.kind == Span.SPAN_KIND_CLIENT:
        return None
    if not 0 < span.start_time_unix_nano <= span.end_time_unix_nano:
        return None
    return Served(
        trace_id=span.trace_id,
        span_id=span.span_id,
        arrived_unix_ns=span.start_time_unix_nano,
        ended_unix_ns=span.end_time_unix_nano,
        **values,
    )


def _first(known: Mapping[str, Any], name: str) -> Any:
    """The first of an attribute's names that is there and makes sense."""
    type_ = _TYPES[name]
    for spelling in _ATTRIBUTES[name]:
        value = known.get(spelling)
        if type_ is str:
            if isinstance(value, str):
                return value
        elif isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            return type_(value)
    return None


# ----------------------------------------------------------------------------------------- energy


class EnergyShare:
    """What a request's share of its GPUs' energy was: energy over time, split among those running.

    An estimate: every request that runs at an instant gets the same part of that instant, whatever
    its length, and an idle GPU's energy belongs to nobody. `keep_s` is how far back requests can
    reach.
    """

    def __init__(self, keep_s: float = 3600.0) -> None:
        self._keep_ns = int(keep_s * 1e9)
        # (unix ns, J of one running request since the beginning), and the last raw reading
        self._points: deque[tuple[int, float]] = deque()
        self._last: tuple[float, float] | None = None

    def add(self, at_unix_ns: int, energy_j: float, running: float) -> None:
        """One reading: the GPUs' energy counters summed, and how many requests run.

        A counter that falls, or a clock set back, begins anew: shares do not reach across it.
        """
        if self._last is None or energy_j < self._last[0] or at_unix_ns <= self._points[-1][0]:
            self._points.clear()
            self._points.append((at_unix_ns, 0.0))
        else:
            before_j, before_running = self._last
            # Mean of the two ends; less than one request at a time is one, some of the time.
            sharing = max(1.0, (before_running + running) / 2)
            share_j = self._points[-1][1] + (energy_j - before_j) / sharing
            self._points.append((at_unix_ns, share_j))
        self._last = (energy_j, running)
        while self._points[-1][0] - self._points[0][0] > self._keep_ns:
            self._points.popleft()

    def of(self, start_unix_ns: int, end_unix_ns: int) -> float | None:
        """J of one request between two instants; None where readings do not cover it all."""
        points = self._points
        if not points or start_unix_ns < points[0][0] or end_unix_ns > points[-1][0]:
            return None
        return self._until(end_unix_ns) - self._until(start_unix_ns)

    def _until(self, at_unix_ns: int) -> float:
        after = bisect.bisect_left(self._points, at_unix_ns, key=lambda point: point[0])
        after_ns, after_j = self._points[after]
        if after_ns == at_unix_ns:
            return after_j
        before_ns, before_j = self._points[after - 1]
        part = (at_unix_ns - before_ns) / (after_ns - before_ns)
        return before_j + part * (after_j - before_j)


# --------------------------------------------------------------------------------------- receiver


class ReceiverStatus(msgspec.Struct, frozen=True):
    """Since the agent began."""

    spans: int  # of exports that were taken
    requests: int  # spans that were requests, each once
    refused: int  # exports that were turned away, each with its HTTP status
    last_error: str | None


class _Refusal(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Receiver:
    """Takes `POST /v1/traces`.

    `learn` is given the requests of each export, with the resource attributes of who sent them.
    `energy` says what one request's share between two unix instants was, for a resource; `keep`
    puts a message and its number of spans into the outbox and says whether it is there. Either may
    be None. An export is taken whole or not at all.
    """

    def __init__(
        self,
        learn: Callable[[Mapping[str, str], Sequence[Served]], None],
        *,
        energy: Callable[[Mapping[str, str], int, int], float | None] | None = None,
        keep: Callable[[bytes, int], Awaitable[bool]] | None = None,
    ) -> None:
        self._learn = learn
        self._energy = energy
        self._keep = keep
        self._free = asyncio.Semaphore(AT_ONCE_MAX)
        self._runner: web.AppRunner | None = None
        self._spans = self._requests = self._refused = 0
        self._last_error: str | None = None
        self._lately: dict[tuple[bytes, bytes], None] = {}

    async def start(self, listen: str) -> str:
        """Listens on `host:port`, port 0 for any; gives its URL.

        Raises UsageError where that is no loopback address, or taken.
        """
        from aiohttp import web

        host, port = loopback(listen)
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_post("/v1/traces", self._post)
        # Decompression is ours, under our own bound.
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=1.0, auto_decompress=False
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.close()
            why = error.strerror or str(error)
            raise UsageError(f"[receive.otlp] listen {listen}: {why}: give another port") from error
        port = self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        """May be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def status(self) -> ReceiverStatus:
        return ReceiverStatus(self._spans, self._requests, self._refused, self._last_error)

    async def _post(self, request: web.Request) -> web.Response:
        from aiohttp import web
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceResponse,
        )

        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with self._free:
                    await self._take(await _body(request))
        except _Refusal as refusal:
            return self._refuse(refusal.status, str(refusal))
        except TimeoutError:
            return self._refuse(503, f"not taken within {TIMEOUT_S:g} s")
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )

    def _refuse(self, status: int, why: str) -> web.Response:
        from aiohttp import web

        self._refused += 1
        self._last_error = f"receive.otlp: HTTP {status}: {why}"
        again = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return web.Response(status=status, text=why, headers=again)

    async def _take(self, body: bytes) -> None:
        """Enriches, keeps, and only then learns: what is refused comes again."""
        message = _parsed(body)
        found = list(self._enriched(message))
        spans = sum(len(s.spans) for r in message.resource_spans for s in r.scope_spans)
        keep = self._keep
        if keep is not None and spans and not await keep(message.SerializeToString(), spans):
            raise _Refusal(503, "the outbox could not keep it")
        for resource, requests in found:
            news = [one for one in requests if self._is_news(one)]
            if news:
                self._learn(resource, news)
            self._requests += len(news)
        self._spans += spans

    def _is_news(self, one: Served) -> bool:
        """OTLP delivers at least once; what came lately comes to nobody's count again."""
        key = (one.trace_id, one.span_id)
        if key in self._lately:
            return False
        self._lately[key] = None
        if len(self._lately) > LATELY_MAX:
            del self._lately[next(iter(self._lately))]
        return True

    def _enriched(
        self, message: ExportTraceServiceRequest
    ) -> Iterator[tuple[dict[str, str], list[Served]]]:
        """The requests of each resource; their energy is written into the message too."""
        for resource in message.resource_spans:
            who = {a.key: a.value.string_value for a in resource.resource.attributes}
            requests = []
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                one = served(span)
                if one is None:
                    continue
                joules = (
                    self._energy(who, one.arrived_unix_ns, one.ended_unix_ns)
                    if self._energy is not None
                    else None
                )
                if joules is not None:
                    span.attributes.add(key=ENERGY_ATTRIBUTE).value.double_value = joules
                    one = msgspec.structs.replace(one, energy_j=joules)
                requests.append(one)
            if requests:
                yield who, requests


async def _body(request: web.Request) -> bytes:
    """The body, decompressed; raises _Refusal."""
    from aiohttp import web

    if not _is_for_us(request.host):  # a page in a browser that thinks we are somebody else
        raise _Refusal(403, "ask for it by a loopback address")
    if request.content_type != "application/x-protobuf":
        raise _Refusal(415, "OTLP over HTTP with protobuf is taken, nothing else")
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _Refusal(413, f"more than {BODY_BYTES_MAX} bytes") from None
    except (web.RequestPayloadError, OSError) as error:
        raise _Refusal(400, f"the body is broken: {type(error).__name__}") from None
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "gzip":
        return _inflated(body)
    if encoding != "identity":
        raise _Refusal(415, "gzip or no compression, nothing else")
    return body


def _inflated(body: bytes) -> bytes:
    """What gzip holds, and no more than we take: a bomb is not unpacked."""
    inflate = zlib.decompressobj(31)  # zlib's number for gzip
    try:
        whole = inflate.decompress(body, BODY_BYTES_MAX + 1)
    except zlib.error:
        raise _Refusal(400, "the body is no gzip") from None
    if len(whole) > BODY_BYTES_MAX:
        raise _Refusal(413, f"more than {BODY_BYTES_MAX} bytes")
    if not inflate.eof:
        raise _Refusal(400, "the body is cut short")
    return whole


def _parsed(body: bytes) -> ExportTraceServiceRequest:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    message = ExportTraceServiceRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise _Refusal(400, "not an ExportTraceServiceRequest") from None
    return message


def loopback(listen: str) -> tuple[str, int]:
    """Host and port of `host:port`; spans carry no credentials, so only loopback is listened on.

    Raises UsageError.
    """
    try:
        host, port = host_port(listen)
    except ValueError:
        raise UsageError(f"[receive.otlp] listen {listen!r}: write it as 127.0.0.1:4319") from None
    if not is_loopback(host) or port > 65535:
        raise UsageError(f"[receive.otlp] listen {listen!r}: only a loopback address, as 127.0.0.1")
    return host, port


def _is_for_us(host: str) -> bool:
    """Whether a Host header names this machine's loopback, with a port or without."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name.lower())
