"""What the agent says of itself."""

from __future__ import annotations

import time

from agent.exporters import Batch
from agent.exporters.own import memory_bytes, own_readings
from agent.exporters.prometheus import page
from agent.metrics import CATALOGUE


def test_it_is_all_of_the_catalogue() -> None:
    before = time.process_time()
    readings = own_readings(7, started_unix_s=1.8e9, store_bytes=4096, writer_lag_s=0.25)
    found = {reading.name: reading.value for reading in readings}
    assert set(found) <= set(CATALOGUE)
    assert found["agent_cpu_seconds_total"] >= before
    assert all(reading.at_ns == 7 for reading in readings)
    text = page([Batch("agent", readings)]).decode()
    assert 'servefit_agent_store_writer_lag_s{source="agent"} 0.25' in text


def test_memory_is_what_is_resident() -> None:
    first = memory_bytes()
    block = b"x" * 50_000_000
    assert memory_bytes() - first > 40_000_000
    del block
