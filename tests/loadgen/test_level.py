"""Every definition of the README on recordings whose figures are known by hand."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import GpuView, Level, Requests, ServerView, Slo, Stats, Tokens, encode
from agent.stats import batch_means_ci95
from loadgen.client import Exchange
from loadgen.level import Bounds, Plan, Window, span, steady_window, summarise
from loadgen.recorder import Recorder, Recording, merge

MS = 1_000_000
T0_MS = 50_000  # the monotonic clock does not begin at 0


@dataclass(frozen=True)
class Ask:
    """One request; instants in ms from the level's start."""

    sent: float | None
    stamps: tuple[float, ...] = ()
    due: float | None = None  # as sent
    end: float | None = None  # as the last stamp
    answer: float | None = None  # as the first stamp
    error: str | None = None
    warmup: bool = False
    prompt: int = -1
    output: int = -1
    counts: tuple[int, ...] = ()
    connect: float = 0.0
    reasoning: int = 0


def ns(ms: float) -> int:
    return round((T0_MS + ms) * MS)


def exchange(index: int, ask: Ask) -> Exchange:
    due = ask.due if ask.due is not None else ask.sent
    assert due is not None
    made = Exchange(index, ns(due), warmup=ask.warmup)
    made.sent_ns = 0 if ask.sent is None else ns(ask.sent)
    made.stamps = array("q", map(ns, ask.stamps))
    end = ask.end if ask.end is not None else (ask.stamps or (due,))[-1]
    made.end_ns = ns(end)
    answer = ask.answer if ask.answer is not None else (ask.stamps or (None,))[0]
    made.answer_ns = 0 if answer is None else ns(answer)
    made.error = ask.error
    made.prompt_tokens, made.output_tokens = ask.prompt, ask.output
    made.token_counts = array("i", ask.counts)
    made.connect_ns = round(ask.connect * MS)
    made.reasoning_tokens = ask.reasoning
    return made


def recorded(
    asks: Iterable[Ask],
    *,
    ramp_end: float | None = None,
    refill_end: float | None = None,
    loop_lag_ms: Iterable[float] = (),
    cpu_s: float = 0.1,
    wall_s: float = 1.0,
) -> Recording:
    recorder = Recorder()
    for index, ask in enumerate(asks):
        recorder.add(exchange(index, ask))
    recorder.ramp_end_ns = 0 if ramp_end is None else ns(ramp_end)
    recorder.refill_end_ns = 0 if refill_end is None else ns(refill_end)
    recorder.loop_lag_ns.extend(round(lag * MS) for lag in loop_lag_ms)
    return recorder.freeze(cpu_s=cpu_s, wall_s=wall_s)


def closed(concurrency: int = 1, **more: Any) -> Plan:
    return Plan("concurrency", concurrency=concurrency, **more)


def opened(rate_rps: float = 1.0) -> Plan:
    return Plan("rate", rate_rps=rate_rps)


def level_of(rec: Recording, plan: Plan | None = None, **more: Any) -> Level:
    return summarise(rec, plan or closed(), started_at="2026-01-01T00:00:00.000Z", **more)


def one(ask: Ask, **more: Any) -> Level:
    return level_of(recorded([ask]), **more)


def stream(sent: float, n: int = 5, first: float = 20, gap: float = 20, **more: Any) -> Ask:
    """`n` tokens, the first after `first` ms; by default it lasts 100 ms."""
    return Ask(sent, tuple(sent + first + i * gap for i in range(n)), **more)


# ---------------------------------------------------------------------------- latencies of requests


def test_the_latencies_of_one_request() -> None:
    level = one(Ask(sent=110, due=100, stamps=(150, 160, 190), end=250, answer=160))
    assert level.ttft_ms.mean == 40
    assert level.ttft_from_due_ms.mean == 50
    assert level.ttfo_ms.mean == 50
    assert (level.itl_ms.n, level.itl_ms.mean, level.itl_ms.max) == (2, 20, 30)
    assert level.tpot_ms.mean == 20  # 40 ms for the second and third token
    assert level.e2e_ms.mean == 80  # to the last token, not to the end of the body
    assert level.duration_s == pytest.approx(0.14)


