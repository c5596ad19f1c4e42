"""Prices and costs: the file and the catalogue, intervals, what met the SLO."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from agent.sizing.curve import parse_slo
from agent.sizing.hardware import gpu, gpus
from agent.sizing.money import (
    ALL,
    Prices,
    Share,
    Usd,
    catalogue,
    hourly,
    met_share,
    parse_prices,
    per_million,
    saving,
)
from agent.sizing.pattern import Buckets, Distribution, Pattern

FILE = Path(__file__).parents[3] / "config/prices.toml"
H100, L40S = gpu("h100-sxm"), gpu("l40s")


def test_the_file_says_what_the_catalogue_says() -> None:
    file, known = parse_prices(FILE.read_text("utf-8")), catalogue()
    assert file.gpu.keys() == known.gpu.keys()
    assert file.power == known.power
    for name, price in file.gpu.items():
        assert price.as_of
        assert price.source == known.gpu[name].source
        assert price.basis == "rental"
        for end in ("low", "typical", "high"):
            told = getattr(known.gpu[name].usd_per_hour, end)
            assert getattr(price.usd_per_hour, end) == pytest.approx(told, rel=2e-3)


def test_every_price_has_a_source_and_an_order() -> None:
    assert len(catalogue().gpu) > 20
    for price in catalogue().gpu.values():
        amount = price.usd_per_hour
        assert price.source
        assert amount.high is not None
        assert 0 < amount.low <= amount.typical <= amount.high


def test_one_number_is_what_is_paid_and_the_rest_stays_as_it_was() -> None:
    mine = parse_prices(
        '[gpu.l40s]\nusd_per_hour = 0.5\nbasis = "owned"\nas_of = 2026-05-01\nsource = "invoice"\n'
    )
    price = mine.gpu["L40S"]
    assert price.usd_per_hour == Usd(0.5, 0.5, 0.5)
    assert (price.basis, price.as_of) == ("owned", "2026-05-01")
    assert mine.gpu["L4"] == catalogue().gpu["L4"]
    assert parse_prices("") == catalogue()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu = 1", "see config/prices.toml"),
        ("[gpus.L4]", "gpus"),
        ("[gpu.L4", "see config/prices.toml"),
        ("[gpu.L4]\nusd_per_hour = 1", "as_of"),
        ('[gpu.L4]\nusd_per_hour = -1\nas_of = "x"\nsource = "y"', "a number above 0"),
        ('[gpu.L4]\nusd_per_hour = [2, 1, 3]\nas_of = "x"\nsource = "y"', "[low, typical, high]"),
        ('[gpu.L4]\nusd_per_hour = [1, 2]\nas_of = "x"\nsource = "y"', "length 3"),
        ('[gpu.L4]\nusd_per_hour = inf\nas_of = "x"\nsource = "y"', "a number above 0"),
        ('[gpu.H1000]\nusd_per_hour = 1\nas_of = "x"\nsource = "y"', "did you mean"),
        ('[gpu.L4]\nusd_per_hour = 1\nas_of = "x"\nsource = "y"\nbasis = "gift"', "gift"),
        ("[power]\npue = 0.5", "pue of 1 to 10"),
        ("[power]\nusd_per_kwh = 0", "usd_per_kwh"),
    ],
)
def test_prices_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_prices(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_power_is_added_to_what_is_owned_and_is_in_what_is_rented() -> None:
    text = '[gpu.L40S]\nusd_per_hour = 0.2\nbasis = "owned"\nas_of = "x"\nsource = "y"\n'
    text += "[power]\nusd_per_kwh = 0.3\npue = 1.5\nrest_w_per_gpu = 100\n"
    prices = parse_prices(text)
    # 2 of 0.2 USD, and (600 + 2 · 100) W · 1.5 · 0.3 USD/kWh
    assert hourly(L40S, 2, prices, 600.0) == Usd(*[pytest.approx(0.4 + 0.36)] * 3)
    assert hourly(L40S, 2, prices, None) is None
    assert hourly(H100, 2, prices, None) == catalogue().gpu[H100.name].usd_per_hour.times(2)
    assert hourly(gpu("mi300x"), 1, Prices(), 100.0) is None


def test_a_device_without_a_price_has_no_cost() -> None:
    unpriced = [card for card in gpus().values() if card.name not in catalogue().gpu]
    assert unpriced
    assert all(hourly(card, 1, catalogue(), 100.0) is None for card in unpriced)


def test_usd_per_million_tokens_that_met_the_slo() -> None:
    an_hour = Usd(3.6, 7.2, 14.4)
    assert per_million(an_hour, 1000.0, ALL) == Usd(*map(pytest.approx, (1.0, 2.0, 4.0)))
    half = per_million(an_hour, 1000.0, Share(0.25, 0.5, 1.0))
    assert half == Usd(*map(pytest.approx, (1.0, 4.0, 16.0)))
    open_end = per_million(an_hour, 1000.0, Share(0.0, 0.5, 1.0))
    assert open_end is not None
    assert open_end.high is None
    assert per_million(an_hour, 1000.0, Share(0.0, 0.0, 0.0)) is None
    assert per_million(an_hour, 0.0, ALL) is None


amounts = st.tuples(*[st.floats(0.01, 100)] * 3).map(lambda ends: Usd(*sorted(ends)))


@given(amounts, st.integers(1, 16), st.integers(1, 16))
def test_fewer_of_the_same_save_exactly_that_part(price: Usd, now: int, then: int) -> None:
    low, high = saving(price.times(now), price.times(then))
    assert low == pytest.approx(1 - then / now)
    assert high == pytest.approx(1 - then / now)


@given(amounts, amounts)
def test_a_saving_is_an_interval_and_none_is_the_whole(now: Usd, then: Usd) -> None:
    low, high = saving(now, then)
    assert low <= high < 1


# ----------------------------------------------------------------------------------------- SLO met

EDGES = (100.0, 250.0, 500.0, 1000.0)
SLO = parse_slo("ttft:p95<400ms,e2e:p95<700ms")


def histogram(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Distribution:
    counts = np.bincount(np.searchsorted(EDGES, values), minlength=len(EDGES) + 1)
    return Distribution(
        n=float(values.size), histograms=(Buckets(EDGES, tuple(map(float, counts))),)
    )


def seen(**latencies: Distribution) -> Pattern:
    return Pattern(60.0, 60.0, 0.0, 0.0, 60.0, ("chat",), **latencies)


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.floats(-1, 1))
@settings(max_examples=60)
def test_the_true_share_lies_inside(seed: int, n: int, together: float) -> None:
    """Of requests with latencies that go together or against each other."""
    normal = np.random.default_rng(seed).normal(size=(2, n))
    ttft = 400 * np.exp(0.8 * normal[0])
    e2e = 700 * np.exp(0.8 * (together * normal[0] + math.sqrt(1 - together**2) * normal[1]))
    share = met_share(seen(ttft_ms=histogram(ttft), e2e_ms=histogram(e2e)), SLO)
    assert share is not None
    truth = float(np.mean((ttft < 400) & (e2e < 700)))
    assert -1e-9 <= share.low <= truth + 1e-9
    assert truth - 1e-9 <= share.high <= 1 + 1e-9
    assert share.low - 1e-9 <= share.value <= share.high + 1e-9


def test_a_bound_on_an_edge_is_exact() -> None:
    ttft = histogram(np.array([50.0, 200.0, 200.0, 900.0]))
    share = met_share(seen(ttft_ms=ttft), parse_slo("ttft:p95<500ms"))
    assert share == Share(0.75, 0.75, 0.75)


def test_what_was_not_measured_is_not_known() -> None:
    assert met_share(seen(), SLO) is None
    assert met_share(seen(ttft_ms=histogram(np.ones(3))), SLO) is None
    assert met_share(seen(), parse_slo("ttfo:p95<1s")) is None
    assert met_share(seen(), []) == ALL
