"""Series: every tier says the same, whole windows are answered, and nonsense in one line."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.metrics import CATALOGUE
from agent.minutes import MinuteHistogram
from agent.model import StoreError, UsageError
from agent.question import PERCENTILES, RECIPES, _spread, combination
from agent.recall import Recall
from agent.sizing.window import COUNTERS, GAUGES, GPU, HISTOGRAMS, Window
from agent.stats import Histogram, quantile
from tests.agent.recorded import NOON, Clocks, counter, gauge, histogram, minute, store

TOKENS = "output_tokens_total"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


def fill(path: Path, *, hours: int, tail_s: int = 0) -> Clocks:
    """Two servers of one service and one GPU each: 10 tokens/s, 400 W; the second twice of both.

    `tail_s` more are not in a minute yet.
    """
    clocks, total = Clocks(), [0.0, 0.0]
    with store(path, clocks) as history:
        history.add_source("a", service="chat", gpus=["g0"])
        history.add_source("b", service="chat", gpus=["g1"])
        history.add_source("c", service="other")
        for second in range(0, hours * 3600 + tail_s, 5):
            for n, name in enumerate("ab"):
                readings = [
                    clocks.reading(TOKENS, total[n]),
                    clocks.reading("kv_usage_ratio", 0.2 * (n + 1)),
                    clocks.reading("requests_running", 8.0 * (n + 1)),
                ]
                history.add_readings(name, readings)
                watts, joules = 400.0 * (n + 1), 400.0 * (n + 1) * second
                power = clocks.reading("gpu_power_w", watts, gpu=f"g{n}")
                energy = clocks.reading("gpu_energy_j", joules, gpu=f"g{n}")
                history.add_readings("nvml", [power, energy])
                total[n] += 50.0 * (n + 1)
            clocks.pass_s(5)
            done = second + 5
            if done % 60 == 0 and done <= hours * 3600:
                start = NOON + done - 60
                for n, name in enumerate("ab"):
                    values = [
                        counter(TOKENS, total[n], 600.0 * (n + 1)),
                        gauge("kv_usage_ratio", 0.2 * (n + 1)),
                        gauge("requests_running", 8.0 * (n + 1)),
                    ]
                    history.add_minute(minute(start, values, source=name))
                gpus = [
                    one
                    for n in (0, 1)
                    for one in (
                        gauge("gpu_power_w", 400.0 * (n + 1), gpu=f"g{n}"),
                        counter("gpu_energy_j", done * 400.0, 24_000.0 * (n + 1), gpu=f"g{n}"),
                    )
                ]
                history.add_minute(minute(start, gpus, source="nvml"))
                assert history.flush()
        assert history.flush()
    return clocks


@pytest.mark.parametrize("step", [5, 15, 60, 300, 3600])
@pytest.mark.parametrize(
    ("metric", "whose", "expected"),
    [
        ("output_tokens_per_s", {}, 30.0),
        (TOKENS, {"server": "b"}, 20.0),
        ("output_tokens_per_s", {"service": "chat"}, 30.0),
        ("output_tokens_per_s", {"service": "other"}, None),
        ("kv_usage_ratio", {}, 0.3),
        ("requests_running", {}, 24.0),
        ("gpu_power_w", {}, 1200.0),
        ("gpu_power_w", {"server": "a"}, 400.0),
        ("gpu_power_w", {"gpu": "g1"}, 800.0),
        ("energy_j_per_output_token", {}, 40.0),
        ("energy_j_per_output_token", {"server": "b"}, 40.0),
    ],
)
def test_every_tier_says_the_same(
    kept: Path, metric: str, whose: dict[str, str], expected: float | None, step: int
) -> None:
    with Recall(kept) as recall:
        series = recall.series(metric, NOON, NOON + 2 * 3600 + 899, step, **whose)
    if expected is None:
        assert series.points == []
        return
    starts = [at for at, _ in series.points]
    every = list(range(NOON, NOON + 2 * 3600 + 900, step))
    assert starts in (every, every[:-1])  # of a counter's last reading no increase is known yet
    whole = series.points[: len(every) - 1]
    assert [value for _, value in whole] == pytest.approx([expected] * len(whole), rel=1e-6)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two closed hours, ten minutes of a third, five minutes that no minute holds yet."""
    path = tmp_path_factory.mktemp("kept") / "agent.db"
    fill(path, hours=2, tail_s=900)
    return path


def test_a_window_runs_to_the_newest_reading(path: Path) -> None:
    clocks = fill(path, hours=0, tail_s=35)
    with Recall(path) as recall:
        newest = recall.newest_unix_s(clocks.wall_ns / 1e9)
        assert newest == NOON + 30
        points = recall.series("requests_running", NOON, newest, 5).points
        assert points[-1] == (NOON + 30, 24.0)
        assert recall.newest_unix_s(NOON - 1) is None


