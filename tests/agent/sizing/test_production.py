"""What weeks of production prove: each finding with its evidence, and silent without it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import Confidence, Ratio, Reason, Recommendation, Verdict
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.judge import Observed, judge
from agent.sizing.pattern import pattern
from agent.sizing.production import (
    Heat,
    Little,
    Needs,
    Past,
    Scene,
    conclude,
    hours,
    settled,
    span,
    weekend_s,
)
from agent.sizing.trial import Trial
from agent.sizing.window import Window
from tests.agent.sizing.test_judge import SWEEP

SLO = tuple(parse_slo("ttft:p95<500ms"))
MONDAY = 1_704_067_200  # 2024-01-01 00:00 UTC
HOUR, DAY = 3600, 86400
BOUNDS = (0.1, 0.25, 0.6, 1.0, math.inf)
FAST, SLOW, TORN = (80.0, 15.0, 4.0, 1.0, 0.0), (0.0, 0.0, 20.0, 80.0, 0.0), (90.0, 4.0, 6.0, 0, 0)


def hour(
    at: int,
    running: float,
    *,
    most: float | None = None,
    waiting: float = 0.0,
    ttft: tuple[float, ...] = FAST,
    source: str = "chat",
    **counters: float,
) -> Minute:
    """An hour's record: as many requests as the histogram holds, 100 tokens each."""
    done = sum(ttft) if running else 0.0
    values = [
        MinuteValue("requests_running", (), 720, running, 0, most or running, running),
        MinuteValue("requests_waiting", (), 720, waiting, 0, waiting, 0),
    ]
    counted = {"requests_finished_total": done, "output_tokens_total": 100 * done, **counters}
    values += [MinuteValue(name, (), 720, 0, 0, 0, 0, rise) for name, rise in counted.items()]
    histograms = (MinuteHistogram("ttft_seconds", (), BOUNDS, ttft),) if running else ()
    return Minute(source, MONDAY + at * HOUR, tuple(values), histograms, float(HOUR))


def scene(minutes: list[Minute], **more: Any) -> Scene:
    end = max((one.start_unix_s for one in minutes), default=MONDAY) + HOUR
    servers = sorted({one.source for one in minutes}) or ["chat"]
    window = Window(MONDAY, end, servers=servers, record_s=HOUR).add_all(minutes)
    slo = more.setdefault("slo", SLO)
    more.setdefault("declared_slo", True)
    return Scene(
        pattern=pattern(window), hours=hours(window, slo), weekend_s=weekend_s(window), **more
    )


def judged(one: Scene) -> Verdict:
    seen, n = one.pattern.concurrency, one.replicas
    observed = Observed({"concurrency": (seen.p99 or 0) / n}, {"concurrency": (seen.p95 or 0) / n})
    levels = SWEEP
    return judge(levels, analyse(levels, one.slo), one.slo, observed=observed)


def measured(minutes: list[Minute], **more: Any) -> Verdict:
    one = scene(minutes, curve="measured", **more)
    by_curve = judged(one)
    held = by_curve.capacity["held"]  # as if half of the bounds were kept under the same load
    return conclude(msgspec.structs.replace(one, held_half=held), by_curve)


def alone(minutes: list[Minute], **more: Any) -> Verdict:
    """Without any curve."""
    return conclude(scene(minutes, **more), None)


def days(n: float, running: float, **more: Any) -> list[Minute]:
    return [hour(at, running, **more) for at in range(round(24 * n))]


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


def test_the_evidence_stands_beside_every_finding() -> None:
    found = measured(days(7, 12), trains=True)
    assert found.demand["declared"] is False
    assert found.demand["concurrency"] == 12
    assert found.demand["observed"]["concurrency"]["max"] == 12
    assert found.demand["covered_s"] == 7 * DAY
    assert found.demand["observed"]["hours_of_week"] == {
        "observed": 168, "concurrency_p99": 12, "concurrency_max": 12,
    }  # fmt: skip
    assert found.questions == {
        "trains": "yes", "users": "service", "priority": "steady experience",
    }  # fmt: skip
    assert found.stability["ttft_p99_over_p50"] > 1
    assert "observed 12 concurrent requests" in found.summary
    assert "declared" not in found.summary


