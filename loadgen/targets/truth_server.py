"""The server of known timing where there is no C compiler: `truth.c` in Python.

The same addresses, bytes and summary. It is late by its event loop's timers (1 ms) and by its own
work (some 30 µs a token), and says by how much: `own_lag_ms`. A token's instant is when the system
call that wrote it returned, so what it says it did is as true as the other's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import sys
import threading
from array import array
from contextlib import suppress
from random import Random
from time import monotonic_ns
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import httptools
import msgspec
import numpy as np
from numpy.typing import NDArray

STALL_EVERY_NS, STALL_NS = 1_000_000_000, 300_000_000
PLATEAU = 0.98  # of the most streams ever: all streams are busy
BACKLOG = 65535

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_MODELS = {
    "object": "list",
    "data": [{"id": "truth", "object": "model", "created": 1700000000, "owned_by": "truth",
              "max_model_len": 131072}],
}  # fmt: skip


class Log:
    """What was really done, in columns; a request is a row, and so is a token."""

    def __init__(self) -> None:
        self.epoch = 0  # a reset forgets the requests that are still running
        self.clear()

    def clear(self) -> None:
        self.epoch += 1
        self.read_ns = array("q")
        self.first_ns = array("q")  # 0: none yet
        self.last_ns = array("q")
        self.end_ns = array("q")
        self.streamed = array("b")
        self.finished = array("b")
        self.token_ns = array("q")
        self.token_request = array("q")
        self.token_late_ns = array("q")
        self.first_any_ns = 0
        self.first_generation_ns = 0
        self.blocked_writes = 0
        self.cpu_before_s = _cpu_s()

    def begin(self, ns: int, streamed: bool) -> int:
        for column, value in (
            (self.read_ns, ns), (self.first_ns, 0), (self.last_ns, 0), (self.end_ns, 0),
            (self.streamed, streamed), (self.finished, False),
        ):  # fmt: skip
            column.append(value)
        self.first_generation_ns = self.first_generation_ns or ns
        return len(self.read_ns) - 1

    def token(self, request: int, ns: int, due_ns: int) -> None:
        self.token_ns.append(ns)
        self.token_request.append(request)
        self.token_late_ns.append(max(0, ns - due_ns))
        self.first_ns[request] = self.first_ns[request] or ns
        self.last_ns[request] = ns

    def end(self, request: int, ns: int, finished: bool) -> None:
        self.end_ns[request] = ns
        self.finished[request] = finished


class Timing(msgspec.Struct, frozen=True):
    """What was asked of the server; means, each drawn evenly from ± `jitter` of it."""

    ttft_ns: float
    itl_ns: float
    jitter: float
    seed: int
    stall: bool
    begin_ns: int

    def drawn(self, rng: Random, mean_ns: float) -> int:
        return int(mean_ns * (1 + self.jitter * (2 * rng.random() - 1)))

    def stall_left(self, ns: int) -> int:
        """0: not in a stall; else how long it goes on."""
        phase = (ns - self.begin_ns) % STALL_EVERY_NS
        return STALL_NS - phase if self.stall and phase < STALL_NS else 0


class Connection(asyncio.Protocol):
    """One client; one request at a time."""

    def __init__(self, timing: Timing, log: Log) -> None:
        self._timing = timing
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._request = -1  # −1: none

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(monotonic_ns(), finished=False)

    def data_received(self, data: bytes) -> None:
        self._read_ns = monotonic_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_message_begin(self) -> None:
        self._body = bytearray()

    def on_url(self, url: bytes) -> None:
        self._target = url.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        parts = urlsplit(self._target)
        if parts.path == "/truth":
            query = parse_qs(parts.query)
            skip, rate = (float(query.get(name, ["0"])[0]) for name in ("skip", "rate"))
            self._reply(summary(self._log, int(skip), rate))
        elif parts.path == "/reset":
            self._log.clear()
            self._reply({})
        else:
            self._answer(parts.path)

    def _answer(self, path: str) -> None:
        self._log.first_any_ns = self._log.first_any_ns or self._read_ns
        if self._parser.get_method() == b"POST" and path.endswith("/completions"):
            self._begin(path.endswith("/chat/completions"))
        elif path.endswith("/models"):
            self._reply(_MODELS)
        elif path.endswith("/health"):
            self._reply({})
        else:
            self._reply({"error": {"message": "not here"}}, "404 Not Found")

    def _reply(self, value: Any, status: str = "200 OK") -> None:
        body = msgspec.json.encode(value)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        self._put(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def _put(self, data: bytes) -> None:
        """At once: the transport would keep it to the end of the loop's turn."""
        if self._transport.get_write_buffer_size() == 0:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # a broken connection shows at the next read
        if data and not self._transport.is_closing():
            self._log.blocked_writes += 1
            self._transport.write(data)

    # ------------------------------------------------------------------------------ one request

    def _begin(self, chat: bool) -> None:
        try:
            asked = msgspec.json.decode(bytes(self._body))
        except ValueError:
            asked = {}
        self._chat = chat
        self._stream = bool(asked.get("stream"))
        self._usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        self._tokens = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 16)
        self._prompt_tokens = _prompt_tokens(asked)
        self._written = 0
        self._epoch = self._log.epoch
        self._request = self._log.begin(self._read_ns, self._stream)
        # The request's own, so that request i has the same timing in every run.
        self._rng = Random(self._timing.seed * 1_000_003 + self._request)
        self._make_chunks()
        wait_ns = self._timing.drawn(self._rng, self._timing.ttft_ns)
        if self._stream:
            self._put(_HEAD)
        else:
            gaps = range(1, self._tokens)
            wait_ns += sum(self._timing.drawn(self._rng, self._timing.itl_ns) for _ in gaps)
        self._wait(self._read_ns + wait_ns)

    def _wait(self, due_ns: int) -> None:
        self._due_ns = due_ns
        left_s = max(0, due_ns - monotonic_ns()) / 1e9
        self._timer = self._loop.call_later(left_s, self._fire)

    def _fire(self) -> None:
        """What is due: a token, or the whole of a reply that is not streamed."""
        if left_ns := self._timing.stall_left(monotonic_ns()):
            self._timer = self._loop.call_later(left_ns / 1e9, self._fire)
            return
        self._put(self._next_token() if self._stream else self._whole())
        ns = monotonic_ns()
        for _ in range(1 if self._stream else self._tokens):
            self._written += 1
            if self._epoch == self._log.epoch:
                self._log.token(self._request, ns, self._due_ns)
        if self._written == self._tokens:
            self._end(ns, finished=True)
            return
        # From when the token was due, so that the pace is the one asked for; but after a long
        # hold-up nothing is caught up in a burst.
        earliest = max(self._due_ns, ns - int(self._timing.itl_ns))
        self._wait(earliest + self._timing.drawn(self._rng, self._timing.itl_ns))

    def _end(self, ns: int, *, finished: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._request >= 0 and self._epoch == self._log.epoch:
            self._log.end(self._request, ns, finished)
        self._request = -1

    # -------------------------------------------------------------------------------- the bytes

    def _make_chunks(self) -> None:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._base = {
            "id": f"cmpl-{self._request:016x}", "object": kind, "created": 1700000000,
            "model": "truth",
        }  # fmt: skip
        self._token = _frame({**self._base, "choices": [self._choice(None)]})

    def _choice(self, finish: str | None) -> dict[str, Any]:
        said = {"delta": {"content": " water"}} if self._chat else {"text": " water"}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def _next_token(self) -> bytes:
        """The role comes with the first token, usage and [DONE] with the last, as vLLM does it."""
        is_last = self._written + 1 == self._tokens
        data = self._token
        if is_last:
            data = _frame({**self._base, "choices": [self._choice("length")]})
        if self._written == 0 and self._chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            data = _frame({**self._base, "choices": [role]}) + data
        if is_last:
            usage = {**self._base, "choices": [], "usage": self._usage_of_it()}
            data += (_frame(usage) if self._usage else b"") + _framed(b"[DONE]") + b"0\r\n\r\n"
        return data

    def _usage_of_it(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
            "completion_tokens": self._tokens,
        }

    def _whole(self) -> bytes:
        words = " water" * self._tokens
        said: dict[str, Any] = {"text": words}
        if self._chat:
            said = {"message": {"role": "assistant", "content": words}}
        choice = {"index": 0, **said, "finish_reason": "length"}
        value = {**self._base, "choices": [choice], "usage": self._usage_of_it()}
        body = msgspec.json.encode(value)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return head.encode() + b"\r\n\r\n" + body


def _frame(value: Any) -> bytes:
    return _framed(msgspec.json.encode(value))


def _framed(data: bytes) -> bytes:
    """One event, in an HTTP chunk of its own."""
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


def _prompt_tokens(asked: dict[str, Any]) -> int:
    """A word a token; token ids are counted as they are."""
    messages = asked.get("messages")
    prompt = messages[0].get("content") if messages else asked.get("prompt")
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt or ())


