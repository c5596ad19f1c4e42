"""Which GPUs a server runs on: as it is configured, else by whose processes are on them.

Pure. Where the driver does not tell (inside a container, by another user), nothing is guessed but
for a server that is alone on its machine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from agent.config import Server
from agent.live import GpusBy

# GPU UUID → memory by process, as NVML tells it
Processes = Mapping[str, Mapping[int, int | None]]


class Owned(NamedTuple):
    gpus: tuple[str, ...]  # UUIDs
    by: GpusBy


def owned(
    server: Server,
    *,
    devices: Sequence[str],
    processes: Processes,
    pids: Collection[int],
    is_alone_here: bool,
) -> Owned:
    """A server's GPUs. `devices`: the UUIDs in the driver's order, `pids`: the server's processes
    on this machine, `is_alone_here`: no other server is configured, and this one is local."""
    if server.gpus:
        named = (_uuid(one, devices) for one in server.gpus)
        return Owned(tuple(one for one in named if one), "configuration")
    on = tuple(uuid for uuid in devices if not set(pids).isdisjoint(processes.get(uuid, ())))
    if on:
        return Owned(on, "process list")
    is_told = any(processes.get(uuid) for uuid in devices)  # and all of them are others'
    if is_alone_here and devices and not is_told:
        return Owned(tuple(devices), "only server")
    return Owned((), "unknown")


def _uuid(named: str | int, devices: Sequence[str]) -> str | None:
    if isinstance(named, str):
        return named
    return devices[named] if named < len(devices) else None
