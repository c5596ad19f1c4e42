"""A measured curve from a file, whoever wrote it: with what is not known null, or left out.

What no server can have shown is refused: a verdict on it would look like any other.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from agent.model import SCHEMA_VERSION, Level, Sweep, UsageError, decode_sweep

LOAD_MAX = 1e9  # streams or requests/s; more is no load
RATE_MAX = 1e12  # tokens/s


def read_sweep(data: bytes) -> Sweep:
    """The sweep that a file holds. Raises UsageError naming the field that does not fit."""
    sweep = decode_sweep(_plain(data))
    if sweep.schema_version != SCHEMA_VERSION:
        raise UsageError(
            f"written in schema_version {sweep.schema_version}, and this reads {SCHEMA_VERSION}: "
            "use the servefit that wrote it, or write it anew"
        )
    for index, level in enumerate(sweep.levels):
        if why := _impossible(level):
            raise UsageError(f"not a sweep: levels[{index}]: {why}")
    return sweep


def _plain(data: bytes) -> bytes:
    """The same JSON without the nulls of what is not known, and with whole numbers of streams."""
    try:
        found = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return data  # it is told elsewhere what is wrong with it
    if not isinstance(found, dict):
        return data
    found = _known(found)
    for part in ("run", "target", "workload", "curve"):
        found |= {part: _known(found[part])} if part in found else {}
    for holder, part in ((found, "levels"), (found.get("target"), "gpus")):
        if isinstance(holder, dict) and isinstance(holder.get(part), list):
            holder[part] = [_known(one) for one in holder[part]]
    for level in found.get("levels", ()):
        streams = level.get("concurrency") if isinstance(level, dict) else None
        if isinstance(streams, float) and streams.is_integer() and abs(streams) <= LOAD_MAX:
            level["concurrency"] = int(streams)
    return msgspec.json.encode(found)


def _known(value: Any) -> Any:
    """An object without its nulls; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {name: one for name, one in value.items() if one is not None}


def _impossible(level: Level) -> str | None:
    """What of a level cannot be, in words; null where nothing is."""
    if level.concurrency is None and level.offered_rps is None:
        return "it tells no load: give its concurrency (or mode rate and offered_rps)"
    for name, least, most in (
        ("concurrency", 1, LOAD_MAX), ("offered_rps", math.ulp(0.0), LOAD_MAX),
        ("request_throughput", 0, LOAD_MAX), ("output_tokens_per_s", 0, RATE_MAX),
    ):  # fmt: skip
        value = getattr(level, name)
        if value is not None and not least <= value <= most:
            return f"{name} is {value:.6g}"
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        mean = getattr(level, name).mean
        if mean is not None and mean < 0:
            return f"{name}.mean is {mean:.6g}"
    return None
