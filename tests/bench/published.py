"""The capacity model against published benchmarks: fitted, carried over, and held to its intervals.

Reads a table of published measurements (`published-benchmarks.csv`; it lies beside the project, or
where SERVEFIT_SHARED says) and scores `agent.sizing.fit` on it:

- same GPU: fitted on one source's rows of one model, precision, engine, GPU and parallelism, scored
  on lengths and on concurrencies that were held out whole
- another GPU of the vendor: everything measured on that GPU is held out
- another engine: everything measured with that engine is held out, whatever its version
- bound by the KV cache or not: by no fitted parameter at all, where a sweep shows it

The intervals of the steps are those that the other GPUs (engines) show among themselves, so that
nothing of what is scored has shaped them. Run alone (`python -m tests.bench.published [CSV …]`, of
which several are read as one table) it prints all tables and the constants that the package keeps.
"""

from __future__ import annotations

import csv
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from agent.model import UsageError
from agent.sizing import engine, fit, hardware, models
from agent.sizing.engine import Efficiencies, EngineSpec
from agent.sizing.fit import Load, Point

ROOT = Path(__file__).parents[2]
TABLE = Path(os.environ.get("SERVEFIT_SHARED", ROOT.parent / "shared")) / "data"
TABLE /= "published-benchmarks.csv"

# What a row leaves unsaid.
_INPUT_TOKENS = (
    256  # ML.ENERGY does not tell its prompts' length; chat and quiz questions are short
)
_MAX_LOAD = 2048  # "max load": TensorRT-LLM's default batch
_MAX_NUM_SEQS = 256  # vLLM's default
_PRECISION = {"": "bf16", "bf16/fp16": "bf16", "fp16": "bf16", "bfloat16": "bf16"}
_FAMILIES = {"trt": "tensorrt-llm", "tensorrt": "tensorrt-llm", "deepspeed": "deepspeed-mii"}
_SPELLED = {"llama2-70b": "llama-2-70b"}
_CONTRADICTION = 0.25  # of a rate against its own latencies (design equation 6)


class Row(NamedTuple):
    """One setting of a table; where it has several values for one, their median."""

    point: Point
    tpot_s: float | None
    latencies: bool  # does the table tell both TTFT and TPOT?


class Group(NamedTuple):
    """A source's rows of one model, precision, engine, GPU and parallelism."""

    source: str
    model: str
    engine: str
    spec: EngineSpec
    rows: tuple[Row, ...]
    measured: fit.Measured

    @property
    def gpu(self) -> str:
        return self.spec.gpu.name

    @property
    def vendor(self) -> str:
        return self.spec.gpu.vendor

    @property
    def family(self) -> str:
        return family(self.engine)

    @property
    def points(self) -> list[Point]:
        return [row.point for row in self.rows]


def family(engine_name: str) -> str:
    word = re.split(r"[ \d-]", engine_name.strip().lower())[0]
    return next((name for start, name in _FAMILIES.items() if word.startswith(start)), word)


# ---------------------------------------------------------------------------------------- reading


def read(*paths: Path) -> tuple[list[Group], Counter[str]]:
    """The rows that can be used, in groups, and how many were left out for which reason."""
    settings: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    specs: dict[tuple[object, ...], EngineSpec] = {}
    left_out: Counter[str] = Counter()
    for line in _lines(paths):
        try:
            spec = _spec(line)
            row = _row(line)
        except UsageError as error:
            left_out[_reason(str(error))] += 1
            continue
        key = (_source(line), line["model"], line["engine"].strip(),
               spec.precision, spec.gpu.name, spec.tp)  # fmt: skip
        specs[key] = spec
        settings[(*key, row.point.load)].append(row)
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for setting, rows in settings.items():
        groups[setting[:-1]].append(_median(rows))
    return [_group(key, specs[key], rows) for key, rows in groups.items()], left_out


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, str]]:
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


def _group(key: tuple[object, ...], spec: EngineSpec, rows: Sequence[Row]) -> Group:
    """An engine took as many requests at once as it was given; no table tells its limit."""
    most = math.ceil(max(row.point.load.concurrency for row in rows))
    spec = msgspec.structs.replace(spec, max_num_seqs=max(_MAX_NUM_SEQS, most))
    measured = fit.Measured(spec, [row.point for row in rows])
    return Group(str(key[0]), str(key[1]), str(key[2]), spec, tuple(rows), measured)


