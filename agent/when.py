"""Times as people write them on a command line, and as a table shows them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from agent.model import UsageError

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "": 1.0}
_SPAN = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([smhd]?)")
UNIX_S_MAX = 2.0**33  # the year 2242


def parse_span_s(text: str, option: str) -> float:
    """`90`, `90s`, `15m`, `1h` or `30d` to seconds, above 0. Raises UsageError."""
    match = _SPAN.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} {text!r}: write a time such as 30s, 15m, 1h or 7d")
    return seconds


def parse_instant_s(text: str, option: str) -> float:
    """An ISO 8601 instant (of this machine's time zone where it names none), or unix seconds."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(text.strip()).timestamp()
        except (ValueError, OverflowError, OSError):
            seconds = math.nan
    if not 0 <= seconds < UNIX_S_MAX:
        raise UsageError(
            f"{option} {text!r}: write an instant such as 2026-11-23T14:00:00Z, or unix seconds"
        )
    return seconds


def utc(unix_s: float) -> str:
    """ISO 8601, to the second."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
