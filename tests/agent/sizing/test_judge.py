"""The first verdict: each finding with the evidence that makes it, and what never may be said."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import (
    Level,
    Measurement,
    Requests,
    ServerView,
    Slo,
    Stats,
    Verdict,
    decode_sweep,
    encode,
)
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.judge import judge

SLO = parse_slo("ttft:p95<500ms")


def even(value: float, n: int = 200) -> Stats:
    return Stats(value, 0.0, value, value, value, value, value, value, n)


def level(
    concurrency: int, tokens: float, ttft: float, *, n: int = 200, reason: str = "", **more: Any
) -> Level:
    return Level(
        concurrency=concurrency,
        output_tokens_per_s=tokens,
        output_tokens_per_s_ci95=(tokens * 0.99, tokens * 1.01),
        request_throughput=tokens / 100,
        requests=Requests(n, 0, 0, {}),
        ttft_ms=even(ttft, n),
        itl_ms=even(10.0, 99 * n),
        measurement=Measurement(not reason, [reason] if reason else []),
        **more,
    )


SWEEP = [
    level(1, 100, 50),
    level(2, 190, 55),
    level(4, 360, 60),
    level(8, 640, 80),
    level(16, 1000, 150),
    level(32, 1040, 900),
]
OPEN = SWEEP[:5]  # neither saturated nor broken


def verdict(levels: list[Level], slo: list[Slo] = SLO, **options: Any) -> Verdict:
    return judge(levels, analyse(levels, slo), slo, **options)


# --------------------------------------------------------------------------------------- findings


def test_what_an_admission_cap_holds_back_is_not_booked_to_the_hardware() -> None:
    def capped(concurrency: int, tokens: float, ttft: float) -> Level:
        running, waiting = min(4, concurrency), max(0, concurrency - 4)
        server = ServerView(
            running_mean=running, running_max=running, waiting_mean=waiting, waiting_max=waiting,
            kv_usage_mean=0.02, kv_usage_max=0.03, preemptions=0, samples=20,
        )  # fmt: skip
        return level(concurrency, tokens, ttft, server=server)

    levels = [capped(1, 100, 50), capped(4, 390, 60), capped(8, 400, 900), capped(32, 400, 5000)]
    assert analyse(levels, SLO).limit == "ADMISSION_CAP"
    for slo in (SLO, []):
        got = verdict(levels, slo, expect_concurrency=32)
        assert got.finding == "UNDER_SIZED"
        assert "as it is configured" in got.summary
        assert "not the hardware" in got.summary
        assert got.recommendation is not None
        assert "--max-num-seqs" in got.recommendation.action
    assert "configured" not in verdict(SWEEP, expect_concurrency=100).summary


@pytest.mark.parametrize(
    ("levels", "slo", "options", "finding"),
    [
        (SWEEP, SLO, {}, "CAPACITY_ONLY"),
        (SWEEP, [], {}, "CAPACITY_ONLY"),
        (OPEN, SLO, {}, "CAPACITY_ONLY"),
        (SWEEP, SLO, {"expect_concurrency": 8}, "RIGHT_SIZED"),
        (SWEEP, SLO, {"expect_concurrency": 16}, "RIGHT_SIZED"),  # measured, and it held
        (SWEEP, SLO, {"expect_concurrency": 20}, "BORDERLINE"),
        (SWEEP, SLO, {"expect_concurrency": 32}, "UNDER_SIZED"),  # measured, and it broke
        (SWEEP, SLO, {"expect_concurrency": 200}, "UNDER_SIZED"),
        (OPEN, SLO, {"expect_concurrency": 16}, "RIGHT_SIZED"),  # a lower bound is enough
        (OPEN, SLO, {"expect_concurrency": 17}, "INSUFFICIENT_DATA"),
        (SWEEP, SLO, {"expect_rps": 4}, "RIGHT_SIZED"),
        (SWEEP, SLO, {"expect_rps": 9.9}, "BORDERLINE"),  # held without bursts, not with them
        (SWEEP, SLO, {"expect_rps": 11}, "UNDER_SIZED"),
        (SWEEP, [], {"expect_concurrency": 8}, "RIGHT_SIZED"),
        (SWEEP, [], {"expect_concurrency": 40}, "UNDER_SIZED"),
        (SWEEP, [], {"expect_rps": 4}, "RIGHT_SIZED"),
        (SWEEP, [], {"expect_rps": 11}, "UNDER_SIZED"),
        (OPEN, [], {"expect_concurrency": 100}, "INSUFFICIENT_DATA"),
        (OPEN, [], {"expect_rps": 100}, "INSUFFICIENT_DATA"),
        (SWEEP, SLO, {"expect_concurrency": 8, "expect_rps": 50}, "UNDER_SIZED"),
        (SWEEP, SLO, {"expect_concurrency": 40, "expect_rps": 1}, "UNDER_SIZED"),
        (SWEEP, parse_slo("ttft:p95<20ms"), {}, "INFEASIBLE_SLO"),
        (SWEEP, parse_slo("ttft:p95<20ms"), {"expect_concurrency": 1}, "INFEASIBLE_SLO"),
        (SWEEP[2:], parse_slo("ttft:p95<20ms"), {}, "CAPACITY_ONLY"),  # four are not one
        (SWEEP[2:], parse_slo("ttft:p95<20ms"), {"expect_concurrency": 4}, "UNDER_SIZED"),
        (SWEEP[2:], parse_slo("ttft:p95<20ms"), {"expect_concurrency": 2}, "INSUFFICIENT_DATA"),
        (SWEEP, parse_slo("e2e:p95<9s"), {}, "CAPACITY_ONLY"),  # latency not judged
        (SWEEP, parse_slo("e2e:p95<9s"), {"expect_concurrency": 4}, "INSUFFICIENT_DATA"),
        (SWEEP, parse_slo("e2e:p95<9s"), {"expect_rps": 50}, "UNDER_SIZED"),  # whatever the SLO
        ([], SLO, {}, "INSUFFICIENT_DATA"),
    ],
)
def test_finding(
    levels: list[Level], slo: list[Slo], options: dict[str, Any], finding: str
) -> None:
    assert verdict(levels, slo, **options).finding == finding


CLIENT = "client_limited: loop_lag_p99_ms 40 is above its bound 10"
FOREIGN = "foreign_traffic: the server finished 90 requests that were not ours"


@pytest.mark.parametrize("reason", [CLIENT, FOREIGN, "errors: failed_share 0.4"])
def test_no_valid_level_is_an_invalid_measurement(reason: str) -> None:
    found = verdict([level(4, 360, 60, reason=reason)], expect_concurrency=2)
    assert found.finding == "INVALID_MEASUREMENT"
    assert found.confidence.level == "none"
    assert found.reasons[0].evidence["measurement"] == [reason]


def test_invalid_levels_say_which_number_decides_and_what_to_do() -> None:
    """Of the lowest of them, and for an open loop too, where no valid level tells the mode."""
    other = CLIENT.replace("40", "90")
    levels = [
        Level(mode="rate", offered_rps=rate, output_tokens_per_s=rate, request_throughput=rate,
              measurement=Measurement(False, [reason, "window: too short"]))
        for rate, reason in [(16.0, other), (8.0, CLIENT)]
    ]  # fmt: skip
    found = verdict(levels)
    assert found.summary == (
        "The measurement does not count: the load generator itself was the limit at 2 level(s), "
        "from load 8 on: loop_lag_p99_ms 40 is above its bound 10."
    )
    assert [reason.code for reason in found.reasons] == ["CLIENT_LIMITED"]
    assert found.recommendation is not None
    for cure in ("`loadgen calibrate`", "fewer streams", "--processes", "another machine"):
        assert cure in found.recommendation.action
    assert "--rate 8,16" in (found.recommendation.confirm_with or "")


def test_invalid_levels_matter_only_where_the_answer_lies() -> None:
    lost = level(64, 9999, 1, reason=CLIENT)
    assert verdict([*OPEN, lost]).finding == "INVALID_MEASUREMENT"
    assert verdict([*OPEN, lost], expect_concurrency=8).finding == "RIGHT_SIZED"
    assert verdict([*OPEN, lost], expect_concurrency=40).finding == "INVALID_MEASUREMENT"
    assert verdict([*SWEEP, lost]).finding == "CAPACITY_ONLY"
    assert verdict([*SWEEP, lost], expect_concurrency=64).finding == "UNDER_SIZED"


def test_a_few_unlucky_requests_prove_nothing_broken() -> None:
    unlucky = Stats(60, 90.0, 50, 60, 900, 950, 950, 950, 20)
    first = msgspec.structs.replace(level(1, 100, 50, n=20), ttft_ms=unlucky)
    assert verdict([first]).finding != "INFEASIBLE_SLO"
    assert verdict([first], expect_concurrency=1).finding == "INSUFFICIENT_DATA"
    sure = msgspec.structs.replace(first, ttft_ms=msgspec.structs.replace(unlucky, n=400))
    assert verdict([sure]).finding == "INFEASIBLE_SLO"


def test_an_open_loop_is_judged_in_its_own_unit() -> None:
    levels = [
        Level(mode="rate", offered_rps=r, output_tokens_per_s=100 * r, request_throughput=r,
              ttft_ms=even(ttft), requests=Requests(900, 0, 0, {}),
              measurement=Measurement(True, [], in_flight_mean=2 * r))
        for r, ttft in [(1.0, 50.0), (2.0, 60.0), (4.0, 100.0), (8.0, 900.0)]
    ]  # fmt: skip
    right = verdict(levels, expect_rps=4)
    assert right.finding == "RIGHT_SIZED"  # its arrivals had their bursts already
    assert right.recommendation is not None
    assert "--rate 4,6,8" in (right.recommendation.confirm_with or "")
    assert verdict(levels, expect_rps=8).finding == "UNDER_SIZED"
    assert verdict(levels, expect_concurrency=7).finding == "RIGHT_SIZED"


# ------------------------------------------------------------------------------------ the numbers


def test_the_ratio_comes_from_the_bracket() -> None:
    ratio = verdict(SWEEP, expect_concurrency=20).ratio
    assert ratio is not None
    assert (ratio.lo, ratio.hi) == (20 / 32, 20 / 16)
    assert ratio.value == pytest.approx(20 / (16 + 16 * 350 / 750))


def test_the_binding_expectation_decides() -> None:
    found = verdict(SWEEP, expect_concurrency=2, expect_rps=8)
    assert found.demand == {"declared": True, "binding": "rps", "concurrency": 2.0, "rps": 8.0}
    assert found.capacity["unit"] == "rps"


def test_the_operating_point_is_the_load_at_or_under_the_demand() -> None:
    spread = Stats(60, 9.0, 50, 60, 70, 100, 100, 100, 200)
    levels = [*SWEEP[:3], level(8, 640, 80, energy_j_per_output_token=0.2), *SWEEP[4:]]
    levels[3] = msgspec.structs.replace(levels[3], ttft_ms=spread)
    found = verdict(levels, expect_concurrency=10)
    assert found.stability == {"at": 8.0, "ttft_p99_over_p50": 2.0, "itl_p99_over_p50": 1.0}
    assert found.energy == {"at": 8.0, "j_per_output_token_busy": 0.2}
    assert verdict(SWEEP, expect_concurrency=10).energy == {}


@pytest.mark.parametrize(
    ("options", "users"),
    [({}, "unknown"), ({"expect_rps": 1}, "unknown"), ({"expect_concurrency": 1}, "single"),
     ({"expect_concurrency": 8}, "service")],
)  # fmt: skip
def test_the_three_questions(options: dict[str, Any], users: str) -> None:
    found = verdict(SWEEP, **options).questions
    assert found == {"trains": "unknown", "users": users, "priority": "steady experience"}


def test_confidence_names_what_limits_it() -> None:
    full = ServerView(running_mean=1, waiting_mean=0, kv_usage_max=0.1)
    best = [msgspec.structs.replace(lv, server=full) for lv in SWEEP for _ in range(3)]
    assert verdict(best).confidence.level == "high"
    assert verdict(SWEEP).confidence.level == "medium"
    assert "no server metrics" in verdict(SWEEP).confidence.limited_by
    assert "single run" in verdict(SWEEP).confidence.limited_by
    few = verdict(SWEEP[3:5]).confidence
    assert (few.level, few.limited_by) == ("low", "only 2 valid level(s)")
    assert verdict([level(8, 640, 80, n=9)]).confidence.level == "low"


def test_a_simulation_says_so() -> None:
    found = verdict(SWEEP, simulated=True, expect_concurrency=8)
    assert found.summary.startswith("Simulated: ")
    assert found.confidence.level == "low"
    assert any("simulated" in line for line in found.rests_on)


def test_started_at_of_the_first_level_dates_the_verdict() -> None:
    levels = [
        msgspec.structs.replace(lv, started_at=f"2025-01-0{i + 1}T00:00:00Z")
        for i, lv in enumerate(SWEEP)
    ]
    assert verdict(levels).since == "2025-01-01T00:00:00Z"


# -------------------------------------------------------------------------------------------- laws

sweeps = st.lists(st.integers(1, 512), min_size=1, max_size=7, unique=True).flatmap(
    lambda at: st.tuples(*[
        st.builds(
            level, st.just(c), st.floats(1, 1e5), st.floats(1, 3000),
            n=st.integers(1, 500), reason=st.sampled_from(["", "", "", CLIENT, FOREIGN]),
        )
        for c in at
    ])
).map(list)  # fmt: skip
slos = st.sampled_from([[], SLO, parse_slo("ttft:p99<50ms,itl:p95<50ms"), parse_slo("e2e:max<1s")])
demands = st.one_of(st.none(), st.floats(0.01, 2000))
FINDINGS = {
    "INVALID_MEASUREMENT", "INFEASIBLE_SLO", "UNDER_SIZED", "RIGHT_SIZED", "BORDERLINE",
    "INSUFFICIENT_DATA", "CAPACITY_ONLY",
}  # fmt: skip


@settings(max_examples=60)
@given(sweeps, slos, demands, demands, st.booleans())
def test_a_verdict_never_claims_more_than_was_measured(
    levels: list[Level], slo: list[Slo], streams: float | None, rps: float | None, sim: bool
) -> None:
    found = verdict(levels, slo, expect_concurrency=streams, expect_rps=rps, simulated=sim)
    assert found.finding in FINDINGS  # OVER_SIZED is not among them
    assert found.summary
    assert found.recommendation is not None
    assert (found.finding == "CAPACITY_ONLY") <= (streams is None and rps is None)
    assert decode_verdict(found) == msgspec.to_builtins(found)
    demand = {"concurrency": streams, "rps": rps}.get(found.capacity["unit"])
    if found.finding == "UNDER_SIZED":
        assert demand is not None
        assert found.capacity["hi"] <= demand
        assert found.capacity["lo"] is None or demand > found.capacity["lo"]
    if found.finding == "RIGHT_SIZED":
        assert demand is not None
        assert found.capacity["lo"] >= demand
        assert found.capacity["hi"] is None or demand < found.capacity["hi"]
    tested = [lv.concurrency or 0 for lv in levels if lv.measurement and lv.measurement.valid]
    if found.capacity["unit"] == "concurrency":
        assert (found.capacity["value"] or 0) <= max(tested, default=0)


def decode_verdict(found: Verdict) -> Any:
    return msgspec.to_builtins(msgspec.json.decode(encode(found), type=Verdict))


@settings(max_examples=40)
@given(sweeps, slos, st.floats(0.01, 2000), st.floats(0.01, 2000))
def test_more_demand_never_turns_too_small_into_fitting(
    levels: list[Level], slo: list[Slo], a: float, b: float
) -> None:
    less, more = sorted((a, b))
    if verdict(levels, slo, expect_concurrency=less).finding == "UNDER_SIZED":
        assert verdict(levels, slo, expect_concurrency=more).finding == "UNDER_SIZED"
    if verdict(levels, slo, expect_concurrency=more).finding == "RIGHT_SIZED":
        assert verdict(levels, slo, expect_concurrency=less).finding == "RIGHT_SIZED"


def test_the_module_reads_sweeps_as_they_are_written() -> None:
    text = (
        b'{"run":{"id":"r","started_at":"t","command":"c","seed":1,"tool_version":"0","host":"h"},'
        b'"target":{"url":"u","model":"m"},"workload":{"endpoint":"chat","input_tokens":"1",'
        b'"output_tokens":"1"},"levels":[{"concurrency":1,"output_tokens_per_s":5.0}]}'
    )
    sweep = decode_sweep(text)
    assert verdict(sweep.levels, sweep.slo).finding == "CAPACITY_ONLY"
