"""No sampler stops another, and each says how it does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agent.metrics import CATALOGUE
from agent.model import Reading
from agent.samplers import SamplerError
from agent.samplers.watched import Watched

GIVEN = Reading(1, "gpu_power_w", 300.0, (("gpu", "GPU-a"),))


class Source:
    """A sampler that does what it is told, on a clock that it moves itself."""

    name = "source"

    def __init__(self) -> None:
        self.now_ns = 0
        self.takes_s = 0.25
        self.fails: Exception | None = None
        self.waits: asyncio.Event | None = None
        self.under_way = 0
        self.at_once = 0
        self.closed = 0

    async def sample(self) -> Sequence[Reading]:
        self.under_way += 1
        self.at_once = max(self.at_once, self.under_way)
        try:
            self.now_ns += int(self.takes_s * 1e9)
            if self.waits:
                await self.waits.wait()
            if self.fails:
                raise self.fails
            return [GIVEN]
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        self.closed += 1
        if self.fails:
            raise self.fails


def watched(source: Source, deadline_s: float | None = None) -> Watched:
    return Watched(source, deadline_s=deadline_s, clock=lambda: source.now_ns)


def record(one: Watched) -> dict[str, float]:
    of_sampler = one.record()
    assert {one.labels for one in of_sampler} == {(("sampler", "source"),)}
    assert {one.name for one in of_sampler} <= CATALOGUE.keys()
    return {one.name: one.value for one in of_sampler}


async def test_a_good_sample_and_its_record() -> None:
    source = Source()
    one = watched(source)
    assert await one.sample() == [GIVEN]
    assert record(one) == {
        "sampler_ok": 1,
        "sampler_duration_s": 0.25,
        "sampler_age_s": 0,
        "sampler_errors_total": 0,
    }


async def test_a_failure_is_a_record_and_a_line() -> None:
    source = Source()
    one = watched(source)
    assert one.status().age_s is None
    await one.sample()
    source.fails = SamplerError("the page is cut short")
    source.now_ns += 4_000_000_000
    assert await one.sample() == []
    assert record(one) == {
        "sampler_ok": 0,
        "sampler_duration_s": 0.25,
        "sampler_age_s": 4.25,
        "sampler_errors_total": 1,
    }
    assert one.status().line == "the page is cut short"
    source.fails = None
    await one.sample()
    status = one.status()
    assert (status.ok, status.age_s, status.errors, status.line) == (True, 0, 1, None)


async def test_a_defect_is_told_without_what_it_says() -> None:
    source = Source()
    source.fails = ValueError("http://user:secret@host/\nand more")
    one = watched(source)
    await one.sample()
    line = one.status().line
    assert line is not None
    assert line.startswith("a defect of servefit: ValueError at test_watched.py:")
    assert "secret" not in line


async def test_samples_never_overlap() -> None:
    source = Source()
    source.waits = asyncio.Event()
    one = watched(source)
    first = asyncio.create_task(one.sample())
    await asyncio.sleep(0)
    assert await one.sample() == []  # at once
    source.waits.set()
    assert GIVEN in await first
    assert source.at_once == 1
    assert one.status().errors == 0


async def test_what_hangs_is_given_up() -> None:
    source = Source()
    source.waits = asyncio.Event()
    one = watched(source, deadline_s=0.01)
    assert await one.sample() == []
    assert record(one)["sampler_ok"] == 0
    assert one.status().line == "nothing within 0.01 s"
    source.waits = None
    assert GIVEN in await one.sample()


async def test_it_can_be_cancelled() -> None:
    source = Source()
    source.waits = asyncio.Event()
    one = watched(source)
    task = asyncio.create_task(one.sample())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    source.waits = None
    assert GIVEN in await one.sample()


async def test_a_slow_source_is_asked_less_often() -> None:
    source = Source()
    one = watched(source)
    assert one.pause_s(1.0) == 1.0
    await one.sample()
    assert one.pause_s(1.0) == 0.75  # the interval is from start to start
    source.takes_s = 2.0
    await one.sample()
    assert one.pause_s(1.0) == 4.0


async def test_closing_cannot_fail() -> None:
    source = Source()
    source.fails = RuntimeError("no")
    await watched(source).close()
    assert source.closed == 1


async def test_two_of_a_kind_have_names_of_their_own() -> None:
    readings = Watched(Source(), name="server chat").record()
    assert readings[0].labels == (("sampler", "server chat"),)
