"""Predictions: the published figures, the laws of a deployment, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Level, Run, Stats, Sweep, Target, TargetGpu, UsageError, Workload
from agent.sizing.engine import Efficiencies, EngineSpec
from agent.sizing.hardware import gpu
from agent.sizing.models import model
from agent.sizing.predict import (
    Deployment,
    Interval,
    Prediction,
    answer,
    deployment,
    lines,
    measured_spec,
    usual_seats,
)
from agent.sizing.steady import steady

H100 = gpu("h100-sxm")
LLAMA = EngineSpec(H100, model("llama-3.1-8b"))
MOST = 2048  # as many as TensorRT-LLM's benchmark let into a batch


def spec(card: str, shape: str, precision: str = "bf16", **more: Any) -> EngineSpec:
    return EngineSpec(gpu(card), model(shape), precision=precision, **more)


def ask(
    one: EngineSpec,
    *concurrency: float,
    gpus: int = 1,
    lengths: tuple[float, float] = (1000, 300),
    engine: str = "vllm",
    replicas: int | None = None,
    tp: int | None = None,
    **more: Any,
) -> Prediction:
    deployed = deployment(one, gpus, tp=tp, replicas=replicas, engine=engine)
    return answer(deployed, concurrency or (1, 8, 64), *lengths, **more)


def holds(said: Interval, seen: float) -> bool:
    return said.lo90 <= seen <= said.hi90


# ------------------------------------------------------------------------------ what is published


@pytest.mark.parametrize(
    ("card", "precision", "published"),
    [
        ("h200-sxm", "fp8", 23_231),
        ("h100-sxm", "fp8", 19_199),
        ("h100-sxm", "fp16", 8_817),
        ("a100-sxm-80", "fp16", 4_882),
    ],
)
def test_tensorrt_llm_llama_3_8b(card: str, precision: str, published: float) -> None:
    """TensorRT-LLM v0.12, 128/2048, as many requests as it takes; fp8 engines cache in fp8 too."""
    one = spec(
        card, "llama-3-8b", precision, max_num_seqs=MOST,
        kv_precision="fp8" if precision == "fp8" else "fp16",
    )  # fmt: skip
    (level,) = ask(one, MOST, lengths=(128, 2048), engine="tensorrt-llm").levels
    assert holds(level.output_tokens_per_s, published)


def test_the_kv_cliff_of_70b() -> None:
    """Twice the GPUs, 6.6 times the tokens: what two had left for the cache was the limit."""
    published = {2: 721.0, 4: 4737.0}
    said = {}
    for gpus, seen in published.items():
        one = spec("h100-sxm", "llama-3-70b", "fp16", max_num_seqs=MOST)
        (level,) = ask(one, MOST, gpus=gpus, lengths=(128, 2048), engine="tensorrt-llm").levels
        assert level.kv_bound
        assert not level.fits
        assert holds(level.output_tokens_per_s, seen)
        said[gpus] = level.output_tokens_per_s.value
    assert said[4] > 4 * said[2]


@pytest.mark.parametrize(("batch", "published"), [(8, 627.4), (64, 3140.3), (253, 5760.3)])
def test_ml_energy_qwen3_14b(batch: float, published: float) -> None:
    """ML.ENERGY, lm-arena-chat on an H100: answers of 620 tokens, prompts of some hundred."""
    one = spec("h100-sxm", "qwen3-14b", max_num_seqs=256)
    (level,) = ask(one, batch, lengths=(250, 620)).levels
    assert holds(level.output_tokens_per_s, published)
    assert level.fits


# ------------------------------------------------------------------------------------ a deployment


@pytest.mark.parametrize(
    ("gpus", "tp", "replicas", "expected"),
    [(4, None, None, (4, 1)), (4, 2, None, (2, 2)), (4, None, 4, (1, 4)), (8, 4, 2, (4, 2))],
)
def test_gpus_are_engines_times_what_they_are_split_over(
    gpus: int, tp: int | None, replicas: int | None, expected: tuple[int, int]
) -> None:
    found = deployment(LLAMA, gpus, tp=tp, replicas=replicas)
    assert (found.spec.tp, found.replicas) == expected


@pytest.mark.parametrize(
    ("gpus", "more", "said"),
    [
        (4, {"tp": 3}, "not 4"),
        (2, {"tp": 4}, "not 2"),
        (4, {"tp": 2, "replicas": 3}, "are 6 GPUs, not 4"),
        (2, {"replicas": 4}, "not 2"),
        (6, {}, "--tp can be 1, 2"),
        (1, {"engine": "vlm"}, "did you mean vllm"),
    ],
)
def test_what_does_not_come_to_the_gpus_is_wrong_usage(
    gpus: int, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        deployment(LLAMA, gpus, **more)


@pytest.mark.parametrize(
    ("engine", "card", "seats"),
    [("vllm", "h100-sxm", 1024), ("vllm", "a100-sxm-80", 256), ("vllm", "l4", 256),
     ("sglang", "l4", 2048)],
)  # fmt: skip
def test_the_batch_of_an_engine_without_flags(engine: str, card: str, seats: int) -> None:
    assert usual_seats(engine, gpu(card)) == seats


@settings(max_examples=25)
@given(share=st.floats(1, 300), replicas=st.integers(1, 8))
def test_replicas_add_up_and_each_client_sees_one(share: float, replicas: int) -> None:
    one = ask(LLAMA, share).levels[0]
    all_of_them = ask(LLAMA, share * replicas, gpus=replicas, replicas=replicas).levels[0]
    rate = all_of_them.output_tokens_per_s.value
    assert rate == pytest.approx(replicas * one.output_tokens_per_s.value)
    assert all_of_them.ttft_ms.value == pytest.approx(one.ttft_ms.value)
    assert all_of_them.tpot_ms.value == pytest.approx(one.tpot_ms.value)


def test_a_single_client_is_no_faster_on_four_replicas() -> None:
    assert ask(LLAMA, 1).levels[0] == ask(LLAMA, 1, gpus=4, replicas=4).levels[0]


def test_more_than_fits_waits() -> None:
    few, many = ask(LLAMA, 100, 1000).levels
    assert few.fits
    assert not many.fits
    assert not many.kv_bound  # the batch is full, not the cache
    assert many.ttft_ms.lo90 > 1000 > few.ttft_ms.value
    rate = many.output_tokens_per_s.value
    assert many.ttft_ms.value > 1e3 * (1000 - LLAMA.max_num_seqs) * 300 / rate


@settings(max_examples=25)
@given(
    clients=st.floats(0.5, 1000), isl=st.integers(1, 4000), osl=st.integers(1, 4000),
    tp=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_a_value_lies_inside_its_interval(clients: float, isl: int, osl: int, tp: int) -> None:
    level = ask(LLAMA, clients, gpus=tp, lengths=(isl, osl)).levels[0]
    for one in (level.output_tokens_per_s, level.ttft_ms, level.tpot_ms):
        assert 0 < one.lo90 < one.value < one.hi90


# ----------------------------------------------------------------------------- from a measurement


TRUE = Efficiencies(t0_s=0.003, eta_b=0.6, eta_c=0.3, eta_p=0.4)


def sweep(
    one: EngineSpec = LLAMA,
    gpu_name: str = "NVIDIA H100 80GB HBM3",
    model_name: str = "meta-llama/Llama-3.1-8B-Instruct",
    ttft_times: float = 1.0,
) -> Sweep:
    """What a server of known efficiencies would have shown."""
    true = msgspec.structs.replace(one, efficiencies=TRUE)
    levels = []
    for concurrency in (1, 4, 16, 64, 128):
        seen = steady(true, concurrency, 1000, 300)
        ttft = Stats(mean=ttft_times * seen.ttft_ms, p50=ttft_times * seen.ttft_ms, n=100)
        levels.append(Level(
            mode="concurrency", concurrency=concurrency, ttft_ms=ttft,
            output_tokens_per_s=seen.output_tokens_per_s,
            prompt_tokens=Stats(mean=1000, n=100), output_tokens=Stats(mean=300, n=100),
        ))  # fmt: skip
    gpus = [TargetGpu(gpu_name, f"GPU-{n}") for n in range(one.tp)] if gpu_name else []
    return Sweep(
        run=Run(tool_version="1"),
        target=Target(model=model_name, gpus=gpus),
        workload=Workload(input_tokens=1000, output_tokens=300),
        levels=levels,
    )


def calibrated(one: EngineSpec, made: Sweep, *concurrency: float, gpus: int = 1) -> Prediction:
    asked = deployment(one, gpus).spec
    return ask(one, *concurrency, gpus=gpus, sweep=made, measured=measured_spec(made, asked))


def test_what_was_measured_is_said_again_and_narrower() -> None:
    made = sweep()
    said, unfounded = calibrated(LLAMA, made, 1, 16, 64), ask(LLAMA, 1, 16, 64)
    assert said.refused is None
    for level, prior, n in zip(said.levels, unfounded.levels, (0, 2, 3), strict=True):
        seen = made.levels[n]
        assert level.output_tokens_per_s.value == pytest.approx(seen.output_tokens_per_s, rel=0.05)
        assert seen.ttft_ms.mean is not None
        assert holds(level.ttft_ms, seen.ttft_ms.mean)
        for narrow, wide in (
            (level.output_tokens_per_s, prior.output_tokens_per_s),
            (level.ttft_ms, prior.ttft_ms),
        ):
            assert narrow.hi90 / narrow.lo90 < wide.hi90 / wide.lo90
    assert "a sweep of llama-3.1-8b in bf16 on 1 x H100-SXM-80GB" in said.assumed.basis


def test_a_servers_own_ttft_is_taken_over() -> None:
    slow, fast = (
        calibrated(LLAMA, sweep(ttft_times=times), 16).levels[0].ttft_ms.value for times in (6, 1)
    )
    assert slow == pytest.approx(6 * fast, rel=0.25)


@pytest.mark.parametrize(
    ("one", "gpus"),
    [
        (spec("h200-sxm", "llama-3.1-8b"), 1),
        (spec("h100-sxm", "llama-3.1-8b", "fp8"), 1),
        (spec("h100-sxm", "llama-3.1-8b"), 2),
    ],
    ids=["gpu", "precision", "tp"],
)
def test_a_step_away_from_what_was_measured_is_less_sure(one: EngineSpec, gpus: int) -> None:
    made = sweep()
    near = calibrated(LLAMA, made, 16).levels[0].output_tokens_per_s
    far = calibrated(one, made, 16, gpus=gpus).levels[0].output_tokens_per_s
    assert far.hi90 / far.lo90 > near.hi90 / near.lo90
    true = msgspec.structs.replace(one, efficiencies=TRUE, tp=gpus)
    assert holds(far, steady(true, 16, 1000, 300).output_tokens_per_s)


def test_what_a_sweep_tells_of_its_target() -> None:
    two = msgspec.structs.replace(LLAMA, tp=2)
    on = measured_spec(sweep(two, "NVIDIA H200", "nvidia/Llama-3.1-8B-Instruct-FP8"), LLAMA)
    assert (on.gpu.name, on.tp, on.precision) == ("H200-SXM-141GB", 2, "fp8")
    assert measured_spec(sweep(), msgspec.structs.replace(LLAMA, precision="fp8")) == LLAMA
    silent = measured_spec(sweep(LLAMA, "", "chat"), two)
    assert silent == two
    told = measured_spec(sweep(LLAMA, "", "chat"), two, card=gpu("l40s"), tp=1, precision="int4")
    assert (told.gpu.name, told.tp, told.precision) == ("L40S", 1, "int4")
    simulated = msgspec.structs.replace(sweep(), target=Target(url="sim:l4/llama-3.2-1b?tp=1"))
    assert measured_spec(simulated, two).gpu.name == "L4"
    with pytest.raises(UsageError, match=r"'Unheard Of'.*--measured-gpu"):
        measured_spec(sweep(gpu_name="Unheard Of"), LLAMA)


def test_a_curve_of_another_tool_is_of_what_is_asked_where_it_does_not_tell() -> None:
    """Nobody knows what its name of a model says; where our own has no precision it is bf16."""
    eight = msgspec.structs.replace(LLAMA, precision="fp8")
    other = msgspec.structs.replace(sweep(), run=Run())
    assert measured_spec(other, eight) == eight
    assert measured_spec(sweep(gpu_name="H100 SXM5"), LLAMA) == LLAMA
    levels = [msgspec.structs.replace(one, prompt_tokens=Stats(), output_tokens=Stats())
              for one in other.levels]  # fmt: skip
    bare = msgspec.structs.replace(other, levels=levels, workload=Workload())
    found, told = calibrated(LLAMA, bare, 8, 32), calibrated(LLAMA, other, 8, 32)
    assert found.levels == told.levels
    assert "taken to be of 1,000 + 300 tokens" in found.assumed.basis
    assert "taken" not in told.assumed.basis


def test_another_engine_is_a_step_away() -> None:
    def width(engine: str | None) -> float:
        made = sweep()
        target = msgspec.structs.replace(made.target, engine=engine)
        said = calibrated(LLAMA, msgspec.structs.replace(made, target=target), 8)
        one = said.levels[0].output_tokens_per_s
        assert ("served by" in said.assumed.basis) == (one.hi90 / one.lo90 > 2)
        return one.hi90 / one.lo90

    assert width("vLLM 0.8.5") == width(None) < 2 < width("sglang 0.5.9") == width("llama.cpp")


@pytest.mark.parametrize(
    ("name", "engine"),
    [("vLLM (Splitwise 2023)", "vllm"), ("trtllm 1.0.0rc3", "tensorrt-llm"),
     ("TensorRT-LLM 0.12.0", "tensorrt-llm"), ("sglang 0.5.1.post1", "sglang"), ("vllm ", "vllm")],
)  # fmt: skip
def test_an_engine_may_be_named_with_its_version(name: str, engine: str) -> None:
    assert deployment(LLAMA, 1, engine=name).engine == engine


def test_the_number_of_gpus_follows_from_how_they_are_split() -> None:
    assert deployment(LLAMA, tp=2, replicas=3).spec.tp == 2
    assert deployment(LLAMA, replicas=3).replicas == 3
    with pytest.raises(UsageError, match="2 replicas of --tp 1 are 2 GPUs, not 1"):
        deployment(LLAMA, 1, replicas=2)


def test_a_simulated_sweep_is_called_so() -> None:
    made = msgspec.structs.replace(sweep(), run=Run(simulated=True))
    assert "simulated" in calibrated(LLAMA, made, 1).assumed.basis


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        (ask(spec("h100-sxm", "llama-3.1-70b")), r"131\.4 GiB, 70\.5 GiB can be used"),
        (ask(LLAMA, lengths=(131_000, 100)), "131,100 tokens is longer than the 131,072"),
        (ask(spec("a16", "llama-3.2-1b")), r"A16: its bf16 FLOP/s are not in the catalogue"),
        (ask(spec("gaudi3", "llama-3.1-8b")), "Intel"),
        (calibrated(spec("mi300x", "llama-3.1-8b"), sweep(), 8), "NVIDIA.*AMD|AMD.*NVIDIA"),
        (
            calibrated(LLAMA, msgspec.structs.replace(sweep(), levels=sweep().levels[:1]), 8),
            "1 different loads",
        ),
    ],
    ids=["weights", "length", "unknown rate", "unknown vendor", "other vendor", "thin sweep"],
)
def test_what_cannot_be_said_is_refused_with_the_reason(prediction: Prediction, said: str) -> None:
    assert prediction.levels == []
    assert prediction.refused is not None
    assert re.search(said, prediction.refused)
    assert prediction.refused in lines(prediction)[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "bf17"}, "precision"),
        ({"kv_precision": "int3"}, "KV precision"),
    ],
)
def test_an_unknown_precision_is_wrong_usage(change: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ask(msgspec.structs.replace(LLAMA, **change))


# ------------------------------------------------------------------------------------------- text


def test_the_table_fits_a_screen_and_says_who_waits() -> None:
    text = lines(ask(spec("h100-sxm", "llama-3.1-70b", "fp8"), 1, 4, 1000, lengths=(1000, 300)))
    assert text[0] == (
        "llama-3.1-70b in fp8 on 1 x H100-SXM-80GB, vllm; requests of 1,000 + 300 tokens"
    )
    assert "weights 66" in text[1] or "weights 67" in text[1]
    assert text[-1].endswith("some wait: KV cache full")
    assert max(map(len, text[3:])) <= 100
    header, first = text[4:6]
    assert header.split() == ["clients", "tok/s", "TTFT", "ms", "TPOT", "ms"]
    assert first.index("[") > 0


def test_json_says_what_it_is_of() -> None:
    found = msgspec.json.decode(msgspec.json.encode(ask(LLAMA, 8)))
    assert found["refused"] is None
    (level,) = found["levels"]
    assert set(level) >= {
        "concurrency",
        "output_tokens_per_s",
        "ttft_ms",
        "tpot_ms",
        "kv_bound",
        "fits",
    }
    assert set(level["ttft_ms"]) == {"value", "lo90", "hi90"}
    assert found["assumed"]["tp"] == 1


def test_deployments_compare_by_value() -> None:
    assert deployment(LLAMA, 1) == Deployment(LLAMA)
