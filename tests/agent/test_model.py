"""The nouns go to JSON and back, under the names the contract gives them."""

from __future__ import annotations

import json
import typing
from typing import Any

import msgspec
import pytest

from agent.model import (
    GpuView,
    Lag,
    Level,
    Measurement,
    Requests,
    Run,
    ServefitError,
    ServerView,
    Slo,
    Stats,
    StoreError,
    Sweep,
    Target,
    TargetError,
    Tokens,
    UsageError,
    Workload,
    decode_sweep,
    encode,
)


def sweep(**changes: Any) -> Sweep:
    level = Level(
        concurrency=8,
        started_at="2026-01-02T03:04:05.000Z",
        duration_s=10.0,
        requests=Requests(9, 1, 0, {"http_503": 1}),
        tokens=Tokens(100, 50, 5, "usage"),
        output_tokens_per_s=5.0,
        output_tokens_per_s_ci95=(4.5, 5.5),
        ttft_ms=Stats(1, 2, 3, 4, 5, 6, 7, 8, 9),
        measurement=Measurement(True, [], Lag(0.1, 0.2, 0.3)),
        server=ServerView(running_mean=7.5, samples=4),
        gpu=[GpuView("GPU-1", energy_j=3.0)],
    )
    whole = Sweep(
        run=Run("r1", "2026-01-02T03:04:05Z", "loadgen sweep", 1, "0.1.0", "host"),
        target=Target("http://h:1", "m"),
        workload=Workload("chat", "256", "128"),
        slo=[Slo("ttft", "p95", 500.0)],
        levels=[level],
    )
    return msgspec.structs.replace(whole, **changes)


def test_a_sweep_survives_its_own_json() -> None:
    assert decode_sweep(encode(sweep())) == sweep()
    assert decode_sweep(encode(sweep(levels=[]))) == sweep(levels=[])


def test_another_tools_numbers_are_a_level_too() -> None:
    data = json.loads(encode(sweep()))
    data["levels"] = [
        {"concurrency": 4, "output_tokens_per_s": 90.5, "ttft_ms": {"mean": 20}, "extra": [1]}
    ]
    level = decode_sweep(json.dumps(data).encode()).levels[0]
    assert (level.concurrency, level.output_tokens_per_s, level.ttft_ms.mean) == (4, 90.5, 20)
    assert level.itl_ms == Stats()
    assert level.measurement is None


def test_what_was_not_measured_is_null_and_never_left_out_or_zero() -> None:
    written = json.loads(encode(Level(concurrency=1)))
    assert written["output_tokens_per_s"] is None
    assert written["ttft_ms"] == {
        "mean": None, "std": None, "p50": None, "p90": None, "p95": None, "p99": None,
        "p999": None, "max": None, "n": 0,
    }  # fmt: skip
    assert (written["server"], written["gpu"]) == (None, [])


def test_a_number_that_is_none_becomes_null_not_NaN() -> None:
    assert encode([float("nan"), float("inf")]) == b"[null,null]"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "schema_version 1"),
        (b"[]", "schema_version 1"),
        (b"{}", "levels"),
        (b'{"run": 5, "levels": []}', "run"),
        (b"\xff", "schema_version 1"),
    ],
)
def test_what_is_no_sweep_is_a_usage_error_that_says_where(data: bytes, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        decode_sweep(data)


def test_a_level_has_every_field_of_the_contract() -> None:
    contract = {
        "mode", "concurrency", "offered_rps", "started_at", "duration_s", "requests", "tokens",
        "request_throughput", "output_tokens_per_s", "total_tokens_per_s",
        "output_tokens_per_s_ci95", "ttft_ms", "ttft_from_due_ms", "ttfo_ms", "itl_ms", "tpot_ms",
        "e2e_ms", "goodput_rps", "slo_attainment", "measurement", "server", "gpu",
        "energy_j_per_output_token", "cost_usd_per_million_output_tokens",
    }  # fmt: skip
    assert contract <= set(Level.__struct_fields__)
    assert {
        "valid", "reasons", "send_lag_ms", "loop_lag_ms", "client_cpu", "achieved_over_offered",
        "in_flight_mean", "littles_law_error", "foreign_requests",
    } <= set(Measurement.__struct_fields__)  # fmt: skip
    assert set(Sweep.__struct_fields__) == {
        "schema_version", "run", "target", "workload", "slo", "levels", "curve", "verdict",
    }  # fmt: skip
    assert typing.get_type_hints(Sweep)["schema_version"] is int
    assert json.loads(encode(sweep()))["schema_version"] == 1


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (TargetError, 4), (StoreError, 2)])
def test_every_error_of_ours_has_its_exit_code(error: type[ServefitError], code: int) -> None:
    assert issubclass(error, ServefitError)
    assert error.exit_code == code
