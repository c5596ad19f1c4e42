"""Model shapes: the counts that follow from a config are those the model cards state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.model import UsageError
from agent.sizing.models import (
    from_config,
    model,
    models,
    precision_in,
    precision_of,
    rows,
)

# Total parameters as the hub counts them in the checkpoint (vision towers and layers that predict
# further tokens taken off), and active ones as the model card states them.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "llama-2-7b": (6.738415616e9, None),
    "llama-2-13b": (13.01586432e9, None),
    "llama-2-70b": (68.976648192e9, None),
    "llama-3-8b": (8.030261248e9, None),
    "llama-3-70b": (70.553706496e9, None),
    "llama-3.1-8b": (8.030261248e9, None),
    "llama-3.1-70b": (70.553706496e9, None),
    "llama-3.1-405b": (405.8533888e9, None),
    "llama-3.2-1b": (1.2358144e9, None),
    "llama-3.2-3b": (3.212749824e9, None),
    "llama-4-scout": (107.76986112e9, 17e9),
    "llama-4-maverick": (400.71184896e9, 17e9),
    "qwen2.5-0.5b": (0.494032768e9, None),
    "qwen2.5-1.5b": (1.543714304e9, None),
    "qwen2.5-3b": (3.085938688e9, None),
    "qwen2.5-7b": (7.615616512e9, None),
    "qwen2.5-14b": (14.770033664e9, None),
    "qwen2.5-32b": (32.763876352e9, None),
    "qwen2.5-72b": (72.706203648e9, None),
    "qwen3-0.6b": (0.59604992e9, None),
    "qwen3-1.7b": (1.720574976e9, None),
    "qwen3-4b": (4.022468096e9, None),
    "qwen3-8b": (8.190735360e9, None),
    "qwen3-14b": (14.7683072e9, None),
    "qwen3-32b": (32.762123264e9, None),
    "qwen3-30b-a3b": (30.532122624e9, 3.3e9),
    "qwen3-235b-a22b": (235.09363456e9, 22e9),
    "qwen3-coder-480b-a35b": (480.154875392e9, 35e9),
    "mistral-7b-v0.1": (7.241732096e9, None),
    "mistral-7b": (7.248023552e9, None),
    "mistral-nemo": (12.2477824e9, None),
    "mistral-small-24b": (23.5724032e9, None),
    "mistral-large": (122.610069504e9, None),
    "mixtral-8x7b": (46.702792704e9, 12.9e9),
    "mixtral-8x22b": (140.630071296e9, 39e9),
    "deepseek-v3": (671.0264192e9, 37e9),
    "deepseek-r1-distill-qwen-1.5b": (1.777088e9, None),
    "gpt-oss-20b": (20.914757184e9, None),
    "gpt-oss-120b": (116.829156672e9, None),
    "glm-4-9b": (9.40027904e9, None),
    "phi-3-mini": (3.821079552e9, None),
    "phi-3.5-mini": (3.821079552e9, None),
    "phi-3-medium": (13.96023808e9, None),
    "phi-3.5-moe": (41.873153344e9, 6.6e9),
    "phi-4": (14.6595072e9, None),
    "phi-4-mini": (3.83602176e9, None),
    "gemma-2-2b": (2.614341888e9, None),
    "gemma-2-9b": (9.241705984e9, None),
    "gemma-2-27b": (27.22712832e9, None),
    "gemma-3-1b": (0.999885952e9, None),
}
# Known from the card's or the paper's rounded figures only; Gemma 3's are the report's table 1.
ROUNDED: dict[str, tuple[float, float | None]] = {
    "glm-4-32b": (32.57e9, None),
    "glm-4.5": (355e9, 32e9),
    "glm-4.5-air": (106e9, 12e9),
    "glm-4.7-flash": (30e9, 3.6e9),
    "minimax-m2": (230e9, 10e9),
    "kimi-k2": (1.03e12, 32e9),
    "gemma-3-4b": (3.209e9 + 0.675e9, None),
    "gemma-3-12b": (10.759e9 + 1.012e9, None),
    "gemma-3-27b": (25.6e9 + 1.416e9, None),
    "llama-65b": (65.3e9, None),
    "codellama-34b": (33.7e9, None),
    "tinyllama-1.1b": (1.1e9, None),
    "solar-10.7b": (10.7e9, None),
    "qwen-7b": (7.72e9, None),
    "qwen-14b": (14.17e9, None),
    "qwen-72b": (72.3e9, None),
    "qwen1.5-72b": (72.3e9, None),
    "chatglm3-6b": (6.24e9, None),
    "glm-4-9b-2024": (9.4e9, None),
    "aquila-7b": (7.3e9, None),
    "yi-34b": (34.4e9, None),
    "deepseek-llm-67b": (67.4e9, None),
    "deepseek-v2": (236e9, 21e9),
    "deepseek-v2-lite": (15.7e9, 2.4e9),
    "opt-66b": (65.7e9, None),
    "bloom-176b": (176.25e9, None),
    "gpt-j-6b": (6.05e9, None),
    "gpt-neox-20b": (20.55e9, None),
    "mpt-7b": (6.65e9, None),
    "falcon-7b": (6.92e9, None),
    "falcon-40b": (41.3e9, None),
    "phi-2": (2.78e9, None),
    "dbrx": (131.6e9, 36e9),
    "command-r-plus": (104e9, None),
    "smollm2-1.7b": (1.71e9, None),
    "nemotron-4-340b": (341e9, None),
}
# As transformers counts the model of the row's configuration, its parameters made on no device.
COUNTED: dict[str, int] = json.loads(
    (Path(__file__).parents[2] / "golden" / "transformers-params.json").read_bytes()
)
# Same shape as another row: like it in all but the longest context.
LIKE = {
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-3.1-nemotron-70b": "llama-3.1-70b",
    "qwen2-7b": "qwen2.5-7b",
    "qwen2-72b": "qwen2.5-72b",
    "qwen2.5-coder-7b": "qwen2.5-7b",
    "qwen2.5-coder-32b": "qwen2.5-32b",
    "qwq-32b": "qwen2.5-32b",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    "glm-4.6": "glm-4.5",
    "glm-4.7": "glm-4.5",
    "minimax-m2.5": "minimax-m2",
    "phi-4-reasoning": "phi-4",
}


def test_the_table_is_covered() -> None:
    siblings = {name for name, row in rows().items() if "like" in row}
    assert set(PUBLISHED) | set(ROUNDED) | set(LIKE) | set(COUNTED) | siblings == set(models())
    ids = [shape.hf_id for shape in models().values()]
    assert len(set(ids)) == len(ids)


def test_parameters_are_those_that_transformers_counts() -> None:
    """But for biases of projections and norms, which no formula here has."""
    counted = {name: model(name).params_total for name in COUNTED}
    assert counted == {name: pytest.approx(total, rel=1e-3) for name, total in COUNTED.items()}


@pytest.mark.parametrize("name", LIKE)
def test_a_sibling_has_the_same_shape(name: str) -> None:
    own = {"name": "", "hf_id": None, "max_context": 0}
    one, other = model(name), model(LIKE[name])
    assert msgspec.structs.replace(one, **own) == msgspec.structs.replace(other, **own)


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_match_the_rounded_figure(name: str) -> None:
    total, active = ROUNDED[name]
    assert model(name).params_total == pytest.approx(total, rel=0.01)
    if active is not None:  # cards differ in whether embeddings count as active
        shape = model(name)
        assert shape.params_active - shape.params_embedding <= active * 1.02
        assert shape.params_active >= active


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_model_card(name: str) -> None:
    total, active = PUBLISHED[name]
    shape = model(name)
    assert shape.params_total == pytest.approx(total, rel=3e-5)
    if active is None and not shape.experts:
        assert shape.params_active == shape.params_total
    elif active is not None:
        assert shape.params_active == pytest.approx(active, rel=0.025)


@pytest.mark.parametrize(("name", "stated"), [("gpt-oss-20b", 3.61e9), ("gpt-oss-120b", 5.13e9)])
def test_gpt_oss_active_parameters(name: str, stated: float) -> None:
    """Its card counts the output head as active and the input table not."""
    shape = model(name)
    assert shape.params_active - shape.params_embedding / 2 == pytest.approx(stated, rel=0.01)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b"),
        ("neuralmagic/Llama-3.1-Nemotron-70B-Instruct-HF-FP8-dynamic", "llama-3.1-nemotron-70b"),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", "qwen3-235b-a22b"),
        ("Qwen/QwQ-32B-Preview", "qwq-32b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-r1-distill-qwen-7b"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "llama-4-maverick"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("zai-org/GLM-4-9B-0414", "glm-4-9b"),
        ("microsoft/phi-4", "phi-4"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("gpt-oss:20b", "gpt-oss-20b"),
        ("qwen2.5:7b-instruct", "qwen2.5-7b"),
        ("llama2-70b", "llama-2-70b"),
        ("lmsys/vicuna-13b-v1.5", "vicuna-13b"),
        ("vicuna-7b-v1.5-16k", "vicuna-7b-16k"),
        ("amd/Llama-3.1-405B-Instruct-FP8-KV", "llama-3.1-405b"),
        ("TheBloke/Mistral-7B-v0.1-AWQ", "mistral-7b-v0.1"),
        ("bartowski/Llama-3.2-3B-Instruct-GGUF", "llama-3.2-3b"),
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen2.5-7b"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "llama-3.1-8b"),
        ("gptj-6b", "gpt-j-6b"),
        ("llama-7b", "llama-7b"),
        ("qwen3-30b", "qwen3-30b-a3b"),
        ("Qwen/Qwen1.5-7B", "qwen1.5-7b"),
    ],
)
def test_names(name: str, short: str) -> None:
    assert model(name).name == short


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "fp8"),
        ("nvidia/DeepSeek-V3-0324-NVFP4", "fp4"),
        ("openai/gpt-oss-120b", "mxfp4"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "int4"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "int8"),
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "int4"),
        ("Qwen2.5-7B-Instruct-Q8_0.gguf", "int8"),
        ("Qwen/Qwen3-8B", None),
    ],
)
def test_the_precision_that_a_name_tells(name: str, precision: str | None) -> None:
    assert precision_in(name) == precision


@pytest.mark.parametrize("name", ["chat", "large", "nano", "plus", "air", "r", "a", "moe", "lite"])
def test_what_operators_call_their_servers_is_no_model(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        model(name)


def test_unknown_and_ambiguous_names() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*llama-3\.1-8b"):
        model("llama-3.1-9b")
    with pytest.raises(UsageError, match="gpt-oss-120b or gpt-oss-20b"):
        model("gpt-oss")


def _config(**more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 8000,
        "max_position_embeddings": 2048,
        **more,
    }


def test_from_config_counts_by_hand() -> None:
    shape = from_config(_config(), name="tiny")
    attention = 256 * 256 * 2 + 256 * 128 * 2
    mlp = 3 * 256 * 512
    assert shape.params_total == 4 * (attention + mlp + 2 * 256) + 256 + 2 * 8000 * 256
    assert (shape.kv_heads, shape.head_dim, shape.max_context) == (4, 32, 2048)
    tied = from_config(_config(tie_word_embeddings=True))
    assert shape.params_total - tied.params_total == 8000 * 256


@pytest.mark.parametrize("kind", ["opt", "falcon", "starcoder2", "nemotron", "gpt_neox"])
def test_a_plain_mlp_has_two_matrices(kind: str) -> None:
    gated = from_config(_config(tie_word_embeddings=False))
    plain = from_config(_config(tie_word_embeddings=False, model_type=kind))
    positions = 2048 * 256 if kind == "opt" else 0
    heads = 4 * 256 * 2 * 3 * 32 if kind == "falcon" else 0  # multi_query: one of four is left
    assert plain.params_total == gated.params_total - 4 * 256 * 512 + positions - heads


def test_other_spellings_of_the_same_numbers() -> None:
    spelled = {
        "n_layer": 4, "n_embd": 256, "n_head": 8, "num_kv_heads": 4, "ffn_dim": 512,
        "vocab_size": 8000, "seq_length": 2048,
    }  # fmt: skip
    assert from_config(spelled) == from_config(_config())
    nested = {
        "d_model": 256, "n_heads": 8, "n_layers": 4, "max_seq_len": 2048, "vocab_size": 8000,
        "attn_config": {"kv_n_heads": 4}, "ffn_config": {"ffn_hidden_size": 512},
    }  # fmt: skip
    assert from_config(nested) == from_config(_config())


def test_the_attention_of_falcon() -> None:
    """One KV head by `multi_query`, whatever else is written, until its new architecture."""
    old = {"model_type": "falcon", "multi_query": True}
    assert from_config(_config(**old)).kv_heads == 1
    assert from_config(_config(**old, new_decoder_architecture=True)).kv_heads == 4


def test_from_config_reads_the_text_part_of_a_multimodal_model() -> None:
    assert from_config({"text_config": _config(), "vision_config": {}}) == from_config(_config())


def test_sliding_layers() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    assert from_config(_config(sliding_window=128, layer_types=kinds)).sliding_layers == 2
    assert from_config(_config(sliding_window=128, sliding_window_pattern=4)).sliding_layers == 3
    assert from_config(_config(sliding_window=128)).full_layers == 0
    beyond = from_config(_config(sliding_window=2048))  # as long as the longest sequence
    assert (beyond.window, beyond.sliding_layers) == (0, 0)
    off = from_config(_config(sliding_window=128, use_sliding_window=False))
    assert (off.window, off.sliding_layers) == (0, 0)
    of = {name: (model(name).window, model(name).sliding_layers) for name in models()}
    assert of["gpt-oss-20b"] == (128, 12)
    assert of["gemma-2-9b"] == (4096, 21)
    assert of["gemma-3-27b"] == (1024, 52)
    assert of["llama-4-scout"] == (8192, 36)


def test_what_a_config_takes_for_granted() -> None:
    """google/gemma-3-4b-it leaves out of its text_config what is the default."""
    written = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "sliding_window": 1024,
    }  # fmt: skip
    shape = from_config({"model_type": "gemma3", "text_config": written}, name="gemma-3-4b")
    assert shape == msgspec.structs.replace(model("gemma-3-4b"), hf_id=None)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"model_type": "nemotron_h"}, "nemotron_h"),
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "linear_attention"),
        ({"layer_types": 4}, "layer_types"),
        ({"block_configs": [{}]}, "block_configs"),
        ({"model_type": "gemma4_text", "global_head_dim": 512}, "global_head_dim"),
    ],
)
def test_a_shape_without_a_formula_is_refused(more: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        from_config(_config(**more))


def test_a_moe_of_experts_and_shared_experts() -> None:
    dense = from_config(_config())
    shape = from_config(
        _config(
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1
        )
    )
    assert shape.params_experts == 4 * 8 * 3 * 256 * 64
    assert shape.params_total - shape.params_active == shape.params_experts * 6 // 8
    shared_and_router = 4 * (3 * 256 * 64 + 256 * 8)
    assert shape.params_total - shape.params_experts - shared_and_router == (
        dense.params_total - 4 * 3 * 256 * 512
    )


@pytest.mark.parametrize("value", [None, "32", 0, -1, 2.5, True])
def test_a_bad_field_is_named(value: object) -> None:
    with pytest.raises(UsageError, match="num_hidden_layers"):
        from_config(_config(num_hidden_layers=value))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"num_key_value_heads": 64}, "64 num_key_value_heads of 32 heads"),
        ({"hidden_size": 16}, "hidden_size 16 leaves 32 heads no dimension"),
        ({"num_experts": 8, "num_experts_per_tok": 16}, "16 of 8 experts"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(more: dict[str, Any], named: str) -> None:
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
              "intermediate_size": 14336, "vocab_size": 128256}  # fmt: skip
    from_config(config)
    with pytest.raises(UsageError, match=named):
        from_config(config | more)


@pytest.mark.parametrize(
    ("told", "precision"),
    [({"quant_method": "fp8"}, "fp8"), ({"quant_method": "awq", "bits": 4}, "int4"),
     ({"quant_method": "gptq", "bits": 8}, "int8"), ({"quant_method": "mxfp4"}, "mxfp4"),
     ({"quant_method": "compressed-tensors"}, None), ("fp8", None), (None, None)],
)  # fmt: skip
def test_the_precision_that_a_config_tells(told: object, precision: str | None) -> None:
    assert precision_of({"quantization_config": told}) == precision
