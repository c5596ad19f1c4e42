"""The OpenAI-compatible API: what goes into a request and what a reply means. No I/O.

What is decoded is decoded by msgspec into typed structs that skip all other members: 0.5 µs for a
chunk of vLLM's, a sixth of what looking for its members in the bytes costs in Python.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from agent.model import UsageError

DONE = b"[DONE]"

# A prompt is a text, token ids, or the messages of a conversation, each {role, content}.
Prompt = str | list[int] | list[dict[str, str]]
TEXT, TOKEN_IDS, MESSAGES = "a text", "token ids", "messages"


class Dialect(msgspec.Struct, frozen=True):
    """Which optional members the server takes; found out by the first probe."""

    limit_member: str = "max_tokens"  # or max_completion_tokens, or max_output_tokens
    ignore_eos: bool = True  # ignore_eos and min_tokens, so that the output has the asked length
    usage_in_stream: bool = True  # stream_options.include_usage


# Tried in this order until the server accepts one.
_DIALECTS = (
    Dialect(),
    Dialect(ignore_eos=False),
    Dialect(limit_member="max_completion_tokens", ignore_eos=False),
    Dialect(ignore_eos=False, usage_in_stream=False),
)
# The Responses API ends every stream with the usage, and knows no option for it.
_RESPONSES_DIALECTS = (
    Dialect(limit_member="max_output_tokens", usage_in_stream=False),
    Dialect(limit_member="max_output_tokens", usage_in_stream=False, ignore_eos=False),
)


class Endpoint(msgspec.Struct, frozen=True):
    """What tells one endpoint from the others."""

    path: str
    operation: str  # gen_ai.operation.name of its spans
    takes: tuple[str, ...]  # kinds of prompts
    dialects: tuple[Dialect, ...] = _DIALECTS
    generates: bool = True  # False: a prompt is computed, and that is all; never streamed
    output_min: int = 1  # the fewest output tokens that may be asked for
    sequences: tuple[int, ...] = (1,)  # as how many of its own a server counts one request


RERANK_QUERY_WORDS = 3
RERANK_DOCUMENTS = 8

ENDPOINTS: dict[str, Endpoint] = {
    "chat": Endpoint("/v1/chat/completions", "chat", (TEXT, MESSAGES)),
    "completions": Endpoint("/v1/completions", "text_completion", (TEXT, TOKEN_IDS)),
    # OpenAI refuses max_output_tokens under 16.
    "responses": Endpoint(
        "/v1/responses", "chat", (TEXT, MESSAGES), _RESPONSES_DIALECTS, output_min=16
    ),
    "embeddings": Endpoint(
        "/v1/embeddings", "embeddings", (TEXT, TOKEN_IDS), (Dialect(),), generates=False
    ),
    # A cross-encoder reads the query with each document; an embedding model reads it by itself.
    "rerank": Endpoint(
        "/v1/rerank",
        "rerank",
        (TEXT,),
        (Dialect(),),
        generates=False,
        sequences=(RERANK_DOCUMENTS, RERANK_DOCUMENTS + 1),
    ),
}


def body(
    endpoint: str,
    model: str,
    prompt: Prompt,
    max_tokens: int,
    *,
    stream: bool,
    dialect: Dialect,
) -> bytes:
    """The JSON of one request. Raises UsageError where the endpoint takes no such prompt.

    Where nothing is generated, `max_tokens`, `stream` and `dialect` have no meaning.
    """
    members = {"model": model, **_prompt_members(endpoint, prompt)}
    if ENDPOINTS[endpoint].generates:
        members[dialect.limit_member] = max_tokens
        if dialect.ignore_eos:
            members["ignore_eos"] = True
            members["min_tokens"] = max_tokens
        if stream:
            members["stream"] = True
            if dialect.usage_in_stream:
                members["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(members)


def _prompt_members(endpoint: str, prompt: Prompt) -> dict[str, Any]:
    kind = _kind(prompt)
    takes = ENDPOINTS[endpoint].takes
    if kind not in takes:
        raise UsageError(
            f"--endpoint {endpoint} takes {' or '.join(takes)} as a prompt, not {kind}"
        )
    if endpoint == "chat":
        return {"messages": prompt if kind == MESSAGES else [{"role": "user", "content": prompt}]}
    if endpoint == "completions":
        return {"prompt": prompt}
    if endpoint == "responses":
        return {"input": prompt, "store": False}  # OpenAI would keep every reply for 30 days
    if endpoint == "embeddings":
        return {"input": prompt}
    return _query_and_documents(str(prompt))


def _kind(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return TEXT
    return TOKEN_IDS if prompt and isinstance(prompt[0], int) else MESSAGES


def _query_and_documents(text: str) -> dict[str, Any]:
    """The first three words are the query, the others the documents, eight equal parts of them.

    A reranker may read the query with every document, and counts it as often: with a fixed number
    of documents the count stays a constant plus the words, as `workload` needs it.
    """
    words = text.split(" ")
    query, rest = words[:RERANK_QUERY_WORDS], words[RERANK_QUERY_WORDS:] or words
    while len(rest) < RERANK_DOCUMENTS:
        rest = rest + rest
    edges = [i * len(rest) // RERANK_DOCUMENTS for i in range(RERANK_DOCUMENTS + 1)]
    documents = [" ".join(rest[low:high]) for low, high in pairwise(edges)]
    return {"query": " ".join(query), "documents": documents}


# ------------------------------------------------------------------------------------- replies


# No prompt and no reply is longer; a count beyond it would not fit the recorder's columns.
Count = Annotated[int, msgspec.Meta(le=2**31 - 1)]


class _Details(msgspec.Struct):
    reasoning_tokens: Count | None = None


class Usage(msgspec.Struct):
    """What the server counted, by its names in chat and completions or in the Responses API."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    output_tokens_details: _Details | None = None
    total_tokens: Count | None = None

    @property
    def prompt(self) -> int | None:
        """Some rerankers say only the total, which is all prompt."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        if self.input_tokens is not None:
            return self.input_tokens
        return self.total_tokens if self.output is None else None

    @property
    def output(self) -> int | None:
        return self.output_tokens if self.completion_tokens is None else self.completion_tokens

    @property
    def reasoning(self) -> int:
        details = self.completion_tokens_details or self.output_tokens_details
        return (details.reasoning_tokens or 0) if details else 0


class _Part(msgspec.Struct):
    """A delta or a message; `text` of a plain completion stands in the choice itself."""

    content: str | list[Any] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Part | None = None
    message: _Part | None = None
    text: str | None = None
    finish_reason: str | None = None


class Reply(msgspec.Struct):
    """One streamed chunk of chat and completions."""

    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None

    @property
    def error_text(self) -> str:
        """The server's words, of a reply that says it failed."""
        return _words(self.error)


