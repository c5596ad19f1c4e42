"""A real metrics back end, an outage of it, and a writer that is killed again and again."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agent.exporters.otlp import MetricsEncoder, assessment
from agent.exporters.outbox import Outbox
from agent.exporters.sender import Sender, signal_url
from agent.model import Confidence, Ratio, Reason, Verdict
from tests.agent.exporters.nasty import receiving
from tests.agent.exporters.samples import BOUNDS, gpus, server
from tests.conftest import Phoenix, VictoriaMetrics

POINTS = 600
ROOT = Path(__file__).parents[3]


class Writer:
    """`tests.agent.exporters.writer` as a process; `last` is the last point it said it kept."""

    def __init__(self, outbox: Path, endpoint: str, run: str, begin_s: int) -> None:
        self._arguments = (str(outbox), endpoint, run)
        self._begin_s = begin_s
        self.last = -1

    def _start(self) -> subprocess.Popen[str]:
        numbers = (str(self.last + 1), str(POINTS - 1), str(self._begin_s))
        command = [sys.executable, "-m", "tests.agent.exporters.writer"]
        return subprocess.Popen(
            [*command, *self._arguments, *numbers], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run_and_kill(self, points: int, pause_s: float) -> None:
        """Until `points` more are kept, and a moment; then kill −9."""
        until = self.last + points
        with self._start() as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.last = int(line)
                if self.last >= until:
                    break
            time.sleep(pause_s)
            os.kill(process.pid, signal.SIGKILL)
            # What it printed before it died was kept; what it kept last it may not have printed,
            # and its successor then writes it a second time, with the same time stamp.
            for line in process.stdout:
                self.last = int(line)
        assert process.returncode == -signal.SIGKILL

    def run_to_the_end(self) -> str:
        with self._start() as process:
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return said.splitlines()[-1]


@pytest.mark.timeout(180)
def test_an_outage_and_kills_lose_no_point_and_double_none(
    tmp_path: Path, victoria_metrics: VictoriaMetrics
) -> None:
    run, moments = secrets.token_hex(6), random.Random()
    begin_s = int(time.time()) - 3600
    writer = Writer(tmp_path / "outbox.db", victoria_metrics.endpoint, run, begin_s)

    writer.run_and_kill(80, moments.uniform(0, 0.05))  # while all is well
    victoria_metrics.stop()
    for _ in range(3):
        writer.run_and_kill(100, moments.uniform(0, 0.05))
    victoria_metrics.start()
    assert writer.run_to_the_end() == "dropped 0"

    match = f'servefit_run="{run}"'
    expected = {
        f"servefit_requests_running{{{match}}}": lambda k: k % 7,
        f"servefit_output_tokens_total{{{match}}}": lambda k: 1000 * k,
        f"hw_energy_joules_total{{{match}}}": lambda k: 350.5 * k,
        f"gen_ai_server_time_to_first_token_seconds_count{{{match}}}": lambda k: 3 * k,
        f'gen_ai_server_time_to_first_token_seconds_bucket{{{match},le="0.5"}}': lambda k: 2 * k,
    }
    stamps = [(begin_s + k) * 1000 for k in range(POINTS)]
    for query, value in expected.items():
        counted = victoria_metrics.query(
            f"count_over_time({query}[{POINTS + 60}s])", begin_s + POINTS
        )
        assert [n for _, n in counted] == [POINTS], query
        [series] = victoria_metrics.export(query)  # one: no attribute changed on the way
        assert series["timestamps"] == stamps, query
        assert series["values"] == [value(k) for k in range(POINTS)], query
    everything = victoria_metrics.export(f"{{{match}}}")
    assert {len(one["timestamps"]) for one in everything} == {POINTS}


async def test_a_query_finds_names_units_and_buckets(
    tmp_path: Path, victoria_metrics: VictoriaMetrics
) -> None:
    run, begin_s = secrets.token_hex(6), int(time.time()) - 600
    outbox = Outbox(tmp_path / "outbox.db")
    encoder = MetricsEncoder({"host.name": "test", "servefit.run": run})
    sender = Sender(outbox, "metrics", signal_url(victoria_metrics.endpoint, "metrics"))
    for k in (10, 20):
        for message in encoder.encode([server(k), gpus(k)], lambda at_ns: begin_s * 10**9 + at_ns):
            assert await sender.put(message.body, message.points)
    assert await sender.drain(10.0) == 0
    await sender.close()
    assert outbox.status().last_error is None
    outbox.close()
    found = {
        one["metric"]["__name__"] for one in victoria_metrics.export(f'{{servefit_run="{run}"}}')
    }
    assert found >= {
        "hw_gpu_memory_usage_bytes",
        "hw_gpu_memory_limit_bytes",
        "hw_gpu_utilization_ratio",
        "hw_power_watts",
        "hw_energy_joules_total",
        "hw_temperature_celsius",
        "servefit_kv_usage_ratio",
        "servefit_requests_running",
        "gen_ai_server_time_to_first_token_seconds_sum",
    }
    [(labels, p50)] = victoria_metrics.query(
        "histogram_quantile(0.5, sum by (le, gen_ai_request_model) "
        f'(increase(gen_ai_server_time_to_first_token_seconds_bucket{{servefit_run="{run}"}}[60s])))',
        begin_s + 21,
    )
    assert labels == {"gen_ai_request_model": "tiny"}
    assert BOUNDS[0] < p50 <= BOUNDS[1]


VERDICT = Verdict(
    finding="UNDER_SIZED",
    summary="24 concurrent requests are 118 % of what the server holds.",
    confidence=Confidence("medium", "four days of demand"),
    reasons=[
        Reason("KV_MEMORY", "the KV cache was full.", {"kv_usage_max": 0.99, "levels": [16, 64]}),
        Reason("ADMISSION_CAP", "max_num_seqs was reached.", {"cap": 256}),
    ],
    demand={"concurrency": {"p95": 24.0, "mean": None}},
    ratio=Ratio(1.18, 1.1, 1.3),
    missing=["energy", "price"],
)


@pytest.mark.timeout(300)
async def test_an_assessment_arrives_with_its_evidence(tmp_path: Path, phoenix: Phoenix) -> None:
    ids = random.Random(secrets.randbits(64))
    same = random.Random()
    same.setstate(ids.getstate())
    now_ns = time.time_ns()
    message = assessment(
        VERDICT,
        server="chat",
        start_unix_ns=now_ns - 5_000_000,
        end_unix_ns=now_ns,
        resource={"host.name": "test"},
        ids=ids,
    )
    outbox = Outbox(tmp_path / "outbox.db")
    sender = Sender(outbox, "traces", signal_url(phoenix.otlp_endpoint, "traces"))
    assert await sender.put(message.body, message.points)
    assert await sender.drain(30.0) == 0
    await sender.close()
    assert outbox.status().last_error is None
    outbox.close()
    [span] = phoenix.wait_for_spans(same.getrandbits(128), 1)
    assert span["name"] == "assessment"
    assert span["parent_id"] is None
    said: dict[str, Any] = span["attributes"]
    assert said["servefit.source"] == "chat"
    assert said["servefit.finding"] == "UNDER_SIZED"
    assert said["servefit.ratio.value"] == 1.18
    assert said["servefit.demand.concurrency.p95"] == 24.0
    assert said["servefit.reason_codes"] == ["KV_MEMORY", "ADMISSION_CAP"]
    assert [event["name"] for event in span["events"]] == ["servefit.reason"] * 2
    assert span["events"][0]["attributes"]["servefit.reason.code"] == "KV_MEMORY"
    assert span["events"][0]["attributes"]["servefit.reason.evidence.kv_usage_max"] == 0.99


async def test_a_killed_sender_repeats_itself_byte_for_byte(tmp_path: Path) -> None:
    """Killed between the back end's taking a request and the outbox's hearing of it."""
    async with receiving() as receiver:
        path = tmp_path / "outbox.db"
        box = Outbox(path)
        box.put("metrics", b"one", 1)
        sender = Sender(box, "metrics", receiver.url)
        request = box.oldest("metrics")
        assert request is not None
        await sender._try(request)  # taken, and the process ends here
        await sender.close()
        box.close()
        again = Outbox(path)
        sender = Sender(again, "metrics", receiver.url)
        assert await sender.drain(5.0) == 0
        await sender.close()
        again.close()
    assert receiver.taken == [b"one", b"one"]
