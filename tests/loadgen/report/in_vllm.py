"""Runs in vLLM's interpreter: its own metrics of the file's requests, beside those in the file."""

from __future__ import annotations

import json
import sys
from unittest.mock import MagicMock

# Not needed here, and they bring torchvision, whose build fails beside a CPU build of torch.
for name in ("vllm.benchmarks.datasets", "vllm.tokenizers"):
    sys.modules[name] = MagicMock()

from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput  # noqa: E402
from vllm.benchmarks.serve import calculate_metrics  # noqa: E402

with open(sys.argv[1]) as file:
    found = json.load(file)
outputs = [
    RequestFuncOutput(
        success=not error,
        latency=latency,
        output_tokens=tokens,
        ttft=ttft,
        itl=itl,
        prompt_len=prompt or 0,
        error=error,
        start_time=start,
    )
    for error, latency, tokens, ttft, itl, prompt, start in zip(
        *(found[name] for name in ("errors", "latencies", "output_lens", "ttfts", "itls",
                                   "input_lens", "start_times")),
        strict=True,
    )
]  # fmt: skip
goodput = {"ttft": 60.0, "tpot": 15.0}
own, _ = calculate_metrics([], outputs, found["duration"], None, [50, 90, 95, 99], goodput)
figures = {
    "completed": own.completed,
    "failed": own.failed,
    "total_input_tokens": own.total_input,
    "total_output_tokens": own.total_output,
    "request_throughput": own.request_throughput,
    "request_goodput": own.request_goodput,
    "output_throughput": own.output_throughput,
    "total_token_throughput": own.total_token_throughput,
    "max_output_tokens_per_s": own.max_output_tokens_per_s,
    "max_concurrent_requests": own.max_concurrent_requests,
}
for name in ("ttft", "tpot", "itl", "e2el"):
    for statistic in ("mean", "median", "std"):
        figures[f"{statistic}_{name}_ms"] = getattr(own, f"{statistic}_{name}_ms")
    for p, value in getattr(own, f"percentiles_{name}_ms"):
        figures[f"p{p}_{name}_ms"] = value
wrong = [
    f"{name}: {value} here, {found[name]} in the file"
    for name, value in figures.items()
    if abs(value - found[name]) > 1e-6 * abs(value) + 1e-4  # the lists are rounded to 100 ns
]
print("\n".join(wrong) or "equal")
