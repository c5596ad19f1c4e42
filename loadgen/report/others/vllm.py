"""The result JSON of `vllm bench serve --save-result --save-detailed`, as of vLLM 0.32.0.

Definitions (vllm/benchmarks/serve.py, calculate_metrics): a request's clock starts before its
connection is opened and stops at its last chunk; TPOT = (latency − TTFT) / (output tokens − 1);
ITL are the gaps between chunks, pooled; standard deviations have no Bessel correction; rates are of
the whole benchmark, its ramp and drain included. Failed requests stand in the lists with zeros.
What we do not know is null: generated texts, and TTFT, TPOT and ITL of replies that were not
streamed. Requests that we cut off at a level's end are left out, because vLLM cuts none off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loadgen.kept import Floats, Kept
from loadgen.report.others.common import Point, integers, seconds

PERCENTILES = (50, 90, 95, 99)
_BACKENDS = {"chat": "openai-chat", "completions": "openai"}
_BURSTINESS = {"poisson": 1.0}  # a shape of gamma; a constant rate has no finite one
_FIGURES: dict[str, Callable[[Floats], float]] = {
    "mean": lambda sample: float(sample.mean()),
    "median": lambda sample: float(np.median(sample)),
    "std": lambda sample: float(sample.std()),
}
_GOODPUT = {"ttft": "ttft", "tpot": "tpot", "e2e": "e2el"}


def file_name(point: Point, repeat: int) -> str:
    """vLLM's own: backend, rate, concurrency, model and instant."""
    level = point.level
    rate = f"{level.offered_rps:g}" if level.offered_rps is not None else "inf"
    held = f"-concurrency{level.concurrency}" if level.concurrency is not None else ""
    model = point.sweep.target.model.split("/")[-1]
    again = f"-{repeat + 1}" if repeat else ""
    return f"{_backend(point)}-{rate}qps{held}-{model}-{_date(point)}{again}.json"


def _backend(point: Point) -> str:
    endpoint = point.sweep.workload.endpoint
    return _BACKENDS.get(endpoint, f"openai-{endpoint}")


def _date(point: Point) -> str:
    return point.started.strftime("%Y%m%d-%H%M%S")


def document(point: Point) -> dict[str, Any]:
    level, sweep = point.level, point.sweep
    asked = point.requests.where(~point.requests.cancelled)
    done = asked.where(asked.ok)
    return {
        "date": _date(point),
        "endpoint_type": _backend(point),
        "backend": _backend(point),
        "label": _backend(point),
        "model_id": sweep.target.model,
        "tokenizer_id": None,
        "num_prompts": asked.n,
        "servefit": point.about(),
        "request_rate": "inf" if level.offered_rps is None else level.offered_rps,
        "burstiness": _burstiness(point),
        "max_concurrency": level.concurrency,
        **_totals(point, asked, done),
        **_detail(asked),
        "max_output_tokens_per_s": _tokens_per_s_max(done),
        "max_concurrent_requests": _concurrent_max(done),
        **_latencies(done),
    }


def _burstiness(point: Point) -> float | None:
    """1 / CV² of the gaps between arrivals; 1, vLLM's default, in closed loop."""
    arrival = point.sweep.workload.arrival or ""
    if point.level.mode != "rate":
        return 1.0
    if arrival.startswith("gamma:"):
        return 1 / float(arrival.removeprefix("gamma:")) ** 2
    return _BURSTINESS.get(arrival)


def _totals(point: Point, asked: Kept, done: Kept) -> dict[str, Any]:
    duration = _duration_s(asked)
    known = not np.isnan(done.prompt_tokens).any()
    prompt = int(done.prompt_tokens.sum()) if known else None
    output = int(np.nansum(done.output_tokens))

    def rate(amount: int | None) -> float | None:
        return None if amount is None or not duration else amount / duration

    return {
        "duration": duration,
        "completed": done.n,
        "failed": asked.n - done.n,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": rate(done.n),
        "request_goodput": rate(_good(point, done)),
        "output_throughput": rate(output),
        "total_token_throughput": rate(None if prompt is None else prompt + output),
    }


