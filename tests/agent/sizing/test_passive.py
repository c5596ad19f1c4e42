"""The passive curve against closed loops of the same engine, and the minutes that do not count."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from agent.minutes import Minute
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.engine import EngineSpec
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.passive import Passive, passive_curve
from agent.sizing.simulate import closed_loop
from agent.sizing.window import Window
from tests.agent.sizing.virtual_server import VirtualServer, watched

SPEC = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))
PROMPT, OUTPUT = 512, 128


def curve(minutes: list[Minute], minutes_min: int = 2) -> Passive:
    end = minutes[-1].start_unix_s + 60
    return passive_curve(Window(0, end, servers=["chat"]).add_all(minutes), minutes_min=minutes_min)


@pytest.fixture(scope="module")
def steady() -> list[Minute]:
    """Clients in a closed loop, 2, 8, 32 and 128 of them, five minutes each.

    They start one after another over 2 s: together they would stay one cohort that computes its
    prompts in step.
    """
    streams = [
        (index * 300 + 2.0 * (k - held) / (n - held), k, PROMPT, OUTPUT)
        for index, (held, n) in enumerate(pairwise((0, 2, 8, 32, 128)))
        for k in range(held + 1, n + 1)
    ]
    return watched(VirtualServer(SPEC), (), 1200.0, streams=streams)


def test_a_closed_loops_minutes_lie_on_the_sweeps_curve(steady: list[Minute]) -> None:
    found = curve(steady)
    assert [round(point.concurrency) for point in found.points] == [2, 8, 32, 128]
    for point in found.points:
        truth = closed_loop(SPEC, round(point.concurrency), PROMPT, OUTPUT, 60)
        assert point.output_tokens_per_s == pytest.approx(truth.output_tokens_per_s, rel=0.03)
        assert point.itl_ms.mean == pytest.approx(truth.itl_ms.mean, rel=0.03)
        assert point.request_throughput == pytest.approx(truth.request_throughput, rel=0.05)
        assert point.kv_usage_mean == pytest.approx(truth.kv_usage_mean, rel=0.1)
        assert point.output_tokens_per_s_ci95 is not None
        low, high = point.output_tokens_per_s_ci95
        assert low <= (point.output_tokens_per_s or 0) <= high
    assert found.reaches == pytest.approx(128, rel=0.02)
    assert "up to 128 requests in flight" in found.note


def test_production_that_arrives_on_its_own_lies_near_the_sweeps_curve() -> None:
    rng = np.random.default_rng(1)
    arrivals = [
        (float(at), PROMPT, OUTPUT)
        for index, rate in enumerate((0.5, 2, 5, 12, 25))
        for at in index * 600 + np.cumsum(rng.exponential(1 / rate, int(700 * rate)))
        if at < (index + 1) * 600
    ]
    found = curve(watched(VirtualServer(SPEC), arrivals, 3000.0))
    assert len(found.points) >= 5
    loads = (1, 2, 4, 8, 16, 32, 64)
    truth = [closed_loop(SPEC, n, PROMPT, OUTPUT, 60) for n in loads]
    for point in found.points:
        if point.concurrency < 1:
            continue
        tokens, itl = (
            np.interp(point.concurrency, loads, column)
            for column in (
                [one.output_tokens_per_s for one in truth],
                [one.itl_ms.mean or 0 for one in truth],
            )
        )
        assert point.output_tokens_per_s == pytest.approx(tokens, rel=0.05)
        assert point.itl_ms.mean == pytest.approx(itl, rel=0.06)
    # the load below one stream is carried to one by Little's law
    alone = found.levels()[0]
    assert alone.concurrency == 1
    assert alone.output_tokens_per_s == pytest.approx(truth[0].output_tokens_per_s, rel=0.05)


def test_its_levels_are_levels_of_a_sweep(steady: list[Minute]) -> None:
    levels = curve(steady).levels()
    assert [level.concurrency for level in levels] == [2, 8, 32, 128]
    bound = 1.2 * (levels[2].itl_ms.mean or 0)
    judged = analyse(levels, parse_slo(f"itl:mean<{bound}ms"))
    assert judged.knee is not None
    assert judged.knee.concurrency == 128
    assert judged.slo_capacity is not None
    assert 32 <= (judged.slo_capacity.concurrency or 0) < 128
    assert judged.slo_capacity.bracketed
    p95 = levels[0].ttft_ms.p95
    assert p95 is not None
    assert p95 >= (levels[0].ttft_ms.p50 or 0)


def marked(mark: str) -> Callable[[Minute], Minute]:
    return lambda one: msgspec.structs.replace(one, marks=(mark,))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (marked("restart"), "a restart, a gap or a jump of the clock"),
        (marked("clock_jump"), "a restart, a gap or a jump of the clock"),
        (marked("gap"), "a restart, a gap or a jump of the clock"),
        (lambda one: msgspec.structs.replace(one, covered_s=50.0), "not observed whole"),
    ],
)
def test_a_spoiled_minute_does_not_count(
    steady: list[Minute], spoil: Callable[[Minute], Minute], why: str
) -> None:
    before = curve(steady)
    after = curve([*steady[:6], spoil(steady[6]), *steady[7:]])
    assert after.minutes_used == before.minutes_used - 1
    assert after.unused[why] == before.unused.get(why, 0) + 1


def test_a_ramp_does_not_count() -> None:
    ramp = [(at * 1.0, at + 1, PROMPT, OUTPUT) for at in range(60)]
    found = curve(watched(VirtualServer(SPEC), (), 60.0, streams=ramp), 1)
    assert found.points == ()
    assert found.unused["the load changed"] == 1


def test_only_what_came_after_the_last_change_counts(steady: list[Minute]) -> None:
    minutes = [*steady[:10], marked("changed")(steady[10]), *steady[11:]]
    assert [round(point.concurrency) for point in curve(minutes).points] == [32, 128]


def test_without_load_it_says_what_it_takes() -> None:
    found = curve(watched(VirtualServer(SPEC), (), 300.0))
    assert (found.points, found.reaches, found.levels()) == ((), None, [])
    assert (
        found.note
        == "no steady minute under load was observed: the curve needs traffic, or a sweep"
    )
    assert found.unused["nothing in flight"] == 5


def test_sums_that_disagree_with_the_samples_are_not_believed(steady: list[Minute]) -> None:
    """A server that writes the ITL once a step, not once a token: the samples count."""

    def once_a_step(one: Minute) -> Minute:
        values = tuple(
            msgspec.structs.replace(v, increase=(v.increase or 0) / 8)
            if v.name.startswith("itl_seconds_") else v
            for v in one.values
        )  # fmt: skip
        return msgspec.structs.replace(one, values=values)

    found = curve([once_a_step(one) for one in steady])
    assert [round(point.concurrency) for point in found.points] == [2, 8, 32, 128]