def _reason(text: str) -> str:
    for words, reason in (
        ("unknown model", "its model's shape is not in the table of models"),
        ("could be", "its model's shape is not in the table of models"),
        ("does not fit", "its weights exceed the memory it says it ran on"),
        ("no room", "its weights exceed the memory it says it ran on"),
    ):
        if words in text:
            return reason
    return text


def _source(line: dict[str, str]) -> str:
    """A collection of runs of one method; of aiconfigurator's file, each origin by itself."""
    text = line["source"]
    if inner := re.search(r"\[(\w+)", text):
        return f"aiconfigurator, {inner[1]}"
    if "ml-energy" in text:
        return f"ML.ENERGY, {Path(text).stem}"
    return re.split(r"[@ ]", text)[0]


def _spec(line: dict[str, str]) -> EngineSpec:
    """The engine a row ran on; all its GPUs share every layer (tensor parallelism)."""
    gpu = hardware.gpu(line["gpu"].rstrip("?"))
    shape = models.model(_SPELLED.get(line["model"], line["model"]))
    precision = _PRECISION.get(line["precision"], line["precision"])
    if "gpt-oss" in shape.name:
        precision = "mxfp4"  # there is no other checkpoint; what tables call fp4 or fp8 is this
    elif line["model"].lower().endswith("fp8"):
        precision = "fp8"
    is_trt = family(line["engine"]) == "tensorrt-llm"
    spec = EngineSpec(
        gpu=gpu,
        model=shape,
        precision=precision,
        kv_precision="fp8" if is_trt and precision == "fp8" else "bf16",  # its fp8 recipe's default
        tp=int(line["n_gpus"]),
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=8192,
    )
    engine.kv_pool_bytes(spec)
    return spec


def _row(line: dict[str, str]) -> Row:
    """Raises UsageError where the row says nothing that can be scored."""
    kind, at = _load_kind(line["concurrency_or_rate"])
    prompt = float(line["isl"] or _INPUT_TOKENS)
    answer = float(line["osl"])
    ttft_s, tpot_s = _seconds(line["ttft_ms"]), _seconds(line["tpot_ms"])
    rate = float(line["output_tok_s"] or 0)
    if "POWER-CAPPED" in line["notes"]:
        raise UsageError("its GPU was power-capped on purpose")
    if kind == "rate" and ttft_s and tpot_s:
        at = rate / answer * (ttft_s + tpot_s * answer)  # in flight, by Little
    elif ttft_s and tpot_s and kind in ("c", "static batch"):
        implied = at * answer / (ttft_s + tpot_s * (answer - 1))
        rate = rate or implied
        if abs(rate / implied - 1) > _CONTRADICTION:
            raise UsageError("its rate and its latencies contradict each other by over 25 %")
    if not rate:
        raise UsageError("it tells no output rate")
    reserved = kind == "static batch" or family(line["engine"]) == "tensorrt-llm"
    load = Load(prompt, answer, max(1.0, at), reserved=reserved)
    return Row(
        Point(load, rate, ttft_s if kind == "c" else None),
        tpot_s,
        bool(ttft_s and tpot_s and kind in ("c", "static batch")),
    )


def _load_kind(text: str) -> tuple[str, float]:
    found = re.match(r"(static batch|c|batch|rate)=([\d.]+)", text)
    return (found[1], float(found[2])) if found else ("max load", float(_MAX_LOAD))


def _seconds(ms: str) -> float | None:
    return float(ms) / 1e3 if ms else None


def _median(rows: Sequence[Row]) -> Row:
    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    rate = middle(row.point.output_tokens_per_s for row in rows)
    ttft_s = middle(row.point.ttft_s for row in rows)
    point = Point(rows[0].point.load, rate or 0.0, ttft_s)
    return Row(point, middle(row.tpot_s for row in rows), rows[0].latencies)


# ---------------------------------------------------------------------------------------- scoring


class Scored(NamedTuple):
    """One row that was held out: logarithm of expected over measured, and did the interval hold?"""

    group: Group
    error: float
    held: bool
    used: bool  # false: the fit said that it had failed


def absolute(errors: Iterable[float]) -> float:
    """Median absolute error, as a share of the truth."""
    return statistics.median(abs(math.expm1(error)) for error in errors)