def _duration_s(asked: Kept) -> float:
    """From the level's start, or the first connection opened before it, to the last end."""
    if not asked.n:
        return 0.0
    first = min(0.0, float(np.nanmin(np.append(asked.start_ms, 0.0))))
    return float(np.nanmax(asked.end_ms) - first) / 1e3


def _ttft_ms(requests: Kept) -> Floats:
    return requests.first_ms - requests.start_ms


def _latency_ms(requests: Kept) -> Floats:
    return requests.last_ms - requests.start_ms


def _tpot_ms(requests: Kept) -> Floats:
    several = requests.output_tokens > 1
    gap = _latency_ms(requests) - _ttft_ms(requests)
    return np.where(several, gap / np.maximum(requests.output_tokens - 1, 1), np.nan)


def _good(point: Point, done: Kept) -> int | None:
    """None without an SLO, or with one that `--goodput` cannot say."""
    bounds = point.bounds_ms()
    if not bounds or not bounds.keys() <= _GOODPUT.keys():
        return None
    tpot = np.where(done.output_tokens > 1, _tpot_ms(done), 0.0)
    values = {"ttft": _ttft_ms(done), "tpot": tpot, "e2e": _latency_ms(done)}
    met = np.ones(done.n, dtype=bool)
    for metric, bound_ms in bounds.items():
        met &= values[metric] <= bound_ms
    return int(met.sum())


def _detail(asked: Kept) -> dict[str, Any]:
    ok = asked.ok
    return {
        "input_lens": integers(asked.prompt_tokens),
        "output_lens": integers(np.where(ok, asked.output_tokens, 0)),
        "ttfts": [value or 0.0 for value in seconds(_ttft_ms(asked))],
        "itls": [None if gaps is None else seconds(gaps) for gaps in asked.gaps_ms],
        "latencies": [
            value if fine and value else 0.0
            for value, fine in zip(seconds(_latency_ms(asked)), ok, strict=True)
        ],
        "start_times": seconds(np.where(np.isnan(asked.start_ms), asked.due_ms, asked.start_ms)),
        "errors": [error or "" for error in asked.error],
    }  # fmt: skip


def _tokens_per_s_max(done: Kept) -> float | None:
    """The most chunks in any whole second since the first request, as vLLM counts them."""
    if not done.n or any(gaps is None for gaps in done.gaps_ms) or np.isnan(done.first_ms).any():
        return None
    begins = done.first_ms - done.start_ms.min()
    stamps = [
        begin + np.append(0.0, np.cumsum(gaps))
        for begin, gaps in zip(begins, done.gaps_ms, strict=True)
        if gaps is not None
    ]
    return float(np.bincount((np.concatenate(stamps) / 1e3).astype(np.int64)).max())


def _concurrent_max(done: Kept) -> int:
    """The most requests that were active at any moment of a whole second."""
    if not done.n:
        return 0
    first = ((done.start_ms - done.start_ms.min()) / 1e3).astype(np.int64)
    last = ((done.last_ms - done.start_ms.min()) / 1e3).astype(np.int64)
    active = np.zeros(int(last.max()) + 2, dtype=np.int64)
    np.add.at(active, first, 1)
    np.add.at(active, last + 1, -1)
    return int(np.cumsum(active).max())


def _latencies(done: Kept) -> dict[str, Any]:
    gaps = [gaps for gaps in done.gaps_ms if gaps is not None]
    samples = {
        "ttft": _ttft_ms(done),
        "tpot": _tpot_ms(done),
        "itl": np.concatenate(gaps) if gaps else np.empty(0),
        "e2el": _latency_ms(done),
    }
    found: dict[str, Any] = {}
    for name, sample in samples.items():
        known = sample[~np.isnan(sample)]
        for statistic, figure in _FIGURES.items():
            found[f"{statistic}_{name}_ms"] = figure(known) if known.size else None
        for p in PERCENTILES:
            value = float(np.percentile(known, p)) if known.size else None
            found[f"p{p}_{name}_ms"] = value
    return found