def test_the_first_step_holds_the_windows_beginning(kept: Path) -> None:
    with Recall(kept) as recall:
        points = recall.series("requests_running", NOON + 1800, NOON + 7000, 3600).points
    assert points == [(NOON, 24.0), (NOON + 3600, 24.0)]


def test_minutes_answer_where_raw_was_shed(path: Path) -> None:
    clocks = Clocks()
    with store(path, clocks) as history:
        history.add_minute(minute(NOON, [gauge("requests_running", 3)]), finished=False)
        assert history.flush()
        with Recall(path) as recall:
            assert recall.series("requests_running", NOON, NOON + 30, 60).points == [(NOON, 3)]


def test_a_gaps_increase_is_of_the_whole_minute(path: Path) -> None:
    with store(path, Clocks()) as history:
        one = minute(NOON, [counter(TOKENS, 99, 120)], covered_s=12, marks=("gap",))
        history.add_minute(one)
    with Recall(path) as recall:
        assert recall.series(TOKENS, NOON, NOON + 59, 60).points == [(NOON, 2.0)]


def test_minutes_of_some_metrics_alone(kept: Path) -> None:
    """The same values as among all of them, whether their hour is over or not."""
    with Recall(kept) as recall:
        whole = list(recall.minutes("a", NOON, NOON + 9000))
        some = list(recall.minutes("a", NOON, NOON + 9000, {TOKENS, "no_such"}))
    assert len(whole) == len(some) == 120
    for one, other in zip(whole, some, strict=True):
        assert [value for value in one.values if value.name == TOKENS] == list(other.values)
        assert (one.start_unix_s, one.covered_s) == (other.start_unix_s, other.covered_s)


def test_who_serves_and_who_speaks(kept: Path) -> None:
    with Recall(kept) as recall:
        assert recall.servers() == {"a": ["g0"], "b": ["g1"]}  # c never spoke, nvml serves nobody
        assert recall.servers(service="other") == {"c": []}
        assert recall.servers("b", "chat") == {"b": ["g1"]}
        assert recall.speakers("gpu_power_w", "kv_usage_ratio") == ["a", "b", "nvml"]
        with pytest.raises(UsageError, match="no server 'd'"):
            recall.servers("d")


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=40),
    st.lists(st.integers(1, 20), min_size=39, max_size=39),
    st.integers(1, 30),
)
def test_a_counters_increase_is_spread_without_loss(
    values: list[int], gaps: list[int], step: int
) -> None:
    """Whatever the steps, their increases add up; a fall is a reset, which counts from 0."""
    times = np.array([0, *itertools.accumulate(gaps)][: len(values)], np.int64) * 1000
    expected = sum(b - a if b >= a else b for a, b in itertools.pairwise(values))
    end = int(times[-1]) // 1000
    edges = np.arange(0, end + step, step, dtype=np.int64) * 1000
    rises, seconds = _spread(times, np.array(values, float), edges, 0, end * 1000)
    assert rises.sum() == pytest.approx(expected)
    assert seconds.sum() == pytest.approx(end)
    assert seconds.max(initial=0) <= step + 1e-9


def test_what_comes_after_a_long_silence_is_nobodys() -> None:
    times, values = np.array([0, 10, 1000, 1010]) * 1000, np.array([0.0, 5, 5000, 5005])
    edges = np.arange(0, 1020, 10, dtype=np.int64) * 1000
    rises, seconds = _spread(times, values, edges, 0, 1_020_000)
    assert (rises.sum(), seconds.sum()) == (10, 20)


def test_raw_readings_come_in_order_whether_packed_or_not(path: Path) -> None:
    """Eleven minutes: ten of them are packed, and each reading is there once, as it was."""
    fill(path, hours=0, tail_s=660)
    with Recall(path) as recall:
        found = list(recall.readings("a", NOON + 590, NOON + 610, gpus=["g1"]))
        every_gpu = list(recall.readings("a", NOON + 590, NOON + 590, gpus=None))
        nobody = list(recall.readings("nobody", NOON, NOON + 600))
    times = [at for at, *_ in found]
    assert times == sorted(times)
    assert sorted(found, key=str) == sorted(
        (
            (float(NOON + second), name, labels, value)
            for second in range(590, 611, 5)
            for name, labels, value in (
                (TOKENS, {}, 10.0 * second),
                ("kv_usage_ratio", {}, 0.2),
                ("requests_running", {}, 8.0),
                ("gpu_power_w", {"gpu": "g1"}, 800.0),
                ("gpu_energy_j", {"gpu": "g1"}, 800.0 * second),
            )
        ),
        key=str,
    )
    assert {labels.get("gpu") for _, _, labels, _ in every_gpu} == {None, "g0", "g1"}
    assert nobody == []


