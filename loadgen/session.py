"""The main job: which level next, everything joined to it, and what it all says.

options → target found and probed → level after level, each kept as it ends → curve → verdict.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import platform
import secrets
import shlex
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from agent import __version__, trace
from agent.join import gpu_views, server_view
from agent.model import (
    Level,
    Overhead,
    Reading,
    Run,
    ServefitError,
    Sweep,
    Target,
    TargetGpu,
    UsageError,
    Workload,
)
from agent.sizing.curve import load_of
from agent.store import State, Store
from loadgen import api, calibrate, dataset, limits, moment, probe, tokenizer, worker
from loadgen.client import Address, Dialer, parse_url, request_head, tls_context
from loadgen.config import DEFAULT_OUTPUT_TOKENS, Options, agent_token, read_prices
from loadgen.crew import Crew, CrewLevel
from loadgen.lengths import Fixed
from loadgen.level import Plan, span, steady_window, summarise
from loadgen.loops import ClosedLoop, OpenLoop
from loadgen.moment import Moment
from loadgen.observe import Observer, discover, local_gpus, on_this_machine
from loadgen.recorder import OK, Recording, rows
from loadgen.resume import stored
from loadgen.schedule import End, Schedule, Upcoming
from loadgen.search import Sample
from loadgen.traces import LevelSpan, RequestSpan, TraceSink, export_level
from loadgen.worker import CONNECT_TIMEOUT_S, Job, TraceIds
from loadgen.workload import Spec

if TYPE_CHECKING:
    from loadgen.remote import Agent

Running = ClosedLoop | OpenLoop | CrewLevel

SERVER_INTERVAL_S = 0.5
GPU_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 0.5
CLOSING_S = 0.01  # the loop closes a level's sockets in its next turns
SETTLE_S = 2.0  # a server's counters may be a moment behind its replies
IDLE_S = 30.0  # how long the queue of a saturated level may take to empty
RAMP_S_MAX = 10.0
FIRST_RATE_RPS = 0.5  # where not even one request was answered
PILOT_REQUESTS = 3
GAPS_PER_LEVEL_MAX = 1_000_000  # 4 bytes each in the store
SIMULATED_ENGINE = "servefit-sim"


class Watcher(Protocol):
    """Who is told how it goes: the terminal, or a test."""

    def note(self, text: str) -> None: ...

    def level_began(self, number: int, upcoming: Upcoming, *, simulated: bool) -> None: ...

    def level_moved(self, state: Moment) -> None: ...

    def level_ended(self, number: int, level: Level) -> None: ...

    def close(self) -> None:
        """After the last level, or an error in the middle of one; notes may still follow."""


class Session:
    """One run of `sweep` or `run`, from the first probe to the verdict."""

    def __init__(
        self, options: Options, watcher: Watcher, *, store: Store | None, simulated: bool = False,
        shown_url: str | None = None, resumed: Sweep | None = None,
    ) -> None:  # fmt: skip
        """`resumed`: a run of the same options that was stopped, to be gone on with."""
        self.options = options
        self._watcher = watcher
        self._store = store
        self._simulated = simulated
        self._shown_url = shown_url or options.url
        self._address: Address = parse_url(options.url)
        self._tls: ssl.SSLContext | None = None
        if self._address.tls:
            self._tls = tls_context(ca_file=options.ca_file, insecure=options.insecure)
        self._dial = Dialer(self._address, self._tls, CONNECT_TIMEOUT_S)
        self._sink = TraceSink(options.otlp_endpoint) if options.otlp_endpoint else None
        self._agent = self._remote_agent()
        self._running: Running | None = None
        self._crew = Crew()
        self._calibration = calibrate.load()
        self._shares_machine = False  # whether the target runs on this one
        self._task: asyncio.Task[Any] | None = None
        self._observer = Observer(())
        self._keeping = False  # a level was measured and is being joined and stored
        self._interrupted = False
        self._told_bunched = False
        self._dataset = dataset.read(options.dataset) if options.dataset else None
        self._trace = trace.read(options.trace) if options.trace else None
        self._prices = read_prices(options.prices) if options.prices else None
        # A new run must not meet the prefix cache that an earlier one with the same seed filled.
        self._nonces = Random(secrets.randbits(64))
        self._unix_minus_monotonic_ns = time.time_ns() - time.monotonic_ns()
        self._resumed = resumed
        self.sweep = resumed or self._empty()
        self._state: State = "running"
        spent_s = sum(level.duration_s or 0.0 for level in self.sweep.levels)
        self._schedule = Schedule(options, self._trace, spent_s)

    def _remote_agent(self) -> Agent | None:
        options = self.options
        if options.agent is None:
            return None
        from loadgen.remote import Agent  # aiohttp: not needed without

        tls = None
        if options.agent.startswith("https:"):
            # Whatever --insecure says of the target: the agent gets a token of its own.
            tls = tls_context(ca_file=options.ca_file, insecure=False)
        return Agent(options.agent, token=agent_token(options.agent_token_file), ssl=tls)

    def _empty(self) -> Sweep:
        options = self.options
        now = datetime.now(UTC)
        return Sweep(
            run=Run(
                id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
                started_at=_iso(now),
                command=options.command,
                seed=options.seed,
                tool_version=__version__,
                host=platform.node(),
                simulated=self._simulated,
            ),
            target=Target(url=self._shown_url, model=options.model or ""),
            workload=_workload(options),
            slo=list(options.slo),
        )

    # -------------------------------------------------------------------------------- the path

    async def run(self) -> Sweep:
        """Raises TargetError and UsageError before the first level, and nothing after it."""
        self._task = asyncio.current_task()
        worker.ask_for_the_processor()
        try:
            await self._prepare()
        except BaseException:
            await self._observer.close()  # else its open connection is complained about at the exit
            raise
        try:
            await self._measure()
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
        finally:
            self._task = None  # what follows is short, and not to be cancelled
            self._watcher.close()
            await self._observer.close()
            await self._crew.close()
        if self._sink is not None:
            delivery = await asyncio.to_thread(self._sink.close)
            self._watcher.note(delivery.line())
        self._conclude()
        await self._hand_over()
        return self.sweep

    def _beyond(self, plan: Plan) -> str | None:
        """Why this level cannot be run here: of an open loop, by what the level before took."""
        processes = self._shared_out(plan).processes
        e2e_ms = self.sweep.levels[-1].e2e_ms.mean if self.sweep.levels else None
        try:
            if plan.concurrency is not None:
                limits.check_streams(plan.concurrency, self._address.port, processes=processes)
            elif e2e_ms is not None:
                limits.check_rate(plan.load, e2e_ms / 1e3, self._address.port, processes=processes)
        except UsageError as error:
            return str(error)
        return None

    async def _measure(self) -> None:
        """Level after level, until the list or the search is at its end, or the server is gone."""
        if self.options.auto == "rate":
            self._schedule.start_rps = await self._first_rate()
        while not self._interrupted:
            upcoming = self._schedule.next(self.sweep.levels)
            stopped = upcoming.why if isinstance(upcoming, End) else await self._next(upcoming)
            if stopped is not None:
                if stopped:
                    self._watcher.note(stopped)
                return

    async def _next(self, upcoming: Upcoming) -> str | None:
        """Measures one level; says why there can be no further one, where that is so."""
        plan = upcoming.plan
        if (beyond := self._beyond(plan)) is not None:
            return f"no further level is tried: {beyond}"
        number = len(self.sweep.levels) + 1
        self._watcher.level_began(number, upcoming, simulated=self._simulated)
        gone = await self._level(number, self._ramped(plan))
        self._keeping = False
        if gone is not None:
            return f"the server is gone: {gone}; no further level is tried"
        if not self._interrupted and number != upcoming.of:
            await self._until_idle()
        return None

    async def _first_rate(self) -> float:
        """Requests/s of one stream alone: a rate that a server can hold, to begin a search with."""
        if self.sweep.levels:
            return self.sweep.levels[0].offered_rps or FIRST_RATE_RPS
        plan = Plan(
            "concurrency", concurrency=1, requests=PILOT_REQUESTS, timeout_s=self.options.timeout_s,
            stream=self.options.stream,
        )  # fmt: skip
        runner = worker.runner(self._job(0, plan, None), self._dial)
        self._running = runner
        try:
            recording = await runner.run()
        finally:
            self._running = None
        self._overhead(
            warmup_requests=int((recording.outcome == OK).sum()),
            warmup_tokens=int(recording.output_tokens.sum()),
        )
        start_ns, end_ns = span(recording)
        if not runner.recorder.ok or end_ns <= start_ns:
            return FIRST_RATE_RPS
        return float(f"{runner.recorder.ok * 1e9 / (end_ns - start_ns):.3g}")

    @property
    def began(self) -> bool:
        """Whether there is a level, begun or ended, that an interruption must keep."""
        return self._running is not None or self._keeping or bool(self.sweep.levels)

    def _ramped(self, plan: Plan) -> Plan:
        """Slots that start over a whole request's time are spread as they would be in the long run.

        All at once they would stay one cohort, which prefills together and decodes together. How
        long a request takes is known from the level before.
        """
        e2e_ms = self.sweep.levels[-1].e2e_ms.mean if self.sweep.levels else None
        longest_s = min(RAMP_S_MAX, (plan.duration_s or math.inf) / 4)
        return msgspec.structs.replace(plan, ramp_s=min((e2e_ms or 0.0) / 1e3, longest_s))

    def _shared_out(self, plan: Plan) -> Plan:
        """The plan with its processes: as many as were asked for, else as it will need."""
        processes = self.options.processes or self._processes_needed(plan)
        if plan.concurrency is not None:
            processes = min(processes, plan.concurrency)
        return msgspec.structs.replace(plan, processes=processes)

    def _processes_needed(self, plan: Plan) -> int:
        """By what this machine holds and what the level before gave, at most as it scales.

        A server on this machine keeps a core for itself: taken from it, it would be measured worse.
        """
        levels = self.sweep.levels
        before = next((lv for lv in reversed(levels) if load_of(lv) and lv.requests), None)
        scale = plan.load / (load_of(before) or 1.0) if before is not None else 0.0
        e2e_s = ((before.e2e_ms.mean if before is not None else None) or 0.0) / 1e3
        rate_rps = plan.rate_rps or scale * ((before and before.request_throughput) or 0.0)
        return calibrate.processes_for(
            self._calibration,
            streams=plan.concurrency or rate_rps * e2e_s,
            token_events_per_s=scale * ((before and before.output_tokens_per_s) or 0.0),
            requests_per_s=rate_rps,
            cores=max(1, calibrate.cores() - self._shares_machine),
        )

    def interrupt(self) -> None:
        """Ends the level that is running and keeps it as far as it came."""
        self._interrupted = True
        self._update_run(interrupted=True)
        if self._running is not None:
            self._state = "cut"
            self._running.stop()
        elif self._task is not None and not self._keeping:
            self._task.cancel()

    def _update_run(self, **changes: Any) -> None:
        run = msgspec.structs.replace(self.sweep.run, **changes)
        self.sweep = msgspec.structs.replace(self.sweep, run=run)

    # ----------------------------------------------------------------------------- preparations

    async def _prepare(self) -> None:
        options = self.options
        recorded = [file.notes for file in (self._dataset, self._trace) if file is not None]
        for note in chain(options.notes, *recorded):
            self._watcher.note(note)
        limits.check_streams(
            max(options.concurrency, default=0), self._address.port,
            processes=options.processes or 1,
        )  # fmt: skip
        limit_s = min(options.timeout_s, probe.PROBE_TIMEOUT_S)
        known = await probe.models(
            self._address, options.headers, self._tls, limit_s,
            optional=bool(options.model or options.mix),
        )  # fmt: skip
        self._api = api.ENDPOINTS[options.endpoint]
        model = self._choose_model(known)
        prompt_tokens = self._check_length(model, known)
        if known.simulated:
            self._simulated = True
            self._update_run(simulated=True)
        with suppress(OSError):  # reached by a name that only a moment ago had an address
            self._shares_machine = await on_this_machine(self._address.origin)
        await self._find_observers(model)
        await self._refuse_busy()
        prober = probe.Prober(
            self._address, self._dial, options.headers, options.endpoint, model,
            stream=options.stream, timeout_s=limit_s,
            count=tokenizer.counter(options.tokenizer) if options.tokenizer else None,
        )  # fmt: skip
        probed = await prober.run(
            prompt_tokens, self._nonces, try_token_ids=api.TOKEN_IDS in self._api.takes
        )
        for note in probed.notes:
            self._watcher.note(note)
        self._dial.keep_alive = probed.keeps_open
        if rate_rps := options.rate_rps_max(self._trace):
            # At least: a level's replies are longer than the probes'.
            limits.check_rate(rate_rps, probed.fastest_s or 0.0, self._address.port)
        self._head = request_head(self._address, self._api.path, options.headers)
        self._overhead(probe_requests=probed.requests, probe_tokens=probed.tokens)
        self._spec = Spec(
            endpoint=options.endpoint,
            stream=options.stream,
            models=options.mix or ((model, 1.0),),
            input_tokens=options.input_tokens,
            output_tokens=options.output_tokens,
            costs=probed.costs,
            dialect=probed.dialect,
            token_ids=probed.token_ids,
            prefix_tokens=options.prefix_tokens,
            prefixes=options.prefixes,
            reuse=options.reuse_prompts,
            dataset=self._dataset,
            trace=self._trace,
            turns=options.turns,
            longest=known.lengths.get(model),
            seed=options.seed,
            nonce=self._nonces.getrandbits(63),
        )

    def _choose_model(self, known: probe.Known) -> str:
        """The model that is probed: of a mix the first, after all were looked for."""
        mixed = [probe.choose_model(name, known.ids) for name, _ in self.options.mix]
        return mixed[0] if mixed else probe.choose_model(self.options.model, known.ids)

    def _check_length(self, model: str, known: probe.Known) -> int:
        """The tokens of a prompt to try; raises UsageError where no request could be answered."""
        options = self.options
        asked = options.input_tokens.fixed
        output = options.output_tokens or Fixed(DEFAULT_OUTPUT_TOKENS)
        if asked is not None and output.fixed is not None and not options.own_lengths:
            whole = asked * options.turns + options.prefix_tokens
            probe.check_length(
                model, known, whole, output.fixed * options.turns, min(self._api.sequences)
            )
            return asked
        longest = known.lengths.get(model, round(options.input_tokens.mean) + 1)
        return max(1, min(round(options.input_tokens.mean), longest - 1))

    def _overhead(self, **more: int) -> None:
        old = msgspec.structs.asdict(self.sweep.run.overhead)
        self._update_run(overhead=Overhead(**{k: v + more.get(k, 0) for k, v in old.items()}))

    async def _find_observers(self, model: str) -> None:
        options = self.options
        if self._agent is not None:
            await self._agent.meet(self._address.origin, model)
        tls: ssl.SSLContext | bool = self._tls if self._tls is not None else True
        self._server, server_note, engine, version = await discover(
            self._address.origin, options.metrics_url, model, options.headers, tls
        )
        if self._simulated:
            # It speaks vLLM's dialect, but nobody shall take its numbers for vLLM's.
            engine, version = SIMULATED_ENGINE, __version__
            self._gpus = None
            gpu_note: str | None = "simulated: there is no GPU behind these numbers"
        elif self._agent is not None:
            self._gpus, gpu_note = None, None if self._agent.gpus else "the agent sees none"
        else:
            self._gpus, gpu_note = await local_gpus(self._address.origin)
        samplers: list[tuple[Any, float]] = []
        if self._server is not None:
            samplers.append((self._server, SERVER_INTERVAL_S))
        if self._gpus is not None:
            samplers.append((self._gpus, GPU_INTERVAL_S))
        self._observer = Observer(samplers)
        gpus: list[TargetGpu] = self._gpus.devices() if self._gpus is not None else []
        if self._agent is not None:
            gpus, server_note = self._take_from(self._agent, server_note)
            engine = engine or self._agent.server.engine
        for what, note in (("server", server_note), ("GPU", gpu_note)):
            if note:
                self._watcher.note(f"no {what} data: {note}")
        target = Target(
            url=self._shown_url,
            model=model,
            engine=engine,
            engine_version=version,
            gpus=gpus,
            fingerprint=_fingerprint(model, engine, version, *(gpu.name for gpu in gpus)),
            settings=dict(self._server.fingerprint) if self._server is not None else {},
            server_note=server_note,
            gpu_note=gpu_note,
        )
        if self._resumed is not None:
            _refuse_another(self._resumed, target)
        self.sweep = msgspec.structs.replace(self.sweep, target=target)

    def _take_from(
        self, agent: Agent, server_note: str | None
    ) -> tuple[list[TargetGpu], str | None]:
        """What the agent has to give, told in a line; the target's GPUs, and why no server data.

        The target's own page is asked twice a second and tells whose the requests were, so the
        agent's look at it comes second. Behind a simulated engine there are no GPUs.
        """
        if self._simulated:
            agent.gpus = []
        agent.gives_server = self._server is None
        what = [f"{len(agent.gpus)} GPU{'s' if len(agent.gpus) > 1 else ''}"] if agent.gpus else []
        if agent.gives_server:
            what.append(f"the server's series ({server_note})")
        server = agent.server
        self._watcher.note(
            f"from the agent {agent.url}: {' and '.join(what) or 'nothing'} of {server.name} "
            f"({server.url}{agent.known_by and ', ' + agent.known_by})"
        )
        if len(agent.gpus) > 1 and not server.gpus:
            self._watcher.note(
                f"all {len(agent.gpus)} GPUs that the agent sees are counted as the target's"
            )
        return agent.gpus, None

    async def _load_now(self) -> tuple[float, float] | None:
        """Running and waiting requests as the server, else the agent, says; None where neither."""
        source = self._server or self._agent
        if source is None:
            return None
        try:
            values = {r.name: r.value for r in await source.sample()}
        except ServefitError:
            return None
        if "requests_running" not in values:
            return None
        return values["requests_running"], values.get("requests_waiting", 0.0)

    async def _refuse_busy(self) -> None:
        load = await self._load_now()
        if load is not None and sum(load) > 0 and not self.options.yes:
            raise UsageError(
                f"the server is busy: {load[0]:.0f} requests running, {load[1]:.0f} waiting; "
                "the sweep would disturb them and they the sweep; --yes to go on all the same"
            )

    async def _until_idle(self) -> None:
        """The level after a saturated one begins with an empty queue."""
        deadline = time.monotonic() + IDLE_S
        while time.monotonic() < deadline:
            load = await self._load_now()
            if load is None or sum(load) == 0:
                return
            await asyncio.sleep(0.2)

    # -------------------------------------------------------------------------------- one level

    def _job(self, number: int, plan: Plan, ids: TraceIds | None) -> Job:
        options = self.options
        return Job(
            plan=plan,
            number=number,
            spec=self._spec,
            address=self._address,
            head=self._head,
            ca_file=options.ca_file,
            insecure=options.insecure,
            tokenizer=options.tokenizer,
            keep_alive=self._dial.keep_alive,
            trace=ids if self._sink is not None else None,
        )

    async def _runner(self, job: Job) -> Running:
        """In this process where one is enough, else shared by a crew."""
        if job.plan.processes > 1:
            return await self._crew.level(job, job.plan.processes)
        return worker.runner(job, self._dial)

    async def _level(self, number: int, plan: Plan) -> str | None:
        """Runs, joins and keeps one level; returns why the server seems gone, if it does."""
        plan = self._shared_out(plan)
        ids = TraceIds.draw(self._nonces)
        runner = await self._runner(self._job(number, plan, ids))
        started_at = _iso(datetime.now(UTC))
        async with self._observer.watching():
            before_ns = time.monotonic_ns()
            self._running, self._keeping = runner, True
            ticker = asyncio.get_running_loop().create_task(self._tick(number, runner))
            try:
                recording = await runner.run()
            finally:
                self._running = None
                ticker.cancel()
                await asyncio.sleep(CLOSING_S)  # what follows opens files, too
            if not self._interrupted and runner.gave_up is None:
                await self._settle(recording)
            after_ns = time.monotonic_ns()
        if runner.gave_up is not None:
            self._state = "cut"
        readings = [*self._observer.readings, *await self._seen_by_agent(before_ns, after_ns)]
        level = self._join(recording, plan, started_at, before_ns, after_ns, readings)
        self._keep(level, recording)
        self._watcher.level_ended(number, level)
        for kind, text in recording.error_texts.items():
            if text:
                self._watcher.note(f"{kind}: {text}")
        self._tell_bunched(level)
        for note in chain(self._observer.notes, self._agent.notes if self._agent else ()):
            self._watcher.note(note)
        await self._export(plan, recording, ids)
        return runner.gave_up

    def _tell_bunched(self, level: Level) -> None:
        """Once a run: what holds streams back on their way does so at every level."""
        reasons = level.measurement.reasons if level.measurement else ()
        for reason in reasons:
            if reason.startswith("bunched:") and not self._told_bunched:
                self._told_bunched = True
                self._watcher.note(reason)

    async def _tick(self, number: int, runner: Running) -> None:
        after = self._schedule.after(number)
        later_s = None if after is None else moment.later_s(after, self.sweep.levels)
        began = time.monotonic()
        samples: list[Sample] = []
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            half = self._look(runner, samples)
            rate = moment.rate_of(samples)
            self._watcher.level_moved(
                moment.of(
                    runner.plan, runner.recorder, runner.in_flight, time.monotonic() - began,
                    half=half, half_wanted=self._schedule.half_wanted, rate=rate,
                    later_s=later_s, budget_left_s=self._schedule.left_s,
                )
            )  # fmt: skip

    def _look(self, runner: Running, samples: list[Sample]) -> float | None:
        """How tight a level is; ends one of a search when it has said enough, or the budget is
        spent.

        From counts that are kept anyway, so that no token event costs more for it.
        """
        if self._schedule.left_s <= 0:
            runner.finish()
        recorder = runner.recorder
        if not recorder.ramp_end_ns:
            return None
        now = Sample(time.monotonic(), runner.arrived, recorder.ok, runner.in_flight)
        moment.keep(samples, now)
        said = self._schedule.look(samples)
        if said.enough:
            runner.finish()
        return said.half

    async def _settle(self, recording: Recording) -> None:
        """Waits until the server has counted what it already answered."""
        name = "requests_finished_total"
        base = next((r.value for r in self._observer.readings if r.name == name), None)
        if base is None or self._server is None:
            return
        ok = int((recording.outcome == OK).sum())
        least, most = (ok * k for k in (min(self._api.sequences), max(self._api.sequences)))
        deadline = time.monotonic() + SETTLE_S
        counted = -1.0
        while time.monotonic() < deadline and not self._interrupted:
            with suppress(ServefitError):
                now = {r.name: r.value for r in await self._server.sample()}
                before, counted = counted, now.get(name, 0.0) - base
                if counted >= most or counted == before >= least:
                    return
            await asyncio.sleep(0.1)

    async def _seen_by_agent(self, before_ns: int, after_ns: int) -> list[Reading]:
        if self._agent is None:
            return []
        return await self._agent.readings(before_ns, after_ns, lambda: self._interrupted)

    def _join(
        self, recording: Recording, plan: Plan, started_at: str, before_ns: int, after_ns: int,
        readings: list[Reading],
    ) -> Level:  # fmt: skip
        window = steady_window(recording)
        server = server_view(
            readings, start_ns=before_ns, end_ns=after_ns,
            window=(window.start_ns, window.end_ns),
        )  # fmt: skip
        if server is not None and self._server is None:
            # The agent's samples lie seconds beside the level, where others' requests are, too.
            server = msgspec.structs.replace(
                server, requests_total=None, prompt_tokens_total=None, output_tokens_total=None
            )
        start_ns, end_ns = span(recording)
        gpu = gpu_views(readings, start_ns=start_ns, end_ns=end_ns)
        return summarise(
            recording, plan, started_at=started_at, slo=self.options.slo, server=server, gpu=gpu
        )

    def _keep(self, level: Level, recording: Recording) -> None:
        warm = recording.warmup == 1
        self._overhead(
            warmup_requests=int((warm & (recording.outcome == OK)).sum()),
            # Of failed ones too, as in a level: the server has counted what it sent of them.
            warmup_tokens=int(recording.output_tokens[warm].sum()),
        )
        self.sweep = msgspec.structs.replace(self.sweep, levels=[*self.sweep.levels, level])
        self._save(level=len(self.sweep.levels) - 1, requests=_store_rows(recording))

    def _save(self, **what: Any) -> None:
        """A store that fails must not take the measurement with it: it is said, once, and left."""
        if self._store is None:
            return
        try:
            kept = msgspec.structs.replace(self.options, url=self._shown_url)
            self._store.save(self.sweep, options=stored(kept), state=self._state, **what)
        except ServefitError as error:
            self._watcher.note(f"not kept in the store: {error}")
            self._store = None

    async def _export(self, plan: Plan, recording: Recording, ids: TraceIds) -> None:
        if self._sink is None:
            return
        start_ns, end_ns = span(recording)
        target = self.sweep.target
        level = LevelSpan(
            name=f"level {plan.mode}={plan.load:g}",
            trace_id=ids.trace_id,
            span_id=ids.root_span_id,
            start_unix_ns=start_ns + self._unix_minus_monotonic_ns,
            end_unix_ns=end_ns + self._unix_minus_monotonic_ns,
            model=target.model,
            operation=self._api.operation,
            provider=target.engine or "openai",
            server_address=self._address.host,
            server_port=self._address.port,
            stream=self.options.stream,
            attributes={
                "servefit.run.id": self.sweep.run.id,
                f"servefit.level.{plan.mode}": plan.load,
                "servefit.simulated": self._simulated,
            },
        )
        export_level(self._sink, level, _spans(recording, ids, self._unix_minus_monotonic_ns))
        await asyncio.to_thread(self._sink.flush)

    # ------------------------------------------------------------------------------ conclusions

    def _conclude(self) -> None:
        from loadgen.conclude import conclude  # not needed before the end

        self.sweep = conclude(
            self.sweep,
            expect_concurrency=self.options.expect_concurrency,
            expect_rps=self.options.expect_rps,
            prices=self._prices,
        )
        if self._state == "running" and not self._interrupted:
            self._state = "done"
        self._save()

    async def _hand_over(self) -> None:
        """The curve to the agent. A refusal is told and fails nothing: the run is kept here."""
        if self._agent is None or not self.sweep.levels:
            return
        run, name = self.sweep.run.id, self._agent.server.name
        try:
            await self._agent.hand_over(self.sweep)
        except ServefitError as error:
            self._watcher.note(
                f"the agent has not the curve: {error}; `loadgen export {run} -o {run}.json` here, "
                f"then `agent import {run}.json --server {shlex.quote(name)}` there"
            )
        else:
            self._watcher.note(f"the agent {self._agent.url} has the curve, as one of {name}")


def _workload(options: Options) -> Workload:
    """What the result says of the requests."""
    arrivals = "closed"
    if options.mode == "rate":
        arrivals = "trace" if options.trace else options.arrival
    lengths = [
        "as recorded" if length is None else str(length) if length.fixed is None else length.fixed
        for length in (options.input_tokens, options.output_tokens)
    ]
    if options.own_lengths:
        lengths[0] = "as recorded"
    return Workload(
        endpoint=options.endpoint,
        input_tokens=lengths[0],
        output_tokens=lengths[1],
        arrival=arrivals,
        dataset=options.dataset and Path(options.dataset).name,
        trace=options.trace and Path(options.trace).name,
        prefix_tokens=options.prefix_tokens or None,
        turns=options.turns if options.turns > 1 else None,
        stream=options.stream,
    )


def _store_rows(rec: Recording) -> Iterator[dict[str, Any]]:
    """Rows for the store, ms since the level's start; gaps for the first GAPS_PER_LEVEL_MAX."""
    start_ns, _ = span(rec)
    gaps_left = GAPS_PER_LEVEL_MAX
    for row in rows(rec):
        sent_ns = row.sent_ns

        def since_sent(at_ns: int | None, sent_ns: int | None = sent_ns) -> float | None:
            return None if sent_ns is None or at_ns is None else (at_ns - sent_ns) / 1e6

        gaps_left -= row.stamps_ns.size
        gaps_ms = np.diff(row.stamps_ns) / 1e6
        yield {
            "request": row.index,
            "due_ms": (row.due_ns - start_ns) / 1e6,
            "sent_ms": None if sent_ns is None else (sent_ns - start_ns) / 1e6,
            "ttft_ms": since_sent(row.first_ns),
            "e2e_ms": since_sent(row.last_ns or row.end_ns),
            "prompt_tokens": row.prompt_tokens,
            "output_tokens": row.output_tokens,
            "error": row.error,
            "connect_ms": row.connect_ns / 1e6,
            "ttfo_ms": since_sent(row.answer_ns),
            "end_ms": (row.end_ns - start_ns) / 1e6,
            "reasoning_tokens": row.reasoning_tokens,
            "chunks": row.stamps_ns.size,
            "gaps_ms": gaps_ms.astype("<f4").tobytes() if gaps_left >= 0 else None,
        }


