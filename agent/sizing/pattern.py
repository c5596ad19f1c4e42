"""The observed pattern: what a service was asked for, and how it answered, over a window.

Pure. What a minute record cannot tell: what came and went between two samples of a gauge, and when
inside a minute something happened. So the maximum of a gauge is the largest value sampled, and the
quantiles of concurrency and load are of minute means, which are smoother than the instants.
"""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime, tzinfo

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.sizing.window import COVERED_LEAST_S, Source, Window
from agent.stats import Floats, Histogram, merged, quantile, t975

QUIET_SHARE = 0.3  # of the busiest hour of the week; where shrinking off peak begins to pay
RATE_RECORD_MIN = 0.5  # of a record observed, for it to be the busiest
WEEK_S = 7 * 86400
WEEK_COVERED_MIN = 0.5
_CELLS = 168
_ZONE_STEP_S = 900  # time zones differ by quarters of an hour


class Spread(msgspec.Struct, frozen=True):
    """A quantity over the window; quantiles are of minute means, `max` is of the samples."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class Rate(msgspec.Struct, frozen=True):
    """Per second of observed time; `p95` over the minutes, `peak` the busiest of them."""

    mean: float | None = None
    p95: float | None = None
    peak: float | None = None


class Buckets(msgspec.Struct, frozen=True):
    """A histogram in JSON: `bounds` without the infinite one, so `counts` has one more."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]


class Distribution(msgspec.Struct, frozen=True):
    """A distribution that a server keeps as a histogram, with its quantiles.

    A quantile is read off a straight line inside its bucket; where it surely lies is in `ranges`
    (null: above the last bound). `mean` is exact. `histograms` has one for each set of bounds.
    """

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    n: float = 0.0
    ranges: dict[str, tuple[float, float | None]] = {}
    histograms: tuple[Buckets, ...] = ()


class Energy(msgspec.Struct, frozen=True):
    """The GPUs' energy; `busy` is of the minutes with a request in flight or a token written."""

    energy_j: float | None = None
    busy_j: float | None = None
    idle_j: float | None = None
    busy_s: float = 0.0
    idle_s: float = 0.0
    power_w: Spread = Spread()
    j_per_output_token: float | None = None  # idle time included
    j_per_output_token_busy: float | None = None
    gpus: tuple[str, ...] = ()


class Cell(msgspec.Struct, frozen=True):
    """One hour of the week; null where it was never observed."""

    mean: float | None = None  # requests in flight
    max: float | None = None
    requests_per_s: float | None = None
    covered_s: float = 0.0


class Burstiness(msgspec.Struct, frozen=True):
    """Variance over mean of the arrivals per minute: 1 for independent arrivals.

    `within_hours` takes each hour's own mean, so that day and night are no bursts.
    """

    dispersion: float | None = None
    within_hours: float | None = None
    minutes: int = 0


class Quiet(msgspec.Struct, frozen=True):
    """`idle_ratio`: share of observed time with nothing in flight. `hours`: hours of the week
    (0 is Monday 0 to 1) whose mean load is under 30 % of the busiest's."""

    idle_ratio: float | None = None
    hours: tuple[int, ...] = ()


class Growth(msgspec.Struct, frozen=True):
    """Requests/s of whole weeks, the oldest first, null where half of one was not observed.

    `per_week`: relative change by a line through their logarithms, with its 95 % interval.
    """

    requests_per_s: tuple[float | None, ...] = ()
    per_week: float | None = None
    ci95: tuple[float, float] | None = None


