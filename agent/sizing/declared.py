"""A demand that somebody declares in a file: what is known of it, taken as given.

Pure. Of each quantity the figure nearest to the peak counts, because the peak is what has to fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import msgspec

from agent.model import UsageError

FORM = '{"requests_per_s": {"mean": …, "peak": …}, "concurrency": {"mean": …, "p99": …, "max": …}}'
TRACE = "a trace, a line of {timestamp (ms), input_length, output_length} for each request"
PEAK_S = 60.0  # the busiest of which has to fit


class Load(msgspec.Struct, frozen=True):
    mean: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None
    peak: float | None = None

    @property
    def high(self) -> float | None:
        known = (self.p99, self.max, self.peak, self.p95, self.mean)
        return next((one for one in known if one is not None), None)


class Lengths(msgspec.Struct, frozen=True):
    mean: float | None = None


class Demand(msgspec.Struct, frozen=True):
    """As contract and agent write it; what else stands in the file is left alone."""

    window_s: float | None = None
    requests_per_s: Load = Load()
    concurrency: Load = Load()
    input_tokens: Lengths = Lengths()
    output_tokens: Lengths = Lengths()


class _Request(msgspec.Struct):
    """A line of a trace, as Mooncake's are; in ms and tokens."""

    timestamp: float
    input_length: int
    output_length: int


def parse_demand(data: bytes) -> Demand:
    """Reads a demand, or a trace of requests as one. Raises UsageError for what is neither."""
    if b'"timestamp"' in data.partition(b"\n")[0]:
        return _traced(data)
    try:
        found = msgspec.json.decode(data, type=Demand)
    except (ValueError, RecursionError) as error:  # the former is msgspec's, and bad UTF-8
        raise UsageError(f"not a demand ({error}): write {FORM}, or give {TRACE}") from error
    highs = [found.concurrency.high, found.requests_per_s.high]
    if highs == [None, None]:
        raise UsageError(f"neither concurrency nor requests_per_s: write {FORM}")
    if not all(high is None or (math.isfinite(high) and high > 0) for high in highs):
        raise UsageError("concurrency and requests_per_s: write finite numbers above 0")
    return found


def _traced(data: bytes) -> Demand:
    """What recorded requests ask: their mean lengths, and at most so many a second for a minute.

    The mean rate is of the gaps (n requests have n - 1), as `loadgen` takes it of a trace.
    """
    try:
        rows = msgspec.json.Decoder(_Request).decode_lines(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not a trace ({error}): give {TRACE}") from error
    at_s = sorted(row.timestamp / 1e3 for row in rows)
    if len(at_s) < 2 or not (math.isfinite(at_s[0]) and at_s[-1] - at_s[0] >= PEAK_S):
        raise UsageError(f"a trace of {len(rows)} requests in under {PEAK_S:.0f} s has no rate")
    window_s = at_s[-1] - at_s[0]
    mean = (len(at_s) - 1) / window_s
    busiest = max(bisect_left(at_s, one + PEAK_S) - index for index, one in enumerate(at_s))
    return Demand(
        window_s=window_s,
        requests_per_s=Load(mean=mean, peak=max(mean, busiest / PEAK_S)),
        input_tokens=Lengths(math.fsum(row.input_length for row in rows) / len(rows)),
        output_tokens=Lengths(math.fsum(row.output_length for row in rows) / len(rows)),
    )