def test_tpot_divides_by_tokens_and_not_by_chunks() -> None:
    assert one(Ask(0, (10, 20, 50), output=9)).tpot_ms.mean == 5  # 40 ms for 8 tokens
    assert one(Ask(0, (10,), output=9)).tpot_ms.n == 0  # one chunk: no time between tokens
    assert one(Ask(0, (10, 20), output=1)).tpot_ms.n == 0


def test_a_chunk_of_k_tokens_is_k_gaps_of_a_kth() -> None:
    level = one(Ask(0, (10, 20, 50), output=6, counts=(2, 1, 3)))
    assert (level.itl_ms.n, level.itl_ms.mean, level.itl_ms.max) == (4, 10, 10)


def test_without_the_servers_counts_a_chunk_is_one_gap() -> None:
    level = one(Ask(0, (10, 20, 50), output=6))
    assert (level.itl_ms.n, level.itl_ms.mean, level.itl_ms.max) == (2, 20, 30)


def test_a_chunk_that_the_server_counts_as_nothing_is_one_gap() -> None:
    level = one(Ask(0, (10, 20, 50), output=2, counts=(1, 0, 1)))
    assert (level.itl_ms.n, level.itl_ms.max) == (2, 30)


def test_gaps_are_pooled_over_requests_and_never_between_them() -> None:
    rec = recorded([Ask(0, (10, 20)), Ask(5, (500,)), Ask(6, (1000, 1030, 1060))])
    level = level_of(rec)
    assert (level.itl_ms.n, level.itl_ms.max) == (3, 30)
    assert level.itl_ms.mean == pytest.approx(70 / 3)


def test_a_reply_that_is_not_streamed_has_only_an_e2e_time() -> None:
    level = one(Ask(sent=10, end=90, output=8, prompt=5))
    assert level.e2e_ms.mean == 80
    for stats in (level.ttft_ms, level.ttft_from_due_ms, level.ttfo_ms, level.itl_ms,
                  level.tpot_ms):  # fmt: skip
        assert stats == Stats()
    assert level.output_tokens_per_s == 8 / 0.08
    assert level.tokens == Tokens(prompt=5, output=8, reasoning=0, source="usage")


def test_latencies_are_of_completed_requests_only() -> None:
    rec = recorded([Ask(0, (10,)), Ask(0, (500,), error="cut"), Ask(0, (900,), error="cancelled")])
    level = level_of(rec)
    assert (level.ttft_ms.n, level.ttft_ms.max) == (1, 10)
    assert level.requests == Requests(ok=1, failed=1, cancelled=1, errors={"cut": 1})


# ------------------------------------------------------------------------------ window and counting


def train(slots: int = 2, each: int = 10, **more: Any) -> list[Ask]:
    """Slots that send requests of 100 ms back to back, staggered by 10 ms."""
    return [
        stream(slot * 10 + i * 100, prompt=50, output=5, **more)
        for i in range(each)
        for slot in range(slots)
    ]


STEADY: dict[str, Any] = {"ramp_end": 10.0, "refill_end": 1000.0}


def test_the_window_runs_from_the_ramps_end_to_the_first_slot_not_refilled() -> None:
    rec = recorded(train(), **STEADY)
    window = steady_window(rec)
    assert window == Window(ns(10), ns(1000), True)
    assert window.seconds == pytest.approx(0.99)
    assert span(rec) == (ns(0), ns(1010))


def test_rates_are_counted_chunk_by_chunk_inside_the_window() -> None:
    level = level_of(recorded(train(), **STEADY), closed(2))
    # Slot 0: 20, 40, … 1000 and slot 1: 30, 50, … 1010, of which the last is outside.
    assert level.output_tokens_per_s == pytest.approx(99 / 0.99)
    # Ten and nine requests ended in the window; each brought its prompt with its first token.
    assert level.request_throughput == pytest.approx(19 / 0.99)
    assert level.total_tokens_per_s == pytest.approx((99 + 20 * 50) / 0.99)
    assert level.window_s == pytest.approx(0.99)
    assert level.window_start_s == pytest.approx(0.01)
    assert level.duration_s == pytest.approx(1.01)
    # … and the counts are of the whole level.
    assert level.requests == Requests(20, 0, 0, {})
    assert level.tokens == Tokens(prompt=1000, output=100, reasoning=0, source="usage")