class Pattern(msgspec.Struct, frozen=True):
    """What was asked of a service; null is what was not known, never zero.

    `requests` are arrivals: what the server says it received, else finished + rejected + the change
    of those in flight. `completions` are those finished and not aborted. `lost`: in flight when
    a server restarted. Totals are of the whole window, gaps included where a counter went on over
    them; rates and levels are of observed time alone. `concurrency` is running and waiting.
    """

    window_s: float
    covered_s: float
    gaps_s: float
    start_unix_s: float
    end_unix_s: float
    servers: tuple[str, ...]
    requests: float | None = None
    completions: float | None = None
    aborts: float | None = None
    rejections: float | None = None
    lost: float = 0.0
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    requests_per_s: Rate = Rate()
    prompt_tokens_per_s: Rate = Rate()
    output_tokens_per_s: Rate = Rate()
    prompt_tokens_per_request: Distribution = Distribution()
    output_tokens_per_request: Distribution = Distribution()
    concurrency: Spread = Spread()
    running: Spread = Spread()
    waiting: Spread = Spread()
    kv_usage: Spread = Spread()
    prefix_hit_rate: float | None = None
    preemptions: float | None = None
    ttft_ms: Distribution = Distribution()
    itl_ms: Distribution = Distribution()
    tpot_ms: Distribution = Distribution()
    e2e_ms: Distribution = Distribution()
    queue_ms: Distribution = Distribution()
    energy: Energy = Energy()
    energy_j_per_output_token: float | None = None
    profile: tuple[Cell, ...] = ()  # 168 hours of the week from Monday 0 on, in `time_zone`
    time_zone: str = "UTC"
    burstiness: Burstiness = Burstiness()
    quiet: Quiet = Quiet()
    growth: Growth = Growth()
    resets: int = 0
    marks: dict[str, int] = {}  # in how many records of a server each stands


def pattern(window: Window, time_zone: tzinfo = UTC) -> Pattern:
    """The pattern of a window; `time_zone` is that of the hours of the week."""
    weights = window.weights_s()
    steady = np.where(window.marked("gap") > 0, 0.0, weights)
    arrivals = arrivals_per_record(window)
    profile = _profile(window, weights, steady, arrivals, time_zone)
    energy = _energy(window)
    covered_s = float(weights.sum())
    return Pattern(
        window_s=window.window_s,
        covered_s=covered_s,
        gaps_s=max(0.0, round(window.window_s - covered_s, 3)),
        start_unix_s=window.start_unix_s,
        end_unix_s=window.end_unix_s,
        servers=tuple(window.servers),
        requests=None if arrivals is None else _whole(max(0.0, float(arrivals.sum()))),
        completions=_completions(window),
        aborts=_sum(window, "requests_aborted_total"),
        rejections=_sum(window, "requests_rejected_total"),
        lost=sum(_lost(one) for one in window.servers.values()),
        prompt_tokens=_sum(window, "prompt_tokens_total"),
        output_tokens=_sum(window, "output_tokens_total"),
        requests_per_s=_rate(window, arrivals, steady),
        prompt_tokens_per_s=_rate(window, _counted(window, "prompt_tokens_total"), steady),
        output_tokens_per_s=_rate(window, _counted(window, "output_tokens_total"), steady),
        prompt_tokens_per_request=_lengths(window, "prompt"),
        output_tokens_per_request=_lengths(window, "output"),
        concurrency=_spread(window.in_flight("mean"), window.in_flight("max"), weights),
        running=_gauge(window, "requests_running", weights),
        waiting=_gauge(window, "requests_waiting", weights),
        kv_usage=_spread(window.kv_usage("mean"), window.kv_usage("max"), weights),
        prefix_hit_rate=_ratio(
            _sum(window, "prefix_cache_hits_total"), _sum(window, "prefix_cache_queries_total")
        ),
        preemptions=_sum(window, "preemptions_total"),
        ttft_ms=_distribution(window, "ttft_seconds", 1e3),
        itl_ms=_distribution(window, "itl_seconds", 1e3),
        tpot_ms=_distribution(window, "tpot_seconds", 1e3),
        e2e_ms=_distribution(window, "e2e_seconds", 1e3),
        queue_ms=_distribution(window, "queue_seconds", 1e3),
        energy=energy,
        energy_j_per_output_token=energy.j_per_output_token,
        profile=profile,
        time_zone=str(time_zone),
        burstiness=_burstiness(window, arrivals, steady),
        quiet=_quiet(window, weights, profile),
        growth=_growth(window, arrivals, steady),
        resets=int(sum(sum(one.resets[1:]) for one in window.servers.values())),
        marks=dict(Counter(
            mark
            for server in window.servers.values()
            for place, marks in sorted(server.marks.items()) if place
            for mark in sorted(marks)
        )),
    )  # fmt: skip