def same_gpu(groups: Sequence[Group]) -> Iterator[Scored]:
    """Each length, and each concurrency, held out whole in its turn."""
    starts = {gpu: typical(groups, lambda other, gpu=gpu: other.gpu != gpu, vendor)  # type: ignore[misc]
              for gpu, vendor in {(group.gpu, group.vendor) for group in groups}}  # fmt: skip
    for group in groups:
        for name in ("lengths", "concurrency"):
            yield from _held_out(group, _folds(group.points, name), starts[group.gpu])


def _folds(points: Sequence[Point], name: str) -> list[list[int]]:
    folds: dict[object, list[int]] = defaultdict(list)
    for index, point in enumerate(points):
        load = point.load
        lengths = (load.input_tokens, load.output_tokens)
        folds[lengths if name == "lengths" else load.concurrency].append(index)
    return list(folds.values())


def _held_out(group: Group, folds: list[list[int]], start: Efficiencies) -> Iterator[Scored]:
    for fold in folds:
        rest = [point for index, point in enumerate(group.points) if index not in fold]
        if len({point.load for point in rest}) < fit.LEAST_POINTS:
            continue
        fitted = fit.fit_points(rest, group.spec, start)
        yield from _scored_by(fitted, group, (group.points[index] for index in fold))


def _scored_by(fitted: fit.Fit, group: Group, points: Iterable[Point]) -> Iterator[Scored]:
    for point in points:
        rate = fitted.expect(point.load).output_tokens_per_s
        truth = point.output_tokens_per_s
        yield Scored(group, math.log(rate.value / truth), rate.lo <= truth <= rate.hi, fitted.ok)


def one_sweep(groups: Sequence[Group]) -> dict[str, list[Scored]]:
    """What a sweep of one length says: every second load of it is fitted, as a user would have it.

    Scored are the loads between, and the other lengths of the group.
    """
    scored: dict[str, list[Scored]] = {"loads between": [], "other lengths": []}
    for group in groups:
        lengths = _folds(group.points, "lengths")
        for fold in lengths:
            sweep = sorted((group.points[index] for index in fold), key=_concurrency)
            if len(sweep[::2]) < fit.LEAST_POINTS:
                continue
            fitted = fit.fit_points(sweep[::2], group.spec)
            others = (p for index, p in enumerate(group.points) if index not in fold)
            scored["loads between"] += _scored_by(fitted, group, sweep[1::2])
            scored["other lengths"] += _scored_by(fitted, group, others)
    return {what: [one for one in some if one.used] for what, some in scored.items()}


def _concurrency(point: Point) -> float:
    return point.load.concurrency


def typical(
    groups: Iterable[Group], used: Callable[[Group], bool], vendor: str,
    start: Efficiencies | None = None,
) -> Efficiencies:  # fmt: skip
    """What the used groups of a vendor have in common; `start` where there is none."""
    chosen = [g.measured for g in groups if g.vendor == vendor and used(g)]
    return fit.learn(chosen, start) if chosen else start or Efficiencies()


class Step(NamedTuple):
    """A way from what was measured to what was not."""

    name: str
    related: Callable[[Group, Group], bool]  # (known, wanted)
    narrower: Callable[[Group, Group], bool] | None = None  # what counts most of the related


def _alike(known: Group, wanted: Group) -> bool:
    """The same method, engine, model and precision."""
    return (known.source, known.engine, known.model, known.spec.precision) == (
        wanted.source, wanted.engine, wanted.model, wanted.spec.precision)  # fmt: skip


def _same_tp(known: Group, wanted: Group) -> bool:
    return known.spec.tp == wanted.spec.tp


GPU = Step("another GPU, same model and engine", lambda a, b: a.gpu != b.gpu and _alike(a, b),
           lambda a, b: a.gpu != b.gpu and _alike(a, b) and _same_tp(a, b))  # fmt: skip
