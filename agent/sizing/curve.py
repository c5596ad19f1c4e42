"""From levels to a curve: the knee, whether it is saturated, and the load that still meets the SLO.

Only valid levels count; a level without a `measurement` (another tool's numbers) counts as valid.
Nothing is extrapolated: every load named here lies between loads that were tested.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import get_args, get_type_hints

import msgspec
import numpy as np

from agent.model import Curve, Knee, Level, ServerView, Slo, SloCapacity, Stats, UsageError
from agent.sizing import rules
from agent.sizing.rules import DEFAULTS, Evidence, Thresholds

# -------------------------------------------------------------------------------------------- slo

METRICS: tuple[str, ...] = get_args(get_type_hints(Slo)["metric"])
STATISTICS: tuple[str, ...] = get_args(get_type_hints(Slo)["statistic"])
UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}

_TARGET = re.compile(
    r"([^:<\s]+)\s*:\s*([^:<\s]+)\s*<\s*([-+]?[\d.]*(?:[eE][-+]?\d+)?)\s*([^\s<]*)"
)

# A failed request has no latency, or an infinite one: the share of failures with which a level can
# still meet a target. A p99 bears 1 % of them, a maximum none, and no target more than 5 %.
_FAILURES_MAX = {"mean": 0.05, "p50": 0.05, "p90": 0.05, "p95": 0.05, "p99": 0.01, "max": 0.0}


def share_allowed(statistic: str) -> float:
    """Of the requests, that may reach a bound on this quantile: 0.05 of `p95`, none of `max`."""
    return 0.0 if statistic == "max" else 1 - float(statistic[1:]) / 100


def parse_slo(text: str) -> list[Slo]:
    """`'ttft:p95<500ms,itl:p95<50ms'` → targets. Raises UsageError saying what to change."""
    targets = [_parse_target(part.strip()) for part in text.split(",") if part.strip()]
    if not targets:
        raise UsageError("the SLO is empty: write for example 'ttft:p95<500ms,itl:p95<50ms'")
    return targets


def _parse_target(text: str) -> Slo:
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UsageError(
            f"SLO target {text!r} is not METRIC:STATISTIC<BOUND: write for example 'ttft:p95<500ms'"
        )
    metric, statistic, number, unit = match.groups()
    _known("metric", metric, METRICS, text)
    _known("statistic", statistic, STATISTICS, text)
    if not number:
        raise UsageError(
            f"SLO target {text!r}: the bound must be a number with a unit, as in 500ms"
        )
    if not unit:
        raise UsageError(f"SLO target {text!r}: the bound needs a unit, us, ms or s")
    _known("unit", unit, tuple(UNITS_MS), text)
    try:
        bound_ms = float(number) * UNITS_MS[unit]
    except ValueError:
        raise UsageError(f"SLO target {text!r}: {number!r} is not a number") from None
    if not 0 < bound_ms < math.inf:
        raise UsageError(f"SLO target {text!r}: the bound must be above 0")
    return msgspec.convert(
        {"metric": metric, "statistic": statistic, "bound_ms": bound_ms}, type=Slo
    )


def _known(kind: str, word: str, words: tuple[str, ...], text: str) -> None:
    if word in words:
        return
    near = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.0)
    raise UsageError(
        f"SLO target {text!r}: unknown {kind} {word!r}, did you mean {near[0]!r}?"
        f" (known: {', '.join(words)})"
    )


def format_slo(slo: Iterable[Slo]) -> str:
    """The targets as `parse_slo` reads them."""
    return ",".join(f"{s.metric}:{s.statistic}<{s.bound_ms:g}ms" for s in slo)


def slo_value(level: Level, target: Slo) -> float | None:
    """The statistic a target is about, ms; infinite with too many failures; null if unknown."""
    if failed_share(level) > _FAILURES_MAX[target.statistic]:
        return math.inf
    stats: Stats = getattr(level, f"{target.metric}_ms")
    value: float | None = getattr(stats, target.statistic)
    return value


def failed_share(level: Level) -> float:
    """Failed requests over all that ended by themselves; 0 where requests were not counted."""
    if level.requests is None or not (ended := level.requests.ok + level.requests.failed):
        return 0.0
    return level.requests.failed / ended


def slo_met(level: Level, slo: Iterable[Slo]) -> bool | None:
    """Did the level meet every target? Null without a target, or if one not measured decides."""
    met = [None if (v := slo_value(level, s)) is None else v < s.bound_ms for s in slo]
    if False in met:
        return False
    return None if not met or None in met else True


# ----------------------------------------------------------------------------------------- points


class Point(msgspec.Struct, frozen=True):
    """The valid levels of one load (repeats together): means, and the envelope of the intervals."""

    load: float
    level: Level  # the one whose server and latency figures speak for the load: the longest sample
    levels: tuple[Level, ...]
    throughput: float  # output tokens/s; requests/s for a workload without output tokens
    half: float  # relative half-width of its 95 % interval
    concurrency: float | None
    rps: float | None


def is_valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid


def is_open(level: Level) -> bool:
    return level.mode == "rate" or level.concurrency is None


def load_of(level: Level) -> float | None:
    """The load in the unit of its mode: streams held, or requests/s offered."""
    return level.offered_rps if is_open(level) else level.concurrency


def of_mode(levels: Iterable[Level]) -> list[Level]:
    """The levels of the mode that most of the valid ones have (of all, where none is valid); the
    closed loop wins a tie."""
    levels = [level for level in levels if load_of(level) is not None]
    counted = list(filter(is_valid, levels)) or levels
    is_rate = 2 * sum(map(is_open, counted)) > len(counted)
    return [level for level in levels if is_open(level) == is_rate]


def points(levels: Iterable[Level], t: Thresholds = DEFAULTS) -> list[Point]:
    """The curve's points by rising load, from valid levels of one mode with a throughput."""
    usable = [level for level in of_mode(filter(is_valid, levels)) if _rate(level) is not None]
    tokens = all(level.output_tokens_per_s for level in usable)
    by_load: dict[float, list[Level]] = defaultdict(list)
    for level in usable:
        by_load[float(load_of(level) or 0)].append(level)
    return [_point(load, by_load[load], tokens, t) for load in sorted(by_load)]