def test_minutes_of_some_series_are_those_minutes_with_less_in_them(kept: Path) -> None:
    window = ("a", NOON + 3000, NOON + 7500)
    with Recall(kept) as recall:
        every = list(recall.minutes(*window))
        some = list(recall.minutes(*window, names={TOKENS}))
        none = list(recall.minutes(*window, names=()))
        assert recall.speakers("gpu_energy_j", "gpu_power_w") == ["nvml"]
    assert len(every) == 70
    assert [len(one.values) for one in every] == [3] * 70
    for whole, part, empty in zip(every, some, none, strict=True):
        values = tuple(one for one in whole.values if one.name == TOKENS)
        assert part == msgspec.structs.replace(whole, values=values)
        assert empty == msgspec.structs.replace(whole, values=())


def test_columns_say_what_the_minutes_say(path: Path) -> None:
    """Parts, gaps, resets, marks, records across both ends: one window filled in both ways."""
    clocks = Clocks()
    dice = random.Random(1)
    with store(path, clocks) as history:
        for n in range(200):
            start = NOON + 60 * (n - (n > 150) * 20)  # the clock is set back: those have parts
            covered_s = dice.choice([60.0, 60.0, 31.5])
            marks = dice.choice([(), (), ("gap",), ("changed", "restart")])
            values = [
                gauge("requests_running", dice.random(), dice.random()),
                gauge("kv_usage_ratio", 0.5),
                *([counter("output_tokens_total", 9.0, dice.random())] if n % 7 else []),
                gauge("requests_waiting", 1.0, rank="0"),
            ]
            counts = [float(dice.randint(0, 3)) for _ in range(3)]
            made = minute(
                start,
                values,
                [histogram("ttft_seconds", *counts)],
                covered_s=covered_s,
                marks=marks,
            )
            history.add_minute(msgspec.structs.replace(made, resets=dice.randint(0, 1)))
            gpus = [counter("gpu_energy_j", 9.0, dice.random(), gpu=gpu) for gpu in ("a", "b")]
            watts = gauge("gpu_power_w", dice.random(), gpu="a")
            history.add_minute(minute(start, [*gpus, watts], source="nvml", covered_s=covered_s))
            if n == 100:
                clocks.pass_s(4 * 3600)  # what came so far moves to its place
                assert history.flush()
        assert history.flush()
    names = GAUGES | COUNTERS | frozenset(HISTOGRAMS)
    with Recall(path) as recall:
        for begin, end in ((NOON, NOON + 7000), (NOON + 90, NOON + 8011.5)):
            one, other = (Window(begin, end, servers=["chat"], gpus=["a"]) for _ in range(2))
            for source, mine, gpus in (("chat", names, None), ("nvml", GPU, ["a"])):
                window = (source, one.origin_unix_s, end)
                one.add_all(recall.minutes(*window, mine))
                other.add_records(recall.records(*window, mine, gpus))
            assert one.gpus.keys() == other.gpus.keys() == {"a"}
            for was, found in (
                (one.servers["chat"], other.servers["chat"]),
                (one.gpus["a"], other.gpus["a"]),
            ):
                assert (was.resets, was.marks) == (found.resets, found.marks)
                np.testing.assert_allclose(was.covered_s, found.covered_s)
                assert was._columns.keys() == found._columns.keys()
                for column in was._columns:
                    np.testing.assert_allclose(
                        was.get(*column), found.get(*column), err_msg=str(column)
                    )
                assert [*was.histograms("ttft_seconds")] == [*found.histograms("ttft_seconds")]
            assert one.servers["chat"].has("output_tokens_total")


def test_a_minute_that_is_written_meanwhile_is_whole_or_not_there(path: Path) -> None:
    clocks = fill(path, hours=1)
    late = [minute(NOON + 3600, [gauge("kv_usage_ratio", 0.2)], source="a")]
    with store(path, clocks) as history:

        class Beside(Recall):
            def _columns(self, *asked: Any) -> Any:
                while late:
                    history.add_minute(late.pop())
                assert history.flush(20)
                return super()._columns(*asked)

        with Beside(path) as recall:
            before = recall.records("a", NOON, NOON + 7200, GAUGES)
            after = recall.records("a", NOON, NOON + 7200, GAUGES)
    assert [one.start_unix_s.size for one in (before, after)] == [60, 61]
    for one in (before, after):
        assert max(value.of.max() for value in one.values) == one.start_unix_s.size - 1


