"""The lines of a running sweep: what they say, and that they fit whatever they say."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Level, Measurement
from loadgen.level import Plan
from loadgen.moment import Moment
from loadgen.report.frame import ASCII, UNICODE, Glyphs, Point, Sight, curve, frame

MOMENT = Moment(
    share=0.5, elapsed_s=12.0, in_flight=16, ok=112, failed=3, tokens=8_000, half=0.126,
    rate=1054.0, ttft_mean_ms=56.0, itl_mean_ms=10.6, errors={"http_503": 1, "cut": 2},
    later_s=100.0,
)  # fmt: skip
PLAN = Plan("concurrency", concurrency=16)
INVALID = Level(
    concurrency=64, output_tokens_per_s=700.0, measurement=Measurement(False, ["errors: many"])
)
ENDED = (
    Level(concurrency=1, output_tokens_per_s=184.0),
    Level(concurrency=4, output_tokens_per_s=577.0),
    INVALID,
)
SIGHT = Sight("[3/4] 16 streams", PLAN, "repeat 1 of 2", MOMENT, ENDED)


def texts(sight: Sight, width: int = 79, height: int = 23, glyphs: Glyphs = UNICODE) -> list[str]:
    return [line.text for line in frame(sight, width, height, glyphs)]


def test_a_level_as_it_is_measured() -> None:
    assert texts(SIGHT, height=30) == [
        "[3/4] 16 streams · measuring                                 ~2 min left in all",
        "████████████░░░░░░░░░░░░ 50% · ~12 s to go · 16 in flight · 112 ok",
        "1,054 tok/s ±13% · TTFT mean 56.0 ms · ITL mean 10.6 ms",
        "3 failed: 2 cut, 1 http_503",
        "repeat 1 of 2",
        "tok/s  ● measured  ○ now  × not valid",
        "1,054 │                                          ○",
        "      │",
        "      │",
        "      │                                                               ×",
        "      │               ⢀⣀⠤⠤⠒⠊●",
        "      │         ⣀⡠⠤⠔⠒⠉⠁",
        "      │  ⢀⣀⡠⠤⠒⠊⠉",
        "      │●⠉⠁",
        "    0 │",
        "      └┬────────────────────┬────────────────────┬────────────────────┬",
        "       1                    4                   16                   64 streams",
    ]


def test_only_what_went_wrong_is_red() -> None:
    styles = {line.style: line.text for line in frame(SIGHT, 79, 23, UNICODE)}
    assert styles["red"] == "3 failed: 2 cut, 1 http_503"
    assert styles["bold"].startswith("[3/4]")
    fine = msgspec.structs.replace(SIGHT, moment=msgspec.structs.replace(MOMENT, failed=0))
    assert all(line.style != "red" for line in frame(fine, 79, 23, UNICODE))


def test_before_anything_is_known() -> None:
    start = Sight("[1/4] 1 stream", PLAN)
    assert texts(start) == ["[1/4] 1 stream · starting"]
    first = Moment(share=0.0, elapsed_s=0.5, in_flight=1, ok=0, failed=0, tokens=0, phase="warm-up")
    assert texts(msgspec.structs.replace(start, moment=first)) == [
        "[1/4] 1 stream · warm-up",
        "░░░░░░░░░░░░░░░░░░░░░░░░ 0% · 1 in flight · 0 ok",
        "no rate yet",
    ]


def test_a_search_says_what_ends_a_level_and_how_long_it_takes_at_most() -> None:
    moment = msgspec.structs.replace(MOMENT, half_wanted=0.05, later_s=None, budget_left_s=81.0)
    searched = Sight("[5] 16 streams", PLAN, "between 2 (holds) and 8 (breaks)", moment)
    head, _, rate, *_ = texts(searched)
    assert head.endswith(" at most 80 s left in all")
    assert rate.startswith("1,054 tok/s ±13% (±5% is enough) · ")


def test_a_budget_bounds_the_estimate() -> None:
    bound = msgspec.structs.replace(MOMENT, budget_left_s=30.0)
    assert texts(msgspec.structs.replace(SIGHT, moment=bound))[0].endswith("~30 s left in all")


def test_a_terminal_without_unicode() -> None:
    lines = texts(SIGHT, 60, 40, ASCII)
    assert all(line.isascii() for line in lines)
    assert lines[2] == "1,054 tok/s +-13% | TTFT mean 56.0 ms | ITL mean 10.6 ms"
    assert lines[5] == "tok/s  o measured  + now  x not valid"
    assert sum(line.count("o") for line in lines[6:-1]) == 2
    assert any("..." in line for line in lines[6:-2]), "the line of the curve"


def test_nothing_generated_is_counted_in_requests() -> None:
    embedded = msgspec.structs.replace(MOMENT, tokens=0, rate=42.0)
    ended = tuple(Level(concurrency=n, request_throughput=10.0 * n) for n in (1, 4))
    lines = texts(msgspec.structs.replace(SIGHT, moment=embedded, ended=ended))
    assert lines[2].startswith("42.0 req/s ")
    assert any(line.startswith("req/s ") for line in lines)


def test_an_open_loop_is_drawn_over_its_rate() -> None:
    plan = Plan("rate", rate_rps=2.0)
    ended = tuple(Level(mode="rate", offered_rps=n, output_tokens_per_s=99 * n) for n in (0.5, 1.0))
    sight = msgspec.structs.replace(SIGHT, plan=plan, ended=ended)
    assert texts(sight)[-1].split() == ["0.5", "1", "2", "requests/s"]


@pytest.mark.parametrize("height", [1, 4, 15])
def test_a_low_terminal_has_no_room_for_the_curve(height: int) -> None:
    lines = texts(SIGHT, height=height)
    assert len(lines) == min(5, height)
    assert not any("│" in line for line in lines)


LOADS = st.lists(st.integers(1, 100_000), min_size=1, max_size=20)


@given(
    LOADS, st.floats(0, 1e12), st.integers(19, 300), st.integers(1, 80), st.booleans(),
    st.text(max_size=60), st.floats(0, 1),
)  # fmt: skip
def test_whatever_is_measured_fits(
    loads: list[int], rate: float, width: int, height: int, braille: bool, why: str, share: float
) -> None:
    ended = tuple(Level(concurrency=n, output_tokens_per_s=rate * (n % 7)) for n in loads)
    moment = msgspec.structs.replace(
        MOMENT, rate=rate, share=share, in_flight=10**6, ok=10**9, errors={why: 10**9},
    )  # fmt: skip
    sight = Sight(f"[3/4] {loads[0]} streams", PLAN, why, moment, ended)
    glyphs = UNICODE if braille else ASCII
    lines = frame(sight, width, height, glyphs)
    assert len(lines) <= height
    assert all(len(line.text) <= width for line in lines)
    assert all(line.text.isprintable() for line in lines)
    assert braille or all(line.text.isascii() or why for line in lines)


@given(LOADS.filter(lambda loads: len(set(loads)) > 1), st.integers(40, 200), st.integers(5, 12))
def test_every_point_is_where_its_numbers_say(loads: list[int], width: int, rows: int) -> None:
    points = [Point(load, math.sqrt(load), "ended") for load in sorted(set(loads))]
    lines = curve(points, "tok/s", "streams", width, rows, UNICODE)
    assert len(lines) == rows
    body = [line.partition("│")[2] for line in lines[1:-2]]
    assert body[0].rstrip().endswith("●"), "the largest is the last, and at the top"
    columns = [line.index("●") for line in reversed(body) if "●" in line]
    assert columns == sorted(columns), "it grows to the right"
    assert min(columns) == 0
    assert str(max(loads)) in lines[-1].replace(",", "") or max(loads) >= 1e6
