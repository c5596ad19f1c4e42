"""The agent's page in a real browser, over a simulated month: the store's numbers, and no noise."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest

from agent.forms import advice
from agent.live import GpuStatus, ServerStatus
from agent.model import Confidence, Reason, Recommendation, Verdict
from agent.recall import Recall
from agent.samplers.watched import SamplerStatus
from agent.stats import Histogram, percentile
from agent.web.app import HEADERS, Site, application
from tests.agent.web.month import BOUNDS, DAY_S, END, MODEL, Month, at, ttft_counts
from tests.e2e.running_agent import Page, RunningAgent, server
from tests.loadgen.report import samples
from tests.loadgen.report.looked import violations

ROOT = Path(__file__).parents[2]
HOSTILE = '<img src=x onerror="window.pwned=1">\'&</script>'
TOKEN = "s3cret-token"
RANGES = {"15m": (900, 5), "1h": (3600, 20), "24h": (DAY_S, 300), "30d": (30 * DAY_S, 10_800)}


class Served:
    """The agent's addresses on a thread of their own, as long as the context."""

    def __init__(
        self, month: Month, token: str | None = None, port: int = 0, events_every_s: float = 0.05
    ) -> None:
        self._month, self._token = month, token
        self._port, self._events_every_s = port, events_every_s
        self._started, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.url = ""

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        site = Site()
        app = application(self._month, token=self._token, events_every_s=self._events_every_s)
        self.url = await site.start(app, f"127.0.0.1:{self._port}")
        self._started.set()
        await self._end.wait()
        await site.close()

    def __enter__(self) -> str:
        self._thread.start()
        assert self._started.wait(10)
        return self.url

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Month]:
    one = Month(tmp_path_factory.mktemp("month") / "agent.db")
    one.fill()
    yield one
    one.history.close()


@pytest.fixture(scope="module")
def url(month: Month) -> Iterator[str]:
    with Served(month) as url:
        yield url


class Shown:
    """The page in the browser, with whatever left the machine and whatever it complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.page = browser.new_page(timezone_id="UTC", **options)
        self.left: list[str] = []
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._record)

    def _record(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.left.append(request.url)

    def ready(self, range_: str) -> None:
        self.page.wait_for_selector(f"html[data-ready='{range_}']", state="attached")

    def charts(self) -> dict[str, Any]:
        data: dict[str, Any] = self.page.evaluate("window.servefitCharts.data()")
        return data

    def until(self, ask: Callable[[], bool], why: str) -> None:
        """Not wait_for_function: the page's policy refuses eval."""
        deadline = time.monotonic() + 20
        while not ask():
            assert time.monotonic() < deadline, why
            self.page.wait_for_timeout(30)

    def keep(self, name: str) -> None:
        """A screenshot for people, in the ignored folder artifacts/."""
        folder = ROOT / "artifacts"
        folder.mkdir(exist_ok=True)
        self.page.screenshot(path=str(folder / f"page-{name}.png"), full_page=True)


@pytest.fixture
def show(browser: Any, url: str) -> Iterator[Any]:
    """show(hash, width=…, color_scheme=…): whatever was shown must be silent and alone."""
    opened: list[Shown] = []

    def start(view: str = "range=24h", width: int = 1280, at_url: str = url, **more: Any) -> Shown:
        shown = Shown(browser, at_url, viewport={"width": width, "height": 900}, **more)
        opened.append(shown)
        shown.page.goto(f"{at_url}/#{view}")
        if "token" not in view:
            shown.ready(re.findall(r"range=(\w+)", view)[0])
        return shown

    yield start
    for shown in opened:
        shown.page.close()
    for shown in opened:
        assert shown.complaints == []
        assert shown.left == []


@pytest.fixture
def changed(month: Month) -> Iterator[Month]:
    """The month, whose servers, GPUs and samplers a test may replace."""
    before = month.servers, month.gpus, month.samplers
    yield month
    month.servers, month.gpus, month.samplers = before


# ----------------------------------------------------------------------------------------- verdict


