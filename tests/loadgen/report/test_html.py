"""The report as text, and as a real browser shows it: no network, no error, the sweep's numbers."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.model import Curve, Level, Measurement, Ratio, SloCapacity, Sweep, Verdict
from agent.sizing.curve import analyse
from agent.sizing.judge import judge
from loadgen.conclude import conclude
from loadgen.report.html import render
from loadgen.report.labels import number
from tests.loadgen.report import samples
from tests.loadgen.report.looked import embedded, overlapping, violations

ROOT = Path(__file__).parents[3]
WIDTHS = (390, 1280, 1920)

replace = msgspec.structs.replace


def elements(page: str, name: str) -> list[str]:
    """The contents of all elements of that name that have no attributes."""
    return re.findall(rf"<{name}>(.*?)</{name}>", page, flags=re.DOTALL)


# --------------------------------------------------------------------------------------- as text


def test_same_sweep_gives_same_bytes() -> None:
    assert render(samples.sweep()) == render(samples.sweep())


def test_policy_allows_our_own_code_by_hash_and_nothing_else() -> None:
    page = render(samples.sweep())
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert found is not None
    policy = dict(part.strip().split(" ", 1) for part in found[1].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    for directive, element in (("script-src", "script"), ("style-src", "style")):
        codes = elements(page, element)
        digests = [base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in codes]
        assert policy[directive].split() == [f"'sha256-{digest}'" for digest in digests]


def test_nothing_is_referred_to() -> None:
    page = render(samples.sweep())
    assert not re.search(r"<(link|img|iframe|object|embed|base|a)\b", page)
    assert not re.search(r"""\s(src|href|style|on\w+)=["']""", page.split("<script")[0])
    assert "@import" not in page
    assert "url(" not in page


def test_embedded_numbers_are_the_sweep() -> None:
    sweep = samples.sweep()
    assert msgspec.convert(embedded(render(sweep))["sweep"], Sweep) == sweep


def test_report_of_twenty_levels_is_small() -> None:
    """Each three times, on eight GPUs, with advice: 0.5 MB, and a third of it the code."""
    sweep = samples.large()
    assert len(sweep.levels) == 60
    page = render(conclude(sweep, expect_concurrency=1))
    assert 300_000 < len(page.encode()) < 1_500_000


def test_hostile_text_is_escaped() -> None:
    sweep = samples.hostile()
    page = render(sweep)
    assert "<img" not in page
    assert page.count("<script") == render(samples.sweep()).count("<script")
    assert html.escape(samples.HOSTILE) in page
    assert embedded(page)["sweep"]["target"]["model"] == samples.HOSTILE


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_is_said_at_the_top_and_at_the_table(simulated: bool) -> None:
    body = render(samples.sweep(simulated=simulated)).split("</main>")[0]
    assert body.count('<span class="badge simulated">simulated</span>') == 2 * simulated
    top, table = body.split('<section class="card verdict')[0], body.split("<caption>")[1]
    assert ("badge simulated" in top) is simulated
    assert ("badge simulated" in table.split("</caption>")[0]) is simulated


def test_missing_server_and_power_say_why() -> None:
    page = render(samples.sweep(server=False, gpu=False))
    assert "no /metrics at the target: 404" in page
    assert "the target is not on this machine; use --agent URL" in page
    assert 'data-charts="server"' not in page
    assert 'data-charts="energy"' not in page


def test_verdict_shows_its_working() -> None:
    sweep = samples.sweep()
    page = render(sweep)
    verdict = sweep.verdict
    assert verdict is not None
    assert verdict.recommendation is not None
    for text in (
        verdict.finding,
        verdict.summary,
        verdict.confidence.limited_by,
        verdict.reasons[0].because,
        verdict.recommendation.action,
        *verdict.missing,
    ):
        assert html.escape(text) in page
    assert "<dt>kv usage max</dt> <dd>0.987</dd>" in page
    assert page.index(verdict.summary) < page.index('data-charts="curve"')


def test_ratio_of_demand_to_capacity_is_a_tile() -> None:
    sweep = samples.sweep()
    judged: Verdict = replace(samples.verdict(), ratio=Ratio(0.61, 0.55, 0.7))
    page = render(replace(sweep, verdict=judged))
    assert "61 %" in page
    assert "95 %: 55 % \N{EN DASH} 70 %" in page


