"""What goes into a request, and what every kind of chunk met in the wild means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from loadgen import api
from loadgen.api import ANSWER, FAILED, FINISH, REASONING


def chat(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


TOOL = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]
AZURE = {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": ""}
MEANINGS: dict[str, tuple[dict[str, Any], int]] = {
    "content": (chat(content="x"), ANSWER),
    "a blank is a token": (chat(content=" "), ANSWER),
    "text of a completion": (text("x"), ANSWER),
    "role only": (chat(role="assistant"), 0),
    "role and empty content": (chat(role="assistant", content=""), 0),
    "empty delta": (chat(), 0),
    "null content": (chat(content=None), 0),
    "empty text": (text(""), 0),
    "reasoning_content": (chat(reasoning_content="x"), REASONING),
    "reasoning": (chat(reasoning="x", content=None), REASONING),
    "empty reasoning": (chat(reasoning_content="", content=""), 0),
    "both": (chat(reasoning_content="x", content="y"), REASONING | ANSWER),
    "tool call": (chat(tool_calls=TOOL), ANSWER),
    "no tool calls": (chat(tool_calls=[]), 0),
    "function call": (chat(function_call={"name": "f", "arguments": ""}), ANSWER),
    "refusal": (chat(refusal="no"), ANSWER),
    "finish": (chat("stop"), FINISH),
    "last token and finish": (chat("length", content="x"), ANSWER | FINISH),
    "usage only": ({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, 0),
    "usage without choices": ({"usage": {"completion_tokens": 2}}, 0),
    "Azure's first": (AZURE, 0),
    "Azure's filter results": ({"choices": [{"content_filter_results": {}, "index": 0}]}, 0),
    "content as a list": (chat(content=[{"type": "text", "text": "x"}]), ANSWER),
    "an empty list": (chat(content=[]), 0),
    "a list with an empty text": (chat(content=[{"type": "text", "text": ""}]), 0),
    "a list that thinks": (chat(content=[{"type": "thinking", "thinking": ["x"]}]), REASONING),
    "a list of strings": (chat(content=["x"]), ANSWER),
    "two choices": (
        {"choices": [{"delta": {}}, {"delta": {"content": "x"}, "finish_reason": "stop"}]},
        ANSWER | FINISH,
    ),
    "a whole reply": (
        {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]},
        ANSWER | FINISH,
    ),
    "null choices": ({"choices": None}, 0),
    "a response's text": ({"type": "response.output_text.delta", "delta": "x"}, ANSWER),
    "a response's empty text": ({"type": "response.output_text.delta", "delta": ""}, 0),
    "a response's refusal": ({"type": "response.refusal.delta", "delta": "x"}, ANSWER),
    "a response's call": ({"type": "response.function_call_arguments.delta", "delta": "{"}, ANSWER),
    "a response's reasoning": ({"type": "response.reasoning_text.delta", "delta": "x"}, REASONING),
    "a response's summary": (
        {"type": "response.reasoning_summary_text.delta", "delta": "x"},
        REASONING,
    ),
    "a response's text again": ({"type": "response.output_text.done", "text": "xyz"}, 0),
    "a response's beginning": ({"type": "response.created", "response": {"usage": None}}, 0),
    "a response's end": ({"type": "response.completed", "response": {}}, FINISH),
    "a response at its limit": ({"type": "response.incomplete", "response": {}}, FINISH),
    "a response that failed": ({"type": "response.failed", "response": {}}, FAILED),
    "an event that is an error": ({"type": "error", "message": "x"}, FAILED),
    "an event of tomorrow": ({"type": "response.smell.delta", "delta": "x"}, 0),
    "an error": ({"error": {"message": "x"}}, FAILED),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name: str) -> None:
    chunk, bits = MEANINGS[name]
    assert api.meaning(api.decode(json.dumps(chunk).encode())) == bits


def test_usage_with_and_without_details() -> None:
    def usage_of(value: Any) -> tuple[int | None, int | None, int]:
        reply = api.decode(json.dumps({"choices": [], "usage": value}).encode())
        assert reply.usage is not None
        usage = reply.usage
        return usage.prompt, usage.output, usage.reasoning

    plain = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert usage_of(plain) == (5, 9, 0)
    assert usage_of(plain | {"completion_tokens_details": {"reasoning_tokens": 4}}) == (5, 9, 4)
    assert usage_of(plain | {"completion_tokens_details": None}) == (5, 9, 0)
    assert usage_of(plain | {"completion_tokens_details": {"reasoning_tokens": None}}) == (5, 9, 0)
    assert usage_of({"prompt_tokens": 5}) == (5, None, 0)
    assert usage_of({"total_tokens": 5}) == (5, None, 0)  # a reranker's: all of it is prompt
    assert usage_of({"completion_tokens": 9, "total_tokens": 14}) == (None, 9, 0)
    by_response = {"input_tokens": 5, "output_tokens": 9, "total_tokens": 14}
    assert usage_of(by_response) == (5, 9, 0)
    assert usage_of(by_response | {"output_tokens_details": {"reasoning_tokens": 4}}) == (5, 9, 4)
    assert api.decode(b'{"choices":[],"usage":null}').usage is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"message": "too long", "type": "bad", "code": 400}, "too long"),
        ({"type": "overloaded"}, "overloaded"),
        ({}, "error"),
        ("boom", "boom"),
        (503, "503"),
    ],
)
def test_an_error_object_is_told_from_a_chunk(error: Any, said: str) -> None:
    reply = api.decode(json.dumps({"error": error}).encode())
    assert api.meaning(reply) == FAILED
    assert reply.error_text == said
    assert api.meaning(api.decode(b'{"choices":[],"error":null}')) == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"[DONE",
        b'{"choices":{}}',
        b'{"choices":[{"delta":"x"}]}',
        b'{"choices":[{"text":"\xff"}]}',
        b'{"usage":{"completion_tokens":"7"}}',
        b'{"usage":{"completion_tokens":99999999999999999999}}',
        b'{"x":' + b"[" * 100_000,
        b"<html></html>",
    ],
)
def test_what_is_no_reply_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        api.decode(data)


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    try:
        reply = api.decode(data)
    except ValueError:
        pass
    else:
        assert api.meaning(reply) in range(16)
    message = api.error_message(data)
    assert len(message) <= 300
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"error":{"message":"no such model","type":"NotFound"}}', "no such model"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"object":"error","message":"too long","code":400}', "too long"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"error":{"type":"x"}}', "{'type': 'x'}"),
        (b'{"error":null,"message":"m"}', "m"),
        (b'"just words"', "just words"),
        (b"<html>\r\n <h1>502   Bad</h1>\n</html>", "502 Bad"),
        (b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad "
         b"Gateway</h1></center>\r\n<hr><center>nginx/1.22.1</center>\r\n</body>\r\n</html>\r\n",
         "502 Bad Gateway"),
        (b"<html><body><h1>504 Gateway Time-out</h1>\nThe server didn't respond in time.\n</body>",
         "504 Gateway Time-out The server didn't respond in time."),
        (b"", ""),
        (b'{"message":"two\\nlines"}', "two lines"),
        (b'"\xff\xfe"', '"\ufffd\ufffd"'),
    ],
)  # fmt: skip
def test_error_message(data: bytes, said: str) -> None:
    assert api.error_message(data) == said


def test_error_message_of_something_huge_or_deep_is_short() -> None:
    assert len(api.error_message(b"x" * 10_000)) == 200
    assert len(api.error_message(json.dumps({"error": "x" * 10_000}).encode())) == 300
    assert len(api.error_message(b"[" * 100_000)) == 200


# ------------------------------------------------------------------------------------- requests


def body(
    endpoint: str = "chat", prompt: api.Prompt = "say é", *, stream: bool = True, **dialect: Any
) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(
        api.body(endpoint, "m", prompt, 9, stream=stream, dialect=api.Dialect(**dialect))
    )
    return members


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def test_a_chat_request() -> None:
    assert body() == {
        "model": "m",
        "messages": [{"role": "user", "content": "say é"}],
        "max_tokens": 9,
        "ignore_eos": True,
        "min_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_completion_that_is_not_streamed() -> None:
    assert body("completions", stream=False) == {
        "model": "m",
        "prompt": "say é",
        "max_tokens": 9,
        "ignore_eos": True,
        "min_tokens": 9,
    }


def test_a_dialect_leaves_out_what_the_server_does_not_take() -> None:
    assert {"ignore_eos", "min_tokens"}.isdisjoint(body(ignore_eos=False))
    renamed = body(limit_member="max_completion_tokens")
    assert (renamed["max_completion_tokens"], "max_tokens" in renamed) == (9, False)
    assert "stream_options" not in body(usage_in_stream=False)
    assert body(usage_in_stream=False)["stream"] is True


def test_the_dialects_are_different_and_the_last_asks_for_nothing_special() -> None:
    forms = [
        api.body("chat", "m", "p", 1, stream=True, dialect=dialect)
        for dialect in api.ENDPOINTS["chat"].dialects
    ]
    assert len(set(forms)) == len(forms)
    assert set(json.loads(forms[-1])) == {"model", "messages", "max_tokens", "stream"}


def test_a_response_is_asked_for_by_its_own_names_and_not_stored() -> None:
    first, second = (
        api.body("responses", "m", "p", 9, stream=True, dialect=dialect)
        for dialect in api.ENDPOINTS["responses"].dialects
    )
    plain = {"model": "m", "input": "p", "store": False, "max_output_tokens": 9, "stream": True}
    assert json.loads(first) == plain | {"ignore_eos": True, "min_tokens": 9}
    assert json.loads(second) == plain


def test_what_generates_nothing_is_asked_for_nothing_else() -> None:
    assert body("embeddings") == {"model": "m", "input": "say é"}
    assert set(body("rerank", "a b c d e")) == {"model", "query", "documents"}


@pytest.mark.parametrize("n", [1, 2, 4, 5, 11, 12, 100])
def test_a_rerank_prompt_is_a_short_query_and_eight_documents(n: int) -> None:
    words = [f"w{i}" for i in range(n)]
    asked = body("rerank", " ".join(words))
    assert asked["query"].split() == words[:3]
    documents = [text.split() for text in asked["documents"]]
    assert len(documents) == api.RERANK_DOCUMENTS
    assert all(documents)
    lengths = [len(document) for document in documents]
    assert max(lengths) - min(lengths) <= 1
    if n >= 3 + api.RERANK_DOCUMENTS:
        assert [word for document in documents for word in document] == words[3:]


def test_prompts_are_texts_token_ids_or_messages() -> None:
    assert body("completions", [1, 2, 3])["prompt"] == [1, 2, 3]
    assert body("embeddings", [1, 2, 3])["input"] == [1, 2, 3]
    assert body("chat", TURNS)["messages"] == TURNS
    assert body("responses", TURNS)["input"] == TURNS


@pytest.mark.parametrize(
    ("endpoint", "prompt", "said"),
    [
        ("chat", [1, 2], "chat takes a text or messages as a prompt, not token ids"),
        ("responses", [1, 2], "not token ids"),
        ("completions", TURNS, "completions takes a text or token ids as a prompt, not messages"),
        ("embeddings", TURNS, "not messages"),
        ("rerank", TURNS, "rerank takes a text as a prompt, not messages"),
        ("rerank", [1], "not token ids"),
    ],
)
def test_a_prompt_that_an_endpoint_does_not_take(
    endpoint: str, prompt: api.Prompt, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        body(endpoint, prompt)


# ------------------------------------------------------------------- replies that are not streamed


@pytest.mark.parametrize(
    ("reply", "is_answer", "text_"),
    [
        ({"choices": [{"message": {"content": "x"}}]}, True, "x"),
        ({"choices": []}, False, ""),
        ({"output": [{"content": [{"text": "x"}]}], "status": "completed"}, True, "x"),
        ({"output": [], "status": "incomplete"}, True, ""),
        ({"output": [], "status": "in_progress"}, False, ""),
        (
            {"output": [{"summary": [{"text": "r"}]}, {"content": [{"text": "x"}]},
                        {"name": "f", "arguments": "{}"}]}, True, "rx{}",
        ),
        ({"data": [{"embedding": [1e-3]}]}, True, ""),
        ({"data": [{"embedding": "AAAA"}]}, True, ""),
        ({"data": []}, False, ""),
        ({"results": [{"index": 0}]}, True, ""),
        ([{"score": 1}], True, ""),
        ([], False, ""),
        ({}, False, ""),
    ],
)  # fmt: skip
def test_a_whole_reply(reply: Any, is_answer: bool, text_: str) -> None:
    whole = api.decode_whole(json.dumps(reply).encode())
    assert whole.is_answer == is_answer
    assert api.text(whole) == text_


@pytest.mark.parametrize("data", [b"", b'{"data":{}}', b"3", b'{"x":' + b"[" * 100_000])
def test_what_is_no_whole_reply(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
        api.decode_whole(data)
