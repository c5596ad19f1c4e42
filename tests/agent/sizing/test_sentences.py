"""What a verdict says of its numbers, and what it tells to do."""

from __future__ import annotations

import shlex

import pytest

from agent.sizing.curve import parse_slo
from tests.agent.sizing.test_judge import CLIENT, FOREIGN, OPEN, SWEEP, level, verdict


def test_without_an_slo_the_verdict_says_that_latency_was_not_judged() -> None:
    assert "Latency was not judged" in verdict(SWEEP, []).summary
    assert "Latency was not judged" in verdict(SWEEP, parse_slo("e2e:p95<9s")).summary
    assert "Latency" not in verdict(SWEEP).summary


def test_right_sized_names_the_headroom_and_what_over_sized_would_take() -> None:
    found = verdict(SWEEP, expect_concurrency=8)
    assert found.ratio is not None
    assert f"{100 * (1 - found.ratio.value):.3g} % are in hand" in found.summary
    assert any("two weekends" in line for line in found.missing)


@pytest.mark.parametrize(
    ("reason", "cure"),
    [(FOREIGN, "nobody else"), ("errors: failed_share 0.4", "log"),
     ("unsteady: littles_law_error 0.4", "--duration")],
)  # fmt: skip
def test_each_cause_has_its_cure(reason: str, cure: str) -> None:
    found = verdict([level(4, 360, 60, reason=reason)])
    assert found.recommendation is not None
    assert cure in found.recommendation.action


def test_the_client_is_named_as_the_limit() -> None:
    found = verdict([*OPEN, level(64, 9999, 1, reason=CLIENT)])
    assert found.reasons[0].code == "CLIENT_LIMITED"
    assert found.recommendation is not None
    assert "load generator" in found.recommendation.action


def test_confirm_with_is_a_command_line() -> None:
    found = verdict(SWEEP, expect_concurrency=20, target="http://localhost:8000").recommendation
    assert found is not None
    assert shlex.split(found.confirm_with or "") == [
        "loadgen", "sweep", "http://localhost:8000", "--concurrency", "16,20,24,32",
        "--slo", "ttft:p95<500ms", "--expect-concurrency", "20", "--repeats", "3",
    ]  # fmt: skip
