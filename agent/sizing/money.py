"""What it costs: prices per GPU-hour, a month, a million output tokens that met the SLO.

Pure. A price is an interval, for no two customers pay the same, and names its day and source. A
rental price has the power in it; that of owned hardware is its hour without power, which is then
added: watts · PUE · tariff. What nobody priced is not known, and stays null.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import msgspec

from agent.model import Slo, UsageError
from agent.sizing.hardware import Gpu, gpus, pick
from agent.sizing.pattern import Distribution, Pattern

HOURS_A_MONTH = 730.0
_MILLION = 1e6

# Where a market's low or high end is not known: these parts of its typical price, the medians of
# the catalogue's devices of which it is.
_LOW, _HIGH = 0.57, 1.7

# USD/kWh, indicative: large customers where power is cheap to small ones where it is not.
_TARIFF = (0.08, 0.15, 0.35)
_PUE = 1.4  # indicative: a common server room; large new ones reach 1.1 to 1.2


class Usd(msgspec.Struct, frozen=True):
    """An amount in USD; `high` is null where it has no upper end."""

    low: float
    typical: float
    high: float | None

    def times(self, factor: float) -> Usd:
        high = None if self.high is None else self.high * factor
        return Usd(self.low * factor, self.typical * factor, high)

    def plus(self, other: Usd) -> Usd:
        known = self.high is not None and other.high is not None
        high = (self.high or 0.0) + (other.high or 0.0) if known else None
        return Usd(self.low + other.low, self.typical + other.typical, high)


class Price(msgspec.Struct, frozen=True):
    """A GPU-hour; `basis`: `rental` has the power in it, `owned` has not."""

    usd_per_hour: Usd
    basis: Literal["rental", "owned"]
    as_of: str  # as the file has it; empty where the source tells the day itself
    source: str


class Power(msgspec.Struct, frozen=True):
    """What power costs, and what the rest of a machine draws for each of its GPUs."""

    usd_per_kwh: Usd = Usd(*_TARIFF)
    pue: float = _PUE
    rest_w_per_gpu: float = 0.0


class Prices(msgspec.Struct, frozen=True):
    """By the catalogue's names; a device that is not here has no known price."""

    gpu: Mapping[str, Price] = {}
    power: Power = Power()


# ------------------------------------------------------------------------------------------- prices


@cache
def catalogue() -> Prices:
    """The prices that stand beside the devices in the catalogue: rentals of 2024 to 2026."""
    found = {}
    for card in gpus().values():
        if (typical := card.price_typical_usd_per_h) is not None:
            low = card.price_low_usd_per_h or _LOW * typical
            high = card.price_high_usd_per_h or _HIGH * typical
            found[card.name] = Price(Usd(low, typical, high), "rental", "", card.price_basis)
    return Prices(found)


_Amount = float | tuple[float, float, float]


class _GpuRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    usd_per_hour: _Amount
    as_of: str
    source: str
    basis: Literal["rental", "owned"] = "rental"


class _PowerRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    usd_per_kwh: _Amount = _TARIFF
    pue: float = _PUE
    rest_w_per_gpu: float = 0.0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gpu: dict[str, _GpuRow] = {}
    power: _PowerRow = _PowerRow()


