"""Drawn requests add up to the minutes they come from; more of them are the same demand, larger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import UsageError
from agent.sizing.arrivals import (
    COPY_WITHIN_S,
    HOUR_S,
    Arrivals,
    _draw,
    busiest,
    observed,
    recorded,
    served,
    times,
)
from agent.sizing.engine import EngineSpec
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.pattern import pattern
from agent.sizing.window import Window
from agent.stats import Histogram
from tests.agent.sizing.virtual_server import VirtualServer, watched

BOUNDS = (100.0, 200.0, 400.0, float("inf"))


def some(n: int = 200, window_s: float = 1000.0, seed: int = 0) -> Arrivals:
    rng = np.random.default_rng(seed)
    at_s = np.sort(rng.uniform(0, window_s, n))
    return recorded(at_s, np.arange(n) + 1, np.arange(n) + 2, window_s=window_s)


# --------------------------------------------------------------------------------------- recorded


def test_recorded_requests_are_put_in_order_and_the_window_ends_with_the_last() -> None:
    found = recorded([3.0, 1.0], [30, 10], [300, 100], cached_tokens=[3, 1])
    assert found.at_s.tolist() == [1.0, 3.0]
    assert found.prompt_tokens.tolist() == [10, 30]
    assert found.output_tokens.tolist() == [100, 300]
    assert found.cached_tokens.tolist() == [1, 3]
    assert found.window_s == 3.0
    assert found.mean_rps == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (([-1.0], [1], [1]), "negative"),
        (([float("nan")], [1], [1]), "no number"),
        (([0.0], [0], [1]), "at least one"),
        (([0.0], [1], [0]), "at least one"),
        (([0.0, 1.0], [1], [1]), "equally many"),
    ],
)
def test_what_is_no_request_is_refused(columns: tuple[list[float], ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        recorded(*columns)


def test_served_requests_are_taken_as_they_came() -> None:
    rows = [
        {"at_ms": 1_000_500, "prompt_tokens": 10, "output_tokens": 5},
        {"at_ms": 1_000_700, "prompt_tokens": None, "output_tokens": 5},
        {"at_ms": 1_002_000, "prompt_tokens": 20, "output_tokens": 6},
    ]
    found = served(rows, 1000.0, 1060.0)
    assert found.at_s.tolist() == pytest.approx([0.5, 2.0])
    assert found.prompt_tokens.tolist() == [10, 20]
    assert (found.window_s, found.start_unix_s) == (60.0, 1000.0)
    with pytest.raises(UsageError, match="spans"):
        served(rows[1:2], 1000.0, 1060.0)


# --------------------------------------------------------------------------------------- observed


def minute(at: int, received: float, hits: float = 0.0, prompt: float = 150.0) -> Minute:
    """A minute in which `received` requests came, of prompts of 100 to 200 and replies of 50."""
    counts = (0.0, received, 0.0, 0.0)
    totals = {
        "requests_received_total": received,
        "prompt_length_tokens_sum": prompt * received,
        "prompt_length_tokens_count": received,
        "output_length_tokens_sum": 50 * received,
        "output_length_tokens_count": received,
        "prefix_cache_queries_total": 100.0,
        "prefix_cache_hits_total": hits,
    }
    values = tuple(
        MinuteValue(name, (), 0, 0, 0, 0, 0, increase=total) for name, total in totals.items()
    )
    histograms = (
        MinuteHistogram("prompt_length_tokens", (), BOUNDS, counts),
        MinuteHistogram("output_length_tokens", (), BOUNDS, (received, 0.0, 0.0, 0.0)),
    )
    return Minute("chat", 60 * at, values, histograms, 60.0)


def drawn(minutes: list[Minute], seed: int = 0, **more: int) -> Arrivals:
    window = Window(0, 60.0 * len(minutes), servers=["chat"]).add_all(minutes)
    return observed(window, pattern(window), np.random.default_rng(seed), **more)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=30).filter(any), st.integers(0, 9))
@settings(max_examples=30)
def test_each_minute_has_as_many_requests_as_were_counted(counts: list[int], seed: int) -> None:
    found = drawn([minute(at, count) for at, count in enumerate(counts)], seed)
    at = np.minimum(found.at_s // 60, len(counts) - 1).astype(int)
    assert np.bincount(at, minlength=len(counts)).tolist() == counts
    assert found.prompt_tokens.min() > 100 * 0.7
    assert found.start_unix_s == 0


def test_lengths_have_their_exact_mean_though_buckets_are_wide() -> None:
    found = drawn([minute(at, 100, prompt=120.0) for at in range(20)])
    assert found.prompt_tokens.mean() == pytest.approx(120, rel=0.01)
    assert found.output_tokens.mean() == pytest.approx(50, rel=0.01)
    assert found.prompt_tokens.std() > 10


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any))
def test_lengths_stay_in_their_buckets(counts: list[int]) -> None:
    one = Histogram(BOUNDS, tuple(float(count) for count in counts))
    found = _draw([one], 2000, None, np.random.default_rng(0))
    share = np.bincount(np.searchsorted(BOUNDS, found), minlength=5)[:4] / 2000
    known = np.array(counts) / sum(counts)
    known[2], known[3] = known[2] + known[3], 0.0  # the endless one's stand at its lower end
    assert share == pytest.approx(known, abs=0.05)


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any))
def test_lengths_of_a_known_mean_stay_in_their_buckets(counts: list[int]) -> None:
    one = Histogram(BOUNDS, (*(float(count) for count in counts), 0.0))
    mean = float(np.average((50.0, 150.0, 300.0), weights=counts))
    found = _draw([one], 2000, mean, np.random.default_rng(0))
    share = np.bincount(np.searchsorted(1.01 * np.array(BOUNDS), found), minlength=4) / 2000
    assert share[:3] == pytest.approx(np.array(counts) / sum(counts), abs=0.05)


def test_of_an_endless_bucket_alone_nothing_is_known() -> None:
    found = _draw([Histogram((float("inf"),), (5.0,))], 10, 300.0, np.random.default_rng(0))
    assert found.tolist() == [0.0] * 10


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), st.floats(1e-3, 1e6))
def test_the_mean_of_lengths_is_exact(counts: list[int], mean: float) -> None:
    one = Histogram(BOUNDS, tuple(float(count) for count in counts))
    found = _draw([one], 500, mean, np.random.default_rng(0))
    assert found.mean() == pytest.approx(mean)
    assert (found >= 0).all()


VLLM = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, np.inf)
COARSE = (1, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, np.inf)
LENGTHS = {
    "gamma": lambda rng, n: rng.gamma(2.0, 600.0, n),
    "short gamma": lambda rng, n: rng.gamma(2.0, 200.0, n),
    "exponential": lambda rng, n: rng.exponential(300.0, n),
    "log-normal": lambda rng, n: np.exp(rng.normal(5.5, 1.0, n)),
}


@pytest.mark.parametrize("bounds", [VLLM, COARSE], ids=["vllm", "coarse"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_distributed_as_they_were(name: str, bounds: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    true = LENGTHS[name](rng, 100_000)
    counts = np.bincount(np.searchsorted(bounds, true), minlength=len(bounds)).astype(float)
    found = _draw([Histogram(bounds, tuple(counts))], true.size, float(true.mean()), rng)
    # of the coarse ones the first holds all of P10
    ends, near = ((0.1, 0.5, 0.9, 0.95), 0.03) if bounds == VLLM else ((0.5, 0.9, 0.95), 0.04)
    assert found.std() == pytest.approx(true.std(), rel=near)
    assert np.quantile(found, ends) == pytest.approx(np.quantile(true, ends), rel=near)


def test_the_share_of_prompts_that_the_cache_knew_is_cached() -> None:
    found = drawn([minute(at, 100, hits=60.0) for at in range(3)])
    assert found.cached_tokens.sum() / found.prompt_tokens.sum() == pytest.approx(0.6, abs=0.01)


def test_what_bunches_from_minute_to_minute_bunches_inside_them() -> None:
    even = drawn([minute(at, 20) for at in range(60)])
    minutes = [minute(at, 200 if at % 10 == 0 else 0) for at in range(60)]
    bursty, spread = drawn(minutes), drawn(minutes, dispersion=1)

    def gaps_cv(found: Arrivals) -> float:
        gaps = np.concatenate([np.diff(found.at_s[found.at_s // 60 == at]) for at in range(60)])
        return float(gaps.std() / gaps.mean())

    assert gaps_cv(even) == pytest.approx(1, abs=0.15)
    assert gaps_cv(bursty) > 3
    assert gaps_cv(spread) == pytest.approx(1, abs=0.15)


def test_of_too_many_requests_the_busiest_hours_are_drawn() -> None:
    minutes = [minute(at, 50 if at >= 60 else 5) for at in range(120)]
    found = drawn(minutes, most=3000)
    assert len(found) == 3000
    assert found.at_s.min() >= HOUR_S


def test_without_counts_or_lengths_there_is_nothing_to_replay() -> None:
    empty = Minute("chat", 0, (), (), 60.0)
    with pytest.raises(UsageError, match="counts its requests"):
        drawn([empty])
    counted = MinuteValue("requests_received_total", (), 0, 0, 0, 0, 0, increase=5.0)
    with pytest.raises(UsageError, match="how long"):
        drawn([Minute("chat", 0, (counted,), (), 60.0)])


def test_the_minutes_of_a_watched_server_become_what_was_sent_to_it() -> None:
    server = VirtualServer(EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b")))
    rng = np.random.default_rng(1)
    sent = [
        (float(at), int(rng.integers(100, 500)), int(rng.integers(20, 90)))
        for at in np.sort(rng.uniform(0, 580, 1200))
    ]
    window = Window(0, 600, servers=["chat"]).add_all(watched(server, sent, 600.0))
    found = observed(window, pattern(window), rng)
    assert len(found) == pytest.approx(1200, abs=12)  # those before the first sample are unseen
    expected = np.bincount((np.array([at for at, _, _ in sent]) // 60).astype(int))
    counts = np.bincount(np.minimum(found.at_s // 60, 9).astype(int))
    assert counts == pytest.approx(expected, abs=16)
    assert found.prompt_tokens.mean() == pytest.approx(np.mean([p for _, p, _ in sent]), rel=0.05)
    assert found.output_tokens.mean() == pytest.approx(np.mean([o for _, _, o in sent]), rel=0.05)


# ---------------------------------------------------------------------------------- more, and less


def test_once_is_what_was_observed() -> None:
    arrivals = some()
    same = times(arrivals, 1.0, 7)
    assert same.at_s.tolist() == arrivals.at_s.tolist()
    assert same.prompt_tokens.tolist() == arrivals.prompt_tokens.tolist()


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.integers(0, 5))
@settings(max_examples=40)
def test_a_larger_multiple_holds_the_requests_of_a_smaller(a: float, b: float, seed: int) -> None:
    arrivals, (low, high) = some(), sorted((a, b))

    def everyone(multiple: float) -> set[tuple[float, int]]:
        found = times(arrivals, multiple, seed)
        assert np.all(np.diff(found.at_s) >= 0)
        assert found.at_s.min(initial=0) >= 0
        assert found.at_s.max(initial=0) <= arrivals.window_s
        assert len(found) == pytest.approx(multiple * len(arrivals), abs=45)
        pairs = list(zip(found.at_s.tolist(), found.prompt_tokens.tolist(), strict=True))
        return set(pairs)

    assert everyone(low) <= everyone(high)


def test_copies_keep_the_shape_of_the_day() -> None:
    """Time is not compressed: the busy stretch lasts as long at thrice the rate."""
    rng = np.random.default_rng(2)
    at_s = np.sort(np.concatenate((rng.uniform(0, 1e4, 500), rng.uniform(4000, 5000, 2000))))
    arrivals = recorded(at_s, np.ones(2500), np.ones(2500), window_s=1e4)
    found = times(arrivals, 3.0, 1)
    once, thrice = (
        np.histogram(one.at_s, np.arange(0, 1e4 + 1, 500))[0] for one in (arrivals, found)
    )
    assert thrice == pytest.approx(3 * once, abs=3 * 2000 * 2 * COPY_WITHIN_S / 1000)
    assert found.window_s == arrivals.window_s


def test_the_busiest_hours_ask_for_the_most_tokens() -> None:
    at_s = np.concatenate((np.full(10, 100.0), np.full(3, HOUR_S + 100), np.full(5, 2 * HOUR_S)))
    prompts = np.concatenate((np.full(10, 10), np.full(3, 1000), np.full(5, 10)))
    arrivals = recorded(at_s, prompts, np.ones(18), window_s=3 * HOUR_S)
    assert busiest(arrivals, 18) is arrivals
    assert busiest(arrivals, 13).at_s.tolist() == at_s[:13].tolist()
    least = busiest(arrivals, 1)
    assert least.prompt_tokens.tolist() == [1000] * 3
    assert least.window_s == arrivals.window_s
