"""What a trace sees is what single steps would show it, and capacity is where the SLO breaks."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Slo, UsageError
from agent.sizing.arrivals import HOUR_S, Arrivals, recorded, times
from agent.sizing.engine import EngineSpec, decode_step_seconds, prefill_seconds
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.replay import (
    BRACKET,
    Replayed,
    Wait,
    capacity_ratio,
    headroom,
    replay,
    saturated_rps,
    with_margin,
)
from agent.sizing.simulate import Engine

SPEC = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))
SLOW = msgspec.structs.replace(SPEC, max_num_seqs=4, max_num_batched_tokens=256)
TTFT = Slo("ttft", "p95", 500.0)


def spec(**change: object) -> EngineSpec:
    return msgspec.structs.replace(SPEC, **change)


def poisson(rps: float, window_s: float, seed: int = 1, output: int = 256) -> Arrivals:
    rng = np.random.default_rng(seed)
    at_s = np.sort(rng.uniform(0, window_s, rng.poisson(rps * window_s)))
    lengths = np.full(at_s.size, 128), np.full(at_s.size, output)
    return recorded(at_s, *lengths, window_s=window_s)


# ------------------------------------------------------------------------------------- one engine


def test_requests_far_apart_each_have_an_engine_of_their_own() -> None:
    at_s, prompts, outputs = zip(
        *((100.0 * i, 100 * (i + 1), 50 + i) for i in range(5)), strict=True
    )
    done = replay(SPEC, recorded(at_s, prompts, outputs))
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        prefill_s = prefill_seconds(SPEC, prompt)
        decode_s = math.fsum(decode_step_seconds(SPEC, 1, prompt + i) for i in range(1, output))
        assert done.queue_s[index] == 0
        assert done.ttft_s[index] == pytest.approx(prefill_s)
        assert done.e2e_s[index] == pytest.approx(prefill_s + decode_s)
    assert done.level.requests == 5
    assert done.level.running_max == 1


def plainly(
    small: EngineSpec, arrivals: list[tuple[float, int, int]]
) -> tuple[list[float], Engine]:
    """When each request is done, by single steps and a clock of its own."""
    engine, now_s, due = Engine(small), 0.0, 0
    finished = [math.nan] * len(arrivals)
    while due < len(arrivals) or not engine.idle:
        if engine.idle:
            now_s = max(now_s, arrivals[due][0])
        while due < len(arrivals) and arrivals[due][0] <= now_s:
            engine.submit(due, arrivals[due][1], arrivals[due][2])
            due += 1
        step = engine.step()
        assert step is not None
        now_s += step.duration_s
        for request_id in step.finished:
            finished[request_id] = now_s
    return finished, engine


requests = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(1, 600), st.integers(1, 60)),
    min_size=1,
    max_size=40,
)


@given(requests)
@settings(max_examples=50)
def test_a_replay_does_not_depend_on_how_steps_are_joined(
    drawn: list[tuple[int, int, int]],
) -> None:
    small = spec(num_gpu_blocks=64, max_num_seqs=8, max_num_batched_tokens=256)
    arrivals = [(at_ms / 1e3, prompt, output) for at_ms, prompt, output in sorted(drawn)]
    done = replay(small, recorded(*zip(*arrivals, strict=True)))
    finished, engine = plainly(small, arrivals)
    sent = np.array([at_s for at_s, _, _ in arrivals])
    assert done.e2e_s == pytest.approx(np.array(finished) - sent, rel=1e-6, abs=1e-6)
    level = done.level
    total = sum(output for _, _, output in arrivals)
    assert level.output_tokens_per_s * level.window_s == pytest.approx(total)
    assert level.preemptions == engine.preemptions
    assert level.itl_ms.n == sum(output - 1 for _, _, output in arrivals)


@given(requests, st.integers(2, 4))
@settings(max_examples=20)
def test_replicas_in_turns_are_engines_apart(drawn: list[tuple[int, int, int]], n: int) -> None:
    arrivals = [(at_ms / 1e3, prompt, output) for at_ms, prompt, output in sorted(drawn)]
    together = replay(SLOW, recorded(*zip(*arrivals, strict=True)), replicas=n)
    for at in range(min(n, len(arrivals))):
        alone = replay(SLOW, recorded(*zip(*arrivals[at::n], strict=True)))
        assert together.e2e_s[at::n] == pytest.approx(alone.e2e_s)
    assert together.level.requests == len(arrivals)


def test_the_least_loaded_replica_is_taken() -> None:
    """Long replies on every other request: taken in turns, one replica gets all of them."""
    at_s = np.arange(40) * 0.1
    output = np.where(np.arange(40) % 2, 4, 400)
    arrivals = recorded(at_s, np.full(40, 64), output)
    in_turns = replay(SLOW, arrivals, replicas=2)
    least = replay(SLOW, arrivals, replicas=2, routing="least_loaded")
    assert least.queue_s.max() < 0.7 * in_turns.queue_s.max()


def test_what_is_too_long_is_rejected_and_counted() -> None:
    small = spec(num_gpu_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=8)
    done = replay(small, recorded([0.0, 0.1], [4, 100], [4, 4]))
    assert (done.level.rejected, done.level.requests) == (1, 1)
    assert math.isnan(done.e2e_s[1])


def test_a_replay_of_nothing() -> None:
    done = replay(SPEC, recorded([], [], []))
    assert (done.level.requests, done.level.output_tokens_per_s) == (0, 0.0)
    assert done.hours == []


def test_at_least_one_replica_has_to_be_left() -> None:
    with pytest.raises(UsageError, match="at least one"):
        replay(SPEC, recorded([0.0], [1], [1]), replicas=0)


# ------------------------------------------------------------------------------------------ hours


def test_hours_are_those_of_the_clock_and_add_up() -> None:
    rng = np.random.default_rng(3)
    at_s = np.sort(rng.uniform(0, 3 * HOUR_S, 300))
    lengths = np.full(300, 200), np.full(300, 50)
    arrivals = recorded(at_s, *lengths, window_s=3 * HOUR_S, start_unix_s=1800.0)
    done = replay(SPEC, arrivals, replicas=2)
    hours, whole = done.hours, done.level
    assert [hour.start_unix_s for hour in hours] == [1800.0, 3600.0, 7200.0, 10800.0]
    assert sum(hour.level.requests for hour in hours) == whole.requests == 300
    expected = np.bincount(((1800 + at_s) // HOUR_S).astype(int))
    assert [hour.level.requests for hour in hours] == list(expected)
    tokens = sum(hour.level.output_tokens_per_s * hour.level.window_s for hour in hours)
    assert tokens == pytest.approx(300 * 50)
    assert max(hour.level.kv_usage_max for hour in hours) == whole.kv_usage_max
    first = done.ttft_s[at_s < 1800]
    assert hours[0].level.ttft_ms.p95 == pytest.approx(1e3 * np.quantile(first, 0.95))


def test_preemptions_are_told_in_their_hour() -> None:
    at_s = np.concatenate((np.zeros(1), np.full(40, 4000.0)))
    arrivals = recorded(at_s, np.full(41, 128), np.full(41, 128), window_s=2 * HOUR_S)
    quiet, busy = replay(spec(num_gpu_blocks=64), arrivals).hours
    assert (quiet.level.preemptions, quiet.level.waiting_max) == (0, 0)
    assert busy.level.preemptions > 0
    assert busy.level.kv_usage_max > 0.9


# --------------------------------------------------------------------------------------- capacity


def p95_s(done: Replayed) -> float:
    return float(np.quantile(done.queue_s, 0.95))


def test_the_multiple_is_where_the_slo_breaks() -> None:
    arrivals = poisson(1.0, 600.0)
    found = capacity_ratio(SLOW, arrivals)
    assert p95_s(replay(SLOW, times(arrivals, found.value, 0))) < 2.0
    assert p95_s(replay(SLOW, times(arrivals, found.value * BRACKET, 0))) > 2.0
    assert found.hi is not None
    assert found.lo <= found.value <= found.hi
    assert found.breaks == ("queue:p95<2000ms",)
    ratio = found.ratio
    assert ratio.value == 1 / found.value
    assert ratio.lo == pytest.approx(1 / found.hi)
    assert ratio.hi == pytest.approx(1 / found.lo)


def test_twice_the_demand_is_half_the_multiple() -> None:
    """Of independent users: the law that a ratio of capacity to demand has to keep."""
    once = capacity_ratio(SLOW, poisson(0.5, 600.0)).value
    twice = capacity_ratio(SLOW, poisson(1.0, 600.0)).value
    assert once / twice == pytest.approx(2, rel=0.2)


def test_two_replicas_hold_about_twice_as_much() -> None:
    arrivals = poisson(1.0, 300.0)
    one, two = (capacity_ratio(SLOW, arrivals, replicas=n).value for n in (1, 2))
    assert two / one == pytest.approx(2, rel=0.2)


def test_the_tightest_target_decides() -> None:
    arrivals = poisson(1.0, 300.0)
    loose = capacity_ratio(SLOW, arrivals, [TTFT])
    tight = capacity_ratio(SLOW, arrivals, [TTFT, Slo("e2e", "p95", 2200.0)])
    assert tight.value < loose.value
    assert tight.breaks == ("e2e:p95<2200ms",)


@pytest.mark.parametrize("target", [Slo("ttft", "mean", 5.0), Slo("e2e", "max", 1.0)])
def test_what_one_request_breaks_no_multiple_holds(target: Slo) -> None:
    found = capacity_ratio(SLOW, poisson(1.0, 100.0), [target])
    assert (found.value, found.lo) == (0.0, 0.0)
    assert found.ratio.value == math.inf


def test_what_nothing_breaks_has_no_upper_end() -> None:
    found = capacity_ratio(SPEC, recorded([0.0, 50.0], [10, 10], [5, 5], window_s=100.0))
    assert found.value == 64
    assert found.hi is None
    assert found.breaks == ()
    assert found.ratio.lo == 0


def test_a_refused_request_misses_every_target() -> None:
    arrivals = recorded(np.arange(100.0), [10, 10, 10, 200_000] * 25, [5] * 100)
    assert capacity_ratio(SPEC, arrivals, [TTFT]).value == 0.0


def test_a_broken_hour_does_not_hide_behind_quiet_ones() -> None:
    """Less than 5 % of the requests come in the one hour that breaks: pooled, the P95 holds."""
    rng = np.random.default_rng(5)
    quiet = rng.uniform(0, 20 * HOUR_S, 2000)
    busy = 10 * HOUR_S + rng.uniform(0, 20, 90)  # twenty seconds of it
    at_s = np.sort(np.concatenate((quiet, busy)))
    lengths = np.full(at_s.size, 128), np.full(at_s.size, 256)
    arrivals = recorded(at_s, *lengths, window_s=20 * HOUR_S)
    assert p95_s(replay(SLOW, arrivals)) < 2.0
    assert capacity_ratio(SLOW, arrivals).value < 1.0


def test_an_interval_holds_what_other_windows_of_the_same_service_show() -> None:
    """Of 24 windows of 600 s the interval held the median of all in 22, before it was stretched."""
    found = [capacity_ratio(SLOW, poisson(1.0, 200.0, seed)) for seed in range(9)]
    middle = sorted(one.value for one in found)[4]
    assert sum(one.lo <= middle <= (one.hi or math.inf) for one in found) >= 8


def test_of_many_requests_the_busiest_hours_are_replayed() -> None:
    rng = np.random.default_rng(9)
    rates = [0.01] * 20 + [0.3] + [0.01] * 3
    single = msgspec.structs.replace(SLOW, max_num_seqs=1)
    at_s = np.concatenate(
        [
            hour * HOUR_S + rng.uniform(0, HOUR_S, int(rate * HOUR_S))
            for hour, rate in enumerate(rates)
        ]
    )
    lengths = np.full(at_s.size, 128), np.full(at_s.size, 256)
    arrivals = recorded(at_s, *lengths, window_s=24 * HOUR_S)
    few = capacity_ratio(single, arrivals, requests=1200)
    assert few.requests < len(arrivals)
    assert few.value == pytest.approx(capacity_ratio(single, arrivals).value, rel=0.1)


def test_an_end_that_nobody_asks_for_costs_no_replay() -> None:
    arrivals = poisson(1.0, 300.0)
    both, low, none = (capacity_ratio(SLOW, arrivals, ends=e) for e in ("both", "low", "none"))
    assert none.replays <= low.replays <= both.replays <= 20
    assert none.value == low.value == both.value
    assert 0 < low.lo == both.lo <= both.value
    assert none.lo <= both.lo


@pytest.mark.parametrize("about", [0.1, 0.9, 7.0])
def test_where_it_is_looked_for_first_does_not_matter(about: float) -> None:
    arrivals = poisson(1.0, 300.0)
    found = capacity_ratio(SLOW, arrivals, about=about)
    unaided = capacity_ratio(SLOW, arrivals)
    assert found.lo <= unaided.value <= (found.hi or math.inf)


def test_the_same_seed_gives_the_same_answer() -> None:
    arrivals = poisson(1.0, 200.0)
    assert capacity_ratio(SLOW, arrivals, seed=4) == capacity_ratio(SLOW, arrivals, seed=4)


def test_nothing_has_no_multiple() -> None:
    with pytest.raises(UsageError, match="no request"):
        capacity_ratio(SPEC, recorded([], [], []))


# --------------------------------------------------------------------------------------- headroom


def bursts(rps: float, window_s: float, size: int) -> Arrivals:
    rng = np.random.default_rng(11)
    at_s = np.repeat(np.sort(rng.uniform(0, window_s, int(rps * window_s / size))), size)
    return recorded(at_s, np.full(at_s.size, 128), np.full(at_s.size, 32), window_s=window_s)


def test_what_comes_in_bursts_needs_more_headroom() -> None:
    even = headroom(SLOW, poisson(1.0, 600.0))
    bursty = headroom(SLOW, bursts(2.0, 600.0, 60))
    assert 1.0 < even.value < 1.5
    assert bursty.value > 1.3 * even.value
    assert even.lo is not None
    assert even.lo <= even.value


def test_saturated_is_what_a_closed_loop_of_all_seats_writes() -> None:
    arrivals = poisson(4.0, 300.0)
    found = saturated_rps(SLOW, arrivals)
    step_s = decode_step_seconds(SLOW, 4, 128 + 128)
    assert found == pytest.approx(4 / (256 * step_s + prefill_seconds(SLOW, 128)), rel=0.1)
    assert saturated_rps(SLOW, arrivals, 2) == pytest.approx(2 * found, rel=0.05)


def test_a_flat_margin_is_a_load_of_that_share_of_the_capacity() -> None:
    arrivals = poisson(1.0, 600.0)
    done = with_margin(SLOW, arrivals, 0.2)
    offered = len(done.arrivals) / 600.0
    assert offered * 1.2 == pytest.approx(saturated_rps(SLOW, arrivals), rel=0.02)
    assert p95_s(with_margin(SLOW, bursts(2.0, 600.0, 60), 0.2)) > 2 * p95_s(done)


def test_a_wait_is_a_target_like_others() -> None:
    arrivals = poisson(1.0, 300.0)
    assert capacity_ratio(SLOW, arrivals, [Wait()]) == capacity_ratio(SLOW, arrivals)
    tight = capacity_ratio(SLOW, arrivals, [Wait(bound_ms=100.0)])
    assert tight.value < capacity_ratio(SLOW, arrivals).value