def test_the_verdict_comes_first_with_its_number(show: Any, month: Month) -> None:
    shown = show()
    with Recall(month.history.path) as recall:
        chat, code = (recall.assessments(name, 1)[0]["verdict"] for name in ("chat", "code"))
    first, second = shown.page.locator("#verdict .sentence").all_inner_texts()
    assert (first, second) == (chat["summary"], code["summary"])
    number = shown.page.inner_text("#verdict article:first-child .number")
    assert float(number.split(" %")[0]) == pytest.approx(chat["ratio"]["value"] * 100, rel=0.005)
    assert "Confidence medium" in shown.page.inner_text("#verdict article:first-child .sure")
    top = shown.page.evaluate("document.querySelector('#verdict').getBoundingClientRect().top")
    assert top < 100
    rows = shown.page.locator("#history tbody tr")
    assert rows.count() == 2  # what was said twice is one row
    assert code["summary"] in rows.nth(0).inner_text()
    assert rows.nth(0).locator("td").nth(2).inner_text() == "2"


def test_what_to_do_stands_beside_the_verdict(show: Any, month: Month) -> None:
    """In the agent's own sentences, unfolded."""
    with Recall(month.history.path) as recall:
        verdict = msgspec.convert(recall.assessments("chat", 1)[0]["verdict"], Verdict)
    rows = (
        show()
        .page.locator("#verdict article:first-child .advice div")
        .evaluate_all(
            "(rows) => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
        )
    )
    assert [tuple(row) for row in rows] == advice(verdict)
    assert [name for name, _ in rows] == ["What to do", "It costs now"]


def test_of_many_verdicts_the_worst_stand_open(show: Any, month: Month) -> None:
    """So that the curve stays in sight; what the others found is said."""
    with Recall(month.history.path) as recall:
        kept = recall.assessments("chat", 1)[0] | {"advice": []}
    script = """(all) => servefitParts.verdicts(all).map((card) => [
        card.localName,
        card.querySelector(":scope > summary")?.textContent,
        card.querySelectorAll("article").length,
    ])"""

    def told(count: int, bad: int) -> Any:
        findings = ["RIGHT_SIZED"] * (count - bad) + ["UNDER_SIZED"] * bad
        scopes = [
            kept | {"scope": f"server-{n}", "verdict": kept["verdict"] | {"finding": finding}}
            for n, finding in enumerate(findings)
        ]
        return page.evaluate(script, scopes)

    page = show().page
    assert [kind for kind, *_ in told(4, 1)] == ["article"] * 4
    *cards, rest = told(12, 4)
    assert [kind for kind, *_ in cards] == ["article"] * 3
    assert rest == ["details", "9 more: 1 × Too small, 8 × Right size", 9]


def test_what_is_unfolded_and_chosen_stays_so(show: Any, month: Month) -> None:
    """The page looks at verdicts and health once a minute; who reads them is not disturbed."""
    page = show("range=1h", width=390).page
    page.click("#verdict summary >> nth=0")
    page.evaluate("document.querySelector('#health .scroll').scrollLeft = 60")
    page.focus("#health .scroll >> nth=0")
    option = page.query_selector("#whose option")
    for _ in range(2):  # what came first is drawn by the time of the second
        with page.expect_response("**/assessments?**"):
            month.advance(65)
    assert page.locator("#verdict details[open]").count() == 1
    assert page.evaluate("document.activeElement.scrollLeft") == 60
    assert option.evaluate("(option) => option.isConnected")


def test_without_a_verdict_it_says_when_one_comes(show: Any, tmp_path: Path, browser: Any) -> None:
    empty = Month(tmp_path / "agent.db")
    empty.servers = []
    with Served(empty) as url:
        shown = Shown(browser, url)
        shown.page.goto(f"{url}/#range=1h")
        shown.ready("1h")
        assert "No verdict yet" in shown.page.inner_text("#verdict")
        assert "not measured" in shown.page.inner_text("#chart-curve")
        assert shown.page.inner_text("#history tbody") == "none yet"
        assert shown.page.locator("#ranges a[aria-current]").inner_text() == "1 hour"
        assert shown.complaints == []
        shown.page.close()
    empty.history.close()


