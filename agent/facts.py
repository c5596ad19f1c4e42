"""What is so on this machine, for `agent.doctor` to judge: every look at the world is here.

Each look has a deadline and says what it found; one that fails says so as a fact and stops no
other. Nothing is changed: no file is made, no setting is touched, no prompt is sent.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib.metadata
import os
import platform
import re
import resource
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from agent import __version__
from agent.config import Config, Server, host_port, otlp_headers, read_headers, read_token
from agent.doctor import (
    VITAL_SERIES,
    Facts,
    GpuFacts,
    GpusFacts,
    HostFacts,
    Lacking,
    ListenFacts,
    ServerFacts,
    StoreFacts,
)
from agent.model import Reading, UsageError
from agent.samplers import SamplerError, dialects

if TYPE_CHECKING:
    from agent.samplers.server import ServerSampler

T = TypeVar("T")

LOOK_S = 2.0  # for one question to a socket, a file system or a driver
NVML_START_S = 10.0  # a driver without persistence mode starts anew
ENERGY_SPAN_S = 0.3  # the energy counter moves every 20 to 100 ms
BODY_BYTES_MAX = 1024 * 1024

# Where servers listen unless they are told otherwise: vLLM, trtllm-serve and Dynamo 8000, Triton
# 8002 (its metrics), llama.cpp and TGI 8080, SGLang 30000, LMDeploy 23333, Ollama 11434.
PORTS = (8000, 8002, 8080, 23333, 30000, 11434)
PAGES = ("/metrics", "/prometheus/metrics")  # the second is trtllm-serve's

# What every GPU of a data centre tells.
VITAL_FIELDS = (
    "gpu_memory_used_bytes", "gpu_utilization_ratio", "gpu_power_w", "gpu_energy_j",
    "gpu_temperature_c", "gpu_throttled",
)  # fmt: skip


async def gather(config: Config, file: str = "", urls: Sequence[str] = ()) -> Facts:
    """All facts, the slow ones at once. `urls` are servers besides those of the configuration."""
    wall_ns, steady_ns = time.time_ns(), time.monotonic_ns()
    cpu_before = _cpu_times()
    receiver = config.receive.otlp
    servers, gpus, listen, receive, otlp, store = await asyncio.gather(
        _servers(config, urls),
        _gpus(config),
        _listen(config, config.agent.listen),
        _listen(config, receiver.listen if receiver else None),
        _otlp(config),
        _store(config),
    )
    host = msgspec.structs.replace(
        _host(),
        clock_step_s=(time.time_ns() - wall_ns - (time.monotonic_ns() - steady_ns)) / 1e9,
        steal_ratio=_steal_ratio(cpu_before, _cpu_times()),
    )
    return Facts(
        version=__version__,
        python=platform.python_version(),
        sqlite=sqlite3.sqlite_version,
        packages=tuple(_packages()),
        config=file,
        open_secrets=tuple(_open_secrets(config)),
        gpus=gpus,
        servers=servers,
        ports=PORTS,
        store=store,
        host=host,
        listen=listen or ListenFacts(config.agent.listen),
        receive=receive,
        listed_gpus=tuple(gpu for server in config.server for gpu in server.gpus),
        otlp=otlp,
    )


async def within(deadline_s: float, look: Callable[[], T]) -> T:
    """What `look` finds, on a daemon thread: one that hangs is left behind. Raises TimeoutError."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = look()
        except BaseException as error:
            with suppress(Exception):
                future.set_exception(error)
        else:
            with suppress(Exception):
                future.set_result(result)

    threading.Thread(target=run, name="servefit-look", daemon=True).start()
    return await asyncio.wait_for(asyncio.wrap_future(future), deadline_s)


# ---------------------------------------------------------------------------------------- software

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9][0-9a-z.]*))?")


def _packages() -> Iterable[tuple[str, str | None, str]]:
    """Every package that this distribution needs here: name, version found, least version."""
    try:
        needed = importlib.metadata.requires("servefit") or []
    except importlib.metadata.PackageNotFoundError:
        return  # run from its sources
    for requirement in needed:
        match = _REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            here = importlib.metadata.version(match[1])
        except importlib.metadata.PackageNotFoundError:
            here = None
        yield match[1], here, match[2] or ""


