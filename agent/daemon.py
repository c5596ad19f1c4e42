"""`agent run`: sources → store → exporters, the scheduled verdict, and the life of the process.

What runs is a table of parts, each made from one section of the configuration. A reload makes the
table anew: parts whose section is the same go on undisturbed, the others end and begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal
import ssl as tls
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from agent import __version__
from agent.config import Config, Server, read_headers, read_token
from agent.exporters import Batch, Known, known_batch
from agent.exporters.own import own_readings
from agent.facts import hardware
from agent.here import on_this_machine
from agent.history import History
from agent.live import GpuStatus, OutboxStatus, ServerStatus, Status, StoreStatus
from agent.minutes import Labels, Minute
from agent.model import Reading, Served, ServefitError, StoreError, TargetGpu, Verdict
from agent.notify import notify, watchdog_s
from agent.owners import Owned, owned
from agent.recall import Recall
from agent.receiver import EnergyShare, Receiver
from agent.samplers import Sampler
from agent.samplers.host import HostSampler
from agent.samplers.server import ServerSampler
from agent.sources import AGENT, GPU, HOST, Group, Own, Source, joules
from agent.tiers import Settings

if TYPE_CHECKING:
    from agent.assess import Assessment
    from agent.exporters.delivery import Delivery

log = logging.getLogger("servefit")

HOST_EVERY_S = 15.0
OWN_EVERY_S = 15.0
KNOWN_EVERY_S = 15.0  # verdicts and curves, which may also come by `agent import`
OWNERS_EVERY_S = 10.0  # as often as the driver is asked for its processes
DETAILS_EVERY_S = 10.0
DCGM_EVERY_S_MIN = 5.0  # a page of a hundred kB, which changes every 30 s unless told otherwise
AGAIN_EVERY_S = 30.0  # for a part that could not begin
FIRST_VERDICT_S = 15.0  # after the start, where none is kept that is young enough
READY_WITHIN_S = 1.5  # for the first samples; a source that is slow holds up no start
STOP_WITHIN_S = 10.0

Part = Coroutine[Any, Any, None]


class _Key(NamedTuple):
    """Which part; `name` is a server's."""

    kind: str
    name: str = ""


