"""The agent's addresses: how it is, what it saw, what it concluded; its page, and /metrics.

Everything is read only but `POST /api/v1/curve`. What a question needs of the store is read in one
of a few threads, within a deadline, so that the sampling loop never waits for a disk. Every error
is JSON with one line. Against pages in a browser: the Host header is checked (DNS rebinding), and
without a token nothing is written for a foreign origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.web_response import ContentCoding

from agent.config import host_port, is_loopback
from agent.exporters import prometheus
from agent.live import Live, Status
from agent.minutes import Minute
from agent.model import ServefitError, UsageError, encode
from agent.recall import Recall
from agent.swept import read_sweep
from agent.terms import script
from agent.web import answers
from agent.when import utc
from agent.words import defect, printable

T = TypeVar("T")
_Given = dict[str, str | None]
_OfWindow = Callable[[Recall, answers.Seen], object]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DEADLINE_S = 10.0  # of an answer from the store
AT_ONCE_MAX = 2  # they share one interpreter: more wait for each other, row by row
WRITER_LAG_MAX_S = 30.0
FLUSH_S = 2.0
BODY_BYTES_MAX = 16 * 1024 * 1024
BODY_TIMEOUT_S = 60.0
QUERY_CHARS_MAX = 2048
GZIP_BYTES_MIN = 1400  # below, it fits a packet as it is
GZIP_IN_THREAD_BYTES = 64 * 1024  # 1 ms
TRIES = 3
SHARED_S = 1.0  # so long what was read for one question of a window is there for the next
LIMIT_MAX = 1000
EVENTS_EVERY_S = 2.0
EVENTS_S_MAX = 900.0  # then the page asks anew: who went away without a word is forgotten
EVENTS_AT_ONCE_MAX = 32
STATIC = Path(__file__).parent / "static"
# What may be asked without a token: health, and the page, which holds nothing of this agent's.
OPEN = frozenset(("/", "/livez", "/readyz"))
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Server": "servefit",
}


class _Refusal(Exception):
    """An answer that is an error: its status, its line, its headers."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        super().__init__(why)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def application(
    live: Live,
    *,
    token: str | None,
    deadline_s: float = DEADLINE_S,
    events_every_s: float = EVENTS_EVERY_S,
) -> web.Application:
    """All addresses of one agent. `token`: what `Authorization: Bearer` must say, None for nothing.

    Belongs to the event loop of `live`.
    """
    pages = _Pages(live, token, deadline_s, events_every_s)
    app = web.Application(
        middlewares=[_compressed, _told, pages.guarded], client_max_size=BODY_BYTES_MAX
    )
    for path, handler in {
        "/": pages.index,
        "/static/words.js": pages.words,
        "/livez": pages.livez,
        "/readyz": pages.readyz,
        "/metrics": pages.metrics,
        "/api/v1/status": pages.status,
        "/api/v1/pattern": pages.pattern,
        "/api/v1/curve": pages.curve,
        "/api/v1/series": pages.series,
        "/api/v1/table": pages.table,
        "/api/v1/events": pages.events,
        "/api/v1/readings": pages.readings,
        "/api/v1/assessment": pages.assessment,
        "/api/v1/assessments": pages.assessments,
    }.items():
        app.router.add_get(path, handler)
    app.router.add_post("/api/v1/curve", pages.take_curve)
    app.router.add_static("/static", STATIC)
    app.on_response_prepare.append(_with_headers)
    app.on_shutdown.append(pages.end_events)
    app.on_cleanup.append(pages.close)
    return app


class Site:
    """The addresses, listened on."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None

    async def start(self, app: web.Application, listen: str) -> str:
        """Listens on `host:port`, port 0 for any; gives the URL. Raises UsageError."""
        # aiohttp logs a traceback for each request that is no HTTP, which anybody can send.
        silent = logging.getLogger(f"{__name__}.http")
        silent.disabled = True
        self._runner = web.AppRunner(app, access_log=None, logger=silent, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            host, port = host_port(listen)
            await web.TCPSite(self._runner, host, port).start()
        except (ValueError, OverflowError) as error:
            await self.close()
            raise UsageError(f"[agent] listen {listen!r}: write it as 127.0.0.1:9477") from error
        except OSError as error:
            await self.close()
            why = os.strerror(error.errno).lower() if error.errno else str(error)
            raise UsageError(f"[agent] listen {listen}: {why}: give another address") from error
        port = self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def close(self) -> None:
        """May be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


