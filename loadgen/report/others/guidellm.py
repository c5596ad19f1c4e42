"""GuideLLM's `benchmarks.json`, report version 2 as of GuideLLM 0.8.1: all load points in one file.

Definitions (guidellm/schemas/base/request_stats.py and benchmark/schemas/metrics.py): a request
takes from before its connection is opened until its reply has ended; `time_per_output_token_ms` =
(last chunk − start) / output tokens, first token included, weighted by tokens;
`inter_token_latency_ms` = (last − first chunk) / (output tokens − 1), weighted by those; rates and
concurrency are distributions over time; everything is given by status, where `incomplete` are the
requests that we cut off at a level's end. Where a request has no value GuideLLM counts 0, and so is
it here. Null is what it has no data for: words, characters, images, tool calls, intervals, and what
its own scheduler does (−1, as GuideLLM writes it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadgen.kept import Floats, Kept, Mask
from loadgen.report.others.common import Point
from loadgen.report.others.distribution import concurrency, rate, weighted

_STATUS = {"successful": "completed", "errored": "errored", "incomplete": "cancelled"}
_UNKNOWN = -1.0
_NOTHING = {
    f"{name}{suffix}": None
    for name in ("input", "output", "total")
    for suffix in ("", "_per_second", "_concurrency")
}
_GOODPUT = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2e": "e2el_ms"}


def report(points: Sequence[Point]) -> dict[str, Any]:
    return {
        "metadata": {"version": 2},
        "config": _scenario(points),
        "benchmarks": [_benchmark(point) for point in points],
        "conclusions": [],
    }


def _scenario(points: Sequence[Point]) -> dict[str, Any]:
    """The run as GuideLLM would have been asked for it, and where it really comes from."""
    sweep = points[0].sweep
    labels = {
        "written_by": "servefit",
        "run": sweep.run.id,
        "simulated": str(sweep.run.simulated).lower(),
        "invalid_levels": ",".join(
            str(p.index + 1) for p in points if p.about()["valid"] is False
        ),
        "tokens_source": ",".join(sorted({str(p.about()["tokens_source"]) for p in points})),
    }  # fmt: skip
    return {
        "metadata": {"labels": labels},
        "spec": {
            "backend": _backend(points[0]),
            "profile": _profile(points),
            "data": [_data(points[0])],
            "seed": {"kind": "static", "value": sweep.run.seed},
        },
        "benchmarks": [None],
    }


def _backend(point: Point) -> dict[str, Any]:
    target, endpoint = point.sweep.target, point.sweep.workload.endpoint
    path = {"chat": "/v1/chat/completions"}.get(endpoint, f"/v1/{endpoint}")
    return {
        "kind": "openai_http",
        "target": target.url,
        "model": target.model,
        "request_format": path,
    }


def _profile(points: Sequence[Point]) -> dict[str, Any]:
    rates = [point.level.offered_rps for point in points if point.level.mode == "rate"]
    if rates:
        arrival = points[0].sweep.workload.arrival
        return {"kind": "constant" if arrival == "constant" else "poisson", "rate": rates}
    return {"kind": "concurrent", "streams": [point.level.concurrency for point in points]}


def _data(point: Point) -> dict[str, Any]:
    """Lengths as they really were, on average; GuideLLM asks for whole tokens."""
    requests = point.requests
    prompt, output = _mean(requests.prompt_tokens), _mean(requests.output_tokens)
    return {
        "kind": "synthetic_text",
        "prompt_tokens": max(1, round(prompt)),
        "output_tokens": max(1, round(output)),
    }


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else 0.0


def _strategy(point: Point) -> dict[str, Any]:
    level = point.level
    if level.mode != "rate":
        return {"type_": "concurrent", "streams": level.concurrency}
    if point.sweep.workload.arrival == "constant":
        return {"type_": "constant", "rate": level.offered_rps}
    return {"type_": "poisson", "rate": level.offered_rps, "random_seed": point.sweep.run.seed}


# -------------------------------------------------------------------------------- one load point


class _Level:
    """Columns in Unix time, the figures of each request, and which row has which status."""

    def __init__(self, point: Point) -> None:
        requests = point.requests
        self.requests = requests
        self.status: dict[str, Mask] = {
            "successful": requests.ok,
            "errored": requests.failed,
            "incomplete": requests.cancelled,
        }
        # What failed before it was sent began and ended when it was due, as far as we know.
        start = np.where(np.isnan(requests.start_ms), requests.due_ms, requests.start_ms)
        end = np.where(np.isnan(requests.end_ms), requests.due_ms, requests.end_ms)
        first = requests.first_ms
        last = np.where(np.isnan(first), np.nan, requests.last_ms)
        tokens = requests.output_tokens
        self.latency_s = (end - requests.start_ms) / 1e3
        self.ttft_ms = first - start
        until = np.where(np.isnan(last), end, last)
        self.tpot_ms = np.where(tokens > 0, (until - start) / np.maximum(tokens, 1), np.nan)
        gap = (last - first) / np.maximum(tokens - 1, 1)
        self.itl_ms = np.where(tokens > 1, gap, np.nan)
        origin_s = point.started.timestamp()
        self.due_s, self.start_s, self.end_s, self.first_s, self.answer_s, self.last_s = (
            origin_s + column / 1e3
            for column in (requests.due_ms, start, end, first, requests.answer_ms, last)
        )
        self.window_s = (float(self.start_s.min()), float(self.end_s.max()))
        self.chunks = _chunks(requests)

    def by_status(self, make: Callable[[NDArray[np.int64]], Any]) -> dict[str, Any]:
        """`make` of the rows of each status, and of all: those of one status behind the other."""
        rows = {name: np.flatnonzero(mask) for name, mask in self.status.items()}
        order = [rows["successful"], rows["incomplete"], rows["errored"]]
        return {**{name: make(of) for name, of in rows.items()},
                "total": make(np.concatenate(order))}  # fmt: skip


def _chunks(requests: Kept) -> NDArray[np.int64]:
    """Token-bearing chunks of each request; where they were not kept a token is a chunk."""
    known = np.where(np.isnan(requests.chunks), requests.output_tokens, requests.chunks)
    return np.nan_to_num(np.where(np.isnan(requests.first_ms), 0, known)).astype(np.int64)


def _benchmark(point: Point) -> dict[str, Any]:
    level = _Level(point)
    sweep, (start, end) = point.sweep, level.window_s
    counts = level.by_status(len)
    return {
        "type_": "generative_benchmark",
        "config": {
            "id_": f"{sweep.run.id}-{point.index + 1}",
            "run_id": sweep.run.id,
            "run_index": point.index,
            "strategy": _strategy(point),
            "constraints": {},
            "sample_size": None,
            "prefer_response_metrics": True,
            "slo": _slo(point),
            "confidence": None,
            "profile": _profile([point]),
            "requests": _data(point),
            "backend": _backend(point),
            "environment": {"host": sweep.run.host},
        },
        "scheduler_state": {
            "start_time": start,
            "end_time": end,
            "start_requests_time": start,
            "end_requests_time": end,
            "created_requests": counts["total"],
            "processed_requests": counts["total"],
            "successful_requests": counts["successful"],
            "errored_requests": counts["errored"],
            "cancelled_requests": counts["incomplete"],
        },
        "scheduler_metrics": _scheduler_metrics(level, start, end, counts, point),
        "metrics": _metrics(level, counts, point),
        "requests": {
            **{name: _request_list(level, point, name) for name in level.status},
            "total": None,
        },
        "warnings": [],
        "start_time": start,
        "end_time": end,
        "duration": end - start,
        "warmup_duration": 0.0,
        "cooldown_duration": 0.0,
        "servefit": point.about(),
    }


def _scheduler_metrics(
    level: _Level, start: float, end: float, counts: dict[str, Any], point: Point
) -> dict[str, Any]:
    requests = level.requests
    unknown = (
        "queued_time_avg", "resolve_start_delay_avg", "resolve_targeted_start_delay_avg",
        "request_start_delay_avg", "resolve_end_delay_avg", "resolve_time_avg",
        "finalized_delay_avg", "processed_delay_avg",
    )  # fmt: skip
    sent = ~np.isnan(requests.start_ms)
    late = (requests.start_ms - requests.due_ms)[sent] / 1e3
    taken = level.latency_s[sent]
    return {
        "start_time": start,
        "request_start_time": start,
        "measure_start_time": start,
        "measure_end_time": end,
        "request_end_time": end,
        "end_time": end,
        "requests_made": counts,
        **dict.fromkeys(unknown, _UNKNOWN),
        "request_targeted_start_delay_avg": float(late.mean()) if late.size else _UNKNOWN,
        "request_time_avg": float(taken.mean()) if taken.size else _UNKNOWN,
        "strategy_type": _strategy(point)["type_"],
    }


def _metrics(level: _Level, counts: dict[str, Any], point: Point) -> dict[str, Any]:
    requests, window = level.requests, level.window_s
    ones = np.ones(requests.n)
    prompt, output = np.nan_to_num(requests.prompt_tokens), np.nan_to_num(requests.output_tokens)

    def sample(values: Floats, weights: Floats | None = None, seen: Floats | None = None) -> Any:
        def make(rows: NDArray[np.int64]) -> Any:
            rows = rows if seen is None else rows[~np.isnan(seen[rows])]
            of = None if weights is None else weights[rows]
            return weighted(np.nan_to_num(values)[rows], of)

        return level.by_status(make)

    def over_time(events: list[tuple[Floats, Floats]]) -> Any:
        def make(rows: NDArray[np.int64]) -> Any:
            return rate(*_joined([events[row] for row in rows]), window)

        return level.by_status(make)

    prompts = _prompt_events(level, prompt)
    outputs = _output_events(level, output)
    both = [_joined(list(pair)) for pair in zip(prompts, outputs, strict=True)]
    sizes = [amounts for _, amounts in outputs]
    later = [amounts[1:] if amounts.size > 1 else np.empty(0) for amounts in sizes]

    def pooled(amounts: list[Floats]) -> Any:
        return level.by_status(
            lambda rows: weighted(np.concatenate([*(amounts[row] for row in rows), np.empty(0)]))
        )

    return {
        "request_totals": counts,
        "requests_per_second": level.by_status(
            lambda rows: rate(level.end_s[rows], ones[rows], window)
        ),
        "request_concurrency": level.by_status(
            lambda rows: concurrency(level.start_s[rows], level.end_s[rows], ones[rows], window)
        ),
        "request_latency": sample(level.latency_s),
        **_scheduled(level, sample, point),
        "request_streaming_iterations_count": sample(level.chunks.astype(np.float64)),
        "prompt_token_count": sample(prompt),
        "output_token_count": sample(output),
        "total_token_count": sample(prompt + output),
        "time_to_first_token_ms": sample(level.ttft_ms, seen=level.first_s),
        "time_to_first_output_token_ms": sample(
            requests.answer_ms - requests.start_ms, seen=requests.answer_ms
        ),
        "time_per_output_token_ms": sample(level.tpot_ms, output),
        "inter_token_latency_ms": sample(level.itl_ms, np.where(output > 0, output, 1.0) - 1.0),
        "time_to_last_round_trip_ms": sample(0 * ones),
        "avg_round_trip_time_ms": sample(0 * ones),
        "prompt_tokens_per_second": over_time(prompts),
        "output_tokens_per_second": over_time(outputs),
        "tokens_per_second": over_time(both),
        "output_tokens_per_iteration": pooled(sizes),
        "iter_tokens_per_iteration": pooled(later),
        "text": {
            "tokens": _text_tokens(level),
            "words": _NOTHING,
            "characters": _NOTHING,
        },
        "image": dict.fromkeys(("tokens", "images", "pixels", "bytes"), _NOTHING),
        "video": dict.fromkeys(("tokens", "frames", "seconds", "bytes"), _NOTHING),
        "audio": dict.fromkeys(("tokens", "samples", "seconds", "bytes"), _NOTHING),
        "tool_call": dict.fromkeys(("tokens", "mixed_tokens", "count"), _NOTHING),
        "turns": None,
        **_goodput(level, point),
    }


def _scheduled(level: _Level, sample: Callable[..., Any], point: Point) -> dict[str, Any]:
    """Lateness against the schedule; a closed loop has none, and no request waits for another."""
    requests = level.requests
    sent = requests.start_ms
    late_s = (sent - requests.due_ms) / 1e3
    found = {"root_dispatch_delay": weighted(late_s[~np.isnan(late_s)])}
    if point.level.mode == "rate":
        found["request_dispatch_delay"] = found["turn_scheduling_delay"] = sample(late_s, seen=sent)
        found["turn_predecessor_delay"] = sample(0 * late_s, seen=sent)
        found["request_scheduled_latency"] = sample(level.end_s - level.due_s, seen=sent)
    return found


def _joined(events: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    empty = (np.empty(0), np.empty(0))
    return (
        np.concatenate([at for at, _ in [*events, empty]]),
        np.concatenate([amounts for _, amounts in [*events, empty]]),
    )


def _prompt_events(level: _Level, prompt: Floats) -> list[tuple[Floats, Floats]]:
    """A prompt counts when the first token comes."""
    at = np.where(np.isnan(level.first_s), level.end_s, level.first_s)
    return [(at[row : row + 1], prompt[row : row + 1]) for row in range(at.size)]


def _output_events(level: _Level, output: Floats) -> list[tuple[Floats, Floats]]:
    """One token with the first chunk, the others evenly spaced up to the last."""
    events = []
    for row, (first, last, chunks) in enumerate(
        zip(level.first_s, level.last_s, level.chunks, strict=True)
    ):
        tokens = float(output[row])
        if chunks <= 1 or tokens <= 1:
            at = level.end_s[row] if np.isnan(last) else last
            single = np.array([first]) if chunks > 1 else np.array([at])
            events.append((single, np.array([tokens])))
            continue
        share = (tokens - 1) / (chunks - 1)
        amounts = np.append(1.0, np.full(chunks - 1, share))
        events.append((np.linspace(first, last, chunks), amounts))
    return events


def _text_tokens(level: _Level) -> dict[str, Any]:
    """Tokens a request, their rates by requests' ends, and how many were under way at once."""
    prompt, output = level.requests.prompt_tokens, level.requests.output_tokens
    known = not np.isnan(prompt).all()
    groups = {
        "input": [prompt] if known else [],
        "output": [output],
        "total": [prompt, output] if known else [],
    }
    return {
        f"{name}{suffix}": level.by_status(partial(make, level, parts)) if parts else None
        for name, parts in groups.items()
        for suffix, make in _TEXT.items()
    }


