"""The observed pattern against what really happened: by hand, by law, in the simulated engine."""

from __future__ import annotations

import json
import math
from datetime import timedelta, timezone

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.minutes import Minute, MinuteHistogram, MinuteValue
from agent.model import encode
from agent.sizing.engine import EngineSpec
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.pattern import Pattern, pattern
from agent.sizing.window import Window
from loadgen.lengths import Empirical, LogNormal
from loadgen.pattern import parse
from tests.agent.sizing.virtual_server import VirtualServer, watched

SPEC = EngineSpec(gpu("h100-sxm"), model("llama-3.1-8b"))
MONDAY = 1_704_067_200  # 2024-01-01 00:00 UTC
HOUR, DAY, WEEK = 3600, 86400, 7 * 86400


def gauge(name: str, mean: float, low: float, high: float, last: float) -> MinuteValue:
    return MinuteValue(name, (), 12, mean, low, high, last)


def rose(name: str, increase: float, gpu: str = "") -> MinuteValue:
    labels = (("gpu", gpu),) if gpu else ()
    return MinuteValue(name, labels, 12, 0, 0, 0, 0, increase)


def minute(
    at: int,
    *values: MinuteValue,
    source: str = "chat",
    running: float = 0.0,
    finished: float = 0.0,
    covered_s: float = 60.0,
    resets: int = 0,
    marks: tuple[str, ...] = (),
    histograms: tuple[MinuteHistogram, ...] = (),
) -> Minute:
    said = (
        gauge("requests_running", running, running, running, running),
        rose("requests_finished_total", finished),
        *values,
    )
    return Minute(source, at, said, histograms, covered_s, resets, marks)


def of(
    minutes: list[Minute], end: float, start: float = 0.0, servers: tuple[str, ...] = ("chat",)
) -> Pattern:
    return pattern(Window(start, end, servers=servers).add_all(minutes))


# ---------------------------------------------------------------------------------------- by hand


def test_arrivals_are_what_finished_and_what_is_still_in_flight() -> None:
    found = of(
        [
            minute(0, gauge("requests_waiting", 1, 0, 2, 2), running=0, finished=10),
            minute(60, gauge("requests_waiting", 0, 0, 0, 0), rose("requests_rejected_total", 3),
                   rose("requests_aborted_total", 2), running=5, finished=20),
        ],
        120,
    )  # fmt: skip
    assert found.requests == (10 + 2) + (20 + 3 + 5 - 2)
    assert (found.completions, found.aborts, found.rejections) == (28, 2, 3)
    assert found.concurrency.mean == (1 + 5) / 2
    assert found.waiting.max == 2
    assert found.requests_per_s.mean == pytest.approx(38 / 120)
    assert found.requests_per_s.peak == pytest.approx(26 / 60)


def test_requests_lost_in_a_restart_had_arrived() -> None:
    found = of([minute(0, running=0, finished=1), minute(60, running=8, finished=2),
                minute(120, running=3, finished=4, resets=1, marks=("restart",))], 180)  # fmt: skip
    assert (found.requests, found.completions, found.lost) == (1 + 10 + 7, 7, 8)
    assert (found.resets, found.marks) == (1, {"restart": 1})


def test_what_was_in_flight_before_the_window_did_not_arrive_in_it() -> None:
    minutes = [minute(0, running=6, finished=99), minute(60, running=0, finished=6)]
    assert of(minutes, 120, start=60).requests == 0
    assert of(minutes[1:], 120, start=60).completions == 6


def test_a_server_that_counts_arrivals_itself_is_believed() -> None:
    received = rose("requests_received_total", 25)
    assert of([minute(0, received, running=9, finished=3)], 60).requests == 25


def test_what_was_not_said_is_null_and_not_zero() -> None:
    found = of([Minute("chat", 0, (), (), 60.0)], 60)
    assert (found.requests, found.output_tokens, found.preemptions) == (None, None, None)
    assert found.requests_per_s.mean is None
    assert found.ttft_ms.p95 is None
    assert found.energy.energy_j is None
    empty = of([], 60)
    assert (empty.covered_s, empty.gaps_s, empty.concurrency.mean) == (0, 60, None)


def test_replicas_are_summed_and_fractions_averaged_by_capacity() -> None:
    def one(source: str, running: float, use: float, capacity: float) -> Minute:
        return minute(
            0,
            gauge("kv_usage_ratio", use, use, use + 0.1, use),
            gauge("kv_capacity_tokens", capacity, capacity, capacity, capacity),
            rose("output_tokens_total", 100),
            source=source,
            running=running,
            finished=5,
        )

    both = [one("a", 2, 0.2, 1000), one("b", 4, 0.6, 3000)]
    found = of(both, 60, servers=("a", "b"))
    assert found.concurrency.mean == 6
    assert found.output_tokens == 200
    assert found.kv_usage.mean == pytest.approx((0.2 * 1000 + 0.6 * 3000) / 4000)
    assert found.kv_usage.max == pytest.approx(0.7)
    assert of(both, 60, servers=("b",)).concurrency.mean == 4


