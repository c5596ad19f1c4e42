"""An OTLP receiver that does what back ends do on bad days; its script says what comes next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

PROTOBUF = "application/x-protobuf"


class Say(msgspec.Struct, frozen=True):
    """One answer. `takes`: it keeps what came. `how`: whole, or what the connection suffers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}
    how: str = "whole"  # stalls, dies (in the request), dies_after (it), half (an answer)
    takes: bool = False


OK = Say(headers={"Content-Type": PROTOBUF}, takes=True)
STALLS, DIES, HALF = (Say(how=how) for how in ("stalls", "dies", "half"))
DIES_AFTER = Say(how="dies_after", takes=True)
LOGIN_PAGE = Say(body=b"<html>please log in</html>", headers={"Content-Type": "text/html"})
GARBAGE = Say(body=b"\xff\xfe\xfd garbage", headers={"Content-Type": PROTOBUF})


def rejects(n: int, message: str) -> Say:
    partial = ExportMetricsPartialSuccess(rejected_data_points=n, error_message=message)
    body = ExportMetricsServiceResponse(partial_success=partial).SerializeToString()
    return Say(body=body, headers={"Content-Type": PROTOBUF}, takes=True)


def rejects_spans(n: int, message: str) -> bytes:
    partial = ExportTracePartialSuccess(rejected_spans=n, error_message=message)
    return ExportTraceServiceResponse(partial_success=partial).SerializeToString()


class Receiver:
    """What came, in order. `seen`: every body that arrived whole, `taken`: those it really took."""

    def __init__(self, script: Callable[[int], Say]) -> None:
        self.script = script
        self.seen: list[bytes] = []
        self.taken: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.at_s: list[float] = []
        self.came = asyncio.Event()  # something was taken
        self.over = asyncio.Event()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        say = self.script(len(self.headers))
        self.headers.append(dict(request.headers))
        self.at_s.append(asyncio.get_running_loop().time())
        if say.how == "dies":
            return self._cut(request)
        body = await request.read()
        self.seen.append(body)
        if say.takes:
            self.taken.append(body)
            self.came.set()
        if say.how == "stalls":
            await self.over.wait()
        if say.how in ("stalls", "dies_after"):
            return self._cut(request)
        if say.how == "half":
            response = web.StreamResponse(headers={"Content-Length": "100"})
            await response.prepare(request)
            await response.write(b"half of it")
            return self._cut(request)
        return web.Response(status=say.status, body=say.body, headers=say.headers)

    def _cut(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


@asynccontextmanager
async def receiving(script: Callable[[int], Say] = lambda n: OK) -> AsyncIterator[Receiver]:
    """A receiver on a free port of 127.0.0.1; `script` answers the n-th request."""
    receiver = Receiver(script)
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/{path:.*}", receiver.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        sockets: Any = site._server
        receiver.url = f"http://127.0.0.1:{sockets.sockets[0].getsockname()[1]}"
        yield receiver
    finally:
        receiver.over.set()
        await runner.cleanup()
