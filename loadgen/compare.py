"""Two runs against each other: what changed, and whether it can be told from noise.

Pure. Levels of the same load are paired; each figure gets a standard error, the change of it a 95 %
interval and a p-value, and all p-values of a comparison are adjusted together (Holm).

Where the error of a figure comes from, the first that there is:

- repeats: the spread between the valid levels of the same load, pooled over both runs, once it has
  two degrees of freedom. It alone sees what differs from one start to the next.
- requests: a bootstrap over blocks of time of the steady window, 4 to 10 of them and if possible
  no shorter than two E2E times, because requests next to each other share batches and queues. Its
  error is taken with the blocks' degrees of freedom. What outlasts a block it does not see.
- summary: where no requests are kept (a JSON file), `output_tokens_per_s_ci95`; and for means
  std/√(n / in flight), never less than the relative error of tokens/s. Requests in flight at once
  share batches and queues, so they count as one: the design effect is as large as it can be where
  each is as long as the next. By Little's law E2E times vary at least as tokens/s do.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model import SCHEMA_VERSION, Level, Stats, Sweep, UsageError
from agent.sizing.curve import in_flight
from agent.sizing.trial import same_settings
from agent.stats import batches, holm, t975, t_two_sided
from loadgen.kept import Floats, Kept, arrivals, meets, pooled_gaps

ALPHA = 0.05
REPLICATES = 1_000
BINS = 512  # of a sample whose quantiles are resampled
BEYOND_QUANTILE = 5  # requests needed beyond a quantile; with fewer its error is not known
BLOCKS_MIN, BLOCKS_MAX = 4, 10
REPEATS_DF = 2

RATES = ("output_tokens_per_s", "total_tokens_per_s", "request_throughput", "goodput_rps")
LATENCIES = ("ttft_ms", "ttft_from_due_ms", "ttfo_ms", "itl_ms", "tpot_ms", "e2e_ms")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
KNOWN = (*RATES, *(f"{name}.{statistic}" for name in LATENCIES for statistic in STATISTICS))
SHOWN = (
    "output_tokens_per_s", "request_throughput", "goodput_rps",
    "ttft_ms.mean", "ttft_ms.p50", "ttft_ms.p95", "ttft_ms.p99",
    "itl_ms.p50", "itl_ms.p95", "itl_ms.p99", "tpot_ms.mean", "tpot_ms.p50",
    "e2e_ms.mean", "e2e_ms.p50", "e2e_ms.p95",
)  # fmt: skip

_RULE = re.compile(r"\s*([a-z0-9_.]+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%\s*")


# ------------------------------------------------------------------------------------- the nouns


@dataclass(frozen=True)
class Side:
    """A run and, where the store has them, the requests of each of its levels."""

    sweep: Sweep
    requests: Sequence[Kept] = ()  # one for each level, or none


class Rule(msgspec.Struct, frozen=True):
    """`METRIC<-X%` or `METRIC>+X%`: missed where the change goes beyond it."""

    metric: str
    sign: int  # −1: below, +1: above
    bound_percent: float

    def __str__(self) -> str:
        return f"{self.metric}{'<' if self.sign < 0 else '>'}{self.bound_percent:+g}%"

    def beyond(self, change_percent: float) -> bool:
        return self.sign * (change_percent - self.bound_percent) > 0


class Change(msgspec.Struct, frozen=True):
    """One figure of one load in both runs."""

    metric: str
    a: float | None
    b: float | None
    change_percent: float | None = None
    ci95_percent: tuple[float, float] | None = None  # of this change alone
    p: float | None = None
    p_adjusted: float | None = None
    distinguishable: bool | None = None  # null: could not be tested
    noise: str | None = None  # what its error is of: repeats, requests, summary
    note: str | None = None  # why it could not be tested


class Load(msgspec.Struct, frozen=True):
    mode: str
    load: float


class Pair(msgspec.Struct, frozen=True):
    """The levels of one load."""

    mode: str
    load: float
    repeats: tuple[int, int]  # valid levels in A and in B
    invalid: list[str]  # each invalid level and why; they are compared with nothing
    changes: list[Change] = []


class Outcome(msgspec.Struct, frozen=True):
    """One rule of the gate at one load; `missed` is null where it could not be decided."""

    rule: str
    mode: str
    load: float
    change_percent: float | None
    p_adjusted: float | None  # over the tests of the gate alone
    missed: bool | None
    note: str | None = None


class Which(msgspec.Struct, frozen=True):
    """Which run a side was."""

    run: str
    started_at: str
    model: str
    url: str
    simulated: bool


class Difference(msgspec.Struct, frozen=True):
    """What else differs between the runs, so that the change need not be what one looks for."""

    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"different {self.what}: A {self.a}, B {self.b}"


class Comparison(msgspec.Struct, frozen=True):
    """What `loadgen compare --json` writes. `warnings`: the `differences`, a line each."""

    a: Which
    b: Which
    warnings: list[str]
    pairs: list[Pair]
    only_a: list[Load]
    only_b: list[Load]
    gate: list[Outcome]
    tests: int  # p-values that were adjusted together
    differences: list[Difference] = []
    method: str = "Holm"
    alpha: float = ALPHA
    schema_version: int = SCHEMA_VERSION


# --------------------------------------------------------------------------------------- the rules


def parse_rules(text: str) -> list[Rule]:
    """`output_tokens_per_s<-5%,ttft_ms.p95>+10%`. Raises UsageError that says what to change."""
    return [_parse_rule(part) for part in text.split(",")]


def _parse_rule(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--fail-on {text!r}: write METRIC<-X% or METRIC>+X%, such as output_tokens_per_s<-5%"
        )
    metric, comparison, bound = match[1], match[2], float(match[3])
    if metric not in KNOWN:
        near = difflib.get_close_matches(metric, KNOWN, n=1, cutoff=0.0)[0]
        raise UsageError(f"--fail-on: unknown metric {metric!r}, nearest is {near!r}")
    sign = -1 if comparison == "<" else 1
    if sign * bound < 0:
        raise UsageError(
            f"--fail-on {text!r}: it would fail without any change; "
            f"the bound after {comparison} is {'negative' if sign < 0 else 'positive'}"
        )
    return Rule(metric, sign, bound)


# ---------------------------------------------------------------------------------- the comparison


def is_better(change: Change) -> bool | None:
    """Whether B is better by this figure; null where that is not told from noise."""
    if not change.distinguishable or change.change_percent is None:
        return None
    return (change.change_percent > 0) == (change.metric in RATES)


def about_tests(comparison: Comparison, better: str = "better", worse: str = "worse") -> str:
    """How far a change that was found can be relied on; `better` and `worse` as they are shown."""
    return (
        f"{comparison.tests} tests, adjusted together by {comparison.method}'s method: the chance "
        f"that any {better} or {worse} is only noise is {comparison.alpha:.0%}. "
        "Each interval is of its own change alone."
    )


def limits(comparison: Comparison) -> list[str]:
    """What the noise that changes were held against does not see."""
    noises = {change.noise for pair in comparison.pairs for change in pair.changes if change.noise}
    lines = []
    if noises - {"repeats"}:
        lines.append(
            "Noise was judged from within the runs: what differs from one start to the next is not "
            "in it. --repeats 3 in both runs brings it in."
        )
    if any("summary" in noise for noise in noises):
        lines.append(
            "A file has no requests: for its means, those in flight at once count as one request, "
            "so that only large changes are told; quantiles are not tested. Runs from the store "
            "have them."
        )
    return lines


def compare(a: Side, b: Side, rules: Sequence[Rule] = (), *, seed: int = 0) -> Comparison:
    """Compares every load that both runs measured. Raises UsageError where there is none.

    The same seed gives the same intervals.
    """
    ours, theirs = _by_load(a), _by_load(b)
    common = [load for load in ours if load in theirs]
    if not common:
        raise UsageError(
            f"no load is in both runs: A has {_loads(ours) or 'none'}, "
            f"B has {_loads(theirs) or 'none'}"
        )
    rng = np.random.default_rng(seed)
    same_slo = sorted(map(repr, a.sweep.slo)) == sorted(map(repr, b.sweep.slo))
    metrics = list(dict.fromkeys([*SHOWN, *(rule.metric for rule in rules)]))
    pairs = []
    for load in common:
        changes = []
        both = _valid(a, ours[load]), _valid(b, theirs[load])
        if all(both):
            changes = [_change(name, a, b, *both, rng) for name in metrics]
        if not same_slo:
            changes = [_without_test(change) for change in changes]
        pairs.append(
            Pair(
                mode=load[0],
                load=load[1],
                repeats=(len(both[0]), len(both[1])),
                invalid=[*_invalid("A", a, ours[load]), *_invalid("B", b, theirs[load])],
                changes=[change for change in changes if (change.a, change.b) != (None, None)],
            )
        )
    gate = _gate(rules, pairs)
    differences = differing(a.sweep, b.sweep)
    pairs, tests = _adjusted(pairs)
    return Comparison(
        a=_which(a.sweep),
        b=_which(b.sweep),
        warnings=list(map(str, differences)),
        pairs=pairs,
        only_a=[Load(*load) for load in ours if load not in theirs],
        only_b=[Load(*load) for load in theirs if load not in ours],
        gate=gate,
        tests=tests,
        differences=differences,
    )


def _loads(loads: dict[tuple[str, float], list[int]]) -> str:
    units = {"rate": "requests/s", "concurrency": "streams"}
    return ", ".join(f"{load:g} {units[mode]}" for mode, load in loads)


def _by_load(side: Side) -> dict[tuple[str, float], list[int]]:
    """Indices of the levels of each load, in the order in which they were measured."""
    found: dict[tuple[str, float], list[int]] = {}
    for index, level in enumerate(side.sweep.levels):
        load = level.offered_rps if level.mode == "rate" else level.concurrency
        if load is not None:
            found.setdefault((level.mode, float(load)), []).append(index)
    return found


def _is_valid(level: Level) -> bool:
    return level.measurement is None or level.measurement.valid


def _valid(side: Side, indices: list[int]) -> list[int]:
    return [index for index in indices if _is_valid(side.sweep.levels[index])]


def _invalid(name: str, side: Side, indices: list[int]) -> list[str]:
    levels = ((index, side.sweep.levels[index].measurement) for index in indices)
    return [
        f"{name}, level {index + 1}: {'; '.join(measurement.reasons) or 'no reason given'}"
        for index, measurement in levels
        if measurement is not None and not measurement.valid
    ]


def _which(sweep: Sweep) -> Which:
    run, target = sweep.run, sweep.target
    return Which(run.id, run.started_at, target.model, target.url, run.simulated)


def differing(a: Sweep, b: Sweep) -> list[Difference]:
    """What the servers are and how they are set first, then what was asked of them."""
    found: list[tuple[str, Any, Any]] = [
        ("origin", _origin(a), _origin(b)),
        ("model", a.target.model, b.target.model),
        ("engine", _engine(a), _engine(b)),
        ("GPUs", _gpus(a), _gpus(b)),
        *_settings(a.target.settings, b.target.settings),
        ("target", a.target.url, b.target.url),
        ("SLO", _slo(a), _slo(b)),
    ]
    workloads = msgspec.to_builtins(a.workload), msgspec.to_builtins(b.workload)
    found += [
        (f"workload {name}", value, workloads[1][name]) for name, value in workloads[0].items()
    ]
    return [Difference(what, _said(x), _said(y)) for what, x, y in found if x != y]


def _settings(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that both servers told and that are not the same, by the flag's own name.

    What only one of them told may be another dialect's, or an older version's, word for it.
    """
    for key in sorted((a.keys() & b.keys()) - {"model"}):
        if not same_settings({key: a[key]}, {key: b[key]}):
            yield f"setting {key.rpartition('.')[2].rpartition(':')[2]}", a[key], b[key]


