"""Several processes share a level as if they were one: real processes, a real socket."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import ServefitError
from loadgen.client import parse_url, request_head
from loadgen.crew import Crew
from loadgen.lengths import Fixed
from loadgen.level import Plan, summarise
from loadgen.prompts import DEFAULT_COSTS
from loadgen.worker import Job, TraceIds, instants, requests
from loadgen.workload import Spec
from tests.loadgen.scripted import HANG, Server, head, serving, stream


def job(url: str = "http://127.0.0.1:1", **plan: Any) -> Job:
    spec = Spec(
        endpoint="chat", stream=True, models=(("m", 1.0),), input_tokens=Fixed(40),
        output_tokens=Fixed(4), costs=DEFAULT_COSTS,
    )  # fmt: skip
    address = parse_url(url)
    return Job(
        plan=Plan(**plan), number=1, spec=spec, address=address,
        head=request_head(address, "/v1/chat/completions", {}),
        trace=TraceIds(1, 2, 3),
    )  # fmt: skip


CLOSED = {"mode": "concurrency", "concurrency": 6, "requests": 40}


@pytest.mark.parametrize("processes", [2, 4, 7])
def test_the_parts_of_a_job_ask_together_what_one_asks(processes: int) -> None:
    whole = job(**CLOSED)
    expected = {request.index: request.data for request in islice(requests(whole), 70)}
    made = [
        request
        for part in whole.parts(processes)
        for request in islice(requests(part), 70 // processes)
    ]
    assert len({request.index for request in made}) == len(made) >= 63
    assert all(expected[request.index] == request.data for request in made)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(0, 200), st.sampled_from(
    ["poisson", "constant", "gamma:3"]))  # fmt: skip
def test_parts_are_exactly_the_whole(p: int, streams: int, n: int, arrival: str) -> None:
    plan = Plan("concurrency", concurrency=streams, requests=n)
    parts = [part.plan for part in msgspec.structs.replace(job(**CLOSED), plan=plan).parts(p)]
    assert sum(part.part_of(n) for part in parts) == n
    assert sorted(i for part in parts for i in part.slots()) == list(range(streams))
    opened = job(mode="rate", rate_rps=5.0, arrival=arrival)
    once, again = (list(islice(instants(opened), 60)) for _ in range(2))
    assert once == again
    assert sorted(at for k in range(p) for at in once[k::p]) == once


@pytest.fixture
async def crew() -> AsyncIterator[Crew]:
    made = Crew()
    try:
        yield made
    finally:
        await made.close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110 - the server of the tests has no event for it
            await asyncio.sleep(0.01)


def asked(server: Server) -> list[bytes]:
    return sorted(request.body for request in server.requests)


async def test_a_closed_loop_of_four_processes_is_that_of_one(crew: Crew) -> None:
    async with serving(stream(4, gap_s=0.01, first_s=0.02)) as server:
        level = await crew.level(job(server.url, **CLOSED), 4)
        rec = await level.run()
        assert sorted(rec.index) == list(range(40))
        assert server.busy_max == 6
        assert server.connections == 6
        sent = asked(server)
        figures = summarise(rec, level.plan, started_at="")
        assert figures.requests is not None
        assert (figures.requests.ok, figures.requests.failed) == (40, 0)
        assert rec.ramp_end_ns == np.sort(rec.sent_ns)[5]
        assert rec.refill_end_ns
        server.requests.clear()
        alone = await crew.level(job(server.url, **CLOSED), 1)
        await alone.run()
        assert asked(server) == sent


async def test_an_open_loop_of_three_processes_keeps_the_one_schedule(crew: Crew) -> None:
    async with serving(stream(2)) as server:
        made = job(server.url, mode="rate", rate_rps=100.0, arrival="gamma:2", requests=60)
        rec = await (await crew.level(made, 3)).run()
        assert sorted(rec.index) == list(range(60))
        due_s = np.sort(rec.due_ns - rec.due_ns.min()) / 1e9
        expected = np.array(list(islice(instants(made), 60)))
        assert np.allclose(due_s, expected - expected[0], atol=1e-6)


async def test_stop_keeps_what_was_in_flight(crew: Crew) -> None:
    async with serving([head(), HANG]) as server:
        level = await crew.level(job(server.url, **CLOSED), 2)
        running = asyncio.create_task(level.run())
        await until(lambda: server.busy == 6)
        level.stop()
        rec = await asyncio.wait_for(running, 10)
        assert Counter(rec.error_kinds[i] for i in rec.error) == {"cancelled": 6}


async def test_a_level_that_one_gives_up_all_give_up(crew: Crew) -> None:
    """Nobody listens at port 1."""
    level = await crew.level(job(**CLOSED), 2)
    rec = await asyncio.wait_for(level.run(), 60)
    assert level.gave_up is not None
    assert "connect" in level.gave_up
    assert (rec.sent_ns == 0).all()


async def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(crew: Crew) -> None:
    async with serving([head(), HANG]) as server:
        level = await crew.level(job(server.url, **CLOSED), 2)
        running = asyncio.create_task(level.run())
        await until(lambda: server.busy == 6)
        os.kill(crew._members[0]._process.pid, signal.SIGKILL)
        with pytest.raises(ServefitError, match="worker process ended by itself"):
            await asyncio.wait_for(running, 10)


async def test_a_crew_outlives_its_levels_and_ends_when_closed() -> None:
    crew = Crew()
    async with serving(stream(2)) as server:
        for _ in range(2):
            rec = await (await crew.level(job(server.url, **CLOSED), 2)).run()
            assert rec.n == 40
    processes = [member._process for member in crew._members]
    assert len(processes) == 2
    await crew.close()
    assert [process.returncode for process in processes] == [0, 0]
