"""The curve as SVG and PNG: parsed and measured, its numbers are the run's."""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Curve, Knee, Level, Measurement, SloCapacity, Sweep, UsageError
from agent.sizing.curve import points
from loadgen.report import raster
from loadgen.report.picture import COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, svg
from tests.conftest import find_chromium
from tests.loadgen.report import samples
from tests.support import require

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "reports" / "curve.svg"
NAMESPACE = "{http://www.w3.org/2000/svg}"
SAMPLES = (samples.sweep, samples.by_rate, samples.minimal, samples.hostile)

replace = msgspec.structs.replace


class Picture:
    """A parsed SVG, and what a place in it means by the labels of its axes."""

    def __init__(self, text: str) -> None:
        self.root = ElementTree.fromstring(text)
        self.rate = self.scale("y", log=False)

    def all(self, name: str, kind: str = "") -> list[ElementTree.Element]:
        found = self.root.iter(NAMESPACE + name)
        return [element for element in found if kind in element.get("class", "")]

    def texts(self) -> list[str]:
        return [element.text or "" for element in self.all("text")]

    def scale(self, axis: str, *, log: bool) -> Callable[[float], float]:
        """From a coordinate to a number, by two labels of the axis."""
        ticks = [
            (float(t.get(axis, "")) - (4 if axis == "y" else 0), float(tick.replace(",", "")))
            for t in self.all("text", f"tick {axis}")
            if (tick := t.text)
        ]
        (a, first), (b, last) = ticks[0], ticks[-1]
        if log:
            return lambda at: float(first * (last / first) ** ((at - a) / (b - a)))
        return lambda at: first + (last - first) * (at - a) / (b - a)

    def markers(self) -> list[tuple[float, float]]:
        """The centres of the levels' markers, as they stand in the picture."""
        circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in self.all("circle")
                   if c.get("class") == "level"]  # fmt: skip
        tops = [re.match(r"M(\S+) (\S+?)l", p.get("d", "")) for p in self.all("path", "level")]
        return sorted(circles + [(float(m[1]), float(m[2]) + 5.2) for m in tops if m])


