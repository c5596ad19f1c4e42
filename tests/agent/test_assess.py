"""The verdict from a store: whose minutes, which curve, since when; and the command's forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.assess import Assessment, assess, assess_each, scope_of
from agent.config import parse as parse_config
from agent.history import History
from agent.minutes import Minute, MinuteHistogram
from agent.model import (
    Confidence,
    GpuView,
    Run,
    ServerView,
    Sweep,
    Target,
    TargetGpu,
    UsageError,
    Verdict,
    Workload,
)
from agent.recall import Recall
from agent.sizing.curve import parse_slo
from agent.sizing.scene import Needs
from agent.when import utc
from tests.agent.recorded import NOON, Clocks, counter, gauge, minute, store
from tests.agent.sizing.test_judge import SWEEP
from tests.agent.test_cli import CURVE, Command, agent

SLO = parse_slo("ttft:p95<500ms")
BOUNDS = (0.1, 0.25, 0.6, 1.0, math.inf)
MINUTES = 180
END = NOON + 60 * MINUTES
ROOMY = [msgspec.structs.replace(one, server=ServerView(kv_usage_max=0.3)) for one in SWEEP]


def served(
    n: int, running: float, *, source: str = "chat", ttft: tuple[float, ...] = (55, 5, 0, 0, 0),
    **gauges: float,
) -> Minute:  # fmt: skip
    """The n-th minute of a server: 60 requests of 200 and 100 tokens."""
    values = [
        gauge("requests_running", running),
        *(gauge(name, value) for name, value in gauges.items()),
        counter("requests_finished_total", 0, 60 if running else 0),
        counter("prompt_tokens_total", 0, 12_000 if running else 0),
        counter("output_tokens_total", 0, 6_000 if running else 0),
        counter("ttft_seconds_count", 0, sum(ttft) if running else 0),
        counter("ttft_seconds_sum", 0, 0.1 * sum(ttft) if running else 0),
    ]
    histograms = [MinuteHistogram("ttft_seconds", (), BOUNDS, ttft)] if running else []
    return minute(NOON + 60 * n, values, histograms, source=source)


def sweep(**more: Any) -> Sweep:
    target = {"url": "http://gpu:8000", "model": "m", **more.pop("target", {})}
    workload = Workload(input_tokens=200, output_tokens=100)
    run = Run(
        id=more.pop("id", "r1"),
        started_at="2026-01-01T00:00:00Z",
        simulated=more.pop("simulated", False),
    )
    return Sweep(
        run=run, target=Target(**target), **{"workload": workload, "levels": ROOMY, **more}
    )


class Box:
    """A store being filled."""

    def __init__(self, path: Path) -> None:
        self.path, self.clocks = path, Clocks()
        self.history: History = store(path, self.clocks)

    def serve(
        self, running: float = 8.0, source: str = "chat", *, service: str | None = None,
        gpus: tuple[str, ...] = (), model: str | None = None, minutes: int = MINUTES, **more: Any,
    ) -> Box:  # fmt: skip
        self.history.add_source(source, service=service, gpus=gpus)
        if model is not None:
            self.history.add_fingerprint(source, model, {"model": model})
        for n in range(minutes):
            self.history.add_minute(served(n, running, source=source, **more))
            if n % 50 == 49:
                assert self.history.flush()
        return self

    def power(self, *gpus: str, minutes: int = MINUTES) -> Box:
        for n in range(minutes):
            joules = [counter("gpu_energy_j", 0, 6000.0, gpu=gpu) for gpu in gpus]
            self.history.add_minute(minute(NOON + 60 * n, joules, source="gpu"))
        return self

    def curve(self, source: str | None = None, **more: Any) -> Box:
        self.history.add_curve(sweep(**more), source)
        return self

    def done(self) -> Path:
        assert self.history.flush()
        self.history.close()
        return self.path


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path / "agent.db")


def ask(path: Path, **more: Any) -> Assessment:
    asked = {"window_s": 60.0 * MINUTES, "slo": SLO, "now_s": END + 5.0, **more}
    if "service" not in asked:
        asked.setdefault("server", "chat")
    with Recall(path) as recall:
        return assess(recall, **asked)


# ------------------------------------------------------------------------------------------ curve


def test_demand_and_curve_meet(box: Box) -> None:
    found = ask(box.serve(8.0, model="m").curve("chat").done())
    verdict = found.verdict
    assert (found.scope, verdict.finding) == ("chat", "RIGHT_SIZED")
    assert verdict.demand["concurrency"] == 8
    assert verdict.demand["rps"] == pytest.approx(1)
    assert verdict.demand["observed"]["requests"] == 60 * MINUTES
    assert verdict.capacity["lo"] == 16
    assert (found.curve.kind, found.curve.by, found.curve.id) == ("measured", "server", 1)
    assert "curve 1, measured 2026-01-01" in " ".join(verdict.rests_on)
    assert f"from {utc(NOON)} to {utc(END)}" in verdict.rests_on[0]
    assert verdict.confidence.level == "low"  # three hours are no day
    assert "no whole day" in verdict.confidence.limited_by
    assert verdict.since == utc(END + 5)


def test_more_than_it_holds(box: Box) -> None:
    assert ask(box.serve(50.0, model="m").curve("chat").done()).verdict.finding == "UNDER_SIZED"


def test_too_much_of_it_in_a_shortened_window(box: Box) -> None:
    path = box.serve(2.0, model="m").curve("chat").done()
    found = ask(path, needs=Needs(over_s=3 * 3600.0, over_daily=1)).verdict
    assert found.finding == "OVER_SIZED"
    assert "at most 1 requests/s were ever seen in 3 hours" in found.summary
    assert found.capacity["held"]["concurrency"] == 16
    assert any("as configured" in line for line in found.rests_on)
    usual = ask(path).verdict
    assert usual.finding == "INSUFFICIENT_DATA"
    assert "14 more day(s)" in usual.missing[0]


def test_what_a_simulation_measured_says_so_in_every_finding(box: Box) -> None:
    path = box.serve(2.0, model="m").curve("chat", simulated=True).done()
    for needs in (Needs(), Needs(over_s=3600.0)):
        summary = ask(path, needs=needs).verdict.summary
        assert summary.startswith("Simulated: ")
        assert summary.count("Simulated") == 1


def test_what_a_simulated_server_showed_says_so(box: Box) -> None:
    box.serve(2.0, minutes=5).history.add_fingerprint("chat", "x", {"servefit.simulated": "1"})
    assert ask(box.done()).verdict.summary.startswith("Simulated: ")


def test_without_a_curve_it_says_how_to_get_one(box: Box) -> None:
    found = ask(box.serve(8.0, minutes=90).done(), slo=[], urls={"chat": "http://gpu:8000"})
    assert found.verdict.finding == "INSUFFICIENT_DATA"
    assert "`loadgen sweep http://gpu:8000 --agent AGENT_URL`" in found.verdict.missing[0]
    assert "`agent import SWEEP.json`" in found.verdict.missing[0]
    assert found.curve.kind == "passive"
    assert "from 90 minutes of production, up to 8 requests in flight" in found.curve.note


def test_without_a_curve_production_shows_that_it_fits(box: Box) -> None:
    found = ask(box.serve(8.0).done()).verdict
    assert found.finding == "RIGHT_SIZED"
    assert "all 3 hours with enough requests kept the SLO" in found.summary
    assert found.capacity["lo"] == 8  # no further than it reaches
    assert "loadgen sweep" in found.missing[0]


def test_a_queue_that_breaks_the_slo_needs_no_sweep(box: Box) -> None:
    slow = (0.0, 0.0, 10.0, 50.0, 0.0)
    found = ask(box.serve(8.0, ttft=slow, requests_waiting=6.0).done()).verdict
    assert found.finding == "UNDER_SIZED"
    assert found.reasons[0].evidence["hours"] == 3


def test_a_queue_that_broke_the_slo_for_an_hour_is_told_as_such(box: Box) -> None:
    slow = (0.0, 0.0, 10.0, 50.0, 0.0)
    found = ask(box.serve(8.0, ttft=slow, requests_waiting=6.0, minutes=60).done()).verdict
    assert found.finding == "INSUFFICIENT_DATA"
    assert "in under 3 hours the SLO broke while requests waited" in found.summary
    assert "more hours as busy as that one" in found.missing[1]


def test_nothing_was_observed(box: Box) -> None:
    box.history.add_source("chat", service=None)
    found = ask(box.curve("chat").done()).verdict
    assert found.finding == "INSUFFICIENT_DATA"
    assert "`agent run`" in found.missing[0]


@pytest.mark.parametrize(
    ("kept", "source", "used", "said"),
    [
        ({}, "other", None, None),  # of a server beside it: whatever its model
        ({"target": {"model": "n"}}, "chat", None, "is of n, and m is served now"),
        ({"target": {"model": ""}}, "chat", "server", None),
        ({"target": {"model": "n", "url": "http://chat:1"}}, None, None, None),
        ({"target": {"model": "n"}}, None, None, None),
        ({}, None, "model", "whether the curve is of this server"),
        ({"target": {"url": "http://here:1"}}, None, "url", None),
        ({"target": {"url": "http://me:secret@here:1/"}}, None, "url", None),
        ({"target": {"url": "http://[", "model": "n"}}, None, None, None),
        ({"target": {"gpus": [TargetGpu("H100", "g1")]}}, "chat", "server", None),
        ({"target": {"gpus": [TargetGpu("H100", "g9")]}}, "chat", None, "on other GPUs"),
    ],
)
def test_only_a_curve_that_fits_is_used(
    box: Box, kept: dict[str, Any], source: str | None, used: str | None, said: str | None
) -> None:
    path = box.serve(8.0, model="m", gpus=("g1",), minutes=5).curve(source, **kept).done()
    found = ask(path, urls={"chat": "http://here:1/v1"})
    assert found.curve.by == used
    assert found.curve.kind == ("passive" if used is None else "measured")
    lines = " ".join(found.verdict.missing)
    assert "secret" not in " ".join(found.verdict.rests_on)
    assert said is None or said in lines


def test_the_newest_that_fits_is_used_and_its_own_slo_where_none_is_declared(box: Box) -> None:
    box.serve(2.0, model="m").curve("chat", id="old").curve("chat", id="new", slo=SLO)
    path = box.curve("chat", id="none", levels=[SWEEP[0]], target={"model": "n"}).done()
    found = ask(path, slo=[], needs=Needs(over_s=3600.0))
    assert found.curve.id == 2
    assert "SLO ttft:p95<500ms" in found.verdict.rests_on
    assert found.verdict.finding == "INSUFFICIENT_DATA"  # it is not over-sized by a sweep's SLO
    assert "an SLO declared for this service" in found.verdict.missing[0]


def test_a_curve_from_before_a_change_counts_little(box: Box) -> None:
    path = box.serve(2.0, model="m").curve("chat").serve(2.0, model="m,lora", minutes=0).done()
    found = ask(path, needs=Needs(over_s=3600.0)).verdict
    assert found.finding == "INVALID_MEASUREMENT"
    assert [one.code for one in found.reasons] == ["FINGERPRINT_DIFFERS"]
    assert "model changed on" in found.summary
    assert any("changed" in line for line in found.missing)


@pytest.mark.parametrize(
    ("in_sweep", "in_production", "finding"),
    [(True, 0.0, "INVALID_MEASUREMENT"), (True, 1.0, "RIGHT_SIZED"), (False, 0.0, "RIGHT_SIZED")],
)
def test_a_sweep_with_its_clocks_held_down(
    box: Box, in_sweep: bool, in_production: float, finding: str
) -> None:
    hot = [GpuView("G", clocks_throttled=in_sweep)]
    box.serve(8.0, model="m")
    for n in range(MINUTES):
        held = [gauge("gpu_throttled", in_production, gpu="G"),
                gauge("gpu_clock_event_reasons", 64 * in_production, gpu="G")]  # fmt: skip
        box.history.add_minute(minute(NOON + 60 * n, held, source="gpu"))
    box.curve("chat", levels=[msgspec.structs.replace(one, gpu=hot) for one in ROOMY])
    verdict = ask(box.done()).verdict
    assert verdict.finding == finding
    codes = [one.code for one in verdict.reasons]
    assert ("THROTTLED" in codes) == (in_sweep or in_production > 0)


def test_other_lengths_than_the_swept_ones_count_little(box: Box) -> None:
    swept = Workload(input_tokens=1000, output_tokens=100)
    path = box.serve(2.0, model="m").curve("chat", workload=swept).done()
    found = ask(path, needs=Needs(over_s=3600.0)).verdict
    assert found.finding == "INSUFFICIENT_DATA"
    assert any("--workload-from" in line for line in found.missing)
    assert "rps" not in found.demand  # a request is not a request


# --------------------------------------------------------------------------------------- services


def test_replicas_share_their_demand(box: Box) -> None:
    for name in "ab":
        box.serve(10.0, name, service="chat", model="m")
    path = box.curve("a").done()
    found = ask(path, service="chat")
    assert found.scope == "service:chat" == scope_of(None, "chat")
    assert found.verdict.finding == "RIGHT_SIZED"
    assert found.verdict.demand["replicas"] == 2
    assert found.verdict.demand["concurrency"] == 10
    assert found.pattern.concurrency.max == 20
    assert "of each of 2 replicas" in found.verdict.summary
    expected = ask(path, service="chat", expect_concurrency=80.0).verdict
    assert expected.finding == "UNDER_SIZED"
    assert "the declared 40 concurrent requests" in expected.summary


def test_uneven_replicas_lose_none(box: Box) -> None:
    box.serve(6.0, "a", service="chat", model="m").serve(0.5, "b", service="chat", model="m")
    path = box.curve("a").done()
    found = ask(path, service="chat", needs=Needs(over_s=3600.0)).verdict
    assert found.finding == "INSUFFICIENT_DATA"
    assert any("evenly" in line for line in found.missing)


@pytest.mark.parametrize("models", [("m", "n"), ("m", None), (None, None)])
def test_one_servers_curve_says_nothing_of_another_model(
    box: Box, models: tuple[str | None, str | None]
) -> None:
    for name, model in zip("ab", models, strict=True):
        box.serve(4.0, name, service="chat", model=model, minutes=5)
    found = ask(box.curve("a").done(), service="chat")
    assert found.curve.kind == "passive"
    assert found.verdict.demand["replicas"] == 1
    assert any("replicas known to serve one model" in line for line in found.verdict.missing)


# ----------------------------------------------------------------------------------------- window


def test_the_unfinished_minute_counts(box: Box) -> None:
    path = box.serve(8.0, minutes=5).done()
    still_open = minute(NOON + 300, [gauge("requests_running", 30.0)], covered_s=20.0)
    strange = minute(NOON + 300, [gauge("requests_running", 99.0)], source="other")
    found = ask(path, window_s=320.0, now_s=NOON + 320.0, open_minutes=[still_open, strange])
    assert found.pattern.concurrency.max == 30
    assert found.pattern.covered_s == 320


def test_the_window_ends_with_the_newest_sample(box: Box) -> None:
    found = ask(box.serve(8.0, minutes=5).done(), window_s=600.0, now_s=NOON + 3 * 86400.0)
    assert found.pattern.covered_s == 300
    assert "the newest is 3 days old" in " ".join(found.verdict.missing)


def test_energy_is_of_the_servers_own_gpus(box: Box) -> None:
    box.serve(8.0, "a", gpus=("g1",), minutes=5).serve(8.0, "b", minutes=5)
    path = box.power("g1", "g2", minutes=5).done()
    own = ask(path, server="a").verdict.energy
    assert own["j_per_output_token"] == pytest.approx(1.0)
    assert own["mean_w"] == pytest.approx(100.0)
    unknown = ask(path, server="b").verdict
    assert unknown.energy == {}
    assert any("[[server]] gpus" in line for line in unknown.missing)


def test_a_lonely_server_has_all_gpus(box: Box) -> None:
    found = ask(box.serve(8.0, minutes=5).power("g1", "g2", minutes=5).done())
    assert found.verdict.energy["mean_w"] == pytest.approx(200.0)


def test_since_when_the_finding_stands(box: Box) -> None:
    box.serve(50.0, model="m").curve("chat")
    for finding in ("UNDER_SIZED", "RIGHT_SIZED", "UNDER_SIZED", "UNDER_SIZED"):
        box.history.add_assessment("chat", Verdict(finding, "", Confidence("low", "")))
        assert box.history.flush()
        box.clocks.pass_s(60)
    assert ask(box.done()).verdict.since == utc(NOON + 120)


@pytest.mark.parametrize(
    ("whose", "said"),
    [
        ({"server": "cat"}, "no server 'cat', nearest is 'chat'"),
        ({"server": None, "service": "x"}, "no service 'x'"),
        ({"server": None}, "name it"),
        ({"server": "chat", "service": "x"}, "name it"),
    ],
)
def test_of_whom(box: Box, whose: dict[str, Any], said: str) -> None:
    path = box.serve(8.0, minutes=1).done()
    with pytest.raises(UsageError, match=said):
        ask(path, **whose)


def test_each_server_and_each_service_of_several(box: Box) -> None:
    for name, service in (("a", "chat"), ("b", "chat"), ("c", "one"), ("d", None)):
        box.serve(50.0, name, service=service, model="m", minutes=5).curve(name, id=name)
    path = box.power("g1", minutes=1).done()
    config = parse_config(
        '[slo]\ntargets = "ttft:p95<500ms"\n[assess]\nexpect_concurrency = 60\n'
        '[[server]]\nname = "c"\nurl = "http://c:1"\nslo = "ttft:p95<100ms"\n'
    )
    with Recall(path) as recall:
        found = assess_each(recall, config, now_s=END + 5.0)
        (part,) = assess_each(recall, config, server="a", now_s=END + 5.0)
        (told,) = assess_each(recall, config, server="a", expect_concurrency=70.0, now_s=END + 5.0)
    assert (part.verdict.demand["declared"], told.verdict.demand["declared"]) == (False, True)
    assert [one.scope for one in found] == ["a", "b", "c", "d", "service:chat"]
    assert "SLO ttft:p95<100ms" in found[2].verdict.rests_on
    assert "SLO ttft:p95<500ms" in found[0].verdict.rests_on
    # the expected 60 are of the service, not of each of its replicas
    assert [one.verdict.demand["declared"] for one in found] == [False, False, True, True, False]


# ---------------------------------------------------------------------------------------- command


@pytest.fixture
def db(box: Box) -> str:
    return str(box.serve(50.0, model="m").curve("chat").done())


def test_one_server_is_meant(capsys: Command, db: str) -> None:
    code, out, err = agent(capsys, "assess", "--db", db, "--slo", "ttft:p95<500ms")
    assert (code, err) == (0, "")
    assert out.startswith("UNDER_SIZED: Too small: the observed 50 concurrent requests")
    assert "of: chat, " in out
    code, out, _ = agent(capsys, "assess", "--db", db, "--format", "json")
    answer = json.loads(out)
    assert (code, answer["scope"], answer["finding"]) == (0, "chat", "UNDER_SIZED")
    assert answer["curve"]["id"] == 1
    assert answer["demand"]["covered_s"] == 60 * MINUTES


def test_markdown_and_html_escape_what_servers_say(capsys: Command, box: Box) -> None:
    name = "<b>|`x`"
    db = str(box.serve(50.0, name, model="m", minutes=20).curve(name).done())
    code, page, _ = agent(capsys, "assess", "--db", db, "--format", "html")
    assert code == 0
    assert page.startswith("<!doctype html>")
    assert "<b>" not in page
    assert "&lt;b&gt;|`x`" in page
    assert "<strong>UNDER_SIZED</strong>" in page
    assert "<td>in flight: mean, P95, P99, most</td><td>50.0, 50.0, 50.0, 50.0</td>" in page
    assert not [word for word in ("<script", "src=", "href=", "url(") if word in page]
    code, text, _ = agent(capsys, "assess", "--db", db, "--format", "markdown")
    assert code == 0
    assert "# \\<b\\>\\|\\`x\\`, " in text
    assert "| in flight: mean, P95, P99, most | 50.0, 50.0, 50.0, 50.0 |" in text
    assert "\n## What to do\n\n- " in text


def test_several_come_one_after_another(capsys: Command, box: Box) -> None:
    db = str(box.serve(8.0, "a", minutes=3).serve(8.0, "b", minutes=3).done())
    code, out, _ = agent(capsys, "assess", "--db", db, "--format", "json")
    assert (code, [one["scope"] for one in json.loads(out)]) == (0, ["a", "b"])
    code, out, _ = agent(capsys, "assess", "--db", db)
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("of: ")] == [
        "of: a", "of: b",
    ]  # fmt: skip


def test_the_configuration_names_store_window_and_slo(
    capsys: Command, db: str, tmp_path: Path
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        f'[agent]\ndb = "{db}"\n[slo]\ntargets = "ttft:p95<450ms"\n[assess]\nwindow = "1h"\n'
    )
    code, out, _ = agent(capsys, "assess", "--config", str(file), "--format", "json")
    answer = json.loads(out)
    assert (code, answer["demand"]["window_s"]) == (0, 3600)
    assert "SLO ttft:p95<450ms" in answer["rests_on"]
    _, out, _ = agent(
        capsys, "assess", "--config", str(file), "--window", "2h", "--slo", "ttft:p95<1s",
        "--format", "json",
    )  # fmt: skip
    assert json.loads(out)["demand"]["window_s"] == 7200
    assert "SLO ttft:p95<1000ms" in json.loads(out)["rests_on"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--db", "/nowhere.db"], "no agent has written /nowhere.db"),
        (["--db", "DB", "--server", "cat"], "no server 'cat', nearest is 'chat'"),
        (["--db", "DB", "--server", "chat", "--service", "x"], "give one of them"),
        (["--db", "DB", "--window", "soon"], "--window 'soon': write a time"),
        (["--db", "DB", "--slo", "ttft"], "SLO target"),
        (["--db", "DB", "--expect-rps", "1"], "--expect-rps goes with --curve"),
        (["--demand", "d.json"], "--demand goes with --curve"),
        (["--db", "DB", "--curve", "c.json"], "--db asks the store"),
        (["--server", "a", "--curve", "c.json"], "--server asks the store"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_wrong_usage(capsys: Command, db: str, args: list[str], said: str) -> None:
    code, out, err = agent(capsys, "assess", *(db if word == "DB" else word for word in args))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_store_without_a_server(capsys: Command, box: Box) -> None:
    db = str(box.power("g1", minutes=1).done())
    code, _, err = agent(capsys, "assess", "--db", db)
    assert code == 2
    assert "knows no inference server yet" in err


# ----------------------------------------------------------------------------------------- demand


def files(tmp_path: Path, demand: object) -> tuple[str, ...]:
    (tmp_path / "c.json").write_text(json.dumps(CURVE))
    text = demand if isinstance(demand, str) else json.dumps(demand)
    (tmp_path / "d.json").write_text(text)
    return "--curve", str(tmp_path / "c.json"), "--demand", str(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("demand", "finding"),
    [
        ({"concurrency": {"mean": 2, "p95": 6, "p99": 8}}, "RIGHT_SIZED"),
        ({"concurrency": {"mean": 2, "p95": 6, "max": 500}}, "UNDER_SIZED"),
        ({"concurrency": {"p99": 4}, "requests_per_s": {"mean": 1, "peak": 90}}, "UNDER_SIZED"),
        ({"window_s": 60, "requests_per_s": {"mean": 1}, "more": [1]}, "RIGHT_SIZED"),
    ],
)
def test_a_declared_demand(
    capsys: Command, tmp_path: Path, demand: dict[str, Any], finding: str
) -> None:
    code, out, _ = agent(capsys, "assess", *files(tmp_path, demand), "--format", "json")
    verdict = json.loads(out)
    assert (code, verdict["finding"], verdict["demand"]["declared"]) == (0, finding, True)
    assert "the declared " in verdict["summary"]


def traced(*at_ms: float) -> str:
    line = '{"timestamp": %r, "input_length": 512, "output_length": 128, "hash_ids": [1]}\n'
    return "".join(line % at for at in at_ms)


@pytest.mark.parametrize(("busy", "finding"), [(0, "RIGHT_SIZED"), (90 * 60, "UNDER_SIZED")])
def test_recorded_requests_are_a_demand(
    capsys: Command, tmp_path: Path, busy: int, finding: str
) -> None:
    """One a second for ten minutes, and in one of them 90 a second more."""
    at_ms = [*range(0, 600_000, 1000), *(120_000 + 60_000 * one / busy for one in range(busy))]
    code, out, _ = agent(capsys, "assess", *files(tmp_path, traced(*at_ms)), "--format", "json")
    verdict = json.loads(out)
    assert (code, verdict["finding"]) == (0, finding)
    rps = (busy + 60) / 60
    assert verdict["demand"]["rps"] == pytest.approx(rps, rel=0.02)


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023,1,2\n", "nothing in it can be used"),
        ('{"timestamp": 1}\n{"timestamp": 2}\n', "a member is missing"),
        (traced(1000), "1 request(s) at one instant have no rate"),
        ("{}", "neither concurrency nor requests_per_s"),
        ({"concurrency": {"p99": "many"}}, "not a demand"),
        ({"concurrency": {"p99": 0}}, "write numbers above 0"),
        ({"concurrency": {"p99": -1}}, "write numbers above 0"),
        ("[" * 100_000, "not a demand"),
    ],
)
def test_a_demand_that_is_none(capsys: Command, tmp_path: Path, demand: object, said: str) -> None:
    code, out, err = agent(capsys, "assess", *files(tmp_path, demand))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"agent: --demand {tmp_path / 'd.json'}: ")
    assert said in err


def test_a_demand_is_declared_once(capsys: Command, tmp_path: Path) -> None:
    given = files(tmp_path, {"concurrency": {"p99": 8}})
    code, _, err = agent(capsys, "assess", *given, "--expect-concurrency", "9")
    assert code == 2
    assert "give one" in err


def test_a_curve_alone_on_paper(capsys: Command, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(CURVE))
    curve = ("assess", "--curve", str(tmp_path / "c.json"), "--format")
    assert "**CAPACITY\\_ONLY**" in agent(capsys, *curve, "markdown")[1]
    assert "<strong>CAPACITY_ONLY</strong>" in agent(capsys, *curve, "html")[1]
