"""Each limit rule: evidence that makes it speak, and the look-alike that keeps it silent."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from agent.model import Level, Measurement, Reason, Requests, ServerView, Stats
from agent.sizing import rules
from agent.sizing.curve import analyse, evidence
from agent.sizing.engine import EngineSpec, kv_capacity_tokens
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.simulate import closed_loop


def level(
    concurrency: int,
    tokens: float,
    *,
    ttft: float = 20.0,
    itl: float = 10.0,
    running: float | None = None,
    kv: float = 0.1,
    prefill: float | None = 20.0,
    queue: float = 0.0,
    **server: Any,
) -> Level:
    """100 output tokens a request; whatever does not run, waits."""
    busy = float(min(concurrency, running or concurrency))
    view: dict[str, Any] = {
        "running_mean": busy,
        "running_max": busy,
        "waiting_mean": concurrency - busy,
        "waiting_max": concurrency - busy,
        "kv_usage_mean": kv * 0.95,
        "kv_usage_max": kv,
        "preemptions": 0,
        "queue_ms": queue,
        "prefill_ms": prefill,
    }
    return Level(
        concurrency=concurrency,
        output_tokens_per_s=tokens,
        output_tokens_per_s_ci95=(tokens * 0.99, tokens * 1.01),
        request_throughput=tokens / 100,
        requests=Requests(100, 0, 0, {}),
        ttft_ms=Stats(mean=ttft, n=100),
        itl_ms=Stats(mean=itl, n=9900),
        measurement=Measurement(True, []),
        server=ServerView(**(view | server)),
    )


RISING = [level(1, 98), level(2, 192), level(4, 370), level(8, 690, itl=11)]

CAPPED = [
    *RISING,
    level(16, 700, ttft=900, itl=11, running=8, queue=900),
    level(32, 702, ttft=2900, itl=11, running=8, queue=2900),
]
KV_FULL = [
    *RISING,
    level(16, 1200, kv=0.6),
    level(32, 1500, ttft=500, itl=15, running=20, kv=0.98),
    level(64, 1510, ttft=2500, itl=15, running=20, kv=0.99, preemptions=3),
]
# 400 ms of prefill alone, 100 tokens of 10 ms: at 2.3 requests/s prefill has 90 % of the time.
PREFILL = [
    level(1, 70, ttft=400, prefill=400.0),
    level(2, 130, ttft=450, itl=12, prefill=450.0),
    level(4, 190, ttft=600, itl=18, prefill=600.0),
    level(8, 225, ttft=900, itl=32, prefill=900.0),
    level(16, 230, ttft=3000, itl=40, running=11, prefill=1300.0, queue=1700.0),
]
# The decode step is 5 ms + 0.5 ms a sequence: reads of weights and of each sequence's cache.
DECODE = [
    level(c, 1000 * c / (5 + 0.5 * c), itl=5 + 0.5 * c, kv=0.005 * c, prefill=6.0)
    for c in (1, 4, 16, 64, 128, 192)
]


def codes(levels: Sequence[Level]) -> list[str]:
    return [reason.code for reason in rules.limits(evidence(levels))]


def changed(levels: Sequence[Level], **server: Any) -> list[Level]:
    """The same curve, the server having said something else at every level."""
    return [
        msgspec.structs.replace(lv, server=msgspec.structs.replace(lv.server, **server))
        for lv in levels
        if lv.server is not None
    ]


@pytest.mark.parametrize(
    ("levels", "code"),
    [
        (KV_FULL, "KV_MEMORY"),
        (CAPPED, "ADMISSION_CAP"),
        (PREFILL, "COMPUTE_PREFILL"),
        (DECODE, "MEM_BANDWIDTH"),
    ],
)
def test_the_rule_speaks(levels: list[Level], code: str) -> None:
    assert codes(levels) == [code]
    assert analyse(levels).limit == code
    assert rules.missing(evidence(levels)) == [] or not analyse(levels).saturated


@pytest.mark.parametrize("levels", [RISING, KV_FULL[:5], PREFILL[:2], DECODE[:3], []])
def test_no_limit_is_claimed_while_throughput_grows(levels: list[Level]) -> None:
    assert codes(levels) == []


@pytest.mark.parametrize("levels", [KV_FULL, CAPPED, PREFILL, DECODE])
def test_no_server_metrics_no_limit(levels: list[Level]) -> None:
    blind = [msgspec.structs.replace(lv, server=None) for lv in levels]
    assert codes(blind) == []
    assert any("server metrics" in line for line in rules.missing(evidence(blind))) or (
        not analyse(blind).saturated
    )


def test_a_full_cache_with_nobody_waiting_is_no_kv_limit() -> None:
    assert "KV_MEMORY" not in codes(changed(KV_FULL, waiting_mean=0.0, preemptions=0))


def test_waiting_beside_a_cache_that_is_not_full_is_no_kv_limit() -> None:
    assert "KV_MEMORY" not in codes(changed(KV_FULL, kv_usage_max=0.7, preemptions=0))


def test_few_long_sequences_fill_the_cache_below_90_percent() -> None:
    long = [
        msgspec.structs.replace(lv, prompt_tokens=Stats(mean=900.0, n=100))
        for lv in changed(KV_FULL, kv_usage_max=0.8, preemptions=0, kv_capacity_tokens=4000)
    ]
    assert codes(long)[0] == "KV_MEMORY"


def test_a_cache_that_fills_after_the_batch_ceased_to_pay_is_no_kv_limit() -> None:
    # From a batch of 16 to one of 20 nothing was gained, so a larger cache would gain nothing.
    levels = [*KV_FULL[:4], level(16, 1500, kv=0.6), *KV_FULL[5:]]
    assert "KV_MEMORY" not in codes(changed(levels, preemptions=0, kv_usage_max=0.99))
    assert "KV_MEMORY" in codes(changed(levels, preemptions=5, kv_usage_max=0.99))


def test_a_batch_that_still_moves_is_no_admission_cap() -> None:
    moving = [
        msgspec.structs.replace(
            lv, server=msgspec.structs.replace(lv.server, running_max=float(8 + i))
        )
        for i, lv in enumerate(CAPPED)
    ]
    assert codes(moving) == []


def test_a_cap_beside_a_filling_cache_is_not_claimed() -> None:
    assert codes(changed(CAPPED, kv_usage_max=0.85)) == []


def test_a_plateau_may_begin_above_the_first_level_that_queues() -> None:
    """At 9 streams one request waits at times, and the batch is 7 in the mean."""
    just_above = level(9, 600, itl=11, running=8)
    (loose,) = changed([just_above], running_mean=7.0, waiting_mean=0.6)
    found = rules.limits(evidence([*RISING, loose, *CAPPED[-2:]]))
    assert [reason.code for reason in found] == ["ADMISSION_CAP"]
    assert found[0].evidence["plateau_levels"] == 2
    assert codes([*RISING, loose, *changed(CAPPED[-2:], running_mean=7.0)]) == []


def test_a_batch_that_still_moved_while_requests_waited_is_no_plateau() -> None:
    (moved,) = changed([level(9, 600, itl=11, running=8)], running_max=6.0, waiting_mean=3.0)
    assert codes([*RISING, moved, *CAPPED[-2:]]) == []


def test_a_plateau_at_which_the_batch_ceased_to_pay_is_no_admission_cap() -> None:
    # Half the batch gave the same throughput: a higher cap would queue inside instead of outside.
    flat = [level(1, 98), level(2, 192), level(4, 690), *CAPPED[3:]]
    assert "ADMISSION_CAP" not in codes(flat)


def test_prefill_as_short_as_a_decode_step_is_no_compute_limit() -> None:
    short = [
        msgspec.structs.replace(lv, itl_ms=Stats(mean=200.0, n=100)) if lv.concurrency == 1 else lv
        for lv in PREFILL
    ]
    assert "COMPUTE_PREFILL" not in codes(short)


def test_without_a_request_alone_the_cost_of_prefill_is_not_known() -> None:
    assert "COMPUTE_PREFILL" not in codes(PREFILL[1:])
    assert any("concurrency 1" in line for line in rules.missing(evidence(PREFILL[1:])))


def test_a_prefill_share_that_one_engine_cannot_have_is_not_believed() -> None:
    assert "COMPUTE_PREFILL" not in codes(
        [PREFILL[0], *[level(c, 700, ttft=900, prefill=900.0) for c in (4, 8, 16)]]
    )


def test_prompts_that_are_not_delayed_are_no_prefill_limit() -> None:
    quick = [PREFILL[0], *changed(PREFILL[1:], prefill_ms=450.0, queue_ms=0.0)]
    assert "COMPUTE_PREFILL" not in codes(quick)


def test_decode_steps_with_an_empty_cache_are_not_memory_reads() -> None:
    # A toy model on a CPU: throughput flat, nothing waits, the cache is almost empty.
    toy = changed(DECODE, kv_usage_mean=0.01, kv_usage_max=0.02)
    assert codes(toy) == []
    saturated = [*toy, level(768, 1950, itl=390, kv=0.02, prefill=6.0)]
    assert codes(saturated) == []
    assert any("device counters" in line for line in rules.missing(evidence(saturated)))


def test_a_step_in_proportion_to_the_batch_is_compute_not_memory() -> None:
    compute = [
        level(c, 1000 * c / max(5, 0.5 * c), itl=max(5, 0.5 * c), kv=0.005 * c, prefill=6.0)
        for c in (1, 4, 16, 64, 128, 192)
    ]
    assert codes(compute) == []


def test_the_client_is_blamed_only_where_it_hid_the_servers_end() -> None:
    lost = Measurement(False, ["client_limited: loop_lag_p99_ms 40 is above its bound 10"])
    invalid = [msgspec.structs.replace(level(c, 9999), measurement=lost) for c in (64, 128)]
    assert codes([*RISING, *invalid]) == ["CLIENT_LIMITED"]
    assert codes([*CAPPED, *invalid]) == ["ADMISSION_CAP"]
    foreign = Measurement(False, ["foreign_traffic: the server finished 9 requests"])
    other = [msgspec.structs.replace(lv, measurement=foreign) for lv in invalid]
    assert codes([*RISING, *other]) == []


def test_all_levels_lost_to_the_client() -> None:
    lost = Measurement(False, ["client_limited: client_cpu 1 is above its bound 0.9"])
    assert codes([msgspec.structs.replace(RISING[0], measurement=lost)]) == ["CLIENT_LIMITED"]


def test_the_order_is_the_policy() -> None:
    names = [rule.__name__ for rule in rules.LIMIT_RULES]
    assert names == [
        "client_limited", "kv_memory", "admission_cap", "compute_prefill", "mem_bandwidth",
    ]  # fmt: skip


def test_every_threshold_says_what_it_is() -> None:
    body = ast.parse(inspect.getsource(rules.Thresholds)).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [i for i, node in enumerate(body.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(rules.Thresholds.__struct_fields__)
    assert all(isinstance(body.body[i + 1], ast.Expr) for i in fields)


# --------------------------------------------------------------------------- numbers and evidence


def flat_numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from flat_numbers(inner)
    elif isinstance(value, int | float):
        yield float(value)


def quoted(reason: Reason) -> list[tuple[float, bool]]:
    """The numbers in the sentence, and whether each is a percentage."""
    found = re.findall(r"(?<![\w.-])(\d+(?:\.\d+)?)(\s?%)?", reason.because)
    return [(float(number), bool(percent)) for number, percent in found]


def assert_evidenced(reason: Reason) -> None:
    numbers = list(flat_numbers(reason.evidence))
    for value, percent in quoted(reason):
        scale, rounding = (100, 0.51) if percent else (1, 0.051)
        assert any(abs(n * scale - value) <= max(rounding, 5e-3 * value) for n in numbers), (
            value,
            reason,
        )


@pytest.mark.parametrize("levels", [KV_FULL, CAPPED, PREFILL, DECODE])
def test_every_number_in_the_sentence_stands_in_the_evidence(levels: list[Level]) -> None:
    for reason in rules.limits(evidence(levels)):
        assert quoted(reason)
        assert_evidenced(reason)
        assert reason.evidence["thresholds"]


def test_steady_load_leaves_room_for_bursts() -> None:
    for peak in (1.0, 8.0, 100.0):
        mean = rules.steady_load(peak, 1.645)
        assert mean + 1.645 * mean**0.5 == pytest.approx(peak)


# ---------------------------------------------------------------------- planted in the simulator


def simulated(spec: EngineSpec, loads: Sequence[int], prompt: int, output: int) -> list[Level]:
    """A sweep of the simulated engine in virtual time, as a real one would be written down."""
    return [_simulated(spec, load, prompt, output) for load in loads]


def _simulated(spec: EngineSpec, load: int, prompt: int, output: int) -> Level:
    once = closed_loop(spec, load, prompt, output, 0.0, ramp_s=0.0)
    seen = closed_loop(spec, load, prompt, output, 8e-3 * (once.e2e_ms.mean or 0.0))
    queue, ttft = seen.queue_ms.mean or 0.0, seen.ttft_ms.mean or 0.0
    return Level(
        concurrency=load,
        output_tokens_per_s=seen.output_tokens_per_s,
        request_throughput=seen.request_throughput,
        requests=Requests(seen.requests, 0, 0, {}),
        ttft_ms=seen.ttft_ms,
        itl_ms=seen.itl_ms,
        tpot_ms=seen.tpot_ms,
        e2e_ms=seen.e2e_ms,
        prompt_tokens=Stats(mean=float(prompt), n=seen.requests),
        measurement=Measurement(True, []),
        server=ServerView(
            running_mean=seen.running_mean,
            running_max=seen.running_max,
            waiting_mean=seen.waiting_mean,
            waiting_max=seen.waiting_max,
            kv_usage_mean=seen.kv_usage_mean,
            kv_usage_max=seen.kv_usage_max,
            preemptions=seen.preemptions,
            queue_ms=queue,
            prefill_ms=ttft - queue,
            decode_ms=(seen.e2e_ms.mean or 0.0) - ttft,
            kv_capacity_tokens=kv_capacity_tokens(spec),
        ),
    )


H100 = EngineSpec(gpu=gpu("H100-SXM-80GB"), model=model("llama-3.1-8b"))
WIDE = EngineSpec(gpu=gpu("H200-SXM-141GB"), model=model("llama-3.1-8b"), max_num_seqs=2048)
DOUBLING = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("spec", "loads", "prompt", "output", "limit"),
    [
        (msgspec.structs.replace(H100, num_gpu_blocks=1200), DOUBLING, 512, 128, "KV_MEMORY"),
        (
            msgspec.structs.replace(H100, num_gpu_blocks=500, max_model_len=4096),
            DOUBLING[:5], 2500, 300, "KV_MEMORY",
        ),
        (msgspec.structs.replace(H100, max_num_seqs=8), DOUBLING, 512, 128, "ADMISSION_CAP"),
        (
            msgspec.structs.replace(H100, gpu=gpu("L4"), max_num_batched_tokens=2048),
            DOUBLING[:6], 3000, 16, "COMPUTE_PREFILL",
        ),
        (WIDE, [1, 8, 32, 128, 256, 512], 128, 2000, "MEM_BANDWIDTH"),
        (H100, DOUBLING[:6], 512, 128, None),
    ],
    ids=["kv", "kv-long", "cap", "prefill", "bandwidth", "not-saturated"],
)  # fmt: skip
def test_planted_limits_are_found(
    spec: EngineSpec, loads: list[int], prompt: int, output: int, limit: str | None
) -> None:
    levels = simulated(spec, loads, prompt, output)
    assert analyse(levels).limit == limit
    for reason in rules.limits(evidence(levels)):
        assert_evidenced(reason)
