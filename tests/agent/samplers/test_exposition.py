from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.samplers import dialects
from agent.samplers.dialects import VLLM, parse
from agent.samplers.exposition import (
    KEPT_LINES_MAX,
    LINE_BYTES_MAX,
    Heads,
    Page,
    Sample,
    read_line,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
BUSY = (GOLDEN / "vllm-0.32.0-busy.txt").read_bytes()
DRAINED = (GOLDEN / "vllm-0.32.0-drained.txt").read_bytes()

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
    page = dialects.page()
    page.feed(b'vllm:num_requests_running{x="} 3\nvllm:num_requests_waiting 2\r\n')
    page.feed(b"vllm:kv_cache_usage_perc NaN\nvllm:prompt_tokens_total +Inf\nvllm:nonsense }{\n")
    samples = page.read()
    assert page.malformed == 1  # a line that nobody wants is not looked at
    assert dialects.readings(samples, VLLM, 0) == [
        dialects.Reading(0, "requests_waiting", 2)  # neither NaN nor infinity is a measurement
    ]


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


@given(_LABELS, st.floats(allow_nan=False))
def test_a_written_line_is_read_back(labels: dict[str, str], value: float) -> None:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    assert read_line(f"name{{{inside}}} {value!r}".encode()) == Sample("name", labels, value)


# --------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(0, len(BUSY)), max_size=30))
def test_a_page_does_not_depend_on_how_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(BUSY)]
    page = dialects.page()
    for start, end in pairwise(edges):
        page.feed(BUSY[start:end])
    assert not page.cut
    assert dialects.readings(page.read(), VLLM, 7) == parse(BUSY, VLLM, 7)


def test_half_a_page_is_known_as_such() -> None:
    page = dialects.page()
    page.feed(BUSY[:-5])
    assert page.cut


def test_an_endless_line_costs_no_memory() -> None:
    page = dialects.page()
    page.feed(b"vllm:num_requests_waiting 2\nvllm:num_requests_running{x=")
    for _ in range(10):
        page.feed(b"x" * LINE_BYTES_MAX)
    assert page.cut
    page.feed(b'"} 3\nvllm:kv_cache_usage_perc 0.5\n')
    assert not page.cut
    assert [one.value for one in page.read()] == [2, 0.5]
    assert page.malformed == 1


# ------------------------------------------------------------------------------ from page to page


def whole(text: bytes, heads: Heads | None = None) -> Page:
    page = dialects.page(buckets=True, heads=heads)
    page.feed(text)
    page.end()
    return page


def test_what_is_known_of_the_page_before_changes_nothing() -> None:
    before = whole(BUSY)
    before.read()
    assert len(before.heads) == len(before.kept)
    after = whole(DRAINED, before.heads)
    assert after.read() == whole(DRAINED).read()
    assert after.heads == before.heads  # and nothing piles up


@given(st.lists(st.sampled_from([b"1", b" 1", b"1 17", b"NaN", b"x", b"", b'2 # {a="b"} 3'])))
def test_known_heads_read_every_line_as_it_stands(values: list[bytes]) -> None:
    heads: Heads = {}
    for value in values:
        line = b'vllm:prompt_tokens_total{a="} # ",b="c"} ' + value + b"\n"
        page, fresh = whole(line, heads), whole(line)
        assert (page.read(), page.malformed) == (fresh.read(), fresh.malformed)
        heads = page.heads


def test_a_series_that_stands_twice_counts_once() -> None:
    twice = b'vllm:prompt_tokens{a="1",b="2"} 3\n' * 2 + b'vllm:prompt_tokens{b="2",a="1"} 9\n'
    page = whole(twice)
    assert [one.value for one in page.read()] == [3]
    assert page.duplicates == 2


def test_more_series_than_any_server_has_are_not_kept() -> None:
    page = dialects.page()
    for n in range(KEPT_LINES_MAX + 2):
        page.feed(b'vllm:prompt_tokens{n="%d"} 1\n' % n)
    assert page.overfull
    assert len(page.kept) == KEPT_LINES_MAX
