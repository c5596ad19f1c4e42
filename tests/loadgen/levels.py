"""Levels with their requests as the store keeps them, made of chosen distributions."""

from __future__ import annotations

from typing import Any

import numpy as np

from agent.model import Level, Measurement, Requests, Run, Slo, Stats, Sweep, Target
from agent.stats import summary
from loadgen.compare import Side
from loadgen.kept import Kept, arrivals, kept, meets, pooled_gaps

TOKENS = 12
SLO = [Slo("ttft", "p95", 30.0)]


def row(index: int, due: float, ttft: float, gaps: list[float], **more: Any) -> dict[str, Any]:
    """An answered request sent when it was due, a token a chunk."""
    e2e = ttft + sum(gaps)
    return {
        "level": 0, "request": index, "due_ms": due, "sent_ms": due, "ttft_ms": ttft,
        "e2e_ms": e2e, "prompt_tokens": 16, "output_tokens": len(gaps) + 1, "error": None,
        "connect_ms": 0.0, "ttfo_ms": ttft, "end_ms": due + e2e, "reasoning_tokens": 0,
        "chunks": len(gaps) + 1, "gaps_ms": np.array(gaps, dtype="<f4").tobytes(), **more,
    }  # fmt: skip


def closed_loop(
    rng: np.random.Generator, streams: int, each: int, slower: float = 1.0
) -> list[dict[str, Any]]:
    """`streams` slots that send `each` requests one after the other; `slower` scales every time."""
    rows = []
    for _ in range(streams):
        now = float(rng.uniform(0, 50))
        for _ in range(each):
            gaps = rng.lognormal(2, 0.3, TOKENS - 1) * slower
            rows.append(row(len(rows), now, float(rng.lognormal(3, 0.4)) * slower, gaps.tolist()))
            now += rows[-1]["e2e_ms"]
    return rows


def level_of(rows: list[dict[str, Any]], streams: int) -> tuple[Level, Kept]:
    """The level's figures over the window in which all streams are held."""
    requests = kept(rows)
    each = requests.n // streams
    ends = requests.end_ms.reshape(streams, each)
    low, high = 50.0, float(ends[:, -1].min())
    seconds = (high - low) / 1e3
    at, tokens = arrivals(requests)
    rate = float(tokens[(at > low) & (at <= high)].sum()) / seconds
    sent = (requests.sent_ms >= low) & (requests.sent_ms <= high)
    gaps, owner = pooled_gaps(requests)

    def stats(values: Any) -> Stats:
        return summary(values[sent & ~np.isnan(values)])

    level = Level(
        concurrency=streams,
        window_s=seconds,
        window_start_s=low / 1e3,
        requests=Requests(requests.n, 0, 0, {}),
        output_tokens_per_s=rate,
        output_tokens_per_s_ci95=(rate * 0.98, rate * 1.02),
        request_throughput=float(((requests.end_ms > low) & (requests.end_ms <= high)).sum())
        / seconds,
        goodput_rps=float((meets(requests, SLO) & sent).sum()) / seconds,
        ttft_ms=stats(requests.ttft_ms),
        itl_ms=summary(gaps[sent[owner]]),
        tpot_ms=stats(requests.tpot_ms),
        e2e_ms=stats(requests.e2e_ms),
        measurement=Measurement(True, []),
    )
    return level, requests


def side(seed: int, loads: tuple[tuple[int, int], ...] = ((4, 15),), slower: float = 1.0) -> Side:
    """A run with a level for each (streams, requests of each)."""
    rng = np.random.default_rng(seed)
    made = [level_of(closed_loop(rng, *load, slower), load[0]) for load in loads]
    target = Target(url="http://a", model="m")
    sweep = Sweep(Run(id=f"run-{seed}"), target, slo=SLO, levels=[level for level, _ in made])
    return Side(sweep, [requests for _, requests in made])
