"""A month beside two servers, as an agent would have kept it: what the page's tests look at.

Office hours on `chat`, a third of that on `code`; each has a GPU of its own. Every figure is a
function of the time, so that a test can say what a chart has to show. The last day is whole; of
those before one minute in twenty was watched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agent.assess import assess
from agent.config import Config, Server
from agent.exporters import Batch
from agent.live import GpuStatus, OutboxStatus, ServerStatus, Status, StoreStatus
from agent.minutes import Minute, MinuteHistogram
from agent.model import Reading, Slo
from agent.recall import Recall
from agent.samplers.watched import SamplerStatus
from tests.agent.recorded import NOON, Clocks, counter, gauge, minute, store
from tests.loadgen.report import samples

DAY_S = 86_400
DAYS = 30
END = NOON  # the beginning of an hour
RAW_S = 1800
SHARES = {"chat": 1.0, "code": 1 / 3}
GPUS = {"chat": "GPU-1f", "code": "GPU-2f"}  # the first is that of the sweep
MODEL = samples.sweep().target.model
MEMORY_BYTES = 80 * 2.0**30
BOUNDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, math.inf)
SLO = (Slo("ttft", "p95", 500.0), Slo("itl", "p95", 50.0))


class At(NamedTuple):
    """What one server does at an instant."""

    running: float
    tokens_per_s: float
    prompt_per_s: float
    requests_per_s: float
    kv: float
    power_w: float


def at(name: str, unix_s: float) -> At:
    hour, weekday = unix_s / 3600 % 24, int(unix_s // DAY_S + 3) % 7
    office = math.exp(-(((hour - 11) / 3.5) ** 2)) * (1.0 if weekday < 5 else 0.15)
    running = SHARES[name] * (2 + 60 * office)
    tokens_per_s = 150 * running / (1 + running / 90)
    requests_per_s = tokens_per_s / 256
    return At(
        running,
        tokens_per_s,
        512 * requests_per_s,
        requests_per_s,
        running / 100,
        150 + 6 * running,
    )


def ttft_counts(one: At) -> tuple[float, ...]:
    """Of a minute: nine in ten between 50 and 100 ms, the rest slower the more there is to do."""
    n = 60 * one.requests_per_s
    slow = min(0.5, one.running / 200)
    return (0.0, n * 0.9 * (1 - slow), n * 0.1 * (1 - slow), n * slow, 0.0, 0.0, 0.0)


class Month:
    """The store, and an agent over it: one `agent.live.Live`. `advance` lets time pass."""

    def __init__(self, path: Path) -> None:
        self.clocks = Clocks(END - DAYS * DAY_S)
        self.history = store(path, self.clocks)
        self.config = Config(
            server=tuple(Server(name=name, url=f"http://{name}:8000") for name in SHARES)
        )
        self.tokens = dict.fromkeys(SHARES, 0.0)
        self.newest: list[Batch] = []
        self.servers = [
            ServerStatus(
                name,
                f"http://user:s3cret@{name}:8000/?key=s3cret",
                "front",
                "vllm",
                MODEL,
                (GPUS[name],),
                "process list",
                SLO,
            )
            for name in SHARES
        ]
        self.gpus = [GpuStatus(uuid, "NVIDIA H100", int(MEMORY_BYTES)) for uuid in GPUS.values()]
        self.samplers = [SamplerStatus(name, True, 1.0, 0.01, 0, None) for name in (*SHARES, "gpu")]

    def fill(self) -> None:
        for name, gpu in GPUS.items():
            self.history.add_source(name, service="front", gpus=[gpu])
        for day in range(DAYS):
            start = END + (day - DAYS) * DAY_S
            step = 60 if day == DAYS - 1 else 1200
            for source in (*SHARES, "gpu"):
                times = range(start, start + DAY_S, step)
                self.history.add_minutes(source, [a_minute(source, one) for one in times])
                assert self.history.flush(60)
            self.clocks.pass_s(DAY_S - (RAW_S if day == DAYS - 1 else 0))
        self.advance(RAW_S)
        self.history.add_curve(samples.sweep(), "chat")
        assert self.history.flush(60)
        self.assess()
        assert self.history.state().minutes_dropped == 0

    def advance(self, seconds: int) -> None:
        """Samples every five seconds, the last of them at the new instant."""
        for _ in range(0, seconds, 5):
            self.clocks.pass_s(5)
            self.newest = [Batch(name, self._sample(name)) for name in SHARES]
            self.newest.append(Batch("gpu", [one for n in SHARES for one in self._of_gpu(n)]))
            for batch in self.newest:
                self.history.add_readings(batch.source, batch.readings)
        assert self.history.flush(60)

    def _sample(self, name: str) -> list[Reading]:
        one, read = at(name, self.now_s), self.clocks.reading
        self.tokens[name] += 5 * one.tokens_per_s
        return [
            read("requests_running", one.running),
            read("requests_waiting", 0.0),
            read("kv_usage_ratio", one.kv),
            read("output_tokens_total", self.tokens[name]),
            read("requests_finished_total", self.tokens[name] / 256),
        ]

    def _of_gpu(self, name: str) -> list[Reading]:
        one, uuid = at(name, self.now_s), GPUS[name]
        return [
            self.clocks.reading("gpu_memory_used_bytes", 0.875 * MEMORY_BYTES, gpu=uuid),
            self.clocks.reading("gpu_power_w", one.power_w, gpu=uuid),
        ]

    def assess(self) -> None:
        """As the agent does: what it concludes of the servers goes to the store, here twice."""
        with Recall(self.history.path) as recall:
            found = [
                assess(recall, server=name, window_s=7 * DAY_S, slo=SLO, now_s=self.now_s)
                for name in SHARES
            ]
        for _ in range(2):
            self.clocks.pass_s(1)
            for one in found:
                self.history.add_assessment(one.scope, one.verdict)
        assert self.history.flush(60)

    # ------------------------------------------------------------------------------ what is asked

    @property
    def now_s(self) -> float:
        return self.clocks.wall_ns / 1e9

    def status(self) -> Status:
        return Status(
            version="1.2.3",
            now_unix_s=self.now_s,
            started_unix_s=END - DAYS * DAY_S,
            uptime_s=self.now_s - END + DAYS * DAY_S,
            samplers=tuple(self.samplers),
            store=StoreStatus(123_000_000, 0.5, True, False, 0, None),
            outbox=OutboxStatus(0, 0),
            servers=tuple(self.servers),
            gpus=tuple(self.gpus),
        )

    def batches(self) -> Sequence[Batch]:
        return self.newest

    def is_ready(self) -> bool:
        return True

    def newest_unix_s(self) -> Mapping[str, float]:
        unix_s = self.history.timeline.unix_s
        return {one.source: unix_s(one.readings[-1].at_ns) for one in self.newest}

    def open_minutes(self) -> Sequence[Minute]:
        return ()


def a_minute(source: str, start: int) -> Minute:
    if source == "gpu":
        found = [one for name in SHARES for one in _gpu_values(name, start)]
        return minute(start, found, source="gpu")
    one = at(source, start)
    values = [
        gauge("requests_running", one.running),
        gauge("requests_waiting", 0.0),
        gauge("kv_usage_ratio", one.kv),
        counter("output_tokens_total", 1e6, 60 * one.tokens_per_s),
        counter("prompt_tokens_total", 1e6, 60 * one.prompt_per_s),
        counter("requests_finished_total", 1e6, 60 * one.requests_per_s),
        counter("requests_received_total", 1e6, 60 * one.requests_per_s),
    ]
    ttft = MinuteHistogram("ttft_seconds", (), BOUNDS, ttft_counts(one))
    itl = MinuteHistogram("itl_seconds", (), (0.01, 0.02, 0.05, math.inf), (30.0, 60.0, 10.0, 0.0))
    return minute(start, values, [ttft, itl], source=source)


def _gpu_values(name: str, start: int) -> list[object]:
    one, labels = at(name, start), {"gpu": GPUS[name]}
    return [
        gauge("gpu_memory_used_bytes", 0.875 * MEMORY_BYTES, **labels),
        gauge("gpu_memory_total_bytes", MEMORY_BYTES, **labels),
        gauge("gpu_utilization_ratio", min(1.0, 0.1 + one.running / 70), **labels),
        gauge("gpu_power_w", one.power_w, **labels),
        counter("gpu_energy_j", 1e6, 60 * one.power_w, **labels),
    ]
