"""`agent run`: the life of the process, what it does again and again, and what it shows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from agent import __version__
from agent.config import Config, read_token
from agent.exporters import Batch, Known, known_batch
from agent.history import History
from agent.live import GpuStatus, OutboxStatus, ServerStatus, Status, StoreStatus
from agent.minutes import Minute
from agent.model import ServefitError, StoreError, Verdict
from agent.notify import notify, watchdog_s
from agent.parts import Parts
from agent.recall import Recall
from agent.tiers import Settings

if TYPE_CHECKING:
    from agent.assess import Assessment

log = logging.getLogger("servefit")

KNOWN_EVERY_S = 15.0  # verdicts and curves, which may also come by `agent import`
OWNERS_EVERY_S = 10.0  # as often as the driver is asked for its processes
AGAIN_EVERY_S = 30.0  # for a part that could not begin
FIRST_VERDICT_S = 15.0  # after the start, where none is kept that is young enough
READY_WITHIN_S = 1.5  # for the first samples; a source that is slow holds up no start
STOP_WITHIN_S = 10.0

Job = Callable[[], Coroutine[Any, Any, None]]


class Daemon:
    """The running agent: one `agent.live.Live`.

    `load` reads the configuration again, for SIGHUP. Raises StoreError where another agent writes
    to the store, UsageError where the address to listen on is taken.
    """

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        self._load = load
        self._started_unix_s = time.time()
        self._began_s = time.monotonic()
        self._history = History(
            config.agent.db,
            Settings(
                raw_s=config.store.raw_s,
                minutes_s=config.store.minutes_s,
                free_bytes_min=config.store.free_bytes_min,
            ),
        )
        self._parts = Parts(config, self._history, self._started_unix_s)
        self._known: list[Known] = []
        self._stop = asyncio.Event()
        self._is_ready = False
        self._tasks: list[asyncio.Task[None]] = []

    # --------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        from agent.web.app import Site, application

        self._handle_signals()
        site = Site()
        try:
            app = application(self, token=self._token())
            url = await site.start(app, self.config.agent.listen)
            log.info("servefit %s: %s, store %s", __version__, url, self._history.path)
            await self._parts.reconcile()
            await self._until_ready()
            self._is_ready = True
            notify(f"READY=1\nSTATUS={len(self.config.server)} servers, {url}")
            log.info("ready in %.1f s", time.monotonic() - self._began_s)
            self._tasks = [
                asyncio.create_task(self._for_ever(job, every_s, first_s), name=job.__name__)
                for job, every_s, first_s in self._jobs()
            ]
            await self._stop.wait()
        finally:
            notify("STOPPING=1")
            await self._end()
            await site.close()

    def _jobs(self) -> list[tuple[Job, Callable[[], float], float]]:
        """What is done again and again: the job, its interval, and when it is first done."""
        from agent.exporters.delivery import every_s

        alive_s = watchdog_s()
        jobs: list[tuple[Job, Callable[[], float], float]] = [
            (self._parts.look_at_owners, self._owners_every_s, 0.0),
            (self._export, every_s, 0.0),
            (self._parts.reconcile, lambda: AGAIN_EVERY_S, AGAIN_EVERY_S),
            (self._assess, lambda: self.config.assess.every_s, self._next_verdict_s()),
            (self._look_at_known, lambda: KNOWN_EVERY_S, 0.0),
        ]
        if alive_s is not None:
            jobs.append((self._tell_alive, lambda: alive_s / 3, 0.0))
        return jobs

    async def _for_ever(self, job: Job, every_s: Callable[[], float], first_s: float) -> None:
        """Whatever one turn of a job meets, the next one comes."""
        await asyncio.sleep(first_s)
        while True:
            began_s = time.monotonic()
            try:
                await job()
            except ServefitError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("a defect of servefit in %s", job.__name__)
            await asyncio.sleep(max(0.0, every_s() - (time.monotonic() - began_s)))

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def reload(self) -> None:
        """Takes the configuration as it is now; one with an error in it changes nothing."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._load()
        except ServefitError as error:
            log.error("not reloaded: %s", error)
        else:
            if config.agent != self.config.agent or config.store != self.config.store:
                log.warning("[agent] and [store] take effect after a restart")
            self._parts.config = config
            self._tasks.append(asyncio.create_task(self._parts.reconcile()))
            log.info("reloaded")
        notify("READY=1")

    async def _until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline_s:
            asked = all(one.watched.status().duration_s is not None for one in self._parts.sources)
            if asked and self._history.state().ready:
                return
            await asyncio.sleep(0.02)

    async def _tell_alive(self) -> None:
        """Only while the writer lives: a loop that turns and keeps nothing is not alive."""
        if self._history.is_alive():
            notify("WATCHDOG=1")

    async def _end(self) -> None:
        """Hands over and writes what there is; the back end gets two seconds, the rest waits."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await self._parts.halt()
                await self._export()  # the newest of all, which nothing follows
                await self._parts.close()
        except (TimeoutError, ServefitError) as error:
            log.warning("stopped in a hurry: %s", error or f"{STOP_WITHIN_S:g} s were over")
        await asyncio.to_thread(self._history.close)
        log.info("stopped")

    # --------------------------------------------------------------------------------------- jobs

    async def _export(self) -> None:
        if (delivery := self._parts.delivery) is not None:
            await delivery.metrics(self.batches())

    async def _assess(self) -> None:
        """A verdict on each server, and on each service of several."""
        began_ns, minutes = time.time_ns(), self.open_minutes()
        for one in await asyncio.to_thread(self._assessments, minutes):
            self._history.add_assessment(one.scope, one.verdict)
            log.info("%s: %s", one.scope, one.verdict.summary)
            if (delivery := self._parts.delivery) is not None:
                await delivery.verdict(one.verdict, one.scope, began_ns)
        await asyncio.to_thread(self._history.flush)
        await self._look_at_known()

    def _assessments(self, minutes: Sequence[Minute]) -> list[Assessment]:
        from agent.assess import assess_each

        with Recall(self._history.path) as recall:
            return assess_each(recall, self.config, open_minutes=minutes, now_s=time.time())

    def _next_verdict_s(self) -> float:
        """How long until a verdict is due: a restart is no reason for another one."""
        newest_s = 0.0
        with contextlib.suppress(StoreError), Recall(self._history.path) as recall:
            newest_s = max((one["at_unix_s"] for one in recall.assessments(limit=1)), default=0.0)
        return max(FIRST_VERDICT_S, newest_s + self.config.assess.every_s - time.time())

    def _owners_every_s(self) -> float:
        """Often at first: who asks early asks whose GPUs these are."""
        is_young = time.monotonic() - self._began_s < 2 * OWNERS_EVERY_S
        return 1.0 if is_young else OWNERS_EVERY_S

    async def _look_at_known(self) -> None:
        """Verdicts, curves, targets and GPUs of the configured servers, for the exporters."""
        servers = [self._parts.server_status(one) for one in self.config.server]
        with contextlib.suppress(StoreError):  # /readyz tells it; what was known still holds
            self._known = await asyncio.to_thread(self._known_of, servers)

    def _known_of(self, servers: Sequence[ServerStatus]) -> list[Known]:
        from agent.assess import scope_of
        from agent.exporters.concluded import of_curve, of_server, of_verdict
        from agent.web.answers import measured

        services = dict.fromkeys(one.service for one in servers if one.service is not None)
        scopes = [*(one.name for one in servers), *(scope_of(None, one) for one in services)]
        known: list[Known] = []
        with Recall(self._history.path) as recall:
            for one in servers:
                known += of_server(one.name, one.gpus, one.slo)
                if (found := measured(recall, [one])) is not None:
                    known += of_curve(one.name, found.sweep, found.received_unix_s)
            for scope in scopes:
                for kept in recall.assessments(scope, limit=1):
                    verdict = msgspec.convert(kept["verdict"], Verdict)
                    known += of_verdict(scope, verdict, kept["at_unix_s"])
        return known

    # --------------------------------------------------------------------------------------- Live

    @property
    def config(self) -> Config:
        return self._parts.config

    @property
    def history(self) -> History:
        return self._history

    def batches(self) -> Sequence[Batch]:
        known = known_batch(time.monotonic_ns(), self._known)
        return [*(one.batch() for one in self._parts.sources), known]

    def is_ready(self) -> bool:
        return self._is_ready

    def newest_unix_s(self) -> Mapping[str, float]:
        return {
            one.name: at_s
            for one in self._parts.sources
            if (at_s := one.minutes.newest_unix_s) is not None
        }

    def open_minutes(self) -> Sequence[Minute]:
        return [
            minute for one in self._parts.sources if (minute := one.minutes.current()) is not None
        ]

    def status(self) -> Status:
        parts = self._parts
        return Status(
            version=__version__,
            now_unix_s=time.time(),
            started_unix_s=self._started_unix_s,
            uptime_s=time.monotonic() - self._began_s,
            samplers=tuple(one.watched.status() for one in parts.sources),
            store=msgspec.convert(self._history.state(), StoreStatus, from_attributes=True),
            outbox=self._outbox_status(),
            servers=tuple(parts.server_status(one) for one in self.config.server),
            gpus=tuple(
                GpuStatus(one.uuid, one.name, one.memory_total_bytes) for one in parts.devices()
            ),
            receiver=parts.receiver.status() if parts.receiver else None,
            notes=tuple(parts.notes()),
        )

    def _outbox_status(self) -> OutboxStatus:
        if (delivery := self._parts.delivery) is None:
            return OutboxStatus(pending=0, dropped=0)
        try:
            return msgspec.convert(delivery.status(), OutboxStatus, from_attributes=True)
        except StoreError as error:
            return OutboxStatus(pending=0, dropped=0, last_error=str(error))

    def _token(self) -> str | None:
        path = self.config.agent.token_file
        return read_token(path) if path else None
