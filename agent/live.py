"""What a running agent shows: to its page, its exporters, and whoever asks over HTTP.

The daemon is one `Live`; `agent.web` asks nothing else of it. The structs are the answers of
/api/v1/status, field for field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from agent.config import Config
from agent.exporters import Batch
from agent.history import History
from agent.minutes import Minute
from agent.model import Slo
from agent.receiver import ReceiverStatus
from agent.samplers.watched import SamplerStatus

GpusBy = Literal["configuration", "process list", "only server", "unknown"]


class StoreStatus(msgspec.Struct, frozen=True):
    bytes: int
    writer_lag_s: float  # age of the oldest thing not yet written
    ready: bool
    shedding: bool  # too little free disk: raw readings are not kept
    readings_dropped: int
    error: str | None  # why the last batch was not written, null when it was


class OutboxStatus(msgspec.Struct, frozen=True):
    pending: int
    dropped: int
    sent: int = 0
    oldest_unix_s: float | None = None
    last_error: str | None = None


class ServerStatus(msgspec.Struct, frozen=True):
    """One inference server as it is configured, and as it showed itself last."""

    name: str
    url: str
    service: str | None
    engine: str | None = None
    model: str | None = None
    gpus: tuple[str, ...] = ()  # UUIDs
    gpus_by: GpusBy = "unknown"
    slo: tuple[Slo, ...] = ()
    missing: tuple[str, ...] = ()  # series that its page lacks
    simulated: bool = False  # its page says that no hardware is behind it


class GpuStatus(msgspec.Struct, frozen=True):
    uuid: str
    name: str
    memory_total_bytes: int | None = None


class Status(msgspec.Struct, frozen=True):
    """`/api/v1/status`. `outbox` is empty, and pending 0, where nothing is exported."""

    version: str
    now_unix_s: float  # by the agent's clock, for whoever compares instants
    started_unix_s: float
    uptime_s: float
    samplers: tuple[SamplerStatus, ...]
    store: StoreStatus
    outbox: OutboxStatus
    servers: tuple[ServerStatus, ...]
    gpus: tuple[GpuStatus, ...]
    receiver: ReceiverStatus | None = None
    notes: tuple[str, ...] = ()  # what is not as it should be, a line each


class Live(Protocol):
    """The agent while it runs. Everything here is asked from its own event loop."""

    @property
    def config(self) -> Config: ...

    @property
    def history(self) -> History:
        """The store's writer; whoever reads opens `agent.recall.Recall(history.path)`."""
        ...

    def status(self) -> Status: ...

    def batches(self) -> Sequence[Batch]:
        """The newest readings of every source, the agent itself included: what is exported."""
        ...

    def is_ready(self) -> bool:
        """Whether each source goes on from what the store knows, and was asked (or had time to)."""
        ...

    def newest_unix_s(self) -> Mapping[str, float]:
        """When each source was sampled last, which may have been by an earlier agent."""
        ...

    def open_minutes(self) -> Sequence[Minute]:
        """The minute that each source is still in, up to its last sample. Not yet in the store."""
        ...
