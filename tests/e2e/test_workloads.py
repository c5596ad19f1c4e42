"""Workloads as a server sees them: lengths to the token, prefixes really shared, history sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.model import Level, Sweep, decode_sweep
from tests.e2e.test_sweep_vllm import counters, loadgen

SIM = "sim:h100-sxm/llama-3.1-8b"


def measured(folder: Path, *arguments: str, target: str = SIM) -> Sweep:
    done = loadgen("run", target, *arguments, "--json", "run.json", cwd=folder)
    # 3: on a machine busy with other things a level may rightly say that the client was late.
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr
    return decode_sweep((folder / "run.json").read_bytes())


def level(sweep: Sweep) -> Level:
    [one] = sweep.levels
    assert one.requests is not None
    assert one.requests.failed == 0
    return one


def mooncake(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "trace.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file.name


def test_lengths_by_distribution_are_the_servers_too(tmp_path: Path) -> None:
    sweep = measured(
        tmp_path, "--concurrency", "8", "--requests", "80", "--processes", "2",
        "--input-tokens", "uniform:40:200", "--output-tokens", "uniform:5:20",
        "--prefix-tokens", "64", "--prefixes", "2",
    )  # fmt: skip
    one = level(sweep)
    assert one.prompt_tokens.n == 80
    assert 104 <= (one.prompt_tokens.p50 or 0) <= 264
    assert one.prompt_tokens.max is not None
    assert 240 <= one.prompt_tokens.max <= 264
    assert one.output_tokens.max is not None
    assert 15 <= one.output_tokens.max <= 20
    assert (sweep.workload.input_tokens, sweep.workload.prefix_tokens) == ("uniform:40:200", 64)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_trace_keeps_its_instants_and_lengths(tmp_path: Path, processes: str) -> None:
    rows = [
        {"timestamp": 100 * i, "input_length": 30 + 10 * i, "output_length": 4 + i % 3,
         "hash_ids": []}
        for i in range(40)
    ]  # fmt: skip
    sweep = measured(
        tmp_path, "--trace", mooncake(tmp_path, rows), "--speedup", "2", "--processes", processes
    )
    one = level(sweep)
    assert one.requests is not None
    assert one.requests.ok == 40
    assert one.prompt_tokens.max == 30 + 10 * 39
    assert one.tokens is not None
    assert one.tokens.prompt == sum(row["input_length"] for row in rows)
    assert one.tokens.output == sum(row["output_length"] for row in rows)
    assert one.window_s == pytest.approx(3.9 / 2, abs=0.1)
    assert one.offered_rps == pytest.approx(20, rel=0.01)
    assert (sweep.workload.arrival, sweep.workload.trace) == ("trace", "trace.jsonl")


def test_a_conversation_grows_by_what_was_said(tmp_path: Path) -> None:
    one = level(
        measured(
            tmp_path,
            "--concurrency",
            "3",
            "--requests",
            "27",
            "--turns",
            "3",
            "--think-time",
            "50ms",
            "--input-tokens",
            "40",
            "--output-tokens",
            "20",
        )
    )
    assert one.prompt_tokens.p50 is not None
    assert one.prompt_tokens.max is not None
    assert one.prompt_tokens.max >= one.prompt_tokens.p50 + 50  # a turn more: message and reply


def test_a_pattern_gives_lengths_and_rate(tmp_path: Path) -> None:
    pattern = {
        "window_s": 3600,
        "requests_per_s": {"mean": 12.0},
        "input_tokens": {"mean": 90, "p50": 60, "p95": 250},
        "output_tokens": {"mean": 10},
    }
    (tmp_path / "pattern.json").write_text(json.dumps(pattern))
    sweep = measured(tmp_path, "--workload-from", "pattern.json", "--duration", "6s")
    one = level(sweep)
    assert one.offered_rps == 12
    assert one.prompt_tokens.mean is not None
    assert 60 <= one.prompt_tokens.mean <= 140
    assert one.prompt_tokens.std is not None
    assert one.prompt_tokens.std > 30


def test_stages_change_the_rate_within_a_level(tmp_path: Path) -> None:
    one = level(
        measured(
            tmp_path,
            "--rate",
            "2s@5,2s@5-25",
            "--arrival",
            "constant",
            "--input-tokens",
            "50",
            "--output-tokens",
            "4",
        )
    )
    assert one.requests is not None
    assert one.requests.ok == 40  # 2 s at 5 and 2 s at 15 on average
    assert one.offered_rps == 10


def test_a_dataset_is_sent_with_what_it_says(tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": "a story about the sea", "output_tokens": 7}),
        "broken",
        json.dumps({"messages": [{"role": "user", "content": "a b c"}], "output_tokens": 9}),
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    done = loadgen(
        "run", SIM, "--dataset", "set.jsonl", "--concurrency", "2", "--requests", "20",
        "--json", "run.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert "set.jsonl: 1 line skipped" in done.stderr + done.stdout
    sweep = decode_sweep((tmp_path / "run.json").read_bytes())
    one = level(sweep)
    assert one.tokens is not None
    assert one.tokens.output == 10 * 7 + 10 * 9
    assert sweep.workload.dataset == "set.jsonl"


# --------------------------------------------------------------------------------------- real vLLM


def test_token_ids_are_exact_on_a_real_vllm(real_vllm: str, tmp_path: Path) -> None:
    before = counters(real_vllm)
    sweep = measured(
        tmp_path, "--endpoint", "completions", "--concurrency", "4", "--requests", "24",
        "--input-tokens", "lognormal:200:150", "--output-tokens", "uniform:4:12",
        "--processes", "2",
        target=real_vllm,
    )  # fmt: skip
    after = counters(real_vllm)
    one = level(sweep)
    assert one.tokens is not None
    overhead = sweep.run.overhead
    grown = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert one.tokens.output + overhead.probe_tokens == grown
    assert 4 <= (one.output_tokens.p50 or 0) <= 12
    assert one.prompt_tokens.std is not None
    assert one.prompt_tokens.std > 50


def test_equal_hash_ids_hit_the_prefix_cache_of_a_real_vllm(real_vllm: str, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 400 * i, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 10 + i]}
        for i in range(12)
    ]
    shared = level(measured(tmp_path, "--trace", mooncake(tmp_path, rows), target=real_vllm))
    assert shared.prompt_tokens.mean == pytest.approx(1100, rel=0.02)
    assert shared.server is not None
    assert shared.server.prefix_hit_rate is not None
    assert shared.server.prefix_hit_rate > 0.7  # 11 of 12 find two blocks of three
    rows = [{**row, "hash_ids": [100 + 3 * i, 101 + 3 * i, 102 + 3 * i]}
            for i, row in enumerate(rows)]  # fmt: skip
    cold = level(measured(tmp_path, "--trace", mooncake(tmp_path, rows), target=real_vllm))
    assert cold.server is not None
    assert (cold.server.prefix_hit_rate or 0.0) < 0.05
