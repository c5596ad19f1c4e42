"""What the agent knows beyond samples, for the exporters: GPUs, targets, verdict and curve.

A verdict or a curve is of hours ago and still holds, so it gets the instant of each export. None of
it is kept as readings: the store has what it is made from. `source` is the server's name, or
`service:NAME`, so that these series join the server's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from agent.exporters import Known
from agent.model import Slo, Sweep, Verdict
from agent.sizing.curve import Point, is_open, points

CONFIDENCE = {"none": 0, "low": 1, "medium": 2, "high": 3}
_CAPACITY = {"concurrency": "requests", "rps": "requests_per_s"}

_Value = tuple[str, float | None, dict[str, str]]  # null: not known


def of_server(source: str, gpus: Sequence[str], slo: Sequence[Slo]) -> list[Known]:
    """The GPUs (UUIDs) that a server runs on, and the targets declared for it."""
    values: list[_Value] = [("server_gpu", 1.0, {"gpu": uuid}) for uuid in gpus]
    values += [
        ("slo_bound_s", one.bound_ms / 1e3, {"metric": one.metric, "statistic": one.statistic})
        for one in slo
    ]
    return _known(source, values)


def of_verdict(source: str, verdict: Verdict, at_unix_s: float) -> list[Known]:
    """The newest verdict. What it does not say, a ratio without a demand, is left out."""
    said = {"finding": verdict.finding, "confidence": verdict.confidence.level}
    values: list[_Value] = [
        ("assessment_unix_s", at_unix_s, {}),
        ("assessment_finding", 1.0, said),
        ("assessment_confidence", CONFIDENCE[verdict.confidence.level], {}),
        ("assessment_energy_j_per_output_token", verdict.energy.get("j_per_output_token"), {}),
    ]
    if verdict.ratio is not None:
        ratio = (verdict.ratio.lo, verdict.ratio.value, verdict.ratio.hi)
        values += _interval("assessment_demand", "ratio", ratio)
    if (ending := _CAPACITY.get(verdict.capacity.get("unit", ""))) is not None:
        capacity = tuple(verdict.capacity.get(end) for end in ("lo", "value", "hi"))
        values += _interval("assessment_capacity", ending, capacity)
    return _known(source, values)


def of_curve(source: str, sweep: Sweep, at_unix_s: float) -> list[Known]:
    """A measured curve, load by load; repeats of a load are one point, invalid levels none."""
    about = {
        "run": sweep.run.id,
        "model": sweep.target.model,
        "simulated": str(sweep.run.simulated).lower(),
    }
    values: list[_Value] = [("curve_received_unix_s", at_unix_s, about)]
    for point in points(sweep.levels):
        values += _of_point(point)
    return _known(source, values)


def _of_point(point: Point) -> Iterator[_Value]:
    level = point.level
    load = {"offered_rps" if is_open(level) else "concurrency": f"{point.load:g}"}
    if level.output_tokens_per_s:
        ends = (1 - point.half, 1, 1 + point.half)
        rates = tuple(max(0.0, point.throughput * end) for end in ends)
        yield from _interval("curve_output", "tokens_per_s", rates, load)
    yield "curve_requests_per_s", point.rps, load
    yield "curve_ttft_p95_s", _seconds(level.ttft_ms.p95), load
    yield "curve_itl_p95_s", _seconds(level.itl_ms.p95), load
    yield "curve_kv_usage_ratio", level.server.kv_usage_mean if level.server else None, load
    yield "curve_energy_j_per_output_token", level.energy_j_per_output_token, load


def _interval(
    name: str, ending: str, ends: Sequence[float | None], labels: dict[str, str] | None = None
) -> Iterator[_Value]:
    """`ends`: low, the value itself, high."""
    for part, value in zip(("_lo", "", "_hi"), ends, strict=True):
        yield f"{name}{part}_{ending}", value, labels or {}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def _known(source: str, values: Iterable[_Value]) -> list[Known]:
    return [
        Known(name, float(value), tuple(sorted({**labels, "source": source}.items())))
        for name, value, labels in values
        if value is not None and math.isfinite(value)
    ]
