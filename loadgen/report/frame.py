"""What a sweep looks like in a terminal while it runs: lines that fit, and the curve as it grows.

Pure: the same state, width and height always give the same lines. No line is ever wider than
asked for, and none has an escape in it; a line's style is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from agent.model import Level
from agent.sizing.curve import is_valid, load_of
from agent.words import ms, number, printable
from loadgen.level import Plan
from loadgen.moment import Moment, about, roughly

BAR_CELLS_MAX = 24
CURVE_WIDTH_MIN = 36
CURVE_CELLS_MAX = 72  # a curve as wide as a wall says no more
CURVE_ROWS = (4, 12)  # at least and at most
ROWS_KEPT = 8  # of the screen for what was said before: levels that have ended, notes


class Glyphs(NamedTuple):
    """What a terminal's encoding has."""

    bar: str  # full and empty
    braille: bool
    ended: str
    running: str
    invalid: str
    axis: tuple[str, str, str, str]  # up, corner, along, mark
    words: dict[int, str]  # what stands for a character that is not there


UNICODE = Glyphs("█░", True, "●", "○", "×", ("│", "└", "─", "┬"), {})
ASCII = Glyphs(
    "#.", False, "o", "+", "x", ("|", "+", "-", "+"),
    str.maketrans({"·": "|", "±": "+-", "–": "-", "…": "~", "µ": "u", "�": "?"}),
)  # fmt: skip


class Line(NamedTuple):
    text: str
    style: str = ""  # "bold", "dim", "red"


class Sight(msgspec.Struct, frozen=True):
    """What there is to be seen: the level that runs, and those that have ended."""

    place: str  # `[3/6] 16 streams`, and whether they are simulated: there is always room for it
    plan: Plan
    why: str = ""  # this load
    moment: Moment | None = None
    ended: tuple[Level, ...] = ()