def test_latencies_are_of_the_requests_sent_in_the_window() -> None:
    slow_first = [Ask(0, (400, 410)), *train()[1:], Ask(1000.5, (2000,))]
    level = level_of(recorded(slow_first, **STEADY), closed(2))
    assert (level.ttft_ms.n, level.ttft_ms.max, level.ttft_ms.std) == (19, 20, 0)
    assert (level.e2e_ms.n, level.e2e_ms.max) == (19, 100)


def test_tokens_of_an_even_share_count_where_their_chunk_came() -> None:
    asks = [Ask(i * 100, (i * 100 + 50, i * 100 + 100), output=8) for i in range(10)]
    level = level_of(recorded(asks, ramp_end=0, refill_end=950))
    assert level.output_tokens_per_s == pytest.approx(19 * 4 / 0.95)


@pytest.mark.parametrize(("refill_end", "steady"), [(210.0, True), (209.9, False)])
def test_a_window_under_twice_the_mean_e2e_is_too_short(refill_end: float, steady: bool) -> None:
    rec = recorded(train(each=4), ramp_end=10, refill_end=refill_end)
    window = steady_window(rec)
    assert window.steady is steady
    if not steady:
        assert (window.start_ns, window.end_ns) == span(rec)
    level = level_of(rec, closed(2))
    assert level.measurement is not None
    noted = [reason for reason in level.measurement.reasons if reason.startswith("window:")]
    assert len(noted) == (not steady)
    assert level.measurement.valid  # it is said, and the figures are of the whole level
    assert (level.output_tokens_per_s_ci95 is None) is not steady
    if not steady:
        assert level.ttft_ms.n == 8
        assert level.output_tokens_per_s == pytest.approx(40 / 0.41)


@pytest.mark.parametrize(("ramp_end", "refill_end"), [(None, 1000.0), (10.0, None), (900.0, 100.0)])
def test_without_an_end_of_the_ramp_or_of_refilling_the_whole_level_is_used(
    ramp_end: float | None, refill_end: float | None
) -> None:
    rec = recorded(train(), ramp_end=ramp_end, refill_end=refill_end)
    assert steady_window(rec) == Window(*span(rec), False)


def test_the_warm_up_is_in_no_count_and_no_latency_but_its_tokens_load_the_window() -> None:
    warm = [
        stream(-100, warmup=True, output=5, prompt=50),
        Ask(-90, (15.0,), warmup=True, output=1),
    ]
    level = level_of(recorded([*warm, *train(slots=1)], ramp_end=0, refill_end=900))
    assert level.requests == Requests(10, 0, 0, {})
    assert level.tokens is not None
    assert level.tokens.output == 50
    assert level.ttft_ms.max == 20
    assert (level.output_tokens.n, level.prompt_tokens.n) == (10, 10)
    # 45 tokens of its own to 900 ms, and one that a request of the warm-up was still owed.
    assert level.output_tokens_per_s == pytest.approx(46 / 0.9)
    assert level.duration_s == pytest.approx(1.0)


def test_open_loop_the_window_runs_to_the_last_due_instant() -> None:
    rec = recorded([stream(i * 50) for i in range(20)], ramp_end=0, refill_end=950)
    level = level_of(rec, opened(20))
    assert level.mode == "rate"
    assert (level.concurrency, level.offered_rps) == (None, 20)
    assert level.window_s == 0.95
    assert level.request_throughput == pytest.approx(18 / 0.95)


def test_the_interval_is_of_batch_means_over_the_window() -> None:
    level = level_of(recorded(train(), **STEADY), closed(2))
    assert level.output_tokens_per_s_ci95 is not None
    low, high = level.output_tokens_per_s_ci95
    assert low <= (level.output_tokens_per_s or 0) <= high
    # 0.99 s are nine batches of 110 ms, one E2E time each at the least.
    counts = [11] * 9
    expected = batch_means_ci95(np.array(counts) / 0.11)
    assert (low, high) == pytest.approx(expected)


