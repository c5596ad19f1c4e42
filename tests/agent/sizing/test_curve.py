"""The curve: knee, saturation and SLO capacity, and the laws they obey."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Level, Measurement, Requests, Slo, Stats, UsageError
from agent.sizing.curve import (
    analyse,
    format_slo,
    invalid_because,
    isotonic,
    parse_slo,
    slo_interval,
    slo_met,
)


def even(value: float, n: int = 200) -> Stats:
    """A sample without spread."""
    return Stats(value, 0.0, value, value, value, value, value, value, n)


def closed(
    concurrency: int,
    tokens: float,
    ttft: float = 50.0,
    *,
    error: float = 0.01,
    valid: bool = True,
    failed: int = 0,
) -> Level:
    return Level(
        concurrency=concurrency,
        output_tokens_per_s=tokens,
        output_tokens_per_s_ci95=(tokens * (1 - error), tokens * (1 + error)),
        request_throughput=tokens / 100,
        requests=Requests(200 - failed, failed, 0, {}),
        ttft_ms=even(ttft),
        measurement=Measurement(valid, [] if valid else ["client_limited: loop_lag_p99_ms 40"]),
    )


def opened(rate: float, finished: float, ttft: float = 50.0) -> Level:
    return Level(
        mode="rate",
        offered_rps=rate,
        output_tokens_per_s=finished * 100,
        request_throughput=finished,
        requests=Requests(2000, 0, 0, {}),
        ttft_ms=even(ttft),
        measurement=Measurement(True, [], in_flight_mean=finished * 2),
    )


SLO = [Slo("ttft", "p95", 500.0)]
RISING = [closed(1, 100), closed(2, 195), closed(4, 370), closed(8, 640)]
FLAT = [*RISING, closed(16, 900, 120), closed(32, 920, 800), closed(64, 925, 2400)]


# ------------------------------------------------------------------------------------------- knee


def test_the_knee_is_the_smallest_level_within_5_percent_of_the_best() -> None:
    knee = analyse(FLAT).knee
    assert knee is not None
    assert (knee.concurrency, knee.output_tokens_per_s) == (16, 900)


def test_a_lucky_best_level_does_not_move_the_knee() -> None:
    lucky = [*FLAT, closed(128, 980, error=0.08)]
    assert analyse(lucky).knee == analyse(FLAT).knee


def test_noise_never_makes_a_level_under_90_percent_the_knee() -> None:
    noisy = [closed(8, 500, error=0.9), closed(16, 1000, error=0.9)]
    knee = analyse(noisy).knee
    assert knee is not None
    assert knee.concurrency == 16


def test_no_valid_level_no_curve() -> None:
    curve = analyse([closed(4, 100, valid=False)], SLO)
    assert (curve.knee, curve.saturated, curve.slo_capacity) == (None, False, None)


def test_other_tools_numbers_are_enough() -> None:
    levels = [
        Level(concurrency=c, output_tokens_per_s=x, ttft_ms=Stats(mean=t))
        for c, x, t in [(1, 10.0, 20.0), (8, 70.0, 30.0), (64, 90.0, 90.0), (128, 90.5, 300.0)]
    ]
    curve = analyse(levels, [Slo("ttft", "mean", 100.0)])
    assert curve.saturated
    assert curve.slo_capacity is not None
    assert (curve.slo_capacity.lo, curve.slo_capacity.hi) == (64, 128)
    assert curve.slo_capacity.rps is None  # they did not say


def computed(concurrency: int, rps: float, error: float = 0.01) -> Level:
    """A level of embeddings: nothing is generated."""
    return Level(
        concurrency=concurrency,
        request_throughput=rps,
        request_throughput_ci95=(rps * (1 - error), rps * (1 + error)),
        requests=Requests(200, 0, 0, {}),
        e2e_ms=even(1e3 * concurrency / rps),
        measurement=Measurement(True, []),
    )


def test_without_output_tokens_requests_decide() -> None:
    rising = [computed(1, 40), computed(2, 78), computed(4, 150)]
    flat = [*rising, computed(8, 160), computed(16, 161)]
    assert not analyse(rising).saturated
    curve = analyse(flat, [Slo("e2e", "p95", 40.0)])
    assert curve.saturated
    assert curve.knee is not None
    assert (curve.knee.concurrency, curve.knee.output_tokens_per_s) == (8, 0)
    assert curve.slo_capacity is not None
    assert (curve.slo_capacity.lo, curve.slo_capacity.hi) == (4, 8)
    assert not analyse([computed(1, 40, 0.8), computed(4, 42, 0.8)]).saturated  # noise


# -------------------------------------------------------------------------------------- saturation


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (RISING, False),
        (FLAT, True),
        ([*RISING, closed(16, 500)], True),  # thrashing
        ([closed(8, 640)], False),  # one level shows no growth and no end of it
        ([closed(8, 640), closed(9, 641, error=0.05)], False),  # too short and noisy a step
        ([closed(8, 640, error=0.3), closed(16, 650, error=0.3)], False),  # too noisy
        ([opened(1, 1.0), opened(2, 2.0)], False),
        ([opened(1, 1.0), opened(2, 1.99), opened(8, 3.1)], True),
        ([opened(8, 3.1)], True),
    ],
)
def test_saturated(levels: list[Level], expected: bool) -> None:
    assert analyse(levels).saturated is expected


def test_a_fine_last_step_is_compared_with_farther_levels_too() -> None:
    assert analyse([*FLAT, closed(66, 926)]).saturated


# ------------------------------------------------------------------------------------ slo capacity


def test_capacity_lies_on_the_line_between_the_levels_that_bracket_it() -> None:
    found = analyse(FLAT, SLO).slo_capacity
    assert found is not None
    assert (found.lo, found.hi, found.bracketed) == (16, 32, True)
    assert found.concurrency == pytest.approx(16 + 16 * (500 - 120) / (800 - 120))
    assert found.rps == pytest.approx(9.0 + 0.2 * (found.concurrency - 16) / 16)


def test_without_a_broken_level_the_capacity_is_a_lower_bound() -> None:
    found = analyse(RISING, SLO).slo_capacity
    assert found is not None
    assert (found.concurrency, found.lo, found.hi, found.bracketed) == (8, 8, None, False)


def test_broken_at_the_smallest_level_there_is_no_capacity_known() -> None:
    found = analyse([closed(4, 100, 900), closed(8, 150, 2000)], SLO).slo_capacity
    assert found is not None
    assert (found.concurrency, found.rps, found.lo, found.hi) == (None, None, None, 4)
    assert not found.bracketed


def test_the_tightest_target_decides() -> None:
    both = [*SLO, Slo("ttft", "p50", 100.0)]
    found = analyse(FLAT, both).slo_capacity
    assert found is not None
    assert (found.lo, found.hi) == (8, 16)


def test_a_target_measured_nowhere_leaves_the_capacity_unknown() -> None:
    assert analyse(FLAT, [*SLO, Slo("e2e", "p95", 1.0)]).slo_capacity is None


def test_one_noisy_level_is_pooled_with_its_neighbour() -> None:
    noisy = [closed(1, 100, 50), closed(2, 190, 520), closed(4, 360, 100), closed(8, 600, 900)]
    found = analyse(noisy, SLO).slo_capacity
    assert found is not None
    assert (found.lo, found.hi) == (4, 8)


def test_too_many_failures_break_the_slo_however_fast_the_others_were() -> None:
    levels = [closed(1, 100), closed(2, 190, failed=40)]
    assert slo_met(levels[1], SLO) is False
    found = analyse(levels, SLO).slo_capacity
    assert found is not None
    assert (found.concurrency, found.lo, found.hi) == (1, 1, 2)


def test_an_open_loop_is_judged_in_requests_per_second() -> None:
    found = analyse([opened(1, 1.0), opened(2, 2.0), opened(4, 3.0, 900)], SLO).slo_capacity
    assert found is not None
    assert (found.lo, found.hi) == (2, 4)
    assert found.rps == pytest.approx(2 + 2 * 450 / 850)
    assert found.concurrency == pytest.approx(4 + (found.rps - 2))


def test_repeats_of_a_load_are_one_point() -> None:
    repeats = [closed(8, 600, 400), closed(8, 640, 480), closed(16, 700, 920)]
    found = analyse(repeats, SLO).slo_capacity
    assert found is not None
    assert (found.lo, found.concurrency) == (8, pytest.approx(8 + 8 * 60 / 480))


def test_a_load_whose_repeats_disagree_is_too_close_to_call() -> None:
    repeats = [closed(4, 350, 100), closed(8, 600, 400), closed(8, 640, 520), closed(16, 700, 900)]
    found = analyse(repeats, SLO).slo_capacity
    assert found is not None
    assert (found.lo, found.hi, found.concurrency) == (4, 16, pytest.approx(8 + 8 * 40 / 440))


def spread(p50: float, p95: float, largest: float, n: int) -> Stats:
    return Stats(p50, 10.0, p50, p95 - 10, p95, largest - 1, largest - 1, largest, n)


@pytest.mark.parametrize(
    ("stats", "statistic", "low", "high"),
    [
        (even(400), "p95", 400, 400),  # no spread, no doubt
        (Stats(p95=400, n=20), "p95", 400, 400),  # another tool's: nothing else is known
        (Stats(mean=400, std=50, n=100), "mean", 400 - 9.8, 400 + 9.8),
        # 0.95 ± 0.0302 of 200: between p90 and p95, and between p95 and p99
        (spread(200, 400, 500, 200), "p95", 400 - 10 * 0.604, 400 + 99 * 0.755),
        # 0.95 ± 0.0955 of 20: under p90, and beyond the largest of so few
        (spread(200, 400, 500, 20), "p95", 390 - 190 * 0.0455 / 0.4, 500 + 300 * 0.91),
        (spread(200, 400, 500, 20), "max", 500, 500),
        # the lower half is not kept, and taken to mirror the upper
        (spread(200, 400, 500, 100), "p50", 200 - 190 * 0.098 / 0.4, 200 + 190 * 0.098 / 0.4),
    ],
)
def test_the_interval_of_a_statistic(stats: Stats, statistic: str, low: float, high: float) -> None:
    level = msgspec.structs.replace(closed(1, 10), ttft_ms=stats)
    slo = msgspec.convert({"metric": "ttft", "statistic": statistic, "bound_ms": 1.0}, type=Slo)
    found = slo_interval(level, slo)
    assert found is not None
    assert (found[0], found[2]) == (pytest.approx(low, rel=0.01), pytest.approx(high, rel=0.01))


def test_gaps_of_one_reply_are_not_independent() -> None:
    """The ITL of 20 requests is as unsure as 20 requests are, however many tokens they had."""
    gaps = spread(10, 40, 90, 2000)
    level = msgspec.structs.replace(closed(1, 10), itl_ms=gaps, e2e_ms=even(900, 20))
    alone = msgspec.structs.replace(level, e2e_ms=Stats())
    target = Slo("itl", "p95", 50.0)
    few, many = slo_interval(level, target), slo_interval(alone, target)
    assert few is not None
    assert many is not None
    assert few[2] - few[0] > 5 * (many[2] - many[0])


def test_levels_too_few_requests_to_decide_lie_inside_the_interval() -> None:
    def at(concurrency: int, p95: float) -> Level:
        ttft = spread(p95 / 2, p95, 1.2 * p95, 30)
        return msgspec.structs.replace(closed(concurrency, 10.0 * concurrency), ttft_ms=ttft)

    found = analyse([at(4, 100), at(8, 300), at(10, 480), at(12, 520), at(16, 900)], SLO)
    assert found.slo_capacity is not None
    assert (found.slo_capacity.lo, found.slo_capacity.hi) == (8, 16)
    assert found.slo_capacity.concurrency == pytest.approx(11)
    # The edges alone: neither surely held nor surely broken.
    edges = analyse([at(10, 480), at(12, 520)], SLO).slo_capacity
    assert edges is not None
    assert (edges.lo, edges.hi, edges.bracketed) == (None, None, False)
    assert edges.concurrency == pytest.approx(11)


# -------------------------------------------------------------------------------------------- laws

loads = st.lists(st.integers(1, 512), min_size=1, max_size=8, unique=True)
sweeps = loads.flatmap(
    lambda at: st.tuples(*[
        st.builds(closed, st.just(c), st.floats(1, 1e5), st.floats(1, 5000), failed=st.just(0))
        for c in at
    ])
).map(list)  # fmt: skip
bounds = st.floats(1, 6000)


@given(sweeps, bounds, st.lists(st.integers(1, 2000), max_size=4), st.floats(1, 1e6))
def test_an_invalid_level_changes_nothing(
    levels: list[Level], bound: float, others: list[int], tokens: float
) -> None:
    slo = [Slo("ttft", "p95", bound)]
    invalid = [closed(c, tokens, 9999, valid=False) for c in others]
    clean, mixed = analyse(levels, slo), analyse([*levels, *invalid], slo)
    # but for saying that the client hid the end of the curve
    assert mixed.limit in (clean.limit, "CLIENT_LIMITED")
    assert msgspec.structs.replace(mixed, limit=clean.limit) == clean


@given(sweeps, bounds, bounds)
def test_a_looser_slo_never_lowers_the_capacity(levels: list[Level], a: float, b: float) -> None:
    tight, loose = (
        analyse(levels, [Slo("ttft", "p95", bound)]).slo_capacity for bound in sorted((a, b))
    )
    assert tight is not None
    assert loose is not None
    assert (tight.concurrency or 0) <= (loose.concurrency or 0) + 1e-9
    assert (tight.lo or 0) <= (loose.lo or 0)


@given(sweeps, bounds)
def test_nothing_is_extrapolated(levels: list[Level], bound: float) -> None:
    curve = analyse(levels, [Slo("ttft", "p95", bound)])
    tested = [level.concurrency or 0 for level in levels]
    rates = [level.request_throughput or 0 for level in levels]
    found = curve.slo_capacity
    assert found is not None
    assert curve.knee is not None
    assert curve.knee.concurrency in tested
    assert found.lo is None or found.lo in tested
    assert found.hi is None or found.hi in tested
    if found.concurrency is not None:
        assert found.lo is not None
        assert found.rps is not None
        assert found.lo <= found.concurrency <= (found.hi or max(tested))
        assert min(rates) - 1e-9 <= found.rps <= max(rates) + 1e-9


@given(sweeps, bounds)
def test_bracketed_means_that_a_level_met_and_a_higher_one_broke(
    levels: list[Level], bound: float
) -> None:
    slo = [Slo("ttft", "p95", bound)]
    found = analyse(levels, slo).slo_capacity
    assert found is not None
    if found.bracketed:
        met = [level.concurrency or 0 for level in levels if slo_met(level, slo)]
        broke = [level.concurrency or 0 for level in levels if not slo_met(level, slo)]
        assert min(met) < max(broke)


@given(sweeps, bounds, st.randoms())
def test_the_order_of_the_levels_is_irrelevant(
    levels: list[Level], bound: float, random: object
) -> None:
    slo = [Slo("ttft", "p95", bound)]
    mixed = list(levels)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert analyse(mixed, slo) == analyse(levels, slo)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_the_isotonic_fit_rises_keeps_the_mean_and_leaves_rising_values_alone(
    values: list[float],
) -> None:
    fitted = isotonic(values, [1.0] * len(values))
    assert all(a <= b + 1e-6 for a, b in pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values))
    assert isotonic(sorted(values), [1.0] * len(values)) == sorted(values)


# --------------------------------------------------------------------------------------------- slo


def test_parse_slo() -> None:
    assert parse_slo("ttft:p95<500ms, itl:mean < 50 ms,e2e:p99<30s,tpot:max<1e3us") == [
        Slo("ttft", "p95", 500.0),
        Slo("itl", "mean", 50.0),
        Slo("e2e", "p99", 30_000.0),
        Slo("tpot", "max", 1.0),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("ttft", "METRIC:STATISTIC<BOUND"),
        ("ttft:p95>5ms", "METRIC:STATISTIC<BOUND"),
        ("tttf:p95<500ms", "unknown metric 'tttf', did you mean 'ttft'"),
        ("ttft:p96<500ms", "unknown statistic 'p96', did you mean 'p9"),
        ("ttft:p95<500", "needs a unit, us, ms or s"),
        ("ttft:p95<500sec", "unknown unit 'sec', did you mean 's'"),
        ("ttft:p95<fastms", "must be a number"),
        ("ttft:p95<1.2.3ms", "'1.2.3' is not a number"),
        ("ttft:p95<0ms", "above 0"),
        ("ttft:p95<-5ms", "above 0"),
    ],
)
def test_a_wrong_slo_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_slo(text)
    assert says in str(caught.value)


@given(
    st.lists(
        st.builds(
            Slo,
            st.sampled_from(["ttft", "ttfo", "itl", "tpot", "e2e"]),
            st.sampled_from(["mean", "p50", "p90", "p95", "p99", "max"]),
            st.integers(1, 100_000).map(float),
        ),
        min_size=1,
    )
)
def test_a_formatted_slo_reads_back(slo: list[Slo]) -> None:
    assert parse_slo(format_slo(slo)) == slo


@pytest.mark.parametrize(
    ("ttft", "slo", "met"),
    [
        (499.0, SLO, True),
        (500.0, SLO, False),  # the target says less than
        (499.0, [], None),
        (499.0, [*SLO, Slo("e2e", "p95", 1.0)], None),
        (501.0, [*SLO, Slo("e2e", "p95", 1.0)], False),
    ],
)
def test_slo_met(ttft: float, slo: list[Slo], met: bool | None) -> None:
    assert slo_met(closed(1, 10, ttft), slo) is met


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("client_limited: send_lag_p99_ms 9 is above its bound 5", "client"),
        ("foreign_traffic: the server finished 40 requests that were not ours", "foreign"),
        ("errors: failed_share 0.4 is above its bound 0.05", "errors"),
        ("unsteady: littles_law_error 0.4 is above its bound 0.25", "unsteady"),
        ("throttled", "other"),
    ],
)
def test_why_a_level_does_not_count(reason: str, cause: str) -> None:
    level = closed(1, 10)
    assert invalid_because(level) is None
    bad = msgspec.structs.replace(level, measurement=Measurement(False, [reason]))
    assert invalid_because(bad) == cause


def test_a_prompt_that_all_streams_wait_for_is_one_event_and_not_a_reply() -> None:
    """One gap in a thousand is long: 48 replies are enough to know that not one in twenty is."""
    itl = Stats(mean=44.0, p50=43.0, p90=44.0, p95=44.0, p99=44.0, p999=92.0, max=92.0, n=50_000)
    level = msgspec.structs.replace(closed(8, 400), itl_ms=itl, e2e_ms=Stats(n=48))
    ends = slo_interval(level, Slo("itl", "p95", 60.0))
    assert ends is not None
    assert ends[2] < 60
    few = msgspec.structs.replace(level, e2e_ms=Stats(n=4))
    assert (slo_interval(few, Slo("itl", "p95", 60.0)) or (0, 0, 0))[2] > 60


def test_what_holds_at_a_load_holds_below_it() -> None:
    """However few requests there were at the lower loads."""
    few = Stats(mean=400.0, p50=300.0, p90=450.0, p95=450.0, p99=600.0, max=700.0, n=5)
    levels = [msgspec.structs.replace(closed(1, 100), ttft_ms=few), closed(4, 370, 450)]
    ends = slo_interval(levels[0], SLO[0])
    found = analyse([*levels, closed(8, 500, 900)], SLO).slo_capacity
    assert ends is not None
    assert ends[2] > 500
    assert found is not None
    assert (found.lo, found.hi) == (4, 8)
