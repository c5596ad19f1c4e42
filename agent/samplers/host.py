"""What the machine does, and the process of the inference server on it: read from /proc and /sys.

No privileges are needed for most of it, and what this user may not see is said (`unseen`) and left
out. Elsewhere than on Linux there is the load and the size of memory, and no more.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from agent.model import Reading
from agent.samplers.worker import Worker

PROC = Path("/proc")
POWERCAP = Path("/sys/class/powercap")
LOOK_NS = 30_000_000_000  # how often a server's process and its descendants are looked for

_LISTENING = b"0A"
_ENERGY_ZONES = re.compile(r"package-\d+|dram|psys")
_PROXIES = ("docker-proxy", "rootlessport")  # they hold a container's port on this machine

Label = tuple[str, str]


# ------------------------------------------------------------------------------------ the machine


class Memory(msgspec.Struct, frozen=True):
    total_bytes: int
    used_bytes: int  # all but what programs could get without swapping
    swap_used_bytes: int


def memory(proc: Path = PROC) -> Memory | None:
    """The machine's memory; None where there is no /proc/meminfo."""
    try:
        lines = (proc / "meminfo").read_text("ascii").splitlines()
        kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        return Memory(
            total_bytes=kilobytes["MemTotal"] * 1024,
            used_bytes=(kilobytes["MemTotal"] - kilobytes["MemAvailable"]) * 1024,
            swap_used_bytes=(kilobytes["SwapTotal"] - kilobytes["SwapFree"]) * 1024,
        )
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _cpu_ticks(proc: Path) -> tuple[int, int] | None:
    """Ticks in use and in all since the boot, over all processors. Waiting for a disk is idle.

    Guests are counted in user and nice already.
    """
    try:
        words = (proc / "stat").read_text("ascii").partition("\n")[0].split()
        ticks = [int(word) for word in words[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(ticks) - ticks[3] - ticks[4], sum(ticks)) if len(ticks) == 8 else None


def _pressure(proc: Path) -> Iterator[tuple[tuple[Label, ...], float]]:
    """Seconds since the boot in which some or all tasks waited for a resource (kernel's PSI)."""
    for resource in ("cpu", "io", "memory"):
        try:
            lines = (proc / "pressure" / resource).read_text("ascii").splitlines()
        except OSError:  # a kernel without PSI (EOPNOTSUPP where it is switched off)
            continue
        for line in lines:
            share, _, rest = line.partition(" ")
            total = rest.rpartition("total=")[2]
            if total.isdigit():
                yield (("resource", resource), ("share", share)), int(total) / 1e6


class _Energy:
    """Energy of processor packages and their memory (RAPL), in J since the first reading.

    Readable by root only since Linux 5.10: power tells secrets (CVE-2020-8694).
    """

    def __init__(self, folder: Path) -> None:
        self.refused = False
        self._joules: dict[Path, float] = {}
        self._last_uj: dict[Path, int] = {}
        self._zones = dict(_energy_zones(folder))

    def read(self) -> Iterator[tuple[str, float]]:
        self.refused = False
        for zone, name in self._zones.items():
            try:
                now_uj = int((zone / "energy_uj").read_text("ascii"))
                span_uj = int((zone / "max_energy_range_uj").read_text("ascii"))
            except PermissionError:
                self.refused = True
                continue
            except (OSError, ValueError):
                continue
            rise_uj = now_uj - self._last_uj.get(zone, now_uj)
            if rise_uj < 0:  # the counter begins anew at its end
                rise_uj += span_uj
            self._last_uj[zone] = now_uj
            self._joules[zone] = self._joules.get(zone, 0.0) + rise_uj / 1e6
            yield name, self._joules[zone]


def _energy_zones(folder: Path) -> Iterator[tuple[Path, str]]:
    """Zones with their names: package-0, package-0/dram. Cores are part of their package."""
    names: dict[str, str] = {}
    for zone in sorted(folder.glob("*-rapl:*")):
        try:
            name = (zone / "name").read_text("ascii").strip()
        except OSError:
            continue
        names[zone.name] = name
        if _ENERGY_ZONES.fullmatch(name) and not zone.name.startswith("intel-rapl-mmio"):
            above = names.get(zone.name.rpartition(":")[0])
            yield zone, f"{above}/{name}" if above else name


# ------------------------------------------------------------------------------------ a process


class _Stat(msgspec.Struct, frozen=True):
    """What /proc/PID/stat says of one process."""

    command: str
    cpu_ticks: int  # its own, and those of descendants that ended and were waited for
    threads: int
    started_ticks: int  # since the boot
    pages: int


def _stat_words(proc: Path, pid: int) -> tuple[bytes, list[bytes]]:
    """The name and what follows it in /proc/PID/stat. Raises OSError where it ended.

    By file descriptor: of a thousand processes a Path's own reading takes 0.1 s.
    """
    descriptor = os.open(f"{proc}/{pid}/stat", os.O_RDONLY)
    try:
        text = os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
    name, _, rest = text.partition(b"(")[2].rpartition(b")")  # a name may hold either
    return name, rest.split()


def _stat(proc: Path, pid: int) -> _Stat | None:
    try:
        name, words = _stat_words(proc, pid)
        return _Stat(
            command=name.decode("utf-8", "replace"),
            cpu_ticks=sum(int(word) for word in words[11:15]),
            threads=int(words[17]),
            started_ticks=int(words[19]),
            pages=int(words[21]),
        )
    except (OSError, ValueError, IndexError):
        return None  # it ended


def _pids(proc: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return []


def listening(port: int, proc: Path = PROC) -> dict[int, int]:
    """The sockets that listen on a TCP port of this machine: inode → user who made it.

    The kernel lists listening sockets before the connections, of which a busy server has thousands:
    reading ends with the first of those.
    """
    found: dict[int, int] = {}
    for table in ("tcp", "tcp6"):
        try:
            with open(proc / "net" / table, "rb") as lines:
                next(lines, None)  # the heading
                for words in map(bytes.split, lines):
                    if words[3] != _LISTENING:
                        break
                    if int(words[1].rpartition(b":")[2], 16) == port:
                        found[int(words[9])] = int(words[7])
        except (OSError, ValueError, IndexError):
            continue
    return found


def holders(inodes: Iterable[int], proc: Path = PROC) -> tuple[set[int], bool]:
    """The processes that hold one of these sockets, and whether all processes could be seen."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found: set[int] = set()
    complete = True
    for pid in _pids(proc) if wanted else ():
        try:
            if any(target in wanted for target in _open_files(proc / str(pid) / "fd")):
                found.add(pid)
        except PermissionError:
            complete = False
        except OSError:
            continue  # it ended under our eyes
    return found, complete


def _open_files(folder: Path) -> Iterator[str]:
    for name in os.listdir(folder):
        try:
            yield os.readlink(f"{folder}/{name}")
        except FileNotFoundError:
            continue  # closed under our eyes


def tree(roots: Iterable[int], proc: Path = PROC) -> dict[int, int]:
    """Processes with all their descendants: pid → when it began, in ticks since the boot."""
    todo = set(roots)
    if not todo:
        return {}
    children: dict[int, list[int]] = {}
    began: dict[int, int] = {}
    for pid in _pids(proc):
        try:
            words = _stat_words(proc, pid)[1]
            parent, began[pid] = int(words[1]), int(words[19])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(pid)
    found: dict[int, int] = {}
    while todo:
        pid = todo.pop()
        if pid in began and pid not in found:
            found[pid] = began[pid]
            todo.update(children.get(pid, ()))
    return found


class _ServerProcess:
    """The process that listens on one port, and its descendants (engine, workers)."""

    def __init__(self, port: int, proc: Path) -> None:
        self.port = port
        self.pids: dict[int, int] = {}  # pid → when it began: numbers are given anew
        self.unseen: str | None = None
        self._proc = proc
        self._looked_ns: int | None = None
        self._sockets: frozenset[int] = frozenset()  # whose holders were searched for
        self._holders: set[int] = set()
        self._complete = True  # all processes could be seen

    def read(self, now_ns: int) -> dict[str, float]:
        """What its processes use now; empty where they cannot be seen."""
        if self._looked_ns is None or now_ns - self._looked_ns >= LOOK_NS:
            self._looked_ns = now_ns
            self._look()
        stats = [stat for pid in self.pids if (stat := self._same(pid))]
        if not stats:
            if self.pids:  # it ended; another may have begun
                self.pids, self._looked_ns = {}, None
            return {}
        first = min(stat.started_ticks for stat in stats)
        return {
            "server_process_cpu_seconds_total": sum(s.cpu_ticks for s in stats) / _TICKS_PER_S,
            "server_process_memory_bytes": sum(s.pages for s in stats) * _PAGE_BYTES,
            "server_process_threads": sum(s.threads for s in stats),
            "server_process_count": len(stats),
            "server_process_start_unix_s": _booted_unix_s(self._proc) + first / _TICKS_PER_S,
        }

    def _same(self, pid: int) -> _Stat | None:
        stat = _stat(self._proc, pid)
        return stat if stat and stat.started_ticks == self.pids.get(pid) else None

    def _look(self) -> None:
        sockets = listening(self.port, self._proc)
        if sockets.keys() != self._sockets or any(not self._same(pid) for pid in self._holders):
            # Every file of every process: a fifth of a second where a thousand run.
            self._sockets = frozenset(sockets)
            self._holders, self._complete = holders(sockets, self._proc)
        self.pids = tree(self._holders, self._proc)
        self.unseen = self._why(sockets)

    def _why(self, sockets: Mapping[int, int]) -> str | None:
        if not sockets:
            return f"nothing listens on port {self.port} here, outside of containers"
        if not self._holders and not self._complete:
            users = ", ".join(str(user) for user in sorted(set(sockets.values())))
            return (
                f"the process on port {self.port} belongs to user {users}, whose files this user "
                "may not see: run as that user or as root"
            )
        for pid in self._holders:
            stat = _stat(self._proc, pid)
            if stat and stat.command in _PROXIES:
                self.pids = {}
                return f"port {self.port} is held by {stat.command}, for a server in a container"
        return None


_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _booted_unix_s(proc: Path) -> float:
    try:
        for line in (proc / "stat").read_text("ascii").splitlines():
            if line.startswith("btime "):
                return float(line.split()[1])
    except OSError:
        pass
    return 0.0


# ----------------------------------------------------------------------------------------- sampler


class HostSampler:
    """This machine, and the processes that listen on `ports`.

    Processor use is of the time between two samples: the first has none. `unseen` says what this
    user cannot see, or this machine does not tell, each in one line.
    """

    name = "host"

    def __init__(
        self,
        *,
        ports: Sequence[int] = (),
        deadline_s: float = 2.0,
        proc: Path = PROC,
        powercap: Path = POWERCAP,
    ) -> None:
        self._proc = proc
        self._deadline_s = deadline_s
        self._energy = _Energy(powercap)
        self._servers = [_ServerProcess(port, proc) for port in ports]
        self._cpu: tuple[int, int] | None = None
        self._worker = Worker("servefit-host")
        self._closed = False
        self.unseen: tuple[str, ...] = ()

    async def sample(self) -> list[Reading]:
        return await self._worker.ask(self._read, self._deadline_s, "this machine's /proc")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._worker.end()

    def pids(self) -> Mapping[int, frozenset[int]]:
        """Per port: the processes of its server, as of the newest look."""
        return {server.port: frozenset(server.pids) for server in self._servers}

    def _read(self) -> list[Reading]:
        at_ns = time.monotonic_ns()
        readings = [Reading(at_ns, name, value) for name, value in self._machine().items()]
        readings += [
            Reading(at_ns, "host_pressure_seconds_total", seconds, labels)
            for labels, seconds in _pressure(self._proc)
        ]
        readings += [
            Reading(at_ns, "host_energy_j", joules, (("domain", domain),))
            for domain, joules in self._energy.read()
        ]
        for server in self._servers:
            labels = (("port", str(server.port)),)
            used = server.read(at_ns)
            readings += [Reading(at_ns, name, value, labels) for name, value in used.items()]
        self.unseen = tuple(self._unseen())
        return readings

    def _machine(self) -> dict[str, float]:
        values: dict[str, float] = {"host_cpus": os.cpu_count() or 1}
        values["host_load1"] = os.getloadavg()[0]
        cpu, before = _cpu_ticks(self._proc), self._cpu
        if cpu and before and cpu[1] > before[1]:
            share = (cpu[0] - before[0]) / (cpu[1] - before[1])
            values["host_cpu_usage_ratio"] = min(max(share, 0.0), 1.0)
        self._cpu = cpu
        of_host = memory(self._proc)
        if of_host:
            values["host_memory_used_bytes"] = of_host.used_bytes
            values["host_memory_total_bytes"] = of_host.total_bytes
            values["host_swap_used_bytes"] = of_host.swap_used_bytes
        elif "SC_PHYS_PAGES" in os.sysconf_names:
            values["host_memory_total_bytes"] = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
        return values

    def _unseen(self) -> Iterator[str]:
        if not (self._proc / "stat").exists():
            yield f"processors, memory in use and processes: not told on {sys.platform}"
            return
        if not (self._proc / "pressure").exists():
            yield "stalls: this kernel keeps no pressure figures (PSI)"
        if self._energy.refused:
            yield "the processors' energy (RAPL) may be read by root only"
        yield from (server.unseen for server in self._servers if server.unseen)
