"""The search that finds the answer itself: which load next, and when a level has said enough.

Pure: what comes next is a function of the levels measured so far, so that a sweep taken up again
takes the decisions of an undisturbed one. Growth until the SLO breaks (without one, until
throughput stops growing), then bisection between the last load that surely held and the first that
surely broke, then repeats of the loads that decide. Only the clock may end it earlier.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from agent.model import Level, Slo, SloCapacity
from agent.sizing import curve as curves
from agent.sizing.curve import Point
from agent.stats import batch_means_ci95

GROWTH = 2.0
GROWTH_HURRIED = 4.0  # where the budget holds few levels
LEVELS_EXPECTED = 12  # of a search with room
LEVEL_SHARE_MAX = 0.1  # of the budget for one level, …
LEVEL_S_MAX = 60.0  # … and this, unless its requests take longer
LEVELS_MAX = 60
TIGHT = 1.1  # hi over lo from which on the interval is tight; adjacent whole numbers are, too
TIGHT_KNEE = 1.25  # the knee is a region of 5 % anyway
ATTEMPTS = 2  # at a load whose level was invalid
CONFIRMED = 2  # levels at each of the two loads that decide
REPEATS_MAX = 3  # levels at a load that is too close to call
SHRINK_MIN = 1 / 64  # an open loop looks for a load that holds down to this share of its first
NEARER = 1.05  # growth of a target's statistic over the last step from which on it gets nearer
FAR = 8.0  # in multiples of the knee: from there on, what does not get nearer never will
RAMP_S_MAX = 10.0

WINDOW_E2E = 5.0  # a level says enough after so many mean E2E times …
WINDOW_S_MIN = 3.0  # … and this long
HALF_MAX = 0.05  # … with a relative half-width of its tokens/s of at most this
OVERLOADED_REQUESTS = 50  # an open loop whose queue only grows has said enough after so many
GROWING = 1.5  # open loop: in flight in the last quarter over the second one, and two requests

Mode = Literal["concurrency", "rate"]


class Settings(msgspec.Struct, frozen=True):
    """What is searched, and with how much time."""

    mode: Mode
    budget_s: float
    slo: tuple[Slo, ...] = ()
    start: float = 1.0  # the first load
    most: float = math.inf
    expect: float | None = None  # the declared demand in the unit of the mode
    level_s: float | None = None  # where the user says how long a level is
    warmup_s: float = 0.0  # … and how long its warm-up, which comes before


class Step(msgspec.Struct, frozen=True):
    """The level to measure next."""

    load: float
    duration_s: float  # its limit: ramp (open loop: warm-up) and window, without the drain
    ramp_s: float
    requests_min: int  # so many make it worth stopping earlier
    why: str


class Done(msgspec.Struct, frozen=True):
    why: str


class _Try(NamedTuple):
    load: float
    why: str
    decides: bool = False  # the answer rests on it: more requests


def next_step(levels: Sequence[Level], settings: Settings, elapsed_s: float) -> Step | Done:
    """What to measure after `levels`, which took `elapsed_s` of the budget, or why no more."""
    wanted = _wanted(levels, settings)
    if isinstance(wanted, Done):
        return wanted
    if len(levels) >= LEVELS_MAX:
        return Done(f"{LEVELS_MAX} levels were measured: {answer(levels, settings)}")
    duration_s = _duration_s(levels, settings, wanted.load, settings.budget_s - elapsed_s)
    if duration_s is None:
        return Done(f"the budget of {settings.budget_s:.0f} s is spent: {answer(levels, settings)}")
    requests = _requests_min(settings.slo) * (3 if wanted.decides else 1)
    if settings.mode == "rate":
        requests = max(requests, 100)  # of Poisson arrivals: a tenth more or less by chance
    ramp_s = min(_e2e_s(levels, settings, wanted.load) or 0.0, RAMP_S_MAX)
    return Step(wanted.load, duration_s, ramp_s, requests, wanted.why)


def answer(levels: Sequence[Level], settings: Settings) -> str:
    """How tight the answer is, in words."""
    curve = _curve(levels, settings)
    if not curve:
        return "no valid level"
    found = curves.slo_capacity(curve, settings.slo)
    if found is None:
        at = curves.knee_point(curve)
        knee = f"the knee is at {_n(at.load)}" if at and curves.saturated(curve) else ""
        return knee or f"throughput still grew at {_n(curve[-1].load)}"
    if found.lo is not None and found.hi is not None:
        return f"the SLO holds at {_n(found.lo)} and breaks at {_n(found.hi)}"
    if found.lo is not None:
        return f"the SLO holds at {_n(found.lo)}, and was not broken"
    if found.hi is not None:
        return f"the SLO breaks at {_n(found.hi)}, and was nowhere surely held"
    return f"the SLO is too close to call at {_n(curve[-1].load)}"


# ------------------------------------------------------------------------------------- which load


def _wanted(levels: Sequence[Level], settings: Settings) -> _Try | Done:
    """The load that says most, whatever time is left."""
    if not levels:
        return _Try(settings.start, "the beginning")
    curve = _curve(levels, settings)
    last, load, skipped = levels[-1], _load(levels[-1]), _skipped(levels, curve)
    measured = any(point.load == load for point in curve)
    if not (curves.is_valid(last) or measured or load in skipped):
        return _Try(load, f"once more: it was invalid ({_reason(last)})")
    if not curve:
        return _grown(settings.start, levels, settings, skipped, "without a valid level yet")
    found = curves.slo_capacity(curve, settings.slo)
    if found is None:
        return _for_knee(curve, levels, settings, skipped)
    if found.hi is None:
        return _to_break(curve, levels, settings, skipped)
    tries = Counter(_load(level) for level in levels)
    return _between(curve, found, settings, skipped, tries)


def _curve(levels: Sequence[Level], settings: Settings) -> list[Point]:
    return curves.points([lv for lv in levels if lv.mode == settings.mode])


def _load(level: Level) -> float:
    return float(curves.load_of(level) or 0.0)


def _reason(level: Level) -> str:
    reasons = level.measurement.reasons if level.measurement else []
    return reasons[0] if reasons else "no reason given"


def _skipped(levels: Sequence[Level], curve: Sequence[Point]) -> list[float]:
    """Loads that were tried as often as may be and gave no valid level."""
    tries = Counter(_load(level) for level in levels if not curves.is_valid(level))
    valid = {point.load for point in curve}
    return sorted(load for load, n in tries.items() if n >= ATTEMPTS and load not in valid)


def _grown(
    top: float, levels: Sequence[Level], settings: Settings, skipped: Sequence[float], why: str
) -> _Try | Done:
    """The next higher load; past one that could not be measured, but not past two."""
    above = [load for load in skipped if load >= top]
    if len(above) >= 2:
        why = _reason(next(lv for lv in reversed(levels) if not curves.is_valid(lv)))
        return Done(f"nothing above {_n(top)} can be measured ({why}): {answer(levels, settings)}")
    base = above[0] if above else top
    if base >= settings.most:
        return Done(f"{_n(base)} is the most that is tried: {answer(levels, settings)}")
    if above:
        why = f"past {_n(base)}, which could not be measured"
    load = min(base * _growth(levels, settings), settings.most)
    return _Try(_rounded(load, settings.mode), why)


def _growth(levels: Sequence[Level], settings: Settings) -> float:
    first = next((lv.e2e_ms.mean for lv in levels if lv.e2e_ms.mean), 0.0) / 1e3
    hurried = LEVELS_EXPECTED * (WINDOW_E2E + 2) * first > settings.budget_s
    return GROWTH_HURRIED if hurried else GROWTH


def _to_break(
    curve: list[Point], levels: Sequence[Level], settings: Settings, skipped: Sequence[float]
) -> _Try | Done:
    """Growth: the SLO was not yet surely broken."""
    top = curve[-1]
    at = curves.knee_point(curve)
    far = curves.saturated(curve) and at is not None and top.load >= FAR * at.load
    if far and not _gets_nearer(curve, settings.slo):
        return Done(
            f"throughput stopped growing at {_n(top.load)} and no target of the SLO gets nearer: "
            f"{answer(levels, settings)}"
        )
    grew = _grown(top.load, levels, settings, skipped, f"the SLO is not broken at {_n(top.load)}")
    if isinstance(grew, Done) and (gap := _gap_below(curve, levels, settings, skipped)):
        return gap
    return grew


def _gap_below(
    curve: list[Point], levels: Sequence[Level], settings: Settings, skipped: Sequence[float]
) -> _Try | None:
    """Between the highest load that could be measured and the lowest above it that could not."""
    low, above = curve[-1].load, [load for load in skipped if load > curve[-1].load]
    if not above or _is_tight(low, above[0], settings.mode, GROWTH / 1.4):
        return None
    why = f"between {_n(low)} and {_n(above[0])}, which could not be measured"
    return _Try(_middle(low, above[0], settings.mode), why)


def _gets_nearer(curve: Sequence[Point], slo: Sequence[Slo]) -> bool:
    """Did any target's statistic grow over the last step of the load?"""
    if len(curve) < 2:
        return True
    for target in slo:
        before, now = (curves.slo_value(point.level, target) for point in curve[-2:])
        if before is not None and now is not None and now > NEARER * before:
            return True
    return False


