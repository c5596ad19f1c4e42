"""Sends what lies in the outbox to an OTLP back end, and reads what the back end says to it.

What an answer means (OTLP 1.x, "OTLP/HTTP response"):

- 2xx: taken; its body may say how many points were rejected, which are counted and not repeated.
- 429, 502, 503, 504, and no answer at all: waits, as long as `Retry-After` says, else for twice as
  long each time, up to a minute.
- other 4xx and 3xx: this request will never be taken. Dropped, counted, and said in one line.
- other 5xx, 408, and a 2xx whose body is no OTLP answer (a login page says 200 too): may or may not
  pass. Tried DOUBTFUL_TRIES_MAX times, then dropped and counted.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import ssl as tls
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import msgspec

from agent.exporters.outbox import KINDS, Kind, Outbox, Request
from agent.model import StoreError, UsageError

if TYPE_CHECKING:
    import aiohttp

TIMEOUT_S = 10.0  # OTLP exporters' default, for the whole exchange
BACKOFF_S = (1.0, 60.0)  # the first pause and the longest
RETRY_AFTER_S_MAX = 3600.0
DOUBTFUL_TRIES_MAX = 8

_ANSWER_BYTES_MAX = 64 * 1024
_WHY_CHARS_MAX = 200
_WAIT_FOR = {429, 502, 503, 504}
_OURS = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}

# ---------------------------------------------------------------------------------------- answers


class Answer(msgspec.Struct, frozen=True):
    """What became of one try. `wait_s`: how long the back end wants to be left alone."""

    outcome: Literal["taken", "refused", "later", "doubtful"]
    why: str | None = None
    rejected: int = 0
    wait_s: float | None = None


def answer_of(
    kind: Kind, status: int, headers: Mapping[str, str], body: bytes, now_unix_s: float
) -> Answer:
    """What a back end's answer means; see the module's table."""
    wait_s = retry_after_s(headers.get("Retry-After"), now_unix_s)
    if 200 <= status < 300:
        return _taken(kind, status, headers.get("Content-Type", ""), body)
    why = f"HTTP {status}" + _said(body, headers.get("Content-Type", ""))
    if status in _WAIT_FOR:
        return Answer("later", why, wait_s=wait_s)
    if status >= 500 or status == 408:
        return Answer("doubtful", why, wait_s=wait_s)
    return Answer("refused", why)


def _taken(kind: Kind, status: int, content_type: str, body: bytes) -> Answer:
    form = content_type.partition(";")[0].strip().lower()
    doubt = Answer("doubtful", f"HTTP {status} with {form or 'a body'} that is no OTLP answer")
    try:
        if not body or form == "text/plain":
            return Answer("taken")
        if form == "application/json":
            partial = json.loads(body).get("partialSuccess") or {}
            n = partial.get("rejectedDataPoints") or partial.get("rejectedSpans") or 0
            return _partly(int(n), str(partial.get("errorMessage") or ""))
        if form == "text/html":
            return doubt
        return _partly(*_partial_success(kind, body))
    except Exception:  # whatever a decoder says of bytes that are anything at all
        return doubt


def _partial_success(kind: Kind, body: bytes) -> tuple[int, str]:
    if kind == "metrics":
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceResponse,
        )

        of_metrics = ExportMetricsServiceResponse.FromString(body).partial_success
        return of_metrics.rejected_data_points, of_metrics.error_message
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    of_traces = ExportTraceServiceResponse.FromString(body).partial_success
    return of_traces.rejected_spans, of_traces.error_message


def _partly(rejected: int, message: str) -> Answer:
    """An answer that has a message and rejects nothing is a warning, and worth its line."""
    if rejected <= 0 and not message:
        return Answer("taken")
    said = f": {_line(message)}" if message else ""
    return Answer("taken", f"rejected {max(0, rejected)} points{said}", max(0, rejected))


def _said(body: bytes, content_type: str) -> str:
    """What a refusal says of itself, where that is text; OTLP sends a google.rpc.Status."""
    if content_type.startswith("text/plain") and body:
        return f": {_line(body.decode('utf-8', 'replace'))}"
    if content_type.startswith("application/x-protobuf") and body:
        from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

        with suppress(Exception):
            return f": {_line(Status.FromString(body).message)}"
    return ""


def _line(text: str) -> str:
    shown = " ".join(text.split())[:_WHY_CHARS_MAX]
    return "".join(c if c.isprintable() else "�" for c in shown)


def retry_after_s(header: str | None, now_unix_s: float) -> float | None:
    """`Retry-After` in seconds from now, at most RETRY_AFTER_S_MAX; None where it says nothing."""
    if not header:
        return None
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(header).timestamp() - now_unix_s
        except (ValueError, OverflowError, IndexError, TypeError):
            return None
    return min(max(0.0, wait_s), RETRY_AFTER_S_MAX) if math.isfinite(wait_s) else None


# ----------------------------------------------------------------------------------------- sender


class Sender:
    """Sends one kind of the outbox's requests to one address, the oldest first.

    One per kind: a trace back end that is down holds up no metrics. `headers` is asked before each
    request, so that a changed credential needs no restart, and may raise UsageError: then it waits.
    `ssl`: False for no verification, or a context with one's own authority. `timeout_s` is for the
    whole exchange. Redirects are not followed: they would take the headers elsewhere.
    """

    def __init__(
        self,
        outbox: Outbox,
        kind: Kind,
        url: str,
        *,
        headers: Callable[[], Mapping[str, str]] = dict,
        ssl: tls.SSLContext | bool = True,
        timeout_s: float = TIMEOUT_S,
        backoff_s: tuple[float, float] = BACKOFF_S,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.kind = kind
        self.url = url
        self._outbox = outbox
        self._headers = headers
        self._ssl = ssl
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._rng = rng or random.Random()
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._failures = 0  # in a row
        self._news = asyncio.Event()

    async def put(self, message: bytes, points: int, state: bytes | None = None) -> bool:
        """`Outbox.put`, off the event loop: a slow disk holds up nobody else.

        False where it was not kept: a full disk, say. It is counted as dropped, with its line.
        """
        try:
            kept = await asyncio.to_thread(self._outbox.put, self.kind, message, points, state)
        except StoreError as error:
            self._outbox.lose(self.kind, str(error))
            return False
        self._news.set()
        return kept

    async def run(self) -> None:
        """Sends until it is cancelled. Whatever back end or disk do, it goes on."""
        while True:
            pause_s = await self.turn()
            if pause_s is None:
                await self._news.wait()
            else:
                await asyncio.sleep(pause_s)

    async def drain(self, budget_s: float) -> int:
        """Sends for at most `budget_s`, before the agent stops; returns what is left of the kind.

        A pause that the back end asked for is kept to: what is left is sent after the next start.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(budget_s):
                while await self.turn() == 0.0:
                    pass
        return self._outbox.status(self.kind).pending

    async def turn(self) -> float | None:
        """One request: how long to wait before the next in s, None where there is none."""
        self._news.clear()
        try:
            request = await asyncio.to_thread(self._outbox.oldest, self.kind)
            if request is None:
                return None
            answer = await self._try(request)
            return await asyncio.to_thread(self._book, request, answer)
        except StoreError as error:  # a full disk, say; what was taken is sent again
            self._outbox.last_error = str(error)
            return self._pause_s(None)

    def _book(self, request: Request, answer: Answer) -> float:
        why = f"{self.kind} to {self._shown}: {answer.why}" if answer.why else None
        gives_up = answer.outcome == "doubtful" and request.attempts + 1 >= DOUBTFUL_TRIES_MAX
        if answer.outcome == "taken":
            self._outbox.settle(request, rejected=min(answer.rejected, request.points), why=why)
            self._failures = 0
            return 0.0
        if answer.outcome == "refused" or gives_up:
            tries = f" ({DOUBTFUL_TRIES_MAX} tries)" if gives_up else ""
            self._outbox.settle(request, dropped=True, why=f"{why}; request dropped{tries}")
            self._failures = 0
            return 0.0
        self._outbox.keep(request, why or "", counts=answer.outcome == "doubtful")
        return self._pause_s(answer.wait_s)

    def _pause_s(self, asked_s: float | None) -> float:
        """What the back end asked for, else twice as long each time, and never all at once.

        The jitter takes up to half away: many agents that lost one back end come back spread out.
        """
        first_s, longest_s = self._backoff_s
        pause_s = min(longest_s, first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return asked_s if asked_s is not None else pause_s * self._rng.uniform(0.5, 1.0)

    async def _try(self, request: Request) -> Answer:
        import aiohttp

        try:
            headers = {k: v for k, v in self._headers().items() if k.lower() not in _OURS}
            async with asyncio.timeout(self._timeout_s):
                return await self._post(request, headers)
        except TimeoutError:
            return Answer("later", f"no answer within {self._timeout_s:g} s")
        except UsageError as error:
            return Answer("later", str(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer("later", _cause(error))

    async def _post(self, request: Request, headers: Mapping[str, str]) -> Answer:
        async with self._connected().post(
            self.url,
            data=io.BytesIO(request.body),
            headers={**headers, **_OURS},
            allow_redirects=False,
        ) as response:
            body = b""
            while len(body) < _ANSWER_BYTES_MAX and (piece := await response.content.readany()):
                body += piece
            return answer_of(self.kind, response.status, response.headers, body, self._clock())

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            from agent import __version__

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=self._ssl),
                headers={"User-Agent": f"servefit/{__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(),  # one deadline, ours
            )
        return self._session

    @property
    def _shown(self) -> str:
        """The address without user, password and query, which may hold credentials."""
        from yarl import URL

        try:
            return str(URL(self.url).with_user(None).with_query(None))
        except ValueError:
            return "the back end"

    async def close(self) -> None:
        """Gives the connection back; may be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _cause(error: Exception) -> str:
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its TLS certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno
        return os.strerror(code).lower() if code and code > 0 else _line(str(error.os_error))
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "it closed the connection before it answered"
    if isinstance(error, aiohttp.InvalidURL):
        return "not a URL"
    return _line(str(error)) or type(error).__name__


def signal_url(endpoint: str, kind: Kind) -> str:
    """The address for one kind: `endpoint` is a base URL as OTEL_EXPORTER_OTLP_ENDPOINT is.

    An endpoint that ends in `/v1/metrics` or `/v1/traces` is taken for that kind as it is, and its
    base for the other. Raises UsageError where it is no http or https URL.
    """
    try:
        parts = urlsplit(endpoint)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment:
        raise UsageError("[export.otlp] endpoint: give a URL like http://127.0.0.1:4318")
    base = endpoint.rstrip("/")
    for known in KINDS:
        base = base.removesuffix(f"/v1/{known}")
    return f"{base}/v1/{kind}"
