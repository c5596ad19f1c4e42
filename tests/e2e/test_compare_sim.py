"""Two real runs of the simulated engine: the slower one is told apart, and its requests go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import loadgen
from tests.e2e.together import waiting

ENGINE = "sim:h100-sxm/llama-3.1-8b?max_num_seqs=8&t0_ms={t0_ms}"
LOAD = ("--concurrency", "4", "--input-tokens", "64", "--output-tokens", "24", "--requests", "60",
        "--slo", "ttft:p95<800ms", "--no-progress", "--quiet")  # fmt: skip
ATTEMPTS = 3  # a machine busy with other things makes a level invalid, and says so


def measured(home: Path, t0_ms: int) -> str:
    """The id of a run of the engine with steps of so many ms."""
    for _ in range(ATTEMPTS):
        file = home / "run.json"
        done = loadgen(home, "run", ENGINE.format(t0_ms=t0_ms), *LOAD, "--json", str(file))
        assert done.returncode in (0, 3), done.stderr
        if done.returncode == 0:
            break
    else:
        pytest.skip("this machine is too busy for a valid level")
    return str(json.loads(file.read_bytes())["run"]["id"])


@waiting
def test_a_slower_engine_is_told_apart_and_exported(tmp_path: Path) -> None:
    a, b = measured(tmp_path, 8), measured(tmp_path, 10)
    done = loadgen(tmp_path, "compare", a, b, "--json", "-",
                   "--fail-on", "output_tokens_per_s<-5%,tpot_ms.mean>+5%")  # fmt: skip
    assert done.returncode == 1, done.stdout
    told = json.loads(done.stdout)
    assert told["a"]["simulated"]
    [pair] = told["pairs"]
    changes = {change["metric"]: change for change in pair["changes"]}
    # A step of the engine took 14 ms and takes 16.
    assert changes["tpot_ms.mean"]["change_percent"] == pytest.approx(100 * (16 / 14 - 1), abs=3)
    assert changes["tpot_ms.mean"]["noise"] == "requests"
    assert {gate["missed"] for gate in told["gate"]} == {True}

    out = tmp_path / "out"
    for form in ("aiperf", "guidellm", "vllm"):
        assert loadgen(tmp_path, "export", b, "--format", form, "-o", str(out)).returncode == 0
    [file] = out.glob("openai-chat-infqps-concurrency4-*.json")
    vllm = json.loads(file.read_bytes())
    assert vllm["completed"] == 60
    assert vllm["servefit"]["simulated"]
    assert vllm["mean_tpot_ms"] == pytest.approx(changes["tpot_ms.mean"]["b"], rel=0.05)
    assert all(len(gaps) == 23 for gaps in vllm["itls"])
    aiperf = json.loads((out / "concurrency_4" / "profile_export_aiperf.json").read_bytes())
    assert aiperf["request_count"]["avg"] == 60
    guidellm = json.loads((out / "benchmarks.json").read_bytes())["benchmarks"][0]
    assert guidellm["metrics"]["request_totals"]["successful"] == 60