def _for_knee(
    curve: list[Point], levels: Sequence[Level], settings: Settings, skipped: Sequence[float]
) -> _Try | Done:
    """Without an SLO (or one that is not measured): growth, then the knee from both sides."""
    if not curves.saturated(curve):
        return _grown(curve[-1].load, levels, settings, skipped, "throughput still grows")
    at = curves.knee_point(curve)
    below = [point.load for point in curve if at is not None and point.load < at.load]
    if at is None or not below:
        return Done(answer(levels, settings))
    bounds = [below[-1], *(load for load in skipped if below[-1] < load < at.load), at.load]
    gaps = [gap for gap in pairwise(bounds) if not _is_tight(*gap, settings.mode, TIGHT_KNEE)]
    if not gaps:
        return Done(f"throughput stopped growing: {answer(levels, settings)}")
    low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
    why = f"the knee lies between {_n(below[-1])} and {_n(at.load)}"
    return _Try(_middle(low, high, settings.mode), why)


def _between(
    curve: list[Point],
    found: SloCapacity,
    settings: Settings,
    skipped: Sequence[float],
    tries: Counter[float],
) -> _Try | Done:
    """Bisection: the SLO surely breaks at `hi`, and surely holds at `lo`, where there is one."""
    high, mode = found.hi or 0.0, settings.mode
    unsure = [p.load for p in curve if (found.lo or 0.0) < p.load < high]
    first = curve[0].load
    if found.lo is None and (lower := _lower(first, unsure, settings, skipped, tries)) is not None:
        return lower
    low = found.lo if found.lo is not None else first
    state = f"between {_n(low)} ({_held(found)}) and {_n(high)} (breaks)"
    if not _is_tight(low, high, mode, TIGHT):
        bounds = [low, *sorted(load for load in {*unsure, *skipped} if low < load < high), high]
        outer = [(bounds[0], bounds[1]), (bounds[-2], bounds[-1])]
        gaps = [gap for gap in outer if not _is_tight(*gap, mode, TIGHT)]
        if gaps:
            return _Try(_divided(gaps, settings), state, decides=True)
        again = [load for load in unsure if tries[load] < REPEATS_MAX]
        if again:
            star = (found.rps if mode == "rate" else found.concurrency) or low
            load = min(again, key=lambda at: (tries[at], abs(at - star)))
            return _Try(load, f"{state}: again, it was too close to call", decides=True)
        return Done(f"{state}, and no repeat narrows it")
    for load in (low, high):
        if tries[load] < CONFIRMED:
            return _Try(load, f"{state}: once more, to be sure", decides=True)
    return Done(f"{state}: tight")


