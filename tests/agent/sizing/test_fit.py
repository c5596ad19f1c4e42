"""The fit: planted efficiencies come back, what it cannot know it says, and intervals hold."""

from __future__ import annotations

import math
import re
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Level, Measurement, ServerView, Stats, UsageError
from agent.sizing import fit as fitting
from agent.sizing.engine import Efficiencies, EngineSpec
from agent.sizing.fit import (
    SPREADS,
    TYPICAL,
    Fit,
    Load,
    Measured,
    Point,
    Work,
    fit,
    fit_points,
    kv_bound,
    learn,
    logs,
    points_of,
    prior,
    transfer,
)
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.simulate import closed_loop
from agent.sizing.steady import steady

H100 = gpu("h100-sxm")
LLAMA = EngineSpec(H100, model("llama-3.1-8b"))
MOE = EngineSpec(H100, model("gpt-oss-20b"), precision="mxfp4")
TRUE = Efficiencies(t0_s=0.002, eta_b=0.62, eta_c=0.45, eta_p=0.4)
LOADS = [Load(i, o, c) for i, o in ((256, 256), (2048, 256), (512, 1024)) for c in (1, 8, 32, 128)]


def with_(spec: EngineSpec, shares: Efficiencies) -> EngineSpec:
    return msgspec.structs.replace(spec, efficiencies=shares)


def measured(
    spec: EngineSpec, loads: list[Load], shares: Efficiencies = TRUE, noise: float = 0.0
) -> list[Point]:
    """What the closed form gives, with noise; TTFT of single streams too."""
    random, points = Random(1), []
    for load in loads:
        at = steady(with_(spec, shares), load.concurrency, load.input_tokens, load.output_tokens,
                    reserves=load.reserved)  # fmt: skip
        factor = math.exp(random.gauss(0, noise))
        points.append(Point(load, at.output_tokens_per_s * factor, at.ttft_ms / 1e3))
    return points


# -------------------------------------------------------------------------------------------- law


@given(
    st.sampled_from([LLAMA, MOE, msgspec.structs.replace(LLAMA, tp=2)]),
    st.builds(
        Efficiencies,
        t0_s=st.floats(1e-4, 0.02),
        eta_b=st.floats(0.1, 1),
        eta_c=st.floats(0.05, 1),
        eta_p=st.floats(0.05, 1),
    ),
    st.builds(
        Load,
        input_tokens=st.integers(1, 8000),
        output_tokens=st.integers(2, 4000),
        concurrency=st.integers(1, 2000),
        reserved=st.booleans(),
    ),
)
@settings(max_examples=60)
def test_the_law_is_the_closed_form(spec: EngineSpec, shares: Efficiencies, load: Load) -> None:
    """What is fitted is what `agent predict` says: to the last digit."""
    at = steady(with_(spec, shares), load.concurrency, load.input_tokens, load.output_tokens,
                reserves=load.reserved)  # fmt: skip
    rate = math.exp(Work(spec, [load]).log_rate(logs(shares))[0])
    assert rate == pytest.approx(at.output_tokens_per_s, rel=1e-6)
    assert kv_bound(spec, load) == at.kv_bound


def test_a_prompt_in_the_cache_costs_no_arithmetic() -> None:
    cold, warm = Load(4000, 100, 32), Load(4000, 100, 32, hit_ratio=0.9)
    cold_rate, warm_rate = Work(LLAMA, [cold, warm]).log_rate(logs(TRUE))
    assert warm_rate > cold_rate + 0.5


# -------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("spec", [LLAMA, MOE], ids=["dense", "experts"])
def test_planted_efficiencies_come_back(spec: EngineSpec) -> None:
    fitted = fit_points(measured(spec, LOADS, noise=0.02), spec)
    assert fitted.ok
    assert fitted.rms < 0.05
    assert fitted.spec.efficiencies.eta_b == pytest.approx(TRUE.eta_b, rel=0.12)
    for name, estimate in fitted.estimates.items():
        assert estimate.lo <= estimate.value <= estimate.hi
        assert estimate.lo <= getattr(TRUE, name) <= estimate.hi, name


