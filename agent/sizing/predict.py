"""What the capacity model expects of hardware that is not there: `agent predict`.

Pure. A basis (`fit.Prior`: what such GPUs reach; `fit.Fit`: what a sweep showed) gives tokens/s
with an interval, `steady` the latencies that go with it. What cannot be said is refused with its
reason, which is an answer too: a figure across vendors, or of weights that do not fit, would look
like any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import msgspec

from agent.model import Sweep, UsageError
from agent.sizing.engine import (
    Cost,
    EngineSpec,
    check,
    kv_bytes_per_token,
    kv_capacity_tokens,
    max_model_len,
    weight_bytes,
)
from agent.sizing.hardware import GIB, Gpu, device, gpu, pick
from agent.sizing.models import model, precision_in
from agent.sizing.steady import Steady, steady
from agent.words import printable

if TYPE_CHECKING:
    from agent.sizing.fit import Expected, Load, Point

ENGINES = ("vllm", "sglang", "tensorrt-llm")
_CALLED = {"trtllm": "tensorrt-llm", "trt-llm": "tensorrt-llm", "tensorrt": "tensorrt-llm"}
_RESERVES = ("tensorrt-llm",)  # admit a request only with all the KV cache it will ever need

# Of 512 published closed-loop rows (vLLM, SGLang, TensorRT-LLM on H100 and H200; in each the
# engine's speed taken as measured), TTFT had its least median error, 25 %, with 30 ms for what is
# not the GPU (HTTP, tokenizer, scheduler) and a fifth of the prompts that could stand before one
# standing there: clients that began together stay together. Nine tenths of the rows lay between
# these factors of it; the upper ones are engines that delay prompts on purpose.
_FRONT_MS = 30.0
_BEFORE = 0.2
_TTFT_90 = (0.6, 5.5)
_TTFT_SD = 0.15  # least deviation (log) of a server's own TTFT from the formula scaled to it
_Z90 = 1.645


class Interval(msgspec.Struct, frozen=True):
    """A value, and where nine of ten measurements should lie."""

    value: float
    lo90: float
    hi90: float


class PredictedLevel(msgspec.Struct, frozen=True):
    """What `concurrency` clients of the whole deployment would see; times are means."""

    concurrency: float
    output_tokens_per_s: Interval
    ttft_ms: Interval
    tpot_ms: Interval
    kv_bound: bool  # it is the KV cache that keeps the batch from being larger
    fits: bool  # nobody waits: cache, max_num_seqs and token budget take all of them at once
    outside: list[str]  # what of it lies outside of what the sweep of --calibrate covered


class Assumed(msgspec.Struct, frozen=True):
    """What the figures are of."""

    gpu: str
    gpus: int
    model: str
    precision: str
    kv_precision: str
    tp: int
    replicas: int
    engine: str
    input_tokens: float
    output_tokens: float
    weights_bytes: float
    kv_capacity_tokens: int | None  # of one replica; null where the weights do not fit
    basis: str  # where the efficiencies are from


class Prediction(msgspec.Struct, frozen=True):
    """`levels` are empty exactly where `refused` says why."""

    levels: list[PredictedLevel]
    refused: str | None
    assumed: Assumed


class Basis(Protocol):
    """What tokens/s are worked out of; `fit.Fit` and `fit.Prior` are such."""

    @property
    def spec(self) -> EngineSpec: ...

    def expect(self, load: Load) -> Expected: ...


class Deployment(msgspec.Struct, frozen=True):
    """So many engines alike behind one address that shares requests out evenly."""

    spec: EngineSpec
    replicas: int = 1
    engine: str = "vllm"

    @property
    def reserves(self) -> bool:
        return self.engine in _RESERVES


def engine_named(name: str) -> str:
    """The engine that a name means, with or without its version: `trtllm 1.0.0rc3`, `vLLM 0.8.5`.

    Raises UsageError for one that nothing is known of.
    """
    found = re.match(r"[a-z][a-z-]*", name.strip().lower())
    word = found[0].rstrip("-") if found else name
    return pick("engine", _CALLED.get(word, word), ENGINES)


def usual_seats(engine: str, card: Gpu) -> int:
    """Requests an engine takes into its batch where no flag says how many.

    vLLM's (0.10 and newer) depends on the GPU; SGLang's and TensorRT-LLM's is 2,048.
    """
    if engine_named(engine) != "vllm":
        return 2048
    is_large = card.memory_bytes >= 70 * GIB and not card.name.startswith("A100")
    return 1024 if is_large else 256


def deployment(
    spec: EngineSpec,
    gpus: int | None = None,
    *,
    tp: int | None = None,
    replicas: int | None = None,
    engine: str = "vllm",
) -> Deployment:
    """`gpus` GPUs as replicas of tensor parallelism: by default one engine over all of them.

    Where `gpus` is not given, it is what the others come to.

    Raises UsageError where that does not come to `gpus`, or the engine could not split the model.
    """
    engine = engine_named(engine)
    gpus = gpus or (tp or 1) * (replicas or 1)
    tp = tp or max(1, gpus // (replicas or 1))
    replicas = replicas or max(1, gpus // max(1, tp))
    if tp < 1 or tp * replicas != gpus:
        raise UsageError(
            f"{replicas} replicas of --tp {tp} are {tp * replicas} GPUs, not {gpus}: give --gpus, "
            "--tp and --replicas so that tp times replicas is gpus"
        )
    heads = spec.model.heads
    if heads % tp:
        can = ", ".join(str(n) for n in range(1, gpus + 1) if not heads % n and not gpus % n)
        raise UsageError(
            f"--tp {tp}: the {heads} attention heads of {spec.model.name} cannot be shared by "
            f"{tp} GPUs; of {gpus} GPUs --tp can be {can}"
        )
    spec = msgspec.structs.replace(spec, tp=tp)
    if engine == "tensorrt-llm":
        spec = msgspec.structs.replace(spec, gpu_memory_utilization=_share_of_free(spec))
    return Deployment(spec, replicas, engine)


def _share_of_free(spec: EngineSpec) -> float:
    """TensorRT-LLM gives the cache a share of what weights and activations leave, not of all.

    The same pool as a share of all memory, as vLLM counts it.
    """
    fixed = spec.activation_bytes + weight_bytes(spec.model, spec.precision) / spec.tp
    share = spec.gpu_memory_utilization
    return share + (1 - share) * min(1.0, fixed / spec.gpu.memory_bytes)


def measured_spec(
    sweep: Sweep,
    asked: EngineSpec,
    *,
    card: Gpu | None = None,
    tp: int | None = None,
    precision: str | None = None,
    own: Mapping[str, Gpu] | None = None,
) -> EngineSpec:
    """The engine that a sweep measured.

    What is given here comes first, then what the sweep tells of its target: `loadgen` has the
    checkpoint's own name, so that a known model without a precision in it is in bf16. What neither
    tells is as asked, and the answer's `basis` says what it was taken for. Raises UsageError for a
    GPU that the catalogue does not have.
    """
    names = [one.name for one in sweep.target.gpus]
    simulated = sweep.target.url.startswith("sim:")
    if card is None and simulated:
        card = gpu(sweep.target.url.removeprefix("sim:").partition("/")[0], own)
    elif card is None and names:
        try:
            card = device(names[0], own) or gpu(names[0], own)
        except UsageError as error:
            raise UsageError(
                f"the sweep was measured on {names[0]!r}, which the catalogue of GPUs does not "
                "have: say which it is with --measured-gpu, or describe it in --gpus-file"
            ) from error
    elif card is None:
        card = asked.gpu
    tp = tp or len(names) or (1 if simulated else asked.tp)
    try:
        shape = model(sweep.target.model)
        untold = "bf16" if sweep.run.tool_version else asked.precision
    except UsageError:  # a name of the operator's own
        shape, untold = asked.model, asked.precision
    told = precision or precision_in(sweep.target.model) or untold
    return msgspec.structs.replace(asked, gpu=card, model=shape, precision=told, tp=tp)


# ----------------------------------------------------------------------------------------- figures


class TtftScale(msgspec.Struct, frozen=True):
    """How a server's TTFT stands to the formula: a factor, and the factors of its interval."""

    value: float = 1.0
    lo: float = _TTFT_90[0]
    hi: float = _TTFT_90[1]


