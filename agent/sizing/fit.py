"""Efficiencies from measured throughput, and how far a figure from them can be trusted.

Pure. The law is the engine's step (design equations 3 to 5) in closed form:

    tokens/s = B / (t0 + max(memory/η_b, decode/η_c) + prefill/η_p + communication)

with B = min(concurrency, sequences that fit, max_num_seqs), and its four unknowns are fitted to the
logarithms of measured rates: bounded, robust, drawn towards what other GPUs of the vendor reach.
Published rates follow it better (2.9 % off) than the simulated engine's own law (3.3 %), by which
a step that decodes computes prompts while it reads: max(memory/η_b, decode/η_c + prefill/η_p). What
is to be replayed is fitted by that one (`Fit.engine`), or its prompts would be a quarter too quick.
What the law leaves is smooth in concurrency and lengths, and is interpolated (kriging): inside the
swept range a measured sweep answers, outside it the law, with an interval that says so.

A figure carried to what was not measured has the error that such steps had on published
benchmarks, whole GPUs held out (`python -m tests.bench`, table "capacity model").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from agent.model import Level, UsageError
from agent.sizing import curve, engine
from agent.sizing.engine import Cost, Efficiencies, EngineSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

NAMES = ("t0_s", "eta_b", "eta_c", "eta_p")
LOWEST = Efficiencies(t0_s=1e-5, eta_b=0.02, eta_c=0.005, eta_p=0.01)
HIGHEST = Efficiencies(t0_s=0.2, eta_b=1.0, eta_c=1.0, eta_p=1.0)

# What the GPUs of a vendor have in common over all published rows (`learn`; the bench prints them
# anew). NVIDIA: A100, H100, H200, RTX 4090 under TensorRT-LLM, vLLM and SGLang, 2023 to 2026. AMD:
# MI300X alone, under a vLLM of 2024.
TYPICAL = {
    "NVIDIA": Efficiencies(t0_s=0.00355, eta_b=0.706, eta_c=0.210, eta_p=0.544),
    "AMD": Efficiencies(t0_s=0.00888, eta_b=0.744, eta_c=0.666, eta_p=0.0216),
}

# How far measured rates lay from those expected after such a step: 5 and 95 of 100 were within
# these factors of it, every row of the GPU (the engine) in question held out. The bench prints them
# with the rows behind each, and how often they held what had not shaped them.
SPREADS = {
    "precision": (0.67, 1.16),
    "model": (0.59, 1.48),
    "parallelism": (0.63, 1.48),
    "GPU": (0.69, 1.40),
    "engine": (0.50, 1.49),
    "everything": (0.50, 1.49),  # nothing of the kind was measured: another GPU, model and engine
}

# How far the efficiencies of one set-up lie from those typical of the vendor, as deviations of
# logarithms: a step's fixed cost is the host's and the engine's, bandwidth is used much alike.
_PRIOR_SD = np.array([1.0, 0.4, 0.8, 0.8])
_NOISE = 0.08  # of a measured rate's logarithm, the law's own roughness included
_BETWEEN = 0.15  # the same of a set-up against what such set-ups have in common
_OUTLIER = 0.3  # log error beyond which a point pulls no harder (Huber)
_TTFT_NOISE = 0.25  # of one stream's TTFT: it holds the client's and the network's part too

# Kriging of what the law leaves: how far apart (factors of e) concurrency, input and output have
# to be for residuals to know little of each other; the least there is; the part that all loads of
# the same lengths share, of which a sweep of one length shows nothing; the part that is each
# point's own. Chosen on the published sweeps so that about nine of ten held-out rates lie inside,
# between the loads that were measured (91 to 94 of 100), at twice the highest of them and beyond
# (87), and at other lengths than the sweep's (88).
_REACH = np.array([1.5, 1.5, 1.8])
_ROUGH = 0.03
_OF_LENGTHS = 0.13
_OWN = 0.02
_PRIORS_WORTH = 0.5  # degrees of freedom that what is known of the vendor's GPUs adds

_Z90 = 1.645  # 95 % point of the normal distribution: what both ends of a 90 % interval are made of
_STEPS_MOST = 60  # of a solution; the law has a kink, along which they can become small
_ENOUGH = 1e-4  # of the loss, where a step is the last; 1 is a deviation
_HALVINGS = 8  # of a way of at most 8 (log): to 3 %
_NEAR = 1.1  # a tenth beyond what was swept is still inside
LEAST_POINTS = 3
WORST_RMS = 0.25  # log residuals; beyond it the law does not describe this server
_FASTER = 0.1  # log residual in the middle that no efficiency up to 1 explains


class Load(msgspec.Struct, frozen=True):
    """Requests alike, so many at once."""

    input_tokens: float
    output_tokens: float
    concurrency: float
    hit_ratio: float = 0.0  # share of the prompt found in the prefix cache
    reserved: bool = False  # the KV cache is held for the whole answer from its beginning


class Point(msgspec.Struct, frozen=True):
    """What was measured at a load."""

    load: Load
    output_tokens_per_s: float
    ttft_s: float | None = None  # used of a single stream only, where nothing waits


class Estimate(msgspec.Struct, frozen=True):
    """A value with its 90 % interval."""

    value: float
    lo: float
    hi: float


class Expected(msgspec.Struct, frozen=True):
    """What is expected at a load; `ratio` to the law: what the measurement knows better than it."""

    output_tokens_per_s: Estimate
    ratio: float
    kv_bound: bool  # more requests than the KV cache holds
    outside: list[str]  # which of lengths and concurrency lie outside of what was swept


# -------------------------------------------------------------------------------------------- law


class Work:
    """What each of some loads asks of the hardware, in seconds a step at full efficiency."""

    def __init__(self, spec: EngineSpec, loads: Sequence[Load]) -> None:
        rows = [_work(spec, load) for load in loads]
        self.columns: Array = np.array(rows, dtype=np.float64).reshape(-1, 9)

    @classmethod
    def joined(cls, parts: Iterable[Work]) -> Work:
        joined = cls.__new__(cls)
        joined.columns = np.concatenate([part.columns for part in parts])
        return joined

    def log_rate(self, params: Array, *, as_simulated: bool = False) -> Array:
        """Logarithm of output tokens/s, by the logarithms of the efficiencies."""
        t0, eta_b, eta_c, eta_p = np.exp(params)
        sequences, memory, decode, prefill, outside, mixed = self.columns.T[:6]
        reading, decoding, prompts = memory / eta_b, decode / eta_c, prefill / eta_p
        plain = np.maximum(reading, decoding)
        if as_simulated:
            prompts = mixed * (np.maximum(reading, decoding + prompts / mixed) - plain)
        rate: Array = np.log(sequences / (t0 + plain + prompts + outside))
        return rate

    def log_ttft(self, params: Array) -> Array:
        """Logarithm of the TTFT of one prompt alone, in s (design equation 5)."""
        t0, eta_b, _, eta_p = np.exp(params)
        prompt, weights, outside = self.columns.T[6:]
        ttft: Array = np.log(t0 + np.maximum(prompt / eta_p, weights / eta_b) + outside)
        return ttft


def _work(spec: EngineSpec, load: Load) -> tuple[float, ...]:
    """Sequences; memory, decode, prefill and communication a step; the share of steps that compute
    prompts; then, of one prompt alone, arithmetic, weights and communication.

    Each is what is left of the engine's own step where everything else costs nothing.
    """
    b = max(1.0, min(load.concurrency, sequences_held(spec, load), spec.max_num_seqs))
    context = b * (load.input_tokens + load.output_tokens / 2)
    link, memory, decode, prefill = (_alone(spec, **shares) for shares in _ALONE)

    def prompt_s(cost: Cost) -> float:
        cached = load.input_tokens * load.hit_ratio
        return cost.prompt_s(load.input_tokens) - cost.prompt_s(cached)

    prompts = b / load.output_tokens  # that come with a step
    link_s, sent_s = link.step_s(b, context), prompt_s(link)
    return (
        b,
        memory.step_s(b, context) - link_s,
        decode.step_s(b, context) - link_s,
        prompts * (prompt_s(prefill) - sent_s),
        link_s + prompts * sent_s,
        min(1.0, prompts * math.ceil(load.input_tokens / spec.max_num_batched_tokens)),
        prompt_s(prefill) - sent_s,
        memory.step_s(0, 0, load.input_tokens) - link.step_s(0, 0, load.input_tokens),
        link.step_s(0, 0) + sent_s,
    )


_ALONE: tuple[dict[str, float], ...] = ({}, {"eta_b": 1.0}, {"eta_c": 1.0}, {"eta_p": 1.0})


def _alone(spec: EngineSpec, eta_b: float = math.inf, eta_c: float = math.inf,
           eta_p: float = math.inf) -> Cost:  # fmt: skip
    """The engine whose other parts take no time."""
    shares = Efficiencies(t0_s=0.0, eta_b=eta_b, eta_c=eta_c, eta_p=eta_p)
    return Cost(msgspec.structs.replace(spec, efficiencies=shares))


def sequences_held(spec: EngineSpec, load: Load) -> float:
    """Sequences whose KV cache fits at once (design equation 3).

    Sequences that began at different times hold ISL + OSL/2 in the mean. Those of a static batch
    reach ISL + OSL together, and TensorRT-LLM admits none that has not its last block.
    Raises UsageError where the weights do not fit.
    """
    whole = load.output_tokens / 2 if load.reserved else 0.0
    return engine.sequences_that_fit(spec, load.input_tokens + whole, load.output_tokens)


def kv_bound(spec: EngineSpec, load: Load) -> bool:
    """Are there more requests than the KV cache holds? Without any fitted parameter."""
    return load.concurrency > sequences_held(spec, load)


# -------------------------------------------------------------------------------------------- fit


class Fit:
    """The efficiencies of one server, fitted to its sweep; see `fit`.

    `ok` says whether it may be used, `why_not` in one line why it may not. `residuals` are
    measured over law, as logarithms, by point. `spec` is the measured one with these efficiencies.
    """

    def __init__(self, spec: EngineSpec, points: Sequence[Point], start: Efficiencies) -> None:
        loads = [point.load for point in points]
        self._measured, self._start = Measured(spec, points), start
        self._problem = _Problem([self._measured], start)
        self._params, self._covariance = self._problem.solve()
        self.points = tuple(points)
        self.spec = msgspec.structs.replace(spec, efficiencies=_efficiencies(self._params))
        self.residuals = tuple(
            map(float, self._measured.log_rates - self._measured.work.log_rate(self._params))
        )
        self._left = _Left(loads, np.array(self.residuals))
        self.why_not = self._why_not(loads)

    @property
    def ok(self) -> bool:
        return self.why_not is None

    @property
    def rms(self) -> float:
        """Root mean square of the residuals: 0.05 is 5 %."""
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    @cached_property
    def engine(self) -> EngineSpec:
        """The measured engine for a replay: efficiencies with which the simulated one shows these
        rates."""
        params, _ = _Problem([self._measured], self._start, as_simulated=True).solve()
        return msgspec.structs.replace(self.spec, efficiencies=_efficiencies(params))

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """t0_s, eta_b, eta_c and eta_p with their 90 % intervals.

        By profile: how far one can be moved, the others following, before the fit is worse than
        90 in 100 times by chance. So an end that the sweep did not show (compute, where memory was
        the limit all along) stays where the prior leaves it.
        """
        return {
            name: Estimate(
                math.exp(self._params[index]),
                math.exp(self._end(index, getattr(LOWEST, name))),
                math.exp(self._end(index, getattr(HIGHEST, name))),
            )
            for index, name in enumerate(NAMES)
        }

    def _end(self, index: int, bound: float) -> float:
        """Where the profile of a parameter crosses its 90 % limit, on the way to its bound."""
        spread = max(1.0, (self.rms / _NOISE) ** 2)
        most = self._problem.loss(self._params) + _Z90**2 * spread
        inside, outside = float(self._params[index]), math.log(bound)

        def is_inside(value: float) -> bool:
            return self._problem.loss(self._problem.solve((index, value))[0]) <= most

        if is_inside(outside):
            return outside
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_inside(middle) else (inside, middle)
        return inside

    @property
    def swept(self) -> dict[str, tuple[float, float]]:
        """The least and the most of input tokens, output tokens and concurrency."""
        return {
            name: (min(values), max(values))
            for name in ("input_tokens", "output_tokens", "concurrency")
            if (values := [float(getattr(point.load, name)) for point in self.points])
        }

    def outside(self, load: Load) -> list[str]:
        """What of a load lies outside of what was swept (a tenth beyond is still inside)."""
        return [
            f"{name} {getattr(load, name):g} outside {lo:g} to {hi:g}"
            for name, (lo, hi) in self.swept.items()
            if not lo / _NEAR <= getattr(load, name) <= hi * _NEAR
        ]

    def expect(self, load: Load) -> Expected:
        """Output tokens/s at a load on the same server, with the 90 % interval."""
        law, deviation = self.law(load)
        left, variance = self._left.at(load)
        half = _t90(len(self.points) - 1 + _PRIORS_WORTH) * math.hypot(
            deviation, math.sqrt(variance)
        )
        return Expected(
            output_tokens_per_s=_around(law + left, half, half),
            ratio=math.exp(left),
            kv_bound=kv_bound(self.spec, load),
            outside=self.outside(load),
        )

    def law(self, load: Load) -> tuple[float, float]:
        """Logarithm of the rate by the law alone, and its deviation from the parameters'."""
        work = Work(self.spec, [load])
        slope = _slopes(work.log_rate, self._params)[0]
        variance = float(slope @ self._covariance @ slope)
        return float(work.log_rate(self._params)[0]), math.sqrt(variance)

    def _why_not(self, loads: Sequence[Load]) -> str | None:
        if (known := len(set(loads))) < LEAST_POINTS:
            return f"{known} different loads were measured, a fit needs {LEAST_POINTS}"
        if self.rms > WORST_RMS:
            return (
                f"measured rates are {math.expm1(self.rms):.0%} off the best fit (rms): is it this "
                f"model, precision, GPU and parallelism? {self.spec.model.name}, "
                f"{self.spec.precision}, {self.spec.tp} x {self.spec.gpu.name}"
            )
        if float(np.median(self.residuals)) > _FASTER:
            return (
                f"measured faster than {self.spec.tp} x {self.spec.gpu.name} can be by its data "
                f"sheet: is it this GPU, precision ({self.spec.precision}) and parallelism?"
            )
        return None


