"""What a sweep comes to: money and advice where the hardware is known, else the judge alone."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from agent.model import Level, Slo, Sweep, TargetGpu, Verdict
from agent.sizing.curve import analyse
from agent.sizing.judge import judge
from agent.sizing.money import parse_prices
from loadgen.conclude import conclude
from tests.agent.sizing.test_judge import slos, sweeps
from tests.loadgen.report import samples

set_ = msgspec.structs.replace
SLOW = TargetGpu("NVIDIA H100 80GB HBM3", "GPU-1f")
OWNED = """
[gpu.H100-SXM-80GB]
usd_per_hour = 2
basis = "owned"
as_of = "2026-05-31"
source = "invoice"
[power]
usd_per_kwh = 0.2
pue = 1.5
"""


def told(sweep: Sweep, **options: Any) -> Sweep:
    return conclude(set_(sweep, verdict=None), **options)


def verdict_of(sweep: Sweep) -> Verdict:
    assert sweep.verdict is not None
    return sweep.verdict


def costs(sweep: Sweep) -> list[float | None]:
    return [level.cost_usd_per_million_output_tokens for level in sweep.levels]


def test_a_level_costs_what_its_tokens_within_the_slo_do() -> None:
    """Equation 9: the hour's price over the hour's tokens that met the SLO."""
    sweep = told(samples.sweep())
    for level, usd in zip(sweep.levels, costs(sweep), strict=True):
        rate, met = level.output_tokens_per_s, level.slo_attainment
        assert rate is not None
        assert met is not None
        assert usd == pytest.approx(2.95 / (rate * met * 3600) * 1e6)
    every = told(set_(samples.sweep(), slo=[]))
    assert costs(every)[0] == pytest.approx(2.95 / (151.2 * 3600) * 1e6)
    assert "May 2026" in verdict_of(sweep).cost["prices"]


def test_of_owned_hardware_the_level_pays_for_its_power() -> None:
    sweep = told(set_(samples.sweep(), slo=[]), prices=parse_prices(OWNED))
    an_hour = 2 + 0.372 * 1.5 * 0.2  # 372 W at the first level
    assert costs(sweep)[0] == pytest.approx(an_hour / (151.2 * 3600) * 1e6)
    assert verdict_of(sweep).cost["prices"] == "invoice (2026-05-31)"
    unread = told(samples.sweep(gpu=False), prices=parse_prices(OWNED))
    assert set(costs(unread)) == {None}
    assert "power" in verdict_of(unread).cost["unknown"]


def test_two_gpus_cost_twice_as_much() -> None:
    sweep = samples.sweep()
    two = told(set_(sweep, target=set_(sweep.target, gpus=[SLOW, SLOW])))
    assert costs(two)[0] == pytest.approx(2 * (costs(told(sweep))[0] or 0))


def test_tokens_that_nobody_could_use_have_no_price() -> None:
    sweep = samples.sweep()
    none_met = [set_(sweep.levels[0], slo_attainment=0.0), *sweep.levels[1:]]
    unknown = [set_(sweep.levels[0], slo_attainment=None), *sweep.levels[1:]]
    silent = [set_(sweep.levels[0], output_tokens_per_s=0.0), *sweep.levels[1:]]
    for levels in (none_met, unknown, silent):
        first, second, *_ = costs(told(set_(sweep, levels=levels)))
        assert (first, second is None) == (None, False)


@pytest.mark.parametrize("what", ["none seen", "simulated", "unknown", "two kinds"])
def test_without_known_hardware_the_verdict_is_the_judges(what: str) -> None:
    """No price and no word is made up."""
    sweep = samples.sweep(simulated=what == "simulated", gpu=False)
    gpus = {
        "none seen": [],
        "unknown": [TargetGpu("Acme Z9", "G")],
        "two kinds": [SLOW, TargetGpu("NVIDIA L4", "H")],
    }.get(what, sweep.target.gpus)
    sweep = set_(sweep, target=set_(sweep.target, gpus=gpus))
    judged = judge(
        sweep.levels, analyse(sweep.levels, sweep.slo), sweep.slo,
        expect_concurrency=20, simulated=sweep.run.simulated, target=sweep.target.url,
    )  # fmt: skip
    found = told(sweep, expect_concurrency=20)
    assert found.verdict == judged
    assert set(costs(found)) == {None}


def test_a_declared_load_brings_candidates_and_what_would_confirm_them() -> None:
    alone = verdict_of(told(samples.sweep(), expect_concurrency=1))
    offer = alone.recommendation
    assert (alone.finding, alone.reasons[-1].code) == ("RIGHT_SIZED", "TRAINING_CLASS_FOR_PERSONAL")
    assert offer is not None
    assert offer.configuration == alone.cost["candidates"][0]["configuration"]
    assert "--expect-concurrency 1" in (offer.confirm_with or "")
    assert offer.overturned_by
    assert offer.saving_lo is not None
    assert 0 < offer.saving_lo < 1
    busy = verdict_of(told(samples.sweep(), expect_concurrency=300))
    assert busy.finding == "UNDER_SIZED"
    assert busy.recommendation is not None
    assert "by prediction" in busy.recommendation.action
    nobody = verdict_of(told(samples.sweep()))
    assert nobody.finding == "CAPACITY_ONLY"
    assert "candidates" not in nobody.cost
    assert nobody.questions["said"][1].startswith("One user or a service? Not known")


def test_the_servers_own_settings_are_those_of_its_box() -> None:
    sweep = samples.sweep()
    flags = {"vllm:cache_config_info.cache_dtype": "fp8"}
    found = told(set_(sweep, target=set_(sweep.target, settings=flags)), expect_concurrency=1)
    assert verdict_of(found).cost["here"]["kv_precision"] == "fp8"


@settings(max_examples=40)
@given(sweeps, slos)
def test_advice_never_fails_and_never_changes_the_finding(
    levels: list[Level], slo: list[Slo]
) -> None:
    sweep = set_(samples.sweep(), levels=levels, slo=slo)
    for expected in (None, 1.0, 500.0):
        found = conclude(sweep, expect_concurrency=expected)
        judged = judge(levels, found.curve, slo, expect_concurrency=expected, target="http://a")
        assert verdict_of(found).finding == judged.finding
        for usd in costs(found):
            assert usd is None or (usd > 0 and math.isfinite(usd))
