"""The truth table of the exit code."""

from __future__ import annotations

import msgspec
import pytest

from agent.model import Confidence, Level, Measurement, Run, Sweep, Target, Verdict, Workload
from loadgen.outcome import exit_code

RUN = Run("r", "2026-01-01T00:00:00Z", "loadgen sweep", 0, "0", "h")


def level(*, valid: bool | None = True, met: bool | None = None) -> Level:
    measurement = None if valid is None else Measurement(valid, [])
    return Level(concurrency=1, output_tokens_per_s=1.0, slo_met=met, measurement=measurement)


def sweep(
    *levels: Level, finding: str | None = "CAPACITY_ONLY", interrupted: bool = False
) -> Sweep:
    verdict = None if finding is None else Verdict(finding, "", Confidence("low", ""))
    run = msgspec.structs.replace(RUN, interrupted=interrupted)
    return Sweep(run, Target("u", "m"), Workload("chat", "1", "1"), [], [*levels], verdict=verdict)


MET, MISSED, INVALID = level(met=True), level(met=False), level(valid=False, met=False)
NO_SLO, FOREIGN = level(), level(valid=None)


@pytest.mark.parametrize(
    ("result", "fail_on", "single", "code"),
    [
        # without a gate
        (sweep(NO_SLO, NO_SLO), (), False, 0),
        (sweep(FOREIGN), (), False, 0),
        (sweep(MET, MISSED), (), False, 0),  # a sweep is meant to go beyond the SLO
        (sweep(MISSED, MISSED), (), False, 1),
        (sweep(MISSED), (), True, 1),
        (sweep(MET), (), True, 0),
        (sweep(MET, finding="UNDER_SIZED"), (), False, 1),
        (sweep(MISSED, finding="INFEASIBLE_SLO"), (), False, 1),
        (sweep(MET, finding="OVER_SIZED"), (), False, 0),
        (sweep(MET, finding=None), (), False, 0),
        # an invalid level can miss nothing
        (sweep(MET, INVALID), (), False, 3),
        (sweep(INVALID), (), True, 3),
        (sweep(), (), False, 3),
        # gates
        (sweep(MET, MISSED), ("slo",), False, 1),
        (sweep(MET, INVALID), ("slo",), False, 3),
        (sweep(MET, INVALID), ("invalid",), False, 1),
        (sweep(), ("invalid",), False, 1),
        (sweep(MET), ("invalid", "slo"), False, 0),
        (sweep(MET, finding="OVER_SIZED"), ("OVER_SIZED",), False, 1),
        (sweep(MET, finding="OVER_SIZED"), ("UNDER_SIZED",), False, 0),
        (sweep(MISSED, INVALID), ("slo",), False, 1),
        # an interruption comes before all
        (sweep(MISSED, interrupted=True), ("slo",), True, 130),
        (sweep(interrupted=True), (), False, 130),
    ],
)
def test_exit_code(result: Sweep, fail_on: tuple[str, ...], single: bool, code: int) -> None:
    assert exit_code(result, fail_on, single=single) == code
