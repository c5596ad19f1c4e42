"""The catalogue: every series by its canonical name, with unit, kind and meaning.

A sampler may only emit readings whose name stands here; whatever is exported is named from here.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["gauge", "counter"]


class Metric(msgspec.Struct, frozen=True):
    name: str
    unit: str
    kind: Kind
    help: str


_ALL = (
    # the inference server
    Metric("requests_running", "1", "gauge", "Requests being computed now."),
    Metric("requests_waiting", "1", "gauge", "Requests admitted but not yet scheduled."),
    Metric("kv_usage_ratio", "1", "gauge", "Share of the KV cache in use, 0 to 1."),
    Metric("kv_capacity_tokens", "{token}", "gauge", "Tokens that the KV cache holds."),
    Metric("requests_finished_total", "{request}", "counter", "Requests finished, any reason."),
    Metric("prompt_tokens_total", "{token}", "counter", "Prompt tokens processed."),
    Metric("output_tokens_total", "{token}", "counter", "Tokens generated."),
    Metric("preemptions_total", "{request}", "counter", "Requests thrown out of the KV cache."),
    Metric("prefix_cache_queries_total", "{token}", "counter", "Tokens looked up in prefix cache."),
    Metric("prefix_cache_hits_total", "{token}", "counter", "Tokens found in the prefix cache."),
    Metric("queue_seconds_sum", "s", "counter", "Time requests spent waiting, summed."),
    Metric("queue_seconds_count", "{request}", "counter", "Requests in queue_seconds_sum."),
    Metric("prefill_seconds_sum", "s", "counter", "Time requests spent in prefill, summed."),
    Metric("prefill_seconds_count", "{request}", "counter", "Requests in prefill_seconds_sum."),
    Metric("decode_seconds_sum", "s", "counter", "Time requests spent in decode, summed."),
    Metric("decode_seconds_count", "{request}", "counter", "Requests in decode_seconds_sum."),
    Metric("ttft_seconds_sum", "s", "counter", "Time to first token, summed by the server."),
    Metric("ttft_seconds_count", "{request}", "counter", "Requests in ttft_seconds_sum."),
    Metric("itl_seconds_sum", "s", "counter", "Time between tokens, summed by the server."),
    Metric("itl_seconds_count", "{gap}", "counter", "Gaps in itl_seconds_sum."),
    Metric("e2e_seconds_sum", "s", "counter", "Whole time of requests, summed by the server."),
    Metric("e2e_seconds_count", "{request}", "counter", "Requests in e2e_seconds_sum."),
    Metric("server_start_unix_s", "s", "gauge", "When the server's process began: it restarted."),
    # the GPU; every reading carries the label gpu = UUID
    Metric("gpu_memory_used_bytes", "By", "gauge", "Memory in use, as the driver reports it."),
    Metric("gpu_memory_total_bytes", "By", "gauge", "Memory of the device."),
    Metric("gpu_utilization_ratio", "1", "gauge", "Share of time with any kernel running, 0 to 1."),
    Metric("gpu_power_w", "W", "gauge", "Power, from the energy counter where there is one."),
    Metric("gpu_energy_j", "J", "counter", "Energy since the driver was loaded."),
    Metric("gpu_temperature_c", "Cel", "gauge", "Core temperature."),
    Metric("gpu_throttled", "1", "gauge", "1 while the clocks are held down by heat or power."),
    # the agent itself
    Metric("agent_start_unix_s", "s", "gauge", "When the agent began."),
    Metric("agent_cpu_seconds_total", "s", "counter", "Processor time that the agent used."),
    Metric("agent_memory_bytes", "By", "gauge", "The agent's resident memory."),
    Metric("agent_store_bytes", "By", "gauge", "Size of the database."),
    Metric("agent_store_writer_lag_s", "s", "gauge", "Age of the oldest reading not yet written."),
    Metric("agent_outbox_pending", "{request}", "gauge", "Requests not yet taken by the back end."),
    Metric("agent_outbox_bytes", "By", "gauge", "Size of the requests that wait, compressed."),
    Metric("agent_outbox_sent_total", "{request}", "counter", "Requests the back end took."),
    Metric("agent_outbox_dropped_total", "{request}", "counter", "Requests given up."),
    Metric("agent_outbox_rejected_points_total", "{point}", "counter", "Points not taken."),
)

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _ALL}
