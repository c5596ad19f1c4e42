"""What the real daemon takes of a machine at its defaults, beside a vLLM page and eight GPUs.

The GPUs are NVML's ABI in C (tests/nvml_standin): pynvml makes its real calls, and no driver is
behind them. Linux only. The agent is asked nothing while it is watched.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from loadgen.targets.vllm import free_port
from tests import nvml_standin
from tests.bench import child

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "tests/golden/metrics/vllm-0.32.0-busy.txt"
GPUS = 8
LOOK_EVERY_S = 1.0
READY_WITHIN_S, STOPPED_WITHIN_S = 60.0, 30.0
TICKS_A_S = os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]


class AgentError(Exception):
    """The agent did not do what is to be measured; its own last words."""


class Look(NamedTuple):
    """The agent and its children at one instant."""

    at_s: float
    cpu_s: float  # since its start; children that ended included
    rss_mb: float


# ------------------------------------------------------------------------------------- arithmetic


def cost(looks: Sequence[Look]) -> Figures:
    """What the agent took over the time of the looks.

    Memory is flat where its last tenth is no higher than the tenth after the first fifth, in which
    caches and buffers fill. The slope is the least squares' over all behind that fifth.
    """
    first, last = looks[0], looks[-1]
    length_s = last.at_s - first.at_s

    def between(begin: float, end: float) -> list[Look]:
        window = (first.at_s + begin * length_s, first.at_s + end * length_s)
        return [look for look in looks if window[0] <= look.at_s <= window[1]]

    settled = between(0.2, 1.0)
    early, late = (
        statistics.median(look.rss_mb for look in between(*part)) for part in ((0.2, 0.3), (0.9, 1))
    )
    slope = statistics.linear_regression(
        [look.at_s for look in settled], [look.rss_mb for look in settled]
    ).slope
    return {
        "watched_s": length_s,
        "cpu_percent": 100 * (last.cpu_s - first.cpu_s) / length_s,
        "rss_mb_max": max(look.rss_mb for look in looks),
        "rss_mb_early": early,
        "rss_mb_late": late,
        "rss_mb_an_hour": slope * 3600,
    }


def cpu_of(stat: str) -> float:
    """CPU seconds of a process and of its children that ended, from its /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()  # a program's name may hold anything
    return sum(map(int, fields[11:15])) / TICKS_A_S


# ----------------------------------------------------------------------------------------- looking


def look(pid: int) -> Look:
    cpu_s = rss_mb = 0.0
    for member in child.family(pid):
        with suppress(OSError):  # it ended meanwhile: its time is its parent's now
            cpu_s += cpu_of(Path(f"/proc/{member}/stat").read_text())
            rss_mb += child.status_mb(member, "VmRSS")
    return Look(time.monotonic(), cpu_s, rss_mb)


def watch(agent: subprocess.Popen[str], seconds: float) -> list[Look]:
    """A look a second. Raises AgentError where the agent ends meanwhile."""
    looks = [look(agent.pid)]
    until_s = looks[0].at_s + seconds
    while looks[-1].at_s < until_s:
        time.sleep(LOOK_EVERY_S)
        if agent.poll() is not None:
            raise AgentError(f"ended with {agent.returncode} while it was watched")
        looks.append(look(agent.pid))
    return looks


@contextmanager
def page_server(page: Path = PAGE) -> Iterator[str]:
    """The URL of a server in a process of its own: see `tests.bench.page`."""
    command = [sys.executable, "-m", "tests.bench.page", str(page)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


class Started(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    ready_s: float  # from before the process existed to the first 200 of /readyz

    def status(self) -> Any:
        return json.loads(self.get("/api/v1/status"))

    def get(self, path: str) -> bytes:
        """Raises AgentError for what is refused."""
        status, body = _get(self.port, path)
        if status != 200:
            raise AgentError(f"{path}: {status} {body[:200]!r}")
        return body


@contextmanager
def agent(
    folder: Path, servers: Mapping[str, str], environment: Mapping[str, str]
) -> Iterator[Started]:
    """The daemon on the store in `folder`, beside these servers, by name and URL; ready, and
    stopped as systemd does it."""
    port = free_port("127.0.0.1", 0)
    config, log = folder / "agent.toml", folder / "agent.log"
    config.write_text(
        f'[agent]\ndb = {json.dumps(str(folder / "agent.db"))}\nlisten = "127.0.0.1:{port}"\n'
        + "".join(
            f"[[server]]\nname = {json.dumps(name)}\nurl = {json.dumps(url)}\n"
            for name, url in servers.items()
        )
    )
    command = [sys.executable, "-m", "agent.cli", "run", "--config", str(config)]
    with log.open("w") as out:
        began_s = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, text=True
        )
        try:
            _wait_until_ready(process, port)
            yield Started(process, port, time.monotonic() - began_s)
            process.send_signal(signal.SIGTERM)
            if process.wait(STOPPED_WITHIN_S) != 0:
                raise AgentError(f"SIGTERM ends it with {process.returncode}")
        except (AgentError, subprocess.TimeoutExpired) as error:
            words = log.read_text(errors="replace").strip().splitlines()
            raise AgentError(f"the agent: {error}; {words[-1] if words else ''}") from error
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[str], port: int) -> None:
    until_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise AgentError(f"ended with {process.returncode} at its start")
        with suppress(OSError, http.client.HTTPException):
            if _get(port, "/readyz")[0] == 200:
                return
        time.sleep(0.02)
    raise AgentError(f"not ready within {READY_WITHIN_S:g} s")


def _get(port: int, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


# ---------------------------------------------------------------------------------------- measuring


def measure(
    folder: Path, seconds: float, starts: int, say: Callable[[str], None] = lambda _: None
) -> Figures:
    """Starts the agent `starts` times, and watches the last of them for `seconds`."""
    library = nvml_standin.compiled(folder)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library.parent),
        "NVML_STANDIN_DEVICES": str(GPUS),
        "PYTHONPATH": str(ROOT),
    }
    ready_s = []
    with page_server() as url:
        for number in range(starts):
            place = folder / f"start-{number}"
            place.mkdir()
            with agent(place, {"chat": url}, environment) as started:
                ready_s.append(started.ready_s)
                if number == starts - 1:
                    say(f"watching the agent for {seconds:g} s")
                    figures = _watched(started, seconds)
                stopping_s = time.monotonic()
            stop_s = time.monotonic() - stopping_s
    return figures | {
        "ready_s": statistics.median(ready_s),
        "stop_s": stop_s,
        "store_mb": _size_mb(place),
    }


def _watched(started: Started, seconds: float) -> Figures:
    busy_s, looks = child.machine_busy_s(), watch(started.process, seconds)
    figures, status = cost(looks), started.status()
    if len(status["gpus"]) != GPUS or [one["engine"] for one in status["servers"]] != ["vllm"]:
        raise AgentError(f"saw {len(status['gpus'])} GPUs and {status['servers']}")
    used_s = looks[-1].cpu_s - looks[0].cpu_s
    return figures | {
        "start_cpu_s": looks[0].cpu_s,
        "failed": float(sum(sampler["errors"] for sampler in status["samplers"])),
        "others_cores": max(0.0, child.machine_busy_s() - busy_s - used_s) / figures["watched_s"],
    }


def _size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("agent.db*")) / 1e6
