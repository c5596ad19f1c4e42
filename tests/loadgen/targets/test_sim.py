"""The simulated engine's front: vLLM's shapes over real HTTP, and the model's times on a clock."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import UsageError
from agent.sizing.engine import decode_step_seconds, prefill_seconds
from agent.sizing.simulate import closed_loop
from loadgen.targets.process import started
from loadgen.targets.sim import DEMO_SPEC, parse_spec
from loadgen.targets.sim_api import NATURAL_TOKENS, count_tokens, token_ids

SPEC = "sim:h100-sxm/llama-3.1-8b?max_model_len=4096&max_num_seqs=64"
MODULE = [sys.executable, "-m", "loadgen.targets.sim"]


# ------------------------------------------------------------------------------------------- spec


def test_parse_spec() -> None:
    spec = parse_spec(
        "sim:h100-sxm/meta-llama/Llama-3.1-8B-Instruct?tp=2&precision=fp8&kv_precision=fp8"
        "&max_num_seqs=32&num_gpu_blocks=512&max_num_batched_tokens=2048&block_size=32"
        "&gpu_memory_utilization=0.8&max_model_len=8192&t0_ms=3&eta_b=0.7&eta_c=0.5&eta_p=0.4"
    )
    assert (spec.gpu.name, spec.model.name) == ("H100-SXM-80GB", "llama-3.1-8b")
    assert (spec.tp, spec.precision, spec.kv_precision, spec.block_size) == (2, "fp8", "fp8", 32)
    assert (spec.max_num_seqs, spec.num_gpu_blocks, spec.max_model_len) == (32, 512, 8192)
    assert (spec.max_num_batched_tokens, spec.gpu_memory_utilization) == (2048, 0.8)
    shares = spec.efficiencies
    assert (shares.t0_s, shares.eta_b, shares.eta_c, shares.eta_p) == (0.003, 0.7, 0.5, 0.4)
    parse_spec(DEMO_SPEC)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sim:h100-sxm", "sim:GPU/MODEL"),
        ("sim:/llama-3.1-8b", "sim:GPU/MODEL"),
        ("", "sim:GPU/MODEL"),
        ("sim:h1000/llama-3.1-8b", "did you mean"),
        ("sim:a100-sxm/llama-3.1-8b", "say which"),
        ("sim:l4/llama-3.1-80b", r"llama-3\.1-8b"),
        ("sim:l4/llama-3.1-70b", "does not fit"),
        ("sim:h100-sxm/llama-3.1-8b?max_num_seq=2", "max_num_seqs"),
        ("sim:h100-sxm/llama-3.1-8b?tp=two", "tp=two: not a number"),
        ("sim:h100-sxm/llama-3.1-8b?eta_b=2", "eta_b"),
        ("sim:h100-sxm/llama-3.1-8b?tp=", "tp=: not a number"),
        ("sim:h100-sxm/llama-3.1-8b?precision=fp9", "fp8"),
        ("sim:h100-sxm/llama-3.1-8b?num_gpu_blocks=1&max_model_len=17", "max_model_len"),
    ],
)
def test_a_bad_spec_says_what_to_change(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse_spec(text)


@given(st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=20)))
def test_tokens_add_up_over_words(words: list[str]) -> None:
    text = " ".join(words)
    assert count_tokens(text) == sum(count_tokens(word) for word in words)
    assert len(token_ids(text, 1000)) == count_tokens(text)
    assert all(0 <= token < 1000 for token in token_ids(text, 1000))


def test_a_short_word_is_one_token() -> None:
    assert [count_tokens(w) for w in ("a", "four", "fives", "eightish", "", "a b\nc")] == [
        1, 1, 2, 2, 0, 3,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started(SPEC) as address:
        yield address


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(path, data=data) as reply:
        assert reply.headers["x-servefit-simulated"] == "1"
        return reply.status, await reply.json()


async def stream(http: aiohttp.ClientSession, path: str, **body: Any) -> list[Any]:
    """The events of a streamed reply, `[DONE]` checked and taken off."""
    async with http.post(path, json={**body, "stream": True}) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        text = await reply.text()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def metrics(http: aiohttp.ClientSession) -> dict[str, float]:
    """The metrics page; series summed over the labels that are not bucket bounds."""
    async with http.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    out: dict[str, float] = {}
    for line in lines:
        if not line.startswith("#") and 'le="' not in line:
            name, value = line.rsplit(" ", 1)
            name = name.partition("{")[0].removeprefix("vllm:")
            out[name] = out.get(name, 0.0) + float(value)
    return out


USER = [{"role": "user", "content": "one two three"}]


async def test_who_it_is(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/models") as reply:
        assert reply.headers["x-servefit-simulated"] == "1"
        (card,) = (await reply.json())["data"]
    assert card["id"] == "llama-3.1-8b"
    assert card["owned_by"] == "servefit-sim"
    assert card["max_model_len"] == 4096
    async with http.get("/version") as reply:
        assert (await reply.json())["version"].startswith("servefit-sim ")
    async with http.get("/health") as reply:
        assert reply.status == 200


async def test_a_chat_stream_has_vllms_chunks(http: aiohttp.ClientSession) -> None:
    events = await stream(
        http,
        "/v1/chat/completions",
        model="llama-3.1-8b",
        messages=USER,
        max_completion_tokens=4,
        stream_options={"include_usage": True},
    )
    role, *tokens, usage = events
    assert role["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    deltas = [event["choices"][0]["delta"] for event in tokens]
    assert deltas == [{"content": " tok"}] * 4
    reasons = [event["choices"][0]["finish_reason"] for event in tokens]
    assert reasons == [None, None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 11, "total_tokens": 15, "completion_tokens": 4}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {"llama-3.1-8b"}
    assert len({event["id"] for event in events}) == 1
    assert role["id"].startswith("chatcmpl-")


async def test_a_completion_stream_has_vllms_chunks(http: aiohttp.ClientSession) -> None:
    events = await stream(http, "/v1/completions", prompt=[5, 6, 7], max_tokens=3)
    assert [event["choices"][0]["text"] for event in events] == [" tok"] * 3
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert {event["object"] for event in events} == {"text_completion"}
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_one_token(http: aiohttp.ClientSession, path: str) -> None:
    chat = "chat" in path
    prompt = {"messages": USER} if chat else {"prompt": "one two three"}
    events = await stream(http, path, **prompt, max_tokens=1)
    assert len(events) == 2 if chat else 1
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_usage_in_every_chunk(http: aiohttp.ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(
        http, "/v1/completions", prompt="a b", max_tokens=3, stream_options=options
    )
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in events} == {2}


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("a b c", 3), ("", 1), ([1, 2], 2), ([[1, 2, 3, 4]], 4), (["a b"], 2)],
)
async def test_a_whole_completion(http: aiohttp.ClientSession, prompt: Any, tokens: int) -> None:
    status, reply = await post(http, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
    assert status == 200
    assert reply["choices"][0]["text"] == " tok tok"
    assert reply["usage"]["prompt_tokens"] == tokens
    assert reply["usage"]["completion_tokens"] == 2


async def test_a_whole_chat_completion(http: aiohttp.ClientSession) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}]
    body = {"messages": parts, "max_tokens": 2}
    status, reply = await post(http, "/v1/chat/completions", body)
    assert status == 200
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["content"] == " tok tok"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == 11


async def test_tokenize_agrees_with_usage(http: aiohttp.ClientSession) -> None:
    _, counted = await post(http, "/tokenize", {"prompt": "a longer prompt of several words"})
    _, reply = await post(http, "/v1/completions", {"prompt": counted["tokens"], "max_tokens": 1})
    assert counted["count"] == len(counted["tokens"]) == reply["usage"]["prompt_tokens"] == 10
    _, chat = await post(http, "/tokenize", {"messages": USER})
    assert chat["count"] == 11
    assert chat["max_model_len"] == 4096


async def test_where_a_reply_ends(http: aiohttp.ClientSession) -> None:
    natural, more = NATURAL_TOKENS, NATURAL_TOKENS + 50
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({}, 16, "length"),
        ({"max_tokens": more}, natural, "stop"),
        ({"max_tokens": more, "ignore_eos": True}, more, "length"),
        ({"max_tokens": more, "min_tokens": natural + 20}, natural + 20, "stop"),
    ]
    asks = (post(http, "/v1/completions", {"prompt": "a", **options}) for options, _, _ in cases)
    for (_, reply), (_, tokens, reason) in zip(await asyncio.gather(*asks), cases, strict=True):
        assert reply["usage"]["completion_tokens"] == tokens
        assert reply["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v1/completions", {"model": "gpt-5", "prompt": "a"}, 404, "`gpt-5` does not exist"),
        ("/v1/completions", b"{", 400, "JSON decode error"),
        ("/v1/completions", b"\xff", 400, "JSON decode error"),
        ("/v1/completions", [], 400, "dictionary"),
        ("/v1/completions", {"prompt": None}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n:"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4096}, 400, "4096 > 4096 - 1"),
        ("/v1/completions", {"prompt": [1] * 4096}, 400, "maximum context length is 4096"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "3"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "min_tokens": 4}, 400, "min_tokens"),
        ("/v1/completions", {"prompt": "a", "stream_options": 3}, 400, "stream_options"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"prompt": "a"}, 400, "messages"),
        ("/v1/responses", {"input": []}, 400, "messages"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_tokens"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/embeddings", {"input": [1, "a"]}, 400, "input"),
        ("/v1/embeddings", {"input": [1] * 4097}, 400, "maximum context length is 4096"),
        ("/v1/embeddings", {"model": "gpt-5", "input": "a"}, 404, "`gpt-5` does not exist"),
        ("/v1/embeddings", b"[]", 400, "dictionary"),
        ("/v1/rerank", {"query": "a"}, 400, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [1]}, 400, "documents"),
        ("/tokenize", b"[]", 400, "dictionary"),
    ],
)
async def test_refusals(
    http: aiohttp.ClientSession, path: str, body: Any, status: int, text: str
) -> None:
    found, reply = await post(http, path, body)
    assert found == status
    assert text in reply["error"]["message"]
    assert reply["error"]["code"] == status


async def responded(http: aiohttp.ClientSession, **body: Any) -> list[Any]:
    """The events of a streamed response; each says its name, and its place in the order."""
    async with http.post("/v1/responses", json={**body, "stream": True}) as reply:
        assert reply.status == 200
        assert reply.content_type == "text/event-stream"
        blocks = (await reply.text()).split("\n\n")
    assert blocks.pop() == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


@pytest.mark.parametrize("tokens", [1, 2, 5])
async def test_a_response_stream_has_vllms_events(http: aiohttp.ClientSession, tokens: int) -> None:
    events = await responded(http, input="one two three", max_output_tokens=tokens)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * tokens,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert {event["delta"] for event in events if "delta" in event} == {" tok"}
    last = events[-1]["response"]
    assert last["status"] == "incomplete"  # as vLLM says it: completed, and cut by the limit
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["output"][0]["content"][0]["text"] == " tok" * tokens
    usage = last["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (11, tokens)


async def test_a_response_that_ends_by_itself_and_one_that_is_not_streamed(
    http: aiohttp.ClientSession,
) -> None:
    events = await responded(http, input=USER, max_output_tokens=2000)
    assert sum("delta" in event for event in events) == NATURAL_TOKENS - 1
    assert events[-1]["response"]["status"] == "completed"
    status, reply = await post(http, "/v1/responses", {"input": USER, "max_output_tokens": 3})
    assert (status, reply["object"], reply["usage"]["output_tokens"]) == (200, "response", 3)
    assert reply["output"][0]["content"][0]["text"] == " tok" * 3
    _, rest = await post(http, "/v1/responses", {"input": [*USER] * 500, "max_output_tokens": 9999})
    assert rest["usage"]["total_tokens"] == 4096  # what there is room for, as in vLLM


@pytest.mark.parametrize(
    ("asked", "counts"),
    [("a b c", [3]), ([1, 2], [2]), (["a", "b c"], [1, 2]), ([[1], [2, 3]], [1, 2]), ("", [0])],
)
async def test_embeddings(http: aiohttp.ClientSession, asked: Any, counts: list[int]) -> None:
    before = await metrics(http)
    status, reply = await post(http, "/v1/embeddings", {"input": asked})
    after = await metrics(http)
    assert status == 200
    assert [entry["index"] for entry in reply["data"]] == list(range(len(counts)))
    assert all(len(entry["embedding"]) == 4096 for entry in reply["data"])
    assert reply["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    grown = {name: after[name] - before[name] for name in after}
    assert grown["request_success_total"] == len(counts)
    assert grown["prompt_tokens_total"] == max(1, sum(counts))
    assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == 0
    assert grown["time_to_first_token_seconds_count"] == 0


async def test_a_rerank_reads_the_query_with_each_document(http: aiohttp.ClientSession) -> None:
    before = await metrics(http)
    body = {"query": "a b", "documents": ["c", "d e", "f"]}
    status, reply = await post(http, "/v1/rerank", body)
    after = await metrics(http)
    assert status == 200
    assert [result["document"]["text"] for result in reply["results"]] == ["c", "d e", "f"]
    assert reply["usage"]["prompt_tokens"] == 3 * (3 + 2) + 4
    assert after["request_success_total"] - before["request_success_total"] == 3
    _, best = await post(http, "/v1/rerank", {**body, "top_n": 2})
    assert len(best["results"]) == 2


async def test_a_prompt_as_long_as_the_model_takes_is_computed(http: aiohttp.ClientSession) -> None:
    status, reply = await post(http, "/v1/embeddings", {"input": [1] * 4096})
    assert (status, reply["usage"]["prompt_tokens"]) == (200, 4096)


async def test_counters_count(http: aiohttp.ClientSession) -> None:
    before = await metrics(http)
    bodies = [{"prompt": [1] * n, "max_tokens": 10 + n} for n in range(1, 9)]
    await asyncio.gather(*(post(http, "/v1/completions", body) for body in bodies))
    after = await metrics(http)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"] == 36
    assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == 116
    assert grown["request_success_total"] == 8
    assert grown["iteration_tokens_total_sum"] == 36 + 116 - 8
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time",
                 "request_prefill_time", "request_decode_time", "request_inference_time",
                 "request_time_per_output_token"):  # fmt: skip
        assert grown[f"{name}_seconds_count"] == 8
        assert grown[f"{name}_seconds_sum"] >= 0
    assert grown["inter_token_latency_seconds_count"] == 116 - 8
    stages = ("queue", "prefill", "decode")
    assert sum(grown[f"request_{stage}_time_seconds_sum"] for stage in stages) == pytest.approx(
        grown["e2e_request_latency_seconds_sum"]
    )
    assert after["num_requests_running"] == after["num_requests_waiting"] == 0
    assert after["kv_cache_usage_perc"] == 0
    assert after["servefit_simulated"] == 1
    assert after["servefit_sim_step_lag_seconds_max"] >= 0
    assert time.time() - 600 < after["process_start_time_seconds"] < time.time()


async def test_the_cache_says_how_much_it_holds(http: aiohttp.ClientSession) -> None:
    async with http.get("/metrics") as reply:
        page = await reply.text()
    assert 'block_size="16"' in page
    assert 'kv_cache_size_tokens="454992",num_gpu_blocks="28437"} 1.0' in page


async def test_a_client_that_leaves_aborts_its_request(http: aiohttp.ClientSession) -> None:
    before = (await metrics(http))["request_success_total"]
    for streamed in (True, False):
        body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": streamed}
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_read_all(http, body), 0.2)
    for _ in range(100):
        now = await metrics(http)
        if now["num_requests_running"] == 0:
            break
        await asyncio.sleep(0.02)
    assert now["num_requests_running"] == now["kv_cache_usage_perc"] == 0
    async with http.get("/metrics") as reply:
        assert 'finished_reason="abort"} 2.0' in await reply.text()
    assert now["request_success_total"] == before + 2


async def _read_all(http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    async with http.post("/v1/completions", json=body) as reply:
        await reply.read()


async def test_http_1_0_gets_a_close_delimited_stream(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"prompt": "a", "max_tokens": 2, "stream": true}'
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head, _, events = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert b"chunked" not in head.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


# ------------------------------------------------------------------------------------------- time


async def test_one_stream_keeps_the_models_time(http: aiohttp.ClientSession) -> None:
    """TTFT is the prefill and a gap the decode step, to a few milliseconds."""
    spec = parse_spec(SPEC)
    before = await metrics(http)
    ttft_s, gaps_s = [], []
    for _ in range(5):
        body = {"prompt": [1] * 1000, "max_tokens": 40, "stream": True}
        sent_s = last_s = time.monotonic()
        async with http.post("/v1/completions", json=body) as reply:
            instants = [time.monotonic() async for line in reply.content if b'"text"' in line]
        ttft_s.append(instants[0] - sent_s)
        for at_s in instants:
            gaps_s.append(at_s - last_s)
            last_s = at_s
    after = await metrics(http)
    step_s = decode_step_seconds(spec, 1, 1020)
    assert statistics.median(gaps_s) == pytest.approx(step_s, abs=0.0015)
    assert statistics.median(ttft_s) == pytest.approx(prefill_seconds(spec, 1000), abs=0.005)
    # What the server says of itself: free of the client's delays.
    name = "inter_token_latency_seconds"
    served_s = (after[f"{name}_sum"] - before[f"{name}_sum"]) / 195
    assert served_s == pytest.approx(step_s, abs=0.0005)


async def _closed_loop(http: aiohttp.ClientSession, clients: int) -> tuple[float, float]:
    """Tokens/s and mean TTFT in ms, by the server's counters, of a closed loop of 3 s."""
    before, started_s = await metrics(http), time.monotonic()

    async def client() -> None:
        while time.monotonic() < started_s + 3.0:
            body = {"prompt": [1] * 100, "max_tokens": 50, "ignore_eos": True}
            await post(http, "/v1/completions", body)

    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed_s, after = time.monotonic() - started_s, await metrics(http)
    grown = {name: after[name] - before[name] for name in after}
    ttft_s = grown["time_to_first_token_seconds_sum"] / grown["time_to_first_token_seconds_count"]
    return grown["generation_tokens_total"] / elapsed_s, 1e3 * ttft_s