def _text_sizes(level: _Level, parts: list[Floats], rows: NDArray[np.int64]) -> Any:
    values = np.concatenate([part[rows] for part in parts])
    return weighted(values[~np.isnan(values)])


def _text_rate(level: _Level, parts: list[Floats], rows: NDArray[np.int64]) -> Any:
    values = np.concatenate([np.nan_to_num(part[rows]) for part in parts])
    return rate(np.tile(level.end_s[rows], len(parts)), values, None)


def _text_concurrency(level: _Level, parts: list[Floats], rows: NDArray[np.int64]) -> Any:
    values = np.concatenate([np.nan_to_num(part[rows]) for part in parts])
    begin, end = (np.tile(column[rows], len(parts)) for column in (level.start_s, level.end_s))
    return concurrency(begin, end, values, None)


_TEXT = {"": _text_sizes, "_per_second": _text_rate, "_concurrency": _text_concurrency}


def _slo(point: Point) -> dict[str, float] | None:
    bounds = point.bounds_ms()
    if not bounds or not bounds.keys() <= _GOODPUT.keys():
        return None
    return {_GOODPUT[metric]: bound for metric, bound in bounds.items()}


def _goodput(level: _Level, point: Point) -> dict[str, Any]:
    """Against the strictest bounds of the SLO; TPOT is GuideLLM's inter-token latency."""
    slo = _slo(point)
    if slo is None:
        return {"slo_attainment": None, "slo_determined_requests": 0, "request_goodput": None}
    values = {"ttft_ms": level.ttft_ms, "tpot_ms": level.itl_ms, "e2el_ms": 1e3 * level.latency_s}
    ok = level.status["successful"]
    known, met = ok.copy(), ok.copy()
    for name, bound in slo.items():
        known &= ~np.isnan(values[name])
        met &= values[name] <= bound
    determined = int(known.sum() + level.status["errored"].sum())
    if not determined:
        return {"slo_attainment": None, "slo_determined_requests": 0, "request_goodput": None}
    rows = np.flatnonzero(met & known)
    none = np.empty(0)
    good = rate(level.end_s[rows], np.ones(rows.size), level.window_s)
    nothing = rate(none, none, level.window_s)
    return {
        "slo_attainment": rows.size / determined,
        "slo_determined_requests": determined,
        "request_goodput": {
            "successful": good,
            "errored": nothing,
            "incomplete": nothing,
            "total": good,
        },
    }


