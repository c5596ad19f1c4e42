"""The capacity model: published points, and the laws its formulas have to keep."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import UsageError
from agent.sizing.engine import (
    Cost,
    Efficiencies,
    EngineSpec,
    active_weight_bytes,
    attention_flops,
    check,
    decode_step_seconds,
    kv_blocks,
    kv_bytes,
    kv_bytes_per_token,
    kv_capacity_tokens,
    kv_pool_bytes,
    max_model_len,
    prefill_seconds,
    sequences_that_fit,
    step_seconds,
    weight_bytes,
)
from agent.sizing.hardware import GIB, gpu
from agent.sizing.models import from_config, model, models

H100 = gpu("h100-sxm")
LLAMA = model("llama-3.1-8b")
SPEC = EngineSpec(H100, LLAMA)
MOE = EngineSpec(H100, model("gpt-oss-20b"), precision="mxfp4")


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("deepseek-v3", 70_272),  # 61 · 576 · 2
        ("llama-3.1-8b", 131_072),  # 2 · 32 · 8 · 128 · 2
        ("llama-3.1-70b", 327_680),
        ("qwen2.5-7b", 57_344),
        ("mixtral-8x7b", 131_072),
    ],
)
def test_kv_bytes_per_token(name: str, per_token: int) -> None:
    assert kv_bytes_per_token(model(name)) == per_token
    assert kv_bytes_per_token(model(name), "fp8") == per_token / 2


def test_kv_under_tensor_parallelism() -> None:
    """Grouped heads are split until there are none left to split; the latent vector never is."""
    assert kv_bytes_per_token(LLAMA, tp=8) == 131_072
    assert kv_bytes_per_token(LLAMA, tp=16) == 2 * 131_072
    assert kv_bytes_per_token(model("deepseek-v3"), tp=8) == 8 * 70_272


def test_a_window_caps_the_sliding_layers_only() -> None:
    shape = model("gpt-oss-20b")
    layer = 2 * 8 * 64 * 2
    assert kv_bytes(shape, 100) == 24 * layer * 100
    assert kv_bytes(shape, 10_000) == 12 * layer * 10_000 + 12 * layer * 128


def test_weights() -> None:
    assert weight_bytes(LLAMA) == 2 * LLAMA.params_total
    assert weight_bytes(LLAMA, "fp8") < 0.6 * weight_bytes(LLAMA)
    # The checkpoints on the hub: 13.8 GB and 65.2 GB.
    assert weight_bytes(model("gpt-oss-20b"), "mxfp4") / 1e9 == pytest.approx(13.8, rel=0.02)
    assert weight_bytes(model("gpt-oss-120b"), "mxfp4") / 1e9 == pytest.approx(65.2, rel=0.02)


def test_a_step_reads_the_experts_it_needs() -> None:
    shape = model("mixtral-8x7b")
    one = active_weight_bytes(shape, "bf16", 1)
    assert one == pytest.approx(2 * shape.params_active, rel=1e-9)
    assert active_weight_bytes(shape, "bf16", 1000) == pytest.approx(weight_bytes(shape))
    assert active_weight_bytes(LLAMA, "bf16", 1) == weight_bytes(LLAMA)


def test_kv_pool_of_a_known_server() -> None:
    """vLLM gives Llama-3.1-8B on an 80 GB H100 about 450,000 tokens of cache."""
    pool = kv_pool_bytes(SPEC)
    assert pool == pytest.approx(0.9 * 80 * GIB - 1.5 * GIB - weight_bytes(LLAMA))
    assert kv_capacity_tokens(SPEC) == pytest.approx(450_000, rel=0.03)
    assert max_model_len(SPEC) == 131_072
    assert sequences_that_fit(SPEC, 1024, 1024) == pytest.approx(454_992 / 1536, rel=1e-4)


def test_llama_70b_needs_gib() -> None:
    """Two 80 GB cards hold it, with room for a few dozen sequences; four hold 15 times as many."""
    two = EngineSpec(H100, model("llama-3.1-70b"), tp=2)
    four = msgspec.structs.replace(two, tp=4)
    assert sequences_that_fit(two, 128, 2048) < 40
    assert kv_blocks(four) > 12 * kv_blocks(two)


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"131\.4 GiB.*70\.5 GiB can be used"):
        check(EngineSpec(H100, model("llama-3.1-70b")))
    with pytest.raises(UsageError, match="does not fit"):
        check(EngineSpec(gpu("l4"), model("llama-3.1-70b"), num_gpu_blocks=1000))


def test_sliding_layers_leave_more_blocks() -> None:
    shape = model("gpt-oss-20b")
    all_full = msgspec.structs.replace(shape, sliding_layers=0, window=0)
    assert 1.9 < kv_blocks(MOE) / kv_blocks(msgspec.structs.replace(MOE, model=all_full)) < 2


def test_a_model_of_sliding_layers_only_counts_as_full() -> None:
    shape = msgspec.structs.replace(LLAMA, sliding_layers=32, window=4096)
    assert kv_blocks(msgspec.structs.replace(SPEC, model=shape)) == kv_blocks(SPEC)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tp": 0}, "tp"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"num_gpu_blocks": 0}, "num_gpu_blocks"),
        ({"max_num_batched_tokens": 100}, "max_num_batched_tokens"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization"),
        ({"precision": "bf17"}, "precision"),
        ({"kv_precision": "int3"}, "KV precision"),
        ({"num_gpu_blocks": 10, "max_model_len": 161}, "max_model_len"),
        ({"efficiencies": Efficiencies(eta_b=0.0)}, "eta_b"),
        ({"efficiencies": Efficiencies(t0_s=-1.0)}, "t0"),
    ],
)
def test_a_spec_that_cannot_start_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check(msgspec.structs.replace(SPEC, **change))


def test_every_model_can_be_asked_about() -> None:
    for shape in models().values():
        check(EngineSpec(gpu("b200"), shape, tp=16))


# ------------------------------------------------------------------------------------------ times


def test_decode_at_batch_1_is_the_time_to_read_the_weights() -> None:
    expected = 0.0015 + (weight_bytes(LLAMA) + 131_072 * 500) / (0.8 * 3.35e12)
    assert decode_step_seconds(SPEC, 1, 500) == pytest.approx(expected, rel=1e-12)


def test_decode_of_a_large_batch_is_bound_by_arithmetic() -> None:
    b = 5000
    expected = 0.0015 + 2 * LLAMA.params_active * b / (0.6 * 989e12)
    assert decode_step_seconds(SPEC, b, 10) == pytest.approx(expected, rel=1e-12)


def test_prefill_is_the_published_formula() -> None:
    """2·params·ISL + 2·layers·heads·head_dim·ISL², and (1 - hit²) of the second with a hit."""
    tokens = 4096
    attention = 2 * 32 * 32 * 128 * tokens**2
    flops = 2 * LLAMA.params_active * tokens + attention
    assert prefill_seconds(SPEC, tokens) == pytest.approx(0.0015 + flops / (0.55 * 989e12))
    assert attention_flops(LLAMA, tokens / 2, tokens) == pytest.approx(attention * (1 - 0.25))
    half = prefill_seconds(SPEC, tokens, hit_ratio=0.5)
    flops = LLAMA.params_active * tokens + attention * 0.75
    assert half == pytest.approx(0.0015 + flops / (0.55 * 989e12))
    assert prefill_seconds(SPEC, tokens, hit_ratio=1.0) == 0


def test_a_short_prefill_is_the_time_to_read_the_weights() -> None:
    expected = 0.0015 + weight_bytes(LLAMA) / (0.8 * 3.35e12)
    assert prefill_seconds(SPEC, 1) == pytest.approx(expected)


def test_a_window_caps_attention() -> None:
    shape = msgspec.structs.replace(LLAMA, sliding_layers=32, window=100)
    per_pair = 4 * 32 * 128 * 32
    assert attention_flops(shape, 0, 100) == pytest.approx(per_pair * 100**2 / 2)
    assert attention_flops(shape, 100, 300) == pytest.approx(per_pair * 200 * 100)


def test_communication_costs_and_tensor_parallelism_still_pays() -> None:
    shape = model("llama-3.1-70b")
    nvlink = [
        decode_step_seconds(EngineSpec(gpu("b200"), shape, tp=tp), 16, 1000) for tp in (1, 2, 8)
    ]
    assert nvlink[0] > nvlink[1] > nvlink[2] > nvlink[0] / 8
    pcie = EngineSpec(gpu("l40s"), LLAMA, tp=4)
    linked = msgspec.structs.replace(
        pcie, gpu=msgspec.structs.replace(pcie.gpu, interconnect_bytes_per_s=900e9)
    )
    args = (16, 16_000, 1024, 0.0)
    assert step_seconds(pcie, *args) > 1.05 * step_seconds(linked, *args)


def test_published_decode_rates_are_near() -> None:
    """ML.ENERGY, Qwen3-14B on an H100: 627 tokens/s at batch 8, 3,140 at 64 (unfitted model)."""
    spec = EngineSpec(H100, model("qwen3-14b"))
    for batch, published in ((8, 627), (64, 3140)):
        rate = batch / decode_step_seconds(spec, batch, 1500)
        assert rate == pytest.approx(published, rel=0.2)


SLIDING = EngineSpec(
    H100,
    from_config(
        {
            "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 256,
            "vocab_size": 1000, "sliding_window": 64, "sliding_window_pattern": 4,
        }
    ),
)  # fmt: skip
# Arithmetic and memory nearly equal, so that a run of steps crosses from one to the other.
CROSSING = EngineSpec(H100, model("llama-3.2-1b"), efficiencies=Efficiencies(eta_b=1.0, eta_c=0.12))


@pytest.mark.parametrize("spec", [SPEC, MOE, SLIDING, CROSSING], ids=["dense", "moe", "swa", "x"])
@given(
    b=st.integers(1, 300),
    mean=st.floats(1, 3000),
    steps=st.integers(1, 200),
    share=st.floats(0.001, 1.5),
)
def test_many_steps_at_once_are_as_many_single_ones(
    spec: EngineSpec, b: int, mean: float, steps: int, share: float
) -> None:
    cost, context = Cost(spec), int(b * mean)
    single = [cost.step_s(b, context + i * b) for i in range(steps)]
    assert single == sorted(single)
    assert cost.run_s(b, context, steps) == pytest.approx(math.fsum(single), rel=1e-9)
    seconds = share * math.fsum(single)
    k = cost.steps_within(b, context, seconds, steps)
    assert 1 <= k <= steps
    assert k == 1 or math.fsum(single[: k - 1]) < seconds * (1 + 1e-9)
    assert k == steps or math.fsum(single[:k]) >= seconds * (1 - 1e-9)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gemma-3-27b", "llama-4-scout"])
def test_windows_are_set_aside_for_no_more_sequences_than_fit(name: str) -> None:
    shape = model(name)
    spec = EngineSpec(gpu("b200"), shape, tp=4, max_num_seqs=4096)
    full_only = kv_pool_bytes(spec) / (
        kv_bytes_per_token(shape, tp=4) * shape.full_layers / shape.layers
    )
    share = kv_bytes(shape, 10**9) / kv_bytes_per_token(shape) / 10**9
    assert 0.9 * share * full_only <= kv_capacity_tokens(spec) <= full_only
    longer = sequences_that_fit(spec, 4 * shape.window, 1)
    assert longer > sequences_that_fit(spec, shape.window, 1) / 4  # the window grows no more


def test_a_ring_through_pcie_takes_longer_with_every_gpu_in_it() -> None:
    """RTX 4090s without peer-to-peer lose more of the ideal with each doubling; NVLink does not."""

    def lost_s(card: str, tp: int) -> float:
        spec = EngineSpec(gpu(card), LLAMA, tp=tp)
        alone = msgspec.structs.replace(spec, gpu=gpu(card), tp=1)
        return decode_step_seconds(spec, 1, 100) - (
            0.0015 + (decode_step_seconds(alone, 1, 100) - 0.0015) / tp
        )

    assert lost_s("rtx-4090", 8) > 3 * lost_s("rtx-4090", 2) > 3 * 64 * 15e-6
    assert lost_s("h100-sxm", 8) == pytest.approx(lost_s("h100-sxm", 2), rel=0.05)
