"""Curves of known hardware: what the law itself would measure, with tails of a given width."""

from __future__ import annotations

from typing import Any

from agent.model import Level, Requests, Run, Stats, Sweep, Target, TargetGpu, Workload
from agent.sizing.engine import EngineSpec
from agent.sizing.fit import TYPICAL
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.steady import steady

H100 = "NVIDIA H100 80GB HBM3"  # as the driver calls it
LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TAIL = 1.4  # p95 over mean


def stats(mean_ms: float) -> Stats:
    return Stats(mean_ms, 0.0, mean_ms, None, TAIL * mean_ms, 2 * mean_ms, None, None, 300)


def sweep_of(
    card: str = "h100-sxm", shape: str = "llama-3.1-8b", *, driver: str = H100, tp: int = 1,
    lengths: tuple[int, int] = (1000, 300), loads: tuple[int, ...] = LOADS, faster: float = 1.0,
    **more: Any,
) -> Sweep:  # fmt: skip
    """What `card` (which its driver calls `driver`) would show; `faster` than its data sheet."""
    shares = TYPICAL[gpu(card).vendor]
    spec = EngineSpec(gpu(card), model(shape), tp=tp, efficiencies=shares)
    target = Target(
        url="http://gpu:8000", model=shape, engine="vllm",
        gpus=[TargetGpu(driver, f"g{n}") for n in range(tp)],
    )  # fmt: skip
    return Sweep(
        run=Run(id=f"{card}-{tp}", started_at="2026-09-01T00:00:00Z"),
        **{
            "target": target,
            "workload": Workload(input_tokens=lengths[0], output_tokens=lengths[1]),
            "levels": [_level(spec, load, lengths, faster) for load in loads],
            **more,
        },
    )


def _level(spec: EngineSpec, load: int, lengths: tuple[int, int], faster: float) -> Level:
    law = steady(spec, load, *lengths)
    rate = law.output_tokens_per_s * faster
    return Level(
        concurrency=load,
        output_tokens_per_s=rate,
        request_throughput=rate / lengths[1],
        requests=Requests(300, 0, 0, {}),
        ttft_ms=stats(law.ttft_ms / faster + 20),
        itl_ms=stats(law.tpot_ms / faster),
        tpot_ms=stats(law.tpot_ms / faster),
        prompt_tokens=Stats(mean=lengths[0], n=300),
        output_tokens=Stats(mean=lengths[1], n=300),
    )
