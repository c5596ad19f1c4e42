"""A demand that somebody declares in a file: what is known of it, taken as given.

Pure. Of each quantity the figure nearest to the peak counts, because the peak is what has to fit.
"""

from __future__ import annotations

import msgspec

from agent.model import TOKENS_MAX, UsageError

MOST = 1e9  # at once or a second; more is no load
FORM = '{"requests_per_s": {"mean": …, "peak": …}, "concurrency": {"mean": …, "p99": …, "max": …}}'


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
    p50: float | None = None

    @property
    def typical(self) -> float | None:
        """The mean, or the middle where no more is told."""
        return self.mean if self.mean is not None else self.p50


class Demand(msgspec.Struct, frozen=True):
    """As contract and agent write it; what else stands in the file is left alone."""

    window_s: float | None = None
    requests_per_s: Load = Load()
    concurrency: Load = Load()
    input_tokens: Lengths = Lengths()
    output_tokens: Lengths = Lengths()


def parse_demand(data: bytes) -> Demand:
    """Reads a demand. Raises UsageError for what is none."""
    try:
        told = msgspec.json.decode(data)
        if isinstance(told, dict):
            told = {name: one for name, one in told.items() if one is not None}
        found = msgspec.convert(told, Demand)
    except (ValueError, RecursionError) as error:  # the former is msgspec's, and bad UTF-8
        raise UsageError(f"not a demand ({error}): write {FORM}, or give a trace") from error
    highs = [found.concurrency.high, found.requests_per_s.high]
    if highs == [None, None]:
        raise UsageError(f"neither concurrency nor requests_per_s: write {FORM}")
    if not all(high is None or 0 < high <= MOST for high in highs):
        raise UsageError(f"concurrency and requests_per_s: write numbers above 0, up to {MOST:g}")
    for name in ("concurrency", "requests_per_s"):
        load: Load = getattr(found, name)
        if load.mean is not None and load.high is not None and load.mean > load.high:
            raise UsageError(
                f"{name}: its mean, {load.mean:g}, is more than its peak, {load.high:g}"
            )
    for name in ("input_tokens", "output_tokens"):
        lengths: Lengths = getattr(found, name)
        if (known := lengths.typical) is not None and not 1 <= known <= TOKENS_MAX:
            raise UsageError(f"{name}: write a number of tokens from 1 to {TOKENS_MAX:,}")
    return found
