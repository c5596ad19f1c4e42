"""What the page says beside a verdict; the sheets on paper are tested where they are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from agent.forms import advice
from agent.model import Confidence, Recommendation, Verdict

PRICES = {
    "gpu": "H100-SXM-80GB", "gpus": 1, "basis": "rental",
    "usd_per_month": {"low": 1453.2, "typical": 2190.0, "high": 3650.0},
    "usd_per_million_output_tokens": {"low": 0.3414, "typical": 0.51, "high": 0.8576},
}  # fmt: skip


def told(offer: Recommendation | None = None, **cost: Any) -> dict[str, str]:
    verdict = Verdict("OVER_SIZED", "x", Confidence("low", "y"), recommendation=offer, cost=cost)
    return dict(advice(verdict))


def test_what_is_recommended_stands_with_what_it_saves_and_costs() -> None:
    offer = Recommendation(
        "try 2 x L40S-48GB with this load", "2 x L40S-48GB, fp8", saving_lo=0.21, saving_hi=0.4,
        error_bar="1,100 to 2,300 tokens/s in nine of ten cases",
    )  # fmt: skip
    assert told(offer, saving_usd_per_month=[310.4, 1460.0], **PRICES) == {
        "What to do": offer.action,
        "Configuration": offer.configuration,
        "It then costs": "21–40 % less (310–1,460 USD a month)",
        "Error bar": offer.error_bar,
        "It costs now": "1,453–3,650 USD a month for 1 \N{MULTIPLICATION SIGN} H100-SXM-80GB,"
        " rented, 0.341–0.858 USD per million output tokens that met the SLO",
    }


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        ({"usd_per_month": None, "usd_per_million_output_tokens": None}, "no price is known for 2"),
        ({"usd_per_month": {"low": None, "typical": 95.0, "high": None}}, "95 USD a month for 2"),
        ({"usd_per_month": {"low": 99.5, "typical": 99.5, "high": 99.5}}, "99.5 USD a month for 2"),
        ({"usd_per_month": {"low": None, "typical": None, "high": 1.0}}, "no price is known for 2"),
    ],
)
def test_what_is_not_known_of_a_price_is_not_told(cost: dict[str, Any], text: str) -> None:
    owned = {"gpu": "L4", "gpus": 2, "basis": "owned", **cost}
    assert told(**owned) == {
        "It costs now": f"{text} \N{MULTIPLICATION SIGN} L4, owned, power included"
    }


def test_the_cheapest_to_test_is_told_where_nothing_is_recommended() -> None:
    best = {"configuration": "1 x L4", "usd_per_month": {"low": 300.0, "high": 520.0}}
    keep = Recommendation("keep it")
    assert told(keep, candidates=[best]) == {
        "What to do": "keep it",
        "Worth a test": "1 x L4, 300–520 USD a month, by prediction",
    }
    assert "Worth a test" not in told(Recommendation("buy", "1 x L40S"), candidates=[best])
    assert "Worth a test" not in told(keep, candidates=[{**best, "usd_per_month": None}])


def test_nothing_to_do_and_nothing_known_is_nothing_to_say() -> None:
    assert told() == {}