def predict(
    basis: Basis,
    deployed: Deployment,
    concurrency: Sequence[float],
    input_tokens: float,
    output_tokens: float,
    ttft: TtftScale | None = None,
) -> list[PredictedLevel]:
    """What each number of clients would see. `basis.spec` is the engine of `deployed`.

    Raises UsageError where the engine could not be started so, or a request does not fit in it.
    """
    scale = ttft or TtftScale()
    return [
        _level(basis, deployed, clients, input_tokens, output_tokens, scale)
        for clients in concurrency
    ]


def _level(
    basis: Basis,
    deployed: Deployment,
    clients: float,
    input_tokens: float,
    output_tokens: float,
    ttft: TtftScale,
) -> PredictedLevel:
    """One replica with its share of the clients, all replicas' tokens added up."""
    from agent.sizing.fit import Load

    share = clients / deployed.replicas
    one = max(1.0, share)  # fewer clients than replicas: each has a replica to itself
    law = steady(basis.spec, one, input_tokens, output_tokens, reserves=deployed.reserves)
    said = basis.expect(Load(input_tokens, output_tokens, one, reserved=deployed.reserves))
    rate = said.output_tokens_per_s
    # The law's times, at the speed that is expected: longer by as much as tokens/s are fewer.
    slower = Interval(*(law.output_tokens_per_s / by for by in (rate.value, rate.hi, rate.lo)))
    parts = ttft_parts(basis.spec, law, input_tokens, output_tokens)
    busy = deployed.replicas * min(1.0, share)
    return PredictedLevel(
        concurrency=clients,
        output_tokens_per_s=Interval(rate.value * busy, rate.lo * busy, rate.hi * busy),
        ttft_ms=Interval(
            parts.ms(slower.value, ttft.value),
            parts.ms(slower.lo90, ttft.value * ttft.lo),
            parts.ms(slower.hi90, ttft.value * ttft.hi),
        ),
        tpot_ms=Interval(*(law.tpot_ms * by for by in (slower.value, slower.lo90, slower.hi90))),
        kv_bound=said.kv_bound and law.sequences_that_fit < basis.spec.max_num_seqs,
        fits=law.fits and not said.kv_bound,
        outside=said.outside,
    )


