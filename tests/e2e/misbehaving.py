"""A loopback server that says what a test tells it to: statuses, HTML, broken streams, silence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

MODEL = "tiny"
Writer = asyncio.StreamWriter
Reply = Callable[[int, Writer], Awaitable[None]]  # given the number of the completion, from 0
Pages = dict[str, bytes | Reply]


def message(
    status: int, body: bytes | dict[str, Any], kind: str = "application/json", extra: str = ""
) -> bytes:
    """A whole reply that is not streamed."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n{extra}"
    return head.encode() + b"\r\n" + data


def models(*names: str) -> bytes:
    entries = [{"id": name, "object": "model"} for name in names]
    return message(200, {"object": "list", "data": entries})


def refusal(status: int, text: str = "no") -> bytes:
    return message(status, {"error": {"message": text, "type": "x", "code": status}})


def html(status: int = 200) -> bytes:
    return message(status, b"<!doctype html><html><body>Welcome</body></html>", "text/html")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: dict[str, Any] | str) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return chunk(f"data: {text}\n\n".encode())


def token(text: str = "x", finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


async def good(_: int, out: Writer, *, tokens: int = 3, pause_s: float = 0.002) -> None:
    """A complete stream. Without usage, so that the probe asks but once."""
    out.write(STREAM_HEAD)
    for i in range(tokens):
        out.write(event(token(finish="stop" if i == tokens - 1 else None)))
        await out.drain()
        if i < tokens - 1:
            await asyncio.sleep(pause_s)
    out.write(event("[DONE]") + b"0\r\n\r\n")


def always(reply: bytes) -> Reply:
    async def send(_: int, out: Writer) -> None:
        out.write(reply)

    return send


async def cut(_: int, out: Writer) -> None:
    """Two tokens, then the connection is closed."""
    out.write(STREAM_HEAD + event(token()) + event(token()))
    await out.drain()
    out.close()


async def error_object(_: int, out: Writer) -> None:
    out.write(STREAM_HEAD + event(token()))
    out.write(event({"error": {"message": "CUDA out of memory", "code": 500}}))
    out.write(event("[DONE]") + b"0\r\n\r\n")


async def silence(_: int, out: Writer) -> None:
    await asyncio.sleep(3600)


class _Server:
    def __init__(self, pages: Pages, reply: Reply, probe: Reply, fallback: bytes) -> None:
        self.pages, self.reply, self.probe, self.fallback = pages, reply, probe, fallback
        self.asked = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, lines: asyncio.StreamReader, out: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not out.is_closing():
                head = (await lines.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                length = [
                    line for line in head.split("\r\n") if line.lower().startswith("content-length")
                ]
                body = b"{}"
                if length:
                    body = await lines.readexactly(int(length[0].partition(":")[2]))
                page = self.pages.get(path)
                if callable(page):
                    await page(0, out)
                elif page is None and method == "POST":
                    await self.complete(json.loads(body), out)
                else:
                    out.write(page or self.fallback)
                await out.drain()
        out.close()
        self.tasks.discard(task)

    async def complete(self, asked: dict[str, Any], out: Writer) -> None:
        if 1 in (asked.get("max_tokens"), asked.get("max_completion_tokens")):
            await self.probe(0, out)
            return
        self.asked += 1
        await self.reply(self.asked - 1, out)


@contextmanager
def serving(
    reply: Reply = good,
    *,
    probe: Reply = good,
    pages: Pages | None = None,
    fallback: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[str]:
    """Serves on a thread of its own for as long as the block lasts; gives HOST:PORT.

    `pages` are whole replies by path, or what gives them; any other POST is a completion and
    answered by `reply`, or by `probe` where one token was asked for; any other GET by `fallback`
    (a 404 if none is given). `/v1/models` lists MODEL.
    """
    known: Pages = {"/v1/models": models(MODEL), **(pages or {})}
    server = _Server(known, reply, probe, fallback or refusal(404, "no such page"))
    up: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    # A client that fails the handshake, as some tests want it, is no news.
    loop.set_exception_handler(lambda *_: None)

    async def main() -> None:
        listening = await asyncio.start_server(server, "127.0.0.1", 0, ssl=tls)
        host, port = listening.sockets[0].getsockname()[:2]
        up.append(f"{host}:{port}")
        ready.set()
        await stop.wait()
        listening.close()
        for task in list(server.tasks):
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield up[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