def fit(
    levels: Iterable[Level],
    spec: EngineSpec,
    *,
    input_tokens: float | None = None,
    output_tokens: float | None = None,
) -> Fit:
    """Fits the efficiencies of `spec` to the valid levels of a sweep.

    The lengths are each level's own where it tells them, else the ones given. Starts from what
    the vendor's GPUs typically reach, where that is known. Raises UsageError where no level can
    be used, or the weights do not fit the memory.
    """
    return fit_points(points_of(levels, input_tokens, output_tokens), spec)


def fit_points(points: Sequence[Point], spec: EngineSpec, start: Efficiencies | None = None) -> Fit:
    """The same, of points; `start` is what is likely before anything was measured."""
    if not points:
        raise UsageError("no valid level with output tokens to fit the model to")
    return Fit(spec, points, start or TYPICAL.get(spec.gpu.vendor, Efficiencies()))


def points_of(
    levels: Iterable[Level], input_tokens: float | None = None, output_tokens: float | None = None
) -> list[Point]:
    """The valid levels that say what they carried. Raises UsageError where lengths lack."""
    points = []
    for level in filter(curve.is_valid, levels):
        concurrency = curve.in_flight(level)
        if not level.output_tokens_per_s or not concurrency:
            continue
        prompt = level.prompt_tokens.mean or input_tokens
        answer = level.output_tokens.mean or output_tokens
        if not prompt or not answer:
            raise UsageError("the levels do not tell their input and output tokens: give both")
        hit = level.server.prefix_hit_rate if level.server else None
        ttft_ms = level.ttft_ms.p50 or level.ttft_ms.mean
        points.append(Point(
            Load(prompt, answer, concurrency, hit or 0.0),
            level.output_tokens_per_s,
            ttft_ms / 1e3 if ttft_ms else None,
        ))  # fmt: skip
    return points


