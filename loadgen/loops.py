"""One level: holds the streams (closed loop) or keeps the schedule (open loop), and records.

A worker is a function of its plan, its requests and a start to a recording that can be merged. It
works in callbacks of the event loop: a coroutine that wakes later would add its own delay.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from itertools import islice
from time import monotonic_ns, process_time

from loadgen.client import Connection, Dialer, Exchange, connect_error_kind
from loadgen.level import Plan
from loadgen.recorder import Count, Recorder, Recording

LOOP_LAG_INTERVAL_S = 0.01
Done = Callable[[Connection, Exchange], None]

RAMP_S_PER_STREAM = 0.005
RAMP_S_MAX = 2.0
CONNECTS_AT_ONCE = 32  # before a level: a full listen queue costs a second (SYN sent again)
RETRY_S = (0.05, 1.0)  # pause after a failed connect: first, and at most
# Nobody is there: so many requests in a row (and two of every stream's) that met no server at all,
# over a time that a restart behind a balancer does not take.
NOBODY = ("connect", "tls", "timeout")
GIVE_UP_REQUESTS = 10
GIVE_UP_S = 2.0
TIMER_S = 0.001
IDLE_S_MAX = 3.0  # servers close idle connections after 5 s or more (uvicorn): not while we send
SPARE_CONNECTIONS = 8


class Request:
    """One request, ready to be sent."""

    __slots__ = ("data", "follow", "index", "prompt_tokens")

    def __init__(
        self,
        index: int,
        data: bytes,
        prompt_tokens: int = -1,
        follow: Callable[[str], Request | None] | None = None,
    ) -> None:
        """`prompt_tokens`: as counted here, −1 where nobody did. `follow`: of a conversation, the
        next turn for a reply's text, or None at its end."""
        self.index = index
        self.data = data
        self.prompt_tokens = prompt_tokens
        self.follow = follow


class Wires:
    """Requests whose bytes exist before their turn: a few are always ready."""

    def __init__(self, source: Iterator[Request], ahead: int, count: Count | None = None) -> None:
        """`source` has no end. `count`: tokens of a reply, where the server does not say them."""
        self.count = count
        self._source = source
        self._ready = deque(islice(source, ahead))

    def take(self) -> Request:
        return self._ready.popleft() if self._ready else next(self._source)

    def refill(self) -> None:
        """Called after a request went out, when its answer is still far away."""
        self._ready.append(next(self._source))