def test_a_service_is_seen_only_while_all_its_live_replicas_are() -> None:
    found = of(
        [
            minute(0, running=2, source="a"),
            minute(60, running=2, source="a"),
            minute(60, running=3, source="b", covered_s=30),
            minute(120, running=2, source="a"),
            minute(120, running=3, source="b"),
        ],
        180,
        servers=("a", "b"),
    )
    # b came in the second minute; half of that is not known of the service
    assert (found.covered_s, found.gaps_s) == (150, 30)
    assert found.concurrency.mean == pytest.approx((2 * 60 + 5 * 30 + 5 * 60) / 150)


def test_gaps_count_in_the_totals_and_in_no_rate() -> None:
    found = of(
        [
            minute(0, finished=60),
            Minute("chat", 60, (rose("requests_finished_total", 600),), (), 0, 0, ("gap",)),
            minute(120, finished=600, covered_s=40, marks=("gap",)),
            minute(180, finished=60),
        ],
        240,
    )
    assert (found.requests, found.gaps_s, found.covered_s) == (1320, 80, 160)
    assert (found.requests_per_s.mean, found.requests_per_s.peak) == (1, 1)


def test_a_minute_across_the_beginning_counts_in_part() -> None:
    found = of([minute(0, finished=60), minute(60, finished=60)], 120, start=45)
    assert (found.requests, found.window_s, found.covered_s, found.gaps_s) == (75, 75, 75, 0)


def test_the_unfinished_minute_counts_whole() -> None:
    found = of([minute(0, finished=60), minute(60, finished=20, covered_s=20)], 80)
    assert (found.requests, found.covered_s, found.gaps_s) == (80, 80, 0)


def test_nor_is_it_cut_to_a_third_where_the_window_ends_a_fraction_before_its_last_sample() -> None:
    found = of([minute(0, finished=60), minute(60, finished=20, covered_s=20)], 79.9993)
    assert (found.requests, found.covered_s) == (80, 80)
    assert found.gaps_s == pytest.approx(0, abs=1e-3)


def test_a_whole_minute_across_the_end_counts_in_part() -> None:
    found = of([minute(0, finished=60), minute(60, finished=60)], 75)
    assert (found.requests, found.covered_s) == (75, 75)


def test_latencies_are_merged_and_say_how_sure_they_are() -> None:
    bounds = (0.1, 0.2, 0.4, math.inf)
    found = of(
        [
            minute(at, rose("ttft_seconds_sum", 10), rose("ttft_seconds_count", 50), finished=50,
                   histograms=(MinuteHistogram("ttft_seconds", (), bounds, counts),))
            for at, counts in ((0, (20, 20, 10, 0)), (60, (0, 40, 5, 5)))
        ],
        120,
    )  # fmt: skip
    assert found.ttft_ms.mean == 200
    assert found.ttft_ms.n == 100
    assert found.ttft_ms.p50 == pytest.approx(150)
    assert found.ttft_ms.ranges["p50"] == (100, 200)
    assert found.ttft_ms.ranges["p99"] == (400, None)
    (kept,) = found.ttft_ms.histograms
    assert (kept.bounds, kept.counts) == ((100, 200, 400), (20, 60, 15, 5))


def test_energy_is_told_busy_from_idle() -> None:
    def both(at: int, joules: float, running: float, tokens: float) -> Minute:
        return minute(
            at,
            rose("gpu_energy_j", joules, "GPU-0"),
            rose("gpu_energy_j", 1e9, "GPU-of-somebody-else"),
            MinuteValue("gpu_energy_j", (("gpu", "GPU-0"), ("mig", "1")), 1, 0, 0, 0, 0, 1e9),
            rose("output_tokens_total", tokens),
            running=running,
        )

    minutes = [both(0, 6000, 0, 0), both(60, 30000, 4, 1000), both(120, 24000, 2, 500)]
    window = Window(0, 180, servers=["chat"], gpus=["GPU-0"]).add_all(minutes)
    energy = pattern(window).energy
    assert (energy.energy_j, energy.busy_j, energy.idle_j) == (60000, 54000, 6000)
    assert (energy.busy_s, energy.idle_s) == (120, 60)
    assert (energy.j_per_output_token, energy.j_per_output_token_busy) == (40, 36)
    assert energy.power_w.max == 500
    assert energy.gpus == ("GPU-0",)


