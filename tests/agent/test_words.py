"""Numbers and verdicts as a person reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Confidence, Reason, Recommendation, Verdict
from agent.words import ms, number, offer_lines, printable, sweep_html, verdict_lines
from tests.loadgen.report import samples


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


@pytest.mark.parametrize(
    ("low", "high", "usd", "text"),
    [
        (0.8, 0.83, [1204.2, 2905.4],
         "configuration: 1 x L4, 80–83 % less (1,204–2,905 USD a month)"),
        (0.5, 0.5, None, "configuration: 1 x L4, 50 % less"),
        (-1.0, -0.5, [-3000.0, -1000.0],
         "configuration: 1 x L4, 50–100 % more (1,000–3,000 USD a month)"),
        (-0.11, 0.34, [-100.0, 900.0], "configuration: 1 x L4, from 11 % more to 34 % less"),
        (0.0, 0.0, [0.0, 0.0], "configuration: 1 x L4"),
        (None, None, None, "configuration: 1 x L4"),
    ],
)  # fmt: skip
def test_what_an_offer_saves(
    low: float | None, high: float | None, usd: list[float] | None, text: str
) -> None:
    offer = Recommendation("buy", "1 x L4", saving_lo=low, saving_hi=high, error_bar="wide")
    cost = {"saving_usd_per_month": usd} if usd else {}
    verdict = Verdict("OVER_SIZED", "x", Confidence("low", "y"), recommendation=offer, cost=cost)
    assert offer_lines(verdict) == [text, "error bar: wide"]


def test_without_an_offer_there_is_nothing_to_say() -> None:
    assert offer_lines(Verdict("IDLE", "x", Confidence("low", "y"))) == []
    idle = Recommendation("give it back", saving_lo=0.99, saving_hi=1.0)
    verdict = Verdict("IDLE", "x", Confidence("low", "y"), recommendation=idle)
    assert offer_lines(verdict) == ["saving: 99–100 % less"]


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


def test_a_notebook_shows_a_table_and_the_verdict() -> None:
    page = samples.sweep(simulated=True)._repr_html_()
    assert page == sweep_html(samples.sweep(simulated=True))
    assert page.startswith("<p>SIMULATED · meta-llama/Llama-3.1-8B-Instruct · http://10.0.0.5:8000")
    assert page.count("<tr>") == 1 + len(samples.POINTS)
    row = "<tr><td>128</td><td>8,604</td><td>33.6</td><td>249 ms</td><td>21.1 ms</td>"
    assert row + "<td>4,883 ms</td><td>2083</td><td>0</td><td>yes</td></tr>" in page
    assert "<td>NO: send lag p99 34 ms is above the bound of 5 ms</td>" in page
    assert "<b>CAPACITY_ONLY</b>: This server holds 131" in page
    assert "<th>requests/s asked</th>" in samples.by_rate()._repr_html_()


def test_a_notebook_runs_nothing_that_a_server_said() -> None:
    page = samples.hostile()._repr_html_()
    assert "<img" not in page
    assert "<script" not in page
    assert samples.minimal()._repr_html_().count("–") >= 4  # not measured is a dash
