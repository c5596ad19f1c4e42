"""Numbers and verdicts as a person reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Confidence, Reason, Recommendation, Verdict
from agent.words import ms, number, printable, verdict_lines


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0.00"), (0.1234, "0.12"), (9.99, "9.99"), (12.34, "12.3"), (123.4, "123"),
     (12345.6, "12,346"), (-12.34, "-12.3")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.50 ms"), (123.4, "123 ms"), (9_999, "9,999 ms"), (10_000, "10.00 s")],
)
def test_ms(value: float | None, text: str) -> None:
    assert ms(value) == text


@given(st.text())
def test_printable_is_one_line_that_steers_nothing(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    assert "\n" not in line


def test_printable_leaves_what_is_harmless() -> None:
    assert printable("TTFT p95 480 ms\n ≥ 1\u00a0[x] – ok") == "TTFT p95 480 ms ≥ 1 [x] – ok"
    assert printable("a\x1b[2Jb\x07") == "a�[2Jb�"


def test_a_verdict_is_a_sentence_a_line() -> None:
    verdict = Verdict(
        "UNDER_SIZED", "It is too small.", Confidence("high", "nothing"),
        reasons=[Reason("KV_MEMORY", "the KV cache was full")],
        recommendation=Recommendation("a second GPU", confirm_with="loadgen sweep x",
                                      overturned_by="less demand"),
        missing=["an agent"],
    )  # fmt: skip
    assert verdict_lines(verdict) == [
        "UNDER_SIZED: It is too small.",
        "confidence high, limited by nothing",
        "KV_MEMORY: the KV cache was full",
        "do: a second GPU",
        "confirm with: loadgen sweep x",
        "overturned by: less demand",
        "missing: an agent",
    ]
    assert len(verdict_lines(Verdict("IDLE", "x", Confidence("low", "y")))) == 2