def test_who_counted_the_tokens_is_named() -> None:
    assert one(Ask(0, (10, 20))).tokens == Tokens(None, 2, 0, "events")
    assert one(Ask(0, (10, 20), output=4, prompt=3, reasoning=1)).tokens == Tokens(3, 4, 1, "usage")


def test_token_counts_and_connects_per_request() -> None:
    rec = recorded([Ask(0, (10,), prompt=100, output=4, connect=3), Ask(0, (20,), output=8)])
    level = level_of(rec)
    assert (level.prompt_tokens.n, level.prompt_tokens.mean) == (1, 100)  # −1 is not a length
    assert (level.output_tokens.n, level.output_tokens.mean) == (2, 6)
    assert (level.connect_ms.n, level.connect_ms.mean) == (1, 3)


# --------------------------------------------------------------------------------------------- SLO


def slo(metric: str, bound_ms: float, statistic: str = "p95") -> list[Slo]:
    return [msgspec.convert({"metric": metric, "statistic": statistic, "bound_ms": bound_ms}, Slo)]


@pytest.mark.parametrize(
    ("metric", "value"), [("ttft", 40), ("ttfo", 50), ("itl", 30), ("tpot", 20), ("e2e", 80)]
)
def test_a_request_meets_a_target_below_its_bound(metric: str, value: float) -> None:
    ask = Ask(sent=110, stamps=(150, 160, 190), answer=160)
    for bound, attained in ((value + 0.1, 1.0), (value, 0.0), (value - 0.1, 0.0)):
        level = one(ask, slo=slo(metric, bound, "max"))
        assert level.slo_attainment == attained
        assert level.goodput_rps == attained / 0.08
        assert level.slo_met is (attained == 1)


def test_of_itl_a_requests_own_statistic_is_taken() -> None:
    rec = recorded([Ask(0, (10, 20, 30, 40, 100)), Ask(0, (10, 20, 30, 40, 50))])
    assert level_of(rec, slo=slo("itl", 59, "max")).slo_attainment == 0.5
    assert level_of(rec, slo=slo("itl", 11, "p50")).slo_attainment == 1.0
    assert level_of(rec, slo=slo("itl", 20, "mean")).slo_attainment == 0.5


def test_every_target_must_be_met() -> None:
    rec = recorded([Ask(0, (10, 20)), Ask(0, (30, 35)), Ask(0, (30, 90))])
    both = [*slo("ttft", 25), *slo("e2e", 50)]
    assert level_of(rec, slo=both).slo_attainment == pytest.approx(1 / 3)


def test_goodput_is_of_requests_due_in_the_window_and_failures_miss() -> None:
    asks = train(slots=1)
    asks[3] = replace(asks[3], error="cut")
    asks[4] = Ask(400, (490,), end=500)  # too slow
    asks.append(Ask(None, due=500, end=501, error="connect"))
    asks.append(Ask(550, due=550, end=560, error="cancelled"))  # by us: it missed nothing
    level = level_of(recorded(asks, ramp_end=0, refill_end=850), slo=slo("ttft", 50))
    assert level.slo_attainment == pytest.approx(7 / 10)  # due at 0, 100, … 800 and 500
    assert level.goodput_rps == pytest.approx(7 / 0.85)


def test_of_a_level_too_short_for_a_window_every_request_counts() -> None:
    asks = [Ask(10, (20,), due=9.99), Ask(12, (90,), due=11, end=110)]
    level = level_of(recorded(asks, ramp_end=12, refill_end=20), slo=slo("ttft", 50))
    assert level.slo_attainment == 0.5
    assert level.goodput_rps == pytest.approx(1 / 0.1)


def test_an_open_loop_begins_with_its_schedule() -> None:
    asks = [Ask(500 + 100 * i, (510 + 100 * i,)) for i in range(10)]
    level = level_of(
        recorded(asks, ramp_end=0, refill_end=1400), plan=opened(10), slo=slo("ttft", 50)
    )
    assert (level.window_s, level.duration_s) == (1.4, pytest.approx(1.41, abs=0.001))
    assert level.goodput_rps == pytest.approx(10 / 1.4)


