"""What the agent says of itself, as readings of the catalogue like everything else."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.model import Reading


class SamplerStatus(msgspec.Struct, frozen=True):
    """How one sampler does; the fields are those of `/api/v1/status`."""

    name: str
    ok: bool  # did its last sample succeed?
    age_s: float | None  # since its last success; null before the first
    duration_s: float | None  # of its last sample
    samples: int = 0  # that succeeded, since the agent began
    errors: int = 0


def own_readings(
    at_ns: int,
    samplers: Iterable[SamplerStatus],
    *,
    started_unix_s: float,
    store_bytes: int,
    writer_lag_s: float,
) -> list[Reading]:
    """The readings of one instant; what is not known has none. The outbox has its own."""
    values: dict[str, float | None] = {
        "agent_start_unix_s": started_unix_s,
        "agent_cpu_seconds_total": time.process_time(),
        "agent_memory_bytes": memory_bytes(),
        "agent_store_bytes": store_bytes,
        "agent_store_writer_lag_s": writer_lag_s,
    }
    found: list[tuple[str, float | None, tuple[tuple[str, str], ...]]]
    found = [(name, value, ()) for name, value in values.items()]
    for one in samplers:
        of_one: dict[str, float | None] = {
            "agent_sampler_ok": float(one.ok),
            "agent_sampler_age_s": one.age_s,
            "agent_sampler_duration_s": one.duration_s,
            "agent_sampler_samples_total": one.samples,
            "agent_sampler_errors_total": one.errors,
        }
        found += [(name, value, (("sampler", one.name),)) for name, value in of_one.items()]
    return [
        Reading(at_ns, name, float(value), labels)
        for name, value, labels in found
        if value is not None
    ]


def memory_bytes() -> int:
    """Resident memory now; where there is no /proc, the most it ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
