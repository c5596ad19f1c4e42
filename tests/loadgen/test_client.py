"""The socket edge against real loopback sockets, for every stream met in the wild."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import socket
import ssl
import weakref
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import monotonic_ns
from typing import Any, NamedTuple

import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from loadgen import client, sse
from loadgen.client import (
    Connection,
    Dialer,
    Exchange,
    connect_error_kind,
    parse_url,
    request_head,
    tls_context,
    wire,
)
from loadgen.usual import Usual
from tests.loadgen.scripted import (
    CLOSE,
    DONE,
    END,
    HANG,
    RESET,
    Line,
    Script,
    Server,
    Step,
    answer,
    chunk,
    delta,
    frame,
    head,
    serving,
    stream,
    usage,
    usage_chunk,
    whole,
)

STREAMS_DIR = Path(__file__).parents[1] / "golden" / "streams"

Play = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=["uvloop", "asyncio"])
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    """Runs a coroutine on the loop that the program uses, and on the standard one."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


def ordered(exchange: Exchange) -> bool:
    """due ≤ sent ≤ first ≤ … ≤ last ≤ end, as far as they happened."""
    instants = [exchange.due_ns, exchange.sent_ns, *exchange.stamps, exchange.end_ns]
    return all(a <= b for a, b in pairwise(ns for ns in instants if ns))


# ------------------------------------------------------------------- every stream, at every cut


class Seen(NamedTuple):
    """What an exchange must say; the counts of a stream of `x`, finished, by default."""

    error: str | None = None
    stamps: int = 3
    finished: bool = True
    status: int = 200
    prompt: int = 7
    output: int = 3
    reasoning: int = 0
    answered: bool = True  # did a token of an answer come?
    counts: tuple[int, ...] = ()
    reused: bool = True  # may the connection carry another request?


def seen(exchange: Exchange, connection: Connection) -> Seen:
    return Seen(
        exchange.error,
        len(exchange.stamps),
        exchange.finished,
        exchange.status,
        exchange.prompt_tokens,
        exchange.output_tokens,
        exchange.reasoning_tokens or exchange.reasoning_chunks,
        exchange.answer_ns > 0,
        tuple(exchange.token_counts),
        connection.usable,
    )


X = delta(content="x")
GOOD = b"".join((delta(role="assistant", content=""), X, X, X, delta("stop"), usage_chunk(7, 3)))
NO_USAGE = Seen(prompt=-1, output=-1)
NOTHING = NO_USAGE._replace(stamps=0, finished=False, answered=False)
BODY = GOOD + DONE


def streamed(*events: bytes, first: bytes | None = None) -> bytes:
    """Events in chunks of their own."""
    return (head() if first is None else first) + b"".join(map(chunk, events)) + END


def with_length(body: bytes, *lines: str, kind: str | None = "text/event-stream") -> bytes:
    return head("200 OK", f"Content-Length: {len(body)}", *lines, kind=kind, chunked=False) + body


def deflated(body: bytes) -> bytes:
    return zlib.compress(body)


def gzipped(*events: bytes) -> bytes:
    """A chunk an event, as a proxy compresses a stream: flushed after each."""
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in events]
    first = head("200 OK", "Content-Encoding: gzip")
    return streamed(*pieces, packer.flush(), first=first)


def event(kind: str, **members: Any) -> bytes:
    """An event of the Responses API, with its line `event:`."""
    return b"event: %b\n" % kind.encode() + frame({"type": kind, **members})


def response(status: str, **members: Any) -> bytes:
    """An event that tells the state of the whole reply."""
    return event(f"response.{status}", response={"status": status, **members})


