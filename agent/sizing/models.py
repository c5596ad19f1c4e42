"""The shape of a model, as far as its size, its KV cache and its arithmetic go.

A shape comes from a Hugging Face `config.json`, whether it is the user's own or one of the few
built in below: the table holds the fields of the published configs that matter here, so that it
grows by pasting, and the parameter counts follow from the shapes. The tests compare them with the
counts that the model cards state.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from agent.model import UsageError
from agent.sizing.hardware import pick


class ModelShape(msgspec.Struct, frozen=True):
    """One decoder-only transformer. Counts are of the whole model, not of one GPU's share."""

    name: str
    hf_id: str | None
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # MLA: mean of the query-key and the value dimension (arithmetic only)
    vocab: int
    params_total: int
    params_active: int  # used by one token: everything but the experts it is not routed to
    params_embedding: int  # input table and output head; stay in 16 bits when the rest shrinks
    max_context: int
    kv_rank: int = 0  # MLA: rank of the compressed KV vector; 0 without MLA
    rope_dim: int = 0  # MLA: the part of the key kept beside it
    window: int = 0  # tokens a sliding layer looks back; 0 without sliding layers
    sliding_layers: int = 0
    experts: int = 0  # routed experts a layer; 0 for a dense model
    experts_active: int = 0  # of them, how many a token goes through
    params_experts: int = 0  # all routed experts of all layers together

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole sequence."""
        return self.layers - self.sliding_layers


# From the `config.json` of each model's repository on the Hugging Face hub, under its hf_id.
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
_GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4,
    "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128,
    "attention_bias": True,
}  # fmt: skip


def _config(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, **more: object
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        **more,
    }


# short name → (Hugging Face id, config)
_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B-Instruct",
        _config(32, 4096, 32, 8, 14336, **_LLAMA),
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B-Instruct",
        _config(80, 8192, 64, 8, 28672, **_LLAMA),
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B-Instruct",
        _config(16, 2048, 32, 8, 8192, tie_word_embeddings=True, head_dim=64, **_LLAMA),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B-Instruct",
        _config(28, 3072, 24, 8, 8192, tie_word_embeddings=True, head_dim=128, **_LLAMA),
    ),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", _config(28, 3584, 28, 4, 18944, **_QWEN2)),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B-Instruct", _config(64, 5120, 40, 8, 27648, **_QWEN2)),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B-Instruct", _config(80, 8192, 64, 8, 29568, **_QWEN2)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _config(36, 4096, 32, 8, 12288, **_QWEN3)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _config(40, 5120, 40, 8, 17408, **_QWEN3)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _config(64, 5120, 64, 8, 25600, **_QWEN3)),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        _config(
            48, 2048, 32, 4, 6144,
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, **_QWEN3,
        ),
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-Instruct-v0.3",
        _config(32, 4096, 32, 8, 14336, vocab_size=32768, max_position_embeddings=32768),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        _config(
            32, 4096, 32, 8, 14336,
            vocab_size=32000, max_position_embeddings=32768,
            num_local_experts=8, num_experts_per_tok=2,
        ),
    ),
    "gpt-oss-20b": (
        "openai/gpt-oss-20b",
        {"num_hidden_layers": 24, "num_local_experts": 32, **_GPT_OSS},
    ),
    "gpt-oss-120b": (
        "openai/gpt-oss-120b",
        {"num_hidden_layers": 36, "num_local_experts": 128, **_GPT_OSS},
    ),
    "deepseek-v3": (
        "deepseek-ai/DeepSeek-V3",
        _config(
            61, 7168, 128, 128, 18432,
            vocab_size=129280, max_position_embeddings=163840,
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
            v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1,
            moe_intermediate_size=2048, first_k_dense_replace=3,
        ),
    ),
}  # fmt: skip


@cache
def models() -> dict[str, ModelShape]:
    """The built-in models by short name."""
    return {
        name: from_config(config, name=name, hf_id=hf_id)
        for name, (hf_id, config) in _TABLE.items()
    }


def model(name: str) -> ModelShape:
    """The built-in model of this short name or Hugging Face id; see `hardware.pick`.

    Raises UsageError naming the nearest where there is none, the candidates where there are two.
    """
    by_id = {shape.hf_id.lower(): shape for shape in models().values() if shape.hf_id}
    if found := by_id.get(name.strip().lower()):
        return found
    short = name.rsplit("/", 1)[-1].lower()
    short = short.removesuffix("-hf").removesuffix("-instruct").removesuffix("-base")
    return models()[pick("model", short, models())]


def from_config(
    config: Mapping[str, Any], *, name: str = "custom", hf_id: str | None = None
) -> ModelShape:
    """The shape that a Hugging Face `config.json` describes.

    A multimodal config is read through its `text_config`. Parameters are counted from the shapes:
    grouped-query or latent attention, gated MLP, routed and shared experts, embeddings; norms
    included, vision towers and extra prediction heads not. Raises UsageError naming the field
    that is missing or has no sense.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    layers, hidden = _int(config, "num_hidden_layers"), _int(config, "hidden_size")
    heads, vocab = _int(config, "num_attention_heads"), _int(config, "vocab_size")
    kv_heads = _int(config, "num_key_value_heads", heads)
    head_dim = _int(config, "head_dim", hidden // heads)
    kv_rank, rope_dim = _int(config, "kv_lora_rank", 0), 0
    if kv_rank:
        rope_dim = _int(config, "qk_rope_head_dim")
        head_dim = (_int(config, "qk_nope_head_dim") + rope_dim + _int(config, "v_head_dim")) // 2
        attention = _latent_attention_params(config, hidden, heads, kv_rank, rope_dim)
    else:
        attention = _attention_params(config, hidden, heads, kv_heads, head_dim)
    mlp = _mlp_params(config, layers, hidden)
    embedding = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    norms = (2 * layers + 1) * hidden
    total = embedding + norms + layers * attention + mlp.dense + mlp.routed
    inactive = mlp.routed - mlp.routed * mlp.active // max(1, mlp.experts)
    window, sliding_layers = _sliding(config, layers)
    return ModelShape(
        name=name,
        hf_id=hf_id,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        params_total=total,
        params_active=total - inactive,
        params_embedding=embedding,
        max_context=_int(config, "max_position_embeddings", 8192),
        kv_rank=kv_rank,
        rope_dim=rope_dim,
        window=window,
        sliding_layers=sliding_layers,
        experts=mlp.experts,
        experts_active=mlp.active,
        params_experts=mlp.routed,
    )


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < (default is None):
        raise UsageError(f"config.json: {key} should be a positive integer, not {value!r}")
    return value


def _attention_params(
    config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Parameters of one layer's grouped-query attention: Q, K, V and output projections."""
    query, kv = heads * head_dim, kv_heads * head_dim
    params = hidden * (2 * query + 2 * kv)
    if config.get("model_type") == "qwen2":
        params += query + 2 * kv  # Qwen2 has biases on Q, K and V and says so nowhere
    elif config.get("attention_bias"):
        params += query + 2 * kv + hidden
    return params


def _latent_attention_params(
    config: Mapping[str, Any], hidden: int, heads: int, kv_rank: int, rope_dim: int
) -> int:
    """Parameters of one layer's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    nope, value = _int(config, "qk_nope_head_dim"), _int(config, "v_head_dim")
    q_rank = _int(config, "q_lora_rank", 0)
    query_out = heads * (nope + rope_dim)
    query = (hidden + query_out + 1) * q_rank if q_rank else hidden * query_out
    key_value = hidden * (kv_rank + rope_dim) + kv_rank * (1 + heads * (nope + value))
    return query + key_value + heads * value * hidden


class _Mlp(msgspec.Struct, frozen=True):
    dense: int  # dense layers, shared experts and routers of the whole model
    routed: int  # all routed experts of the whole model
    experts: int
    active: int


def _mlp_params(config: Mapping[str, Any], layers: int, hidden: int) -> _Mlp:
    """Parameters of all layers' gated MLPs (three matrices each) and experts."""
    intermediate = _int(config, "intermediate_size", 4 * hidden)
    experts = next(
        (_int(config, key) for key in ("num_experts", "num_local_experts", "n_routed_experts")
         if config.get(key)), 0,
    )  # fmt: skip
    if experts < 2:
        return _Mlp(layers * 3 * hidden * intermediate, 0, 0, 0)
    expert_width = _int(config, "moe_intermediate_size", intermediate)
    dense_layers = _int(config, "first_k_dense_replace", 0)
    moe_layers = layers - dense_layers
    shared_width = expert_width * _int(config, "n_shared_experts", 0)
    shared_width += _int(config, "shared_expert_intermediate_size", 0)
    bias = 2 * expert_width + hidden if config.get("model_type") == "gpt_oss" else 0
    return _Mlp(
        dense=dense_layers * 3 * hidden * intermediate
        + moe_layers * (3 * hidden * shared_width + hidden * experts),
        routed=moe_layers * experts * (3 * hidden * expert_width + bias),
        experts=experts,
        active=_int(config, "num_experts_per_tok"),
    )


def _sliding(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """Window in tokens and number of sliding layers; (0, 0) where every layer sees everything.

    Which layers slide is said by `layer_types` (newer configs), by `sliding_window_pattern` n
    (every n-th is full: Gemma 2 and 3), is every other one in gpt-oss, else all of them.
    """
    window = _int(config, "sliding_window", 0)
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    if types := config.get("layer_types"):
        sliding = sum(kind == "sliding_attention" for kind in types)
    elif pattern := _int(config, "sliding_window_pattern", 0):
        sliding = layers - layers // pattern
    elif config.get("model_type") == "gpt_oss":
        sliding = (layers + 1) // 2
    else:
        sliding = layers
    return (window, sliding) if sliding else (0, 0)
