"""The simulated engine as a server: vLLM's interface and metric names over `Engine`, in real time.

A target for demonstrations and tests that needs no GPU and whose truth is known: the engine says
how long each step takes, and the front sleeps until then and writes one chunk a stream. Every
reply, and the metrics page, say that it is simulated. How late the machine ran behind the model is
on that page too (`servefit_sim_step_lag_seconds_max`): where it is more than a step, this machine
could not hold the pace, and what was measured is the machine.

    python -m loadgen.targets.sim 'sim:h100-sxm/llama-3.1-8b?max_num_seqs=64' --port 8000

Prompts are counted, not read; the reply is the word "tok" once a token, an embedding or a score 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web

from agent import __version__
from agent.model import ServefitError, UsageError
from agent.sizing.engine import Efficiencies, EngineSpec, check
from agent.sizing.hardware import gpu, unknown
from agent.sizing.models import model
from agent.sizing.simulate import Engine, Step
from loadgen import limits
from loadgen.api import ENDPOINTS
from loadgen.targets.sim_api import (
    ID_PREFIXES,
    SIMULATED,
    Ask,
    Chunks,
    Refused,
    ResponseEvents,
    check_model,
    count_messages,
    count_pairs,
    count_prompts,
    json_reply,
    prefill,
    scores,
    token_ids,
    too_long,
    understand,
    whole_reply,
)

DEMO_SPEC = "sim:rtx-4090/llama-3.1-8b?num_gpu_blocks=256"
"""Small enough that a laptop holds its pace, and a KV cache that 30 short requests fill."""

FILES_WANTED = 2**20  # a connection takes one: as many as the hard limit lets
# ------------------------------------------------------------------------------------------- spec


_ENGINE_KEYS: dict[str, Callable[[str], Any]] = {
    "tp": int,
    "precision": str,
    "kv_precision": str,
    "gpu_memory_utilization": float,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "block_size": int,
    "num_gpu_blocks": int,
    "max_model_len": int,
}
_EFFICIENCY_KEYS = ("t0_ms", "eta_b", "eta_c", "eta_p")


def parse_spec(text: str) -> EngineSpec:
    """`sim:GPU/MODEL[?key=value&…]` as an engine, e.g. `sim:h100-sxm/llama-3.1-8b?tp=2`.

    Keys are those of `EngineSpec` and `t0_ms`, `eta_b`, `eta_c`, `eta_p`. Raises UsageError that
    names the nearest known GPU, model or key, or says why the engine could not be started.
    """
    body = text.strip().removeprefix("sim:")
    place, _, query = body.partition("?")
    gpu_name, slash, model_name = place.partition("/")
    if not slash or not gpu_name or not model_name:
        raise UsageError(f"{text!r} is not a simulated engine: write sim:GPU/MODEL[?key=value&…]")
    engine: dict[str, Any] = {}
    efficiencies: dict[str, float] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in _ENGINE_KEYS:
            engine[key] = _parse_value(key, value, _ENGINE_KEYS[key])
        elif key == "t0_ms":
            efficiencies["t0_s"] = _parse_value(key, value, float) / 1e3
        elif key in _EFFICIENCY_KEYS:
            efficiencies[key] = _parse_value(key, value, float)
        else:
            raise UsageError(unknown("key", key, [*_ENGINE_KEYS, *_EFFICIENCY_KEYS]))
    spec = EngineSpec(
        gpu=gpu(gpu_name),
        model=model(model_name),
        efficiencies=Efficiencies(**efficiencies),
        **engine,
    )
    check(spec)
    return spec


def _parse_value(key: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(f"{key}={value}: not a number") from error


# ----------------------------------------------------------------------------------------- metrics

_LATENCY_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
              120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
           10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
          20.0, 40.0, 80.0)  # fmt: skip
_STEP_TOKENS = tuple(float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                        16384))  # fmt: skip


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, … up to `most`: vLLM's bounds for lengths."""
    bounds = (m * 10.0**e for e in range(len(str(most))) for m in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= most)