def tells_lengths(
    levels: Iterable[Level], input_tokens: float | None, output_tokens: float | None
) -> bool:
    """Do the valid levels, or what was asked of all of them, tell how long requests were?"""
    return all(
        (level.prompt_tokens.mean or input_tokens) and (level.output_tokens.mean or output_tokens)
        for level in levels
        if curve.is_valid(level)
    )


class Carried:
    """Efficiencies taken to where they were not measured: `spec` has them, `steps` says how far.

    The steps' errors are taken to be independent of each other.
    """

    def __init__(self, spec: EngineSpec, steps: Sequence[str], fitted: Fit | None = None) -> None:
        self.spec, self.steps = spec, tuple(steps)
        self._fitted = fitted
        self._below, self._above = (
            math.hypot(*(math.log(SPREADS[step][end]) for step in self.steps)) for end in (0, 1)
        )

    def expect(self, load: Load) -> Expected:
        """Output tokens/s at a load, with the 90 % interval."""
        log_rate = float(Work(self.spec, [load]).log_rate(logs(self.spec.efficiencies))[0])
        own = 0.0
        if self._fitted and not self.steps:  # flags alone: what they change, the law knows
            own = _Z90 * math.hypot(self._fitted.law(load)[1], self._fitted.rms)
        return Expected(
            output_tokens_per_s=_around(log_rate, own + self._below, own + self._above),
            ratio=1.0,
            kv_bound=kv_bound(self.spec, load),
            outside=self._fitted.outside(load) if self._fitted else [],
        )