def test_the_picture_is_the_golden_one() -> None:
    text = svg(samples.sweep(simulated=True))
    if os.environ.get("SERVEFIT_REFRESH_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(("make", "log"), [(samples.sweep, True), (samples.by_rate, False)])
def test_the_markers_are_the_levels_numbers(make: Callable[[], Sweep], log: bool) -> None:
    sweep = make()
    picture = Picture(svg(sweep))
    load = picture.scale("x", log=log)
    read = [(load(x), picture.rate(y)) for x, y in picture.markers()]
    loads = [lv.offered_rps if lv.mode == "rate" else lv.concurrency for lv in sweep.levels]
    assert [x for x, _ in read] == pytest.approx(loads, rel=1e-3)
    rates = [lv.output_tokens_per_s for lv in sweep.levels]
    assert [y for _, y in read] == pytest.approx(rates, rel=1e-3, abs=0.5)


def test_intervals_line_marks_and_band_are_the_runs() -> None:
    sweep = samples.sweep()
    picture = Picture(svg(sweep))
    load = picture.scale("x", log=True)
    bars = [re.match(r"M\S+ (\S+?)V(\S+?)M", p.get("d", "")) for p in picture.all("path", "interv")]
    read = [(picture.rate(float(m[2])), picture.rate(float(m[1]))) for m in bars if m]
    for (lo, hi), level in zip(read, sweep.levels, strict=True):
        assert (lo, hi) == pytest.approx(level.output_tokens_per_s_ci95, rel=1e-3, abs=0.5)
    corners = picture.all("polyline")[0].get("points", "").split()
    on_line = [load(float(corner.split(",")[0])) for corner in corners]
    assert on_line == pytest.approx([p.load for p in points(sweep.levels)], rel=1e-3)
    knee, capacity = (
        load(float(p.get("d", "")[1:].split()[0])) for p in picture.all("path", "mark")
    )
    assert knee == pytest.approx(128, rel=1e-3)
    assert capacity == pytest.approx(131, rel=1e-3)
    band = picture.all("rect", "band")[0]
    left = float(band.get("x", ""))
    ends = load(left), load(left + float(band.get("width", "")))
    assert ends == pytest.approx((128, 192), rel=1e-3)
    told = picture.texts()
    assert {"knee 128", "SLO capacity 131", "limit: KV cache memory"} <= set(told)
    assert "simulated" not in " ".join(told)


def test_what_missed_and_what_is_not_valid_looks_so() -> None:
    sweep = samples.sweep()
    picture = Picture(svg(sweep))
    assert [p.get("fill") for p in picture.all("path", "level")] == [
        COLOURS["--slo"],
        COLOURS["--card"],
    ]  # 192 missed, 256 missed and is not valid
    good = [c for c in picture.all("circle", "level") if c.get("fill") == COLOURS["--s1"]]
    assert len(good) == 10
    assert "not valid" in (picture.all("title")[-1].text or "")


def test_simulated_is_said_three_times() -> None:
    picture = Picture(svg(samples.sweep(simulated=True)))
    assert "simulated" in picture.texts()
    assert picture.texts()[-1].startswith("simulated, not measured · ")
    assert (picture.all("desc")[0].text or "").startswith("Simulated. ")


def test_hostile_text_is_text() -> None:
    text = svg(samples.hostile())
    names = {element.tag.removeprefix(NAMESPACE) for element in Picture(text).root.iter()}
    assert names <= {"svg", "title", "desc", "rect", "text", "path", "g", "circle", "polyline"}
    assert "<img" not in text
    attributes = {key for element in Picture(text).root.iter() for key in element.attrib}
    assert not any(key.startswith("on") or "href" in key or key == "style" for key in attributes)
    assert (Picture(text).all("title")[0].text or "").startswith(samples.HOSTILE[:-1])


def test_without_a_throughput_there_is_no_picture() -> None:
    sweep = replace(samples.minimal(), levels=[Level(concurrency=4)])
    with pytest.raises(UsageError, match="01JP2Q6Z: no level has a throughput"):
        svg(sweep)


def test_requests_where_nothing_is_generated() -> None:
    levels = [Level(concurrency=n, request_throughput=10.0 * n) for n in (1, 2)]
    picture = Picture(svg(replace(samples.minimal(), levels=levels)))
    assert picture.texts()[1].startswith("requests/s against concurrency")
    assert [picture.rate(y) for _, y in picture.markers()] == pytest.approx([10, 20], rel=1e-3)


def test_colours_are_the_style_sheets() -> None:
    style = (ROOT / "agent/web/static/servefit.css").read_text().split("@media")[0]
    assert dict(re.findall(r"(--[\w-]+): (#\w{6})\b", style)).items() >= COLOURS.items()


some_levels = st.lists(
    st.builds(
        lambda load, rate, valid, rps: Level(
            mode="rate" if rps else "concurrency",
            concurrency=None if rps else load,
            offered_rps=load / 7 if rps else None,
            output_tokens_per_s=rate,
            measurement=Measurement(valid, []),
        ),
        st.integers(0, 10**6), st.floats(1e-3, 1e9), st.booleans(), st.booleans(),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(some_levels, st.text())
def test_any_levels_and_names_give_a_picture_that_holds_them(
    levels: list[Level], name: str
) -> None:
    target = replace(samples.minimal().target, model=name, engine=name)
    sweep = replace(samples.minimal(), levels=levels, curve=Curve(), target=target)
    picture = ElementTree.fromstring(svg(sweep).encode())
    for x, y in Picture(ElementTree.tostring(picture, encoding="unicode")).markers():
        assert LEFT <= x <= RIGHT
        assert TOP <= y <= HEIGHT


# ------------------------------------------------------------------------------ as a browser has it


@pytest.fixture(scope="module")
def page() -> Any:
    chromium = find_chromium()
    require(chromium, "Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        require(False, "playwright")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        browser.close()


def near_the_edge() -> Sweep:
    """Marks so far right that their names have no room there, the capacity before the knee."""
    base = samples.sweep()
    capacity = SloCapacity(170.0, 33.7, 128.0, 192.0, True)
    return replace(base, curve=replace(base.curve, knee=Knee(192, 8811.7), slo_capacity=capacity))


def capacity_first() -> Sweep:
    base = samples.sweep()
    capacity = SloCapacity(14.0, 33.7, 8.0, 16.0, True)
    return replace(base, curve=replace(base.curve, knee=Knee(16, 2140.8), slo_capacity=capacity))


BOXES = """() => [...document.querySelectorAll("svg > text")].map((t) => {
  const b = t.getBBox(); return [t.textContent, b.x, b.y, b.x + b.width, b.y + b.height]; })"""


@pytest.mark.parametrize("make", [*SAMPLES, near_the_edge, capacity_first])
def test_no_text_lies_over_another_or_outside(page: Any, make: Callable[[], Sweep]) -> None:
    page.set_content(f"<body style='margin:0'>{svg(make())}</body>")
    boxes = page.evaluate(BOXES)
    for i, (text, left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= WIDTH, text
        assert 0 <= top < bottom <= HEIGHT, text
        for other, x0, y0, x1, y1 in boxes[i + 1 :]:
            apart = right <= x0 or x1 <= left or bottom <= y0 + 1 or y1 <= top + 1
            assert apart, (text, other)
    for line in Picture(svg(make())).all("path", "mark"):
        x, start = map(float, line.get("d", "")[1:].split("V")[0].split())
        crossed = [t for t, x0, _, x1, y1 in boxes if x0 < x < x1 and start < y1 - 1 < TOP]
        assert not crossed


PIXELS = """async ([url, places]) => {
  const image = new Image(); image.src = url; await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.width; canvas.height = image.height;
  const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
  return places.map(([x, y]) => [...context.getImageData(2 * x, 2 * y, 1, 1).data]); }"""


def test_the_png_has_the_markers_in_their_places(page: Any) -> None:
    text = svg(samples.sweep())
    data = raster.png(text, WIDTH, HEIGHT)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (2 * WIDTH, 2 * HEIGHT)
    folder = ROOT / "artifacts"
    folder.mkdir(exist_ok=True)
    (folder / "curve.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    seen = page.evaluate(PIXELS, [url, Picture(text).markers()])
    names = ["--s1"] * 10 + ["--slo", "--card"]
    assert seen == [[*bytes.fromhex(COLOURS[name][1:]), 255] for name in names]


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the browser's place."""

    def install(script: str) -> None:
        path = tmp_path / "browser"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(raster, "BROWSERS", (str(path),))

    return install


def test_without_a_browser_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "BROWSERS", ("no-such-browser",))
    with pytest.raises(UsageError, match=r"install one .*, or --svg FILE needs no browser"):
        raster.png("<svg/>", 1, 1)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no display >&2; echo >&2", "drew no PNG: no display; --svg"),
        ("exit 7", "exit code 7"),
        ("exec sleep 5", "no answer within 0.1 s"),
    ],
)
def test_a_browser_that_fails_is_told(
    browser: Callable[[str], None], script: str, said: str
) -> None:
    browser(script)
    with pytest.raises(UsageError, match=said):
        raster.png("<svg/>", 1, 1, timeout_s=0.1 if "sleep" in script else 10.0)
