"""Bad days of a running agent: each costs a line, and none of them what was measured."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agent.recall import Recall
from loadgen.targets.vllm import free_port
from tests.agent.test_receiver import PROTOBUF, an_export
from tests.e2e.command import agent as run_agent
from tests.e2e.command import environment
from tests.e2e.running_agent import Page, RunningAgent, server, serving_page
from tests.e2e.together import waiting
from tests.nvml_standin import compiled

NO_GPU = '[gpu]\nsource = "none"\n'


@waiting
def test_three_kills_lose_no_token(tmp_path: Path) -> None:
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url) + NO_GPU) as agent,
    ):
        for _ in range(3):
            looks = page.looks
            agent.until(lambda looks=looks: page.looks > looks + 1, 10, "has not looked")
            time.sleep(1.2)  # the store commits once a second
            agent.kill()
            agent.start()
        looks = page.looks
        agent.until(lambda: page.looks > looks + 1, 10, "has not looked")
        pattern = agent.get("/api/v1/pattern")
        seen = page.looks
        assert agent.stop() == 0
    # Counting begins at the first look; the newest one may still be under way.
    assert 7 * (seen - 2) <= pattern["output_tokens"] <= 7 * (seen - 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


@waiting
def test_an_agent_begun_anew_takes_nothing_back(tmp_path: Path) -> None:
    """Asked before its own first sample, it tells what the one before it had seen, to the end."""
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url, "3s") + NO_GPU) as agent,
    ):

        def seen() -> float:
            return float(agent.get("/api/v1/pattern")["output_tokens"])

        agent.until(lambda: page.looks > 1, 20, "has not looked")
        time.sleep(70 - time.time() % 60)  # a minute watched from its very beginning
        before = seen()
        assert agent.stop() == 0
        page.slow_s = 4.0  # longer than a start waits for it
        agent.start()
        assert seen() >= before - 1e-6
        page.slow_s = 0.0
        agent.until(lambda: seen() > before, 20, "does not go on counting")


def test_a_second_agent_on_one_store_says_so_and_ends(tmp_path: Path, page: Page) -> None:
    with RunningAgent(tmp_path, server("chat", page.url) + NO_GPU) as agent:
        second = tmp_path / "second.toml"
        second.write_text(f'[agent]\ndb = "{agent.db}"\nlisten = "127.0.0.1:0"\n{NO_GPU}')
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "run", "--config", str(second)],
            env=environment(tmp_path), capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert str(agent.pid) in done.stderr.splitlines()[-1]
        assert agent.get("/api/v1/status")["store"]["error"] is None


def test_a_reload_takes_a_good_file_and_refuses_a_bad_one(tmp_path: Path, page: Page) -> None:
    with RunningAgent(tmp_path, NO_GPU) as agent:
        assert agent.get("/api/v1/status")["servers"] == []
        agent.configure(server("chat", page.url) + NO_GPU)
        agent.reload()
        agent.until(lambda: page.looks > 1, 10, "has not looked")
        agent.configure('[gpu]\nsauce = "none"\n')
        agent.reload()
        agent.until(lambda: 'did you mean "source"?' in agent.said(), 10, "has not said")
        assert [one["name"] for one in agent.get("/api/v1/status")["servers"]] == ["chat"]
        looks = page.looks
        agent.until(lambda: page.looks > looks, 10, "has stopped looking")
        assert agent.stop() == 0


@waiting
def test_a_server_that_goes_and_comes_back(tmp_path: Path) -> None:
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url) + NO_GPU) as agent,
    ):
        agent.until(lambda: page.looks > 1, 10, "has not looked")
        page.is_there = False
        agent.until(lambda: "chat: " in agent.said(), 20, "has not said that it is away")
        assert agent.get("/readyz")  # its own pod must not leave its service for that
        page.is_there = True
        agent.until(lambda: "chat: is back" in agent.said(), 20, "has not said that it is back")
        assert agent.stop() == 0


class Driver:
    """The C stand-in of NVML, told what to do by a file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "nvml"
        library = compiled(folder)
        self.env = {"LD_LIBRARY_PATH": str(library.parent), "NVML_STANDIN": str(self._file)}

    def does(self, *lines: str) -> None:
        """Replaces the file, so that the library reads it anew."""
        written = self._file.with_suffix(".new")
        written.write_text("\n".join(("devices 2", *lines)) + "\n")
        written.rename(self._file)


