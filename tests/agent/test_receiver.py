"""The inference server's own spans: what is learned from them, and what is not believed."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.exporters.outbox import Outbox
from agent.exporters.sender import Sender
from agent.model import UsageError
from agent.receiver import BODY_BYTES_MAX, EnergyShare, Receiver, Served, loopback, served
from tests.agent.exporters.nasty import receiving
from tests.conftest import Spanning

SECOND_NS = 10**9
T0 = 1_800_000_000 * SECOND_NS
PROTOBUF = {"Content-Type": "application/x-protobuf"}


def an_export(n: int = 1, **changes: Any) -> ExportTraceServiceRequest:
    """`n` request spans as vLLM writes them, and one of something else."""
    message = ExportTraceServiceRequest()
    resource = message.resource_spans.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "vllm-server"
    scope = resource.scope_spans.add()
    scope.spans.add(name="step", trace_id=b"t" * 16, span_id=b"other---")
    attributes = {
        "gen_ai.usage.prompt_tokens": 512,
        "gen_ai.usage.completion_tokens": 128,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_in_model_prefill": 0.25,
        "gen_ai.latency.time_in_model_decode": 1.25,
        "gen_ai.latency.time_to_first_token": 0.75,
        "gen_ai.request.id": "chatcmpl-1",
        **changes,
    }
    for number in range(n):
        span = scope.spans.add(
            name="llm_request",
            kind=2,
            trace_id=b"t" * 16,
            span_id=number.to_bytes(8),
            start_time_unix_nano=T0 + number * SECOND_NS,
            end_time_unix_nano=T0 + (number + 2) * SECOND_NS,
        )
        for key, value in attributes.items():
            into = span.attributes.add(key=key).value
            if isinstance(value, str):
                into.string_value = value
            elif isinstance(value, int):
                into.int_value = value
            elif isinstance(value, float):
                into.double_value = value
    return message


def the_span(**changes: Any) -> Any:
    return an_export(**changes).resource_spans[0].scope_spans[0].spans[1]


# ------------------------------------------------------------------------------------- the spans


def test_a_request_tells_when_it_came_and_what_it_was() -> None:
    assert served(the_span()) == Served(
        trace_id=b"t" * 16,
        span_id=bytes(8),
        arrived_unix_ns=T0,
        ended_unix_ns=T0 + 2 * SECOND_NS,
        prompt_tokens=512,
        output_tokens=128,
        queue_s=0.5,
        prefill_s=0.25,
        decode_s=1.25,
        ttft_s=0.75,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gen_ai.latency.time_in_queue", float("nan")),
        ("gen_ai.latency.time_in_queue", -1.0),
        ("gen_ai.latency.time_in_queue", "soon"),
        ("gen_ai.latency.time_in_queue", None),
    ],
)
def test_what_makes_no_sense_is_not_told(name: str, value: Any) -> None:
    found = served(the_span(**{name: value}))
    assert found is not None
    assert found.queue_s is None
    assert found.prefill_s == 0.25


def test_what_is_no_request_of_the_server_is_left_alone() -> None:
    client, backwards, endless = the_span(), the_span(), the_span()
    client.kind = 3
    backwards.end_time_unix_nano = T0 - 1
    endless.end_time_unix_nano = 0
    step = an_export().resource_spans[0].scope_spans[0].spans[0]
    assert [served(span) for span in (client, backwards, endless, step)] == [None] * 4


# ------------------------------------------------------------------------------------ the energy


def test_energy_is_split_among_those_that_run() -> None:
    share = EnergyShare()
    for second, running in enumerate([1, 1, 4, 4, 0, 0]):
        share.add(T0 + second * SECOND_NS, 100.0 * second, running)
    # 1 J to each at 100 W: alone 100, then among 2.5, 4, 2 and (an idle GPU) at most one.
    assert share.of(T0, T0 + SECOND_NS) == 100.0
    assert share.of(T0 + 2 * SECOND_NS, T0 + 3 * SECOND_NS) == 25.0
    assert share.of(T0 + SECOND_NS // 2, T0 + SECOND_NS) == 50.0
    assert share.of(T0, T0 + 5 * SECOND_NS) == pytest.approx(100 + 40 + 25 + 50 + 100)


def test_what_readings_do_not_cover_has_no_share() -> None:
    share = EnergyShare(keep_s=2)
    assert share.of(T0, T0 + 1) is None
    for second in range(5):
        share.add(T0 + second * SECOND_NS, 10.0 * second, 1)
    assert share.of(T0, T0 + SECOND_NS) is None  # longer ago than is kept
    assert share.of(T0 + 3 * SECOND_NS, T0 + 5 * SECOND_NS) is None  # not read yet
    assert share.of(T0 + 3 * SECOND_NS, T0 + 4 * SECOND_NS) == 10.0
    share.add(T0 + 5 * SECOND_NS, 1.0, 1)  # the driver was loaded anew
    assert share.of(T0 + 3 * SECOND_NS, T0 + 4 * SECOND_NS) is None


@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 50)), min_size=2, max_size=20),
    st.lists(st.integers(0, 18 * SECOND_NS), min_size=1, max_size=5),
)
def test_shares_of_parts_add_up(steps: list[tuple[float, int]], cuts: list[int]) -> None:
    share, energy = EnergyShare(), 0.0
    for second, (joules, running) in enumerate(steps):
        energy += joules
        share.add(T0 + second * SECOND_NS, energy, running)
    end = T0 + (len(steps) - 1) * SECOND_NS
    edges = sorted({T0, end, *(min(T0 + cut, end) for cut in cuts)})
    parts = [share.of(a, b) for a, b in pairwise(edges)]
    whole = share.of(T0, end)
    assert whole is not None
    assert sum(part or 0.0 for part in parts) == pytest.approx(whole)
    assert 0 <= whole <= energy + 1e-6


# ---------------------------------------------------------------------------------- the receiver


class Learned:
    def __init__(self) -> None:
        self.all: list[tuple[dict[str, str], list[Served]]] = []

    def __call__(self, resource: Mapping[str, str], requests: Sequence[Served]) -> None:
        self.all.append((dict(resource), list(requests)))

    def requests(self) -> list[Served]:
        return [one for _, requests in self.all for one in requests]


@asynccontextmanager
async def listening(port: int = 0, **options: Any) -> AsyncIterator[tuple[Receiver, Learned, str]]:
    learned = Learned()
    receiver = Receiver(learned, **options)
    url = await receiver.start(f"127.0.0.1:{port}")
    try:
        yield receiver, learned, f"{url}/v1/traces"
    finally:
        await receiver.close()
        await receiver.close()


async def post(url: str, body: bytes, **headers: str) -> tuple[int, str, Mapping[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=io.BytesIO(body), headers={**PROTOBUF, **headers}) as answer,
    ):
        return answer.status, await answer.text(errors="replace"), answer.headers


async def test_spans_are_learned_from_given_their_energy_and_passed_on(tmp_path: Path) -> None:
    share = EnergyShare()
    for second in range(4):
        share.add(T0 + second * SECOND_NS, 50.0 * second, 2)
    outbox = Outbox(tmp_path / "outbox.db")
    async with receiving() as back_end:
        sender = Sender(outbox, "traces", back_end.url)
        async with listening(energy=lambda who, a, b: share.of(a, b), keep=sender.put) as (
            receiver,
            learned,
            url,
        ):
            body = gzip.compress(an_export(3).SerializeToString())
            status, _, _ = await post(url, body, **{"Content-Encoding": "gzip"})
            assert status == 200
            assert receiver.status().spans == 4
        assert await sender.drain(5.0) == 0
        await sender.close()
    outbox.close()
    [(resource, requests)] = learned.all
    assert resource == {"service.name": "vllm-server"}
    assert [one.energy_j for one in requests] == [50.0, 50.0, None]
    [passed] = back_end.taken
    spans = ExportTraceServiceRequest.FromString(passed).resource_spans[0].scope_spans[0].spans
    added = [
        [a.value.double_value for a in span.attributes if a.key == "servefit.energy_j"]
        for span in spans
    ]
    assert added == [[], [50.0], [50.0], []]
    for span, one in zip(spans, an_export(3).resource_spans[0].scope_spans[0].spans, strict=True):
        kept = [a for a in span.attributes if a.key != "servefit.energy_j"]
        assert kept == list(one.attributes)


async def test_what_comes_twice_is_learned_once() -> None:
    async with listening() as (receiver, learned, url):
        for _ in range(2):
            assert (await post(url, an_export(2).SerializeToString()))[0] == 200
        assert receiver.status().requests == 2
    assert len(learned.requests()) == 2


async def test_what_cannot_be_kept_is_not_acknowledged_and_not_learned() -> None:
    async def full(message: bytes, points: int) -> bool:
        return False

    async with listening(keep=full) as (receiver, learned, url):
        status, _, headers = await post(url, an_export().SerializeToString())
        assert (status, headers["Retry-After"]) == (503, "5")
        assert receiver.status().refused == 1
    assert not learned.all


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xff nonsense", {}, 400),
        (b"not gzip", {"Content-Encoding": "gzip"}, 400),
        (gzip.compress(b"abc" * 99)[:-9], {"Content-Encoding": "gzip"}, 400),
        (b"", {"Content-Encoding": "zstd"}, 415),
        (gzip.compress(b"\x00" * (BODY_BYTES_MAX * 8)), {"Content-Encoding": "gzip"}, 413),
        (b"\x00" * (BODY_BYTES_MAX + 10), {}, 413),
        (b"{}", {"Content-Type": "application/json"}, 415),
        (b"", {"Content-Type": "text/plain"}, 415),
        (b"", {"Host": "evil.example:4319"}, 403),
    ],
    ids=[
        "nonsense",
        "not gzip",
        "cut",
        "zstd",
        "bomb",
        "large",
        "json",
        "a form's type",
        "rebound name",
    ],
)
async def test_bad_exports_are_refused_and_the_next_is_taken(
    body: bytes, headers: dict[str, str], status: int
) -> None:
    async with listening() as (receiver, learned, url):
        found, _, _ = await post(url, body, **headers)
        assert found == status
        assert f"HTTP {status}" in (receiver.status().last_error or "")
        assert (await post(url, an_export().SerializeToString()))[0] == 200
    assert len(learned.requests()) == 1


@given(st.binary(max_size=200))
def test_no_bytes_are_too_strange_to_be_a_span(body: bytes) -> None:
    message = ExportTraceServiceRequest()
    try:
        message.ParseFromString(body)
    except Exception:
        return
    for resource in message.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                served(span)


@pytest.mark.parametrize("listen", ["127.0.0.1:4319", "[::1]:4319", "localhost:0", "127.9.9.9:1"])
def test_loopback_is_listened_on(listen: str) -> None:
    assert loopback(listen)[1] == int(listen.rpartition(":")[2])


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:4319", "4319", "", "127.0.0.1", "127.0.0.1:x", "[::]:1", "127.0.0.1:70000"]
)
def test_nothing_else_is(listen: str) -> None:
    with pytest.raises(UsageError, match="listen"):
        loopback(listen)


async def test_a_taken_port_is_said() -> None:
    async with listening() as (_, learned, url):
        port = url.split(":")[2].partition("/")[0]
        with pytest.raises(UsageError, match="give another port"):
            await Receiver(learned).start(f"127.0.0.1:{port}")


# ------------------------------------------------------------------------------------- a real vLLM


@pytest.mark.timeout(600)
async def test_a_real_vllm_tells_of_each_request(spanning_vllm: Spanning) -> None:
    async with listening(spanning_vllm.spans_port) as (_, learned, _):

        def ask() -> None:
            for tokens in (3, 7):
                asked = {"model": "tiny", "prompt": "one two", "max_tokens": tokens}
                request = urllib.request.Request(
                    f"{spanning_vllm.url}/v1/completions",
                    data=json.dumps({**asked, "ignore_eos": True}).encode(),
                    headers={"Content-Type": "application/json"},
                )
                urllib.request.urlopen(request, timeout=60).read()
            deadline = time.monotonic() + 30
            while len(learned.requests()) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)

        before_ns = time.time_ns()
        await asyncio.to_thread(ask)
        after_ns = time.time_ns()
    first, second = sorted(learned.requests(), key=lambda one: one.arrived_unix_ns)
    assert (first.output_tokens, second.output_tokens) == (3, 7)
    assert first.prompt_tokens == second.prompt_tokens
    assert first.prompt_tokens is not None
    assert first.prompt_tokens > 0
    assert before_ns < first.arrived_unix_ns < first.ended_unix_ns < after_ns
    assert first.ttft_s is not None
    assert first.decode_s is not None
    assert 0 < first.ttft_s < (first.ended_unix_ns - first.arrived_unix_ns) / 1e9
