from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.join import bracket, gpu_views, increase, server_view
from agent.model import Reading

S = 1_000_000_000
GPU = (("gpu", "GPU-a"),)

Series = dict[str, list[tuple[float, float]]]  # name → (seconds, value)


def made(series: Series, labels: tuple[tuple[str, str], ...] = ()) -> list[Reading]:
    return [
        Reading(round(at * S), name, value, labels)
        for name, points in series.items()
        for at, value in points
    ]


def server(
    series: Series, start: float = 0, end: float = 10, window: tuple[int, int] | None = None
):
    return server_view(
        made(series), start_ns=round(start * S), end_ns=round(end * S), window=window
    )


def gpu(series: Series, start: float = 0, end: float = 10, window: tuple[int, int] | None = None):
    views = gpu_views(
        made(series, GPU), start_ns=round(start * S), end_ns=round(end * S), window=window
    )
    assert len(views) == 1
    return views[0]


# ----------------------------------------------------------------------------------------- server


def test_nothing_said_is_no_view() -> None:
    assert server({}) is None
    assert (
        server_view(made({"gpu_power_w": [(5, 1)]}, GPU), start_ns=0, end_ns=S, window=None) is None
    )


def test_gauges_are_of_the_window() -> None:
    running = [(0.0, 0.0), (2.0, 4.0), (4.0, 8.0), (6.0, 6.0), (10.0, 0.0)]
    view = server({"requests_running": running, "kv_usage_ratio": running}, window=(3 * S, 7 * S))
    assert (view.running_mean, view.running_max, view.samples) == (7, 8, 5)
    assert (view.kv_usage_mean, view.kv_usage_max) == (7, 8)
    assert view.waiting_mean is None


def test_a_window_without_samples_falls_back_to_the_level() -> None:
    running = [(-0.1, 0.0), (1.0, 4.0), (9.0, 8.0), (10.1, 0.0)]
    view = server({"requests_running": running}, window=(4 * S, 5 * S))
    assert (view.running_mean, view.running_max) == (6, 8)


def test_the_idle_moments_beside_a_level_are_not_the_level() -> None:
    view = server({"requests_running": [(-0.1, 0.0), (10.1, 0.0)]})
    assert (view.running_mean, view.running_max, view.samples) == (None, None, 2)


def test_uneven_intervals_are_weighted_by_time() -> None:
    # 1 held for most of ten seconds; then a burst of quick samples at 100.
    points = [(0.0, 1.0), (4.0, 1.0), (8.0, 1.0), *((9 + i / 10, 100.0) for i in range(10))]
    view = server({"requests_running": points})
    assert view.running_mean == pytest.approx(12, abs=3)  # unweighted it would be 77


def test_counters_run_from_just_before_to_just_after_the_level() -> None:
    view = server(
        {
            "preemptions_total": [(-9, 1), (-1, 2), (5, 4), (11, 7), (20, 100)],
            "requests_finished_total": [(-1, 10), (11, 30)],
            "prompt_tokens_total": [(-1, 0), (11, 2000)],
            "output_tokens_total": [(-1, 0), (11, 640)],
            "kv_capacity_tokens": [(-1, 512), (11, 512)],
        }
    )
    assert view.preemptions == 5
    assert (view.requests_total, view.prompt_tokens_total, view.output_tokens_total) == (
        *(20, 2000, 640),
    )
    assert view.kv_capacity_tokens == 512


def test_stage_times_are_means_per_request() -> None:
    view = server(
        {
            "queue_seconds_sum": [(0, 1.0), (10, 3.0)],
            "queue_seconds_count": [(0, 10), (10, 20)],
            "prefill_seconds_sum": [(0, 1.0), (10, 1.0)],
            "prefill_seconds_count": [(0, 10), (10, 10)],
            "decode_seconds_sum": [(0, 1.0), (10, 4.0)],
            "prefix_cache_queries_total": [(0, 0), (10, 200)],
            "prefix_cache_hits_total": [(0, 0), (10, 50)],
        }
    )
    assert view.queue_ms == pytest.approx(200)
    assert view.prefill_ms is None  # no request finished
    assert view.decode_ms is None  # how many is not known
    assert view.prefix_hit_rate == 0.25


def test_a_counter_that_falls_is_null_and_the_others_stand() -> None:
    view = server(
        {
            "preemptions_total": [(0, 5), (5, 0), (10, 9)],
            "requests_finished_total": [(0, 5), (5, 6), (10, 9)],
        }
    )
    assert (view.preemptions, view.requests_total) == (None, 4)


def test_a_restarted_server_has_no_increases() -> None:
    view = server(
        {
            "requests_finished_total": [(0, 5), (10, 9)],  # overtook its old count
            "server_start_unix_s": [(0, 1000), (10, 2000)],
            "requests_running": [(5, 1)],
        }
    )
    assert (view.requests_total, view.running_mean) == (None, 1)


def test_one_sample_is_no_increase() -> None:
    assert server({"requests_finished_total": [(5, 5)]}).requests_total is None


def test_what_is_not_a_number_is_left_out() -> None:
    view = server({"requests_running": [(4, float("nan")), (5, 3), (6, float("inf"))]})
    assert (view.running_mean, view.running_max) == (3, 3)


# -------------------------------------------------------------------------------------------- gpu


def test_energy_is_interpolated_to_the_levels_bounds() -> None:
    view = gpu({"gpu_energy_j": [(-1, 0), (1, 200), (9, 2600), (11, 2700)]})
    assert view.energy_j == pytest.approx(2650 - 100)
    assert view.power_w_mean == pytest.approx(255)


