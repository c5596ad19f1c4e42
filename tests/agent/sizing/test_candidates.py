"""Other configurations: only what holds the load at its interval's low end, the cheapest first."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Level, Stats, Sweep, Target, TargetGpu, UsageError
from agent.sizing.candidates import (
    Box,
    Candidate,
    Need,
    Oracle,
    at_once_for,
    batch_limit,
    box_of,
    candidates,
    card_of,
    holds_now,
    measured_at,
    shape,
    tails,
)
from agent.sizing.curve import format_slo, parse_slo
from agent.sizing.hardware import gpu
from agent.sizing.money import Prices, catalogue, parse_prices, saving
from tests.agent.sizing.swept import H100, TAIL, sweep_of

SLO = tuple(parse_slo("ttft:p95<1000ms,itl:p95<60ms"))
SWEEP = sweep_of()
BOX = box_of(SWEEP.target, 1, {})


def need(requests_per_s: float | None = 1.0, **more: Any) -> Need:
    given = {"at_once": 4.0, "slo": SLO, "tails": tails(SLO, SWEEP.levels, 4.0), **more}
    return Need(1000.0, 300.0, requests_per_s=requests_per_s, **given)


def find(
    asked: Need, *, cheaper: bool = True, box: Box = BOX, sweep: Sweep = SWEEP,
    prices: Prices | None = None,
) -> list[Candidate]:  # fmt: skip
    return candidates(Oracle(box, sweep), box, asked, prices or catalogue(), cheaper=cheaper)


# ------------------------------------------------------------------------------------ what is there


def of(url: str = "http://gpu:8000", *names: str) -> Target:
    gpus = [TargetGpu(name, f"g{n}") for n, name in enumerate(names)]
    return Target(url=url, model="llama-3.1-8b", gpus=gpus)


def test_the_device_is_the_one_that_the_sweep_tells() -> None:
    assert card_of(of("http://gpu:8000", H100, H100)) == gpu("h100-sxm")
    assert card_of(of("sim:l40s/llama-3.1-8b")) == gpu("l40s")


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "which GPU it runs on"), (("Voodoo 2",), "'Voodoo 2'"), ((H100, "NVIDIA L40S"), "alike")],
)
def test_a_device_that_is_not_known_is_not_guessed(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        card_of(of("http://gpu:8000", *names))


def test_the_servers_own_settings_count() -> None:
    told = {
        "cache_dtype": "fp8_e4m3", "gpu_memory_utilization": "0.5", "num_gpu_blocks": "1000",
        "block_size": "32", "max_model_len": "None",
    }  # fmt: skip
    spec = box_of(sweep_of(tp=2).target, 3, told).spec
    assert (spec.kv_precision, spec.gpu_memory_utilization, spec.tp) == ("fp8", 0.5, 2)
    assert (spec.num_gpu_blocks, spec.block_size) == (1000, 32)
    strange = {"cache_dtype": "auto", "gpu_memory_utilization": "much", "num_gpu_blocks": "-1"}
    assert box_of(SWEEP.target, 1, strange) == BOX


def test_how_far_a_statistic_lies_above_the_mean() -> None:
    found = tails(parse_slo("ttft:p95<1s,itl:mean<50ms,itl:p90<50ms"), SWEEP.levels, 7.0)
    assert found["ttft:p95<1000ms"] == pytest.approx(TAIL)
    assert found["itl:mean<50ms"] == 1
    assert "itl:p90<50ms" not in found  # nobody measured it
    assert tails(SLO, [], 1.0) == {}


# ------------------------------------------------------------------------------------- candidates


def keeps(one: Candidate, asked: Need) -> bool:
    means = {"ttft": one.ttft_ms.hi90, "itl": one.tpot_ms.hi90}
    return all(
        means[target.metric] * asked.tails[format_slo([target])] <= target.bound_ms
        for target in asked.slo
    )


@pytest.mark.parametrize(
    ("rate", "cheaper"), [(0.05, True), (0.5, True), (0.5, False), (3.0, False)]
)
def test_every_candidate_holds_the_load_at_its_low_end(rate: float, cheaper: bool) -> None:
    asked = need(rate, personal=True)
    found = find(asked, cheaper=cheaper)
    assert found
    assert all(keeps(one, asked) for one in found)
    assert all(one.output_tokens_per_s.lo90 >= 300 * rate for one in found)
    assert all(one.at_once >= asked.at_once for one in found)
    costs = [one.usd_per_month.typical for one in found if one.usd_per_month]
    assert costs == sorted(costs)
    assert all(gpu(one.gpu).vendor == "NVIDIA" for one in found)
    if cheaper:
        assert all(one.saving is not None and one.saving[0] > 0 for one in found)


FEW = Prices({name: catalogue().gpu[name] for name in ("L4", "L40S", "RTX-PRO-6000")})


@given(st.floats(0.02, 4.0), st.floats(1.05, 3.0))
@settings(max_examples=10)
def test_more_load_is_never_cheaper(rate: float, factor: float) -> None:
    def cheapest(asked: Need) -> float:
        found = find(asked, cheaper=False, prices=FEW)
        return min((one.usd_per_month.typical for one in found if one.usd_per_month), default=1e9)

    assert cheapest(need(rate * factor)) >= cheapest(need(rate)) * (1 - 1e-9)


def test_a_tighter_slo_leaves_no_more_to_choose_from() -> None:
    def names(bound_ms: int) -> set[str]:
        slo = tuple(parse_slo(f"itl:p95<{bound_ms}ms"))
        asked = need(0.2, slo=slo, tails=tails(slo, SWEEP.levels, 4.0))
        return {one.words for one in find(asked)}

    assert names(25) < names(60)
    assert not names(5)


def test_a_consumers_card_is_for_a_person() -> None:
    def kinds(**more: Any) -> set[str]:
        return {one.category for one in find(need(0.1, **more))}

    assert "consumer" in kinds(personal=True)
    assert "consumer" not in kinds()


def test_nothing_follows_for_another_vendor() -> None:
    swept = sweep_of("mi300x", driver="AMD Instinct MI300X")
    box = box_of(swept.target, 1, {})
    found = find(need(0.5, tails=tails(SLO, swept.levels, 4)), box=box, sweep=swept, cheaper=False)
    assert found
    assert {gpu(one.gpu).vendor for one in found} == {"AMD"}


def test_without_a_price_nothing_is_cheaper() -> None:
    assert find(need(0.1), prices=Prices()) == []
    here = Prices({BOX.spec.gpu.name: catalogue().gpu[BOX.spec.gpu.name]})
    assert find(need(0.1, personal=True), prices=here) == []


def test_replicas_of_the_same_save_exactly() -> None:
    swept = sweep_of()
    four = box_of(swept.target, 4, {})
    same = [one for one in find(need(0.5), box=four) if one.gpu == BOX.spec.gpu.name]
    (fewer,) = [one for one in same if one.tp == 1 and not one.flags]
    assert (fewer.replicas, fewer.steps, fewer.saving) == (1, ("replicas",), (0.75, 0.75))


def test_owned_hardware_draws_power_at_the_same_share_of_its_tdp() -> None:
    rows = "".join(
        f'[gpu.{name}]\nusd_per_hour = {usd}\nbasis = "owned"\nas_of = "x"\nsource = "y"\n'
        for name, usd in (("H100-SXM-80GB", 1.0), ("L40S", 0.3))
    )
    prices = parse_prices(rows + "[power]\nusd_per_kwh = 0.2\npue = 1.0\n")
    box = msgspec.structs.replace(BOX, mean_w=350.0)  # half of the H100's 700 W
    (l40s,) = [one for one in find(need(0.1), box=box, prices=prices) if one.gpu == "L40S"]
    assert l40s.usd_per_month is not None
    assert l40s.usd_per_month.typical == pytest.approx(730 * (0.3 + 0.175 * 0.2))
    assert find(need(0.1), prices=prices) == []  # what its own GPUs draw is not known


def test_what_does_not_hold_it_is_not_offered_less_of_the_same() -> None:
    three = msgspec.structs.replace(BOX, replicas=3)
    more = [one for one in find(need(0.5), box=three, cheaper=False) if one.gpu == "H100-SXM-80GB"]
    assert all(one.replicas > 3 for one in more if one.tp == 1 and not one.flags)


@given(st.floats(0.05, 20.0))
@settings(max_examples=20)
def test_replicas_help_to_hold_it(rate: float) -> None:
    oracle = Oracle(BOX, SWEEP)
    held = [
        holds_now(oracle, msgspec.structs.replace(BOX, replicas=n), need(rate)) for n in (1, 2, 8)
    ]
    assert held == sorted(held)


def test_a_cache_made_small_by_a_flag_is_given_its_memory_back() -> None:
    small = {"num_gpu_blocks": "500", "block_size": "16"}
    swept = sweep_of(loads=(1, 2, 4))
    box = box_of(swept.target, 1, small)
    asked = need(2.0, at_once=30.0, tails=tails(SLO, swept.levels, 4.0))
    found = find(asked, box=box, sweep=swept, cheaper=False)
    free = next(one for one in found if one.flags.startswith("all its memory"))
    assert free.words.startswith("1 x H100-SXM-80GB with all its memory for the KV cache")
    assert free.saving == (0.0, 0.0)


def test_what_cannot_be_predicted_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="how far itl:p95<60ms lies above the mean"):
        find(need(tails={"ttft:p95<1000ms": 1.4}))
    fast = sweep_of(faster=3.0)
    with pytest.raises(UsageError, match="a sweep that the capacity model describes"):
        find(need(), sweep=fast, box=box_of(fast.target, 1, {}))
    ttfo = tuple(parse_slo("ttfo:p95<1s"))
    assert find(need(slo=ttfo, tails={format_slo(ttfo): 1.0})) == []  # nothing models it


# ------------------------------------------------------------------------------------------- parts


@given(st.floats(0.01, 200), st.floats(0.1, 50))
def test_at_once_for_a_rate_leaves_room_for_bursts(rate: float, each: float) -> None:
    """Where n at once give n · each, a rate takes rate / each of them, and bursts their root."""
    found = at_once_for(rate, lambda n: n * each)
    mean = rate / each
    if mean > 256:
        assert found is None
    else:
        assert found == pytest.approx(mean + 1.645 * math.sqrt(mean), abs=1 + 1e-6)
        assert found >= mean


def test_a_rate_that_no_batch_reaches() -> None:
    assert at_once_for(100.0, lambda n: min(n, 8) * 10.0) is None
    assert at_once_for(0.0, lambda n: n * 10.0) == 0


def test_between_levels_and_never_beyond() -> None:
    levels = [Level(concurrency=n, output_tokens_per_s=100.0 * n) for n in (1, 4, 16)]
    assert measured_at(levels, 10) == pytest.approx(1000)
    assert measured_at(levels, 16) == pytest.approx(1600)
    assert measured_at(levels, 17) is None
    assert measured_at(levels, 0.5) is None
    assert measured_at([], 1) is None


def test_a_batch_limit_has_room_in_the_cache() -> None:
    assert batch_limit(BOX, need(), 20.0) == 64
    tiny = box_of(SWEEP.target, 1, {"num_gpu_blocks": "500", "block_size": "16"})
    assert batch_limit(tiny, need(), 20.0) == 500 * 16 // 1150


def test_words() -> None:
    assert shape("L40S", 1, 1) == "1 x L40S"
    assert shape("L40S", 4, 2) == "2 replicas of 4 x L40S"


def test_stats_without_a_mean_have_no_tail() -> None:
    odd = [Level(concurrency=1, output_tokens_per_s=9.0, ttft_ms=Stats(p95=5.0, n=9))]
    assert tails(SLO, odd, 1.0) == {}
    assert saving(*[catalogue().gpu["L4"].usd_per_hour] * 2) == (0.0, 0.0)
