"""Planted limits of a real vLLM, found by `agent assess` in what `agent run` and loadgen saw.

One server has a small KV cache and a small --max-num-seqs. Long requests fill the cache before the
cap is reached, short ones reach the cap beside a cache that is mostly free. Which of the two it is,
the verdict has to tell from one store: observed demand, and a curve that was handed over (by the
sweep itself, or by `agent import`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from agent.model import Sweep, decode_sweep
from tests.ahead import PLANTED_SEQS
from tests.e2e.command import agent, loadgen
from tests.e2e.running_agent import RunningAgent, server

SLO = "ttft:p95<300ms"
SHORTENED = tuple(
    f"{name}: 3 seconds of observation were enough, as configured, where {usual} are usual"
    for name, usual in (("IDLE", "24 hours"), ("RIGHT", "60 minutes"))
)


class Load(NamedTuple):
    """Lengths, the levels of the sweep, and how many ask at once besides."""

    input_tokens: int
    output_tokens: int
    levels: str
    at_once: int


# From the second level to the third throughput may be off by a third and still tell saturation.
LONG = Load(192, 32, "1,6,30", at_once=64)
SHORT = Load(16, 32, "1,8,40", at_once=96)


def running(folder: Path, url: str) -> RunningAgent:
    rules = '[assess.rules]\nidle = "3s"\nright = "3s"\n'
    more = f'[gpu]\nsource = "none"\n[slo]\ntargets = "{SLO}"\n{rules}'
    return RunningAgent(folder, server("chat", url) + more)


def asked_of(url: str, load: Load, one: RunningAgent, *args: str) -> Sweep:
    """What loadgen measured; each word of it is in the command line."""
    lengths = ("--input-tokens", str(load.input_tokens), "--output-tokens", str(load.output_tokens))
    file = one.folder / f"{args[0]}.json"
    verb, *rest = args
    done = loadgen(one.folder, verb, url, *lengths, *rest, "--slo", SLO, "--json", str(file))
    assert done.returncode in (0, 1, 3), done.stderr
    return decode_sweep(file.read_bytes())


def sent(sweep: Sweep) -> int:
    overhead = sweep.run.overhead
    done = sum(level.requests.ok for level in sweep.levels if level.requests)
    return done + overhead.probe_requests + overhead.warmup_requests


def under(load: Load, url: str, one: RunningAgent, *more: str) -> int:
    """Users, then a sweep; the number of requests, once the agent has seen them all.

    Where something else on this machine took the processors, throughput may seem to rise up to the
    last level: a sweep that does not show what stops more is made again, at most twice.
    """
    users = ("run", "--concurrency", str(load.at_once), "--duration", "2s", "--metrics-url", "none")
    requests = sent(asked_of(url, load, one, *users))
    for _ in range(3):
        sweep = asked_of(
            url, load, one, "sweep", "--concurrency", load.levels, "--duration", "4s", *more
        )
        requests += sent(sweep)
        if sweep.curve is not None and sweep.curve.limit is not None:
            break

    def seen() -> int:
        return round(one.get("/api/v1/pattern?window=1h")["requests"])

    one.until(lambda: seen() >= requests, 10, "has not seen all requests")
    return requests


class Assessed(NamedTuple):
    """What `agent assess` says of a stopped agent's store, to programs and to people."""

    verdict: dict[str, Any]
    text: str

    def reason(self, code: str) -> dict[str, Any]:
        """The evidence of the one reason that is a limit of the server."""
        limits = [one for one in self.verdict["reasons"] if one["code"] in LIMITS]
        assert [one["code"] for one in limits] == [code]
        assert f"{code}: {limits[0]['because']}" in self.text
        return dict(limits[0]["evidence"])

    def is_too_much(self) -> bool:
        """Whether more was asked than it holds; by how much is of the load, not of the plant."""
        finding, ratio = self.verdict["finding"], self.verdict["ratio"]
        return finding == "UNDER_SIZED" or (finding == "BORDERLINE" and ratio["value"] > 1)


LIMITS = ("KV_MEMORY", "ADMISSION_CAP", "COMPUTE_PREFILL", "MEM_BANDWIDTH", "CLIENT_LIMITED")


def assessed(one: RunningAgent) -> Assessed:
    asked = ("assess", "--config", str(one.config))
    told = agent(one.folder, *asked, "--format", "json")
    text = agent(one.folder, *asked)
    assert (told.returncode, text.returncode) == (0, 0), told.stderr + text.stderr
    found = Assessed(json.loads(told.stdout), text.stdout)
    for line in SHORTENED:
        assert line in found.verdict["rests_on"]
        assert line in found.text
    assert found.text.startswith(f"{found.verdict['finding']}: ")
    return found


def test_nobody_asks(tmp_path: Path, planted_vllm: str) -> None:
    with running(tmp_path, planted_vllm) as one:
        time.sleep(4.5)
        assert one.stop() == 0
    found = assessed(one).verdict
    assert found["finding"] == "IDLE"
    assert found["reasons"][0]["evidence"]["requests"] == 0
    assert 3 <= found["demand"]["covered_s"] < 60


def test_long_requests_fill_the_small_cache(tmp_path: Path, planted_vllm: str) -> None:
    with running(tmp_path, planted_vllm) as one:
        requests = under(LONG, planted_vllm, one, "--agent", one.url)
        assert one.stop() == 0
    found = assessed(one)
    evidence = found.reason("KV_MEMORY")
    assert evidence["kv_usage_max"] > 0.8
    assert evidence["waiting_mean"] > 1
    assert evidence["running_mean"] < PLANTED_SEQS - 1
    assert found.is_too_much()
    assert round(found.verdict["demand"]["observed"]["requests"]) == requests
    assert (found.verdict["curve"]["kind"], found.verdict["curve"]["by"]) == ("measured", "server")


def test_short_requests_reach_the_small_cap(tmp_path: Path, planted_vllm: str) -> None:
    with running(tmp_path, planted_vllm) as one:
        requests = under(SHORT, planted_vllm, one)
        assert one.stop() == 0
    brought = ("import", str(tmp_path / "sweep.json"), "--server", "chat", "--db", str(one.db))
    assert agent(tmp_path, *brought).returncode == 0
    found = assessed(one)
    evidence = found.reason("ADMISSION_CAP")
    assert evidence["running_max"] == PLANTED_SEQS
    assert evidence["kv_usage_max"] < 0.6
    assert "the admission cap (--max-num-seqs) binds, not the hardware" in found.text
    assert found.is_too_much()
    assert round(found.verdict["demand"]["observed"]["requests"]) == requests
    assert (found.verdict["curve"]["kind"], found.verdict["curve"]["by"]) == ("measured", "server")
