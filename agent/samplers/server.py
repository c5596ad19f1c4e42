"""What an inference server says of itself on its /metrics page, and on small pages beside it.

Scraping can hurt the server and whoever shares our event loop, so: one exchange at a time, one
deadline on the whole of it, at most 16 MiB as sent and as decompressed, no redirects, and the page
is taken in small pieces.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl as tls
import time
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

import aiohttp
from yarl import URL

from agent.model import Reading
from agent.samplers import SamplerError, dialects
from agent.samplers.dialects import Dialect, Missing
from agent.samplers.exposition import KEPT_LINES_MAX, Heads, Page

MAX_PAGE_BYTES = 16 * 1024 * 1024
MAX_SMALL_PAGE_BYTES = 1024 * 1024  # llama.cpp's /slots has 1 kB for each slot
ASK_AGAIN_NS = 60_000_000_000  # for a page beside that was not there
_PIECE_BYTES = 64 * 1024

# Uncompressed: at two scrapes a second the server's CPU is worth more than 50 kB of network.
_ASK = {
    "Accept": "text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.5",
    "Accept-Encoding": "identity",
}
SIMULATED_HEADER = "X-Servefit-Simulated"
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's names for these two formats

# Of an exchange, TimeoutError included; ValueError and RecursionError: JSON that is none.
_FAILURES = (aiohttp.ClientError, OSError, ValueError, RecursionError)

_ADVICE = {
    401: "the page wants credentials",
    403: "the credentials given are not allowed to read the page",
    404: "there is no metrics page at this address",
    501: "the server was started without its metrics page",
    502: "a proxy answers, but no server behind it",
    504: "a proxy answers, but no server behind it",
}


class ServerSampler:
    """Reads one server's metrics page; the dialect is recognised from each page anew.

    `headers` go out with every scrape (credentials). `model`: only this model's series, on a page
    of several. `ssl`: False for no verification, or a context. `timeout_s` is for the whole
    exchange, connecting included. `full`: also the buckets of histograms and the small pages beside
    (llama.cpp's /slots, Ollama's /api/ps), for whoever keeps them. Must be used and closed within
    one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 5.0,
        ssl: tls.SSLContext | bool = True,
        max_bytes: int = MAX_PAGE_BYTES,
        model: str | None = None,
        full: bool = False,
        name: str = "server",
    ) -> None:
        self.name = name
        self.url = url
        self.dialect: Dialect | None = None  # of the newest page
        self.engine: str | None = None  # its name
        self.fingerprint: tuple[tuple[str, str], ...] = ()  # model and settings; see dialects
        self.simulated = False  # whether the newest page says that its engine is
        self.malformed = 0  # lines that could not be read, ever
        self.duplicates = 0  # lines that repeat a series of their page, ever
        self.page_bytes = 0  # size of the newest page, decompressed
        self.exchange_s = 0.0  # how long the newest sample took …
        self.parse_s = 0.0  # … and how much of it the page's parsing took this process
        self._headers = {**(headers or {}), **_ASK}
        self._timeout_s = timeout_s
        self._ssl = ssl
        self._max_bytes = max_bytes
        self._model = model
        self._full = full
        self._prefix = dialects.DYNAMO_PREFIX
        self._beside_from_ns = 0  # when a page beside may be asked for again
        self._newest: list[Reading] = []
        self._heads: Heads = {}
        self._session: aiohttp.ClientSession | None = None
        self._busy = False

    async def sample(self) -> list[Reading]:
        """The readings of one scrape; `at_ns` is when the answer's head arrived.

        The server writes the page before it sends the head: that instant, not the end of the
        transfer, is nearest to what the values speak of. SamplerError says in one line what came
        instead of a page.
        """
        if self._busy:
            raise SamplerError(f"{self._shown}: the last scrape has not ended yet")
        self._busy = True
        began = time.monotonic()
        try:
            self._newest = await asyncio.wait_for(self._sample(), self._timeout_s)
        except TimeoutError:
            raise SamplerError(f"{self._shown}: no page within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise SamplerError(f"{self._shown}: {_cause(error)}") from error
        finally:
            self._busy = False
            self.exchange_s = time.monotonic() - began
        return list(self._newest)

    def missing(self) -> list[Missing]:
        """What the newest page lacks, what that costs, and what brings it; empty before one."""
        return dialects.missing(self._newest, self.dialect) if self.dialect else []

    async def fill(self, page: Page) -> int:
        """Gives the page to another reader (dcgm-exporter's) under the same limits.

        Returns when its head arrived; see `sample`.
        """
        try:
            at_ns = await asyncio.wait_for(self._fill(page), self._timeout_s)
        except TimeoutError:
            raise SamplerError(f"{self._shown}: no page within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise SamplerError(f"{self._shown}: {_cause(error)}") from error
        if what := _is_other(page.begins):
            raise SamplerError(f"{self._shown}: not a Prometheus page ({what})")
        if page.cut or page.overfull:
            fault = f"has more than {KEPT_LINES_MAX} series" if page.overfull else "is cut short"
            raise SamplerError(f"{self._shown}: the page {fault}")
        return at_ns

    async def get_json(self, url: str) -> Any:
        """A small JSON document of the same server (its version, say), under the same limits."""
        try:
            body = await asyncio.wait_for(self._small_page(url, _PIECE_BYTES), self._timeout_s)
            return json.loads(body)
        except _FAILURES as error:
            raise SamplerError(f"{_without_secrets(url)}: {_cause(error)}") from error

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def _shown(self) -> str:
        return _without_secrets(self.url)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=self._ssl),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                # One deadline, ours; and decompression under our own bound.
                timeout=aiohttp.ClientTimeout(),
                auto_decompress=False,
                read_bufsize=_PIECE_BYTES,
            )
        return self._session

    async def _sample(self) -> list[Reading]:
        if self.dialect is dialects.OLLAMA and (found := await self._ollama()):
            return found
        try:
            page, at_ns = await self._scrape()
            if (prefix := dialects.prefix_of(page)) != self._prefix:
                self._prefix = prefix
                page, at_ns = await self._scrape()
        except _NoPage:
            if self._full and (found := await self._ollama()):
                return found
            raise
        found = self._readings(page, at_ns)
        names = {one.name for one in found}
        return found + [one for one in await self._beside() if one.name not in names]

    async def _scrape(self) -> tuple[Page, int]:
        page = dialects.page(self._full, self._prefix, self._heads)
        return page, await self._fill(page)

    async def _fill(self, page: Page) -> int:
        size = 0
        async with self._connected().get(self.url, allow_redirects=False) as response:
            at_ns = time.monotonic_ns()
            self._check_status(response)
            self.simulated = response.headers.get(SIMULATED_HEADER) == "1"
            async with aclosing(_pieces(response, self._max_bytes)) as pieces:
                async for piece in pieces:
                    size += len(piece)
                    page.feed(piece)
                    if _is_other(page.begins) or page.overfull:
                        break
        self.page_bytes = size
        return at_ns

    async def _small_page(self, url: str, max_bytes: int) -> bytes:
        async with self._connected().get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}")
            return b"".join([piece async for piece in _pieces(response, max_bytes)])

    async def _beside(self) -> list[Reading]:
        """The page beside that the dialect speaks of; nothing where it is not there or slow."""
        path = self.dialect.beside if self.dialect and self._full else ""
        if not path or time.monotonic_ns() < self._beside_from_ns:
            return []
        try:
            async with asyncio.timeout(self._timeout_s / 4):
                text = await self._small_page(self._next_to(path), MAX_SMALL_PAGE_BYTES)
            return dialects.slots(text, time.monotonic_ns())
        except _FAILURES:
            self._beside_from_ns = time.monotonic_ns() + ASK_AGAIN_NS
            return []

    async def _ollama(self) -> list[Reading]:
        """What Ollama says of itself, which has no metrics page; empty where this is no Ollama."""
        try:
            url = str(URL(self.url).origin().join(URL("/api/ps")))
            text = await self._small_page(url, MAX_SMALL_PAGE_BYTES)
            found, self.fingerprint = dialects.ollama(text, time.monotonic_ns())
        except _FAILURES:
            return []
        self.dialect, self.engine = dialects.OLLAMA, dialects.OLLAMA.name
        self.page_bytes = len(text)
        return found

    def _next_to(self, path: str) -> str:
        return str(URL(self.url).with_query(None).with_fragment(None).join(URL(path)))

    def _check_status(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status == 200:
            return
        if 300 <= status < 400:
            to = response.headers.get("Location")
            where = _without_secrets(str(response.url.join(URL(to))))[:200] if to else "nowhere"
            raise SamplerError(
                f"{self._shown}: HTTP {status}, moved to {where}; redirects are not followed"
            )
        advice = _ADVICE.get(status)
        kind = _NoPage if status == 404 else SamplerError
        raise kind(f"{self._shown}: HTTP {status}" + (f", {advice}" if advice else ""))

    def _readings(self, page: Page, at_ns: int) -> list[Reading]:
        what = _is_other(page.begins)
        if what or not (page.kept or page.samples or page.begins.startswith(b"#")):
            raise SamplerError(f"{self._shown}: not a Prometheus page ({what or 'nothing on it'})")
        if page.overfull:
            raise SamplerError(
                f"{self._shown}: more than {KEPT_LINES_MAX} series, which is no server's page"
            )
        if page.cut:
            raise SamplerError(f"{self._shown}: the page is cut short")
        began = time.thread_time()
        dialect = dialects.recognise(page, self._prefix)
        if dialect is None:
            raise SamplerError(f"{self._shown}: a metrics page, but of no server known here")
        samples = page.read()
        self._heads = page.heads
        self.malformed += page.malformed
        self.duplicates += page.duplicates
        found = dialects.models(samples, dialect)
        if self._model is not None and len(found) > 1 and self._model not in found:
            names = ", ".join(name[:60] for name in sorted(found)[:5])
            raise SamplerError(f"{self._shown}: speaks of {names}, but not of {self._model}")
        self.dialect, self.engine = dialect, dialect.name
        told = (dialects.SIMULATED,) if self.simulated else ()
        self.fingerprint = (*dialects.fingerprint(samples, dialect), *told)
        taken = dialects.readings(samples, dialect, at_ns, self._model, buckets=self._full)
        self.parse_s = time.thread_time() - began
        return taken


class _NoPage(SamplerError):
    """The server answers, but has no page at this address."""


# ----------------------------------------------------------------------------------------- pieces


async def _pieces(response: aiohttp.ClientResponse, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces of at most 64 KiB, decompressed; ValueError over `max_bytes` of either.

    The decompressor is stopped at each piece's end, so that a bomb costs no more memory than a
    page, and the event loop runs between pieces.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    inflate = None
    if encoding not in ("", "identity"):
        if encoding not in _WINDOW_BITS:
            raise ValueError(f"compressed as {encoding[:40]!r}, which was not asked for")
        inflate = zlib.decompressobj(_WINDOW_BITS[encoding])
    received = given = 0
    async for raw in response.content.iter_chunked(_PIECE_BYTES):
        received += len(raw)
        for piece in _inflated(inflate, raw) if inflate else (raw,):
            given += len(piece)
            if max(received, given) > max_bytes:
                raise ValueError(f"more than {max_bytes} bytes, which is no server's page")
            yield piece
            await asyncio.sleep(0)
    if inflate is not None and not inflate.eof:
        raise ValueError("the compressed page is cut short")


def _inflated(inflate: Any, raw: bytes) -> Iterator[bytes]:
    try:
        piece = inflate.decompress(raw, _PIECE_BYTES)
        while piece:
            yield piece
            piece = inflate.decompress(inflate.unconsumed_tail, _PIECE_BYTES)
    except zlib.error as error:
        raise ValueError(f"the compressed page is broken: {error}") from error


def _is_other(begins: bytes) -> str | None:
    """What a body is that is certainly no Prometheus text; None where it may be some."""
    start = begins.lstrip()
    if start.startswith(b"<"):
        return "HTML or XML"
    return "JSON" if start.startswith((b"{", b"[")) else None


def _cause(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its TLS certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno
        return os.strerror(code).lower() if code and code > 0 else str(error.os_error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the page is cut short"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection"
    if isinstance(error, aiohttp.InvalidURL):
        return "not a URL"
    return str(error) or type(error).__name__


def _without_secrets(url: str) -> str:
    """The address without user, password and query, which may hold credentials."""
    try:
        return str(URL(url).with_user(None).with_query(None))
    except ValueError:
        return "the metrics address"
