"""What weeks of production prove: each finding with its evidence, and silent without it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.minutes import Minute, MinuteValue
from agent.model import Reason, Recommendation, Verdict
from agent.sizing.curve import parse_slo
from agent.sizing.pattern import pattern
from agent.sizing.production import conclude
from agent.sizing.scene import Little, Needs, Scene, hours
from agent.sizing.trial import Trial
from agent.sizing.window import Window
from tests.agent.sizing.weeks import (
    DAY,
    FAST,
    HOUR,
    MONDAY,
    SLOW,
    TORN,
    alone,
    codes,
    days,
    hour,
    judged,
    measured,
    scene,
)

# --------------------------------------------------------------------------------------- findings


@pytest.mark.parametrize(
    ("minutes", "more", "finding"),
    [
        # the curve holds 16 surely, breaks at 32
        (days(7, 12), {}, "RIGHT_SIZED"),
        (days(7, 40, ttft=SLOW), {}, "UNDER_SIZED"),
        (days(7, 40), {}, "INSUFFICIENT_DATA"),  # the curve says so, and the SLO was kept
        (days(7, 20), {}, "BORDERLINE"),
        ([*days(7, 12), hour(168, 40)], {}, "RIGHT_SIZED"),  # P99 leaves one hour of 169 out
        ([*days(2, 12), *[hour(48 + k, 40) for k in range(2)]], {}, "BORDERLINE"),  # P95 is 12
        (days(14, 5), {}, "OVER_SIZED"),
        (days(13.8, 5), {}, "OVER_SIZED"),
        (days(12, 5), {}, "INSUFFICIENT_DATA"),
        (days(14, 5), {"declared_slo": False}, "INSUFFICIENT_DATA"),
        (days(14, 5), {"doubts": ("a sweep since the flags changed",)}, "INSUFFICIENT_DATA"),
        (days(14, 5), {"trains": True}, "RIGHT_SIZED"),
        (days(14, 5), {"expect_concurrency": 12}, "RIGHT_SIZED"),
        (days(14, 7), {}, "RIGHT_SIZED"),  # half of it would be 87 % full
        ([*days(14, 5), hour(336, 5, most=7)], {}, "RIGHT_SIZED"),  # its peak would
        (days(14, 5, requests_rejected_total=2.0), {}, "INSUFFICIENT_DATA"),
        (days(14, 12), {"replicas": 2}, "OVER_SIZED"),  # 12 of 16 on one
        (days(14, 0.05), {"replicas": 20}, "OVER_SIZED"),
        (days(14, 14), {"replicas": 2}, "RIGHT_SIZED"),
        (days(14, 80, ttft=SLOW), {"replicas": 2}, "UNDER_SIZED"),
        ([hour(0, 12)], {}, "RIGHT_SIZED"),
        ([hour(0, 12)], {"needs": Needs(right_s=2 * HOUR)}, "INSUFFICIENT_DATA"),
        (days(0.5, 0), {}, "INSUFFICIENT_DATA"),
        (days(1, 0), {}, "IDLE"),
        ([*days(8, 0), hour(192, 2)], {}, "IDLE"),
        ([*days(2, 0), hour(48, 2)], {}, "INSUFFICIENT_DATA"),  # 2 % busy: and little else known
        ([], {}, "INSUFFICIENT_DATA"),
    ],
)
def test_finding_with_a_measured_curve(
    minutes: list[Minute], more: dict[str, Any], finding: str
) -> None:
    assert measured(minutes, **more).finding == finding


BROKEN = [hour(at, 9, waiting=4, ttft=SLOW) for at in range(3)]


@pytest.mark.parametrize(
    ("minutes", "more", "finding"),
    [
        ([*BROKEN, *[hour(at, 3) for at in range(3, 24)]], {}, "UNDER_SIZED"),
        ([*BROKEN[:2], *[hour(at, 3) for at in range(2, 24)]], {}, "INSUFFICIENT_DATA"),
        ([hour(at, 9, ttft=SLOW) for at in range(24)], {}, "INSUFFICIENT_DATA"),  # nothing waits
        ([hour(at, 9, ttft=SLOW, preemptions_total=1.0) for at in range(24)], {}, "UNDER_SIZED"),
        ([hour(at, 9, waiting=4, ttft=TORN) for at in range(24)], {}, "INSUFFICIENT_DATA"),
        ([hour(at, 9, waiting=4, ttft=(0, 0, 0, 29, 0)) for at in range(24)], {},
         "INSUFFICIENT_DATA"),
        (BROKEN, {"slo": ()}, "INSUFFICIENT_DATA"),
        (days(1, 3), {}, "RIGHT_SIZED"),
        (days(1, 3), {"slo": tuple(parse_slo("itl:p95<1s"))}, "INSUFFICIENT_DATA"),
        (days(1, 3), {"slo": ()}, "INSUFFICIENT_DATA"),
        ([hour(0, 3), hour(1, 3)], {}, "INSUFFICIENT_DATA"),
        (days(60, 0.1, ttft=(40.0, 0, 0, 0, 0)), {}, "RIGHT_SIZED"),  # never OVER_SIZED
        (days(1, 3), {"expect_concurrency": 9}, "INSUFFICIENT_DATA"),
        (days(1, 0), {}, "IDLE"),
    ],
)  # fmt: skip
def test_finding_without_a_curve(minutes: list[Minute], more: dict[str, Any], finding: str) -> None:
    assert alone(minutes, **more).finding == finding


def test_production_outweighs_a_sweep_that_says_it_fits() -> None:
    found = measured([*BROKEN, *[hour(at, 9) for at in range(3, 72)]])
    assert found.finding == "UNDER_SIZED"
    assert found.reasons[0].code == "SLO_BROKEN_IN_PRODUCTION"
    assert found.reasons[0].evidence["hours"] == 3
    assert found.reasons[0].evidence["waiting"] == 4
    assert "in 3 of 72 observed hours" in found.summary
    assert "TTFT p95 at least 600 ms (bound 500 ms) of 100 requests" in found.summary


@pytest.mark.parametrize("limit", ["KV_MEMORY", "ADMISSION_CAP", None])
def test_what_broke_asks_for_what_its_limit_takes(limit: str | None) -> None:
    one = scene([*BROKEN, *[hour(at, 9) for at in range(3, 72)]], curve="measured")
    by_curve = judged(one)
    by_curve = msgspec.structs.replace(by_curve, capacity={**by_curve.capacity, "limit": limit})
    assert by_curve.finding == "RIGHT_SIZED"
    found = conclude(one, by_curve)
    assert found.finding == "UNDER_SIZED"
    assert found.recommendation is not None
    said = {
        "KV_MEMORY": "more KV-cache memory", "ADMISSION_CAP": "raise --max-num-seqs",
        None: "more capacity; how much",
    }  # fmt: skip
    assert found.recommendation.action.startswith(said[limit])


# ------------------------------------------------------------------------------------------ words


def test_what_is_short_of_over_sized_is_named_and_never_safe() -> None:
    found = measured(days(12, 5), declared_slo=False)
    assert found.summary == (
        "So far it looks over-sized, but nothing is to be taken away yet: at most 5 concurrent"
        " requests were ever seen in 12 days, 16 are surely held within half of the SLO's bounds"
        " and of the KV cache: half of it would be 62 % full at that peak."
    )
    assert found.missing[0].startswith("2 more day(s): 12 were observed")
    assert "an SLO declared for this service" in found.missing[1]
    assert found.recommendation is not None
    assert found.recommendation.action.startswith("keep it as it is")
    assert found.confidence.level == "none"


def test_two_weekends_are_asked_for_by_their_days() -> None:
    gone = [one for one in days(15, 5) if (one.start_unix_s // DAY + 3) % 7 < 5]
    found = measured(gone, needs=Needs(over_s=14 * DAY, covered_min=0.75))
    assert found.finding == "INSUFFICIENT_DATA"
    assert any("two weekends: 0 of their 4 days" in line for line in found.missing)


def test_over_sized_says_what_to_try_first_and_what_is_not_known() -> None:
    one = measured(days(14, 5))
    assert one.recommendation is not None
    assert "measure that one" in one.recommendation.action
    assert (one.confidence.level, one.recommendation.saving_lo) == ("low", None)
    two = measured(days(14, 12), replicas=2)
    assert two.recommendation is not None
    assert (two.recommendation.saving_lo, two.recommendation.saving_hi) == (0.5, 0.5)
    assert "1 replica(s) would be 75 % full" in two.summary


def test_idle_tells_its_watts_and_minds_training_and_promises() -> None:
    def watts(minutes: list[Minute], **more: Any) -> Verdict:
        energy = [
            msgspec.structs.replace(one, source="gpu", histograms=(), values=(
                MinuteValue("gpu_energy_j", (("gpu", "g0"),), 720, 0, 0, 0, 0, 360_000.0),))
            for one in minutes
        ]  # fmt: skip
        end = MONDAY + len(minutes) * HOUR
        window = Window(MONDAY, end, servers=["chat"], record_s=HOUR)
        window.add_all([*minutes, *energy])
        return conclude(Scene(pattern(window), hours(window, ()), **more), None)

    found = watts(days(2, 0))
    assert found.finding == "IDLE"
    assert found.summary.endswith("idle, its GPUs draw 100 W.")
    assert found.energy == {"idle_w": 100.0, "mean_w": 100.0, "energy_j": 48 * 360_000.0}
    for more, said in (({"trains": True}, "training"), ({"expect_concurrency": 8}, "8 expected")):
        action = watts(days(2, 0), **more).recommendation
        assert action is not None
        assert said in action.action


# ------------------------------------------------------------------------------------------- laws

loads = st.lists(
    st.tuples(st.floats(0, 60), st.floats(0, 3), st.sampled_from([FAST, SLOW, TORN])),
    min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=50)
@given(loads, st.booleans(), st.sampled_from([1, 2, 3]), st.booleans())
def test_hardware_is_never_taken_away_on_thin_evidence(
    asked: list[tuple[float, float, tuple[float, ...]]], trains: bool, replicas: int, is_own: bool
) -> None:
    """Under two weeks nothing is over-sized; where it is, the peak has room on what is left."""
    minutes = [
        hour(at, running, waiting=queue, ttft=ttft)
        for at, (running, queue, ttft) in enumerate(asked)
    ]
    more = {"trains": trains, "replicas": replicas, "declared_slo": is_own}
    assert measured(minutes, **more).finding != "OVER_SIZED"
    assert alone(minutes, **more).finding != "OVER_SIZED"
    found = measured(minutes, **more, needs=Needs(over_s=HOUR))
    if found.finding == "OVER_SIZED":
        most = max(running + queue for running, queue, _ in asked)
        left = replicas - 1 if replicas > 1 else 0.5
        assert most < 0.85 * 16 * left
        assert is_own
        assert not trains


# ---------------------------------------------------------------------------------- off its peak


def office(n: int, peak: float = 12.0) -> list[Minute]:
    """Days whose nights have hardly any load."""
    return [hour(at, peak if 8 <= at % 24 < 18 else 1.0) for at in range(24 * n)]


@pytest.mark.parametrize(
    ("minutes", "more", "finding"),
    [
        (office(7), {}, "OVER_OFF_PEAK"),
        (office(5), {}, "RIGHT_SIZED"),  # weekends were not seen
        (days(7, 12), {}, "RIGHT_SIZED"),
        (office(7), {"needs": Needs(off_peak_hours=120)}, "RIGHT_SIZED"),
        (office(7), {"needs": Needs(off_peak_ratio=0.9)}, "RIGHT_SIZED"),
        (office(7), {"trains": True}, "RIGHT_SIZED"),
        (office(7), {"declared_slo": False}, "RIGHT_SIZED"),
    ],
)
def test_right_at_its_peak_alone(minutes: list[Minute], more: dict[str, Any], finding: str) -> None:
    found = measured(minutes, **more)
    assert found.finding == finding
    assert ("schedule" in (found.recommendation or RECOMMEND).action) == (
        finding == "OVER_OFF_PEAK"
    )


RECOMMEND = Recommendation(action="")

# -------------------------------------------------------------------------------------- the replay


def tried(value: float, lo: float, hi: float, smaller: float = 0.0) -> Trial:
    return Trial(value, lo, hi, smaller, None, 1000, "a replay")


TORN_WEEK = days(7, 20, ttft=TORN)  # neither surely kept nor surely broken


@pytest.mark.parametrize(
    ("minutes", "trial", "finding"),
    [
        (TORN_WEEK, tried(1.5, 1.2, 1.8), "RIGHT_SIZED"),
        (TORN_WEEK, tried(1.1, 0.9, 1.3), "BORDERLINE"),
        (TORN_WEEK, tried(0.9, 0.7, 1.1), "BORDERLINE"),
        (TORN_WEEK, tried(0.8, 0.7, 0.9), "UNDER_SIZED"),
        (days(7, 20), tried(0.8, 0.7, 0.9), "BORDERLINE"),  # production kept it all the same
        (days(7, 20), tried(1.1, 0.9, 1.3), "RIGHT_SIZED"),
        (days(7, 40, ttft=SLOW), tried(1.5, 1.2, 1.8), "UNDER_SIZED"),  # what broke, broke
        (days(14, 5), tried(4, 3, 5, smaller=1.3), "OVER_SIZED"),
        (days(14, 5), tried(4, 3, 5, smaller=1.1), "RIGHT_SIZED"),
        ([*days(14, 5), *[hour(336 + k, 5, ttft=SLOW) for k in range(2)]],
         tried(4, 3, 5, smaller=1.3), "RIGHT_SIZED"),
    ],
)  # fmt: skip
def test_what_the_replay_decides(minutes: list[Minute], trial: Trial, finding: str) -> None:
    found = measured(minutes, trial=trial)
    assert found.finding == finding
    assert "a replay" in found.rests_on
    if found.ratio is not None:
        assert found.ratio == trial.ratio


# ------------------------------------------------------------------- measurements that do not count


@pytest.mark.parametrize(
    ("sampled_s", "summed_s", "requests", "is_wrong"),
    [
        (20_000, 10_000, 1000, True),
        (10_000, 20_000, 1000, True),
        (12_000, 10_000, 1000, False),
        (2_000, 1_000, 1000, False),  # too little to tell
        (20_000, 10_000, 50, False),
    ],
)
def test_gauges_and_latencies_that_contradict_each_other(
    sampled_s: float, summed_s: float, requests: float, is_wrong: bool
) -> None:
    found = measured(days(7, 12), little=Little(sampled_s, summed_s, requests))
    assert (found.finding == "INVALID_MEASUREMENT") == is_wrong
    assert ("TELEMETRY_INCONSISTENT" in codes(found)) == is_wrong


def test_a_sweep_that_does_not_count_is_said_unless_production_proves_more() -> None:
    why = Reason("FINGERPRINT_DIFFERS", "dtype changed")
    assert measured(days(7, 12), wrong=why).finding == "INVALID_MEASUREMENT"
    broken = days(7, 40, waiting=3, ttft=SLOW)
    assert measured(broken, wrong=why).finding == "UNDER_SIZED"