# ------------------------------------------------------------------------------------ the summary


def summary(log: Log, skip: int, rate: float) -> dict[str, Any]:
    """What `truth.c` says, under the same names: times in ms, rates per second.

    `skip`: the first requests are left out. `rate`: what was asked of an open loop of constant
    gaps, 0 for none.
    """
    used_s = _cpu_s() - log.cpu_before_s  # before the summary uses any
    told: dict[str, Any] = {
        "requests": max(0, len(log.read_ns) - skip),
        "blocked_writes": log.blocked_writes,
        "first_request_ns": log.first_any_ns,
        "first_generation_ns": log.first_generation_ns,
        "cpu_s": used_s,
    }
    return told | _figures(log, skip, rate) if told["requests"] else told


def _figures(log: Log, skip: int, rate: float) -> dict[str, Any]:
    # Copies: an array that numpy looks into cannot grow.
    read, first, last, end = (
        np.array(column, dtype=np.int64)[skip:]
        for column in (log.read_ns, log.first_ns, log.last_ns, log.end_ns)
    )
    streamed, finished = (
        np.array(column, dtype=bool)[skip:] for column in (log.streamed, log.finished)
    )
    ended = np.where(end > 0, end, monotonic_ns())
    low, high, most = _busy(read, ended, plateau=rate == 0)
    inside = (read >= low) & (read <= high)
    span_ns = int(read[-1] - read[0])
    held_ns = np.clip(np.minimum(ended, high) - np.maximum(read, low), 0, None).sum()
    told: dict[str, Any] = {
        "finished": int(finished.sum()),
        "streams_max": most,
        "streams_mean": float(held_ns / (high - low)) if high > low else 0.0,
        "window_s": (high - low) / 1e9,
        "requests_per_s": (read.size - 1) * 1e9 / span_ns if span_ns else 0.0,
        "ttft_ms": _stats((first - read)[inside & streamed & (first > 0)]),
        "reply_ms": _stats((last - read)[inside & finished]),
        **_tokens(log, skip, low, high, inside & streamed),
    }
    if rate > 0:
        off_ns = read - read[0] - np.arange(read.size) * (1e9 / rate)
        told["late_ms"] = _stats(off_ns - min(0.0, off_ns.min()))
    return told