class Daemon:
    """The running agent: one `agent.live.Live`.

    `load` reads the configuration again, for SIGHUP. Raises StoreError where another agent writes
    to the store, UsageError where the address to listen on is taken.
    """

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        self._config = config
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
        self._sources = Group()
        self._parts: dict[_Key, Any] = {}  # what runs, and the section it was made from
        self._notes: dict[_Key, str] = {}  # why a part does not run
        self._owned: dict[str, Owned] = {}
        self._gpus: Sequence[TargetGpu] = ()  # as the store knows them
        self._here: dict[str, bool] = {}  # server URL → on this machine
        self._energy: dict[str, EnergyShare] = {}
        self._known: list[Known] = []
        self._delivery: Delivery | None = None
        self._receiver: Receiver | None = None
        self._reconciling = asyncio.Lock()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # --------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        from agent.web.app import Site, application

        self._handle_signals()
        site = Site()
        try:
            app = application(self, token=self._token())
            url = await site.start(app, self._config.agent.listen)
            log.info("servefit %s: %s, store %s", __version__, url, self._history.path)
            await self._reconcile()
            await self._until_ready()
            notify(f"READY=1\nSTATUS={len(self._config.server)} servers, {url}")
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

    def _jobs(self) -> list[tuple[Callable[[], Part], Callable[[], float], float]]:
        """What is done again and again: the job, its interval, and when it is first done."""
        from agent.exporters.delivery import every_s

        alive_s = watchdog_s()
        jobs: list[tuple[Callable[[], Part], Callable[[], float], float]] = [
            (self._look_at_owners, self._owners_every_s, 0.0),
            (self._export, every_s, 0.0),
            (self._reconcile, lambda: AGAIN_EVERY_S, AGAIN_EVERY_S),
            (self._assess, lambda: self._config.assess.every_s, self._next_verdict_s()),
            (self._look_at_known, lambda: KNOWN_EVERY_S, 0.0),
        ]
        if alive_s is not None:
            jobs.append((self._tell_alive, lambda: alive_s / 3, 0.0))
        return jobs

    async def _for_ever(
        self, job: Callable[[], Part], every_s: Callable[[], float], first_s: float
    ) -> None:
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
            if config.agent != self._config.agent or config.store != self._config.store:
                log.warning("[agent] and [store] take effect after a restart")
            self._config = config
            self._tasks.append(asyncio.create_task(self._reconcile()))
            log.info("reloaded")
        notify("READY=1")

    async def _until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline_s:
            asked = all(one.watched.status().duration_s is not None for one in self._sources)
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
                if self._receiver is not None:
                    await self._receiver.close()
                await self._sources.halt()
                await self._export()  # the newest of all, which nothing follows
                await self._sources.stop()
                if self._delivery is not None:
                    await self._delivery.close()
        except (TimeoutError, ServefitError) as error:
            log.warning("stopped in a hurry: %s", error or f"{STOP_WITHIN_S:g} s were over")
        await asyncio.to_thread(self._history.close)
        log.info("stopped")

    # -------------------------------------------------------------------------------------- parts

    def _wanted(self) -> dict[_Key, Any]:
        """Every part that should run, with all that it is made from."""
        config = self._config
        wanted: dict[_Key, Any] = {_Key("server", one.name): one for one in config.server}
        wanted[_Key("host")] = tuple(one.url for one in config.server)
        wanted[_Key("own")] = ()
        if config.gpu.source != "none":
            wanted[_Key("gpu")] = config.gpu
        if config.export.otlp:
            wanted[_Key("export")] = config.export.otlp
        if config.receive.otlp:
            wanted[_Key("receive")] = (config.receive.otlp, config.export.otlp)
        return wanted

    async def _reconcile(self) -> None:
        """Ends what is no longer wanted as it is, and begins what is not there."""
        async with self._reconciling:
            await self._make_as_wanted()

    async def _make_as_wanted(self) -> None:
        wanted = self._wanted()
        for key in [key for key, made in self._parts.items() if wanted.get(key) != made]:
            del self._parts[key]
            await self._finish(key)
        self._notes = {key: why for key, why in self._notes.items() if key in wanted}
        for key, made in wanted.items():
            if key not in self._parts:
                await self._begin(key, made)

    async def _begin(self, key: _Key, made: Any) -> None:
        start: dict[str, Callable[[Any], Part]] = {
            "server": self._begin_server,
            "host": self._begin_host,
            "own": self._begin_own,
            "gpu": self._begin_gpu,
            "export": self._begin_export,
            "receive": self._begin_receive,
        }
        try:
            await start[key.kind](made)
        except ServefitError as error:  # an address that is taken, say: it is tried again
            if self._notes.get(key) != str(error):
                log.warning("%s", error)
            self._notes[key] = str(error)
            return
        self._parts[key] = made
        self._notes.pop(key, None)

    async def _finish(self, key: _Key) -> None:
        if key.kind == "export" and self._delivery is not None:
            delivery, self._delivery = self._delivery, None
            await delivery.close()
        elif key.kind == "receive" and self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            await receiver.close()
        else:
            name = {"gpu": GPU, "host": HOST, "own": AGENT}.get(key.kind, key.name)
            await self._sources.stop([name] if self._sources.get(name) else [])
            self._owned.pop(key.name, None)

    async def _begin_server(self, server: Server) -> None:
        headers = read_headers(server.headers_file) if server.headers_file else {}
        trusted = tls.create_default_context(cafile=server.ca_file) if server.ca_file else True
        sampler = ServerSampler(
            server.metrics_url, headers=headers, ssl=trusted, full=True, name=server.name
        )
        self._history.add_source(server.name, service=server.service)
        self._sources.start(
            Source(
                server.name,
                sampler,
                server.interval_s,
                self._history,
                labels=lambda: self._labels(server, sampler),
                fingerprint=lambda: sampler.fingerprint,
            )
        )

    async def _begin_host(self, urls: Sequence[str]) -> None:
        for url in urls:
            if url not in self._here:
                self._here[url] = await asyncio.to_thread(_is_here, url)
        ports = sorted({_port(url) for url in urls if self._here[url]})
        sampler = HostSampler(ports=ports)
        self._sources.start(Source(HOST, sampler, HOST_EVERY_S, self._history))

    async def _begin_own(self, _: Any) -> None:
        sampler = Own(self._own_readings)
        self._sources.start(Source(AGENT, sampler, OWN_EVERY_S, self._history, keeps_raw=False))

    async def _begin_gpu(self, gpu: Any) -> None:
        found = await asyncio.to_thread(_gpu_sampler, self._config)
        if found is None:
            return  # a machine without GPUs is well
        interval_s = gpu.interval_s
        if found.name == "dcgm":
            interval_s = max(interval_s, DCGM_EVERY_S_MIN)
        self._sources.start(Source(GPU, found, interval_s, self._history, heard=self._share_energy))

    async def _begin_export(self, export: Any) -> None:
        from agent.exporters.delivery import Delivery

        db = self._history.path
        offset = self._history.timeline
        self._delivery = Delivery(
            export, db.with_name(f"{db.name}-outbox"), lambda at_ns: at_ns + offset.offset_ns
        )

    async def _begin_receive(self, made: Any) -> None:
        receive, _ = made
        keep = self._keep_spans if self._config.export.otlp else None
        receiver = Receiver(self._learn, energy=self._energy_of, keep=keep)
        log.info("spans are taken at %s/v1/traces", await receiver.start(receive.listen))
        self._receiver = receiver

    # --------------------------------------------------------------------------------------- jobs

    async def _export(self) -> None:
        if self._delivery is not None:
            await self._delivery.metrics(self.batches())

    async def _assess(self) -> None:
        """A verdict on each server, and on each service of several."""
        began_ns, minutes = time.time_ns(), self.open_minutes()
        for one in await asyncio.to_thread(self._assessments, minutes):
            self._history.add_assessment(one.scope, one.verdict)
            log.info("%s: %s", one.scope, one.verdict.summary)
            if self._delivery is not None:
                await self._delivery.verdict(one.verdict, one.scope, began_ns)
        await asyncio.to_thread(self._history.flush)
        await self._look_at_known()

    def _assessments(self, minutes: Sequence[Minute]) -> list[Assessment]:
        from agent.assess import assess_each

        with Recall(self._history.path) as recall:
            return assess_each(recall, self._config, open_minutes=minutes, now_s=time.time())

    def _next_verdict_s(self) -> float:
        """How long until a verdict is due: a restart is no reason for another one."""
        newest_s = 0.0
        with contextlib.suppress(StoreError), Recall(self._history.path) as recall:
            newest_s = max((one["at_unix_s"] for one in recall.assessments(limit=1)), default=0.0)
        return max(FIRST_VERDICT_S, newest_s + self._config.assess.every_s - time.time())

    def _owners_every_s(self) -> float:
        """Often at first: who asks early asks whose GPUs these are."""
        is_young = time.monotonic() - self._began_s < 2 * OWNERS_EVERY_S
        return 1.0 if is_young else OWNERS_EVERY_S

    async def _look_at_owners(self) -> None:
        """Which GPUs each server is on; processes come and go."""
        gpu, host = self._sources.get(GPU), self._sources.get(HOST)
        if (gpus := self._devices()) != self._gpus:
            self._gpus = gpus
            self._history.add_gpus(gpus)
        devices = [one.uuid for one in gpus]
        ask = getattr(gpu.sampler, "processes", None) if gpu else None
        processes = ask() if ask else {}
        pids = host.sampler.pids() if host and isinstance(host.sampler, HostSampler) else {}
        for server in self._config.server:
            is_here = self._here.get(server.url, False)
            found = owned(
                server,
                devices=devices,
                processes=processes,
                pids=pids.get(_port(server.url), frozenset()) if is_here else frozenset(),
                is_alone_here=is_here and len(self._config.server) == 1,
            )
            if found != self._owned.get(server.name):
                self._owned[server.name] = found
                self._history.add_source(server.name, service=server.service, gpus=found.gpus)

    async def _look_at_known(self) -> None:
        """Verdicts, curves, targets and GPUs of the configured servers, for the exporters."""
        servers = [self._server_status(one) for one in self._config.server]
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

    # --------------------------------------------------------------------------- the server's spans

    async def _keep_spans(self, body: bytes, spans: int) -> bool:
        return self._delivery is not None and await self._delivery.spans(body, spans)

    def _learn(self, resource: Mapping[str, str], requests: Sequence[Served]) -> None:
        server = self._spans_of(resource)
        if server is not None:
            self._history.add_served(server, requests)

    def _energy_of(self, resource: Mapping[str, str], start_ns: int, end_ns: int) -> float | None:
        server = self._spans_of(resource)
        share = self._energy.get(server) if server else None
        return share.of(start_ns, end_ns) if share else None

    def _spans_of(self, resource: Mapping[str, str]) -> str | None:
        """Whose spans: by service.name, else the only server's."""
        named = resource.get("service.name")
        servers = self._config.server
        for one in servers:
            if named in (one.name, one.service) and named:
                return one.name
        return servers[0].name if len(servers) == 1 else None

    def _share_energy(self, readings: Sequence[Reading]) -> None:
        if self._receiver is None:
            return
        energy_j = joules(readings)
        at_unix_ns = readings[0].at_ns + self._history.timeline.offset_ns
        for name, (gpus, _) in self._owned.items():
            source = self._sources.get(name)
            running = source.value("requests_running") if source else None
            if gpus and running is not None and set(gpus) <= energy_j.keys():
                share = self._energy.setdefault(name, EnergyShare())
                share.add(at_unix_ns, sum(energy_j[gpu] for gpu in gpus), running)

    # --------------------------------------------------------------------------------------- Live

    @property
    def config(self) -> Config:
        return self._config

    @property
    def history(self) -> History:
        return self._history

    def batches(self) -> Sequence[Batch]:
        known = known_batch(time.monotonic_ns(), self._known)
        return [*(one.batch() for one in self._sources), known]

    def open_minutes(self) -> Sequence[Minute]:
        return [minute for one in self._sources if (minute := one.minutes.current()) is not None]

    def status(self) -> Status:
        store, now_s = self._history.state(), time.time()
        return Status(
            version=__version__,
            now_unix_s=now_s,
            started_unix_s=self._started_unix_s,
            uptime_s=time.monotonic() - self._began_s,
            samplers=tuple(one.watched.status() for one in self._sources),
            store=StoreStatus(
                bytes=store.bytes,
                writer_lag_s=store.writer_lag_s,
                ready=store.ready,
                shedding=store.shedding,
                readings_dropped=store.readings_dropped,
                error=store.error,
            ),
            outbox=self._outbox_status(),
            servers=tuple(self._server_status(one) for one in self._config.server),
            gpus=tuple(
                GpuStatus(one.uuid, one.name, one.memory_total_bytes) for one in self._devices()
            ),
            receiver=self._receiver.status() if self._receiver else None,
            notes=tuple(self._all_notes()),
        )

    def _outbox_status(self) -> OutboxStatus:
        if self._delivery is None:
            return OutboxStatus(pending=0, dropped=0)
        try:
            said = self._delivery.status()
        except StoreError as error:
            return OutboxStatus(pending=0, dropped=0, last_error=str(error))
        return OutboxStatus(
            said.pending, said.dropped, said.sent, said.oldest_unix_s, said.last_error
        )

    def _server_status(self, server: Server) -> ServerStatus:
        source = self._sources.get(server.name)
        page = source.sampler if source and isinstance(source.sampler, ServerSampler) else None
        gpus, by = self._owned.get(server.name, Owned((), "unknown"))
        return ServerStatus(
            name=server.name,
            url=server.url,
            service=server.service,
            engine=page.engine if page else None,
            model=dict(page.fingerprint).get("model") if page else None,
            simulated=bool(page and page.simulated),
            gpus=gpus,
            gpus_by=by,
            slo=server.slo or self._config.slo.targets,
            missing=tuple(one.canonical for one in page.missing()) if page else (),
        )

    def _all_notes(self) -> list[str]:
        host = self._sources.get(HOST)
        unseen = host.sampler.unseen if host and isinstance(host.sampler, HostSampler) else ()
        return [*self._notes.values(), *unseen]

    # ------------------------------------------------------------------------------------ figures

    def _devices(self) -> Sequence[TargetGpu]:
        gpu = self._sources.get(GPU)
        ask = getattr(gpu.sampler, "devices", None) if gpu else None
        found: Sequence[TargetGpu] = ask() if ask else ()
        return found

    def _own_readings(self) -> list[Reading]:
        at_ns, state = time.monotonic_ns(), self._history.state()
        readings = own_readings(
            at_ns,
            started_unix_s=self._started_unix_s,
            store_bytes=state.bytes,
            writer_lag_s=state.writer_lag_s,
        )
        for source in self._sources:
            readings += source.watched.record()
        if self._delivery is not None:
            with contextlib.suppress(StoreError):
                readings += self._delivery.readings(at_ns)
        return readings

    def _labels(self, server: Server, sampler: ServerSampler) -> Labels:
        """What a server's exported series say of it."""
        host = urlsplit(server.url)
        known = {
            "model": dict(sampler.fingerprint).get("model"),
            "engine": sampler.engine,
            "service": server.service,
            "address": host.hostname,
            "port": str(_port(server.url)),
            "simulated": "1" if sampler.simulated else None,
        }
        return tuple((name, value) for name, value in known.items() if value)

    def _token(self) -> str | None:
        path = self._config.agent.token_file
        return read_token(path) if path else None


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _is_here(url: str) -> bool:
    try:
        return on_this_machine(url)
    except (OSError, ValueError):
        return False


def _gpu_sampler(config: Config) -> Sampler | None:
    """The sampler that `[gpu] source` means; None where `auto` finds no GPU on this machine."""
    source = config.gpu.source
    if source == "auto":
        makers = hardware()
        if "NVIDIA" in makers or _nvml_is_there():
            source = "nvml"
        elif "AMD" in makers:
            source = "amdsmi"
        else:
            return None
    if source == "dcgm":
        from agent.samplers.dcgm import DcgmSampler

        assert config.gpu.url is not None  # the configuration was checked
        return DcgmSampler(config.gpu.url)
    if source == "amdsmi":
        from agent.samplers.amd import AmdSampler

        return AmdSampler(details_interval_s=DETAILS_EVERY_S)
    from agent.samplers.nvml import NvmlSampler

    return NvmlSampler(
        min_interval_s=config.gpu.interval_s,
        details_interval_s=DETAILS_EVERY_S,
        gpm=config.gpu.gpm,
        start_deadline_s=None,
    )


def _nvml_is_there() -> bool:
    """Whether the driver's library can be loaded: under WSL there is no GPU on the bus."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True
