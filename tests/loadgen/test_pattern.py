"""Patterns: an agent's and a declared one, with whatever is known of the load."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import trace
from agent.model import UsageError
from loadgen.lengths import Empirical, Fixed, LogNormal
from loadgen.pattern import SHARES, Pattern, parse

GOLDEN = Path(__file__).parent.parent / "golden/traces"


def parsed(said: object) -> Pattern:
    return parse(json.dumps(said), "p.json")


def test_a_declared_demand() -> None:
    found = parsed({
        "window_s": 86400,
        "requests_per_s": {"mean": 2.5, "peak": 9},
        "concurrency": {"mean": 20, "p95": 33, "p99": 40, "max": 51},
        "input_tokens": {"mean": 1155, "p50": 1020, "p95": 4083},
        "output_tokens": {"mean": 211, "p50": 129, "p95": 451},
    })  # fmt: skip
    assert (found.window_s, found.rate_rps, found.rate_peak_rps) == (86400, 2.5, 9)
    assert found.concurrency_mean == 20
    assert isinstance(found.input_tokens, Empirical)
    assert found.input_tokens.mean == pytest.approx(1155, rel=0.01)
    assert found.input_tokens.quantile(0.95) == 4083
    assert found.output_tokens is not None
    assert found.output_tokens.mean == pytest.approx(211, rel=0.01)
    assert found.notes == []


def test_an_agents_totals() -> None:
    found = parsed({
        "window_s": 3600, "requests": 7200, "prompt_tokens": 7_200_000, "output_tokens": 1_440_000,
        "concurrency": {"mean": 12.5, "p50": 12, "p95": 20, "p99": 24, "max": 31},
        "kv_usage": {"mean": 0.2, "p95": 0.4, "max": 0.5},
        "ttft_ms": {"p50": 80, "p95": 200, "p99": None}, "gaps_s": [],
    })  # fmt: skip
    assert (found.rate_rps, found.rate_peak_rps, found.concurrency_mean) == (2, 2, 12.5)
    assert found.input_tokens == LogNormal(1000, 1000)
    assert found.output_tokens == LogNormal(200, 200)
    assert found.notes == [
        "input_tokens: only its mean known; taken as lognormal:1000:1000",
        "output_tokens: only its mean known; taken as lognormal:200:200",
    ]


def test_an_agents_distributions() -> None:
    found = parsed({
        "window_s": 3600, "requests": 3600,
        "prompt_tokens": {"mean": 800, "p50": 400, "p95": 2900, "p99": 5000, "histogram": [[1, 2]]},
        "output_tokens": {"p50": 100},
    })  # fmt: skip
    assert found.rate_rps == 1
    assert isinstance(found.input_tokens, Empirical)
    assert found.input_tokens.mean == pytest.approx(800, rel=0.01)
    assert found.output_tokens == LogNormal(141.4, 141.4)  # the median of a CV of 1 is m/√2
    assert found.notes == ["output_tokens: only one quantile known; taken as lognormal:141.4:141.4"]


@pytest.mark.parametrize(("m", "sd"), [(1000, 800), (1000, 1500), (50, 10)])
@pytest.mark.parametrize("figure", ["p50", "p95"])
def test_a_mean_and_one_quantile_of_a_lognormal_give_it_back(
    m: float, sd: float, figure: str
) -> None:
    rng, length = Random(1), LogNormal(m, sd)
    sample = sorted(length.sample(rng) for _ in range(100_000))
    quantile = sample[int(SHARES[figure] * len(sample))]
    found = parsed({"input_tokens": {"mean": m, figure: quantile}}).input_tokens
    assert isinstance(found, LogNormal)
    assert (found.m, found.sd) == (m, pytest.approx(sd, rel=0.1))


def test_lengths_themselves_without_a_count_of_requests() -> None:
    found = parsed({"input_tokens": 512, "output_tokens": 128.0})
    assert (found.input_tokens, found.output_tokens) == (Fixed(512), Fixed(128))
    assert (found.rate_rps, found.concurrency_mean, found.window_s) == (None, None, None)


def test_a_window_with_gaps_says_so() -> None:
    found = parse('\ufeff{"window_s": 60, "requests": 30, "gaps_s": 12.5}', "p.json")
    assert found.rate_rps == 0.5
    assert found.notes == ["12.5 s of the window were not observed; rates are over all of it"]


@pytest.mark.parametrize("name", ["azure-2023-code.csv", "burstgpt-1.csv"])
def test_the_demand_of_a_trace_is_a_pattern(name: str) -> None:
    said = trace.demand(trace.read(GOLDEN / name))
    found = parsed(said)
    assert found.rate_rps == said["requests_per_s"]["mean"]
    assert found.rate_peak_rps == said["requests_per_s"]["peak"]
    for length, key in (
        (found.input_tokens, "input_tokens"),
        (found.output_tokens, "output_tokens"),
    ):
        assert length is not None
        assert length.mean == pytest.approx(said[key]["mean"], rel=0.02)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "give what an agent answers at /api/v1/pattern"),
        ({"error": "no such server"}, "no pattern: give"),
        ({"requests": 0, "window_s": 3600}, "no request in the window; take a longer one"),
        ({"requests": 5, "window_s": 0}, "window_s is 0; it must be above 0"),
        ({"requests_per_s": {"mean": -1}}, "requests_per_s is -1; it must be above 0"),
        ({"requests_per_s": {"mean": 3, "peak": 2}}, "a peak of 2 below the mean of 3"),
        ({"requests_per_s": 1e9}, "at most 1e.06"),
        ({"concurrency": {"mean": -5}}, "concurrency is -5"),
        ({"input_tokens": {"p50": 9, "p95": 3}}, "input_tokens: its quantiles fall"),
        ({"input_tokens": {"mean": -1}}, "input_tokens.mean is -1; write a length"),
        ({"output_tokens": 1e9}, "output_tokens is 1e.09; write a length"),
        ({"input_tokens": "512"}, r"no pattern: Expected `float . object . null`, got `str`"),
        ([1], "no pattern: Expected `object`"),
    ],
)
def test_what_is_no_pattern(said: object, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        parsed(said)
    assert str(caught.value).startswith("--workload-from p.json: ")


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"{", b"\xff\xfe", b"\x00", b"[" * 100_000, b'{"x":' * 100_000, b"NaN"]
)
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"^--workload-from http://a: no (JSON|pattern)") as caught:
        parse(data, "http://a")
    assert len(str(caught.value)) < 200


numbers = st.none() | st.floats(-10, 1e8) | st.integers(-(10**30), 10**30)
figures = numbers | st.dictionaries(st.sampled_from((*SHARES, "mean", "peak", "x")), numbers)
members = st.sampled_from(
    ("window_s", "requests", "requests_per_s", "concurrency", "input_tokens", "prompt_tokens",
     "output_tokens", "gaps_s")
)  # fmt: skip


@given(st.dictionaries(members, figures))
def test_any_figures_are_a_pattern_or_a_usage_error(said: dict[str, Any]) -> None:
    with suppress(UsageError):
        found = parsed(said)
        for length in (found.input_tokens, found.output_tokens):
            assert length is None or length.sample(Random(1)) >= 1