def test_a_snapshot_is_of_one_moment(path: Path) -> None:
    with store(path, Clocks()) as history:
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert history.flush()
        with Recall(path) as recall:
            with recall.snapshot():
                assert len(list(recall.minutes("chat", NOON, NOON + 600))) == 1
                history.add_minute(minute(NOON + 60, [gauge("requests_running", 1)]))
                assert history.flush()
                assert len(list(recall.minutes("chat", NOON, NOON + 600))) == 1
            assert len(list(recall.minutes("chat", NOON, NOON + 600))) == 2


def test_a_question_can_be_given_up(kept: Path) -> None:
    with (
        Recall(kept, give_up=lambda: True) as recall,
        pytest.raises(StoreError, match="interrupted"),
    ):
        recall.series("requests_running", 0, NOON, 3600 * 10)


def test_every_metric_has_a_combination_and_every_recipe_its_counters() -> None:
    for recipe in RECIPES.values():
        for name in (recipe.counter, recipe.over):
            assert name is None or CATALOGUE[name].kind == "counter"
    assert combination("kv_usage_ratio") == "mean"
    assert combination("gpu_temperature_c") == "max"
    assert combination("gpu_power_w") == "sum"
    assert not RECIPES.keys() & CATALOGUE.keys()
    assert not PERCENTILES.keys() & {*RECIPES, *CATALOGUE}
    assert {f"{one.histogram}_bucket" for one in PERCENTILES.values()} <= CATALOGUE.keys()


def test_percentiles_are_of_all_that_was_counted_whatever_the_tier(path: Path) -> None:
    """Two servers of different bounds; the minutes of a day say what its hours say."""
    clocks = Clocks()
    coarse, fine = (0.1, 0.5, math.inf), (0.1, 0.2, 0.5, math.inf)
    with store(path, clocks) as history:
        for name in "ab":
            history.add_source(name, service="chat")
        for n in range(180):
            slow = 5.0 if n // 60 == 1 else 1.0
            histograms = [
                MinuteHistogram("ttft_seconds", (), coarse, (9.0, slow, 0.0)),
                MinuteHistogram("ttft_seconds", (), fine, (9.0, 0.0, slow, 0.0)),
            ]
            for name, one in zip("ab", histograms, strict=True):
                history.add_minute(minute(NOON + 60 * n, (), [one], source=name))
            clocks.pass_s(60)
        clocks.pass_s(3 * 3600)
        assert history.flush()
    with Recall(path) as recall:
        hours = recall.series("ttft_p95_ms", NOON, NOON + 10_799, 3600)
        minutes = recall.series("ttft_p95_ms", NOON, NOON + 10_799, 60)
        alone = recall.series("ttft_p95_ms", NOON, NOON + 10_799, 3600, server="a")
        half = recall.series("ttft_p50_ms", NOON, NOON + 10_799, 1800, service="chat")
        assert recall.series("itl_p50_ms", NOON, NOON + 10_799).points == []
    assert (hours.unit, len(minutes.points)) == ("ms", 180)
    by_minute = dict(minutes.points)
    for at, value in hours.points:
        assert value == pytest.approx(by_minute[at])
    whole = [Histogram(coarse, (540.0, 300.0, 0.0)), Histogram(fine, (540.0, 0.0, 300.0, 0.0))]
    expected = quantile(whole, 0.95)
    assert expected is not None
    assert hours.points[1] == (NOON + 3600, pytest.approx(expected.value * 1000))
    assert alone.points[0] == (NOON, pytest.approx(100 + 400 * 0.5))
    assert half.points[0] == (NOON, pytest.approx(100 * 10 / 18))
    assert len(half.points) == 6


@pytest.mark.parametrize(
    ("arguments", "whose", "said"),
    [
        (("kv_usage", 0, 10), {}, "no metric 'kv_usage', nearest is 'kv_usage_ratio'"),
        (("kv_usage_ratio", 0, 10), {"server": "cat"}, "no server 'cat', nearest is 'chat'"),
        (("kv_usage_ratio", 0, 10), {"service": "x"}, "no service 'x'"),
        (("kv_usage_ratio", 10, 10), {}, "a window from 10 to 10"),
        (("kv_usage_ratio", 0, float("inf")), {}, "a window"),
        (("kv_usage_ratio", float("nan"), 1), {}, "a window"),
        (("kv_usage_ratio", 0, 10, 0), {}, "a step of 0 s"),
        (("kv_usage_ratio", 0, 10, float("nan")), {}, "a step of nan"),
        (("kv_usage_ratio", 0, 10**9, 1), {}, "more than 50,000 points"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    path: Path, arguments: tuple[str, float, float], whose: dict[str, str], said: str
) -> None:
    with store(path, Clocks()) as history:
        history.add_source("chat", service=None)
    with Recall(path) as recall, pytest.raises(UsageError, match=said) as refused:
        recall.series(*arguments, **whose)
    assert "\n" not in str(refused.value)