def test_shortened_times_are_told() -> None:
    found = measured(days(1, 5), needs=Needs(over_s=DAY))
    assert found.finding == "OVER_SIZED"
    assert any("OVER: 24 hours of observation were enough" in line for line in found.rests_on)
    assert not any("as configured" in line for line in measured(days(1, 5)).rests_on)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7 * DAY, "7 days"), (36 * HOUR, "36 hours"), (DAY, "24 hours"), (90 * 60, "90 minutes"),
     (45, "45 seconds"), (2 * DAY, "2 days"), (0, "0 seconds")],
)  # fmt: skip
def test_span(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_an_hour_tells_its_load_and_its_latency() -> None:
    (first, second), slo = [hour(0, 9, waiting=4, ttft=SLOW), hour(2, 3)], (*SLO, *parse_slo(
        "ttft:mean<1s,e2e:p95<1s,ttft:max<1s"))  # fmt: skip
    found = hours(
        Window(MONDAY, MONDAY + 3 * HOUR, servers=["chat"], record_s=HOUR).add_all([first, second]),
        slo,
    )
    assert [(one.concurrency, one.waiting) for one in found] == [(13, 4), (3, 0)]
    assert found[0].said[0] is not None
    assert (found[0].said[0].lo, found[0].said[0].hi) == (600, 1000)
    assert found[0].said[1:] == (None, None, None)


# ------------------------------------------------------------------------------------------- laws

loads = st.lists(
    st.tuples(st.floats(0, 60), st.floats(0, 3), st.sampled_from([FAST, SLOW, TORN])),
    min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
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


# ---------------------------------------------------------------------------------- circumstances


def codes(found: Verdict) -> set[str]:
    return {one.code for one in found.reasons}


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


@pytest.mark.parametrize(
    ("heat", "code"),
    [
        (Heat(0.5, 0x40), "THROTTLED"), (Heat(0.5, 0x4), "POWER_CAPPED"),
        (Heat(0.01, 0x40), None), (None, None),
    ],
)  # fmt: skip
def test_clocks_that_are_held_down(heat: Heat | None, code: str | None) -> None:
    found = codes(measured(days(7, 12), heat=heat))
    assert found & {"THROTTLED", "POWER_CAPPED"} == ({code} if code else set())


def bursty(quiet: float, loud: float) -> list[Minute]:
    """Minutes of two hours: each fifth one loud. As many requests as in flight."""
    minutes = []
    for at in range(120):
        n = loud if at % 5 == 0 else quiet
        values = (
            MinuteValue("requests_running", (), 12, 40, 0, 40, 40),
            MinuteValue("requests_received_total", (), 12, 0, 0, 0, 0, n),
        )
        histograms = (MinuteHistogram("ttft_seconds", (), BOUNDS, SLOW),)
        minutes.append(Minute("chat", MONDAY + 60 * at, values, histograms, 60.0))
    return minutes


@pytest.mark.parametrize(("loud", "fires"), [(100, True), (12, False)])
def test_bursts(loud: float, fires: bool) -> None:
    minutes = bursty(10, loud)
    window = Window(MONDAY, MONDAY + 7200, servers=["chat"]).add_all(minutes)
    one = Scene(pattern(window), hours(window, SLO), SLO, True, "measured")
    found = conclude(one, judged(one))
    assert found.finding == "UNDER_SIZED"
    assert ("BURST_ONLY" in codes(found)) == fires


@pytest.mark.parametrize(("night", "fires"), [(1.0, True), (30.0, False)])
def test_a_peak_of_the_day(night: float, fires: bool) -> None:
    minutes = [
        hour(at, 40 if at % 24 in (11, 12) else night, ttft=SLOW if at % 24 in (11, 12) else FAST)
        for at in range(7 * 24)
    ]
    found = measured(minutes)
    assert found.finding == "UNDER_SIZED"
    assert ("DIURNAL_PEAK" in codes(found)) == fires


@pytest.mark.parametrize(("aborted", "fires"), [(20.0, True), (1.0, False)])
def test_requests_that_were_given_up(aborted: float, fires: bool) -> None:
    found = measured(days(7, 40, ttft=SLOW, requests_aborted_total=aborted))
    assert found.finding == "UNDER_SIZED"
    assert ("RETRY_INFLATED" in codes(found)) == fires


@pytest.mark.parametrize(("hits", "fires"), [(60.0, True), (10.0, False)])
def test_what_hangs_on_the_prefix_cache(hits: float, fires: bool) -> None:
    cache = {"prefix_cache_queries_total": 100.0, "prefix_cache_hits_total": hits}
    found = measured(days(7, 12, **cache))
    assert ("PREFIX_CACHE_DEPENDENT" in codes(found)) == fires


# -------------------------------------------------------------------------------------- hysteresis


def said(finding: str, ratio: float | None = None) -> Verdict:
    return Verdict(
        finding, "So.", Confidence("low", ""), ratio=Ratio(ratio) if ratio is not None else None
    )


def past(*rows: tuple[float, str, str]) -> list[Past]:
    """(days ago, finding, found)"""
    return [Past(100 * DAY - ago * DAY, finding, found) for ago, finding, found in rows]


RIGHT, UNDER, OVER = "RIGHT_SIZED", "UNDER_SIZED", "OVER_SIZED"


@pytest.mark.parametrize(
    ("found", "before", "finding"),
    [
        (said(UNDER), [], UNDER),
        (said(UNDER), past((0.1, RIGHT, RIGHT)), RIGHT),
        (said(UNDER), past((0.1, RIGHT, UNDER), (0.2, RIGHT, RIGHT)), UNDER),
        (said(UNDER), past((0.1, UNDER, UNDER)), UNDER),
        (said(UNDER), past((0.1, "INSUFFICIENT_DATA", "INSUFFICIENT_DATA")), UNDER),
        (said("BORDERLINE", 1.0), past((0.1, UNDER, UNDER)), UNDER),
        (said(RIGHT, 0.97), past((0.1, UNDER, UNDER)), UNDER),
        (said(RIGHT, 0.9), past((0.1, UNDER, UNDER)), RIGHT),
        (said("BORDERLINE", 1.0), past((0.1, RIGHT, RIGHT)), "BORDERLINE"),
        (said(OVER), [], RIGHT),
        (said(OVER), past((1, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, RIGHT, OVER), (2, RIGHT, OVER)), OVER),
        (said(OVER), past((0.1, RIGHT, OVER), (0.2, RIGHT, OVER), (0.3, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, RIGHT, OVER), (1.5, RIGHT, RIGHT), (2, RIGHT, OVER)), RIGHT),
        (said(OVER), past((1, "OVER_OFF_PEAK", OVER)), "OVER_OFF_PEAK"),
        (said(OVER), past((0.1, OVER, OVER)), OVER),
        (said("IDLE"), past((0.1, UNDER, UNDER)), "IDLE"),
    ],
)
def test_findings_do_not_flap(found: Verdict, before: list[Past], finding: str) -> None:
    verdict = settled(found, before, Needs(), 100 * DAY)
    assert verdict.finding == finding
    assert verdict.found == (found.finding if finding != found.finding else None)
    assert verdict.summary.endswith("So.")


@given(st.lists(st.sampled_from([RIGHT, UNDER, OVER, "BORDERLINE", "IDLE"]), max_size=30))
def test_over_sized_is_never_said_before_its_days(found: list[str]) -> None:
    """Judged each hour of one day, whatever each window finds."""
    before: list[Past] = []
    for at, finding in enumerate(found[:24]):
        verdict = settled(said(finding, 1.0), before, Needs(), at * HOUR)
        assert verdict.finding != OVER
        before.insert(0, Past(at * HOUR, verdict.finding, verdict.found or verdict.finding))