def _held(found: SloCapacity) -> str:
    return "holds" if found.lo is not None else "too close to call"


def _lower(
    first: float,
    unsure: Sequence[float],
    settings: Settings,
    skipped: Sequence[float],
    tries: Counter[float],
) -> _Try | Done | None:
    """No load surely holds: one under the `first`, or that again; null where that is of no use.

    One stream alone is the least there is; an open loop can ask for less.
    """
    least = 1.0 if settings.mode == "concurrency" else SHRINK_MIN * settings.start
    lower = _rounded(max(least, first / GROWTH_HURRIED), settings.mode)
    if lower < first and lower not in skipped:
        return _Try(lower, f"the SLO does not surely hold at {_n(first)}")
    if unsure:
        if tries[first] < REPEATS_MAX:
            return _Try(first, f"{_n(first)} is the least, and was too close to call: again", True)
        return None
    if tries[first] < CONFIRMED:
        return _Try(first, f"the SLO breaks at {_n(first)}: once more, to be sure", True)
    return Done(f"the SLO breaks at {_n(first)}, the least that is tried")


def _divided(gaps: Sequence[tuple[float, float]], settings: Settings) -> float:
    """The declared demand where it lies in a gap, else the middle of the widest."""
    for low, high in gaps:
        wanted = settings.expect or 0.0
        wanted = float(math.ceil(wanted)) if settings.mode == "concurrency" else wanted
        if low < wanted < high:
            return wanted
    low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
    return _middle(low, high, settings.mode)