# ------------------------------------------------------------------------------------- over time


def store_says(month: Month, range_: str, names: list[str], **who: str) -> dict[str, Any]:
    length, step = RANGES[range_]
    begin = (month.now_s - length) // step * step
    with Recall(month.history.path) as recall:
        table = recall.table(names, begin, month.now_s, step, **who)
    return {"from": table.from_s, **{n: one.values for n, one in table.metrics.items()}}


def series_of(charts: dict[str, Any]) -> dict[str, list[float | None]]:
    over_time = [chart for chart in charts.values() if chart["x"] and chart["x"][0] > 1e9]
    return {key: values for chart in over_time for key, values in chart["series"].items()}


@pytest.mark.parametrize("range_", RANGES)
def test_every_chart_shows_the_numbers_of_the_store(show: Any, month: Month, range_: str) -> None:
    shown = show(f"range={range_}")
    charts = shown.charts()
    found = series_of(charts)
    wanted = store_says(month, range_, list(found))
    assert charts["load"]["x"][0] == wanted.pop("from")
    assert found == wanted
    assert {"requests_running", "ttft_p95_ms", "gpu_power_w", "kv_usage_ratio"} <= found.keys()
    assert any(value is not None for value in found["requests_running"])


def test_what_is_shown_is_what_was(show: Any) -> None:
    """Independent of the agent's own reading: the functions that the month was made of."""
    charts = show("range=24h&server=chat").charts()
    at_ten = charts["load"]["x"].index(END - 4 * 3600)
    minutes = [at("chat", END - 4 * 3600 + 60 * n) for n in range(5)]

    def mean(field: str) -> float:
        return sum(getattr(one, field) for one in minutes) / 5

    def shown(chart: str, key: str) -> Any:
        return charts[chart]["series"][key][at_ten]

    assert shown("load", "requests_running") == pytest.approx(mean("running"))
    assert shown("tokens", "output_tokens_per_s") == pytest.approx(mean("tokens_per_s"))
    assert shown("rate", "requests_per_s") == pytest.approx(mean("requests_per_s"))
    assert shown("kv", "kv_usage_ratio") == pytest.approx(mean("kv"))
    assert shown("power", "gpu_power_w") == pytest.approx(mean("power_w"))
    energy = mean("power_w") / mean("tokens_per_s")
    assert shown("energy", "energy_j_per_output_token") == pytest.approx(energy)
    counts = [sum(each) for each in zip(*map(ttft_counts, minutes), strict=True)]
    for share in (0.5, 0.95, 0.99):
        seconds = percentile([Histogram(BOUNDS, tuple(counts))], share)
        assert seconds is not None
        expected = pytest.approx(seconds * 1000, rel=1e-4)  # counts are kept to a thousandth
        assert shown("ttft", f"ttft_p{share * 100:.0f}_ms") == expected
    assert [line["y"] for line in charts["ttft"]["lines"]] == [500]


def test_a_gap_is_no_line_and_a_sampling_interval_no_gap(show: Any) -> None:
    shown = show("range=1h")
    drawn = """window.servefitCharts.data().load.drawn[0].map((v) => v === undefined ? "on" : v)"""
    found = shown.page.evaluate(drawn)
    assert None not in found[:-1]
    assert "on" in found  # of what is kept by the minute only
    table = {"from_s": 0, "step_s": 20, "metrics": {}}
    script = """(table) => {
        const names = window.servefitViews.METRICS;
        const values = [1, null, 2, null, null, null, null, 3];
        for (const name of names) table.metrics[name] = { unit: "", values };
        const specs = window.servefitViews.timeCharts(table, []);
        window.servefitCharts.mount(document.querySelector('[data-charts="time"]'), specs[0]);
    }"""
    shown.page.evaluate(script, table)
    assert shown.page.evaluate(drawn) == [1, "on", 2, None, None, None, None, 3]


