"""What a curve is judged on: the levels, the demand, and what the one holds of the other.

Pure. The judge (`agent.sizing.judge`) and the sentences it speaks (`agent.sizing.sentences`) share
these nouns.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.model import Curve, Level, Slo
from agent.sizing import curve as curves
from agent.sizing.curve import Point
from agent.sizing.rules import Evidence, Thresholds

Unit = Literal["concurrency", "rps"]
UNIT_NAMES: dict[Unit, str] = {"concurrency": "concurrent requests", "rps": "requests/s"}


class Capacity(msgspec.Struct, frozen=True):
    """What the server holds, in one unit, and what that rests on.

    `lo` was measured and held, `hi` was measured and did not; null where the sweep never saw it.
    """

    unit: Unit
    value: float | None
    lo: float | None
    hi: float | None
    basis: Literal["slo", "knee", "highest level tested", "throughput"]


class Observed(msgspec.Struct, frozen=True):
    """A demand that was watched, in the units that are known of it.

    `low`: the least it surely was, which UNDER_SIZED is proven by. `words`: what each figure is,
    to stand behind it. `limits`: what confidence is held to (1 low, 2 medium), and why.
    `from_production`: the levels were seen in production too, not swept.
    """

    demand: dict[Unit, float]
    low: dict[Unit, float]
    words: dict[Unit, str] = {}
    limits: tuple[tuple[int, str], ...] = ()
    from_production: bool = False


class Case(msgspec.Struct, frozen=True):
    """Everything a verdict is made from."""

    levels: tuple[Level, ...]
    points: tuple[Point, ...]
    curve: Curve
    slo: tuple[Slo, ...]
    demand: dict[Unit, float]
    observed: Observed  # of the units that were observed, and no more declared
    evidence: Evidence
    simulated: bool
    target: str
    endpoint: str
    t: Thresholds

    @property
    def invalid(self) -> list[Level]:
        """The levels that do not count."""
        return [lv for lv in curves.of_mode(self.levels) if not curves.is_valid(lv)]

    @property
    def is_slo_unmeasured(self) -> bool:
        """Does the SLO ask for a statistic that no valid level has?"""
        return bool(self.slo) and self.curve.slo_capacity is None

    def is_declared(self, unit: Unit) -> bool:
        """Was this demand declared, rather than observed?"""
        return unit not in self.observed.demand
