"""Weeks of hourly records with a known load, and what is concluded of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import Verdict
from agent.sizing.case import Observed
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.judge import judge
from agent.sizing.pattern import pattern
from agent.sizing.production import conclude
from agent.sizing.scene import Scene, hours, weekend_s
from agent.sizing.window import Window
from tests.agent.sizing.test_judge import SWEEP

SLO = tuple(parse_slo("ttft:p95<500ms"))
MONDAY = 1_704_067_200  # 2024-01-01 00:00 UTC
HOUR, DAY = 3600, 86400
BOUNDS = (0.1, 0.25, 0.6, 1.0, math.inf)
FAST, SLOW, TORN = (80.0, 15.0, 4.0, 1.0, 0.0), (0.0, 0.0, 20.0, 80.0, 0.0), (90.0, 4.0, 6.0, 0, 0)


def hour(
    at: int,
    running: float,
    *,
    most: float | None = None,
    waiting: float = 0.0,
    ttft: tuple[float, ...] = FAST,
    source: str = "chat",
    **counters: float,
) -> Minute:
    """An hour's record: as many requests as the histogram holds, 100 tokens each."""
    done = sum(ttft) if running else 0.0
    values = [
        MinuteValue("requests_running", (), 720, running, 0, most or running, running),
        MinuteValue("requests_waiting", (), 720, waiting, 0, waiting, 0),
    ]
    counted = {"requests_finished_total": done, "output_tokens_total": 100 * done, **counters}
    values += [MinuteValue(name, (), 720, 0, 0, 0, 0, rise) for name, rise in counted.items()]
    histograms = (MinuteHistogram("ttft_seconds", (), BOUNDS, ttft),) if running else ()
    return Minute(source, MONDAY + at * HOUR, tuple(values), histograms, float(HOUR))


def scene(minutes: list[Minute], **more: Any) -> Scene:
    end = max((one.start_unix_s for one in minutes), default=MONDAY) + HOUR
    servers = sorted({one.source for one in minutes}) or ["chat"]
    window = Window(MONDAY, end, servers=servers, record_s=HOUR).add_all(minutes)
    slo = more.setdefault("slo", SLO)
    more.setdefault("declared_slo", True)
    return Scene(
        pattern=pattern(window), hours=hours(window, slo), weekend_s=weekend_s(window), **more
    )


def judged(one: Scene) -> Verdict:
    seen, n = one.pattern.concurrency, one.replicas
    observed = Observed({"concurrency": (seen.p99 or 0) / n}, {"concurrency": (seen.p95 or 0) / n})
    levels = SWEEP
    return judge(levels, analyse(levels, one.slo), one.slo, observed=observed)


def measured(minutes: list[Minute], **more: Any) -> Verdict:
    one = scene(minutes, curve="measured", **more)
    by_curve = judged(one)
    held = by_curve.capacity["held"]  # as if half of the bounds were kept under the same load
    return conclude(msgspec.structs.replace(one, held_half=held), by_curve)


def alone(minutes: list[Minute], **more: Any) -> Verdict:
    """Without any curve."""
    return conclude(scene(minutes, **more), None)


def days(n: float, running: float, **more: Any) -> list[Minute]:
    return [hour(at, running, **more) for at in range(round(24 * n))]


def codes(found: Verdict) -> set[str]:
    return {one.code for one in found.reasons}
