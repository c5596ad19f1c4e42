"""Times as people write them."""

from __future__ import annotations

import pytest

from agent.model import UsageError
from agent.when import parse_instant_s, parse_span_s, utc


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("15m", 900), ("7 d", 604_800)]
)
def test_a_span(text: str, seconds: float) -> None:
    assert parse_span_s(text, "--last") == seconds


@pytest.mark.parametrize("text", ["", "0", "-1h", "1w", "h", "1e3", "nan", "9" * 400])
def test_no_span(text: str) -> None:
    with pytest.raises(UsageError, match=r"--last .*: write a time"):
        parse_span_s(text, "--last")


@pytest.mark.parametrize(
    ("text", "unix_s"),
    [("1790000000", 1_790_000_000), ("2026-09-21T13:33:20Z", 1_789_997_600),
     ("2026-09-21T15:33:20+02:00", 1_789_997_600), ("0", 0)],
)  # fmt: skip
def test_an_instant(text: str, unix_s: float) -> None:
    assert parse_instant_s(text, "--from") == unix_s
    assert parse_instant_s(utc(unix_s), "--from") == unix_s


@pytest.mark.parametrize("text", ["", "noon", "-5", "nan", "inf", "1e30", "2026-13-01"])
def test_no_instant(text: str) -> None:
    with pytest.raises(UsageError, match=r"--from .*: write an instant"):
        parse_instant_s(text, "--from")
