"""The agent beside a real vLLM under load: what it counts is what server and client counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agent.minutes import Minute
from agent.model import Sweep, decode_sweep
from agent.recall import Recall
from tests.e2e.command import loadgen
from tests.e2e.running_agent import RunningAgent, server
from tests.e2e.test_sweep_vllm import counters

OUTPUT_TOKENS = 24


class Observed:
    """One load that three have counted: the server, the load generator and the agent."""

    def __init__(
        self, agent: RunningAgent, sweep: Sweep, increase: dict[str, float], pattern: Any, said: str
    ) -> None:
        self.agent, self.sweep, self.increase, self.pattern = agent, sweep, increase, pattern
        self.said = said


@pytest.fixture(scope="module")
def observed(real_vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("agent")
    config = server("chat", real_vllm) + '[gpu]\nsource = "none"\n'
    with RunningAgent(folder, config) as agent:
        agent.until(lambda: agent.get("/api/v1/pattern")["requests"] == 0, 10, "has no sample")
        before = counters(real_vllm)
        done = loadgen(
            folder, "sweep", real_vllm, "--concurrency", "2,8", "--duration", "10s",
            "--input-tokens", "40", "--output-tokens", str(OUTPUT_TOKENS),
            "--metrics-url", "none", "--agent", agent.url, "--json", str(folder / "sweep.json"),
        )  # fmt: skip
        assert done.returncode in (0, 3), done.stderr
        after = counters(real_vllm)
        increase = {name: after[name] - before[name] for name in before}
        sweep = decode_sweep((folder / "sweep.json").read_bytes())

        def counted() -> Any:
            pattern = agent.get("/api/v1/pattern?window=1h")
            return (
                pattern if pattern["output_tokens"] >= increase["generation_tokens_total"] else None
            )

        pattern = agent.until(counted, 60, "has not counted all")
        yield Observed(agent, sweep, increase, pattern, done.stderr)


def test_the_pattern_is_what_the_server_and_the_client_counted(observed: Observed) -> None:
    sent = observed.sweep
    overhead = sent.run.overhead
    requests = sum(level.requests.ok for level in sent.levels if level.requests)
    output = sum(level.tokens.output or 0 for level in sent.levels if level.tokens)
    requests += overhead.probe_requests + overhead.warmup_requests
    output += overhead.probe_tokens + overhead.warmup_tokens
    assert observed.increase["request_success_total"] == requests
    assert observed.increase["generation_tokens_total"] == output
    assert observed.pattern["requests"] == requests
    assert observed.pattern["output_tokens"] == output
    assert observed.pattern["prompt_tokens"] == observed.increase["prompt_tokens_total"]
    assert observed.pattern["gaps_s"] < 3600
    assert 6 <= observed.pattern["concurrency"]["max"] <= 8  # as often as it was looked
    assert 0 < observed.pattern["ttft_ms"]["p50"] <= observed.pattern["ttft_ms"]["p99"]


def test_the_sweep_lies_in_the_store_with_the_agents_series(observed: Observed) -> None:
    curve = observed.agent.get("/api/v1/curve?server=chat")
    assert curve["measured"]["sweep"]["run"]["id"] == observed.sweep.run.id
    for level in observed.sweep.levels:
        assert level.server is not None
        assert level.server.running_max is not None
        assert level.server.running_max <= (level.concurrency or 0)
        assert level.server.running_max >= 0.75 * (level.concurrency or 0)
        assert (level.server.kv_usage_max or 0) > 0
        assert level.gpu == []


def test_the_page_of_the_agent_tells_the_same(observed: Observed) -> None:
    page = observed.agent.get("/metrics")
    assert "servefit_output_tokens_total{" in page
    assert 'engine="vllm"' in page
    assert "servefit_ttft_seconds_bucket{" in page
    status = observed.agent.get("/api/v1/status")
    assert status["servers"][0]["engine"] == "vllm"
    assert all(one["ok"] for one in status["samplers"]), status["samplers"]
    series = observed.agent.get("/api/v1/series?metric=output_tokens_per_s&server=chat")
    assert max(value for _, value in series["points"]) > 10


def test_what_it_observed_can_be_sent_again(observed: Observed, real_vllm: str) -> None:
    folder, agent = observed.agent.folder, observed.agent
    asked = f"{agent.url}/api/v1/pattern?window=1h"
    done = loadgen(
        folder, "run", real_vllm, "--workload-from", asked, "--rate", "5", "--requests", "12",
        "--json", str(folder / "again.json"),
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    [level] = decode_sweep((folder / "again.json").read_bytes()).levels
    assert level.requests is not None
    assert level.tokens is not None
    assert level.requests.ok == 12
    mean = observed.pattern["output_tokens"] / observed.pattern["requests"]
    assert (level.tokens.output or 0) / 12 == pytest.approx(mean, rel=0.5)


def test_what_lies_in_the_store_after_a_clean_stop_adds_up_too(observed: Observed) -> None:
    """The last test of this module: it ends the agent."""
    agent = observed.agent

    def seen() -> int:
        return round(agent.get("/api/v1/pattern?window=1h")["output_tokens"])

    before = seen()
    assert agent.stop() == 0
    agent.start()  # goes on inside the minute, from what the first one left
    assert seen() >= before > observed.pattern["output_tokens"]
    assert agent.stop() == 0
    with Recall(agent.db) as recall:
        minutes: list[Minute] = list(recall.minutes("chat", 0, 2**33))
        kept = recall.curves()
    assert [one["source"] for one in kept] == ["chat"]
    assert all(minute.resets == 0 for minute in minutes)
