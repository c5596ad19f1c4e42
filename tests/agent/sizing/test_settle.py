"""What may be said after what was said before: findings do not flap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Confidence, Ratio, Verdict
from agent.sizing.scene import Needs
from agent.sizing.settle import Past, settled
from tests.agent.sizing.weeks import DAY, HOUR


def said(finding: str, ratio: float | None = None) -> Verdict:
    return Verdict(
        finding, "So.", Confidence("low", ""), ratio=Ratio(ratio) if ratio is not None else None
    )


def past(*rows: tuple[float, str, str]) -> list[Past]:
    """(days ago, finding, found)"""
    return [Past(100 * DAY - ago * DAY, finding, found) for ago, finding, found in rows]


RIGHT, UNDER, OVER = "RIGHT_SIZED", "UNDER_SIZED", "OVER_SIZED"


@pytest.mark.parametrize(
    ("found", "before", "finding"),
    [
        (said(UNDER), [], UNDER),
        (said(UNDER), past((0.1, RIGHT, RIGHT)), RIGHT),
        (said(UNDER), past((0.1, RIGHT, UNDER), (0.2, RIGHT, RIGHT)), UNDER),
        (said(UNDER), past((0.1, UNDER, UNDER)), UNDER),
        (said(UNDER), past((0.1, "INSUFFICIENT_DATA", "INSUFFICIENT_DATA")), UNDER),
        (said("BORDERLINE", 1.0), past((0.1, UNDER, UNDER)), UNDER),
        (said(RIGHT, 0.97), past((0.1, UNDER, UNDER)), UNDER),
        (said(RIGHT, 0.9), past((0.1, UNDER, UNDER)), RIGHT),
        (said("BORDERLINE", 1.0), past((0.1, RIGHT, RIGHT)), "BORDERLINE"),
        (said(OVER), [], RIGHT),
        (said(OVER), past((1, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, RIGHT, OVER), (2, RIGHT, OVER)), OVER),
        (said(OVER), past((0.1, RIGHT, OVER), (0.2, RIGHT, OVER), (0.3, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, RIGHT, OVER), (1.5, RIGHT, RIGHT), (2, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, "OVER_OFF_PEAK", OVER)), "OVER_OFF_PEAK"),
        (said(OVER), past((0.1, OVER, OVER)), OVER),
        (said("IDLE"), past((0.1, UNDER, UNDER)), "IDLE"),
    ],
)
def test_findings_do_not_flap(found: Verdict, before: list[Past], finding: str) -> None:
    verdict = settled(found, before, Needs(), 100 * DAY)
    assert verdict.finding == finding
    assert verdict.found == (found.finding if finding != found.finding else None)
    assert verdict.summary.endswith("So.")


@given(st.lists(st.sampled_from([RIGHT, UNDER, OVER, "BORDERLINE", "IDLE"]), max_size=30))
def test_over_sized_is_never_said_before_its_days(found: list[str]) -> None:
    """Judged each hour of one day, whatever each window finds."""
    before: list[Past] = []
    for at, finding in enumerate(found[:24]):
        verdict = settled(said(finding, 1.0), before, Needs(), at * HOUR)
        assert verdict.finding != OVER
        before.insert(0, Past(at * HOUR, verdict.finding, verdict.found or verdict.finding))
