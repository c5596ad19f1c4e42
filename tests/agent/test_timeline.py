"""Stamps follow the wall clock, and every setting of it is seen once."""

from __future__ import annotations

import pytest

from agent.timeline import Timeline


class Clocks:
    """Two clocks that a test turns."""

    def __init__(self) -> None:
        self.wall = 1_760_000_000 * 10**9
        self.monotonic = 5 * 10**9

    def pass_s(self, seconds: float) -> None:
        self.wall += round(seconds * 1e9)
        self.monotonic += round(seconds * 1e9)

    def timeline(self) -> Timeline:
        return Timeline(lambda: self.wall, lambda: self.monotonic)


def test_a_reading_is_stamped_by_the_wall_clock() -> None:
    clocks = Clocks()
    timeline = clocks.timeline()
    assert timeline.unix_s(clocks.monotonic - 250 * 10**6) == pytest.approx(
        1_759_999_999.75, abs=1e-6
    )


@pytest.mark.parametrize("set_by_s", [3600.0, -3600.0, 1.5, -1.5])
def test_a_clock_that_is_set_is_seen_once_and_followed(set_by_s: float) -> None:
    clocks = Clocks()
    timeline = clocks.timeline()
    clocks.pass_s(100)
    assert timeline.jumped_s() is None
    clocks.wall += round(set_by_s * 1e9)
    assert timeline.jumped_s() == pytest.approx(set_by_s)
    assert timeline.jumped_s() is None
    assert timeline.unix_s(clocks.monotonic) == pytest.approx(clocks.wall / 1e9, abs=1e-6)
    clocks.pass_s(7)
    assert timeline.steady_s() == 7


def test_slewing_is_no_jump() -> None:
    clocks = Clocks()
    timeline = clocks.timeline()
    for _ in range(1000):
        clocks.pass_s(1)
        clocks.wall += 10**8  # a tenth of a second each: far off in the end, but never in a step
        assert timeline.jumped_s() is None
    assert timeline.unix_s(clocks.monotonic) == pytest.approx(clocks.wall / 1e9, abs=1e-6)
