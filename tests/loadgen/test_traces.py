"""Traces: the spans themselves, a back end that misbehaves, and a real one that counts them."""

from __future__ import annotations

import gzip
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from agent.model import UsageError
from loadgen.traces import (
    BATCH_SPANS,
    FIRST_TOKEN_EVENT,
    LevelSpan,
    RequestSpan,
    TraceSink,
    export_level,
    traces_url,
)
from tests.conftest import Phoenix

START_NS = 1_800_000_000_000_000_000
MS = 1_000_000


def a_level(seed: int = 1, **changes: Any) -> LevelSpan:
    ids = random.Random(seed)
    fields: dict[str, Any] = {
        "name": "level concurrency=4",
        "trace_id": ids.getrandbits(128),
        "span_id": ids.getrandbits(64),
        "start_unix_ns": START_NS,
        "end_unix_ns": START_NS + 9_000 * MS,
        "model": "tiny",
        "provider": "vllm",
        "server_address": "127.0.0.1",
        "server_port": 8000,
        "attributes": {"servefit.level.concurrency": 4},
    }
    return LevelSpan(**{**fields, **changes})


def some_rows(n: int, seed: int = 2) -> list[RequestSpan]:
    """Every tenth one timed out before its first token."""
    ids = random.Random(seed)
    rows = []
    for i in range(n):
        begin = START_NS + i * MS
        is_lost = i % 10 == 9
        rows.append(
            RequestSpan(
                span_id=ids.getrandbits(64),
                start_unix_ns=begin,
                first_token_unix_ns=None if is_lost else begin + 50 * MS,
                end_unix_ns=begin + 300 * MS,
                status="timeout" if is_lost else "ok",
                input_tokens=None if is_lost else 100,
                output_tokens=None if is_lost else 20 + i,
            )
        )
    return rows


# ----------------------------------------------------------------------- a back end of our own

Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {}, ExportTraceServiceResponse().SerializeToString())


class Receiver:
    """Takes OTLP over HTTP on 127.0.0.1; `answer` decides what the n-th request is told."""

    def __init__(self, answer: Callable[[int], Answer]) -> None:
        self.answer = answer
        self.taken: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.taken
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resource(self) -> dict[str, str]:
        attributes = self.taken[0].resource_spans[0].resource.attributes
        return {a.key: a.value.string_value for a in attributes}


@contextmanager
def receiving(answer: Callable[[int], Answer] = lambda n: OK) -> Iterator[Receiver]:
    receiver = Receiver(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            status, headers, reply = receiver.answer(len(receiver.headers))
            receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
            if status == 200:
                receiver.taken.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(reply))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(url: str, n: int, **options: Any) -> TraceSink:
    sink = TraceSink(url, **options)
    export_level(sink, a_level(), some_rows(n))
    return sink


@pytest.fixture(autouse=True)
def _no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


# ------------------------------------------------------------------------------------- the spans


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_carries_the_ids_that_went_out_and_says_what_was_measured() -> None:
    level, rows = a_level(), some_rows(10)
    with receiving() as receiver:
        assert send(receiver.url, 10).close().line() == "traces: 11 spans delivered"
    first = receiver.spans()[1]
    assert int.from_bytes(first.trace_id) == level.trace_id
    assert int.from_bytes(first.span_id) == rows[0].span_id
    assert int.from_bytes(first.parent_span_id) == level.span_id
    assert (first.name, first.kind, first.status.code) == ("chat tiny", 3, 0)
    assert first.start_time_unix_nano == rows[0].start_unix_ns
    assert first.end_time_unix_nano == rows[0].end_unix_ns
    assert attributes(first) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.response.time_to_first_chunk": 0.05,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 20,
        "server.address": "127.0.0.1",
        "server.port": 8000,
    }
    [event] = first.events
    assert event.name == FIRST_TOKEN_EVENT
    assert event.time_unix_nano == rows[0].first_token_unix_ns


def test_a_failed_request_says_how() -> None:
    with receiving() as receiver:
        send(receiver.url, 10).close()
    lost = receiver.spans()[10]
    assert (lost.status.code, lost.status.message) == (2, "timeout")
    assert attributes(lost)["error.type"] == "timeout"
    assert "gen_ai.usage.output_tokens" not in attributes(lost)
    assert not lost.events


def test_the_level_is_the_root_and_no_call_of_the_model() -> None:
    with receiving() as receiver:
        send(receiver.url, 1).close()
    root = receiver.spans()[0]
    assert (root.name, root.kind, root.parent_span_id) == ("level concurrency=4", 1, b"")
    assert int.from_bytes(root.span_id) == a_level().span_id
    assert attributes(root) == {
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "servefit.model": "tiny",
        "servefit.level.concurrency": 4,
    }


@pytest.mark.parametrize("semconv", ["v1.41", "latest"])
def test_both_spellings_can_be_asked_for(semconv: str) -> None:
    with receiving() as receiver:
        send(receiver.url, 1, semconv=semconv).close()
    scope = receiver.taken[0].resource_spans[0].scope_spans[0]
    assert scope.schema_url == ("https://opentelemetry.io/schemas/1.41.0" * (semconv == "v1.41"))
    assert attributes(scope.spans[1])["gen_ai.usage.output_tokens"] == 20