class Level:
    """What both loops share: counting, ending, giving up, watching the client itself."""

    def __init__(self, plan: Plan, dial: Dialer, wires: Wires) -> None:
        self.plan = plan
        self.recorder = Recorder(wires.count)
        self.gave_up: str | None = None
        self.in_flight = 0
        self._dial = dial
        self._wires = wires
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._warmup_left = plan.part_of(plan.warmup_requests)
        self._quota = None if plan.requests is None else plan.part_of(plan.requests)
        self._proper = 0  # issued after the warm-up
        self._proper_ns = 0  # when the first of them was due
        self._stopping = False
        self._finishing = False
        self._crash: BaseException | None = None  # a defect of ours, met in a task
        self._connections: set[Connection] = set()
        self._unsent: set[Exchange] = set()  # issued, and most of them waiting for a connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures_in_a_row = 0  # that mean: nobody is there
        self._failing_since_ns = 0
        self._start_ns = 0

    # ------------------------------------------------------------------------------ one request

    def _issue_next(self, due_ns: int, turn: Request | None = None) -> tuple[Exchange, bytes]:
        """The next request, or the next turn of a conversation: its record, and its bytes."""
        warmup = self._takes_warmup(due_ns)
        if not warmup:
            self._proper += 1
            self._proper_ns = self._proper_ns or due_ns
        request = turn or self._wires.take()
        exchange = Exchange(request.index, due_ns, warmup=warmup)
        exchange.counted_here = request.prompt_tokens
        exchange.follow = request.follow
        if self._wires.count is not None or request.follow is not None:
            exchange.texts = []
        self._unsent.add(exchange)
        return exchange, request.data

    def _turn_after(self, exchange: Exchange) -> Request | None:
        """What the user of a conversation says next; nothing after a reply that failed."""
        if exchange.follow is None or exchange.error is not None:
            return None
        turn: Request | None = exchange.follow("".join(exchange.texts or ()))
        return turn

    def _takes_warmup(self, due_ns: int) -> bool:
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return True
        warmup_s = self.plan.warmup_s  # none: a timer that fires early must not make one
        return warmup_s > 0 and due_ns < self._start_ns + int(warmup_s * 1e9)

    def _send(self, connection: Connection, exchange: Exchange, data: bytes) -> None:
        self._unsent.discard(exchange)
        self.in_flight += 1
        connection.start(exchange, data, self.plan.timeout_s, stream=self.plan.stream)
        self._wires.refill()

    async def _connect_and_send(
        self, exchange: Exchange, data: bytes, done: Done
    ) -> Connection | None:
        """Sends over a connection of its own; where there is none the request has failed."""
        began_ns = monotonic_ns()
        connection, kind, text = await self._connect(done)
        if exchange not in self._unsent:  # stopped meanwhile
            return connection
        if connection is None:
            self._fail_unsent(exchange, kind, text)
            return None
        exchange.connect_ns = monotonic_ns() - began_ns
        self._send(connection, exchange, data)
        return connection

    def _fail_unsent(self, exchange: Exchange, kind: str, text: str) -> None:
        self._unsent.discard(exchange)
        exchange.error = kind
        exchange.error_text = text
        exchange.end_ns = monotonic_ns()
        self._record(exchange)
        self._wires.refill()

    def _record(self, exchange: Exchange) -> None:
        self.recorder.add(exchange)
        if exchange.error is None or exchange.status:
            self._failures_in_a_row = 0
        elif exchange.error in NOBODY:
            self._count_nobody(exchange)

    def _count_nobody(self, exchange: Exchange) -> None:
        if not self._failures_in_a_row:
            self._failing_since_ns = exchange.due_ns
        self._failures_in_a_row += 1
        enough = max(GIVE_UP_REQUESTS, 2 * int(self.plan.concurrency or 1))
        lasted_s = (exchange.end_ns - self._failing_since_ns) / 1e9
        if self._failures_in_a_row >= enough and lasted_s >= GIVE_UP_S:
            self.give_up(
                f"{self._failures_in_a_row} requests in a row, over {lasted_s:.0f} s, ended with "
                f"'{exchange.error}': {exchange.error_text}"
            )

    # --------------------------------------------------------------------------------- the ends

    def stop(self) -> None:
        """No further request; what is in flight is cancelled and kept as far as it came."""
        self._stopping = True
        if not self.recorder.refill_end_ns:
            self.recorder.refill_end_ns = monotonic_ns()
        for connection in list(self._connections):
            connection.cancel()
        for exchange in list(self._unsent):
            self._fail_unsent(exchange, "cancelled", "")
        self._ended.set()

    def finish(self) -> None:
        """No further request is due: the level ends as its plan would, with the last reply."""
        self._finishing = True

    @property
    def arrived(self) -> int:
        """Tokens so far, those of replies still under way (a chunk is one there) included."""
        return self.recorder.tokens + sum(c.arrived for c in self._connections)

    def give_up(self, why: str) -> None:
        if self.gave_up is None:
            self.gave_up = why
            self.stop()

    def _exhausted(self, now_ns: int) -> bool:
        if self._stopping or self._finishing:
            return True
        plan = self.plan
        if self._quota is not None:
            return self._proper >= self._quota
        if self._warmup_left:
            return False
        began_ns = self._start_ns + int(plan.warmup_s * 1e9)
        if plan.warmup_requests:
            began_ns = max(began_ns, self._proper_ns or now_ns)
        return now_ns >= began_ns + int((plan.duration_s or 0) * 1e9)

    # ---------------------------------------------------------------------------------- running

    async def run(self, start: Callable[[], Awaitable[int]] | None = None) -> Recording:
        """Runs the level until its plan is done, or until `stop` or `give_up`.

        `start`: asked once the connections are open, gives the instant to begin at, in ns of the
        monotonic clock, so that several workers begin together.
        """
        watch: asyncio.Task[None] | None = None
        try:
            await self._open_unless_stopped()
            gc.collect()
            gc.disable()  # between token events; what a level keeps is arrays, not cycles
            start_ns = await start() if start is not None else 0
            watch = self._loop.create_task(self._watch_loop())
            cpu_s, wall_ns = process_time(), monotonic_ns()
            if not self._stopping:
                self._start_ns = max(start_ns, wall_ns)
                self._begin()
                await self._ended.wait()
        finally:
            self._stopping = True  # nothing that ends from here on begins anew
            gc.enable()
            if watch is not None:
                watch.cancel()
            self._close()
        if self._crash is not None:
            raise self._crash
        return self.recorder.freeze(
            cpu_s=process_time() - cpu_s, wall_s=(monotonic_ns() - wall_ns) / 1e9
        )

    async def _open_unless_stopped(self) -> None:
        opening = self._loop.create_task(self._open())
        ended = self._loop.create_task(self._ended.wait())
        try:
            await asyncio.wait((opening, ended), return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
        finally:
            opening.cancel()
            ended.cancel()

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
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash = error  # or the level would wait for ever for what the task was to do
            self._ended.set()

    async def _connect(self, done: Done) -> tuple[Connection | None, str, str]:
        """A new connection, or None with the kind and the text of what stopped it."""
        try:
            connection = await self._dial(done)
        except (OSError, TimeoutError) as error:
            return None, connect_error_kind(error), str(error) or "no answer to the connect"
        self._connections.add(connection)
        return connection, "", ""

    async def _gathered(self, openings: Iterable[Coroutine[None, None, None]]) -> None:
        gate = asyncio.Semaphore(CONNECTS_AT_ONCE)

        async def gated(opening: Coroutine[None, None, None]) -> None:
            async with gate:
                await opening

        await asyncio.gather(*map(gated, openings))

    def _drop(self, connection: Connection | None) -> None:
        if connection is not None:
            self._connections.discard(connection)
            connection.close()

    async def _open(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        raise NotImplementedError


def _fresh(connection: Connection) -> bool:
    """Can be used, and was not idle for so long that its server may be about to close it."""
    idle_ns = monotonic_ns() - connection.idle_since_ns
    return connection.usable and idle_ns <= IDLE_S_MAX * 1e9


class ClosedLoop(Level):
    """A fixed number of streams: a slot sends its next request when its last reply has ended."""

    async def _open(self) -> None:
        self._slots = [_Slot(self) for _ in self.plan.slots()]
        self._started = 0
        self._retired = 0
        await self._gathered(slot.open() for slot in self._slots)

    def _begin(self) -> None:
        n = int(self.plan.concurrency or 1)
        step_s = max(min(RAMP_S_PER_STREAM, RAMP_S_MAX / n), self.plan.ramp_s / n)
        lead_s = (self._start_ns - monotonic_ns()) / 1e9
        for i, slot in zip(self.plan.slots(), self._slots, strict=True):
            due_ns = self._start_ns + int(i * step_s * 1e9)
            self._loop.call_later(max(0.0, lead_s + i * step_s), slot.proceed, due_ns)

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

    async def open(self) -> None:
        """Connects before the level starts; a failure here is met again at the first request."""
        self._connection, _, _ = await self._level._connect(self._done)

    def proceed(self, due_ns: int, turn: Request | None = None) -> None:
        """Sends the slot's next request, or retires the slot."""
        level = self._level
        due_ns = min(due_ns, monotonic_ns())  # a timer may fire a moment early
        if level._exhausted(due_ns):
            level.slot_retired(due_ns)
            return
        exchange, data = level._issue_next(due_ns, turn)
        if self._connection is not None and _fresh(self._connection):
            level._send(self._connection, exchange, data)
            self._sent(exchange)
        else:
            level._drop(self._connection)
            level._later(self._reconnect(exchange, data))

    async def _reconnect(self, exchange: Exchange, data: bytes) -> None:
        self._connection = await self._level._connect_and_send(exchange, data, self._done)
        if self._connection is None:
            self._pause()
        else:
            self._sent(exchange)

    def _sent(self, exchange: Exchange) -> None:
        if not (self._measured or exchange.warmup):
            self._measured = True
            self._level.slot_started(exchange.sent_ns or monotonic_ns())

    def _pause(self) -> None:
        """A server that takes no connection is not asked for one again at once."""
        level = self._level
        level._loop.call_later(self._retry_s, lambda: self.proceed(monotonic_ns()))
        self._retry_s = min(2 * self._retry_s, RETRY_S[1])

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        level = self._level
        level.in_flight -= 1
        level._record(exchange)
        if exchange.error == "reset" and exchange.connect_ns and not exchange.status:
            self._pause()
            return
        self._retry_s = RETRY_S[0]
        turn = level._turn_after(exchange)
        think_s = level.plan.think_s if turn is not None else 0.0
        if think_s:
            due_ns = exchange.end_ns + int(think_s * 1e9)
            level._loop.call_later(think_s, self.proceed, due_ns, turn)
        else:
            self.proceed(exchange.end_ns, turn)


class OpenLoop(Level):
    """A schedule of instants: requests go out when they are due, whatever the server does."""

    def __init__(self, plan: Plan, dial: Dialer, wires: Wires, arrivals: Iterator[float]) -> None:
        """`arrivals`: instants of the whole level in s after its start; ours are taken of them."""
        super().__init__(plan, dial, wires)
        self._arrivals = islice(arrivals, plan.part, None, plan.processes)
        self._next_ns: int | None = None  # None: no arrival is left
        self._thinking = 0  # conversations whose user has not said the next thing yet
        self._free: list[Connection] = []
        self._opening = 0
        self._outstanding = 0
        self._over = False
        self._warm_until_ns = 0  # when the last request of the warm-up was due

    async def _open(self) -> None:
        spare = min(256, SPARE_CONNECTIONS + int(self.plan.load))
        await self._gathered(self._open_spare() for _ in range(spare))

    async def _open_spare(self) -> None:
        self._opening += 1
        connection, _, _ = await self._connect(self._done)
        self._opening -= 1
        if connection is not None:
            self._free.append(connection)

    def _begin(self) -> None:
        self._advance()
        self._tick()

    def _advance(self) -> None:
        at_s = next(self._arrivals, None)
        self._next_ns = None if at_s is None else self._start_ns + int(at_s * 1e9)

    def _tick(self) -> None:
        if self._stopping:
            return
        now_ns = monotonic_ns()
        while self._next_ns is not None and self._next_ns <= now_ns:
            if self._exhausted(self._next_ns):
                break
            self._issue(self._next_ns)
            self._advance()
        if self._next_ns is None or self._exhausted(self._next_ns):
            self._over = True
            self._maybe_end()
        else:
            # uvloop's timers are of whole milliseconds: a shorter wait would spin on a whole core.
            wait_s = max(TIMER_S, (self._next_ns - now_ns) / 1e9)
            self._loop.call_later(wait_s, self._tick)

    def _issue(self, due_ns: int, turn: Request | None = None) -> None:
        exchange, data = self._issue_next(due_ns, turn)
        self.recorder.refill_end_ns = max(self.recorder.refill_end_ns, due_ns)
        if exchange.warmup:
            self._warm_until_ns = due_ns
        elif not self.recorder.ramp_end_ns:
            # Not from the first arrival on: n arrivals over n - 1 gaps are more than was offered.
            timed_ns = self._start_ns + int(self.plan.warmup_s * 1e9)
            self.recorder.ramp_end_ns = max(timed_ns, self._warm_until_ns)
        self._outstanding += 1
        connection = self._take()
        if connection is not None:
            self._send(connection, exchange, data)
        else:
            self._later(self._send_over_new(exchange, data))
        if len(self._free) + self._opening < SPARE_CONNECTIONS:
            self._later(self._open_spare())

    def _take(self) -> Connection | None:
        while self._free:
            connection = self._free.pop()  # the last used: the others may idle out
            if _fresh(connection):
                return connection
            self._drop(connection)
        return None

    async def _send_over_new(self, exchange: Exchange, data: bytes) -> None:
        if await self._connect_and_send(exchange, data, self._done) is None:
            self._outstanding -= 1
            self._maybe_end()

    def _done(self, connection: Connection, exchange: Exchange) -> None:
        self.in_flight -= 1
        self._outstanding -= 1
        self._record(exchange)
        if connection.usable:
            self._free.append(connection)
        else:
            self._drop(connection)
        turn = self._turn_after(exchange)
        if turn is not None:
            think_s = self.plan.think_s
            self._thinking += 1
            self._loop.call_later(think_s, self._say, exchange.end_ns + int(think_s * 1e9), turn)
        self._maybe_end()

    def _say(self, due_ns: int, turn: Request) -> None:
        """The next turn of a conversation, where the level has not ended meanwhile."""
        self._thinking -= 1
        if not self._exhausted(due_ns):
            self._issue(due_ns, turn)
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self._over and self._outstanding == 0 and self._thinking == 0:
            self._ended.set()
