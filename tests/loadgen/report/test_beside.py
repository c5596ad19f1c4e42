"""Two runs beside each other: as text, and as a real browser shows them."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.model import Measurement, Run, SloCapacity, Sweep, Target, TargetGpu
from agent.sizing.curve import analyse
from loadgen.compare import Comparison, Side, compare, parse_rules
from loadgen.report.beside import HEADLINES, name_of, render, sentence
from tests.loadgen.levels import side
from tests.loadgen.report import samples
from tests.loadgen.report.looked import overlapping, violations
from tests.loadgen.report.samples import HOSTILE

ROOT = Path(__file__).parents[3]
LOADS = ((1, 40), (2, 40), (4, 30), (8, 20))
MEMORY = "vllm:cache_config_info.gpu_memory_utilization"
BLOCKS = "vllm:cache_config_info.num_gpu_blocks"
RULES = parse_rules("output_tokens_per_s<-5%,ttft_ms.p95>+10%")

set_ = msgspec.structs.replace


def measured(seed: int, slower: float, version: str, memory: str, blocks: str) -> Side:
    """A run with requests of known distributions, of a server that says how it was started."""
    made = side(seed, LOADS, slower)
    sweep = set_(
        made.sweep,
        run=Run(id=f"run-{seed}", started_at="2026-03-11T09:12:00Z", tool_version="0.1.0",
                command=f"loadgen sweep http://a --seed {seed}"),
        target=Target("http://a", "m", "vllm", version, [TargetGpu("NVIDIA H100 80GB HBM3", "G")],
                      settings={MEMORY: memory, BLOCKS: blocks, "model": "m"}),
        curve=analyse(made.sweep.levels, made.sweep.slo),
    )  # fmt: skip
    return replace(made, sweep=sweep)


A = measured(1, 1.0, "0.10.2", "0.9", "27000")
B = measured(2, 1.12, "0.11.0", "0.5", "27010")


def changed(given: Side, at: int | None = None, **fields: Any) -> Side:
    """With other fields of the sweep, or of one of its levels."""
    if at is None:
        return replace(given, sweep=set_(given.sweep, **fields))
    levels = list(given.sweep.levels)
    levels[at] = set_(levels[at], **fields)
    return changed(given, levels=levels)


def page(a: Side = A, b: Side = B) -> str:
    return render(compare(a, b, RULES), a.sweep, b.sweep)


COMPARED = compare(A, B, RULES)
PAGE = render(COMPARED, A.sweep, B.sweep)


# --------------------------------------------------------------------------------------- as text


def test_what_differs_is_said_before_any_number() -> None:
    """Flags and versions; what a server measures of its memory at each start is no flag."""
    differs = PAGE.split('id="h-differs"')[1].split("</section>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th><td class="text">(.*?)</td>'
                      r'<td class="text">(.*?)</td>', differs) == [
        ("engine", "vllm 0.10.2", "vllm 0.11.0"),
        ("setting gpu_memory_utilization", "0.9", "0.5"),
    ]  # fmt: skip
    assert PAGE.index('id="h-differs"') < PAGE.index('data-charts="curve"')
    assert "Nothing that the runs know of" in page(A, changed(B, target=A.sweep.target))


def test_the_sentence_holds_the_changes_that_are_told_from_noise() -> None:
    rates = [c for pair in COMPARED.pairs for c in pair.changes if c.metric == HEADLINES[0][0]]
    assert all(one.distinguishable for one in rates)
    lost = sorted(-(one.change_percent or 0.0) for one in rates)
    assert sentence(COMPARED).startswith(
        f"In B output tokens/s is {lost[0]:.1f} to {lost[-1]:.1f} % lower at all 4 loads; "
    )
    assert '<section class="card verdict bad"' in PAGE
    assert ">B is worse</span>" in PAGE
    assert ">B is better</span>" in page(B, A)


def test_of_a_run_and_itself_nothing_is_said() -> None:
    text = page(A, A)
    assert "output tokens/s is not told from A&#x27;s" in text
    assert ">No change told from noise</span>" in text
    assert 'class="missed"' not in text


def test_runs_that_cannot_be_tested_say_so() -> None:
    bare = [untested(one) for one in (A, B)]
    text = page(*bare)
    assert ">Nothing could be tested</span>" in text
    assert "Neither throughput nor latency" in text
    broken = changed(A, levels=[set_(level, measurement=Measurement(False, ["lag"]))
                                for level in A.sweep.levels])  # fmt: skip
    text = page(broken)
    assert "No load has a valid level in both runs" in text
    assert "A, level 1: lag" in text


def untested(given: Side) -> Side:
    """Of a tool that tells neither intervals nor spreads, and keeps no requests."""
    names = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
    levels = [
        set_(
            level,
            output_tokens_per_s_ci95=None,
            **{name: set_(getattr(level, name), std=None) for name in names},
        )
        for level in given.sweep.levels
    ]
    return changed(Side(given.sweep), levels=levels)


def test_how_far_it_can_be_relied_on_stands_under_the_sentence() -> None:
    def sure(text: str) -> str:
        return text.split('<p class="sure">')[1].split("</p>")[0]

    judged = [change.distinguishable for pair in COMPARED.pairs for change in pair.changes]
    assert f"{judged.count(True)} worse" in sure(PAGE)
    assert "--repeats 3 in both runs" in sure(PAGE)
    assert "A file has no requests" not in sure(PAGE)
    assert "A file has no requests" in sure(page(Side(A.sweep), Side(B.sweep)))


def test_every_change_stands_in_its_table_with_its_words() -> None:
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', PAGE.split('id="h-levels"')[1])
    changes = [change for pair in COMPARED.pairs for change in pair.changes]
    assert len(rows) == len(changes)
    for (name, cells), change in zip(rows, changes, strict=True):
        assert name.removesuffix(", ms") == name_of(change.metric)
        told = re.sub("<[^>]+>", " ", cells)
        assert change.change_percent is not None
        assert f"{change.change_percent:+.1f} %".replace("-", "−") in told
        words = change.note or ("not told from noise" if not change.distinguishable else "worse")
        assert words in told
    gate = PAGE.split('id="h-gate"')[1].split("</section>")[0]
    missed = [one for one in COMPARED.gate if one.missed]
    assert gate.count(">missed</b>") == len(missed) > 0


def test_hostile_text_is_escaped() -> None:
    text = render(*hostile())
    assert "<img" not in text
    assert text.count("<script") == PAGE.count("<script")
    assert html.escape(HOSTILE) in text


def hostile() -> tuple[Comparison, Sweep, Sweep]:
    """Every free text is an attack."""
    bad = Target(HOSTILE, HOSTILE, HOSTILE, HOSTILE, [TargetGpu(HOSTILE, HOSTILE)], HOSTILE,
                 {MEMORY: HOSTILE, HOSTILE: HOSTILE})  # fmt: skip
    run = Run(HOSTILE, HOSTILE, HOSTILE, 0, HOSTILE, HOSTILE)
    one = changed(A, target=bad, run=run)
    two = changed(B, target=set_(bad, model=f"{HOSTILE}2", settings={MEMORY: "1", HOSTILE: "2"}))
    two = changed(two, 0, measurement=Measurement(False, [HOSTILE]))
    return compare(one, two, RULES), one.sweep, two.sweep


def test_two_sweeps_of_twenty_levels_are_small() -> None:
    large = Side(samples.large())
    assert len(render(compare(large, large), large.sweep, large.sweep).encode()) < 1_500_000


def test_policy_allows_our_own_code_by_hash_and_nothing_else() -> None:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', PAGE)
    assert found is not None
    policy = dict(part.strip().split(" ", 1) for part in found[1].split(";"))
    assert policy["default-src"] == "'none'"
    codes = re.findall(r"<script>(.*?)</script>", PAGE, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in codes]
    assert policy["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not re.search(r"<(link|img|iframe|object|embed|base|a)\b", PAGE)
    assert page() == PAGE


# --------------------------------------------------------------------------------- as it is shown


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """show(html, width=…): whatever was shown must be silent and stay on this machine."""
    opened: list[tuple[Any, list[str], list[str]]] = []

    def start(text: str = PAGE, width: int = 1280, **options: Any) -> Any:
        shown = browser.new_page(viewport={"width": width, "height": 900}, **options)
        complaints: list[str] = []
        left: list[str] = []
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda asked: left.append(asked.url))
        opened.append((shown, complaints, left))
        path = tmp_path / "beside.html"
        path.write_text(text, encoding="utf-8")
        shown.goto(path.as_uri())
        return shown

    yield start
    for shown, complaints, left in opened:
        shown.close()
        assert complaints == []
        assert all(url.startswith("file:") for url in left)


def charts(shown: Any) -> dict[str, Any]:
    data: dict[str, Any] = shown.evaluate("window.servefitCharts.data()")
    return data


def test_both_curves_and_every_change_are_the_runs_numbers(show: Any) -> None:
    found = charts(show())
    curve = found["curve"]
    loads = [streams for streams, _ in LOADS]
    assert curve["x"] == sorted(loads * 2)
    for name, run in (("A", A), ("B", B)):
        key = f"{name}_output_tokens_per_s"
        levels = run.sweep.levels
        own = [i for i, value in enumerate(curve["series"][key]) if value is not None]
        assert [curve["x"][i] for i in own] == loads
        rates = [level.output_tokens_per_s for level in levels]
        assert [curve["series"][key][i] for i in own] == rates
        ends = [list(level.output_tokens_per_s_ci95 or ()) for level in levels]
        assert [curve["ci"][key][i] for i in own] == ends
        for metric in ("ttft", "itl", "e2e"):
            for statistic in ("p50", "p95"):
                values = found[metric]["series"][f"{name}_{statistic}"]
                of = [getattr(getattr(level, f"{metric}_ms"), statistic) for level in levels]
                assert [value for value in values if value is not None] == of
    rates_a, rates_b = curve["drawn"]
    assert [i for i, one in enumerate(rates_a) if one is not None] == [0, 2, 4, 6]
    assert [i for i, one in enumerate(rates_b) if one is not None] == [1, 3, 5, 7]
    assert [line["y"] for line in found["ttft"]["lines"]] == [30]
    for metric in ("output_tokens_per_s", "ttft_ms.p95", "itl_ms.p95", "e2e_ms.p95"):
        of_load = [next(c for c in pair.changes if c.metric == metric) for pair in COMPARED.pairs]
        shown = found[f"change-{metric.replace('.', '_')}"]
        assert shown["x"] == loads
        assert shown["series"][metric.replace(".", "_")] == [c.change_percent for c in of_load]
        intervals = [list(c.ci95_percent) if c.ci95_percent else None for c in of_load]
        assert shown["ci"][metric.replace(".", "_")] == intervals
        assert shown["valid"] == [c.distinguishable is True for c in of_load]


@pytest.mark.parametrize(
    ("capacity", "told", "mark"),
    [
        (SloCapacity(12.0, None, 8.0, 16.0, True), "12 (8 – 16)", "A: SLO capacity 12"),
        (SloCapacity(8.0, None, 8.0, None, False), "at least 8", "A: SLO capacity ≥ 8"),
        (SloCapacity(3.0, None, None, 4.0, False), "not surely 3, below 4",
         "A: SLO capacity not surely 3"),
        (SloCapacity(None, None, None, 1.0, False), "below 1", "A: knee ≥ 8"),
    ],
)  # fmt: skip
def test_a_capacity_is_told_as_surely_as_it_is_known(
    show: Any, capacity: SloCapacity, told: str, mark: str
) -> None:
    text = page(changed(A, curve=set_(A.sweep.curve, slo_capacity=capacity)))
    rows = re.findall(r'<th scope="row">SLO capacity</th><td class="text">(.*?)</td>', text)
    assert rows == [told]
    assert charts(show(text))["curve"]["marks"][0]["label"] == mark


def test_an_invalid_level_is_hollow_and_no_corner_of_its_curve(show: Any) -> None:
    b = changed(B, 1, measurement=Measurement(False, ["late"]))
    curve = charts(show(page(A, b)))["curve"]
    assert curve["valid"] == [True, True, True, False, True, True, True, True]
    assert curve["series"]["B_output_tokens_per_s"][3] == B.sweep.levels[1].output_tokens_per_s
    assert curve["drawn"][1][3] is None


def test_the_pointer_and_the_keyboard_tell_both_runs_at_a_load(show: Any) -> None:
    shown = show()
    shown.hover("#chart-curve .u-over", position={"x": 3, "y": 50})
    tip = shown.inner_text("#chart-curve .tip")
    assert tip.startswith("concurrency 1\n")
    assert tip.count("concurrency") == 1
    assert ["A: output tokens/s" in tip, "B: output tokens/s" in tip] == [True, True]
    shown.focus("#chart-curve .plot")
    for name in ("A", "B"):
        shown.keyboard.press("ArrowRight")
        assert shown.inner_text("#status").startswith(f"concurrency 1, {name}: output tokens/s")


@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (1280, "dark"), (1280, "light"), (1920, "light")]
)
def test_nothing_overlaps_and_axe_finds_nothing(show: Any, width: int, scheme: str) -> None:
    shown = show(width=width, color_scheme=scheme)
    (ROOT / "artifacts").mkdir(exist_ok=True)
    shown.screenshot(path=str(ROOT / f"artifacts/beside-{width}-{scheme}.png"), full_page=True)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert overlapping(shown) == []
    assert violations(shown) == []


def test_hostile_names_are_text(show: Any) -> None:
    shown = show(render(*hostile()))
    assert shown.evaluate("window.pwned") is None
    assert shown.locator("img").count() == 0
    assert shown.inner_text("h1 b").startswith("<img src=x onerror=")
    shown.focus("#chart-curve .plot")
    for _ in range(2):
        shown.keyboard.press("ArrowRight")
    assert HOSTILE[:20] in shown.inner_text("#chart-curve .tip")


def test_paper_is_light_and_holds_every_table(show: Any) -> None:
    shown = show(color_scheme="dark")
    shown.emulate_media(media="print", color_scheme="dark")
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.locator("details.load[open]").count() == len(LOADS)
    cut = """[...document.querySelectorAll(".plot, .scroll, .page")]
        .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)
        .map((e) => e.className)"""
    assert shown.evaluate(cut) == []


def test_commands_are_copied(show: Any) -> None:
    shown = show()
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.click("[aria-label='Copy the command of B']")
    shown.wait_for_selector(".command button:text-is('Copied')")
    assert shown.evaluate("navigator.clipboard.readText()") == B.sweep.run.command
