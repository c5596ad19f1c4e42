"""What would stop a good measurement here, each with the flag or command that mends it.

Judgements only: `agent.facts` finds out what is so, a function here says what it means. The order
of `EXAMINATIONS` is the order of the lines. `bad`: something is not measured, or wrongly. `warn`:
it is measured, and worse than it could be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from agent.words import printable

Status = Literal["ok", "warn", "bad"]

STEAL_RATIO_MAX = 0.05
THROTTLED_RATIO_MAX = 0.05
QUOTA_CPUS_MIN = 0.25  # the agent takes a hundredth of that, in bursts
MEMORY_LIMIT_BYTES_MIN = 256 * 2**20
OPEN_FILES_MIN = 1024
CLOCK_STEP_S_MAX = 0.05  # within the seconds that the doctor looks
SCRAPE_S_MAX = 1.0
PAGE_BYTES_MAX = 2 * 2**20

# The series without which a verdict has no evidence (a histogram by its name): that one is missing
# is to be mended; of the many others it is only told.
VITAL_SERIES = (
    "requests_running", "requests_waiting", "kv_usage_ratio", "prompt_tokens_total",
    "output_tokens_total", "ttft_seconds", "itl_seconds",
)  # fmt: skip

# ------------------------------------------------------------------------------------------- facts


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU as NVML tells of it; None where the driver does not say."""

    name: str
    uuid: str
    missing: tuple[str, ...] = ()  # canonical series that it gave no reading of
    persistence: bool | None = None
    ecc: bool | None = None
    ecc_uncorrected: int | None = None  # since the driver was loaded
    virtual: bool | None = None
    mig: bool | None = None
    processes: tuple[int, ...] | None = None  # ids, as the host counts them


class GpusFacts(msgspec.Struct, frozen=True):
    """The source of GPU readings. `hardware`: makers of GPUs on the PCI bus."""

    source: str = "auto"
    problem: str = ""
    driver: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    hardware: tuple[str, ...] = ()


class Lacking(msgspec.Struct, frozen=True):
    """A series that a page has not. `brings` is empty where no setting of the server writes it."""

    name: str
    brings: str = ""
    costs: str = ""


class ServerFacts(msgspec.Struct, frozen=True):
    """One inference server's metrics page. `problem` is empty where the page was read."""

    url: str
    name: str = ""
    problem: str = ""
    engine: str | None = None
    missing: tuple[Lacking, ...] = ()
    page_bytes: int = 0
    scrape_s: float = 0.0


class StoreFacts(msgspec.Struct, frozen=True):
    path: str
    problem: str = ""
    free_bytes: int | None = None
    free_bytes_min: int = 0
    filesystem: str = ""
    holders: tuple[int, ...] = ()  # agents that have it, by their lock


class HostFacts(msgspec.Struct, frozen=True):
    """This machine, or what a container is given of it; None where it cannot be seen."""

    cpus: int = 1
    quota_cpus: float | None = None
    throttled_ratio: float | None = None
    steal_ratio: float | None = None
    governors: tuple[tuple[str, str], ...] = ()  # (governor, driver) of each processor
    memory_limit_bytes: int | None = None
    open_files: int | None = None  # soft limit; None: no limit
    clock_synchronised: bool | None = None
    clock_step_s: float = 0.0
    container: str = ""
    host_processes: bool = True  # whether /proc shows the processes of the whole machine


class ListenFacts(msgspec.Struct, frozen=True):
    """The agent's own address: free, taken by an agent (`version`), or by somebody else."""

    address: str
    problem: str = ""
    version: str = ""


