"""The scenarios' own truth, and a few of them judged; all of them are judged by `make bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.sizing.curve import parse_slo
from tests.bench.scenarios import (
    H100,
    L4,
    SCENARIOS,
    SLO,
    Box,
    Traffic,
    came,
    hours,
    judged,
    matrix,
    minutes_of,
    played,
    right,
    truth,
)

DAY = Traffic(0.1, days=0.5, shape="flat")


def test_there_are_enough_and_each_has_its_name() -> None:
    assert len(SCENARIOS) >= 40
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)


def test_the_truth_is_of_the_engine() -> None:
    assert not truth(L4, DAY, SLO).now.breaks
    slow = truth(Box(slower=2.0), DAY, SLO)
    assert slow.now.pooled
    assert slow.now.broken == slow.now.counted
    assert not truth(L4, DAY, SLO).smaller  # twice as long a token as the SLO allows
    assert truth(H100, DAY, SLO).smaller_safe


def test_minutes_add_up_to_what_was_served() -> None:
    (part,) = played(L4, DAY)
    minutes = minutes_of(part, "chat", DAY)
    done = part.record.finished_s < DAY.days * 86400
    totals = {
        name: sum(v.increase or 0 for one in minutes for v in one.values if v.name == name)
        for name in ("requests_received_total", "requests_finished_total", "e2e_seconds_sum")
    }
    assert totals["requests_received_total"] == len(came(DAY))
    assert totals["requests_finished_total"] == done.sum()
    assert totals["e2e_seconds_sum"] == pytest.approx(part.done.e2e_s[done].sum())
    counts = sum(
        sum(table.counts) for one in minutes for table in one.histograms if "ttft" in table.name
    )
    assert counts == pytest.approx(len(came(DAY)), abs=20)
    in_flight = sum(one.values[0].mean + one.values[1].mean for one in minutes) * 60
    assert in_flight == pytest.approx(part.done.e2e_s.sum(), rel=0.03)
    assert hours([part], parse_slo(SLO)).counted == 12


@pytest.mark.parametrize("name", ["nobody asks, no sweep", "twenty minutes"])
def test_a_scenario(name: str, tmp_path: Path) -> None:
    one = next(one for one in SCENARIOS if one.name == name)
    found = judged(one, tmp_path)
    assert found.is_right, found.verdict.summary
    assert not found.is_dangerous
    assert found.right == right(one, truth(one.box, one.traffic, one.slo))
    assert matrix([found])[-1].startswith(f"| {found.right[0]} | 1 |")