VENDOR = Step("another GPU, any model and engine", lambda a, b: a.gpu != b.gpu)
ENGINE = Step("another engine, any model and GPU", lambda a, b: a.family != b.family)
PRECISION = Step(
    "another precision",
    lambda a, b: (a.source, a.engine, a.gpu, a.model) == (b.source, b.engine, b.gpu, b.model)
    and _same_tp(a, b) and a.spec.precision != b.spec.precision,
)  # fmt: skip
MODEL = Step(
    "another model",
    lambda a, b: (a.source, a.engine, a.gpu, a.spec.precision)
    == (b.source, b.engine, b.gpu, b.spec.precision)
    and _same_tp(a, b) and a.model != b.model,
)  # fmt: skip
PARALLEL = Step("another parallelism",
                lambda a, b: a.gpu == b.gpu and _alike(a, b) and not _same_tp(a, b))  # fmt: skip


def carried(groups: Sequence[Group], step: Step) -> Iterator[tuple[Group, list[float]]]:
    """Errors (log of expected over measured) of each group that something related was known of.

    What is likely beforehand comes from other GPUs (another engine: from other engines), too.
    """
    learned: dict[tuple[object, ...], Efficiencies] = {}

    def of(chosen: Sequence[Group], start: Efficiencies) -> Efficiencies:
        key = (*map(id, chosen), start)
        if key not in learned:
            learned[key] = fit.learn([g.measured for g in chosen], start)
        return learned[key]

    first = ENGINE.related if step is ENGINE else VENDOR.related
    for wanted in groups:
        known = [group for group in groups if group.vendor == wanted.vendor]
        shares, reached = Efficiencies(), False
        for related in (first, step.related, step.narrower):
            if related and (chosen := [group for group in known if related(group, wanted)]):
                shares = of(chosen, shares)
                reached |= related is step.related
        if reached:
            yield wanted, _errors(wanted, shares)


def _errors(group: Group, shares: Efficiencies) -> list[float]:
    expected = group.measured.work.log_rate(fit.logs(shares))
    return [float(error) for error in expected - group.measured.log_rates]


# ------------------------------------------------------------------------------------ KV or not

_STOPPED, _GOES_ON = 0.25, 0.5  # of decoding sequences, as a share of the growth of the load
_FLAT, _RISES = 0.15, 0.3  # of a rate, the same


class Shown(NamedTuple):
    """A sweep of one length that shows whether the KV cache bound it, and what was said of it."""

    group: Group
    load: Load  # its highest
    truth: bool
    said: bool


def kv_sweeps(groups: Iterable[Group]) -> Iterator[Shown]:
    """Where latencies are told, sequences decoding = rate · TPOT (Little): bound by KV where they
    stopped growing while the load grew. Of static batches the rate alone is told: bound where it
    stays flat at this length while it rises at a shorter one with the same batches, for what else
    stops a rate (compute) stops it there too.
    """
    for group in groups:
        lengths: dict[tuple[float, float], list[Row]] = defaultdict(list)
        for row in group.rows:
            load = row.point.load
            lengths[load.input_tokens, load.output_tokens].append(row)
        sweeps = [sorted(rows, key=lambda row: row.point.load.concurrency)
                  for _, rows in sorted(lengths.items())]  # fmt: skip
        for rows in sweeps:
            truth = _bound(rows, sweeps)
            if truth is not None:
                load = rows[-1].point.load
                yield Shown(group, load, truth, fit.kv_bound(group.spec, load))


def _bound(rows: Sequence[Row], sweeps: Sequence[Sequence[Row]]) -> bool | None:
    """None where it is not shown, or lies between."""
    if len(rows) < 2:
        return None
    if all(row.latencies for row in rows[-2:]):
        growth = _growth(rows[-2:], lambda row: row.point.output_tokens_per_s * (row.tpot_s or 0))
        return _either(growth, _STOPPED, _GOES_ON)
    if not rows[-1].point.load.reserved:
        return None
    rate: Callable[[Row], float] = lambda row: row.point.output_tokens_per_s  # noqa: E731
    batches = [row.point.load.concurrency for row in rows[-2:]]
    same = [row for row in sweeps[0] if row.point.load.concurrency in batches]
    if len(same) < 2 or _growth(same, rate) < _RISES:
        return None
    return _either(_growth(rows[-2:], rate), _FLAT, _RISES)


