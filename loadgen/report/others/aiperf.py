"""AIPerf's `profile_export_aiperf.json`, schema 1.4 as of AIPerf 0.13.0.

Definitions (aiperf/metrics/types): a request's clock starts before its connection is opened;
request latency ends with the last chunk that carries content; inter-token latency is one figure a
request, (request latency − TTFT) / (output tokens − 1); throughputs are of the time from the first
request's start to the last response. Only answered requests are in the distributions. Left out is
what AIPerf alone knows: its version, its configuration, its telemetry.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import numpy as np

from loadgen.kept import Floats, Kept
from loadgen.report.others.common import Point

SCHEMA_VERSION = "1.4"
FILE = "profile_export_aiperf.json"
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_GOODPUT = {  # our metric of one request → AIPerf's
    "ttft": "time_to_first_token",
    "ttfo": "time_to_first_output_token",
    "tpot": "inter_token_latency",
    "e2e": "request_latency",
}
_UNITS = {
    "inter_chunk_latency": "ms",
    "output_sequence_length": "tokens",
    "input_sequence_length": "tokens",
    "output_token_count": "tokens",
    "reasoning_token_count": "tokens",
    "output_token_throughput_per_user": "tokens/sec/user",
    "prefill_throughput_per_user": "tokens/sec/user",
}


def file_name(point: Point, repeat: int) -> str:
    """AIPerf's own: a folder for each load, further runs of it in `profile_runs`."""
    runs = f"profile_runs/run_{repeat + 1:04d}/" if repeat else ""
    return f"{point.load_name}/{runs}{FILE}"


def document(point: Point) -> dict[str, Any]:
    done = point.requests.where(point.requests.ok)
    samples = _samples(done)
    metrics = {
        name: _distribution(sample[~np.isnan(sample)], _UNITS.get(name, "ms"))
        for name, sample in samples.items()
        if not np.isnan(sample).all()
    }
    run = point.sweep.run
    last = point.index == len(point.sweep.levels) - 1
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark_id": f"{run.id}-{point.index + 1}",
        **metrics,
        **_scalars(point, done, samples),
        "run_info": _run_info(point),
        "was_cancelled": run.interrupted and last,
        "error_summary": _errors(point.requests),
        "start_time": point.started.isoformat(),
        "end_time": (point.started + timedelta(seconds=point.level.duration_s or 0.0)).isoformat(),
        "servefit": point.about(),
    }


def _samples(done: Kept) -> dict[str, Floats]:
    """A value a request (of chunks, a gap), NaN where AIPerf has none."""
    latency = done.last_ms - done.start_ms
    ttft = done.first_ms - done.start_ms
    tokens = done.output_tokens
    itl = np.where(tokens >= 2, (latency - ttft) / np.maximum(tokens - 1, 1), np.nan)
    gaps = [gaps for gaps in done.gaps_ms if gaps is not None]
    second = [gaps[0] if gaps is not None and gaps.size else np.nan for gaps in done.gaps_ms]
    reasons = done.reasoning_tokens.any() and not np.isnan(done.reasoning_tokens).all()
    return {
        "request_latency": latency,
        "time_to_first_token": ttft,
        "time_to_second_token": np.array(second, dtype=np.float64),
        "time_to_first_output_token": done.answer_ms - done.start_ms,
        "inter_token_latency": itl,
        "inter_chunk_latency": np.concatenate(gaps) if gaps else np.empty(0),
        "output_token_throughput_per_user": 1e3 / np.where(itl > 0, itl, np.nan),
        "prefill_throughput_per_user": 1e3 * done.prompt_tokens / np.where(ttft > 0, ttft, np.nan),
        "input_sequence_length": done.prompt_tokens,
        "output_sequence_length": tokens,
        "output_token_count": tokens - np.nan_to_num(done.reasoning_tokens),
        "reasoning_token_count": done.reasoning_tokens if reasons else np.empty(0),
    }


def _distribution(sample: Floats, unit: str) -> dict[str, Any]:
    quantiles = np.percentile(sample, _PERCENTILES)
    return {
        "unit": unit,
        "avg": float(sample.mean()),
        **{f"p{p}": float(value) for p, value in zip(_PERCENTILES, quantiles, strict=True)},
        "min": float(sample.min()),
        "max": float(sample.max()),
        "std": float(sample.std()),
        "count": sample.size,
        "sum": float(sample.sum()),
    }


def _scalars(point: Point, done: Kept, samples: dict[str, Floats]) -> dict[str, Any]:
    """What AIPerf gives as one number; what is not known is left out, as AIPerf leaves it."""
    duration = float(done.last_ms.max() - done.start_ms.min()) / 1e3 if done.n else 0.0
    good = _good(point, samples, done.n)
    prompt, output = done.prompt_tokens.sum(), done.output_tokens.sum()
    reasoning = samples["reasoning_token_count"].sum()
    totals = {
        "request_count": ("requests", float(done.n)),
        "error_request_count": ("requests", float(point.requests.failed.sum())),
        "good_request_count": ("requests", good),
        "total_isl": ("tokens", prompt),
        "total_osl": ("tokens", output),
        "total_output_tokens": ("tokens", samples["output_token_count"].sum()),
        "total_reasoning_tokens": ("tokens", reasoning or np.nan),
        "benchmark_duration": ("sec", duration or np.nan),
    }
    rates = {
        "request_throughput": ("requests/sec", float(done.n)),
        "output_token_throughput": ("tokens/sec", output),
        "total_token_throughput": ("tokens/sec", prompt + output),
        "goodput": ("requests/sec", good),
    }
    if duration:
        totals |= {name: (unit, amount / duration) for name, (unit, amount) in rates.items()}
    return {
        name: {"unit": unit, "avg": float(value)}
        for name, (unit, value) in totals.items()
        if not np.isnan(value)
    }


def _good(point: Point, samples: dict[str, Floats], n: int) -> float:
    """Requests within every target; NaN without an SLO, or with one AIPerf has no metric for."""
    bounds = point.bounds_ms()
    if not bounds or not bounds.keys() <= _GOODPUT.keys():
        return float("nan")
    met = np.ones(n, dtype=bool)
    for metric, bound_ms in bounds.items():
        met &= samples[_GOODPUT[metric]] <= bound_ms  # what a request lacks, it misses
    return float(met.sum())


def _run_info(point: Point) -> dict[str, Any]:
    level, run = point.level, point.sweep.run
    kind, load = (
        ("request_rate", level.offered_rps)
        if level.mode == "rate"
        else ("concurrency", level.concurrency)
    )
    return {
        "benchmark_id": f"{run.id}-{point.index + 1}",
        "sweep_id": run.id,
        "random_seed": run.seed if run.seed >= 0 else None,
        "run_label": point.load_name,
        "variation_label": point.load_name,
        "variation_index": point.index,
        "variation_values": {f"phases.profiling.{kind}": load},
        "cli_command": run.command,
    }


def _errors(requests: Kept) -> list[dict[str, Any]]:
    kinds = Counter(error for error in requests.error if error not in (None, "cancelled"))
    return [
        {"error_details": {"code": _status(kind), "type": kind, "message": kind}, "count": n}
        for kind, n in kinds.items()
    ]


def _status(kind: str | None) -> int | None:
    digits = (kind or "").removeprefix("http_")
    return int(digits) if digits.isdigit() else None
