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


def _histogram(name: str, unit: str, of: str, what: str) -> tuple[Metric, ...]:
    """A histogram's series; the label `le` of a bucket is its upper bound, and +Inf the last."""
    return (
        Metric(f"{name}_sum", unit, "counter", f"{what}, summed."),
        Metric(f"{name}_count", of, "counter", f"How many are in {name}_sum."),
        Metric(f"{name}_bucket", of, "counter", f"{what}: how many up to the bound le."),
    )


def _interval(name: str, ending: str, unit: str, what: str) -> tuple[Metric, ...]:
    """A figure and the ends of its interval, where it has any."""
    return (
        Metric(f"{name}_{ending}", unit, "gauge", f"{what}."),
        Metric(f"{name}_lo_{ending}", unit, "gauge", f"{what}: low end of its interval."),
        Metric(f"{name}_hi_{ending}", unit, "gauge", f"{what}: high end of its interval."),
    )


_ALL = (
    # the inference server
    Metric("requests_running", "1", "gauge", "Requests being computed now."),
    Metric("requests_waiting", "1", "gauge", "Requests admitted but not yet scheduled."),
    Metric("requests_waiting_by_reason", "1", "gauge", "Those waiting, by what they wait for."),
    Metric("kv_usage_ratio", "1", "gauge", "Share of the KV cache in use, 0 to 1."),
    Metric("kv_used_tokens", "{token}", "gauge", "Tokens in the KV cache that are in use."),
    Metric("kv_capacity_tokens", "{token}", "gauge", "Tokens that the KV cache holds."),
    Metric("requests_received_total", "{request}", "counter", "Requests that arrived."),
    Metric("requests_finished_total", "{request}", "counter", "Requests finished, any reason."),
    Metric("requests_aborted_total", "{request}", "counter", "Requests given up by their client."),
    Metric("requests_rejected_total", "{request}", "counter", "Requests refused for being busy."),
    Metric("prompt_tokens_total", "{token}", "counter", "Prompt tokens processed."),
    Metric("output_tokens_total", "{token}", "counter", "Tokens generated."),
    Metric("preemptions_total", "{request}", "counter", "Requests thrown out of the KV cache."),
    Metric("prefix_cache_queries_total", "{token}", "counter", "Tokens looked up in prefix cache."),
    Metric("prefix_cache_hits_total", "{token}", "counter", "Tokens found in the prefix cache."),
    Metric("spec_decode_drafts_total", "1", "counter", "Drafts made by speculative decoding."),
    Metric("spec_decode_draft_tokens_total", "{token}", "counter", "Tokens in those drafts."),
    Metric("spec_decode_accepted_tokens_total", "{token}", "counter", "Draft tokens accepted."),
    *_histogram("queue_seconds", "s", "{request}", "Time requests spent waiting"),
    *_histogram("prefill_seconds", "s", "{request}", "Time requests spent in prefill"),
    *_histogram("decode_seconds", "s", "{request}", "Time requests spent in decode"),
    *_histogram("ttft_seconds", "s", "{request}", "Time to first token by the server"),
    *_histogram("itl_seconds", "s", "{gap}", "Time between tokens by the server"),
    *_histogram("tpot_seconds", "s", "{request}", "Mean time per token of each request"),
    *_histogram("e2e_seconds", "s", "{request}", "Whole time of requests by the server"),
    *_histogram("prompt_length_tokens", "{token}", "{request}", "Prompt tokens of each request"),
    *_histogram("output_length_tokens", "{token}", "{request}", "Output tokens of each request"),
    Metric("replicas_ready", "1", "gauge", "Servers that a gateway sends requests to."),
    Metric("models_loaded", "1", "gauge", "Models in memory, where the server loads by itself."),
    Metric("model_memory_bytes", "By", "gauge", "Memory of the models with their KV cache."),
    Metric("model_memory_gpu_bytes", "By", "gauge", "The part of it that lies on the GPU."),
    Metric("server_start_unix_s", "s", "gauge", "When the server's process began: it restarted."),
    # the GPU; every reading carries the label gpu = UUID
    Metric("gpu_memory_used_bytes", "By", "gauge", "Memory in use, as the driver reports it."),
    Metric("gpu_memory_total_bytes", "By", "gauge", "Memory of the device."),
    Metric("gpu_memory_reserved_bytes", "By", "gauge", "Memory the driver keeps for itself."),
    Metric("gpu_memory_unified", "1", "gauge", "1 where GPU memory is the host's own."),
    Metric("gpu_utilization_ratio", "1", "gauge", "Share of time with any kernel running, 0 to 1."),
    Metric("gpu_memory_busy_ratio", "1", "gauge", "Share of time memory was read or written."),
    Metric("gpu_power_w", "W", "gauge", "Power, from the energy counter where there is one."),
    Metric("gpu_power_polled", "1", "gauge", "1 while gpu_power_w is polled: there is no counter."),
    Metric("gpu_energy_j", "J", "counter", "Energy since the driver was loaded."),
    Metric("gpu_temperature_c", "Cel", "gauge", "Core temperature."),
    Metric("gpu_sm_clock_hz", "Hz", "gauge", "Clock of the multiprocessors."),
    Metric("gpu_memory_clock_hz", "Hz", "gauge", "Clock of the memory."),
    Metric("gpu_throttled", "1", "gauge", "1 while the clocks are held down by heat or power."),
    Metric("gpu_clock_event_reasons", "1", "gauge", "NVML's bits of what sets the clocks now."),
    Metric("gpu_throttled_seconds_total", "s", "counter", "Time held down, by label reason."),
    Metric("gpu_pcie_sent_bytes_per_s", "By/s", "gauge", "What the GPU sent over PCIe."),
    Metric("gpu_pcie_received_bytes_per_s", "By/s", "gauge", "What the GPU received over PCIe."),
    Metric("gpu_pcie_replays_total", "1", "counter", "PCIe packets sent again."),
    Metric("gpu_ecc_corrected_total", "1", "counter", "Memory errors corrected since the reboot."),
    Metric("gpu_ecc_uncorrected_total", "1", "counter", "Memory errors not corrected."),
    Metric("gpu_xid_errors_total", "1", "counter", "Xid errors since the agent looks."),
    Metric("gpu_last_xid", "1", "gauge", "Number of the newest Xid error; 0 for none."),
    Metric("gpu_sm_occupancy_ratio", "1", "gauge", "Warps active against the most possible."),
    Metric("gpu_tensor_active_ratio", "1", "gauge", "Share of time the tensor cores worked."),
    Metric("gpu_dram_active_ratio", "1", "gauge", "Memory bandwidth used against the peak."),
    # parts of a GPU under MIG, with the labels gpu and mig; energy and power are never theirs
    Metric("mig_memory_used_bytes", "By", "gauge", "Memory in use in a MIG instance."),
    Metric("mig_memory_total_bytes", "By", "gauge", "Memory of a MIG instance."),
    # the machine
    Metric("host_cpu_usage_ratio", "1", "gauge", "Share of all processors' time in use, 0 to 1."),
    Metric("host_cpus", "{cpu}", "gauge", "Processors of the machine."),
    Metric("host_load1", "1", "gauge", "Load average of a minute."),
    Metric("host_memory_used_bytes", "By", "gauge", "Memory that could not be given away."),
    Metric("host_memory_total_bytes", "By", "gauge", "Memory of the machine."),
    Metric("host_swap_used_bytes", "By", "gauge", "Swap in use."),
    Metric("host_pressure_seconds_total", "s", "counter", "Time stalled, by resource and share."),
    Metric("host_energy_j", "J", "counter", "Energy of processors or their memory, by domain."),
    # the inference server's process and its descendants, with the label port
    Metric("server_process_cpu_seconds_total", "s", "counter", "Processor time used."),
    Metric("server_process_memory_bytes", "By", "gauge", "Resident memory; shared pages doubled."),
    Metric("server_process_threads", "{thread}", "gauge", "Threads."),
    Metric("server_process_count", "{process}", "gauge", "Processes."),
    Metric("server_process_start_unix_s", "s", "gauge", "When the first process began."),
    # what the agent knows of a server, with the label source = its name (service:NAME of a service)
    Metric("server_gpu", "1", "gauge", "1 for each GPU the server runs on, by label gpu."),
    Metric("slo_bound_s", "s", "gauge", "Bound of a declared target, by metric and statistic."),
    Metric("assessment_unix_s", "s", "gauge", "When the newest verdict was reached."),
    Metric("assessment_finding", "1", "gauge", "1 for the newest verdict's finding."),
    Metric("assessment_confidence", "1", "gauge", "In it: 0 none, 1 low, 2 medium, 3 high."),
    *_interval("assessment_demand", "ratio", "1", "Demand over capacity; above 1 it does not fit"),
    *_interval("assessment_capacity", "requests", "{request}", "Requests at once that it holds"),
    *_interval("assessment_capacity", "requests_per_s", "{request}/s", "Requests/s that it holds"),
    Metric("assessment_energy_j_per_output_token", "J/{token}", "gauge", "Of GPUs, idle included."),
    # its newest measured curve, by label concurrency or offered_rps; of valid levels
    Metric("curve_received_unix_s", "s", "gauge", "When the agent was handed the curve."),
    *_interval("curve_output", "tokens_per_s", "{token}/s", "Output tokens/s at this load"),
    Metric("curve_requests_per_s", "{request}/s", "gauge", "Requests/s at this load."),
    Metric("curve_ttft_p95_s", "s", "gauge", "95th percentile of TTFT at this load."),
    Metric("curve_itl_p95_s", "s", "gauge", "95th percentile of ITL at this load."),
    Metric("curve_kv_usage_ratio", "1", "gauge", "Mean share of the KV cache in use, 0 to 1."),
    Metric("curve_energy_j_per_output_token", "J/{token}", "gauge", "Of GPUs at this load."),
    # the samplers themselves, with the label sampler
    Metric("sampler_ok", "1", "gauge", "1 where the last sample came."),
    Metric("sampler_duration_s", "s", "gauge", "How long the last sample took."),
    Metric("sampler_age_s", "s", "gauge", "Time since the last sample that came."),
    Metric("sampler_errors_total", "1", "counter", "Samples that failed."),
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
