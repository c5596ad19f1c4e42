"""Stores for tests: clocks that a test turns, readings and minutes at its instants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from agent.history import History
from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import Reading
from agent.timeline import Timeline

NOON = 1_790_000_000 // 3600 * 3600  # an hour's beginning, unix s
BOUNDS = (0.1, 0.5, math.inf)


class Clocks:
    """Wall and monotonic clock of a test."""

    def __init__(self, unix_s: float = NOON) -> None:
        self.wall_ns = round(unix_s * 1e9)
        self.monotonic_ns = 10**12

    def pass_s(self, seconds: float) -> None:
        self.wall_ns += round(seconds * 1e9)
        self.monotonic_ns += round(seconds * 1e9)

    def timeline(self) -> Timeline:
        return Timeline(lambda: self.wall_ns, lambda: self.monotonic_ns)

    def reading(self, name: str, value: float, **labels: str) -> Reading:
        return Reading(self.monotonic_ns, name, value, tuple(sorted(labels.items())))


def store(path: Path, clocks: Clocks, **settings: Any) -> History:
    """A store whose upkeep comes with every flush."""
    free: Callable[[], int] = settings.pop("free_bytes", lambda: 10**12)
    return History(
        path, timeline=clocks.timeline(), free_bytes=free, upkeep_every_s=0.0, **settings
    )


def gauge(name: str, *values: float, **labels: str) -> MinuteValue:
    mean = math.fsum(values) / len(values)
    return MinuteValue(
        name, tuple(labels.items()), len(values), mean, min(values), max(values), values[-1], None
    )


def counter(name: str, last: float, increase: float, **labels: str) -> MinuteValue:
    return MinuteValue(name, tuple(labels.items()), 12, last, last, last, last, increase)


def histogram(name: str, *counts: float) -> MinuteHistogram:
    return MinuteHistogram(name, (), BOUNDS, counts)


def minute(
    start_unix_s: int,
    values: Iterable[MinuteValue] = (),
    histograms: Iterable[MinuteHistogram] = (),
    *,
    source: str = "chat",
    covered_s: float = 60.0,
    marks: tuple[str, ...] = (),
) -> Minute:
    return Minute(source, start_unix_s, tuple(values), tuple(histograms), covered_s, 0, marks)