def _rate(level: Level) -> float | None:
    return level.output_tokens_per_s or level.request_throughput


def _point(load: float, levels: list[Level], tokens: bool, t: Thresholds) -> Point:
    # Sorted by content, so that the order in which the levels came cannot matter.
    levels = sorted(levels, key=lambda lv: (-sample_size(lv), repr(lv)))
    rates = [(lv.output_tokens_per_s if tokens else lv.request_throughput) or 0 for lv in levels]
    mean = float(np.mean(rates))
    spread = max(abs(rate - mean) for rate in rates) / mean if mean > 0 else 0.0
    half = max(spread, *(_half(level, tokens, t) for level in levels))
    return Point(
        load=load,
        level=levels[0],
        levels=tuple(levels),
        throughput=mean,
        half=half,
        concurrency=_mean(map(in_flight, levels)),
        rps=_mean(level.request_throughput for level in levels),
    )


def sample_size(level: Level) -> int:
    """Completed requests that the level's figures rest on; 0 where they were not counted."""
    return level.requests.ok if level.requests else level.e2e_ms.n


def _half(level: Level, tokens: bool, t: Thresholds) -> float:
    rate, interval = (
        (level.output_tokens_per_s, level.output_tokens_per_s_ci95)
        if tokens
        else (level.request_throughput, level.request_throughput_ci95)
    )
    if interval is None or not rate:
        return t.assumed_error
    return max(0.0, interval[1] - interval[0]) / 2 / rate


def in_flight(level: Level) -> float | None:
    """Requests in flight: what was held, what was counted, or throughput · E2E (Little)."""
    if not is_open(level):
        return float(level.concurrency or 0)
    if level.measurement is not None and level.measurement.in_flight_mean is not None:
        return level.measurement.in_flight_mean
    if level.request_throughput is None or level.e2e_ms.mean is None:
        return None
    return level.request_throughput * level.e2e_ms.mean / 1000


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def interpolate(
    curve: Sequence[Point],
    at: float | None,
    x: Callable[[Point], float | None],
    y: Callable[[Point], float | None],
) -> float | None:
    """y where x is `at`, on the line between two measured points; null outside of them.

    x need not rise (a saturated curve thrashes): its running maximum is used.
    """
    known = [(px, py) for p in curve if (px := x(p)) is not None and (py := y(p)) is not None]
    if at is None or not known:
        return None
    xs = np.maximum.accumulate([px for px, _ in known])
    if not xs[0] <= at <= xs[-1]:
        return None
    return float(np.interp(at, xs, [py for _, py in known]))


