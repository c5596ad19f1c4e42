"""The closed form: laws, and agreement with the same engine played step by step."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.model import UsageError
from agent.sizing.engine import (
    Cost,
    Efficiencies,
    EngineSpec,
    attention_flops,
    decode_step_seconds,
    prefill_seconds,
    sequences_that_fit,
)
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.simulate import closed_loop
from agent.sizing.steady import Steady, steady

H100 = gpu("h100-sxm")
LLAMA = EngineSpec(H100, model("llama-3.1-8b"))
MOE = EngineSpec(H100, model("gpt-oss-20b"), precision="mxfp4")
MLA = EngineSpec(gpu("h200-sxm"), model("deepseek-v3"), precision="fp8", tp=8)
TWO = EngineSpec(H100, model("llama-3.1-70b"), tp=2)
SPECS = [LLAMA, MOE, MLA, TWO]
NAMES = ["dense", "moe", "mla", "tp2"]

# A busy machine's pauses say nothing about a formula.
formula = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
lengths = st.integers(1, 8000)
clients = st.floats(0.1, 2000)


def test_one_client_is_prefill_and_steps() -> None:
    one = steady(LLAMA, 1, 1024, 256)
    step_s = decode_step_seconds(LLAMA, 1, 1024 + 128)
    assert one.tpot_ms == pytest.approx(1e3 * step_s)
    assert one.ttft_ms == pytest.approx(1e3 * prefill_seconds(LLAMA, 1024))
    flops = 2 * LLAMA.model.params_active * 1024 + attention_flops(LLAMA.model, 0, 1024)
    prompt_s = flops / (0.55 * 989e12)
    assert one.output_tokens_per_s == pytest.approx(1 / (step_s + prompt_s / 256))
    assert (one.decoding, one.waiting, one.fits, one.kv_bound) == (1, 0, True, False)


def test_the_batch_is_what_fits_and_the_rest_waits() -> None:
    fit = sequences_that_fit(TWO, 1024, 256)
    many = steady(TWO, 100, 1024, 256)
    assert many.decoding == many.sequences_that_fit == fit < 30
    assert many.waiting == pytest.approx(100 - fit)
    assert many.kv_bound
    assert not many.fits
    queue_ms = 1e3 * many.waiting * 256 / many.output_tokens_per_s
    assert many.ttft_ms > queue_ms > 20_000
    assert steady(LLAMA, 300, 1024, 256).decoding == LLAMA.max_num_seqs
    assert not steady(LLAMA, 300, 1024, 256).kv_bound


def test_short_replies_to_long_prompts_are_admitted_by_the_token_budget() -> None:
    assert steady(LLAMA, 200, 2000, 20).decoding == pytest.approx(8192 / 101)


@pytest.mark.parametrize("spec", [LLAMA, MOE, TWO], ids=["dense", "moe", "tp2"])
@pytest.mark.parametrize(("isl", "osl"), [(128, 128), (1024, 128), (4096, 256)])
@pytest.mark.parametrize("concurrency", [1, 4, 16, 100])
def test_it_agrees_with_the_engine_step_by_step(
    spec: EngineSpec, isl: int, osl: int, concurrency: int
) -> None:
    """Within what the sum of prefill and decode leaves out (their overlap), and preemptions."""
    said = steady(spec, concurrency, isl, osl)
    request_s = (said.ttft_ms + osl * said.tpot_ms) / 1e3
    seen = closed_loop(spec, concurrency, isl, osl, 4 * request_s)
    exact = 0.03 if concurrency <= 4 else 0.25
    assert said.output_tokens_per_s == pytest.approx(seen.output_tokens_per_s, rel=exact)
    assert seen.tpot_ms.mean is not None
    assert seen.ttft_ms.mean is not None
    assert said.tpot_ms == pytest.approx(seen.tpot_ms.mean, rel=exact + 0.1)
    assert said.ttft_ms == pytest.approx(seen.ttft_ms.mean, rel=0.35)


# ------------------------------------------------------------------------------------------- laws


def _more(spec: EngineSpec, **change: Any) -> EngineSpec:
    return msgspec.structs.replace(spec, gpu=msgspec.structs.replace(spec.gpu, **change))


def _not_slower(better: Steady, worse: Steady) -> None:
    edge = 1 - 1e-9
    assert better.output_tokens_per_s >= worse.output_tokens_per_s * edge
    assert better.ttft_ms * edge <= worse.ttft_ms
    assert better.tpot_ms * edge <= worse.tpot_ms


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@formula
@given(concurrency=clients, isl=lengths, osl=lengths, factor=st.floats(1, 4))
def test_more_bandwidth_or_arithmetic_is_never_slower(
    spec: EngineSpec, concurrency: float, isl: int, osl: int, factor: float
) -> None:
    base = steady(spec, concurrency, isl, osl)
    wider = _more(spec, bandwidth_bytes_per_s=spec.gpu.bandwidth_bytes_per_s * factor)
    faster = _more(spec, flops={name: rate * factor for name, rate in spec.gpu.flops.items()})
    for better in (wider, faster):
        _not_slower(steady(better, concurrency, isl, osl), base)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@formula
@given(concurrency=clients, isl=lengths, osl=lengths, factor=st.floats(1, 4))
def test_more_memory_never_holds_less(
    spec: EngineSpec, concurrency: float, isl: int, osl: int, factor: float
) -> None:
    base = steady(spec, concurrency, isl, osl)
    larger = steady(_more(spec, memory_bytes=spec.gpu.memory_bytes * factor), concurrency, isl, osl)
    assert larger.sequences_that_fit >= base.sequences_that_fit
    assert larger.output_tokens_per_s >= base.output_tokens_per_s * (1 - 1e-9)
    assert larger.waiting <= base.waiting
    assert base.kv_bound or not larger.kv_bound


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@formula
@given(concurrency=clients, isl=lengths, osl=lengths, factor=st.floats(1, 10))
def test_more_clients_never_write_less_in_all_nor_wait_less_each(
    spec: EngineSpec, concurrency: float, isl: int, osl: int, factor: float
) -> None:
    few, many = (steady(spec, c, isl, osl) for c in (concurrency, concurrency * factor))
    assert many.output_tokens_per_s >= few.output_tokens_per_s * (1 - 1e-9)
    assert many.tpot_ms >= few.tpot_ms * (1 - 1e-9)
    assert many.ttft_ms >= few.ttft_ms * (1 - 1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@formula
@given(concurrency=clients, isl=lengths, osl=lengths)
def test_nothing_is_faster_than_the_data_sheet(
    spec: EngineSpec, concurrency: float, isl: int, osl: int
) -> None:
    flops = spec.gpu.flops_per_s(spec.precision) * spec.tp
    said = steady(spec, concurrency, isl, osl)
    assert said.output_tokens_per_s * 2 * spec.model.params_active <= flops
    assert all(math.isfinite(one) and one > 0 for one in (said.ttft_ms, said.tpot_ms))


@formula
@given(concurrency=clients, isl=lengths, osl=lengths)
def test_worse_efficiencies_are_never_faster(concurrency: float, isl: int, osl: int) -> None:
    worse = msgspec.structs.replace(LLAMA, efficiencies=Efficiencies(0.003, 0.6, 0.4, 0.4))
    _not_slower(steady(LLAMA, concurrency, isl, osl), steady(worse, concurrency, isl, osl))


@formula
@given(concurrency=st.floats(1, 200), isl=st.integers(1, 2000), osl=st.integers(8, 2000))
def test_two_gpus_are_faster_than_one_and_less_than_twice_as_fast(
    concurrency: float, isl: int, osl: int
) -> None:
    """Where the cache holds all clients: beyond that, memory is what twice as many GPUs add."""
    one, two = (
        steady(msgspec.structs.replace(LLAMA, tp=tp), concurrency, isl, osl) for tp in (1, 2)
    )
    if one.fits:
        assert one.output_tokens_per_s < two.output_tokens_per_s < 2 * one.output_tokens_per_s


def test_prompt_time_grows_faster_than_its_length() -> None:
    cost = Cost(LLAMA)
    assert cost.prompt_s(2000) > 2 * cost.prompt_s(1000) > 0


@pytest.mark.parametrize(
    ("concurrency", "isl", "osl"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (math.nan, 1, 1)]
)
def test_an_impossible_load_is_refused(concurrency: float, isl: int, osl: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        steady(LLAMA, concurrency, isl, osl)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        steady(EngineSpec(gpu("l4"), model("llama-3.1-70b")), 1, 100, 100)
