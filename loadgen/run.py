"""One level: holds the streams (closed loop) or keeps the schedule (open loop), and records.

A worker is a function of its plan, its requests and a start to a recording that can be merged. It
works in callbacks of the event loop: a coroutine that wakes later would add its own delay.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from time import monotonic_ns, process_time

from loadgen.client import Connection, Dialer, Exchange, connect_error_kind
from loadgen.level import Plan
from loadgen.recorder import Recorder, Recording

LOOP_LAG_INTERVAL_S = 0.01
Done = Callable[[Connection, Exchange], None]

RAMP_S_PER_STREAM = 0.005
RAMP_S_MAX = 2.0
CONNECTS_AT_ONCE = 64
RETRY_S = (0.05, 1.0)  # pause after a failed connect: first, and at most
IDLE_S_MAX = 3.0  # servers close idle connections after 5 s or more (uvicorn): not while we send
SPARE_CONNECTIONS = 8


class Wires:
    """Requests whose bytes exist before their turn: a few are always ready."""

    def __init__(self, source: Iterator[bytes], ahead: int) -> None:
        self._source = source
        self._ready = deque(next(source) for _ in range(ahead))

    def take(self) -> bytes:
        return self._ready.popleft() if self._ready else next(self._source)

    def refill(self) -> None:
        """Called after a request went out, when its answer is still far away."""
        self._ready.append(next(self._source))


class Level:
    """What both loops share: counting, ending, giving up, watching the client itself."""

    def __init__(self, plan: Plan, dial: Dialer, wires: Wires) -> None:
        self.plan = plan
        self.recorder = Recorder()
        self.gave_up: str | None = None
        self.in_flight = 0
        self._dial = dial
        self._wires = wires
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._issued = 0
        self._warmup_left = plan.warmup_requests
        self._stopping = False
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures_in_a_row = 0  # of kinds that mean: nobody is there
        self._start_ns = 0

    # ------------------------------------------------------------------------------ one request

    def _exchange(self, due_ns: int) -> Exchange:
        index = self._issued
        self._issued += 1
        return Exchange(index, due_ns, warmup=self._takes_warmup(due_ns))

    def _takes_warmup(self, due_ns: int) -> bool:
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return True
        return due_ns < self._start_ns + int(self.plan.warmup_s * 1e9)

    def _send(self, connection: Connection, exchange: Exchange, data: bytes) -> None:
        self.in_flight += 1
        connection.start(exchange, data, self.plan.timeout_s, stream=self.plan.stream)
        self._wires.refill()

    def _record(self, exchange: Exchange) -> None:
        self.recorder.add(exchange)
        if exchange.error in ("connect", "timeout"):
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= max(20, 2 * int(self.plan.concurrency or 1)):
                self.give_up(f"{self._failures_in_a_row} requests in a row ended with "
                             f"'{exchange.error}': {exchange.error_text}")  # fmt: skip
        elif exchange.error is None:
            self._failures_in_a_row = 0

    def _fail_unsent(self, exchange: Exchange, kind: str, text: str) -> None:
        exchange.error = kind
        exchange.error_text = text
        exchange.end_ns = monotonic_ns()
        self._record(exchange)

    # --------------------------------------------------------------------------------- the ends

    def stop(self) -> None:
        """No further request; what is in flight is cancelled and kept as far as it came."""
        self._stopping = True
        if not self.recorder.refill_end_ns:
            self.recorder.refill_end_ns = monotonic_ns()
        for connection in list(self._connections):
            connection.cancel()
        self._ended.set()

    def give_up(self, why: str) -> None:
        if self.gave_up is None:
            self.gave_up = why
            self.stop()

    def _exhausted(self, now_ns: int) -> bool:
        if self._stopping:
            return True
        plan = self.plan
        if plan.requests is not None:
            return self._issued >= plan.requests + plan.warmup_requests
        duration_ns = int((plan.warmup_s + (plan.duration_s or 0)) * 1e9)
        return now_ns >= self._start_ns + duration_ns

    # ---------------------------------------------------------------------------------- running

    async def run(self) -> Recording:
        """Runs the level until its plan is done, or until `stop` or `give_up`."""
        await self._open()
        gc.collect()
        gc.disable()  # between token events; what a level keeps is arrays, not cycles
        watch = self._loop.create_task(self._watch_loop())
        self._cpu0, self._wall0 = process_time(), monotonic_ns()
        try:
            self._start_ns = monotonic_ns()
            self._begin()
            await self._ended.wait()
        finally:
            watch.cancel()
            gc.enable()
            self._close()
        return self.recorder.freeze(
            cpu_s=process_time() - self._cpu0, wall_s=(monotonic_ns() - self._wall0) / 1e9
        )

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.close()

    async def _watch_loop(self) -> None:
        """How late a timer of the event loop fires: what every other callback suffers too."""
        due_ns = monotonic_ns()
        step_ns = int(LOOP_LAG_INTERVAL_S * 1e9)
        while True:
            due_ns += step_ns
            await asyncio.sleep(max(0.0, (due_ns - monotonic_ns()) / 1e9))
            now_ns = monotonic_ns()
            self.recorder.loop_lag_ns.append(max(0, now_ns - due_ns))
            if now_ns - due_ns > step_ns:
                due_ns = now_ns

    def _later(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, done: Done) -> tuple[Connection | None, str, str]:
        """A new connection, or None with the kind and the text of what stopped it."""
        try:
            connection = await self._dial(done)
        except (OSError, TimeoutError) as error:
            return None, connect_error_kind(error), str(error) or "no answer to the connect"
        self._connections.add(connection)
        return connection, "", ""

    def _drop(self, connection: Connection | None) -> None:
        if connection is not None:
            self._connections.discard(connection)
            connection.close()

    async def _open(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        raise NotImplementedError


class ClosedLoop(Level):
    """A fixed number of streams: a slot sends its next request when its last reply has ended."""

    async def _open(self) -> None:
        n = int(self.plan.concurrency or 1)
        self._slots = [_Slot(self) for _ in range(n)]
        self._started = 0
        self._retired = 0
        gate = asyncio.Semaphore(CONNECTS_AT_ONCE)
        await asyncio.gather(*(slot.open(gate) for slot in self._slots))

    def _begin(self) -> None:
        n = len(self._slots)
        step_s = min(RAMP_S_PER_STREAM, RAMP_S_MAX / n)
        for i, slot in enumerate(self._slots):
            self._loop.call_later(i * step_s, slot.proceed)

    def slot_started(self, now_ns: int) -> None:
        """A slot sent its first request after the warm-up; the last to do so ends the ramp."""
        self._started += 1
        if self._started == len(self._slots):
            self.recorder.ramp_end_ns = now_ns

    def slot_retired(self, now_ns: int) -> None:
        if not self.recorder.refill_end_ns:
            self.recorder.refill_end_ns = now_ns
        self._retired += 1
        if self._retired == len(self._slots):
            self._ended.set()


class _Slot:
    """One stream of a closed loop, with a connection of its own."""

    def __init__(self, level: ClosedLoop) -> None:
        self._level = level
        self._connection: Connection | None = None
        self._measured = False
        self._retry_s = RETRY_S[0]

    async def open(self, gate: asyncio.Semaphore) -> None:
        """Connects before the level starts; a failure here is met again at the first request."""
        async with gate:
            self._connection, _, _ = await self._level._connect(self._done)

    def proceed(self, due_ns: int = 0) -> None:
        """Sends the slot's next request, or retires the slot."""
        level = self._level
        due_ns = due_ns or monotonic_ns()
        if level._exhausted(due_ns):
            level.slot_retired(due_ns)
        elif self._connection is not None and self._connection.usable:
            self._send(self._connection, level._exchange(due_ns))
        else:
            level._drop(self._connection)
            level._later(self._reconnect(level._exchange(due_ns)))

    def _send(self, connection: Connection, exchange: Exchange) -> None:
        level = self._level
        if not (self._measured or exchange.warmup):
            self._measured = True
            level.slot_started(monotonic_ns())
        level._send(connection, exchange, level._wires.take())

    async def _reconnect(self, exchange: Exchange) -> None:
        level = self._level
        began_ns = monotonic_ns()
        self._connection, kind, text = await level._connect(self._done)
        if level._stopping:
            level._fail_unsent(exchange, "cancelled", "")
        elif self._connection is None:
            level._fail_unsent(exchange, kind, text)
            level._loop.call_later(self._retry_s, self.proceed)
            self._retry_s = min(2 * self._retry_s, RETRY_S[1])
        else:
            self._retry_s = RETRY_S[0]
            exchange.connect_ns = monotonic_ns() - began_ns
            self._send(self._connection, exchange)

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        level = self._level
        level.in_flight -= 1
        level._record(exchange)
        self.proceed(exchange.end_ns)