def _is_tight(low: float, high: float, mode: Mode, ratio: float) -> bool:
    return high <= ratio * low or (mode == "concurrency" and high - low <= 1)


def _middle(low: float, high: float, mode: Mode) -> float:
    """The geometric mean, strictly between the two."""
    middle = _rounded(math.sqrt(low * high), mode)
    if mode == "concurrency":
        return min(max(middle, low + 1), high - 1)
    return middle if low < middle < high else math.sqrt(low * high)


def _rounded(load: float, mode: Mode) -> float:
    """A whole number of streams, or a rate of three figures."""
    return float(math.floor(load)) if mode == "concurrency" else float(f"{load:.3g}")


def _n(load: float) -> str:
    return f"{load:,.0f}" if load >= 1000 else f"{load:.3g}"


# -------------------------------------------------------------------------------------- how long


def _duration_s(
    levels: Sequence[Level], settings: Settings, load: float, left_s: float
) -> float | None:
    """The limit of a level; null where too little is left for it to have a steady window.

    The drain, about one E2E time, lies behind the limit and inside the budget too.
    """
    share_s = min(LEVEL_SHARE_MAX * settings.budget_s, LEVEL_S_MAX)
    e2e_s = _e2e_s(levels, settings, load)
    if e2e_s is None:
        return min(settings.level_s or share_s, max(left_s, 0.1))
    ramp_s = min(e2e_s, RAMP_S_MAX)
    least_s = settings.level_s or max(WINDOW_S_MIN / 2, ramp_s + 2 * e2e_s)
    left_s -= settings.warmup_s
    if left_s < least_s + e2e_s:
        return None
    wanted_s = max(share_s, ramp_s + max(WINDOW_E2E * e2e_s, WINDOW_S_MIN))
    return settings.level_s or min(wanted_s, left_s - e2e_s)


