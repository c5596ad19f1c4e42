"""`python -m tests.bench.replay`: the headroom that public traces need, and how fast a replay is.

Each trace goes through the modelled engine at as many multiples as it takes to find the largest
with a P95 wait under 2 s. What that engine writes at most, over the mean load it held then, is the
headroom the trace needs; a flat margin of 20 % is then tried on the same trace.

The traces are not part of the repository: SERVEFIT_TRACES names a directory with
`azure-2023-code.csv.gz`, `azure-2023-conversation.csv.gz` (github.com/Azure/AzurePublicDataset) and
`mooncake-conversation.jsonl.gz` (github.com/kvcache-ai/Mooncake).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agent import trace
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.engine import EngineSpec
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.replay import headroom, replay, with_margin

ROOT = Path(__file__).parent.parent.parent
SPEC = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))
FLAT = 0.2
FAST_REQUESTS, FAST_RPS = 200_000, 20_000.0

HEAD = (
    "| trace | requests/s, mean | tokens in / out, mean | headroom needed | 95 % interval "
    "| P95 wait with +20 % |\n| --- | ---: | ---: | ---: | ---: | ---: |"
)


class Case(NamedTuple):
    title: str
    arrivals: Callable[[], Arrivals]


def directory() -> Path:
    return Path(os.environ.get("SERVEFIT_TRACES", ROOT.parent / "shared/data/traces"))


def read(name: str, *, is_cached: bool = False) -> Arrivals:
    """A trace as it was recorded; with `is_cached` no block of a prompt is computed twice.

    Raises UsageError where it is not there.
    """
    rows = trace.read(directory() / name).rows
    cached = list(_known_before(rows)) if is_cached else 0
    return recorded(rows.at_s, rows.input_tokens, rows.output_tokens, cached_tokens=cached)


def _known_before(rows: trace.Rows) -> Iterator[int]:
    """Tokens at the beginning of each prompt that an endless prefix cache knew."""
    known: set[int] = set()
    for row in rows:
        ids = row.hash_ids
        same = next((at for at, one in enumerate(ids) if one not in known), len(ids))
        known.update(ids)
        yield min(row.input_tokens, same * trace.HASH_BLOCK_TOKENS)


def _evenly(arrivals: Arrivals) -> Arrivals:
    """The same requests at instants that know nothing of each other."""
    rng = np.random.default_rng(1)
    order = rng.permutation(len(arrivals))
    shuffled = arrivals.only(order)
    return recorded(
        rng.uniform(0, arrivals.window_s, len(arrivals)),
        shuffled.prompt_tokens,
        shuffled.output_tokens,
        window_s=arrivals.window_s,
    )


CODE, CHAT = "azure-2023-code.csv.gz", "azure-2023-conversation.csv.gz"
LONG = "mooncake-conversation.jsonl.gz"
CASES = (
    Case("Azure 2023, code", lambda: read(CODE)),
    Case("Azure 2023, conversation", lambda: read(CHAT)),
    Case("Mooncake, conversation", lambda: read(LONG)),
    Case("Mooncake, endless prefix cache", lambda: read(LONG, is_cached=True)),
    Case("Azure 2023, conversation, but at independent instants", lambda: _evenly(read(CHAT))),
)


class Found(NamedTuple):
    title: str
    arrivals: Arrivals
    needed: float
    lo: float | None
    hi: float | None
    flat_wait_s: float  # P95 with a flat margin

    def line(self) -> str:
        lo, hi = (f"{end:.2f}" if end else "no end" for end in (self.lo, self.hi))
        tokens = (
            f"{self.arrivals.prompt_tokens.mean():,.0f} / {self.arrivals.output_tokens.mean():,.0f}"
        )
        cells = (
            self.title, f"{self.arrivals.mean_rps:.2f}", tokens, f"{self.needed:.2f}×",
            f"{lo} to {hi}", f"{self.flat_wait_s:,.1f} s",
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def required(case: Case) -> Found:
    arrivals = case.arrivals()
    found = headroom(SPEC, arrivals)
    flat = with_margin(SPEC, arrivals, FLAT).level.queue_ms.p95
    assert flat is not None
    return Found(case.title, arrivals, found.value, found.lo, found.hi, flat / 1e3)


def fast(name: str) -> float:
    """Requests replayed in a second of CPU, percentiles by hour included: 200,000 of a trace, one
    recording behind the other."""
    once = read(name)
    times = -(-FAST_REQUESTS // len(once))
    shift = np.repeat(np.arange(times) * once.window_s, len(once))
    columns = (np.tile(one, times) for one in (once.prompt_tokens, once.output_tokens))
    many = recorded(np.tile(once.at_s, times) + shift, *columns).only(np.arange(FAST_REQUESTS))
    began = time.process_time()
    done = replay(SPEC, many)
    hourly, whole = done.hours, done.level
    took_s = time.process_time() - began
    assert sum(hour.level.requests for hour in hourly) == whole.requests
    return FAST_REQUESTS / took_s


def missing() -> str | None:
    lacks = [name for name in (CODE, CHAT, LONG) if not (directory() / name).exists()]
    return f"{directory()} lacks {', '.join(lacks)} (SERVEFIT_TRACES)" if lacks else None


def show(cases: tuple[Case, ...] = CASES) -> list[Found]:
    print(f"\n{SPEC.model.name} on one {SPEC.gpu.name}, simulated; P95 wait ≤ 2 s.\n\n{HEAD}")
    found = []
    for case in cases:
        found.append(required(case))
        print(found[-1].line(), flush=True)
    return found


def main() -> int:
    if (why := missing()) is not None:
        print(f"replay: {why}; nothing measured")
        return 0
    show()
    for name in (CODE, CHAT, LONG):
        print(f"\n{name}: {fast(name):,.0f} requests/s replayed on one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
