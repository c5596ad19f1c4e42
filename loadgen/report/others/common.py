"""What the three formats share: one load point, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agent.model import Level, Sweep
from loadgen.kept import Floats, Kept


@dataclass(frozen=True)
class Point:
    """One level of a run with the requests that were kept of it."""

    sweep: Sweep
    index: int
    requests: Kept

    @property
    def level(self) -> Level:
        return self.sweep.levels[self.index]

    @property
    def load_name(self) -> str:
        """`concurrency_4` or `request_rate_2.5`."""
        level = self.level
        if level.mode == "rate":
            return f"request_rate_{level.offered_rps or 0:g}"
        return f"concurrency_{level.concurrency or 0}"

    @property
    def started(self) -> datetime:
        """The level's start in UTC; the run's, and else 1970, where it is not known."""
        for text in (self.level.started_at, self.sweep.run.started_at):
            if text:
                return datetime.fromisoformat(text)
        return datetime.fromtimestamp(0, UTC)

    def bounds_ms(self) -> dict[str, float]:
        """Per-request limits of the SLO by metric: the strictest where one has several."""
        bounds: dict[str, float] = {}
        for slo in self.sweep.slo:
            bounds[slo.metric] = min(slo.bound_ms, bounds.get(slo.metric, slo.bound_ms))
        return bounds

    def about(self) -> dict[str, Any]:
        """What none of the formats has a place for and no reader may miss."""
        run, target, level = self.sweep.run, self.sweep.target, self.level
        measurement, counts = level.measurement, level.requests
        requests = self.requests
        return {
            "note": "written by servefit's loadgen; figures by the definitions of this file's tool",
            "run": run.id,
            "level": self.index + 1,
            "tool_version": run.tool_version,
            "url": target.url,
            "engine": target.engine,
            "engine_version": target.engine_version,
            "simulated": run.simulated,
            "valid": measurement.valid if measurement else None,
            "reasons": measurement.reasons if measurement else [],
            "tokens_source": level.tokens.source if level.tokens else None,
            "requests": counts.ok + counts.failed + counts.cancelled if counts else None,
            "requests_kept": requests.n,
            "requests_cancelled": int(requests.cancelled.sum()),
            "requests_with_gaps": sum(gaps is not None for gaps in requests.gaps_ms),
        }


def seconds(values_ms: Floats) -> list[float | None]:
    """ms as s, to the 100 ns that the store keeps gaps to; null is not known."""
    return [None if value != value else round(value / 1e3, 7) for value in values_ms.tolist()]


def integers(values: Floats) -> list[int | None]:
    return [None if value != value else int(value) for value in values.tolist()]