class OpenLoop(Level):
    """A schedule of instants: requests go out when they are due, whatever the server does."""

    def __init__(self, plan: Plan, dial: Dialer, wires: Wires, arrivals: Iterator[float]) -> None:
        super().__init__(plan, dial, wires)
        self._arrivals = arrivals
        self._free: list[Connection] = []
        self._opening = 0
        self._outstanding = 0
        self._over = False

    async def _open(self) -> None:
        spare = min(256, SPARE_CONNECTIONS + int(self.plan.load))
        await asyncio.gather(*(self._open_spare() for _ in range(spare)))

    async def _open_spare(self) -> None:
        self._opening += 1
        connection, _, _ = await self._connect(self._done)
        self._opening -= 1
        if connection is not None:
            self._free.append(connection)

    def _begin(self) -> None:
        self._next_ns = self._start_ns + int(next(self._arrivals) * 1e9)
        self._tick()

    def _tick(self) -> None:
        if self._stopping:
            return
        now_ns = monotonic_ns()
        while self._next_ns <= now_ns:
            if self._exhausted(self._next_ns):
                break
            self._issue(self._next_ns)
            self.recorder.refill_end_ns = self._next_ns
            self._next_ns = self._start_ns + int(next(self._arrivals) * 1e9)
        if self._exhausted(self._next_ns):
            self._over = True
            self._maybe_end()
        else:
            self._loop.call_later(max(0.0, (self._next_ns - now_ns) / 1e9), self._tick)

    def _issue(self, due_ns: int) -> None:
        exchange = self._exchange(due_ns)
        if not exchange.warmup and not self.recorder.ramp_end_ns:
            self.recorder.ramp_end_ns = due_ns
        self._outstanding += 1
        data = self._wires.take()
        connection = self._take()
        if connection is not None:
            self._send(connection, exchange, data)
        else:
            self._later(self._connect_and_send(exchange, data))
        if len(self._free) + self._opening < SPARE_CONNECTIONS:
            self._later(self._open_spare())

    def _take(self) -> Connection | None:
        fresh_ns = monotonic_ns() - int(IDLE_S_MAX * 1e9)
        while self._free:
            connection = self._free.pop()  # the last used: the others may idle out
            if connection.usable and connection.idle_since_ns >= fresh_ns:
                return connection
            self._drop(connection)
        return None

    async def _connect_and_send(self, exchange: Exchange, data: bytes) -> None:
        began_ns = monotonic_ns()
        connection, kind, text = await self._connect(self._done)
        if connection is None or self._stopping:
            self._outstanding -= 1
            self._fail_unsent(exchange, *(("cancelled", "") if self._stopping else (kind, text)))
            self._maybe_end()
            return
        exchange.connect_ns = monotonic_ns() - began_ns
        self._send(connection, exchange, data)

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        self.in_flight -= 1
        self._outstanding -= 1
        self._record(exchange)
        if connection.usable:
            self._free.append(connection)
        else:
            self._drop(connection)
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self._over and self._outstanding == 0:
            self._ended.set()
