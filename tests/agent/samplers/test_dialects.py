from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.metrics import CATALOGUE
from agent.samplers import dialects
from agent.samplers.dialects import DIALECTS, VLLM, Page, Sample, detect, parse, read_line

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
BUSY = (GOLDEN / "vllm-0.32.0-busy.txt").read_bytes()
DRAINED = (GOLDEN / "vllm-0.32.0-drained.txt").read_bytes()


def values(page: bytes, model: str | None = None) -> dict[str, float]:
    readings = parse(page, VLLM, 7, model)
    assert all(one.at_ns == 7 and one.labels == () for one in readings)
    assert len({one.name for one in readings}) == len(readings)
    return {one.name: one.value for one in readings}


def test_every_name_is_in_the_catalogue() -> None:
    for dialect in DIALECTS:
        assert dialect.series.keys() | dialect.from_labels.keys() <= CATALOGUE.keys()


# ---------------------------------------------------------------------------------------- vLLM


def test_a_real_page_of_a_busy_vllm() -> None:
    assert detect(BUSY) is VLLM
    assert values(BUSY) == {
        "requests_running": 48,
        "requests_waiting": 0,
        "kv_usage_ratio": 0.027284380150155663,
        "kv_capacity_tokens": 524288,
        "requests_finished_total": 24,
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


# --------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        (b"a 1", Sample("a", {}, 1)),
        (b"  a\t 1.5e-3  ", Sample("a", {}, 0.0015)),
        (b"a 1 1395066363000", Sample("a", {}, 1)),
        (b"a{} -.5", Sample("a", {}, -0.5)),
        (b"a +Inf", Sample("a", {}, math.inf)),
        (b"a -inf", Sample("a", {}, -math.inf)),
        (b'a {x="1" , y = "2",} 3', Sample("a", {"x": "1", "y": "2"}, 3)),
        (b'a{x="\\"}, b{\\\\ \\n #"} 3', Sample("a", {"x": '"}, b{\\ \n #'}, 3)),
        (b'a{x="C:\\dir"} 3', Sample("a", {"x": "C:\\dir"}, 3)),  # no escape: as it stands
        ('a{x="é"} 3'.encode(), Sample("a", {"x": "é"}, 3)),
        (b'a{x="\xff"} 3', Sample("a", {"x": "�"}, 3)),
        (b'a_bucket{le="1"} 4 # {trace_id="q # 7"} 0.5 12', Sample("a_bucket", {"le": "1"}, 4)),
        (b'a{x="1"} 4 17 # {} 0.5', Sample("a", {"x": "1"}, 4)),
    ],
)
def test_lines_that_are_right(line: bytes, sample: Sample) -> None:
    assert read_line(line) == sample


def test_not_a_number_is_one() -> None:
    sample = read_line(b"a NaN")
    assert sample is not None
    assert math.isnan(sample.value)


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"a", b"a ", b"a{} ", b"1a 3", b"a one", b"a 1_0", b"a 0x1", b"a 1 2 3", b"a 1 x"),
        *(b'a{x="1} 3', b"a{x=1} 3", b'a{x="1"y="2"} 3', b'a{x="1"', b'a{"x"} 3', b"a{,} 3"),
        *(b'a{x="1"}', b'a{x="1"}} 3', b"a infinite", b"a \xff"),
    ],
)
def test_lines_that_are_wrong(line: bytes) -> None:
    assert read_line(line) is None


def test_malformed_lines_are_counted_and_the_rest_is_read() -> None:
    page = Page()
    page.feed(b'vllm:num_requests_running{x="} 3\nvllm:num_requests_waiting 2\r\n')
    page.feed(b"vllm:kv_cache_usage_perc NaN\nvllm:prompt_tokens_total +Inf\nvllm:nonsense }{\n")
    samples = page.read()
    assert page.malformed == 1  # a line that nobody wants is not looked at
    assert dialects.readings(samples, VLLM, 0) == [
        dialects.Reading(0, "requests_waiting", 2)  # neither NaN nor infinity is a measurement
    ]


@settings(deadline=None)  # the machine has other things to do
@given(st.binary(max_size=60))
def test_no_line_raises(line: bytes) -> None:
    read_line(line)
    read_line(b"a{" + line)
    read_line(b'a{x="' + line + b'"} 1')


def test_no_line_takes_long() -> None:
    began = time.perf_counter()
    for nasty in (b'"', b'x="', b"\\", b'x="",', b" ", b"1", b"{", b'"\\"'):
        read_line(b"a{" + nasty * 15_000)
        read_line(b"a " + nasty * 15_000)
    assert time.perf_counter() - began < 2


_LABELS = st.dictionaries(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]*", fullmatch=True), st.text())


@settings(deadline=None)
@given(_LABELS, st.floats(allow_nan=False))
def test_a_written_line_is_read_back(labels: dict[str, str], value: float) -> None:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    assert read_line(f"name{{{inside}}} {value!r}".encode()) == Sample("name", labels, value)


# --------------------------------------------------------------------------------------- pieces


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BUSY)), max_size=30))
def test_a_page_does_not_depend_on_how_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(BUSY)]
    page = Page()
    for start, end in pairwise(edges):
        page.feed(BUSY[start:end])
    assert not page.cut
    assert dialects.readings(page.read(), VLLM, 7) == parse(BUSY, VLLM, 7)


def test_half_a_page_is_known_as_such() -> None:
    page = Page()
    page.feed(BUSY[:-5])
    assert page.cut


def test_an_endless_line_costs_no_memory() -> None:
    page = Page()
    page.feed(b"vllm:num_requests_waiting 2\nvllm:num_requests_running{x=")
    for _ in range(10):
        page.feed(b"x" * dialects.LINE_BYTES_MAX)
    assert page.cut
    page.feed(b'"} 3\nvllm:kv_cache_usage_perc 0.5\n')
    assert not page.cut
    assert [one.value for one in page.read()] == [2, 0.5]
    assert page.malformed == 1
