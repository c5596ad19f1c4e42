from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.metrics import CATALOGUE
from agent.model import Reading
from agent.samplers import dialects
from agent.samplers.dialects import (
    DIALECTS,
    SGLANG,
    VLLM,
    Dialect,
    detect,
    missing,
    parse,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
BUSY = (GOLDEN / "vllm-0.32.0-busy.txt").read_bytes()
DRAINED = (GOLDEN / "vllm-0.32.0-drained.txt").read_bytes()


def values(page: bytes, model: str | None = None) -> dict[str, float]:
    readings = parse(page, VLLM, 7, model)
    return only_plain(readings)


def only_plain(readings: list[Reading]) -> dict[str, float]:
    """Values of readings without labels, each of which may stand there once."""
    assert all(one.at_ns == 7 and one.name in CATALOGUE for one in readings)
    assert len({(one.name, one.labels) for one in readings}) == len(readings)
    return {one.name: one.value for one in readings if not one.labels}


def test_every_name_is_in_the_catalogue() -> None:
    for dialect in DIALECTS:
        names = {f"{one}_{part}" for one in dialect.histograms for part in ("sum", "bucket")}
        assert dialect.series.keys() | names <= CATALOGUE.keys()
        known = dialect.series.keys() | dialect.histograms.keys() | dialects._COSTS.keys()
        beside = {"kv_used_tokens"} if dialect.beside else set()
        assert dialect.proxies.keys() | dialect.brings.keys() <= known | beside | {""}


# ---------------------------------------------------------------------------------------- vLLM


def test_a_real_page_of_a_busy_vllm() -> None:
    assert detect(BUSY) is VLLM
    assert values(BUSY) == {
        "requests_running": 48,
        "requests_waiting": 0,
        "kv_usage_ratio": 0.027284380150155663,
        "kv_capacity_tokens": 524288,
        "requests_finished_total": 24,
        "requests_aborted_total": 0,
        "requests_rejected_total": 0,
        "prompt_tokens_total": 18660,
        "output_tokens_total": 3707,
        "preemptions_total": 0,
        "prefix_cache_queries_total": 18660,
        "prefix_cache_hits_total": 5088,
        "queue_seconds_sum": 0.6181786690005993,
        "queue_seconds_count": 24,
        "prefill_seconds_sum": 4.442838040998595,
        "prefill_seconds_count": 24,
        "decode_seconds_sum": 11.3907466940002,
        "decode_seconds_count": 24,
        "ttft_seconds_sum": 28.660789966583252,
        "ttft_seconds_count": 72,
        "itl_seconds_sum": 63.0107036779973,
        "itl_seconds_count": 3635,
        "e2e_seconds_sum": 21.16596031188965,
        "e2e_seconds_count": 24,
        "tpot_seconds_sum": 0.22718912115628104,
        "tpot_seconds_count": 24,
        "prompt_length_tokens_sum": 3372,
        "prompt_length_tokens_count": 24,
        "output_length_tokens_sum": 1236,
        "output_length_tokens_count": 24,
        "server_start_unix_s": 1795420449.24,
    }


def test_requests_finished_are_summed_over_reasons_and_lack_the_aborted() -> None:
    # 24 + 48 requests were sent and one of them was cut off by its client: vLLM 0.32 counts
    # finished requests only.
    assert values(DRAINED)["requests_finished_total"] == 71
    assert values(DRAINED)["requests_running"] == 0


def test_a_page_of_50_kb_takes_a_millisecond() -> None:
    def once() -> float:
        began = time.perf_counter()
        parse(BUSY, VLLM, 0)
        return time.perf_counter() - began

    assert len(BUSY) > 50_000
    # The best of many: the machine does other things too. 0.6 ms where it was written.
    assert min(once() for _ in range(50)) < 3e-3


def test_data_parallel_ranks_are_joined_rightly() -> None:
    lines = [
        'vllm:num_requests_running{engine="0",model_name="m"} 3',
        'vllm:num_requests_running{engine="1",model_name="m"} 5',
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25',
        'vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75',
        'vllm:cache_config_info{engine="0",kv_cache_size_tokens="1000"} 1',
        'vllm:cache_config_info{engine="1",kv_cache_size_tokens="1000"} 1',
    ]
    assert values("\n".join(lines).encode()) == {
        "requests_running": 8,  # counts add up
        "kv_usage_ratio": 0.5,  # fractions do not
        "kv_capacity_tokens": 2000,
    }


@pytest.mark.parametrize(
    ("labels", "tokens"),
    [
        (['num_gpu_blocks="100",block_size="16"'], 1600),
        # num_gpu_blocks is the sum over the ranks already, on each of them
        (['engine="0",num_gpu_blocks="200",block_size="16"'] * 2, 3200),
        (['kv_cache_size_tokens="None",num_gpu_blocks="10",block_size="32"'], 320),
        (['kv_cache_size_tokens="None",num_gpu_blocks="None",block_size="32"'], None),
        (['num_gpu_blocks="0",block_size="32"'], None),
        (['block_size="32"'], None),
        (['kv_cache_size_tokens="many"'], None),
    ],
)
def test_kv_capacity(labels: list[str], tokens: float | None) -> None:
    page = "".join(f"vllm:cache_config_info{{{one}}} 1.0\n" for one in labels)
    assert values(page.encode()).get("kv_capacity_tokens") == tokens


def test_old_names_count_where_the_new_are_missing() -> None:
    old = b"""\
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:gpu_prefix_cache_queries_total{model_name="m"} 10
vllm:gpu_prefix_cache_hits_total{model_name="m"} 4
vllm:time_per_output_token_seconds_sum{model_name="m"} 2.5
vllm:time_per_output_token_seconds_count{model_name="m"} 100
"""
    expected = {
        "kv_usage_ratio": 0.5,
        "prefix_cache_queries_total": 10,
        "prefix_cache_hits_total": 4,
        "itl_seconds_sum": 2.5,
        "itl_seconds_count": 100,
    }
    assert values(old) == expected
    # Releases that write both mean the new one.
    assert values(old + b"vllm:kv_cache_usage_perc 0.125\n") == {
        **expected,
        "kv_usage_ratio": 0.125,
    }


def test_counters_with_and_without_total() -> None:
    assert values(b"vllm:prompt_tokens 5\n") == {"prompt_tokens_total": 5}
    assert values(b"vllm:prompt_tokens_total 6\n") == {"prompt_tokens_total": 6}
    # A gauge's name gets no suffix, and a histogram whose name ends so is none of ours.
    assert values(b"vllm:num_requests_running_total 6\nvllm:iteration_tokens_total_sum 9\n") == {}


TWO_MODELS = b"""\
vllm:num_requests_running{model_name="a"} 1
vllm:num_requests_running{model_name="b"} 10
vllm:cache_config_info{kv_cache_size_tokens="64"} 1
"""


@pytest.mark.parametrize(("model", "running"), [("a", 1), ("b", 10), (None, 11), ("neither", None)])
def test_several_models_on_a_page(model: str | None, running: float | None) -> None:
    found = values(TWO_MODELS, model)
    assert found.pop("kv_capacity_tokens") == 64  # has no model_name
    assert found.get("requests_running") == running


def test_an_alias_of_the_only_model_is_that_model() -> None:
    assert values(BUSY, "an-adapter")["requests_running"] == 48


def test_detect_knows_others_not() -> None:
    assert detect(b"") is None
    assert detect(b"process_start_time_seconds 5\nhttp_requests_total 3\n") is None
    assert detect(b"<html>vllm:num_requests_running 1</html>") is None


# -------------------------------------------------------------------------------- every server

# What the pages were written to say; by hand, from the lines of each.
TRUTH: dict[str, tuple[str, dict[str, float]]] = {
    # 6 + 3 on two data-parallel ranks, each told by two tensor-parallel ranks, the total under
    # priority ""; half and a quarter of their caches.
    "sglang-0.5.23-tp2-dp2.txt": (
        "sglang",
        {
            "requests_running": 9,
            "requests_waiting": 3,
            "kv_usage_ratio": 0.375,
            "kv_used_tokens": 75_000,
            "kv_capacity_tokens": 200_000,
            "requests_finished_total": 40,
            "requests_aborted_total": 3,
            "prompt_tokens_total": 24_000,
            "output_tokens_total": 840,
            "preemptions_total": 3,
            "prefix_cache_queries_total": 24_000,
            "prefix_cache_hits_total": 3_000,
            "spec_decode_drafts_total": 280,
            "queue_seconds_count": 40,
            "prefill_seconds_sum": 1.6,
            "ttft_seconds_sum": 17.6,
            "itl_seconds_count": 800,
            "e2e_seconds_count": 40,
            "prompt_length_tokens_sum": 24_000,
        },
    ),
    "tgi-3.3.6.txt": (
        "tgi",
        {
            "requests_running": 5,
            "requests_waiting": 1,
            "kv_usage_ratio": 0.25,
            "kv_capacity_tokens": 16_384,
            "requests_received_total": 40,
            "requests_finished_total": 28,
            "requests_aborted_total": 2,
            "requests_rejected_total": 3,
            "prompt_tokens_total": 7_200,
            "output_tokens_total": 1_400,
            "prefill_seconds_count": 12,
            "itl_seconds_sum": 12,
            "itl_seconds_count": 600,
            "tpot_seconds_count": 28,
            "e2e_seconds_sum": 51.8,
            "queue_seconds_sum": 0.378,
        },
    ),
    "llama.cpp-0c1e57098.txt": (
        "llama.cpp",
        {
            "requests_running": 3,
            "requests_waiting": 2,
            "prompt_tokens_total": 6_400,
            "output_tokens_total": 2_000,
            "prefix_cache_queries_total": 6_400,
            "prefix_cache_hits_total": 1_280,
            "prefill_seconds_sum": 2.56,
            "itl_seconds_sum": 40,
            "itl_seconds_count": 2_000,
        },
    ),
    "tensorrt-llm-2026-11.txt": (
        "tensorrt-llm",
        {
            "requests_running": 7,
            "requests_waiting": 3,
            "kv_usage_ratio": 0.125,
            "kv_used_tokens": 32_000,
            "kv_capacity_tokens": 256_000,
            "requests_finished_total": 20,
            "requests_rejected_total": 2,
            "prompt_tokens_total": 10_000,
            "prefix_cache_hits_total": 2_500,
            "spec_decode_accepted_tokens_total": 300,
            "ttft_seconds_sum": 1,
            "itl_seconds_sum": 0.4,
            "decode_seconds_sum": 18,
        },
    ),
    "triton-tensorrtllm-backend.txt": (
        "triton-trtllm",
        {
            "requests_running": 12,
            "requests_waiting": 4,
            "kv_usage_ratio": 0.25,
            "kv_used_tokens": 99_840,
            "kv_capacity_tokens": 399_360,
            "requests_finished_total": 88,  # not once more for each step of the ensemble
            "prompt_tokens_total": 17_600,
            "e2e_seconds_sum": 80,
            "e2e_seconds_count": 88,
        },
    ),
    **dict.fromkeys(
        ("dynamo-1.6.1-frontend.txt", "dynamo-1.6.1-frontend-renamed.txt"),
        (
            "dynamo",
            {
                "requests_running": 9,  # of 14 in flight 5 wait
                "requests_waiting": 5,
                "requests_received_total": 64,
                "requests_finished_total": 50,
                "requests_aborted_total": 2,
                "requests_rejected_total": 1,
                "prompt_tokens_total": 5_400,
                "output_tokens_total": 560,
                "prefix_cache_hits_total": 3_000,
                "ttft_seconds_sum": 4,
                "itl_seconds_count": 500,
                "e2e_seconds_sum": 75,
                "output_length_tokens_sum": 550,
            },
        ),
    ),
    "lmdeploy-0.16.0.txt": (
        "lmdeploy",
        {
            "requests_running": 8,
            "requests_waiting": 4,
            "kv_usage_ratio": 0.375,
            "requests_finished_total": 41,
            "requests_aborted_total": 3,
            "prompt_tokens_total": 20_500,
            "output_tokens_total": 1_025,
            "prefix_cache_queries_total": 20_500,
            "prefix_cache_hits_total": 5_125,
            "spec_decode_drafts_total": 100,
            "itl_seconds_count": 123,
            "e2e_seconds_sum": 123,
            "prompt_length_tokens_count": 41,
        },
    ),
    "gateway-epp-0.10.txt": (  # old and new names side by side
        "gateway-epp",
        {
            "requests_running": 24,  # 6 on each of 4
            "requests_waiting": 2,
            "kv_usage_ratio": 0.41,
            "replicas_ready": 4,
            "requests_received_total": 100,
            "requests_finished_total": 70,
            "requests_rejected_total": 3,
            "prompt_tokens_total": 14_000,
            "prefix_cache_hits_total": 3_500,
            "itl_seconds_count": 700,
        },
    ),
    "gateway-epp-1.0.txt": (
        "gateway-epp",
        {
            "requests_running": 26,
            "requests_waiting": 2,
            "kv_usage_ratio": 0.41,
            "replicas_ready": 4,
            "requests_received_total": 100,
            "e2e_seconds_count": 70,
        },
    ),
}


@pytest.mark.parametrize("name", TRUTH)
def test_a_page_of_every_server(name: str) -> None:
    text = (GOLDEN / name).read_bytes()
    engine, truth = TRUTH[name]
    dialect = recognised(text)
    assert dialect.name == engine
    found = only_plain(parse(text, dialect, 7, buckets=True))
    assert {key: found.get(key) for key in truth} == pytest.approx(truth)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.txt")))
def test_every_histogram_ends_with_its_count(name: str) -> None:
    text = (GOLDEN / name).read_bytes()
    found = parse(text, recognised(text), 7, buckets=True)
    counts = {one.name: one.value for one in found if one.name.endswith("_count")}
    buckets: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        if one.name.endswith("_bucket"):
            ((label, bound),) = one.labels
            assert label == "le"
            buckets.setdefault(one.name, []).append((float(bound), one.value))
    assert buckets or name.startswith("llama.cpp")
    for key, cumulative in buckets.items():
        assert cumulative == sorted(cumulative)
        assert cumulative[-1] == (math.inf, counts[key.replace("_bucket", "_count")])
    # Without buckets, the same and nothing else.
    plain = parse(text, recognised(text), 7)
    assert plain == [one for one in found if not one.name.endswith("_bucket")]


def recognised(text: bytes) -> Dialect:
    dialect = detect(text)
    assert dialect is not None
    return dialect


def test_an_engine_behind_dynamo_counts_once() -> None:
    text = (GOLDEN / "dynamo-1.6.1-worker-vllm.txt").read_bytes()
    dialect = recognised(text)
    assert dialect.name == "dynamo+vllm"
    alone = values(BUSY)
    del alone["server_start_unix_s"]  # Dynamo lets python_ and process_ series out
    assert only_plain(parse(text, dialect, 7)) == alone


def test_what_the_engine_does_not_write_comes_from_dynamo() -> None:
    text = b"""\
dynamo_component_gpu_cache_usage_percent{dp_rank="0",model="m"} 0.75
dynamo_component_inflight_requests{dynamo_endpoint="generate"} 4
dynamo_component_inflight_requests{dynamo_endpoint="clear_kv_blocks"} 1
vllm:num_requests_running{model_name="m"} 3
"""
    found = only_plain(parse(text, recognised(text), 7))
    assert found == {"requests_running": 3, "kv_usage_ratio": 0.75}


def test_ranks_that_share_the_work_add_up_and_ranks_that_repeat_it_do_not() -> None:
    lines = [
        f'sglang:num_running_reqs{{dp_rank="{dp}",pp_rank="{pp}",tp_rank="{tp}"}} {10 * dp + 1}\n'
        for dp in range(2)
        for pp in range(2)
        for tp in (2 * dp + 10, 2 * dp + 9)
    ]
    assert only_plain(parse("".join(lines).encode(), SGLANG, 7)) == {"requests_running": 12}
    one = 'sglang:num_running_reqs{engine_type="unified",pp_rank="0",tp_rank="0"} 5\n'
    assert only_plain(parse(one.encode(), SGLANG, 7)) == {"requests_running": 5}


def test_a_counter_without_such_an_event_stands_at_nothing() -> None:
    # TGI writes a failure's series with the first of its kind: before it there were none …
    some = b'tgi_request_failure{err="validation"} 2\n'
    dialect = recognised(some)
    assert only_plain(parse(some, dialect, 7)) == {
        "requests_aborted_total": 0,
        "requests_rejected_total": 0,
    }
    # … but where no failure is on the page, nothing is known.
    assert parse(b"tgi_queue_size 3\n", dialect, 7) == [Reading(7, "requests_waiting", 3)]
    # A gauge is not counted from nothing.
    triton = b'nv_trt_llm_request_metrics{request_type="active"} 2\n'
    assert only_plain(parse(triton, recognised(triton), 7)) == {"requests_running": 2}


def test_waiting_by_reason() -> None:
    text = "".join(
        f'vllm:num_requests_waiting_by_reason{{engine="{engine}",reason="{reason}"}} {value}\n'
        for engine, reason, value in ((0, "capacity", 3), (1, "capacity", 4), (0, "deferred", 1))
    )
    text += f'vllm:num_requests_waiting_by_reason{{reason="{"x" * 5000}"}} 1\n'
    text += "".join(f'vllm:num_requests_waiting_by_reason{{reason="r{n}"}} 1\n' for n in range(99))
    found = {one.labels: one.value for one in parse(text.encode(), VLLM, 7)}
    assert found[(("reason", "capacity"),)] == 7
    assert found[(("reason", "deferred"),)] == 1
    assert len(found) == dialects.GROUPS_MAX


HISTOGRAM = """\
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 1
vllm:time_to_first_token_seconds_bucket{engine="0",le="2"} 3
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 4
vllm:time_to_first_token_seconds_count{engine="0"} 4
"""


def ttft_buckets(text: str) -> dict[str, float]:
    found = parse(text.encode(), VLLM, 7, buckets=True)
    assert any(one.name == "ttft_seconds_count" for one in found)
    return {dict(one.labels)["le"]: one.value for one in found if one.name.endswith("_bucket")}


def test_buckets_of_ranks_add_up_whatever_the_bounds() -> None:
    assert ttft_buckets(HISTOGRAM) == {"0.5": 1, "2.0": 3, "+Inf": 4}
    both = HISTOGRAM + HISTOGRAM.replace('"0"', '"1"').replace('"2"', '"2.0"')
    assert ttft_buckets(both) == {"0.5": 2, "2.0": 6, "+Inf": 8}


@pytest.mark.parametrize(
    "broken",
    [
        HISTOGRAM.replace("+Inf", "many"),  # no last bucket
        HISTOGRAM.replace('"2"} 3', '"2"} 0'),  # a count that falls
        HISTOGRAM.replace('"2"} 3', '"2"} NaN') + HISTOGRAM.replace('"0"', '"1"'),
        HISTOGRAM + HISTOGRAM.replace('"0"', '"1"').replace('"2"', '"3"'),  # other bounds
        HISTOGRAM
        + "".join(
            f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="{n + 5}"}} 4\n'
            for n in range(dialects.BUCKETS_MAX)
        ),
    ],
)
def test_what_is_no_histogram_has_no_buckets(broken: str) -> None:
    assert ttft_buckets(broken) == {}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["vllm:", "sglang:", "tgi_", "llamacpp:", "trtllm_", "nv_trt_llm_"]),
            st.sampled_from(["num_requests_running", "request_metrics", "kv_cache_max_blocks"]),
            st.dictionaries(st.sampled_from(["le", "engine", "tp_rank", "priority"]), st.text()),
            st.floats(),
        )
    )
)
def test_no_page_raises(lines: list[tuple[str, str, dict[str, str], float]]) -> None:
    text = "".join(
        f"{mark}{name}{{"
        + ",".join(f'{key}="{value}"' for key, value in labels.items())
        + f"}} {value!r}\n"
        for mark, name, labels, value in lines
        for value in [value]
    ).encode("utf-8", "replace")
    dialect = detect(text)
    for one in parse(text, dialect, 7, buckets=True) if dialect else ():
        assert math.isfinite(one.value)


