"""When requests are due: laws of the arrival processes."""

from __future__ import annotations

from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from loadgen.arrival import ARRIVALS, constant, instants, poisson

rates = st.floats(0.01, 1e4)


@settings(max_examples=50, deadline=None)
@given(rates, st.sampled_from(ARRIVALS), st.integers())
def test_instants_never_go_back_and_the_same_seed_gives_the_same(
    rate: float, arrival: str, seed: int
) -> None:
    first = list(islice(instants(arrival, rate, Random(seed)), 50))
    assert first == list(islice(instants(arrival, rate, Random(seed)), 50))
    assert first[0] >= 0
    assert all(a < b for a, b in pairwise(first))


@settings(max_examples=50, deadline=None)
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


@pytest.mark.parametrize(("arrival", "rate"), [("poisson", 0), ("constant", -1), ("regular", 1)])
def test_what_cannot_be_is_a_usage_error(arrival: str, rate: float) -> None:
    with pytest.raises(UsageError, match="above 0" if rate <= 0 else "poisson, constant"):
        instants(arrival, rate, Random(1))
