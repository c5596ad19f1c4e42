"""What is at the URL, over real sockets: what is refused, what is noted, what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from agent.model import TargetError, UsageError
from loadgen import api, probe, prompts
from loadgen.client import Dialer, parse_url
from loadgen.probe import Probed, Prober, choose_model
from tests.e2e.misbehaving import (
    MODEL,
    STREAM_HEAD,
    Pages,
    Reply,
    Writer,
    always,
    cut,
    event,
    good,
    message,
    models,
    refusal,
    serving,
    token,
)
from tests.loadgen import scripted


async def known(pages: Pages) -> probe.Known:
    with serving(pages=pages) as address:
        return await probe.models(parse_url(address), {}, None, 2.0)


async def probed(reply: Reply, input_tokens: int = 64) -> Probed:
    with serving(probe=reply) as where:
        address = parse_url(where)
        prober = Prober(
            address, Dialer(address, None, 2.0), {}, "chat", MODEL, stream=True, timeout_s=2.0
        )
        return await prober.run(input_tokens, Random(1))


async def test_models() -> None:
    assert (await known({})).ids == [MODEL]
    assert not (await known({})).simulated
    ours = {"data": [{"id": "m", "owned_by": "servefit-sim"}]}
    assert (await known({"/v1/models": message(200, ours)})).simulated
    assert (await known({"/v1/models": refusal(404)})).ids == []
    more = await known({"/v1/models": models("b", "a")})
    assert more.ids == ["b", "a"]


@pytest.mark.parametrize(
    "reply",
    [
        message(200, b""),
        message(200, b"[]"),
        message(200, b"null"),
        message(200, {"data": None}),
        message(200, {"data": [{}]}),
        message(200, {"data": ["x"]}),
        message(200, b'{"data": [{"id": "\xff"}]}'),
        message(301, b"moved", extra="location: http://127.0.0.1:9/\r\n"),
        message(502, b"<html>bad gateway"),
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort",
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
)
async def test_what_is_no_list_of_models(reply: bytes) -> None:
    async def closing(_: int, out: Writer) -> None:
        out.write(reply)
        await out.drain()
        out.close()

    with pytest.raises(TargetError, match=r".") as caught:
        await known({"/v1/models": closing})
    assert "\n" not in str(caught.value)


async def test_a_redirect_is_named_and_no_key_goes_there() -> None:
    async with scripted.serving([scripted.stream(1)]) as elsewhere:
        to = f"location: {elsewhere.url}/v1/models?key=secret\r\n"
        with pytest.raises(TargetError, match=f"give {elsewhere.url}/v1 ") as caught:
            await known({"/v1/models": message(308, b"", extra=to)})
        assert "secret" not in str(caught.value)
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (message(502, b"<html><head><title>502 Bad Gateway</title></head>"),
         r"502 \(502 Bad Gateway\): that is a proxy whose server does not answer"),
        (message(502, b""), "answered 502: that is a proxy"),
        (message(503, b""), "answered 503: is this the right address"),
        (message(200, b""), "answers nothing at all"),
    ],
)  # fmt: skip
async def test_a_proxy_says_what_it_is(reply: bytes, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        await known({"/v1/models": reply})


async def test_the_context_of_a_llama_cpp_slot_is_the_longest_request() -> None:
    meta = {"vocab_type": 2, "n_vocab": 8000, "n_ctx": 2048, "n_ctx_train": 32768}
    entry = {"id": "tiny.gguf", "object": "model", "owned_by": "llamacpp", "meta": meta}
    found = await known({"/v1/models": message(200, {"object": "list", "data": [entry]})})
    assert found.lengths == {"tiny.gguf": 2048}
    entry = {"id": "m", "meta": None, "max_model_len": None}
    assert (await known({"/v1/models": message(200, {"data": [entry]})})).lengths == {}


@pytest.mark.parametrize("closes", [True, False])
async def test_a_server_that_closes_without_a_word_is_noticed(closes: bool) -> None:
    reply = [*scripted.stream(1), *([scripted.CLOSE] if closes else [])]
    async with scripted.serving(reply) as server:
        address = parse_url(server.url)
        prober = Prober(address, Dialer(address, None, 2.0), {}, "chat", MODEL, stream=True)
        found = await prober.run(64, Random(1))
    assert found.keeps_open is not closes
    assert any("closes each connection" in note for note in found.notes) is closes


async def test_a_models_page_that_is_broken_is_not_needed_where_the_model_is_named() -> None:
    for status in (403, 405, 500):
        pages: Pages = {"/v1/models": message(status, b"Internal Server Error")}
        with serving(pages=pages) as where:
            found = await probe.models(parse_url(where), {}, None, 2.0, optional=True)
            assert found.ids == []
            with pytest.raises(TargetError, match=f"answered {status}"):
                await probe.models(parse_url(where), {}, None, 2.0)
    with serving(pages={"/v1/models": message(200, {"object": "list", "data": []})}) as where:
        assert (await probe.models(parse_url(where), {}, None, 2.0, optional=True)).ids == []
        with pytest.raises(TargetError, match="--model"):
            await probe.models(parse_url(where), {}, None, 2.0)
    with (
        serving(pages={"/v1/models": message(401, b"")}) as where,
        pytest.raises(TargetError, match="--api-key-file"),
    ):
        await probe.models(parse_url(where), {}, None, 2.0, optional=True)


def test_choose_model() -> None:
    assert choose_model(None, ["a", "b"]) == "a"
    assert choose_model("b", ["a", "b"]) == "b"
    assert choose_model("x", []) == "x"  # a server without the page is believed
    with pytest.raises(TargetError, match="--model"):
        choose_model(None, [])
    with pytest.raises(TargetError, match=r"nearest is 'llama' \(of 7: .*, …\)"):
        choose_model("lama", ["llama", *"abcdef"])


async def test_a_server_that_tells_nothing_is_noted() -> None:
    found = await probed(good)
    assert found.costs == prompts.DEFAULT_COSTS
    assert found.requests > 0
    assert any("does not say how long a prompt was" in note for note in found.notes)


async def test_a_probe_that_fails_is_noted_and_data() -> None:
    found = await probed(cut)
    assert (found.requests, found.tokens) == (0, 2)  # the server has counted what it sent
    assert found.costs == prompts.DEFAULT_COSTS
    assert any("the probe failed (cut" in note for note in found.notes)


async def test_counts_that_follow_nothing_are_not_believed() -> None:
    numbers = iter([10, 9, 8, 7, 6, 5, 4, 3, 2, 1])

    async def reply(_: int, out: Writer) -> None:
        usage = {"prompt_tokens": next(numbers), "completion_tokens": 1}
        out.write(STREAM_HEAD + event(token(finish="stop")))
        out.write(event({"choices": [], "usage": usage}) + event("[DONE]") + b"0\r\n\r\n")

    found = await probed(reply)
    assert found.costs == prompts.DEFAULT_COSTS
    assert any("do not follow the prompts" in note for note in found.notes)
    assert found.tokens == found.requests


COUNTS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "words in a template": lambda text: len(text.split()) + 23,
    "characters": len,
    "3.3 characters": lambda text: round(len(text) / 3.3) + 7,
    "5 characters": lambda text: len(text) // 5,
    "6 characters": lambda text: len(text) // 6 + 4,
}


@pytest.mark.parametrize("name", COUNTS)
async def test_prompts_have_the_asked_length_however_busy_the_server_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PAUSES_S", (0.0, 0.0))
    count = COUNTS[name]

    def script(request: scripted.Request) -> scripted.Script:
        if request.number % 3 == 0:
            return [scripted.whole("503 X", b"busy")]
        prompt = json.loads(request.body)["messages"][0]["content"]
        return [scripted.answer(prompt=count(prompt), output=1)]

    async with scripted.serving(script) as server:
        address = parse_url(f"http://127.0.0.1:{server.port}")
        prober = Prober(address, Dialer(address, None, 2.0), {}, "chat", MODEL, stream=False)
        found = await prober.run(400, Random(1))
    assert found.notes == []
    prompt = str(prompts.Texts(found.costs, 2).prompt(400, Random(2), 5).content)
    assert abs(count(prompt) - 400) <= 8
    answered = [request for request in server.requests if request.number % 3]
    assert found.requests == found.tokens == len(answered)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "--api-key-file"), (403, "may not use it"), (404, "--endpoint"), (400, "every form"),
     (307, "a redirect"), (405, "not an OpenAI-compatible API")],
)  # fmt: skip
async def test_refusals(status: int, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        await probed(always(refusal(status)))


async def test_a_model_too_small_for_the_prompt_says_so() -> None:
    """The costs are learned from short prompts; the long one is refused."""
    asked = 0
    fixed, letters = 8, len(prompts.NONCE_LETTERS)  # of a token each, as every unit is
    counts = [
        fixed + letters,
        fixed + letters + 20 * prompts.PROBE_BLOCKS,
        fixed + letters + prompts.PROBE_UNITS,
        fixed + prompts.PROBE_LETTERS,
    ]

    async def reply(_: int, out: Writer) -> None:
        nonlocal asked
        asked += 1
        if asked > len(counts):
            out.write(refusal(400, "maximum context length is 32"))
            return
        usage = {"prompt_tokens": counts[asked - 1], "completion_tokens": 1}
        out.write(STREAM_HEAD + event(token(finish="stop")))
        out.write(event({"choices": [], "usage": usage}) + event("[DONE]") + b"0\r\n\r\n")

    with pytest.raises(UsageError, match=r"--input-tokens 64: .*maximum context length is 32"):
        await probed(reply)


def test_a_request_longer_than_the_model_takes_is_refused_beforehand() -> None:
    known = probe.Known(["m"], {"m": 2048})
    probe.check_length("m", known, 1920, 128)
    with pytest.raises(UsageError, match="more than the 2048 tokens"):
        probe.check_length("m", known, 1921, 128)
    probe.check_length("other", known, 10**6, 1)  # the server does not say
    probe.check_length("m", known, 8 * 2048, 0, 8)  # each document by itself
    with pytest.raises(UsageError, match=r"16385, 8 documents with their query, are together more"):
        probe.check_length("m", known, 8 * 2048 + 1, 0, 8)


# --------------------------------------------------------------------------- the other endpoints


def answered(request: scripted.Request) -> scripted.Script:
    """Every endpoint, counting words; token ids for what they are."""
    body = json.loads(request.body)
    prompt = body.get("prompt", body.get("input"))
    if "documents" in body:
        texts = [f"{body['query']} {document}" for document in body["documents"]]
        count = sum(len(text.split()) for text in texts)
        return [scripted.whole("200 OK", json.dumps(
            {"results": [{"index": 0}], "usage": {"total_tokens": count}}).encode())]  # fmt: skip
    count = len(prompt.split() if isinstance(prompt, str) else prompt)
    if b"/v1/embeddings" in request.head:
        reply = {"data": [{"embedding": [0.0]}], "usage": {"prompt_tokens": count}}
    elif b"/v1/responses" in request.head:
        usage = {"input_tokens": count, "output_tokens": body["max_output_tokens"]}
        reply = {"status": "incomplete", "output": [], "usage": usage}
    else:
        return [scripted.answer(prompt=count, output=1)]
    return [scripted.whole("200 OK", json.dumps(reply).encode())]


async def asked_of(
    script: Callable[[scripted.Request], scripted.Script], endpoint: str, **more: bool
) -> tuple[Probed, list[dict[str, Any]]]:
    async with scripted.serving(script) as server:
        address = parse_url(server.url)
        prober = Prober(address, Dialer(address, None, 2.0), {}, endpoint, MODEL, stream=False)
        found = await prober.run(400, Random(1), **more)
        return found, [json.loads(request.body) for request in server.requests]


@pytest.mark.parametrize("endpoint", ["completions", "responses", "embeddings", "rerank"])
async def test_prompts_have_the_asked_length_at_every_endpoint(endpoint: str) -> None:
    found, bodies = await asked_of(answered, endpoint)
    assert found.notes == []
    assert found.requests == len(bodies)
    assert not found.token_ids
    # The last probe is a prompt as the levels will send it: as long as was asked for.
    last = bodies[-1]
    if endpoint == "rerank":
        documents = [*last["documents"], *[last["query"]] * len(last["documents"])]
        assert sum(len(text.split()) for text in documents) == 400
    else:
        assert len(last.get("prompt", last.get("input")).split()) == 400
    if endpoint == "responses":
        assert found.tokens == 16 * found.requests  # OpenAI takes no less
    elif endpoint != "completions":
        assert found.tokens == 0


@pytest.mark.parametrize("endpoint", ["completions", "embeddings"])
async def test_token_ids_are_tried_where_asked_and_counted(endpoint: str) -> None:
    found, bodies = await asked_of(answered, endpoint, try_token_ids=True)
    assert found.token_ids
    tried = [body.get("prompt", body.get("input")) for body in bodies]
    (ids,) = (prompt for prompt in tried if isinstance(prompt, list))
    assert len(ids) == 32
    assert all(100 <= number < 1000 for number in ids)
    assert found.requests == len(bodies)


async def test_token_ids_are_not_tried_where_the_api_has_none() -> None:
    found, bodies = await asked_of(answered, "responses", try_token_ids=True)
    assert not found.token_ids
    assert all(isinstance(body["input"], str) for body in bodies)


@pytest.mark.parametrize("status", [200, 400, 422, 500])
async def test_token_ids_that_are_refused_or_miscounted_are_not_believed(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PAUSES_S", (0.0, 0.0))

    def script(request: scripted.Request) -> scripted.Script:
        if isinstance(json.loads(request.body)["prompt"], str):
            return answered(request)
        if status == 200:
            return [scripted.answer(prompt=33, output=1)]  # with a token of its own before
        return [scripted.whole(f"{status} X", b'{"error":"a prompt is a text"}')]

    found, _ = await asked_of(script, "completions", try_token_ids=True)
    assert not found.token_ids
    assert found.notes == []
    assert found.costs.block == 16  # and the texts go on as before


async def test_each_dialect_of_an_endpoint_is_tried() -> None:
    def script(request: scripted.Request) -> scripted.Script:
        if b"ignore_eos" in request.body:
            return [scripted.whole("400 X", b'{"error":"unknown member ignore_eos"}')]
        return answered(request)

    found, _ = await asked_of(script, "responses")
    assert found.dialect == api.ENDPOINTS["responses"].dialects[1]
    assert found.notes == []