def frame(sight: Sight, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """At most `height` lines of at most `width` characters: how it stands, and then the curve."""
    lines = [_headline(sight, width, glyphs)]
    if sight.moment is not None:
        lines += _standing(sight.moment, width, glyphs)
    if sight.why:
        lines.append(Line(_cut(sight.why, width, glyphs), "dim"))
    rows = min(CURVE_ROWS[1], height - ROWS_KEPT - len(lines))
    points = _points(sight)
    is_room = rows >= CURVE_ROWS[0] and width >= CURVE_WIDTH_MIN
    if is_room and len({point.load for point in points}) > 1:
        unit = "requests/s" if sight.plan.mode == "rate" else "streams"
        lines += [Line(text) for text in curve(points, _unit(sight), unit, width, rows, glyphs)]
    return lines[:height]


# ------------------------------------------------------------------------------------ how it stands


def _headline(sight: Sight, width: int, glyphs: Glyphs) -> Line:
    """What is tried, its phase where there is room for it, and at the right the time left."""
    moment = sight.moment
    phase = moment.phase if moment is not None else "starting"
    left = _left(moment).translate(glyphs.words) if moment is not None else ""
    room = width - len(left) - 2 if left else width
    text = _fitted([sight.place, phase], max(room, len(sight.place)), glyphs)
    if left and len(text) <= room:
        text += left.rjust(width - len(text))
    return Line(text[:width], "bold")


def _standing(moment: Moment, width: int, glyphs: Glyphs) -> list[Line]:
    cells = min(BAR_CELLS_MAX, width // 3)
    full = round(moment.share * cells)
    bar = glyphs.bar[0] * full + glyphs.bar[1] * (cells - full)
    level = [f"{bar} {moment.share:.0%}", f"{moment.in_flight:,} in flight", f"{moment.ok:,} ok"]
    if moment.left_s is not None and moment.share < 1:
        level.insert(1, f"{about(moment.left_s)} to go")
    rate = "no rate yet" if moment.rate is None else f"{number(moment.rate)} {_rate_unit(moment)}"
    so_far = [rate + _half(moment)]
    if moment.ttft_mean_ms is not None:
        so_far.append(f"TTFT mean {ms(moment.ttft_mean_ms)}")
    if moment.itl_mean_ms is not None:
        so_far.append(f"ITL mean {ms(moment.itl_mean_ms)}")
    lines = [Line(_fitted(parts, width, glyphs)) for parts in (level, so_far)]
    if moment.failed:
        kinds = sorted(moment.errors.items(), key=lambda kind: (-kind[1], kind[0]))
        told = ", ".join(f"{n:,} {kind}" for kind, n in kinds)
        text = f"{moment.failed:,} failed" + (f": {told}" if told else "")
        lines.append(Line(_cut(text, width, glyphs), "red"))
    return lines


def _half(moment: Moment) -> str:
    """`±13% (±5% is enough)`: how tight the rate is, and where that alone ends the level."""
    if moment.half is None:
        return ""
    wanted = moment.half_wanted
    return f" ±{moment.half:.0%}" + ("" if wanted is None else f" (±{wanted:.0%} is enough)")


def _rate_unit(moment: Moment) -> str:
    return "tok/s" if moment.tokens else "req/s"


def _left(moment: Moment) -> str:
    """Of the whole run, said to be an estimate; of a search, whose end nobody knows, its bound."""
    budget = moment.budget_left_s
    if moment.left_s is not None and moment.later_s is not None:
        return f"{about(min(moment.left_s + moment.later_s, budget))} left in all"
    return f"at most {roughly(max(budget, 0.0))} left in all" if budget < math.inf else ""


def _fitted(parts: Sequence[str], width: int, glyphs: Glyphs) -> str:
    """As many of the parts as there is room for, the first in any case."""
    kept = [part.translate(glyphs.words) for part in map(printable, parts)]
    between = " · ".translate(glyphs.words)
    while len(kept) > 1 and len(between.join(kept)) > width:
        kept.pop()
    return _cut(between.join(kept), width, glyphs)


def _cut(text: str, width: int, glyphs: Glyphs) -> str:
    text = printable(text).translate(glyphs.words)
    return text if len(text) <= width else text[: width - 1] + "…".translate(glyphs.words)


# --------------------------------------------------------------------------------------- the curve


class Point(NamedTuple):
    load: float
    rate: float
    mark: str  # "ended", "invalid" or "running"


def _unit(sight: Sight) -> str:
    generates = any(level.output_tokens_per_s is not None for level in sight.ended)
    return "tok/s" if generates else "req/s"


def _points(sight: Sight) -> list[Point]:
    """The levels that have ended, and the one that runs last, so that nothing lies over it."""
    found = []
    tokens = _unit(sight) == "tok/s"
    for level in sight.ended:
        load = load_of(level)
        rate = level.output_tokens_per_s if tokens else level.request_throughput
        if load and rate is not None:
            found.append(Point(load, rate, "ended" if is_valid(level) else "invalid"))
    moment = sight.moment
    if moment is not None and moment.rate is not None and sight.ended:
        found.append(Point(sight.plan.load, moment.rate, "running"))
    return found


def curve(
    points: Sequence[Point], title: str, unit: str, width: int, rows: int, glyphs: Glyphs
) -> list[str]:
    """Rate over the logarithm of the load, from 0 to the largest, in `rows` lines with its axes."""
    most = max(point.rate for point in points) or 1.0
    labels = [number(most), "0"]
    left = max(map(len, labels)) + 1
    cells = min(CURVE_CELLS_MAX, width - left - 1 - len(unit) - 1)
    up, corner, along, mark = glyphs.axis
    canvas = _Canvas(cells, rows - 3, most, [point.load for point in points], glyphs)
    canvas.draw(points)
    body = []
    for row, text in enumerate(canvas.lines()):
        label = labels[0] if row == 0 else labels[1] if row == canvas.rows - 1 else ""
        body.append(f"{label:>{left - 1}} {up}{text}".rstrip())
    marked = {canvas.column(point.load): point.load for point in sorted(points)}
    axis = "".join(mark if column in marked else along for column in range(cells))
    named = _axis_names(marked, cells)
    pad = " " * left
    legend = _legend(points, glyphs)
    return [
        f"{title:>{left - 1}}  {legend}".rstrip()[:width],
        *body,
        f"{pad}{corner}{axis}",
        f"{pad} {named} {unit}",
    ]


def _legend(points: Sequence[Point], glyphs: Glyphs) -> str:
    names = (("ended", "measured"), ("running", "now"), ("invalid", "not valid"))
    there = {point.mark for point in points}
    return "  ".join(f"{getattr(glyphs, mark)} {name}" for mark, name in names if mark in there)


def _axis_names(marked: dict[int, float], cells: int) -> str:
    """Loads under their marks; one for which there is no room is left out, never the last."""
    taken = [" "] * cells
    for column in sorted(marked, key=lambda at: (at != max(marked), at)):
        text = f"{marked[column]:g}"
        at = min(max(0, column - len(text) // 2), cells - len(text))
        around = taken[max(0, at - 1) : at + len(text) + 1]
        if at >= 0 and not "".join(around).strip():
            taken[at : at + len(text)] = text
    return "".join(taken)


class _Canvas:
    """Cells of which each has dots: 2 × 4 in braille, one where there is none."""

    def __init__(
        self, cells: int, rows: int, most: float, loads: Sequence[float], glyphs: Glyphs
    ) -> None:
        self.rows = rows
        self._cells, self._glyphs, self._most = cells, glyphs, most
        self._wide, self._high = (2, 4) if glyphs.braille else (1, 1)
        self._low = math.log(min(loads))
        self._decades = math.log(max(loads)) - self._low or 1.0
        self._dots: dict[tuple[int, int], int] = {}  # (row, column) → bits of braille
        self._marks: dict[tuple[int, int], str] = {}

    def column(self, load: float) -> int:
        return self._across(load) // self._wide

    def _across(self, load: float) -> int:
        return round((math.log(load) - self._low) / self._decades * (self._cells * self._wide - 1))

    def _down(self, rate: float) -> int:
        dots = self.rows * self._high - 1
        return dots - round(min(max(rate / self._most, 0.0), 1.0) * dots)

    def draw(self, points: Sequence[Point]) -> None:
        """A line through the means of the valid levels, and a mark for each point."""
        rates: dict[float, list[float]] = {}
        for load, rate, mark in points:
            if mark == "ended":
                rates.setdefault(load, []).append(rate)
        means = [(at, sum(rates[at]) / len(rates[at])) for at in sorted(rates)]
        knots = [(self._across(load), self._down(rate)) for load, rate in means]
        for start, end in pairwise(knots):
            self._line(start, end)
        for load, rate, mark in points:
            place = (self._down(rate) // self._high, self.column(load))
            self._marks[place] = getattr(self._glyphs, mark)

    def _line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        (x0, y0), (x1, y1) = start, end
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            self._dot(round(x), round(y))

    def _dot(self, x: int, y: int) -> None:
        bit = 1 << (x % self._wide * 3 + y % 4) if y % 4 < 3 else 64 << x % 2
        cell = (y // self._high, x // self._wide)
        self._dots[cell] = self._dots.get(cell, 0) | bit

    def lines(self) -> list[str]:
        lines = [[" "] * self._cells for _ in range(self.rows)]
        for (row, column), bits in self._dots.items():
            lines[row][column] = chr(0x2800 + bits) if self._glyphs.braille else "."
        for (row, column), mark in self._marks.items():
            lines[row][column] = mark
        return ["".join(line) for line in lines]
