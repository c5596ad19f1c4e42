"""The card as a Markdown reader has it: its numbers are the run's, names are text."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from agent.model import Curve, Level, Measurement, SloCapacity, Sweep, Verdict
from agent.words import printable
from loadgen.conclude import conclude
from loadgen.report.card import card
from tests.loadgen.report import samples

GOLDEN = Path(__file__).parents[2] / "golden" / "reports" / "card.md"
MARKDOWN = MarkdownIt("commonmark").enable("table")

replace = msgspec.structs.replace


def inside(text: str) -> list[list[Token]]:
    """The inline parts of a paragraph and of a table's cells, one behind the other."""
    return [token.children or [] for token in MARKDOWN.parse(text) if token.type == "inline"]


def rows(text: str) -> dict[str, str]:
    """The table as a reader sees it."""
    cells = ["".join(token.content for token in part) for part in inside(text)[3:]]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def test_the_card_is_the_golden_one() -> None:
    text = card(samples.sweep(simulated=True))
    if os.environ.get("SERVEFIT_REFRESH_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_what_it_says_is_the_runs() -> None:
    sweep = samples.sweep()
    shown = rows(card(sweep))
    best, held = sweep.levels[10], sweep.levels[9]
    assert shown["Model"] == sweep.target.model
    assert shown["Engine"] == "vllm 0.10.2"
    assert shown["GPUs"] == "1 × NVIDIA H100 80GB HBM3"
    assert shown["Workload"] == "chat, 512 tokens in, 256 out"
    assert shown["Most throughput"].startswith(f"{best.output_tokens_per_s:,.0f} output tokens/s")
    assert shown["Most throughput"].endswith("at concurrency 192, where the SLO was missed")
    assert shown["SLO capacity"] == "131 concurrent, surely held at 128 and broken at 192"
    ttft, itl = held.ttft_ms.p95, held.itl_ms.p95
    assert shown["TTFT p95, ITL p95"] == f"{ttft:.0f} ms, {itl:.1f} ms at concurrency 128"
    assert shown["Limited by"] == "KV cache memory (KV_MEMORY)"
    assert shown["Validity"].startswith(
        "11 of 12 levels valid; concurrency 256: send lag p99 34 ms"
    )
    assert shown["Run"] == "01JP2Q6Z, servefit 0.1.0, 2026-03-11 09:10 UTC"
    assert "Simulated" not in shown
    assert isinstance(sweep.verdict, Verdict)
    sentence = "".join(token.content for token in inside(card(sweep))[0])
    assert sentence.endswith(f": {sweep.verdict.summary}")


def test_the_cost_is_that_of_the_load_that_held_and_says_whose_price_it_is() -> None:
    sweep = conclude(samples.sweep())
    usd = sweep.levels[9].cost_usd_per_million_output_tokens
    assert usd is not None
    told = rows(card(sweep))["Cost"]
    assert told.startswith(
        f"{usd:.3g} USD per million output tokens within the SLO at concurrency 128 "
        "(1 × H100-SXM-80GB at typical prices, indicative: Mercatus index May 2026"
    )
    assert "Cost" not in rows(card(samples.sweep()))


def test_simulated_is_said_in_the_sentence_and_in_the_table() -> None:
    text = card(samples.sweep(simulated=True))
    assert "(simulated, not measured)" in text.splitlines()[0]
    assert rows(text)["Simulated"].startswith("yes")


def test_an_open_loop_whose_slo_was_never_broken() -> None:
    shown = rows(card(samples.by_rate()))
    assert shown["SLO capacity"] == "at least 6 requests/s: it was never surely broken"
    assert shown["Most throughput"].endswith("at 6 requests/s offered")


@pytest.mark.parametrize(
    ("hi", "said"),
    [
        (1.0, "below 1 concurrent: not surely held at the lowest load that was tried"),
        (None, "not surely held at the lowest load that was tried"),
    ],
)
def test_an_slo_that_never_held_has_latencies_at_the_most_throughput(
    hi: float | None, said: str
) -> None:
    capacity = SloCapacity(None, None, None, hi, False)
    shown = rows(card(replace(samples.sweep(), curve=Curve(slo_capacity=capacity))))
    assert shown["SLO capacity"] == said
    assert shown["TTFT p95, ITL p95"].endswith("at concurrency 192")


def test_of_repeats_the_worse_latency_counts() -> None:
    sweep = samples.sweep()
    slow = replace(sweep.levels[9], ttft_ms=samples.stats(500.0))
    shown = rows(card(replace(sweep, levels=[*sweep.levels, slow])))
    assert shown["TTFT p95, ITL p95"].startswith("800 ms, ")


def test_no_valid_level_shows_no_throughput() -> None:
    levels = [Level(concurrency=4, output_tokens_per_s=5.0, measurement=Measurement(False, ["x*"]))]
    shown = rows(card(replace(samples.minimal(), levels=levels)))
    assert "Most throughput" not in shown
    assert shown["Validity"] == "0 of 1 levels valid; concurrency 4: x*"


def named(name: str) -> Sweep:
    """A sweep with that name in all places."""
    base = samples.hostile()
    assert base.verdict is not None
    return replace(
        base,
        target=replace(base.target, model=name, engine=name),
        workload=replace(base.workload, endpoint=name, dataset=name, trace=name),
        verdict=replace(base.verdict, summary=name),
        curve=replace(base.curve, limit=name),
    )


@given(st.text(min_size=1) | st.text("`|\\*_<>[]()&;#@:/.www~$ \n-", min_size=1))
@example(samples.HOSTILE)
def test_any_name_is_text(drawn: str) -> None:
    kinds = {token.type for part in inside(card(named(drawn))) for token in part}
    assert kinds <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}
    clean = printable(drawn).strip().replace("|", "\N{DIVIDES}")
    if clean:
        assert rows(card(named(drawn)))["Model"] == clean
    sentence = "".join(token.content for token in inside(card(named(drawn)))[0])
    assert sentence.replace("\u2060", "").endswith(printable(drawn).replace("\u2060", "").strip())


def test_nobody_is_told_and_nothing_becomes_a_link() -> None:
    said = card(named("@team see #12 at https://example.com or www.example.com")).splitlines()[0]
    prose = said.split(": ", 1)[1]
    for linked in ("@team", "#12", "https://", "www.example"):
        assert linked not in prose
    assert prose.replace("\u2060", "").startswith("@team see #12 at https://example.com or www.")
