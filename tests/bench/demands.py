"""`python -m tests.bench.demands [--every=N] [WORD …]`: recorded requests, judged from files.

`agent assess --curve CURVE --demand TRACE` is held against the engine that was swept: the very same
requests go through it, with its true efficiencies, ever faster, until the SLO breaks. That is how
much it holds (K); at 0.2 to 2 times that (D/K) the verdict is asked for. The curve is of requests
of the trace's mean lengths or of 512 + 128 tokens, with the errors of a sweep; and it tells its
model and GPU, so that the requests can be replayed, or it does not.

Wrong is UNDER_SIZED where the SLO holds, and RIGHT_SIZED where it breaks. Words choose the cases
whose engine, trace or SLO hold one of them; a replay takes seconds, and one in N is asked for.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import NamedTuple

import msgspec
import numpy as np

from agent.files import Asked, judge_files, read_demand
from agent.model import Slo, Sweep
from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.curve import parse_slo
from agent.sizing.engine import EngineSpec
from agent.sizing.replay import excess, replay
from agent.stats import Floats
from tests.bench.replay import CHAT, CODE, LONG, missing, read
from tests.bench.scenarios import Box, Traffic, sweep_of

REQUESTS = 1_500
LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SLOS = ("ttft:p95<2s,itl:p95<100ms", "ttft:p95<500ms,itl:p95<40ms", "ttft:p95<1s")
FACTORS = (0.2, 0.4, 0.6, 0.8, 0.95, 1.1, 1.4, 2.0)
OWN, OTHER_LENGTHS = "its lengths", (512, 128)
EVERY = 8
NEAR = 1.03  # of the multiples between which the most that is held lies
ENGINES = {
    "H100": Box("h100-sxm", precision="bf16"),
    "L4": Box("l4"),
    "H100, 14B": Box("h100-sxm", "qwen3-14b", "bf16"),
}


# -------------------------------------------------------------------------------------- the truth


@lru_cache(maxsize=1)
def traces() -> dict[str, Arrivals]:
    """Parts of public traces, and requests with their lengths at other instants."""
    code, chat, long = (read(name) for name in (CODE, CHAT, LONG))
    rng = np.random.default_rng(7)
    picked = chat.only(np.sort(rng.choice(len(chat), REQUESTS, replace=False)))

    def at(instants_s: Floats) -> Arrivals:
        order = rng.permutation(REQUESTS)
        lengths = picked.prompt_tokens[order], picked.output_tokens[order]
        return recorded(instants_s - instants_s[0], *lengths)

    return {
        "code": _part(code, 0),
        "code, later": _part(code, len(code) // 2),
        "chat": _part(chat, 0),
        "chat, later": _part(chat, len(chat) // 2),
        "long": _part(long, 0),
        "independent": at(np.cumsum(rng.exponential(1.0, REQUESTS))),
        "bursts": at(np.cumsum(rng.gamma(1 / 16, 16.0, REQUESTS))),
        "day": at(np.sort(_of_a_day(rng))),
    }


def _part(arrivals: Arrivals, first: int) -> Arrivals:
    some = arrivals.only(np.arange(first, first + REQUESTS))
    return recorded(some.at_s - some.at_s[0], some.prompt_tokens, some.output_tokens)


def _of_a_day(rng: np.random.Generator) -> Floats:
    """Instants of an office day: a tenth of the peak's rate at night."""
    hours = 24 * rng.random(100 * REQUESTS)
    rate = 0.1 + 0.9 * np.clip(np.sin((hours - 7) / 12 * np.pi), 0, 1) ** 1.5
    kept: Floats = hours[rng.random(hours.size) < rate]
    return 3600 * kept[:REQUESTS]


def faster(arrivals: Arrivals, by: float) -> Arrivals:
    return msgspec.structs.replace(
        arrivals, at_s=arrivals.at_s / by, window_s=arrivals.window_s / by
    )


def missed(spec: EngineSpec, arrivals: Arrivals, slo: Sequence[Slo]) -> float:
    """How many times what the SLO allows the engine misses: over 1 it breaks."""
    done = replay(spec, arrivals)
    return max(excess(done, target, len(arrivals)) for target in slo)


def most(spec: EngineSpec, arrivals: Arrivals, slo: Sequence[Slo]) -> float | None:
    """How many times as fast the requests may come; null where at no speed they all meet it."""
    held, broken, by = 0.0, math.inf, 1.0
    while held == 0.0 or broken / held > NEAR:
        if not 1e-3 < by < 1e4:
            return None
        if missed(spec, faster(arrivals, by), slo) > 1:
            broken = by
        else:
            held = by
        by = math.sqrt(held * broken) if held and broken < math.inf else 2 * held or broken / 2
    return held