def test_without_an_slo_there_is_neither_goodput_nor_attainment() -> None:
    level = one(Ask(0, (10,)))
    assert (level.goodput_rps, level.slo_attainment, level.slo_met) == (None, None, None)


def test_what_cannot_be_measured_is_no_miss() -> None:
    level = one(Ask(0, end=100, output=5), slo=slo("ttft", 1))
    assert level.slo_attainment == 1.0
    assert level.slo_met is None  # but the level does not claim to have met it


# ---------------------------------------------------------------------------------------- validity


def measurement(rec: Recording, plan: Plan | None = None, **more: Any) -> Any:
    return level_of(rec, plan or closed(2), **more).measurement


def steady(**more: Any) -> Recording:
    return recorded(train(), **STEADY, **more)


def test_a_good_level_is_valid_and_its_figures_stand_by_it() -> None:
    got = measurement(steady(loop_lag_ms=[0, 1, 2], cpu_s=0.5, wall_s=2))
    assert (got.valid, got.reasons) == (True, [])
    assert got.in_flight_mean == pytest.approx(2.0, rel=0.01)
    assert got.littles_law_error == pytest.approx(0, abs=0.01)
    assert (got.loop_lag_ms.p50, got.loop_lag_ms.max) == (1, 2)
    assert got.client_cpu == 0.25
    assert got.achieved_over_offered is None
    assert got.foreign_requests is None


def reasons_of(got: Any, code: str) -> list[str]:
    return [reason for reason in got.reasons if reason.startswith(f"{code}: ")]


def test_send_lag_above_its_bound() -> None:
    late = [replace(ask, due=(ask.sent or 0) - 12) for ask in train()]
    got = measurement(recorded(late, **STEADY))
    assert (got.send_lag_ms.p50, got.send_lag_ms.max, got.valid) == (12, 12, False)
    assert got.reasons == ["client_limited: send_lag_p99_ms 12 is above its bound 10"]
    assert measurement(recorded(late, **STEADY), bounds=Bounds(send_lag_p99_ms=13)).valid


def test_two_late_requests_of_few_are_noted_and_three_decide() -> None:
    def with_late(n: int) -> Any:
        asks = [replace(ask, due=(ask.sent or 0) - (40 if i < n else 0))
                for i, ask in enumerate(train())]  # fmt: skip
        return measurement(recorded(asks, **STEADY))

    noted = with_late(2)
    assert noted.send_lag_ms.p99 > 10
    assert noted.valid
    assert len(reasons_of(noted, "late")) == 1
    assert f"2 of {len(train())} requests were sent later than 10 ms" in noted.reasons[0]
    decided = with_late(3)
    assert not decided.valid
    assert not reasons_of(decided, "late")
    assert reasons_of(decided, "client_limited")


def test_the_time_a_connection_takes_is_not_the_clients_lag() -> None:
    late = [replace(ask, due=(ask.sent or 0) - 31, connect=30) for ask in train()]
    got = measurement(recorded(late, **STEADY))
    assert got.valid
    assert got.send_lag_ms.max == 1
    level = level_of(recorded(late, **STEADY), closed(2))
    assert level.ttft_from_due_ms.mean == 51  # where it cannot hide


def test_one_stall_of_the_client_is_found_where_a_p99_hides_it() -> None:
    lags = [0.5] * 3000 + [300.0]
    got = measurement(steady(loop_lag_ms=lags, cpu_s=1, wall_s=30))
    assert got.loop_lag_ms.p99 < 1
    assert got.stalled_share == pytest.approx(0.01)
    assert got.reasons == ["client_limited: stalled_share 0.01 is above its bound 0.004"]
    assert not got.valid


def test_a_stall_in_a_long_level_is_a_note_and_short_pauses_are_none() -> None:
    long = measurement(steady(loop_lag_ms=[0.5] * 9999 + [300.0], cpu_s=1, wall_s=100))
    assert long.valid
    assert long.reasons == [
        "stalled: the client itself stood still for 300 ms, 0.30% of the level; the bound is 0.40%"
    ]
    pauses = [30.0] * 20 + [149.0] + [0.5] * 2980
    assert measurement(steady(loop_lag_ms=pauses, cpu_s=1, wall_s=30)).reasons == []