def test_it_follows_what_is_sampled(show: Any, month: Month) -> None:
    shown = show("range=15m")
    before = shown.charts()["load"]
    handle = shown.page.query_selector("#chart-load canvas")
    asked: list[str] = []
    shown.page.on("request", lambda request: asked.append(request.url))
    month.advance(30)
    last = (month.now_s // 5) * 5
    shown.until(lambda: shown.charts()["load"]["x"][-1] >= last - 5, "the chart stands still")
    shown.until(lambda: is_what_the_store_says(shown, month), "it shows other than the store says")
    after = shown.charts()["load"]
    assert len(after["x"]) - len(before["x"]) in (-1, 0, 1)
    assert after["x"][0] == before["x"][0] + 30
    assert handle.evaluate("(canvas) => canvas.isConnected")  # drawn on, not made anew
    tables = [one for one in asked if "/table?" in one]
    spans = [re.findall(r"(?:from|to)=([\d.]+)", one) for one in tables]
    assert spans
    assert all(float(end) - float(begin) < 200 for begin, end in spans)
    assert shown.page.inner_text("#live") == "live"


def is_what_the_store_says(shown: Shown, month: Month) -> bool:
    """To a billionth: a shorter window is summed up in another order."""
    found = series_of(shown.charts())
    wanted = store_says(month, "15m", list(found))
    known = {name: [math.nan if one is None else one for one in wanted[name]] for name in found}
    shown_now = {name: [math.nan if one is None else one for one in found[name]] for name in found}
    return all(shown_now[n] == pytest.approx(known[n], rel=1e-9, nan_ok=True) for n in found)


def test_a_running_agent_is_followed(browser: Any, page: Page, tmp_path: Path) -> None:
    """`agent run` itself, beside a server's page that always says the same."""
    with RunningAgent(tmp_path, server("chat", page.url) + '[gpu]\nsource = "none"\n') as agent:
        shown = Shown(browser, agent.url)
        shown.page.goto(f"{agent.url}/#range=15m")
        shown.ready("15m")

        def shows(least: int) -> bool:
            found = series_of(shown.charts())
            known = [one for one in found.get("requests_running", []) if one is not None]
            return len(known) >= least and set(known) == {3.0}

        shown.until(lambda: shows(1), "the first samples do not appear")
        shown.until(lambda: shows(2), "no later ones do")
        assert "answers" in shown.page.locator("#health table").nth(0).inner_text()
        assert (shown.complaints, shown.left) == ([], [])
        shown.page.close()


def test_what_did_not_come_is_said_and_asked_for_again(browser: Any, url: str) -> None:
    shown = Shown(browser, url)
    busy = {
        "status": 503,
        "content_type": "application/json",
        "body": '{"error": "busy: ask again"}',
    }
    shown.page.route("**/api/v1/table?**", lambda route: route.fulfill(**busy), times=2)
    shown.page.goto(f"{url}/#range=1h")
    shown.ready("1h")
    shown.until(lambda: "load" in shown.charts(), "it is not asked for again")
    assert shown.page.is_hidden("#trouble")
    assert [line for line in shown.complaints if "503" not in line] == []
    assert len(shown.complaints) == 2
    shown.page.close()


def test_what_an_agent_was_too_busy_for_is_asked_for_again_soon(
    browser: Any, tmp_path: Path
) -> None:
    """While it judges, a long window may take too long; the page is not poor for a minute then."""
    one = Month(tmp_path / "agent.db")
    one.history.add_source("chat", service="front", gpus=[])
    assert one.history.flush(20)
    busy = {"status": 503, "content_type": "application/json", "body": '{"error": "busy"}'}
    with Served(one) as url:
        shown = Shown(browser, url)
        page = shown.page
        page.route("**/api/v1/pattern?**", lambda route: route.fulfill(**busy), times=1)
        page.goto(f"{url}/#range=1h&server=chat")
        shown.ready("1h")
        assert page.inner_text("#trouble") == "week: busy"
        one.advance(15)
        shown.until(lambda: page.is_hidden("#trouble"), "it is not asked for again")
        assert [line for line in shown.complaints if "503" not in line] == []
        page.close()
    one.history.close()


def test_a_chart_that_is_taken_away_leaves_nothing(show: Any) -> None:
    shown = show("range=24h&server=chat")
    assert "curve-ttft" in shown.charts()
    clear = """servefitCharts.clear(document.querySelector('[data-charts="latency"]'))"""
    shown.page.evaluate(clear)
    assert "curve-ttft" not in shown.charts()
    assert shown.page.locator("#chart-curve-ttft").count() == 0


def test_a_lost_agent_is_said_and_found_again(browser: Any, month: Month) -> None:
    with Served(month) as url:
        shown = Shown(browser, url)
        shown.page.goto(f"{url}/#range=1h")
        shown.ready("1h")
        shown.until(lambda: shown.page.inner_text("#live") == "live", "it does not follow")
    shown.until(lambda: shown.page.inner_text("#live") == "not connected", "it says it is live")
    trouble = shown.page.inner_text("#trouble")
    said = r"not connected: the agent does not answer; what is shown is of 21 Sept 2026, \d\d:\d\d"
    assert re.fullmatch(said, trouble), trouble
    with Served(month, port=int(url.rpartition(":")[2])):
        shown.until(lambda: shown.page.inner_text("#live") == "live", "it does not come back")
        assert shown.page.is_hidden("#trouble")
    shown.page.close()


def test_an_agent_that_says_nothing_any_more_is_not_live(browser: Any, month: Month) -> None:
    """Its machine is gone, or it hangs: the connection stays open, and nothing comes."""
    with Served(month, events_every_s=3600) as url:
        shown = Shown(browser, url)
        shown.page.clock.install()
        shown.page.goto(f"{url}/#range=1h")
        shown.ready("1h")
        shown.until(lambda: shown.page.inner_text("#live") == "live", "it does not follow")
        shown.page.clock.fast_forward(14_000)
        assert shown.page.inner_text("#live") == "live"
        shown.page.clock.fast_forward(2_000)
        shown.until(lambda: shown.page.inner_text("#live") == "not connected", "it says it is live")
        assert "the agent has gone silent" in shown.page.inner_text("#trouble")
        shown.page.close()


# ------------------------------------------------------------------------------------------ views


def test_a_link_is_a_view_and_the_keyboard_changes_it(show: Any, month: Month) -> None:
    shown = show("range=24h&server=code")
    page = shown.page
    assert page.locator("#whose").input_value() == "server=code"
    assert page.locator("#verdict article").count() == 1
    found = series_of(shown.charts())
    wanted = store_says(month, "24h", list(found), server="code")
    assert found["requests_running"] == wanted["requests_running"]
    page.focus("#ranges a:nth-child(6)")
    page.keyboard.press("Enter")
    shown.ready("30d")
    assert page.evaluate("location.hash") == "#range=30d&server=code"
    page.select_option("#whose", "service=front")
    shown.until(
        lambda: page.evaluate("location.hash") == "#range=30d&service=front", "the view stayed"
    )
    page.go_back()
    shown.until(lambda: page.locator("#whose").input_value() == "server=code", "no way back")


def test_points_are_walked_and_spoken(show: Any) -> None:
    page = show("range=24h").page
    page.focus("#chart-ttft .plot")
    page.keyboard.press("ArrowLeft")
    said = page.inner_text("#status")
    assert re.match(r"21 Sept, 13:55, p50 [\d.]+ ms, p95 \d+ ms, p99 \d+ ms$", said), said
    label = page.get_attribute("#chart-load .plot", "aria-label")
    assert label.startswith("Requests in flight, mean, from 20 Sept 2026, 14:00 to 21 Sept 2026")
    assert "running: " in label


def test_an_unknown_server_is_one_line(browser: Any, url: str) -> None:
    shown = Shown(browser, url)
    shown.page.goto(f"{url}/#range=1h&server=cat")
    shown.ready("1h")
    assert "no server 'cat', nearest is 'chat'" in shown.page.inner_text("#trouble")
    shown.page.close()


# ------------------------------------------------------------------------------- curve and the week


def test_the_curve_is_the_sweep_with_production_in_it(show: Any, month: Month) -> None:
    shown = show("range=24h&server=chat")
    page = shown.page
    curves, pattern = (
        page.evaluate(f"fetch('/api/v1/{what}?window=7d&server=chat').then((r) => r.json())")
        for what in ("curve", "pattern")
    )
    curve = shown.charts()["curve"]
    sweep = samples.sweep()
    measured = dict(zip(curve["x"], curve["series"]["output_tokens_per_s"], strict=True))
    production = dict(zip(curve["x"], curve["series"]["production"], strict=True))
    for level in sweep.levels:
        assert measured[level.concurrency] == level.output_tokens_per_s
    points = curves["passive"]["points"]
    assert len(points) > 5
    for point in points:
        assert production[point["concurrency"]] == point["output_tokens_per_s"]
    assert sum(v is not None for v in measured.values()) == len(sweep.levels)
    assert [one for one in curve["ci"]["output_tokens_per_s"] if one] == [
        list(level.output_tokens_per_s_ci95 or ()) for level in sweep.levels
    ]
    marks = {mark["label"]: mark["x"] for mark in curve["marks"]}
    running = at("chat", month.now_s).running
    now = marks.pop(next(label for label in marks if label.startswith("now ")))
    assert now == pytest.approx(running, rel=0.05)
    assert marks == {"knee 128": 128, "SLO capacity 131": 131}
    capacity, life = curve["bands"]
    assert (capacity["lo"], capacity["hi"]) == (128, 192)
    assert (life["lo"], life["hi"]) == (
        pattern["concurrency"]["p50"],
        pattern["concurrency"]["p99"],
    )
    caption = page.inner_text("#chart-curve figcaption")
    assert "limit: KV cache memory" in caption
    for metric, bound in (("ttft", 500), ("itl", 50)):
        chart = shown.charts()[f"curve-{metric}"]
        assert [line["y"] for line in chart["lines"]] == [bound]
        assert page.is_visible(f"#chart-curve-{metric} canvas")
        known = [one for one in chart["series"]["p95"] if one is not None]
        assert known == [getattr(level, f"{metric}_ms").p95 for level in sweep.levels]


def test_the_week_is_the_pattern_against_the_capacity(show: Any, month: Month) -> None:
    page = show("range=24h&server=chat").page
    pattern = page.evaluate("fetch('/api/v1/pattern?window=7d&server=chat').then((r) => r.json())")
    with Recall(month.history.path) as recall:
        capacity = recall.assessments("chat", 1)[0]["verdict"]["capacity"]
    assert capacity["unit"] == "rps"
    cells = page.locator("#week td[data-step]").all_text_contents()
    assert len(cells) == 168
    for cell, text in zip(pattern["profile"], cells, strict=True):
        shown, share = re.findall(r"([\d.]+) requests/s, ([\d.]+) % of the capacity", text)[0]
        assert float(shown) == pytest.approx(cell["requests_per_s"], rel=0.01)
        expected = cell["requests_per_s"] / capacity["value"] * 100
        assert float(share) == pytest.approx(expected, rel=0.01)


def test_the_week_is_told_in_the_time_of_whoever_looks(show: Any) -> None:
    profile = [{"mean": hour, "max": hour, "requests_per_s": None} for hour in range(168)]
    script = """(profile) => window.servefitViews.week({ profile }, null, 2).days
        .map((cells) => cells.map((cell) => cell.value))"""
    days = show().page.evaluate(script, profile)
    assert days[0][:3] == [166, 167, 0]
    assert [*itertools.chain(*days)] == [*range(166, 168), *range(166)]


# ----------------------------------------------------------------------------- health, names, token


def test_health_says_who_does_not_answer(show: Any, changed: Month) -> None:
    line = "connection refused by http://code:8000/metrics"
    changed.samplers = [
        *changed.samplers[:1],
        SamplerStatus("code", False, 600.0, 0.1, 3, line),
        *changed.samplers[2:],
    ]
    page = show().page
    assert page.inner_text("#unwell").strip("\u2068") == "code\u2069 does not answer"
    top = page.evaluate("document.querySelector('#unwell').getBoundingClientRect().top")
    assert top < 100, "in sight, far above the tables"
    servers = page.locator("#health table").nth(0).locator("tbody tr")
    assert "answers" in servers.nth(0).inner_text()
    assert "does not answer" in servers.nth(1).inner_text()
    assert MODEL in servers.nth(0).inner_text()
    assert "s3cret" not in page.content()
    assert line in page.locator("#health table").nth(2).inner_text()
    assert "GPU-2f" in page.locator("#health table").nth(1).inner_text()


def test_who_is_not_well_is_counted_and_nobody_is_nothing(show: Any, month: Month) -> None:
    page = show().page
    assert page.is_hidden("#unwell")
    status = msgspec.to_builtins(month.status())
    for sampler in status["samplers"]:
        sampler["ok"] = False
    status["store"]["error"] = "disk full"
    told = page.evaluate("(status) => servefitParts.unwell(status)", status)
    assert told == "3 of 3 do not answer · the store is not written"


def test_a_simulated_server_is_told_as_such(show: Any) -> None:
    """As the agent's status says it of a server; every chart that it is in says so, too."""
    page = show("range=1h").page
    told = page.evaluate(
        """async () => {
          const status = await (await fetch("/api/v1/status")).json();
          status.servers[1].simulated = true;
          const names = servefitParts.health(status)[0].querySelectorAll("tbody th");
          const { METRICS, timeCharts } = servefitViews;
          const metrics = Object.fromEntries(METRICS.map((name) => [name, { values: [1, 2] }]));
          const grid = document.querySelector('[data-charts="time"]');
          for (const spec of timeCharts({ from_s: 0, step_s: 60, metrics }, [], true))
            servefitCharts.show(grid, spec);
          return [...names].map((one) => one.textContent);
        }"""
    )
    assert told == ["chat", "code simulated"]
    figures = page.locator('[data-charts="time"] figure')
    assert figures.locator(".badge.simulated").count() == figures.count() == 10


def test_hostile_names_are_text(browser: Any, tmp_path: Path) -> None:
    one = Month(tmp_path / "agent.db")
    one.servers = [
        ServerStatus(HOSTILE, "http://x", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), missing=(HOSTILE,))
    ]
    one.gpus = [GpuStatus(HOSTILE, HOSTILE, 1)]
    one.samplers = [SamplerStatus(HOSTILE, False, None, None, 1, HOSTILE)]
    verdict = msgspec.structs.replace(
        samples.verdict(),
        finding=HOSTILE,
        summary=HOSTILE,
        confidence=Confidence("low", HOSTILE),
        reasons=[Reason(HOSTILE, HOSTILE)],
        recommendation=Recommendation(
            HOSTILE,
            HOSTILE,
            error_bar=HOSTILE,
            confirm_with=HOSTILE,
            overturned_by=HOSTILE,
        ),
        cost={"gpu": HOSTILE, "gpus": 1, "basis": HOSTILE, "prices": HOSTILE},
        missing=[HOSTILE],
    )
    swept = samples.hostile()
    target = msgspec.structs.replace(swept.target, model=HOSTILE, gpus=[])
    one.history.add_source(HOSTILE, service=HOSTILE, gpus=[HOSTILE])
    one.history.add_assessment(HOSTILE, verdict)
    one.history.add_curve(msgspec.structs.replace(swept, target=target), HOSTILE)
    assert one.history.flush(20)
    with Served(one) as url:
        shown = Shown(browser, url)
        shown.page.goto(f"{url}/#{urlencode({'range': '1h', 'server': HOSTILE})}")
        shown.ready("1h")
        page = shown.page
        assert page.evaluate("window.pwned") is None
        assert page.locator("img").count() == 0
        for place in ("#verdict", "#history", "#h-curve", "#h-week", "#health table >> nth=0"):
            assert HOSTILE in page.inner_text(place), place
        page.click("#verdict summary")
        assert page.inner_text("#verdict").count(HOSTILE) == 15
        assert HOSTILE in page.inner_text("#curve-note")
        assert HOSTILE in page.inner_text("#health table >> nth=1")
        assert HOSTILE in page.inner_text("#health table >> nth=2")
        assert HOSTILE in page.locator("#whose").inner_text()
        assert "limit: <img" in page.inner_text("#chart-curve figcaption")
        assert (shown.complaints, shown.left) == ([], [])
        shown.keep("hostile")
        page.close()
    one.history.close()


