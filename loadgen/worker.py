"""A worker: the level of a job, whole or a part of it, to a recording that can be merged.

What a worker does is a function of its job and of the instant to begin at. One runs in the
measuring process itself; more run as processes of their own (`loadgen.crew`), for which this module
is the program: jobs come in by stdin, counts and recordings go out by stdout.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from random import Random
from typing import Any

import msgspec

from loadgen import arrival, tokenizer
from loadgen.client import Address, Dialer, tls_context, wire
from loadgen.level import Plan
from loadgen.loops import ClosedLoop, OpenLoop, Request, Wires
from loadgen.workload import Ask, Source, Spec, Talk

CONNECT_TIMEOUT_S = 10.0
READY_AHEAD_MAX = 4096
REPORT_INTERVAL_S = 0.5
REALTIME_PRIORITY = 1  # the lowest there is, and before everything that is none
NICE = -10  # where the other is refused; without the right to either all is left as it is


class TraceIds(msgspec.Struct, frozen=True):
    """The ids of one level's trace: they go out on the wire before any span exists."""

    trace_id: int
    root_span_id: int
    first: int

    @classmethod
    def draw(cls, rng: Random) -> TraceIds:
        return cls(rng.getrandbits(128) or 1, rng.getrandbits(64) or 1, rng.getrandbits(64))

    def span_id(self, index: int) -> int:
        return (self.first + index) % 2**64 or 1

    def traceparent(self, index: int) -> str:
        """W3C trace context of request `index`, sampled."""
        return f"00-{self.trace_id:032x}-{self.span_id(index):016x}-01"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One level, for one worker."""

    plan: Plan
    number: int  # of the level, from 1
    spec: Spec
    address: Address
    head: bytes
    ca_file: str | None = None
    insecure: bool = False
    keep_alive: bool = True  # see `Dialer`
    tokenizer: str | None = None
    trace: TraceIds | None = None  # None: no traceparent is sent

    def parts(self, processes: int) -> list[Job]:
        """The same level for so many workers."""
        plans = [
            msgspec.structs.replace(self.plan, processes=processes, part=part)
            for part in range(processes)
        ]
        return [msgspec.structs.replace(self, plan=plan) for plan in plans]


def runner(job: Job, dial: Dialer | None = None) -> ClosedLoop | OpenLoop:
    """What runs the job, on the event loop of this moment."""
    if dial is None:
        tls = None
        if job.address.tls:
            tls = tls_context(ca_file=job.ca_file, insecure=job.insecure)
        dial = Dialer(job.address, tls, CONNECT_TIMEOUT_S, keep_alive=job.keep_alive)
    plan = job.plan
    counts = tokenizer.counter(job.tokenizer) if job.tokenizer else None
    share = plan.load / plan.processes
    wires = Wires(requests(job), min(READY_AHEAD_MAX, max(8, int(2 * share))), counts)
    if plan.mode == "concurrency":
        return ClosedLoop(plan, dial, wires)
    return OpenLoop(plan, dial, wires, instants(job))


def instants(job: Job) -> Iterator[float]:
    """When the requests of the whole level are due, in s after its start."""
    plan, trace = job.plan, job.spec.trace
    if trace is not None:
        return (at_s / plan.speedup for at_s in trace.rows.at_s.tolist())
    rng = Random(f"{job.spec.seed}:{job.number}")
    if plan.stages is not None:
        return plan.stages.instants(plan.arrival, rng)
    return arrival.instants(plan.arrival, plan.load, rng)


def requests(job: Job) -> Iterator[Request]:
    """The worker's own requests of the level, in order and without end.

    A turn of a conversation takes an index too; what it says hangs on the conversation's number.
    """
    plan, spec = job.plan, job.spec
    source = Source(spec, job.number)
    indexes = count(plan.part, plan.processes)

    def request(ask: Ask, talk: Talk | None) -> Request:
        index = next(indexes)
        # Requests of the warm-up have no span, so nothing may hang under one.
        traced = job.trace is not None and index >= plan.warmup_requests
        traceparent = job.trace.traceparent(index) if job.trace and traced else None
        follow = partial(after, talk) if talk is not None else None
        data = wire(job.head, ask.body(spec), traceparent)
        return Request(index, data, ask.prompt_tokens if job.tokenizer else -1, follow)

    def after(talk: Talk, reply: str) -> Request | None:
        ask = talk.follow(reply)
        return None if ask is None else request(ask, talk)

    for n in count(plan.part, plan.processes):
        if spec.turns > 1:
            talk = source.talk(n)
            yield request(talk.first, talk)
        else:
            yield request(source.ask(n), None)


def ask_for_the_processor() -> None:
    """Has the calling thread served first, where that is allowed (root, CAP_SYS_NICE).

    A client that waits for its turn measures the scheduler: beside a vLLM on the same two cores its
    loop was 65 ms late at p99 with a nice value, and 0.8 ms as a real-time thread. What it starts
    does not inherit it: samplers and servers of ours wait their turn.
    """
    with suppress(OSError, AttributeError):  # macOS has no such policies
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(REALTIME_PRIORITY))
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


# -------------------------------------------------------------------- as a process of its own

Message = tuple[str, Any]  # what it is, and what belongs to it


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message of a pipe between worker and crew; None at its end."""
    try:
        size = int.from_bytes(await reader.readexactly(8))
        message: Message = pickle.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def packed(message: Message) -> bytes:
    """The bytes of a message, its length in front. Pickle: both ends are this very program."""
    data = pickle.dumps(message, protocol=5)
    return len(data).to_bytes(8) + data


class _Process:
    """Runs one job after the other until stdin ends."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._out = os.dup(1)
        os.dup2(2, 1)  # whatever prints must not get between the messages
        self._running: ClosedLoop | OpenLoop | None = None
        self._start: asyncio.Future[int] | None = None

    def _say(self, kind: str, what: Any = None) -> None:
        view = memoryview(packed((kind, what)))
        while view:
            view = view[os.write(self._out, view) :]

    async def serve(self) -> None:
        task: asyncio.Task[None] | None = None
        while (message := await read_message(self._reader)) is not None:
            kind, what = message
            if kind == "job":
                task = asyncio.create_task(self._level(what))
            elif kind == "start" and self._start is not None and not self._start.done():
                self._start.set_result(what)
            elif kind in ("stop", "finish") and self._running is not None:
                getattr(self._running, kind)()
        if task is not None:
            task.cancel()

    async def _level(self, job: Job) -> None:
        try:
            self._running = level = runner(job)
            self._start = asyncio.get_running_loop().create_future()
            reports = asyncio.create_task(self._reports(level))
            try:
                recording = await level.run(self._begin)
            finally:
                reports.cancel()
            self._say("done", (recording, level.gave_up))
        except Exception as error:  # a defect of ours: the crew says so and ends
            self._say("crash", f"{type(error).__name__}: {error}")
        finally:
            self._running = None

    async def _begin(self) -> int:
        assert self._start is not None
        self._say("ready")
        return await self._start

    async def _reports(self, level: ClosedLoop | OpenLoop) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._say("moved", (level.in_flight, level.arrived, level.recorder.counts))


async def _main() -> None:
    reader = asyncio.StreamReader(limit=2**30)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await _Process(reader).serve()


def main() -> None:
    """`python -m loadgen.worker`: only for `loadgen.crew`."""
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the crew, which then says stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ask_for_the_processor()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(_main())


if __name__ == "__main__":
    main()
