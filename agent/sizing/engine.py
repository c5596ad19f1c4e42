"""The capacity model: how long a step of an inference engine takes, and how much its cache holds.

A roofline with few parameters: a step streams the weights and the KV cache through the memory and
does its arithmetic, whichever takes longer, plus a fixed cost. Every function names its formula,
its units and its source. What the model cannot know (kernel quality, clocks, the host) is in
`Efficiencies`, which a sweep on the real box can be fitted to.

Symbols: B sequences decoding, L their mean context, κ KV bytes per token, η efficiencies.
"""

from __future__ import annotations

import math

import msgspec

from agent.model import UsageError
from agent.sizing.hardware import GIB, Gpu, unknown
from agent.sizing.models import ModelShape

# Bits a parameter, scales included: int4 in groups of 128 with a 16-bit scale and a zero, NVFP4
# in groups of 16 with an 8-bit scale, MXFP4 in groups of 32 with an 8-bit scale.
BITS = {
    "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "int8": 8.0,
    "int4": 4.25, "fp4": 4.5, "mxfp4": 4.25,
}  # fmt: skip
KV_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}

# One all-reduce of a small tensor: over NVLink one kernel whatever the number of GPUs; through PCIe
# a ring of 2·(tp - 1) hops, 30 us between two GPUs (NCCL tests).
_ALL_REDUCE_NVLINK_S = 8e-6
_ALL_REDUCE_PCIE_HOP_S = 15e-6
_NVLINK_MIN_BYTES_PER_S = 200e9  # both directions; slower links are PCIe or a network
_UNKNOWN_LINK_BYTES_PER_S = 64e9  # PCIe 4 x16, the least that tensor parallelism is run over


class Efficiencies(msgspec.Struct, frozen=True):
    """What an engine reaches of the data sheet. The defaults are for vLLM V1 with CUDA graphs.

    They are set by reason, not fitted: a well-tuned decode streams 75 to 85 % of the data sheet's
    bandwidth and spends 1 to 2 ms a step outside the kernels; large matrix products reach half to
    two thirds of the dense rate. A single stream of Llama-3.1-8B in bf16 on an H100 then takes
    7.5 ms a token, where 7 to 8 ms are commonly reported. A sweep on the box replaces them.
    """

    t0_s: float = 0.0015  # scheduling, launches, sampling: what a step costs whatever is in it
    eta_b: float = 0.80  # share of the memory bandwidth
    eta_c: float = 0.60  # share of the dense FLOP/s in decode
    eta_p: float = 0.55  # share of the dense FLOP/s in prefill


class EngineSpec(msgspec.Struct, frozen=True):
    """An engine on its hardware: a vLLM command line, as far as capacity goes."""

    gpu: Gpu
    model: ModelShape
    precision: str = "bf16"  # of the weights
    kv_precision: str = "bf16"  # of the KV cache, which is not the weights'
    tp: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_gpu_blocks: int | None = None  # None: what the memory holds
    max_model_len: int | None = None  # None: the model's, or the whole cache where that is less
    activation_bytes: float = 1.5 * GIB  # a GPU: activations, graphs, the driver's part
    efficiencies: Efficiencies = Efficiencies()


def _bits(precision: str) -> float:
    if precision not in BITS:
        raise UsageError(unknown("precision", precision, BITS))
    return BITS[precision]


def _kv_layer_bytes(model: ModelShape, kv_precision: str) -> int:
    """KV bytes of one token in one layer: 2·kv_heads·head_dim·bytes; MLA: (rank + rope)·bytes."""
    if kv_precision not in KV_BYTES:
        raise UsageError(unknown("KV precision", kv_precision, KV_BYTES))
    size = KV_BYTES[kv_precision]
    if model.kv_rank:
        return (model.kv_rank + model.rope_dim) * size
    return 2 * model.kv_heads * model.head_dim * size


