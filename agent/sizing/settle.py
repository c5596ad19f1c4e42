"""Which finding may be said, after those that were said before: findings must not flap.

Pure. What one window found and what is said of the service are told apart in the verdict (`found`),
so that the next window knows both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from agent.model import Verdict
from agent.sizing.scene import DAY_S, Needs


class Past(msgspec.Struct, frozen=True):
    """An earlier verdict: what was said, and what its window alone had found."""

    at_unix_s: float
    finding: str
    found: str


def settled(verdict: Verdict, past: Sequence[Past], needs: Needs, now_s: float) -> Verdict:
    """The verdict that may be said, after those `past` (newest first, of the same configuration).

    OVER_SIZED takes `over_daily` windows a day apart that found it, UNDER_SIZED two in a row where
    something else was said before, and its end a demand clearly below the capacity. Until then what
    was said stays, and `found` is what this window alone says. A shortened window's days are as
    much shorter.
    """
    before = past[0].finding if past else None
    if verdict.finding == "OVER_SIZED":
        day_s = min(DAY_S, needs.over_s / 14)
        days = _days(past, now_s, day_s)
        if before == "OVER_SIZED" or days >= needs.over_daily:
            return verdict
        stays = before if before in ("RIGHT_SIZED", "OVER_OFF_PEAK") else "RIGHT_SIZED"
        often = f"found on {days} of {needs.over_daily} days in a row so far"
        return _held_back(verdict, stays, f"It fits, and may be larger than it has to be ({often})")
    if verdict.finding == "UNDER_SIZED":
        row = 1 + sum(1 for _ in _leading(past, "UNDER_SIZED"))
        if before in (None, "UNDER_SIZED", "INSUFFICIENT_DATA") or row >= needs.under_windows:
            return verdict
        return _held_back(verdict, str(before), "This window alone says it is too small, and one"
                          " alone does not change the finding")  # fmt: skip
    close = verdict.finding == "BORDERLINE" or (
        verdict.finding in ("RIGHT_SIZED", "OVER_OFF_PEAK")
        and verdict.ratio is not None
        and verdict.ratio.value > needs.under_exit
    )
    if before == "UNDER_SIZED" and close:
        return _held_back(verdict, "UNDER_SIZED", "It was too small, and is not clear of it yet")
    return verdict


def _held_back(verdict: Verdict, finding: str, words: str) -> Verdict:
    prefix = "Simulated: " if verdict.summary.startswith("Simulated: ") else ""
    summary = f"{prefix}{words}: {verdict.summary.removeprefix(prefix)}"
    return msgspec.structs.replace(verdict, finding=finding, found=verdict.finding, summary=summary)


def _leading(past: Sequence[Past], found: str) -> list[Past]:
    """The newest ones in a row whose windows found it."""
    return list(itertools.takewhile(lambda one: one.found == found, past))


def _days(past: Sequence[Past], now_s: float, day_s: float) -> int:
    """How many verdicts in a row found OVER_SIZED, counting one a day, this one included."""
    count, last_s = 1, now_s
    for one in _leading(past, "OVER_SIZED"):
        if one.at_unix_s <= last_s - 0.9 * day_s:
            count, last_s = count + 1, one.at_unix_s
    return count
