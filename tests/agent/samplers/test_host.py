"""The machine and the server's process: a real /proc where there is one, and written ones."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent.metrics import CATALOGUE
from agent.model import Reading
from agent.samplers import host
from agent.samplers.host import HostSampler
from tests.support import require

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")


def values(readings: list[Reading], *labels: tuple[str, str]) -> dict[str, float]:
    assert {one.name for one in readings} <= CATALOGUE.keys()
    return {one.name: one.value for one in readings if one.labels == labels}


@pytest.fixture
def none(tmp_path: Path) -> Path:
    return tmp_path / "none"


# ------------------------------------------------------------------------------------ the machine


@needs_proc
async def test_this_machine(none: Path) -> None:
    sampler = HostSampler(powercap=none)
    first = values(await sampler.sample())
    busy_until = time.monotonic() + 0.2
    while time.monotonic() < busy_until:
        pass
    fields = values(await sampler.sample())
    await sampler.close()
    await sampler.close()
    assert "host_cpu_usage_ratio" not in first  # of the time between two samples
    assert 0 < fields["host_cpu_usage_ratio"] <= 1
    assert fields["host_cpus"] == os.cpu_count()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert fields["host_memory_total_bytes"] == pytest.approx(total, rel=0.05)
    assert 0 < fields["host_memory_used_bytes"] < fields["host_memory_total_bytes"]
    assert fields["host_load1"] >= 0


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = """MemTotal:       16000 kB
MemFree:         1000 kB
MemAvailable:    6000 kB
SwapTotal:       4000 kB
SwapFree:        3000 kB
HugePages_Total:       0
"""


async def test_figures_of_a_written_proc(tmp_path: Path) -> None:
    proc = written(
        tmp_path,
        stat="cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 1\nbtime 1700000000\n",
        meminfo=MEMINFO,
        pressure__cpu="some avg10=1.5 avg60=0 avg300=0 total=2500000\n",
        pressure__memory=(
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000\n"
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=500\n"
        ),
    )
    sampler = HostSampler(proc=proc, powercap=tmp_path / "none")
    await sampler.sample()
    written(proc, stat="cpu  160 0 140 800 200 0 0 0 50 0\n")
    readings = await sampler.sample()
    await sampler.close()
    fields = values(readings)
    assert fields["host_cpu_usage_ratio"] == pytest.approx(100 / 300)  # waiting for disks is idle
    assert fields["host_memory_used_bytes"] == 10_000 * 1024
    assert fields["host_memory_total_bytes"] == 16_000 * 1024
    assert fields["host_swap_used_bytes"] == 1_000 * 1024
    pressure = {one.labels: one.value for one in readings if one.name.startswith("host_pressure")}
    assert pressure == {
        (("resource", "cpu"), ("share", "some")): 2.5,
        (("resource", "memory"), ("share", "some")): 0.001,
        (("resource", "memory"), ("share", "full")): 0.0005,
    }


@pytest.mark.parametrize("text", ["", "MemTotal", "MemTotal: x kB\n", "MemTotal: 16000 kB\n"])
def test_a_meminfo_that_says_little(tmp_path: Path, text: str) -> None:
    assert host.memory(written(tmp_path, meminfo=text)) is None


async def test_without_proc_there_is_less_and_it_is_said(none: Path) -> None:
    sampler = HostSampler(ports=(8000,), proc=none, powercap=none)
    fields = values(await sampler.sample())
    await sampler.close()
    assert fields.keys() == {"host_cpus", "host_load1", "host_memory_total_bytes"}
    assert sampler.unseen == (
        f"processors, memory in use and processes: not told on {sys.platform}",
    )


def test_it_imports_elsewhere() -> None:
    code = "import os; del os.sysconf; os.sysconf_names = {}; import agent.samplers.host"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# ------------------------------------------------------------------------------------------ energy


def zone(folder: Path, name: str, zone_name: str, energy_uj: int) -> None:
    written(
        folder / name,
        name=zone_name + "\n",
        energy_uj=f"{energy_uj}\n",
        max_energy_range_uj="1000000000\n",
    )


def joules(readings: list[Reading]) -> dict[str, float]:
    return {
        dict(one.labels)["domain"]: one.value for one in readings if one.name == "host_energy_j"
    }


async def test_energy_over_the_end_of_its_counter(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:0:1", "dram", 10_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 900_000_000)  # the same counter once more
    sampler = HostSampler(powercap=tmp_path)
    assert joules(await sampler.sample()) == {"package-0": 0, "package-0/dram": 0, "package-1": 0}
    zone(tmp_path, "intel-rapl:0", "package-0", 50_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 13_000_000)
    assert joules(await sampler.sample()) == {"package-0": 150, "package-0/dram": 3, "package-1": 0}
    await sampler.close()


async def test_energy_that_this_user_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refusing(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", refusing)
    sampler = HostSampler(powercap=tmp_path)
    assert joules(await sampler.sample()) == {}
    await sampler.close()
    assert "the processors' energy (RAPL) may be read by root only" in sampler.unseen


# --------------------------------------------------------------------------- the server's processes

SERVER = """
import socket, subprocess, sys, time
listener = socket.socket(socket.{family})
listener.bind(("{address}", 0))
listener.listen()
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile True: time.sleep(0.01)"])
print(listener.getsockname()[1], child.pid, flush=True)
data = bytearray(30_000_000)
for at in range(0, len(data), 4096):
    data[at] = 1
