"""How `agent run` begins: its log, its configuration, and the servers that nobody named."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from agent.config import Config, Server, load, server_url
from agent.daemon import Daemon
from agent.facts import usual_servers

log = logging.getLogger("servefit")

THREADS_MAX = 4
LOOK_EVERY_S = 30.0  # for a server, where none is named and none was found yet
TIMED = "%(asctime)s %(levelname)s %(message)s"
UNTIMED = "%(levelname)s %(message)s"  # the journal has its own time


def run(file: str | None, urls: Sequence[str] = ()) -> None:
    """`agent run`, until a signal ends it.

    Raises UsageError for the configuration, StoreError for the store.
    """
    form = UNTIMED if "JOURNAL_STREAM" in os.environ else TIMED
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
    asyncio.run(_run(file, urls))


async def _run(file: str | None, urls: Sequence[str]) -> None:
    asked = [Server(url=server_url(url, "--url")) for url in urls]
    found: list[Server] = []

    def configured() -> Config:
        """The file as it is now, with what --url adds, or else what was found."""
        config = load(file) if file else Config()
        known = {one.url for one in config.server}
        named = (*config.server, *(one for one in asked if one.url not in known))
        return msgspec.structs.replace(config, server=named or tuple(found))

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS_MAX))
    is_named = bool(file or asked)  # a file without servers means none
    if not is_named:
        found += await _usual()
        if not found:
            log.info("no server is named, and none answers on this machine's usual ports yet")
    daemon = Daemon(configured(), configured)
    looking = asyncio.create_task(_look(daemon, found)) if not (is_named or found) else None
    try:
        await daemon.run()
    finally:
        if looking is not None:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking


async def _look(daemon: Daemon, found: list[Server]) -> None:
    """Until a server answers on a usual port: it may be started after the agent."""
    while not found:
        await asyncio.sleep(LOOK_EVERY_S)
        found += await _usual()
    daemon.reload()


async def _usual() -> list[Server]:
    servers = [Server(url=url, metrics_url=page) for url, page in await usual_servers()]
    for one in servers:
        log.info("found on a usual port: %s", one.url)
    return servers
