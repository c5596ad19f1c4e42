"""Several worker processes that share one level, seen as if they were one.

They stay from level to level: a process that starts costs half a second, and a warm one measures
what a cold one does not. All open their connections first and begin at one instant.
"""

from __future__ import annotations

import asyncio
import sys
from time import monotonic_ns
from typing import Any

from agent.model import ServefitError
from loadgen.level import Plan
from loadgen.recorder import Counts, Recording, added, merge
from loadgen.worker import Job, packed, read_message

LEAD_NS = 20_000_000  # between the word to begin and the beginning
QUIT_S = 2.0
NOTHING = (0, 0, Counts())  # in flight, tokens arrived, and what was recorded


class _Member:
    """One worker process and what it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.moved = NOTHING

    @classmethod
    async def started(cls) -> _Member:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadgen.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**30,
        )  # fmt: skip
        return cls(process)

    def say(self, kind: str, what: object = None) -> None:
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(packed((kind, what)))

    async def until(self, *kinds: str) -> Any:
        """What the next message of these kinds holds; progress is taken note of meanwhile."""
        assert self._process.stdout is not None
        while True:
            message = await read_message(self._process.stdout)
            if message is None:
                code = await self._process.wait()
                raise ServefitError(f"a worker process ended by itself (exit code {code})")
            kind, what = message
            if kind == "moved":
                self.moved = what
            elif kind == "crash":
                raise ServefitError(f"a worker process failed: {what}")
            elif kind in kinds:
                return what

    async def quit(self) -> None:
        """Ends the process; it ends by itself when its stdin does."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), QUIT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class CrewLevel:
    """A level that several workers run; it has the face of `ClosedLoop` and `OpenLoop`."""

    def __init__(self, job: Job, members: list[_Member]) -> None:
        self.plan: Plan = job.plan
        self.gave_up: str | None = None
        self._jobs = job.parts(len(members))
        self._members = members

    @property
    def recorder(self) -> Counts:
        return added([member.moved[2] for member in self._members])

    @property
    def in_flight(self) -> int:
        return sum(member.moved[0] for member in self._members)

    @property
    def arrived(self) -> int:
        """Tokens so far, those of replies still under way included."""
        return sum(member.moved[1] for member in self._members)

    def finish(self) -> None:
        """No further request is due: the level ends with the last reply."""
        for member in self._members:
            member.say("finish")

    def stop(self) -> None:
        """No further request; what is in flight is cancelled and kept as far as it came."""
        for member in self._members:
            member.say("stop")

    async def run(self) -> Recording:
        """The merged recording of all. Raises ServefitError where a worker died."""
        for member, job in zip(self._members, self._jobs, strict=True):
            member.moved = NOTHING
            member.say("job", job)
        await asyncio.gather(*(member.until("ready") for member in self._members))
        start_ns = monotonic_ns() + LEAD_NS
        for member in self._members:
            member.say("start", start_ns)
        return merge(await asyncio.gather(*(self._result(member) for member in self._members)))

    async def _result(self, member: _Member) -> Recording:
        recording, gave_up = await member.until("done")
        assert isinstance(recording, Recording)
        if gave_up is not None and self.gave_up is None:
            self.gave_up = gave_up
            self.stop()
        return recording


class Crew:
    """The worker processes of a run, started when first asked for. `close` it."""

    def __init__(self) -> None:
        self._members: list[_Member] = []

    async def level(self, job: Job, processes: int) -> CrewLevel:
        """A level for so many workers of this machine."""
        while len(self._members) < processes:
            self._members.append(await _Member.started())
        return CrewLevel(job, self._members[:processes])

    async def close(self) -> None:
        members, self._members = self._members, []
        await asyncio.gather(*(member.quit() for member in members))
