"""The main job: which level next, everything joined to it, and what it all says.

options → target found and probed → level after level, each kept as it ends → curve → verdict.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import platform
import secrets
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from random import Random
from typing import Any, Protocol

import msgspec
import numpy as np

from agent import __version__
from agent.join import gpu_views, server_view
from agent.model import (
    Curve,
    Level,
    Overhead,
    Run,
    ServefitError,
    Sweep,
    Target,
    TargetGpu,
    UsageError,
    Workload,
)
from agent.sizing.curve import analyse
from agent.sizing.judge import judge
from agent.store import Store
from loadgen import api, arrival, probe, tokenizer, workload
from loadgen.client import Address, Dialer, parse_url, request_head, tls_context, wire
from loadgen.config import Options
from loadgen.level import Plan, span, steady_window, summarise
from loadgen.observe import Observer, discover, local_gpus
from loadgen.recorder import OK, LocalCount, Recording, rows
from loadgen.run import ClosedLoop, OpenLoop, Wires
from loadgen.traces import LevelSpan, RequestSpan, TraceSink, export_level

CONNECT_TIMEOUT_S = 10.0
SERVER_INTERVAL_S = 0.5
GPU_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 0.5
SETTLE_S = 2.0  # a server's counters may be a moment behind its replies
IDLE_S = 30.0  # how long the queue of a saturated level may take to empty
RAMP_S_MAX = 10.0
GAPS_PER_LEVEL_MAX = 1_000_000  # 4 bytes each in the store
SIMULATED_ENGINE = "servefit-sim"
READY_AHEAD_MAX = 4096
PRIORITY = -10  # nice value; refused without the right to it, and then left as it is


class Watcher(Protocol):
    """Who is told how it goes: the terminal, or a test."""

    def note(self, text: str) -> None: ...

    def level_began(self, number: int, of: int, plan: Plan) -> None: ...

    def level_moved(self, state: Moment) -> None: ...

    def level_ended(self, number: int, level: Level) -> None: ...


class Moment(msgspec.Struct, frozen=True):
    """How a running level stands."""

    share: float  # 0 … 1 of the level is done
    elapsed_s: float
    in_flight: int
    ok: int
    failed: int
    tokens: int


class TraceIds:
    """The ids of one level's trace: they go out on the wire before any span exists."""

    def __init__(self, rng: Random) -> None:
        self.trace_id = rng.getrandbits(128) or 1
        self.root_span_id = rng.getrandbits(64) or 1
        self._first = rng.getrandbits(64)

    def span_id(self, index: int) -> int:
        return (self._first + index) % 2**64 or 1

    def traceparent(self, index: int) -> str:
        """W3C trace context of request `index`, sampled."""
        return f"00-{self.trace_id:032x}-{self.span_id(index):016x}-01"