class _Histogram:
    """A Prometheus histogram; `observe` may count one value many times."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.text = text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        at = 0
        for bound in self.bounds:
            if value <= bound:
                break
            at += 1
        self.counts[at] += times
        self.sum += value * times

    def lines(self, labels: str) -> list[str]:
        bounds = [*(repr(bound) for bound in self.bounds), "+Inf"]
        sums = list(itertools.accumulate(self.counts))
        out = [f"# HELP {self.name} {self.text}", f"# TYPE {self.name} histogram"]
        out += (
            f'{self.name}_bucket{{{labels},le="{bound}"}} {count}.0'
            for bound, count in zip(bounds, sums, strict=True)
        )
        out.append(f"{self.name}_count{{{labels}}} {sums[-1]}.0")
        out.append(f"{self.name}_sum{{{labels}}} {self.sum!r}")
        return out


_FINISHED = ("stop", "length", "abort", "error")


class _Metrics:
    """The page vLLM serves, of what the simulation knows."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.labels = f'engine="0",model_name="{model_name}"'
        self.started_s = time.time()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(_FINISHED, 0)
        self.lag_s_max = 0.0
        # As vLLM's, these gauges are of the last scheduled step: a request that came in while the
        # step was running is not waiting for anything but its end.
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        lengths = _one_two_five(max_model_len)
        self.all: list[_Histogram] = []
        self.ttft = self._add("time_to_first_token_seconds", "time to first token", _TTFT_S)
        self.itl = self._add("inter_token_latency_seconds", "inter-token latency", _ITL_S)
        self.tpot = self._add(
            "request_time_per_output_token_seconds", "time per output token of a request", _ITL_S
        )
        self.e2e = self._add("e2e_request_latency_seconds", "E2E request latency", _LATENCY_S)
        self.queue = self._add("request_queue_time_seconds", "time WAITING", _LATENCY_S)
        self.prefill = self._add("request_prefill_time_seconds", "time in PREFILL", _LATENCY_S)
        self.decode = self._add("request_decode_time_seconds", "time in DECODE", _LATENCY_S)
        self.inference = self._add("request_inference_time_seconds", "time RUNNING", _LATENCY_S)
        self.request_prompt = self._add("request_prompt_tokens", "prefill tokens", lengths)
        self.request_output = self._add("request_generation_tokens", "generation tokens", lengths)
        self.step_tokens = self._add(
            "iteration_tokens_total", "tokens of an engine step", _STEP_TOKENS
        )

    def _add(self, name: str, text: str, bounds: tuple[float, ...]) -> _Histogram:
        histogram = _Histogram(f"vllm:{name}", f"Histogram of {text}.", bounds)
        self.all.append(histogram)
        return histogram

    def observe_step(self, step: Step | None, engine: Engine) -> None:
        self.running = step.running if step else 0
        self.waiting = engine.waiting
        self.kv_usage = step.blocks[1] / engine.num_blocks if step else 0.0

    def page(self, engine: Engine) -> bytes:
        out: list[str] = []

        def add(name: str, kind: str, value: float, text: str, labels: str | None = None) -> None:
            out.append(f"# HELP {name} {text}")
            out.append(f"# TYPE {name} {kind}")
            braced = f"{{{self.labels if labels is None else labels}}}" if labels != "" else ""
            out.append(f"{name}{braced} {float(value)!r}")

        add("servefit_simulated", "gauge", 1, "1: a simulated engine, not a measurement.", "")
        add("servefit_sim_step_lag_seconds_max", "gauge", self.lag_s_max,
            "Latest that a step ended after the model's time.", "")  # fmt: skip
        add("process_start_time_seconds", "gauge", self.started_s,
            "Start time of the process since unix epoch in seconds.", "")  # fmt: skip
        add("vllm:num_requests_running", "gauge", self.running,
            "Number of requests in model execution batches.")  # fmt: skip
        add("vllm:num_requests_waiting", "gauge", self.waiting,
            "Number of requests waiting to be processed.")  # fmt: skip
        add("vllm:kv_cache_usage_perc", "gauge", self.kv_usage,
            "KV-cache usage. 1 means 100 percent usage.")  # fmt: skip
        add("vllm:prefix_cache_queries_total", "counter", 0,
            "Prefix cache queries, in terms of number of queried tokens.")  # fmt: skip
        add("vllm:prefix_cache_hits_total", "counter", 0,
            "Prefix cache hits, in terms of number of cached tokens.")  # fmt: skip
        add("vllm:num_preemptions_total", "counter", engine.preemptions,
            "Cumulative number of preemption from the engine.")  # fmt: skip
        add("vllm:prompt_tokens_total", "counter", self.prompt_tokens,
            "Number of prefill tokens processed.")  # fmt: skip
        add("vllm:generation_tokens_total", "counter", self.generation_tokens,
            "Number of generation tokens processed.")  # fmt: skip
        add("vllm:cache_config_info", "gauge", 1, "Information of the LLMEngine CacheConfig",
            _cache_labels(engine))  # fmt: skip
        name = "vllm:request_success_total"
        out += (
            f"# HELP {name} Count of successfully processed requests.",
            f"# TYPE {name} counter",
        )
        out += (
            f'{name}{{{self.labels},finished_reason="{reason}"}} {count}.0'
            for reason, count in self.finished.items()
        )
        for histogram in self.all:
            out += histogram.lines(self.labels)
        return ("\n".join(out) + "\n").encode()