def _busy(
    read: NDArray[np.int64], ended: NDArray[np.int64], *, plateau: bool
) -> tuple[int, int, int]:
    """(from, to, most streams): when all streams were busy, else all there is.

    Closed loop: from when nearly as many as ever were in flight to the last request's arrival.
    Shorter than twice the mean reply it is mostly the ramp, and an open loop has no plateau.
    """
    ends = np.sort(ended)
    streams = np.arange(1, read.size + 1) - np.searchsorted(ends, read, side="right")
    most = int(streams.max())
    low, high = int(read[np.argmax(streams >= PLATEAU * most)]), int(read[-1])
    if plateau and high - low >= 2 * float((ended - read).mean()):
        return low, high, most
    return int(read[0]), int(ends[-1]), most


def _tokens(log: Log, skip: int, low: int, high: int, counted: NDArray[np.bool_]) -> dict[str, Any]:
    ns = np.array(log.token_ns, dtype=np.int64)
    request = np.array(log.token_request, dtype=np.int64) - skip
    proper = request >= 0
    ns, request = ns[proper], request[proper]
    order = np.argsort(request, kind="stable")  # the tokens of a request behind one another
    same = np.diff(request[order]) == 0
    gaps = np.diff(ns[order])[same & counted[request[order][1:]]]
    in_window = int(((ns >= low) & (ns <= high)).sum())
    return {
        "tokens": int(ns.size),
        "tokens_per_s": in_window * 1e9 / (high - low) if high > low else 0.0,
        "itl_ms": _stats(gaps),
        "own_lag_ms": _stats(np.array(log.token_late_ns, dtype=np.int64)),
    }


def _stats(ns: NDArray[Any]) -> dict[str, float] | None:
    if ns.size == 0:
        return None
    p50, p95, p99 = (float(q) / 1e6 for q in np.quantile(ns, (0.5, 0.95, 0.99)))
    mean, most = float(ns.mean()) / 1e6, float(ns.max()) / 1e6
    return {"mean": mean, "p50": p50, "p95": p95, "p99": p99, "max": most, "n": int(ns.size)}


def _cpu_s() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


# ----------------------------------------------------------------------------------------- main


async def serve(timing: Timing, port: int) -> None:
    """Serves until stdin ends: a parent holds it open for as long as it lives."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    log = Log()
    server = await loop.create_server(
        lambda: Connection(timing, log), "127.0.0.1", port, backlog=BACKLOG
    )

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    print(f"ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    threading.Thread(target=watch_stdin, daemon=True).start()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would be late tokens; what is kept is columns, not cycles
    await stop.wait()
    server.close()


def main(argv: list[str] | None = None) -> int:
    import uvloop

    parser = argparse.ArgumentParser(prog="loadgen.targets.truth_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--itl-ms", type=float, default=10.0)
    parser.add_argument("--jitter", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stall", action="store_true")
    given = parser.parse_args(argv)
    timing = Timing(
        given.ttft_ms * 1e6, given.itl_ms * 1e6, given.jitter, given.seed, given.stall,
        monotonic_ns(),
    )  # fmt: skip
    with suppress(ValueError, OSError):  # macOS says "unlimited" and means something else
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(timing, given.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