TOOL = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{"}}]
ERROR = frame({"error": {"message": "out of memory", "code": 500}})
HTTP_1_0 = head(version="1.0", chunked=False)
AZURE = frame({"choices": [], "prompt_filter_results": [], "id": "", "model": ""})
TEXT_DELTA = event("response.output_text.delta", delta="x", item_id="m", sequence_number=4)
THOUGHT = event("response.reasoning_text.delta", delta="r", item_id="r")
ARGUMENTS = event("response.function_call_arguments.delta", delta="{", item_id="f")
OPENED = (
    response("created", usage=None), response("in_progress"),
    event("response.output_item.added", item={"type": "message", "content": []}),
    event("response.content_part.added", part={"type": "output_text", "text": ""}),
    event("response.output_text.delta", delta=""),
)  # fmt: skip
COUNTED = {
    "input_tokens": 7, "output_tokens": 3, "total_tokens": 10,
    "output_tokens_details": {"reasoning_tokens": 0},
}  # fmt: skip
CLOSED = event("response.output_text.done", text="xxx")


def crlf(*events: bytes) -> tuple[bytes, ...]:
    return tuple(each.replace(b"\n", b"\r\n") for each in events)


PLAIN = (delta(role="assistant", content=""), X, X, X, delta("stop"), usage_chunk(7, 3), DONE)

# name → (events, what must be seen). Every stream that is known to exist.
STREAMS: dict[str, tuple[tuple[bytes, ...], Seen]] = {
    "plain": (PLAIN, Seen()),
    "CRLF": (crlf(*PLAIN), Seen()),
    "CR": (tuple(each.replace(b"\n", b"\r") for each in PLAIN), Seen()),
    "no space": (tuple(each.replace(b"data: ", b"data:") for each in PLAIN), Seen()),
    "comments": (tuple(b": ping\n\nevent: x\n: y\n" + each for each in PLAIN), Seen()),
    "comments with CRLF": (crlf(*(b": ping\n\n" + each for each in PLAIN)), Seen()),
    "two events in one": ((X + X, X + delta("stop"), usage_chunk(7, 3) + DONE), Seen()),
    "utf-8": (
        (delta(content="日本"), delta("stop", content="é🙂"), DONE), NO_USAGE._replace(stamps=2)
    ),
    "role-only and empty deltas": (
        (delta(role="assistant"), delta(), delta(content=""), X, delta("stop"), DONE),
        NO_USAGE._replace(stamps=1),
    ),
    "reasoning_content": (
        (delta(reasoning_content="r"), delta(reasoning_content="r"), X, delta("stop"),
         usage_chunk(7, 9, 6), DONE), Seen(output=9, reasoning=6),
    ),
    "reasoning": (
        (delta(reasoning="r"), delta(reasoning="r"), X, delta("stop"), DONE),
        NO_USAGE._replace(reasoning=2),
    ),
    "reasoning by both names": (
        (*[delta(reasoning="r", reasoning_content="r")] * 2, X, delta("stop"), DONE),
        NO_USAGE._replace(reasoning=2),
    ),
    "reasoning without an answer": (
        (*[delta(reasoning="r")] * 3, delta("length"), DONE),
        NO_USAGE._replace(reasoning=3, answered=False),
    ),
    "tool calls": (
        (delta(tool_calls=TOOL), delta(tool_calls=TOOL), delta("tool_calls"), DONE),
        NO_USAGE._replace(stamps=2),
    ),
    "usage in the last chunk": (
        (X, X, delta("stop", usage(7, 3), content="x"), DONE),
        Seen(counts=(1, 1, 3)),  # not their sum: the recorder shares the total out
    ),
    "usage in every chunk": (
        (delta(None, usage(7, 0), role="assistant"), delta(None, usage(7, 1), content="x"),
         delta(None, usage(7, 4), content="xyz"), delta("stop", usage(7, 4)), DONE),
        Seen(stamps=2, output=4, counts=(1, 3)),
    ),
    "usage never": ((X, X, X, delta("stop"), DONE), NO_USAGE),
    "Azure": ((AZURE, X, X, X, delta("stop"), DONE), NO_USAGE),
    "an error in the middle": (
        (X, X, ERROR, DONE),
        NO_USAGE._replace(error="stream_error", stamps=2, finished=False, reused=False),
    ),
    "an error after the finish_reason": (
        (X, delta("stop"), ERROR, DONE),
        NO_USAGE._replace(error="stream_error", stamps=1, reused=False),
    ),
    "no [DONE], a finish_reason": (PLAIN[:-1], Seen()),
    "neither": (
        (X, X), NO_USAGE._replace(error="cut", stamps=2, finished=False, reused=False)
    ),
    "nothing at all": ((), NOTHING._replace(error="cut", reused=False)),
    "[DONE] without a newline": ((*PLAIN[:-1], b"data: [DONE]"), Seen()),
    "only [DONE] tells the end": ((X, X, X, DONE), NO_USAGE),
    "more after [DONE]": ((*PLAIN, X, ERROR, DONE), Seen()),
    "a broken frame, then [DONE]": (
        (X, b'data: {"choices":[{"del\n\n', X, DONE),
        NO_USAGE._replace(error="bad_stream", stamps=1, finished=False, reused=False),
    ),
    "cut inside a frame": (
        (X, X, b'data: {"choices":[{"del'),
        NO_USAGE._replace(error="bad_stream", stamps=2, finished=False, reused=False),
    ),
    "responses": (
        (*OPENED, TEXT_DELTA, TEXT_DELTA, TEXT_DELTA, CLOSED, response("completed", usage=COUNTED)),
        Seen(),
    ),
    "responses that reason": (
        (*OPENED, THOUGHT, event("response.reasoning_summary_text.delta", delta="r"), TEXT_DELTA,
         response("completed", usage={**COUNTED, "output_tokens_details": {"reasoning_tokens": 2}}),
         DONE), Seen(reasoning=2),
    ),
    "responses that call": (
        (*OPENED, ARGUMENTS, ARGUMENTS, ARGUMENTS, response("completed", usage=COUNTED)), Seen(),
    ),
    "responses at max_output_tokens": (
        (*OPENED, TEXT_DELTA, TEXT_DELTA, TEXT_DELTA, response("incomplete", usage=COUNTED)),
        Seen(),
    ),
    "responses that failed": (
        (*OPENED, TEXT_DELTA, response("failed", error={"code": "x", "message": "no memory"})),
        NO_USAGE._replace(error="stream_error", stamps=1, finished=False, reused=False),
    ),
    "responses with an error": (
        (*OPENED, THOUGHT, event("error", code="x", message="no memory")),
        NO_USAGE._replace(error="stream_error", stamps=1, finished=False, reasoning=1,
                          answered=False, reused=False),
    ),
    "responses cut": (
        (*OPENED, TEXT_DELTA, CLOSED),
        NO_USAGE._replace(error="cut", stamps=1, finished=False, reused=False),
    ),
}  # fmt: skip

# name → (bytes of a reply of these events, then the connection is closed?)
FRAMINGS: dict[str, tuple[Callable[..., bytes], bool]] = {
    "an event a chunk": (streamed, False),
    "one chunk": (lambda *events: streamed(*filter(None, (b"".join(events),))), False),
    "sixteen bytes a chunk": (
        lambda *events: streamed(*cut_up(b"".join(events), 16)), False
    ),
    "content-length": (lambda *events: with_length(b"".join(events)), False),
    "until the connection closes": (lambda *events: HTTP_1_0 + b"".join(events), True),
    "gzip": (gzipped, False),
}  # fmt: skip


def cut_up(data: bytes, step: int) -> list[bytes]:
    return [data[i : i + step] for i in range(0, len(data), step)]


# name → (bytes, then the connection is closed?, what must be seen)
REPLIES: dict[str, tuple[bytes, bool, Seen]] = {
    **{name: (streamed(*events), False, told) for name, (events, told) in STREAMS.items()},
    "content-length": (with_length(BODY), False, Seen()),
    "close-delimited, HTTP/1.0": (HTTP_1_0 + BODY, True, Seen(reused=False)),
    "close-delimited, HTTP/1.1": (head(chunked=False) + BODY, True, Seen(reused=False)),
    "HTTP/1.0 kept alive": (
        head("200 OK", "Connection: keep-alive", f"Content-Length: {len(BODY)}",
             version="1.0", chunked=False) + BODY, False, Seen(),
    ),
    "connection: close": (
        head("200 OK", "Connection: close") + chunk(BODY) + END, True, Seen(reused=False)
    ),
    "one byte a chunk": (streamed(*cut_up(BODY, 1)), False, Seen()),
    "no final chunk": (
        head() + chunk(X) + chunk(X), True,
        NO_USAGE._replace(error="cut", stamps=2, finished=False, reused=False),
    ),
    "no final chunk after [DONE]": (head() + chunk(BODY), True, Seen(reused=False)),
    "no final chunk after the finish_reason": (
        head() + chunk(GOOD), True, Seen(error="cut", reused=False)
    ),
    "closed without a word": (b"", True, NOTHING._replace(error="reset", status=0, reused=False)),
    "gzip that nobody asked for": (
        with_length(gzip.compress(BODY), "Content-Encoding: gzip"), False, Seen()
    ),
    "deflate in chunks": (
        streamed(deflated(BODY), first=head("200 OK", "Content-Encoding: deflate")), False, Seen()
    ),
    "br that nobody asked for": (
        with_length(b"\x0b\x02\x80", "Content-Encoding: br"), False,
        NOTHING._replace(error="bad_http", reused=False),
    ),
    "broken gzip": (
        with_length(b"no gzip at all", "Content-Encoding: gzip"), False,
        NOTHING._replace(error="bad_http", reused=False),
    ),
    "429": (
        whole("429 Too Many Requests", b'{"error":{"message":"slow down"}}', "Retry-After: 2"),
        False, NOTHING._replace(error="http_429", status=429),
    ),
    "503 in HTML": (
        whole("503 Service Unavailable", b"<h1>busy</h1>", "Retry-After: 1", kind="text/html"),
        False, NOTHING._replace(error="http_503", status=503),
    ),
    "500 as a stream": (
        head("500 Oops") + chunk(ERROR) + END, False,
        NOTHING._replace(error="http_500", status=500),
    ),
    "204": (
        b"HTTP/1.1 204 No Content\r\n\r\n", False, NOTHING._replace(error="http_204", status=204)
    ),
    "interim replies": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Encoding: gzip\r\n\r\n"
        + streamed(BODY), False, Seen(),
    ),
    "switching protocols": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", False,
        NOTHING._replace(error="bad_http", status=101, reused=False),
    ),
    "not HTTP": (
        b"SSH-2.0-OpenSSH_9.6\r\n", False,
        NOTHING._replace(error="bad_http", status=0, reused=False),
    ),
    "a broken chunk": (
        head() + chunk(X) + b"zz\r\n", False,
        NO_USAGE._replace(error="bad_http", stamps=1, finished=False, reused=False),
    ),
    "not streamed although asked": (answer(7, 3), False, Seen(stamps=0, answered=False)),
    "not streamed and not declared": (
        with_length(b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}', kind=None),
        False, NO_USAGE._replace(stamps=0, answered=False),
    ),
    "streamed and not declared": (with_length(BODY, kind=None), False, Seen()),
    "streamed as text": (with_length(b": hi\n\n" + BODY, kind="text/plain"), False, Seen()),
    "HTML": (
        whole("200 OK", b"<html>log in</html>", kind="text/html"), False,
        NOTHING._replace(error="bad_reply", reused=False),
    ),
    "JSON of something else": (
        whole("200 OK", b'{"hello":1}'), False, NOTHING._replace(error="bad_reply"),
    ),
    "an error with status 200": (
        whole("200 OK", b'{"error":{"message":"no"}}'), False,
        NOTHING._replace(error="stream_error"),
    ),
    "a response that is not streamed": (
        whole("200 OK", json.dumps({
            "object": "response", "status": "incomplete", "error": None,
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
            "usage": {**COUNTED, "output_tokens_details": {"reasoning_tokens": 1}},
        }).encode()), False, Seen(stamps=0, answered=False, reasoning=1),
    ),
    "a response that failed": (
        whole("200 OK", b'{"status":"failed","output":[],"error":{"message":"no memory"}}'), False,
        NOTHING._replace(error="stream_error"),
    ),
    "a response that is only queued": (
        whole("200 OK", b'{"status":"queued","output":[]}'), False,
        NOTHING._replace(error="bad_reply"),
    ),
    "embeddings": (
        whole("200 OK", b'{"data":[{"embedding":[0.5,-1e-3]}],"usage":{"prompt_tokens":7}}'),
        False, Seen(stamps=0, answered=False, output=0),
    ),
    "scores": (
        whole("200 OK", b'{"results":[{"relevance_score":0.5}],"usage":{"total_tokens":7}}'),
        False, Seen(stamps=0, answered=False, output=0),
    ),
    "scores as a list": (
        whole("200 OK", b'[{"score":0.5,"index":0}]'), False,
        NO_USAGE._replace(stamps=0, answered=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_over_a_real_socket(name: str, play: Play) -> None:
    data, closes, expected = REPLIES[name]

    async def main() -> None:
        async with serving([data, CLOSE] if closes else [data]) as server:
            line = Line(server)
            exchange = await line.ask()
            assert line.connection is not None
            assert seen(exchange, line.connection) == expected
            assert ordered(exchange)
            assert exchange.sent_ns > 0
            line.close()

    play(main())


# Replies of real servers, as they came over the wire → what must be seen.
RECORDED = {
    "llama.cpp-b11434-chat.http": Seen(prompt=4),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_reply(name: str, play: Play) -> None:
    data = (STREAMS_DIR / name).read_bytes()

    async def main() -> None:
        async with serving([data]) as server:
            line = Line(server)
            exchange = await line.ask()
            assert line.connection is not None
            assert seen(exchange, line.connection) == RECORDED[name]
            line.close()

    play(main())


class FakeTransport(asyncio.Transport):
    """Takes everything, and forgets it."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.high: int | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return object() if name == "ssl_object" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


def fed(
    pieces: Sequence[bytes], *, end: str = "", is_stream: bool = True, usual: bool = True
) -> Seen:
    """What a connection makes of the pieces, without a socket; then its `end` comes."""
    ended: list[Exchange] = []
    connection = Connection(lambda _, exchange: ended.append(exchange))
    connection.connection_made(FakeTransport())
    connection.start(Exchange(0, monotonic_ns()), b"x", 60.0, stream=is_stream)
    if not usual:
        connection._usual = Unlearned()
    for piece in pieces:
        if piece and not connection._transport.is_closing():  # type: ignore[union-attr]
            connection.data_received(piece)
    if end == CLOSE:
        connection.eof_received()
    elif end == RESET:
        connection.connection_lost(ConnectionResetError(errno.ECONNRESET, "reset by peer"))
    elif end == HANG:
        connection._timed_out()
    assert len(ended) == 1
    assert ordered(ended[0])
    result = seen(ended[0], connection)
    if end != RESET:
        connection.connection_lost(None)
    assert len(ended) == 1
    return result._replace(reused=result.reused and not end)


class Unlearned(Usual):
    """Knows no chunk: every one is decoded."""

    def fits(self, data: bytes) -> bool:
        return False


def cut_everywhere(data: bytes, end: str, expected: Seen) -> None:
    assert fed([data], end=end) == expected
    assert fed(cut_up(data, 1), end=end) == expected
    for cut in range(1, len(data)):
        assert fed([data[:cut], data[cut:]], end=end) == expected, cut


@pytest.mark.parametrize("name", REPLIES)
async def test_a_reply_cut_at_every_position(name: str) -> None:
    data, closes, expected = REPLIES[name]
    cut_everywhere(data, CLOSE if closes else "", expected)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_in_every_framing_cut_at_every_position(name: str, framing: str) -> None:
    events, expected = STREAMS[name]
    framed, closes = FRAMINGS[framing]
    if closes:
        expected = expected._replace(reused=False)
    cut_everywhere(framed(*events), CLOSE if closes else "", expected)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
@pytest.mark.parametrize(("end", "kind"), [(RESET, "reset"), (HANG, "timeout"), (CLOSE, "cut")])
async def test_an_end_after_some_tokens_cut_at_every_position(
    tokens: int, end: str, kind: str
) -> None:
    data = head() + chunk(X) * tokens
    expected = NOTHING._replace(error=kind, stamps=tokens, answered=tokens > 0, reused=False)
    cut_everywhere(data, end, expected)


@pytest.mark.parametrize(("end", "kind"), [(RESET, "reset"), (HANG, "timeout"), (CLOSE, "reset")])
async def test_an_end_at_every_position_of_the_head(end: str, kind: str) -> None:
    data = head()
    for cut in range(len(data) - 1):
        told = fed([data[:cut]], end=end)
        assert (told.error, told.stamps, told.reused) == (kind, 0, False), cut


async def test_the_text_of_a_reply_does_not_depend_on_the_cuts() -> None:
    events, _ = STREAMS["utf-8"]
    data = streamed(*events)
    for cut in range(len(data)):
        exchange = Exchange(0, monotonic_ns())
        exchange.texts = []
        connection = Connection(lambda *_: None)
        connection.connection_made(FakeTransport())
        connection.start(exchange, b"x", 60.0, stream=True)
        for piece in (data[:cut], data[cut:]):
            if piece:
                connection.data_received(piece)
        assert "".join(exchange.texts) == "日本é🙂"
        connection.connection_lost(None)


# What a server might send as one more chunk: nearly always the one before with another token.
MEMBERS = st.sampled_from(["content", "reasoning_content", "reasoning", "refusal", "role"])
USUAL = '{"id":"c","choices":[{"index":0,"delta":{"MEMBER":"TOKEN"},"finish_reason":null}]}'
UNUSUAL = [
    USUAL.replace('"c"', '"d"'),
    USUAL.replace("null", '"stop"'),
    USUAL.replace("]}", '],"usage":{"completion_tokens":4}}'),
    USUAL.replace("[{", '[{"delta":{"content":"x"}},{'),
    USUAL.replace('"delta":{', '"delta":{"content":"TOKEN",'),
    USUAL.replace("null", "null\r"),
    '{"choices":[{"text":"TOKEN"}]}', '{"error":"TOKEN"}', "TOKEN", "[DONE]",
    '{"type":"response.output_text.delta","delta":"TOKEN"}',
]  # fmt: skip
TOKENS = st.one_of(
    st.sampled_from(["x", " a", "c", "0x7", ":", "\\n", '\\"', "é"]),
    st.sampled_from(["", '"', "\\", "\n", "\r", "\x00", "\x7f", "}", '","x":"', '"},"x":{"']),
    st.text(max_size=3),
)
FRAME_ENDS = st.sampled_from(["\n\n"] * 12 + ["\r\n\r\n", "\n", ""])


@st.composite
def frames(draw: st.DrawFn) -> list[bytes]:
    member = draw(MEMBERS)

    def one() -> bytes:
        usual = draw(st.integers(0, 9)) < 7
        template = USUAL if usual else draw(st.sampled_from(UNUSUAL))
        text = template.replace("MEMBER", member if usual else draw(MEMBERS))
        text = f"data: {text.replace('TOKEN', draw(TOKENS))}{draw(FRAME_ENDS)}"
        return text.encode("utf-8", "surrogatepass")

    return [one() for _ in range(draw(st.integers(1, 12)))]


@settings(max_examples=300)
@given(frames(), st.booleans(), st.lists(st.integers(0, 900), max_size=3))
def test_what_needs_no_decoding_means_what_it_means_decoded(
    parts: list[bytes], whole_frames: bool, cuts: list[int]
) -> None:
    """The same exchange with and without the short way, whatever comes and however it is cut."""
    data = streamed(*parts)
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    pieces = [data[a:b] for a, b in pairwise(edges)]
    if whole_frames:  # each in a read of its own: the short way's own case
        pieces = [head(), *map(chunk, parts), END]

    async def both() -> None:
        assert fed(pieces) == fed(pieces, usual=False)

    asyncio.run(both())


async def test_the_short_way_is_taken() -> None:
    """Else the test above would compare nothing."""
    ended: list[Exchange] = []
    connection = Connection(lambda _, exchange: ended.append(exchange))
    connection.connection_made(FakeTransport())
    connection.start(Exchange(0, monotonic_ns()), b"x", 60.0, stream=True)
    decoded: list[bytes] = []
    events = connection._events
    feed = events.feed

    class Spy(sse.Decoder):
        def feed(self, data: bytes) -> list[bytes]:
            decoded.append(data)
            return feed(data)

    connection._events = Spy()
    thoughts = [delta(reasoning="a"), delta(reasoning="b"), delta(reasoning="é")]
    answers = [delta(content=text) for text in ("c", "d", '"', "e", " f")]
    for piece in (head(), *map(chunk, (*thoughts, *answers, delta("stop"), DONE)), END):
        connection.data_received(piece)
    (exchange,) = ended
    assert (len(exchange.stamps), exchange.reasoning_chunks) == (8, 3)
    assert decoded == [thoughts[0], thoughts[2], answers[0], answers[2], delta("stop"), DONE]


async def test_a_stream_where_none_was_asked_is_a_stream() -> None:
    assert fed([streamed(GOOD, DONE)], is_stream=False) == Seen()


# ------------------------------------------------------------------------------------ how it ends


def ask(script: Script, *, timeout_s: float = 5.0, body: bytes = b"{}") -> Callable[[], Any]:
    async def main() -> tuple[Exchange, Server]:
        async with serving(script) as server:
            line = Line(server)
            exchange = await line.ask(timeout_s=timeout_s, body=body)
            assert ordered(exchange)
            line.close()
            return exchange, server

    return main


def test_reset_after_two_tokens(play: Play) -> None:
    exchange, _ = play(ask([head(), chunk(X), 0.02, chunk(X), 0.02, RESET])())
    assert (exchange.error, exchange.status, len(exchange.stamps)) == ("reset", 200, 2)
    assert not exchange.finished
    assert exchange.error_text
    assert exchange.end_ns - exchange.stamps[-1] >= 10_000_000  # ended by the reset, not before it


def test_reset_before_a_word(play: Play) -> None:
    exchange, _ = play(ask([RESET])())
    assert (exchange.error, exchange.status, len(exchange.stamps)) == ("reset", 0, 0)


def test_a_server_that_never_answers(play: Play) -> None:
    exchange, server = play(ask([HANG], timeout_s=0.1)())
    assert (exchange.error, exchange.status) == ("timeout", 0)
    assert len(server.requests) == 1
    assert 0.09 <= (exchange.end_ns - exchange.sent_ns) / 1e9 <= 2


def test_a_stream_that_stops_in_the_middle(play: Play) -> None:
    exchange, _ = play(ask([head(), chunk(X), HANG], timeout_s=0.15)())
    assert (exchange.error, exchange.status, len(exchange.stamps)) == ("timeout", 200, 1)


def test_done_but_the_body_never_ends(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GRACE_AFTER_DONE_S", 0.2)
    exchange, server = play(ask([head(), chunk(BODY), HANG], timeout_s=5)())
    assert exchange.error is None
    assert (exchange.output_tokens, len(exchange.stamps)) == (3, 3)
    # The grace is not the server's time.
    assert (exchange.end_ns - server.sent_ns[-1]) / 1e9 < 0.18


def test_tokens_without_end_after_done_do_not_hold_the_stream(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_AFTER_DONE_S", 0.05)
    more: list[Step] = [chunk(DONE + X), 0.01] * 100
    exchange, server = play(ask([head(), chunk(BODY), *more])())
    assert exchange.error is None
    assert len(exchange.stamps) == 3
    assert len(server.sent_ns) < 60  # it was not waited for


def test_a_finish_reason_and_then_nothing_is_complete_at_the_time_limit(play: Play) -> None:
    exchange, _ = play(ask([head(), chunk(X + delta("stop")), HANG], timeout_s=0.1)())
    assert exchange.error is None
    assert exchange.finished


def test_an_answer_before_the_request_was_whole_is_refused(play: Play) -> None:
    """A 413 may come early; an answer may not, and the connection is out of step in any case."""

    async def early(reply: bytes) -> Exchange:
        async with serving([reply, HANG], reads_body=False) as server:
            line = Line(server)
            exchange = await line.ask(b"x" * 30_000_000)
            assert line.connection is not None
            assert not line.connection.usable
            return exchange

    too_large = play(early(whole("413 Too Large", b"{}")))
    assert (too_large.error, too_large.sent_ns) == ("http_413", 0)
    answered = play(early(streamed(BODY)))
    assert (answered.error, answered.sent_ns) == ("bad_http", 0)
    assert "before the whole request" in answered.error_text


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (REPLIES["429"][0], "slow down (Retry-After: 2)"),
        (REPLIES["503 in HTML"][0], "busy (Retry-After: 1)"),
        (whole("503 Busy", b"", "Retry-After: 9"), "(Retry-After: 9)"),
        (REPLIES["responses that failed"][0], "no memory"),
        (REPLIES["responses with an error"][0], "no memory"),
        (REPLIES["an error in the middle"][0], "out of memory"),
        (REPLIES["neither"][0], "finish_reason"),
        (REPLIES["a broken frame, then [DONE]"][0], "frame"),
        (REPLIES["HTML"][0], "JSON"),
    ],
)
async def test_a_failure_says_what_the_server_said(reply: bytes, said: str) -> None:
    exchange, _ = await ask([reply])()
    assert said in exchange.error_text


async def test_a_reply_without_bound_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REPLY_BYTES_MAX", 1000)
    exchange, _ = await ask([head(kind="application/json"), *[chunk(b" " * 400)] * 4, HANG])()
    assert (exchange.error, exchange.status) == ("bad_http", 200)
    assert "1000 bytes" in exchange.error_text


async def test_cancel_keeps_what_came() -> None:
    async with serving([head(), chunk(X), chunk(X), HANG]) as server:
        line = Line(server)
        asked = asyncio.create_task(line.ask())
        await server.stuck.wait()
        await asyncio.sleep(0.05)
        assert line.connection is not None
        line.connection.cancel()
        exchange = await asked
        assert (exchange.error, len(exchange.stamps)) == ("cancelled", 2)
        assert not line.connection.usable
        line.connection.cancel()  # and once more does nothing


# ----------------------------------------------------------------------- one connection, many asks


def test_a_connection_carries_one_request_after_the_other(play: Play) -> None:
    async def main() -> None:
        refused = whole("503 Busy", b"{}")
        scripts: list[Script] = [stream(3), [refused], [answer()], stream(5), stream(1)]
        async with serving(lambda request: scripts[request.number]) as server:
            line = Line(server)
            got = [await line.ask() for _ in scripts]
            assert [e.error for e in got] == [None, "http_503", None, None, None]
            assert [len(e.stamps) for e in got] == [3, 0, 0, 5, 1]
            assert [e.output_tokens for e in got] == [3, -1, 3, 5, 1]
            assert server.connections == 1
            assert [request.on_connection for request in server.requests] == [0, 1, 2, 3, 4]
            line.close()

    play(main())


def test_a_server_that_closes_after_each_reply(play: Play) -> None:
    async def main() -> None:
        async with serving([*stream(2), CLOSE]) as server:
            line = Line(server)
            assert (await line.ask()).error is None
            assert line.connection is not None
            await asyncio.sleep(0.05)
            assert not line.connection.usable
            line.connection = None
            assert (await line.ask()).error is None
            assert server.connections == 2

    play(main())


def test_a_request_on_a_connection_that_is_gone_ends_as_reset(play: Play) -> None:
    async def main() -> None:
        async with serving([*stream(1), CLOSE]) as server:
            line = Line(server)
            await line.ask()
            await asyncio.sleep(0.05)
            exchange = await line.ask()
            assert (exchange.error, exchange.sent_ns) == ("reset", 0)
            assert ordered(exchange)

    play(main())


def test_bytes_on_an_idle_connection_close_it(play: Play) -> None:
    async def main() -> None:
        async with serving([*stream(2), 0.05, b"HTTP/1.1 408 Timeout\r\n\r\n", 0.2]) as server:
            line = Line(server)
            assert (await line.ask()).error is None
            assert line.connection is not None
            assert line.connection.usable
            await asyncio.sleep(0.15)
            assert not line.connection.usable

    play(main())


@pytest.mark.parametrize("more", [streamed(BODY), b"rubbish"])
async def test_what_follows_a_reply_in_the_same_read_is_not_the_next_reply(more: bytes) -> None:
    """The next request must not begin inside the parser, or it would own what follows."""
    ended: list[Exchange] = []
    usable: list[bool] = []

    def done(connection: Connection, exchange: Exchange) -> None:
        ended.append(exchange)
        usable.append(connection.usable)
        if connection.usable:
            connection.start(Exchange(1, monotonic_ns()), b"x", 60.0, stream=True)

    connection = Connection(done)
    connection.connection_made(FakeTransport())
    connection.start(Exchange(0, monotonic_ns()), b"x", 60.0, stream=True)
    connection.data_received(streamed(BODY) + more)
    assert [exchange.error for exchange in ended] == [None]
    assert usable == [False]
    connection.connection_lost(None)


async def test_a_connection_that_is_lost_is_freed_without_the_collector() -> None:
    connection = Connection(lambda _, exchange: None)
    connection.connection_made(FakeTransport())
    connection.start(Exchange(0, monotonic_ns()), b"x", 60.0, stream=True)
    connection.data_received(streamed(BODY))
    connection.connection_lost(None)
    freed = weakref.ref(connection)
    del connection
    assert freed() is None


# ----------------------------------------------------------------------------------------- instants


def test_latencies_are_what_the_server_really_did(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(6, gap_s=0.03, first_s=0.05)) as server:
            line = Line(server)
            await line.open()
            began_ns = monotonic_ns()
            exchange = await line.ask()
            assert began_ns <= exchange.due_ns
            ttft_ms = (exchange.stamps[0] - exchange.sent_ns) / 1e6
            assert 45 <= ttft_ms <= 150
            # The server's own writes of the tokens: none is stamped before it was sent.
            written = server.sent_ns[1:7]
            for sent_ns, stamp_ns in zip(written, exchange.stamps, strict=True):
                assert 0 <= stamp_ns - sent_ns <= 100_000_000
            mean_gap_ms = (exchange.stamps[-1] - exchange.stamps[0]) / 5 / 1e6
            assert 27 <= mean_gap_ms <= 130
            assert exchange.sent_ns <= server.requests[0].at_ns
            line.close()

    play(main())


def test_the_first_token_is_reasoning_and_the_answer_comes_later(play: Play) -> None:
    script: Script = [
        head(), chunk(delta(role="assistant", content="")), 0.03,
        chunk(delta(reasoning_content="r")), 0.05, chunk(X), 0.02,
        chunk(X), chunk(delta("stop")), chunk(DONE) + END,
    ]  # fmt: skip
    exchange, _ = play(ask(script)())
    first, answered, _ = exchange.stamps
    assert exchange.answer_ns == answered
    assert first - exchange.sent_ns >= 25_000_000  # not the role
    assert answered - first >= 45_000_000
    assert exchange.reasoning_chunks == 1


def test_without_reasoning_the_answer_is_the_first_token(play: Play) -> None:
    exchange, _ = play(ask(stream(3))())
    assert exchange.answer_ns == exchange.stamps[0]


def test_a_large_request_is_sent_when_its_last_byte_went(play: Play) -> None:
    """A server that does not read: the kernel's buffers fill, and `sent` waits."""

    async def main() -> None:
        reading = asyncio.Event()
        async with serving(stream(2), reads_from=reading) as server:
            line = Line(server)
            asked = asyncio.create_task(line.ask(b"x" * 20_000_000))
            await asyncio.sleep(0.1)
            assert not asked.done()
            released_ns = monotonic_ns()
            reading.set()
            exchange = await asked
            assert exchange.error is None
            assert exchange.sent_ns >= released_ns
            assert ordered(exchange)
            line.close()

    play(main())


async def test_sent_waits_for_the_last_byte_and_not_for_a_low_water_mark() -> None:
    transport = FakeTransport()
    connection = Connection(lambda *_: None)
    connection.connection_made(transport)
    assert transport.high == 0
    transport.get_write_buffer_size = lambda: 1  # type: ignore[method-assign]
    exchange = Exchange(0, monotonic_ns())
    connection.start(exchange, b"x", 60.0, stream=True)
    assert exchange.sent_ns == 0
    connection.resume_writing()
    sent_ns = exchange.sent_ns
    assert sent_ns
    connection.resume_writing()
    assert exchange.sent_ns == sent_ns
    connection.connection_lost(None)


def test_a_prompt_of_a_megabyte_arrives_whole(play: Play) -> None:
    prompt = json.dumps({"prompt": "wörd " * 200_000}).encode()
    exchange, server = play(ask(stream(2), body=prompt)())
    assert exchange.error is None
    assert server.requests[0].body == prompt
    assert exchange.sent_ns


# ---------------------------------------------------------------------------------------------- TLS


class Tls(NamedTuple):
    server: ssl.SSLContext
    ca_file: str


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    ca = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return Tls(context, str(path))


def test_tls(play: Play, tls: Tls) -> None:
    async def main() -> None:
        context = tls_context(ca_file=tls.ca_file, insecure=False)
        async with serving(stream(4, gap_s=0.01), tls=tls.server) as server:
            line = Line(server, context)
            for body in (b"{}", b"x" * 1_000_000):
                exchange = await line.ask(body)
                assert (exchange.error, len(exchange.stamps)) == (None, 4)
                assert exchange.sent_ns
                assert ordered(exchange)
            assert server.connections == 1
            assert len(server.requests[1].body) == 1_000_000
            line.close()

    play(main())


def test_tls_refused(play: Play, tls: Tls) -> None:
    async def main() -> None:
        async with serving(stream(1), tls=tls.server) as server:
            line = Line(server, tls_context(ca_file=None, insecure=False))
            with pytest.raises(ssl.SSLError) as failed:
                await line.open()
            assert connect_error_kind(failed.value) == "tls"
            unverified = Line(server, tls_context(ca_file=None, insecure=True))
            assert (await unverified.ask()).error is None
            unverified.close()

    play(main())


def test_nobody_listens(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(1)) as server:
            pass
        with pytest.raises(ConnectionError) as failed:
            await Line(server).open()
        assert connect_error_kind(failed.value) == "connect"

    play(main())


async def test_a_connect_that_is_not_answered_ends() -> None:
    # The listener's queue is full, and it accepts nothing.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        held = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            held.append(sock)
        dial = Dialer(parse_url(f"http://127.0.0.1:{port}"), None, 0.1)
        with pytest.raises(TimeoutError) as failed:
            await dial(lambda *_: None)
        assert connect_error_kind(failed.value) == "connect"
        for sock in held:
            sock.close()


def test_a_missing_ca_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--ca-file"):
        tls_context(ca_file="no-such-file.pem", insecure=False)


# ------------------------------------------------------------------------------ addresses and heads


@pytest.mark.parametrize(
    ("url", "origin", "host", "port"),
    [
        ("http://h:8000", "http://h:8000", "h", 8000),
        ("http://h:8000/v1", "http://h:8000", "h", 8000),
        ("http://h:8000/v1/", "http://h:8000", "h", 8000),
        ("http://h/proxy/v1", "http://h/proxy", "h", 80),
        ("https://api.example.org", "https://api.example.org", "api.example.org", 443),
        ("localhost:8000", "http://localhost:8000", "localhost", 8000),
        ("http://[::1]:8000/v1", "http://[::1]:8000", "::1", 8000),
    ],
)
def test_urls(url: str, origin: str, host: str, port: int) -> None:
    address = parse_url(url)
    assert (address.origin, address.host, address.port) == (origin, host, port)
    assert address.tls == url.startswith("https")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://h", "ftp"),
        ("http://", "no host"),
        ("http://h:x", "http://HOST:PORT"),
        ("http://h:99999", "http://HOST:PORT"),
        ("http://user:secret@h", "--api-key-file"),
    ],
)
def test_what_is_no_url_says_what_to_write(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as failed:
        parse_url(url)
    assert "secret" not in str(failed.value)


def test_the_bytes_of_a_request() -> None:
    base = request_head(parse_url("http://h:1/x/v1"), "/v1/completions", {"Authorization": "k é"})
    data = wire(base, b"{}", "00-aa-bb-01")
    top, body = data.split(b"\r\n\r\n")
    assert body == b"{}"
    assert top.decode().split("\r\n") == [
        "POST /x/v1/completions HTTP/1.1",
        "Host: h:1",
        "Content-Type: application/json",
        "Accept: text/event-stream, application/json",
        "Authorization: k é",
        "traceparent: 00-aa-bb-01",
        "Content-Length: 2",
    ]
    assert b"traceparent" not in wire(base, b"{}")


def test_a_header_cannot_smuggle_another() -> None:
    with pytest.raises(UsageError, match="line break"):
        request_head(parse_url("http://h"), "/v1", {"A": "x\r\nB: y"})