def _open_secrets(config: Config) -> Iterable[str]:
    otlp = config.export.otlp
    headers = [one.headers_file for one in (*config.server, *((otlp,) if otlp else ()))]
    for path in (config.agent.token_file, *headers):
        with suppress(OSError):
            if path is not None and path.stat().st_mode & 0o007:
                yield str(path)


# --------------------------------------------------------------------------------------------- GPU

_MAKERS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_DISPLAY = ("0x0300", "0x0302", "0x0380", "0x1200")  # PCI classes of GPUs and accelerators


def hardware(pci: Path = Path("/sys/bus/pci/devices")) -> tuple[str, ...]:
    """Makers of the GPUs on the bus, with or without a driver."""
    makers = set()
    for vendor in pci.glob("*/vendor"):
        with suppress(OSError):
            maker = _MAKERS.get(vendor.read_text().strip())
            kind = (vendor.parent / "class").read_text().strip()
            if maker and kind.startswith(_DISPLAY):
                makers.add(maker)
    return tuple(sorted(makers))


async def _gpus(config: Config) -> GpusFacts:
    source, makers = config.gpu.source, hardware()
    if source == "none":
        return GpusFacts(source)
    if source == "dcgm":
        assert config.gpu.url is not None  # the configuration was checked
        return GpusFacts(source, await _dcgm(config.gpu.url), hardware=makers)
    if source == "amdsmi" or (source == "auto" and makers == ("AMD",)):
        return GpusFacts(source, await _amdsmi(), hardware=makers)
    return msgspec.structs.replace(await _nvml(), source=source, hardware=makers)


async def _dcgm(url: str) -> str:
    """What is wrong with a page of dcgm-exporter; "" for nothing."""
    async with aiohttp.ClientSession() as session:
        status, body, why = await _get(session, url)
    if why:
        return f"{url}: {why}"
    if status != 200 or b"DCGM_FI_DEV_" not in body:
        return f"{url}: is no page of dcgm-exporter (HTTP {status})"
    return ""


async def _amdsmi() -> str:
    def look() -> str:
        try:
            module: Any = importlib.import_module("amdsmi")
            module.amdsmi_init()
            found = module.amdsmi_get_processor_handles()
            module.amdsmi_shut_down()
        except Exception as error:  # the module brings a tree of its own, and a library
            return f"AMD's driver is not answering: {type(error).__name__}: {error}"
        return "" if found else "AMD's driver shows no GPU"

    try:
        return await within(NVML_START_S, look)
    except TimeoutError:
        return f"AMD's driver did not answer within {NVML_START_S:g} s"


async def _nvml() -> GpusFacts:
    """What the sampler reads, then what the driver says besides."""
    from agent.samplers.nvml import NvmlSampler

    try:
        sampler = await within(
            NVML_START_S + LOOK_S, lambda: NvmlSampler(start_deadline_s=NVML_START_S)
        )
    except (SamplerError, TimeoutError) as error:
        return GpusFacts(problem=str(error) or "the NVIDIA driver does not answer")
    try:
        read = list(await sampler.sample())
        await asyncio.sleep(ENERGY_SPAN_S)  # power is energy over time: two looks
        read += await sampler.sample()
        driver, gpus = await within(LOOK_S, _nvml_details)
    except (SamplerError, TimeoutError) as error:
        return GpusFacts(problem=str(error) or "the NVIDIA driver does not answer")
    finally:
        await sampler.close()
    given = {(dict(one.labels).get("gpu"), one.name) for one in read}
    return GpusFacts(
        driver=driver,
        gpus=tuple(
            msgspec.structs.replace(
                gpu, missing=tuple(f for f in VITAL_FIELDS if (gpu.uuid, f) not in given)
            )
            for gpu in gpus
        ),
    )