def test_the_week_by_hours_quiet_hours_and_growth() -> None:
    """Three weeks, 2 at once by day and none at night, each week half as much again."""
    minutes = []
    for hour in range(3 * 168):
        is_day = 8 <= hour % 24 < 20
        grown = 1.5 ** (hour // 168)
        minutes += [
            minute(MONDAY + HOUR * hour + 60 * index, running=2.0 * is_day,
                   finished=60 * grown * is_day)
            for index in range(0, 60, 10)
        ]  # fmt: skip
    for index in range(0, 60, 10):  # nothing was in flight at the end
        minutes.append(minute(MONDAY + 3 * WEEK + 60 * index))
    window = Window(MONDAY, MONDAY + 3 * WEEK, servers=["chat"])
    observed = pattern(window.add_all(minutes))
    assert len(observed.profile) == 168
    assert (observed.profile[9].mean, observed.profile[9].max) == (2, 2)
    assert observed.profile[3].mean == 0
    assert observed.quiet.hours == tuple(h for h in range(168) if not 8 <= h % 24 < 20)
    assert observed.quiet.idle_ratio == 0.5
    # a tenth of each week was observed: too little to speak of growth
    assert observed.growth.requests_per_s == (None, None, None)
    assert observed.growth.per_week is None
    cet = timezone(timedelta(hours=1), "CET")
    assert pattern(window, cet).profile[10].mean == 2
    assert pattern(window, cet).profile[8].mean == 0
    assert pattern(window, cet).time_zone == "CET"


def test_growth_by_hourly_records() -> None:
    minutes = [
        Minute("chat", MONDAY + HOUR * hour,
               (rose("requests_finished_total", 3600 * 1.5 ** (hour // 168)),), (), 3600.0)
        for hour in range(3 * 168)
    ]  # fmt: skip
    window = Window(MONDAY, MONDAY + 3 * WEEK, servers=["chat"], record_s=HOUR).add_all(minutes)
    growth = pattern(window).growth
    assert growth.requests_per_s == pytest.approx((1, 1.5, 2.25))
    assert growth.per_week == pytest.approx(0.5)
    assert growth.ci95 is not None
    assert growth.ci95[0] <= 0.5 <= growth.ci95[1]


def test_bursts_are_told_from_independent_arrivals_and_from_the_time_of_day() -> None:
    rng = np.random.default_rng(3)

    def found(counts: list[float]) -> Pattern:
        minutes = [minute(60 * at, finished=float(n)) for at, n in enumerate(counts)]
        return of(minutes, 60 * len(counts))

    poisson = found(list(rng.poisson(20, 3000))).burstiness
    assert poisson.dispersion == pytest.approx(1, abs=0.1)
    bursts = found([40.0 * n for n in rng.poisson(0.5, 3000)]).burstiness
    assert bursts.dispersion == pytest.approx(40, rel=0.15)
    by_day = found(list(rng.poisson([5 if at // 60 % 2 else 50 for at in range(3000)]))).burstiness
    assert by_day.dispersion is not None
    assert by_day.dispersion > 10
    assert by_day.within_hours == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------------------- laws

records = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 30),
        st.integers(0, 300),
        st.floats(0, 60),
    ),
    max_size=30,
    unique_by=lambda one: one[:2],
)


@given(records, st.floats(0, 600), st.floats(0, 900))
def test_whatever_was_seen_the_figures_are_in_order(
    said: list[tuple[int, str, int, int, float]], start: float, length: float
) -> None:
    minutes = [
        minute(60 * at, rose("output_tokens_total", 3.0 * done), source=source,
               running=float(running), finished=float(done), covered_s=covered_s)
        for at, source, running, done, covered_s in said
    ]  # fmt: skip
    found = of(minutes, start + length, start, ("a", "b"))
    assert found.covered_s + found.gaps_s >= found.window_s - 1e-3
    spread = found.concurrency
    if spread.mean is not None:
        assert spread.p50 is not None
        assert spread.p50 <= (spread.p95 or 0) <= (spread.p99 or 0) <= (spread.max or 0)
        assert spread.mean <= (spread.max or 0) + 1e-9
    rate = found.requests_per_s
    if rate.mean is not None:
        assert 0 <= rate.mean <= (rate.peak or 0) + 1e-9
    backwards = of(minutes[::-1], start + length, start, ("b", "a"))
    assert backwards.requests == pytest.approx(found.requests)
    assert b"NaN" not in encode(found)


@given(records)
def test_totals_of_two_windows_add_up(said: list[tuple[int, str, int, int, float]]) -> None:
    minutes = [
        minute(60 * at, running=float(running), finished=float(done), source=source)
        for at, source, running, done, _ in said
    ]
    servers = ("a", "b", "c")
    whole, first, second = (
        of(minutes, end, start, servers) for start, end in ((0, 1260), (0, 630), (630, 1260))
    )
    if whole.completions is not None:
        parts = (first.completions or 0) + (second.completions or 0)
        assert parts == pytest.approx(whole.completions)
        assert (first.output_tokens, second.output_tokens) == (None, None)


# ---------------------------------------------------------------------------- against the truth


@pytest.fixture(scope="module")
def observed() -> tuple[Pattern, VirtualServer]:
    """20 minutes of independent arrivals of mixed lengths, then 5 of nothing."""
    rng = np.random.default_rng(7)
    at = np.cumsum(rng.exponential(1 / 6, 7200))
    at = at[at < 1200]
    prompts = np.clip(rng.lognormal(5.8, 0.8, at.size), 8, 4000).astype(int)
    outputs = np.clip(rng.lognormal(4.5, 0.6, at.size), 2, 900).astype(int)
    server = VirtualServer(SPEC)
    arrivals = zip(at.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    minutes = watched(server, arrivals, 1500.0)
    return pattern(Window(0, server.now_s, servers=["chat"]).add_all(minutes)), server


def test_counts_are_those_of_the_server_to_the_unit(
    observed: tuple[Pattern, VirtualServer],
) -> None:
    found, server = observed
    assert server.engine.idle
    assert found.requests == found.completions == server.arrived == server.finished
    assert found.prompt_tokens == server.prompt_tokens
    assert found.output_tokens == server.output_tokens
    assert (found.gaps_s, found.resets, found.marks) == (0, 0, {})
    assert found.window_s == pytest.approx(1500, abs=1)


def test_levels_and_rates_are_near_the_truth(observed: tuple[Pattern, VirtualServer]) -> None:
    found, server = observed
    assert found.concurrency.mean == pytest.approx(server.area_s / server.now_s, rel=0.05)
    assert found.requests_per_s.mean == pytest.approx(server.arrived / 1500, rel=0.01)
    assert found.requests_per_s.peak == pytest.approx(6, rel=0.35)
    assert found.energy.energy_j == pytest.approx(server.energy_j, rel=0.01)
    assert found.energy.idle_s == pytest.approx(300, abs=61)
    assert found.energy_j_per_output_token == pytest.approx(
        server.energy_j / server.output_tokens, rel=0.01
    )
    assert found.quiet.idle_ratio == pytest.approx(0.2, abs=0.05)


def test_latencies_and_lengths_are_where_they_say(observed: tuple[Pattern, VirtualServer]) -> None:
    found, server = observed
    for distribution, truth, scale in (
        (found.ttft_ms, server.ttft, 1e3),
        (found.itl_ms, server.itl, 1e3),
        (found.e2e_ms, server.e2e, 1e3),
        (found.prompt_tokens_per_request, server.prompts, 1.0),
        (found.output_tokens_per_request, server.outputs, 1.0),
    ):
        values, times = (np.array(column) for column in zip(*truth.sample, strict=True))
        sample = np.sort(np.repeat(values, times)) * scale
        assert distribution.mean == pytest.approx(sample.mean())
        assert distribution.n == pytest.approx(sample.size)
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            true = sample[math.ceil(q * sample.size) - 1]
            low, high = distribution.ranges[name]
            assert low <= true * (1 + 1e-9)
            assert high is None or true <= high * (1 + 1e-9)


# ------------------------------------------------------------------------------------ the contract


def test_the_json_has_what_the_contract_asks_for(observed: tuple[Pattern, VirtualServer]) -> None:
    said = json.loads(encode(observed[0]))
    for name in ("window_s", "requests", "prompt_tokens", "output_tokens", "gaps_s"):
        assert isinstance(said[name], float)
    assert {"mean", "p50", "p95", "p99", "max"} <= said["concurrency"].keys()
    assert {"mean", "p95", "max"} <= said["kv_usage"].keys()
    assert {"p50", "p95", "p99"} <= said["ttft_ms"].keys()
    assert msgspec.json.decode(encode(observed[0]), type=Pattern) == observed[0]


def test_a_load_generator_reads_it(observed: tuple[Pattern, VirtualServer]) -> None:
    found, server = observed
    read = parse(encode(found), "http://agent/api/v1/pattern")
    assert read.rate_rps == found.requests_per_s.mean
    assert read.rate_peak_rps == found.requests_per_s.peak
    assert read.concurrency_mean == found.concurrency.mean
    assert isinstance(read.input_tokens, Empirical)
    assert isinstance(read.output_tokens, Empirical)
    assert read.output_tokens.mean == pytest.approx(server.output_tokens / server.finished, rel=0.1)
    assert read.notes == []


def test_a_load_generator_reads_one_without_histograms_or_long_requests() -> None:
    found = of(
        [minute(0, rose("prompt_tokens_total", 5000), rose("output_tokens_total", 1000),
                finished=10)],
        60,
    )  # fmt: skip
    read = parse(encode(found), "p.json")
    assert read.concurrency_mean is None
    assert (read.input_tokens, read.output_tokens) == (LogNormal(500, 500), LogNormal(100, 100))