# ----------------------------------------------------------------------------------- the requests


def _request_list(level: _Level, point: Point, status: str) -> list[dict[str, Any]]:
    """What GuideLLM keeps of each request; without texts, which we do not keep."""
    return [
        _request(level, point, row, status) for row in np.flatnonzero(level.status[status]).tolist()
    ]


def _request(level: _Level, point: Point, row: int, status: str) -> dict[str, Any]:
    requests = level.requests
    identity = f"{point.sweep.run.id}-{point.index + 1}-{row}"

    def instant(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    sent = not np.isnan(requests.start_ms[row])
    chunks = int(level.chunks[row])
    first, last = instant(level.first_s[row]), instant(level.last_s[row])
    begin, end = float(level.start_s[row]), float(level.end_s[row])
    prompt, output = _count(requests.prompt_tokens[row]), _count(requests.output_tokens[row])
    error = requests.error[row]
    return {
        "type_": "generative_request_stats",
        "request_id": identity,
        "info": {
            "request_id": identity,
            "status": _STATUS[status],
            "scheduler_start_time": level.window_s[0],
            "timings": {
                "targeted_start": instant(level.due_s[row]),
                "resolve_start": begin,
                "request_start": begin if sent else None,
                "first_request_iteration": first,
                "first_token_iteration": first,
                "first_output_token_iteration": instant(level.answer_s[row]),
                "last_token_iteration": last,
                "last_request_iteration": last,
                "request_iterations": chunks,
                "token_iterations": chunks,
                "request_end": end if sent else None,
                "resolve_end": end,
            },
            "error": error if status == "errored" else None,
        },
        "input_metrics": {"text_tokens": prompt},
        "output_metrics": {"text_tokens": output},
        "request_start_time": begin,
        "request_end_time": end,
        "request_latency": _known(level.latency_s[row]),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "total_tokens": None
        if prompt is None and output is None
        else (prompt or 0) + (output or 0),
        "time_to_first_token_ms": _known(level.ttft_ms[row]),
        "time_per_output_token_ms": _known(level.tpot_ms[row]),
        "inter_token_latency_ms": _known(level.itl_ms[row]),
    }


def _count(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