def test_loop_lag_and_cpu_above_their_bounds() -> None:
    got = measurement(steady(loop_lag_ms=[20.0], cpu_s=0.96))
    assert got.reasons == [
        "client_limited: loop_lag_p99_ms 20 is above its bound 10",
        "client_limited: client_cpu 0.96 is above its bound 0.95",
    ]
    assert measurement(steady(cpu_s=1.8), closed(2, processes=2)).valid


def test_streams_that_were_not_held() -> None:
    got = measurement(steady(), closed(3))
    assert not got.valid
    (reason,) = reasons_of(got, "client_limited")
    assert "in_flight_over_concurrency 0.66" in reason
    assert "its bound 0.9" in reason


def test_littles_law() -> None:
    """Time that the client spends outside of E2E (here after the last token) breaks it."""
    asks = [replace(ask, end=ask.stamps[-1] + 50) for ask in train()]
    got = measurement(recorded(asks, **STEADY), closed(2))
    assert got.littles_law_error == pytest.approx(0.45, abs=0.02)
    (reason,) = reasons_of(got, "unsteady")
    assert "littles_law_error 0.4" in reason
    assert "its bound 0.1" in reason


def test_achieved_over_offered() -> None:
    on_time = [stream(i * 50, output=5) for i in range(19)]
    never = [Ask(None, due=i * 50 + 25, end=2000, error="cancelled") for i in range(19)]
    late = [stream(1000, due=i * 50 + 25, output=5) for i in range(2)]
    refused = [Ask(None, due=i * 50 + 30, end=i * 50 + 31, error="connect") for i in range(2)]
    window: dict[str, Any] = {"ramp_end": 0.0, "refill_end": 900.0}
    plan = opened(20)
    assert measurement(recorded(on_time, **window), plan).achieved_over_offered == 1
    # Our own cancelling is no lateness, and a server that is not there is not our limit.
    assert measurement(recorded(on_time + never, **window), plan).achieved_over_offered == 1
    got = measurement(recorded(on_time + refused, **window), plan)
    assert got.achieved_over_offered == 1
    got = measurement(recorded(on_time + late, **window), plan)
    assert got.achieved_over_offered == pytest.approx(19 / 21)
    assert any("achieved_over_offered 0.905 is below its bound 0.99" in r for r in got.reasons)


def test_an_overloaded_open_loop_is_said_to_be_saturated_and_not_asked_for_littles_law() -> None:
    """Each request takes longer than the one before: the queue only grows."""
    asks = [Ask(i * 50, (i * 50 + 20 * i + 10.0,), output=1) for i in range(100)]
    got = measurement(recorded(asks, ramp_end=0, refill_end=4950), opened(20))
    assert got.littles_law_error is None
    assert reasons_of(got, "saturated")
    assert got.valid
    assert got.achieved_over_offered == 1


def test_too_many_failures() -> None:
    asks = train()
    failed = [replace(ask, error="http_503") if i % 5 == 0 else ask for i, ask in enumerate(asks)]
    got = measurement(recorded(failed, **STEADY))
    assert reasons_of(got, "errors") == ["errors: failed_share 0.2 is above its bound 0.1"]
    assert not got.valid


@pytest.mark.parametrize(
    ("server_total", "foreign", "valid"),
    [(21, 0, True), (20, 0, True), (22, 1, True), (23, 2, False), (71, 50, False), (0, 0, True)],
)
def test_foreign_requests(server_total: int, foreign: int, valid: bool) -> None:
    """20 of ours and one warm-up; a single foreign request may be a counter that lags."""
    rec = recorded([stream(-100, warmup=True, output=5), *train()], **STEADY)
    got = measurement(rec, server=ServerView(requests_total=server_total))
    assert (got.foreign_requests, got.valid) == (foreign, valid)
    if not valid:
        assert f"finished {foreign} requests" in reasons_of(got, "foreign_traffic")[0]
        assert "1% of 20" in got.reasons[0]


