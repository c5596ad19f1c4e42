"""The truth behind the verdicts on recorded requests; all of them are judged by `make bench`."""

from __future__ import annotations

import numpy as np
import pytest

from agent.sizing.arrivals import Arrivals, recorded
from agent.sizing.curve import parse_slo
from tests.bench.demands import ENGINES, Judged, _asked, faster, missed, most

BOX, SLO = ENGINES["L4"], parse_slo("ttft:p95<500ms")


def even(rate: float, n: int = 300) -> Arrivals:
    return recorded(np.arange(n) / rate, np.full(n, 500), np.full(n, 50))


def test_the_most_that_is_held_is_where_the_slo_breaks() -> None:
    held = most(BOX.spec, even(1.0), SLO)
    assert held is not None
    assert missed(BOX.spec, even(0.95 * held), SLO) <= 1 < missed(BOX.spec, even(1.1 * held), SLO)
    assert most(BOX.spec, even(1.0), parse_slo("ttft:p95<1ms")) is None


def test_faster_requests_are_the_same_ones_in_less_time() -> None:
    twice = faster(even(1.0), 2.0)
    assert twice.mean_rps == pytest.approx(2 * even(1.0).mean_rps)
    assert (twice.prompt_tokens == 500).all()


def test_the_command_reads_the_very_requests() -> None:
    given = even(7.0)
    asked = _asked(given)
    assert asked.arrivals is not None
    assert asked.arrivals.at_s == pytest.approx(given.at_s, abs=1e-9)
    assert asked.demand.input_tokens.mean == 500


@pytest.mark.parametrize(
    ("finding", "times", "is_wrong"),
    [
        ("RIGHT_SIZED", 1.1, True),
        ("RIGHT_SIZED", 0.9, False),
        ("UNDER_SIZED", 0.9, True),
        ("UNDER_SIZED", 1.1, False),
        ("BORDERLINE", 1.1, False),
        ("INSUFFICIENT_DATA", 0.9, False),
    ],
)
def test_wrong_is_what_breaks_a_service_or_buys_for_nothing(
    finding: str, times: float, is_wrong: bool
) -> None:
    one = Judged("L4", "chat", "", 1.0, "its lengths", True, times, finding, "")
    assert one.is_wrong == is_wrong