class TtftParts(msgspec.Struct, frozen=True):
    """What a TTFT is made of, in ms at the law's speed; `front_ms` is not the engine's."""

    queue_ms: float
    own_ms: float  # the step it finds, the prompts before it, its own prompt
    front_ms: float = _FRONT_MS

    def ms(self, slower: float, factor: float) -> float:
        """At another speed; `factor` is for all but the queue, which Little's law settles."""
        return slower * self.queue_ms + factor * (self.front_ms + slower * self.own_ms)


def ttft_parts(
    spec: EngineSpec, law: Steady, input_tokens: float, output_tokens: float
) -> TtftParts:
    """The law's TTFT, and the share of the other prompts that stand before one's own."""
    queue_ms = 1e3 * law.waiting * output_tokens / law.output_tokens_per_s
    before_ms = _BEFORE * (law.decoding - 1) / 2 * 1e3 * Cost(spec).prompt_s(input_tokens)
    return TtftParts(queue_ms, law.ttft_ms - queue_ms + before_ms)


def ttft_scale(points: Iterable[Point], spec: EngineSpec) -> TtftScale:
    """How the TTFT of a measured server stands to the formula, from its loads without a queue.

    That of published servers where none tells.
    """
    logs = []
    for point in points:
        load = point.load
        law = steady(spec, max(1.0, load.concurrency), load.input_tokens, load.output_tokens)
        if law.fits and point.ttft_s:
            slower = law.output_tokens_per_s / point.output_tokens_per_s
            parts = ttft_parts(spec, law, load.input_tokens, load.output_tokens)
            logs.append(math.log(1e3 * point.ttft_s / parts.ms(slower, 1)))
    if not logs:
        return TtftScale()
    middle = fmean(logs)
    off = math.sqrt(fmean((log - middle) ** 2 for log in logs) + _TTFT_SD**2)
    return TtftScale(math.exp(middle), math.exp(-_Z90 * off), math.exp(_Z90 * off))


# ------------------------------------------------------------------------------------- the answer


def answer(
    deployed: Deployment,
    concurrency: Sequence[float],
    input_tokens: float,
    output_tokens: float,
    sweep: Sweep | None = None,
    measured: EngineSpec | None = None,
) -> Prediction:
    """The prediction, or why there is none. `measured` is the engine that `sweep` is of.

    Raises UsageError for what the asker can mend in the question itself.
    """
    spec = deployed.spec
    weights = weight_bytes(spec.model, spec.precision)
    kv_bytes_per_token(spec.model, spec.kv_precision)  # an unknown precision is wrong usage
    capacity, levels, source, refused = None, [], "", None
    try:
        check(spec)
        capacity = kv_capacity_tokens(spec)
        _check_length(spec, input_tokens + output_tokens)
        asked = (input_tokens, output_tokens)
        basis, ttft, source = _basis(deployed, sweep, measured or spec, asked)
        levels = predict(basis, deployed, concurrency, input_tokens, output_tokens, ttft)
    except UsageError as error:
        refused = str(error)
    return Prediction(
        levels=levels,
        refused=refused,
        assumed=Assumed(
            gpu=spec.gpu.name,
            gpus=spec.tp * deployed.replicas,
            model=spec.model.name,
            precision=spec.precision,
            kv_precision=spec.kv_precision,
            tp=spec.tp,
            replicas=deployed.replicas,
            engine=deployed.engine,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            weights_bytes=weights,
            kv_capacity_tokens=capacity,
            basis=source,
        ),
    )