class _Response(msgspec.Struct):
    """The state of a reply, as the first and the last event tell it."""

    usage: Usage | None = None
    error: Any = None


class Event(Reply):
    """One event of the Responses API."""

    type: str = ""
    delta: str | None = None
    response: _Response | None = None
    message: Any = None  # of an event that is an error itself

    @property
    def error_text(self) -> str:
        return _words(self.error or (self.response and self.response.error) or self.message)


def _words(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message") or error.get("type")
    return str(error or "error")


class Whole(Reply):
    """A reply that is not streamed."""

    output: list[Any] | None = None  # the Responses API
    status: Any = None
    data: list[msgspec.Raw] | None = None  # embeddings
    results: list[msgspec.Raw] | None = None  # rerank

    @property
    def is_answer(self) -> bool:
        if self.output is not None:
            return self.status in (None, "completed", "incomplete")
        return bool(self.choices or self.data or self.results)


# What a chunk carries, as bits.
ANSWER, REASONING, FINISH, FAILED = 1, 2, 4, 8
TOKEN = ANSWER | REASONING

# Events of the Responses API; a stream cut short by max_output_tokens is complete.
_EVENTS = {
    "response.output_text.delta": ANSWER,
    "response.refusal.delta": ANSWER,
    "response.function_call_arguments.delta": ANSWER,
    "response.custom_tool_call_input.delta": ANSWER,
    "response.mcp_call_arguments.delta": ANSWER,
    "response.code_interpreter_call_code.delta": ANSWER,
    "response.reasoning_text.delta": REASONING,
    "response.reasoning_summary_text.delta": REASONING,
    "response.completed": FINISH,
    "response.incomplete": FINISH,
    "response.failed": FAILED,
    "error": FAILED,
}


def meaning(reply: Reply) -> int:
    """ANSWER, REASONING and FINISH as far as the chunk carries them; FAILED alone.

    A role-only or empty delta carries nothing. Content, refusals and tool calls are an answer.
    """
    if reply.error is not None:
        return FAILED
    if isinstance(reply, Event):
        bits = _EVENTS.get(reply.type, 0)
        return bits if reply.delta or not bits & TOKEN else 0
    bits = 0
    for choice in reply.choices or ():
        part = choice.delta or choice.message
        if choice.text:
            bits |= ANSWER
        if part is not None:
            if part.content:
                bits |= ANSWER if isinstance(part.content, str) else _of_parts(part.content)
            if part.refusal or part.tool_calls or part.function_call:
                bits |= ANSWER
            if part.reasoning_content or part.reasoning:
                bits |= REASONING
        if choice.finish_reason:
            bits |= FINISH
    return bits


def _of_parts(parts: list[Any]) -> int:
    """Content as a list: Mistral's thinking parts are reasoning, an empty text is nothing."""
    bits = 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            bits |= REASONING
        elif part and not (kind == "text" and not part.get("text")):
            bits |= ANSWER
    return bits


def text(reply: Reply) -> str:
    """The generated text of a chunk or a whole reply: answer, reasoning, arguments of calls."""
    return "".join(texts(reply))


def texts(reply: Reply) -> list[str]:
    """The same in its parts, some of them empty."""
    if isinstance(reply, Event):
        return [reply.delta or ""]
    words = [_flat(reply.output)] if isinstance(reply, Whole) else []
    for choice in reply.choices or ():
        words.append(choice.text or "")
        part = choice.delta or choice.message
        if part is None:
            continue
        words += (part.reasoning_content or part.reasoning or "", _flat(part.content))
        words += (part.refusal or "", *(_flat(call) for call in part.tool_calls or ()))
    return words


def _flat(value: Any) -> str:
    """Strings of nested content: Mistral's parts, items of a response, arguments of a call."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_flat(item) for item in value)
    if isinstance(value, dict):
        members = ("text", "thinking", "summary", "content", "function", "arguments")
        return "".join(_flat(value[name]) for name in members if name in value)
    return ""


_chunks = msgspec.json.Decoder(Reply)
_events = msgspec.json.Decoder(Event)
_wholes = msgspec.json.Decoder(Whole | list[msgspec.Raw])


def decode(data: bytes) -> Reply:
    """A streamed chunk or event. Raises ValueError where `data` is not JSON of its shape."""
    try:
        reply = _chunks.decode(data)
        return reply if reply.choices is not None else _events.decode(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def decode_whole(data: bytes) -> Whole:
    """A reply that was not streamed; SGLang's rerank is a bare list. Raises ValueError."""
    try:
        value = _wholes.decode(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value if isinstance(value, Whole) else Whole(results=value)


_TITLE = re.compile(rb"<title[^>]*>(.*?)</title", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(rb"<[^>]*>?")


def error_message(data: bytes) -> str:
    """What a refusing server says, in one line; the start of the body where it is no JSON.

    A proxy's page is HTML: its title, or its words without the tags.
    """
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        if data.lstrip()[:1] == b"<":
            title = _TITLE.search(data[:4000])
            data = title[1] if title else _TAG.sub(b" ", data[:4000])
        return " ".join(data[:200].decode("utf-8", "replace").split())
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    if isinstance(value, dict):
        value = value.get("message") or value
    return " ".join(str(value).split())[:300]