# -------------------------------------------------------------------------------------- delivery


def test_batches_are_bounded() -> None:
    with receiving() as receiver:
        send(receiver.url, 1200).close()
    sizes = [len(t.resource_spans[0].scope_spans[0].spans) for t in receiver.taken]
    assert sizes == [BATCH_SPANS, BATCH_SPANS, 1201 - 2 * BATCH_SPANS]


def test_otel_variables_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "nightly")
    with receiving() as receiver:
        send(receiver.url, 1, headers={"X-Other": "1"}, resource={"servefit.run.id": "r1"}).close()
    headers, resource = receiver.headers[0], receiver.resource()
    assert (headers["x-key"], headers["x-other"]) == ("secret", "1")
    assert headers["content-encoding"] == "gzip"
    assert resource["service.name"] == "nightly"
    assert resource["deployment.environment.name"] == "lab"
    assert resource["servefit.run.id"] == "r1"


def test_the_service_is_servefit_where_nobody_says_otherwise() -> None:
    with receiving() as receiver:
        send(receiver.url, 1).close()
    assert receiver.resource()["service.name"] == "servefit"


def test_a_failure_that_passes_loses_nothing() -> None:
    def answer(n: int) -> Answer:
        return (503, {"retry-after": "0"}, b"") if n < 3 else OK

    with receiving(answer) as receiver:
        delivery = send(receiver.url, 600).close()
    assert (delivery.delivered, delivery.dropped) == (601, 0)
    assert len({span.span_id for span in receiver.spans()}) == 601


def test_what_is_not_sent_between_levels_waits_for_the_next_time() -> None:
    is_up = threading.Event()

    def answer(n: int) -> Answer:
        return OK if is_up.is_set() else (503, {"retry-after": "1"}, b"")

    with receiving(answer) as receiver:
        sink = send(receiver.url, 5)
        assert sink.flush(0.3).waiting == 6
        is_up.set()
        export_level(sink, a_level(seed=7), some_rows(5, seed=8))
        assert sink.close().delivered == 12
    assert len(receiver.spans()) == 12


def test_a_refusal_is_final_and_named() -> None:
    with receiving(lambda n: (401, {}, b"")) as receiver:
        delivery = send(receiver.url, 600).close()
    assert delivery.line() == (
        f"traces: 0 spans delivered, 601 dropped ({receiver.url}/v1/traces answered 401)"
    )
    assert len(receiver.headers) == 2  # one try for each batch


def test_a_partial_success_is_counted() -> None:
    partial = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=3, error_message="too old")
    )
    with receiving(lambda n: (200, {}, partial.SerializeToString())) as receiver:
        delivery = send(receiver.url, 9).close()
    assert (delivery.delivered, delivery.dropped) == (7, 3)
    assert "rejected some: too old" in delivery.line()


def test_a_back_end_that_is_not_there_costs_a_bounded_time(
    capfd: pytest.CaptureFixture[str],
) -> None:
    begin = time.monotonic()
    delivery = send("http://127.0.0.1:1", 5).close(1.0)
    assert time.monotonic() - begin < 4
    assert (delivery.delivered, delivery.dropped) == (0, 6)
    assert "127.0.0.1:1/v1/traces does not answer" in delivery.line()
    assert capfd.readouterr() == ("", "")  # the library's own log lines stay out of the report


def test_a_back_end_that_stalls_costs_a_bounded_time() -> None:
    over = threading.Event()

    def stall(n: int) -> Answer:
        over.wait(20)
        return OK

    with receiving(stall) as receiver:
        begin = time.monotonic()
        delivery = send(receiver.url, 5).close(0.5)
        assert time.monotonic() - begin < 4
        over.set()
    assert delivery.dropped == 6


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/api/otel", "https://h/api/otel/v1/traces"),
        ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
    ],
)
def test_the_endpoint_is_a_base_address_or_the_whole_one(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["", "h:4318", "grpc://h:4317", "http://", "http://h:x"])
def test_what_is_no_address_is_wrong_usage(endpoint: str) -> None:
    with pytest.raises(UsageError, match="--otlp-endpoint"):
        TraceSink(endpoint)


# -------------------------------------------------------------------------------- a real back end


@pytest.mark.timeout(300)
def test_phoenix_holds_every_span_under_its_own_id(phoenix: Phoenix) -> None:
    level, rows = a_level(seed=random.getrandbits(32)), some_rows(700, seed=random.getrandbits(32))
    sink = TraceSink(phoenix.otlp_endpoint)
    export_level(sink, level, rows)
    assert sink.close().delivered == 701
    found = phoenix.wait_for_spans(level.trace_id, 701)
    assert len(found) == 701
    requests = {
        int(span["context"]["span_id"], 16): span
        for span in found
        if span["parent_id"] == f"{level.span_id:016x}"
    }
    assert set(requests) == {row.span_id for row in rows}
    for row in rows:
        stored = requests[row.span_id]
        assert stored["attributes"].get("gen_ai.usage.output_tokens") == row.output_tokens
        assert stored["attributes"].get("error.type") == (
            None if row.status == "ok" else row.status
        )
        assert stored["name"] == "chat tiny"