def prior(spec: EngineSpec) -> Carried:
    """What is expected of hardware that nothing was measured on.

    Raises UsageError for a vendor that no published measurement is known of.
    """
    vendor = spec.gpu.vendor
    if vendor not in TYPICAL:
        raise UsageError(
            f"nothing is known of what {vendor}'s accelerators reach ({spec.gpu.name}): measure "
            "it, and give the sweep with --calibrate"
        )
    return Carried(msgspec.structs.replace(spec, efficiencies=TYPICAL[vendor]), ["everything"])


def transfer(fitted: Fit, spec: EngineSpec, *, same_engine: bool = True) -> Carried:
    """The fitted efficiencies on other hardware, another model, precision, engine or other flags.

    Raises UsageError where the fit failed, and for the hardware of another vendor.
    """
    if fitted.why_not:
        raise UsageError(f"the sweep cannot be used: {fitted.why_not}")
    known = fitted.spec
    if spec.gpu.vendor != known.gpu.vendor:
        raise UsageError(
            f"measured on {known.gpu.name} ({known.gpu.vendor}), asked for {spec.gpu.name} "
            f"({spec.gpu.vendor}): nothing follows for another vendor's hardware, measure there"
        )
    changed = {
        "GPU": spec.gpu.name != known.gpu.name,
        "model": spec.model != known.model,
        "precision": (spec.precision, spec.kv_precision) != (known.precision, known.kv_precision),
        "parallelism": spec.tp != known.tp,
        "engine": not same_engine,
    }
    to = msgspec.structs.replace(spec, efficiencies=known.efficiencies)
    return Carried(to, [step for step, is_changed in changed.items() if is_changed], fitted)