def test_a_failed_request_of_ours_is_not_taken_for_a_foreign_one() -> None:
    asks = [replace(ask, error="cut") if i < 2 else ask for i, ask in enumerate(train())]
    rec = recorded(asks, **STEADY)
    for total in (18, 19, 20):
        server = ServerView(requests_total=total)
        assert measurement(rec, server=server).foreign_requests == 0


@pytest.mark.parametrize(
    ("server_total", "foreign"),
    [(160, 0), (180, 0), (161, 1), (179, 19), (183, 3), (220, 40), (0, 0)],
)
def test_a_rerank_is_eight_or_nine_requests_to_the_server(server_total: int, foreign: int) -> None:
    got = measurement(
        recorded(train(), **STEADY),
        closed(2, endpoint="rerank"),
        server=ServerView(requests_total=server_total),
    )
    assert got.foreign_requests == foreign


# --------------------------------------------------------------------------- nothing is generated

EMBEDDING = closed(2, endpoint="embeddings", stream=False)


def embedded() -> Recording:
    """As `train`, without a token: two slots, a request of 100 ms after the other."""
    asks = [replace(ask, stamps=(), end=ask.stamps[-1], output=0, prompt=50) for ask in train()]
    return recorded(asks, **STEADY)


def test_where_nothing_is_generated_requests_are_the_throughput() -> None:
    level = level_of(embedded(), EMBEDDING)
    assert level.output_tokens_per_s is None
    assert level.output_tokens_per_s_ci95 is None
    assert level.energy_j_per_output_token is None
    assert level.request_throughput == pytest.approx(19 / 0.99)
    assert level.request_throughput_ci95 is not None
    low, high = level.request_throughput_ci95
    assert low <= 19 / 0.99 <= high
    assert level.total_tokens_per_s == pytest.approx(19 * 50 / 0.99)
    assert level.tokens == Tokens(1000, 0, 0, "usage")
    assert (level.ttft_ms.n, level.itl_ms.n, level.tpot_ms.n) == (0, 0, 0)
    assert (level.e2e_ms.n, level.e2e_ms.mean) == (19, 100)


def test_littles_law_holds_without_tokens_too() -> None:
    got = measurement(embedded(), EMBEDDING)
    assert got.valid
    assert got.littles_law_error == pytest.approx(0, abs=0.05)
    slow = [
        replace(ask, stamps=(), end=ask.stamps[-1] - 60, output=0) for ask in train()
    ]  # slots that idle between two requests
    assert reasons_of(measurement(recorded(slow, **STEADY), EMBEDDING), "client_limited")


def test_an_slo_on_e2e_is_judged_without_tokens() -> None:
    level = level_of(embedded(), EMBEDDING, slo=slo("e2e", 101))
    assert (level.slo_attainment, level.slo_met) == (1.0, True)
    assert level.goodput_rps == pytest.approx(level.request_throughput or 0, rel=0.1)


def test_energy_per_token() -> None:
    gpu = [GpuView("a", energy_j=30.0), GpuView("b", energy_j=20.0), GpuView("c")]
    assert level_of(recorded(train()), gpu=gpu).energy_j_per_output_token == 0.5
    assert level_of(recorded(train())).energy_j_per_output_token is None
    none = recorded([Ask(0, end=5, error="cut")])
    assert level_of(none, gpu=gpu).energy_j_per_output_token is None


# ------------------------------------------------------------------------------- nothing to measure