def test_what_the_sweep_did_not_show_stays_wide() -> None:
    """One stream alone is bound by memory: it says nothing of compute in decode."""
    single = [Load(64, 512 * n, 1) for n in (1, 2, 4, 8)]
    estimates = fit_points(measured(LLAMA, single), LLAMA).estimates
    width = {name: one.hi / one.lo for name, one in estimates.items()}
    assert width["eta_c"] > 4 * width["eta_b"]
    assert estimates["eta_c"].hi > 0.7


def test_a_simulated_engine_is_fitted_from_its_own_sweep() -> None:
    """Played step by step, not by the law: held-out concurrencies are within 5 %."""
    spec = with_(LLAMA, TRUE)
    rates = {c: closed_loop(spec, c, 512, 64, 4.0).output_tokens_per_s for c in (1, 4, 8, 16, 32)}
    known = [Point(Load(512, 64, c), rate) for c, rate in rates.items() if c != 8]
    expected = fit_points(known, LLAMA).expect(Load(512, 64, 8))
    assert expected.output_tokens_per_s.value == pytest.approx(rates[8], rel=0.05)
    assert expected.outside == []


def test_what_is_replayed_shows_what_was_swept() -> None:
    """Long prompts, which the law adds to a step and the simulated engine hides in it."""
    true = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))
    swept = {at: closed_loop(true, at, 1200, 200, 30.0) for at in (1, 4, 16, 64)}
    points = [
        Point(Load(1200.0, 200.0, at), seen.output_tokens_per_s, (seen.ttft_ms.p50 or 0.0) / 1e3)
        for at, seen in swept.items()
    ]
    found = fit_points(points, true)
    for at, seen in swept.items():
        again = closed_loop(found.engine, at, 1200, 200, 30.0)
        assert again.output_tokens_per_s == pytest.approx(seen.output_tokens_per_s, rel=0.05)
        assert again.ttft_ms.p50 == pytest.approx(seen.ttft_ms.p50, rel=0.06)
        assert again.itl_ms.p50 == pytest.approx(seen.itl_ms.p50, rel=0.06)
    by_the_law = closed_loop(found.spec, 4, 1200, 200, 30.0)
    assert (by_the_law.ttft_ms.p50 or 0.0) < 0.95 * (swept[4].ttft_ms.p50 or 0.0)


def test_one_wild_point_does_not_move_the_rest() -> None:
    points = measured(LLAMA, LOADS)
    wild = msgspec.structs.replace(points[5], output_tokens_per_s=points[5].output_tokens_per_s / 8)
    fitted = fit_points([*points[:5], wild, *points[6:]], LLAMA)
    assert fitted.spec.efficiencies.eta_b == pytest.approx(TRUE.eta_b, rel=0.15)
    assert int(np.argmin(fitted.residuals)) == 5


@given(st.randoms(use_true_random=False))
@settings(max_examples=10)
def test_the_order_of_the_points_changes_nothing(random: Random) -> None:
    points = measured(LLAMA, LOADS, noise=0.05)
    shuffled = random.sample(points, len(points))
    one, other = fit_points(points, LLAMA), fit_points(shuffled, LLAMA)
    for name in fitting.NAMES:
        value = getattr(other.spec.efficiencies, name)
        assert getattr(one.spec.efficiencies, name) == pytest.approx(value, rel=1e-3)


def test_a_measured_load_is_answered_by_its_measurement() -> None:
    """What the law leaves, the points know: 15 % less at long prompts is expected there again."""
    points = [
        msgspec.structs.replace(p, output_tokens_per_s=p.output_tokens_per_s * 0.85)
        if p.load.input_tokens == 2048 else p
        for p in measured(LLAMA, LOADS)
    ]  # fmt: skip
    fitted = fit_points(points, LLAMA)
    for point in points:
        rate = fitted.expect(point.load).output_tokens_per_s
        assert rate.value == pytest.approx(point.output_tokens_per_s, rel=0.06)
        assert rate.lo <= point.output_tokens_per_s <= rate.hi


