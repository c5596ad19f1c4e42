"""The main job on a real vLLM: what the sweep reports is what the server counted, to the token."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from random import Random
from urllib.parse import quote

import pytest

from agent.model import Sweep, decode_sweep
from loadgen.client import Dialer, parse_url
from loadgen.probe import Probed, Prober
from tests.conftest import Phoenix

INPUT_TOKENS = 100
OUTPUT_TOKENS = 32
CONCURRENCY = (1, 4, 16, 64)


def counters(url: str) -> dict[str, float]:
    """Sums of vLLM's own counters, read without servefit's parser."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        page = reply.read().decode()
    names = ("generation_tokens_total", "request_success_total", "prompt_tokens_total")
    return {
        name: sum(float(v) for v in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.M))
        for name in names
    }


def loadgen(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "XDG_DATA_HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


class Measured:
    """A finished sweep beside the increase of the server's counters while it ran."""

    def __init__(self, sweep: Sweep, increase: dict[str, float], stdout: str) -> None:
        self.sweep = sweep
        self.increase = increase
        self.stdout = stdout


@pytest.fixture(scope="module")
def measured(
    real_vllm: str, phoenix: Phoenix, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    folder = tmp_path_factory.mktemp("sweep")
    before = counters(real_vllm)
    done = loadgen(
        "sweep", real_vllm, "--concurrency", ",".join(map(str, CONCURRENCY)),
        "--input-tokens", str(INPUT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS),
        "--warmup", "3", "--slo", "ttft:p95<2s", "--otlp-endpoint", phoenix.otlp_endpoint,
        "--json", "sweep.json", "--html", "sweep.html", "--db", "sweep.db",
        cwd=folder,
    )  # fmt: skip
    after = counters(real_vllm)
    # 3: on a machine busy with other things a level may rightly say that the client was late.
    assert done.returncode in (0, 1, 3), done.stderr
    assert "Traceback" not in done.stderr
    sweep = decode_sweep((folder / "sweep.json").read_bytes())
    assert (folder / "sweep.html").stat().st_size > 10_000
    return Measured(sweep, {name: after[name] - before[name] for name in after}, done.stdout)


def test_every_level_completes(measured: Measured) -> None:
    levels = measured.sweep.levels
    assert [level.concurrency for level in levels] == list(CONCURRENCY)
    for level in levels:
        assert level.requests is not None
        assert level.requests.failed == level.requests.cancelled == 0
        assert level.requests.ok == max(20, 5 * (level.concurrency or 0))
        assert level.output_tokens_per_s > 0
        assert level.ttft_ms.n > 0
        assert level.itl_ms.n > 0
    assert levels[-1].output_tokens_per_s > levels[0].output_tokens_per_s


def test_levels_and_overhead_are_what_the_server_counted(measured: Measured) -> None:
    sweep, overhead = measured.sweep, measured.sweep.run.overhead
    requests = sum(level.requests.ok for level in sweep.levels if level.requests)
    tokens = sum(level.tokens.output for level in sweep.levels if level.tokens)
    assert overhead.warmup_requests == 3 * len(CONCURRENCY)
    assert overhead.probe_requests > 0
    assert (
        requests + overhead.probe_requests + overhead.warmup_requests
        == (measured.increase["request_success_total"])
    )
    assert (
        tokens + overhead.probe_tokens + overhead.warmup_tokens
        == (measured.increase["generation_tokens_total"])
    )


def test_prompts_have_the_asked_length(measured: Measured) -> None:
    for level in measured.sweep.levels:
        assert level.tokens is not None
        assert level.tokens.source == "usage"
        assert level.prompt_tokens.mean == pytest.approx(INPUT_TOKENS, rel=0.02)
        assert level.output_tokens.mean == OUTPUT_TOKENS


def test_the_server_tells_its_side_of_each_level(measured: Measured) -> None:
    assert measured.sweep.target.engine == "vllm"
    assert "vllm:cache_config_info.block_size" in measured.sweep.target.settings
    for level in measured.sweep.levels:
        server = level.server
        assert server is not None
        assert level.requests is not None
        assert server.requests_total == level.requests.ok + 3  # the warm-up
        assert level.measurement is not None
        assert level.measurement.foreign_requests == 0
        assert server.kv_capacity_tokens
    busiest = measured.sweep.levels[-1].server
    assert busiest is not None
    assert busiest.running_max == CONCURRENCY[-1]
    assert 0 < (busiest.kv_usage_max or 0) < 1
    assert (busiest.prefix_hit_rate or 0) < 0.05, "prompts differ from their first tokens"


def test_no_gpu_is_claimed_where_there_is_none(measured: Measured) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("needs a machine without a GPU")
    assert all(level.gpu == [] for level in measured.sweep.levels)
    assert measured.sweep.target.gpu_note


def trace_ids(phoenix: Phoenix, run_id: str) -> dict[str, int]:
    """The trace of each level of a run, by the name of the level's own span."""
    found: dict[str, int] = {}
    deadline = time.monotonic() + 60
    while len(found) < len(CONCURRENCY) and time.monotonic() < deadline:
        for concurrency in CONCURRENCY:
            name = f"level concurrency={concurrency}"
            for span in phoenix.get(f"/v1/projects/default/spans?limit=1000&name={quote(name)}")[
                "data"
            ]:
                if span["attributes"].get("servefit.run.id") == run_id:
                    found[name] = int(span["context"]["trace_id"], 16)
        time.sleep(0.5)
    return found


def test_its_traces_arrive_spans_as_requests(measured: Measured, phoenix: Phoenix) -> None:
    """One trace a level, one client span a request, in a real back end."""
    traces = trace_ids(phoenix, measured.sweep.run.id)
    for level in measured.sweep.levels:
        assert level.requests is not None
        trace_id = traces[f"level concurrency={level.concurrency}"]
        spans = phoenix.wait_for_spans(trace_id, level.requests.ok + 1)
        requests = [span for span in spans if span["name"] == "chat tiny"]
        assert len(requests) == level.requests.ok
        assert len(spans) == len(requests) + 1  # the level's own span, their parent
        assert level.tokens is not None
        tokens = sum(span["attributes"]["gen_ai.usage.output_tokens"] for span in requests)
        assert tokens == level.tokens.output


def test_the_table_and_a_verdict_are_printed(measured: Measured) -> None:
    assert "streams" in measured.stdout
    assert measured.sweep.verdict is not None
    assert measured.sweep.verdict.finding in measured.stdout


def test_completions_without_streaming(real_vllm: str, tmp_path: Path) -> None:
    done = loadgen(
        "run", real_vllm, "--endpoint", "completions", "--no-stream", "--concurrency", "2",
        "--requests", "10", "--input-tokens", "64", "--output-tokens", "16", "--json", "run.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    (level,) = decode_sweep((tmp_path / "run.json").read_bytes()).levels
    assert level.requests is not None
    assert level.requests.ok == 10
    assert level.tokens is not None
    assert (level.tokens.prompt, level.tokens.output) == (640, 160)
    assert level.ttft_ms.n == level.itl_ms.n == 0
    assert level.e2e_ms.n > 0


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_responses(stream: str, real_vllm: str, tmp_path: Path) -> None:
    before = counters(real_vllm)
    done = loadgen(
        "run", real_vllm, "--endpoint", "responses", stream, "--concurrency", "2",
        "--requests", "10", "--input-tokens", "64", "--output-tokens", "16", "--json", "run.json",
        cwd=tmp_path,
    )  # fmt: skip
    after = counters(real_vllm)
    assert done.returncode in (0, 3), done.stderr
    sweep = decode_sweep((tmp_path / "run.json").read_bytes())
    (level,), overhead = sweep.levels, sweep.run.overhead
    assert level.requests is not None
    assert level.requests.ok == 10
    assert level.tokens is not None
    assert (level.tokens.prompt, level.tokens.output) == (640, 160)
    grown = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert grown == 160 + overhead.probe_tokens
    assert (level.ttft_ms.n > 0) == (level.itl_ms.n > 0) == (stream == "--stream")
    assert level.e2e_ms.n > 0


def test_token_ids_are_a_prompt_where_the_api_has_them(real_vllm: str) -> None:
    async def probed(endpoint: str) -> Probed:
        address = parse_url(real_vllm)
        prober = Prober(address, Dialer(address, None, 5.0), {}, endpoint, "tiny", stream=True)
        return await prober.run(100, Random(1), try_token_ids=True)

    assert asyncio.run(probed("completions")).token_ids
    assert not asyncio.run(probed("chat")).token_ids


@pytest.mark.parametrize(("endpoint", "sequences"), [("embeddings", 1), ("rerank", 9)])
def test_what_generates_nothing(
    endpoint: str, sequences: int, pooling_vllm: str, tmp_path: Path
) -> None:
    before = counters(pooling_vllm)
    done = loadgen(
        "run", pooling_vllm, "--endpoint", endpoint, "--concurrency", "2", "--requests", "20",
        "--input-tokens", "100", "--json", "run.json", "--html", "run.html",
        cwd=tmp_path,
    )  # fmt: skip
    after = counters(pooling_vllm)
    grown = {name: after[name] - before[name] for name in after}
    assert done.returncode in (0, 3), done.stderr
    sweep = decode_sweep((tmp_path / "run.json").read_bytes())
    (level,), overhead = sweep.levels, sweep.run.overhead
    assert level.requests is not None
    assert level.requests.ok == 20
    assert grown["request_success_total"] == sequences * (20 + overhead.probe_requests)
    assert grown["generation_tokens_total"] == overhead.probe_tokens == 0
    assert level.prompt_tokens.mean == pytest.approx(100, rel=0.02)
    assert level.output_tokens_per_s is None
    assert (level.request_throughput or 0) > 0
    assert level.total_tokens_per_s == pytest.approx(
        100 * (level.request_throughput or 0), rel=0.05
    )
    assert level.measurement is not None
    assert level.measurement.foreign_requests == 0


def test_open_loop_keeps_its_rate(real_vllm: str, tmp_path: Path) -> None:
    done = loadgen(
        "run", real_vllm, "--rate", "8", "--arrival", "constant", "--duration", "6s",
        "--input-tokens", "32", "--output-tokens", "8", "--json", "run.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    (level,) = decode_sweep((tmp_path / "run.json").read_bytes()).levels
    assert level.mode == "rate"
    assert level.requests is not None
    assert level.requests.ok == 48
    assert level.request_throughput == pytest.approx(8, rel=0.15)
    assert level.ttft_from_due_ms.mean >= level.ttft_ms.mean


def test_an_unknown_model_names_the_nearest(real_vllm: str, tmp_path: Path) -> None:
    done = loadgen("run", real_vllm, "--model", "tinny", cwd=tmp_path)
    assert done.returncode == 4
    assert "'tiny'" in done.stderr
