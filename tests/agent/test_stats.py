"""Quantiles and intervals against their definitions."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Lag, Stats
from agent.stats import (
    Histogram,
    batch_means_ci95,
    coarsened,
    holm,
    lag,
    merged,
    percentile,
    quantile,
    summary,
    t975,
    t_two_sided,
)

samples = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60)


def type_7(values: list[float], q: float) -> float:
    """The quantile of that name of Hyndman and Fan, written out."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@settings(max_examples=60)
@given(samples)
def test_summary_is_what_the_definitions_say(values: list[float]) -> None:
    got = summary(np.array(values))
    assert got.n == len(values)
    assert got.max == max(values)
    assert got.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999)):
        assert getattr(got, name) == pytest.approx(type_7(values, q), rel=1e-9, abs=1e-6)
    expected = statistics.stdev(values) if len(values) > 1 else 0.0
    assert got.std == pytest.approx(expected, rel=1e-6, abs=1e-3)


@settings(max_examples=60)
@given(samples)
def test_quantiles_are_in_order(values: list[float]) -> None:
    got = summary(np.array(values))
    ordered = [got.p50, got.p90, got.p95, got.p99, got.p999, got.max]
    assert ordered == sorted(ordered)  # type: ignore[type-var]


def test_an_empty_sample_has_no_figures() -> None:
    assert summary(np.empty(0)) == Stats()
    assert lag(np.empty(0)) == Lag()


def test_lag() -> None:
    got = lag(np.arange(101.0))
    assert (got.p50, got.p99, got.max) == (50.0, 99.0, 100.0)


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (4, 2.776), (19, 2.093), (30, 2.042)])
def test_students_t(df: int, t: float) -> None:
    assert t975(df) == t


def test_students_t_falls_towards_the_normal() -> None:
    values = [t975(df) for df in range(60)]
    assert values[0] == math.inf
    assert values == sorted(values, reverse=True)
    assert values[-1] == 1.96


def test_the_interval_of_batch_means_by_hand() -> None:
    low, high = batch_means_ci95(np.array([98.0, 100.0, 102.0])) or (0, 0)
    half = 4.303 * 2.0 / math.sqrt(3)
    assert (low, high) == pytest.approx((100 - half, 100 + half))


def test_the_interval_needs_two_batches_and_is_never_negative() -> None:
    assert batch_means_ci95(np.array([])) is None
    assert batch_means_ci95(np.array([5.0])) is None
    low, high = batch_means_ci95(np.array([0.0, 10.0])) or (1, 1)
    assert low == 0.0
    assert math.isfinite(high)


def test_the_interval_holds_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        low, high = batch_means_ci95(rng.normal(100, 5, 10)) or (0, 0)
        hits += low <= 100 <= high
    assert 925 <= hits <= 975


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 1000])
def test_the_t_distribution_and_its_quantile_agree(degrees: int) -> None:
    assert t_two_sided(t975(degrees), degrees) == pytest.approx(0.05, abs=1e-4)
    assert t_two_sided(-t975(degrees), degrees + 0.9) == t_two_sided(t975(degrees), degrees + 0.9)
    assert t_two_sided(0.0, degrees) == pytest.approx(1.0)
    assert 0 <= t_two_sided(1e6, degrees) < 1e-4


def test_nothing_is_sure_without_a_degree_of_freedom() -> None:
    assert t_two_sided(100.0, 0.5) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_no_and_bonferronis_correction(
    p_values: list[float],
) -> None:
    adjusted = holm(p_values)
    for p, a in zip(p_values, adjusted, strict=True):
        assert p <= a <= min(1.0, len(p_values) * p) or a == pytest.approx(p)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


# -------------------------------------------------------------------------------------- histograms

times = st.lists(st.floats(0, 30), min_size=1, max_size=60)
bucket_bounds = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20]), unique=True).map(
    lambda bounds: (*sorted(bounds), math.inf)
)


def histogram(sample: list[float], bounds: tuple[float, ...]) -> Histogram:
    where = np.searchsorted(bounds, sample)
    return Histogram(bounds, tuple(float(n) for n in np.bincount(where, minlength=len(bounds))))


@given(times, times, bucket_bounds)
def test_merged_histograms_are_the_histogram_of_the_union(
    a: list[float], b: list[float], bounds: tuple[float, ...]
) -> None:
    assert merged([histogram(a, bounds), histogram(b, bounds)]) == [histogram(a + b, bounds)]


@given(times, bucket_bounds, bucket_bounds)
def test_a_coarsened_histogram_is_that_of_the_same_sample(
    sample: list[float], fine: tuple[float, ...], other: tuple[float, ...]
) -> None:
    both = tuple(bound for bound in fine if bound in other)
    assert coarsened(histogram(sample, fine), other) == histogram(sample, both)


@given(times, times, bucket_bounds, bucket_bounds, st.floats(0.01, 0.99))
def test_a_quantile_lies_where_it_says(
    a: list[float], b: list[float], bounds: tuple[float, ...], others: tuple[float, ...], q: float
) -> None:
    """Of two servers with bounds of their own: the true quantile is inside lo and hi."""
    ordered = sorted(a + b)
    true = ordered[max(0, math.ceil(q * len(ordered) * (1 - 1e-12)) - 1)]
    found = quantile(merged([histogram(a, bounds), histogram(b, others)]), q)
    assert found is not None
    assert found.lo <= true
    assert found.hi is None or true <= found.hi
    assert found.lo <= found.value <= (found.hi or math.inf)


@given(times, bucket_bounds, st.floats(0.01, 0.99))
def test_a_percentile_is_the_quantiles_value(
    sample: list[float], bounds: tuple[float, ...], q: float
) -> None:
    one = histogram(sample, bounds)
    found, value = quantile([one], q), percentile([one], q)
    assert found is not None
    assert value is not None
    assert found.lo <= value <= (found.hi or found.lo)
    if one.counts[-1] == 0:  # else the mass without an end is drawn on, there
        assert value == pytest.approx(found.value, rel=1e-9)
    finer = Histogram((*one.bounds[:-1], 40.0, math.inf), (*one.counts, 0.0))
    both = quantile([one, finer], q)
    assert both is not None
    assert percentile([one, finer], q) == both.value
    assert percentile([Histogram(one.bounds, (0.0,) * len(one.bounds))], q) is None
    assert percentile([], q) is None


@given(times, bucket_bounds)
def test_quantiles_of_a_histogram_rise(sample: list[float], bounds: tuple[float, ...]) -> None:
    found = [quantile([histogram(sample, bounds)], q) for q in (0, 0.1, 0.5, 0.9, 0.99, 1)]
    values = [one.value for one in found if one]
    assert len(values) == 6
    assert values == sorted(values)


def test_a_quantile_by_hand() -> None:
    one = Histogram((1.0, 2.0, 4.0, math.inf), (2, 4, 4, 0))
    assert quantile([one], 0.5) == (1.75, 1, 2)
    assert quantile([one], 0.8) == (3, 2, 4)
    assert quantile([Histogram((1.0, math.inf), (1, 9))], 0.5) == (1, 1, None)
    assert quantile([], 0.5) is None
    assert quantile([Histogram((1.0, math.inf), (0, 0))], 0.5) is None
    assert one.n == 10


def test_histograms_of_other_bounds_stay_apart_and_lose_nothing() -> None:
    a, b = Histogram((1.0, math.inf), (1, 2)), Histogram((2.0, math.inf), (3, 4))
    assert merged([b, a, a]) == [Histogram((1.0, math.inf), (2, 4)), b]
