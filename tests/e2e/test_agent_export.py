"""What the running agent sends arrives: through an outage of the back end and three kills."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import Phoenix, VictoriaMetrics
from tests.e2e.running_agent import Page, RunningAgent, server

COUNTER = "output_tokens_total"
COMMITTED_S = 1.2  # the store commits once a second, the outbox with each export


def samples(db: Path) -> dict[int, float]:
    """What the agent's own store holds of the counter: ms → value."""
    with closing(sqlite3.connect(db)) as store:
        sql = "select cast(at_unix_s * 1000 as integer), value from recent where name = ?"
        return dict(store.execute(sql, [COUNTER]).fetchall())


class Exporting(NamedTuple):
    """An agent that exports; `name` is its server's, and nobody else's."""

    agent: RunningAgent
    name: str


@pytest.fixture
def exporting(
    tmp_path: Path, page: Page, victoria_metrics: VictoriaMetrics, phoenix: Phoenix
) -> Iterator[Exporting]:
    name = f"chat-{secrets.token_hex(6)}"
    env = {
        # Every sample goes out more than once, with its own time: the back end keeps it once.
        "OTEL_METRIC_EXPORT_INTERVAL": "400",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{victoria_metrics.endpoint}/v1/metrics",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{phoenix.otlp_endpoint}/v1/traces",
    }
    config = server(name, page.url) + '[gpu]\nsource = "none"\n[export.otlp]\n'
    with RunningAgent(tmp_path, config, env) as agent:
        yield Exporting(agent, name)


def test_every_point_arrives_once(
    exporting: Exporting, page: Page, victoria_metrics: VictoriaMetrics
) -> None:
    agent, name = exporting

    def wait_for(looks: int) -> None:
        until = page.looks + looks
        agent.until(lambda: page.looks >= until, 30, "does not look")

    kills = []
    wait_for(3)
    victoria_metrics.stop()
    try:
        for _ in range(3):
            wait_for(3)
            kills.append(time.time())
            agent.kill()
            agent.start()
        wait_for(3)
        waiting = agent.get("/api/v1/status")["outbox"]
        assert waiting["pending"] > 10
        assert "refused" in waiting["last_error"]
    finally:
        victoria_metrics.start()
    agent.until(lambda: agent.get("/api/v1/status")["outbox"]["pending"] <= 1, 90, "keeps it all")
    assert agent.get("/api/v1/status")["outbox"]["dropped"] == 0
    time.sleep(COMMITTED_S)
    assert agent.stop() == 0

    match = f'{{__name__=~"servefit_output_tokens.*",servefit_source="{name}"}}'
    [series] = victoria_metrics.export(match)
    arrived = dict(zip(series["timestamps"], series["values"], strict=True))
    assert len(arrived) == len(series["timestamps"])  # each once
    assert len(arrived) >= 12
    kept = samples(agent.db)
    # A kill may come between a sample's two ways, to the store and to the outbox.
    unkept = arrived.keys() - kept.keys()
    assert all(min(abs(at / 1e3 - kill) for kill in kills) < 2.5 for at in unkept)
    # A slow disk may hold one export up until the next sample is there. What an outage or a death
    # had lost would be all samples in a row.
    marks = [at in arrived for at in sorted(kept)]
    rows = "".join("+" if here else "-" for here in marks)
    assert "---" not in rows, rows
    assert rows.count("-") <= 2 * len(kills) + 2, rows
    assert all(arrived[at] == kept[at] for at in arrived.keys() & kept.keys())


def test_a_verdict_arrives_as_a_span(exporting: Exporting, phoenix: Phoenix) -> None:
    agent, name = exporting

    def spans() -> list[dict[str, Any]]:
        found = phoenix.get("/v1/projects/default/spans?limit=1000")["data"]
        return [one for one in found if one["attributes"].get("servefit.source") == name]

    [span] = agent.until(spans, 60, "has sent no verdict")
    [kept] = agent.until(lambda: agent.get(f"/api/v1/assessments?server={name}"), 5, "keeps none")
    assert span["name"] == "assessment"
    assert span["attributes"]["servefit.finding"] == kept["finding"]
    assert agent.stop() == 0