def test_a_token_is_asked_for_once(browser: Any, month: Month) -> None:
    with Served(month, TOKEN) as url:
        shown = Shown(browser, url)
        page = shown.page
        page.goto(f"{url}/#range=1h")
        page.wait_for_selector("#lock:visible")
        assert page.locator("h2:visible").count() == 0, "there is nothing behind it yet"
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#refused:has-text('did not take')")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        shown.ready("1h")
        assert page.is_hidden("#lock")
        assert page.locator("h2:visible").count() == 6
        shown.until(lambda: page.inner_text("#live") == "live", "the events want the token too")
        page.reload()
        shown.ready("1h")
        assert page.is_hidden("#lock")
        assert TOKEN not in page.url + page.content()
        assert all("401" in line for line in shown.complaints)
        page.close()


# ----------------------------------------------------------------------------------- as it is shown


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark"), (1920, "light")])
def test_no_width_overflows_or_overlaps(show: Any, width: int, scheme: str) -> None:
    shown = show("range=24h", width=width, color_scheme=scheme)
    page = shown.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """[...document.querySelectorAll("figure, section, article, form, nav a, canvas")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.id)"""
    assert page.evaluate(outside) == []
    overlapping = """(() => {
        const boxes = [...document.querySelectorAll("figure, article, #health > *, nav a, #week")]
          .map((e) => [e.id || e.className || e.textContent, e.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
          p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1
          && q.top < p.bottom - 1).map(([b]) => [a, b]));
    })()"""
    assert page.evaluate(overlapping) == []
    day = """[...document.querySelectorAll("#week tbody tr")].map(({ children: [day, first] }) => {
        const text = document.createRange();
        text.selectNodeContents(day);
        return text.getBoundingClientRect().right - first.getBoundingClientRect().left;
    })"""
    assert max(page.evaluate(day)) < 0, "a day's name lies over its first hour"
    for now in (scheme, "dark" if scheme == "light" else "light"):
        page.emulate_media(color_scheme=now)
        page.wait_for_timeout(50)  # charts are drawn anew
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 200) is (now == "dark")
        shown.keep(f"{width}-{now}")


