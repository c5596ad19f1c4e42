"""Readings joined to a level: what server and GPUs did between two instants.

Pure: readings in, the views of `agent.model` out. All instants are time.monotonic_ns(). The samples
may come from a load test's own scraping or from an always-on agent; only those between the last one
at or before the level's start and the first one at or after its end are looked at.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

from agent.model import GpuView, Reading, ServerView

Points = list[tuple[int, float]]  # (at_ns, value), in order of time

# What a server's view is made of; readings of other sources in the same list are left alone.
SERVER_SERIES = frozenset(
    (
        *("requests_running", "requests_waiting", "kv_usage_ratio", "kv_capacity_tokens"),
        *("requests_finished_total", "prompt_tokens_total", "output_tokens_total"),
        *("preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
        *("queue_seconds_sum", "prefill_seconds_sum", "decode_seconds_sum"),
        *("queue_seconds_count", "prefill_seconds_count", "decode_seconds_count"),
        "server_start_unix_s",
    )
)
# … and a GPU's.
GPU_SERIES = frozenset(
    (
        *("gpu_memory_used_bytes", "gpu_utilization_ratio", "gpu_temperature_c", "gpu_throttled"),
        *("gpu_energy_j", "gpu_power_w"),
    )
)

# Less than this share of a level's time between energy readings is too little to speak for it.
COVERED_MIN = 0.5


# ----------------------------------------------------------------------------------------- server


def server_view(
    readings: Iterable[Reading],
    *,
    start_ns: int,
    end_ns: int,
    window: tuple[int, int] | None,
) -> ServerView | None:
    """The server during a level; None where it said nothing. `window`: the steady window, if any.

    Gauges: over the samples inside the window, or inside the level where the window holds none;
    each sample weighs the time it stands for. Counters: increase from just before the level to
    just after it, null where one fell or the server's process restarted. Times in ms per request.
    A field without samples is null. What happens between two scrapes is not seen: a maximum here
    is the largest value scraped.
    """
    series = _server_series(readings, start_ns, end_ns)
    if not series:
        return None
    restarted = len({value for _, value in series.get("server_start_unix_s", ())}) > 1

    def mean_max(name: str) -> tuple[float | None, float | None]:
        points = _steady(series.get(name, []), start_ns, end_ns, window)
        return _mean(points), _highest(points)

    def rise(name: str) -> float | None:
        return None if restarted else increase(series.get(name, []))

    def mean_ms(name: str) -> float | None:
        seconds = _ratio(rise(f"{name}_sum"), rise(f"{name}_count"))
        return None if seconds is None else seconds * 1000

    running, waiting = mean_max("requests_running"), mean_max("requests_waiting")
    kv_usage = mean_max("kv_usage_ratio")
    capacity = series.get("kv_capacity_tokens")
    return ServerView(
        running_mean=running[0],
        running_max=running[1],
        waiting_mean=waiting[0],
        waiting_max=waiting[1],
        kv_usage_mean=kv_usage[0],
        kv_usage_max=kv_usage[1],
        preemptions=_whole(rise("preemptions_total")),
        prefix_hit_rate=_ratio(rise("prefix_cache_hits_total"), rise("prefix_cache_queries_total")),
        queue_ms=mean_ms("queue_seconds"),
        prefill_ms=mean_ms("prefill_seconds"),
        decode_ms=mean_ms("decode_seconds"),
        kv_capacity_tokens=_whole(capacity[-1][1]) if capacity else None,
        requests_total=_whole(rise("requests_finished_total")),
        prompt_tokens_total=_whole(rise("prompt_tokens_total")),
        output_tokens_total=_whole(rise("output_tokens_total")),
        samples=len({at for points in series.values() for at, _ in points}),
    )


# -------------------------------------------------------------------------------------------- gpu


def gpu_views(
    readings: Iterable[Reading],
    *,
    start_ns: int,
    end_ns: int,
    window: tuple[int, int] | None = None,
) -> list[GpuView]:
    """Each GPU during a level, in order of UUID.

    Energy is the counter's increase, interpolated to the level's bounds; without a counter (or
    after its reset) it is integrated polled power, which on A100 and H100 sees a quarter of the
    time (arXiv 2312.02741). Mean power is that energy over the level's time. Energy is null where
    the readings cover less than half of the level. Memory, temperature and throttling are of the
    level and the samples beside it; utilization of the window, as the server's gauges.
    """
    by_gpu: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for one in readings:
        uuid = dict(one.labels).get("gpu")
        if uuid is not None and one.name in GPU_SERIES and math.isfinite(one.value):
            by_gpu.setdefault(uuid, {}).setdefault(one.name, []).append((one.at_ns, one.value))
    views = (_gpu_view(uuid, by_gpu[uuid], start_ns, end_ns, window) for uuid in sorted(by_gpu))
    return [view for view in views if view is not None]


def _gpu_view(
    uuid: str,
    all_points: dict[str, Points],
    start_ns: int,
    end_ns: int,
    window: tuple[int, int] | None,
) -> GpuView | None:
    series = {name: bracket(sorted(p), start_ns, end_ns) for name, p in all_points.items()}
    if not any(series.values()):
        return None
    power = _power_w(series, start_ns, end_ns)
    throttled = _highest(series.get("gpu_throttled", []))
    return GpuView(
        uuid=uuid,
        memory_used_bytes_max=_highest(series.get("gpu_memory_used_bytes", [])),
        utilization_mean=_mean(
            _steady(series.get("gpu_utilization_ratio", []), start_ns, end_ns, window)
        ),
        power_w_mean=power,
        energy_j=None if power is None else power * (end_ns - start_ns) / 1e9,
        temperature_c_max=_highest(series.get("gpu_temperature_c", [])),
        clocks_throttled=None if throttled is None else throttled > 0,
    )


def _power_w(series: dict[str, Points], start_ns: int, end_ns: int) -> float | None:
    """Mean power over the level in W, from the energy counter, else from polled power."""
    energy = series.get("gpu_energy_j", [])
    lo, hi = _covered(energy, start_ns, end_ns)
    if hi > lo and increase(energy) is not None:
        return (_at(energy, hi) - _at(energy, lo)) / ((hi - lo) / 1e9)
    polled = series.get("gpu_power_w", [])
    lo, hi = _covered(polled, start_ns, end_ns)
    return _integral(polled, lo, hi) / (hi - lo) if hi > lo else None


def _covered(points: Points, start_ns: int, end_ns: int) -> tuple[int, int]:
    """The part of the level between the first and the last point; empty where it is too short."""
    if len(points) < 2:
        return start_ns, start_ns
    lo, hi = max(start_ns, points[0][0]), min(end_ns, points[-1][0])
    return (lo, hi) if hi - lo >= COVERED_MIN * (end_ns - start_ns) else (start_ns, start_ns)


# ------------------------------------------------------------------------------------------ points


def bracket(points: Points, start_ns: int, end_ns: int) -> Points:
    """The points from the last at or before `start_ns` to the first at or after `end_ns`."""
    first = max(bisect_right(points, start_ns, key=_time) - 1, 0)
    last = bisect_left(points, end_ns, key=_time)
    return points[first : last + 1]


def increase(points: Sequence[tuple[int, float]]) -> float | None:
    """Last minus first of a counter; None with fewer than two points, or where it ever falls."""
    if len(points) < 2 or any(b[1] < a[1] for a, b in pairwise(points)):
        return None
    return points[-1][1] - points[0][1]


def _time(point: tuple[int, float]) -> int:
    return point[0]


def _server_series(readings: Iterable[Reading], start_ns: int, end_ns: int) -> dict[str, Points]:
    """The server's series around the level; empty where it holds no sample of them."""
    series: dict[str, Points] = {}
    for one in readings:
        if one.name in SERVER_SERIES and math.isfinite(one.value):
            series.setdefault(one.name, []).append((one.at_ns, one.value))
    return {name: bracket(sorted(points), start_ns, end_ns) for name, points in series.items()}