_LENGTH = re.compile(r"(?:(?:log)?normal:([\d.]+):[\d.]+|uniform:([\d.]+):([\d.]+)|([\d.]+))")


def mean_length(asked: int | str) -> float | None:
    """Mean tokens of a length as a workload writes it: 512, `normal:512:100`, `uniform:256:768`.

    Null for what tells no mean.
    """
    found = _LENGTH.fullmatch(str(asked).strip())
    try:
        known = [float(one) for one in found.groups() if one is not None] if found else []
    except ValueError:  # digits with two points
        return None
    return sum(known) / len(known) if known and sum(known) > 0 else None


def load(point: Point) -> float:
    return point.load


def concurrency(point: Point) -> float | None:
    return point.concurrency


def rps(point: Point) -> float | None:
    return point.rps


# ------------------------------------------------------------------------------------------ curve


def analyse(
    levels: Sequence[Level], slo: Sequence[Slo] = (), thresholds: Thresholds = DEFAULTS
) -> Curve:
    """Knee, saturation, SLO capacity and limit of a sweep; the order of the levels is irrelevant.

    Invalid levels change nothing but the limit, which is CLIENT_LIMITED where they hid the end.
    """
    seen = evidence(levels, thresholds)
    found = rules.limits(seen)
    curve = points(levels, thresholds)
    return Curve(
        knee=knee(curve, thresholds),
        saturated=seen.saturated,
        slo_capacity=slo_capacity(curve, slo),
        limit=found[0].code if found else None,
    )


def evidence(levels: Sequence[Level], thresholds: Thresholds = DEFAULTS) -> Evidence:
    """What the limit rules look at."""
    curve = points(levels, thresholds)
    at = knee_point(curve, thresholds)
    top = curve[-1].load if curve else 0.0
    return Evidence(
        levels=tuple(p.level for p in curve),
        loads=tuple(p.load for p in curve),
        throughputs=tuple(p.throughput for p in curve),
        saturated=saturated(curve, thresholds),
        knee_load=at.load if at else None,
        client_limited=tuple(sorted(
            value
            for level in of_mode(levels)
            if invalid_because(level) == "client" and (value := load_of(level) or 0.0) > top
        )),
        thresholds=thresholds,
    )  # fmt: skip


def invalid_because(level: Level) -> str | None:
    """Why a level does not count: foreign, client, errors, unsteady or other; null if it does.

    Read from `measurement.reasons`, each of which begins with its code; the first match here
    decides, so that somebody else's traffic is never booked to the client.
    """
    if level.measurement is None or level.measurement.valid:
        return None
    text = " ".join(level.measurement.reasons).lower()
    for cause, words in CAUSES.items():
        if any(word in text for word in words):
            return cause
    return "other"


# Words of `measurement.reasons` that tell a cause; the first cause that fits decides.
CAUSES = {
    "foreign": ("foreign",),
    "client": ("client", "send_lag", "loop_lag", "send lag", "loop lag", "achieved"),
    "errors": ("error:", "errors", "failed"),
    "unsteady": ("unsteady", "little"),
}


def knee_point(curve: Sequence[Point], t: Thresholds = DEFAULTS) -> Point | None:
    """The smallest load within 5 % of the best throughput.

    The best is what it surely reached (the low end of its interval), so that one lucky level does
    not move the knee outwards; noise excuses 5 % more at most.
    """
    if not curve:
        return None
    best = max(curve, key=lambda p: p.throughput)
    sure = best.throughput * (1 - (best.half if best.half > t.assumed_error else 0.0))
    least = max(t.knee_share_noisy * best.throughput, t.knee_share * sure)
    return next(p for p in curve if p.throughput >= least)


def knee(curve: Sequence[Point], t: Thresholds = DEFAULTS) -> Knee | None:
    """The knee as the JSON has it; null where its concurrency is not known."""
    at = knee_point(curve, t)
    if at is None or at.concurrency is None:
        return None
    return Knee(at.concurrency, at.level.output_tokens_per_s or 0.0)