async def test_a_level_is_what_the_simulation_in_virtual_time_says(
    http: aiohttp.ClientSession,
) -> None:
    """The same closed loop on both clocks, once in three on a machine that others use too."""
    truth = closed_loop(parse_spec(SPEC), 16, 100, 50, 3.0, ramp_s=0.0)
    expected = (
        pytest.approx(50 * truth.requests / truth.duration_s, rel=0.08),
        pytest.approx(truth.ttft_ms.mean, rel=0.4),
    )
    seen = []
    for _ in range(3):
        seen.append(await _closed_loop(http, 16))
        if seen[-1] == expected:
            return
    pytest.fail(f"{seen} and not {expected}")


async def test_a_full_cache_is_seen_from_outside() -> None:
    with started("sim:h100-sxm/llama-3.1-8b?num_gpu_blocks=32&max_num_seqs=32") as url:
        async with aiohttp.ClientSession(url) as http:
            body = {"prompt": [1] * 30, "max_tokens": 120, "ignore_eos": True}
            asks = [asyncio.create_task(post(http, "/v1/completions", body)) for _ in range(12)]
            await asyncio.sleep(0.5)
            seen = await metrics(http)
            assert seen["num_requests_waiting"] > 0
            assert seen["num_requests_running"] + seen["num_requests_waiting"] == 12
            assert seen["kv_cache_usage_perc"] > 0.5
            assert all(status == 200 for status, _ in await asyncio.gather(*asks))
            assert (await metrics(http))["num_preemptions_total"] > 0


# ---------------------------------------------------------------------------------------- process


def test_mistakes_are_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, named in (
            (["sim:h1000/llama-3.1-8b"], "did you mean"),
            ([SPEC, "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            ([SPEC, "--port", "70000"], "65535"),
            ([SPEC, "--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1"),
        ):
            done = subprocess.run([*MODULE, *arguments], capture_output=True, text=True)
            assert done.returncode == 2
            assert named in done.stderr
            assert done.stderr.startswith("error: ")
            assert len(done.stderr.splitlines()) == 1


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*MODULE, SPEC, "--port", "0", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"ready http://127.0.0.1:")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    with _start() as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, b"")


def test_it_ends_with_its_parent_where_asked_to() -> None:
    with _start("--exit-with-parent") as process:
        _, errors = process.communicate(timeout=10)  # closes its stdin
    assert (process.returncode, errors) == (0, b"")


def test_it_ends_with_streams_under_way() -> None:
    with started("sim:h100-sxm/llama-3.1-8b") as url:
        host, port = url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        body = b'{"prompt": "a", "max_tokens": 100000, "ignore_eos": true, "stream": true}'
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        before_s = time.monotonic()
    assert time.monotonic() - before_s < 3.0
    connection.close()