def kv_bytes_per_token(model: ModelShape, kv_precision: str = "bf16", tp: int = 1) -> float:
    """κ over all GPUs, in bytes, while the sequence is inside every window.

    κ = 2·layers·kv_heads·head_dim·bytes; MLA: layers·(kv_rank + rope_dim)·bytes. Tensor
    parallelism repeats KV heads once there are more GPUs than heads: κ·max(1, tp/kv_heads); the
    latent vector of MLA is whole on every GPU: κ·tp (design equation 1; DeepSeek-V3: 70,272).
    """
    return model.layers * _kv_layer_bytes(model, kv_precision) * _kv_copies(model, tp)


def _kv_copies(model: ModelShape, tp: int) -> float:
    return float(tp) if model.kv_rank else max(1.0, tp / model.kv_heads)


def kv_bytes(model: ModelShape, tokens: float, kv_precision: str = "bf16", tp: int = 1) -> float:
    """KV bytes of one sequence of `tokens`: a sliding layer keeps no more than its window."""
    layer = _kv_layer_bytes(model, kv_precision) * _kv_copies(model, tp)
    sliding = model.sliding_layers * min(tokens, model.window)
    return layer * (model.full_layers * tokens + sliding)


def _weight_parts_bytes(model: ModelShape, precision: str) -> tuple[float, float]:
    """Bytes of what every token uses, and of the routed experts.

    Quantised checkpoints keep embeddings and head in 16 bits; MXFP4 (gpt-oss) shrinks the experts
    alone.
    """
    size, full = _bits(precision) / 8, BITS["bf16"] / 8
    body = model.params_total - model.params_embedding - model.params_experts
    if precision == "mxfp4" and model.params_experts:
        return (body + model.params_embedding) * full, model.params_experts * size
    return body * size + model.params_embedding * full, model.params_experts * size


def weight_bytes(model: ModelShape, precision: str = "bf16") -> float:
    """Bytes of all weights: parameters times bytes each (design equation 2).

    The checkpoint's own index (`total_size`) is better where it is at hand.
    """
    return sum(_weight_parts_bytes(model, precision))


def active_weight_bytes(model: ModelShape, precision: str, tokens: float) -> float:
    """Weight bytes that a step with so many tokens reads.

    Dense + experts·(1 - (1 - k/E)^tokens): the share of E experts that at least one of the tokens
    is routed to, k each, evenly and independently (design equation 4).
    """
    dense, experts = _weight_parts_bytes(model, precision)
    if not model.experts:
        return dense
    missed = math.pow(1 - model.experts_active / model.experts, tokens)
    return dense + experts * (1 - missed)


def kv_pool_bytes(spec: EngineSpec) -> float:
    """Bytes left for the KV cache over all GPUs (design equation 2).

    tp·(utilization·memory - activations) - weights. Raises UsageError where nothing is left.
    """
    usable = spec.tp * (spec.gpu_memory_utilization * spec.gpu.memory_bytes - spec.activation_bytes)
    weights = weight_bytes(spec.model, spec.precision)
    if usable <= weights:
        raise UsageError(
            f"{spec.model.name} in {spec.precision} does not fit on {spec.tp} x {spec.gpu.name}: "
            f"its weights take {weights / GIB:.1f} GiB, {usable / GIB:.1f} GiB can be used "
            f"({spec.gpu_memory_utilization:g} of {spec.gpu.memory_bytes / GIB:g} GiB less "
            f"{spec.activation_bytes / GIB:g} GiB for activations, each)"
        )
    return usable - weights


