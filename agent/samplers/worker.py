"""One thread for what may hang: drivers and files that no deadline can interrupt."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from agent.samplers import SamplerError

T = TypeVar("T")


class Worker:
    """One daemon thread that runs one job at a time.

    Not an executor: those are joined at exit, and a hung driver would keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._since: float | None = None  # when the job under way was handed in
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def busy_s(self) -> float | None:
        """For how long a job has been under way; None when there is none."""
        since = self._since
        return None if since is None else time.monotonic() - since

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Hands a job in; whoever does so has seen that no other is under way."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                result = function()
            except BaseException as error:
                self._since = None
                _settle(future, error=error)
            else:
                self._since = None
                _settle(future, result=result)

        self._since = time.monotonic()
        self._jobs.put(job)
        return future

    def start(
        self, function: Callable[[], T], deadline_s: float, who: str, error: type[SamplerError]
    ) -> T:
        """A first job's result, waited for. Raises `error` where `who` needs longer.

        Where the job fails, and when it hangs, the thread ends with it.
        """
        try:
            return self.submit(function).result(deadline_s)
        except TimeoutError:
            self.end()
            raise error(f"{who} did not answer within {deadline_s:g} s") from None
        except BaseException:
            self.end()
            raise

    async def ask(self, function: Callable[[], T], deadline_s: float, who: str) -> T:
        """The job's result. SamplerError where `who` needs longer than `deadline_s`.

        A job that hangs is left to the thread; until it comes back the next ones fail at once.
        """
        stuck_s = self.busy_s()
        if stuck_s is not None:
            raise SamplerError(f"{who} has not answered for {stuck_s:.0f} s")
        future = asyncio.wrap_future(self.submit(function))
        try:
            return await asyncio.wait_for(future, deadline_s)
        except TimeoutError:
            raise SamplerError(f"{who} did not answer within {deadline_s:g} s") from None

    async def stop(self, last: Callable[[], None], deadline_s: float) -> None:
        """Runs `last` if the thread is free, and ends it; a hung one is left behind."""
        if self.busy_s() is None:
            future = asyncio.wrap_future(self.submit(last))
            await asyncio.wait({future}, timeout=deadline_s)
        self.end()

    def end(self) -> None:
        """Ends the thread after the job under way."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: Future[T], *, result: Any = None, error: BaseException | None = None) -> None:
    """Completes a future, unless whoever waited for it has gone."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
