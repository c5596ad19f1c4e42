"""The shape of a model, as far as its size, its KV cache and its arithmetic go.

A shape comes from a Hugging Face `config.json`, whether it is the user's own or one of those in
`data/models.json`: the file holds the fields of the published configs that matter here, so that it
grows by pasting, and the parameter counts follow from the shapes. The tests compare them with the
counts that the model cards state. `like` in the file is another row of the same shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from agent.model import UsageError
from agent.sizing.hardware import pick, unknown


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


# What configs spell differently: the name that is read here, and the others for the same number.
_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num"),
    "head_dim": ("kv_channels",),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("padded_vocab_size",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "model_max_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_top_k", "moe_k"),
    "n_shared_experts": ("num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "first_k_dense_replace": ("moe_layer_start_index",),
}
# What transformers takes for granted where a config of this `model_type` says nothing.
_TIED = (
    "bloom", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "falcon", "gemma", "gemma2",
    "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "minicpm3", "mpt", "opt",
    "smollm3", "starcoder2",
)  # fmt: skip
_SILENT: dict[str, dict[str, Any]] = {
    "bloom": {"max_position_embeddings": 2048},
    "cohere2": {"sliding_window_pattern": 4},
    "falcon": {"multi_query": True, "max_position_embeddings": 2048},
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"sliding_window_pattern": 2},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {
        "sliding_window_pattern": 6, "vocab_size": 262208,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 4096, "max_position_embeddings": 131072,
    },
    "llama4_text": {"sliding_window_pattern": 4, "interleave_moe_layer_step": 1},
    "mpt": {"max_position_embeddings": 2048},
    "starcoder2": {"num_key_value_heads": 2, "max_position_embeddings": 4096},
}  # fmt: skip
_SILENT |= {kind: {"tie_word_embeddings": True, **_SILENT.get(kind, {})} for kind in _TIED}
# MLPs of two matrices; all others are gated and have three.
_PLAIN_MLP = (
    "apertus", "arcee", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gptj", "jais2", "mpt", "nanochat", "nemotron", "opt", "persimmon", "phi",
    "starcoder2",
)  # fmt: skip
_LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo", "opt")  # a table, beside the tokens'
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
# Layers with a state instead of a KV cache, or of two attentions (LongCat).
_NO_FORMULA = (
    "mamba", "mamba2", "jamba", "nemotron_h", "minimax", "minimax_text_01", "minimax_m1", "rwkv",
    "falcon_h1", "bamba", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "longcat_flash",
    "recurrent_gemma", "xlstm", "zamba", "zamba2",
)  # fmt: skip
# Keys of models whose layers differ in ways that are not counted here.
_NO_FORMULA_KEYS = (
    "block_configs", "hybrid_layer_pattern", "hybrid_override_pattern", "compress_ratios",
    "global_head_dim", "num_kv_shared_layers", "sparse_attention_config", "full_attention_interval",
    "num_key_value_heads_per_layer", "inner_hidden_size",
)  # fmt: skip
_QKV_BIAS = ("qwen", "qwen2", "qwen2_moe", "chatglm")  # have it and say so nowhere
_FOUR_NORMS = ("gemma2", "gemma3_text", "glm4")  # a layer, where the others have two

# Endings of a checkpoint's name that do not change the shape.
_ENDING = re.compile(
    r"[-.](hf|instruct|base|chat|it|thinking|reasoning|preview|\d{4}|v[01]([._]\d+)?|\d+k|1m|"
    r"(nv|mx)?fp[48](a16)?(-v2)?|kv|dynamic|bf16|fp16|int[48]|w\da\d+|awq|gptq|quantized|"
    r"gguf|q\d(_\w+)?|(bnb-)?[48]bit|99(\.9)?)$"
)


@cache
def models() -> dict[str, ModelShape]:
    """The built-in models by short name, in the order of the file."""
    return {name: _shape(name) for name in rows()}


@cache
def rows() -> dict[str, dict[str, Any]]:
    """The file as it is: fields of published configs by short name."""
    text = resources.files("agent.sizing").joinpath("data/models.json").read_bytes()
    table: dict[str, dict[str, Any]] = msgspec.json.decode(text)
    return table


@cache
def _shape(name: str) -> ModelShape:
    return from_config(_whole(rows()[name]), name=name, hf_id=rows()[name]["hf_id"])


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what it takes from the one it is `like`."""
    like = row.get("like")
    return {**(_whole(rows()[like]) if like else {}), **row}


@cache
def _exact() -> dict[str, str]:
    """The short name by itself, and by the id with its owner and without."""
    ids = {row["hf_id"].lower(): short for short, row in rows().items()}
    bare = {name.rpartition("/")[2]: short for name, short in ids.items()}
    return bare | {short: short for short in rows()} | ids


@cache
def _stemmed() -> dict[str, str]:
    """The short name by the id without owner and endings."""
    return {_stems(row["hf_id"])[-1]: short for short, row in rows().items()}