# -------------------------------------------------------------------------------------- arrivals


def arrivals_per_record(window: Window) -> Floats | None:
    """Requests that arrived in each record; None where no server counts its requests."""
    total: Floats = np.zeros(window.places)
    known = False
    for server in window.servers.values():
        if server.has("requests_received_total"):
            total += np.nan_to_num(server.get("requests_received_total", "increase"))
        elif server.has("requests_finished_total"):
            total += np.nan_to_num(server.get("requests_finished_total", "increase"))
            total += np.nan_to_num(server.get("requests_rejected_total", "increase"))
            total += _change_in_flight(server)
        else:
            continue
        known = True
    return total if known else None


def _in_flight_at_ends(server: Source) -> tuple[Floats, Floats]:
    """What was in flight at the end of each record, and at the end of the one before.

    Before the first record it is taken to be the least of that record: what is then in flight was
    there before, or came within a minute of being seen.
    """
    running, waiting = (server.get(f"requests_{name}", "last") for name in ("running", "waiting"))
    known = ~np.isnan(running)
    last = running + np.nan_to_num(waiting)
    if not known.any():
        nothing: Floats = np.zeros(running.size)
        return nothing, nothing
    first = int(np.flatnonzero(known)[0])
    least = server.get("requests_running", "min")[first]
    least += np.nan_to_num(server.get("requests_waiting", "min")[first])
    filled = last[np.maximum.accumulate(np.where(known, np.arange(last.size), first))]
    filled[:first] = least
    before = np.concatenate(([least], filled[:-1]))
    return filled, before


def _change_in_flight(server: Source) -> Floats:
    """A restart loses what was in flight; it is then no departure of requests that had arrived."""
    now, before = _in_flight_at_ends(server)
    change = now - np.where(np.frombuffer(server.resets) > 0, 0.0, before)
    change[0] = 0.0
    return change


def _lost(server: Source) -> float:
    _, before = _in_flight_at_ends(server)
    return float(before[1:][np.frombuffer(server.resets)[1:] > 0].sum())


def _completions(window: Window) -> float | None:
    finished = _sum(window, "requests_finished_total")
    return None if finished is None else finished - (_sum(window, "requests_aborted_total") or 0.0)


# ---------------------------------------------------------------------------------------- figures


def _counted(window: Window, name: str) -> Floats | None:
    return window.total(name) if window.has(name) else None


def _sum(window: Window, name: str) -> float | None:
    return _whole(float(window.total(name).sum())) if window.has(name) else None


def _whole(value: float) -> float:
    """Shares of whole things add up to whole things but for rounding."""
    nearest = float(round(value))
    return nearest if abs(value - nearest) <= 1e-6 * max(1.0, abs(value) / 1e3) else value


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _quantiles(values: Floats, weights: Floats, shares: tuple[float, ...]) -> list[float]:
    """The smallest values under which at least those shares of the weight lie."""
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(weights[order])
    at = np.searchsorted(passed, np.array(shares) * passed[-1] * (1 - 1e-12))
    return [float(value) for value in values[order][np.minimum(at, values.size - 1)]]


def _spread(means: Floats, highest: Floats, weights: Floats) -> Spread:
    seen = (weights > 0) & ~np.isnan(means)
    if not seen.any():
        return Spread()
    means, weights = means[seen], weights[seen]
    p50, p95, p99 = _quantiles(means, weights, (0.5, 0.95, 0.99))
    mean = float((means * weights).sum() / weights.sum())
    return Spread(mean, p50, p95, p99, float(np.nanmax(highest[seen])))


def _gauge(window: Window, name: str, weights: Floats) -> Spread:
    if not window.has(name):
        return Spread()
    return _spread(window.total(name, "mean"), window.total(name, "max"), weights)


def _rate(window: Window, counts: Floats | None, weights: Floats) -> Rate:
    if counts is None or not weights.any():
        return Rate()
    mean = max(0.0, float(counts[weights > 0].sum() / weights.sum()))
    enough = weights >= RATE_RECORD_MIN * window.record_s
    if not enough.any():
        return Rate(mean, mean, mean)
    rates = np.maximum(0.0, counts[enough] / weights[enough])
    (p95,) = _quantiles(rates, weights[enough], (0.95,))
    return Rate(mean, p95, max(mean, float(rates.max())))


