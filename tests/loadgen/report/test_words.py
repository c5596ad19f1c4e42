"""The answer in plain words: short, true to the curve, and never without its number."""

from __future__ import annotations

import io
import re
from typing import Any

import msgspec
import pytest

from agent.model import Level, Measurement, Recommendation, Requests, Slo, SloCapacity, Stats, Sweep
from agent.sizing.curve import analyse, parse_slo
from agent.sizing.judge import judge
from agent.sizing.sentences import ACTIONS
from loadgen.report import words
from loadgen.report.terminal import show
from loadgen.report.words import answer
from tests.loadgen.report import samples
from tests.loadgen.report.test_table import some_sweeps

replace = msgspec.structs.replace
CLIENT = Measurement(False, ["client_limited: send_lag_p99_ms 34 is above its bound 10"])


def judged(levels: list[Level], slo: str = "", **changes: Any) -> Sweep:
    """A sweep of these levels, concluded as a run concludes it."""
    targets = parse_slo(slo) if slo else []
    curve = analyse(levels, targets)
    base = samples.sweep(**changes)
    return replace(
        base, levels=levels, slo=targets, curve=curve, verdict=judge(levels, curve, targets)
    )


def levels(*, until: int = 192) -> list[Level]:
    return [lv for lv in samples.sweep().levels if (lv.concurrency or 0) <= until]


SLO = "ttft:p95<500ms,itl:p95<50ms"


def test_how_many_what_stops_more_and_what_to_change() -> None:
    assert answer(judged(levels(), SLO)) == [
        "About 131 people can be answered at once, each with the first word within 0.5 s and at "
        "least 15 words a second (in 95 of 100 cases): 128 were, 192 were too many.",
        "More is stopped by the memory for replies under way (KV cache): from 128 at once on it "
        "writes 8,604 tokens (6,453 words) a second in all and no more.",
        f"What to do: {ACTIONS['KV_MEMORY']}.",
    ]


def test_assumed_limits_are_said_to_be() -> None:
    first, *_, last = answer(judged(levels()))
    assert first.startswith("About 137 people can be answered at once, each with the first word")
    assert "within 1 s and at least 7.5 words a second" in first
    assert last.startswith("These limits are assumed, and --slo sets yours")
    assert "assumed" not in " ".join(answer(judged(levels(), SLO)))


def test_simulated_is_the_first_word() -> None:
    assert answer(judged(levels(), SLO, simulated=True))[0].startswith("Simulated: About 131")


def test_what_was_not_reached_is_a_lower_bound() -> None:
    first, second, *rest = answer(judged(levels(until=32), SLO))
    assert first.startswith("At least 32 people can be answered at once, ")
    assert first.endswith("; more was not tried.")
    assert second == (
        "What stops more was not reached: at 32 at once, the most that was tried, it wrote 3,872 "
        "tokens (2,904 words) a second in all, and perhaps it writes more beyond."
    )
    assert rest == []  # the verdict names what is missing


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        (CLIENT.reasons, "above which this load generator was the limit"),
        (["errors: failed_share 0.4 is above its bound 0.1"], "above which no level is valid"),
    ],
)
def test_levels_that_do_not_count_are_no_limit_of_the_server(reasons: list[str], said: str) -> None:
    lost = replace(levels(until=64)[-1], measurement=Measurement(False, reasons))
    lines = answer(judged([*levels(until=32), lost], SLO))
    assert lines[0].startswith("At least 32 people")
    assert f"at 32 at once, {said}, it wrote 3,872" in lines[1]


def test_no_valid_level_is_no_number() -> None:
    lost = [replace(level, measurement=CLIENT) for level in levels(until=4)]
    first, second, third = answer(judged(lost, SLO))
    assert first == "How many it can serve at once cannot be said: no level of this sweep is valid."
    assert "send_lag_p99_ms 34 is above its bound 10" in second
    assert "`loadgen calibrate`" in third


