"""A loopback server that answers with scripted bytes, and the words its scripts are written in."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from loadgen.client import Connection, Dialer, Exchange, parse_url, request_head, wire

# ---------------------------------------------------------------------------------------- scripts

CLOSE, RESET, HANG = "close", "reset", "hang"
Step = bytes | float | str  # bytes to send, seconds to wait, or one of the three words
Script = Sequence[Step]


def head(
    status: str = "200 OK",
    *lines: str,
    version: str = "1.1",
    kind: str | None = "text/event-stream",
    chunked: bool = True,
) -> bytes:
    fields = [f"Content-Type: {kind}"] if kind else []
    fields += ["Transfer-Encoding: chunked"] if chunked else []
    return "\r\n".join((f"HTTP/{version} {status}", *fields, *lines, "", "")).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def frame(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def delta(finish: str | None = None, usage: Any = None, /, **members: Any) -> bytes:
    """A chat chunk; `members` are the delta's."""
    value: dict[str, Any] = {
        "choices": [{"index": 0, "delta": members, "finish_reason": finish}],
    }
    if usage is not None:
        value["usage"] = usage
    return frame(value)


def usage(prompt: int, output: int, reasoning: int | None = None) -> dict[str, Any]:
    value: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output}
    if reasoning is not None:
        value["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return value


def usage_chunk(prompt: int, output: int, reasoning: int | None = None) -> bytes:
    return frame({"choices": [], "usage": usage(prompt, output, reasoning)})


def whole(status: str, body: bytes, *lines: str, kind: str = "application/json") -> bytes:
    """A reply with a length."""
    return head(status, f"Content-Length: {len(body)}", *lines, kind=kind, chunked=False) + body


def answer(prompt: int = 7, output: int = 3) -> bytes:
    """A reply that is not streamed."""
    message = {"role": "assistant", "content": "a b c"}
    value = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": usage(prompt, output),
    }
    return whole("200 OK", json.dumps(value).encode())


def stream(tokens: int = 3, gap_s: float = 0.0, first_s: float = 0.0) -> list[Step]:
    """A plain good stream, a write a token."""
    steps: list[Step] = [first_s, head()]
    for i in range(tokens):
        steps += [gap_s if i else 0.0, chunk(delta(content="x"))]
    return [*steps, chunk(delta("stop")), chunk(usage_chunk(7, tokens)), chunk(DONE) + END]


# ----------------------------------------------------------------------------------------- server


@dataclass
class Request:
    """What the server read, and when it was whole."""

    number: int  # of all requests, from 0
    on_connection: int  # of those on its connection, from 0
    at_ns: int
    head: bytes
    body: bytes


@dataclass
class Server:
    script: Callable[[Request], Script]
    port: int = 0
    tls: ssl.SSLContext | None = None
    reads_body: bool = True
    reads_from: asyncio.Event | None = None  # nothing is read before it is set
    scheme: str = "http"
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    sent_ns: list[int] = field(default_factory=list)  # before every write
    busy: int = 0
    busy_max: int = 0
    stuck: asyncio.Event = field(default_factory=asyncio.Event)  # a script came to its HANG
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self.tls, limit=2**16, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.scheme = "https" if self.tls else "http"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._replies(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_connection = 0
        if self.reads_from is not None:
            await self.reads_from.wait()
        while True:
            top = await reader.readuntil(b"\r\n\r\n")
            length = int(top.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length if self.reads_body else 0)
            request = Request(len(self.requests), on_connection, monotonic_ns(), top, body)
            self.requests.append(request)
            on_connection += 1
            self.busy += 1
            self.busy_max = max(self.busy_max, self.busy)
            try:
                if not await self._play(self.script(request), writer):
                    return
            finally:
                self.busy -= 1

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> bool:
        """False: the connection is gone."""
        for step in script:
            if isinstance(step, bytes):
                self.sent_ns.append(monotonic_ns())
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                if step:
                    await asyncio.sleep(step)
            elif step == HANG:
                self.stuck.set()
                await asyncio.Event().wait()
            elif step == RESET:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return False
            else:
                writer.close()
                return False
        return True


@asynccontextmanager
async def serving(
    script: Script | Callable[[Request], Script], **options: Any
) -> AsyncIterator[Server]:
    """A server that plays `script` to every request."""
    play = script if callable(script) else lambda _: script
    server = Server(play, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


# ----------------------------------------------------------------------------------------- client


class Line:
    """A connection of the client under test, for one request after the other."""

    def __init__(self, server: Server, tls: ssl.SSLContext | None = None) -> None:
        self.address = parse_url(server.url)
        self._dial = Dialer(self.address, tls, 5.0)
        self._head = request_head(self.address, "/v1/chat/completions", {})
        self.connection: Connection | None = None
        self._ended: asyncio.Future[Exchange] | None = None

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        assert self._ended is not None, "an exchange ended twice"
        ended, self._ended = self._ended, None
        ended.set_result(exchange)

    async def open(self) -> Connection:
        self.connection = await self._dial(self._done)
        return self.connection

    async def ask(
        self, body: bytes = b"{}", *, stream: bool = True, timeout_s: float = 5.0
    ) -> Exchange:
        connection = self.connection or await self.open()
        exchange = Exchange(0, monotonic_ns())
        self._ended = asyncio.get_running_loop().create_future()
        ended = self._ended
        connection.start(exchange, wire(self._head, body), timeout_s, stream=stream)
        return await ended

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
