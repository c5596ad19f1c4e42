"""What the agent says of itself."""

from __future__ import annotations

import time

from agent.exporters import Batch
from agent.exporters.own import SamplerStatus, memory_bytes, own_readings
from agent.exporters.prometheus import page
from agent.metrics import CATALOGUE


def test_it_is_all_of_the_catalogue_and_nothing_is_invented() -> None:
    samplers = [
        SamplerStatus("chat", ok=True, age_s=0.5, duration_s=0.01, samples=9, errors=1),
        SamplerStatus("nvml", ok=False, age_s=None, duration_s=None, errors=3),
    ]
    before = time.process_time()
    readings = own_readings(7, samplers, started_unix_s=1.8e9, store_bytes=4096, writer_lag_s=0.25)
    assert {reading.name for reading in readings} <= set(CATALOGUE)
    found = {(reading.name, dict(reading.labels).get("sampler")): reading for reading in readings}
    assert found["agent_sampler_errors_total", "nvml"].value == 3.0
    assert ("agent_sampler_age_s", "nvml") not in found
    assert found["agent_cpu_seconds_total", None].value >= before
    assert all(reading.at_ns == 7 for reading in readings)
    text = page([Batch("agent", readings)]).decode()
    assert 'servefit_agent_sampler_ok{sampler="nvml",source="agent"} 0' in text


def test_memory_is_what_is_resident() -> None:
    first = memory_bytes()
    block = b"x" * 50_000_000
    assert memory_bytes() - first > 40_000_000
    del block
