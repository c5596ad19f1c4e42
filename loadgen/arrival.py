"""When requests are due: iterators of instants in seconds after the level's start.

An arrival process knows nothing of the server: an open loop keeps its schedule whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

from agent.model import UsageError

ARRIVALS = ("poisson", "constant")


def constant(rate_rps: float) -> Iterator[float]:
    """Evenly spaced, the first at once."""
    return (i / rate_rps for i in count())


def poisson(rate_rps: float, rng: Random) -> Iterator[float]:
    """Independent exponential gaps: what many independent users look like."""
    at = 0.0
    while True:
        at += rng.expovariate(rate_rps)
        yield at


def instants(arrival: str, rate_rps: float, rng: Random) -> Iterator[float]:
    """The arrival process by its name in the options. Raises UsageError for another name."""
    if rate_rps <= 0:
        raise UsageError(f"a rate of {rate_rps:g} requests/s: it must be above 0")
    if arrival == "constant":
        return constant(rate_rps)
    if arrival == "poisson":
        return poisson(rate_rps, rng)
    raise UsageError(f"--arrival {arrival!r}: choose one of {', '.join(ARRIVALS)}")