def _cache_labels(engine: Engine) -> str:
    spec = engine.spec
    labels = {
        "block_size": spec.block_size,
        "cache_dtype": "auto" if spec.kv_precision == spec.precision else spec.kv_precision,
        "enable_prefix_caching": False,
        "engine": 0,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "kv_cache_size_tokens": engine.num_blocks * spec.block_size,
        "num_gpu_blocks": engine.num_blocks,
    }
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


# -------------------------------------------------------------------------------------------- clock


class _Alarm:
    """Wakes the event loop at an instant of the monotonic clock, to about 0.1 ms.

    The loop's own timers wait in whole milliseconds (epoll), which would be seen in every gap
    between two tokens; a thread that sleeps does better, and works on every system.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: queue.SimpleQueue[tuple[float, asyncio.Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="alarm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._due.get()) is not None:
            at_s, future = job
            if (delay_s := at_s - time.monotonic()) > 0:
                time.sleep(delay_s)
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(_wake, future)

    async def until(self, at_s: float) -> None:
        if at_s <= time.monotonic():
            await asyncio.sleep(0)  # late: the connections still get their turn
            return
        future = self._loop.create_future()
        self._due.put((at_s, future))
        await future

    def close(self) -> None:
        self._due.put(None)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# ------------------------------------------------------------------------------------------- server


class _Live:
    """One request under way: where its tokens go, and its instants on the monotonic clock."""

    __slots__ = (
        "admitted_s", "ask", "chunks", "done", "first_s", "gone", "id", "last_s", "sent_s", "token",
        "transport",
    )  # fmt: skip

    def __init__(
        self, request_id: int, ask: Ask, finished: asyncio.Future[None], sent_s: float
    ) -> None:
        self.id = request_id
        self.ask = ask
        self.gone = finished
        self.sent_s = sent_s
        self.admitted_s = sent_s
        self.first_s = sent_s
        self.last_s = sent_s
        self.done = 0
        self.transport: asyncio.Transport | None = None
        self.chunks: Chunks | ResponseEvents | None = None
        self.token = b""  # the chunk of an ordinary token; empty where each is different


def _token_number(live: _Live) -> bytes:
    assert live.chunks is not None
    return live.chunks.token_number(live.done)


class Server:
    """The HTTP front. `app()` gives the aiohttp application; the engine runs while it does."""

    def __init__(self, spec: EngineSpec) -> None:
        self.engine = Engine(spec)
        self.model = spec.model.name
        self.metrics = _Metrics(self.model, self.engine.max_model_len)
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count(1)
        self._tag = os.urandom(6).hex()
        self._work: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None  # the engine; it ends only by a defect

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        for name, endpoint in ENDPOINTS.items():
            answer = self._generate if endpoint.generates else self._compute
            app.router.add_post(endpoint.path, partial(answer, endpoint=name))
        app.cleanup_ctx.append(self._running)
        return app

    async def _running(self, app: web.Application) -> Any:
        self._work = asyncio.Event()
        alarm = _Alarm(asyncio.get_running_loop())
        self.task = asyncio.create_task(self._run(alarm, self._work))
        yield
        alarm.close()
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    # ---------------------------------------------------------------------------------- engine

    async def _run(self, alarm: _Alarm, work: asyncio.Event) -> None:
        """Steps the engine for ever, each step due when the model says the one before it ended."""
        due_s = time.monotonic()
        while True:
            step = self.engine.step(with_ids=True)
            self.metrics.observe_step(step, self.engine)
            if step is None:
                work.clear()
                await work.wait()
                due_s = time.monotonic()
                continue
            start_s, due_s = due_s, due_s + step.duration_s
            for request_id in step.admitted:
                if live := self._live.get(request_id):
                    live.admitted_s = max(start_s, live.sent_s)
            await alarm.until(due_s)
            now_s = time.monotonic()
            self._emit(step, now_s)
            self.metrics.lag_s_max = max(self.metrics.lag_s_max, now_s - due_s)
            if now_s - due_s > 1.0:
                due_s = now_s  # hopeless: a burst that catches up would measure nothing

    def _emit(self, step: Step, now_s: float) -> None:
        """Hands every stream its token. This is the hot path: about one write a token."""
        live_by_id = self._live
        gap_s, usual = 0.0, 0
        finished = set(step.finished)
        for request_id in step.tokens:
            live = live_by_id.get(request_id)
            if live is None:
                continue
            live.done += 1
            gap_s = now_s - live.last_s
            live.last_s = now_s
            usual += 1
            if request_id in finished:
                continue
            if (transport := live.transport) is not None:
                transport.write(live.token or _token_number(live))
        metrics = self.metrics
        if usual:
            metrics.itl.observe(gap_s, usual)  # those who decode all got their last one together
        for request_id in (*step.first, *step.resumed):
            if live := live_by_id.get(request_id):
                self._give_after_prefill(live, now_s, request_id in finished)
        for request_id in step.finished:
            if live := live_by_id.pop(request_id, None):
                self._finish(live)
        metrics.generation_tokens += usual
        metrics.step_tokens.observe(step.decoded + step.prefilled)

    def _give_after_prefill(self, live: _Live, now_s: float, is_last: bool) -> None:
        live.done += 1
        self.metrics.generation_tokens += live.ask.generates
        if live.done == 1:
            live.first_s = now_s
            self.metrics.prompt_tokens += live.ask.prompt_tokens
            if live.ask.generates:
                self.metrics.ttft.observe(now_s - live.sent_s)
        else:
            self.metrics.itl.observe(now_s - live.last_s)
        live.last_s = now_s
        if live.transport is not None and live.chunks is not None and not is_last:
            chunks = live.chunks
            first = chunks.first if live.done == 1 else chunks.token_number(live.done)
            live.transport.write(first)

    def _finish(self, live: _Live) -> None:
        ask, metrics = live.ask, self.metrics
        if live.transport is not None and live.chunks is not None:
            live.transport.write(live.chunks.last(live.done))
        _wake(live.gone)
        metrics.finished[ask.finish_reason] += 1
        metrics.e2e.observe(live.last_s - live.sent_s)
        metrics.queue.observe(live.admitted_s - live.sent_s)
        metrics.prefill.observe(live.first_s - live.admitted_s)
        metrics.decode.observe(live.last_s - live.first_s)
        metrics.inference.observe(live.last_s - live.admitted_s)
        metrics.request_prompt.observe(ask.prompt_tokens)
        metrics.request_output.observe(live.done if ask.generates else 0)
        if live.done > 1:
            metrics.tpot.observe((live.last_s - live.first_s) / (live.done - 1))

    # ---------------------------------------------------------------------------------- routes

    async def _generate(self, request: web.Request, endpoint: str) -> web.StreamResponse:
        sent_s = time.monotonic()
        try:
            body = await _body(request)
            ask = understand(body, endpoint, self.model, self.engine.max_model_len)
        except Refused as refused:
            return refused.response()
        live = self._begin(ask, sent_s)
        reply_id = f"{ID_PREFIXES[endpoint]}{self._tag}-{live.id}"
        reply = await self._open_stream(request, live, reply_id) if ask.stream else None
        await self._run_through([live])
        return reply if reply is not None else json_reply(whole_reply(ask, reply_id))

    async def _compute(self, request: web.Request, endpoint: str) -> web.StreamResponse:
        """Embeddings and scores: prompts are computed, and nothing is generated."""
        sent_s = time.monotonic()
        longest = self.engine.max_model_len
        try:
            body = await _body(request)
            check_model(body, self.model)
            reranks = endpoint == "rerank"
            counts = count_pairs(body) if reranks else count_prompts(body.get("input"), "input")
            if max(counts) > longest:
                raise too_long(max(counts), longest)
        except Refused as refused:
            return refused.response()
        asks = [prefill(endpoint, self.model, max(1, count)) for count in counts]
        await self._run_through([self._begin(ask, sent_s) for ask in asks])
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        head = {"model": self.model, "usage": usage}
        if reranks:
            return json_reply({**head, "results": scores(body)})
        vector = msgspec.Raw(b"[" + b",".join([b"0.0"] * self.engine.spec.model.hidden) + b"]")
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index in range(len(counts))
        ]
        return json_reply({"object": "list", **head, "data": data})

    def _begin(self, ask: Ask, sent_s: float) -> _Live:
        return _Live(next(self._ids), ask, asyncio.get_running_loop().create_future(), sent_s)

    async def _run_through(self, lives: list[_Live]) -> None:
        """Gives the sequences of one request to the engine, and waits until it is done."""
        for live in lives:
            self._live[live.id] = live
            room = self.engine.max_model_len - live.ask.output_tokens
            self.engine.submit(live.id, min(live.ask.prompt_tokens, room), live.ask.output_tokens)
        assert self._work is not None
        self._work.set()
        try:
            for live in lives:
                await live.gone
        except asyncio.CancelledError:  # the client has gone
            for live in lives:
                if self._live.pop(live.id, None) is not None:
                    self.engine.abort(live.id)
                    self.metrics.finished["abort"] += 1
            raise

    async def _open_stream(
        self, request: web.Request, live: _Live, reply_id: str
    ) -> web.StreamResponse:
        """Sends the headers and makes ready to write past aiohttp, straight to the transport."""
        reply = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", **SIMULATED}
        )
        chunked = request.version >= (1, 1)
        if chunked:
            reply.enable_chunked_encoding()
        await reply.prepare(request)
        make = ResponseEvents if live.ask.endpoint == "responses" else Chunks
        live.chunks = make(live.ask, reply_id, chunked)
        live.token = live.chunks.token
        live.transport = request.transport
        return reply

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(headers=SIMULATED)

    async def _version(self, request: web.Request) -> web.Response:
        return json_reply({"version": f"servefit-sim {__version__}"})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.page(self.engine),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", **SIMULATED},
        )

    async def _models(self, request: web.Request) -> web.Response:
        card = {
            "id": self.model,
            "object": "model",
            "created": int(self.metrics.started_s),
            "owned_by": "servefit-sim",
            "root": self.engine.spec.model.hf_id or self.model,
            "parent": None,
            "max_model_len": self.engine.max_model_len,
        }
        return json_reply({"object": "list", "data": [card]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        try:
            body = await _body(request)
            if not isinstance(body, dict):
                raise Refused(400, "Input should be a valid dictionary")
            if "messages" in body:
                count = count_messages(body["messages"])
                tokens = list(range(count))
            else:
                tokens = token_ids(str(body.get("prompt", "")), self.engine.spec.model.vocab)
                count = len(tokens)
        except Refused as refused:
            return refused.response()
        longest = self.engine.max_model_len
        return json_reply(
            {"count": count, "max_model_len": longest, "tokens": tokens, "token_strs": None}
        )


async def _body(request: web.Request) -> Any:
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise Refused(413, "the request's body is too large") from error
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise Refused(400, f"JSON decode error: {error}") from error


# --------------------------------------------------------------------------------------------- main


async def serve(spec: EngineSpec, host: str, port: int, exit_with_parent: bool) -> None:
    """Serves until SIGTERM, SIGINT or, if asked to, the end of stdin. Raises OSError."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(spec)
    runner = web.AppRunner(
        server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5
    )
    await runner.setup()
    assert server.task is not None
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
        bound_port = runner.addresses[0][1]
        print(f"ready http://{f'[{host}]' if ':' in host else host}:{bound_port}", flush=True)
        if exit_with_parent:
            threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()
        # A collection of everything that was loaded would be seen as a late step.
        gc.collect()
        gc.freeze()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, server.task}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
    finally:
        await runner.cleanup()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """A parent holds our stdin open for as long as it lives, and can no longer after that."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)


def _run(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not on this system; slower, and otherwise the same
        asyncio.run(main)
    else:
        uvloop.run(main)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadgen.targets.sim", description="A simulated inference server."
    )
    parser.add_argument("spec", nargs="?", default=DEMO_SPEC, help="sim:GPU/MODEL[?key=value&…]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="exit when stdin reaches its end"
    )
    options = parser.parse_args(argv)
    try:
        if not 0 <= options.port < 65536:
            raise UsageError(f"--port must be from 0 to 65535, not {options.port}")
        spec = parse_spec(options.spec)
        limits.allow_files(FILES_WANTED)
        _run(serve(spec, options.host, options.port, options.exit_with_parent))
    except ServefitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"error: cannot listen on {options.host}:{options.port}: {error.strerror}",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