def _growth(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """1 where the value grows as much as the load between two rows, 0 where it does not."""
    low, high = rows
    load = high.point.load.concurrency / low.point.load.concurrency - 1
    return (value(high) / value(low) - 1) / load


def _either(growth: float, low: float, high: float) -> bool | None:
    return True if growth < low else False if growth >= high else None


# --------------------------------------------------------------------------------------- outcome

_WITHIN = {"precision": PRECISION, "model": MODEL, "parallelism": PARALLEL}
_LEAST_ROWS = 100  # that a spread is taken from


class Figure(NamedTuple):
    """One line of the table; what it is of, with the rows behind it, stands in `what`."""

    what: str
    value: float | None  # None: no row shows it
    bar: str = ""
    reached: bool | None = None


class Carry(NamedTuple):
    """A step, over every row that was held out for it."""

    errors: dict[str, list[float]]  # by what was held out: GPUs, or engines
    held: dict[str, float]  # share of each within the spread that the others show

    @property
    def every(self) -> list[float]:
        return [error for errors in self.errors.values() for error in errors]

    @property
    def judged(self) -> int:
        """Rows of the parts whose others show a spread."""
        return sum(len(self.errors[part]) for part in self.held)

    @property
    def coverage(self) -> float | None:
        held = sum(share * len(self.errors[part]) for part, share in self.held.items())
        return _share(held, self.judged)

    @property
    def spread(self) -> tuple[float, float]:
        """Factors that 5 and 95 of 100 of the measured rates were within of the expected."""
        low, high = np.quantile(self.every, [0.05, 0.95])
        return math.exp(-high), math.exp(-low)


def carry(groups: Sequence[Group], step: Step) -> Carry:
    def part(group: Group) -> str:
        return group.family if step is ENGINE else group.gpu

    errors: dict[str, list[float]] = defaultdict(list)
    for group, some in carried(groups, step):
        errors[part(group)] += some
    held = {}
    for name, own in errors.items():
        others = [e for _, some in carried([g for g in groups if part(g) != name], step)
                  for e in some]  # fmt: skip
        if len(others) >= _LEAST_ROWS:
            low, high = np.quantile(others, [0.05, 0.95])
            held[name] = sum(low <= error <= high for error in own) / len(own)
    return Carry(dict(errors), held)


def refusals(groups: Sequence[Group]) -> tuple[int, int]:
    """Requests for another vendor's hardware: how many were refused, of how many."""
    refused = asked = 0
    for known in groups:
        fitted = fit.fit_points(known.points, known.spec)
        others = {group.vendor: group for group in groups if group.vendor != known.vendor}
        for other in others.values() if fitted.ok else ():
            asked += 1
            try:
                fit.transfer(fitted, other.spec)
            except UsageError:
                refused += 1
    return refused, asked


def outcome(*paths: Path) -> tuple[list[Figure], list[str]]:
    """What the capacity model reaches on a table, and further tables as Markdown."""
    groups, left_out = read(*paths)
    same = list(same_gpu(groups))
    used = [one for one in same if one.used]
    steps = {name: carry(groups, step) for name, step in _WITHIN.items()}
    steps |= {"GPU": carry(groups, GPU), "everything": carry(groups, VENDOR)}
    engines = carry(groups, ENGINE)
    shown = list(kv_sweeps(groups))
    right = _share(sum(one.truth == one.said for one in shown), len(shown))
    refused, asked = refusals(groups)
    figures = [
        _error("same GPU, each length and load in turn", [one.error for one in used], 0.10),
        _interval("same GPU", _share(sum(one.held for one in used), len(used)), len(used)),
        _error("same GPU, failed fits too", [one.error for one in same]),
        *(figure for what, some in one_sweep(groups).items() for figure in _of_a_sweep(what, some)),
        _error("another GPU, all rows", _best(groups), 0.20),
        *_carried("another GPU, model and engine known", steps["GPU"]),
        *_carried("another GPU, any model and engine", steps["everything"]),
        *_carried("another engine", engines),
        *(_error(f"another {name}", steps[name].every) for name in _WITHIN),
        _scored(f"another vendor: refused, % of {asked}", _share(refused, asked), "100", 1, 1),
        _scored(f"bound by KV or not: right, % of {len(shown)} sweeps", right, "≥ 95", 0.95, 1),
    ]  # fmt: skip
    return figures, [
        _sources_table(used),
        _steps_table(steps | {"engine": engines}),
        _kv_table(shown),
        _left_out_table(left_out, sum(len(group.rows) for group in groups), len(groups)),
    ]


def _best(groups: Sequence[Group]) -> list[float]:
    """Errors on GPUs held out, by the nearest that is known of each group."""
    known: dict[int, list[float]] = {}
    for step in (VENDOR, GPU):
        known |= {id(group): errors for group, errors in carried(groups, step)}
    return [error for errors in known.values() for error in errors]


def _of_a_sweep(what: str, some: Sequence[Scored]) -> tuple[Figure, Figure]:
    what = f"same GPU, a sweep of one length, {what}"
    held = _share(sum(one.held for one in some), len(some))
    return _error(what, [one.error for one in some], 0.10), _interval(what, held, len(some))


def _carried(what: str, step: Carry) -> tuple[Figure, Figure]:
    return _error(what, step.every), _interval(what, step.coverage, step.judged)


def _error(what: str, errors: Sequence[float], bar: float = math.inf) -> Figure:
    text = f"{what}: median absolute error, % ({len(errors):,} rows)"
    value = absolute(errors) if errors else None
    return _scored(text, value, f"≤ {100 * bar:g}" if bar < math.inf else "", 0, bar)


def _interval(what: str, share: float | None, rows: int) -> Figure:
    return _scored(f"{what}: in the 90 % interval, % ({rows:,} rows)", share, "85–95", 0.85, 0.95)


def _scored(what: str, share: float | None, bar: str, low: float, high: float) -> Figure:
    if share is None:
        return Figure(what, None, bar)
    return Figure(what, 100 * share, bar, low <= share <= high if bar else None)


def _share(some: float, of: int) -> float | None:
    return some / of if of else None


def _table(*rows: Sequence[object]) -> str:
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sources_table(scored: Sequence[Scored]) -> str:
    by: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        by[one.group.source, one.group.gpu].append(one)
    return _table(
        ("same GPU: source", "GPU", "rows", "median absolute error", "in the interval"),
        *((*key, len(some), _percent(absolute(one.error for one in some)),
           _percent(sum(one.held for one in some) / len(some)))
          for key, some in sorted(by.items())),
    )  # fmt: skip


def _steps_table(steps: dict[str, Carry]) -> str:
    rows = []
    for name, step in steps.items():
        if not step.errors:
            continue
        lo, hi = step.spread
        coverage = "" if step.coverage is None else _percent(step.coverage)
        error = _percent(absolute(step.every))
        rows.append((f"**{name}**", len(step.every), error, f"{lo:.2f}–{hi:.2f}", coverage))
        rows += [(part, len(errors), _percent(absolute(errors)), "",
                  _percent(step.held[part]) if part in step.held else "")
                 for part, errors in sorted(step.errors.items())]  # fmt: skip
    return _table(("another … (held out)", "rows", "median absolute error", "5 to 95 % of measured "
                   "over expected", "in the interval of the others"), *rows)  # fmt: skip


def _kv_table(shown: Sequence[Shown]) -> str:
    counts = Counter((bool(one.group.rows[0].latencies), one.truth, one.said) for one in shown)
    return _table(
        ("KV", "bound, said so", "bound, said not", "not, said not", "not, said bound"),
        *((name, *(counts[told, truth, said] for truth, said in
                   ((True, True), (True, False), (False, False), (False, True))))
          for told, name in ((True, "latencies told"), (False, "static batches"))),
    )  # fmt: skip


def _left_out_table(left_out: Counter[str], settings: int, groups: int) -> str:
    return _table(
        ("rows", ""),
        (f"{settings:,}", f"settings scored, in {groups} groups (medians of equal settings)"),
        *((count, f"left out: {reason}") for reason, count in left_out.most_common()),
    )


def main() -> int:
    paths = [Path(one) for one in sys.argv[1:]] or [TABLE]
    figures, tables = outcome(*paths)
    for figure in figures:
        mark = {None: "", True: "reached", False: "NOT reached"}[figure.reached]
        value = "no row shows it" if figure.value is None else f"{figure.value:.1f}"
        print(f"{figure.what}: {value} {figure.bar and f'({figure.bar})'} {mark}")
    for table in tables:
        print(f"\n{table}")
    groups, _ = read(*paths)
    for vendor in sorted({group.vendor for group in groups}):
        print(f"\nTYPICAL {vendor}: {typical(groups, lambda _: True, vendor)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