# ------------------------------------------------------------------------------------------- edges


@web.middleware
async def _compressed(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    body = response.body if isinstance(response, web.Response) else None
    if isinstance(body, bytes | bytearray) and len(body) >= GZIP_BYTES_MIN:
        response.headers["Vary"] = "Accept-Encoding"
        if _wants_gzip(request):
            response.enable_compression(ContentCoding.gzip)
    return response


@web.middleware
async def _told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is JSON with one line."""
    try:
        return await handler(request)
    except _Refusal as refusal:
        return _error(refusal.status, str(refusal), refusal.headers)
    except web.HTTPException as refusal:
        allow = {"Allow": refusal.headers["Allow"]} if "Allow" in refusal.headers else {}
        return _error(refusal.status, f"{request.method} {request.path}: {refusal.reason}", allow)
    except answers.NotKnown as error:
        return _error(404, str(error))
    except UsageError as error:
        return _error(400, str(error))
    except ServefitError as error:
        return _error(503, str(error), {"Retry-After": "5"})
    except Exception as error:
        return _error(500, f"{defect(error)}: please report it")


def _error(status: int, why: str, headers: dict[str, str] | None = None) -> web.Response:
    response = _json(encode({"error": printable(why)}), status)
    response.headers.update(headers or {})
    return response


def _json(body: bytes | bytearray, status: int = 200) -> web.Response:
    return web.Response(
        body=body,
        status=status,
        content_type="application/json",
        zlib_executor_size=GZIP_IN_THREAD_BYTES,
    )


async def _with_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    if not request.path.startswith("/static/"):
        response.headers["Cache-Control"] = "no-store"


def _wants_gzip(request: web.Request) -> bool:
    for part in request.headers.get("Accept-Encoding", "").lower().split(","):
        coding, _, quality = part.partition(";")
        if coding.strip() == "gzip":
            return quality.strip().rstrip("0") not in ("q=", "q=0.")
    return False


def _name(netloc: str) -> str:
    """The host of `host:port`."""
    host = netloc[1:].partition("]")[0] if netloc.startswith("[") else netloc.partition(":")[0]
    return host.lower()


def _is_our_name(name: str, listen: str) -> bool:
    """Whether somebody who calls us so cannot have been led to us by a foreign name.

    Where every address is listened on, that is any address; a name might be anybody's.
    """
    if is_loopback(name) or name == listen.lower():
        return True
    try:
        return ipaddress.ip_address(listen).is_unspecified and bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _query(request: web.Request, *names: str) -> _Given:
    """The parameters of a question, null where not given. Raises UsageError."""
    given = request.rel_url.query
    for name in given:
        if name not in names:
            known = ", ".join(f"{one}=" for one in names) or "none"
            raise UsageError(f"unknown parameter {name!r}: there are {known}")
        if len(given.getall(name)) > 1:
            raise UsageError(f"parameter {name!r} stands twice")
    return {name: given.get(name) or None for name in names}


def _needed(given: _Given, name: str) -> str:
    value = given[name]
    if value is None:
        raise UsageError(f"parameter {name!r} is missing")
    return value


# ------------------------------------------------------------------------------------------- pages


class _Pages:
    """The handlers, each a question to the running agent or to its store."""

    def __init__(
        self, live: Live, token: str | None, deadline_s: float, events_every_s: float
    ) -> None:
        self._live = live
        self._token = token
        self._deadline_s = deadline_s
        self._events_every_s = events_every_s
        self._ending = asyncio.Event()
        self._followers = 0
        self._windows: dict[tuple[answers.Asked, float], asyncio.Future[answers.Seen]] = {}
        self._listen, _ = host_port(live.config.agent.listen)
        self._threads = ThreadPoolExecutor(AT_ONCE_MAX, thread_name_prefix="web")
        self._closed = False

    async def close(self, _: web.Application) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --------------------------------------------------------------------------------- who may ask

    @web.middleware
    async def guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if len(request.rel_url.raw_query_string) > QUERY_CHARS_MAX:
            raise _Refusal(414, f"a query of more than {QUERY_CHARS_MAX} characters")
        if self._token is not None:
            if request.path not in OPEN and not request.path.startswith("/static/"):
                self._check_token(request, self._token)
        elif not _is_our_name(_name(request.headers.get("Host", "")), self._listen):
            raise _Refusal(
                403, "ask by the address that the agent listens on, or configure a token_file"
            )
        return await handler(request)

    @staticmethod
    def _check_token(request: web.Request, token: str) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), token.encode("utf-8")
        )
        if not (same and scheme.lower() == "bearer"):
            raise _Refusal(
                401, "this agent wants `Authorization: Bearer TOKEN`", WWW_Authenticate="Bearer"
            )

    def _check_writer(self, request: web.Request) -> None:
        """A page in a browser has no token, and without one must not write."""
        if self._token is not None:
            return
        if not is_loopback(self._listen):
            raise _Refusal(403, "beyond the loopback a curve is taken with a token only")
        if request.content_type != "application/json":
            raise _Refusal(415, "send the curve as Content-Type: application/json")
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        if origin is not None and origin.rpartition("://")[2] != host:
            raise _Refusal(403, "a page of another origin may not write here")

    # -------------------------------------------------------------------------------------- health

    async def livez(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(self, request: web.Request) -> web.Response:
        status = self._live.status()
        reasons = [] if self._live.is_ready() else ["its sources are asked for the first time"]
        reasons += _not_ready(status)
        samplers = [{"name": one.name, "ok": one.ok, "age_s": one.age_s} for one in status.samplers]
        said = {
            "ready": not reasons,
            "reasons": reasons,
            "samplers": samplers,
            "writer_lag_s": status.store.writer_lag_s,
        }
        return _json(encode(said), 503 if reasons else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        form = prometheus.negotiate(request.headers.get("Accept"))
        return web.Response(
            body=prometheus.page(self._live.batches(), form),
            headers={"Content-Type": prometheus.CONTENT_TYPE[form]},
            zlib_executor_size=GZIP_IN_THREAD_BYTES,
        )

    async def index(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / "index.html")

    async def words(self, request: web.Request) -> web.Response:
        """What the page calls findings and reasons, out of the table that the report has too."""
        return web.Response(text=script(), content_type="text/javascript", charset="utf-8")

    async def status(self, request: web.Request) -> web.Response:
        _query(request)
        return _json(encode(self._live.status()))

    # -------------------------------------------------------------------------------------- events

    async def events(self, request: web.Request) -> web.StreamResponse:
        """A line every few seconds (server-sent events), which says how far the samples go now.

        It is its own heartbeat. The page asks for what is new then, and for nothing else.
        """
        _query(request)
        if self._followers >= EVENTS_AT_ONCE_MAX:
            raise _Refusal(503, f"{EVENTS_AT_ONCE_MAX} pages follow already", Retry_After="30")
        self._followers += 1
        try:
            return await self._tell(request)
        finally:
            self._followers -= 1

    async def _tell(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        until = time.monotonic() + EVENTS_S_MAX
        try:
            while not self._ending.is_set() and time.monotonic() < until:
                await stream.write(b"data: " + encode(self._newest()) + b"\n\n")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), self._events_every_s)
        except ConnectionError:
            pass  # the page was closed
        return stream

    def _newest(self) -> dict[str, float | None]:
        newest = max(self._live.newest_unix_s().values(), default=None)
        return {"now_unix_s": self._now().unix_s, "newest_unix_s": newest}

    async def end_events(self, _: web.Application) -> None:
        self._ending.set()

    # --------------------------------------------------------------------------------------- store

    async def pattern(self, request: web.Request) -> web.Response:
        return await self._of_window(request, "1h", answers.observed_pattern)

    async def curve(self, request: web.Request) -> web.Response:
        return await self._of_window(request, "7d", answers.curves)

    async def _of_window(
        self,
        request: web.Request,
        default: str,
        answer: _OfWindow,
    ) -> web.Response:
        """A minute that ends while the store is read might count twice: then it is read again."""
        given = _query(request, "server", "service", "window")
        asked = answers.Asked(given["server"], given["service"])
        window_s = answers.window_s(given["window"], default)
        for _ in range(TRIES):
            observed = await self._within(self._seen(asked, window_s))
            if _begun(observed.open_minutes) == _begun(self._live.open_minutes()):
                break
            self._windows.pop((asked, window_s), None)
        return _json(await self._ask(lambda recall: encode(answer(recall, observed))))

    def _seen(self, asked: answers.Asked, window_s: float) -> asyncio.Future[answers.Seen]:
        """A window's minutes. Pattern and curve are asked for together, and reading takes longest:
        who asks for the same meanwhile, or just afterwards, gets the same."""
        key = (asked, window_s)
        if key not in self._windows:
            now = self._now_with_samples()
            reading = asyncio.ensure_future(
                self._ask(lambda recall: answers.seen(recall, now, asked, window_s), flush=True)
            )
            self._windows[key] = reading
            forget = lambda done: asyncio.get_running_loop().call_later(  # noqa: E731
                0.0 if done.cancelled() or done.exception() else SHARED_S, self._forget, key, done
            )
            reading.add_done_callback(forget)
        return asyncio.shield(self._windows[key])

    def _forget(self, key: tuple[answers.Asked, float], reading: object) -> None:
        if self._windows.get(key) is reading:
            del self._windows[key]

    async def series(self, request: web.Request) -> web.Response:
        given = _query(request, "metric", "from", "to", "step", "server", "service", "gpu")
        asked, now = answers.Asked(given["server"], given["service"]), self._now()
        found = await self._ask(
            lambda recall: answers.series(
                recall,
                now,
                asked,
                _needed(given, "metric"),
                begin=given["from"],
                end=given["to"],
                step=given["step"],
                gpu=given["gpu"],
            )
        )
        return _json(encode(found))

    async def table(self, request: web.Request) -> web.Response:
        given = _query(request, "metrics", "from", "to", "step", "server", "service", "gpu")
        asked, now = answers.Asked(given["server"], given["service"]), self._now()
        found = await self._ask(
            lambda recall: encode(
                answers.table(
                    recall,
                    now,
                    asked,
                    _needed(given, "metrics"),
                    begin=given["from"],
                    end=given["to"],
                    step=given["step"],
                    gpu=given["gpu"],
                )
            )
        )
        return _json(found)

    async def readings(self, request: web.Request) -> web.Response:
        given = _query(request, "server", "from", "to")
        server, begin, end = (_needed(given, name) for name in ("server", "from", "to"))
        asked, now = answers.Asked(server), self._now()
        return _json(
            await self._ask(
                lambda recall: answers.readings(recall, now, asked, begin, end), flush=True
            )
        )

    async def assessment(self, request: web.Request) -> web.Response:
        given = _query(request, "server", "service")
        found = await self._assessments(given, 1)
        if not found:
            raise answers.NotKnown(self._when_next())
        return _json(encode(found[0]))

    async def assessments(self, request: web.Request) -> web.Response:
        given = _query(request, "server", "service", "limit", "changes")
        limit, changes = given["limit"] or "100", given["changes"] or "false"
        if changes not in ("true", "false"):
            raise UsageError(f"changes {changes!r}: write true or false")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:5]) <= LIMIT_MAX):
            raise UsageError(f"limit {limit!r}: write a number from 1 to {LIMIT_MAX}")
        found = await self._assessments(given, int(limit), changes=changes == "true")
        return _json(encode(found))

    async def _assessments(
        self, given: _Given, limit: int, *, changes: bool = False
    ) -> list[dict[str, Any]]:
        asked, now = answers.Asked(given["server"], given["service"]), self._now()
        return await self._ask(
            lambda recall: answers.assessments(recall, now, asked, limit, changes)
        )

    def _when_next(self) -> str:
        status, every_s = self._live.status(), self._live.config.assess.every_s
        at_s = status.started_unix_s + every_s
        when = f"comes at {utc(at_s)}" if at_s > status.now_unix_s else "is due"
        return f"no assessment yet: the next one {when} ([assess] every is {every_s:g} s)"

    async def take_curve(self, request: web.Request) -> web.Response:
        server = _query(request, "server")["server"]
        self._check_writer(request)
        if server is not None:
            asked, now = answers.Asked(server), self._now()
            await self._ask(lambda recall: answers.whose(recall, now, asked))
        body = await _body(request)
        sweep = await self._within(self._run(lambda: read_sweep(body)))
        history = self._live.history
        kept = history.add_curve(sweep, server)
        await self._within(self._run(lambda: history.flush(FLUSH_S)))
        id_ = await self._within(asyncio.wrap_future(kept))
        said = {"id": id_, "levels": len(sweep.levels), "model": sweep.target.model}
        return _json(encode(said))

    # ------------------------------------------------------------------------------------- threads

    def _now(self) -> answers.Now:
        status = self._live.status()
        return answers.Now(status.now_unix_s, status.servers)

    def _now_with_samples(self) -> answers.Now:
        live = self._live
        return self._now()._replace(
            intervals_s={one.name: one.interval_s for one in live.config.server},
            newest_unix_s=live.newest_unix_s(),
            open_minutes=tuple(live.open_minutes()),
        )

    async def _ask(self, work: Callable[[Recall], T], *, flush: bool = False) -> T:
        """Runs a question to the store. `flush`: what was sampled until now is in it first."""
        history = self._live.history
        deadline = time.monotonic() + self._deadline_s

        def run() -> T:
            if flush:
                history.flush(FLUSH_S)
            is_late = lambda: self._closed or time.monotonic() > deadline  # noqa: E731
            with Recall(history.path, give_up=is_late) as recall, recall.snapshot():
                return work(recall)

        return await self._within(self._run(run))

    def _run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _within(self, answer: asyncio.Future[T]) -> T:
        """Raises _Refusal where an answer takes too long; its thread then ends by itself."""
        try:
            return await asyncio.wait_for(answer, self._deadline_s)
        except TimeoutError:
            raise _Refusal(
                503,
                f"busy: no answer within {self._deadline_s:g} s; ask again, or for less",
                Retry_After="5",
            ) from None


async def _body(request: web.Request) -> bytes:
    if (request.content_length or 0) > BODY_BYTES_MAX:
        raise _Refusal(413, f"more than {BODY_BYTES_MAX} bytes")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise _Refusal(408, f"the body did not come within {BODY_TIMEOUT_S:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise _Refusal(413, f"more than {BODY_BYTES_MAX} bytes") from None
    except (web.RequestPayloadError, OSError) as error:
        raise _Refusal(400, f"the body is broken: {type(error).__name__}") from None


def _begun(minutes: Sequence[Minute]) -> dict[str, int]:
    return {one.source: one.start_unix_s for one in minutes}


def _not_ready(status: Status) -> list[str]:
    """Why nothing should rely on this agent now.

    A server or GPU that is away is no reason: an agent beside it must not take its pod out of
    service.
    """
    store = status.store
    is_busy = store.error is not None and ("locked" in store.error or "busy" in store.error)
    reasons = {
        "the store is being opened": not store.ready,
        f"the store's writer is {store.writer_lag_s:.0f} s behind": (
            store.writer_lag_s > WRITER_LAG_MAX_S
        ),
        f"the store was not written: {store.error}": store.error is not None and not is_busy,
    }
    return [printable(reason) for reason, holds in reasons.items() if holds]
