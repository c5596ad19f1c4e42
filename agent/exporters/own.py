"""What the agent says of itself, as readings of the catalogue like everything else."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

from agent.model import Reading


def own_readings(
    at_ns: int, *, started_unix_s: float, store_bytes: int, writer_lag_s: float
) -> list[Reading]:
    """The agent's process and its store, at one instant; samplers and outbox have their own."""
    values = {
        "agent_start_unix_s": started_unix_s,
        "agent_cpu_seconds_total": time.process_time(),
        "agent_memory_bytes": memory_bytes(),
        "agent_store_bytes": store_bytes,
        "agent_store_writer_lag_s": writer_lag_s,
    }
    return [Reading(at_ns, name, float(value)) for name, value in values.items()]


def memory_bytes() -> int:
    """Resident memory now; where there is no /proc, the most it ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")