def _check_length(spec: EngineSpec, tokens: float) -> None:
    if tokens > (longest := max_model_len(spec)):
        raise UsageError(
            f"a request of {tokens:,.0f} tokens is longer than the {longest:,} that "
            f"{spec.model.name} takes on {spec.tp} x {spec.gpu.name}"
        )


def _basis(
    deployed: Deployment, sweep: Sweep | None, measured: EngineSpec, asked: tuple[float, float]
) -> tuple[Basis, TtftScale, str]:
    """What to work with, and in words where it is from. Raises UsageError where nothing will do.

    A sweep that does not tell its lengths is taken to be of those that are `asked` for.
    """
    from agent.sizing import curve, fit

    spec = deployed.spec
    if sweep is None:
        return fit.prior(spec), TtftScale(), "published benchmarks of the vendor's GPUs"
    prompt, answer = (curve.mean_length(one) for one in
                      (sweep.workload.input_tokens, sweep.workload.output_tokens))  # fmt: skip
    fitted = fit.fit(
        sweep.levels, measured, input_tokens=prompt or asked[0], output_tokens=answer or asked[1]
    )
    if not fitted.ok:
        raise UsageError(f"the sweep cannot be used to calibrate: {fitted.why_not}")
    kind = "simulated sweep" if sweep.run.simulated else "sweep"
    on = f"a {kind} of {measured.model.name} in {measured.precision} on "
    on += f"{measured.tp} x {measured.gpu.name}"
    if not fit.tells_lengths(sweep.levels, prompt, answer):
        on += f", taken to be of {asked[0]:,.0f} + {asked[1]:,.0f} tokens, for it does not tell"
    same = _same_engine(sweep.target.engine, deployed.engine)
    if not same:
        on += f", served by {sweep.target.engine}"
    basis = fitted if same and measured == spec else fit.transfer(fitted, spec, same_engine=same)
    return basis, ttft_scale(fitted.points, fitted.spec), on


def _same_engine(measured: str | None, asked: str) -> bool:
    """Is it the same engine, whatever its version? A sweep that does not tell it is of the same."""
    try:
        return not measured or engine_named(measured) == asked
    except UsageError:  # one that nothing is known of
        return False


def lines(prediction: Prediction) -> list[str]:
    """The prediction as text for a terminal."""
    of = prediction.assumed
    engines = f"{of.replicas} replicas of " if of.replicas > 1 else ""
    head = (
        f"{of.model} in {of.precision} on {engines}{of.tp} x {of.gpu}, {of.engine}; requests of "
        f"{of.input_tokens:,.0f} + {of.output_tokens:,.0f} tokens"
    )
    if prediction.refused:
        return [printable(head), printable(f"refused: {prediction.refused}")]
    held = f"weights {of.weights_bytes / GIB:,.1f} GiB"
    held += f", KV cache {of.kv_capacity_tokens or 0:,} tokens"
    return [
        printable(head),
        printable(f"{held}{' each' if of.replicas > 1 else ''}; from {of.basis}"),
        "in brackets: where nine of ten measurements should lie",
        "",
        *_table(prediction.levels),
    ]


def _table(levels: Sequence[PredictedLevel]) -> list[str]:
    rows = [("clients", "tok/s", "TTFT ms", "TPOT ms", "")]
    rows += [
        (
            f"{one.concurrency:,g}",
            _interval(one.output_tokens_per_s),
            _interval(one.ttft_ms),
            _interval(one.tpot_ms),
            _remark(one),
        )
        for one in levels
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.rjust(n) for cell, n in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def _interval(one: Interval) -> str:
    return f"{_short(one.value)} [{_short(one.lo90)}–{_short(one.hi90)}]"


def _short(value: float) -> str:
    """Three digits are more than is known."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def _remark(one: PredictedLevel) -> str:
    said = []
    if not one.fits:
        said.append("some wait: KV cache full" if one.kv_bound else "some wait: batch full")
    if one.outside:
        said.append(", ".join(one.outside))
    return "; ".join(said)