def test_invalid_level_is_shown_with_its_reason() -> None:
    page = render(samples.sweep())
    row = page.split('<tr class="invalid">')[1]
    assert row.startswith('<th scope="row">256</th>')
    assert "send lag p99 34 ms is above the bound of 5 ms" in row.split("</tr>")[1]
    assert page.count("not valid</b>") == 1


def lost(level: Level, **changes: Any) -> Level:
    """The level as a client that could not keep up would have seen it: wrong by a factor."""
    measured = Measurement(False, ["client_limited: send_lag_p99_ms 34 is above its bound 10"])
    return replace(level, measurement=measured, **changes)


def test_the_tiles_know_no_invalid_level() -> None:
    """A level that would be the best, the knee and the cheapest, if it counted."""
    sweep = samples.by_rate()
    planted = lost(
        sweep.levels[-1], offered_rps=7.0, output_tokens_per_s=1e6, energy_j_per_output_token=1e-9
    )
    tiles = [
        render(one).split('<dl class="card tiles">')[1].split("</dl>")[0]
        for one in (sweep, replace(sweep, levels=[*sweep.levels, planted]))
    ]
    assert tiles[0] == tiles[1]
    knee = replace(sweep, levels=[lost(level) for level in sweep.levels])
    assert "Most output" not in render(knee)


def test_what_is_true_of_every_level_is_said_once() -> None:
    sweep = samples.sweep()
    note = "window: shorter than twice the mean E2E time"
    measured = Measurement(valid=True, reasons=[note])
    levels = [replace(level, measurement=measured) for level in sweep.levels]
    body = render(replace(sweep, levels=levels)).split("</main>")[0]
    assert body.count(note) == 1
    assert f"At every level: {note}." in body


def priced() -> Sweep:
    """What a run of the same levels would have come to, for one user."""
    return conclude(samples.sweep(), expect_concurrency=1)


def test_what_it_costs_is_said_with_whose_price_it_is() -> None:
    sweep = priced()
    page = render(sweep)
    assert sweep.verdict is not None
    usd = sweep.levels[0].cost_usd_per_million_output_tokens
    assert f'<td class="first">{number(usd)}</td>' in page
    caption = page.split("<caption>")[1].split("</caption>")[0]
    assert "1 × H100-SXM-80GB at typical prices, indicative: Mercatus index May 2026" in caption
    worth = page.split('id="h-worth"')[1].split("</section>")[0]
    for text in sweep.verdict.questions["said"]:
        assert html.escape(text) in worth
    for one in sweep.verdict.cost["candidates"]:
        assert f'<th scope="row">{one["configuration"]}</th>' in worth
    assert "Configuration: 1 x L40S, 52–60 % less" in page
    assert "h-worth" not in render(samples.sweep())


def test_command_facts_and_interruption() -> None:
    sweep = samples.sweep()
    page = render(replace(sweep, run=replace(sweep.run, interrupted=True)))
    assert f'<code id="command">{html.escape(sweep.run.command)}</code>' in page
    assert "interrupted</span>" in page.split('<section class="card verdict')[0]
    for fact in ("vllm 0.10.2", "256 asked, 274 measured on average", "240 requests", "9c41d0e2"):
        assert fact in page


@pytest.mark.parametrize("levels", [[], [Level(concurrency=1)]], ids=["none", "empty"])
def test_a_sweep_that_measured_nothing_renders(levels: list[Level]) -> None:
    page = render(replace(samples.minimal(), levels=levels))
    assert "No latency was measured at any level." in page


# --------------------------------------------------------------------------------- as it is shown