def test_the_interval_widens_away_from_what_was_swept() -> None:
    fitted = fit_points(measured(LLAMA, LOADS, noise=0.05), LLAMA)

    def width(load: Load) -> float:
        rate = fitted.expect(load).output_tokens_per_s
        return rate.hi / rate.lo

    inside, beyond, far = Load(256, 256, 16), Load(256, 256, 1000), Load(30000, 8000, 4000)
    assert width(inside) < min(width(beyond), width(far))
    assert fitted.outside(inside) == fitted.outside(Load(256, 256, 140)) == []
    assert fitted.outside(beyond) == ["concurrency 1000 outside 1 to 128"]
    assert [text.split()[0] for text in fitted.expect(far).outside] == [
        "input_tokens", "output_tokens", "concurrency"]  # fmt: skip


def test_the_interval_holds_what_is_measured_next() -> None:
    """Noisy sweeps, a concurrency left out of each in turn: 90 % intervals hold about 90 %."""
    held, asked = 0, 0
    random = Random(7)
    for _ in range(12):
        loads = [Load(random.choice((200, 800)), 300, c) for c in (1, 2, 4, 8, 16, 32, 64, 128)]
        points = [
            msgspec.structs.replace(
                p, output_tokens_per_s=p.output_tokens_per_s * math.exp(random.gauss(0, 0.05))
            )
            for p in measured(LLAMA, loads)
        ]
        for out in range(1, 7):
            rate = fit_points(points[:out] + points[out + 1 :], LLAMA).expect(
                points[out].load).output_tokens_per_s  # fmt: skip
            held += rate.lo <= points[out].output_tokens_per_s <= rate.hi
            asked += 1
    assert 0.82 <= held / asked <= 0.99


# --------------------------------------------------------------------------------------- failures


def test_two_loads_are_no_fit() -> None:
    points = measured(LLAMA, LOADS[:2])
    fitted = fit_points([*points, *points], LLAMA)
    assert not fitted.ok
    assert fitted.why_not == "2 different loads were measured, a fit needs 3"


def test_a_sweep_of_faster_hardware_is_not_believed() -> None:
    """An H100's sweep given as an A10's."""
    fitted = fit_points(measured(LLAMA, LOADS), msgspec.structs.replace(LLAMA, gpu=gpu("a10")))
    assert not fitted.ok
    with pytest.raises(UsageError, match="the sweep cannot be used: measured "):
        transfer(fitted, LLAMA)


def test_rates_without_a_pattern_are_not_believed() -> None:
    random = Random(3)
    points = [
        msgspec.structs.replace(
            p, output_tokens_per_s=p.output_tokens_per_s * random.choice((1, 5))
        )
        for p in measured(LLAMA, LOADS)
    ]
    why_not = fit_points(points, LLAMA).why_not
    assert why_not is not None
    assert re.search("off the best fit .* 1 x H100-SXM-80GB", why_not)


def test_weights_that_do_not_fit_are_no_fit() -> None:
    spec = msgspec.structs.replace(LLAMA, gpu=gpu("rtx-4080"))
    with pytest.raises(UsageError, match="does not fit on 1 x RTX-4080"):
        fit_points([Point(LOADS[0], 100.0)], spec)


def test_nothing_measured_is_no_fit() -> None:
    with pytest.raises(UsageError, match="no valid level with output tokens"):
        fit([], LLAMA)


# ----------------------------------------------------------------------------------------- levels


def level(concurrency: int | None, rate: float | None, **more: object) -> Level:
    known = {"concurrency": concurrency, "output_tokens_per_s": rate, **more}
    return Level(**known)  # type: ignore[arg-type]