class Facts(msgspec.Struct, frozen=True):
    """Everything that was found out."""

    version: str
    python: str
    sqlite: str
    packages: tuple[tuple[str, str | None, str], ...]  # name, version here, least version needed
    config: str  # the file, or "" for the defaults
    open_secrets: tuple[str, ...]  # files of secrets that others may read
    gpus: GpusFacts
    servers: tuple[ServerFacts, ...]
    ports: tuple[int, ...]  # looked at because no server was named
    store: StoreFacts
    host: HostFacts
    listen: ListenFacts
    receive: ListenFacts | None = None  # of [receive.otlp]
    listed_gpus: tuple[str | int, ...] = ()  # by [[server]] gpus: indices and UUIDs
    otlp: tuple[str, str] | None = None  # endpoint, and its problem or ""


# ----------------------------------------------------------------------------------------- checks


class Check(msgspec.Struct, frozen=True):
    """One line of the doctor's. `mend` is empty where all is well."""

    name: str
    status: Status
    says: str
    mend: str = ""


def ok(name: str, says: str) -> Check:
    return Check(name, "ok", says)


def warn(name: str, says: str, mend: str) -> Check:
    return Check(name, "warn", says, mend)


def bad(name: str, says: str, mend: str) -> Check:
    return Check(name, "bad", says, mend)


def examine(facts: Facts) -> list[Check]:
    """Every judgement, in the order of the lines."""
    return [check for examination in EXAMINATIONS for check in examination(facts)]


def to_mend(checks: Iterable[Check]) -> int:
    """How many checks say that something is to mend."""
    return sum(check.status != "ok" for check in checks)


def exit_code(checks: Iterable[Check]) -> int:
    """0 all well, 1 something to mend."""
    return int(to_mend(checks) > 0)


# --------------------------------------------------------------------------------------- software


def software(facts: Facts) -> Iterator[Check]:
    says = f"servefit {facts.version}, Python {facts.python}, SQLite {facts.sqlite}"
    lacking = [
        f"{name} {here or 'is not there'} (needs {least})" if least else f"{name} is not there"
        for name, here, least in facts.packages
        if here is None or _release(here) < _release(least)
    ]
    if lacking:
        yield bad("software", f"{says}; {', '.join(lacking)}", "pip install --upgrade servefit")
    else:
        yield ok("software", says)