try:
    while True:
        time.sleep(0.001)
except KeyboardInterrupt:
    child.kill()
"""


@pytest.fixture(params=["AF_INET", "AF_INET6"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, int]]:
    """A process that listens, with a child: (port, its pid, the child's)."""
    if request.param == "AF_INET6":
        require(Path("/proc/net/tcp6").exists() and socket.has_ipv6, "IPv6")
    address = "127.0.0.1" if request.param == "AF_INET" else "::1"
    code = SERVER.format(family=request.param, address=address)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child: int | None = None
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        require(words, f"a listener on {address}")
        port, child = int(words[0]), int(words[1])
        time.sleep(0.2)
        yield port, process.pid, child
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
        if child is not None:
            os.kill(child, 9)


@needs_proc
async def test_the_process_behind_a_port_and_its_children(
    server: tuple[int, int, int], none: Path
) -> None:
    port, pid, child = server
    sampler = HostSampler(ports=(port,), powercap=none)
    first = values(await sampler.sample(), ("port", str(port)))
    assert sampler.pids() == {port: {pid, child}}
    assert first["server_process_count"] == 2
    assert first["server_process_threads"] == 2
    assert first["server_process_memory_bytes"] > 30e6
    assert first["server_process_start_unix_s"] == pytest.approx(time.time(), abs=30)
    await asyncio.sleep(0.5)
    second = values(await sampler.sample(), ("port", str(port)))
    used_s = second["server_process_cpu_seconds_total"] - first["server_process_cpu_seconds_total"]
    assert 0 <= used_s < 1
    assert second["server_process_cpu_seconds_total"] > 0
    assert not [line for line in sampler.unseen if "port" in line]
    await sampler.close()


@needs_proc
async def test_a_port_that_nobody_listens_on(none: Path) -> None:
    with closing(socket.socket()) as unheard:
        unheard.bind(("127.0.0.1", 0))  # bound, and not listening
        port = unheard.getsockname()[1]
        sampler = HostSampler(ports=(port,), powercap=none)
        assert values(await sampler.sample(), ("port", str(port))) == {}
        await sampler.close()
    assert f"nothing listens on port {port} here, outside of containers" in sampler.unseen


STAT = (
    "{pid} ({name}) S {parent} 1 1 0 -1 4194304 0 0 0 0 {cpu} {cpu} 3 2 20 0 {threads} 0 {start} "
    "1000000 {pages} 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0\n"
)


class Proc:
    """A /proc with sockets, processes and their descriptors, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        written(folder, stat="cpu  1 0 1 1 1 0 0 0 0 0\nbtime 1700000000\n", meminfo=MEMINFO)
        (folder / "pressure").mkdir()

    def listens(self, port: int, inode: int, uid: int = 1000) -> None:
        head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        rows = "".join(
            f"   {place}: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 "
            f"00000000 {uid:>5}        0 {number} 1 0000000000000000 100 0 0 10 0\n"
            for place, (state, number) in enumerate([("0A", inode), ("01", 1)])
        )
        written(self.folder, net__tcp=head + rows)

    def process(
        self,
        pid: int,
        *,
        parent: int = 1,
        sockets: tuple[int, ...] = (),
        name: str = "python",
        start: int = 5000,
        cpu: int = 100,
    ) -> None:
        line = STAT.format(
            pid=pid, name=name, parent=parent, cpu=cpu, threads=4, start=start, pages=10
        )
        written(self.folder / str(pid), stat=line)
        descriptors = self.folder / str(pid) / "fd"
        descriptors.mkdir(exist_ok=True)
        for number, inode in enumerate(sockets):
            (descriptors / str(number)).symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "proc")


def sampled(proc: Proc, none: Path) -> HostSampler:
    return HostSampler(ports=(8000,), proc=proc.folder, powercap=none)


async def test_a_tree_of_processes(proc: Proc, none: Path) -> None:
    proc.listens(8000, 77)
    proc.process(10, sockets=(77,), name="api) S (x", start=6000)
    proc.process(11, parent=10)
    proc.process(12, parent=11)
    proc.process(13, parent=1)  # somebody else's
    proc.process(14, parent=13, sockets=(1,))  # connected to it, not listening
    sampler = sampled(proc, none)
    fields = values(await sampler.sample(), ("port", "8000"))
    await sampler.close()
    hertz = os.sysconf("SC_CLK_TCK")
    assert fields == {
        "server_process_cpu_seconds_total": 3 * 205 / hertz,  # waited-for descendants included
        "server_process_memory_bytes": 30 * os.sysconf("SC_PAGE_SIZE"),
        "server_process_threads": 12,
        "server_process_count": 3,
        "server_process_start_unix_s": 1700000000 + 5000 / hertz,
    }
    assert sampler.pids() == {8000: {10, 11, 12}}
    assert sampler.unseen == ()


async def test_a_restarted_server_is_found_at_once(proc: Proc, none: Path) -> None:
    proc.listens(8000, 77)
    proc.process(10, sockets=(77,))
    sampler = sampled(proc, none)
    await sampler.sample()
    proc.process(10, start=9000)  # the number was given to another process
    assert values(await sampler.sample(), ("port", "8000")) == {}
    proc.listens(8000, 78)
    proc.process(20, sockets=(78,), start=9500)
    fields = values(await sampler.sample(), ("port", "8000"))
    await sampler.close()
    assert fields["server_process_start_unix_s"] > 1700000090
    assert sampler.pids() == {8000: {20}}


async def test_the_tree_is_not_searched_for_at_each_sample(
    proc: Proc, none: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc.listens(8000, 77)
    proc.process(10, sockets=(77,))
    sampler = sampled(proc, none)
    await sampler.sample()
    monkeypatch.setattr(host, "holders", lambda *given: pytest.fail("searched again"))
    assert values(await sampler.sample(), ("port", "8000"))
    monkeypatch.setattr(host, "LOOK_NS", 0)  # as if half a minute had gone
    proc.process(11, parent=10)
    assert values(await sampler.sample(), ("port", "8000"))["server_process_count"] == 2
    await sampler.close()


async def test_a_socket_that_is_handed_on_is_followed(
    proc: Proc, none: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LOOK_NS", 0)
    proc.listens(8000, 77)
    proc.process(10, sockets=(77,))
    sampler = sampled(proc, none)
    await sampler.sample()
    shutil.rmtree(proc.folder / "10")
    proc.process(20, sockets=(77,))
    await sampler.sample()
    await sampler.close()
    assert sampler.pids() == {8000: {20}}


async def test_another_users_process_is_said(
    proc: Proc, none: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc.listens(8000, 77, uid=1234)
    proc.process(10)
    listed = os.listdir

    def refusing(folder: Path) -> list[str]:
        if str(folder).endswith("/fd"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    sampler = sampled(proc, none)
    assert values(await sampler.sample(), ("port", "8000")) == {}
    await sampler.close()
    assert sampler.unseen == (
        "the process on port 8000 belongs to user 1234, whose files this user may not see: "
        "run as that user or as root",
    )


async def test_a_containers_proxy_is_not_the_server(proc: Proc, none: Path) -> None:
    proc.listens(8000, 77)
    proc.process(10, sockets=(77,), name="docker-proxy")
    sampler = sampled(proc, none)
    assert values(await sampler.sample(), ("port", "8000")) == {}
    await sampler.close()
    assert sampler.unseen == ("port 8000 is held by docker-proxy, for a server in a container",)
