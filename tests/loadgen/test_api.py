"""What goes into a request, and what every kind of chunk met in the wild means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=100, deadline=None)
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
        (b"<html>\r\n <h1>502   Bad</h1>\n</html>", "<html> <h1>502 Bad</h1> </html>"),
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


def body(endpoint: str = "chat", *, stream: bool = True, **dialect: Any) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(
        api.body(endpoint, "m", "say é", 9, stream=stream, dialect=api.Dialect(**dialect))
    )
    return members


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