def model(name: str) -> ModelShape:
    """The built-in model of this short name or Hugging Face id; see `hardware.pick`.

    Endings that do not change a shape are taken off one by one, so that Mistral-7B-v0.1-AWQ is
    mistral-7b-v0.1. A word alone is no short form but of a family: servers are called `large`,
    `chat` or `nano` by their operators. Raises UsageError naming the nearest where there is none,
    the candidates where there are two.
    """
    forms = (name.strip().lower(), *_stems(name))
    short = next((_exact()[form] for form in forms if form in _exact()), None)
    short = short or _stemmed().get(forms[-1])
    return _shape(short or _short_form(forms[-1]))


def _short_form(name: str) -> str:
    family = name.partition("-")[0]
    says_more = any(sign.isdigit() for sign in name)
    if not says_more and all(family != known.partition("-")[0] for known in rows()):
        raise UsageError(unknown("model", name, rows()))
    return pick("model", name, rows())


# What a checkpoint's name says of its weights: the first of these that is in it.
_PRECISIONS = (
    ("nvfp4", "fp4"), ("mxfp4", "mxfp4"), ("gpt-oss", "mxfp4"), ("fp8", "fp8"), ("w8a8", "int8"),
    ("int8", "int8"), ("awq", "int4"), ("gptq", "int4"), ("int4", "int4"), ("w4a16", "int4"),
    ("fp4", "fp4"), ("q4_", "int4"), ("q8_0", "int8"), ("4bit", "int4"), ("8bit", "int8"),
)  # fmt: skip


def precision_in(name: str) -> str | None:
    """The precision that a checkpoint's name tells: fp8 of `nvidia/Llama-3.1-8B-Instruct-FP8`."""
    return next((precision for word, precision in _PRECISIONS if word in name.lower()), None)


