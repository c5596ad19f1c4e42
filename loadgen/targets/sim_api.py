"""What is asked of the simulated server, and how its answers are spelled: as vLLM spells them.

Prompts are counted, not read; the reply is the word "tok" once a token, an embedding or a score 0.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

import msgspec
from aiohttp import web

from loadgen.api import ENDPOINTS

NATURAL_TOKENS = 512
"""A reply ends by itself after so many tokens unless `ignore_eos` or `min_tokens` say otherwise."""

CHAT_TOKENS = 3  # the chat template: once a conversation …
MESSAGE_TOKENS = 4  # … and once a message
PAIR_TOKENS = 3  # what stands around and between a reranker's query and document
_COMPLETIONS_MAX_TOKENS = 16  # what OpenAI and vLLM take where max_tokens is not given

# ---------------------------------------------------------------------------------------- counting


def count_tokens(text: str) -> int:
    """Tokens of a text: a word takes one for every 4 characters, rounded up.

    A rule, not a tokenizer: it adds up over words, so that a prompt of n short words is n tokens.
    """
    return sum(-(-len(word) // 4) for word in text.split())


def token_ids(text: str, vocab: int) -> list[int]:
    """An id for each token of `text`, the same for the same piece."""
    pieces = (word[at : at + 4] for word in text.split() for at in range(0, len(word), 4))
    return [zlib.crc32(piece.encode()) % vocab for piece in pieces]


def _content_text(content: Any) -> str:
    """The text of a chat message: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def count_messages(messages: Any) -> int:
    """Tokens of a conversation: of chat, or as the input of the Responses API."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages: Input should be a valid list of messages")
    if not messages:
        raise Refused(400, "messages: at least one message is needed")
    texts = (_content_text(message.get("content")) for message in messages)
    return CHAT_TOKENS + sum(MESSAGE_TOKENS + count_tokens(text) for text in texts)


def _count_prompt(prompt: Any) -> int:
    """Tokens of a completions prompt: text, token ids, or a list of one of either."""
    counts = count_prompts(prompt, "prompt")
    if len(counts) != 1:
        raise Refused(400, "prompt: the simulated engine takes one text or one list of token ids")
    return counts[0]


def count_prompts(prompt: Any, name: str) -> list[int]:
    """Tokens of each prompt: a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [count_tokens(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [len(prompt)]
        if all(isinstance(item, (str, list)) for item in prompt):
            return [count for item in prompt for count in count_prompts(item, name)]
    raise Refused(400, f"{name}: Input should be a text, token ids, or a list of either", name)


def count_pairs(body: dict[str, Any]) -> list[int]:
    """Tokens of each pair that a reranker reads: the query with one document."""
    query, documents = body.get("query"), body.get("documents")
    if not isinstance(query, str) or not isinstance(documents, list) or not documents:
        raise Refused(400, "a query and a list of documents are needed", "documents")
    if not all(isinstance(document, str) for document in documents):
        raise Refused(400, "documents: Input should be a valid list of texts", "documents")
    return [PAIR_TOKENS + count_tokens(query) + count_tokens(text) for text in documents]


# ------------------------------------------------------------------------------------------ replies


class Refused(Exception):
    """A request that is answered with an error object, as vLLM words and shapes it."""

    def __init__(self, status: int, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.param = param

    def response(self) -> web.Response:
        error = {
            "message": self.text,
            "type": "NotFoundError" if self.status == 404 else "BadRequestError",
            "param": self.param,
            "code": self.status,
        }
        return json_reply({"error": error}, self.status)


SIMULATED = {"x-servefit-simulated": "1"}


def json_reply(value: Any, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(
        body=body, status=status, content_type="application/json", headers=SIMULATED
    )


class Ask(msgspec.Struct):
    """A request for tokens, understood."""

    endpoint: str  # of `loadgen.api`
    model: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str  # how it will end: stop or length
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def generates(self) -> bool:
        return ENDPOINTS[self.endpoint].generates


ID_PREFIXES = {"chat": "chatcmpl-", "completions": "cmpl-", "responses": "resp_"}


def prefill(endpoint: str, model: str, prompt_tokens: int) -> Ask:
    """One sequence of which only the prompt is computed: to the engine, a request of one token."""
    return Ask(endpoint, model, prompt_tokens, output_tokens=1, finish_reason="stop")


def scores(body: dict[str, Any]) -> list[dict[str, Any]]:
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": 0.0}
        for index, text in enumerate(body["documents"])
    ]
    return results[: _whole(body, "top_n") or len(results)]


def _whole(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refused(400, f"{name}: Input should be a valid non-negative integer", name)
    return value


def check_model(body: Any, served: str) -> None:
    if not isinstance(body, dict):
        raise Refused(400, "Input should be a valid dictionary")
    asked_model = body.get("model") or served
    if asked_model != served:
        raise Refused(404, f"The model `{asked_model}` does not exist.", "model")


def too_long(prompt: int, longest: int) -> Refused:
    return Refused(
        400,
        f"This model's maximum context length is {longest} tokens. However, your request has "
        f"{prompt} input tokens. Please reduce the length of the input messages.",
        "input_tokens",
    )


def _count_input(body: dict[str, Any], endpoint: str) -> int:
    if endpoint == "chat":
        return count_messages(body.get("messages"))
    if endpoint == "completions":
        return _count_prompt(body.get("prompt"))
    text = body.get("input")
    return count_messages([{"content": text}] if isinstance(text, str) else text)


def understand(body: Any, endpoint: str, served: str, longest: int) -> Ask:
    """Raises Refused where vLLM would refuse."""
    check_model(body, served)
    if body.get("n") not in (None, 1):
        raise Refused(400, "n: the simulated engine gives one choice a request", "n")
    prompt = max(1, _count_input(body, endpoint))
    room = longest - prompt
    if room < 1:
        raise too_long(prompt, longest)
    most = _limit(body, endpoint, room)
    if most < 1:
        raise Refused(400, f"max_tokens must be at least 1, got {most}.", "max_tokens")
    if most > room:
        raise Refused(
            400,
            f"'max_tokens' or 'max_completion_tokens' is too large: {most}. This model's maximum "
            f"context length is {longest} tokens and your request has {prompt} input tokens "
            f"({most} > {longest} - {prompt}).",
            "max_tokens",
        )
    least = _whole(body, "min_tokens") or 0
    if least > most:
        raise Refused(400, f"min_tokens must be at most max_tokens={most}, got {least}.")
    ends_at = most if body.get("ignore_eos") else max(NATURAL_TOKENS, least)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused(400, "stream_options: Input should be a valid dictionary")
    return Ask(
        endpoint=endpoint,
        model=served,
        prompt_tokens=prompt,
        output_tokens=min(most, ends_at),
        finish_reason="stop" if ends_at < most else "length",
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
    )


def _limit(body: dict[str, Any], endpoint: str, room: int) -> int:
    """The most output tokens that were asked for; what vLLM takes where none were."""
    if endpoint == "responses":
        most = _whole(body, "max_output_tokens")
        return room if most is None else min(most, room)
    most = _whole(body, "max_completion_tokens") if endpoint == "chat" else None
    most = _whole(body, "max_tokens") if most is None else most
    if most is None:
        return room if endpoint == "chat" else min(room, _COMPLETIONS_MAX_TOKENS)
    return most


def _usage(ask: Ask, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": ask.prompt_tokens,
        "total_tokens": ask.prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class Chunks:
    """The events of one stream as bytes, shaped as vLLM shapes them, made before they are due."""

    def __init__(self, ask: Ask, reply_id: str, chunked: bool) -> None:
        self._ask = ask
        self._chunked = chunked
        self._chat = ask.endpoint == "chat"
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": ask.model,
        }
        usual = self._frame(self._token_event())
        self.token = b"" if ask.continuous_usage else usual  # of most tokens, where one is as all
        first = self._event({"role": "assistant", "content": ""}) if self._chat else b""
        self.first = self._frame(first + self._token_event(1))

    def token_number(self, done: int) -> bytes:
        return self._frame(self._token_event(done))

    def last(self, done: int) -> bytes:
        """The last token with its finish reason, the usage where it was asked for, `[DONE]`."""
        ask = self._ask
        text = "" if ask.finish_reason == "stop" else " tok"
        role = {"role": "assistant", "content": ""}
        events = self._event(role) if self._chat and done == 1 else b""
        events += self._token_event(done, text, ask.finish_reason)
        if ask.include_usage:
            events += _sse({**self._head, "choices": [], "usage": _usage(ask, done)})
        return self._frame(events + b"data: [DONE]\n\n")

    def _token_event(self, done: int = 0, text: str = " tok", reason: str | None = None) -> bytes:
        delta: Any = {"content": text} if self._chat else text
        return self._event(delta, reason, done)

    def _event(self, delta: Any, reason: str | None = None, done: int = 0) -> bytes:
        choice: dict[str, Any] = {"index": 0, "delta" if self._chat else "text": delta}
        choice |= {"logprobs": None, "finish_reason": reason}
        if not self._chat or reason:
            choice["stop_reason"] = None
        event = {**self._head, "choices": [choice]}
        if self._ask.continuous_usage:
            event["usage"] = _usage(self._ask, done)
        return _sse(event)

    def _frame(self, data: bytes) -> bytes:
        return _frame(data, self._chunked)


class ResponseEvents:
    """The same for a stream of the Responses API, whose events are numbered."""

    token = b""  # none is as another

    def __init__(self, ask: Ask, reply_id: str, chunked: bool) -> None:
        self._ask = ask
        self._chunked = chunked
        self._reply_id = reply_id
        self._item_id = f"msg_{reply_id.removeprefix('resp_')}"
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        kind = "response.output_text.delta"
        event = {"type": kind, **place, "delta": " tok", "logprobs": []}
        self._before = b"event: %b\ndata: %b" % (kind.encode(), msgspec.json.encode(event)[:-1])
        self._place = place
        self._opening = self._opened()
        self.first = self._frame(self._opening + self._token_event(1))

    def token_number(self, done: int) -> bytes:
        return self._frame(self._token_event(done))

    def last(self, done: int) -> bytes:
        """The last token, the ends of all that was opened, and the reply with its usage."""
        told = done - (self._ask.finish_reason == "stop")  # the token that ends a reply has no text
        events = self._opening if done == 1 else b""
        events += self._token_event(done) if told == done else b""
        text = {"type": "output_text", "text": " tok" * told, "annotations": []}
        item = self._item("completed", [text])
        reply = _response(self._ask, self._reply_id, [item])
        closing: _Events = (
            ("output_text.done", {**self._place, "text": text["text"]}),
            ("content_part.done", {**self._place, "part": text}),
            ("output_item.done", {"output_index": 0, "item": item}),
            ("completed", {"response": reply}),
        )
        return self._frame(events + _numbered(closing, _OPENING_EVENTS + told))

    def _opened(self) -> bytes:
        reply = {**_response(self._ask, self._reply_id, []), "status": "in_progress", "usage": None}
        part = {"type": "output_text", "text": "", "annotations": []}
        opening: _Events = (
            ("created", {"response": reply}),
            ("in_progress", {"response": reply}),
            ("output_item.added", {"output_index": 0, "item": self._item("in_progress", [])}),
            ("content_part.added", {**self._place, "part": part}),
        )
        assert len(opening) == _OPENING_EVENTS
        return _numbered(opening, 0)

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._item_id, "type": "message", "role": "assistant", "status": status,
            "content": content,
        }  # fmt: skip

    def _token_event(self, done: int) -> bytes:
        return b'%b,"sequence_number":%d}\n\n' % (self._before, _OPENING_EVENTS + done - 1)

    def _frame(self, data: bytes) -> bytes:
        return _frame(data, self._chunked)


_OPENING_EVENTS = 4
_Events = tuple[tuple[str, dict[str, Any]], ...]


def _numbered(events: _Events, first: int) -> bytes:
    lines = b""
    for number, (kind, members) in enumerate(events, first):
        event = {"type": f"response.{kind}", **members, "sequence_number": number}
        lines += b"event: response.%b\n%b" % (kind.encode(), _sse(event))
    return lines


def _response(ask: Ask, reply_id: str, output: list[Any]) -> dict[str, Any]:
    """A finished reply of the Responses API."""
    n, cut = ask.output_tokens, ask.finish_reason == "length"
    return {
        "id": reply_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": ask.model,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "output": output,
        "usage": {
            "input_tokens": ask.prompt_tokens,
            "output_tokens": n,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": ask.prompt_tokens + n,
        },
    }


def _frame(data: bytes, chunked: bool) -> bytes:
    """One chunk of HTTP/1.1's chunked coding; HTTP/1.0 has the connection's end instead."""
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def whole_reply(ask: Ask, reply_id: str) -> dict[str, Any]:
    n, chat = ask.output_tokens, ask.endpoint == "chat"
    text = " tok" * (n - 1 if ask.finish_reason == "stop" else n)
    if ask.endpoint == "responses":
        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
        return _response(ask, reply_id, [item])
    choice: dict[str, Any] = {"index": 0}
    choice["message" if chat else "text"] = (
        {"role": "assistant", "content": text, "tool_calls": []} if chat else text
    )
    choice |= {"logprobs": None, "finish_reason": ask.finish_reason, "stop_reason": None}
    return {
        "id": reply_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [choice],
        "usage": {**_usage(ask, n), "prompt_tokens_details": None},
    }