def _said(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _origin(sweep: Sweep) -> str:
    return "simulated" if sweep.run.simulated else "measured"


def _engine(sweep: Sweep) -> str:
    return " ".join(part for part in (sweep.target.engine, sweep.target.engine_version) if part)


def _gpus(sweep: Sweep) -> str:
    return ", ".join(sorted(gpu.name for gpu in sweep.target.gpus))


def _slo(sweep: Sweep) -> str:
    texts = (f"{slo.metric}:{slo.statistic}<{slo.bound_ms:g}ms" for slo in sweep.slo)
    return ",".join(sorted(texts))


# -------------------------------------------------------------------------------------- one figure


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; `why` says what kept it from having one."""

    value: float
    error: float = math.nan
    degrees_of_freedom: float = 0
    noise: str | None = None
    why: str | None = None


def _change(
    name: str, a: Side, b: Side, in_a: list[int], in_b: list[int], rng: np.random.Generator
) -> Change:
    values_a, values_b = _values(name, a, in_a), _values(name, b, in_b)
    if not values_a or not values_b:
        value_a = float(np.mean(values_a)) if values_a else None
        value_b = float(np.mean(values_b)) if values_b else None
        return Change(name, value_a, value_b, note=f"not measured in {'B' if values_a else 'A'}")
    repeats = _from_repeats(values_a, values_b)
    one, two = repeats or (_of_run(name, a, in_a, rng), _of_run(name, b, in_b, rng))
    return _tested(name, one, two)


def _tested(name: str, a: Estimate, b: Estimate) -> Change:
    """Welch's t of the relative change, its error by the delta method."""
    if a.value <= 0:
        return Change(name, a.value, b.value, note="A is zero: there is no relative change")
    ratio = b.value / a.value
    change = 100 * (ratio - 1)
    why = a.why or b.why
    if why:
        return Change(name, a.value, b.value, change, note=why)
    part_a, part_b = ratio * a.error / a.value, b.error / a.value
    error = math.hypot(part_a, part_b)
    if not error > 0:
        return Change(name, a.value, b.value, change, note="it does not vary within either run")
    freedom = a.degrees_of_freedom
    if a.noise != "repeats":  # else one spread is both's, with its own degrees of freedom
        freedom = _welch(part_a, freedom, part_b, b.degrees_of_freedom)
    half = 100 * t975(int(freedom)) * error
    return Change(
        name, a.value, b.value, change, (change - half, change + half),
        p=t_two_sided((ratio - 1) / error, freedom),
        noise=a.noise if a.noise == b.noise else f"{a.noise} and {b.noise}",
    )  # fmt: skip


def _welch(error_a: float, freedom_a: float, error_b: float, freedom_b: float) -> float:
    """Welch–Satterthwaite degrees of freedom of a difference."""
    below = error_a**4 / max(freedom_a, 1) + error_b**4 / max(freedom_b, 1)
    return (error_a**2 + error_b**2) ** 2 / below if below > 0 else 1.0


def _values(name: str, side: Side, indices: list[int]) -> list[float]:
    found = (_figure(side.sweep.levels[index], name) for index in indices)
    return [value for value in found if value is not None]


def _figure(level: Level, name: str) -> float | None:
    group, _, statistic = name.partition(".")
    value = getattr(level, group)
    found: float | None = getattr(value, statistic) if isinstance(value, Stats) else value
    return found


def _from_repeats(a: list[float], b: list[float]) -> tuple[Estimate, Estimate] | None:
    """Both runs' means with the relative spread between repeats, one for both; None if too few."""
    freedom = len(a) + len(b) - 2
    means = float(np.mean(a)), float(np.mean(b))
    if freedom < REPEATS_DF or min(means) <= 0:
        return None
    squares = sum(
        float(((np.array(values) / mean - 1) ** 2).sum())
        for values, mean in zip((a, b), means, strict=True)
    )
    spread = math.sqrt(squares / freedom)
    one, two = (
        Estimate(mean, spread * mean / math.sqrt(len(values)), freedom, "repeats")
        for values, mean in zip((a, b), means, strict=True)
    )
    return one, two


def _of_run(name: str, side: Side, indices: list[int], rng: np.random.Generator) -> Estimate:
    """The mean over the levels of one load, with the error that each has from within itself."""
    parts = [_of_level(name, side, index, rng) for index in indices]
    value = float(np.mean([part.value for part in parts]))
    why = next((part.why for part in parts if part.why), None)
    return Estimate(
        value,
        math.sqrt(sum(part.error**2 for part in parts)) / len(parts),
        sum(part.degrees_of_freedom for part in parts),
        parts[0].noise,
        why,
    )


def _of_level(name: str, side: Side, index: int, rng: np.random.Generator) -> Estimate:
    level = side.sweep.levels[index]
    value = _figure(level, name)
    if value is None:
        return Estimate(math.nan, why="not measured in every repeat")
    requests = side.requests[index] if index < len(side.requests) else None
    if requests is None or not requests.n or level.window_start_s is None or not level.window_s:
        return _from_summary(name, level, value)
    blocks = _blocks(level, requests)
    if name in RATES:
        return _rate(name, side.sweep, level, value, blocks)
    return _latency(name, value, blocks, rng)


def _from_summary(name: str, level: Level, value: float) -> Estimate:
    """What a JSON file allows: the interval of tokens/s, and means."""
    if name == "output_tokens_per_s" and level.output_tokens_per_s_ci95 is not None:
        return Estimate(value, value * _rate_error(level), _batches(level) - 1, "summary")
    group, _, statistic = name.partition(".")
    stats = getattr(level, group)
    if statistic != "mean" or group == "itl_ms" or stats.std is None or stats.n < 2:
        return Estimate(value, why="not tested: its requests are not kept")
    apart = max(2.0, stats.n / max(1.0, in_flight(level) or 1.0))
    error = max(stats.std / math.sqrt(apart), value * _rate_error(level))
    return Estimate(value, error, apart - 1, "summary")


def _rate_error(level: Level) -> float:
    """Relative standard error of tokens/s, by its interval; 0 where there is none."""
    interval, rate = level.output_tokens_per_s_ci95, level.output_tokens_per_s
    if not interval or not rate:
        return 0.0
    return (interval[1] - interval[0]) / 2 / t975(_batches(level) - 1) / rate


def _batches(level: Level) -> int:
    """How many batches the interval is of; of another tool's the fewest that there could be."""
    return batches(1e3 * (level.window_s or 0.0), level.e2e_ms.mean or math.inf)


# ------------------------------------------------------------------------------------ the bootstrap


@dataclass(frozen=True)
class _Blocks:
    """The steady window cut into equal blocks of time."""

    requests: Kept  # all that were kept
    edges_ms: Floats
    steady: bool

    @property
    def n(self) -> int:
        return self.edges_ms.size - 1

    @property
    def seconds(self) -> float:
        return float(self.edges_ms[1] - self.edges_ms[0]) / 1e3

    def of(self, at_ms: Floats) -> NDArray[np.int64]:
        """Which block an instant is in; −1 outside all."""
        block = np.searchsorted(self.edges_ms, at_ms, side="right") - 1
        inside = (at_ms >= self.edges_ms[0]) & (at_ms <= self.edges_ms[-1])
        return np.where(inside, np.minimum(block, self.n - 1), -1)

    def per_second(self, at_ms: Floats, amount: Floats) -> Floats:
        block = self.of(at_ms)
        inside = block >= 0
        return np.bincount(block[inside], amount[inside], self.n) / self.seconds


def _blocks(level: Level, requests: Kept) -> _Blocks:
    start = (level.window_start_s or 0.0) * 1e3
    end = start + (level.window_s or 0.0) * 1e3
    e2e = requests.e2e_ms[requests.ok]
    mean = float(e2e.mean()) if e2e.size else 1.0
    total = (
        level.requests.ok + level.requests.failed + level.requests.cancelled
        if level.requests
        else 0
    )
    if requests.n < total:  # only those that ended first were kept: not all of the last moments
        end = max(min(end, float(np.nanmax(requests.end_ms)) - mean), start + 1.0)
    n = int(np.clip((end - start) / max(2 * mean, 1e-3), BLOCKS_MIN, BLOCKS_MAX))
    return _Blocks(
        requests, np.linspace(start, end, n + 1), level.output_tokens_per_s_ci95 is not None
    )


def _rate(name: str, sweep: Sweep, level: Level, value: float, blocks: _Blocks) -> Estimate:
    """Batch means: the rates of the blocks are nearly independent (see `batch_means_ci95`)."""
    if not blocks.steady:
        return Estimate(value, why="not tested: the level is too short for a steady window")
    rates = _rates(name, sweep, blocks)
    mean = float(rates.mean())
    error = float(rates.std(ddof=1)) / math.sqrt(blocks.n)
    if name in ("request_throughput", "goodput_rps"):
        # Equal counts are no certainty: the window's two edges cut between requests at random.
        error = max(error, math.sqrt(1 / 6) / (blocks.n * blocks.seconds))
    # A rate of nothing at all, or one of other requests than were kept, is scaled by nothing.
    scale = value / mean if mean > 0 else 1.0
    return Estimate(value, error * scale, blocks.n - 1, "requests")


def _rates(name: str, sweep: Sweep, blocks: _Blocks) -> Floats:
    requests = blocks.requests
    if name == "request_throughput":
        return blocks.per_second(requests.end_ms, requests.ok.astype(np.float64))
    if name == "goodput_rps":
        return blocks.per_second(requests.due_ms, meets(requests, sweep.slo).astype(np.float64))
    rates = blocks.per_second(*arrivals(requests))
    if name == "total_tokens_per_s":
        at = np.where(np.isnan(requests.first_ms), requests.end_ms, requests.first_ms)
        prompts = np.nan_to_num(requests.prompt_tokens) * requests.ok
        rates = rates + blocks.per_second(at, prompts)
    return rates


def _latency(name: str, value: float, blocks: _Blocks, rng: np.random.Generator) -> Estimate:
    """The error of a mean or a quantile by resampling blocks of time with all their requests."""
    group, _, statistic = name.partition(".")
    sample, block = _sample(group, blocks)
    unit = "gaps" if group == "itl_ms" else "requests"
    if statistic != "mean":
        q = float(statistic[1:]) / 100
        if sample.size * min(q, 1 - q) < BEYOND_QUANTILE:
            return Estimate(
                value, why=f"not tested: {sample.size} {unit} are too few for {statistic}"
            )
    filled = np.unique(block).size
    if filled < 2:
        return Estimate(value, why=f"not tested: {sample.size} {unit} are too few")
    weights = rng.multinomial(blocks.n, np.full(blocks.n, 1 / blocks.n), REPLICATES)
    resampled = (
        _means(sample, block, weights)
        if statistic == "mean"
        else _quantiles(sample, block, weights, q)
    )
    now = float(sample.mean() if statistic == "mean" else np.quantile(sample, q))
    # The bootstrap's spread is of n blocks as if n were their degrees of freedom.
    error = float(np.nanstd(resampled)) * math.sqrt(filled / (filled - 1))
    return Estimate(value, error * (value / now if now > 0 else 1.0), filled - 1, "requests")


def _sample(group: str, blocks: _Blocks) -> tuple[Floats, NDArray[np.int64]]:
    """The latencies of the requests sent in the window, and the block each was sent in."""
    requests = blocks.requests
    block = np.where(requests.ok, blocks.of(requests.sent_ms), -1)
    if group == "itl_ms":
        sample, owner = pooled_gaps(requests)
        block = block[owner]
    else:
        sample = {
            "ttft_ms": requests.ttft_ms,
            "ttft_from_due_ms": requests.first_ms - requests.due_ms,
            "ttfo_ms": requests.answer_ms - requests.sent_ms,
            "tpot_ms": requests.tpot_ms,
            "e2e_ms": requests.e2e_ms,
        }[group]
    known = (block >= 0) & ~np.isnan(sample)
    return sample[known], block[known]


def _means(sample: Floats, block: NDArray[np.int64], weights: NDArray[np.int64]) -> Floats:
    n = weights.shape[1]
    sums, counts = np.bincount(block, sample, n), np.bincount(block, minlength=n)
    below = weights @ counts
    means: Floats = np.divide(
        weights @ sums, below, where=below > 0, out=np.full(len(below), np.nan)
    )
    return means


def _quantiles(
    sample: Floats, block: NDArray[np.int64], weights: NDArray[np.int64], q: float
) -> Floats:
    """The q-quantile of every resample, from counts of each block in bins of the whole sample."""
    order = np.argsort(sample, kind="stable")
    bins = min(BINS, sample.size)
    place = np.empty(sample.size, dtype=np.int64)
    place[order] = np.arange(sample.size) * bins // sample.size
    middle = np.bincount(place, sample, bins) / np.bincount(place, minlength=bins)
    counts = np.zeros((weights.shape[1], bins))
    np.add.at(counts, (block, place), 1.0)
    heaps = weights.astype(np.float64) @ np.cumsum(counts, axis=1)
    at = (heaps >= q * heaps[:, -1:]).argmax(axis=1)
    found: Floats = np.where(heaps[:, -1] > 0, middle[at], np.nan)
    return found


# ------------------------------------------------------------------------------- many tests at once


def _adjusted(pairs: list[Pair]) -> tuple[list[Pair], int]:
    """Every p-value of the table adjusted for all of them."""
    p_values = [change.p for pair in pairs for change in pair.changes if change.p is not None]
    adjusted = iter(holm(p_values))

    def judged(changes: list[Change]) -> Iterator[Change]:
        for change in changes:
            if change.p is None:
                yield change
                continue
            p = next(adjusted)
            yield msgspec.structs.replace(change, p_adjusted=p, distinguishable=p <= ALPHA)

    done = [msgspec.structs.replace(pair, changes=list(judged(pair.changes))) for pair in pairs]
    return done, len(p_values)


def _gate(rules: Sequence[Rule], pairs: list[Pair]) -> list[Outcome]:
    """A rule is missed where the change goes beyond its bound and is not noise.

    What the gate asks was named beforehand, so its tests are adjusted among themselves only.
    """
    asked = [
        (rule, pair, next((c for c in pair.changes if c.metric == rule.metric), None))
        for pair in pairs
        if pair.changes
        for rule in rules
    ]
    tests = {
        (pair.mode, pair.load, change.metric): change.p
        for _, pair, change in asked
        if change is not None and change.p is not None
    }
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [
        _decide(rule, pair, change, adjusted.get((pair.mode, pair.load, rule.metric)))
        for rule, pair, change in asked
    ]


def _decide(rule: Rule, pair: Pair, change: Change | None, p: float | None) -> Outcome:
    if change is None:
        note = "not measured in either run"
        return Outcome(str(rule), pair.mode, pair.load, None, None, None, note)
    percent = change.change_percent
    missed: bool | None
    if percent is None:
        missed = None
    elif not rule.beyond(percent):
        missed = False
    else:
        missed = None if p is None else p <= ALPHA
    return Outcome(str(rule), pair.mode, pair.load, percent, p, missed, change.note)


def _without_test(change: Change) -> Change:
    if change.metric != "goodput_rps" or change.change_percent is None:
        return change
    return Change(
        change.metric, change.a, change.b, change.change_percent, note="not tested: different SLO"
    )
