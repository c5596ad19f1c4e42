"""Advice from a store and from a file: prices, settings, what was predicted earlier, on paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import forms
from agent.assess import assess_each
from agent.config import parse as parse_config
from agent.files import judge_files, read_demand
from agent.minutes import Minute, MinuteHistogram
from agent.model import ServerView, Sweep, TargetGpu, UsageError, encode
from agent.recall import Recall
from agent.sizing.curve import parse_slo
from agent.sizing.scene import Needs
from tests.agent.recorded import NOON, counter, minute
from tests.agent.sizing.swept import H100, sweep_of
from tests.agent.test_assess import END, MINUTES, Box, ask, served
from tests.agent.test_cli import Command, agent

SLO = parse_slo("ttft:p95<1000ms")
SHORT = Needs(idle_s=3600.0, right_s=3600.0, over_s=3 * 3600.0, over_daily=1)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path / "agent.db")


def alone(box: Box, running: float = 1.5, card: str = "h100-sxm", driver: str = H100) -> Box:
    """One person on a GPU, with a sweep of production's lengths."""
    box.serve(running, gpus=("g0",), model="llama-3.1-8b").power("g0")
    sweep = sweep_of(card, driver=driver, lengths=(200, 100))
    levels = [
        msgspec.structs.replace(level, server=ServerView(level.concurrency, waiting_mean=0.0,
                                kv_usage_max=0.2, prefill_ms=5.0))
        for level in sweep.levels
    ]  # fmt: skip
    box.history.add_curve(msgspec.structs.replace(sweep, levels=levels), "chat")
    return box


def test_from_a_store(box: Box) -> None:
    found = ask(alone(box).done(), slo=SLO, needs=SHORT).verdict
    assert found.finding == "OVER_SIZED"
    assert [reason.code for reason in found.reasons][-1] == "TRAINING_CLASS_FOR_PERSONAL"
    assert found.recommendation is not None
    assert found.recommendation.configuration == "1 x RTX-3090"
    assert found.cost["usd_per_month"]["typical"] == pytest.approx(730 * 2.95)
    million = found.cost["usd_per_million_output_tokens"]
    assert million["typical"] == pytest.approx(2.95 / 3600 / 100 * 1e6, rel=0.01)
    assert found.questions["users"] == "single"
    assert found.energy["kwh_per_month"] == pytest.approx(73)
    usual = ask(box.path, slo=SLO).verdict
    assert usual.finding == "INSUFFICIENT_DATA"
    assert "TRAINING_CLASS_FOR_PERSONAL" not in [one.code for one in usual.reasons]


def kept(box: Box, *names: str) -> Path:
    """One person on these GPUs, without any sweep."""
    gpus = [TargetGpu(name, f"g{n}", 80 << 30) for n, name in enumerate(names)]
    box.history.add_gpus(gpus)
    owned = tuple(one.uuid for one in gpus)
    box.serve(1.5, gpus=owned, model="llama-3.1-8b", minutes=0).power(*owned)
    steps = MinuteHistogram("itl_seconds", (), (0.01, 0.02, math.inf), (0.0, 6000.0, 0.0))
    times = (counter("itl_seconds_count", 0, 6000), counter("itl_seconds_sum", 0, 84.0))
    for n in range(MINUTES):
        one = served(n, 1.5)
        one = msgspec.structs.replace(
            one, values=(*one.values, *times), histograms=(*one.histograms, steps)
        )
        box.history.add_minute(one)
        if n % 50 == 49:
            assert box.history.flush()
    return box.done()


def test_the_gpus_that_the_agent_saw_cost_and_compare_without_a_sweep(box: Box) -> None:
    found = ask(kept(box, H100), slo=SLO, needs=SHORT).verdict
    assert found.finding == "RIGHT_SIZED"
    assert (found.cost["gpu"], found.cost["gpus"]) == ("H100-SXM-80GB", 1)
    assert found.cost["usd_per_month"]["typical"] == pytest.approx(730 * 2.95)
    assert found.cost["candidates"]
    assert all("published" in one["steps"] for one in found.cost["candidates"])
    assert found.recommendation is not None
    assert "published benchmarks, for no sweep of this box" in str(found.recommendation.error_bar)
    assert found.recommendation.action.startswith("try 1 x ")
    assert "H100-SXM-80GB is training-class" in found.questions["said"][0]