class Shown:
    """A report in a page of the browser, with whatever left it and whatever it complained of."""

    def __init__(self, browser: Any, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.route("**/*", self._record)

    def _record(self, route: Any) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def open(self, sweep: Sweep) -> Any:
        path = self.folder / "report.html"
        path.write_text(render(sweep), encoding="utf-8")
        self.page.goto(path.as_uri())
        self.page.evaluate("document.fonts.ready.then(() => null)")
        return self.page

    def charts(self) -> dict[str, Any]:
        data: dict[str, Any] = self.page.evaluate("window.servefitCharts.data()")
        return data

    def keep(self, name: str) -> None:
        """A screenshot for people, in the ignored folder artifacts/."""
        folder = ROOT / "artifacts"
        folder.mkdir(exist_ok=True)
        self.page.screenshot(path=str(folder / f"report-{name}.png"), full_page=True)


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """show(sweep, width=…, color_scheme=…): whatever was shown must be silent and alone."""
    opened: list[Shown] = []

    def start(sweep: Sweep, width: int = 1280, **options: Any) -> Shown:
        viewport = {"width": width, "height": 900}
        shown = Shown(browser, tmp_path, viewport=viewport, **options)
        opened.append(shown)
        shown.open(sweep)
        return shown

    yield start
    for shown in opened:
        shown.page.close()
        assert shown.complaints == []
        assert shown.requests == []


def test_curve_shows_the_numbers_of_the_sweep(show: Any) -> None:
    sweep = samples.sweep()
    curve = show(sweep).charts()["curve"]
    levels = sweep.levels
    rates = [level.output_tokens_per_s for level in levels]
    assert curve["x"] == [level.concurrency for level in levels]
    assert curve["log"]["x"] is True
    assert curve["series"]["output_tokens_per_s"] == rates
    assert curve["ci"]["output_tokens_per_s"] == [
        list(level.output_tokens_per_s_ci95 or ()) for level in levels
    ]
    assert curve["valid"] == [True] * 11 + [False]
    assert curve["met"] == [True] * 10 + [False] * 2
    assert curve["drawn"] == [[*rates[:-1], None]]  # the line leaves out what is not valid
    assert [(mark["x"], mark["label"]) for mark in curve["marks"]] == [
        (128, "knee 128"),
        (131, "SLO capacity 131"),
    ]
    assert [(band["lo"], band["hi"]) for band in curve["bands"]] == [(128, 192)]


def test_no_line_mark_or_band_touches_an_invalid_level(show: Any) -> None:
    """Planted between two valid levels and above them, with the numbers that a knee would have."""
    sweep = samples.by_rate()
    planted = [
        lost(sweep.levels[2], offered_rps=2.5, output_tokens_per_s=1e6),
        lost(sweep.levels[-1], offered_rps=9.0),  # exactly the output of the knee
    ]
    charts = show(replace(sweep, levels=[*sweep.levels, *planted])).charts()
    without = show(sweep).charts()
    assert charts["curve"]["marks"] == without["curve"]["marks"]
    assert charts["curve"]["bands"] == without["curve"]["bands"]
    for name, chart in charts.items():
        assert chart["x"] == [1, 2, 2.5, 3, 4, 5, 6, 9], name
        assert chart["valid"] == [True, True, False, True, True, True, True, False]
        for line, alone in zip(chart["drawn"], without[name]["drawn"], strict=True):
            assert (line[2], line[7]) == (None, None)
            assert [*line[:2], *line[3:7]] == alone


def test_a_sweep_of_invalid_levels_is_shown_and_nothing_drawn(show: Any) -> None:
    sweep = samples.by_rate()
    levels = [lost(level) for level in sweep.levels]
    curve = analyse(levels, sweep.slo)
    assert curve == Curve(limit="CLIENT_LIMITED")
    judged = judge(levels, curve, sweep.slo)
    shown = show(replace(sweep, levels=levels, curve=curve, verdict=judged))
    for chart in shown.charts().values():
        assert chart["x"] == [level.offered_rps for level in levels]
        assert not any(chart["valid"])
        assert all(value is None for line in chart["drawn"] for value in line)
        assert chart["marks"] == []
        assert chart["bands"] == []
    text = shown.page.inner_text("main")
    assert "INVALID_MEASUREMENT" in text
    assert "send_lag_p99_ms 34 is above its bound 10" in text
    assert "loadgen calibrate" in text
    assert "no valid measurement" in aria_labels(shown.page)[0]


def test_other_charts_show_the_numbers_of_the_sweep(show: Any) -> None:
    sweep = samples.sweep()
    charts = show(sweep).charts()
    for metric in ("ttft", "itl", "e2e"):
        for statistic in ("p50", "p95", "p99"):
            stats = [getattr(level, f"{metric}_ms") for level in sweep.levels]
            expected = [getattr(each, statistic) for each in stats]
            assert charts[metric]["series"][statistic] == expected
    assert charts["ttft"]["log"]["y"] is True
    assert charts["itl"]["log"]["y"] is False
    assert [line["y"] for line in charts["ttft"]["lines"]] == [500]
    assert [line["y"] for line in charts["itl"]["lines"]] == [50]
    servers = [level.server for level in sweep.levels]
    assert charts["kv"]["series"]["kv_usage_max"] == [s and s.kv_usage_max for s in servers]
    assert charts["queue"]["series"]["waiting_mean"] == [s and s.waiting_mean for s in servers]
    watts = [level.gpu[0].power_w_mean for level in sweep.levels]
    assert charts["power"]["series"]["power_w"] == watts
    energy = charts["energy"]["series"]["energy_j_per_output_token"]
    assert energy == [level.energy_j_per_output_token for level in sweep.levels]


def test_repeats_of_a_load_are_one_corner_of_the_line(show: Any) -> None:
    sweep = samples.sweep()
    one, two = sweep.levels[0], sweep.levels[1]
    shown = show(replace(sweep, levels=[one, replace(two, concurrency=1), *sweep.levels[2:]]))
    curve = shown.charts()["curve"]
    rates = [level.output_tokens_per_s for level in sweep.levels]
    assert curve["series"]["output_tokens_per_s"] == rates
    assert curve["drawn"] == [[pytest.approx((151.2 + 298.7) / 2), None, *rates[2:-1], None]]
    shown.page.focus("#chart-curve .plot")
    for spoken in ("151", "299", "585"):
        shown.page.keyboard.press("ArrowRight")
        assert f"output tokens/s {spoken}" in shown.page.inner_text("#status")


def test_embeddings_are_drawn_by_requests(show: Any) -> None:
    sweep = samples.sweep()
    bare = {"output_tokens_per_s": 0.0, "output_tokens_per_s_ci95": None}
    shown = show(replace(sweep, levels=[replace(level, **bare) for level in sweep.levels]))
    rates = [level.request_throughput for level in sweep.levels]
    assert shown.charts()["curve"]["series"] == {"request_throughput": rates}
    assert "34.4 requests/s" in shown.page.inner_text(".tiles")


def test_slo_that_is_never_met_has_no_capacity_but_an_upper_bound(show: Any) -> None:
    sweep = samples.sweep()
    capacity = SloCapacity(None, None, None, 1.0, False)
    shown = show(replace(sweep, curve=replace(sweep.curve, slo_capacity=capacity)))
    assert "< 1 concurrent" in shown.page.inner_text(".tiles")
    curve = shown.charts()["curve"]
    assert [(b["lo"], b["hi"], b["label"]) for b in curve["bands"]] == [
        (None, 1, "SLO capacity below 1")
    ]
    assert [mark["label"] for mark in curve["marks"]] == ["knee 128"]


def test_open_loop_is_drawn_against_the_offered_rate(show: Any) -> None:
    sweep = samples.by_rate()
    shown = show(sweep)
    shown.keep("rate")
    charts = shown.charts()
    assert charts["curve"]["x"] == [level.offered_rps for level in sweep.levels]
    assert charts["curve"]["bands"] == []  # never broken: no bracket, a lower bound
    labels = [mark["label"] for mark in charts["curve"]["marks"]]
    assert labels == ["knee ≥ 6 requests/s", "SLO capacity ≥ 6 requests/s"]
    due = [level.ttft_from_due_ms.p95 for level in sweep.levels]
    assert charts["ttft"]["series"]["due_p95"] == due
    assert {"kv", "power"}.isdisjoint(charts)
    tiles = shown.page.inner_text(".tiles")
    assert "≥ 6 requests/s" in tiles
    assert "concurrent" not in tiles


@pytest.mark.parametrize("sweep", [samples.minimal(), replace(samples.minimal(), levels=[])])
def test_little_data_is_no_error(show: Any, sweep: Sweep) -> None:
    assert list(show(sweep).charts()) == (["curve"] if sweep.levels else [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_overflows(show: Any, width: int, scheme: str) -> None:
    shown = show(samples.sweep(simulated=True), width=width, color_scheme=scheme)
    shown.keep(f"{width}-{scheme}")
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll("figure, section, dl, aside, canvas")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.className)"""
    assert shown.page.evaluate(outside) == []
    background = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) is (scheme == "dark")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_and_axe_finds_nothing(show: Any, width: int) -> None:
    page = show(priced(), width=width).page
    assert overlapping(page) == []
    assert violations(page) == []


def test_canvas_follows_a_change_of_theme(show: Any) -> None:
    page = show(samples.sweep(), color_scheme="light").page
    picture = "document.querySelector('#chart-curve canvas').toDataURL()"
    light = page.evaluate(picture)
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 10
    while page.evaluate(picture) == light:  # not wait_for_function: the page's policy refuses eval
        assert time.monotonic() < deadline, "the canvas kept the light theme's colours"
        time.sleep(0.05)


def test_simulated_is_said_at_every_chart(show: Any) -> None:
    page = show(samples.sweep(simulated=True)).page
    figures = page.locator("figure.chart")
    assert figures.count() == 8
    assert figures.locator("figcaption .badge.simulated").count() == 8
    assert all("Simulated." in label for label in aria_labels(page))


def aria_labels(page: Any) -> list[str]:
    labels: list[str] = page.eval_on_selector_all(
        ".plot[role=img]", "(all) => all.map((e) => e.getAttribute('aria-label'))"
    )
    return labels


def test_charts_are_told_in_words(show: Any) -> None:
    labels = aria_labels(show(samples.sweep()).page)
    assert labels[0] == (
        "Throughput over 12 levels, concurrency 1 to 256, 1 of them not valid. "
        "output tokens/s: 151 at first, 8,812 at last, highest 8,812 output tokens/s. "
        "knee 128. SLO capacity 131. Limit: KV cache memory. "
        "The table of all levels holds the numbers."
    )
    assert len(labels) == 8


def test_levels_are_walked_with_the_keyboard(show: Any) -> None:
    page = show(samples.sweep()).page
    page.focus("#chart-curve .plot")
    page.keyboard.press("ArrowLeft")
    expected = "send lag p99 34 ms is above the bound of 5 ms"
    assert expected in page.inner_text("#chart-curve .tip")
    assert page.inner_text("#status").startswith("concurrency 256, output tokens/s 8,790")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#status").startswith("concurrency 192, output tokens/s 8,812")
    page.keyboard.press("Escape")
    assert page.is_hidden("#chart-curve .tip")


def test_pointer_shows_exact_values(show: Any) -> None:
    page = show(samples.sweep()).page
    page.hover("#chart-ttft .u-over", position={"x": 3, "y": 50})
    tip = page.inner_text("#chart-ttft .tip")
    assert "concurrency 1" in tip
    assert "21.4 ms" in tip
    assert page.is_hidden("#chart-curve .tip")


def test_command_is_copied(show: Any) -> None:
    sweep = samples.sweep()
    page = show(sweep).page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_selector("#copy:text-is('Copied')")  # a polled script would be refused (CSP)
    assert page.evaluate("navigator.clipboard.readText()") == sweep.run.command


def test_hostile_names_are_text(show: Any) -> None:
    shown = show(samples.hostile())
    shown.keep("hostile")
    page = shown.page
    page.focus("#chart-curve .plot")
    page.keyboard.press("ArrowRight")
    assert samples.HOSTILE[:20] in page.inner_text("#chart-curve .tip")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert page.inner_text("h1 b").startswith("<img src=x onerror=")
    assert "limit: <img" in page.inner_text("#chart-curve figcaption")


def test_code_put_into_the_page_is_refused(show: Any) -> None:
    shown = show(samples.sweep())
    shown.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.pwned = 1";
          document.head.append(script);
        }"""
    )
    assert shown.page.evaluate("window.pwned") is None
    assert len(shown.complaints) == 1
    assert "Content Security Policy" in shown.complaints.pop()


@pytest.mark.parametrize(("sweep", "pages"), [(samples.sweep(), 3), (priced(), 5)])
def test_paper_is_light_and_nothing_is_cut(show: Any, sweep: Sweep, pages: int) -> None:
    shown = show(sweep, color_scheme="dark")
    page = shown.page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = """[...document.querySelectorAll(".plot, .scroll, .page")]
        .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)
        .map((e) => e.className)"""
    assert page.evaluate(cut) == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    (ROOT / "artifacts").mkdir(exist_ok=True)
    path = ROOT / "artifacts" / "report.pdf"
    page.pdf(path=str(path), prefer_css_page_size=True, print_background=True)
    assert len(re.findall(rb"/Type\s*/Page\b", path.read_bytes())) == pages
