"""What production asks of a server, as an agent observed it or as somebody declares it.

Two forms of JSON are read: a demand,

    {"window_s", "requests_per_s": {"mean", "peak"}, "concurrency": {"mean", …},
     "input_tokens": {"mean", "p50", "p95"}, "output_tokens": {…}}

and what an agent answers at /api/v1/pattern,

    {"window_s", "requests", "prompt_tokens", "output_tokens", "concurrency": {…}, …}

where the tokens are totals of the window or figures of one request as above; the figures may also
stand beside the totals, as prompt_tokens_per_request and output_tokens_per_request. Whatever is
known is taken; what is assumed for the rest is said in `notes`.
"""

from __future__ import annotations

import math
from codecs import BOM_UTF8
from statistics import NormalDist
from typing import Any

import msgspec

from agent.model import TOKENS_MAX, UsageError
from loadgen.arrival import RATE_RPS_MAX
from loadgen.lengths import Empirical, Fixed, Length, LogNormal

# Where only a mean is known. Deviation over mean was 0.96 to 1.31 for prompts and 0.73 to 2.15 for
# replies in the Azure 2023 and Mooncake traces.
ASSUMED_CV = 1.0

SHARES = {
    "min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95,
    "p99": 0.99, "p999": 0.999, "max": 1.0,
}  # fmt: skip


class Pattern(msgspec.Struct, frozen=True):
    """A load as it was observed or declared; None for what is not known."""

    window_s: float | None
    rate_rps: float | None
    rate_peak_rps: float | None
    concurrency_mean: float | None
    input_tokens: Length | None
    output_tokens: Length | None
    notes: list[str]  # what was assumed, one line each


class _Figures(msgspec.Struct):
    """Any figures of a distribution; others, such as its histogram, are not needed."""

    mean: float | None = None
    peak: float | None = None
    min: float | None = None
    p10: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


_Said = _Figures | float | None


class _Json(msgspec.Struct):
    window_s: float | None = None
    requests: float | None = None
    requests_per_s: _Said = None
    concurrency: _Said = None
    input_tokens: _Said = None
    prompt_tokens: _Said = None
    output_tokens: _Said = None
    prompt_tokens_per_request: _Figures | None = None
    output_tokens_per_request: _Figures | None = None
    gaps_s: Any = None


def parse(data: str | bytes, source: str) -> Pattern:
    """The pattern in the JSON that `source` (a path or an address) gave. Raises UsageError."""
    where = f"--workload-from {source}"
    raw = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    try:
        said = msgspec.json.decode(raw.removeprefix(BOM_UTF8), type=_Json)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: no pattern: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON: {str(error)[:100]}") from error
    if said.requests is not None and said.requests < 1:
        raise UsageError(f"{where}: no request in the window; take a longer one (?window=7d)")
    notes: list[str] = []
    if isinstance(said.gaps_s, int | float) and said.gaps_s > 0:
        notes.append(f"{said.gaps_s:g} s of the window were not observed; rates are over all of it")
    inputs = said.prompt_tokens if said.input_tokens is None else said.input_tokens
    inputs = _better(said.prompt_tokens_per_request, inputs)
    outputs = _better(said.output_tokens_per_request, said.output_tokens)
    rate_rps, peak_rps = _rates(said, where)
    pattern = Pattern(
        window_s=said.window_s,
        rate_rps=rate_rps,
        rate_peak_rps=peak_rps,
        # Requests too short for its samples leave an agent with a concurrency of 0: not known.
        concurrency_mean=_number(_mean(said.concurrency) or None, "concurrency", math.inf, where),
        input_tokens=_length(inputs, "input_tokens", said.requests, where, notes),
        output_tokens=_length(outputs, "output_tokens", said.requests, where, notes),
        notes=notes,
    )
    known = (
        pattern.rate_rps,
        pattern.concurrency_mean,
        pattern.input_tokens,
        pattern.output_tokens,
    )
    if all(value is None for value in known):
        raise UsageError(
            f"{where}: no pattern: give what an agent answers at /api/v1/pattern, or "
            '{"requests_per_s": {"mean": …}, "input_tokens": {…}, "output_tokens": {…}}'
        )
    return pattern


