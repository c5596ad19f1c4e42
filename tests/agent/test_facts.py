"""What is found out: against real files, sockets and the NVML stand-in, and the whole command."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent import facts
from agent.config import Agent, Config, Export, Gpu, OtlpExport, Server
from agent.doctor import Facts
from tests.support import require

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics" / "vllm-0.32.0-busy.txt"
STANDIN = Path(__file__).parents[1] / "nvml_standin" / "modes.c"

Handler = Callable[[web.Request], Any]
Serve = Callable[[dict[str, Handler]], Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server of the given GET and POST pages; gives its base URL."""
    runners = []

    async def start(pages: dict[str, Handler]) -> str:
        app = web.Application()
        for path, handler in pages.items():
            app.router.add_route("*", path, handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


def text(body: bytes, status: int = 200) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type="text/plain")

    return answer


def of_json(value: Any) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(value)

    return answer


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        agent=Agent(db=tmp_path / "deep" / "agent.db", listen="127.0.0.1:0"),
        gpu=Gpu(source="none"),
        server=(Server(url="http://127.0.0.1:9"),),
    )


async def found(config: Config, *urls: str) -> Facts:
    return await facts.gather(config, "", urls)


# ----------------------------------------------------------------------------------------- servers


async def test_a_server_with_its_page(serve: Serve, config: Config) -> None:
    url = await serve({"/metrics": text(GOLDEN.read_bytes())})
    _, server = (await found(config, url)).servers
    assert (server.problem, server.engine, server.url) == ("", "vllm", f"{url}/metrics")
    assert server.page_bytes == GOLDEN.stat().st_size
    assert 0 < server.scrape_s < 5
    assert {one.name for one in server.missing}.isdisjoint(facts.VITAL_SERIES)


async def test_a_page_without_the_vital_series(serve: Serve, config: Config) -> None:
    lines = GOLDEN.read_text().splitlines(keepends=True)
    page = "".join(line for line in lines if "num_requests_running" not in line)
    url = await serve({"/metrics": text(page.encode())})
    _, server = (await found(config, url)).servers
    assert "requests_running" in [one.name for one in server.missing if one.brings]


async def test_a_server_whose_page_is_off_tells_what_it_is(serve: Serve, config: Config) -> None:
    models = {"object": "list", "data": [{"id": "m", "owned_by": "sglang"}]}
    url = await serve({"/v1/models": of_json(models)})
    _, server = (await found(config, url)).servers
    assert "there is no metrics page" in server.problem
    assert server.engine == "sglang"


async def test_nobody_there(config: Config) -> None:
    (server,) = (await found(config)).servers
    assert "connection refused" in server.problem
    assert server.engine is None


