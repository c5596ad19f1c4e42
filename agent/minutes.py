"""Minute records: what one source said in one minute, small enough to be kept for months."""

from __future__ import annotations

import msgspec


class MinuteValue(msgspec.Struct, frozen=True):
    """One series over one minute. `increase`: counters only, resets handled."""

    name: str
    labels: tuple[tuple[str, str], ...]
    n: int
    mean: float
    min: float
    max: float
    last: float
    increase: float | None


class MinuteHistogram(msgspec.Struct, frozen=True):
    """What came into each bucket during the minute, not cumulative; the last bound is +inf."""

    name: str
    labels: tuple[tuple[str, str], ...]
    bounds: tuple[float, ...]
    counts: tuple[float, ...]


class Minute(msgspec.Struct, frozen=True):
    """All that one source said in the minute from `start_unix_s`."""

    source: str
    start_unix_s: int
    values: tuple[MinuteValue, ...]
    histograms: tuple[MinuteHistogram, ...]
    covered_s: float
    resets: int
    marks: tuple[str, ...]
