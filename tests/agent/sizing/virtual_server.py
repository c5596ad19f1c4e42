"""The simulated engine as a server that an agent watches in virtual time, and the truth."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from agent.minutes import Minute, Minutes
from agent.model import Reading
from agent.sizing.engine import EngineSpec
from agent.sizing.simulate import Engine

TIME_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 10.0, 20.0, 40.0,
)  # fmt: skip
LENGTH_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
_MANY = 1 << 30


class _Observed:
    """A histogram as prometheus_client keeps it, and the sample itself."""

    def __init__(self, name: str, bounds: tuple[float, ...]) -> None:
        self.name, self.bounds = name, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.sample: list[tuple[float, int]] = []

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times
        self.sample.append((value, times))

    def readings(self) -> Iterable[Reading]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield Reading(0, f"{self.name}_bucket", total, (("le", str(bound)),))
        yield Reading(0, f"{self.name}_sum", self.sum)
        yield Reading(0, f"{self.name}_count", total)


class VirtualServer:
    """An engine, its metrics page, and what really happened (`area_s`: in flight × time)."""

    def __init__(self, spec: EngineSpec) -> None:
        self.engine = Engine(spec)
        self.now_s = 0.0
        self.area_s = 0.0
        self.arrived = self.finished = self.prompt_tokens = self.output_tokens = 0
        self.energy_j = 0.0
        self._requests: dict[int, tuple[float, int, int]] = {}
        self.ttft = _Observed("ttft_seconds", TIME_BOUNDS_S)
        self.itl = _Observed("itl_seconds", TIME_BOUNDS_S)
        self.e2e = _Observed("e2e_seconds", TIME_BOUNDS_S)
        self.prompts = _Observed("prompt_length_tokens", LENGTH_BOUNDS)
        self.outputs = _Observed("output_length_tokens", LENGTH_BOUNDS)

    def submit(self, prompt: int, output: int) -> None:
        self._requests[self.arrived] = self.now_s, prompt, output
        self.engine.submit(self.arrived, prompt, output)
        self.arrived += 1

    def advance(self, until_s: float) -> list[int]:
        """Runs on until the instant, or until somebody is done; who it was."""
        step = self.engine.step(_MANY, until_s - self.now_s)
        if step is None:
            self.energy_j += 100.0 * (until_s - self.now_s)
            self.now_s = until_s
            return []
        in_flight = step.running + self.engine.waiting
        self.area_s += in_flight * step.duration_s
        self.energy_j += 500.0 * step.duration_s
        self.now_s += step.duration_s
        self.output_tokens += step.decoded * step.steps + len(step.first) + len(step.resumed)
        if step.decoded:
            self.itl.observe(step.duration_s / step.steps, step.decoded * step.steps)
        for request in step.first:
            sent_s, prompt, _ = self._requests[request]
            self.ttft.observe(self.now_s - sent_s)
            self.prompt_tokens += prompt
        for request in step.finished:
            sent_s, prompt, output = self._requests.pop(request)
            self.finished += 1
            self.e2e.observe(self.now_s - sent_s)
            self.prompts.observe(prompt)
            self.outputs.observe(output)
        return step.finished

    def page(self) -> list[Reading]:
        figures = {
            "requests_running": self.engine.running,
            "requests_waiting": self.engine.waiting,
            "kv_usage_ratio": self.engine.kv_usage,
            "kv_capacity_tokens": self.engine.num_blocks * self.engine.spec.block_size,
            "requests_finished_total": self.finished,
            "prompt_tokens_total": self.prompt_tokens,
            "output_tokens_total": self.output_tokens,
            "preemptions_total": self.engine.preemptions,
            "server_start_unix_s": 1.0,
        }
        return [
            *(Reading(0, name, float(value)) for name, value in figures.items()),
            *(
                one
                for histogram in (self.ttft, self.itl, self.e2e, self.prompts, self.outputs)
                for one in histogram.readings()
            ),
        ]


def watched(
    server: VirtualServer,
    arrivals: Iterable[tuple[float, int, int]],
    until_s: float,
    *,
    source: str = "chat",
    interval_s: float = 5.0,
    streams: Iterable[tuple[float, int, int, int]] = (),
) -> list[Minute]:
    """The minutes an agent sees while requests (at s, prompt, output) arrive.

    `streams`: (from s, how many, prompt, output): a closed loop of so many clients from then on.
    """
    minutes = Minutes(source, interval_s=interval_s)
    due = iter(sorted(arrivals))
    closed = iter(streams)
    coming, turn = next(due, None), next(closed, None)
    held, lengths = 0, (1, 1)
    sample_s = 0.0
    found: list[Minute] = []
    while server.now_s < until_s:
        while coming is not None and coming[0] <= server.now_s:
            server.submit(*coming[1:])
            coming = next(due, None)
        if turn is not None and turn[0] <= server.now_s:
            held, *rest = turn[1:]
            lengths = rest[0], rest[1]
            turn = next(closed, None)
        while server.engine.running + server.engine.waiting < held:
            server.submit(*lengths)
        if sample_s <= server.now_s:
            page = [*server.page(), Reading(0, "gpu_energy_j", server.energy_j, (("gpu", "G"),))]
            found += minutes.add(page, server.now_s, round(server.now_s * 1e9))
            sample_s += interval_s
        stops = [sample_s, until_s, *([coming[0]] if coming else []), *([turn[0]] if turn else [])]
        server.advance(max(min(stops), server.now_s + 1e-9))
    found += minutes.add(server.page(), server.now_s, round(server.now_s * 1e9))
    current = minutes.current()
    return [*found, current] if current else found
