"""When requests are due: iterators of instants in seconds after the level's start.

An arrival process knows nothing of the server: an open loop keeps its schedule whatever happens.
How even or bursty it is, is the coefficient of variation (CV) of its gaps, standard deviation over
mean: 0 is constant, 1 is Poisson, above 1 is burstier than independent users.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from random import Random

import msgspec

from agent.model import UsageError
from loadgen.units import parse_duration, parse_number

ARRIVALS = ("poisson", "constant", "gamma:CV")
CV_MIN, CV_MAX = 0.01, 10.0  # beyond, gaps are all but even, or a day holds too few bursts
RATE_RPS_MAX = 1e6


def constant(rate_rps: float) -> Iterator[float]:
    """Evenly spaced, the first at once."""
    return (i / rate_rps for i in count())


def poisson(rate_rps: float, rng: Random) -> Iterator[float]:
    """Independent exponential gaps: what many independent users look like."""
    at = 0.0
    while True:
        at += rng.expovariate(rate_rps)
        yield at


def gamma(rate_rps: float, cv: float, rng: Random) -> Iterator[float]:
    """Independent gamma gaps of shape 1/cv²: a CV of 1 is Poisson, above it requests bunch."""
    shape = 1 / cv**2
    scale = 1 / (rate_rps * shape)
    at = 0.0
    while True:
        at += rng.gammavariate(shape, scale)
        yield at


def parse_arrival(text: str) -> tuple[str, float]:
    """`poisson`, `constant` or `gamma:2.5` to its name and its CV. Raises UsageError."""
    if text in ("poisson", "constant"):
        return text, 1.0 if text == "poisson" else 0.0
    name, _, word = text.partition(":")
    cv = parse_number(word)
    if name != "gamma" or cv is None:
        raise UsageError(
            f"--arrival {text[:40]!r}: choose one of {', '.join(ARRIVALS)} (such as gamma:2.5)"
        )
    if not CV_MIN <= cv <= CV_MAX:
        raise UsageError(f"--arrival {text[:40]}: write a CV from {CV_MIN:g} to {CV_MAX:g}")
    return name, cv


def instants(arrival: str, rate_rps: float, rng: Random) -> Iterator[float]:
    """The arrival process by its name in the options. Raises UsageError for another name."""
    if rate_rps <= 0:
        raise UsageError(f"a rate of {rate_rps:g} requests/s: it must be above 0")
    name, cv = parse_arrival(arrival)
    if name == "constant":
        return constant(rate_rps)
    if name == "poisson":
        return poisson(rate_rps, rng)
    return gamma(rate_rps, cv, rng)


# ---------------------------------------------------------------------------------------- stages


class Stage(msgspec.Struct, frozen=True):
    """A time at one rate, or with the rate rising or falling evenly."""

    duration_s: float
    from_rps: float
    to_rps: float

    @property
    def requests(self) -> float:
        """Expected number of requests."""
        return self.duration_s * (self.from_rps + self.to_rps) / 2

    def after_s(self, requests: float) -> float:
        """Seconds from the stage's start until so many are expected; at most its duration.

        The root of from·t + (to − from)·t²/(2·duration) = requests, in the form that stays exact
        where the rate hardly changes.
        """
        slope = (self.to_rps - self.from_rps) / self.duration_s
        root = math.sqrt(max(0.0, self.from_rps**2 + 2 * slope * requests))
        speed = self.from_rps + root
        return min(2 * requests / speed, self.duration_s) if speed else 0.0


class Stages(msgspec.Struct, frozen=True):
    """A rate that changes in time: stages one after the other."""

    stages: tuple[Stage, ...]

    @property
    def total_s(self) -> float:
        return sum(stage.duration_s for stage in self.stages)

    @property
    def requests(self) -> float:
        """Expected number of requests of all stages."""
        return sum(stage.requests for stage in self.stages)

    @property
    def mean_rps(self) -> float:
        return self.requests / self.total_s

    @property
    def peak_rps(self) -> float:
        return max(max(stage.from_rps, stage.to_rps) for stage in self.stages)

    def warp(self, units: Iterator[float]) -> Iterator[float]:
        """Instants of a process of 1 request/s, moved to where this rate expects as many.

        The random time change of a point process by its cumulative rate (Daley and Vere-Jones,
        Theory of Point Processes, 7.4): Poisson stays Poisson, constant stays even, gamma keeps
        its CV, at every rate. Ends with the last stage.
        """
        begin_s = before = 0.0
        unit = next(units)
        for stage in self.stages:
            until = before + stage.requests
            while unit < until:
                yield begin_s + stage.after_s(unit - before)
                unit = next(units)
            begin_s, before = begin_s + stage.duration_s, until

    def instants(self, arrival: str, rng: Random) -> Iterator[float]:
        """Instants of the arrival process by its name, at this rate. Raises UsageError."""
        return self.warp(instants(arrival, 1.0, rng))


def stages(text: str, option: str = "--rate") -> Stages:
    """`30s@2,60s@2-10,30s@10`: a time at a rate, or a ramp from one to another, in requests/s.

    Raises UsageError.
    """
    parsed = tuple(_stage(word.strip(), option) for word in text.split(","))
    if not any(stage.requests for stage in parsed):
        raise UsageError(f"{option} {text[:60]!r}: every rate is 0; give a stage one above")
    return Stages(parsed)


def _stage(word: str, option: str) -> Stage:
    duration, at, rates = word.partition("@")
    ends = [parse_number(rate.strip()) for rate in rates.split("-")]
    numbers = [rps for rps in ends if rps is not None and rps < RATE_RPS_MAX]
    if not at or len(numbers) != len(ends) or len(ends) > 2:
        raise UsageError(
            f"{option} {word[:40]!r}: write TIME@RATE or TIME@RATE-RATE, such as 60s@2-10"
        )
    return Stage(parse_duration(duration, option), numbers[0], numbers[-1])
