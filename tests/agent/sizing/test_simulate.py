"""The scheduler keeps its laws whatever is thrown at it, and its times are the model's."""

from __future__ import annotations

import math
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from agent.sizing.engine import (
    Cost,
    EngineSpec,
    attention_flops,
    decode_step_seconds,
    prefill_seconds,
)
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.simulate import Engine, Step, _weighted, closed_loop
from agent.stats import summary

SPEC = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))


def spec(**change: object) -> EngineSpec:
    return msgspec.structs.replace(SPEC, **change)


SMALL = spec(num_gpu_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=8)

# Engines so small that every limit is met: seats, token budget and blocks.
small_specs = st.builds(
    lambda blocks, size, seats, spare: spec(
        num_gpu_blocks=blocks,
        block_size=size,
        max_num_seqs=seats,
        max_num_batched_tokens=seats + spare,
    ),
    st.integers(2, 20),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(0, 12),
)


@st.composite
def loads(draw: st.DrawFn) -> tuple[EngineSpec, list[tuple[int, int]]]:
    """An engine and requests (prompt, output) that each fit into it alone."""
    small = draw(small_specs)
    longest = min(40, small.num_gpu_blocks * small.block_size)
    lengths = st.integers(1, longest - 1).flatmap(
        lambda prompt: st.tuples(st.just(prompt), st.integers(1, longest - prompt))
    )
    return small, draw(st.lists(lengths, min_size=1, max_size=12))


def run(engine: Engine, max_steps: int = 1) -> list[Step]:
    """Steps until idle, checking after each what has to hold at any time."""
    steps = []
    while (step := engine.step(max_steps, with_ids=max_steps == 1)) is not None:
        steps.append(step)
        assert len(steps) < 100_000, "the engine does not come to an end"
        assert 0 <= engine.blocks_used <= engine.num_blocks
        assert max(step.blocks) <= engine.num_blocks
        assert step.running <= engine.spec.max_num_seqs
        assert step.decoded + step.prefilled <= engine.spec.max_num_batched_tokens
        assert step.duration_s > 0
    return steps


@given(loads())
def test_every_request_gets_exactly_its_tokens(
    load: tuple[EngineSpec, list[tuple[int, int]]],
) -> None:
    small, requests = load
    engine = Engine(small)
    for index, (prompt, output) in enumerate(requests):
        engine.submit(index, prompt, output)
    steps = run(engine)
    given_tokens = Counter(
        request_id for step in steps for request_id in (*step.tokens, *step.first, *step.resumed)
    )
    assert given_tokens == {index: output for index, (_, output) in enumerate(requests)}
    for name in ("admitted", "first", "finished"):
        everyone = sorted(request_id for step in steps for request_id in getattr(step, name))
        assert everyone == list(range(len(requests)))
    assert engine.idle
    assert engine.blocks_used == engine.running == engine.waiting == engine.decoding == 0
    assert engine.preemptions == sum(len(step.preempted) for step in steps)
    computed = sum(step.prefilled for step in steps)
    assert computed >= sum(prompt for prompt, _ in requests)
    if not engine.preemptions:
        assert computed == sum(prompt for prompt, _ in requests)


@given(loads(), st.integers(2, 50))
def test_many_steps_at_once_do_what_single_steps_do(
    load: tuple[EngineSpec, list[tuple[int, int]]], most: int
) -> None:
    small, requests = load
    one, many = Engine(small), Engine(small)
    for index, (prompt, output) in enumerate(requests):
        one.submit(index, prompt, output)
        many.submit(index, prompt, output)
    at_once = run(many, most)
    singles = run(one)
    assert sum(step.steps for step in at_once) == len(singles)
    assert many.preemptions == one.preemptions
    single = iter(singles)
    for step in at_once:
        same = [next(single) for _ in range(step.steps)]
        assert step.duration_s == pytest.approx(math.fsum(s.duration_s for s in same))
        assert {s.decoded for s in same} == {step.decoded}
        assert (step.blocks[0], step.blocks[1]) == (same[0].blocks[0], same[-1].blocks[1])
        for name in ("admitted", "first", "resumed", "finished", "preempted"):
            assert [i for s in same for i in getattr(s, name)] == getattr(step, name)