def _nvml_details() -> tuple[str, list[GpuFacts]]:
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    try:
        handles = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):
                handles.append(pynvml.nvmlDeviceGetHandleByIndex(index))
        driver = _said(lambda: pynvml.nvmlSystemGetDriverVersion())
        return str(driver or ""), [_nvml_device(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(handle: Any) -> GpuFacts:
    import pynvml

    def on(function: str, *args: Any) -> bool | None:
        mode = _said(lambda: getattr(pynvml, function)(handle, *args))
        return None if mode is None else bool(mode[0] if isinstance(mode, list | tuple) else mode)

    processes = _said(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    if processes is None:  # an older driver has the second version only
        processes = _said(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle))
    virtual = _said(lambda: pynvml.nvmlDeviceGetVirtualizationMode(handle))
    return GpuFacts(
        name=str(_said(lambda: pynvml.nvmlDeviceGetName(handle)) or "GPU"),
        uuid=str(_said(lambda: pynvml.nvmlDeviceGetUUID(handle)) or ""),
        persistence=on("nvmlDeviceGetPersistenceMode"),
        ecc=on("nvmlDeviceGetEccMode"),
        ecc_uncorrected=_said(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        ),
        mig=on("nvmlDeviceGetMigMode"),
        virtual=None if virtual is None else virtual == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU,
        processes=None if processes is None else tuple(one.pid for one in processes),
    )


def _said(ask: Callable[[], T]) -> T | None:
    """The driver's answer; None where it has none, or pynvml does not know the question."""
    import pynvml

    try:
        return ask()
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, AttributeError):
        return None


# ----------------------------------------------------------------------------------------- servers


async def _servers(config: Config, urls: Sequence[str]) -> tuple[ServerFacts, ...]:
    """The servers that were named, else those that answer on this machine's usual ports."""
    named = [*config.server, *(Server(url=url) for url in urls)]
    if named:
        return tuple(await asyncio.gather(*(_server(server) for server in named)))
    looked = await asyncio.gather(*(_usual(port) for port in PORTS))
    return tuple(one for one in looked if one is not None)


async def usual_servers() -> list[tuple[str, str]]:
    """URL and metrics page of each inference server that answers on this machine's usual ports."""
    looked = await asyncio.gather(*(_usual(port) for port in PORTS))
    found = [(one.url, urlsplit(one.url)) for one in looked if one is not None and not one.problem]
    return [(f"{parts.scheme}://{parts.netloc}", url) for url, parts in found]


async def _usual(port: int) -> ServerFacts | None:
    """What listens on a usual port, if it is an inference server; None otherwise."""
    if not await _listens("127.0.0.1", port):
        return None
    base = f"http://127.0.0.1:{port}"
    found = [await _server(Server(url=base, metrics_url=base + page)) for page in PAGES]
    best = next((one for one in found if one.engine and not one.problem), None)
    return best or next((one for one in found if one.engine), None)


async def _server(server: Server) -> ServerFacts:
    from agent.samplers.server import ServerSampler

    facts = ServerFacts(url=server.metrics_url, name=server.name)
    try:
        headers = read_headers(server.headers_file) if server.headers_file else {}
        trusted = ssl.create_default_context(cafile=server.ca_file) if server.ca_file else True
    except (UsageError, OSError) as error:
        return msgspec.structs.replace(facts, problem=str(error))
    # All of it, as the agent asks: llama.cpp tells of its KV cache on a page beside.
    sampler = ServerSampler(server.metrics_url, headers=headers, ssl=trusted, full=True)
    began = time.monotonic()
    try:
        found = await sampler.sample()
        return msgspec.structs.replace(
            facts,
            engine=sampler.engine,
            missing=missing_series(sampler.engine, found),
            page_bytes=sampler.page_bytes,
            scrape_s=time.monotonic() - began,
        )
    except SamplerError as error:
        engine = await _owner(sampler, server.url)
        return msgspec.structs.replace(facts, problem=str(error), engine=engine)
    finally:
        await sampler.close()


def missing_series(engine: str | None, found: Sequence[Reading]) -> tuple[Lacking, ...]:
    """What a page lacks, with what brings it where the dialect's table knows."""
    dialect = next((one for one in dialects.DIALECTS if one.name == engine), None)
    if dialect is not None:
        return tuple(
            Lacking(
                one.canonical, "" if one.brings.startswith("nothing") else one.brings, one.costs
            )
            for one in dialects.missing(found, dialect)
        )
    names = {one.name.removesuffix("_count") for one in found}
    mend = "update the server, or see which flag of it turns its metrics on"
    return tuple(Lacking(name, mend) for name in VITAL_SERIES if name not in names)


async def _owner(sampler: ServerSampler, url: str) -> str | None:
    """Who owns the models of a server, which is the engine's name for most; None if not told."""
    try:
        owner = (await sampler.get_json(f"{url}/v1/models"))["data"][0]["owned_by"]
    except (SamplerError, LookupError, TypeError):
        return None
    return owner if isinstance(owner, str) else None


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), LOOK_S)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


