"""A sweep over the wire finds what was planted in the engine: knee, limit and SLO capacity.

What is planted is worked out by the same engine in virtual time, where there is no client, no
socket and no noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agent.model import Curve, Sweep, decode_sweep
from agent.sizing.curve import analyse, parse_slo
from loadgen.targets.sim import parse_spec
from tests.agent.sizing.test_rules import simulated
from tests.e2e.together import waiting

ATTEMPTS = 3  # a machine busy with other things makes a level invalid, and says so


class Planted(msgspec.Struct, frozen=True):
    name: str
    spec: str
    loads: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    slo: str
    limit: str
    knee: int


CASES = (
    Planted(
        "admission", "sim:h100-sxm/llama-3.1-8b?max_num_seqs=8&t0_ms=8",
        (1, 4, 8, 16, 32), 128, 32, "ttft:p95<800ms", "ADMISSION_CAP", 8,
    ),
    Planted(
        "memory", "sim:rtx-4090/llama-3.1-8b?precision=fp8&num_gpu_blocks=256",
        (1, 4, 8, 16, 32), 256, 64, "ttft:p95<1s", "KV_MEMORY", 16,
    ),
    Planted(
        "prefill", "sim:l4/llama-3.1-8b?precision=fp8&max_num_batched_tokens=2048",
        (1, 2, 4, 8, 16), 1024, 4, "ttft:p95<900ms", "COMPUTE_PREFILL", 8,
    ),
)  # fmt: skip


def loadgen(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *arguments],
        env={**os.environ, "XDG_DATA_HOME": str(cwd)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def swept(case: Planted, folder: Path) -> Sweep:
    """The real sweep, over a real socket; the last of a few attempts if the machine is too busy."""
    for attempt in range(ATTEMPTS):
        result = folder / f"{case.name}-{attempt}.json"
        done = loadgen(
            "sweep", case.spec,
            "--concurrency", ",".join(map(str, case.loads)), "--slo", case.slo,
            "--input-tokens", str(case.input_tokens),
            "--output-tokens", str(case.output_tokens),
            "--json", str(result), "--db", str(folder / "sim.db"),
            cwd=folder,
        )  # fmt: skip
        assert done.returncode in (0, 1, 3), done.stderr
        assert "SIMULATED" in done.stdout
        sweep = decode_sweep(result.read_bytes())
        if done.returncode != 3:
            break
    return sweep


@waiting
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sweep_finds_what_was_planted(case: Planted, tmp_path: Path) -> None:
    slo = parse_slo(case.slo)
    planted: Curve = analyse(
        simulated(parse_spec(case.spec), case.loads, case.input_tokens, case.output_tokens), slo
    )
    assert (planted.limit, planted.knee and planted.knee.concurrency) == (case.limit, case.knee)

    sweep = swept(case, tmp_path)
    found = sweep.curve
    assert sweep.run.simulated
    assert found.limit == case.limit
    assert found.saturated
    assert found.knee is not None
    assert found.knee.concurrency == case.knee
    assert planted.knee is not None
    assert found.knee.output_tokens_per_s == pytest.approx(
        planted.knee.output_tokens_per_s, rel=0.15
    )
    assert found.slo_capacity is not None
    assert planted.slo_capacity is not None
    assert found.slo_capacity.bracketed
    # The planted crossing lies inside the interval that the sweep states.
    lo, hi = found.slo_capacity.lo, found.slo_capacity.hi
    assert lo is not None
    assert hi is not None
    assert planted.slo_capacity.concurrency is not None
    assert lo <= planted.slo_capacity.concurrency <= hi


@waiting
@pytest.mark.parametrize("endpoint", ["embeddings", "rerank"])
def test_where_nothing_is_generated_prefill_is_the_limit(endpoint: str, tmp_path: Path) -> None:
    """16 streams of a prefill each: requests/s stand still, and nothing is said of tokens."""
    for attempt in range(ATTEMPTS):
        result = tmp_path / f"{attempt}.json"
        done = loadgen(
            "sweep", "sim:rtx-4090/llama-3.1-8b?precision=fp8", "--endpoint", endpoint,
            "--concurrency", "1,4,16", "--duration", "4s", "--input-tokens", "256",
            "--slo", "e2e:p95<200ms", "--json", str(result), "--db", str(tmp_path / "sim.db"),
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode in (0, 1, 3), done.stderr
        if done.returncode != 3:
            break
    sweep = decode_sweep(result.read_bytes())
    assert "tok/s  ±95%" not in done.stdout
    assert "prompt tok/s" in done.stdout
    assert (sweep.workload.stream, sweep.workload.output_tokens) == (False, 0)
    for level in sweep.levels:
        assert level.output_tokens_per_s is None
        assert level.requests is not None
        assert level.requests.failed == 0
        assert level.prompt_tokens.mean == pytest.approx(256, rel=0.01)
        assert level.total_tokens_per_s == pytest.approx(
            256 * (level.request_throughput or 0), rel=0.02
        )
        assert level.measurement is not None
        assert level.measurement.foreign_requests == 0
    assert sweep.curve.saturated
    assert sweep.curve.limit == "COMPUTE_PREFILL"
    assert sweep.curve.slo_capacity is not None
    assert (sweep.curve.slo_capacity.lo, sweep.curve.slo_capacity.hi) == (4, 16)
    assert sweep.verdict is not None
    assert "requests/s at the knee" in sweep.verdict.summary
    assert sweep.verdict.recommendation is not None
    assert f"--endpoint {endpoint}" in (sweep.verdict.recommendation.confirm_with or "")