def test_gpus_that_are_not_alike_are_told(box: Box) -> None:
    found = ask(kept(box, H100, "NVIDIA L40S"), slo=SLO).verdict
    assert "GPUs that are alike: it has" in found.cost["unknown"]


def test_replicas_on_other_gpus_are_no_box(box: Box) -> None:
    box.history.add_gpus([TargetGpu(H100, "g0"), TargetGpu("NVIDIA L40S", "g1")])
    for name, gpu in (("a", "g0"), ("b", "g1")):
        box.serve(1.5, name, service="chat", gpus=(gpu,), model="llama-3.1-8b")
    path = box.done()
    assert "which GPU it runs on" in ask(path, service="chat", slo=SLO).verdict.cost["unknown"]
    assert ask(path, server="b", slo=SLO).verdict.cost["gpu"] == "L40S"


def test_a_curve_that_tells_no_gpu_is_of_those_that_the_agent_saw(box: Box) -> None:
    swept = sweep_of(lengths=(200, 100))
    bare = msgspec.structs.replace(swept.target, gpus=[])
    box.history.add_curve(msgspec.structs.replace(swept, target=bare), "chat")
    found = ask(kept(box, H100), slo=SLO, needs=SHORT).verdict
    assert found.cost["gpu"] == "H100-SXM-80GB"
    assert any(line.startswith("a replay") or "replay" in line for line in found.rests_on)


def test_prices_of_a_file_count_and_a_wrong_one_is_said(box: Box, tmp_path: Path) -> None:
    path = alone(box).done()
    prices = tmp_path / "prices.toml"
    config = parse_config(f'[prices]\nfile = "{prices}"\n[assess]\nwindow = "3h"\n', tmp_path)

    def month() -> Any:
        with Recall(path) as recall:
            (found,) = assess_each(recall, config, now_s=END + 5.0)
        return found.verdict.cost["usd_per_month"]

    prices.write_text(
        '[gpu.H100-SXM-80GB]\nusd_per_hour = 2\nas_of = "2026-09"\nsource = "our contract"\n'
    )
    assert month() == pytest.approx({"low": 1460, "typical": 1460, "high": 1460})
    prices.write_text("[gpu.H100-SXM-80GB]\nusd_per_hour = 0\n")
    with pytest.raises(UsageError, match=r"prices file .*prices\.toml: "):
        month()