async def _get(
    session: aiohttp.ClientSession,
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] = {},
    tls: ssl.SSLContext | bool = True,
) -> tuple[int, bytes, str]:
    """Status, the body's beginning, and what went wrong in words ("" for nothing)."""
    try:
        async with asyncio.timeout(LOOK_S):
            call = session.request(method, url, headers=headers, ssl=tls, allow_redirects=False)
            async with call as reply:
                return reply.status, await reply.content.read(BODY_BYTES_MAX), ""
    except TimeoutError:
        return 0, b"", f"no answer within {LOOK_S:g} s"
    except aiohttp.ClientConnectorCertificateError:
        return 0, b"", "its TLS certificate is not trusted"
    except aiohttp.ClientConnectorError as error:
        return 0, b"", (os.strerror(error.errno) if error.errno else "no connection").lower()
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return 0, b"", f"no HTTP answer ({type(error).__name__})"


# --------------------------------------------------------------------------------- agent's own ends


async def _listen(config: Config, address: str | None) -> ListenFacts | None:
    """Whether an address is free, by binding it for an instant; who has it, if an agent."""
    if address is None:
        return None
    host, port = host_port(address)
    try:
        await within(LOOK_S, lambda: _bind(host, port))
    except TimeoutError:
        return ListenFacts(address, "its name was not resolved in time")
    except OSError as error:
        version = await _agent_version(config) if error.errno == errno.EADDRINUSE else ""
        taken = "another program listens there"
        why = taken if error.errno == errno.EADDRINUSE else str(error.strerror or error).lower()
        return ListenFacts(address, "" if version else why, version)
    return ListenFacts(address)


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)


async def _agent_version(config: Config) -> str:
    host, port = host_port(config.agent.listen)
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    place = f"[{shown}]" if ":" in shown else shown
    headers = {}
    if config.agent.token_file:
        with suppress(UsageError):
            headers["Authorization"] = f"Bearer {read_token(config.agent.token_file)}"
    async with aiohttp.ClientSession() as session:
        url = f"http://{place}:{port}/api/v1/status"
        _, body, _ = await _get(session, url, headers=headers)
    try:
        status = msgspec.json.decode(body)
        return str(status["version"]) if "samplers" in status else ""
    except (ValueError, TypeError, LookupError):
        return ""


async def _otlp(config: Config) -> tuple[str, str] | None:
    """Whether the back end takes metrics: an empty export, which is valid and leaves nothing."""
    export = config.export.otlp
    if export is None:
        return None
    try:
        headers = otlp_headers(export) | {"Content-Type": "application/x-protobuf"}
        tls = ssl.create_default_context(cafile=export.ca_file) if export.ca_file else True
    except (UsageError, OSError) as error:
        return export.endpoint, str(error)
    async with aiohttp.ClientSession() as session:
        url = f"{export.endpoint}/v1/metrics"
        status, _, why = await _get(session, url, method="POST", headers=headers, tls=tls)
    if not why and status in (401, 403):
        why = f"HTTP {status}: give its key by headers_file"
    elif not why and status // 100 != 2:
        why = f"HTTP {status} for /v1/metrics"
    return export.endpoint, why


async def _store(config: Config) -> StoreFacts:
    path = config.agent.db.absolute()
    facts = StoreFacts(str(path), free_bytes_min=config.store.free_bytes_min)
    try:
        return await within(LOOK_S, lambda: _look_at_store(path, facts))
    except TimeoutError:
        why = f"its file system did not answer within {LOOK_S:g} s"
    except OSError as error:
        why = (error.strerror or str(error)).lower()
    return msgspec.structs.replace(facts, problem=why)


def _look_at_store(path: Path, facts: StoreFacts) -> StoreFacts:
    folder = next(one for one in path.parents if one.exists())
    problem = ""
    if path.is_dir() or not folder.is_dir():
        problem = "a directory stands where the file belongs" if path.is_dir() else "no directory"
    elif not os.access(
        path if path.exists() else folder, os.W_OK | (0 if path.exists() else os.X_OK)
    ):
        problem = f"user {os.getuid()} may not write there"
    room = os.statvfs(folder)
    if not problem and room.f_flag & os.ST_RDONLY:
        problem = "the file system is read-only"
    return msgspec.structs.replace(
        facts,
        problem=problem,
        free_bytes=room.f_bavail * room.f_frsize,
        filesystem=_filesystem(folder),
        holders=tuple(_holders(path.with_name(path.name + "-lock"))),
    )