def _e2e_s(levels: Sequence[Level], settings: Settings, load: float) -> float | None:
    """How long a request will take at `load`: as measured, above the highest load in proportion."""
    known = sorted({
        _load(lv): lv.e2e_ms.mean / 1e3
        for lv in levels
        if lv.mode == settings.mode and lv.e2e_ms.mean
    }.items())  # fmt: skip
    if not known:
        return None
    top, e2e_s = known[-1]
    if load > top:
        saturated = curves.saturated(_curve(levels, settings))
        return e2e_s * (load / top if saturated else 1.0)
    return float(np.interp(load, [at for at, _ in known], [value for _, value in known]))


def _requests_min(slo: Sequence[Slo]) -> int:
    """Requests of which a statistic is more than the worst one."""
    tails = {"p99": 100}
    return max((tails.get(target.statistic, 20) for target in slo), default=20)


# ------------------------------------------------------------------------- when a level said enough


class Sample(NamedTuple):
    """How a running level stood at an instant of its steady window."""

    at_s: float
    tokens: int  # arrived so far, those of replies still under way included
    ok: int  # requests completed so far
    in_flight: int


class Standing(NamedTuple):
    """What a running level has said so far."""

    half: float | None  # relative half-width of the 95 % interval of its tokens/s, or requests/s
    enough: bool


def standing(samples: Sequence[Sample], mode: Mode, requests_min: int) -> Standing:
    """Has a level said enough? Looked at about once a second, at a few counts.

    Closed loop: over at least five mean E2E times (by Little's law, from the counts), the tokens/s
    of the two halves agree and their 95 % interval by batch means is within ±5 %. Open loop, where
    tokens/s are what was offered: enough requests, or a queue that only grows.
    """
    if len(samples) < 5:
        return Standing(None, False)
    window_s = samples[-1].at_s - samples[0].at_s
    done = samples[-1].ok - samples[0].ok
    if window_s <= 0 or done <= 0:
        return Standing(None, False)
    e2e_s = float(np.mean([sample.in_flight for sample in samples])) * window_s / done
    half, steady = _steadiness(samples, e2e_s)
    long = window_s >= max(WINDOW_S_MIN, WINDOW_E2E * e2e_s) and done >= requests_min
    if mode == "rate":
        return Standing(half, long or (done >= OVERLOADED_REQUESTS and _grows(samples)))
    return Standing(half, long and steady and half is not None and half <= HALF_MAX)


def _steadiness(samples: Sequence[Sample], e2e_s: float) -> tuple[float | None, bool]:
    """Relative half-width by batch means, and whether the halves agree within their noise.

    4 to 20 batches, of one E2E time and two samples at least, where there is room for that.
    """
    at = np.array([sample.at_s for sample in samples])
    generates = samples[-1].tokens > 0  # else requests are what is counted
    counts = [sample.tokens if generates else sample.ok for sample in samples]
    done = np.array(counts, dtype=np.float64)
    window_s = float(at[-1] - at[0])
    batches = int(np.clip(min(window_s / max(e2e_s, 1e-3), len(samples) / 2), 4, 20))
    edges = np.linspace(at[0], at[-1], batches + 1)
    rates = np.diff(np.interp(edges, at, done)) * batches / window_s
    interval, mean = batch_means_ci95(rates), float(rates.mean())
    if interval is None or mean <= 0:
        return None, False
    first, second = rates[: batches // 2], rates[-(batches // 2) :]
    noise = math.sqrt(float(first.var(ddof=1) + second.var(ddof=1)) / (batches // 2))
    apart = abs(float(first.mean() - second.mean()))
    return (interval[1] - interval[0]) / 2 / mean, apart <= max(2 * noise, HALF_MAX * mean)


def _grows(samples: Sequence[Sample]) -> bool:
    """In flight in the last quarter clearly more than in the second, as in `level`."""
    quarter = max(1, len(samples) // 4)
    in_flight = [sample.in_flight for sample in samples]
    second = float(np.mean(in_flight[quarter : 2 * quarter]))
    return float(np.mean(in_flight[-quarter:])) > GROWING * second + 2