@given(loads(), st.data())
def test_what_is_aborted_leaves_nothing_behind(
    load: tuple[EngineSpec, list[tuple[int, int]]], data: st.DataObject
) -> None:
    small, requests = load
    engine = Engine(small)
    for index, (prompt, output) in enumerate(requests):
        engine.submit(index, prompt, output)
    left = set(range(len(requests)))
    while (step := engine.step(with_ids=True)) is not None:
        assert not set(step.tokens) - left
        left -= set(step.finished)
        victim = data.draw(st.integers(-3, len(requests) - 1))
        assert engine.abort(victim) == (victim in left)
        left.discard(victim)
    assert not left
    assert engine.blocks_used == engine.running == engine.waiting == engine.decoding == 0


@given(loads())
def test_first_come_is_first_served(load: tuple[EngineSpec, list[tuple[int, int]]]) -> None:
    small, requests = load
    engine = Engine(small)
    for index, (prompt, output) in enumerate(requests):
        engine.submit(index, prompt, output)
    admitted = [request_id for step in run(engine) for request_id in step.admitted]
    assert admitted == sorted(admitted)


def test_the_most_recently_admitted_gives_way_and_comes_back_first() -> None:
    engine = Engine(SMALL)  # 48 tokens in blocks of 4
    for index in range(4):
        engine.submit(index, 4, 20)
    engine.submit(4, 4, 1)
    steps = run(engine)
    preempted = [request_id for step in steps for request_id in step.preempted]
    assert preempted[0] == 3
    assert 4 not in preempted
    first = {request_id: at for at, step in enumerate(steps) for request_id in step.first}
    back = next(at for at, step in enumerate(steps) if 3 in step.resumed)
    assert back < first[4]  # it was thrown out, but it came before


def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes() -> None:
    engine = Engine(spec(max_num_seqs=4, max_num_batched_tokens=100))
    engine.submit(0, 10, 50)
    engine.step()
    engine.submit(1, 250, 2)
    prefilled = []
    while not (step := engine.step(with_ids=True)).first:  # type: ignore[union-attr]
        assert step is not None
        prefilled.append(step.prefilled)
        assert step.tokens == [0]
    assert [*prefilled, step.prefilled] == [99, 99, 52]


def test_a_step_takes_what_the_model_says() -> None:
    engine = Engine(SPEC)
    cost = Cost(SPEC)
    engine.submit(0, 100, 10)
    engine.submit(1, 300, 10)
    step = engine.step()
    assert step is not None
    flops = attention_flops(SPEC.model, 0, 100) + attention_flops(SPEC.model, 0, 300)
    assert step.duration_s == cost.step_s(0, 0, 400, flops)
    step = engine.step()
    assert step is not None
    assert step.duration_s == pytest.approx(cost.step_s(2, 402), rel=1e-12)


def test_what_cannot_be_served_is_refused_at_once() -> None:
    engine = Engine(SMALL)
    with pytest.raises(UsageError, match="max_model_len of 48"):
        engine.submit(0, 40, 9)
    with pytest.raises(UsageError, match="at least one"):
        engine.submit(0, 0, 1)
    engine.submit(0, 40, 8)
    with pytest.raises(ValueError, match="already"):
        engine.submit(0, 1, 1)
    assert engine.step() is not None
    with pytest.raises(UsageError, match="max_num_batched_tokens"):
        Engine(spec(max_num_batched_tokens=1))


def test_what_is_cached_is_not_computed_but_kept() -> None:
    engine, whole = Engine(SPEC), Engine(SPEC)
    engine.submit(0, 300, 2, 200)
    whole.submit(0, 300, 2)
    step, other = engine.step(), whole.step()
    assert step is not None
    assert other is not None
    assert (step.prefilled, other.prefilled) == (100, 300)
    assert step.duration_s == Cost(SPEC).step_s(0, 0, 100, attention_flops(SPEC.model, 200, 300))
    assert step.blocks == other.blocks
    assert step.first == [0]


def test_a_prompt_that_is_all_cached_still_computes_its_last_token() -> None:
    engine = Engine(SPEC)
    engine.submit(0, 300, 1, 5000)
    step = engine.step()
    assert step is not None
    assert (step.prefilled, step.finished) == (1, [0])
    assert engine.blocks_used == 0


def test_what_was_cached_is_computed_again_after_a_preemption() -> None:
    engine = Engine(SMALL)  # 48 tokens in blocks of 4
    for index in range(4):
        engine.submit(index, 4, 20, 3)
    steps = run(engine)
    assert engine.preemptions
    first = sum(step.prefilled for step in steps if step.first)
    assert first == 4
    assert sum(step.prefilled for step in steps) > 4 * 4
    assert engine.blocks_used == 0


