"""The passive curve on a real vLLM: what production shows against what a sweep measures.

    python -m tests.soak.passive [--minutes 3] [--concurrency 1,2,4,8]

Production is played by `loadgen run` at one load after the other, whole minutes each, while the
agent watches; then a sweep of the same loads is the yardstick. A passive point lies on the sweep's
curve where its own interval meets the sweep's. Takes about a quarter of an hour, on a machine with
nothing else to do: the tiny model's arithmetic and the load share its processors.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agent.model import Level, Sweep, decode_sweep
from loadgen.targets.vllm import VllmOptions, serve
from tests.conftest import find_vllm_python
from tests.e2e.command import LOADGEN, environment
from tests.e2e.running_agent import RunningAgent, server

Pick = Callable[[Sequence[float]], float]

OUTPUT_TOKENS = 64
SWEEP_S = 30


class Row(NamedTuple):
    """One passive point beside the sweep's curve at the same concurrency."""

    concurrency: float
    minutes: int
    passive: tuple[float, float, float]  # tokens/s: lo, value, hi
    swept: tuple[float, float, float]
    itl_ms: tuple[float, float]  # passive, swept

    @property
    def meets(self) -> bool:
        return self.passive[0] <= self.swept[2] and self.swept[0] <= self.passive[2]


def loadgen(folder: Path, *args: str) -> None:
    done = subprocess.run([*LOADGEN, *args], env=environment(folder), check=False)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"loadgen {args[0]} ended with {done.returncode}")


def campaign(folder: Path, url: str, loads: Sequence[int], minutes: int) -> tuple[Any, Sweep]:
    """(the agent's curve, the sweep)."""
    lengths = ("--input-tokens", "64", "--output-tokens", str(OUTPUT_TOKENS))
    config = server("chat", url, "5s") + '[gpu]\nsource = "none"\n'
    with RunningAgent(folder, config) as agent:
        for load in loads:
            seconds = 60 * (minutes + 1)  # whole minutes, wherever the first begins
            held = ("--concurrency", str(load), "--duration", f"{seconds}s")
            loadgen(folder, "run", url, *held, *lengths)
        sweep = folder / "sweep.json"
        loadgen(
            folder, "sweep", url, "--concurrency", ",".join(map(str, loads)), "--duration",
            f"{SWEEP_S}s", "--repeats", "2", "--json", str(sweep), *lengths,
        )  # fmt: skip
        return agent.get("/api/v1/curve?window=6h"), decode_sweep(sweep.read_bytes())


def rows(curve: Any, sweep: Sweep) -> list[Row]:
    """Each passive point beside the sweep, interpolated where it lies between two levels."""
    at: dict[int, list[Level]] = {}
    for level in sweep.levels:
        at.setdefault(level.concurrency or 0, []).append(level)
    loads = sorted(at)

    def swept(concurrency: float, pick: Pick, of: Callable[[Level], float]) -> float:
        known = [float(pick([of(one) for one in at[load]])) for load in loads]
        return float(np.interp(concurrency, loads, known))

    def rate(level: Level, end: int) -> float:
        return float((level.output_tokens_per_s_ci95 or (0.0, 0.0))[end])

    found = []
    for point in curve["passive"]["points"]:
        c, value = point["concurrency"], point["output_tokens_per_s"]
        lo, hi = point["output_tokens_per_s_ci95"] or (value, value)
        mine = (
            swept(c, min, lambda level: rate(level, 0)),
            swept(c, statistics.mean, lambda level: level.output_tokens_per_s or 0.0),
            swept(c, max, lambda level: rate(level, 1)),
        )
        itl = (point["itl_ms"]["mean"], swept(c, statistics.mean, lambda lv: lv.itl_ms.mean or 0.0))
        found.append(Row(c, point["minutes"], (lo, value, hi), mine, itl))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=3)
    parser.add_argument("--concurrency", default="1,2,4,8")
    asked = parser.parse_args()
    python = find_vllm_python()
    if python is None:
        raise SystemExit("needs vLLM: make real-parts")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with serve(VllmOptions(python=python, log=folder / "vllm.log")) as started:
            loads = [int(one) for one in asked.concurrency.split(",")]
            found = rows(*campaign(folder, started.url, loads, asked.minutes))
    print("| concurrency | minutes | passive tokens/s | sweep tokens/s | ITL ms, both | meet |")
    print("| ---: | ---: | ---: | ---: | ---: | --- |")
    for row in found:
        passive, swept = (f"{v:.1f} [{lo:.1f}, {hi:.1f}]" for lo, v, hi in (row.passive, row.swept))
        itl = f"{row.itl_ms[0]:.2f} / {row.itl_ms[1]:.2f}"
        meet = "yes" if row.meets else "no"
        print(f"| {row.concurrency:.2f} | {row.minutes} | {passive} | {swept} | {itl} | {meet} |")
    return 0 if len(found) >= len(loads) and all(row.meets for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
