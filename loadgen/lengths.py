"""How long prompts and replies are: distributions of numbers of tokens.

Every length that is drawn is a whole number from 1 to TOKENS_MAX: what a distribution puts outside
is moved to the nearer end, and `mean` counts it there. The same generator state gives the same
lengths.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from random import Random

import msgspec

from agent.model import TOKENS_MAX, UsageError
from agent.words import is_whole
from loadgen.units import parse_number, plain

Z999 = 3.0902  # 99.9 % point of the standard normal distribution

Floats = tuple[float, ...]
# Where an observed quantile function may turn, besides the observed quantiles.
KNOTS = (
    0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995,
    0.999, 1.0,
)  # fmt: skip
BEND_MAX = 3.0


class Length(msgspec.Struct, frozen=True, tag_field="kind"):
    """A distribution of lengths in tokens; `str()` writes it as the options do."""

    def sample(self, rng: Random) -> int:
        """One length, at least 1."""
        raise NotImplementedError

    @property
    def mean(self) -> float:
        """Expected length, counting what is clipped; rounding is taken to even out."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """The largest length, or the 99.9 % point where there is none: to hold beside a model's
        longest context."""
        raise NotImplementedError

    @property
    def fixed(self) -> int | None:
        """The length where there is only one, else None."""
        return None


class Fixed(Length, frozen=True, tag="fixed"):
    """Always the same; draws nothing from the generator."""

    tokens: int

    def sample(self, rng: Random) -> int:
        return self.tokens

    @property
    def mean(self) -> float:
        return float(self.tokens)

    @property
    def longest(self) -> int:
        return self.tokens

    @property
    def fixed(self) -> int | None:
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


class Normal(Length, frozen=True, tag="normal"):
    """Normal with a mean and a standard deviation in tokens."""

    m: float
    sd: float

    def sample(self, rng: Random) -> int:
        return _clip(rng.normalvariate(self.m, self.sd))

    @property
    def mean(self) -> float:
        if not self.sd:
            return self.m
        low, high = ((end - self.m) / self.sd for end in (1, TOKENS_MAX))
        inside = self.m * (_cdf(high) - _cdf(low)) - self.sd * (_pdf(high) - _pdf(low))
        return _cdf(low) + inside + TOKENS_MAX * _cdf(-high)

    @property
    def longest(self) -> int:
        return _clip(self.m + Z999 * self.sd)

    def __str__(self) -> str:
        return f"normal:{plain(self.m)}:{plain(self.sd)}"


class LogNormal(Length, frozen=True, tag="lognormal"):
    """Lognormal: many short and a few very long, as prompts and replies of people are.

    `m` and `sd` are the mean and standard deviation of the lengths themselves, not of their
    logarithms. Those have the variance ln(1 + sd²/m²) and the mean ln m − variance/2
    (Johnson, Kotz, Balakrishnan, Continuous Univariate Distributions 1, chapter 14).
    """

    m: float
    sd: float

    def _logs(self) -> tuple[float, float]:
        """Mean and standard deviation of the logarithms."""
        variance = math.log1p((self.sd / self.m) ** 2)
        return math.log(self.m) - variance / 2, math.sqrt(variance)

    def sample(self, rng: Random) -> int:
        return _clip(rng.lognormvariate(*self._logs()))

    @property
    def mean(self) -> float:
        mu, sigma = self._logs()
        if not sigma:
            return self.m
        low, high = ((math.log(end) - mu) / sigma for end in (1, TOKENS_MAX))
        inside = self.m * (_cdf(high - sigma) - _cdf(low - sigma))
        return _cdf(low) + inside + TOKENS_MAX * _cdf(-high)

    @property
    def longest(self) -> int:
        mu, sigma = self._logs()
        return _clip(math.exp(min(mu + Z999 * sigma, math.log(TOKENS_MAX))))

    def __str__(self) -> str:
        return f"lognormal:{plain(self.m)}:{plain(self.sd)}"


class Uniform(Length, frozen=True, tag="uniform"):
    """Every whole number from `low` to `high` equally often."""

    low: int
    high: int

    def sample(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def longest(self) -> int:
        return self.high

    def __str__(self) -> str:
        return f"uniform:{self.low}:{self.high}"


class Empirical(Length, frozen=True, tag="empirical"):
    """Observed lengths, as a quantile function that is linear between its points.

    `shares` rise from 0 to 1; `tokens` are the lengths that such a share of requests stays under.
    """

    shares: Floats
    tokens: Floats

    @classmethod
    def of(cls, quantiles: Mapping[float, float], mean: float | None = None) -> Empirical:
        """From at least two quantiles by their share, such as {0.5: 300, 0.95: 2000}, in tokens.

        Between and beyond them lengths run as a lognormal's do, bent until the mean is the
        observed one, or as near as the quantiles allow. Shares are 0, 1 or between 0.001 and
        0.999. Raises ValueError for others, and for lengths that fall or are none.
        """
        known = sorted((share, float(length)) for share, length in quantiles.items())
        lengths = [length for _, length in known]
        shares = all(share in (0, 1) or 0.001 <= share <= 0.999 for share, _ in known)
        inside = shares and all(1 <= length <= TOKENS_MAX for length in lengths)
        if len(known) < 2 or not inside or any(a > b for a, b in pairwise(lengths)):
            raise ValueError(f"two or more quantiles that rise and lie in 1 to {TOKENS_MAX}")
        if mean is None:
            return cls(*_run(known, 0.0))
        low, high = -BEND_MAX, BEND_MAX
        for _ in range(50):
            bend = (low + high) / 2
            low, high = (bend, high) if _area(*_run(known, bend)) > mean else (low, bend)
        return cls(*_run(known, high))

    def quantile(self, share: float) -> float:
        """The length that this share of requests stays under, in tokens."""
        right = min(max(bisect_right(self.shares, share), 1), len(self.shares) - 1)
        left = right - 1
        width = self.shares[right] - self.shares[left]
        part = (share - self.shares[left]) / width if width else 1.0
        return self.tokens[left] + part * (self.tokens[right] - self.tokens[left])

    def sample(self, rng: Random) -> int:
        return _clip(self.quantile(rng.random()))

    @property
    def mean(self) -> float:
        return _area(self.shares, self.tokens)

    @property
    def longest(self) -> int:
        return _clip(self.tokens[-1])

    def __str__(self) -> str:
        p50, p95 = self.quantile(0.5), self.quantile(0.95)
        return f"observed (mean {self.mean:.0f}, p50 {p50:.0f}, p95 {p95:.0f})"


AnyLength = Fixed | Normal | LogNormal | Uniform | Empirical


def _clip(value: float) -> int:
    return round(min(max(value, 1.0), TOKENS_MAX))


def _cdf(z: float) -> float:
    """Standard normal distribution function."""
    return math.erfc(-z / math.sqrt(2)) / 2


def _pdf(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _area(shares: Floats, tokens: Floats) -> float:
    """Mean of the lengths: the area under the quantile function."""
    points = pairwise(zip(shares, tokens, strict=True))
    return sum((s1 - s0) * (t0 + t1) / 2 for (s0, t0), (s1, t1) in points)


def _run(known: Sequence[tuple[float, float]], bend: float) -> tuple[Floats, Floats]:
    """Shares and lengths of a fine quantile function through the known quantiles.

    The logarithm of a lognormal's quantile is linear in the normal quantile z. A positive `bend`
    lowers every length that is not known, a negative one raises it.
    """
    shares = tuple(sorted({*KNOTS, *(share for share, _ in known)}))
    return shares, tuple(_between(known, share, math.exp(bend)) for share in shares)


def _between(known: Sequence[tuple[float, float]], share: float, power: float) -> float:
    right = bisect_left(known, (share, 0.0))
    if right < len(known) and known[right][0] == share:
        return known[right][1]
    (first, shortest), (last, longest) = known[0], known[-1]
    sigma = math.log(longest / shortest) / (_z(last) - _z(first))
    if right == 0:
        return max(1.0, shortest * math.exp(sigma * power * (_z(share) - _z(first))))
    if right == len(known):
        grown = math.log(longest) + sigma / power * (_z(share) - _z(last))
        return math.exp(min(grown, math.log(TOKENS_MAX)))
    (left, low), (end, high) = known[right - 1], known[right]
    part = (_z(share) - _z(left)) / (_z(end) - _z(left))
    return float(low * (high / low) ** (part**power))


@cache
def _z(share: float) -> float:
    """Standard normal quantile; the shortest and longest of all stand where 1 of 5000 does."""
    from statistics import NormalDist  # 10 ms to import, which few need

    return NormalDist().inv_cdf(min(max(share, 0.0002), 0.9998))


# --------------------------------------------------------------------------------------- parsing

FORMS = "N, normal:M:SD, lognormal:M:SD or uniform:A:B"


def parse(text: str, option: str) -> AnyLength:
    """The length that an option's text names. M and SD are the mean and standard deviation of the
    lengths themselves, for lognormal too. Raises UsageError."""
    kind, *words = text.strip().split(":")
    if not words and is_whole(kind):
        return Fixed(_whole(kind, text, option))
    if kind == "uniform" and len(words) == 2:
        low, high = (_whole(word, text, option) for word in words)
        if low > high:
            raise UsageError(f"{option} {text}: the first bound is above the second; swap them")
        return Uniform(low, high)
    if kind in ("normal", "lognormal") and len(words) == 2:
        m, sd = (parse_number(word) for word in words)
        if m is None or sd is None or not 1 <= m <= TOKENS_MAX or sd > TOKENS_MAX:
            raise _out_of_range(text, option, "a mean from 1 and a deviation from 0")
        return Normal(m, sd) if kind == "normal" else LogNormal(m, sd)
    raise UsageError(f"{option} {text[:60]!r}: write {FORMS}, in tokens")


def _whole(word: str, text: str, option: str) -> int:
    if not is_whole(word) or not 1 <= int(word) <= TOKENS_MAX:
        raise _out_of_range(text, option, "whole numbers from 1")
    return int(word)


def _out_of_range(text: str, option: str, what: str) -> UsageError:
    return UsageError(f"{option} {text[:60]!r}: write {what} to {TOKENS_MAX}, in tokens")
