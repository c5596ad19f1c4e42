"""What is planted is found, what is noise is not, and the gate does what it says."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Measurement, Run, Stats, Sweep, UsageError
from loadgen.compare import KNOWN, SHOWN, Change, Comparison, Rule, Side, compare, parse_rules
from loadgen.outcome import comparison_exit_code
from tests.loadgen.levels import side

RUNS = 40


def change(result: Comparison, metric: str, pair: int = 0) -> Change:
    return next(change for change in result.pairs[pair].changes if change.metric == metric)


def without_requests(given: Side) -> Side:
    return Side(given.sweep)


def with_level(given: Side, at: int = 0, **fields: object) -> Side:
    levels = list(given.sweep.levels)
    levels[at] = msgspec.structs.replace(levels[at], **fields)
    return replace(given, sweep=msgspec.structs.replace(given.sweep, levels=levels))


# -------------------------------------------------------------------------- noise and real changes


@pytest.mark.parametrize("loads", [((4, 15),), ((1, 20), (8, 8))], ids=["one", "several"])
def test_of_equal_runs_no_more_are_told_apart_than_the_level_says(
    loads: tuple[tuple[int, int], ...],
) -> None:
    """The family of one comparison: any figure told from noise is a false one."""
    wrong = 0
    for seed in range(RUNS):
        result = compare(side(2 * seed, loads), side(2 * seed + 1, loads))
        wrong += any(c.distinguishable for pair in result.pairs for c in pair.changes)
    assert wrong / RUNS <= 0.08


@pytest.mark.parametrize("slower", [1.1, 0.9])
def test_ten_percent_are_found(slower: float) -> None:
    found = missed = 0
    rules = parse_rules("output_tokens_per_s<-5%")
    for seed in range(RUNS // 3):
        a, b = side(2 * seed, ((4, 40),)), side(2 * seed + 1, ((4, 40),), slower)
        result = compare(a, b, rules)
        for metric in ("output_tokens_per_s", "tpot_ms.mean", "itl_ms.p50", "e2e_ms.mean"):
            found += bool(change(result, metric).distinguishable)
        missed += bool(result.gate[0].missed)
    assert found / (4 * (RUNS // 3)) >= 0.9
    assert (missed / (RUNS // 3) >= 0.9) if slower > 1 else missed == 0


def test_the_interval_of_a_change_holds_the_true_one() -> None:
    inside = 0
    for seed in range(RUNS):
        tested = change(compare(side(2 * seed), side(2 * seed + 1, slower=1.1)), "tpot_ms.mean")
        assert tested.ci95_percent is not None
        inside += tested.ci95_percent[0] <= 10 <= tested.ci95_percent[1]
    assert inside / RUNS >= 0.88


def test_the_same_seed_gives_the_same_comparison() -> None:
    a, b = side(1), side(2)
    assert compare(a, b, seed=7) == compare(a, b, seed=7)
    assert compare(a, b, seed=7) != compare(a, b, seed=8)


def test_a_run_is_no_different_from_itself() -> None:
    same = side(3)
    for each in compare(same, same).pairs[0].changes:
        assert each.change_percent == 0
        assert not each.distinguishable


def test_repeats_are_the_noise_once_there_are_enough() -> None:
    def run(rates: list[float]) -> Side:
        levels = [msgspec.structs.replace(side(0).sweep.levels[0], output_tokens_per_s=rate,
                                          output_tokens_per_s_ci95=(rate - 0.1, rate + 0.1))
                  for rate in rates]  # fmt: skip
        return Side(Sweep(run=Run(id="r"), levels=levels))

    wide = change(compare(run([100, 80, 120]), run([95, 125, 105])), "output_tokens_per_s")
    assert (wide.noise, wide.distinguishable) == ("repeats", False)
    assert wide.a == pytest.approx(100)
    tight = change(compare(run([100, 101, 99]), run([80, 81, 79])), "output_tokens_per_s")
    assert (tight.noise, tight.distinguishable) == ("repeats", True)
    # t of two means of three with a pooled relative spread of 1 and 1.25 %, four degrees of freedom
    spread = ((2 * 0.01**2 + 2 * 0.0125**2) / 4) ** 0.5
    half = 2.776 * (2 / 3) ** 0.5 * spread * 0.8 * 100
    assert tight.ci95_percent == pytest.approx((-20 - half, -20 + half), abs=1e-6)
    one = change(compare(run([100, 101]), run([80])), "output_tokens_per_s")
    assert one.noise == "summary"  # a single degree of freedom says nothing


# ------------------------------------------------------------------------- what cannot be tested


def test_a_file_has_intervals_and_means_only() -> None:
    a, b = without_requests(side(1)), without_requests(side(2, slower=1.3))
    result = compare(a, b, parse_rules("ttft_ms.p50>+5%"))
    rate = change(result, "output_tokens_per_s")
    assert (rate.noise, rate.distinguishable) == ("summary", True)
    assert change(result, "ttft_ms.mean").p is not None
    for metric in ("ttft_ms.p50", "request_throughput", "itl_ms.p50"):
        assert change(result, metric).note == "not tested: its requests are not kept"
        assert change(result, metric).change_percent is not None
    # beyond its bound and not testable: neither held nor missed
    assert result.gate[0].missed is None
    assert comparison_exit_code(result) == 3


def test_of_a_file_requests_in_flight_at_once_count_as_one() -> None:
    """8 streams whose means wander together by more than requests alone would make them."""
    rng = np.random.default_rng(0)
    wrong = {True: 0, False: 0}
    for _ in range(RUNS):
        sides = []
        for _ in range(2):
            generations = rng.normal(100, 15, 8)  # one fate for all that are in flight
            sample = np.repeat(generations, 8) + rng.normal(0, 5, 64)
            stats = Stats(mean=float(sample.mean()), std=float(sample.std(ddof=1)), n=64)
            sides.append([with_level(without_requests(side(0)), concurrency=streams, ttft_ms=stats)
                          for streams in (1, 8)])  # fmt: skip
        for at, streams in enumerate((1, 8)):
            told = change(compare(sides[0][at], sides[1][at]), "ttft_ms.mean")
            assert told.p is not None
            wrong[streams == 8] += told.p < 0.05
    assert wrong[True] <= 0.08 * RUNS < 0.3 * RUNS <= wrong[False]


def test_the_rate_of_a_file_is_tested_with_the_batches_of_its_interval() -> None:
    a, b = (with_level(without_requests(side(0)), output_tokens_per_s=rate,
                       output_tokens_per_s_ci95=(rate - 4, rate + 4), window_s=10.0)
            for rate in (100.0, 90.0))  # fmt: skip
    told = change(compare(a, b), "output_tokens_per_s")
    assert told.ci95_percent is not None
    assert told.p is not None
    # Each ± 4 %, of 20 batches: √2 · 4 % · t(38) / t(19), and B 10 % less.
    assert told.ci95_percent[1] - told.ci95_percent[0] == pytest.approx(2 * 5.2, rel=0.1)
    assert told.p < 0.01


def test_a_quantile_needs_requests_beyond_it() -> None:
    tested = change(compare(side(1), side(2)), "ttft_ms.p99")
    assert tested.p is None
    assert tested.note is not None
    assert "too few for p99" in tested.note
    plenty = ((8, 40),)
    assert change(compare(side(1, plenty), side(2, plenty)), "ttft_ms.p95").p is not None


def test_a_window_that_is_not_steady_has_no_rate_to_test() -> None:
    short = with_level(side(1), output_tokens_per_s_ci95=None)
    result = compare(short, side(2))
    assert "too short for a steady window" in (change(result, "output_tokens_per_s").note or "")
    assert change(result, "ttft_ms.p50").p is not None


def test_goodput_of_different_slos_is_not_tested() -> None:
    other = side(2)
    sweep = msgspec.structs.replace(other.sweep, slo=[])
    result = compare(side(1), replace(other, sweep=sweep))
    assert change(result, "goodput_rps").note == "not tested: different SLO"
    assert "different SLO: A ttft:p95<30ms, B none" in result.warnings


def test_nothing_to_divide_by() -> None:
    result = compare(with_level(side(1), goodput_rps=0.0), side(2))
    assert change(result, "goodput_rps").change_percent is None
    lost = compare(side(1), with_level(side(2), goodput_rps=0.0))
    assert change(lost, "goodput_rps").change_percent == -100


def test_what_one_run_did_not_measure() -> None:
    result = compare(side(1), with_level(side(2), ttft_ms=Stats()), parse_rules("ttft_ms.p50>+1%"))
    assert change(result, "ttft_ms.p50").note == "not measured in B"
    assert result.gate[0].missed is None


# ---------------------------------------------------------------------------- levels, pairs, rules


def test_levels_are_paired_by_load() -> None:
    result = compare(side(1, ((2, 10), (4, 10))), side(2, ((4, 10), (8, 6))))
    assert [pair.load for pair in result.pairs] == [4]
    assert [load.load for load in result.only_a] == [2]
    assert [load.load for load in result.only_b] == [8]
    with pytest.raises(UsageError, match="no load is in both runs: A has 2 streams, B has 8"):
        compare(side(1, ((2, 10),)), side(2, ((8, 6),)))


def test_an_invalid_level_is_compared_with_nothing() -> None:
    bad = with_level(side(2), measurement=Measurement(False, ["client_limited: too slow"]))
    result = compare(side(1), bad, parse_rules("output_tokens_per_s<-5%"))
    assert result.pairs[0].changes == []
    assert result.pairs[0].invalid == ["B, level 1: client_limited: too slow"]
    assert result.gate == []
    assert comparison_exit_code(result) == 3


def test_an_invalid_repeat_leaves_the_others() -> None:
    twice = ((4, 15), (4, 15))
    bad = with_level(side(2, twice), at=1, measurement=Measurement(False, ["errors: all"]))
    result = compare(side(1, twice), bad)
    assert result.pairs[0].repeats == (2, 1)
    assert change(result, "tpot_ms.mean").p is not None
    assert comparison_exit_code(result) == 3


def test_the_gate_wants_both_the_bound_and_the_certainty() -> None:
    a, slower = side(1), side(2, slower=1.1)
    codes = {
        "output_tokens_per_s<-5%": 1,
        "output_tokens_per_s<-20%": 0,  # told from noise, and within the bound
        "ttft_ms.mean>+0%": 0,  # beyond the bound, and not told from noise
        "output_tokens_per_s<-20%, itl_ms.p50 > 5 %": 1,
    }
    for rules, code in codes.items():
        assert comparison_exit_code(compare(a, slower, parse_rules(rules))) == code, rules


def test_the_gates_tests_are_adjusted_among_themselves() -> None:
    a, b = side(1), side(2, slower=1.1)
    [asked] = compare(a, b, parse_rules("e2e_ms.p50>+1%")).gate
    assert asked.p_adjusted == change(compare(a, b), "e2e_ms.p50").p
    table = compare(a, b)
    assert table.tests == sum(c.p is not None for c in table.pairs[0].changes)
    for each in table.pairs[0].changes:
        assert each.p is None or (each.p_adjusted or 0) >= each.p


def test_a_metric_that_only_the_gate_names_is_compared_too() -> None:
    assert "ttft_ms.p90" not in SHOWN
    result = compare(side(1), side(2), parse_rules("ttft_ms.p90>+50%"))
    assert change(result, "ttft_ms.p90").a is not None


@settings(max_examples=50)
@given(st.sampled_from(KNOWN), st.sampled_from([-1, 1]), st.integers(0, 999))
def test_a_rule_is_read_as_it_is_written(metric: str, sign: int, bound: int) -> None:
    rule = Rule(metric, sign, float(sign * bound))
    assert parse_rules(str(rule)) == [rule]
    assert rule.beyond(sign * (bound + 1))
    assert not rule.beyond(sign * (bound - 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output_tokens_per_s", "write METRIC<-X%"),
        ("output_tokens_per_s<-5", "write METRIC<-X%"),
        ("", "write METRIC<-X%"),
        ("output_token_per_s<-5%", "nearest is 'output_tokens_per_s'"),
        ("ttft_ms.p42>+5%", "nearest is 'ttft_ms."),
        ("ttft_ms.p95>-5%", "it would fail without any change"),
        ("output_tokens_per_s<5%", "the bound after < is negative"),
    ],
)
def test_a_rule_that_means_nothing(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_rules(text)


def test_what_else_differs_is_said_first() -> None:
    a, b = side(1), side(2)
    target = msgspec.structs.replace(b.sweep.target, model="other", engine="vllm")
    workload = msgspec.structs.replace(b.sweep.workload, input_tokens=512)
    run = msgspec.structs.replace(b.sweep.run, simulated=True)
    sweep = msgspec.structs.replace(b.sweep, target=target, workload=workload, run=run)
    assert compare(a, replace(b, sweep=sweep)).warnings == [
        "different origin: A measured, B simulated",
        "different model: A m, B other",
        "different engine: A none, B vllm",
        "different workload input_tokens: A none, B 512",
    ]
    assert compare(a, b).warnings == []
