"""What each fact means: without a GPU, a server or a sick machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.doctor import (
    Check,
    Facts,
    GpuFacts,
    GpusFacts,
    HostFacts,
    Lacking,
    ListenFacts,
    ServerFacts,
    StoreFacts,
    examine,
    exit_code,
    lines,
)
from agent.facts import PORTS

GPU = GpuFacts("NVIDIA H200", "GPU-5c8e3a77-1", persistence=True, processes=(4711,), mig=False)
SERVER = ServerFacts("http://127.0.0.1:8000/metrics", "chat", "", "vllm", (), 51_000, 0.02)
WELL = Facts(
    version="0.1.0",
    python="3.11.7",
    sqlite="3.40.1",
    packages=(("aiohttp", "3.14.0", "3.11"), ("numpy", "2.0.0rc1", "1.26")),
    config="agent.toml",
    open_secrets=(),
    gpus=GpusFacts("auto", "", "580.65", (GPU, GPU), ("NVIDIA",)),
    servers=(SERVER,),
    ports=(8000, 8080),
    store=StoreFacts("/var/lib/servefit/agent.db", "", 50 * 2**30, 2**29, "ext4"),
    host=HostFacts(cpus=16, clock_synchronised=True, open_files=65536, steal_ratio=0.0),
    listen=ListenFacts("127.0.0.1:9477"),
    otlp=("http://127.0.0.1:4318", ""),
)


def with_(part: str, **changes: object) -> Facts:
    """A machine that is well but for this."""
    changed = msgspec.structs.replace(getattr(WELL, part), **changes)
    return msgspec.structs.replace(WELL, **{part: changed})


def with_server(**changes: object) -> Facts:
    return msgspec.structs.replace(WELL, servers=(msgspec.structs.replace(SERVER, **changes),))


def with_gpu(**changes: object) -> Facts:
    return with_("gpus", gpus=(msgspec.structs.replace(GPU, **changes),))


def with_host(**changes: object) -> Facts:
    return with_("host", **changes)


def with_facts(**changes: object) -> Facts:
    return msgspec.structs.replace(WELL, **changes)


def to_mend(facts: Facts) -> list[Check]:
    return [check for check in examine(facts) if check.status != "ok"]


def test_a_machine_that_is_well() -> None:
    checks = examine(WELL)
    assert to_mend(WELL) == []
    assert exit_code(checks) == 0
    assert list(lines(checks))[-1] == "all well"
    assert "auto: 2 × NVIDIA H200, driver 580.65" in [check.says for check in checks]


NO_GPU = "no NVIDIA driver on this machine: libnvidia-ml.so.1 not found"


@pytest.mark.parametrize(
    ("facts", "status", "says", "mend"),
    [
        (with_facts(packages=(("numpy", "1.9", "1.26"),)), "bad", "numpy 1.9 (needs 1.26)", "pip"),
        (with_facts(packages=(("rich", None, "13.7"),)), "bad", "rich is not there", "pip"),
        (with_facts(open_secrets=("/etc/token",)), "warn", "/etc/token", "chmod 600 /etc/token"),
        # GPUs
        (with_("gpus", gpus=(), hardware=(), problem=NO_GPU), "warn", NO_GPU, 'source = "dcgm"'),
        (with_("gpus", gpus=(), problem=NO_GPU), "bad", NO_GPU, "install the driver"),
        (with_("gpus", gpus=(), source="dcgm", problem="no answer"), "bad", "no ans", "exporter"),
        (with_("gpus", gpus=(), hardware=("AMD",), problem="none"), "bad", "none", "amdsmi"),
        (with_gpu(missing=("gpu_energy_j",)), "warn", "gives no gpu_energy_j", "polled"),
        (with_gpu(missing=("gpu_throttled",)), "warn", "gives no gpu_thr", "update the driver"),
        (with_gpu(persistence=False), "warn", "persistence mode is off", "nvidia-smi -pm 1"),
        (with_gpu(ecc_uncorrected=3), "warn", "3 memory errors", "nvidia-smi -q -d ECC"),
        (with_gpu(virtual=True), "warn", "is a virtual GPU", "dcgm"),
        (with_gpu(processes=None), "warn", "does not say which processes", "gpus = [0, …]"),
        (with_gpu(processes=(1, 2)), "warn", "2 processes share it (time-slicing)", "MIG"),
        (with_host(host_processes=False), "warn", "outside of this container", "hostPID: true"),
        (with_facts(listed_gpus=(0, 7)), "bad", "gpus names 7, which is not", "nvidia-smi -L"),
        # servers
        (with_facts(servers=()), "bad", "none answers on this machine (ports 8000, 8080)", "--url"),
        (with_server(problem="refused", engine=None), "bad", "refused", "metrics_url"),
        (with_server(problem="404", engine="sglang"), "bad", "404", "--enable-metrics"),
        (with_server(problem="501", engine="llamacpp"), "bad", "501", "--metrics"),
        (with_server(missing=(Lacking("itl_seconds", "start it with --x", "no ITL"),
                              Lacking("ttft_seconds", "start it with --x", "no TTFT"))),
         "warn", "its page has no itl_seconds, ttft_seconds: no ITL; no TTFT", "start it with --x"),
        (with_server(page_bytes=22_000_000), "warn", "heavy (22000 kB", 'interval = "30s"'),
        (with_server(scrape_s=1.5), "warn", "in 1500 ms", 'interval = "30s"'),
        # the store and the agent's own ends
        (with_("store", problem="the file system is read-only"), "bad", "read-only", "[agent] db"),
        (with_("store", filesystem="nfs4"), "bad", "is on nfs4", "[agent] db"),
        (with_("store", free_bytes=2**28), "bad", "0.2 GiB free", "free_floor"),
        (with_("store", holders=(41,)), "warn", "in use by process 41", "[agent] db"),
        (with_("listen", problem="another program listens there"), "bad", "another", "listen"),
        (with_facts(receive=ListenFacts("127.0.0.1:4319", "taken")), "bad", "127.0.0.1:4319: taken",
         "[receive.otlp] listen"),
        (with_facts(otlp=("http://c:4318", "HTTP 404")), "bad", "http://c:4318: HTTP 404", "coll"),
        # the machine
        (with_host(clock_synchronised=False), "warn", "not synchronised", "timedatectl"),
        (with_host(clock_step_s=-3600.0), "warn", "jumped by -3600.00 s", "chronyd"),
        (with_host(quota_cpus=0.1), "warn", "may use 0.1 of a processor", "resources.limits.cpu"),
        (with_host(throttled_ratio=0.4), "warn", "in 40% of all periods", "CPUQuota="),
        (with_host(steal_ratio=0.3), "warn", "takes 30% of the processors", "of its own"),
        (with_host(memory_limit_bytes=64 * 2**20), "warn", "64 MiB", "--memory"),
        (with_host(open_files=256), "warn", "256 files", "LimitNOFILE="),
        (with_host(governors=(("powersave", "acpi-cpufreq"),)), "warn", "1 of 16", "cpupower"),
    ],
)  # fmt: skip
def test_one_thing_to_mend(facts: Facts, status: str, says: str, mend: str) -> None:
    (check,) = to_mend(facts)
    assert check.status == status
    assert says in check.says
    assert mend in check.mend
    assert exit_code([check]) == 1


@pytest.mark.parametrize(
    "facts",
    [
        with_("gpus", source="none", gpus=()),
        with_("gpus", source="dcgm", gpus=()),
        with_gpu(mig=True, processes=(1, 2)),
        with_facts(listed_gpus=(0, 1, GPU.uuid)),
        with_facts(receive=ListenFacts("127.0.0.1:4319")),
        with_gpu(ecc_uncorrected=0),
        with_gpu(processes=()),
        with_server(missing=(Lacking("preemptions_total"), Lacking("kv_usage_ratio"))),
        with_server(missing=(Lacking("requests_rejected_total", "start it with --x"),)),
        msgspec.structs.replace(
            with_("store", holders=(41,)), listen=ListenFacts("127.0.0.1:9477", "", "0.1.0")
        ),
        with_host(clock_synchronised=None),
        with_host(quota_cpus=2.0, throttled_ratio=0.01),
        with_host(governors=(("powersave", "intel_pstate"), ("performance", "acpi-cpufreq"))),
        with_host(open_files=None),
        with_host(container="Docker"),
        with_facts(otlp=None, config=""),
    ],
)
def test_what_is_no_reason_to_mend(facts: Facts) -> None:
    assert to_mend(facts) == []


def test_in_a_container_the_gpu_has_to_be_let_in() -> None:
    facts = with_("gpus", gpus=(), problem=NO_GPU)
    host = msgspec.structs.replace(facts.host, container="Docker")
    (check,) = to_mend(msgspec.structs.replace(facts, host=host))
    assert "--gpus all" in check.mend


def test_what_a_server_does_not_write_is_told() -> None:
    lacking = (Lacking("queue_seconds"), Lacking("requests_rejected_total", "with --x"))
    says = [check.says for check in examine(with_server(missing=lacking))]
    assert any(
        s.endswith("; without queue_seconds, requests_rejected_total (with --x)") for s in says
    )


def test_what_mends_a_thing_stands_under_it() -> None:
    said = list(lines(examine(with_host(open_files=256))))
    at = next(n for n, line in enumerate(said) if line.startswith("warn"))
    assert said[at].split() == ["warn", "files", "256", "files", "may", "be", "open", "at", "once"]
    assert said[at + 1].strip().startswith("→ ulimit -n 1024")
    assert said[-1] == "1 to mend"


def test_a_server_cannot_steer_the_terminal() -> None:
    said = "\n".join(lines(examine(with_server(problem="\x1b[2J\nall well", engine=None))))
    assert "\x1b" not in said
    assert "\nall well" not in said


@settings(max_examples=50)
@given(st.from_type(Facts))
def test_whatever_is_found_each_thing_to_mend_says_how(facts: Facts) -> None:
    checks = examine(facts)
    assert {check.name for check in checks} >= {"software", "config", "listen"}
    assert all(bool(check.mend) == (check.status != "ok") for check in checks)
    assert exit_code(checks) == any(check.status != "ok" for check in checks)
    assert all(line.isprintable() for line in lines(checks))


README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_what_the_doctor_says() -> None:
    gpus = msgspec.structs.replace(WELL.gpus, gpus=(), hardware=(), problem=NO_GPU)
    checks = examine(with_facts(gpus=gpus, servers=(), ports=PORTS, config=""))
    shown = [check for check in checks if check.name in ("software", "config", "gpu", "server")]
    *said, _to_mend = lines(shown)
    assert "\n".join(said) in README.read_text("utf-8")
