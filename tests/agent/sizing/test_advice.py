"""What a verdict comes to: its cost, what is recommended and how sure, and how predictions did."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Level, Recommendation, Stats, Sweep, Target, TargetGpu, Verdict, encode
from agent.sizing.advice import advise
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.judge import judge
from agent.sizing.kind import Known
from agent.sizing.money import Prices, catalogue, parse_prices
from agent.sizing.pattern import Buckets, Distribution, Quiet, Rate, Spread
from tests.agent.sizing.swept import sweep_of
from tests.agent.sizing.test_kind import SLO, known, seen, verdict

HARD = Rate(10.0, 30.0, 40.0)
KEEP = Recommendation("keep it", confirm_with="loadgen sweep x")
BUSY = {
    "requests_per_s": Rate(1.0, 3.0, 4.0),
    "concurrency": Spread(mean=5.0, p95=30.0, p99=40.0, max=60.0),
}


def advised(finding: str = "RIGHT_SIZED", *codes: str, **more: Any) -> Verdict:
    of = {key: more.pop(key) for key in ("ratio", "demand", "capacity") if key in more}
    given = verdict(finding, *codes, recommendation=KEEP, **of)
    found = advise(given, known(**more))
    assert found.finding == finding
    return found


def offer(found: Verdict) -> Recommendation:
    assert found.recommendation is not None
    return found.recommendation


def codes(found: Verdict) -> list[str]:
    return [reason.code for reason in found.reasons]


# --------------------------------------------------------------------------- one person's H100


def test_one_person_on_a_training_device() -> None:
    found = advised()
    reason = found.reasons[-1]
    assert reason.code == "TRAINING_CLASS_FOR_PERSONAL"
    assert "P99 of 1.5 at once, no training declared" in reason.because
    assert "1 x RTX-4090 would hold it by prediction, a token every " in reason.because
    do = offer(found)
    assert do.configuration == "1 x RTX-4090"
    assert do.action.startswith("try 1 x RTX-4090 with this load; give this one back only when")
    assert do.saving_lo is not None
    assert do.saving_hi is not None
    assert 0.7 < do.saving_lo <= do.saving_hi < 1
    assert "in nine of ten cases (−3" in str(do.error_bar)
    assert "another GPU of the vendor" in str(do.error_bar)
    assert do.confirm_with is not None
    assert do.confirm_with.startswith(
        "loadgen sweep URL --input-tokens 1000 --output-tokens 300 --concurrency 1,"
    )
    assert "--slo 'ttft:p95<1000ms,itl:p95<60ms'" in do.confirm_with
    assert "larger peak" in str(do.overturned_by)
    low, high = found.cost["saving_usd_per_month"]
    assert 1000 < low < high < found.cost["usd_per_month"]["high"]


@pytest.mark.parametrize(
    "changed",
    [
        {"trains": True},
        {"expect_concurrency": 8.0},
        {"pattern": seen(2.5)},
        {"pattern": seen(days=0.9)},
        {"pattern": msgspec.structs.replace(seen(), concurrency=Spread())},
        {"sweep": sweep_of("l40s", driver="NVIDIA L40S")},  # made for inference
        {"prices": Prices({"H100-SXM-80GB": catalogue().gpu["H100-SXM-80GB"]})},
        {"slo": tuple(parse_slo("itl:p95<12ms"))},  # nothing cheaper is that fast
    ],
)
def test_otherwise_it_is_not_said(changed: dict[str, Any]) -> None:
    found = advised(**changed)
    assert "TRAINING_CLASS_FOR_PERSONAL" not in codes(found)
    assert found.recommendation == KEEP


def test_an_slo_without_a_word_of_fluency_does_not_allow_a_crawl() -> None:
    bare = advised(slo=tuple(parse_slo("ttft:p95<60s")))
    assert "tpot:p95<100ms was assumed, for the SLO does not say" in str(offer(bare).error_bar)
    assert all(1.4 * one["tpot_ms"]["hi90"] <= 100 for one in bare.cost["candidates"])
    none = advised(slo=())
    assert "ttft:p95<1000ms,tpot:p95<100ms was assumed" in str(offer(none).error_bar)
    assert "was assumed" not in str(offer(advised()).error_bar)


def test_of_a_curve_with_means_alone_the_means_are_assumed() -> None:
    of = known()
    levels = [
        msgspec.structs.replace(one, ttft_ms=Stats(mean=one.ttft_ms.mean),
                                itl_ms=Stats(mean=one.itl_ms.mean), tpot_ms=Stats())
        for one in of.levels
    ]  # fmt: skip
    none = advised(slo=(), levels=levels)
    assert "ttft:mean<1000ms,itl:mean<100ms was assumed" in str(offer(none).error_bar)


def test_a_shortened_window_is_enough_where_it_was_configured() -> None:
    found = advised(pattern=seen(days=0.1), least_s=3600.0)
    assert "TRAINING_CLASS_FOR_PERSONAL" in codes(found)


def test_while_evidence_is_thin_it_is_a_reason_and_no_action() -> None:
    found = advised("INSUFFICIENT_DATA")
    assert "TRAINING_CLASS_FOR_PERSONAL" in codes(found)
    assert found.recommendation == KEEP


# -------------------------------------------------------------------------------- by the finding


def test_right_sized_is_kept_and_what_might_be_cheaper_is_told() -> None:
    found = advised(pattern=seen(10.0, concurrency=Spread(mean=1.0, p95=8.0, p99=10.0, max=20.0)))
    assert found.recommendation == KEEP
    best = found.cost["candidates"][0]
    assert best["category"] != "consumer"
    assert best["usd_per_month"]["typical"] < found.cost["usd_per_month"]["typical"]
    assert best["at_once"] >= 20  # the most that was ever seen


def test_over_sized_is_tried_on_something_smaller() -> None:
    do = offer(advised("OVER_SIZED", pattern=seen(5.0)))
    assert do.action.startswith("try 1 x ")
    assert do.saving_lo is not None
    assert do.saving_lo > 0


def test_over_sized_replicas_go_one_by_one() -> None:
    given = verdict("OVER_SIZED", recommendation=Recommendation(
        "take one replica out", saving_lo=1 / 3, saving_hi=1 / 3))  # fmt: skip
    found = advise(given, known(replicas=3, pattern=seen(5.0)))
    assert offer(found).action == "take one replica out"
    assert offer(found).configuration == "2 replicas of 1 x H100-SXM-80GB"
    month = found.cost["usd_per_month"]
    assert found.cost["gpus"] == 3
    assert found.cost["saving_usd_per_month"] == pytest.approx(
        [month["low"] / 3, month["high"] / 3]
    )


def test_under_sized_is_offered_the_cheapest_that_holds_it() -> None:
    found = advised("UNDER_SIZED", pattern=seen(40.0, **BUSY | {"requests_per_s": HARD}))
    do, best = offer(found), found.cost["candidates"][0]
    assert do.action == f"{best['configuration']} to hold it, by prediction; keep it"
    assert do.configuration == best["configuration"]
    assert best["output_tokens_per_s"]["lo90"] >= 300 * 30.0
    assert "the P95 of the minutes" in str(do.error_bar)
    hours = Rate(1.0, 3.0, 30.0)  # the busy minutes are held, the busiest are not
    found = advised("UNDER_SIZED", pattern=seen(40.0, **BUSY | {"requests_per_s": hours}))
    assert "the busiest minute" in str(offer(found).error_bar)


def test_the_same_hardware_with_other_flags_comes_first() -> None:
    small = {"num_gpu_blocks": "1500", "block_size": "16"}
    sweep = sweep_of(loads=(1, 2, 4, 8))
    found = advised("UNDER_SIZED", pattern=seen(40.0, **BUSY), sweep=sweep, settings=small)
    assert "1 x H100-SXM-80GB with " in str(offer(found).configuration)


def test_a_model_that_contradicts_the_measurement_is_not_asked() -> None:
    found = advised("UNDER_SIZED", pattern=seen(40.0))
    assert found.recommendation == KEEP
    assert found.cost["candidates"] == []
    assert "by that of now this box holds it" in found.missing[-1]


def test_a_flag_comes_before_hardware() -> None:
    found = advised("UNDER_SIZED", "ADMISSION_CAP", pattern=seen(40.0, **BUSY))
    do = offer(found)
    assert do.configuration == "1 x H100-SXM-80GB with --max-num-seqs 128"
    assert do.action == "keep it"  # as the judge says it
    off = advised(
        "UNDER_SIZED", "COMPUTE_PREFILL", pattern=seen(40.0, **BUSY),
        settings={"enable_prefix_caching": "False"},
    )  # fmt: skip
    assert str(offer(off).configuration).endswith("with --enable-prefix-caching")
    on = advised("UNDER_SIZED", "COMPUTE_PREFILL", pattern=seen(40.0, **BUSY))
    assert "--enable-prefix-caching" not in str(offer(on).configuration)


def test_idle_hardware_saves_its_idle_time_at_least() -> None:
    found = advised("IDLE", pattern=seen(0.0, quiet=Quiet(idle_ratio=0.995)))
    assert (offer(found).saving_lo, offer(found).saving_hi) == (0.995, 1.0)
    assert found.cost["saving_usd_per_month"][1] == found.cost["usd_per_month"]["high"]
    kept = advised("IDLE", pattern=seen(0.0), expect_concurrency=4.0)
    assert offer(kept).saving_lo is None


def test_an_slo_that_one_request_breaks_takes_other_hardware() -> None:
    sweep = sweep_of("l4", driver="NVIDIA L4")
    found = advised("INFEASIBLE_SLO", sweep=sweep, slo=tuple(parse_slo("itl:p95<40ms")))
    assert "to keep the SLO with one request" in offer(found).action
    assert "L4 " not in str(offer(found).configuration)


@pytest.mark.parametrize("finding", ["BORDERLINE", "INVALID_MEASUREMENT", "CAPACITY_ONLY"])
def test_where_measuring_comes_first_no_hardware_is_offered(finding: str) -> None:
    found = advised(finding)
    assert found.recommendation == KEEP
    assert found.cost["candidates"] == []


# ---------------------------------------------------------------------------- energy and money


def met(share: float) -> Distribution:
    counts = (100 * share, 100 * (1 - share), 0.0)
    return Distribution(n=100.0, histograms=(Buckets((60.0, 1000.0), counts),))


def test_tokens_within_the_slo_pay_for_the_idle_time() -> None:
    slo = tuple(parse_slo("itl:p95<60ms"))
    found = advised(slo=slo, pattern=seen(itl_ms=met(0.5)))
    month = found.cost["usd_per_month"]
    assert month["typical"] == pytest.approx(730 * 2.95)
    per_million = found.cost["usd_per_million_output_tokens"]
    assert per_million["typical"] == pytest.approx(2.95 / 3600 / 3.0 / 0.5 * 1e6)
    busy = found.cost["usd_per_million_output_tokens_busy"]
    assert busy["typical"] == pytest.approx(0.1 * per_million["typical"])
    assert found.cost["slo_met_ratio"]["value"] == 0.5
    assert found.energy["kwh_per_month"] == pytest.approx(0.12 * 730)
    assert found.energy["idle_ratio"] == pytest.approx(0.6)
    assert found.cost["basis"] == "rental"
    assert "May 2026" in found.cost["prices"]


def test_without_a_latency_it_is_not_known_who_met_the_slo() -> None:
    found = advised()
    assert found.cost["usd_per_million_output_tokens"] is None
    assert "nothing tells who met the SLO" in found.cost["unknown"]


def test_an_unknown_price_is_null_and_said() -> None:
    found = advised(prices=Prices())
    assert found.cost["usd_per_month"] is None
    assert "a price of H100-SXM-80GB is not known" in found.cost["unknown"]
    owned = parse_prices(
        '[gpu.H100-SXM-80GB]\nusd_per_hour = 1\nbasis = "owned"\nas_of = "x"\nsource = "y"\n'
    )
    blind = msgspec.structs.replace(seen(), energy=type(seen().energy)())
    found = advised(prices=owned, pattern=blind)
    assert "the power that its GPUs draw is not known" in found.cost["unknown"]
    found = advised(prices=owned)
    assert found.cost["usd_per_month"]["typical"] == pytest.approx(730 * (1 + 0.12 * 1.4 * 0.15))


def test_an_unknown_device_costs_nothing_that_is_known() -> None:
    sweep = sweep_of(driver="Voodoo 2")
    found = advised(sweep=sweep)
    assert found.cost == {"unknown": "'Voodoo 2' in the catalogue of GPUs"}
    assert found.recommendation == KEEP
    assert found.energy["idle_ratio"] == pytest.approx(0.6)


def test_of_an_unknown_model_the_cost_is_known_all_the_same() -> None:
    base = sweep_of()
    served = msgspec.structs.replace(base.target, model="my-own-model")
    found = advised(sweep=msgspec.structs.replace(base, target=served))
    assert found.cost["usd_per_month"] is not None
    assert "candidates" not in found.cost
    assert found.missing[-1].startswith("to compare other hardware: the shape of the model")


def test_a_curve_alone_is_paid_at_the_most_that_it_held() -> None:
    found = advised(pattern=None, capacity={"lo": 64.0}, demand={"concurrency": 24.0})
    level = next(one for one in sweep_of().levels if one.concurrency == 64)
    assert found.cost["at"] == 64
    assert found.cost["usd_per_million_output_tokens_busy"]["typical"] == pytest.approx(
        2.95 / 3600 / (level.output_tokens_per_s or 0.0) * 1e6
    )
    assert found.cost["usd_per_million_output_tokens"] is None


# ----------------------------------------------------------------------------------------- scored


def earlier(at_s: float = 0.0) -> tuple[tuple[float, dict[str, Any]], ...]:
    """What was predicted on an H100: what is kept of a verdict is what the store keeps."""
    cost = msgspec.json.decode(encode(advised("OVER_SIZED", pattern=seen(5.0)).cost))
    return ((at_s, cost),)


def after(faster: float = 1.0, **more: Any) -> Verdict:
    history = earlier()
    name = history[0][1]["candidates"][0]["gpu"]
    sweep = sweep_of(name, driver=f"NVIDIA {name}", faster=faster)
    return advised(sweep=sweep, history=history, measured_unix_s=10.0, **more)


def test_a_prediction_is_scored_when_it_was_followed() -> None:
    found = after()
    (reason,) = [one for one in found.reasons if one.code == "PREDICTION_SCORED"]
    assert reason.evidence["inside"] is True
    assert reason.because.endswith("were measured: inside")
    predicted = reason.evidence["predicted"]
    assert predicted["lo90"] <= reason.evidence["measured"] <= predicted["hi90"]
    (missed,) = [one for one in after(0.4).reasons if one.code == "PREDICTION_SCORED"]
    assert missed.because.endswith("were measured: outside")


@pytest.mark.parametrize(
    "more",
    [
        {"measured_unix_s": -1.0},  # the sweep was there before it was predicted
        {"measured_unix_s": None},
        {"sweep": sweep_of(), "measured_unix_s": 10.0},  # nothing was changed
        {"sweep": sweep_of("h200-sxm", driver="NVIDIA H200"), "measured_unix_s": 10.0},
    ],
)
def test_only_what_was_predicted_before_it_stood_there_is_scored(more: dict[str, Any]) -> None:
    history = earlier()
    name = history[0][1]["candidates"][0]["gpu"]
    followed = {"sweep": sweep_of(name, driver=f"NVIDIA {name}"), "history": history}
    assert "PREDICTION_SCORED" not in codes(advised(**followed | more))


def test_other_lengths_are_another_question() -> None:
    history = earlier()
    name = history[0][1]["candidates"][0]["gpu"]
    sweep = sweep_of(name, driver=f"NVIDIA {name}", lengths=(200, 100))
    found = advised(sweep=sweep, history=history, measured_unix_s=10.0)
    assert "PREDICTION_SCORED" not in codes(found)


def test_what_was_kept_before_there_were_predictions_is_no_trouble() -> None:
    assert advised(history=((0.0, {}), (1.0, {"at": 4})), measured_unix_s=10.0)


# ---------------------------------------------------------------------------------- whatever comes


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4096), st.floats(1e-3, 1e6), st.floats(1e-3, 1e6) | st.none(),
            st.floats(1e-3, 1e5) | st.none(),
        ),
        max_size=6,
    ),
    st.sampled_from(["NVIDIA L4", "AMD Instinct MI300X", "NVIDIA A16", "Gaudi3", "none"]),
    st.floats(0.1, 1e4) | st.none(),
)  # fmt: skip
@settings(max_examples=40)
def test_no_curve_breaks_it(
    rows: list[tuple[int, float, float | None, float | None]], name: str, demand: float | None
) -> None:
    """Other tools' numbers may be anything; the finding is the judge's, and all of it is JSON."""
    base = sweep_of(loads=(1,)).levels[0]
    levels: list[Level] = [
        msgspec.structs.replace(
            base, concurrency=n, output_tokens_per_s=rate,
            ttft_ms=msgspec.structs.replace(base.ttft_ms, mean=ttft),
            itl_ms=msgspec.structs.replace(base.itl_ms, mean=itl),
        )
        for n, rate, ttft, itl in rows
    ]  # fmt: skip
    target = Target(url="u", model="llama-3.1-8b", gpus=[TargetGpu(name, "g")])
    sweep = Sweep(target=target, levels=levels)
    given = judge(levels, analyse(levels, SLO), SLO, expect_concurrency=demand)
    found = advise(given, Known(levels, SLO, sweep))
    assert found.finding == given.finding
    assert len(found.questions["said"]) == 3
    encode(found)
