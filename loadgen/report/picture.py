"""The main curve as one SVG for documents: throughput against load, in the report's language.

Written by hand, because a curve is a few dozen shapes: it is exact, needs no library and opens in
whatever shows SVG. There are neither styles nor scripts in it, so that what imports a picture (a
word processor, a wiki) takes all of it. What is drawn how is the chart's rule of
`agent/web/static/charts.js`: the line goes through the valid levels, repeats of a load by their
mean; diamonds missed the SLO, hollow markers are not valid.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from agent.model import Level, Sweep, UsageError
from agent.sizing import curve as curves
from agent.words import printable
from loadgen.report.labels import engine_name, gpu_names, named, number, slo_text

# The light theme of agent/web/static/servefit.css: paper is white.
COLOURS = {
    "--card": "#ffffff", "--ink": "#14191f", "--ink-2": "#4b5662", "--line": "#dde2e7",
    "--grid": "#e9edf0", "--s1": "#1c5fb8", "--slo": "#c42020", "--knee": "#7442c8",
    "--capacity": "#157a3d", "--warn": "#8a5a00", "--warn-soft": "#fdf1d7",
    "--neutral": "#55606b", "--neutral-soft": "#eceff2",
}  # fmt: skip
BAND_OPACITY = 0x24 / 0xFF  # of --band, which is --capacity, seen through
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 936, 140, 464  # of the plot; above it there is room for the marks
MARGIN = 24
LOG_SPAN = 8.0  # loads that span this factor are read in doublings
EM = 0.66  # a letter's mean width in ems: nothing here can measure text, so it is a little too much


class Shown(NamedTuple):
    """One level in the picture."""

    level: Level
    load: float
    rate: float
    interval: tuple[float, float] | None
    valid: bool


class Mark(NamedTuple):
    """A vertical line with its name."""

    load: float
    label: str
    colour: str


class Plot(NamedTuple):
    """What is drawn, and where a load and a rate lie in the picture."""

    levels: list[Shown]
    unit: str
    open_loop: bool
    log: bool
    loads: tuple[float, float]
    top: float

    def x(self, load: float) -> float:
        lo, hi = self.loads
        share = math.log(load / lo) / math.log(hi / lo) if self.log else (load - lo) / (hi - lo)
        return LEFT + min(max(share, 0.0), 1.0) * (RIGHT - LEFT)

    def y(self, rate: float) -> float:
        return BOTTOM - rate / self.top * (BOTTOM - TOP)


def svg(sweep: Sweep) -> str:
    """The picture. Pure: the same sweep gives the same bytes.

    Raises UsageError where no level has a throughput.
    """
    plot = _plot(sweep)
    marks = list(_marks(sweep, plot))
    title = f"{sweep.target.model or 'a model'}: {plot.unit} against load"
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title desc" '
        f'font-family="{FONT}" font-size="12" fill="{COLOURS["--ink-2"]}">',
        f'<title id="title">{_safe(title)}</title>',
        f'<desc id="desc">{_safe(_described(sweep, plot, marks))}</desc>',
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" '
        f'fill="{COLOURS["--card"]}" stroke="{COLOURS["--line"]}"/>',
        *_head(sweep, plot),
        *_axes(plot),
        *_band(sweep, plot),
        *_drawn_marks(plot, marks),
        _line(sweep, plot),
        *(shape for shown in plot.levels for shape in _error_bar(plot, shown)),
        *(_marker(plot, shown) for shown in plot.levels),
        *_foot(sweep),
        "</svg>",
    )
    return "\n".join(filter(None, parts)) + "\n"


# ------------------------------------------------------------------------------- what is to be seen


def _plot(sweep: Sweep) -> Plot:
    levels = sorted(curves.of_mode(sweep.levels), key=lambda lv: curves.load_of(lv) or 0.0)
    tokens = any(level.output_tokens_per_s for level in levels)
    shown = [one for level in levels if (one := _shown(level, tokens)) is not None]
    if not shown:
        raise UsageError(f"run {sweep.run.id}: no level has a throughput, so there is no curve")
    lo, hi = shown[0].load, shown[-1].load
    log = lo > 0 and hi / lo >= LOG_SPAN
    pad = (hi - lo) * 0.05
    loads = (lo / 1.2, hi * 1.2) if log else (max(0.0, lo - pad), hi + pad)
    if lo == hi:
        loads = (0.0, 2 * hi or 1.0)
    highest = max(max((one.rate, *(one.interval or ()))) for one in shown)
    open_loop = curves.is_open(shown[0].level)
    unit = "output tokens/s" if tokens else "requests/s"
    return Plot(shown, unit, open_loop, log, loads, highest * 1.08 or 1.0)


def _shown(level: Level, tokens: bool) -> Shown | None:
    rate, interval = (
        (level.output_tokens_per_s, level.output_tokens_per_s_ci95)
        if tokens
        else (level.request_throughput, level.request_throughput_ci95)
    )
    load = curves.load_of(level)
    if rate is None or load is None:
        return None
    return Shown(level, float(load), rate, interval, curves.is_valid(level))


def _marks(sweep: Sweep, plot: Plot) -> Iterator[Mark]:
    unit = " requests/s" if plot.open_loop else ""
    knee = _knee(sweep, plot)
    if knee is not None:
        rising = "" if sweep.curve.saturated else "≥ "
        yield Mark(knee, f"knee {rising}{number(knee)}{unit}", "--knee")
    capacity = sweep.curve.slo_capacity
    if capacity is None:
        return
    at = capacity.rps if plot.open_loop else capacity.concurrency
    if at is not None:
        unsure = "not surely " if capacity.lo is None else "≥ "
        least = "" if capacity.bracketed else unsure
        yield Mark(at, f"SLO capacity {least}{number(at)}{unit}", "--capacity")


def _knee(sweep: Sweep, plot: Plot) -> float | None:
    """Knees carry a concurrency; on an axis of rates the place is the level nearest in output."""
    knee = sweep.curve.knee
    if knee is None:
        return None
    if not plot.open_loop:
        return knee.concurrency
    valid = [one for one in plot.levels if one.valid]
    wanted = knee.output_tokens_per_s
    nearest = min(valid, key=lambda one: abs(one.rate - wanted), default=None)
    return nearest.load if nearest else None


def _described(sweep: Sweep, plot: Plot, marks: list[Mark]) -> str:
    """The picture in words, for who does not see it."""
    said = [f"{_named_load(plot, one)}: {_named_rate(plot, one)}" for one in plot.levels]
    said += [mark.label for mark in marks]
    if sweep.curve.limit:
        said.append(f"limit: {named(sweep.curve.limit)}")
    return ("Simulated. " if sweep.run.simulated else "") + "; ".join(said) + "."


def _named_load(plot: Plot, one: Shown) -> str:
    unit = "offered requests/s" if plot.open_loop else "concurrency"
    return f"{unit} {number(one.load)}"


def _named_rate(plot: Plot, one: Shown) -> str:
    parts = [f"{number(one.rate)} {plot.unit}"]
    if one.interval:
        parts.append(f"95 %: {number(one.interval[0])} to {number(one.interval[1])}")
    if one.level.slo_met is not None:
        parts.append("SLO met" if one.level.slo_met else "SLO missed")
    if not one.valid:
        parts.append("not valid")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------ head and foot


def _head(sweep: Sweep, plot: Plot) -> Iterator[str]:
    right = RIGHT
    for label, tone in _pills(sweep):
        width = _wide(label, 11.5) + 16
        right -= round(width) + 8
        yield (
            f'<rect x="{right + 8}" y="22" width="{width:.0f}" height="20" rx="10" '
            f'fill="{COLOURS[f"{tone}-soft"]}"{_dashed(label, tone)}/>'
        )
        middle = right + 8 + width / 2
        yield _text(middle, 36, label, 11.5, tone, 'font-weight="600" text-anchor="middle"')
    room = right - MARGIN - 8
    model = _cut(sweep.target.model or sweep.target.url, room, 17)
    yield _text(MARGIN, 38, model, 17, "--ink", 'font-weight="600"')
    axis = "offered rate" if plot.open_loop else "concurrency"
    facts = (f"{plot.unit} against {axis}", gpu_names(sweep), engine_name(sweep), _lengths(sweep))
    under = " · ".join(filter(None, facts))
    yield _text(MARGIN, 60, _cut(under, RIGHT - MARGIN, 12.5), 12.5, "--ink-2")
    yield from _legend(plot, sweep)


def _pills(sweep: Sweep) -> Iterator[tuple[str, str]]:
    if sweep.run.simulated:
        yield "simulated", "--warn"
    if sweep.run.interrupted:
        yield "interrupted", "--warn"
    if sweep.curve.limit:
        yield _cut(f"limit: {named(sweep.curve.limit)}", 300, 11.5), "--neutral"


def _dashed(label: str, tone: str) -> str:
    dashes = f' stroke="{COLOURS[tone]}" stroke-dasharray="3 2"'
    return dashes if label == "simulated" else ""


def _lengths(sweep: Sweep) -> str:
    load = sweep.workload
    if load.input_tokens == "" or load.output_tokens == "":
        return ""
    return f"{load.input_tokens} tokens in, {load.output_tokens} out"


def _legend(plot: Plot, sweep: Sweep) -> Iterator[str]:
    x = float(MARGIN)
    for shape, label in _legend_entries(plot, sweep):
        yield f'<g transform="translate({x:.0f} 80)">{shape}</g>'
        yield _text(x + 23, 84, label, 12, "--ink-2")
        x += 23 + _wide(label, 12) + 14


def _legend_entries(plot: Plot, sweep: Sweep) -> Iterator[tuple[str, str]]:
    """Only what occurs; each with its shape, 18 wide, around y = 0."""
    blue, red, met = COLOURS["--s1"], COLOURS["--slo"], {lv.level.slo_met for lv in plot.levels}
    yield f'<path d="M0 0H18" stroke="{blue}" stroke-width="2.25"/>', plot.unit
    if any(one.interval for one in plot.levels):
        yield f'<path d="{_bar_path(9, -4, 4, 3)}" stroke="{blue}"/>', "95 % interval"
    if True in met:
        yield f'<circle cx="9" r="4" fill="{blue}"/>', "SLO met"
    if False in met:
        yield f'<path d="{_diamond(9, 0)}" fill="{red}"/>', "SLO missed"
    if not all(one.valid for one in plot.levels):
        yield (
            f'<circle cx="9" r="3.5" fill="none" stroke="{blue}" stroke-width="1.5"/>',
            "not valid",
        )
    bracket = _bracket(sweep)
    if bracket:
        lo, hi = bracket
        known = f"below {number(hi)}" if lo is None else f"between {number(lo)} and {number(hi)}"
        green = f'fill="{COLOURS["--capacity"]}" fill-opacity="{BAND_OPACITY:.3f}"'
        yield f'<rect y="-5" width="18" height="10" {green}/>', f"SLO capacity {known}"


def _foot(sweep: Sweep) -> Iterator[str]:
    slo = slo_text(sweep)
    truth = "simulated, not measured · " if sweep.run.simulated else ""
    origin = f"{truth}servefit {sweep.run.tool_version}, run {sweep.run.id}"
    yield _text(MARGIN, 522, _cut(f"SLO: {slo}" if slo else "no SLO", 380, 11.5), 11.5, "--ink-2")
    yield _text(RIGHT, 522, _cut(origin, 510, 11.5), 11.5, "--ink-2", 'text-anchor="end"')


# -------------------------------------------------------------------------------------------- plot


def _axes(plot: Plot) -> Iterator[str]:
    for rate in _steps(0.0, plot.top, 6):
        y = plot.y(rate)
        yield f'<path d="M{LEFT} {y:.2f}H{RIGHT}" stroke="{COLOURS["--grid"]}"/>'
        right = 'text-anchor="end" class="tick y"'
        yield _text(LEFT - 8, y + 4, _tick(rate), 12, "--ink-2", right)
    for load in _load_ticks(plot):
        x = plot.x(load)
        yield f'<path d="M{x:.2f} {TOP}V{BOTTOM}" stroke="{COLOURS["--grid"]}"/>'
        middle = 'text-anchor="middle" class="tick x"'
        yield _text(x, BOTTOM + 18, _tick(load), 12, "--ink-2", middle)
    label = "offered rate, requests/s" if plot.open_loop else "concurrency, streams"
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 37, label, 12, "--ink-2", 'text-anchor="middle"')


def _tick(value: float) -> str:
    return number(value) if value.is_integer() else f"{value:g}"


def _load_ticks(plot: Plot) -> list[float]:
    lo, hi = plot.loads
    if not plot.log:
        return [t for t in _steps(lo, hi, 12) if plot.open_loop or t.is_integer()]
    doublings = [2.0**n for n in range(math.ceil(math.log2(lo)), math.floor(math.log2(hi)) + 1)]
    return doublings[:: math.ceil(len(doublings) / 16)]


def _steps(lo: float, hi: float, most: int) -> list[float]:
    """At most so many multiples of 1, 2 or 5 times a power of ten within the two."""
    raw = (hi - lo) / most
    decade = 10.0 ** math.floor(math.log10(raw))
    step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= raw * 0.9999)
    return [n * step for n in range(math.ceil(lo / step), math.floor(hi / step) + 1)]


def _bracket(sweep: Sweep) -> tuple[float | None, float] | None:
    """Where the SLO surely held and where it surely broke; None where it was never broken."""
    capacity = sweep.curve.slo_capacity
    return None if capacity is None or capacity.hi is None else (capacity.lo, capacity.hi)


def _band(sweep: Sweep, plot: Plot) -> Iterator[str]:
    bracket = _bracket(sweep)
    if bracket is None:
        return
    lo, hi = bracket
    left = LEFT if lo is None else plot.x(lo)
    yield (
        f'<rect class="band" x="{left:.2f}" y="{TOP}" width="{plot.x(hi) - left:.2f}" '
        f'height="{BOTTOM - TOP}" fill="{COLOURS["--capacity"]}" '
        f'fill-opacity="{BAND_OPACITY:.3f}"/>'
    )


def _drawn_marks(plot: Plot, marks: list[Mark]) -> Iterator[str]:
    """Their names stand in rows above the plot, where no data can be under them.

    All on the right, the leftmost on top, or all on the left, the rightmost on top: so no line
    goes through another's name.
    """
    right = all(plot.x(m.load) + 5 + _wide(m.label, 12) <= WIDTH - 8 for m in marks)
    ordered = sorted(marks, key=lambda mark: mark.load, reverse=not right)
    for row, mark in enumerate(ordered):
        x, y = plot.x(mark.load), TOP - 8 - 16 * (len(marks) - 1 - row)
        yield (
            f'<path class="mark" d="M{x:.2f} {y}V{BOTTOM}" stroke="{COLOURS[mark.colour]}" '
            'stroke-width="1.25" stroke-dasharray="2 3"/>'
        )
        left = not right and x - 5 - _wide(mark.label, 12) >= 8
        at, anchor = (x - 5, "end") if left else (x + 5, "start")
        bold = f'class="mark" font-weight="600" text-anchor="{anchor}"'
        yield _text(at, y + 3, mark.label, 12, mark.colour, bold)


def _line(sweep: Sweep, plot: Plot) -> str:
    points = curves.points(sweep.levels)
    if not points:
        return ""
    path = " ".join(f"{plot.x(p.load):.2f},{plot.y(p.throughput):.2f}" for p in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{COLOURS["--s1"]}" '
        'stroke-width="2.25" stroke-linejoin="round"/>'
    )


def _error_bar(plot: Plot, one: Shown) -> Iterator[str]:
    if one.interval:
        path = _bar_path(plot.x(one.load), plot.y(one.interval[1]), plot.y(one.interval[0]), 4)
        yield f'<path class="interval" d="{path}" stroke="{COLOURS["--s1"]}" stroke-width="1.25"/>'


def _bar_path(x: float, top: float, bottom: float, cap: float) -> str:
    left, width = f"{x - cap:.2f}", f"{2 * cap:g}"
    return f"M{x:.2f} {top:.2f}V{bottom:.2f}M{left} {top:.2f}h{width}M{left} {bottom:.2f}h{width}"


def _marker(plot: Plot, one: Shown) -> str:
    """Round: good. Diamond: the SLO was missed. Hollow: the measurement is not valid."""
    missed = one.level.slo_met is False
    colour, paper = COLOURS["--slo" if missed else "--s1"], COLOURS["--card"]
    fill, stroke = (colour, paper) if one.valid else (paper, colour)
    x, y = plot.x(one.load), plot.y(one.rate)
    shape = f'path d="{_diamond(x, y)}"' if missed else f'circle cx="{x:.2f}" cy="{y:.2f}" r="4"'
    name = shape.split(" ", 1)[0]
    told = f"{_named_load(plot, one)}: {_named_rate(plot, one)}"
    return (
        f'<{shape} class="level" fill="{fill}" stroke="{stroke}" stroke-width="1.5">'
        f"<title>{_safe(told)}</title></{name}>"
    )


def _diamond(x: float, y: float) -> str:
    r = 5.2
    return f"M{x:.2f} {y - r:.2f}l{r} {r}l-{r} {r}l-{r} -{r}z"


# -------------------------------------------------------------------------------------------- text


def _safe(text: str) -> str:
    """Text that is no markup, and of characters that XML allows."""
    return escape(printable(text))


def _text(x: float, y: float, text: str, size: float, colour: str, more: str = "") -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" fill="{COLOURS[colour]}"'
        f"{' ' if more else ''}{more}>{_safe(text)}</text>"
    )


def _wide(text: str, size: float) -> float:
    """About how wide a text is, px; letters of East Asia are a whole em."""
    return sum(size if unicodedata.east_asian_width(c) in "WF" else EM * size for c in text)


def _cut(text: str, room: float, size: float) -> str:
    """As much of a text as fits."""
    text = printable(text)
    if _wide(text, size) <= room:
        return text
    while text and _wide(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