def parse_prices(text: str) -> Prices:
    """Prices as TOML, see config/prices.toml; what it does not name is as the catalogue has it.

    Raises UsageError that names the key and what to write.
    """
    try:
        file = msgspec.convert(_plain(tomllib.loads(text)), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{error}: see config/prices.toml for the form") from error
    known = dict(catalogue().gpu)
    for name, row in file.gpu.items():
        amount = _usd(row.usd_per_hour, f"[gpu.{name}] usd_per_hour")
        known[pick("GPU", name, gpus())] = Price(amount, row.basis, row.as_of, row.source)
    power = file.power
    if not (1 <= power.pue <= 10 and 0 <= power.rest_w_per_gpu <= 1e5):
        raise UsageError("[power]: write a pue of 1 to 10, and rest_w_per_gpu in W, 0 or more")
    tariff = _usd(power.usd_per_kwh, "[power] usd_per_kwh")
    return Prices(known, Power(tariff, power.pue, power.rest_w_per_gpu))


def _plain(value: Any) -> Any:
    """TOML with its dates as text: `as_of = 2026-05-31` is as good as in quotes."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else value


def _usd(given: _Amount, key: str) -> Usd:
    """One number is what is paid; three are [low, typical, high]."""
    numbers = given if isinstance(given, tuple) else (given, given, given)
    if not all(0 < a <= b < math.inf for a, b in pairwise(numbers)):
        raise UsageError(f"{key}: write a number above 0, or three: [low, typical, high]")
    return Usd(*numbers)


# ------------------------------------------------------------------------------------------- costs


def hourly(card: Gpu, count: int, prices: Prices, watts: float | None) -> Usd | None:
    """`count` of these GPUs for an hour; null where the price is not known, or of owned ones the
    mean `watts` that they draw together."""
    price = prices.gpu.get(card.name)
    if price is None:
        return None
    hardware = price.usd_per_hour.times(count)
    if price.basis == "rental":
        return hardware
    if watts is None:
        return None
    power = prices.power
    kilowatts = (watts + count * power.rest_w_per_gpu) / 1e3
    return hardware.plus(power.usd_per_kwh.times(kilowatts * power.pue))


def per_million(an_hour: Usd, tokens_per_s: float, share: Share) -> Usd | None:
    """USD per million output tokens that met the SLO, at this mean rate of all output tokens.

    Null where none did. The high end has none where perhaps none did.
    """
    if tokens_per_s <= 0 or not share.high:
        return None
    each = an_hour.times(_MILLION / 3600 / tokens_per_s)
    typical = each.typical / (share.value or share.high)
    high = each.high / share.low if each.high is not None and share.low > 0 else None
    return Usd(each.low / share.high, typical, high)


def saving(now: Usd, then: Usd) -> tuple[float, float]:
    """What part of the cost is saved, at least and at most.

    The ends of one market belong together: who pays the low price of one device does of another.
    """
    pairs = [(now.low, then.low), (now.typical, then.typical)]
    if now.high is not None and then.high is not None:
        pairs.append((now.high, then.high))
    shares = [1 - after / before for before, after in pairs]
    return min(shares), max(shares)


# ---------------------------------------------------------------------------------------- SLO met


class Share(msgspec.Struct, frozen=True):
    """A part of the whole, and where it surely lies."""

    low: float
    value: float
    high: float


ALL = Share(1.0, 1.0, 1.0)


def met_share(seen: Pattern, slo: Sequence[Slo]) -> Share | None:
    """The part of production's tokens whose requests met every target; null where not known.

    A server keeps a histogram for each latency, so a bound inside a bucket leaves an interval; and
    of several targets it is not known whether the same requests missed them: at least all but
    those that missed any, at most those that met the hardest. Of ITL it is the part of the gaps.
    """
    found = [_met(_LATENCIES[one.metric](seen), one.bound_ms) for one in slo
             if one.metric in _LATENCIES]  # fmt: skip
    known = [share for share in found if share is not None]
    if len(known) < len(slo):
        return None
    if not known:
        return ALL
    return Share(
        low=max(0.0, 1 - math.fsum(1 - share.low for share in known)),
        value=math.prod(share.value for share in known),
        high=min(share.high for share in known),
    )


_LATENCIES: dict[str, Callable[[Pattern], Distribution]] = {
    "ttft": lambda seen: seen.ttft_ms,
    "itl": lambda seen: seen.itl_ms,
    "tpot": lambda seen: seen.tpot_ms,
    "e2e": lambda seen: seen.e2e_ms,
}


def _met(of: Distribution, bound_ms: float) -> Share | None:
    parts = [_below(one.bounds, one.counts, bound_ms) for one in of.histograms]
    total = math.fsum(count for one in of.histograms for count in one.counts)
    if not total:
        return None
    low, value, high = (math.fsum(column) / total for column in zip(*parts, strict=True))
    return Share(low, value, high)


def _below(
    bounds: Sequence[float], counts: Sequence[float], bound: float
) -> tuple[float, float, float]:
    """How many surely, probably (evenly in a bucket) and possibly lie under a bound."""
    low = value = high = 0.0
    edges: Iterable[tuple[float, float]] = zip((0.0, *bounds), (*bounds, math.inf), strict=True)
    for (begin, end), count in zip(edges, counts, strict=True):
        if end <= bound:
            low, value, high = low + count, value + count, high + count
        elif begin < bound:
            value += count * (bound - begin) / (end - begin)  # 0 in the last, which has no end
            high += count
    return low, value, high