def saturated(curve: Sequence[Point], t: Thresholds = DEFAULTS) -> bool:
    """Has throughput stopped growing at the highest load?

    Growth share of a step = (X₂/X₁ - 1)/(L₂/L₁ - 1): 1 is proportional growth, 0 none. Saturated
    when, from some lower level to the highest, the share is under `growth_share_max` and the upper
    end of its 95 % interval under `growth_share_upper_max`: a short or noisy step proves nothing.
    An open loop is also saturated when fewer requests finish than are offered, beyond what the
    Poisson noise of their number allows, when more wait than run, or when the measurement itself
    found the number in flight growing.
    """
    if not curve:
        return False
    top = curve[-1]
    if is_open(top.level) and _overloaded(top.level, t):
        return True
    return any(_flat(point, top, t) for point in curve[:-1] if point.load > 0)


def _flat(low: Point, high: Point, t: Thresholds) -> bool:
    if low.throughput <= 0:
        return False
    gain = high.throughput / low.throughput
    noise = gain * math.hypot(low.half, high.half)
    proportional = high.load / low.load - 1
    share, upper = (gain - 1) / proportional, (gain + noise - 1) / proportional
    return share < t.growth_share_max and upper < t.growth_share_upper_max


def _overloaded(level: Level, t: Thresholds) -> bool:
    server = level.server or ServerView()
    if (server.waiting_mean or 0.0) > max(1.0, server.running_mean or 0.0):
        return True
    reasons = level.measurement.reasons if level.measurement else []
    if any(reason.startswith("saturated") for reason in reasons):
        return True
    if not level.offered_rps or level.request_throughput is None:
        return False
    noise = 2 / math.sqrt(max(1, sample_size(level)))
    return level.request_throughput / level.offered_rps < min(t.achieved_share_min, 1 - noise)


# ----------------------------------------------------------------------------------- slo capacity


def slo_capacity(curve: Sequence[Point], slo: Sequence[Slo]) -> SloCapacity | None:
    """λ*: the most load at which every target is met, and the interval that it lies in.

    Per target: isotonic fit of the statistic over load, then the line between the last fitted
    point under the bound and the first at or above it; the least over the targets. `lo` is the last
    load at which the upper ends of the statistics' 95 % intervals stay under every bound, `hi` the
    first at which a lower end does not: loads between them were too close to call. More load makes
    no statistic better, so what held at a load held below it; where levels say otherwise, the ends
    are fitted as the statistic is. Null without an SLO, or when one of its statistics was measured
    nowhere.
    """
    if not curve or not slo:
        return None
    crossings = [_crossing(curve, target) for target in slo]
    known = [c for c in crossings if c is not None]
    if len(known) < len(crossings):
        return None
    low = _least(held for held, _, _ in known)
    star = _least(star for _, star, _ in known)
    high = min((broken for _, _, broken in known if broken is not None), default=None)
    opened = is_open(curve[0].level)
    return SloCapacity(
        concurrency=interpolate(curve, star, load, concurrency) if opened else star,
        rps=star if opened else interpolate(curve, star, load, rps),
        lo=low,
        hi=high,
        bracketed=low is not None and high is not None,
    )


def _least(values: Iterable[float | None]) -> float | None:
    """The least, and null where one of them is not known."""
    known = list(values)
    return None if None in known else min(value for value in known if value is not None)


_Crossing = tuple[float | None, float | None, float | None]  # last surely met, λ*, first broken


def _crossing(curve: Sequence[Point], target: Slo) -> _Crossing | None:
    known = [(p, ends) for p in curve if (ends := _ends(p, target)) is not None]
    if not known:
        return None
    loads = [p.load for p, _ in known]
    weights = [_weight(p, target) for p, _ in known]
    columns = list(zip(*(ends for _, ends in known), strict=True))
    fitted = [isotonic(column, weights) for column in columns]
    held, broken = _sure(loads, columns[0], columns[2], target)
    if held is not None and broken is not None and held >= broken:
        held, broken = _sure(loads, fitted[0], fitted[2], target)
    return held, _star(loads, fitted[1], target), broken


def _sure(
    loads: Sequence[float], low: Sequence[float], high: Sequence[float], target: Slo
) -> tuple[float | None, float | None]:
    """The last load that surely met the target, and the first that surely did not."""
    held = [at for at, end in zip(loads, high, strict=True) if end < target.bound_ms]
    broken = [at for at, end in zip(loads, low, strict=True) if end >= target.bound_ms]
    return held[-1] if held else None, broken[0] if broken else None