# ----------------------------------------------------------------------- missing, fingerprint


def test_nothing_of_a_whole_page_is_missing() -> None:
    assert missing(parse(BUSY, VLLM, 7), VLLM) == []


def test_what_is_missing_what_it_costs_and_what_brings_it() -> None:
    few = parse(b"sglang:num_running_reqs 1\n", SGLANG, 7)
    found = {one.canonical: one for one in missing(few, SGLANG)}
    assert "requests_running" not in found
    assert found["ttft_seconds"].brings == "start it with --enable-metrics"
    assert "SLO" in found["ttft_seconds"].costs
    assert found["requests_rejected_total"].brings == "nothing here: sglang does not write it"


def test_missing_on_every_golden_page_says_something_to_do() -> None:
    for path in GOLDEN.glob("*.txt"):
        dialect = recognised(path.read_bytes())
        for one in missing([], dialect):
            assert one.costs
            assert one.brings


def fingerprint_of(text: bytes) -> dict[str, str]:
    page = dialects.page()
    page.feed(text)
    return dict(dialects.fingerprint(page.read(), recognised(text)))


def test_a_fingerprint_moves_with_model_and_settings_only() -> None:
    busy, drained = fingerprint_of(BUSY), fingerprint_of(DRAINED)
    assert busy == drained
    assert busy["model"] == "tiny"
    assert busy["vllm:cache_config_info.block_size"] == "32"
    assert fingerprint_of(BUSY.replace(b'block_size="32"', b'block_size="16"')) != busy
    assert fingerprint_of(BUSY.replace(b'"tiny"', b'"large"'))["model"] == "large"
    sglang = fingerprint_of((GOLDEN / "sglang-0.5.23-tp2-dp2.txt").read_bytes())
    assert sglang["sglang:context_len"] == "131072"