def test_polled_power_is_not_used_beside_a_counter() -> None:
    view = gpu({"gpu_energy_j": [(0, 0), (10, 1000)], "gpu_power_w": [(0, 700), (10, 700)]})
    assert view.power_w_mean == pytest.approx(100)


def test_without_a_counter_power_is_integrated() -> None:
    view = gpu({"gpu_power_w": [(-1, 100), (1, 100), (9, 300), (11, 300)]})
    assert view.energy_j == pytest.approx(100 + 200 * 8 + 300)
    assert view.power_w_mean == pytest.approx(200)


def test_a_reset_counter_falls_back_to_power() -> None:
    view = gpu({"gpu_energy_j": [(0, 900), (5, 0), (10, 1000)], "gpu_power_w": [(0, 50), (10, 50)]})
    assert view.energy_j == pytest.approx(500)
    assert gpu({"gpu_energy_j": [(0, 900), (5, 0), (10, 1000)]}).energy_j is None


def test_too_little_of_the_level_is_not_extrapolated() -> None:
    assert gpu({"gpu_energy_j": [(8, 0), (10, 1000)]}).energy_j is None
    assert gpu({"gpu_energy_j": [(2, 0), (10, 800)]}).energy_j == pytest.approx(1000)
    assert gpu({"gpu_energy_j": [(5, 7)]}).energy_j is None


def test_the_other_fields() -> None:
    view = gpu(
        {
            "gpu_memory_used_bytes": [(-1, 10), (5, 30), (11, 20), (99, 99)],
            "gpu_temperature_c": [(-1, 40), (5, 70), (11, 75)],
            "gpu_utilization_ratio": [(-1, 0.0), (4, 0.5), (6, 0.7), (11, 0.0)],
            "gpu_throttled": [(-1, 0), (5, 1), (11, 0)],
        },
        window=(3 * S, 7 * S),
    )
    assert (view.memory_used_bytes_max, view.temperature_c_max) == (30, 75)
    assert view.utilization_mean == pytest.approx(0.6)
    assert view.clocks_throttled is True
    assert view.energy_j is None


def test_never_asked_is_not_unthrottled() -> None:
    assert gpu({"gpu_temperature_c": [(5, 40)]}).clocks_throttled is None
    assert gpu({"gpu_throttled": [(5, 0)]}).clocks_throttled is False


def test_gpus_are_told_apart() -> None:
    readings = [
        *made({"gpu_energy_j": [(0, 0), (10, 1000)]}, (("gpu", "b"),)),
        *made({"gpu_energy_j": [(0, 0), (10, 3000)]}, (("gpu", "a"),)),
        *made({"requests_running": [(5, 1)], "gpu_power_w": [(5, 1)]}),  # without a UUID: whose?
    ]
    views = gpu_views(readings, start_ns=0, end_ns=10 * S)
    assert [(one.uuid, one.energy_j) for one in views] == [("a", 3000), ("b", 1000)]
    assert gpu_views([], start_ns=0, end_ns=S) == []


# ------------------------------------------------------------------------------------------- laws

times = st.lists(st.integers(-5 * S, 15 * S), min_size=1, max_size=30, unique=True).map(sorted)
values = st.floats(0, 1e6)


@given(st.data())
def test_a_mean_lies_among_the_values(data: st.DataObject) -> None:
    points = [(at / S, data.draw(values)) for at in data.draw(times)]
    view = server(
        {"requests_running": points}, window=data.draw(st.sampled_from([None, (2 * S, 8 * S)]))
    )
    if view.running_mean is not None:
        inside = [value for at, value in points if 0 <= at <= 10]
        assert min(inside) <= view.running_mean <= view.running_max <= max(inside)


@given(times, st.floats(1, 2000), st.integers(0, 2 * S), st.integers(8 * S, 12 * S))
def test_steady_power_gives_its_energy(at: list[int], watts: float, start: int, end: int) -> None:
    readings = [Reading(t, "gpu_energy_j", (t + 5 * S) / S * watts, GPU) for t in at]
    for view in gpu_views(readings, start_ns=start, end_ns=end):
        if view.energy_j is not None:
            assert view.energy_j == pytest.approx(watts * (end - start) / S, rel=1e-6)


@given(times, st.lists(st.integers(0, 100), min_size=31, max_size=31), st.integers(1, 29))
def test_levels_side_by_side_add_up(at: list[int], steps: list[int], cut: int) -> None:
    total, points = 0, []
    for t, step in zip(at, steps, strict=False):
        total += step
        points.append((t, float(total)))
    middle = at[min(cut, len(at) - 1)]
    halves = [increase(bracket(points, *span)) for span in ((at[0], middle), (middle, at[-1]))]
    if None not in halves:
        assert sum(h for h in halves if h is not None) == increase(points)


@given(st.permutations(range(12)), st.lists(values, min_size=12, max_size=12))
def test_the_order_of_readings_does_not_matter(order: list[int], found: list[float]) -> None:
    readings = made({"requests_running": [(i, v) for i, v in enumerate(found)]})
    shuffled = [readings[i] for i in order]
    spans = {"start_ns": 0, "end_ns": 10 * S, "window": (2 * S, 9 * S)}
    assert server_view(shuffled, **spans) == server_view(readings, **spans)  # type: ignore[arg-type]