def _star(loads: Sequence[float], fitted: Sequence[float], target: Slo) -> float | None:
    """Where the fitted statistic crosses the bound: null if nowhere under it, else a tested end."""
    met = [i for i, value in enumerate(fitted) if value < target.bound_ms]
    if not met:
        return None
    last = met[-1]
    if last + 1 == len(fitted):
        return loads[last]
    step = fitted[last + 1] - fitted[last]
    share = (target.bound_ms - fitted[last]) / step if math.isfinite(step) else 0.0
    return min(loads[last] + share * (loads[last + 1] - loads[last]), loads[last + 1])


Ends = tuple[float, float, float]  # lower end of the 95 % interval, value, upper end


def slo_interval(level: Level, target: Slo) -> Ends | None:
    """The statistic a target is about with its 95 % interval, ms; null where it is not known.

    Of a quantile, the sample's own quantiles at q ± 1.96·√(q(1-q)/n), which needs no distribution
    (Conover, Practical Nonparametric Statistics, 3.2), read off the line between those that were
    kept. n are requests, also for the ITL: gaps of one reply are not independent. A tail that so
    few requests cannot have shown is the median's distance to the largest value carried on.

    Long gaps are other requests' prompts, which all streams wait for: what varies is how many of
    those there were, not which replies met them. So their share, 1 - q, deviates by no more than
    (1-q)·√(4/n), which is a count of n prompts' that come up to four at a time.
    """
    value = slo_value(level, target)
    if value is None or not math.isfinite(value):
        return None if value is None else (value, value, value)
    stats: Stats = getattr(level, f"{target.metric}_ms")
    n = min(stats.n, level.e2e_ms.n or stats.n)
    if n == 0 or target.statistic == "max":
        return value, value, value
    if target.statistic == "mean":
        half = 1.96 * (stats.std or 0.0) / math.sqrt(n)
        return max(0.0, value - half), value, value + half
    q = float(target.statistic[1:]) / 100
    half = 1.96 * math.sqrt(q * (1 - q) / n)
    if target.metric == "itl":
        half = min(half, 1.96 * (1 - q) * math.sqrt(4 / n))
    low, high = _quantile(stats, q - half), _quantile(stats, q + half)
    if stats.max is not None and stats.p50 is not None and q + half > 1:
        high = stats.max + (stats.max - stats.p50) * (q + half - 1) / (1 - q)
    if q - half < 0.5:  # nothing is kept of the lower half: taken to mirror the upper one
        low = max(0.0, 2 * _quantile(stats, 0.5) - _quantile(stats, min(1.0, 1 - q + half)))
    return min(low, value), value, max(high, value)


_KEPT = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))


def _quantile(stats: Stats, q: float) -> float:
    known = [(at, value) for name, at in _KEPT if (value := getattr(stats, name)) is not None]
    return float(np.interp(q, [at for at, _ in known], [value for _, value in known]))


def _ends(point: Point, target: Slo) -> Ends | None:
    """Mean over the repeats of a load; their own spread counts where it is more than theirs."""
    known = [ends for level in point.levels if (ends := slo_interval(level, target)) is not None]
    if not known:
        return None
    values = [value for _, value, _ in known]
    mean = float(np.mean(values))
    if not math.isfinite(mean):
        return min(low for low, _, _ in known), mean, mean
    below = math.sqrt(sum((value - low) ** 2 for low, value, _ in known)) / len(known)
    above = math.sqrt(sum((high - value) ** 2 for _, value, high in known)) / len(known)
    return (
        mean - max(below, mean - min(values)),
        mean,
        mean + max(above, max(values) - mean),
    )


def surely_keeps(point: Point, slo: Iterable[Slo]) -> bool:
    """Whether the whole interval of each target's statistic lies below its bound."""
    ends = [(target, _ends(point, target)) for target in slo]
    return all(one is not None and one[2] < target.bound_ms for target, one in ends)


def _weight(point: Point, target: Slo) -> float:
    return max(1.0, float(sum(getattr(lv, f"{target.metric}_ms").n for lv in point.levels)))


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest in weighted least squares: pool adjacent violators.

    Ayer et al., Annals of Mathematical Statistics 26 (1955). Infinite values stay infinite.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [mean for mean, _, length in blocks for _ in range(length)]
