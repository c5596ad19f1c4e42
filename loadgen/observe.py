"""What the server and the GPUs did while a level ran: samplers beside the load, and finding them.

The load shares this event loop and must not feel it: a sampler does small pieces of work, never
overlaps itself, and slows down when its source is slow.
"""

from __future__ import annotations

import asyncio
import ssl as tls
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from yarl import URL

from agent import here
from agent.model import Reading, UsageError
from agent.samplers import Sampler, SamplerError
from agent.samplers.watched import pause_s

if TYPE_CHECKING:
    from agent.samplers.nvml import NvmlSampler
    from agent.samplers.server import ServerSampler


class Observer:
    """Runs samplers while a level runs.

    `readings` and `notes` are of the newest level: readings of all samplers, in the order they
    came; one line for each different failure, with how often it happened.
    """

    def __init__(self, samplers: Sequence[tuple[Sampler, float]]) -> None:
        """`samplers`: each with its interval in seconds."""
        self._samplers = tuple(samplers)
        self._failures: dict[str, int] = {}
        self.readings: list[Reading] = []

    @property
    def notes(self) -> list[str]:
        return [
            text if times == 1 else f"{text} ({times} times)"
            for text, times in self._failures.items()
        ]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Samples once before the body, at each sampler's interval during it, and once after it.

        A scrape under way when the body ends is waited for, so that the last one is taken after
        it; both within the sampler's own deadline. An exception in the body ends it at once.
        """
        self.readings, self._failures = [], {}
        await self._all_once()
        stop = asyncio.Event()
        tasks = [
            asyncio.create_task(self._repeat(sampler, interval_s, stop))
            for sampler, interval_s in self._samplers
        ]
        try:
            yield
            stop.set()
            await asyncio.gather(*tasks)
            await self._all_once()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Closes the samplers; what fails to close is left."""
        await asyncio.gather(
            *(sampler.close() for sampler, _ in self._samplers), return_exceptions=True
        )

    async def _all_once(self) -> None:
        await asyncio.gather(*(self._once(sampler) for sampler, _ in self._samplers))

    async def _repeat(self, sampler: Sampler, interval_s: float, stop: asyncio.Event) -> None:
        wait_s = interval_s
        while not await _set_within(stop, wait_s):
            began = time.monotonic()
            await self._once(sampler)
            wait_s = pause_s(interval_s, time.monotonic() - began)

    async def _once(self, sampler: Sampler) -> None:
        """One sample. Whatever it raises becomes a note: observing never ends a measurement."""
        try:
            self.readings.extend(await sampler.sample())
        except SamplerError as error:
            self._failed(f"{sampler.name}: {error}")
        except Exception as error:
            self._failed(f"{sampler.name}: {type(error).__name__}: {error}")

    def _failed(self, text: str) -> None:
        self._failures[text] = self._failures.get(text, 0) + 1


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


# ----------------------------------------------------------------------------------------- finding


async def discover(
    target_url: str,
    metrics_url: str | None = None,
    model: str | None = None,
    headers: Mapping[str, str] | None = None,
    ssl: tls.SSLContext | bool = True,
) -> tuple[ServerSampler | None, str | None, str | None, str | None]:
    """Finds the target's metrics page: (sampler, note, engine, engine version).

    `metrics_url` None: beside the API, then at the root of its address; 'none': not at all. `note`
    says in one line why there is no sampler. The target's `headers` (its API key) are sent to its
    own scheme, host and port only. The version is null where the server does not tell it. Raises
    UsageError for a `metrics_url` that is no address.
    """
    if metrics_url == "none":
        return None, "switched off (--metrics-url none)", None, None
    from agent.samplers.server import ServerSampler  # aiohttp: not needed where switched off

    target = URL(target_url)
    note = None
    for url in [_http_url(metrics_url)] if metrics_url else _metrics_urls(target):
        own = url.origin() == target.origin()
        sampler = ServerSampler(str(url), headers=headers if own else None, ssl=ssl, model=model)
        try:
            await sampler.sample()
        except SamplerError as error:
            note = note or str(error)
            await sampler.close()
            continue
        version = await _version(sampler, url)
        return sampler, None, sampler.engine, version
    return None, note, None, None


def _http_url(text: str) -> URL:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--metrics-url {text!r} is no address: http://HOST:PORT/metrics, or none")
    return url


def _metrics_urls(target: URL) -> list[URL]:
    """Where a target's page may be: beside /v1 (behind a path prefix), and at the root."""
    base = target.with_query(None).with_fragment(None)
    parts = [part for part in base.path.split("/") if part]
    if parts and parts[-1] == "v1":
        parts.pop()
    paths = ["/".join(("", *parts, "metrics")), "/metrics"]
    return [base.with_path(path) for path in dict.fromkeys(paths)]


async def _version(sampler: ServerSampler, metrics_url: URL) -> str | None:
    """The server's version from /version beside its metrics page, as vLLM gives it."""
    try:
        answer = await sampler.get_json(str(metrics_url.with_name("version").with_query(None)))
    except SamplerError:
        return None
    version = answer.get("version") if isinstance(answer, dict) else None
    return version[:100] if isinstance(version, str) else None


async def on_this_machine(target_url: str) -> bool:
    """See `agent.here`; off the event loop, because the resolver may take seconds."""
    return await asyncio.to_thread(here.on_this_machine, target_url)


async def local_gpus(target_url: str) -> tuple[NvmlSampler | None, str | None]:
    """This machine's GPUs, if the target runs here: (sampler, note).

    All GPUs of the machine are sampled whether the server uses them or not, which cannot be told
    from its address. `note` says why there is no sampler, or that several GPUs are counted.
    """
    host = URL(target_url).host
    try:
        is_here = await on_this_machine(target_url)
    except OSError as error:
        return None, f"where {host} is could not be found out: {error.strerror}"
    if not is_here:
        return None, f"the target {host} is not on this machine, so this machine's GPU is not its"
    try:
        sampler = await asyncio.to_thread(_open_nvml)
    except SamplerError as error:
        return None, str(error)
    n = len(sampler.devices())
    return sampler, None if n == 1 else f"all {n} GPUs of this machine are counted as the target's"


def _open_nvml() -> NvmlSampler:
    from agent.samplers.nvml import NvmlSampler

    return NvmlSampler()
