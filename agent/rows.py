"""What the agent keeps, as rows of its tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import Served, Sweep, UsageError, encode

Labels = tuple[tuple[str, str], ...]


def labels_text(labels: Labels) -> str:
    return json.dumps(dict(labels), sort_keys=True)


def bounds_text(bounds: tuple[float, ...]) -> str:
    """JSON knows no infinity: the last bound is null."""
    return json.dumps([None if one == float("inf") else one for one in bounds]) if bounds else ""


def value_row(value: MinuteValue) -> tuple[float | str | None, ...]:
    if value.increase is not None:
        return (value.n, None, None, None, value.last, value.increase, None)
    three = (None if one == value.last else one for one in (value.mean, value.min, value.max))
    return (value.n, *three, value.last, None, None)


def histogram_row(histogram: MinuteHistogram) -> tuple[float | str | None, ...]:
    """Counts to a thousandth, without the zeros behind the last one.

    What came between two samples is shared out over two minutes by time, with all digits of a
    float; what rounding loses in a month is a tenth of a request.
    """
    counts = thousandths(histogram.counts)
    return (round(sum(counts)), None, None, None, None, None, counts_text(counts))


def thousandths(counts: Sequence[float]) -> list[float]:
    rounded = [round(count, 3) for count in counts]
    return [int(count) if count == int(count) else count for count in rounded]


def counts_text(counts: list[float]) -> str:
    end = next((n for n in range(len(counts), 0, -1) if counts[n - 1]), 0)
    return json.dumps(counts[:end], separators=(",", ":"))


def counted_s(minute: Minute) -> float:
    """The seconds that a minute's increases are of.

    In a gap nothing was watched, but what a counter rose by meanwhile is known.
    """
    return max(minute.covered_s, 60.0) if "gap" in minute.marks else minute.covered_s


def curve_row(sweep: Sweep, source: str | None, now_s: float) -> dict[str, Any]:
    _check_curve(sweep)
    text = encode(sweep).decode()
    return {
        "key": sweep.run.id or "sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        "received_unix_s": now_s,
        "source": source,
        "started_at": sweep.run.started_at,
        "url": sweep.target.url,
        "model": sweep.target.model,
        "engine": sweep.target.engine,
        "levels": len(sweep.levels),
        "simulated": int(sweep.run.simulated),
        "sweep": text,
    }


def _check_curve(sweep: Sweep) -> None:
    """A curve says of one load at least what came out. Raises UsageError."""
    says = False
    for number, level in enumerate(sweep.levels):
        load = level.concurrency if level.concurrency is not None else level.offered_rps
        rates = (level.output_tokens_per_s, level.request_throughput, level.total_tokens_per_s)
        if any(one is not None and one < 0 for one in (load, *rates)):
            raise UsageError(f"levels[{number}] has a negative load or rate")
        says |= bool(load) and any(one is not None for one in rates)
    if not says:
        raise UsageError("no level has both a load (concurrency or offered_rps) and a throughput")


def served_row(source: int, one: Served) -> tuple[int | float | str | None, ...]:
    """A request as `served` has it; the instant is its arrival."""

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e3, 3)

    return (
        one.arrived_unix_ns // 1_000_000,
        source,
        one.model,
        one.prompt_tokens,
        one.output_tokens,
        ms((one.ended_unix_ns - one.arrived_unix_ns) / 1e9),
        *(ms(stage) for stage in (one.ttft_s, one.queue_s, one.prefill_s, one.decode_s)),
        None if one.energy_j is None else round(one.energy_j, 3),
    )