def _distribution(window: Window, name: str, scale: float) -> Distribution:
    histograms = [_scaled(one, scale) for one in merged(window.histograms(name))]
    n = _sum(window, f"{name}_count")
    mean = _ratio(_sum(window, f"{name}_sum"), n)
    found = {
        label: at
        for label, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))
        if (at := quantile(histograms, q)) is not None
    }
    return Distribution(
        mean=None if mean is None else mean * scale,
        **{label: at.value for label, at in found.items()},
        n=math.fsum(one.n for one in histograms) if n is None else n,
        ranges={label: (at.lo, at.hi) for label, at in found.items()},
        histograms=tuple(Buckets(one.bounds[:-1], one.counts) for one in histograms),
    )


def _scaled(one: Histogram, scale: float) -> Histogram:
    return Histogram(tuple(bound * scale for bound in one.bounds), one.counts)


def _lengths(window: Window, what: str) -> Distribution:
    """Tokens of a request; where no histogram tells it, its mean over those that finished."""
    known = _distribution(window, f"{what}_length_tokens", 1.0)
    if known.mean is not None:
        return known
    finished = _sum(window, "requests_finished_total")
    mean = _ratio(_sum(window, f"{what}_tokens_total"), finished)
    return msgspec.structs.replace(known, mean=mean, n=known.n or finished or 0.0)


# ----------------------------------------------------------------------------------------- energy


def _energy(window: Window) -> Energy:
    """Over the records in which every GPU was observed; tokens are those of the same records."""
    parts = [_energy_j(gpu, window) for gpu in window.gpus.values()]
    if not parts:
        return Energy()
    energy: Floats = np.sum(parts, axis=0)
    covered: Floats = np.min([np.frombuffer(g.covered_s) for g in window.gpus.values()], axis=0)
    seen = (covered >= COVERED_LEAST_S) & ~np.isnan(energy)
    seen[0] = False
    if not seen.any():
        return Energy(gpus=tuple(sorted(window.gpus)))
    output = window.total("output_tokens_total")
    busy = seen & ((window.in_flight("mean") > 0) | (output > 0))
    tokens = float(output[seen].sum())
    energy_j, busy_j = float(energy[seen].sum()), float(energy[busy].sum())
    power = np.where(seen, energy / np.where(seen, covered, 1.0), np.nan)
    highest: Floats = sum(
        (np.nan_to_num(gpu.get("gpu_power_w", "max")) for gpu in window.gpus.values()),
        start=np.zeros(window.places),
    )
    return Energy(
        energy_j=energy_j,
        busy_j=busy_j,
        idle_j=energy_j - busy_j,
        busy_s=float(covered[busy].sum()),
        idle_s=float(covered[seen & ~busy].sum()),
        power_w=_spread(power, np.maximum(power, highest), np.where(seen, covered, 0.0)),
        j_per_output_token=_ratio(energy_j, tokens),
        j_per_output_token_busy=_ratio(busy_j, tokens),
        gpus=tuple(sorted(window.gpus)),
    )


def _energy_j(gpu: Source, window: Window) -> Floats:
    """The counter's increase; polled power times what was observed where there is no counter."""
    if gpu.has("gpu_energy_j"):
        return gpu.get("gpu_energy_j", "increase")
    return gpu.get("gpu_power_w", "mean") * np.frombuffer(gpu.covered_s)


# ------------------------------------------------------------------------------------ over the week