def _release(version: str) -> tuple[int, ...]:
    """`3.11.2` as numbers; what follows the numbers (`rc1`, `.dev0`) is left out."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def configuration(facts: Facts) -> Iterator[Check]:
    if not facts.config:
        yield ok("config", "none given: the defaults (config/agent.example.toml lists them)")
        return
    yield ok("config", f"{facts.config} is valid")
    if facts.open_secrets:
        files = " ".join(facts.open_secrets)
        yield warn("config", f"everybody on this machine can read {files}", f"chmod 600 {files}")


# -------------------------------------------------------------------------------------------- GPU

_DRIVER = "install the driver of your distribution, then check with `nvidia-smi`"
_IN_CONTAINER = (
    "start the container with `--gpus all` (NVIDIA_DRIVER_CAPABILITIES=utility; Kubernetes: "
    "runtimeClassName: nvidia, as in config/kubernetes.yaml)"
)


def gpu_source(facts: Facts) -> Iterator[Check]:
    gpus, host = facts.gpus, facts.host
    if gpus.source == "none":
        yield ok("gpu", 'not read: [gpu] source = "none"')
    elif not gpus.problem:
        shown = ", ".join(f"{n} × {name}" for name, n in Counter(g.name for g in gpus.gpus).items())
        driver = f", driver {gpus.driver}" if gpus.driver else ""
        yield ok("gpu", f"{gpus.source}: {shown or 'it answers'}{driver}")
    elif gpus.source == "dcgm":
        yield bad("gpu", gpus.problem, "start dcgm-exporter there, or mend [gpu] url")
    elif gpus.source == "amdsmi" or (gpus.source == "auto" and gpus.hardware == ("AMD",)):
        yield bad("gpu", gpus.problem, "install ROCm's amd-smi and its Python module amdsmi")
    elif "NVIDIA" in gpus.hardware:
        yield bad("gpu", gpus.problem, _IN_CONTAINER if host.container else _DRIVER)
    else:
        yield warn(
            "gpu",
            gpus.problem,
            "run the agent where the GPUs are, or read them from there: [gpu] "
            'source = "dcgm", url = "http://GPU-HOST:9400/metrics"; where servers run on '
            'processors alone, source = "none"',
        )


_FIELD_MENDS = {
    "gpu_energy_j": "older GPUs have no energy counter: power is polled instead, and less exact",
    "gpu_power_w": "in a virtual machine ask the provider; elsewhere update the driver",
}


def gpu_devices(facts: Facts) -> Iterator[Check]:
    for gpu in facts.gpus.gpus:
        name = f"gpu {gpu.uuid[:12]}"
        if gpu.missing:
            mends = [_FIELD_MENDS[field] for field in gpu.missing if field in _FIELD_MENDS]
            yield warn(
                name,
                f"gives no {', '.join(gpu.missing)}",
                "; ".join(mends) or "update the driver; what is missing is left empty",
            )
        if gpu.persistence is False:
            yield warn(
                name,
                "persistence mode is off: the driver unloads when idle, and the energy counter "
                "begins anew",
                "sudo nvidia-smi -pm 1 (lasting: systemctl enable --now nvidia-persistenced)",
            )
        if gpu.ecc_uncorrected:
            yield warn(
                name,
                f"{gpu.ecc_uncorrected} memory errors that ECC could not correct",
                "see `nvidia-smi -q -d ECC,ROW_REMAPPER`; reset the GPU, and replace it if they "
                "come back",
            )
        if gpu.virtual:
            yield warn(
                name,
                "is a virtual GPU: power and utilization are not those of the device",
                'read the device where it is: [gpu] source = "dcgm" with the url of that machine',
            )
        yield from _gpu_processes(name, gpu)
    here = {gpu.uuid for gpu in facts.gpus.gpus} | set(range(len(facts.gpus.gpus)))
    unknown = [str(gpu) for gpu in facts.listed_gpus if gpu not in here]
    if unknown and facts.gpus.gpus and not any(gpu.mig for gpu in facts.gpus.gpus):
        yield bad(
            "gpu",
            f"[[server]] gpus names {', '.join(unknown)}, which is not here",
            "take indices or UUIDs that `nvidia-smi -L` lists",
        )
    if any(gpu.processes for gpu in facts.gpus.gpus) and not facts.host.host_processes:
        yield warn(
            "gpu",
            "its processes are outside of this container, so servers and GPUs cannot be matched",
            "start the container with --pid=host (Kubernetes: hostPID: true), or write gpus = [0, "
            "…] under [[server]]",
        )


def _gpu_processes(name: str, gpu: GpuFacts) -> Iterator[Check]:
    if gpu.processes is None:
        yield warn(
            name,
            "the driver does not say which processes use it",
            "list them: gpus = [0, …] under [[server]]",
        )
    elif len(gpu.processes) > 1 and not gpu.mig:
        yield warn(
            name,
            f"{len(gpu.processes)} processes share it (time-slicing): utilization and energy "
            "cannot be told apart",
            "give each server a GPU of its own, or a part of one by MIG",
        )


# ---------------------------------------------------------------------------------------- servers

# What brings a metrics page that is not there, by who owns the server's models.
_PAGE_MENDS = {
    "sglang": "start SGLang with --enable-metrics",
    "llamacpp": "start llama-server with --metrics",
    "lmdeploy": "start LMDeploy's api_server without --disable-metrics",
    "tensorrt_llm": (
        "give trtllm-serve a configuration with return_perf_metrics: true; its page is "
        "/prometheus/metrics: metrics_url under [[server]]"
    ),
    "library": "Ollama has no metrics page: use a server that has one",
}
_NO_PAGE = "give the page's address: metrics_url under [[server]], or --url"


def servers(facts: Facts) -> Iterator[Check]:
    if not facts.servers:
        ports = ", ".join(map(str, facts.ports))
        yield bad(
            "server",
            f"none answers on this machine (ports {ports})",
            "start one (`loadgen serve sim` is one to try with), or name it: --url "
            "http://HOST:PORT, and [[server]] url in the configuration",
        )
    for server in facts.servers:
        yield from _server(server)


def _server(server: ServerFacts) -> Iterator[Check]:
    name = f"server {server.name}".strip()
    if server.problem:
        yield bad(name, server.problem, _PAGE_MENDS.get(server.engine or "", _NO_PAGE))
        return
    size = f"{server.page_bytes / 1000:.0f} kB in {server.scrape_s * 1000:.0f} ms"
    vital = [one for one in server.missing if one.name in VITAL_SERIES and one.brings]
    others = ", ".join(
        f"{one.name} ({one.brings})" if one.brings else one.name
        for one in server.missing
        if one not in vital
    )
    without = f"; without {others}" if others else ""
    yield ok(name, f"{server.engine or 'a server'} at {server.url}, {size}{without}")
    by_mend: dict[str, list[Lacking]] = defaultdict(list)
    for one in vital:
        by_mend[one.brings].append(one)
    for brings, lacking in by_mend.items():
        names = ", ".join(one.name for one in lacking)
        costs = "; ".join(dict.fromkeys(one.costs for one in lacking if one.costs))
        yield warn(name, f"its page has no {names}{f': {costs}' if costs else ''}", brings)
    if server.page_bytes > PAGE_BYTES_MAX or server.scrape_s > SCRAPE_S_MAX:
        yield warn(
            name,
            f"its page is heavy ({size}), and writing it takes time from its requests",
            'ask less often: interval = "30s" under [[server]]',
        )


# ----------------------------------------------------------------------------------------- machine

NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs")


def store(facts: Facts) -> Iterator[Check]:
    kept = facts.store
    if kept.problem:
        yield bad("store", f"{kept.path}: {kept.problem}", "give another: [agent] db")
        return
    if kept.filesystem in NETWORK_FILESYSTEMS:
        yield bad(
            "store",
            f"{kept.path} is on {kept.filesystem}: SQLite's log needs a disk of this machine",
            "give one: [agent] db",
        )
    if kept.free_bytes is None:
        return
    free = f"{kept.free_bytes / 2**30:.1f} GiB free"
    if kept.free_bytes < kept.free_bytes_min:
        yield bad(
            "store",
            f"{kept.path}: {free}, under the floor of {kept.free_bytes_min / 2**30:.1f} GiB",
            "make room, give another disk ([agent] db), or lower [store] free_floor",
        )
    else:
        yield ok("store", f"{kept.path}: can be written, {free}")


def listen(facts: Facts) -> Iterator[Check]:
    own, holders = facts.listen, facts.store.holders
    if own.version:
        yield ok("listen", f"an agent ({own.version}) answers on {own.address}")
    elif own.problem:
        yield bad(
            "listen", f"{own.address}: {own.problem}", "free it, or give another: [agent] listen"
        )
    else:
        yield ok("listen", f"{own.address} is free")
    if facts.receive is not None and facts.receive.problem and not own.version:
        says = f"{facts.receive.address}: {facts.receive.problem}"
        yield bad("receive", says, "free it, or give another: [receive.otlp] listen")
    if len(holders) > 1 or (holders and not own.version):
        ids = ", ".join(map(str, holders))
        yield warn(
            "store",
            f"{facts.store.path} is in use by process {ids}: a store takes one agent",
            "stop the other one, or give this one a db of its own: [agent] db",
        )


def otlp(facts: Facts) -> Iterator[Check]:
    if facts.otlp is None:
        return
    endpoint, problem = facts.otlp
    if problem:
        yield bad(
            "otlp",
            f"{endpoint}: {problem}",
            "start the collector, or mend [export.otlp]; what is due is kept until it answers",
        )
    else:
        yield ok("otlp", f"{endpoint} takes metrics")


def clock(facts: Facts) -> Iterator[Check]:
    host = facts.host
    if abs(host.clock_step_s) > CLOCK_STEP_S_MAX:
        yield warn(
            "clock",
            f"it jumped by {host.clock_step_s:+.2f} s while it was watched",
            "let one service alone set it, and slew it: chronyd or systemd-timesyncd",
        )
    elif host.clock_synchronised is False:
        yield warn(
            "clock",
            "not synchronised: times here and on other machines cannot be joined",
            "timedatectl set-ntp true (on the host, where this is a container)",
        )
    else:
        state = "synchronised" if host.clock_synchronised else "steady; nobody says if synchronised"
        yield ok("clock", state)


def processors(facts: Facts) -> Iterator[Check]:
    host, sound = facts.host, True
    for check in (*_limits(host), *_frequency(host)):
        sound = False
        yield check
    if sound:
        quota = f", limited to {host.quota_cpus:g}" if host.quota_cpus else ""
        yield ok("cpu", f"{host.cpus} processors{quota}")


def _limits(host: HostFacts) -> Iterator[Check]:
    quota, throttled, steal = host.quota_cpus, host.throttled_ratio, host.steal_ratio
    if quota is not None and quota < QUOTA_CPUS_MIN:
        yield warn(
            "cpu",
            f"this container may use {quota:g} of a processor: samples come late",
            "give it more, or no limit: --cpus, resources.limits.cpu, CPUQuota=",
        )
    elif throttled is not None and throttled > THROTTLED_RATIO_MAX:
        yield warn(
            "cpu",
            f"its limit stopped this container in {throttled:.0%} of all periods",
            "raise or drop the limit: --cpus, resources.limits.cpu, CPUQuota=",
        )
    if steal is not None and steal > STEAL_RATIO_MAX:
        yield warn(
            "cpu",
            f"the hypervisor takes {steal:.0%} of the processors away",
            "a machine with processors of its own; latencies measured here are not the server's",
        )
    if host.memory_limit_bytes is not None and host.memory_limit_bytes < MEMORY_LIMIT_BYTES_MIN:
        yield warn(
            "memory",
            f"this container may use {host.memory_limit_bytes / 2**20:.0f} MiB",
            f"give it {MEMORY_LIMIT_BYTES_MIN // 2**20} MiB: --memory, resources.limits.memory",
        )
    if host.open_files is not None and host.open_files < OPEN_FILES_MIN:
        yield warn(
            "files",
            f"{host.open_files} files may be open at once",
            f"ulimit -n {OPEN_FILES_MIN} (LimitNOFILE= of a service, --ulimit nofile= of a "
            "container)",
        )


# Drivers that scale by load under this name too, by hints of the hardware.
_SCALES_ITSELF = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")


def _frequency(host: HostFacts) -> Iterator[Check]:
    slow = [
        pair for pair in host.governors if pair[0] == "powersave" and pair[1] not in _SCALES_ITSELF
    ]
    if slow:
        yield warn(
            "cpu",
            f"{len(slow)} of {host.cpus} processors keep their lowest clock (governor powersave)",
            "sudo cpupower frequency-set -g performance",
        )


def life(facts: Facts) -> Iterator[Check]:
    """How it would run for months: a hint, never something to mend."""
    if facts.host.container:
        yield ok("service", f"a container ({facts.host.container}): keep the store on a volume")


Examination = Callable[[Facts], Iterable[Check]]
EXAMINATIONS: tuple[Examination, ...] = (
    software, configuration, gpu_source, gpu_devices, servers, store, listen, otlp, clock,
    processors, life,
)  # fmt: skip

# ------------------------------------------------------------------------------------------ words


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """The checks for people: a line each, what mends it under it, and a last word."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        yield f"{check.status:<4}  {printable(check.name):<{width}}  {printable(check.says)}"
        if check.mend:
            yield f"{'':<4}  {'':<{width}}  → {printable(check.mend)}"
    left = to_mend(checks)
    yield f"{left} to mend" if left else "all well"
