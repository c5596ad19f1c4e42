"""What inference servers call things: a table for each, and how a page becomes readings.

A dialect is a table from our canonical names (`agent.metrics`) to the names a server uses. Adding
a server means adding a table. What is not on a page is simply not read; `missing` says what that
costs and what brings it.

Sources of the names: vLLM 0.32 (recorded pages) and its older releases; SGLang 0.5.23
`metrics_collector.py`; TGI 3.3.6 `router`, `backends/v3`; llama.cpp `server-task.cpp` (0c1e57098);
TensorRT-LLM `metrics/collector.py` (2026-11); tensorrtllm_backend `custom_metrics_reporter.cc`;
Dynamo 1.6.1 `prometheus_names.py`; LMDeploy 0.16.0 `metrics/loggers.py`; llm-d-router 0.10
`pkg/epp/metrics`, which took the endpoint picker over from gateway-api-inference-extension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import msgspec

from agent.metrics import CATALOGUE
from agent.model import Reading
from agent.samplers.exposition import NUMBER, Heads, Page, Sample

BUCKETS_MAX = 256  # of one histogram; TGI has 101
GROUPS_MAX = 32  # values of one label that become readings of their own
TEXT_MAX = 200  # characters of a label that is kept

T = TypeVar("T")

# ---------------------------------------------------------------------------------------- tables

Aggregate = Literal["sum", "mean", "max"]


class Series(msgspec.Struct, frozen=True):
    """Where one canonical series is found on a page.

    `names`: newest first; the first that is on the page is read and the others are left alone,
    because servers keep old names beside new ones for a while. A counter's `_total` is optional.
    `aggregate`: how the label sets (ranks, finish reasons) become one value: counts are summed,
    fractions averaged. `scale`: factor to the catalogue's unit. `where`: only the lines whose label
    has one of these values, or lacks the label. `among`: (label, name), only the lines whose label
    has a value that it also has on series `name`. `by`: one reading for each value of this label.
    """

    names: tuple[str, ...]
    aggregate: Aggregate = "sum"
    scale: float = 1.0
    where: tuple[str, tuple[str, ...]] | None = None
    among: tuple[str, str] | None = None
    by: str | None = None


class FromLabels(msgspec.Struct, frozen=True):
    """A figure that a server writes into labels: the product of `labels` of series `name`."""

    name: str
    labels: tuple[str, ...]
    aggregate: Aggregate


class Two(msgspec.Struct, frozen=True):
    """A figure that takes two series: absent where either is, or where it would divide by 0."""

    first: Series
    sign: Literal["+", "-", "*", "/"]
    second: Series


Source = Series | FromLabels | Two
Sources = tuple[Source, ...]  # alternatives, best first


class Dialect(msgspec.Struct, frozen=True):
    """One server's table. `marks`: beginnings of series names that only this server has.

    `histograms`: canonical names without `_sum`, `_count`, `_bucket`. `repeated`: labels of ranks
    that work on the same requests and each write them down; the lowest is read, and only ranks
    that share the requests out (data parallel) add up. `info`: series whose labels are the
    server's settings, `settings`: gauges that are: both make the fingerprint. `beside`: a small
    page, relative to the metrics page, that has more. `proxies`: what a series really is where it
    is not quite what its name says. `brings`: what makes the server write a series that is missing;
    the empty name stands for every other.
    """

    name: str
    marks: tuple[str, ...]
    series: Mapping[str, Sources]
    histograms: Mapping[str, tuple[Series, ...]]
    model_label: str = "model_name"
    repeated: tuple[str, ...] = ()
    info: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    beside: str = ""
    proxies: Mapping[str, str] = {}
    brings: Mapping[str, str] = {}


def _sources(**table: Source | Sources) -> dict[str, Sources]:
    started = Series(("process_start_time_seconds",), aggregate="max")
    given = {"server_start_unix_s": started, **table}
    return {key: one if isinstance(one, tuple) else (one,) for key, one in given.items()}


def _only(label: str, *values: str) -> tuple[str, tuple[str, ...]]:
    return (label, values)


def _histograms(**table: Series | tuple[str, ...] | str) -> dict[str, tuple[Series, ...]]:
    def series(entry: Series | tuple[str, ...] | str) -> Series:
        if isinstance(entry, Series):
            return entry
        return Series((entry,) if isinstance(entry, str) else entry)

    return {key: (series(entry),) for key, entry in table.items()}


VLLM = Dialect(
    name="vllm",
    marks=("vllm:",),
    series=_sources(
        requests_running=Series(("vllm:num_requests_running",)),
        requests_waiting=Series(("vllm:num_requests_waiting",)),
        requests_waiting_by_reason=Series(("vllm:num_requests_waiting_by_reason",), by="reason"),
        kv_usage_ratio=Series(
            ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), aggregate="mean"
        ),
        kv_capacity_tokens=(
            # Each data-parallel rank writes its own capacity …
            FromLabels("vllm:cache_config_info", ("kv_cache_size_tokens",), "sum"),
            # … but num_gpu_blocks is summed over the ranks before every rank writes it.
            FromLabels("vllm:cache_config_info", ("num_gpu_blocks", "block_size"), "max"),
        ),
        requests_finished_total=Series(("vllm:request_success",)),
        requests_aborted_total=Series(
            ("vllm:request_success",), where=_only("finished_reason", "abort")
        ),
        requests_rejected_total=Series(("vllm:admission_rejections",)),
        prompt_tokens_total=Series(("vllm:prompt_tokens",)),
        output_tokens_total=Series(("vllm:generation_tokens",)),
        preemptions_total=Series(("vllm:num_preemptions",)),
        prefix_cache_queries_total=Series(
            ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries")
        ),
        prefix_cache_hits_total=Series(("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits")),
        spec_decode_drafts_total=Series(("vllm:spec_decode_num_drafts",)),
        spec_decode_draft_tokens_total=Series(("vllm:spec_decode_num_draft_tokens",)),
        spec_decode_accepted_tokens_total=Series(("vllm:spec_decode_num_accepted_tokens",)),
    ),
    histograms=_histograms(
        queue_seconds=("vllm:request_queue_time_seconds", "vllm:time_in_queue_requests"),
        prefill_seconds="vllm:request_prefill_time_seconds",
        decode_seconds="vllm:request_decode_time_seconds",
        ttft_seconds="vllm:time_to_first_token_seconds",
        itl_seconds=(
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
        ),
        tpot_seconds="vllm:request_time_per_output_token_seconds",
        e2e_seconds="vllm:e2e_request_latency_seconds",
        prompt_length_tokens="vllm:request_prompt_tokens",
        output_length_tokens="vllm:request_generation_tokens",
    ),
    info=("vllm:cache_config_info",),
    proxies={
        "requests_aborted_total": "requests whose client went away are not in it (vLLM 0.32)",
    },
    brings={
        "requests_rejected_total": "vLLM 0.32 or newer with --max-num-queued-reqs",
        "": "start it without --disable-log-stats",
    },
)

# Schedulers of one data-parallel rank run the same requests: attention ranks other than 0 write
# only with --enable-metrics-for-all-schedulers, pipeline ranks always. The tokenizer's own series
# (tokens, TTFT, E2E) carry no rank. With priorities, a scheduler's gauge stands under "" as the
# total and under each priority as its part, where the tokenizer's counters really add up.
_SGLANG_TOTAL = _only("priority", "")
SGLANG = Dialect(
    name="sglang",
    marks=("sglang:",),
    series=_sources(
        requests_running=Series(("sglang:num_running_reqs",), where=_SGLANG_TOTAL),
        requests_waiting=Series(("sglang:num_queue_reqs",), where=_SGLANG_TOTAL),
        kv_usage_ratio=Series(("sglang:token_usage",), aggregate="mean", where=_SGLANG_TOTAL),
        kv_used_tokens=Series(
            ("sglang:kv_used_tokens", "sglang:num_used_tokens"), where=_SGLANG_TOTAL
        ),
        kv_capacity_tokens=Series(("sglang:max_total_num_tokens",)),
        requests_finished_total=Series(("sglang:num_requests",)),
        requests_aborted_total=Series(("sglang:num_aborted_requests",)),
        prompt_tokens_total=Series(("sglang:prompt_tokens",)),
        output_tokens_total=Series(("sglang:generation_tokens",)),
        preemptions_total=Series(("sglang:num_retracted_requests",)),
        prefix_cache_queries_total=Series(("sglang:prompt_tokens",)),
        prefix_cache_hits_total=Series(("sglang:cached_tokens",)),
        spec_decode_drafts_total=Series(("sglang:spec_verify_calls",)),
    ),
    histograms=_histograms(
        queue_seconds="sglang:queue_time_seconds",
        prefill_seconds=Series(
            ("sglang:per_stage_req_latency_seconds",), where=_only("stage", "prefill_forward")
        ),
        ttft_seconds="sglang:time_to_first_token_seconds",
        itl_seconds=("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
        tpot_seconds="sglang:request_time_per_output_token_seconds",
        e2e_seconds="sglang:e2e_request_latency_seconds",
        prompt_length_tokens="sglang:prompt_tokens_histogram",
        output_length_tokens="sglang:generation_tokens_histogram",
    ),
    repeated=("tp_rank", "pp_rank", "moe_ep_rank"),
    settings=("sglang:max_total_num_tokens", "sglang:page_size", "sglang:context_len"),
    brings={"": "start it with --enable-metrics"},
)

TGI = Dialect(
    name="tgi",
    marks=("tgi_",),
    series=_sources(
        requests_running=Series(("tgi_batch_current_size",)),
        requests_waiting=Series(("tgi_queue_size",)),
        kv_usage_ratio=Two(
            Series(("tgi_batch_current_max_tokens",)),
            "/",
            Series(("tgi_batch_max_total_tokens",)),
        ),
        kv_capacity_tokens=Series(("tgi_batch_max_total_tokens",)),
        requests_received_total=Series(("tgi_request_count",)),
        requests_finished_total=Series(("tgi_request_success",)),
        requests_aborted_total=Series(("tgi_request_failure",), where=_only("err", "dropped")),
        requests_rejected_total=Series(("tgi_request_failure",), where=_only("err", "overloaded")),
        prompt_tokens_total=Series(("tgi_request_input_length_sum",)),
        output_tokens_total=Series(("tgi_request_generated_tokens_sum",)),
    ),
    histograms=_histograms(
        queue_seconds="tgi_request_queue_duration",
        prefill_seconds=Series(("tgi_batch_inference_duration",), where=_only("method", "prefill")),
        itl_seconds=Series(("tgi_batch_inference_duration",), where=_only("method", "decode")),
        tpot_seconds="tgi_request_mean_time_per_token_duration",
        e2e_seconds="tgi_request_duration",
        prompt_length_tokens="tgi_request_input_length",
        output_length_tokens="tgi_request_generated_tokens",
    ),
    settings=("tgi_batch_max_total_tokens",),
    proxies={
        "kv_usage_ratio": "tokens that the batch may grow to, over the most that a batch may hold",
        "prefill_seconds": "the time of a batch's prefill, once for each batch",
        "itl_seconds": "the time of a batch's decode step, once for each step",
        "tpot_seconds": "inference time over tokens, prefill included",
    },
)

LLAMA_CPP = Dialect(
    name="llama.cpp",
    marks=("llamacpp:",),
    series=_sources(
        requests_running=Series(("llamacpp:requests_processing",)),
        requests_waiting=Series(("llamacpp:requests_deferred",)),
        # Old releases wrote it on the page; now it is made of /slots.
        kv_usage_ratio=Series(("llamacpp:kv_cache_usage_ratio",), aggregate="mean"),
        prompt_tokens_total=(
            Two(
                Series(("llamacpp:prompt_tokens_total",)),
                "+",
                Series(("llamacpp:prompt_tokens_cached_total",)),
            ),
            Series(("llamacpp:prompt_tokens_total",)),
        ),
        output_tokens_total=Series(("llamacpp:tokens_predicted_total",)),
        prefix_cache_queries_total=Two(
            Series(("llamacpp:prompt_tokens_total",)),
            "+",
            Series(("llamacpp:prompt_tokens_cached_total",)),
        ),
        prefix_cache_hits_total=Series(("llamacpp:prompt_tokens_cached_total",)),
        prefill_seconds_sum=Series(("llamacpp:prompt_seconds_total",)),
        itl_seconds_sum=Series(("llamacpp:tokens_predicted_seconds_total",)),
        itl_seconds_count=Series(("llamacpp:tokens_predicted_total",)),
        spec_decode_drafts_total=Series(("llamacpp:spec_decode_num_drafts_total",)),
        spec_decode_draft_tokens_total=Series(("llamacpp:spec_decode_num_draft_tokens_total",)),
        spec_decode_accepted_tokens_total=Series(
            ("llamacpp:spec_decode_num_accepted_tokens_total",)
        ),
    ),
    histograms={},
    beside="slots",
    proxies={
        "kv_usage_ratio": "tokens of the busy slots over the context of all slots; with a unified "
        "KV cache, which the page does not tell, the true share is higher",
    },
    brings={
        "kv_usage_ratio": "start it without --no-slots",
        "kv_used_tokens": "start it without --no-slots",
        "": "start it with --metrics",
    },
)

_TRTLLM_ITERATIONS = "enable_iter_perf_stats: true in its --extra_llm_api_options file"
TRTLLM = Dialect(
    name="tensorrt-llm",
    marks=("trtllm_",),
    series=_sources(
        requests_running=Series(("trtllm_num_requests_running",)),
        requests_waiting=Series(("trtllm_num_requests_waiting",)),
        kv_usage_ratio=Series(("trtllm_kv_cache_utilization",), aggregate="mean"),
        kv_used_tokens=Two(
            Series(("trtllm_kv_cache_used_blocks",)),
            "*",
            Series(("trtllm_kv_cache_tokens_per_block",), aggregate="mean"),
        ),
        kv_capacity_tokens=Two(
            Series(("trtllm_kv_cache_max_blocks",)),
            "*",
            Series(("trtllm_kv_cache_tokens_per_block",), aggregate="mean"),
        ),
        requests_finished_total=Series(("trtllm_request_success",)),
        requests_aborted_total=Series(("trtllm_num_aborted_requests",)),
        requests_rejected_total=Series(
            ("trtllm_request_error",), where=_only("http_code", "429", "503")
        ),
        prompt_tokens_total=Series(("trtllm_prompt_tokens",)),
        output_tokens_total=Series(("trtllm_generation_tokens",)),
        prefix_cache_queries_total=Series(("trtllm_prompt_tokens",)),
        prefix_cache_hits_total=Series(("trtllm_prompt_cached_tokens",)),
        spec_decode_draft_tokens_total=Series(("trtllm_spec_decode_num_draft_tokens",)),
        spec_decode_accepted_tokens_total=Series(("trtllm_spec_decode_num_accepted_tokens",)),
    ),
    histograms=_histograms(
        queue_seconds="trtllm_request_queue_time_seconds",
        prefill_seconds="trtllm_request_prefill_time_seconds",
        decode_seconds="trtllm_request_decode_time_seconds",
        ttft_seconds="trtllm_time_to_first_token_seconds",
        itl_seconds="trtllm_time_per_output_token_seconds",
        tpot_seconds="trtllm_time_per_output_token_seconds",
        e2e_seconds="trtllm_e2e_request_latency_seconds",
    ),
    info=(
        "trtllm_model_config_info",
        "trtllm_parallel_config_info",
        "trtllm_speculative_config_info",
        "trtllm_kv_cache_config_info",
    ),
    settings=("trtllm_kv_cache_max_blocks", "trtllm_max_batch_size_static"),
    proxies={"itl_seconds": "the mean of each request (TPOT), once for each request"},
    brings={
        "requests_running": _TRTLLM_ITERATIONS,
        "requests_waiting": _TRTLLM_ITERATIONS,
        "kv_usage_ratio": _TRTLLM_ITERATIONS,
        "kv_capacity_tokens": _TRTLLM_ITERATIONS,
        "": "return_perf_metrics: true in its --extra_llm_api_options file",
    },
)


def _triton_kv(kind: str) -> Series:
    return Series(("nv_trt_llm_kv_cache_block_metrics",), where=_only("kv_cache_block_type", kind))


def _triton_requests(kind: str) -> Series:
    return Series(("nv_trt_llm_request_metrics",), where=_only("request_type", kind))


_TRITON_LLM = ("model", "nv_trt_llm_request_metrics")
TRITON = Dialect(
    name="triton-trtllm",
    marks=("nv_trt_llm_",),
    series=_sources(
        requests_running=(_triton_requests("active"), _triton_requests("scheduled")),
        requests_waiting=_triton_requests("waiting"),
        kv_usage_ratio=(
            msgspec.structs.replace(_triton_kv("fraction"), aggregate="mean"),
            Two(_triton_kv("used"), "/", _triton_kv("max")),
        ),
        kv_used_tokens=Two(
            _triton_kv("used"),
            "*",
            msgspec.structs.replace(_triton_kv("tokens_per"), aggregate="mean"),
        ),
        kv_capacity_tokens=Two(
            _triton_kv("max"),
            "*",
            msgspec.structs.replace(_triton_kv("tokens_per"), aggregate="mean"),
        ),
        # An ensemble and each of its steps count the same requests.
        requests_finished_total=Series(("nv_inference_request_success",), among=_TRITON_LLM),
        prompt_tokens_total=Series(("nv_llm_input_token_len_sum",)),
        output_tokens_total=Series(("nv_llm_output_token_len_sum",)),
        e2e_seconds_sum=Series(
            ("nv_inference_request_duration_us",), scale=1e-6, among=_TRITON_LLM
        ),
        e2e_seconds_count=Series(("nv_inference_request_success",), among=_TRITON_LLM),
    ),
    histograms=_histograms(
        prompt_length_tokens="nv_llm_input_token_len",
        output_length_tokens="nv_llm_output_token_len",
    ),
    model_label="",  # its models are the steps of one ensemble
    proxies={"e2e_seconds": "inside the model's own step, without its tokenizer's"},
)

_GENERATE = _only("dynamo_endpoint", "generate")


@lru_cache(8)  # a prefix is what a page says: there may be many
def _dynamo(prefix: str) -> Dialect:
    """Dynamo's table; its frontend's names may begin otherwise (DYN_METRICS_PREFIX)."""
    frontend = f"{prefix}_"
    in_flight = Series((f"{frontend}active_requests", f"{frontend}inflight_requests"))
    queued = Series((f"{frontend}queued_requests",))
    requests = Series((f"{frontend}requests", "dynamo_component_requests"), where=_GENERATE)
    return Dialect(
        name="dynamo",
        marks=("dynamo_", frontend),
        series=_sources(
            # What is in flight holds what waits for its first token.
            requests_running=(
                Two(in_flight, "-", queued),
                in_flight,
                Series(("dynamo_component_inflight_requests",), where=_GENERATE),
            ),
            requests_waiting=queued,
            kv_usage_ratio=Series(("dynamo_component_gpu_cache_usage_percent",), aggregate="mean"),
            requests_received_total=Series((f"{frontend}requests_started",)),
            requests_finished_total=requests,
            requests_aborted_total=(
                Series((f"{frontend}model_cancellation",)),
                Series((f"{frontend}requests",), where=_only("error_type", "cancelled")),
            ),
            requests_rejected_total=Series((f"{frontend}model_rejection",)),
            prompt_tokens_total=Series((f"{frontend}input_sequence_tokens_sum",)),
            output_tokens_total=Series(
                (f"{frontend}output_tokens", f"{frontend}output_sequence_tokens_sum")
            ),
            prefix_cache_queries_total=Series((f"{frontend}input_sequence_tokens_sum",)),
            prefix_cache_hits_total=Series((f"{frontend}cached_tokens_sum",)),
        ),
        histograms=_histograms(
            ttft_seconds=f"{frontend}time_to_first_token_seconds",
            itl_seconds=f"{frontend}inter_token_latency_seconds",
            e2e_seconds=Series(
                (
                    f"{frontend}request_duration_seconds",
                    "dynamo_component_request_duration_seconds",
                ),
                where=_GENERATE,
            ),
            prompt_length_tokens=f"{frontend}input_sequence_tokens",
            output_length_tokens=f"{frontend}output_sequence_tokens",
        ),
        model_label="model",
        settings=(
            f"{frontend}model_context_length",
            f"{frontend}model_kv_cache_block_size",
            f"{frontend}model_max_num_seqs",
            f"{frontend}model_max_num_batched_tokens",
        ),
        proxies={
            "requests_waiting": "requests that have no token yet, those in prefill among them",
        },
        brings={
            "kv_usage_ratio": "the worker's own page: start it with DYN_SYSTEM_PORT=8081",
            "kv_capacity_tokens": "the worker's own page: start it with DYN_SYSTEM_PORT=8081",
            "preemptions_total": "the worker's own page: start it with DYN_SYSTEM_PORT=8081",
            "queue_seconds": "the worker's own page: start it with DYN_SYSTEM_PORT=8081",
        },
    )


DYNAMO_PREFIX = "dynamo_frontend"
DYNAMO = _dynamo(DYNAMO_PREFIX)

LMDEPLOY = Dialect(
    name="lmdeploy",
    marks=("lmdeploy:",),
    series=_sources(
        requests_running=Series(("lmdeploy:num_requests_running",)),
        requests_waiting=Series(("lmdeploy:num_requests_waiting",)),
        kv_usage_ratio=Series(("lmdeploy:gpu_cache_usage_perc",), aggregate="mean"),
        requests_finished_total=Series(("lmdeploy:request_success",)),
        requests_aborted_total=Series(
            ("lmdeploy:request_success",),
            where=_only("finished_reason", "ResponseType.CANCEL"),
        ),
        requests_rejected_total=Series(
            ("lmdeploy:request_success",),
            where=_only("finished_reason", "ResponseType.NO_QUEUE"),
        ),
        prompt_tokens_total=Series(("lmdeploy:prompt_tokens",)),
        output_tokens_total=Series(("lmdeploy:generation_tokens",)),
        # Both when a request ends, so that they speak of the same requests.
        prefix_cache_queries_total=Series(("lmdeploy:request_prompt_tokens_sum",)),
        prefix_cache_hits_total=Series(("lmdeploy:cached_tokens",)),
        spec_decode_drafts_total=Series(("lmdeploy:spec_decode_num_drafts",)),
        spec_decode_draft_tokens_total=Series(("lmdeploy:spec_decode_num_draft_tokens",)),
        spec_decode_accepted_tokens_total=Series(("lmdeploy:spec_decode_num_accepted_tokens",)),
    ),
    histograms=_histograms(
        queue_seconds="lmdeploy:request_queue_time_seconds",
        prefill_seconds="lmdeploy:request_prefill_time_seconds",
        decode_seconds="lmdeploy:request_decode_time_seconds",
        ttft_seconds="lmdeploy:time_to_first_token_seconds",
        itl_seconds="lmdeploy:iter_token_latency",
        tpot_seconds="lmdeploy:time_per_output_token_seconds",
        e2e_seconds="lmdeploy:e2e_request_latency_seconds",
        prompt_length_tokens="lmdeploy:request_prompt_tokens",
        output_length_tokens="lmdeploy:request_generation_tokens",
    ),
    info=("lmdeploy:backend_config_info",),
    brings={"": "start it without --disable-metrics"},
)


def _epp(new: str, objective: str | None = None) -> tuple[str, ...]:
    """A request series of the endpoint picker by the names it had: each was renamed twice."""
    old = objective or new
    return (f"llm_d_epp_{new}", f"inference_objective_{old}", f"inference_model_{old}")


def _pool(new: str, old: str | None = None) -> Series:
    return Series((f"llm_d_epp_{new}", f"inference_pool_{old or new}"), aggregate="mean")


_READY = Series(("llm_d_epp_ready_endpoints", "inference_pool_ready_pods"))
EPP = Dialect(
    name="gateway-epp",
    marks=("llm_d_epp_", "inference_pool_", "inference_objective_", "inference_model_"),
    series=_sources(
        # Means over the pool's servers, once for each pool; a picker has one pool.
        requests_running=(
            Two(_pool("average_running_requests"), "*", _READY),
            Series(_epp("request_running", "running_requests")),
        ),
        requests_waiting=Two(_pool("average_queue_size"), "*", _READY),
        kv_usage_ratio=_pool("average_kv_cache_utilization"),
        replicas_ready=_READY,
        requests_received_total=Series(_epp("request")),
        requests_finished_total=Series(_epp("request_duration_seconds_count")),
        requests_rejected_total=Series(
            _epp("request_error"),
            where=_only("error_code", "ResourceExhausted", "InferencePoolResourceExhausted"),
        ),
        prompt_tokens_total=Series(_epp("request_input_tokens_sum", "input_tokens_sum")),
        output_tokens_total=Series(_epp("request_output_tokens_sum", "output_tokens_sum")),
        prefix_cache_queries_total=Series(_epp("request_input_tokens_sum", "input_tokens_sum")),
        prefix_cache_hits_total=Series(
            _epp("request_cached_tokens_sum", "prompt_cached_tokens_sum")
        ),
    ),
    histograms=_histograms(
        queue_seconds=(
            "llm_d_epp_flow_control_request_queue_duration_seconds",
            "inference_extension_flow_control_request_queue_duration_seconds",
        ),
        ttft_seconds=_epp("request_ttft_seconds"),
        itl_seconds="llm_d_epp_request_streaming_itl_seconds",
        tpot_seconds=_epp("request_streaming_tpot_seconds", "request_tpot_seconds"),
        e2e_seconds=_epp("request_duration_seconds"),
        prompt_length_tokens=_epp("request_input_tokens", "input_tokens"),
        output_length_tokens=_epp("request_output_tokens", "output_tokens"),
    ),
    info=("llm_d_epp_info", "inference_extension_info"),
    proxies={
        "requests_running": "the mean of the pool's servers times the servers that are ready",
        "requests_waiting": "the mean of the pool's servers times the servers that are ready",
        "queue_seconds": "time in the gateway's own queue",
    },
)

DIALECTS: tuple[Dialect, ...] = (
    VLLM,
    SGLANG,
    TGI,
    LLAMA_CPP,
    TRTLLM,
    TRITON,
    DYNAMO,
    LMDEPLOY,
    EPP,
)

# Not found by its page, for it has none: what it tells is in /api/ps.
OLLAMA = Dialect(name="ollama", marks=(), series={}, histograms={})


def _both(
    first: Mapping[str, tuple[T, ...]], second: Mapping[str, tuple[T, ...]]
) -> dict[str, tuple[T, ...]]:
    return {key: (*first.get(key, ()), *second.get(key, ())) for key in {**first, **second}}


def _under(engine: Dialect, dynamo: Dialect) -> Dialect:
    """A page on which Dynamo passes its engine's series through: each figure counts once.

    The engine's own word comes first, because it knows its scheduler and its cache; Dynamo's fills
    what the engine does not write.
    """

    return msgspec.structs.replace(
        engine,
        name=f"dynamo+{engine.name}",
        series=_both(engine.series, dynamo.series),
        histograms=_both(engine.histograms, dynamo.histograms),
        settings=(*engine.settings, *dynamo.settings),
        brings={**dynamo.brings, **engine.brings},
    )


# ------------------------------------------------------------------------- what is on the page

# Of Dynamo's frontend alone; its router's series of the same ending begin with `dynamo_`.
_DYNAMO_TELLS = b"_input_sequence_tokens histogram"
_RENAMED = re.compile(
    rb"# TYPE (?!dynamo_)([a-zA-Z_:][a-zA-Z0-9_:]{0,99})" + re.escape(_DYNAMO_TELLS)
)


def page(buckets: bool = False, prefix: str = DYNAMO_PREFIX, heads: Heads | None = None) -> Page:
    """An empty page that keeps what any dialect wants; `prefix`: see `prefix_of`."""
    return Page(_wanted(buckets, prefix), _DYNAMO_TELLS, heads)


def prefix_of(taken: Page) -> str:
    """How Dynamo's frontend begins its names on this page: it may have been told another prefix.

    Where the answer differs from the prefix that the page was read with, read it again with this.
    """
    match = _RENAMED.match(taken.told)
    return match[1].decode() if match else DYNAMO_PREFIX


def recognise(taken: Page, prefix: str = DYNAMO_PREFIX) -> Dialect | None:
    """The dialect with most of its names among the lines kept; None for an unknown server."""
    names = {line.split(b"{", 1)[0].split()[0] for line in taken.kept}

    def score(dialect: Dialect) -> int:
        marks = tuple(mark.encode() for mark in dialect.marks)
        return sum(name.startswith(marks) for name in names)

    dynamo = _dynamo(prefix)
    behind = score(dynamo)
    engine = max((one for one in DIALECTS if one is not DYNAMO), key=score)
    if not score(engine):
        return dynamo if behind else None
    return _under(engine, dynamo) if behind else engine


@lru_cache(8)
def _wanted(buckets: bool, prefix: str) -> frozenset[bytes]:
    tables = (*(one for one in DIALECTS if one is not DYNAMO), _dynamo(prefix))
    return frozenset(name.encode() for one in tables for name in _page_names(one, buckets))


def _page_names(dialect: Dialect, buckets: bool) -> Iterable[str]:
    for canonical, sources in dialect.series.items():
        counter = CATALOGUE[canonical].kind == "counter"
        for name in (name for source in sources for name in _names(source)):
            yield name
            if counter:
                yield f"{name}_total"
    for parts in dialect.histograms.values():
        for name in (name for series in parts for name in series.names):
            yield from (f"{name}_sum", f"{name}_count")
            if buckets:
                yield f"{name}_bucket"
    yield from dialect.info
    yield from dialect.settings


def _names(source: Source) -> tuple[str, ...]:
    if isinstance(source, Series):
        return source.names
    if isinstance(source, FromLabels):
        return (source.name,)
    return (*source.first.names, *source.second.names)


# ------------------------------------------------------------------------------------- readings

ByName = dict[str, list[Sample]]


def detect(text: bytes) -> Dialect | None:
    """Which server wrote this page; None for one that no table here describes."""
    taken = _whole(text, buckets=False, prefix=DYNAMO_PREFIX)
    prefix = prefix_of(taken)
    if prefix != DYNAMO_PREFIX:
        taken = _whole(text, buckets=False, prefix=prefix)
    return recognise(taken, prefix)


def parse(
    text: bytes, dialect: Dialect, at_ns: int, model: str | None = None, *, buckets: bool = False
) -> list[Reading]:
    """The canonical readings of a whole page, in the catalogue's units.

    `at_ns`: time.monotonic_ns() when the answer arrived. `model`, `buckets`: see `readings`.
    """
    taken = _whole(text, buckets, prefix=DYNAMO_PREFIX)
    prefix = prefix_of(taken)
    if prefix != DYNAMO_PREFIX:
        taken = _whole(text, buckets, prefix)
    return readings(taken.read(), dialect, at_ns, model, buckets=buckets)


def _whole(text: bytes, buckets: bool, prefix: str) -> Page:
    taken = page(buckets, prefix)
    taken.feed(text)
    taken.end()
    return taken


def models(samples: Iterable[Sample], dialect: Dialect) -> set[str]:
    """The models that a page speaks of."""
    return {one.labels[dialect.model_label] for one in samples if dialect.model_label in one.labels}


def readings(
    samples: list[Sample],
    dialect: Dialect,
    at_ns: int,
    model: str | None = None,
    *,
    buckets: bool = False,
) -> list[Reading]:
    """Canonical readings from parsed samples.

    `model` leaves out other models' series where the page speaks of several. A page of one model
    is taken whole: the label holds the first served name, a request may use an alias or an adapter.
    Series without a model label (cache_config_info, the process's start) always count. `buckets`:
    also the histograms' cumulative counts `NAME_bucket` with the label le, bounds as on the page.
    """
    if model is not None and len(models(samples, dialect)) > 1:
        samples = [one for one in samples if one.labels.get(dialect.model_label, model) == model]
    by_name: ByName = {}
    for one in _once(samples, dialect.repeated):
        by_name.setdefault(one.name, []).append(one)
    found: list[Reading] = []
    for canonical, sources in dialect.series.items():
        counter = CATALOGUE[canonical].kind == "counter"
        values = next((v for v in (_values(one, by_name, counter) for one in sources) if v), [])
        found += [Reading(at_ns, canonical, value, labels) for labels, value in values]
    for canonical, alternatives in dialect.histograms.items():
        found += _histogram(canonical, alternatives, by_name, at_ns, buckets)
    return found


def _once(samples: list[Sample], repeated: tuple[str, ...]) -> Iterable[Sample]:
    """Each series of the lowest of the ranks that repeat it."""
    if not repeated:
        return samples
    lowest: dict[object, tuple[tuple[int, ...], Sample]] = {}
    for one in samples:
        rest = tuple(sorted(pair for pair in one.labels.items() if pair[0] not in repeated))
        rank = tuple(_rank(one.labels.get(label, "")) for label in repeated)
        kept = lowest.get((one.name, rest))
        if kept is None or rank < kept[0]:
            lowest[one.name, rest] = rank, one
    return [one for _, one in lowest.values()]


def _rank(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else -1


Values = list[tuple[tuple[tuple[str, str], ...], float]]  # (labels of the reading, value)


def _values(source: Source, by_name: ByName, counter: bool) -> Values:
    """The readings of one source; empty where the page lacks it."""
    if isinstance(source, FromLabels):
        value = _from_labels(source, by_name)
    elif isinstance(source, Two):
        value = _two(source, by_name)
    elif source.by is not None:
        return _by_label(source, source.by, by_name)
    else:
        value = _value(source, by_name)
        if value is None and counter and source.where and _found(source, by_name):
            value = 0.0  # it counts, and none of these has happened yet
    return [] if value is None else [((), value)]


def _found(series: Series, by_name: ByName) -> list[Sample]:
    for name in series.names:
        found = by_name.get(name) or by_name.get(f"{name}_total")
        if found:
            return found
    return []


def _chosen(found: list[Sample], where: tuple[str, tuple[str, ...]] | None) -> list[Sample]:
    if where is None:
        return found
    label, allowed = where
    return [one for one in found if one.labels.get(label, allowed[0]) in allowed]


def _value(series: Series, by_name: ByName) -> float | None:
    found = _chosen(_found(series, by_name), series.where)
    if series.among is not None:
        label, name = series.among
        known = {one.labels.get(label) for one in by_name.get(name, ())}
        found = [one for one in found if one.labels.get(label) in known]
    values = [one.value for one in found]
    return _AGGREGATES[series.aggregate](values) * series.scale if values else None


def _by_label(series: Series, label: str, by_name: ByName) -> Values:
    groups: dict[str, list[float]] = {}
    for one in _chosen(_found(series, by_name), series.where):
        text = one.labels.get(label, "")
        if text and len(text) <= TEXT_MAX and (text in groups or len(groups) < GROUPS_MAX):
            groups.setdefault(text, []).append(one.value)
    aggregate = _AGGREGATES[series.aggregate]
    return [
        (((label, text),), aggregate(values) * series.scale)
        for text, values in sorted(groups.items())
    ]


def _two(source: Two, by_name: ByName) -> float | None:
    first, second = _value(source.first, by_name), _value(source.second, by_name)
    if first is None or second is None:
        return None
    if source.sign == "/":
        return first / second if second else None
    if source.sign == "*":
        return first * second
    # Gauges of one page are not of one instant: a difference may come out below nothing.
    return first + second if source.sign == "+" else max(first - second, 0.0)


def _from_labels(source: FromLabels, by_name: ByName) -> float | None:
    products = [
        # vLLM writes Python's "None" before the cache is sized.
        math.prod(_figure(one.labels.get(label, "")) for label in source.labels)
        for one in by_name.get(source.name, ())
    ]
    usable = [product for product in products if math.isfinite(product) and product > 0]
    return _AGGREGATES[source.aggregate](usable) if usable else None


def _figure(text: str) -> float:
    return float(text) if NUMBER.match(text.encode()) else math.nan


def _histogram(
    canonical: str,
    alternatives: tuple[Series, ...],
    by_name: ByName,
    at_ns: int,
    buckets: bool,
) -> list[Reading]:
    """Sum and count of the first histogram that is on the page, and its buckets if asked for."""
    for series in alternatives:
        for name in series.names:
            counts = _chosen(by_name.get(f"{name}_count", []), series.where)
            if not counts:
                continue
            sums = _chosen(by_name.get(f"{name}_sum", []), series.where)
            found = [
                Reading(at_ns, f"{canonical}_{part}", math.fsum(one.value for one in values))
                for part, values in (("sum", sums), ("count", counts))
                if values
            ]
            if buckets:
                lines = _chosen(by_name.get(f"{name}_bucket", []), series.where)
                found += _buckets(f"{canonical}_bucket", lines, at_ns)
            return found
    return []


def _buckets(canonical: str, lines: list[Sample], at_ns: int) -> list[Reading]:
    """Cumulative buckets, label sets added up, bounds ascending.

    None of them where they cannot be a histogram: bounds that differ between label sets, counts
    that fall, no +Inf, or more than BUCKETS_MAX.
    """
    bounds: dict[float, list[float]] = {}
    for one in lines:
        bounds.setdefault(_figure(one.labels.get("le", "")), []).append(one.value)
    totals = [(bound, math.fsum(bounds[bound])) for bound in sorted(bounds)]
    counts = [total for _, total in totals]
    if (
        not 0 < len(totals) <= BUCKETS_MAX
        or totals[-1][0] != math.inf
        or len({len(values) for values in bounds.values()}) > 1
        or counts != sorted(counts)
    ):
        return []
    return [Reading(at_ns, canonical, total, (("le", _le(bound)),)) for bound, total in totals]


def _le(bound: float) -> str:
    """A bound as prometheus_client writes it, so that a series is called the same everywhere."""
    return "+Inf" if bound == math.inf else repr(bound)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


_AGGREGATES: dict[Aggregate, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "mean": _mean,
    "max": max,
}


# ----------------------------------------------------------------------------------- fingerprint

_NO_SETTING = frozenset(("engine", "le", "worker_id", "dp_rank", "tp_rank", "pp_rank"))
PAIRS_MAX = 200
SIMULATED = ("servefit.simulated", "1")  # in the fingerprint of a server without hardware


def fingerprint(samples: Iterable[Sample], dialect: Dialect) -> tuple[tuple[str, str], ...]:
    """What the page tells of model and settings, as sorted pairs; where it changes, they did.

    No page tells the server's version but the endpoint picker's (its commit).
    """
    pairs: dict[str, set[str]] = {}

    def add(key: str, text: str) -> None:
        if len(text) <= TEXT_MAX and (key in pairs or len(pairs) < PAIRS_MAX):
            pairs.setdefault(key, set()).add(text)

    for one in samples:
        if dialect.model_label in one.labels:
            add("model", one.labels[dialect.model_label])
        if one.name in dialect.info:
            for label, text in one.labels.items():
                if label not in _NO_SETTING:
                    add(f"{one.name}.{label}", text)
        elif one.name in dialect.settings:
            add(one.name, f"{one.value:g}")
    return tuple((key, ",".join(sorted(texts)[:10])) for key, texts in sorted(pairs.items()))


# --------------------------------------------------------------------------------------- missing


class Missing(NamedTuple):
    canonical: str  # a histogram without its `_count`
    costs: str
    brings: str


_COSTS = {
    "requests_running": "no concurrency: neither demand nor the passive curve",
    "requests_waiting": "queueing is not seen",
    "kv_usage_ratio": "whether memory is the limit cannot be told",
    "kv_capacity_tokens": "how many tokens fit is not known",
    "requests_finished_total": "no requests per second",
    "requests_aborted_total": "requests that users gave up are not seen",
    "requests_rejected_total": "requests that the server refused are not seen",
    "prompt_tokens_total": "no prompt tokens per second",
    "output_tokens_total": "no output tokens per second, and no energy per token",
    "preemptions_total": "a full KV cache cannot be told from a busy one",
    "prefix_cache_hits_total": "what the prefix cache saves is not known",
    "queue_seconds": "no time in the queue",
    "ttft_seconds": "no time to first token: an SLO on it is not watched",
    "itl_seconds": "no time between tokens: an SLO on it is not watched, no passive curve of it",
    "e2e_seconds": "no time of whole requests",
    "prompt_length_tokens": "prompt lengths are known as a mean only, if at all",
    "output_length_tokens": "output lengths are known as a mean only, if at all",
}


def missing(found: Iterable[Reading], dialect: Dialect) -> list[Missing]:
    """What these readings of one page lack, what that costs, and what brings it."""
    names = {one.name for one in found}
    return [
        Missing(canonical, costs, _brings(canonical, dialect))
        for canonical, costs in _COSTS.items()
        if canonical not in names and f"{canonical}_count" not in names
    ]


def _brings(canonical: str, dialect: Dialect) -> str:
    if canonical in dialect.brings:
        return dialect.brings[canonical]
    if canonical in dialect.series or canonical in dialect.histograms:
        return dialect.brings.get("", "nothing here: this release of it does not write it")
    return f"nothing here: {dialect.name} does not write it"


# ------------------------------------------------------------------------------- pages beside


class _Slot(msgspec.Struct):
    n_ctx: int = 0
    is_processing: bool = False
    n_prompt_tokens: int | None = None


class _Loaded(msgspec.Struct):
    size: int = 0
    size_vram: int = 0
    context_length: int = 0
    model: str = ""


class _Ps(msgspec.Struct):
    models: list[_Loaded]


def slots(text: bytes, at_ns: int) -> list[Reading]:
    """The KV cache of llama.cpp from its /slots: tokens that the busy slots hold, and their share.

    A slot's prompt holds what was generated so far. Idle slots keep their tokens for the next
    request but give them up at once, so they count as free, as everywhere. ValueError for what is
    no such page; nothing where a release before the count of tokens wrote it.
    """
    found = msgspec.json.decode(text, type=list[_Slot])
    busy = [one for one in found if one.is_processing]
    context = sum(max(one.n_ctx, 0) for one in found)
    if not context or any(one.n_prompt_tokens is None for one in busy):
        return []
    used = sum(one.n_prompt_tokens or 0 for one in busy)
    return [
        Reading(at_ns, "kv_used_tokens", float(used)),
        Reading(at_ns, "kv_usage_ratio", min(used / context, 1.0)),
    ]


def ollama(text: bytes, at_ns: int) -> tuple[list[Reading], tuple[tuple[str, str], ...]]:
    """Readings and fingerprint of Ollama's /api/ps, which is all that it tells.

    `size_vram` is GPU memory with weights and KV cache; what is left of `size` lies in host memory.
    ValueError for what is no such page.
    """
    loaded = msgspec.json.decode(text, type=_Ps).models
    pairs = {(f"model.{one.model[:TEXT_MAX]}", str(one.context_length)) for one in loaded}
    return [
        Reading(at_ns, "models_loaded", float(len(loaded))),
        Reading(at_ns, "model_memory_bytes", float(sum(one.size for one in loaded))),
        Reading(at_ns, "model_memory_gpu_bytes", float(sum(one.size_vram for one in loaded))),
    ], tuple(sorted(pairs)[:PAIRS_MAX])
