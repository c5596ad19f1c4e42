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
from pathlib import Path
from typing import NamedTuple

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
_MAX_NUM_SEQS = 2048  # more than any row holds
_PRECISION = {"": "bf16", "bf16/fp16": "bf16", "fp16": "bf16", "bfloat16": "bf16"}
_FAMILIES = {"trt": "tensorrt-llm", "tensorrt": "tensorrt-llm", "deepspeed": "deepspeed-mii"}
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
    replicas: int
    spec: EngineSpec
    rows: tuple[Row, ...]

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
                spec, replicas = _spec(line)
                row = _row(line, spec, replicas)
            except UsageError as error:
                left_out[_reason(str(error))] += 1
                continue
            key = (_source(line), line["model"], line["engine"].strip(), replicas,
                   spec.precision, spec.gpu.name, int(line["n_gpus"]), spec.tp)  # fmt: skip
            specs[key] = spec
            settings[(*key, row.point.load)].append(row)
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for setting, rows in settings.items():
        groups[setting[:-1]].append(_median(rows))
    return [
        Group(str(key[0]), str(key[1]), str(key[2]), int(str(key[3])), specs[key], tuple(rows))
        for key, rows in groups.items()
    ], left_out


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


def _spec(line: dict[str, str]) -> tuple[EngineSpec, int]:
    """The engine a row ran on, and how many replicas of it."""
    gpu = hardware.gpu(line["gpu"].rstrip("?"))
    shape = models.model(line["model"])
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
    split = re.search(r"tp=(\d+) dp=(\d+)", line["notes"])
    if split and int(split[2]) > 1 and int(split[1]) * int(split[2]) == spec.tp:
        one = _with(spec, tp=int(split[1]))
        if fits(one):  # else attention alone is replicated, and the experts are spread out
            return one, int(split[2])
    engine.kv_blocks(spec)
    return spec, 1


def _with(spec: EngineSpec, **changes: int) -> EngineSpec:
    from msgspec.structs import replace

    return replace(spec, **changes)


def fits(spec: EngineSpec) -> bool:
    try:
        return engine.kv_blocks(spec) > 0
    except UsageError:
        return False


def _row(line: dict[str, str], spec: EngineSpec, replicas: int) -> Row:
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
    load = Load(prompt, answer, max(1.0, at / replicas), reserved=reserved)
    return Row(
        Point(load, rate / replicas, ttft_s if kind == "c" else None),
        tpot_s,
        bool(ttft_s and tpot_s and kind in ("c", "static batch")),
    )


def _load_kind(text: str) -> tuple[str, float]:
    found = re.match(r"(static batch|c|batch|rate)=([\d.]+)", text)
    return (found[1], float(found[2])) if found else ("max load", float(_MAX_NUM_SEQS))


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
    chosen = [(g.spec, g.points) for g in groups if g.vendor == vendor and used(g)]
    return fit.learn(chosen, start) if chosen else start or Efficiencies()


if __name__ == "__main__":
    groups, left_out = read(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE)
    print(len(groups), sum(len(g.rows) for g in groups), left_out)
    np.seterr(all="raise")
    scored = list(same_gpu(groups))
    print(len(scored), absolute(scored), coverage(scored))
    by = defaultdict(list)
    for one in scored:
        by[one.group.source[:30], one.group.gpu].append(one)
    for key, some in by.items():
        print(key, len(some), round(absolute(some), 3), round(coverage(some), 3))