def test_an_idle_engine_has_no_step() -> None:
    assert Engine(SPEC).step() is None
    assert not Engine(SPEC).abort(7)


# ----------------------------------------------------------------------------------- virtual time


@given(st.integers(1, 4000), st.integers(2, 500))
@settings(max_examples=30)
def test_one_client_sees_the_closed_form(prompt: int, output: int) -> None:
    """At concurrency 1 TTFT is the prefill, a gap the decode step, and the rate one over both."""
    prefill_s = prefill_seconds(SPEC, prompt)
    steps_s = [decode_step_seconds(SPEC, 1, prompt + i) for i in range(1, output)]
    e2e_s = prefill_s + math.fsum(steps_s)
    level = closed_loop(SPEC, 1, prompt, output, 20.5 * e2e_s, turnaround_s=0.0)
    assert level.requests == 21
    assert level.ttft_ms.mean == pytest.approx(1e3 * prefill_s)
    assert level.ttft_ms.std == pytest.approx(0, abs=1e-6)
    assert level.e2e_ms.mean == pytest.approx(1e3 * e2e_s)
    assert level.itl_ms.mean == pytest.approx(1e3 * math.fsum(steps_s) / (output - 1))
    assert level.tpot_ms.mean == pytest.approx(level.itl_ms.mean)
    assert level.output_tokens_per_s == pytest.approx(output / e2e_s, rel=0.06)
    assert level.running_mean == pytest.approx(1)
    assert (level.waiting_max, level.preemptions) == (0, 0)


def test_the_admission_cap_shows_as_waiting() -> None:
    level = closed_loop(spec(max_num_seqs=8), 32, 128, 64, 20.0)
    assert level.running_max == 8
    assert level.waiting_mean == pytest.approx(24, abs=1)
    assert level.kv_usage_max < 0.1
    assert level.output_tokens_per_s == pytest.approx(
        closed_loop(spec(max_num_seqs=8), 8, 128, 64, 20.0).output_tokens_per_s, rel=0.1
    )


def test_a_small_cache_shows_as_kv_use_preemptions_and_waiting() -> None:
    level = closed_loop(spec(num_gpu_blocks=256), 64, 128, 128, 30.0)
    assert level.kv_usage_max > 0.97
    assert level.preemptions > 0
    assert level.waiting_mean > 20
    assert level.running_mean < 32


@pytest.mark.parametrize("concurrency", [1, 8, 64, 400])
def test_littles_law(concurrency: int) -> None:
    """In flight = throughput · mean E2E; the gauges lack who came since the step began."""
    level = closed_loop(SPEC, concurrency, 256, 64, 30.0)
    assert level.running_mean + level.waiting_mean == pytest.approx(concurrency, rel=0.03)
    assert level.e2e_ms.mean is not None
    in_flight = level.request_throughput * level.e2e_ms.mean / 1e3
    assert in_flight == pytest.approx(concurrency, rel=0.05)


def test_a_request_waits_for_the_end_of_the_step_it_arrives_in() -> None:
    """What a client sees that is not infinitely fast: nearly a step more than the prefill."""
    at_once = closed_loop(SPEC, 16, 64, 128, 20.0, turnaround_s=0.0)
    later = closed_loop(SPEC, 16, 64, 128, 20.0, turnaround_s=0.0005)
    assert at_once.ttft_ms.p50 is not None
    assert later.ttft_ms.p50 is not None
    assert at_once.itl_ms.p50 is not None
    waited_ms = later.ttft_ms.p50 - at_once.ttft_ms.p50
    assert waited_ms == pytest.approx(at_once.itl_ms.p50, rel=0.15)


def test_a_window_too_short_is_the_whole_level() -> None:
    level = closed_loop(SPEC, 4, 128, 1000, 1.0)
    assert level.window_s == level.duration_s
    assert level.requests == 4


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 5)), min_size=1, max_size=30),
)
def test_a_weighted_summary_is_that_of_the_whole_sample(pairs: list[tuple[float, int]]) -> None:
    values = np.array([value for value, _ in pairs])
    counts = np.array([count for _, count in pairs])
    expected = msgspec.structs.asdict(summary(np.repeat(values, counts)))
    found = msgspec.structs.asdict(_weighted(values, counts.astype(float)))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-4)