async def test_usual_ports_are_looked_at_where_no_server_is_named(
    serve: Serve, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = await serve({"/prometheus/metrics": text(GOLDEN.read_bytes())})
    other = await serve({"/metrics": text(b"node_load1 1\n")})
    ports = (int(ours.rpartition(":")[2]), int(other.rpartition(":")[2]), 9)
    monkeypatch.setattr(facts, "PORTS", ports)
    said = await facts._servers(Config(), ())
    assert [one.url for one in said] == [f"{ours}/prometheus/metrics"]


# ------------------------------------------------------------------------------------ other sources


async def test_the_back_end_takes_an_empty_export(serve: Serve, config: Config) -> None:
    asked: list[tuple[str, str | None, bytes]] = []

    async def take(request: web.Request) -> web.Response:
        asked.append((request.method, request.headers.get("x-key"), await request.read()))
        return web.Response()

    url = await serve({"/v1/metrics": take})
    headers = config.agent.db.parents[1] / "headers"
    headers.write_text("x-key: geheim\n")
    export = Export(otlp=OtlpExport(endpoint=url, headers_file=headers))
    said = await facts._otlp(Config(export=export))
    assert said == (url, "")
    assert asked == [("POST", "geheim", b"")]


@pytest.mark.parametrize(
    ("status", "why"), [(404, "HTTP 404 for /v1/metrics"), (401, "HTTP 401: give its key")]
)
async def test_a_back_end_that_does_not(serve: Serve, status: int, why: str) -> None:
    url = await serve({"/v1/metrics": text(b"no", status)})
    said = await facts._otlp(Config(export=Export(otlp=OtlpExport(endpoint=url))))
    assert said is not None
    assert why in said[1]


async def test_a_back_end_that_is_not_there_or_hangs(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    monkeypatch.setattr(facts, "LOOK_S", 0.2)
    for url, why in (
        ("http://127.0.0.1:9", "connection refused"),
        (await serve({"/v1/metrics": hang}), "no answer within 0.2 s"),
    ):
        said = await facts._otlp(Config(export=Export(otlp=OtlpExport(endpoint=url))))
        assert said == (url, why)


async def test_dcgm(serve: Serve) -> None:
    url = await serve(
        {"/metrics": text(b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 3\n'), "/other": text(b"x 1\n")}
    )
    assert await facts._dcgm(f"{url}/metrics") == ""
    assert "is no page of dcgm-exporter" in await facts._dcgm(f"{url}/other")
    assert "connection refused" in await facts._dcgm("http://127.0.0.1:9/metrics")


# ----------------------------------------------------------------------------- the agent's own ends


async def test_an_address_that_is_free_taken_or_an_agents(serve: Serve) -> None:
    async def look(url: str) -> tuple[str, str]:
        address = url.removeprefix("http://")
        said = await facts._listen(Config(agent=Agent(listen=address)), address)
        assert said is not None
        return said.problem, said.version

    agent = await serve({"/api/v1/status": of_json({"version": "0.1.0", "samplers": []})})
    assert await look(agent) == ("", "0.1.0")
    assert await look(await serve({})) == ("another program listens there", "")
    assert await look("127.0.0.1:0") == ("", "")
    problem, _ = await look("192.0.2.1:9477")  # of nobody: RFC 5737
    assert "cannot assign" in problem


async def test_a_store_that_is_not_there_yet(config: Config) -> None:
    said = await facts._store(config)
    assert (said.problem, said.holders) == ("", ())
    assert said.free_bytes is not None
    assert said.free_bytes > 0
    assert not config.agent.db.parent.exists()  # looked, and made nothing


async def test_places_where_no_store_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for db, why in (
        (tmp_path, "a directory stands"),
        (tmp_path / "file" / "agent.db", "no direct"),
    ):
        said = await facts._store(Config(agent=Agent(db=db)))
        assert why in said.problem


async def test_another_agent_on_the_store(config: Config) -> None:
    config.agent.db.parent.mkdir()
    lock = config.agent.db.with_name("agent.db-lock")
    with lock.open("a"):
        assert (await facts._store(config)).holders == (os.getpid(),)
    assert (await facts._store(config)).holders == ()


async def test_a_look_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await facts.within(0.1, lambda: release.wait(30))
    assert time.monotonic() - began < 5
    release.set()


# ------------------------------------------------------------------------------------- this machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_limits_of_a_container(tmp_path: Path) -> None:
    v2 = {"cpu.max": "50000 100000\n", "memory.max": "134217728\n",
          "cpu.stat": "usage_usec 1\nnr_periods 200\nnr_throttled 50\n"}  # fmt: skip
    assert facts._cgroup(tree(tmp_path / "v2", v2)) == (0.5, 0.25, 2**27)
    v1 = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
          "memory/memory.limit_in_bytes": "9223372036854771712\n"}  # fmt: skip
    assert facts._cgroup(tree(tmp_path / "v1", v1)) == (None, None, None)
    free = {"cpu.max": "max 100000\n", "memory.max": "max\n"}
    assert facts._cgroup(tree(tmp_path / "free", free)) == (None, None, None)
    assert facts._cgroup(tmp_path / "nowhere") == (None, None, None)


def test_hardware_on_the_bus(tmp_path: Path) -> None:
    bus = {"0000:01:00.0/vendor": "0x10de\n", "0000:01:00.0/class": "0x030200\n",
           "0000:02:00.0/vendor": "0x10de\n", "0000:02:00.0/class": "0x040300\n",
           "0000:03:00.0/vendor": "0x1002\n", "0000:03:00.0/class": "0x060400\n"}  # fmt: skip
    assert facts.hardware(tree(tmp_path, bus)) == ("NVIDIA",)
    assert facts.hardware(tmp_path / "nowhere") == ()


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} nfs4 rw 0 0\n")
    assert facts._filesystem(tmp_path, mounts) == "nfs4"
    assert facts._filesystem(Path("/usr"), mounts) == "ext4"
    assert facts._filesystem(Path("/usr"), tmp_path / "nowhere") == ""


def test_governors_steal_and_where_we_are(tmp_path: Path) -> None:
    cpu = {"cpu0/cpufreq/scaling_governor": "powersave\n",
           "cpu0/cpufreq/scaling_driver": "intel_pstate\n"}  # fmt: skip
    assert list(facts._governors(tree(tmp_path, cpu))) == [("powersave", "intel_pstate")]
    stat = tree(tmp_path, {"stat": "cpu  10 0 10 60 5 0 5 10 0 0\ncpu0 1\n"}) / "stat"
    assert facts._cpu_times(stat) == (10, 0, 10, 60, 5, 0, 5, 10)
    assert facts._steal_ratio((0,) * 8, facts._cpu_times(stat)) == 0.1
    assert facts._steal_ratio((), facts._cpu_times(stat)) is None
    assert facts._container(tmp_path) == ""
    assert facts._container(tree(tmp_path, {"run/.containerenv": ""})) == "Podman"
    assert not facts._sees_host_processes(tree(tmp_path, {"2/comm": "python\n"}))


async def test_this_machine(config: Config) -> None:
    """Everything that can be seen here is seen, and the clock does not jump meanwhile."""
    said = await found(config)
    assert said.host.cpus == os.cpu_count()
    assert abs(said.host.clock_step_s) < 5
    assert said.store.filesystem or sys.platform != "linux"
    assert {name for name, _, _ in said.packages} >= {"aiohttp", "msgspec"} or not said.packages


# -------------------------------------------------------------------------------- the whole command


def doctor(*args: str, **env: str) -> tuple[int, str, str]:
    asked = subprocess.run(
        [sys.executable, "-m", "agent.cli", "doctor", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )
    return asked.returncode, asked.stdout, asked.stderr


def written(tmp_path: Path, more: str = "") -> Path:
    file = tmp_path / "agent.toml"
    file.write_text(f'[agent]\ndb = "agent.db"\nlisten = "127.0.0.1:0"\n{more}')
    return file


def test_a_machine_with_neither_gpu_nor_server_says_what_to_do(tmp_path: Path) -> None:
    """NVML is looked for, and where there is no driver the line says what mends it."""
    file = written(tmp_path, '[[server]]\nname = "chat"\nurl = "http://127.0.0.1:9"')
    code, out, err = doctor("--config", str(file), "--json", LD_LIBRARY_PATH=str(tmp_path))
    assert (code, err) == (1, "")
    said = json.loads(out)
    by_name = {check["name"]: check for check in said["checks"] if check["status"] != "ok"}
    assert said["to_mend"] >= 1
    assert "metrics_url" in by_name["server chat"]["mend"]
    assert all(check["mend"] for check in by_name.values())
    if not Path("/dev/nvidiactl").exists():
        assert "gpu" in by_name


def test_wrong_usage(tmp_path: Path) -> None:
    for args in (("--config", str(tmp_path / "none.toml")), ("--url", "localhost"), ("--jsn",)):
        code, out, err = doctor(*args)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


def test_the_real_pynvml_on_a_driver_that_is_none(tmp_path: Path) -> None:
    cc = shutil.which("cc")
    require(cc, "a C compiler")
    assert cc is not None
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(
        [cc, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, STANDIN], check=True
    )
    control = tmp_path / "control"
    control.write_text("persistence 0\necc.uncorrected 2\nerror.nvmlDeviceGetTemperatureV 3\n"
                       "error.nvmlDeviceGetTemperature 3\n")  # fmt: skip
    env = {"LD_LIBRARY_PATH": str(tmp_path), "NVML_STANDIN": str(control)}
    code, out, err = doctor("--config", str(written(tmp_path)), "--json", **env)
    assert (code, err) == (1, "")
    said = [check["says"] for check in json.loads(out)["checks"] if check["name"].startswith("gpu")]
    assert "auto: 1 × Stand-in GPU 0, driver 580.65.06" in said
    assert "gives no gpu_temperature_c" in said
    assert any("persistence mode is off" in line for line in said)
    assert any("2 memory errors" in line for line in said)
    # A driver that hangs is said, within a deadline.
    control.write_text("hang.nvmlDeviceGetPersistenceMode 1\n")
    code, out, _ = doctor("--config", str(written(tmp_path)), **env)
    assert code == 1
    assert "the NVIDIA driver does not answer" in out
