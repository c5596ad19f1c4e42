"""What a window of minutes becomes: hours with their load and latency, and lengths of time."""

from __future__ import annotations

import pytest

from agent.sizing.curve import parse_slo
from agent.sizing.scene import hours, span
from agent.sizing.window import Window
from tests.agent.sizing.weeks import DAY, HOUR, MONDAY, SLO, SLOW, hour


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7 * DAY, "7 days"), (36 * HOUR, "36 hours"), (DAY, "24 hours"), (90 * 60, "90 minutes"),
     (45, "45 seconds"), (2 * DAY, "2 days"), (0, "0 seconds")],
)  # fmt: skip
def test_span(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_an_hour_tells_its_load_and_its_latency() -> None:
    (first, second), slo = [hour(0, 9, waiting=4, ttft=SLOW), hour(2, 3)], (*SLO, *parse_slo(
        "ttft:mean<1s,e2e:p95<1s,ttft:max<1s"))  # fmt: skip
    found = hours(
        Window(MONDAY, MONDAY + 3 * HOUR, servers=["chat"], record_s=HOUR).add_all([first, second]),
        slo,
    )
    assert [(one.concurrency, one.waiting) for one in found] == [(13, 4), (3, 0)]
    assert found[0].said[0] is not None
    assert (found[0].said[0].lo, found[0].said[0].hi) == (600, 1000)
    assert found[0].said[1:] == (None, None, None)
