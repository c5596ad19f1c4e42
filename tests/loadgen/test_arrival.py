"""When requests are due: laws of the arrival processes."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from loadgen.arrival import constant, gamma, instants, parse_arrival, poisson, stages

rates = st.floats(0.01, 1e4)
arrivals = st.sampled_from(("poisson", "constant", "gamma:0.3", "gamma:2"))


@settings(max_examples=50)
@given(rates, arrivals, st.integers())
def test_instants_never_go_back_and_the_same_seed_gives_the_same(
    rate: float, arrival: str, seed: int
) -> None:
    first = list(islice(instants(arrival, rate, Random(seed)), 50))
    assert first == list(islice(instants(arrival, rate, Random(seed)), 50))
    assert first[0] >= 0
    # Gamma gaps of a CV of 2 are so small at times that they vanish beside the instant.
    assert all(a <= b if arrival == "gamma:2" else a < b for a, b in pairwise(first))


@settings(max_examples=50)
@given(rates)
def test_constant_is_even_and_begins_at_once(rate: float) -> None:
    times = list(islice(constant(rate), 100))
    assert times == pytest.approx([i / rate for i in range(100)])


@pytest.mark.parametrize("rate", [0.5, 20.0, 3000.0])
def test_poisson_has_exponential_gaps_of_the_asked_mean(rate: float) -> None:
    n = 20_000
    times = list(islice(poisson(rate, Random(1)), n))
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    mean = sum(gaps) / n
    variance = sum((gap - mean) ** 2 for gap in gaps) / n
    assert mean * rate == pytest.approx(1, rel=0.03)
    assert variance**0.5 * rate == pytest.approx(1, rel=0.05)  # a CV of 1
    assert sum(gap < mean for gap in gaps) / n == pytest.approx(0.632, abs=0.02)  # 1 − 1/e


def test_different_seeds_differ() -> None:
    assert next(poisson(5, Random(1))) != next(poisson(5, Random(2)))


@pytest.mark.parametrize("cv", [0.1, 0.5, 1.0, 2.5])
def test_gamma_has_the_asked_mean_and_evenness(cv: float) -> None:
    n = 40_000
    times = list(islice(gamma(20.0, cv, Random(1)), n))
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    mean = sum(gaps) / n
    std = (sum((gap - mean) ** 2 for gap in gaps) / n) ** 0.5
    assert mean * 20 == pytest.approx(1, rel=0.04)
    assert std / mean == pytest.approx(cv, rel=0.05)


def test_gamma_of_a_cv_of_1_is_poisson() -> None:
    """Shape 1 is the exponential distribution: the same generator gives the same instants."""
    same = zip(gamma(5, 1.0, Random(3)), poisson(5, Random(3)), strict=False)
    assert all(a == pytest.approx(b) for a, b in islice(same, 1000))


def test_names_of_arrivals() -> None:
    assert parse_arrival("poisson") == ("poisson", 1.0)
    assert parse_arrival("constant") == ("constant", 0.0)
    assert parse_arrival("gamma:2.5") == ("gamma", 2.5)


@pytest.mark.parametrize(
    ("arrival", "rate", "said"),
    [
        ("poisson", 0, "above 0"), ("constant", -1, "above 0"), ("regular", 1, "poisson, constant"),
        ("gamma", 1, "gamma:CV"), ("gamma:", 1, "gamma:2.5"), ("gamma:x", 1, "gamma:CV"),
        ("gamma:nan", 1, "gamma:CV"), ("gamma:1:2", 1, "gamma:CV"), ("poisson:1", 1, "gamma:CV"),
        ("gamma:0", 1, "CV from 0.01 to 10"), ("gamma:11", 1, "CV from 0.01 to 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_usage_error(arrival: str, rate: float, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        instants(arrival, rate, Random(1))


# ---------------------------------------------------------------------------------------- stages


def test_stages_are_times_at_rates_and_ramps() -> None:
    load = stages("30s@2, 1m@2-10,500ms@0")
    assert [(s.duration_s, s.from_rps, s.to_rps) for s in load.stages] == [
        (30.0, 2.0, 2.0), (60.0, 2.0, 10.0), (0.5, 0.0, 0.0),
    ]  # fmt: skip
    assert load.total_s == 90.5
    assert load.requests == 30 * 2 + 60 * 6
    assert load.mean_rps == pytest.approx(420 / 90.5)
    assert load.peak_rps == 10


def test_constant_stages_hold_their_rate_and_pause_at_zero() -> None:
    times = list(stages("2s@2,3s@0,2s@4").instants("constant", Random(1)))
    assert times == pytest.approx([0, 0.5, 1, 1.5, 5, 5.25, 5.5, 5.75, 6, 6.25, 6.5, 6.75])


def test_a_ramp_from_nothing_follows_the_square() -> None:
    """From 0 to 10/s in 10 s: half of t² requests are due by t."""
    times = list(stages("10s@0-10").instants("constant", Random(1)))
    assert times == pytest.approx([(2 * n) ** 0.5 for n in range(50)])


STAGE = st.tuples(st.floats(0.1, 1e3), st.floats(0, 50), st.floats(0, 50))


@settings(max_examples=100)
@given(st.lists(STAGE, min_size=1, max_size=5), arrivals, st.integers())
def test_instants_of_stages_are_sorted_inside_and_repeat(
    parts: list[tuple[float, float, float]], arrival: str, seed: int
) -> None:
    load = stages("1s@1," + ",".join(f"{time:.3f}s@{a:.3f}-{b:.3f}" for time, a, b in parts))
    times = list(islice(load.instants(arrival, Random(seed)), 2000))
    assert times == list(islice(load.instants(arrival, Random(seed)), 2000))
    assert all(a <= b for a, b in pairwise(times))
    assert not times or 0 <= times[0] <= times[-1] <= load.total_s
    if arrival == "constant":
        assert len(times) == min(2000, max(1, math.ceil(load.requests - 1e-9)))


@pytest.mark.parametrize("arrival", ["poisson", "constant", "gamma:2"])
def test_stages_offer_in_each_part_what_they_say(arrival: str) -> None:
    load = stages("1000s@5,1000s@5-15,1000s@15")
    times = list(load.instants(arrival, Random(2)))
    for begin_s, end_s, expected in ((0, 1000, 5000), (1000, 2000, 10000), (2000, 3000, 15000)):
        held = sum(begin_s <= at < end_s for at in times)
        assert held == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "TIME@RATE"), ("10s", "TIME@RATE"), ("10s@", "TIME@RATE"), ("10s@x", "TIME@RATE"),
        ("10s@1-2-3", "TIME@RATE"), ("10s@1e3", "TIME@RATE"), ("10s@9999999", "TIME@RATE"),
        ("10s@1,,", "TIME@RATE"), ("10s@-1", "TIME@RATE"), ("0s@1", "above 0"),
        ("10x@1", "a time such as"), ("10s@0,1s@0-0", "every rate is 0"),
    ],
)  # fmt: skip
def test_stages_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^--rate .*{said}"):
        stages(text)
