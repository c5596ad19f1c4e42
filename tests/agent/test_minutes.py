"""Minute records: what they add up to, whatever the source and the clocks do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.minutes import GAP_RECORDS_MAX, Minute, MinuteHistogram, Minutes, MinuteValue, joined
from agent.model import Reading

S = 10**9
TOTAL = "output_tokens_total"
EMPTY = Minute("", 0, (), (), 0.0)


def gauge(value: float, name: str = "requests_running", **labels: str) -> Reading:
    return Reading(0, name, value, tuple(sorted(labels.items())))


def counter(value: float, name: str = TOTAL) -> Reading:
    return Reading(0, name, value)


def buckets(counts: dict[str, float], name: str = "ttft_seconds") -> list[Reading]:
    return [Reading(0, f"{name}_bucket", value, (("le", le),)) for le, value in counts.items()]


def value_of(minute: Minute | None, name: str) -> MinuteValue:
    assert minute is not None
    (found,) = (one for one in minute.values if one.name == name)
    return found


def histogram_of(minute: Minute | None, name: str = "ttft_seconds") -> MinuteHistogram:
    assert minute is not None
    (found,) = (one for one in minute.histograms if one.name == name)
    return found


def everything(
    samples: Iterable[tuple[float, list[Reading]]], minutes: Minutes | None = None
) -> list[Minute]:
    """Minutes of samples (at s, readings) on clocks that agree, the unfinished one included."""
    minutes = minutes or Minutes("chat")
    found = [one for at, said in samples for one in minutes.add(said, at, round(at * S))]
    current = minutes.current()
    return found + ([current] if current else [])


# ------------------------------------------------------------------------------------------- laws


class Sample(msgspec.Struct):
    at_s: float
    start_s: float
    counts: list[float]
    running: float


@st.composite
def lives(draw: st.DrawFn) -> list[Sample]:
    """A process that counts two things, restarts and is sometimes not seen for long."""
    at_s = draw(st.floats(0, 200))
    start_s, counts = 1.0, [float(draw(st.integers(0, 50))), float(draw(st.integers(0, 50)))]
    samples = []
    for _ in range(draw(st.integers(1, 25))):
        if draw(st.integers(0, 6)) == 0:
            start_s, counts = at_s + 0.01, [0.0, 0.0]
        at_s += draw(st.one_of(st.floats(0.1, 15), st.floats(16, 300)))
        counts = [count + draw(st.integers(0, 1000)) for count in counts]
        samples.append(Sample(at_s, start_s, list(counts), float(draw(st.integers(0, 40)))))
    return samples


def said(sample: Sample) -> list[Reading]:
    first, second = sample.counts
    return [
        counter(first),
        counter(second, "prompt_tokens_total"),
        counter(sample.start_s, "server_start_unix_s"),
        gauge(sample.running),
        *buckets({"0.1": min(first, second), "+Inf": first + second}),
    ]


def rises(samples: list[Sample], count: Callable[[Sample], float]) -> float:
    """What is known to have been counted: the rise in one process, all of it after a restart."""
    return math.fsum(
        count(b) - (count(a) if abs(a.start_s - b.start_s) < 1 else 0) for a, b in pairwise(samples)
    )


@given(lives())
def test_minutes_add_up_to_what_the_counters_rose(samples: list[Sample]) -> None:
    # A second process within a second of the first is told by its counters; leave that out.
    for a, b in pairwise(samples):
        if a.start_s != b.start_s and abs(a.start_s - b.start_s) <= 1:
            return
    minutes = everything((one.at_s, said(one)) for one in samples)
    for index, name in enumerate((TOTAL, "prompt_tokens_total")):
        increases = [v.increase or 0.0 for m in minutes for v in m.values if v.name == name]
        wanted = rises(samples, lambda one, index=index: one.counts[index])  # type: ignore[misc]
        assert math.fsum(increases) == pytest.approx(wanted, rel=1e-9, abs=1e-6)
        assert min(increases, default=0) >= 0
    all_buckets = [h for m in minutes for h in m.histograms]
    assert all(h.bounds == (0.1, math.inf) for h in all_buckets)
    low = math.fsum(h.counts[0] for h in all_buckets)
    whole = math.fsum(count for h in all_buckets for count in h.counts)
    assert low == pytest.approx(rises(samples, lambda s: min(s.counts)), rel=1e-9, abs=1e-6)
    assert whole == pytest.approx(rises(samples, lambda s: sum(s.counts)), rel=1e-9, abs=1e-6)
    resets = sum(a.start_s != b.start_s for a, b in pairwise(samples))
    assert sum(m.resets for m in minutes) == resets


@given(lives())
def test_gauges_are_weighted_by_time_and_what_is_covered_is_what_was_seen(
    samples: list[Sample],
) -> None:
    minutes = everything((one.at_s, said(one)) for one in samples)
    seen = [(a, b) for a, b in pairwise(samples) if round((b.at_s - a.at_s) * S) <= 15 * S]
    covered = math.fsum(b.at_s - a.at_s for a, b in seen)
    area = math.fsum((b.at_s - a.at_s) * (a.running + b.running) / 2 for a, b in seen)
    assert math.fsum(m.covered_s for m in minutes) == pytest.approx(covered, abs=1e-5)
    assert math.fsum(
        v.mean * m.covered_s for m in minutes for v in m.values if v.name == "requests_running"
    ) == pytest.approx(area, abs=1e-4)
    for minute in minutes:
        assert minute.start_unix_s % 60 == 0
        assert -1e-9 <= minute.covered_s <= 60 + 1e-6
        assert all(v.min <= v.mean <= v.max for v in minute.values)
    starts = [m.start_unix_s for m in minutes]
    assert starts == sorted(set(starts))
    assert sum(v.n for m in minutes for v in m.values if v.name == TOTAL) == len(samples)


@given(lives(), st.data())
def test_an_agent_that_died_goes_on_from_the_samples_of_its_last_minute(
    samples: list[Sample], data: st.DataObject
) -> None:
    whole = everything((one.at_s, said(one)) for one in samples)
    starts = [m.start_unix_s for m in whole]
    start = data.draw(st.sampled_from(starts))
    first = max((i for i, one in enumerate(samples) if one.at_s < start), default=0)
    again = everything((one.at_s, said(one)) for one in samples[first:])
    wanted = [m for m in whole if m.start_unix_s >= start]
    found = [m for m in again if m.start_unix_s >= start]
    if first == 0:
        assert found == wanted
    else:  # all but whether the very first sample was itself a restart
        assert [m.start_unix_s for m in found] == [m.start_unix_s for m in wanted]
        assert all(
            (a.values, a.histograms) == (b.values, b.histograms)
            for a, b in zip(found[1:], wanted[1:], strict=True)
        )


@given(lives())
def test_an_agent_that_goes_on_from_a_dump_gives_the_same_minutes(samples: list[Sample]) -> None:
    found, minutes = [], Minutes("chat")
    for one in samples:
        found += minutes.add(said(one), one.at_s, round(one.at_s * S))
        dumped, minutes = minutes.dump("boot"), Minutes("chat")
        assert minutes.load(dumped, "boot")
    assert minutes.dump("boot") == dumped
    current = minutes.current()
    assert found + ([current] if current else []) == everything(
        (one.at_s, said(one)) for one in samples
    )


def test_a_dump_of_another_boot_or_form_is_left() -> None:
    minutes = Minutes("chat")
    minutes.add([counter(5)], 100, 100 * S)
    fresh = Minutes("chat")
    assert not fresh.load(minutes.dump("boot"), "another")
    assert not fresh.load(b"\x00nonsense", "boot")
    assert fresh.current() is None


@given(lives(), st.integers(1, 24))
def test_two_agents_in_turn_have_all_but_the_time_between(samples: list[Sample], cut: int) -> None:
    def sums(minutes: list[Minute]) -> float:
        return math.fsum(v.increase or 0 for m in minutes for v in m.values)

    before = everything((one.at_s, said(one)) for one in samples[:cut])
    after = everything((one.at_s, said(one)) for one in samples[cut:])
    if before and after and before[-1].start_unix_s == after[0].start_unix_s:
        parts = [*before[:-1], joined(before[-1], after[0]), *after[1:]]
        assert sums(parts) == pytest.approx(sums(before) + sums(after))
        both = parts[len(before) - 1]
        assert both.covered_s == before[-1].covered_s + after[0].covered_s
        assert all(v.min <= v.mean <= v.max for v in both.values)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.floats(-1e4, 1e4) | st.sampled_from([math.nan, math.inf]),
            st.integers(-10 * S, 1000 * S),
            st.lists(
                st.builds(
                    Reading,
                    st.just(0),
                    st.sampled_from(
                        (TOTAL, "requests_running", "ttft_seconds_bucket", "server_start_unix_s",
                         "gpu_energy_j", "nobody_knows")
                    ),
                    st.floats() | st.integers(0, 100).map(float),
                    st.sampled_from([(), (("le", "1"),), (("le", "+Inf"),), (("le", "x"),)]),
                ),
                max_size=8,
            ),
        ),
        max_size=12,
    ),
    st.integers(0, 4),
)  # fmt: skip
def test_whatever_comes_the_records_are_sound(
    samples: list[tuple[float, int, list[Reading]]], series_max: int
) -> None:
    minutes = Minutes("chat", series_max=series_max)
    found = []
    for at_unix_s, at_ns, readings in samples:
        found += minutes.add(readings, at_unix_s, at_ns)
        assert len(found) <= len(samples) * (GAP_RECORDS_MAX + 2)
    current = minutes.current()
    for minute in [*found, *([current] if current else [])]:
        assert len(minute.values) + len(minute.histograms) <= series_max
        assert math.isfinite(minute.covered_s)
        for one in minute.values:
            assert all(math.isfinite(x) for x in (one.mean, one.min, one.max, one.last))
            assert one.min <= one.mean <= one.max
        for histogram in minute.histograms:
            assert histogram.bounds[-1] == math.inf
            assert list(histogram.bounds) == sorted(set(histogram.bounds))
            assert all(count >= 0 for count in histogram.counts)


# --------------------------------------------------------------------------------------- examples


def test_one_minute_by_hand() -> None:
    samples = [
        (50.0, [counter(100), gauge(4), *buckets({"0.1": 1, "0.5": 2, "+Inf": 3})]),
        (70.0, [counter(140), gauge(8), *buckets({"0.1": 1, "0.5": 6, "+Inf": 11})]),
        (125.0, [counter(250), gauge(8), *buckets({"0.1": 1, "0.5": 6, "+Inf": 11})]),
    ]
    first, second, third = everything(samples, Minutes("chat", interval_s=20))
    assert (first.source, first.start_unix_s, first.covered_s) == ("chat", 0, 10)
    assert value_of(first, TOTAL) == MinuteValue(TOTAL, (), 1, 100, 100, 100, 100, 20)
    assert value_of(first, "requests_running") == MinuteValue("requests_running", (), 1, 4, 4, 4, 4)
    assert histogram_of(first) == MinuteHistogram(
        "ttft_seconds", (), (0.1, 0.5, math.inf), (0, 2, 2)
    )
    assert (second.start_unix_s, second.covered_s) == (60, 60)
    assert value_of(second, TOTAL).increase == 20 + 100
    assert value_of(second, "requests_running").mean == 8
    assert histogram_of(second).counts == (0, 2, 2)
    assert (third.start_unix_s, third.covered_s) == (120, pytest.approx(5))
    assert value_of(third, TOTAL).increase == pytest.approx(10)
    assert {m.marks for m in (first, second, third)} == {()}


def test_a_minute_is_finished_by_the_first_sample_at_or_after_its_end() -> None:
    minutes = Minutes("chat")
    assert minutes.current() is None
    assert minutes.add([counter(0)], 50, 50 * S) == []
    assert minutes.add([counter(5)], 55, 55 * S) == []
    (done,) = minutes.add([counter(10)], 60, 60 * S)
    assert (done.start_unix_s, value_of(done, TOTAL).increase) == (0, 10)
    current = value_of(minutes.current(), TOTAL)
    assert (current.n, current.increase, current.last) == (1, 0, 10)


def test_a_gap_is_not_covered_and_its_gauges_are_unknown() -> None:
    samples = [
        (float(at), [counter(at), gauge(3)]) for at in (*range(0, 31, 5), *range(330, 361, 5))
    ]
    found = everything(samples)
    assert [m.start_unix_s for m in found] == [0, 60, 120, 180, 240, 300, 360]
    assert [m.covered_s for m in found] == [30, 0, 0, 0, 0, 30, 0]
    assert [("gap" in m.marks) for m in found] == [True] * 6 + [False]
    for minute in found[1:5]:
        (only,) = minute.values  # the counter's rise is known, the gauge is not
        assert (only.name, only.n, only.last, only.increase) == (TOTAL, 0, 30, pytest.approx(60))
    assert math.fsum(value_of(m, TOTAL).increase or 0 for m in found) == 360


def test_a_gap_of_days_costs_no_more_records_than_one_of_hours() -> None:
    day = 86400.0
    found = everything([(0, [counter(0)]), (30 * day + 7, [counter(1e6)])])
    assert len(found) <= GAP_RECORDS_MAX + 2
    assert math.fsum(value_of(m, TOTAL).increase or 0 for m in found) == pytest.approx(1e6)
    assert found[-1].start_unix_s == 30 * day


def test_a_restart_counts_from_the_process_start() -> None:
    """300 s were not seen, but the server came up 20 s ago: its 40 tokens lie in those 20 s."""
    start = "server_start_unix_s"
    found = everything(
        [(10, [counter(100), counter(5, start)]), (310, [counter(40), counter(290, start)])]
    )
    increases = {m.start_unix_s: value_of(m, TOTAL).increase for m in found}
    assert increases == {0: 0, 240: 20, 300: 20}
    assert [m.resets for m in found] == [0, 0, 1]
    assert "restart" in found[-1].marks


def test_a_fall_of_most_counters_is_a_restart_of_all() -> None:
    """No process start on the page: the tokens already exceed what they were, the others fell."""
    names = ("requests_finished_total", "prompt_tokens_total")
    (only,) = everything(
        [
            (10, [counter(50), *(counter(100, name) for name in names)]),
            (15, [counter(60), *(counter(3, name) for name in names)]),
        ]
    )
    assert value_of(only, TOTAL).increase == 60
    assert value_of(only, names[0]).increase == 3
    assert (only.resets, only.marks) == (1, ("restart",))


def test_one_counter_that_falls_alone_counts_alone_and_rounding_is_no_fall() -> None:
    prompt = "prompt_tokens_total"
    (only,) = everything(
        [
            (10, [counter(100), counter(50, prompt), counter(1, "preemptions_total")]),
            (
                15,
                [counter(120), counter(50 * (1 - 1e-12), prompt), counter(0, "preemptions_total")],
            ),
        ]
    )
    assert value_of(only, TOTAL).increase == 20
    assert value_of(only, prompt).increase == 0
    assert only.resets == 1


def test_a_counter_that_appears_later_began_at_zero_where_the_process_is_known() -> None:
    start = counter(1, "server_start_unix_s")
    (known,) = everything([(10, [start]), (15, [start, counter(7)])])
    (unknown,) = everything([(10, [gauge(1)]), (15, [gauge(1), counter(7)])])
    (lost,) = everything([(10, [start, counter(math.nan)]), (15, [start, counter(7)])])
    assert value_of(known, TOTAL).increase == 7
    assert value_of(unknown, TOTAL).increase == 0
    assert value_of(lost, TOTAL).increase == 0


def test_a_series_that_a_sample_lacks_is_counted_when_it_comes_back() -> None:
    found = everything(
        [(50, [counter(0), gauge(1)]), (55, [gauge(1)]), (62, [gauge(1)]), (65, [counter(30)])]
    )
    # Its minute was given out before it came back: nothing is lost, the next one holds it.
    assert math.fsum(v.increase or 0 for m in found for v in m.values) == 30


def test_samples_that_come_twice_or_late_are_dropped_and_counted() -> None:
    minutes = Minutes("chat")
    minutes.add([counter(10)], 10, 10 * S)
    minutes.add([counter(20)], 15, 15 * S)
    assert minutes.add([counter(99)], 15, 15 * S) == []
    assert minutes.add([counter(5)], 12, 12 * S) == []
    minutes.add([counter(30), counter(1000)], 20, 20 * S)
    assert minutes.dropped == 2
    assert value_of(minutes.current(), TOTAL).increase == 20
    assert value_of(minutes.current(), TOTAL).n == 3


def test_values_that_are_no_numbers_are_left_out() -> None:
    minutes = Minutes("chat")
    minutes.add([counter(10), gauge(math.inf)], 10, 10 * S)
    minutes.add([counter(math.nan), gauge(1)], 15, 15 * S)
    minutes.add([counter(30), gauge(math.nan)], 20, 20 * S)
    assert value_of(minutes.current(), TOTAL).increase == 20
    assert value_of(minutes.current(), "requests_running").max == 1


def test_the_clock_set_forward_or_back_moves_the_stamps_and_no_length_of_time() -> None:
    for jump in (3600.0, -3600.0):
        minutes = Minutes("chat")
        found = []
        for index in range(13):
            at = 7000.0 + 5 * index
            wall = at + (jump if index >= 3 else 0)
            found += minutes.add([counter(index), gauge(2)], wall, round(at * S))
        current = minutes.current()
        assert current is not None
        found.append(current)
        assert math.fsum(value_of(m, TOTAL).increase or 0 for m in found) == 12
        assert math.fsum(m.covered_s for m in found) == pytest.approx(60)
        assert [m.start_unix_s for m in found] == [6960, 6960 + jump, 7020 + jump]
        assert ["clock_jump" in m.marks for m in found] == [True, True, False]
        assert [m.covered_s for m in found] == pytest.approx([10, 10, 40])


def test_a_small_step_of_the_clock_reopens_no_minute_and_drift_is_none() -> None:
    minutes = Minutes("chat")
    found = minutes.add([counter(0)], 58, 58 * S)
    found += minutes.add([counter(5)], 60.5, 63 * S)  # 2.5 s less than passed
    found += minutes.add([counter(10)], 65.4, 68 * S)  # 0.1 s less
    assert [m.start_unix_s for m in found] == [0]
    assert found[0].marks == ("clock_jump",)
    current = minutes.current()
    assert current is not None
    assert current.start_unix_s == 60
    total = (value_of(found[0], TOTAL).increase or 0) + (value_of(current, TOTAL).increase or 0)
    assert total == pytest.approx(10)
    assert current.covered_s + found[0].covered_s == pytest.approx(10)


def test_another_fingerprint_marks_the_minutes_of_the_interval() -> None:
    minutes = Minutes("chat")
    found = minutes.add([counter(0)], 10, 10 * S, fingerprint="a")
    found += minutes.add([counter(0)], 15, 15 * S)  # not known now: no change
    found += minutes.add([counter(0)], 55, 20 * S, fingerprint="a")
    for at, fingerprint in ((58, "a"), (62, "b"), (67, "b"), (121, "b")):
        found += minutes.add([counter(0)], at + 100, (at + 100) * S, fingerprint=fingerprint)
    changed = {m.start_unix_s for m in found if "changed" in m.marks}
    assert changed == {120}
    minutes = Minutes("chat")
    minutes.add([counter(0)], 58, 58 * S, fingerprint="a")
    (first,) = minutes.add([counter(0)], 62, 62 * S, fingerprint="b")
    current = minutes.current()
    assert current is not None
    assert (first.marks, current.marks) == (("changed",), ("changed",))


def test_bounds_that_change_leave_what_both_have() -> None:
    (only,) = everything(
        [
            (10, buckets({"0.1": 0, "0.5": 0, "1": 0, "+Inf": 0})),
            (15, buckets({"0.1": 1, "0.5": 3, "1": 4, "+Inf": 6})),
            (20, buckets({"0.1": 2, "1": 5, "+Inf": 9})),
            (25, buckets({"0.1": 2, "0.2": 3, "1": 7, "+Inf": 12})),
        ]
    )
    assert histogram_of(only) == MinuteHistogram("ttft_seconds", (), (0.1, 1, math.inf), (2, 5, 5))
    assert only.marks == ("bounds_changed",)


def test_bounds_that_change_with_a_restart_count_from_zero() -> None:
    start = "server_start_unix_s"
    found = everything(
        [
            (30, [counter(1, start), *buckets({"0.1": 3, "1": 5, "+Inf": 9})]),
            (59, [counter(1, start), *buckets({"0.1": 3, "1": 5, "+Inf": 9})]),
            (61, [counter(60, start), *buckets({"0.2": 10, "2": 20, "+Inf": 30})]),
        ],
        Minutes("chat", interval_s=30),
    )
    assert histogram_of(found[-1]) == MinuteHistogram(
        "ttft_seconds", (), (0.2, 2, math.inf), (10, 10, 10)
    )
    assert found[-1].marks == ("bounds_changed", "restart")


def test_buckets_are_kept_apart_by_their_other_labels_and_need_an_end() -> None:
    def two(a: float, b: float) -> list[Reading]:
        return [
            Reading(0, "ttft_seconds_bucket", a, (("gpu", "x"), ("le", "+Inf"))),
            Reading(0, "ttft_seconds_bucket", b, (("gpu", "y"), ("le", "+Inf"))),
            Reading(0, "itl_seconds_bucket", b, (("le", "0.5"),)),
        ]

    (only,) = everything([(0, two(0, 0)), (5, two(3, 8))])
    assert {h.labels: h.counts for h in only.histograms} == {
        (("gpu", "x"),): (3,),
        (("gpu", "y"),): (8,),
    }


def test_memory_is_bounded_and_says_so() -> None:
    minutes = Minutes("chat", series_max=100)
    for at in range(0, 300, 5):
        many = [gauge(1, gpu=f"{at}-{index}") for index in range(80)]
        minutes.add([counter(at), *many], at, at * S)
    current = minutes.current()
    assert current is not None
    assert len(current.values) <= 100
    assert minutes.refused > 0
    assert "series_limit" in current.marks
    assert value_of(current, TOTAL).last == 295  # what came first stays


def test_series_that_are_gone_make_room() -> None:
    minutes = Minutes("chat", series_max=10)
    minutes.add([gauge(1, gpu=f"old-{index}") for index in range(10)], 0, 1)
    for at in range(5, 300, 5):
        minutes.add([gauge(2, gpu="old-0")], at, at * S)
    minutes.add([gauge(3, gpu="new")], 300, 300 * S)
    assert minutes.refused == 0
    assert {v.labels for v in (minutes.current() or EMPTY).values} == {(("gpu", "new"),)}


def test_a_counter_that_was_forgotten_does_not_count_from_zero_again() -> None:
    start = counter(1, "server_start_unix_s")
    minutes = Minutes("chat", series_max=2)
    found = minutes.add([start, counter(1000)], 0, 1)
    for at in range(5, 300, 5):
        found += minutes.add([start], at, at * S)
    found += minutes.add([start, gauge(1)], 300, 300 * S)  # takes the counter's place
    for at in range(305, 600, 5):
        found += minutes.add([start], at, at * S)
    found += minutes.add([start, counter(1010)], 600, 600 * S)
    found.append(minutes.current() or EMPTY)
    assert {v.increase for m in found for v in m.values if v.name == TOTAL} == {0}


def test_buckets_that_fall_within_a_page_add_up_to_its_count() -> None:
    (only,) = everything(
        [
            (0, buckets({"0.1": 0, "0.5": 0, "+Inf": 0})),
            (5, buckets({"0.1": 5, "0.5": 3, "+Inf": 8})),
        ]
    )
    assert histogram_of(only).counts == (5, 0, 3)


def test_a_source_that_does_not_answer_gives_its_minute_out_once() -> None:
    minutes = Minutes("chat")
    minutes.add([counter(0)], 50, 50 * S)
    minutes.add([counter(5)], 55, 55 * S)
    assert minutes.add([], 60, 60 * S) == []  # may still come back within this gap
    (done,) = minutes.add([], 71, 71 * S)
    assert (done.start_unix_s, done.covered_s, done.marks) == (0, 5, ("gap",))
    assert value_of(done, TOTAL).increase == 5
    assert minutes.add([], 200, 200 * S) == []
    found = minutes.add([counter(150)], 200, 200 * S + 1)
    found.append(minutes.current() or EMPTY)
    assert [m.start_unix_s for m in found] == [60, 120, 180]
    assert math.fsum(value_of(m, TOTAL).increase or 0 for m in found) == pytest.approx(145)


def test_names_that_nobody_knows_are_counted() -> None:
    minutes = Minutes("chat")
    minutes.add([counter(1, "made_up"), *buckets({"x": 1})], 5, 5 * S)
    assert minutes.unknown == 2
    assert (minutes.current() or EMPTY).values == ()


def test_parts_of_different_minutes_are_not_joined() -> None:
    with pytest.raises(ValueError, match="different minutes"):
        joined(Minute("a", 0, (), (), 1), Minute("a", 60, (), (), 1))