def learn(sweeps: Sequence[Measured], start: Efficiencies | None = None) -> Efficiencies:
    """The efficiencies that several sweeps have in common.

    A long sweep counts no more than six points, for its errors are alike.
    """
    problem = _Problem(sweeps, start or Efficiencies(), _BETWEEN, at_most=6)
    return _efficiencies(problem.solve()[0])


class Measured:
    """A sweep as the fit reads it: the work of each point, and the logarithms of what it gave."""

    def __init__(self, spec: EngineSpec, points: Sequence[Point]) -> None:
        single = [point.ttft_s if point.load.concurrency <= 1 else None for point in points]
        self.work = Work(spec, [point.load for point in points])
        self.log_rates: Array = np.log([point.output_tokens_per_s for point in points])
        self.singles = np.array([ttft is not None for ttft in single])
        self.log_ttfts: Array = np.log([ttft for ttft in single if ttft is not None])


class _Problem:
    """What has to be as small as it can be: squared errors in deviations, robust, and the prior.

    `noise` is the deviation of one rate's logarithm; of a sweep, as much counts as of `at_most`.
    """

    def __init__(
        self,
        sweeps: Sequence[Measured],
        start: Efficiencies,
        noise: float = _NOISE,
        at_most: float = math.inf,
        as_simulated: bool = False,
    ) -> None:
        self._as_simulated = as_simulated
        self._work = Work.joined(sweep.work for sweep in sweeps)
        self._rates, self._singles, self._ttfts = (
            np.concatenate([getattr(sweep, name) for sweep in sweeps])
            for name in ("log_rates", "singles", "log_ttfts")
        )
        sizes = [len(sweep.log_rates) for sweep in sweeps]
        each = np.sqrt(np.minimum(1.0, at_most / np.repeat(sizes, sizes)))
        self._weights: Array = np.concatenate(
            [each / noise, each[self._singles] / max(noise, _TTFT_NOISE)]
        )
        self._limit = _OUTLIER * self._weights
        self._mean = logs(start)

    def loss(self, params: Array) -> float:
        size, limit = np.abs(self._errors(params)), self._limit
        robust = np.where(size < limit, size**2, limit * (2 * size - limit))
        return float(robust.sum() + np.sum(((params - self._mean) / _PRIOR_SD) ** 2))

    def solve(self, held: tuple[int, float] | None = None) -> tuple[Array, Array]:
        """The best parameters and their covariance, by Levenberg and Marquardt; one may be held."""
        lowest, highest = logs(LOWEST), logs(HIGHEST)
        if held:
            lowest[held[0]] = highest[held[0]] = held[1]
        prior = np.diag(_PRIOR_SD**-2)
        params, damping = np.clip(self._mean, lowest, highest), 1e-2
        loss = self.loss(params)
        for _ in range(_STEPS_MOST):
            errors = self._errors(params)
            counted = np.minimum(1.0, self._limit / np.maximum(np.abs(errors), 1e-12))
            slopes = _slopes(self._errors, params)
            curvature = slopes.T @ (slopes * counted[:, None]) + prior
            gradient = slopes.T @ (errors * counted) + prior @ (params - self._mean)
            free = lowest < highest
            gradient[~free] = 0.0
            damped = curvature + damping * np.diag(np.diag(curvature))
            damped[~free] = damped[:, ~free] = 0.0
            damped[~free, ~free] = 1.0
            tried = np.clip(params - np.linalg.solve(damped, gradient), lowest, highest)
            better = loss - (after := self.loss(tried))
            if better > 0:
                params, loss, damping = tried, after, max(damping / 5, 1e-6)
            else:
                damping *= 5
            if 0 < better < _ENOUGH or damping > 1e6:
                break
        spread = max(1.0, float(np.mean(counted * errors**2)))
        return params, np.asarray(np.linalg.inv(curvature / spread), dtype=np.float64)

    def _errors(self, params: Array) -> Array:
        """Law less measured, in deviations."""
        rates = self._work.log_rate(params, as_simulated=self._as_simulated) - self._rates
        ttfts = self._work.log_ttft(params)[self._singles] - self._ttfts
        errors: Array = np.concatenate([rates, ttfts]) * self._weights
        return errors


