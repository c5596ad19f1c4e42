"""Wall-clock stamps for readings of the monotonic clock, and the moments the wall clock jumped.

Readings carry time.monotonic_ns(), which never jumps; what is kept is stamped by the wall clock, as
every other system on the machine stamps. So a wall clock that is set shows as a step in their
difference. A clock set back lets the same hour happen twice: the store keeps both passes
(`agent.history`), and the step is a mark beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

JUMP_S = 1.0  # smaller steps are corrected in silence; NTP steps from 0.128 s, and rarely
# Between two looks at two clocks the scheduler may come: an instant that is stamped twice (in the
# store and in an export) has to be the same instant.
NOISE_S = 0.01


class Timeline:
    """The difference of two clocks, looked at again and again."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        self.offset_ns = wall_ns() - monotonic_ns()
        self._steady_since_ns = monotonic_ns()

    def jumped_s(self) -> float | None:
        """Follows the wall clock; how far it was set since the last look, None where it was not.

        Above 0: set forward, or the machine slept.
        """
        offset_ns = self._wall_ns() - self._monotonic_ns()
        step_s = (offset_ns - self.offset_ns) / 1e9
        if abs(step_s) < NOISE_S:
            return None
        self.offset_ns = offset_ns
        if abs(step_s) < JUMP_S:
            return None
        self._steady_since_ns = self._monotonic_ns()
        return step_s

    def now_s(self) -> float:
        return self._wall_ns() / 1e9

    def unix_s(self, at_ns: int) -> float:
        """A monotonic instant by the wall clock as it stood at the last look."""
        return (at_ns + self.offset_ns) / 1e9

    def steady_s(self) -> float:
        """How long the wall clock was not set, since it was first looked at."""
        return (self._monotonic_ns() - self._steady_since_ns) / 1e9
