"""Power from a counter of energy: what was used, not what was drawn when somebody looked."""

from __future__ import annotations

POWER_SPAN_NS_MIN = 100_000_000  # the counters of GPUs move every 20 to 100 ms
STILL_NS = 1_000_000_000  # a counter that stands still for this long counts nothing


class EnergyMeter:
    """One device's counter.

    `still`: it does not count. No GPU draws 0 W, but virtual ones have a counter that stays.
    """

    def __init__(self) -> None:
        self.still = False
        self._from: tuple[int, float] | None = None  # (at_ns, J) that power is reckoned from

    def power_w(self, at_ns: int, joules: float) -> float | None:
        """Mean power since the last reading; none over too short a span or across a reset."""
        before, was_still = self._from, self.still
        if before is None or joules < before[1]:
            self._from = (at_ns, joules)
            return None
        span_ns = at_ns - before[0]
        if joules == before[1]:
            self.still = was_still or span_ns >= STILL_NS
            return None
        self.still = False
        if span_ns < POWER_SPAN_NS_MIN:
            return None
        self._from = (at_ns, joules)
        return None if was_still else (joules - before[1]) / (span_ns / 1e9)