def precision_of(config: Mapping[str, Any]) -> str | None:
    """The precision that a config.json tells by its `quantization_config`; None where it does not.

    compressed-tensors and others of many schemes are not read: --precision says it.
    """
    told = config.get("quantization_config")
    if not isinstance(told, Mapping):
        return None
    method, bits = str(told.get("quant_method", "")).lower(), told.get("bits")
    if method in ("awq", "gptq"):
        return {4: "int4", 8: "int8"}.get(bits) if isinstance(bits, int) else None
    return {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4"}.get(method)


def _stems(name: str) -> list[str]:
    """`llama-3.1-8b-instruct-fp8`, `llama-3.1-8b-instruct` and `llama-3.1-8b` of
    `nvidia/Llama-3.1-8B-Instruct-FP8`, and the last of Ollama's `llama3.1:8b`."""
    short = name.strip().rsplit("/", 1)[-1].lower().removeprefix("meta-").replace(":", "-")
    short = re.sub(r"-(\d)_(\d)-", r"-\1.\2-", short)
    stems = [re.sub(r"^(llama|gemma|phi|glm|gpt|mistral-small)(?=\d|j\b)", r"\1-", short)]
    while ending := _ENDING.search(stems[-1]):
        stems.append(stems[-1][: ending.start()])
    return stems


def from_config(
    config: Mapping[str, Any], *, name: str = "custom", hf_id: str | None = None
) -> ModelShape:
    """The shape that a Hugging Face `config.json` describes.

    A multimodal config is read through its `text_config`. Parameters are counted from the shapes:
    grouped-query or latent attention, gated or plain MLP, routed and shared experts, embeddings;
    norms included, vision towers and extra prediction heads not. Raises UsageError naming the
    field that is missing or has no sense, or what there is no formula for.
    """
    config = _decoder(config)
    layers, hidden = _int(config, "num_hidden_layers"), _int(config, "hidden_size")
    heads, vocab = _int(config, "num_attention_heads"), _int(config, "vocab_size")
    kv_heads = _kv_heads(config, heads)
    if kv_heads > heads:
        raise UsageError(f"config.json: {kv_heads} num_key_value_heads of {heads} heads in all")
    head_dim = _int(config, "head_dim", hidden // heads)
    if not head_dim:
        raise UsageError(f"config.json: hidden_size {hidden} leaves {heads} heads no dimension")
    kv_rank, rope_dim = _int(config, "kv_lora_rank", 0), 0
    if kv_rank:
        rope_dim = _int(config, "qk_rope_head_dim")
        head_dim = (_int(config, "qk_nope_head_dim") + rope_dim + _int(config, "v_head_dim")) // 2
        attention = _latent_attention_params(config, hidden, heads, kv_rank, rope_dim)
    else:
        attention = _attention_params(config, hidden, heads, kv_heads, head_dim)
    mlp = _mlp_params(config, layers, hidden)
    embedding = _embedding_params(config, vocab, hidden)
    norms = ((4 if config.get("model_type") in _FOUR_NORMS else 2) * layers + 1) * hidden
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


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model alone, with what its `model_type` takes for granted.

    Raises UsageError for layers that keep no KV cache, or none of this size: a figure made of the
    wrong formula would look like any other.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        tied = config.get("tie_word_embeddings")
        config = text if tied is None else {"tie_word_embeddings": tied, **text}
    kind = config.get("model_type")
    types = config.get("layer_types") or ()
    if not isinstance(types, list | tuple):
        raise UsageError(f"config.json: layer_types should be a list, not {types!r}")
    strange = [f"layers of {one!r}" for one in types if one not in _ATTENTION]
    strange += [key for key in _NO_FORMULA_KEYS if config.get(key)]
    if kind in _NO_FORMULA or strange:
        what = strange[0] if strange else f"a {kind} model"
        raise UsageError(
            f"config.json: there is no formula for {what}, only for decoders with softmax "
            "attention in every layer: measure it instead"
        )
    return {**_SILENT.get(str(kind), {}), **_spelled_out(config)}


def _spelled_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the names that are read here: what it nests (MPT, DBRX) on its own level, what
    it says layer by layer (Hunyuan) once where the layers agree, and no nulls."""
    nested = (config.get(key) for key in ("attn_config", "ffn_config"))
    parts = [part for part in nested if isinstance(part, Mapping)]
    flat = {key: value for part in (*parts, config) for key, value in part.items()
            if value is not None}  # fmt: skip
    for key, others in _ALIASES.items():
        if said := next((flat[name] for name in (key, *others) if flat.get(name)), None):
            alike = isinstance(said, list) and said.count(said[0]) == len(said)
            flat[key] = said[0] if alike else said
    return flat


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < (default is None):
        raise UsageError(f"config.json: {key} should be a positive integer, not {value!r}")
    return value


def _embedding_params(config: Mapping[str, Any], vocab: int, hidden: int) -> int:
    """Parameters of input table and output head, and of the positions where they are learned."""
    width = _int(config, "word_embed_proj_dim", hidden)  # OPT-350m: half of it, and projected
    params = vocab * width * (1 if config.get("tie_word_embeddings") else 2)
    if config.get("model_type") in _LEARNED_POSITIONS:
        params += _int(config, "max_position_embeddings", 0) * hidden
    return params + (2 * width * hidden if width != hidden else 0)


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """KV heads; Falcon and StarCoder have one by `multi_query`, whatever else is written, until
    Falcon's new architecture."""
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _int(config, "num_key_value_heads", heads)


def _attention_params(
    config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Parameters of one layer's grouped-query attention: Q, K, V and output projections."""
    query, kv = heads * head_dim, kv_heads * head_dim
    params = hidden * (2 * query + 2 * kv)
    if config.get("model_type") in _QKV_BIAS:
        params += query + 2 * kv
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
    """Parameters of all layers' MLPs, of three matrices (gated) or two, and experts."""
    kind = config.get("model_type")
    matrices = 2 if kind in _PLAIN_MLP else 3
    intermediate = _int(config, "intermediate_size", 4 * hidden)
    if kind == "qwen":  # the first one: gate and up projection in one number
        intermediate //= 2
    experts = _int(config, "num_experts", 0)
    if experts < 2:
        return _Mlp(layers * matrices * hidden * intermediate, 0, 0, 0)
    active = _int(config, "num_experts_per_tok")
    if active > experts:
        raise UsageError(f"config.json: num_experts_per_tok is {active} of {experts} experts")
    expert_width = _int(config, "moe_intermediate_size", intermediate)
    # Dense first, then experts in every layer or, in Llama 4, in every second.
    step = _int(config, "interleave_moe_layer_step", 1)
    moe_layers = (layers - _int(config, "first_k_dense_replace", 0)) // step
    dense_width = _int(config, "intermediate_size_mlp", intermediate)
    shared_width = expert_width * _int(config, "n_shared_experts", 0)
    shared_width += _int(config, "shared_expert_intermediate_size", 0)
    if kind == "llama4_text":
        shared_width = intermediate
    bias = 2 * expert_width + hidden if kind == "gpt_oss" else 0
    return _Mlp(
        dense=(layers - moe_layers) * 3 * hidden * dense_width
        + moe_layers * (3 * hidden * shared_width + hidden * experts),
        routed=moe_layers * experts * (3 * hidden * expert_width + bias),
        experts=experts,
        active=active,
    )


def _sliding(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """Window in tokens and number of sliding layers; (0, 0) where every layer sees everything.

    Which layers slide is said by `layer_types` (newer configs), by `sliding_window_pattern` n
    (every n-th is full: Gemma, gpt-oss, Llama 4), else it is all of them. Llama 4's chunks are
    windows of their own length: no more than that is kept or looked at.
    """
    window = _int(config, "sliding_window", 0) or _int(config, "attention_chunk_size", 0)
    context = _int(config, "max_position_embeddings", window)
    if not window or window >= context or config.get("use_sliding_window") is False:
        return 0, 0
    if types := config.get("layer_types"):
        sliding = sum(kind != "full_attention" for kind in types)
    elif pattern := _int(config, "sliding_window_pattern", 0):
        sliding = layers - layers // pattern
    else:
        sliding = layers
    return (window, sliding) if sliding else (0, 0)
