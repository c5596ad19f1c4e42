"""What a finished run means to a script: its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.model import Level, Sweep

if TYPE_CHECKING:
    from loadgen.compare import Comparison

MISSED_SLO_FINDINGS = ("UNDER_SIZED", "INFEASIBLE_SLO")


def exit_code(sweep: Sweep, fail_on: tuple[str, ...] = (), *, single: bool = False) -> int:
    """0 done · 1 the SLO or the gate was missed · 3 a level is invalid · 130 interrupted.

    A sweep is meant to go beyond the SLO: without `--fail-on slo` it misses it only where no level
    met it, or where the verdict says that the expected load does not fit. One load point (`single`)
    misses it where its level does. An invalid level can miss nothing.
    """
    if sweep.run.interrupted:
        return 130
    valid = [level for level in sweep.levels if _valid(level)]
    all_valid = len(valid) == len(sweep.levels) > 0
    missed = [level for level in valid if level.slo_met is False]
    finding = sweep.verdict.finding if sweep.verdict else ""
    gate = (
        ("slo" in fail_on and missed)
        or ("invalid" in fail_on and not all_valid)
        or finding in fail_on
    )
    if gate:
        return 1
    if not all_valid:
        return 3
    met = any(level.slo_met for level in valid)
    return 1 if (missed and (single or not met)) or finding in MISSED_SLO_FINDINGS else 0


def comparison_exit_code(comparison: Comparison) -> int:
    """0 done · 1 the gate was missed · 3 a level is invalid, or a rule could not be decided."""
    if any(outcome.missed for outcome in comparison.gate):
        return 1
    undecided = any(outcome.missed is None for outcome in comparison.gate)
    return 3 if undecided or any(pair.invalid for pair in comparison.pairs) else 0


def _valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid
