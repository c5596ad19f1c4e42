"""Runs the real command as a child and says what it cost. Linux only, as the server is.

numpy and the like must not be imported here: at exec a child inherits its parent's peak of resident
memory, so a fat parent would be measured instead of the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """A child that ended, with what it and its own children cost."""

    stdout: str
    stderr: str
    code: int
    began_ns: int  # monotonic clock, before the child existed
    wall_s: float
    cpu_s: float
    rss_mb: float  # of all its processes together, at the peak
    others_cores: float  # what everybody else on this machine used meanwhile, the server included


def loadgen() -> list[str]:
    """The command that a user starts, of this interpreter's environment."""
    script = Path(sys.executable).with_name("loadgen")
    return [str(script)] if script.exists() else [sys.executable, "-m", "loadgen.cli"]


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> Ended:
    """Runs to the end, or kills it; wait4 gives the usage of this child and of its own children."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        busy0_s, began_ns = machine_busy_s(), time.monotonic_ns()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=env)
        limit = threading.Timer(timeout_s, process.kill)
        limit.start()
        with _memory_of(process.pid) as memory:
            _, status, usage = os.wait4(process.pid, 0)
        limit.cancel()
        wall_s = (time.monotonic_ns() - began_ns) / 1e9
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        cpu_s = usage.ru_utime + usage.ru_stime
        return Ended(
            stdout=out.read(),
            stderr=errors.read(),
            code=process.returncode,
            began_ns=began_ns,
            wall_s=wall_s,
            cpu_s=cpu_s,
            rss_mb=max(usage.ru_maxrss / 1024, *memory),
            others_cores=max(0.0, machine_busy_s() - busy0_s - cpu_s) / wall_s,
        )


MEMORY_INTERVAL_S = 0.25


@contextmanager
def _memory_of(pid: int) -> Iterator[list[float]]:
    """Looks now and then at the peaks of a process and all that it started; MB, summed."""
    sums = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(MEMORY_INTERVAL_S):
            sums.append(sum(status_mb(member, "VmHWM") for member in family(pid)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sums
    finally:
        ended.set()
        thread.join()


def family(pid: int) -> list[int]:
    """A process and its descendants, as far as they still run."""
    members = [pid]
    for member in members:  # grows while it is walked
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            with suppress(OSError):
                members += map(int, children.read_text().split())
    return members


def status_mb(pid: int, name: str) -> float:
    """VmRSS (memory now) or VmHWM (its peak) of a process; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def machine_busy_s() -> float:
    """CPU seconds used since the machine's start, and those that its host took for others."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _, _, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(url: str, database: Path, *options: str) -> tuple[Ended, dict[str, Any]]:
    """One `loadgen run` and its JSON."""
    command = [
        *loadgen(), "run", url, *options, "--metrics-url", "none", "--quiet", "--json", "-",
        "--db", str(database),
    ]  # fmt: skip
    ended = run(command)
    if ended.code not in (0, 3):  # 3: done, but it calls its own measurement invalid
        raise RuntimeError(f"{' '.join(command)}: exit code {ended.code}\n{ended.stderr}")
    report: dict[str, Any] = json.loads(ended.stdout)
    return ended, report
