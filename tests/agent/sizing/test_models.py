"""Model shapes: the counts that follow from a config are those the model cards state."""

from __future__ import annotations

from typing import Any

import pytest

from agent.model import UsageError
from agent.sizing.models import from_config, model, models

# Total and active parameters as the model cards and the checkpoints' indices state them.
PUBLISHED = {
    "llama-3.1-8b": (8.030261248e9, None),
    "llama-3.1-70b": (70.553706496e9, None),
    "llama-3.2-1b": (1.2358144e9, None),
    "llama-3.2-3b": (3.212749824e9, None),
    "qwen2.5-7b": (7.615616512e9, None),
    "qwen2.5-32b": (32.763876352e9, None),
    "qwen2.5-72b": (72.706203648e9, None),
    "qwen3-8b": (8.190735360e9, None),
    "qwen3-14b": (14.7683072e9, None),
    "qwen3-32b": (32.762123264e9, None),
    "qwen3-30b-a3b": (30.532122624e9, 3.3e9),
    "mistral-7b": (7.248023552e9, None),
    "mixtral-8x7b": (46.702792704e9, 12.9e9),
    "gpt-oss-20b": (20.914757184e9, None),
    "gpt-oss-120b": (116.829156672e9, None),
    "deepseek-v3": (671.0264192e9, 37e9),
}


def test_the_table_is_covered() -> None:
    assert set(PUBLISHED) == set(models())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_model_card(name: str) -> None:
    total, active = PUBLISHED[name]
    shape = model(name)
    assert shape.params_total == pytest.approx(total, rel=1e-5)
    if active is None and not shape.experts:
        assert shape.params_active == shape.params_total
    elif active is not None:
        assert shape.params_active == pytest.approx(active, rel=0.02)


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
        ("deepseek", "deepseek-v3"),
    ],
)
def test_names(name: str, short: str) -> None:
    assert model(name).name == short


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


def test_from_config_reads_the_text_part_of_a_multimodal_model() -> None:
    assert from_config({"text_config": _config(), "vision_config": {}}) == from_config(_config())


def test_sliding_layers() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    assert from_config(_config(sliding_window=128, layer_types=kinds)).sliding_layers == 2
    assert from_config(_config(sliding_window=128, sliding_window_pattern=4)).sliding_layers == 3
    assert from_config(_config(sliding_window=128)).full_layers == 0
    off = from_config(_config(sliding_window=128, use_sliding_window=False))
    assert (off.window, off.sliding_layers) == (0, 0)
    assert model("gpt-oss-20b").sliding_layers == 12


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