def gpu_sampler(agent: RunningAgent) -> dict[str, Any]:
    [one] = [one for one in agent.get("/api/v1/status")["samplers"] if one["name"] == "gpu"]
    return dict(one)


@waiting
@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ("hang.nvmlDeviceGetTotalEnergyConsumption 1", "did not answer within"),
        ("error.nvmlDeviceGetMemoryInfo_v2 15\nerror.nvmlDeviceGetUtilizationRates 15", "is gone"),
    ],
)
def test_a_driver_in_trouble_stops_no_other(tmp_path: Path, trouble: str, line: str) -> None:
    driver = Driver(tmp_path)
    mine = f"process.1.{os.getpid()} 1000000"
    driver.does(mine)
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url), driver.env) as agent,
    ):
        agent.until(lambda: "servefit_gpu_power_w{" in agent.get("/metrics"), 10, "has no power")
        status = agent.until(
            lambda: (now := agent.get("/api/v1/status")) and now["servers"][0]["gpus"] and now,
            15,
            "does not know whose GPU that is",
        )
        assert status["servers"][0]["gpus_by"] == "process list"
        assert status["servers"][0]["gpus"] == [status["gpus"][1]["uuid"]]
        driver.does(mine, trouble)
        agent.until(lambda: not gpu_sampler(agent)["ok"], 10, "sees no trouble")
        assert line in gpu_sampler(agent)["line"]
        looks = page.looks
        agent.until(lambda: page.looks > looks + 1, 10, "has stopped looking at the server")
        assert agent.get("/readyz")
        driver.does(mine)
        agent.until(lambda: gpu_sampler(agent)["ok"], 20, "did not recover")
        assert agent.stop() == 0


@waiting
def test_whose_gpus_these_are_is_kept_so_that_a_verdict_can_say_what_they_cost(
    tmp_path: Path,
) -> None:
    driver = Driver(tmp_path)
    driver.does(f"process.1.{os.getpid()} 1000000")
    env = driver.env | {"NVML_STANDIN_NAME": "NVIDIA L4"}
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url), env) as agent,
    ):
        agent.until(lambda: agent.get("/api/v1/status")["servers"][0]["gpus"], 15, "owns no GPU")
        agent.until(lambda: page.looks > 4, 10, "has not looked")
        assert agent.stop() == 0
    told = run_agent(tmp_path, "assess", "--config", str(agent.config), "--format", "json")
    assert told.returncode == 0, told.stderr
    cost = json.loads(told.stdout)["cost"]
    assert (cost["gpu"], cost["gpus"], cost["basis"]) == ("L4", 1, "rental")
    assert 0 < cost["usd_per_month"]["low"] <= cost["usd_per_month"]["high"]
    with Recall(agent.db) as recall:
        [kept] = recall.gpus(recall.servers()["chat"])
    assert (kept.name, kept.memory_total_bytes) == ("NVIDIA L4", 80 << 30)


@waiting
def test_the_servers_own_spans_are_learned_with_their_energy(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.does(f"process.1.{os.getpid()} 1000000")
    port = free_port("127.0.0.1", 0)
    receive = f'[receive.otlp]\nlisten = "127.0.0.1:{port}"\n'
    with (
        serving_page() as page,
        RunningAgent(tmp_path, server("chat", page.url) + receive, driver.env) as agent,
    ):
        agent.until(lambda: agent.get("/api/v1/status")["servers"][0]["gpus"], 15, "owns no GPU")
        time.sleep(3.0)  # three readings of its energy
        now_ns = time.time_ns()
        message = an_export()
        span = message.resource_spans[0].scope_spans[0].spans[1]
        span.start_time_unix_nano, span.end_time_unix_nano = now_ns - 2 * 10**9, now_ns - 10**9
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/traces", message.SerializeToString(), PROTOBUF
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert reply.status == 200
        assert agent.get("/api/v1/status")["receiver"]["requests"] == 1
        assert agent.stop() == 0
    with Recall(agent.db) as recall:
        [served] = recall.served("chat", 0, 2**33)
    assert served["at_ms"] == (now_ns - 2 * 10**9) // 1_000_000
    assert (served["prompt_tokens"], served["output_tokens"]) == (512, 128)
    assert served["e2e_ms"] == pytest.approx(1000)
    assert served["queue_ms"] == 500
    assert served["energy_j"] == pytest.approx(300 / 3, rel=0.3)  # 300 W, shared by three
