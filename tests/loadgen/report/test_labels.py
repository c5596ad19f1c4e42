"""How the pictures write a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import words
from loadgen.report.labels import number


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (3.0, "3"), (12345.0, "12,345"), (0.01234, "0.0123"), (-0.5, "-0.5"),
     (1e-7, "0.0000001")],
)  # fmt: skip
def test_what_is_whole_or_under_one_is_told_by_its_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@given(st.floats(1, 1e12).filter(lambda value: not value.is_integer()))
def test_all_else_reads_as_in_the_tables(value: float) -> None:
    assert number(value) == words.number(value)