def _slopes(function: Callable[[Array], Array], params: Array) -> Array:
    """Derivatives by each parameter, a column each."""
    step = 1e-5
    ahead = [function(params + step * unit) for unit in np.eye(len(params))]
    behind = [function(params - step * unit) for unit in np.eye(len(params))]
    slopes: Array = np.transpose(np.subtract(ahead, behind)) / (2 * step)
    return slopes


class _Left:
    """What the law leaves, between the points (simple kriging with an exponential covariance)."""

    def __init__(self, loads: Sequence[Load], residuals: Array) -> None:
        self._places = self._features(loads)
        self._variance = max(_ROUGH, float(np.sqrt(np.mean(residuals**2)))) ** 2
        covariance = self._covariance(self._places) + _OWN**2 * np.eye(len(loads))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ residuals

    def at(self, load: Load) -> tuple[float, float]:
        """Mean and variance of a new measurement's log residual."""
        near = self._covariance(self._features([load]))[0]
        whole = self._variance + _OF_LENGTHS**2 + _OWN**2
        variance = whole - float(near @ self._inverse @ near)
        return float(near @ self._weights), variance

    def _covariance(self, places: Array) -> Array:
        steps = places[:, None] - self._places
        apart, lengths_apart = (np.linalg.norm(part, axis=2) for part in (steps, steps[:, :, 1:]))
        smooth = self._variance * np.exp(-apart)
        return np.asarray(smooth + _OF_LENGTHS**2 * np.exp(-lengths_apart))

    @staticmethod
    def _features(loads: Sequence[Load]) -> Array:
        rows = [(load.concurrency, load.input_tokens, load.output_tokens) for load in loads]
        return np.asarray(np.log(np.maximum(rows, 1.0)) / _REACH)


def logs(shares: Efficiencies) -> Array:
    return np.log([getattr(shares, name) for name in NAMES])


def _efficiencies(params: Array) -> Efficiencies:
    return Efficiencies(**dict(zip(NAMES, map(float, np.exp(params)), strict=True)))


def _t90(degrees_of_freedom: float) -> float:
    """95 % point of Student's t (Cornish-Fisher; 2 % off at two degrees of freedom)."""
    n = max(1.0, degrees_of_freedom)
    return _Z90 + 1.524 / n + 1.420 / n**2


def _around(log_value: float, below: float, above: float) -> Estimate:
    return Estimate(*(math.exp(log_value + by) for by in (0.0, -below, above)))
