"""The capacity model against published benchmarks: fitted, carried over, and held to its intervals.

Reads a table of published measurements (`published-benchmarks.csv`; it lies beside the project, or
where SERVEFIT_SHARED says) and scores `agent.sizing.fit` on it:

- same GPU: fitted on one source's rows of one model, precision, engine, GPU and parallelism, scored
  on lengths and on concurrencies that were held out whole
- another GPU of the vendor: everything measured on that GPU is held out
- another engine: everything measured with that engine is held out, whatever its version
- bound by the KV cache or not: by no fitted parameter at all, where a sweep shows it

The intervals of the steps are those that the other GPUs (engines) show among themselves, so that
nothing of what is scored has shaped them. Run alone (`python -m tests.bench.published [CSV]`) it
prints all tables and the constants that the package keeps.
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
from itertools import pairwise
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
_INPUT_TOKENS = 256  # ML.ENERGY does not tell its prompts' length; chat and quiz questions are short
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


def read(path: Path) -> tuple[list[Group], Counter[str]]:
    """The rows that can be used, in groups, and how many were left out for which reason."""
    settings: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    specs: dict[tuple[object, ...], EngineSpec] = {}
    left_out: Counter[str] = Counter()
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
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


def absolute(scored: Sequence[Scored]) -> float:
    """Median absolute error, as a share of the truth."""
    return statistics.median(abs(math.expm1(one.error)) for one in scored)


def coverage(scored: Sequence[Scored]) -> float:
    return sum(one.held for one in scored) / len(scored)


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
        if not fitted.ok:
            continue
        for index in fold:
            point = group.points[index]
            rate = fitted.expect(point.load).output_tokens_per_s
            truth = point.output_tokens_per_s
            yield Scored(group, math.log(rate.value / truth), rate.lo <= truth <= rate.hi)


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


class Figure(NamedTuple):
    """One line of the table: how much of what, over how many rows, and the bar it has to reach."""

    what: str
    value: float
    bar: str = ""
    reached: bool | None = None


class Outcome(NamedTuple):
    figures: list[Figure]
    tables: list[str]  # Markdown, for who wants to know more
    typical: dict[str, Efficiencies]
    spreads: dict[str, tuple[float, float]]


_STEPS = {
    "precision": PRECISION, "model": MODEL, "parallelism": PARALLEL, "GPU": GPU,
    "everything": VENDOR,
}  # fmt: skip


def outcome(path: Path) -> Outcome:
    """Everything that the table says of the capacity model."""
    groups, left_out = read(path)
    same = list(same_gpu(groups))
    kept = [one for one in same if one.used]
    steps = {name: list(carried(groups, step)) for name, step in _STEPS.items()}
    engines = list(carried(groups, ENGINE))
    across = _best(steps["GPU"], steps["everything"])
    shown = list(kv_sweeps(groups))
    figures = [
        *_both("same GPU, lengths and concurrencies held out", _absolute(kept), _share(kept), 0.10),
        Figure(f"the same with rows of failed fits ({len(same)} rows)", _absolute(same)),
    ]
    return Outcome(figures, [], {}, {})


if __name__ == "__main__":
    groups, left_out = read(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE)
    scored = list(same_gpu(groups))
    print(len(scored), absolute(scored), coverage(scored))
    by = defaultdict(list)
    for one in scored: by[one.group.source[:30], one.group.gpu].append(one)
    for key, some in by.items(): print(key, len(some), round(absolute(some), 3), round(coverage(some), 3))
    for v in ("NVIDIA", "AMD"): print(v, typical(groups, lambda g: True, v))
    for g in groups:
        f = fit.fit_points(g.points, g.spec)
        if not f.ok: print(len(g.rows), g.source, g.model, g.engine, g.gpu, g.spec.tp, f.why_not)
    c=Counter(); 
    for one in kv_sweeps(groups):
        kind='latencies' if one.group.rows[0].latencies else 'static'
        c[kind, one.truth, one.said]+=1
        if one.truth!=one.said: print(one.truth, one.said, one.group[:4], one.group.gpu, one.group.spec.tp, one.load, round(fit.sequences_held(one.group.spec, one.load),1))
    print(c, sum(v for k,v in c.items() if k[1]==k[2])/sum(c.values()))
    sys.exit()
    for step in (GPU, VENDOR, ENGINE, PRECISION, MODEL, PARALLEL):
        found = list(carried(groups, step))
        e = np.array([x for g,v in found for x in v])
        if len(e): print(step.name, len(found), len(e), np.median(abs(np.expm1(e))).round(3), 'truth/pred q', np.exp(np.quantile(-e, [.05,.5,.95])).round(2))
        part = (lambda g: g.family) if step is ENGINE else (lambda g: g.gpu)
        held = n = 0
        for name in sorted({part(g) for g, _ in found}):
            others = [x for _, v in carried([g for g in groups if part(g) != name], step) for x in v]
            own = np.array([x for g, v in found if part(g) == name for x in v])
            if len(others) < 20: print('   ', name, 'nothing else'); continue
            lo, hi = np.quantile(others, [.05, .95])
            inside = (own >= lo) & (own <= hi)
            held += inside.sum(); n += len(own)
            print('   ', name, len(own), 'holds', inside.mean().round(3), np.exp([-hi, -lo]).round(2))
        if n: print('   coverage', held / n)