class Session:
    """One run of `sweep` or `run`, from the first probe to the verdict."""

    def __init__(
        self, options: Options, watcher: Watcher, *, store: Store | None, simulated: bool = False,
        shown_url: str | None = None,
    ) -> None:  # fmt: skip
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
        self._running: ClosedLoop | OpenLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._observer = Observer(())
        self._keeping = False  # a level was measured and is being joined and stored
        self._interrupted = False
        self._rng = Random(options.seed)
        # A new run must not meet the prefix cache that an earlier one with the same seed filled.
        self._nonces = Random(secrets.randbits(64))
        self._unix_minus_monotonic_ns = time.time_ns() - time.monotonic_ns()
        self.sweep = self._empty()

    def _empty(self) -> Sweep:
        options = self.options
        now = datetime.now(UTC)
        arrivals = f"{options.arrival}" if options.rates_rps else "closed"
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
            workload=Workload(
                endpoint=options.endpoint,
                input_tokens=options.input_tokens,
                output_tokens=options.output_tokens,
                arrival=arrivals,
                stream=options.stream,
            ),
            slo=list(options.slo),
        )

    # -------------------------------------------------------------------------------- the path

    async def run(self) -> Sweep:
        """Raises TargetError and UsageError before the first level, and nothing after it."""
        self._task = asyncio.current_task()
        _ask_for_the_processor()
        try:
            await self._prepare()
        except BaseException:
            await self._observer.close()  # else its open connection is complained about at the exit
            raise
        try:
            plans = self.options.plans()
            for number, plan in enumerate(plans, 1):
                self._watcher.level_began(number, len(plans), plan)
                why = await self._level(number, self._ramped(plan))
                self._keeping = False
                if why is not None:
                    self._watcher.note(f"the server is gone: {why}; no further level is tried")
                    break
                if self._interrupted:
                    break
                if number < len(plans):
                    await self._until_idle()
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
        finally:
            self._task = None  # what follows is short, and not to be cancelled
            await self._observer.close()
        if self._sink is not None:
            delivery = await asyncio.to_thread(self._sink.close)
            self._watcher.note(delivery.line())
        self._conclude()
        return self.sweep

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

    def interrupt(self) -> None:
        """Ends the level that is running and keeps it as far as it came."""
        self._interrupted = True
        self._update_run(interrupted=True)
        if self._running is not None:
            self._running.stop()
        elif self._task is not None and not self._keeping:
            self._task.cancel()

    def _update_run(self, **changes: Any) -> None:
        run = msgspec.structs.replace(self.sweep.run, **changes)
        self.sweep = msgspec.structs.replace(self.sweep, run=run)

    # ----------------------------------------------------------------------------- preparations

    async def _prepare(self) -> None:
        options = self.options
        limit_s = min(options.timeout_s, probe.PROBE_TIMEOUT_S)
        known = await probe.models(self._address, options.headers, self._tls, limit_s)
        model = probe.choose_model(options.model, known.ids)
        probe.check_length(model, known, options.input_tokens, options.output_tokens)
        if known.simulated:
            self._simulated = True
            self._update_run(simulated=True)
        await self._find_observers(model)
        await self._refuse_busy()
        count = tokenizer.counter(options.tokenizer) if options.tokenizer else None
        prober = probe.Prober(
            self._address, self._dial, options.headers, options.endpoint, model,
            stream=options.stream, timeout_s=limit_s,
            count=count,
        )  # fmt: skip
        self._probed = await prober.run(options.input_tokens, self._nonces)
        shape = workload.shape_of(options.input_tokens, self._probed.costs)
        prompt_tokens = round(workload.expected_tokens(shape, self._probed.costs))
        self._counter = LocalCount(count, prompt_tokens) if count is not None else None
        for note in self._probed.notes:
            self._watcher.note(note)
        self._head = request_head(self._address, api.PATHS[options.endpoint], options.headers)
        self._overhead(probe_requests=self._probed.requests, probe_tokens=self._probed.tokens)

    def _overhead(self, **more: int) -> None:
        old = msgspec.structs.asdict(self.sweep.run.overhead)
        self._update_run(overhead=Overhead(**{k: v + more.get(k, 0) for k, v in old.items()}))

    async def _find_observers(self, model: str) -> None:
        options = self.options
        tls: ssl.SSLContext | bool = self._tls if self._tls is not None else True
        self._server, server_note, engine, version = await discover(
            self._address.origin, options.metrics_url, model, options.headers, tls
        )
        if self._simulated:
            # It speaks vLLM's dialect, but nobody shall take its numbers for vLLM's.
            engine, version = SIMULATED_ENGINE, __version__
            self._gpus = None
            gpu_note: str | None = "simulated: there is no GPU behind these numbers"
        else:
            self._gpus, gpu_note = await local_gpus(self._address.origin)
        samplers: list[tuple[Any, float]] = []
        if self._server is not None:
            samplers.append((self._server, SERVER_INTERVAL_S))
        if self._gpus is not None:
            samplers.append((self._gpus, GPU_INTERVAL_S))
        self._observer = Observer(samplers)
        gpus: list[TargetGpu] = self._gpus.devices() if self._gpus is not None else []
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
            server_note=server_note,
            gpu_note=gpu_note,
        )
        self.sweep = msgspec.structs.replace(self.sweep, target=target)

    async def _load_now(self) -> tuple[float, float] | None:
        """Running and waiting requests as the server says; None where it does not."""
        if self._server is None:
            return None
        try:
            values = {r.name: r.value for r in await self._server.sample()}
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

    def _wires(self, plan: Plan, trace: TraceIds) -> Wires:
        options = self.options
        prompts = workload.Prompts(
            options.input_tokens, self._probed.costs, self._nonces, reuse=options.reuse_prompts
        )

        def encode(prompt: str) -> bytes:
            return api.body(
                options.endpoint, self.sweep.target.model, prompt, options.output_tokens,
                stream=options.stream, dialect=self._probed.dialect,
            )  # fmt: skip

        def source() -> Iterator[bytes]:
            bodies = workload.bodies(prompts, encode)
            for index, body in enumerate(bodies):
                # Requests of the warm-up have no span, so nothing may hang under one.
                traced = self._sink is not None and index >= plan.warmup_requests
                yield wire(self._head, body, trace.traceparent(index) if traced else None)

        ahead = max(8, int(2 * plan.load))
        return Wires(source(), min(READY_AHEAD_MAX, ahead), self._counter)

    async def _level(self, number: int, plan: Plan) -> str | None:
        """Runs, joins and keeps one level; returns why the server seems gone, if it does."""
        trace = TraceIds(self._nonces)
        wires = self._wires(plan, trace)
        runner: ClosedLoop | OpenLoop
        if plan.mode == "concurrency":
            runner = ClosedLoop(plan, self._dial, wires)
        else:
            rng = Random(f"{self.options.seed}:{number}")
            runner = OpenLoop(
                plan, self._dial, wires, arrival.instants(plan.arrival, plan.load, rng)
            )
        started_at = _iso(datetime.now(UTC))
        async with self._observer.watching():
            before_ns = time.monotonic_ns()
            self._running, self._keeping = runner, True
            ticker = asyncio.get_running_loop().create_task(self._tick(runner))
            try:
                recording = await runner.run()
            finally:
                self._running = None
                ticker.cancel()
            if not self._interrupted and runner.gave_up is None:
                await self._settle(recording)
            after_ns = time.monotonic_ns()
        level = self._join(recording, plan, started_at, before_ns, after_ns)
        self._keep(level, recording)
        self._watcher.level_ended(number, level)
        for kind, text in recording.error_texts.items():
            if text:
                self._watcher.note(f"{kind}: {text}")
        for note in self._observer.notes:
            self._watcher.note(note)
        await self._export(plan, recording, trace)
        return runner.gave_up

    async def _tick(self, runner: ClosedLoop | OpenLoop) -> None:
        plan = runner.plan
        began = time.monotonic()
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            recorder = runner.recorder
            elapsed = time.monotonic() - began
            if plan.requests is not None:
                share = (recorder.ok + recorder.failed) / (plan.requests + plan.warmup_requests)
            else:
                share = elapsed / (plan.warmup_s + (plan.duration_s or 1.0))
            self._watcher.level_moved(
                Moment(min(share, 1.0), elapsed, runner.in_flight, recorder.ok, recorder.failed,
                       recorder.tokens)
            )  # fmt: skip

    async def _settle(self, recording: Recording) -> None:
        """Waits until the server has counted what it already answered."""
        name = "requests_finished_total"
        base = next((r.value for r in self._observer.readings if r.name == name), None)
        if base is None or self._server is None:
            return
        ours = int((recording.outcome == OK).sum())
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and not self._interrupted:
            with suppress(ServefitError):
                now = {r.name: r.value for r in await self._server.sample()}
                if now.get(name, 0.0) - base >= ours:
                    return
            await asyncio.sleep(0.1)

    def _join(
        self, recording: Recording, plan: Plan, started_at: str, before_ns: int, after_ns: int
    ) -> Level:
        window = steady_window(recording)
        readings = self._observer.readings
        server = server_view(
            readings, start_ns=before_ns, end_ns=after_ns,
            window=(window.start_ns, window.end_ns),
        )  # fmt: skip
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
            self._store.save(self.sweep, **what)
        except ServefitError as error:
            self._watcher.note(f"not kept in the store: {error}")
            self._store = None

    async def _export(self, plan: Plan, recording: Recording, trace: TraceIds) -> None:
        if self._sink is None:
            return
        start_ns, end_ns = span(recording)
        target = self.sweep.target
        level = LevelSpan(
            name=f"level {plan.mode}={plan.load:g}",
            trace_id=trace.trace_id,
            span_id=trace.root_span_id,
            start_unix_ns=start_ns + self._unix_minus_monotonic_ns,
            end_unix_ns=end_ns + self._unix_minus_monotonic_ns,
            model=target.model,
            operation="chat" if self.options.endpoint == "chat" else "text_completion",
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
        export_level(self._sink, level, _spans(recording, trace, self._unix_minus_monotonic_ns))
        await asyncio.to_thread(self._sink.flush)

    # ------------------------------------------------------------------------------ conclusions

    def _conclude(self) -> None:
        options = self.options
        levels = self.sweep.levels
        curve = analyse(levels, options.slo) if levels else Curve()
        verdict = judge(
            levels, curve, options.slo,
            expect_concurrency=options.expect_concurrency,
            expect_rps=options.expect_rps,
            simulated=self._simulated,
            target=self._shown_url,
        )  # fmt: skip
        self.sweep = msgspec.structs.replace(self.sweep, curve=curve, verdict=verdict)
        self._save()


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


def _spans(rec: Recording, trace: TraceIds, unix_minus_monotonic_ns: int) -> Iterator[RequestSpan]:
    for row in rows(rec):
        first_ns = row.first_ns
        yield RequestSpan(
            span_id=trace.span_id(row.index),
            start_unix_ns=(row.sent_ns or row.due_ns) + unix_minus_monotonic_ns,
            first_token_unix_ns=None if first_ns is None else first_ns + unix_minus_monotonic_ns,
            end_unix_ns=row.end_ns + unix_minus_monotonic_ns,
            status=row.error or "ok",
            input_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
        )


def _ask_for_the_processor() -> None:
    """A client that waits for its turn measures the scheduler; root may ask to be served first."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)


def _fingerprint(*parts: str | None) -> str:
    """Twelve hex digits that differ where model, engine, version or GPUs differ."""
    return hashlib.sha256("|".join(part or "?" for part in parts).encode()).hexdigest()[:12]


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
