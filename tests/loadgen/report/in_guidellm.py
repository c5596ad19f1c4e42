"""Runs in GuideLLM's interpreter: its own models load the file and compile its metrics anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from guidellm.benchmark.schemas.accumulator import GenerativeRequestsAccumulator
from guidellm.benchmark.schemas.metrics import GenerativeMetrics
from guidellm.benchmark.schemas.report import GenerativeBenchmarksReport

# Intervals are not asked for; what the mode is among equals is a matter of the last digit.
LEFT_OUT = {"mean_ci", "percentile_cis", "pdf", "mode"}


def differences(path: str, own: Any, ours: Any) -> Iterator[str]:
    if isinstance(own, dict) and isinstance(ours, dict):
        for key in (own.keys() | ours.keys()) - LEFT_OUT:
            yield from differences(f"{path}.{key}", own.get(key), ours.get(key))
    elif isinstance(own, int | float) and isinstance(ours, int | float):
        # Unix time in a float has a grain of 0.24 µs.
        if abs(own - ours) > 1e-3 * abs(own) + 1e-5:
            yield f"{path}: {own} here, {ours} in the file"
    elif own != ours:
        yield f"{path}: {own} here, {ours} in the file"


def main(file: str) -> None:
    report = GenerativeBenchmarksReport.load_file(file)
    with open(file) as text:
        written = json.load(text)
    found = []
    for benchmark, ours in zip(report.benchmarks, written["benchmarks"], strict=True):
        window = benchmark.scheduler_metrics
        accumulator = SimpleNamespace(
            config=benchmark.config,
            timings=SimpleNamespace(
                finalized_measure_start=window.measure_start_time,
                finalized_measure_end=window.measure_end_time,
            ),
            **{
                name: GenerativeRequestsAccumulator.model_construct(requests_stats=requests)
                for name, requests in (
                    ("completed", benchmark.requests.successful),
                    ("incomplete", benchmark.requests.incomplete),
                    ("errored", benchmark.requests.errored),
                )
            },
        )
        own = GenerativeMetrics.compile(accumulator).model_dump(mode="json")
        found += differences("", own, ours["metrics"])
    print("\n".join(found) or "equal")


main(sys.argv[1])