def _better(figures: _Figures | None, said: _Said) -> _Said:
    """The figures of one request where they say anything, else what else is said."""
    return said if figures is None or figures == _Figures() else figures


def _rates(said: _Json, where: str) -> tuple[float | None, float | None]:
    """Mean and peak in requests/s; the peak is the mean where it is not said."""
    mean = _mean(said.requests_per_s)
    window_s = _number(said.window_s, "window_s", math.inf, where)
    if mean is None and said.requests is not None and window_s is not None:
        mean = said.requests / window_s
    peak = said.requests_per_s.peak if isinstance(said.requests_per_s, _Figures) else None
    mean = _number(mean, "requests_per_s", RATE_RPS_MAX, where)
    peak = _number(peak, "requests_per_s.peak", RATE_RPS_MAX, where)
    if mean is not None and peak is not None and peak < mean:
        raise UsageError(f"{where}: requests_per_s: a peak of {peak:g} below the mean of {mean:g}")
    return mean, mean if peak is None else peak


def _mean(said: _Said) -> float | None:
    return said.mean if isinstance(said, _Figures) else said


def _number(value: float | None, name: str, high: float, where: str) -> float | None:
    if value is not None and not 0 < value <= high:
        bound = "above 0" if high == math.inf else f"above 0 and at most {high:g}"
        raise UsageError(f"{where}: {name} is {value:g}; it must be {bound}")
    return value


def _length(
    said: _Said, name: str, requests: float | None, where: str, notes: list[str]
) -> Length | None:
    """The distribution that the figures tell, or the likeliest that has them."""
    if said is None:
        return None
    if not isinstance(said, _Figures):
        if requests is None:  # somebody wrote the length itself
            return Fixed(max(1, round(_tokens(said, name, where))))
        said = _Figures(mean=said / requests)
    mean = None if said.mean is None else _tokens(said.mean, f"{name}.mean", where)
    quantiles = {
        share: max(1.0, _tokens(value, f"{name}.{figure}", where))
        for figure, share in SHARES.items()
        if (value := getattr(said, figure)) is not None
    }
    if len(quantiles) > 1:
        try:
            return Empirical.of(quantiles, mean)
        except ValueError:
            raise UsageError(
                f"{where}: {name}: its quantiles fall where they should rise"
            ) from None
    inner = next(((share, q) for share, q in quantiles.items() if 0 < share < 1), None)
    if inner is None and mean is None:
        return None
    length = _likely(mean, inner)
    told = (
        "its mean" if inner is None else "one quantile" if mean is None else "mean and a quantile"
    )
    notes.append(f"{name}: only {told} known; taken as {length}")
    return length


def _tokens(value: float, name: str, where: str) -> float:
    if not 0 <= value <= TOKENS_MAX:
        raise UsageError(f"{where}: {name} is {value:g}; write a length from 0 to {TOKENS_MAX}")
    return value


def _likely(mean: float | None, quantile: tuple[float, float] | None) -> Length:
    """The lognormal with this mean and through this quantile; with a CV of ASSUMED_CV where one of
    them is missing or no lognormal has both.

    With the mean m, the quantile q at z and the deviation s of the logarithms,
    ln q = ln m − s²/2 + z·s.
    """
    sigma = math.sqrt(math.log1p(ASSUMED_CV**2))
    if quantile is not None:
        share, q = quantile
        z = NormalDist().inv_cdf(share)
        if mean is None:
            mean = q * math.exp(sigma**2 / 2 - z * sigma)
        elif (square := z * z - 2 * math.log(q / max(mean, 1.0))) >= 0:
            roots = (z - math.sqrt(square), z + math.sqrt(square))
            sigma = min((root for root in roots if root >= 0), default=sigma)
    mean = max(1.0, mean or 1.0)
    sd = mean * math.sqrt(math.expm1(min(sigma, 5.0) ** 2))
    return LogNormal(round(mean, 1), round(min(sd, float(TOKENS_MAX)), 1))