def kv_blocks(spec: EngineSpec) -> int:
    """Blocks of the KV cache: as the engine was told, or as many as the pool holds.

    Of a model with sliding layers, these layers' windows are set aside first, for `max_num_seqs`
    sequences or as many of a window's length as fit, and the blocks hold the full layers. Where
    every layer slides, blocks are counted as if none did: such a cache holds no less than this.
    Raises UsageError where the weights or a single block do not fit.
    """
    if spec.num_gpu_blocks is not None:
        kv_pool_bytes(spec)  # the weights still have to fit
        return spec.num_gpu_blocks
    layer = _kv_layer_bytes(spec.model, spec.kv_precision) * _kv_copies(spec.model, spec.tp)
    pool = kv_pool_bytes(spec)
    layers = spec.model.full_layers
    if layers and (window := spec.model.window):
        whole = kv_bytes(spec.model, window, spec.kv_precision, spec.tp)
        sequences = min(spec.max_num_seqs, pool // whole)
        pool -= layer * spec.model.sliding_layers * window * sequences
    blocks = int(pool // (layer * (layers or spec.model.layers) * spec.block_size))
    if blocks < 1:
        raise UsageError(
            f"{spec.model.name} leaves no room for a KV cache on {spec.tp} x {spec.gpu.name}"
        )
    return blocks


def kv_capacity_tokens(spec: EngineSpec) -> int:
    """Tokens that the KV cache holds."""
    return kv_blocks(spec) * spec.block_size


def max_model_len(spec: EngineSpec) -> int:
    """Longest sequence, prompt and output together, that the engine accepts.

    Raises UsageError where more was asked for than the model or its KV cache can hold, as vLLM
    does when it starts.
    """
    capacity = kv_capacity_tokens(spec)
    if spec.max_model_len is None:
        return min(spec.model.max_context, capacity)
    if spec.max_model_len > capacity:
        raise UsageError(
            f"max_model_len {spec.max_model_len} is more than the KV cache holds "
            f"({capacity} tokens): lower it, or give the cache more memory"
        )
    return spec.max_model_len


def sequences_that_fit(spec: EngineSpec, input_tokens: float, output_tokens: float) -> float:
    """Sequences whose KV fits at once: pool / (κ·(ISL + OSL/2)) (design equation 3).

    A sliding layer holds no more than its window of each.
    """
    tokens = input_tokens + output_tokens / 2
    if spec.num_gpu_blocks is not None:
        return kv_capacity_tokens(spec) / tokens
    return kv_pool_bytes(spec) / kv_bytes(spec.model, tokens, spec.kv_precision, spec.tp)


def check(spec: EngineSpec) -> None:
    """Raises UsageError, naming the field, where the engine could not be started like this."""
    at_least_one = ("tp", "max_num_seqs", "block_size", "num_gpu_blocks", "max_model_len")
    for name in at_least_one:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if spec.max_num_batched_tokens < spec.max_num_seqs:
        raise UsageError(
            f"max_num_batched_tokens ({spec.max_num_batched_tokens}) must be at least "
            f"max_num_seqs ({spec.max_num_seqs})"
        )
    if not 0 < spec.gpu_memory_utilization <= 1:
        raise UsageError(
            f"gpu_memory_utilization must be in (0, 1], not {spec.gpu_memory_utilization:g}"
        )
    shares = spec.efficiencies
    for name in ("eta_b", "eta_c", "eta_p"):
        if not 0 < getattr(shares, name) <= 1:
            raise UsageError(f"{name} must be in (0, 1], not {getattr(shares, name):g}")
    if not 0 <= shares.t0_s < math.inf:
        raise UsageError(f"t0 must not be negative, not {shares.t0_s:g} s")
    max_model_len(spec)


def attention_flops(model: ModelShape, start: float, end: float) -> float:
    """FLOPs of attention while a prompt is computed from token `start` to token `end`.

    4·heads·head_dim for every pair of a token and one it sees. Over all layers and from 0 to ISL
    that is 2·layers·heads·head_dim·ISL² (design equation 5); a prefix already in the cache takes
    (hit·ISL)² off, and a sliding layer sees its window at most.
    """
    pairs = model.full_layers * (end * end - start * start) / 2
    if model.sliding_layers:
        seen = _window_area(end, model.window) - _window_area(start, model.window)
        pairs += model.sliding_layers * seen
    return 4.0 * model.heads * model.head_dim * pairs


def _window_area(tokens: float, window: int) -> float:
    """Integral of min(x, window) from 0 to tokens."""
    inside = min(tokens, window)
    return inside * inside / 2 + (tokens - inside) * window


class Cost:
    """The times of a step as plain coefficients, in seconds: built once a spec, then cheap.

    step = t0 + max(memory, compute) + communication (design equations 4 and 5, which it is at its
    two ends: no prefill, and nothing but prefill):
    - memory = (active weights(B + P) + κ·context) / (η_b·bandwidth·tp)
    - compute = 2·active params·(B/η_c + P/η_p) / (FLOP/s·tp) + attention / (η_p·FLOP/s·tp)
    - communication = two all-reduces a layer, each a latency + 2·(tp - 1)/tp · tokens·hidden·2
      bytes at one direction of the link (ring all-reduce); nothing at tp = 1.
    """

    __slots__ = (
        "_comm_fixed", "_comm_token", "_decode_token", "_experts", "_fixed", "_flop", "_kv_full",
        "_kv_sliding", "_miss", "_prefill_token", "_weights", "_window", "model",
    )  # fmt: skip

    def __init__(self, spec: EngineSpec) -> None:
        model, shares, tp = spec.model, spec.efficiencies, spec.tp
        bandwidth = shares.eta_b * spec.gpu.bandwidth_bytes_per_s * tp
        flops = spec.gpu.flops_per_s(spec.precision) * tp
        dense, experts = _weight_parts_bytes(model, spec.precision)
        layer = _kv_layer_bytes(model, spec.kv_precision) * _kv_copies(model, tp)
        self.model = model
        self._fixed = shares.t0_s
        self._weights = dense / bandwidth
        self._experts = experts / bandwidth
        self._miss = 1 - model.experts_active / model.experts if model.experts else 0.0
        self._kv_full = layer * model.full_layers / bandwidth
        self._kv_sliding = layer * model.sliding_layers / bandwidth
        self._window = model.window
        self._decode_token = 2 * model.params_active / (shares.eta_c * flops)
        self._prefill_token = 2 * model.params_active / (shares.eta_p * flops)
        self._flop = 1 / (shares.eta_p * flops)
        self._comm_fixed, self._comm_token = _communication_s(spec)

    def step_s(
        self,
        decode_sequences: float,
        context_tokens: float,
        prefill_tokens: float = 0,
        prefill_attention_flops: float = 0.0,
    ) -> float:
        """Seconds of one step; `context_tokens` is the sum over the decoding sequences."""
        tokens = decode_sequences + prefill_tokens
        memory = self._memory_s(decode_sequences, context_tokens, tokens)
        compute = (
            decode_sequences * self._decode_token
            + prefill_tokens * self._prefill_token
            + prefill_attention_flops * self._flop
        )
        return self._outside_s(tokens) + (memory if memory > compute else compute)

    def prompt_s(self, tokens: float) -> float:
        """Seconds of arithmetic and communication that a prompt adds to steps that run anyway."""
        flops = attention_flops(self.model, 0, tokens)
        return tokens * (self._prefill_token + self._comm_token) + flops * self._flop

    def run_s(self, decode_sequences: int, context_tokens: float, steps: int) -> float:
        """Seconds of so many steps of the same batch, whose context grows by B a step.

        The sum in closed form: in each stretch the memory time is a straight line, and compute is
        constant.
        """
        b, k = decode_sequences, steps
        inside = self._steps_inside_window(b, context_tokens)
        if 0 < inside < k:
            head = self.run_s(b, context_tokens, inside)
            return head + self.run_s(b, context_tokens + inside * b, k - inside)
        slope = b * (self._kv_full + (self._kv_sliding if inside else 0.0))
        first = self._memory_s(b, context_tokens, b)
        compute = b * self._decode_token
        flat = 0  # how many of the steps are bound by compute: the first ones
        if first < compute:
            flat = min(k, math.ceil((compute - first) / slope)) if slope else k
        rising = (k - flat) * first + slope * (k * (k - 1) - flat * (flat - 1)) / 2
        return k * self._outside_s(b) + flat * compute + rising

    def steps_within(
        self, decode_sequences: int, context_tokens: float, seconds: float, most: int
    ) -> int:
        """The least number of steps that take at least `seconds`; from 1 to `most`.

        Later steps never take less time than earlier ones, which bounds it from both sides.
        """
        b = decode_sequences
        first = self.step_s(b, context_tokens)
        hi = min(most, math.ceil(seconds / first)) if seconds < most * first else most
        if hi <= 1:
            return 1
        last = self.step_s(b, context_tokens + (hi - 1) * b)
        lo = max(1, min(hi, math.ceil(seconds / last)))
        while lo < hi:
            middle = (lo + hi) // 2
            if self.run_s(b, context_tokens, middle) >= seconds:
                hi = middle
            else:
                lo = middle + 1
        return lo

    def _memory_s(self, decode_sequences: float, context_tokens: float, tokens: float) -> float:
        seconds = self._weights + self._kv_full * context_tokens
        if self._experts:
            seconds += self._experts * (1 - self._miss**tokens)
        if self._kv_sliding:
            seconds += self._kv_sliding * min(context_tokens, decode_sequences * self._window)
        return seconds

    def _outside_s(self, tokens: float) -> float:
        return self._fixed + self._comm_fixed + tokens * self._comm_token

    def _steps_inside_window(self, b: int, context_tokens: float) -> int:
        """Steps until the mean context passes the window; 0 without sliding layers or past it."""
        if not self._kv_sliding or context_tokens >= b * self._window:
            return 0
        return math.ceil((b * self._window - context_tokens) / b)


def _communication_s(spec: EngineSpec) -> tuple[float, float]:
    """Seconds a step spends in all-reduces: whatever its size, and for each token in it."""
    if spec.tp == 1:
        return 0.0, 0.0
    link = spec.gpu.interconnect_bytes_per_s or _UNKNOWN_LINK_BYTES_PER_S
    hops = 2 * (spec.tp - 1)
    is_nvlink = link >= _NVLINK_MIN_BYTES_PER_S
    latency = _ALL_REDUCE_NVLINK_S if is_nvlink else hops * _ALL_REDUCE_PCIE_HOP_S
    reduces = 2 * spec.model.layers
    moved = hops / spec.tp * spec.model.hidden * 2
    return reduces * latency, reduces * moved / (link / 2)


def step_seconds(
    spec: EngineSpec,
    decode_sequences: int,
    context_tokens: float,
    prefill_tokens: int = 0,
    prefill_attention_flops: float = 0.0,
) -> float:
    """Seconds of one step of the engine; see `Cost`. Build a `Cost` for many."""
    return Cost(spec).step_s(
        decode_sequences, context_tokens, prefill_tokens, prefill_attention_flops
    )


def decode_step_seconds(spec: EngineSpec, sequences: int, mean_context_tokens: float) -> float:
    """t(B): seconds from one token of a stream to its next (design equation 4)."""
    return step_seconds(spec, sequences, sequences * mean_context_tokens)


def prefill_seconds(spec: EngineSpec, input_tokens: float, hit_ratio: float = 0.0) -> float:
    """Seconds to compute one prompt alone (design equation 5, plus t0 and communication a step).

    `hit_ratio` of the prompt is in the prefix cache. Prompts longer than `max_num_batched_tokens`
    take several steps, each of which reads the weights.
    """
    cost = Cost(spec)
    at, total = float(round(input_tokens * hit_ratio)), 0.0
    while at < input_tokens:
        to = min(input_tokens, at + spec.max_num_batched_tokens)
        total += cost.step_s(0, 0, to - at, attention_flops(spec.model, at, to))
        at = to
    return total
