"""The Grafana dashboards, the alerts, and the compose file that brings them together.

What can be read off the files is tested on them; every expression is then asked of a real
VictoriaMetrics that has scraped a real agent beside a server under load, and has to return data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from agent.config import Config
from agent.exporters import Batch, known_batch
from agent.exporters.concluded import of_curve, of_verdict
from agent.exporters.prometheus import page, sample_name
from agent.metrics import CATALOGUE
from agent.model import (
    Confidence,
    Level,
    Ratio,
    Reading,
    ServerView,
    Stats,
    Sweep,
    Target,
    Verdict,
    encode,
)
from dashboards.generate import DASHBOARDS, HERE, expand, files, render_all
from loadgen.targets.process import announced, running
from tests.agent.samplers.test_dcgm import GOLDEN, read
from tests.conftest import VictoriaMetrics, find_promtool, find_victoria_metrics
from tests.e2e.command import Started, loadgen
from tests.e2e.running_agent import RunningAgent, server
from tests.nvml_standin import compiled
from tests.support import require

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
NAMES = {sample_name(name): name for name in CATALOGUE}
Json = dict[str, Any]

BY_NAME: dict[str, Json] = {one.name: render_all(one) for one in DASHBOARDS}
each_dashboard = pytest.mark.parametrize("name", sorted(BY_NAME))


def placed(name: str) -> list[Json]:
    """Rows and panels, those of folded rows among them."""
    return [one for row in BY_NAME[name]["panels"] for one in (row, *row.get("panels", ()))]


def panels(name: str) -> list[Json]:
    return [one for one in placed(name) if one["type"] != "row"]


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


def series_in(expression: str) -> set[str]:
    return set(re.findall(r"\bservefit_\w+", expression))


# ------------------------------------------------------------------------------------------- files


def test_the_files_are_as_generated() -> None:
    assert {path: path.read_text("utf-8") for path in HERE.glob("*.json")} == files()


def test_the_script_says_whether_they_are() -> None:
    asked = subprocess.run(
        [sys.executable, HERE / "generate.py", "--check"], capture_output=True, text=True
    )
    assert (asked.returncode, asked.stdout) == (0, "as generated\n"), asked.stderr


def test_all_that_people_look_for_is_there() -> None:
    assert set(BY_NAME) == {"overview", "server", "gpu", "agent", "sweep"}


def test_a_name_that_is_not_in_the_catalogue_makes_no_panel() -> None:
    with pytest.raises(KeyError):
        expand("sum(@requests_runing)", ())
    assert expand("rate(@gpu_energy_j[5m])", ("gpu",)) == (
        'rate(servefit_gpu_energy_j_total{gpu=~"$gpu"}[5m])'
    )


# --------------------------------------------------------------------------------------- structure


@each_dashboard
def test_it_can_be_imported_anywhere(name: str) -> None:
    made = BY_NAME[name]
    assert made["id"] is None
    assert made["uid"] == f"servefit-{name}"
    first, *others = made["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    asking = [*panels(name), *(t for panel in panels(name) for t in panel["targets"])]
    asking += [one for one in others if one["type"] == "query"]
    assert {one["datasource"]["uid"] for one in asking} == {"${datasource}"}


@each_dashboard
def test_its_variables_take_several_values_and_each_is_used(name: str) -> None:
    variables = {one["name"]: one for one in BY_NAME[name]["templating"]["list"]}
    text = "\n".join([*expressions(name), *(str(one["query"]) for one in variables.values())])
    used = set(re.findall(r"\$(\w+)", text)) - {"__rate_interval", "__range"}
    assert used == variables.keys() - {"datasource"}
    for one in variables.values():
        if one["type"] == "query":
            assert one["multi"] or (name, one["name"]) == ("sweep", "server")
            assert f'"${one["name"]}"' in text
            assert f'=~"${one["name"]}"' in text, "several values need a regular expression"


@each_dashboard
def test_every_panel_has_a_unit_a_title_and_something_to_ask(name: str) -> None:
    found = panels(name)
    assert found
    for panel in found:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit, panel["title"]
        assert ": " not in unit, "Grafana puts the space before a suffix itself"
        assert panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters
        assert len(set(letters)) == len(letters)
    every = placed(name)
    assert len({panel["id"] for panel in every}) == len(every)


@each_dashboard
def test_no_panel_lies_over_another_or_beyond_the_edge(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in placed(name):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} over {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_a_row_that_most_sweeps_leave_empty_is_folded() -> None:
    """It holds its panels and asks for nothing; unfolded they lie below everything else."""
    *_, row = BY_NAME["sweep"]["panels"]
    assert (row["type"], row["collapsed"], len(row["panels"])) == ("row", True, 5)
    others = [one for one in BY_NAME["sweep"]["panels"] if one is not row]
    bottom = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in others)
    assert row["gridPos"]["y"] == bottom
    assert min(one["gridPos"]["y"] for one in row["panels"]) == bottom + 1
    open_rows = [one for one in others if one["type"] == "row"]
    assert all(one["panels"] == [] and not one["collapsed"] for one in open_rows)


@each_dashboard
def test_what_it_asks_for_is_in_the_catalogue(name: str) -> None:
    variables = BY_NAME[name]["templating"]["list"]
    asked = [*expressions(name), *(one.get("definition", "") for one in variables)]
    assert set.union(*map(series_in, asked)) <= NAMES.keys()


@each_dashboard
def test_it_asks_as_prometheus_wants(name: str) -> None:
    for expression in expressions(name):
        windows = re.findall(r"\[([^\]]+)\]", expression)
        assert set(windows) <= {"$__rate_interval", "$__range"}, expression
        assert len(windows) == len(re.findall(r"\b(?:rate|increase)\(", expression)), expression
        if "_bucket" in expression:
            quantile = r"histogram_quantile\([\d.]+, sum by \(le, \w+\) \(rate\(\w+_bucket\{"
            heatmap = r"sum by \(le\) \(increase\(\w+_bucket\{"
            assert re.match(f"{quantile}|{heatmap}", expression), expression
        if "servefit_kv_usage_ratio" in expression:
            assert re.match(r"avg by \(\w+\) \(servefit_kv_usage_ratio\{[^}]*\}\)$", expression)


# ------------------------------------------------------------------------------------------- a run

# What has no source in the run below, and why. All else of the catalogue has to be on the page.
NOT_IN_THE_RUN = {
    "requests_waiting_by_reason": "newer vLLM's, the simulated one is older",
    "kv_used_tokens": "SGLang's",
    "requests_received_total": "Triton's",
    "requests_rejected_total": "newer vLLM's",
    "spec_decode_drafts_total": "no speculation",
    "spec_decode_draft_tokens_total": "no speculation",
    "spec_decode_accepted_tokens_total": "no speculation",
    "replicas_ready": "a gateway's",
    "models_loaded": "Ollama's",
    "model_memory_bytes": "Ollama's",
    "model_memory_gpu_bytes": "Ollama's",
    "gpu_memory_unified": "a GPU with memory of its own",
    "gpu_power_polled": "a GPU with an energy counter",
    "gpu_sm_occupancy_ratio": "the agent does not ask for GPM",
    "gpu_tensor_active_ratio": "the agent does not ask for GPM",
    "gpu_dram_active_ratio": "the agent does not ask for GPM",
    "mig_memory_used_bytes": "no MIG",
    "mig_memory_total_bytes": "no MIG",
    "assessment_capacity_requests_per_s": "a demand in requests/s takes minutes",
    "assessment_capacity_lo_requests_per_s": "a demand in requests/s takes minutes",
    "assessment_capacity_hi_requests_per_s": "a demand in requests/s takes minutes",
    "assessment_demand_lo_ratio": "the sweep breaks no SLO, so the capacity has no high end",
    "assessment_capacity_hi_requests": "the sweep breaks no SLO",
}
DEPENDS_ON_THE_MACHINE = {
    "host_energy_j": "RAPL",
    "host_pressure_seconds_total": "a kernel with pressure stall information",
}


def at(source: str, **values: float) -> Batch:
    """One source at an instant."""
    return Batch(source, [Reading(0, name, value) for name, value in values.items()])


class Observed(NamedTuple):
    """A run that a real store has scraped, as the agent `instance`."""

    store: VictoriaMetrics
    instance: str
    page: str
    at_unix_s: float

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        return self.store.query(self.filled(expression, self.instance), self.at_unix_s)

    @staticmethod
    def filled(expression: str, instance: str) -> str:
        """As Grafana sends it: everything of one agent."""
        values = {
            "__rate_interval": "1m", "__range": "1h", "instance": instance, "gpu_hour": "2",
            "kwh": "0.3",
        }  # fmt: skip
        return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".*"), expression)


def scrape(store: VictoriaMetrics, text: str, instance: str, at_unix_s: float) -> None:
    """What a store makes of a page that it reads at an instant."""
    labels = f"extra_label=job=servefit&extra_label=instance={instance}"
    request = urllib.request.Request(
        f"{store.url}/api/v1/import/prometheus?{labels}&timestamp={int(1000 * at_unix_s)}",
        data=text.encode(),
    )
    urllib.request.urlopen(request, timeout=10).close()


def rated_curve() -> Sweep:
    """A curve as another tool writes it: by offered rate, with energy."""
    return Sweep(
        target=Target(model="llama-3.1-8b"),
        levels=[
            Level(
                mode="rate",
                offered_rps=rate,
                request_throughput=rate,
                output_tokens_per_s=32 * rate,
                ttft_ms=Stats(mean=200.0, p95=300.0, n=100),
                itl_ms=Stats(mean=20.0, p95=30.0, n=100),
                e2e_ms=Stats(mean=1_000.0, n=100),
                server=ServerView(kv_usage_mean=0.5),
                energy_j_per_output_token=0.4,
            )
            for rate in (1.0, 2.0)
        ],
    )


def elsewhere(at_unix_s: float, tokens: float) -> str:
    """What agents elsewhere say: of GPUs read through dcgm-exporter, of a server that finds prompts
    in its cache, of a demand in requests/s (it takes minutes), of a sweep with its energy."""
    verdict = Verdict(
        "UNDER_SIZED",
        "the service needs more",
        Confidence("medium", ""),
        ratio=Ratio(1.5, 1.25, 2.0),
        capacity={"unit": "rps", "lo": 1.0, "value": 1.5, "hi": 2.0},
    )
    level = Level(concurrency=8, output_tokens_per_s=900.0, energy_j_per_output_token=0.4)
    cache = {"prefix_cache_queries_total": tokens, "prefix_cache_hits_total": tokens / 4}
    devices, _ = read(GOLDEN.read_bytes())
    known = [
        *of_verdict("service:batch", verdict, at_unix_s),
        *of_curve("batch", Sweep(levels=[level]), at_unix_s),
    ]
    said = [known_batch(0, known), at("batch", **cache), Batch("gpu", devices)]
    return page(said).decode()


@pytest.fixture(scope="module")
def observed(
    _victoria_metrics: VictoriaMetrics, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    """Two servers under load, a GPU each, a curve each, verdicts."""
    folder = tmp_path_factory.mktemp("dashboards")
    library = compiled(folder)
    (folder / "nvml").write_text("devices 2\n")
    env = {"LD_LIBRARY_PATH": str(library.parent), "NVML_STANDIN": str(folder / "nvml")}
    _victoria_metrics.start()
    sim = [sys.executable, "-m", "loadgen.cli", "serve", "sim", "--port", "0"]
    with (
        running(sim, ready=announced, timeout_s=60) as chat,
        running(sim, ready=announced, timeout_s=60) as rates,
    ):
        slo = 'slo = "ttft:p95<10s,itl:p95<5s"\n'  # whatever else the machine does
        config = (
            server("chat", chat.url, more=f"gpus = [0]\n{slo}")
            + server("rates", rates.url, more=f"gpus = [1]\n{slo}")
            + '[assess]\nevery = "1m"\nexpect_concurrency = 2\n'
            + '[export.otlp]\nendpoint = "http://127.0.0.1:9"\n'
        )
        with RunningAgent(folder, config, env) as agent:
            yield from observe(agent, (chat.url, rates.url), folder, _victoria_metrics)


LENGTHS = ("--input-tokens", "64", "--output-tokens", "32")


def observe(
    agent: RunningAgent, urls: tuple[str, str], folder: Path, store: VictoriaMetrics
) -> Iterator[Observed]:
    instance = agent.url.removeprefix("http://")
    done, scraped = threading.Event(), list[float]()

    def keep_scraping() -> None:
        while not done.wait(1.0):
            scrape(store, agent.get("/metrics"), instance, time.time())
            scraped.append(time.time())

    scraper = threading.Thread(target=keep_scraping, daemon=True)
    scraper.start()
    try:
        rated = Started(
            folder, "run", urls[1], "--rate", "4", "--duration", "4s", *LENGTHS,
            "--db", str(folder / "rated.db"),
        )  # fmt: skip
        swept = loadgen(
            folder, "sweep", urls[0], "--concurrency", "1,4", "--duration", "2s", *LENGTHS,
            "--agent", f"{agent.url}?server=chat", "--json", str(folder / "sweep.json"),
        )  # fmt: skip
        assert swept.returncode in (0, 3), swept.stderr
        assert rated.end()[0] in (0, 3)
        post(f"{agent.url}/api/v1/curve?server=rates", encode(rated_curve()))
        agent.until(lambda: is_all_there(agent.get("/metrics")), 90, "has no verdict on a curve")
        enough = len(scraped) + 3  # a rate takes two
        agent.until(lambda: len(scraped) >= enough, 10, "is not scraped")
    finally:
        done.set()
        scraper.join()
    text = agent.get("/metrics")
    at_unix_s = time.time()
    scrape(store, text, instance, at_unix_s)
    for before_s, tokens in ((15.0, 1000.0), (0.0, 2000.0)):
        scrape(store, elsewhere(at_unix_s, tokens), instance, at_unix_s - before_s)
    yield Observed(store, instance, text, at_unix_s)


def is_all_there(text: str) -> bool:
    """The last to come: the verdicts, the curves, the outbox."""
    last = ("servefit_assessment_demand_ratio{", "{offered_rps=", "servefit_agent_outbox_bytes{")
    return all(one in text for one in last)


def post(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10).close()


def test_the_catalogue_is_exported(observed: Observed) -> None:
    exported = {NAMES[name] for name in series_in_page(observed.page)}
    missing = CATALOGUE.keys() - exported
    assert missing - DEPENDS_ON_THE_MACHINE.keys() == NOT_IN_THE_RUN.keys()


def series_in_page(text: str) -> set[str]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {re.split(r"[ {]", line)[0] for line in lines}


@each_dashboard
def test_every_expression_returns_data(observed: Observed, name: str) -> None:
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in panels(name)
        for target in panel["targets"]
        if not any(value == value for _, value in observed.ask(target["expr"]))
    ]
    assert empty == []


@each_dashboard
def test_every_variable_finds_values(observed: Observed, name: str) -> None:
    for one in BY_NAME[name]["templating"]["list"]:
        if one["type"] == "query":
            [(series, label)] = re.findall(r"label_values\((.*), (\w+)\)", one["definition"])
            values = {labels.get(label) for labels, _ in observed.ask(series)}
            assert values
            assert None not in values


def test_the_numbers_are_those_of_the_run(observed: Observed) -> None:
    """Energy of a token: 300 W is what the stand-in draws, on one GPU each."""

    def value(dashboard: str, title: str, target: int = 0, **labels: str) -> float:
        asked = [one["targets"][target] for one in panels(dashboard) if one["title"] == title]
        found = [one for asking in asked for one in observed.ask(asking["expr"])]
        [wanted] = [value for said, value in found if labels.items() <= said.items()]
        return wanted

    tokens = value("overview", "Output tokens a second", source="chat")
    joules = value("overview", "Energy of an output token", source="chat")
    assert joules * tokens == pytest.approx(300, rel=0.1)
    usd = value("overview", "Cost of a million output tokens", source="chat")
    assert usd == pytest.approx((2 / 3600 + 0.3 * joules * tokens / 3.6e6) / tokens * 1e6)
    assert value("overview", "Demand over capacity", source="chat") == 2 / 4
    assert value("overview", "Newest verdicts", 5, source="service:batch") == 1.5
    swept = "Output tokens a second"
    four, one = (value("sweep", swept, concurrency=load) for load in "41")
    assert four > one > 0
    assert value("sweep", "KV cache in use", offered_rps="2") == 0.5
    assert value("server", "Prefix cache hits", source="batch") == 0.25
    assert value("server", "KV cache in use", source="chat") < 0.1
    assert value("agent", "Samplers", sampler="gpu") == 1


# ------------------------------------------------------------------------------------------ alerts

ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((CONFIG / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
}


def finding(name: str) -> Batch:
    labels = (("confidence", "medium"), ("finding", name))
    return Batch("chat", [Reading(0, "assessment_finding", 1.0, labels)])


def sampler(ok: float) -> Batch:
    return Batch("agent", [Reading(0, "sampler_ok", ok, (("sampler", "gpu"),))])


UP, DOWN = "up 1\n", "up 0\n"
FULL = at("chat", kv_usage_ratio=0.97, requests_waiting=3)
# alert → what is on the page when it must fire, and when it must not.
CASES: dict[str, tuple[list[str | Batch], list[str | Batch]]] = {
    "ServefitUnderSized": (
        [finding("UNDER_SIZED")],
        [finding("BORDERLINE"), finding("OVER_SIZED"), ""],
    ),
    "ServefitKvNearFull": (
        [FULL],
        [
            at("chat", kv_usage_ratio=0.97, requests_waiting=0),
            at("chat", kv_usage_ratio=0.85, requests_waiting=9),
            "",
        ],
    ),
    "ServefitAgentBlind": ([sampler(0)], [sampler(1), ""]),
    "ServefitAgentGone": ([DOWN, ""], [UP]),
    "ServefitAgentNotWriting": (
        [at("agent", agent_store_writer_lag_s=120)],
        [at("agent", agent_store_writer_lag_s=1.5), ""],
    ),
}
TOLD = [
    (alert, said, must_fire)
    for alert, both in CASES.items()
    for must_fire, pages in zip((True, False), both, strict=True)
    for said in pages
]


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_waits_says_what_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    for part in ("summary", "description", "runbook"):
        assert rule["annotations"][part].strip()
    assert series_in(rule["expr"]) <= NAMES.keys()
    assert alert in CASES


@pytest.mark.parametrize(("alert", "said", "must_fire"), TOLD, ids=str)
def test_an_alert_fires_when_it_must_and_only_then(
    victoria_metrics: VictoriaMetrics, alert: str, said: str | Batch, must_fire: bool
) -> None:
    text = said if isinstance(said, str) else page([said]).decode()
    # Each case has a day of its own, on which nobody else wrote anything.
    day = 10 + TOLD.index((alert, said, must_fire))
    now_s = time.time() - day * 86_400
    for minute in range(6):
        scrape(victoria_metrics, text, "alerts:9477", now_s - 60 * minute)
    fired = victoria_metrics.query(ALERTS[alert]["expr"], now_s)
    assert bool(fired) == must_fire, fired
    for labels, _ in fired:
        used = set(re.findall(r"\$labels\.(\w+)", ALERTS[alert]["annotations"]["summary"]))
        assert used <= labels.keys() or "{{ with" in ALERTS[alert]["annotations"]["summary"]


def test_kv_use_is_averaged_over_what_shares_a_name(victoria_metrics: VictoriaMetrics) -> None:
    """Two half-full caches are no full one."""
    halves = [
        Batch("chat", [Reading(0, "kv_usage_ratio", 0.5), Reading(0, "requests_waiting", 5)], kind)
        for kind in ((("model", "a"),), (("model", "b"),))
    ]
    now_s = time.time() - 5 * 86_400
    scrape(victoria_metrics, page(halves).decode(), "alerts:9477", now_s)
    assert victoria_metrics.query(ALERTS["ServefitKvNearFull"]["expr"], now_s) == []


@pytest.mark.parametrize("what", ["alerts", "configuration", "dashboards"])
def test_promtool_takes_them(tmp_path: Path, what: str) -> None:
    """Prometheus' own parser is stricter than VictoriaMetrics'."""
    promtool = find_promtool()
    require(promtool, "promtool (make real-parts)")
    recorded = tmp_path / "dashboards.yaml"
    asked = {Observed.filled(expr, "agent:9477") for name in BY_NAME for expr in expressions(name)}
    rules = [{"record": f"n{n}", "expr": expr} for n, expr in enumerate(sorted(asked))]
    recorded.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    command = {
        "alerts": ["rules", CONFIG / "alerts.yaml"],
        "configuration": ["config", CONFIG / "prometheus.yml"],
        "dashboards": ["rules", recorded],
    }[what]
    said = subprocess.run([str(promtool), "check", *command], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_victoria_metrics_takes_the_configuration() -> None:
    command = find_victoria_metrics()
    require(command, "VictoriaMetrics (make real-parts)")
    said = subprocess.run(
        [str(command), f"-promscrape.config={CONFIG / 'prometheus.yml'}",
         "-promscrape.config.strictParse=false", "-promscrape.config.dryRun"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr


# ----------------------------------------------------------------------------------------- compose

COMPOSE = CONFIG / "compose.yaml"


def services() -> dict[str, Json]:
    return dict(yaml.safe_load(COMPOSE.read_text("utf-8"))["services"])


def mounts(service: Json) -> dict[str, str]:
    """target → source; with the default of a variable."""
    found = {}
    for one in service["volumes"]:
        if isinstance(one, str):
            source, target = one.removesuffix(":ro").split(":")
        else:
            source, target = one["source"], one["target"]
        found[target] = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", source)
    return found


def test_what_compose_mounts_is_there() -> None:
    named = yaml.safe_load(COMPOSE.read_text("utf-8"))["volumes"].keys()
    sources = {source for one in services().values() for source in mounts(one).values()}
    assert {one for one in sources if "/" not in one} == named
    paths = {(CONFIG / one).resolve() for one in sources if "/" in one}
    assert [one for one in paths if not one.exists()] in ([], [ROOT / "agent.toml"])


def test_everything_stays_on_the_loopback_and_finds_the_next() -> None:
    agent, prometheus, grafana = (services()[one] for one in ("agent", "prometheus", "grafana"))
    assert all(one["network_mode"] == "host" for one in services().values())
    assert Config().agent.listen.startswith("127.0.0.1:")
    [job] = yaml.safe_load((CONFIG / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert job["job_name"] == "servefit"  # the alerts ask for it
    assert job["static_configs"][0]["targets"] == [Config().agent.listen]
    said = dict(one[2:].split("=") for one in prometheus["command"])
    assert mounts(prometheus)[said["config.file"]] == "./prometheus.yml"
    [source] = yaml.safe_load((CONFIG / "grafana/datasources/servefit.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == f"http://{said['web.listen-address']}"
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert mounts(agent)["/etc/servefit/agent.toml"] == "../agent.toml"
    assert agent["build"] == {"context": "..", "dockerfile": "config/Containerfile"}


def test_grafana_finds_the_dashboards_and_prometheus_the_alerts() -> None:
    prometheus, grafana = mounts(services()["prometheus"]), mounts(services()["grafana"])
    [provider] = yaml.safe_load((CONFIG / "grafana/dashboards/servefit.yaml").read_text())[
        "providers"
    ]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    folder = provider["options"]["path"]
    assert (CONFIG / grafana[folder]).resolve() == HERE
    assert (HERE / Path(home).relative_to(folder)).exists()
    for kind in ("datasources", "dashboards"):
        assert grafana[f"/etc/grafana/provisioning/{kind}"] == f"./grafana/{kind}"
    [rules] = yaml.safe_load((CONFIG / "prometheus.yml").read_text("utf-8"))["rule_files"]
    assert prometheus[f"/etc/prometheus/{rules}"] == f"./{rules}"


def answers(compose: list[str]) -> bool:
    found = shutil.which(compose[0])
    return bool(found) and not subprocess.run([*compose, "version"], capture_output=True).returncode


def test_compose_takes_the_files(tmp_path: Path) -> None:
    start = next(filter(answers, (["docker", "compose"], ["docker-compose"])), None)
    if start is None:
        pytest.skip("no docker compose here; the names are compared without it")
    said = subprocess.run(
        [*start, "-f", COMPOSE, "-f", CONFIG / "compose.gpu.yaml", "config", "--format", "json"],
        env={**os.environ, "HOME": str(tmp_path), "GRAFANA_PASSWORD": "s3cret"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert set(json.loads(said.stdout)["services"]) == set(services())
