"""Times and whole numbers as options write them."""

from __future__ import annotations

import re

from agent.model import UsageError

DURATION_S_MAX = 365 * 86_400.0

_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str, option: str) -> float:
    """`30`, `30s`, `500ms`, `2m` or `1h` to seconds, above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _SECONDS:
        raise UsageError(f"{option} {text!r}: write a time such as 30s, 500ms or 2m")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= DURATION_S_MAX:
        raise UsageError(f"{option} {text[:40]!r}: it must be above 0 and at most a year")
    return seconds


def parse_number(word: str) -> float | None:
    """Plain digits with at most a point, `12` or `0.5`; None for anything else, signs included."""
    found = re.fullmatch(r"[0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18}", word)
    return float(word) if found else None


def plain(value: float) -> str:
    """The shortest text that reads back as the same number, without an exponent where whole."""
    return str(int(value)) if value == int(value) else repr(value)
