"""The requests of a time, one by one: recorded, or drawn so that an agent's minutes come out.

Pure. What a replay serves: when each request came and how long its prompt and its reply were. Who
has them asks for nothing else (a trace's columns, the server's own spans); who has minute records
gets requests that add up to them, minute by minute.

What minutes cannot tell is drawn, with a random generator that is passed in:

- When inside its minute a request came. Its gaps are gamma distributed, with the square of their
  coefficient of variation the index of dispersion that the minutes of an hour showed, and never
  less than 1: what bunches from minute to minute is taken to bunch inside them too.
- Which prompt had which reply. Lengths are drawn independently, from the histograms of the same
  hour of the day, and brought to their exact mean: inside a bucket the neighbours tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent.model import UsageError
from agent.sizing.pattern import Pattern, arrivals_per_record
from agent.sizing.window import Window
from agent.stats import Floats, Histogram

Tokens = NDArray[np.int64]

DISPERSION_MAX = 100.0  # a CV of 10; beyond, a minute is one burst
LENGTHS_LEAST = 100  # of an hour of the day, to have a distribution of its own
HOUR_S = 3600.0
DRAWN_MOST = 2_000_000  # requests; about 100 MB
DECAY_MOST = 20.0  # from one end of a bucket to the other: by a factor of e to that power
COPY_WITHIN_S = 30.0  # how far from the observed request its copies may come, either way


class Arrivals(msgspec.Struct, frozen=True):
    """Requests in order of their instants, which count from `start_unix_s`."""

    at_s: Floats
    prompt_tokens: Tokens
    output_tokens: Tokens
    cached_tokens: Tokens  # of the prompt, found in the prefix cache
    window_s: float
    start_unix_s: float = 0.0

    def __len__(self) -> int:
        return int(self.at_s.size)

    @property
    def mean_rps(self) -> float:
        """Requests a second of the window; 0 where it has no length."""
        return len(self) / self.window_s if self.window_s else 0.0

    @property
    def hours(self) -> NDArray[np.int64]:
        """The hour of each request, by the clock, counted from the window's first one."""
        first = self.start_unix_s // HOUR_S
        return ((self.start_unix_s + self.at_s) // HOUR_S - first).astype(np.int64)

    def only(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Arrivals:
        """Some of the requests, in the same window."""
        return msgspec.structs.replace(
            self,
            at_s=self.at_s[chosen],
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            cached_tokens=self.cached_tokens[chosen],
        )


def recorded(
    at_s: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    cached_tokens: ArrayLike = 0,
    window_s: float | None = None,
    start_unix_s: float = 0.0,
) -> Arrivals:
    """Requests as they were recorded, put in order; the window ends with the last by default.

    Raises UsageError where an instant is negative or no number, a length under 1, or the columns
    are not equally long.
    """
    at: Floats = np.asarray(at_s, dtype=np.float64)
    prompt, output = (np.asarray(one, dtype=np.int64) for one in (prompt_tokens, output_tokens))
    if not at.shape == prompt.shape == output.shape:
        raise UsageError("arrivals: instants, prompts and replies are not equally many")
    cached = np.broadcast_to(np.asarray(cached_tokens, dtype=np.int64), at.shape)
    if at.size and not (at.min() >= 0 and np.isfinite(at).all()):
        raise UsageError("arrivals: an instant is negative, or no number of seconds")
    if at.size and min(prompt.min(), output.min(), cached.min() + 1) < 1:
        raise UsageError("arrivals: a request needs at least one prompt token and one output token")
    last_s = float(at.max()) if at.size else 0.0
    whole = Arrivals(at, prompt, output, cached, max(window_s or 0.0, last_s), start_unix_s)
    return whole.only(np.argsort(at, kind="stable"))


def served(rows: Iterable[Mapping[str, Any]], from_s: float, to_s: float) -> Arrivals:
    """The requests that the server's own spans told, as `agent.recall.Recall.served` has them.

    Those whose lengths are not known are left out. Raises UsageError where there are no others.
    """
    known = [
        (row["at_ms"] / 1e3 - from_s, row["prompt_tokens"], row["output_tokens"])
        for row in rows
        if row["prompt_tokens"] and row["output_tokens"]
    ]
    if not known:
        raise UsageError(
            "no request with its lengths in this window: the server's spans tell them "
            "([receive.otlp] in the agent's configuration)"
        )
    at_s, prompt, output = zip(*known, strict=True)
    return recorded(at_s, prompt, output, window_s=to_s - from_s, start_unix_s=from_s)


# -------------------------------------------------------------------------------- drawn of minutes


def observed(
    window: Window,
    pattern: Pattern,
    rng: np.random.Generator,
    *,
    dispersion: float | None = None,
    most: int = DRAWN_MOST,
) -> Arrivals:
    """Requests that came as the minutes of a window say; `pattern` is that of the same window.

    `dispersion` inside a minute is by default that of the minutes of an hour, which is cautious
    for whoever wants to shrink; 1, independent instants, is so for whoever says that it does not
    fit. Of Azure's traces of 2023 the multiple that fits was 0.38 to 0.44 and 1.76 so (code, whose
    minutes have a dispersion of 171; truly 0.62), and 2.38 and 2.71 (conversation; truly 2.43).

    Of more than `most` requests those of the busiest hours are drawn. Prompts are cached by the
    share that the prefix cache hit in the window. Raises UsageError where no server counts its
    requests, or none tells how long they are.
    """
    counts = arrivals_per_record(window)
    if counts is None:
        raise UsageError("no server of this window counts its requests: nothing to replay")
    starts = window.starts_unix_s - window.start_unix_s
    whole = _whole(counts)
    if whole.sum() > most:
        clock = (window.starts_unix_s // HOUR_S).astype(np.int64)
        hours = clock - clock[0]
        of_hour = np.bincount(hours, whole)
        whole = np.where(_first_hours(of_hour, of_hour, most)[hours], whole, 0)
    records = np.repeat(np.arange(window.places), whole)
    if dispersion is None:
        dispersion = pattern.burstiness.within_hours or 1.0
    at_s = starts[records] + window.record_s * _inside(records, dispersion, rng)
    of_day = (window.starts_unix_s // HOUR_S % 24).astype(np.int64)
    lengths = {
        what: _lengths(window, pattern, what, of_day, records, rng) for what in ("prompt", "output")
    }
    return recorded(
        np.clip(at_s, 0.0, window.window_s),
        lengths["prompt"],
        lengths["output"],
        cached_tokens=np.floor(lengths["prompt"] * (pattern.prefix_hit_rate or 0.0)),
        window_s=window.window_s,
        start_unix_s=window.start_unix_s,
    )


def _whole(counts: Floats) -> NDArray[np.int64]:
    """Counts as whole numbers of the same sum, one behind the other; a negative one takes from
    those after it."""
    reached = np.maximum.accumulate(np.maximum(0.0, np.cumsum(counts)))
    return np.diff(np.round(reached + 1e-9), prepend=0.0).astype(np.int64)


def _inside(
    records: NDArray[np.int64], dispersion: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """When inside its record each request comes, 0 to 1, with gamma gaps; rising in each record.

    n requests have n + 1 gaps, before the first and after the last too. Of a shape of 1 they are
    the order statistics of n independent instants: Poisson, given the count.
    """
    squared_cv = min(max(dispersion, 1.0), DISPERSION_MAX)
    _, begins, counts = np.unique(records, return_index=True, return_counts=True)
    gaps = rng.gamma(1 / squared_cv, size=records.size + counts.size) + 1e-12
    firsts = begins + np.arange(counts.size)  # the first gap of each record
    total = np.add.reduceat(gaps, firsts) if records.size else gaps
    reached = np.cumsum(gaps)
    before = reached[firsts] - gaps[firsts]
    is_last = np.zeros(gaps.size, dtype=bool)
    is_last[firsts + counts] = True
    inside: Floats = (reached[~is_last] - np.repeat(before, counts)) / np.repeat(total, counts)
    return np.clip(inside, 0.0, 1.0)


def _lengths(
    window: Window,
    pattern: Pattern,
    what: str,
    of_day: NDArray[np.int64],
    records: NDArray[np.int64],
    rng: np.random.Generator,
) -> Tokens:
    """A length for each request."""
    name = f"{what}_length_tokens"
    whole: Floats | None = None
    drawn: Floats = np.empty(records.size)
    hours = of_day[records]
    for hour in np.unique(hours):
        here = np.flatnonzero(hours == hour)
        own = window.histograms(name, (of_day == hour).astype(np.float64))
        if sum(one.n for one in own) >= LENGTHS_LEAST:
            drawn[here] = _draw(own, here.size, _mean(window, name, of_day == hour), rng)
            continue
        if whole is None:
            whole = _draw_whole(window, pattern, what, records.size, rng)
        drawn[here] = whole[here]
    return np.maximum(1, np.round(drawn)).astype(np.int64)


def _draw_whole(
    window: Window, pattern: Pattern, what: str, n: int, rng: np.random.Generator
) -> Floats:
    """From the histograms of the whole window; of a mean alone, lengths of a CV of 1."""
    known = getattr(pattern, f"{what}_tokens_per_request")
    own = window.histograms(f"{what}_length_tokens")
    if sum(one.n for one in own) > 0:
        return _draw(own, n, known.mean, rng)
    if known.mean is None:
        raise UsageError(
            f"no server of this window tells how long its requests' {what}s are: nothing to replay"
        )
    return rng.exponential(known.mean, n)


def _mean(window: Window, name: str, places: NDArray[np.bool_]) -> float | None:
    """The exact mean, by the histogram's own sum and count."""
    n = float(window.total(f"{name}_count")[places].sum())
    return float(window.total(f"{name}_sum")[places].sum()) / n if n > 0 else None


def _draw(
    histograms: Sequence[Histogram], n: int, mean: float | None, rng: np.random.Generator
) -> Floats:
    """Lengths that get rarer inside each bucket as they do from its neighbours to it.

    Even ones would put too much at the far end of a tail's wide buckets: of gamma distributed
    lengths (shape 2) in vLLM's buckets the standard deviation was 18 % too large so. The mean,
    which histograms tell exactly, says how much faster or slower than the neighbours let expect:
    with it 2 %, and P10 to P95 are within 3 %. Those of the endless bucket are at its lower end.
    """
    low = np.concatenate([(0.0, *one.bounds[:-1]) for one in histograms])
    high = np.concatenate([one.bounds for one in histograms])
    width = np.where(np.isfinite(high), high - low, 0.0)
    counts = np.concatenate([one.counts for one in histograms])
    share = counts / counts.sum()
    decay = width * np.concatenate([_decay(one) for one in histograms])  # over the bucket
    if mean is not None:
        decay = _to_mean(decay, low, width, share, mean)
    bucket = rng.choice(low.size, n, p=share)
    over = _not_flat(decay)[bucket]
    drawn: Floats = low[bucket] - width[bucket] * np.log1p(rng.random(n) * np.expm1(-over)) / over
    found = float(drawn.mean()) if n else 0.0  # 0 where the endless bucket is the only one
    return drawn * (mean / found) if mean and found else drawn


def _decay(one: Histogram) -> Floats:
    """Of each bucket, how fast the logarithm of the density falls, per token.

    The mean of the slopes to its two neighbours, where an empty one counts as half a request.
    """
    bounds, counts = np.asarray(one.bounds, dtype=np.float64), np.asarray(one.counts)
    width = np.diff(bounds, prepend=0.0)
    near = np.convolve(counts > 0, (1, 1, 1), "same") > 0
    known = np.flatnonzero(np.isfinite(width) & (width > 0) & near)
    decay: Floats = np.zeros(bounds.size)
    if known.size > 1:
        density = np.log(np.maximum(counts[known], 0.5) / width[known])
        falls = -np.diff(density) / np.diff(bounds[known] - width[known] / 2)
        decay[known] = (np.append(falls, falls[-1]) + np.append(falls[0], falls)) / 2
    return decay


def _to_mean(decay: Floats, low: Floats, width: Floats, share: Floats, mean: float) -> Floats:
    """With a rate on top that is the same in all buckets, so that the mean comes out."""
    relative = width / max(1e-9, float(width[share > 0].max()))
    least, most = -DECAY_MOST, DECAY_MOST
    for _ in range(40):
        middle = (least + most) / 2
        over = _not_flat(decay + middle * relative)
        place = 1 / over - 1 / np.expm1(over)
        if float(share @ (low + width * place)) > mean:
            least = middle
        else:
            most = middle
    return decay + most * relative


def _not_flat(decay: Floats) -> Floats:
    """Bounded, and never 0, where the formulas of a decay have a gap."""
    bounded = np.clip(decay, -2 * DECAY_MOST, 2 * DECAY_MOST)
    return np.where(np.abs(bounded) < 1e-4, 1e-4, bounded)


# ---------------------------------------------------------------------------------- more, and less


def times(arrivals: Arrivals, multiple: float, seed: int) -> Arrivals:
    """The same demand `multiple` times: so many users as there are, each as they are.

    Requests are repeated, or left out, and time stays what it is. To compress time would be wrong
    where it matters: the busy hour would last half as long at twice the rate, and the queue that
    it builds up be half of what twice the users make. The first copy of a request is the request
    itself; further ones come at most `COPY_WITHIN_S` before or after it. So each minute keeps its
    shape, bursts of minutes grow with the demand (as of a common cause: the cautious reading), and
    inside a minute the users are independent.

    Of one seed a larger multiple holds every request of a smaller one, so that what is searched
    over multiples does not jump about. At 1 it is the arrivals themselves.
    """
    rng = np.random.default_rng(seed)
    copies = np.ceil(multiple - rng.random(len(arrivals))).clip(0).astype(np.int64)
    parts = [np.flatnonzero(copies > 0)]
    at_s = [arrivals.at_s[parts[0]]]
    for copy in range(1, math.ceil(multiple)):
        moved = arrivals.at_s + rng.uniform(-COPY_WITHIN_S, COPY_WITHIN_S, len(arrivals))
        parts.append(np.flatnonzero(copies > copy))
        at_s.append(_reflected(moved[parts[-1]], arrivals.window_s))
    chosen = arrivals.only(np.concatenate(parts))
    instants = np.concatenate(at_s)
    order = np.argsort(instants, kind="stable")
    return msgspec.structs.replace(chosen.only(order), at_s=instants[order])


def _reflected(at_s: Floats, window_s: float) -> Floats:
    """What lies outside the window as far inside it; nothing piles up at its ends."""
    inside: Floats = np.clip(window_s - np.abs(window_s - np.abs(at_s)), 0.0, window_s)
    return inside


def busiest(arrivals: Arrivals, most: int) -> Arrivals:
    """The hours that ask for the most tokens, together at most so many requests, at least one hour.

    Whoever asks what breaks first need not serve the quiet hours; the time between the chosen ones
    stays, empty.
    """
    if len(arrivals) <= most:
        return arrivals
    hours = arrivals.hours
    tokens = arrivals.prompt_tokens - arrivals.cached_tokens + arrivals.output_tokens
    chosen = _first_hours(np.bincount(hours, tokens), np.bincount(hours), most)
    return arrivals.only(chosen[hours])


def _first_hours(load: ArrayLike, requests: ArrayLike, most: int) -> NDArray[np.bool_]:
    """Which hours are the most loaded ones that together have at most so many requests."""
    order = np.argsort(-np.asarray(load), kind="stable")
    fits = np.cumsum(np.asarray(requests)[order]) <= most
    fits[0] = True
    chosen = np.zeros(order.size, dtype=bool)
    chosen[order[fits]] = True
    return chosen