def _profile(
    window: Window, weights: Floats, steady: Floats, arrivals: Floats | None, zone: tzinfo
) -> tuple[Cell, ...]:
    cells = _hours_of_week(window.starts_unix_s, zone)
    covered = np.bincount(cells, weights, _CELLS)
    areas = np.bincount(cells, weights * window.in_flight("mean"), _CELLS)
    counted_s = np.bincount(cells, steady, _CELLS)
    counted = np.bincount(
        cells, np.where(steady > 0, 0.0 if arrivals is None else arrivals, 0.0), _CELLS
    )
    highest: Floats = np.zeros(_CELLS)
    seen = weights > 0
    np.maximum.at(highest, cells[seen], window.in_flight("max")[seen])
    return tuple(
        Cell(
            mean=float(areas[cell] / covered[cell]),
            max=float(highest[cell]),
            requests_per_s=(
                max(0.0, float(counted[cell] / counted_s[cell]))
                if arrivals is not None and counted_s[cell] > 0
                else None
            ),
            covered_s=float(covered[cell]),
        )
        if covered[cell] > 0
        else Cell()
        for cell in range(_CELLS)
    )


def _hours_of_week(unix_s: Floats, zone: tzinfo) -> NDArray[np.int_]:
    quarters, where = np.unique(np.floor(unix_s / _ZONE_STEP_S), return_inverse=True)
    local = [datetime.fromtimestamp(float(at) * _ZONE_STEP_S, zone) for at in quarters]
    return np.array([at.weekday() * 24 + at.hour for at in local], dtype=np.int_)[where]


def _burstiness(window: Window, arrivals: Floats | None, weights: Floats) -> Burstiness:
    whole = weights >= window.record_s * (1 - 1e-3)
    if arrivals is None or whole.sum() < 2:
        return Burstiness()
    counts = np.maximum(0.0, arrivals[whole])
    mean = float(counts.mean())
    if mean <= 0:
        return Burstiness(minutes=counts.size)
    _, hours = np.unique(np.floor(window.starts_unix_s[whole] / 3600), return_inverse=True)
    own = np.bincount(hours, counts) / np.bincount(hours)
    freedom = counts.size - own.size
    within = float(((counts - own[hours]) ** 2).sum() / freedom / mean) if freedom > 0 else None
    return Burstiness(float(counts.var(ddof=1)) / mean, within, counts.size)


def _quiet(window: Window, weights: Floats, profile: tuple[Cell, ...]) -> Quiet:
    total_s = float(weights.sum())
    if not total_s:
        return Quiet()
    nothing = (window.in_flight("max") == 0) & (window.total("output_tokens_total") == 0)
    busiest = max(cell.mean for cell in profile if cell.mean is not None)
    return Quiet(
        idle_ratio=float(weights[nothing].sum()) / total_s,
        hours=tuple(
            hour
            for hour, cell in enumerate(profile)
            if cell.mean is not None and cell.mean < QUIET_SHARE * busiest
        ),
    )


def _growth(window: Window, arrivals: Floats | None, weights: Floats) -> Growth:
    """Weeks are counted back from the window's end."""
    weeks = int(window.window_s // WEEK_S)
    if arrivals is None or weeks < 2:
        return Growth()
    back = np.floor((window.end_unix_s - window.starts_unix_s - 1e-6) / WEEK_S).astype(int)
    rates: list[float | None] = []
    for week in reversed(range(weeks)):
        inside = (back == week) & (weights > 0)
        observed_s = float(weights[inside].sum())
        is_known = observed_s >= WEEK_COVERED_MIN * WEEK_S
        rates.append(float(arrivals[inside].sum()) / observed_s if is_known else None)
    points = [(at, math.log(rate)) for at, rate in enumerate(rates) if rate]
    if len(points) < 2:
        return Growth(tuple(rates))
    slope, half = _line(np.array(points))
    interval = None
    if math.isfinite(half):
        interval = (math.expm1(slope - half), math.expm1(slope + half))
    return Growth(tuple(rates), math.expm1(slope), interval)


def _line(points: Floats) -> tuple[float, float]:
    """Slope of the least-squares line, and half of its 95 % interval; infinite for two points."""
    x, y = points[:, 0] - points[:, 0].mean(), points[:, 1]
    spread = float((x**2).sum())
    slope = float((x * y).sum()) / spread
    freedom = y.size - 2
    if freedom < 1:
        return slope, math.inf
    left = float(((y - y.mean() - slope * x) ** 2).sum())
    return slope, t975(freedom) * math.sqrt(left / freedom / spread)