def test_a_wrong_price_is_found_before_anything_runs(capsys: Command, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text('[gpu.L4]\nusd_per_hour = -1\nas_of = "x"\nsource = "y"')
    (tmp_path / "agent.toml").write_text('[prices]\nfile = "prices.toml"\n')
    code, out, err = agent(capsys, "config", "check", str(tmp_path / "agent.toml"))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "prices.toml: [gpu.L4] usd_per_hour: write a number above 0" in err


def test_the_servers_own_settings_make_the_box(box: Box) -> None:
    settings = {"model": "llama-3.1-8b", "vllm:cache_config_info.cache_dtype": "fp8"}
    box.serve(1.5, gpus=("g0",)).history.add_fingerprint("chat", "x", settings)
    box.history.add_curve(sweep_of(lengths=(200, 100)), "chat")
    assert ask(box.done(), slo=SLO, needs=SHORT).verdict.cost["here"]["kv_precision"] == "fp8"


def test_what_was_predicted_is_scored_after_the_change(box: Box) -> None:
    path = alone(box).done()
    before = ask(path, slo=SLO, needs=SHORT, now_s=END + 5.0)
    again = Box(path)
    again.history.add_assessment("chat", before.verdict)
    swept = sweep_of("4090", driver="NVIDIA GeForce RTX 4090", lengths=(200, 100), loads=(1, 4, 16))
    later = {"run": type(swept.run)(id="later", started_at="2030-01-01T00:00:00Z")}
    again.history.add_curve(Sweep(**{**{f: getattr(swept, f) for f in swept.__struct_fields__},
                                     **later}), "chat")  # fmt: skip
    again.done()
    found = ask(path, slo=SLO, needs=SHORT, now_s=END + 3600.0).verdict
    (scored,) = [one for one in found.reasons if one.code == "PREDICTION_SCORED"]
    assert "of 1 x RTX-4090 " in scored.because
    assert scored.evidence["inside"] is True


def test_from_a_file_with_declared_lengths() -> None:
    demand = {"concurrency": {"p99": 2}, "input_tokens": {"mean": 900},
              "output_tokens": {"mean": 250}}  # fmt: skip
    found = judge_files(sweep_of(), SLO, read_demand(json.dumps(demand).encode(), "d.json"))
    assert found.finding == "RIGHT_SIZED"
    assert found.recommendation is not None
    assert "--input-tokens 900 --output-tokens 250" in str(found.recommendation.confirm_with)
    assert found.cost["candidates"][0]["input_tokens"] == 900


# ----------------------------------------------------------------------------------------- on paper


def test_text_fits_a_screen_and_names_its_numbers(box: Box) -> None:
    found = ask(alone(box).done(), slo=SLO, needs=SHORT)
    lines = forms.text(forms.sheet("chat", found.verdict, found.pattern))
    assert sum(-(-len(line) // 100) for line in lines) <= 40  # of 100 columns
    text = "\n".join(lines)
    for said in (
        "\nconfiguration: 1 x RTX-3090, ", " % less (1,", " USD a month)\n", "\nerror bar: ",
        "\nDo I train? No training is declared. H100-SXM-80GB is training-class",
        "\nOne user or a service? One user: 1.5 requests at once",
        "hardware: 1 x H100-SXM-80GB, rented · ",
        "USD a month: low, typical, high: 1,453, 2,154, 3,650",
        "USD per million output tokens within the SLO, idle time included: ",
    ):  # fmt: skip
        assert said in text, said


def test_every_form_has_the_cost_and_the_questions(
    capsys: Command, box: Box, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.json"
    file.write_bytes(encode(sweep_of()))
    asked = ("assess", "--curve", str(file), "--expect-concurrency", "2", "--format")
    code, text, _ = agent(capsys, *asked, "text")
    assert code == 0
    assert "USD a month: low, typical, high: 1,453, 2,154, 3,650" in text
    assert "## The three questions" in agent(capsys, *asked, "markdown")[1]
    assert "<h2>The three questions</h2><ul><li>Do I train?" in agent(capsys, *asked, "html")[1]
    answer = json.loads(agent(capsys, *asked, "json")[1])
    assert answer["recommendation"]["saving_lo"] > 0
    assert answer["cost"]["candidates"][0]["output_tokens_per_s"]["lo90"] > 0


def test_what_might_be_cheaper_is_told_where_nothing_is_recommended() -> None:
    found = judge_files(sweep_of(), SLO, expect_concurrency=24)
    (row,) = [value for name, value in forms.sheet("x", found).evidence if "cheapest" in name]
    assert row.endswith(" USD a month")


# ------------------------------------------------------------------------------------------ energy


def package(*joules: float, domain: str = "package-0") -> list[Minute]:
    return [
        minute(NOON + 60 * n, [counter("host_energy_j", 0, rise, domain=domain)], source="host")
        for n, rise in enumerate(joules)
    ]


def test_processors_and_memory_are_told_apart_from_the_gpus(box: Box) -> None:
    alone(box)
    for one in (*package(3000.0, 3000.0), *package(1000.0, domain="package-0/dram")):
        box.history.add_minute(one)
    path = box.done()
    found = ask(path, slo=SLO, urls={"chat": "http://127.0.0.1:8000"}).verdict.energy
    assert found["host_energy_j"] == 7000
    assert found["host_j_per_output_token"] == pytest.approx(7000 / (6000 * MINUTES))
    assert found["energy_j"] == 6000.0 * MINUTES
    for elsewhere in ({}, {"chat": "http://gpu:8000"}):
        assert "host_energy_j" not in ask(path, slo=SLO, urls=elsewhere).verdict.energy


def test_the_whole_platform_is_counted_once_and_for_nobody_beside_others(box: Box) -> None:
    alone(box)
    for one in (*package(3000.0), *package(9000.0, domain="psys")):
        box.history.add_minute(one)
    assert box.history.flush()
    urls = {name: "http://localhost:8000" for name in ("chat", "other")}
    assert ask(box.path, slo=SLO, urls=urls).verdict.energy["host_energy_j"] == 9000
    path = box.serve(1.0, "other", minutes=1).done()
    assert "host_energy_j" not in ask(path, slo=SLO, urls=urls).verdict.energy