def test_paper_is_light_and_nothing_is_cut(show: Any) -> None:
    page = show("range=24h", color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    dark = "document.querySelector('#chart-load canvas').toDataURL()"
    before = page.evaluate(dark)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = """[...document.querySelectorAll(".plot, .scroll, .page")]
        .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)
        .map((e) => e.id || e.className)"""
    assert page.evaluate(cut) == []
    assert page.locator("#ranges a:visible").all_inner_texts() == ["24 hours"]
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate(dark) != before, "the canvas kept the dark theme's colours"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    (ROOT / "artifacts").mkdir(exist_ok=True)
    page.pdf(path=str(ROOT / "artifacts" / "page.pdf"), prefer_css_page_size=True)


def test_colours_that_are_the_data_stay_where_the_system_chooses_them(show: Any) -> None:
    page = show("range=24h&server=chat", forced_colors="active").page
    shades = """new Set([...document.querySelectorAll("#week td[data-step]")]
        .map((cell) => getComputedStyle(cell).backgroundColor)).size"""
    assert page.evaluate(shades) > 3


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing(show: Any, width: int, scheme: str) -> None:
    assert violations(show("range=24h", width=width, color_scheme=scheme).page) == []


def test_code_put_into_the_page_is_refused(show: Any) -> None:
    shown = show()
    shown.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.pwned = 1";
          document.head.append(script);
        }"""
    )
    assert shown.page.evaluate("window.pwned") is None
    assert "Content Security Policy" in shown.complaints.pop()
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
