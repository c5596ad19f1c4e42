"""Lengths: what is asked for is drawn, what is drawn is a length, and `mean` says what it was."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import TOKENS_MAX, UsageError
from loadgen.lengths import (
    Empirical,
    Fixed,
    Length,
    LogNormal,
    Normal,
    Uniform,
    parse,
)

tokens = st.integers(1, TOKENS_MAX)
means = st.floats(1, 1e5).map(lambda m: round(m, 3))
deviations = st.floats(0, 1e5).map(lambda sd: round(sd, 3))


@st.composite
def observed(draw: st.DrawFn) -> Empirical:
    shares = sorted(draw(st.sets(st.sampled_from((0.0, 0.1, 0.5, 0.9, 0.99, 1.0)), min_size=2)))
    lengths = sorted(draw(st.lists(st.floats(1, 1e6), min_size=len(shares), max_size=len(shares))))
    mean = draw(st.none() | st.floats(1, 1e6))
    return Empirical.of(dict(zip(shares, lengths, strict=True)), mean)


lengths: st.SearchStrategy[Length] = st.one_of(
    tokens.map(Fixed),
    st.builds(Normal, means, deviations),
    st.builds(LogNormal, means, deviations),
    st.tuples(tokens, tokens).map(lambda ab: Uniform(min(ab), max(ab))),
    observed(),
)


def drawn(length: Length, n: int = 50_000) -> list[int]:
    rng = Random(5)
    return [length.sample(rng) for _ in range(n)]


@settings(max_examples=200)
@given(lengths, st.integers())
def test_what_is_drawn_is_a_length_and_repeats(length: Length, seed: int) -> None:
    rng, again = Random(seed), Random(seed)
    sample = [length.sample(rng) for _ in range(20)]
    assert sample == [length.sample(again) for _ in range(20)]
    assert all(isinstance(n, int) and 1 <= n <= TOKENS_MAX for n in sample)
    assert 1 <= length.mean <= TOKENS_MAX * (1 + 1e-9)
    assert 1 <= length.longest <= TOKENS_MAX
    assert length.fixed is None or {length.fixed} == set(sample)


@given(lengths.filter(lambda length: not isinstance(length, Empirical)))
def test_the_text_is_given_back(length: Length) -> None:
    assert parse(str(length), "--input-tokens") == length


@given(lengths)
def test_a_length_travels_to_another_process(length: Length) -> None:
    kinds = Fixed | Normal | LogNormal | Uniform | Empirical
    assert msgspec.json.decode(msgspec.json.encode(length), type=kinds) == length


@pytest.mark.parametrize(
    "text", ["512", "normal:512:50", "lognormal:512:300.5", "uniform:1:9", "normal:10000000:0"]
)
def test_texts(text: str) -> None:
    assert str(parse(text, "--input-tokens")) == text


def test_fixed_draws_nothing() -> None:
    rng = Random(1)
    state = rng.getstate()
    length = parse("512", "--input-tokens")
    assert length.sample(rng) == length.mean == length.longest == length.fixed == 512
    assert rng.getstate() == state


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_mean_and_deviation_are_those_of_the_lengths(kind: str) -> None:
    length = parse(f"{kind}:2000:500", "--input-tokens")
    sample = drawn(length)
    mean = sum(sample) / len(sample)
    std = (sum((n - mean) ** 2 for n in sample) / len(sample)) ** 0.5
    assert mean == pytest.approx(2000, rel=0.01)
    assert std == pytest.approx(500, rel=0.03)
    assert length.mean == pytest.approx(2000, rel=1e-3)


def test_lognormal_leans_to_the_short_and_normal_does_not() -> None:
    assert sorted(drawn(LogNormal(1000, 1000)))[25_000] == pytest.approx(
        1000 / math.sqrt(2), rel=0.02  # the median is m/√(1 + sd²/m²)
    )  # fmt: skip
    assert sorted(drawn(Normal(1000, 100)))[25_000] == pytest.approx(1000, rel=0.01)


def test_uniform_has_every_length_equally_often_both_bounds_too() -> None:
    sample = drawn(Uniform(3, 7))
    assert [sample.count(n) / len(sample) for n in range(3, 8)] == pytest.approx(
        [0.2] * 5, rel=0.05
    )
    assert Uniform(3, 7).mean == 5


@pytest.mark.parametrize(
    "length",
    [
        Normal(100, 200), Normal(10, 5), LogNormal(3, 4), LogNormal(500, 1500), Uniform(1, 4000),
        Normal(9_999_000, 2_000), Empirical.of({0.5: 300, 0.95: 2000}, 700),
        Empirical.of({0: 1, 0.5: 300, 1: 900}),
    ],
)  # fmt: skip
def test_mean_is_that_of_what_is_drawn_clipped_or_not(length: Length) -> None:
    sample = drawn(length, 200_000)
    assert sum(sample) / len(sample) == pytest.approx(length.mean, rel=0.02)


@pytest.mark.parametrize("length", [Normal(1000, 100), LogNormal(500, 500)])
def test_longest_is_the_999th_of_a_thousand(length: Length) -> None:
    over = sum(n > length.longest for n in drawn(length, 200_000))
    assert over / 200_000 == pytest.approx(0.001, rel=0.3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write N, normal"), ("x", "write N, normal"), ("-5", "write N, normal"),
        ("0", "whole numbers from 1 to 10000000"), ("10000001", "whole numbers from 1"),
        ("normal:5", "normal:M:SD"), ("normal:0:1", "a mean from 1"), ("normal:5:-1", "a mean"),
        ("lognormal:5:nan", "a mean"), ("lognormal:inf:1", "a mean"), ("normal:1:99999999", "a m"),
        ("uniform:5:4", "swap"), ("uniform:1.5:4", "whole"), ("uniform:0:4", "whole"),
        ("gauss:1:2", "normal:M:SD"), ("9" * 5000, "write N"), ("normal:1:2:3", "normal:M:SD"),
    ],
)  # fmt: skip
def test_texts_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^--output-tokens .*{said}") as caught:
        parse(text, "--output-tokens")
    assert len(str(caught.value)) < 200


@given(st.text() | st.text(alphabet="0123456789.:normaluif-e ²\x00\udcff", max_size=30))
def test_any_text_is_a_length_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        parse(text, "--input-tokens").sample(Random(1))


# ------------------------------------------------------------------------------------- observed


@settings(max_examples=200)
@given(observed(), st.floats(0, 1))
def test_an_observed_quantile_function_never_falls(length: Empirical, share: float) -> None:
    assert length.shares[0] == 0
    assert length.shares[-1] == 1
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(length.tokens))
    low, high = length.tokens[0], length.tokens[-1]
    assert low * (1 - 1e-9) <= length.quantile(share) <= high * (1 + 1e-9)


def test_observed_quantiles_and_mean_come_back() -> None:
    length = Empirical.of({0.5: 374, 0.95: 2700, 0.99: 4000}, 763)
    assert length.mean == pytest.approx(763)
    sample = sorted(drawn(length))
    for share, value in ((0.5, 374), (0.95, 2700), (0.99, 4000)):
        assert sample[int(share * len(sample))] == pytest.approx(value, rel=0.03)
    assert str(length) == "observed (mean 763, p50 374, p95 2700)"


@pytest.mark.parametrize("sd", [100, 1000, 3000])
def test_ends_that_nobody_observed_are_those_of_a_lognormal(sd: float) -> None:
    """Three quantiles of a lognormal give its mean within a few percent, none told."""
    sample = sorted(drawn(LogNormal(1000, sd), 100_000))
    length = Empirical.of({s: float(sample[int(s * 100_000)]) for s in (0.1, 0.5, 0.9, 0.95, 0.99)})
    assert length.mean == pytest.approx(1000, rel=0.08)


def test_narrow_lengths_stay_narrow() -> None:
    length = Empirical.of({0.5: 500, 0.95: 520})
    assert 450 < length.tokens[0] < 490
    assert length.longest < 550
    assert length.mean == pytest.approx(500, abs=3)


def test_a_mean_that_quantiles_forbid_is_met_as_near_as_can_be() -> None:
    assert 55 < Empirical.of({0.5: 100, 0.95: 200}, 10).mean < 65  # 55.5 at the least
    assert 100 < Empirical.of({0: 100, 1: 200}, 10).mean < 110
    assert 190 < Empirical.of({0: 100, 1: 200}, 1000).mean < 200


@pytest.mark.parametrize(
    "quantiles",
    [{}, {0.5: 3}, {0.5: 0.5, 1: 2}, {0.5: 4, 1: 3}, {0.5: 4, 2: 5}, {0: 1, 1e-5: 5},
     {0.5: float("nan"), 1: 5}, {0.5: 1, 1: TOKENS_MAX + 1}],
)  # fmt: skip
def test_quantiles_that_are_none(quantiles: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="quantiles"):
        Empirical.of(quantiles)