# ---------------------------------------------------------------------------------------- verdicts


class Judged(NamedTuple):
    engine: str
    trace: str
    slo: str
    factor: float  # D/K
    lengths: str  # of the curve's requests
    is_known: bool  # the curve tells model and GPU
    missed: float  # times what the SLO allows
    finding: str
    summary: str

    @property
    def is_wrong(self) -> bool:
        breaks = self.missed > 1
        return self.finding in (("RIGHT_SIZED", "OVER_SIZED") if breaks else ("UNDER_SIZED",))

    def line(self) -> str:
        how = "replayed" if self.is_known else "not replayed"
        return (
            f"WRONG {self.engine}, {self.trace}, {self.slo}, {self.lengths}, {how}: at"
            f" {self.factor:g} of what it holds, {self.missed:.2f} of what may be missed,"
            f" {self.finding}: {self.summary}"
        )


def judged(engine: str, name: str, slo_text: str, every: int) -> list[Judged]:
    """The verdicts at every factor; replayed are one in `every` of them, for that takes seconds."""
    box, base, slo = ENGINES[engine], traces()[name], parse_slo(slo_text)
    if (held := most(box.spec, base, slo)) is None:
        return []
    found = []
    means = round(base.prompt_tokens.mean()), round(base.output_tokens.mean())
    for lengths, of in ((OWN, means), ("512 + 128", OTHER_LENGTHS)):
        sweep = _swept(box, *of)
        for number, factor in enumerate(FACTORS):
            asked = _asked(faster(base, held * factor))
            assert asked.arrivals is not None
            truth = missed(box.spec, asked.arrivals, slo)
            turn = sum(map(ord, f"{engine}{name}{slo_text}{lengths}")) + number
            for is_known in (False, True)[: 1 + (turn % every == 0)]:
                curve = sweep if is_known else _unknown(sweep)
                verdict = judge_files(curve, slo, asked)
                found.append(
                    Judged(
                        engine, name, slo_text, factor, lengths, is_known, truth,
                        verdict.finding, verdict.summary,
                    )
                )  # fmt: skip
    return found


@lru_cache(maxsize=64)
def _swept(box: Box, prompt: int, output: int) -> Sweep:
    return sweep_of(box, Traffic(0.1, prompt=prompt, output=output), LOADS)


def _unknown(sweep: Sweep) -> Sweep:
    target = msgspec.structs.replace(sweep.target, model="ours", gpus=[])
    return msgspec.structs.replace(sweep, target=target)


def _asked(arrivals: Arrivals) -> Asked:
    """The requests as the command reads them."""
    columns = (1e3 * arrivals.at_s, arrivals.prompt_tokens, arrivals.output_tokens)
    lines = (
        json.dumps({"timestamp": at_ms, "input_length": prompt, "output_length": output})
        for at_ms, prompt, output in zip(*(one.tolist() for one in columns), strict=True)
    )
    return read_demand("\n".join(lines).encode(), "requests.jsonl")


# --------------------------------------------------------------------------------------- the table


def show(words: Sequence[str] = (), every: int = EVERY) -> list[Judged]:
    """Judges on all processors; prints what is wrong, and the tables."""
    cases = [
        (engine, name, slo, every)
        for engine in ENGINES
        for name in traces()
        for slo in SLOS
        if not words or any(word in f"{engine} {name} {slo}" for word in words)
    ]
    found: list[Judged] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for some in pool.map(judged, *zip(*cases, strict=True)):
            found += some
            for one in some:
                if one.is_wrong:
                    print(one.line(), flush=True)
    print("\n" + "\n".join(_table(found)))
    return found


def _table(found: Sequence[Judged]) -> Iterator[str]:
    said = sorted({one.finding for one in found})
    yield f"| curve, and D/K | {' | '.join(said)} |"
    yield f"| --- | {' | '.join('---:' for _ in said)} |"
    rows = Counter((one.is_known, one.lengths, one.factor, one.finding) for one in found)
    for known, lengths, factor in sorted({key[:3] for key in rows}):
        cells = (str(rows[known, lengths, factor, finding] or "") for finding in said)
        how = "replayed" if known else "not replayed"
        yield f"| {lengths}, {how}, {factor:g} | {' | '.join(cells)} |"


def main(words: Sequence[str]) -> int:
    if (why := missing()) is not None:
        print(f"demands: {why}; nothing judged")
        return 0
    every = next((int(word[8:]) for word in words if word.startswith("--every=")), EVERY)
    began = time.monotonic()
    found = show([word for word in words if not word.startswith("--")], every)
    wrong = sum(one.is_wrong for one in found)
    print(f"\n{len(found)} verdicts, {wrong} wrong; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
