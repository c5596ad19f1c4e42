"""What this machine lets a client hold open: said, with its cure, before a run needs more of it.

A stream takes a file descriptor of its process, and a local port towards the server's address and
port. A server far away has the same limits on its side, which cannot be seen from here.
"""

from __future__ import annotations

import math
import os
import resource
from contextlib import suppress
from pathlib import Path

from agent.model import UsageError

# Files besides the streams that a run opens: database and its journals, metrics page, NVML,
# results, event loop, and the modules that are imported late.
OTHER_FILES = 48
WIDEST_PORTS = "1024 65535"


def check_streams(streams: int, port: int | None = None, *, processes: int = 1) -> None:
    """Raises UsageError where so many streams cannot be held; raises the soft limit where it can.

    `port` is the server's, where it is known; `processes` share the streams.
    """
    _check(streams, port, f"--concurrency {streams}", "streams", processes)


def check_rate(rate_rps: float, reply_s: float, port: int, *, processes: int = 1) -> None:
    """The same for an open loop, that holds `rate_rps` · `reply_s` connections (Little's law).

    `reply_s` is what is known of how long a reply takes: with a lower bound of it what is refused
    is sure not to fit, and what is not refused may still be too much.
    """
    asked = f"--rate {rate_rps:g} with replies of {reply_s:.3g} s"
    _check(math.ceil(rate_rps * reply_s), port, asked, "connections", processes)


def _check(needed: int, port: int | None, asked: str, what: str, processes: int) -> None:
    files = math.ceil(needed / processes) + open_files() + OTHER_FILES
    allowed = allow_files(files)
    if files > allowed:
        most = max(0, allowed - (files - math.ceil(needed / processes))) * processes
        raise UsageError(
            f"{asked} takes {files:,} open files{' a process' if processes > 1 else ''} "
            f"and {allowed:,} are allowed here: raise the limit (`ulimit -n {files}` as root, "
            "LimitNOFILE= of a service, --ulimit nofile= of a container), or ask for at most "
            f"{most:,} {what}"
        )
    ports = free_ports(port)
    if ports is not None and needed > ports:
        raise UsageError(
            f"{asked} takes {needed:,} local ports and {ports:,} are free: widen their range "
            f"(`sysctl -w net.ipv4.ip_local_port_range='{WIDEST_PORTS}'`), measure from more "
            f"addresses (another machine or container), or ask for at most {ports:,} {what}"
        )


def allow_files(wanted: int) -> int:
    """Raises this process's soft limit of open files to `wanted`, as far as the hard one lets it.

    Returns what is allowed now. Children inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _at_least(soft, wanted):
        return wanted if soft == resource.RLIM_INFINITY else soft
    goal = wanted if _at_least(hard, wanted) else hard
    with suppress(ValueError, OSError):  # macOS allows less than its hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
        return goal
    return soft


def _at_least(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def open_files() -> int:
    """How many file descriptors this process has open; 0 where that cannot be seen."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def free_ports(server_port: int | None, proc: Path = Path("/proc")) -> int | None:
    """Local ports that are free for connections to `server_port`; None where it cannot be seen.

    Those that lead to the same port of any address count as taken: it is the usual case, and the
    other way round a run would be refused in its middle.
    """
    try:
        text = (proc / "sys/net/ipv4/ip_local_port_range").read_text()
        low, high = (int(word) for word in text.split())
    except (OSError, ValueError):
        return None
    if server_port is None:
        return max(0, high - low + 1)
    reuse = ""
    with suppress(OSError):
        reuse = (proc / "sys/net/ipv4/tcp_tw_reuse").read_text().strip()
    taken = 0
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            taken += _connections_to(server_port, (proc / "net" / name).read_text(), reuse)
    return max(0, high - low + 1 - taken)


TIME_WAIT = "06"
LOOPBACK = ("7F", "00000000000000000000000001000000")  # the ends of 127.*.*.* and of ::1


def _connections_to(port: int, table: str, reuse: str) -> int:
    """Lines of /proc/net/tcp whose remote end is `port`: `sl local:port remote:port state …`.

    A closed connection holds its port for a minute (TIME_WAIT), unless the kernel may use it again:
    `tcp_tw_reuse` 1 always, 2 (the default) on the loopback.
    """
    taken = 0
    for line in table.splitlines()[1:]:
        row = line.split(maxsplit=4)
        address, _, number = row[2].partition(":") if len(row) > 3 else ("", "", "")
        if number != f"{port:04X}":
            continue
        free = reuse == "1" or (reuse == "2" and address.endswith(LOOPBACK))
        taken += row[3] != TIME_WAIT or not free
    return taken