# ------------------------------------------------------------------------------- pages beside


def test_the_kv_cache_of_llama_cpp_is_what_its_busy_slots_hold() -> None:
    text = (GOLDEN / "llama.cpp-0c1e57098-slots.json").read_bytes()
    assert dialects.slots(text, 7) == [
        Reading(7, "kv_used_tokens", 1_500),
        Reading(7, "kv_usage_ratio", 1_500 / (4 * 4_096)),
    ]
    old = b'[{"id": 0, "n_ctx": 4096, "is_processing": true, "prompt": "not looked at"}]'
    assert dialects.slots(old, 7) == []  # it does not tell how many tokens
    assert dialects.slots(b"[]", 7) == []


def test_what_ollama_has_loaded() -> None:
    found, prints = dialects.ollama((GOLDEN / "ollama-ps.json").read_bytes(), 7)
    assert found == [
        Reading(7, "models_loaded", 1),
        Reading(7, "model_memory_bytes", 6 * 2**30),
        Reading(7, "model_memory_gpu_bytes", 4 * 2**30),
    ]
    assert prints == (("model.qwen3:8b", "8192"),)


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b'{"error": 1}', b"[1]", b'"x"', b"\xff"])
def test_pages_beside_that_are_none(text: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        dialects.slots(text, 7)
    with pytest.raises(msgspec.MsgspecError):
        dialects.ollama(text, 7)
