"""The kind of hardware: the three questions, and a resource that idles while another one binds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.model import Confidence, Ratio, Reason, Verdict
from agent.sizing.curve import parse_slo
from agent.sizing.kind import Known, mismatch, place_of, questions
from agent.sizing.pattern import Distribution, Energy, Pattern, Quiet, Rate, Spread
from tests.agent.sizing.swept import sweep_of

DAY_S = 86_400.0
SLO = tuple(parse_slo("ttft:p95<1000ms,itl:p95<60ms"))


def seen(p99: float = 1.5, days: float = 14.0, **more: Any) -> Pattern:
    """Prompts of 1,000 and answers of 300 tokens, at up to 0.1 requests a second."""
    return Pattern(**{
        "window_s": days * DAY_S, "covered_s": days * DAY_S, "gaps_s": 0.0, "start_unix_s": 0.0,
        "end_unix_s": days * DAY_S, "servers": ("chat",), "requests": 10_000.0,
        "requests_per_s": Rate(0.01, 0.05, 0.1),
        "output_tokens_per_s": Rate(3.0, 15.0, 30.0),
        "prompt_tokens_per_request": Distribution(mean=1000.0),
        "output_tokens_per_request": Distribution(mean=300.0),
        "concurrency": Spread(mean=0.1, p95=1.0, p99=p99, max=max(3.0, p99)),
        "kv_usage": Spread(max=0.04),
        "quiet": Quiet(idle_ratio=0.9),
        "energy": Energy(
            energy_j=1e8, busy_j=4e7, idle_j=6e7, power_w=Spread(mean=120.0), gpus=("g0",),
            j_per_output_token=33.0, j_per_output_token_busy=13.0,
        ),
        **more,
    })  # fmt: skip


def known(**more: Any) -> Known:
    sweep = more.pop("sweep", sweep_of())
    pattern = more.pop("pattern", seen())
    return Known(**{"levels": sweep.levels, "slo": SLO, "sweep": sweep, "pattern": pattern, **more})


def verdict(finding: str = "RIGHT_SIZED", *codes: str, **more: Any) -> Verdict:
    reasons = [Reason(code, "it was measured") for code in codes]
    return Verdict(finding, "it is", Confidence("medium", "x"), reasons=reasons, **more)


def said(found: dict[str, Any]) -> str:
    return "\n".join(found["said"])


def test_each_question_is_answered_with_its_numbers() -> None:
    of = known()
    steady = {"ttft_p99_over_p50": 3.25, "itl_p99_over_p50": 1.5}
    found = questions(
        verdict(stability=steady, questions={"users": "single"}), of, place_of(of, [])
    )
    assert found["users"] == "single"
    assert said(found).split("\n") == [
        "Do I train? No training is declared. H100-SXM-80GB is training-class (80 GiB, 3.35 TB/s,"
        " 989 TFLOPS in bf16); the busy minutes took under 1 % of its FLOPS and 7 % of its"
        " bandwidth.",
        "One user or a service? One user: 1.5 requests at once (P99 of the minutes).",
        "Peak speed or a steady service? TTFT p99 is 3.25 times its p50, ITL p99 1.50 times, the"
        " KV cache was at most 4 % full, a token takes 13.0 J, with the idle time 33.0 J.",
    ]


def test_what_is_not_known_is_not_answered() -> None:
    of = Known(levels=[])
    found = said(questions(verdict("CAPACITY_ONLY"), of, place_of(of, [])))
    assert "What class of hardware this is, is not known." in found
    assert "no demand was observed or declared" in found
    assert "Neither steadiness, memory nor energy were seen." in found


def test_a_declared_demand_is_told_as_such() -> None:
    of = known(pattern=None)
    found = said(questions(verdict(demand={"concurrency": 24.0}), of, place_of(of, [])))
    assert "A service: 24 requests at once (declared)." in found
    rate = said(questions(verdict(demand={"rps": 3.0}), of, place_of(of, [])))
    assert "Not known: of the demand, requests/s alone are declared." in rate
    trained = said(questions(verdict(), known(trains=True), None))
    assert "Training is declared." in trained


def test_a_cache_that_is_full_beside_idle_flops_is_a_mismatch() -> None:
    busy = seen(
        30.0,
        output_tokens_per_s=Rate(100.0, 300.0, 400.0),
        concurrency=Spread(mean=5.0, p95=30.0, p99=30.0, max=40.0),
        kv_usage=Spread(max=0.98),
    )
    of = known(pattern=busy)
    place = place_of(of, [])
    assert place is not None
    found = mismatch(verdict("UNDER_SIZED", "KV_MEMORY"), of, place)
    assert found is not None
    assert (found["name"], found["binds"], found["idles"]) == ("MISMATCHED", "KV_MEMORY", "FLOPS")
    assert "more memory for the KV cache" in found["because"]
    near = verdict("RIGHT_SIZED", "KV_MEMORY", ratio=Ratio(0.9))
    assert mismatch(near, of, place) == found
    for silent in (
        verdict("UNDER_SIZED"),  # nothing is shown to bind
        verdict("UNDER_SIZED", "ADMISSION_CAP"),  # a flag is no resource
        verdict("RIGHT_SIZED", "KV_MEMORY", ratio=Ratio(0.5)),  # it binds beyond the demand
        verdict("RIGHT_SIZED", "KV_MEMORY"),
    ):
        assert mismatch(silent, of, place) is None


def test_where_everything_is_used_nothing_is_mismatched() -> None:
    busy = seen(
        200.0,
        output_tokens_per_s=Rate(5000.0, 6000.0, 7000.0),
        concurrency=Spread(mean=150.0, p95=200.0, p99=200.0, max=200.0),
        kv_usage=Spread(max=0.98),
    )
    of = known(pattern=busy)
    place = place_of(of, [])
    assert place is not None
    assert mismatch(verdict("UNDER_SIZED", "KV_MEMORY"), of, place) is None


@pytest.mark.parametrize("gone", ["output_tokens_per_s", "concurrency"])
def test_without_its_numbers_there_is_no_mismatch(gone: str) -> None:
    bare = msgspec.structs.replace(
        seen(), **{gone: {"output_tokens_per_s": Rate(), "concurrency": Spread()}[gone]}
    )
    of = known(pattern=bare)
    place = place_of(of, [])
    assert place is not None
    assert mismatch(verdict("UNDER_SIZED", "KV_MEMORY"), of, place) is None
