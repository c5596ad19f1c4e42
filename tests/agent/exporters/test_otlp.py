"""Readings and verdicts in OTLP: names, units, times, buckets, attributes."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics, hw_metrics

from agent import __version__
from agent.exporters import Batch, histogram_of
from agent.exporters.otlp import (
    CONVENTIONS,
    POINTS_MAX,
    MetricsEncoder,
    Starts,
    assessment,
    otlp_name,
    otlp_unit,
)
from agent.metrics import CATALOGUE
from agent.model import Confidence, Reading, Reason, StoreError, Verdict
from tests.agent.exporters.samples import SECOND_NS, gpus, histogram, server

ANCHOR_NS = 1_800_000_100 * SECOND_NS
BEGAN_NS = 1_800_000_000 * SECOND_NS


def unix_ns(at_ns: int) -> int:
    return ANCHOR_NS + at_ns


def encode(*batches: Batch, encoder: MetricsEncoder | None = None) -> dict[str, Any]:
    """The metrics of one interval, by name."""
    encoder = encoder or MetricsEncoder({"host.name": "h"})
    [message] = encoder.encode(batches, unix_ns)
    [resource] = ExportMetricsServiceRequest.FromString(message.body).resource_metrics
    return {metric.name: metric for metric in resource.scope_metrics[0].metrics}


def attributes(point: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in point.attributes}


def test_conventions_are_named_as_opentelemetry_names_them() -> None:
    modules = (vars(hw_metrics), vars(gen_ai_metrics))
    known = {v for names in modules for v in names.values() if isinstance(v, str)}
    for convention in CONVENTIONS.values():
        assert set(convention.names) == {"v1.41", "latest"}
        assert convention.names["v1.41"] in known


@pytest.mark.parametrize("semconv", ["v1.41", "latest"])
def test_no_two_series_have_one_name(semconv: Any) -> None:
    families = {part[0] if (part := histogram_of(name)) else name for name in CATALOGUE}
    names = [otlp_name(name, semconv) for name in families]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("servefit.", "hw.", "gen_ai.")) for name in names)


@pytest.mark.parametrize(
    ("canonical", "name", "unit"),
    [
        ("kv_usage_ratio", "servefit.kv_usage", "1"),
        ("requests_running", "servefit.requests_running", ""),
        ("output_tokens_total", "servefit.output_tokens", "{token}"),
        ("queue_seconds", "servefit.queue", "s"),
        ("gpu_power_w", "hw.power", "W"),
        ("gpu_energy_j", "hw.energy", "J"),
        ("gpu_memory_used_bytes", "hw.gpu.memory.usage", "By"),
        ("gpu_throttled", "servefit.gpu_throttled", ""),
        ("ttft_seconds", "gen_ai.server.time_to_first_token", "s"),
    ],
)
def test_names_have_no_unit_in_them(canonical: str, name: str, unit: str) -> None:
    assert (otlp_name(canonical, "v1.41"), otlp_unit(canonical)) == (name, unit)


def test_a_gauge_says_when_and_of_whom() -> None:
    [point] = encode(server(3))["servefit.requests_running"].gauge.data_points
    assert (point.time_unix_nano, point.as_double) == (ANCHOR_NS + 3 * SECOND_NS, 3.0)
    assert attributes(point) == {
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "server.address": "127.0.0.1",
        "server.port": "8000",
        "servefit.source": "chat",
    }


def test_hardware_carries_its_id_and_type() -> None:
    metrics = encode(gpus(5))
    [power] = metrics["hw.power"].gauge.data_points
    assert attributes(power) == {"hw.id": "GPU-1", "hw.type": "gpu", "servefit.source": "gpu"}
    [busy] = metrics["hw.gpu.utilization"].gauge.data_points
    assert attributes(busy)["hw.gpu.task"] == "general"
    memory = metrics["hw.gpu.memory.usage"].sum
    assert (memory.is_monotonic, memory.aggregation_temporality) == (False, 2)
    energy = metrics["hw.energy"].sum
    assert (energy.is_monotonic, energy.aggregation_temporality) == (True, 2)


def test_the_resource_says_who_sends() -> None:
    encoder = MetricsEncoder({"host.name": "h", "service.name": "mine"})
    [message] = encoder.encode([gpus(1)], unix_ns)
    request = ExportMetricsServiceRequest.FromString(message.body)
    assert attributes(request.resource_metrics[0].resource) == {
        "host.name": "h",
        "service.name": "mine",
        "service.version": __version__,
    }
    scope = request.resource_metrics[0].scope_metrics[0]
    assert scope.schema_url.endswith("1.41.0")
    assert (scope.scope.name, scope.scope.version) == ("servefit", __version__)


def test_a_histogram_keeps_its_buckets() -> None:
    metric = encode(server(2))["gen_ai.server.time_to_first_token"]
    assert (metric.unit, metric.histogram.aggregation_temporality) == ("s", 2)
    [point] = metric.histogram.data_points
    assert list(point.explicit_bounds) == [0.1, 0.5]
    assert list(point.bucket_counts) == [2, 2, 2]
    assert (point.count, point.sum) == (6, 0.5)
    assert point.start_time_unix_nano == BEGAN_NS
    assert "servefit.le" not in attributes(point)


def test_a_histogram_without_buckets_is_one_bucket() -> None:
    readings = [r for r in histogram("ttft_seconds", 0, (1, 2, 3), 0.9) if "bucket" not in r.name]
    [point] = encode(Batch("s", readings))[
        "gen_ai.server.time_to_first_token"
    ].histogram.data_points
    assert (list(point.explicit_bounds), list(point.bucket_counts), point.sum) == ([], [3], 0.9)


@pytest.mark.parametrize(
    "readings",
    [
        histogram("ttft_seconds", 0, (5, 2, 3), 0.9),  # torn
        histogram("ttft_seconds", 0, (1, 2, math.nan), math.nan)[:2],
        [Reading(0, "ttft_seconds_sum", 1.0)],
        [Reading(0, "requests_running", math.nan), Reading(0, "kv_usage_ratio", math.inf)],
        [Reading(0, "not_of_the_catalogue", 1.0)],
    ],
    ids=["torn", "no count", "sum alone", "no number", "unknown"],
)
def test_what_cannot_be_said_rightly_is_left_out(readings: list[Reading]) -> None:
    assert MetricsEncoder({}).encode([Batch("s", readings)], unix_ns) == []


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.randoms())
def test_buckets_come_out_as_they_went_in(counts: list[int], order: Any) -> None:
    bounds = [0.1 * (n + 1) for n in range(len(counts) - 1)]
    running = [sum(counts[: n + 1]) for n in range(len(counts))]
    readings = [
        Reading(0, "ttft_seconds_bucket", n, (("le", bound),))
        for bound, n in zip([*map(repr, bounds), "+Inf"], running, strict=True)
    ]
    readings += [Reading(0, "ttft_seconds_sum", 1.5), Reading(0, "ttft_seconds_count", running[-1])]
    order.shuffle(readings)
    [point] = encode(Batch("s", readings))[
        "gen_ai.server.time_to_first_token"
    ].histogram.data_points
    assert list(point.bucket_counts) == counts
    assert list(point.explicit_bounds) == bounds
    assert point.count == sum(counts)


def test_histograms_of_several_label_sets_stay_apart() -> None:
    def one(engine: str, n: int) -> list[Reading]:
        return [
            msgspec.structs.replace(r, labels=tuple(sorted((*r.labels, ("rank", engine)))))
            for r in histogram("ttft_seconds", 0, (n, n, n), 1.0)
        ]

    metric = encode(Batch("s", [*one("0", 1), *one("1", 5)]))["gen_ai.server.time_to_first_token"]
    assert {attributes(p)["servefit.rank"]: p.count for p in metric.histogram.data_points} == {
        "0": 1,
        "1": 5,
    }


def test_hostile_labels_are_only_text() -> None:
    labels = (("model", 'a"\n\\{}\ud800' + "x" * 10_000), ("we\ud800ird", ""))
    [point] = encode(Batch("s\udfff", [Reading(0, "requests_running", 1.0)], labels))[
        "servefit.requests_running"
    ].gauge.data_points
    said = attributes(point)
    assert said["servefit.source"] == "s?"
    assert said["gen_ai.request.model"].startswith('a"\n\\{}?xxx')
    assert len(said["gen_ai.request.model"]) < 5000
    assert said["servefit.we?ird"] == ""


def test_large_intervals_are_several_requests() -> None:
    batches = [gpus(1, f"GPU-{n}") for n in range(POINTS_MAX // 3)]
    messages = MetricsEncoder({}).encode(batches, unix_ns)
    assert sum(message.points for message in messages) == 7 * len(batches)
    assert all(message.points <= POINTS_MAX for message in messages)
    assert all(len(message.body) < 1_000_000 for message in messages)


def test_the_same_readings_are_the_same_bytes() -> None:
    first, second = (
        MetricsEncoder({"b": "1", "a": "2"}).encode([server(4), gpus(4)], unix_ns) for _ in range(2)
    )
    assert first == second


# ----------------------------------------------------------------------------------------- starts


def start(metrics: dict[str, Any], name: str = "hw.energy") -> int:
    [point] = metrics[name].sum.data_points
    return int(point.start_time_unix_nano)


def test_a_servers_counters_start_with_its_process() -> None:
    encoder = MetricsEncoder({})
    for k in (5, 6):
        assert start(encode(server(k), encoder=encoder), "servefit.output_tokens") == BEGAN_NS
    restarted = server(7, start_unix_s=1_800_000_105.5)
    assert start(encode(restarted, encoder=encoder), "servefit.output_tokens") == (
        1_800_000_105_500_000_000
    )
    assert encoder.take_state() is not None


def test_a_counter_of_unknown_age_starts_when_it_is_first_seen_and_again_when_it_falls() -> None:
    encoder = MetricsEncoder({})
    starts = [start(encode(gpus(k), encoder=encoder)) for k in (10, 11, 12)]
    assert starts == [unix_ns(10 * SECOND_NS)] * 3
    fallen = Batch("gpu", [Reading(13 * SECOND_NS, "gpu_energy_j", 0.5, (("gpu", "GPU-1"),))])
    assert start(encode(fallen, encoder=encoder)) == unix_ns(12 * SECOND_NS)


def test_a_restart_of_the_agent_changes_no_start() -> None:
    before = MetricsEncoder({})
    first = start(encode(gpus(10), encoder=before))
    state = before.take_state()
    assert state is not None
    encode(gpus(11), encoder=before)
    assert before.take_state() is None  # nothing new to keep
    after = MetricsEncoder({}, state=state)
    assert start(encode(gpus(12), encoder=after)) == first
    reset = MetricsEncoder({}, state=state)
    assert start(encode(gpus(1), encoder=reset)) != first


def test_state_that_is_damaged_says_so() -> None:
    with pytest.raises(StoreError, match="start times"):
        Starts(b"\xc1 nonsense")


def test_a_server_whose_clock_is_ahead_starts_no_point_after_itself() -> None:
    metrics = encode(server(1, start_unix_s=1_900_000_000.0))
    [point] = metrics["servefit.output_tokens"].sum.data_points
    assert point.start_time_unix_nano <= point.time_unix_nano


@given(st.lists(st.tuples(st.integers(-50, 100), st.integers(0, 5)), min_size=1, max_size=50))
def test_a_start_moves_only_when_the_counter_falls(steps: list[tuple[int, int]]) -> None:
    starts, at_ns, last = Starts(), 1000, None
    for jump, value in steps:
        at_ns = max(1, at_ns + jump)  # the wall clock may be set back
        found = starts.of(("s", "n", ()), at_ns, value, None)
        assert found <= at_ns
        if last is not None and value >= last[1] and at_ns >= last[2]:
            assert found == last[0] or last[0] == last[2]
        last = (found, value, at_ns)


def test_series_that_are_gone_are_forgotten() -> None:
    starts = Starts()
    for n in range(100):
        starts.of(("s", str(n), ()), 1, 0.0, None)
    starts.of(("s", "new", ()), 8 * 24 * 3600 * SECOND_NS, 0.0, None)
    assert starts.dump() is not None
    assert len(starts._series) == 1


# ------------------------------------------------------------------------------------ assessments


def test_a_verdict_is_a_span_with_its_reasons_as_events() -> None:
    verdict = Verdict(
        finding="RIGHT_SIZED",
        summary="It fits.",
        confidence=Confidence("low", "one run"),
        reasons=[Reason("KV_MEMORY", "full.", {"max": 0.99, "nested": {"n": 1}, "l": [1, 2]})],
        capacity={"rps": None, "streams": 16, "ok": True},
        rests_on=["a", "b"],
    )

    def made() -> Any:
        return assessment(
            verdict,
            server="chat",
            start_unix_ns=5,
            end_unix_ns=9,
            resource={"host.name": "h"},
            ids=random.Random(4),
        )

    message = made()
    assert made() == message
    request = ExportTraceServiceRequest.FromString(message.body)
    assert attributes(request.resource_spans[0].resource)["service.name"] == "servefit"
    [span] = request.resource_spans[0].scope_spans[0].spans
    assert (span.name, span.start_time_unix_nano, span.end_time_unix_nano) == ("assessment", 5, 9)
    assert (len(span.trace_id), len(span.span_id), span.parent_span_id) == (16, 8, b"")
    said = attributes(span)
    assert said["servefit.source"] == "chat"
    assert said["servefit.finding"] == "RIGHT_SIZED"
    assert said["servefit.confidence.limited_by"] == "one run"
    assert said["servefit.capacity.streams"] == 16
    assert said["servefit.capacity.ok"] is True
    assert "servefit.capacity.rps" not in said
    assert [v.string_value for v in said["servefit.rests_on"].values] == ["a", "b"]
    [event] = span.events
    assert attributes(event) == {
        "servefit.reason.code": "KV_MEMORY",
        "servefit.reason.because": "full.",
        "servefit.reason.evidence.max": 0.99,
        "servefit.reason.evidence.nested.n": 1,
        "servefit.reason.evidence.l": "[1, 2]",
    }