def _filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that holds `folder`; "" where it cannot be seen."""
    best, kind = "", ""
    with suppress(OSError):
        place = os.path.realpath(folder)
        for line in mounts.read_text("utf-8", "replace").splitlines():
            _, at, its_kind, *_ = line.replace("\\040", " ", 1).split(" ")
            inside = place == at or place.startswith(at.rstrip("/") + "/")
            if inside and len(at) >= len(best):
                best, kind = at, its_kind
    return kind


def _holders(path: Path, proc: Path = Path("/proc")) -> Iterable[int]:
    """Processes that have the file open, as far as this user may see."""
    if not path.exists():
        return
    wanted = os.path.realpath(path)
    for fds in proc.glob("[0-9]*/fd"):
        with suppress(OSError):
            if any(os.readlink(fd) == wanted for fd in fds.iterdir()):
                yield int(fds.parent.name)


# ------------------------------------------------------------------------------------ this machine


def _host() -> HostFacts:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    quota, throttled, memory = _cgroup()
    return HostFacts(
        cpus=os.cpu_count() or 1,
        quota_cpus=quota,
        throttled_ratio=throttled,
        governors=tuple(_governors()),
        memory_limit_bytes=memory,
        open_files=None if soft == resource.RLIM_INFINITY else soft,
        clock_synchronised=_clock_synchronised(),
        container=_container(),
        host_processes=_sees_host_processes(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> tuple[float | None, float | None, int | None]:
    """Of this container: processors allowed, share of periods it was stopped in, memory allowed.

    Control groups v2, and v1 where it is mounted; a group sees itself as the root.
    """
    quota_us, _, period_us = _text(root / "cpu.max").partition(" ")
    if not quota_us:
        quota_us = _text(root / "cpu/cpu.cfs_quota_us")
        period_us = _text(root / "cpu/cpu.cfs_period_us")
    quota = None
    if quota_us.isdigit() and period_us.isdigit() and int(period_us):
        quota = int(quota_us) / int(period_us)
    stat = _text(root / "cpu.stat") or _text(root / "cpu/cpu.stat")
    counts = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    periods, stopped = int(counts.get("nr_periods", 0)), int(counts.get("nr_throttled", 0))
    memory = _text(root / "memory.max") or _text(root / "memory/memory.limit_in_bytes")
    limit = int(memory) if memory.isdigit() and int(memory) < 2**60 else None  # v1: "no limit"
    return quota, stopped / periods if periods else None, limit


def _governors(cpu: Path = Path("/sys/devices/system/cpu")) -> Iterable[tuple[str, str]]:
    for folder in sorted(cpu.glob("cpu[0-9]*/cpufreq")):
        if governor := _text(folder / "scaling_governor"):
            yield governor, _text(folder / "scaling_driver")


def _cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, ...]:
    line = _text(stat).partition("\n")[0].split()
    return tuple(map(int, line[1:9])) if line[:1] == ["cpu"] else ()


def _steal_ratio(before: Sequence[int], after: Sequence[int]) -> float | None:
    """Share of processor time that the hypervisor kept; the eighth column of /proc/stat."""
    if len(before) < 8 or len(after) < 8:
        return None
    spent = sum(after) - sum(before)
    return (after[7] - before[7]) / spent if spent > 0 else None


def _container(root: Path = Path("/")) -> str:
    if (root / "var/run/secrets/kubernetes.io").exists():
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    return ""


def _sees_host_processes(proc: Path = Path("/proc")) -> bool:
    """The kernel's own threads are seen by who sees all processes: process 2 is kthreadd."""
    return not proc.exists() or _text(proc / "2/comm") == "kthreadd"


class _Timex(ctypes.Structure):
    """`struct timex` of <sys/timex.h>, as 64-bit Linux has it."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long), ("esterror", ctypes.c_long), ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 160),
    )  # fmt: skip


_STA_UNSYNC = 0x40


def _clock_synchronised() -> bool | None:
    """What the kernel was told by whoever sets the clock; None where it cannot be asked."""
    timex = _Timex()  # modes 0: nothing is set
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else not timex.status & _STA_UNSYNC