def _steady(points: Points, start_ns: int, end_ns: int, window: tuple[int, int] | None) -> Points:
    """Points inside the window, else inside the level: never those beside it, when it was idle."""
    lo, hi = window or (start_ns, end_ns)
    inside = [one for one in points if lo <= one[0] <= hi]
    return inside or [one for one in points if start_ns <= one[0] <= end_ns]


def _mean(points: Points) -> float | None:
    """Mean in which a sample stands for the time half-way to its neighbours.

    The first and the last reach out as far as they reach in, so that even intervals give the
    plain mean.
    """
    if not points:
        return None
    times = [at for at, _ in points]
    gaps = [b - a for a, b in pairwise(times)]
    if sum(gaps) == 0:
        return math.fsum(value for _, value in points) / len(points)
    spans = [a + b for a, b in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)]
    weighted = math.fsum(
        span * value for span, (_, value) in zip(spans, points, strict=True)
    ) / sum(spans)
    return min(max(weighted, min(v for _, v in points)), max(v for _, v in points))


def _at(points: Points, at_ns: int) -> float:
    """The value at an instant inside the points, by linear interpolation."""
    after = bisect_left(points, at_ns, key=_time)
    if points[after][0] == at_ns:
        return points[after][1]
    (t0, v0), (t1, v1) = points[after - 1], points[after]
    return v0 + (v1 - v0) * (at_ns - t0) / (t1 - t0)


def _integral(points: Points, lo_ns: int, hi_ns: int) -> float:
    """Trapezoids between two instants inside the points, in value · ns."""
    inner = [one for one in points if lo_ns < one[0] < hi_ns]
    bent = [(lo_ns, _at(points, lo_ns)), *inner, (hi_ns, _at(points, hi_ns))]
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(bent))


def _highest(points: Points) -> float | None:
    return max((value for _, value in points), default=None)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
