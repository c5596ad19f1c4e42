"""What goes to the OTLP back end, from readings and verdicts to a sender of each kind."""

from __future__ import annotations

import asyncio
import os
import platform
import random
import ssl as tls
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

from agent.config import OtlpExport, otlp_headers, server_url
from agent.exporters import Batch
from agent.exporters.otlp import MetricsEncoder, assessment
from agent.exporters.outbox import KINDS, Kind, Outbox, OutboxStatus
from agent.exporters.sender import Sender, signal_url
from agent.model import Reading, Verdict

EVERY_S = 15.0
DRAIN_S = 2.0  # for what is still to be sent when the agent stops; the rest is sent after a start


def every_s(environ: Mapping[str, str] = os.environ) -> float:
    """How often metrics go out: OTEL_METRIC_EXPORT_INTERVAL (ms), at least every 0.1 s."""
    said = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    return max(0.1, int(said) / 1e3) if said.isdigit() else EVERY_S


def url_of(endpoint: str, kind: Kind, environ: Mapping[str, str] = os.environ) -> str:
    """Where one kind goes: OTEL_EXPORTER_OTLP_METRICS_ENDPOINT or …_TRACES_ENDPOINT as it is, else
    below `endpoint`. Raises UsageError for what is no URL."""
    variable = f"OTEL_EXPORTER_OTLP_{kind.upper()}_ENDPOINT"
    own = environ.get(variable, "").strip()
    return server_url(own, variable) if own else signal_url(endpoint, kind)


def resource(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Whose readings these are: this host, and what OTEL_RESOURCE_ATTRIBUTES and
    OTEL_SERVICE_NAME say."""
    pairs = (one.partition("=") for one in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    said = {name.strip(): unquote(value.strip()) for name, mark, value in pairs if mark}
    if service := environ.get("OTEL_SERVICE_NAME", "").strip():
        said["service.name"] = service
    return {"host.name": platform.node(), **said}


class Delivery:
    """The outbox at `path` with an encoder before it and two senders behind it.

    `unix_ns` turns a reading's monotonic time into wall time. Raises StoreError where the outbox
    cannot be opened. Made, used and closed within one event loop.
    """

    def __init__(self, export: OtlpExport, path: Path, unix_ns: Callable[[int], int]) -> None:
        trusted = tls.create_default_context(cafile=export.ca_file) if export.ca_file else True
        self._unix_ns = unix_ns
        self._resource = resource()
        self._ids = random.Random()
        self._outbox = Outbox(path)
        self._encoder = MetricsEncoder(self._resource, state=self._outbox.state("metrics"))
        self._senders: dict[Kind, Sender] = {
            kind: Sender(
                self._outbox,
                kind,
                url_of(export.endpoint, kind),
                headers=lambda: otlp_headers(export),
                ssl=trusted,
            )
            for kind in KINDS
        }
        self._tasks = [asyncio.create_task(one.run()) for one in self._senders.values()]

    async def metrics(self, batches: Iterable[Batch]) -> None:
        """One interval's points: on return they are in the outbox, or counted as dropped."""
        state: bytes | None = None
        for number, message in enumerate(self._encoder.encode(batches, self._unix_ns)):
            state = self._encoder.take_state() if number == 0 else None
            await self._senders["metrics"].put(message.body, message.points, state)

    async def verdict(self, verdict: Verdict, scope: str, start_unix_ns: int) -> None:
        """An assessment as a span, from when it was begun until now."""
        message = assessment(
            verdict,
            server=scope,
            start_unix_ns=start_unix_ns,
            end_unix_ns=time.time_ns(),
            resource=self._resource,
            ids=self._ids,
        )
        await self._senders["traces"].put(message.body, message.points)

    async def spans(self, body: bytes, spans: int) -> bool:
        """Spans of somebody else, as they are; whether they are kept."""
        return await self._senders["traces"].put(body, spans)

    def status(self) -> OutboxStatus:
        return self._outbox.status()

    def readings(self, at_ns: int) -> list[Reading]:
        return self._outbox.readings(at_ns)

    async def close(self) -> None:
        """Sends what it can within DRAIN_S; the rest lies in the outbox for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(one.drain(DRAIN_S) for one in self._senders.values()))
        await asyncio.gather(*(one.close() for one in self._senders.values()))
        self._outbox.close()