def _spans(rec: Recording, ids: TraceIds, unix_minus_monotonic_ns: int) -> Iterator[RequestSpan]:
    for row in rows(rec):
        first_ns = row.first_ns
        yield RequestSpan(
            span_id=ids.span_id(row.index),
            start_unix_ns=(row.sent_ns or row.due_ns) + unix_minus_monotonic_ns,
            first_token_unix_ns=None if first_ns is None else first_ns + unix_minus_monotonic_ns,
            end_unix_ns=row.end_ns + unix_minus_monotonic_ns,
            status=row.error or "ok",
            input_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
        )


def _refuse_another(resumed: Sweep, target: Target) -> None:
    """Levels of two servers are no curve. Raises UsageError."""
    before = resumed.target
    if before.fingerprint == target.fingerprint:
        return

    def words(one: Target) -> str:
        gpus = ", ".join(gpu.name for gpu in one.gpus)
        parts = (one.model, one.engine, one.engine_version, gpus)
        return " ".join(part for part in parts if part)

    raise UsageError(
        f"--resume {resumed.run.id}: this is not the server that it measured: {words(before)} then,"
        f" {words(target)} now; start a new sweep"
    )


def _fingerprint(*parts: str | None) -> str:
    """Twelve hex digits that differ where model, engine, version or GPUs differ."""
    return hashlib.sha256("|".join(part or "?" for part in parts).encode()).hexdigest()[:12]


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
