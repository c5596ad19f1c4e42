"""The socket edge against real loopback sockets, for every stream met in the wild."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import weakref
import zlib
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from time import monotonic_ns
from typing import Any, NamedTuple

import pytest
import trustme
import uvloop

from agent.model import UsageError
from loadgen import client
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
        tuple(exchange.token_counts),
        connection.usable,
    )


X = delta(content="x")
GOOD = b"".join((delta(role="assistant", content=""), X, X, X, delta("stop"), usage_chunk(7, 3)))
NO_USAGE = Seen(prompt=-1, output=-1)
BODY = GOOD + DONE


def streamed(*events: bytes, first: bytes | None = None) -> bytes:
    """Events in chunks of their own."""
    return (head() if first is None else first) + b"".join(map(chunk, events)) + END


def with_length(body: bytes, *lines: str, kind: str | None = "text/event-stream") -> bytes:
    return head("200 OK", f"Content-Length: {len(body)}", *lines, kind=kind, chunked=False) + body


def deflated(body: bytes) -> bytes:
    return zlib.compress(body)


TOOL = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{"}}]
ERROR = frame({"error": {"message": "out of memory", "code": 500}})
HTTP_1_0 = head(version="1.0", chunked=False)

# name → (bytes, then the connection is closed?, what must be seen)
REPLIES: dict[str, tuple[bytes, bool, Seen]] = {
    "chunked": (streamed(GOOD, DONE), False, Seen()),
    "content-length": (with_length(BODY), False, Seen()),
    "an event a chunk": (streamed(X, X, X, delta("stop"), usage_chunk(7, 3), DONE), False, Seen()),
    "close-delimited, HTTP/1.0": (HTTP_1_0 + BODY, True, Seen(reused=False)),
    "close-delimited, HTTP/1.1": (head(chunked=False) + BODY, True, Seen(reused=False)),
    "HTTP/1.0 kept alive": (
        head("200 OK", "Connection: keep-alive", f"Content-Length: {len(BODY)}",
             version="1.0", chunked=False) + BODY, False, Seen(),
    ),
    "connection: close": (
        head("200 OK", "Connection: close") + chunk(BODY) + END, True, Seen(reused=False)
    ),
    "CRLF": (streamed(BODY.replace(b"\n", b"\r\n")), False, Seen()),
    "no space": (streamed(BODY.replace(b"data: ", b"data:")), False, Seen()),
    "comments": (streamed(BODY.replace(b"data: ", b": ping\n\nevent: x\ndata: ")), False, Seen()),
    "one byte a chunk": (head() + b"".join(chunk(b"%c" % c) for c in BODY) + END, False, Seen()),
    "utf-8": (streamed(delta(content="日本"), delta("stop", content="é"), DONE), False,
              NO_USAGE._replace(stamps=2)),
    "role-only and empty deltas": (
        streamed(delta(role="assistant"), delta(), delta(content=""), X, delta("stop"), DONE),
        False, NO_USAGE._replace(stamps=1),
    ),
    "reasoning_content": (
        streamed(delta(reasoning_content="r"), delta(reasoning_content="r"), X, delta("stop"),
                 usage_chunk(7, 9, 6), DONE), False, Seen(output=9, reasoning=6),
    ),
    "reasoning": (
        streamed(delta(reasoning="r"), delta(reasoning="r"), X, delta("stop"), DONE), False,
        NO_USAGE._replace(reasoning=2),
    ),
    "tool calls": (
        streamed(delta(tool_calls=TOOL), delta(tool_calls=TOOL), delta("tool_calls"), DONE), False,
        NO_USAGE._replace(stamps=2),
    ),
    "usage in the last chunk": (
        streamed(X, X, delta("stop", usage(7, 3), content="x"), DONE), False,
        Seen(counts=(1, 1, 3)),  # not their sum: the recorder shares the total out
    ),
    "usage in every chunk": (
        streamed(delta(None, usage(7, 0), role="assistant"), delta(None, usage(7, 1), content="x"),
                 delta(None, usage(7, 4), content="xyz"), delta("stop", usage(7, 4)), DONE),
        False, Seen(stamps=2, output=4, counts=(1, 3)),
    ),
    "usage never": (streamed(X, X, X, delta("stop"), DONE), False, NO_USAGE),
    "Azure": (
        streamed(frame({"choices": [], "prompt_filter_results": []}), X, X, X, delta("stop"), DONE),
        False, NO_USAGE,
    ),
    "an error in the middle": (
        streamed(X, X, ERROR, DONE), False,
        NO_USAGE._replace(error="stream_error", stamps=2, finished=False, reused=False),
    ),
    "an error after the finish_reason": (
        streamed(X, delta("stop"), ERROR, DONE), False,
        NO_USAGE._replace(error="stream_error", stamps=1, reused=False),
    ),
    "no [DONE], a finish_reason": (streamed(GOOD), False, Seen()),
    "neither": (
        streamed(X, X), False,
        NO_USAGE._replace(error="cut", stamps=2, finished=False, reused=False),
    ),
    "nothing at all": (
        streamed(), False, NO_USAGE._replace(error="cut", stamps=0, finished=False, reused=False)
    ),
    "[DONE] without a newline": (streamed(GOOD, b"data: [DONE]"), False, Seen()),
    "only [DONE] tells the end": (streamed(X, X, X, DONE), False, NO_USAGE),
    "a broken frame, then [DONE]": (
        streamed(X, b'data: {"choices":[{"del\n\n', X, DONE), False,
        NO_USAGE._replace(error="bad_stream", stamps=1, finished=False, reused=False),
    ),
    "cut inside a frame": (
        streamed(X, X, b'data: {"choices":[{"del'), False,
        NO_USAGE._replace(error="bad_stream", stamps=2, finished=False, reused=False),
    ),
    "more after [DONE]": (streamed(GOOD, DONE, ERROR, DONE), False, Seen()),
    "no final chunk": (
        head() + chunk(X) + chunk(X), True,
        NO_USAGE._replace(error="cut", stamps=2, finished=False, reused=False),
    ),
    "no final chunk after [DONE]": (head() + chunk(BODY), True, Seen(reused=False)),
    "no final chunk after the finish_reason": (
        head() + chunk(GOOD), True, Seen(error="cut", reused=False)
    ),
    "closed without a word": (
        b"", True,
        NO_USAGE._replace(error="reset", stamps=0, finished=False, status=0, reused=False),
    ),
    "gzip that nobody asked for": (
        with_length(gzip.compress(BODY), "Content-Encoding: gzip"), False, Seen()
    ),
    "deflate in chunks": (
        streamed(deflated(BODY), first=head("200 OK", "Content-Encoding: deflate")), False, Seen()
    ),
    "broken gzip": (
        with_length(b"no gzip at all", "Content-Encoding: gzip"), False,
        NO_USAGE._replace(error="bad_http", stamps=0, finished=False, reused=False),
    ),
    "429": (
        whole("429 Too Many Requests", b'{"error":{"message":"slow down"}}', "Retry-After: 2"),
        False, NO_USAGE._replace(error="http_429", stamps=0, finished=False, status=429),
    ),
    "503 in HTML": (
        whole("503 Service Unavailable", b"<h1>busy</h1>", "Retry-After: 1", kind="text/html"),
        False, NO_USAGE._replace(error="http_503", stamps=0, finished=False, status=503),
    ),
    "500 as a stream": (
        head("500 Oops") + chunk(ERROR) + END, False,
        NO_USAGE._replace(error="http_500", stamps=0, finished=False, status=500),
    ),
    "204": (
        b"HTTP/1.1 204 No Content\r\n\r\n", False,
        NO_USAGE._replace(error="http_204", stamps=0, finished=False, status=204),
    ),
    "interim replies": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Encoding: gzip\r\n\r\n"
        + streamed(BODY), False, Seen(),
    ),
    "switching protocols": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", False,
        NO_USAGE._replace(error="bad_http", stamps=0, finished=False, status=101, reused=False),
    ),
    "not HTTP": (
        b"SSH-2.0-OpenSSH_9.6\r\n", False,
        NO_USAGE._replace(error="bad_http", stamps=0, finished=False, status=0, reused=False),
    ),
    "a broken chunk": (
        head() + chunk(X) + b"zz\r\n", False,
        NO_USAGE._replace(error="bad_http", stamps=1, finished=False, reused=False),
    ),
    "not streamed although asked": (answer(7, 3), False, Seen(stamps=0)),
    "not streamed and not declared": (
        with_length(b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}', kind=None),
        False, NO_USAGE._replace(stamps=0),
    ),
    "streamed and not declared": (with_length(BODY, kind=None), False, Seen()),
    "streamed as text": (with_length(b": hi\n\n" + BODY, kind="text/plain"), False, Seen()),
    "HTML": (
        whole("200 OK", b"<html>log in</html>", kind="text/html"), False,
        NO_USAGE._replace(error="bad_reply", stamps=0, finished=False, reused=False),
    ),
    "JSON of something else": (
        whole("200 OK", b'{"hello":1}'), False,
        NO_USAGE._replace(error="bad_reply", stamps=0, finished=False),
    ),
    "an error with status 200": (
        whole("200 OK", b'{"error":{"message":"no"}}'), False,
        NO_USAGE._replace(error="stream_error", stamps=0, finished=False),
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


def fed(pieces: list[bytes], *, closes: bool, is_stream: bool = True) -> Seen:
    """What a connection makes of the pieces, without a socket."""
    ended: list[Exchange] = []
    connection = Connection(lambda _, exchange: ended.append(exchange))
    connection.connection_made(FakeTransport())
    connection.start(Exchange(0, monotonic_ns()), b"x", 60.0, stream=is_stream)
    for piece in pieces:
        if piece and not connection._transport.is_closing():  # type: ignore[union-attr]
            connection.data_received(piece)
    if closes:
        connection.eof_received()
    assert len(ended) == 1
    assert ordered(ended[0])
    result = seen(ended[0], connection)
    connection.connection_lost(None)
    assert len(ended) == 1
    return result._replace(reused=result.reused and not closes)


@pytest.mark.parametrize("name", REPLIES)
async def test_a_reply_cut_at_every_position(name: str) -> None:
    data, closes, expected = REPLIES[name]
    assert fed([data], closes=closes) == expected
    assert fed([data[i : i + 1] for i in range(len(data))], closes=closes) == expected
    step = max(1, len(data) // 1000)
    for cut in range(1, len(data), step):
        assert fed([data[:cut], data[cut:]], closes=closes) == expected, cut


async def test_a_stream_where_none_was_asked_is_a_stream() -> None:
    assert fed([streamed(GOOD, DONE)], closes=False, is_stream=False) == Seen()


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
        (REPLIES["429"][0], "slow down"),
        (REPLIES["503 in HTML"][0], "<h1>busy</h1>"),
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
