"""The search finds the SLO capacity that was planted, inside its interval and its budget.

What is planted is worked out by the same engine in virtual time, at every whole number of streams.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from agent.model import Sweep, decode_sweep
from agent.sizing.curve import analyse, is_valid, parse_slo
from loadgen.search import Settings, Step, next_step
from loadgen.targets.sim import parse_spec
from tests.agent.sizing.test_rules import simulated
from tests.e2e.command import loadgen
from tests.e2e.together import waiting

ATTEMPTS = 3  # a level during which the client was late is invalid, and says so
START_S = 8.0  # of the command and of its simulated server, before the budget begins to run


class Planted(msgspec.Struct, frozen=True):
    name: str
    spec: str
    input_tokens: int
    output_tokens: int
    slo: str
    budget_s: float


CASES = (
    Planted("admission", "sim:h100-sxm/llama-3.1-8b?max_num_seqs=8&t0_ms=8",
            128, 32, "ttft:p95<180ms", 40),
    Planted("memory", "sim:rtx-4090/llama-3.1-8b?precision=fp8&num_gpu_blocks=256",
            256, 48, "ttft:p95<110ms", 45),
    Planted("prefill", "sim:l4/llama-3.1-8b?precision=fp8&max_num_batched_tokens=2048",
            1024, 4, "e2e:mean<1200ms", 45),
)  # fmt: skip


def quiet_enough(levels_are_valid: bool) -> None:
    """A machine that leaves the client no core is no place to hold its answer against another."""
    if not levels_are_valid:
        pytest.skip("the machine was too busy for valid levels")


def searched(folder: Path, *args: str, budget_s: float) -> tuple[Sweep, float, str]:
    """The sweep, how long the command took, and what it said; again if the machine is too busy."""
    result = folder / "auto.json"
    for _ in range(ATTEMPTS):
        began_s = time.monotonic()
        done = loadgen(
            folder, "sweep", *args, "--budget", f"{budget_s:g}s", "--json", str(result),
            "--db", str(folder / "auto.db"),
        )  # fmt: skip
        took_s = time.monotonic() - began_s
        assert done.returncode in (0, 1, 3), done.stderr
        if done.returncode != 3:
            break
    return decode_sweep(result.read_bytes()), took_s, done.stderr


def assert_replays(sweep: Sweep, budget_s: float) -> None:
    """Every load that was measured is what the levels before it ask for."""
    settings = Settings("concurrency", budget_s, tuple(sweep.slo))
    for at, level in enumerate(sweep.levels):
        step = next_step(sweep.levels[:at], settings, 0.0)
        assert isinstance(step, Step)
        assert step.load == level.concurrency


@waiting
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_search_finds_the_planted_capacity(case: Planted, tmp_path: Path) -> None:
    slo = parse_slo(case.slo)
    engine = parse_spec(case.spec)
    planted = analyse(
        simulated(engine, range(1, 21), case.input_tokens, case.output_tokens), slo
    ).slo_capacity
    assert planted is not None
    assert planted.concurrency is not None

    sweep, took_s, said = searched(
        tmp_path, case.spec, "--concurrency", "auto", "--slo", case.slo,
        "--input-tokens", str(case.input_tokens), "--output-tokens", str(case.output_tokens),
        budget_s=case.budget_s,
    )  # fmt: skip
    found = sweep.curve.slo_capacity
    assert found is not None
    assert found.lo is not None
    assert found.hi is not None
    assert found.bracketed
    assert found.lo <= planted.concurrency <= found.hi, said
    assert found.hi <= 1.5 * found.lo, said
    drain_s = (sweep.levels[-1].e2e_ms.max or 0.0) / 1e3
    assert took_s <= case.budget_s + drain_s + START_S
    assert_replays(sweep, case.budget_s)
    assert "(holds) and" in said
    assert "note: the search is at its end: " in said


@waiting
def test_a_rate_is_searched_up_to_what_the_server_completes(tmp_path: Path) -> None:
    """Eight seats for requests of 0.45 s: 17.9 requests/s at most, and fewer with a short queue."""
    sweep, _, said = searched(
        tmp_path, CASES[0].spec, "--rate", "auto", "--slo", "ttft:p95<500ms",
        "--input-tokens", "128", "--output-tokens", "32", budget_s=40,
    )  # fmt: skip
    found = sweep.curve.slo_capacity
    assert found is not None
    assert found.lo is not None
    assert found.hi is not None
    assert 2 < found.lo < found.hi, said
    assert found.lo < 17.9
    assert found.hi > 14
    # The first rate is about what one stream alone completes, which is no level but counted.
    assert sweep.levels[0].offered_rps == pytest.approx(2.2, rel=0.2)
    assert sweep.run.overhead.warmup_requests >= 3


def test_on_a_real_vllm_what_was_found_holds_when_it_is_listed(
    real_vllm: str, tmp_path: Path
) -> None:
    """Its truth is not known, but listed levels under the interval and above it must agree.

    The bound is what twelve streams saw before; half and twice the load are well apart from it.
    """
    size = ("--input-tokens", "64", "--output-tokens", "16", "--yes")
    probe, _, _ = searched(tmp_path, real_vllm, "--concurrency", "12", *size, budget_s=20)
    quiet_enough(is_valid(probe.levels[0]))
    bound_ms = probe.levels[0].e2e_ms.mean
    assert bound_ms is not None
    slo = f"e2e:mean<{bound_ms:.0f}ms"
    sweep, took_s, said = searched(
        tmp_path, real_vllm, "--concurrency", "auto", "--slo", slo, *size, budget_s=40
    )
    drain_s = (sweep.levels[-1].e2e_ms.max or 0.0) / 1e3
    assert took_s <= 40 + drain_s + START_S
    quiet_enough(sum(map(is_valid, sweep.levels)) > len(sweep.levels) / 2)
    found = sweep.curve.slo_capacity
    assert found is not None
    assert found.bracketed, said
    assert found.lo is not None
    assert found.hi is not None
    loads = f"{max(1, int(found.lo / 2))},{int(found.hi * 2)}"
    for _ in range(ATTEMPTS):  # whatever else runs here makes vLLM slower than it just was
        listed, _, _ = searched(
            tmp_path, real_vllm, "--concurrency", loads, "--slo", slo, *size, budget_s=30
        )
        met = [level.slo_met for level in listed.levels]
        if met == [True, False]:
            break
    quiet_enough(all(map(is_valid, listed.levels)))
    assert met == [True, False], said
