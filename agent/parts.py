"""The parts of a running agent: its sources, the delivery to a back end, the spans' receiver.

What runs is a table, each part made from one section of the configuration. Where that changes,
parts whose section is the same go on undisturbed; the others end and begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import ssl as tls
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from agent.config import Config, Server, read_headers
from agent.exporters.own import own_readings
from agent.facts import hardware
from agent.here import on_this_machine
from agent.history import History
from agent.live import ServerStatus
from agent.minutes import Labels
from agent.model import Reading, Served, ServefitError, StoreError, TargetGpu
from agent.owners import Owned, owned
from agent.receiver import EnergyShare, Receiver
from agent.samplers import Sampler
from agent.samplers.host import HostSampler
from agent.samplers.server import ServerSampler
from agent.sources import AGENT, GPU, HOST, Group, Own, Source, joules

if TYPE_CHECKING:
    from agent.exporters.delivery import Delivery

log = logging.getLogger("servefit")

HOST_EVERY_S = 15.0
OWN_EVERY_S = 15.0
DETAILS_EVERY_S = 10.0
DCGM_EVERY_S_MIN = 5.0  # a page of a hundred kB, which changes every 30 s unless told otherwise


class _Key(NamedTuple):
    """Which part; `name` is a server's."""

    kind: str
    name: str = ""