def numbers(value: Any) -> Iterable[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


def floats_of(level: Level) -> list[float]:
    return list(numbers(msgspec.to_builtins(level)))


NOTHING: dict[str, list[Ask]] = {
    "no request": [],
    "all failed at the connect": [
        Ask(None, due=i, end=i + 5, error="connect") for i in range(5)
    ],
    "all cut": [stream(i * 10, error="cut") for i in range(5)],
    "all cancelled": [Ask(i, end=90, error="cancelled") for i in range(5)],
    "only warm-up": [stream(i * 10, warmup=True, output=5) for i in range(5)],
    "one": [stream(0)],
    "one that took no time": [Ask(0, (0,), end=0)],
    "replies without a token": [Ask(i, end=i + 5) for i in range(5)],
    "zero tokens by usage": [Ask(i, end=i + 5, output=0, prompt=0) for i in range(5)],
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("plan", [closed(2), opened(5)], ids=["closed", "open"])
@pytest.mark.parametrize("edges", [(None, None), (0, 2000), (50, 50)], ids=str)
def test_no_recording_gives_a_number_that_is_none(
    name: str, plan: Plan, edges: tuple[float | None, float | None]
) -> None:
    for rec in (
        recorded(NOTHING[name], ramp_end=edges[0], refill_end=edges[1], wall_s=0),
        recorded(NOTHING[name], ramp_end=edges[0], refill_end=edges[1], loop_lag_ms=[1]),
    ):
        level = level_of(
            rec,
            plan,
            slo=[*slo("ttft", 5), *slo("itl", 5), *slo("e2e", 5, "mean")],
            server=ServerView(requests_total=0),
            gpu=[GpuView("a", energy_j=0.0)],
        )
        assert all(map(math.isfinite, floats_of(level)))
        text = encode(level)
        assert b"NaN" not in text
        assert json.loads(text)["requests"]["failed"] >= 0
        assert level.measurement is not None
        completed = level.requests is not None and level.requests.ok > 0
        assert level.measurement.valid <= completed
        if not completed:
            assert any("no request of the level was completed" in reason
                       for reason in level.measurement.reasons)  # fmt: skip


# ---------------------------------------------------------------------------------------- merge law

asks_of_any_kind = st.builds(
    lambda sent, gaps, more, error, warmup, output: Ask(
        sent,
        tuple(sent + 5 + sum(gaps[: i + 1]) for i in range(len(gaps))),
        due=sent - more,
        end=sent + 5 + sum(gaps) + more,
        error=error,
        warmup=warmup,
        output=output,
        prompt=output * 3,
        connect=more,
    ),
    st.integers(0, 3000).map(float),
    st.lists(st.integers(0, 50), max_size=6),
    st.integers(0, 3),
    st.sampled_from([None, None, None, "cut", "reset", "cancelled"]),
    st.sampled_from([False, False, False, True]),
    st.integers(-1, 12),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(asks_of_any_kind, st.integers(0, 3)), max_size=40), st.booleans())
def test_four_workers_merged_are_one(dealt: list[tuple[Ask, int]], is_open: bool) -> None:
    edges: dict[str, Any] = {"ramp_end": 500.0, "refill_end": 2500.0}
    whole = recorded([ask for ask, _ in dealt], **edges, cpu_s=0.4)
    parts = [
        recorded([ask for ask, worker in dealt if worker == i], **edges, cpu_s=0.1)
        for i in range(4)
    ]
    plan = opened(5) if is_open else closed(4)
    target = [*slo("ttft", 30), *slo("itl", 20)]
    one_level = level_of(whole, plan, slo=target)
    merged = level_of(merge(parts), plan, slo=target)
    assert merged.requests == one_level.requests
    assert floats_of(merged) == pytest.approx(floats_of(one_level))
    assert reasons_without_numbers(merged) == reasons_without_numbers(one_level)
    assert all(map(math.isfinite, floats_of(merged)))


def reasons_without_numbers(level: Level) -> list[str]:
    assert level.measurement is not None
    return [reason.split(":")[0] for reason in level.measurement.reasons]


# ------------------------------------------------------------------------- held back on the way


def test_a_stream_that_comes_in_bunches_is_told_and_valid() -> None:
    """nginx with its default buffering: 4 kB of chunks in one read, then the next."""
    bunches = Ask(0, (100, 100, 100, 100, 200, 200, 200, 200))
    level = level_of(recorded([bunches, bunches]))
    assert level.measurement is not None
    assert level.measurement.valid
    told = [reason for reason in level.measurement.reasons if reason.startswith("bunched:")]
    assert len(told) == 1
    assert "86%" in told[0]  # 6 of the 7 behind the first
    assert level.itl_ms.p50 == 0  # what arrived is not made prettier

    single = level_of(recorded([stream(0), Ask(0, (10,))]))
    assert single.measurement is not None
    assert not any("bunched" in reason for reason in single.measurement.reasons)