def test_one_alone_is_too_many() -> None:
    assert answer(judged(levels(), "ttft:p95<20ms"))[0] == (
        "Not even one person alone is answered with the first word within 0.02 s (in 95 of 100 "
        "cases): the first word within 0.0407 s is what it gave."
    )
    assert answer(judged(levels()[2:], "itl:p95<5ms"))[0] == (
        "Fewer than 4 people are answered with at least 150 words a second (in 95 of 100 cases): "
        "at least 74.2 words a second is what it gave."
    )
    failing = [replace(lv, requests=Requests(60, 40, 0, {"cut": 40})) for lv in levels(until=4)]
    assert "cases): 40% of the requests failed." in answer(judged(failing, SLO))[0]


def test_a_lowest_load_that_held_of_too_few_requests_is_not_called_broken() -> None:
    few = [replace(lv, ttft_ms=replace(lv.ttft_ms, n=20)) for lv in levels()]
    said = answer(judged(few, "ttft:p95<50ms"))[0]
    assert said == (
        "How many can be answered at once, each with the first word within 0.05 s (in 95 of 100 "
        "cases), cannot be said: 1, the lowest that was tried, kept to it, of too few requests to "
        "be sure; --requests or --duration makes them more."
    )


def test_what_was_not_measured_is_named() -> None:
    blind = [replace(level, ttft_ms=Stats()) for level in levels()]
    assert answer(judged(blind, SLO))[0] == (
        "How many can be answered at once, each with the first word within 0.5 s and at least 15 "
        "words a second (in 95 of 100 cases), cannot be said: TTFT was measured at no level."
    )


def test_an_open_loop_speaks_of_requests() -> None:
    assert answer(samples.by_rate())[0] == (
        "At least 6 requests a second can be answered, each with the first word within 0.5 s and "
        "at least 15 words a second (in 95 of 100 cases); more was not tried."
    )
    capacity = SloCapacity(20.0, 4.66, 4.0, 5.0, True)
    sweep = samples.by_rate()
    sweep = replace(sweep, curve=replace(sweep.curve, slo_capacity=capacity))
    assert answer(sweep)[0].startswith("About 4.66 requests a second can be answered, each with")
    assert answer(sweep)[0].endswith(": 4 were, 5 were too many.")


def test_limits_of_all_kinds_are_words() -> None:
    each = "ttft:mean<1500ms,ttfo:p50<2s,tpot:p99<40ms,e2e:max<30s"
    assert words._limits(parse_slo(each)) == (
        "the first word within 1.5 s (on average) and the first word of the answer within 2 s (in "
        "half of the cases) and at least 18.8 words a second (in 99 of 100 cases) and the whole "
        "reply within 30 s (always)"
    )


def test_one_load_point_is_no_answer() -> None:
    assert answer(judged(levels(until=1), SLO)) == []
    assert answer(replace(samples.sweep(), levels=[])) == []


def test_every_sentence_is_short_in_number_and_has_its_number() -> None:
    for sweep in some_sweeps():
        said = answer(sweep)
        assert len(said) <= 5
        for line in said:
            assert line.startswith("What to do: ") or re.search(r"\d|one", line)
            assert not line.endswith("..")


def test_the_terminal_says_it_above_the_verdict_and_nothing_twice() -> None:
    sweep = judged(levels(), SLO)
    out = io.StringIO()
    show(sweep, out)
    text = out.getvalue()
    for line in answer(sweep):
        assert text.count(line) == 1
    assert text.index("About 131 people") < text.index("CAPACITY_ONLY: ")
    assert text.count(ACTIONS["KV_MEMORY"]) == 1
    assert sweep.verdict is not None
    kept = Recommendation("keep it")
    show(replace(sweep, verdict=replace(sweep.verdict, recommendation=kept)), out)
    assert "do: keep it" in out.getvalue()


def test_the_assumed_limits_are_between_those_they_name() -> None:
    bounds = {target.metric: target.bound_ms for target in words.ASSUMED}
    assert 450 < bounds["ttft"] < 2000
    assert 40 < bounds["tpot"] < 200
    assert all(isinstance(target, Slo) for target in words.ASSUMED)