def test_levels_tell_their_own_lengths_first() -> None:
    levels = [
        level(4, 100.0, prompt_tokens=Stats(mean=500.0), output_tokens=Stats(mean=90.0),
              server=ServerView(prefix_hit_rate=0.25), ttft_ms=Stats(p50=40.0, mean=60.0)),
        level(8, 150.0),
        level(16, None),
        level(32, 200.0, measurement=Measurement(valid=False, reasons=["client"])),
        level(None, 120.0, mode="rate", offered_rps=2.0, request_throughput=2.0,
              e2e_ms=Stats(mean=3000.0)),
    ]  # fmt: skip
    points = points_of(levels, input_tokens=1000, output_tokens=100)
    assert [point.load for point in points] == [
        Load(500, 90, 4, hit_ratio=0.25), Load(1000, 100, 8), Load(1000, 100, 6)]  # fmt: skip
    assert [point.ttft_s for point in points] == [0.04, None, None]


def test_levels_without_lengths_are_asked_for_them() -> None:
    with pytest.raises(UsageError, match="do not tell their input and output tokens"):
        points_of([level(1, 50.0)], input_tokens=100)


# ------------------------------------------------------------------------------------- elsewhere


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit_points(measured(LLAMA, LOADS, noise=0.02), LLAMA)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_num_seqs": 64}, ()),
        ({"precision": "fp8"}, ("precision",)),
        ({"tp": 2}, ("parallelism",)),
        ({"gpu": gpu("h200-sxm")}, ("GPU",)),
        ({"gpu": gpu("h200-sxm"), "model": model("llama-3.1-70b"), "tp": 2},
         ("GPU", "model", "parallelism")),
    ],
)  # fmt: skip
def test_every_step_away_widens_the_interval(
    fitted: Fit, changes: dict[str, object], steps: tuple[str, ...]
) -> None:
    there = transfer(fitted, msgspec.structs.replace(LLAMA, **changes))
    rate = there.expect(Load(256, 256, 8)).output_tokens_per_s
    assert there.steps == steps
    assert there.spec.efficiencies == fitted.spec.efficiencies
    assert rate.lo < rate.value < rate.hi
    below = math.hypot(*(math.log(SPREADS[step][0]) for step in steps))
    if steps:
        assert rate.lo / rate.value == pytest.approx(math.exp(-below))
    else:
        assert rate.hi / rate.lo < 1.3


def test_more_bandwidth_is_expected_to_be_faster(fitted: Fit) -> None:
    """The efficiencies stay, the data sheet changes: H200 has 1.43 times the bandwidth."""
    load = Load(256, 256, 8)
    there = transfer(fitted, msgspec.structs.replace(LLAMA, gpu=gpu("h200-sxm"))).expect(load)
    here = fitted.expect(load)
    assert 1.1 < there.output_tokens_per_s.value / here.output_tokens_per_s.value < 1.43


def test_another_vendor_is_refused(fitted: Fit) -> None:
    with pytest.raises(UsageError, match=r"measured on H100.*asked for MI300X.*measure there"):
        transfer(fitted, msgspec.structs.replace(LLAMA, gpu=gpu("mi300x")))


def test_without_a_measurement_the_interval_is_the_widest(fitted: Fit) -> None:
    load = Load(256, 256, 8)
    blind = prior(LLAMA).expect(load).output_tokens_per_s
    assert prior(LLAMA).spec.efficiencies == TYPICAL["NVIDIA"]
    for change in ({"gpu": gpu("h200-sxm")}, {"precision": "fp8"}):
        known = transfer(fitted, msgspec.structs.replace(LLAMA, **change)).expect(load)
        assert blind.hi / blind.lo > known.output_tokens_per_s.hi / known.output_tokens_per_s.lo


def test_a_vendor_nobody_measured_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nothing is known of what Intel's .*--calibrate"):
        prior(msgspec.structs.replace(LLAMA, gpu=gpu("gaudi3")))


def test_several_sweeps_have_the_middle_in_common() -> None:
    def sweep(eta_b: float) -> Measured:
        shares = msgspec.structs.replace(TRUE, eta_b=eta_b)
        return Measured(LLAMA, measured(LLAMA, LOADS, shares))

    common = learn([sweep(0.5), sweep(0.6), sweep(0.7)])
    assert 0.5 < common.eta_b < 0.7
    assert learn([sweep(0.6)], common).eta_b == pytest.approx(0.6, rel=0.08)
