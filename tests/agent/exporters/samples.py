"""For the exporters' tests: an instant of a server and of a GPU, by number; short words for an
outbox."""

from __future__ import annotations

from typing import Any

from agent.exporters import Batch
from agent.exporters.outbox import Outbox
from agent.model import Reading

SECOND_NS = 1_000_000_000
LABELS = (("model", "tiny"), ("engine", "vllm"), ("address", "127.0.0.1"), ("port", "8000"))
BOUNDS = (0.1, 0.5)


def histogram(base: str, at_ns: int, buckets: tuple[float, ...], total: float) -> list[Reading]:
    """`buckets` cumulative, for BOUNDS and +Inf."""
    bounds = [*map(str, BOUNDS), "+Inf"]
    return [
        *(
            Reading(at_ns, f"{base}_bucket", n, (("le", bound),))
            for bound, n in zip(bounds, buckets, strict=True)
        ),
        Reading(at_ns, f"{base}_count", buckets[-1]),
        Reading(at_ns, f"{base}_sum", total),
    ]


def server(k: int, *, start_unix_s: float | None = 1_800_000_000.0, source: str = "chat") -> Batch:
    """The k-th second of a server that began at `start_unix_s`."""
    at_ns = k * SECOND_NS
    readings = [
        Reading(at_ns, "requests_running", k % 7),
        Reading(at_ns, "kv_usage_ratio", (k % 100) / 100),
        Reading(at_ns, "output_tokens_total", 1000.0 * k),
        *histogram("ttft_seconds", at_ns, (k, 2 * k, 3 * k), 0.25 * k),
    ]
    if start_unix_s is not None:
        readings.append(Reading(at_ns, "server_start_unix_s", start_unix_s))
    return Batch(source, readings, LABELS)


def gpus(k: int, uuid: str = "GPU-1") -> Batch:
    at_ns, labels = k * SECOND_NS, (("gpu", uuid),)
    values = {
        "gpu_memory_used_bytes": 60e9,
        "gpu_memory_total_bytes": 80e9,
        "gpu_utilization_ratio": 0.9,
        "gpu_power_w": 350.5,
        "gpu_energy_j": 350.5 * k,
        "gpu_temperature_c": 61.0,
        "gpu_throttled": 0.0,
    }
    return Batch("gpu", [Reading(at_ns, name, value, labels) for name, value in values.items()])


def put(outbox: Outbox, *messages: bytes, kind: Any = "metrics") -> None:
    for message in messages:
        assert outbox.put(kind, message, points=3)


def counts(outbox: Outbox) -> tuple[int, int, int]:
    """How many wait, were sent, were dropped."""
    status = outbox.status()
    return status.pending, status.sent, status.dropped