class Parts:
    """All that samples, receives and sends. `config` may be set anew; `reconcile` then follows."""

    def __init__(self, config: Config, history: History, started_unix_s: float) -> None:
        self.config = config
        self.sources = Group()
        self.delivery: Delivery | None = None
        self.receiver: Receiver | None = None
        self._history = history
        self._started_unix_s = started_unix_s
        self._running: dict[_Key, Any] = {}  # and the section each was made from
        self._failed: dict[_Key, str] = {}  # why a part does not run
        self._owned: dict[str, Owned] = {}
        self._gpus: Sequence[TargetGpu] = ()  # as the store knows them
        self._here: dict[str, bool] = {}  # server URL → on this machine
        self._energy: dict[str, EnergyShare] = {}
        self._reconciling = asyncio.Lock()

    async def reconcile(self) -> None:
        """Ends what is no longer wanted as it is, and begins what is not there."""
        async with self._reconciling:
            await self._make_as_wanted()

    async def halt(self) -> None:
        """Takes nothing more; the newest readings still stand to be exported."""
        if self.receiver is not None:
            await self.receiver.close()
        await self.sources.halt()

    async def close(self) -> None:
        """Keeps what was sampled; the back end gets what it takes, the rest waits in the outbox."""
        await self.sources.stop()
        if self.delivery is not None:
            await self.delivery.close()

    def _wanted(self) -> dict[_Key, Any]:
        """Every part that should run, with all that it is made from."""
        config = self.config
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

    async def _make_as_wanted(self) -> None:
        wanted = self._wanted()
        for key in [key for key, made in self._running.items() if wanted.get(key) != made]:
            del self._running[key]
            await self._finish(key)
        self._failed = {key: why for key, why in self._failed.items() if key in wanted}
        for key, made in wanted.items():
            if key not in self._running:
                await self._begin(key, made)

    async def _begin(self, key: _Key, made: Any) -> None:
        start: dict[str, Callable[[Any], Coroutine[Any, Any, None]]] = {
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
            if self._failed.get(key) != str(error):
                log.warning("%s", error)
            self._failed[key] = str(error)
            return
        self._running[key] = made
        self._failed.pop(key, None)

    async def _finish(self, key: _Key) -> None:
        if key.kind == "export" and self.delivery is not None:
            delivery, self.delivery = self.delivery, None
            await delivery.close()
        elif key.kind == "receive" and self.receiver is not None:
            receiver, self.receiver = self.receiver, None
            await receiver.close()
        else:
            name = {"gpu": GPU, "host": HOST, "own": AGENT}.get(key.kind, key.name)
            await self.sources.stop([name] if self.sources.get(name) else [])
            self._owned.pop(key.name, None)

    async def _begin_server(self, server: Server) -> None:
        headers = read_headers(server.headers_file) if server.headers_file else {}
        trusted = tls.create_default_context(cafile=server.ca_file) if server.ca_file else True
        sampler = ServerSampler(
            server.metrics_url, headers=headers, ssl=trusted, full=True, name=server.name
        )
        self._history.add_source(server.name, service=server.service)
        self.sources.start(
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
        self.sources.start(Source(HOST, sampler, HOST_EVERY_S, self._history))

    async def _begin_own(self, _: Any) -> None:
        sampler = Own(self._own_readings)
        self.sources.start(Source(AGENT, sampler, OWN_EVERY_S, self._history, keeps_raw=False))

    async def _begin_gpu(self, gpu: Any) -> None:
        found = await asyncio.to_thread(_gpu_sampler, self.config)
        if found is None:
            return  # a machine without GPUs is well
        interval_s = gpu.interval_s
        if found.name == "dcgm":
            interval_s = max(interval_s, DCGM_EVERY_S_MIN)
        self.sources.start(Source(GPU, found, interval_s, self._history, heard=self._share_energy))

    async def _begin_export(self, export: Any) -> None:
        from agent.exporters.delivery import Delivery

        db = self._history.path
        offset = self._history.timeline
        self.delivery = Delivery(
            export, db.with_name(f"{db.name}-outbox"), lambda at_ns: at_ns + offset.offset_ns
        )

    async def _begin_receive(self, made: Any) -> None:
        receive, _ = made
        keep = self._keep_spans if self.config.export.otlp else None
        receiver = Receiver(self._learn, energy=self._energy_of, keep=keep)
        log.info("spans are taken at %s/v1/traces", await receiver.start(receive.listen))
        self.receiver = receiver

    # ------------------------------------------------------------------------------- what is known

    async def look_at_owners(self) -> None:
        """Which GPUs each server is on; processes come and go."""
        gpu, host = self.sources.get(GPU), self.sources.get(HOST)
        if (gpus := self.devices()) != self._gpus:
            self._gpus = gpus
            self._history.add_gpus(gpus)
        devices = [one.uuid for one in gpus]
        ask = getattr(gpu.sampler, "processes", None) if gpu else None
        processes = ask() if ask else {}
        pids = host.sampler.pids() if host and isinstance(host.sampler, HostSampler) else {}
        for server in self.config.server:
            is_here = self._here.get(server.url, False)
            found = owned(
                server,
                devices=devices,
                processes=processes,
                pids=pids.get(_port(server.url), frozenset()) if is_here else frozenset(),
                is_alone_here=is_here and len(self.config.server) == 1,
            )
            if found != self._owned.get(server.name):
                self._owned[server.name] = found
                self._history.add_source(server.name, service=server.service, gpus=found.gpus)

    def server_status(self, server: Server) -> ServerStatus:
        source = self.sources.get(server.name)
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
            slo=server.slo or self.config.slo.targets,
            missing=tuple(one.canonical for one in page.missing()) if page else (),
        )

    def notes(self) -> list[str]:
        host = self.sources.get(HOST)
        unseen = host.sampler.unseen if host and isinstance(host.sampler, HostSampler) else ()
        return [*self._failed.values(), *unseen]

    def devices(self) -> Sequence[TargetGpu]:
        gpu = self.sources.get(GPU)
        ask = getattr(gpu.sampler, "devices", None) if gpu else None
        found: Sequence[TargetGpu] = ask() if ask else ()
        return found

    # --------------------------------------------------------------------------- the server's spans

    async def _keep_spans(self, body: bytes, spans: int) -> bool:
        return self.delivery is not None and await self.delivery.spans(body, spans)

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
        servers = self.config.server
        for one in servers:
            if named in (one.name, one.service) and named:
                return one.name
        return servers[0].name if len(servers) == 1 else None

    def _share_energy(self, readings: Sequence[Reading]) -> None:
        if self.receiver is None:
            return
        energy_j = joules(readings)
        at_unix_ns = readings[0].at_ns + self._history.timeline.offset_ns
        for name, (gpus, _) in self._owned.items():
            source = self.sources.get(name)
            running = source.value("requests_running") if source else None
            if gpus and running is not None and set(gpus) <= energy_j.keys():
                share = self._energy.setdefault(name, EnergyShare())
                share.add(at_unix_ns, sum(energy_j[gpu] for gpu in gpus), running)

    # ------------------------------------------------------------------------------------ readings

    def _own_readings(self) -> list[Reading]:
        at_ns, state = time.monotonic_ns(), self._history.state()
        readings = own_readings(
            at_ns,
            started_unix_s=self._started_unix_s,
            store_bytes=state.bytes,
            writer_lag_s=state.writer_lag_s,
        )
        for source in self.sources:
            readings += source.watched.record()
        if self.delivery is not None:
            with contextlib.suppress(StoreError):
                readings += self.delivery.readings(at_ns)
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
