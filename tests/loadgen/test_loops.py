"""Both loops against a real loopback server: streams held, schedules kept, ends that end."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from itertools import count, islice, pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import uvloop

from loadgen import arrival, loops
from loadgen.client import Connection, Dialer, Exchange, parse_url, request_head, wire
from loadgen.level import Plan, steady_window, summarise
from loadgen.loops import ClosedLoop, OpenLoop, Wires
from loadgen.loops import Request as Ready
from loadgen.recorder import CANCELLED, OK, Recording
from tests.loadgen.scripted import (
    CLOSE,
    DONE,
    END,
    HANG,
    RESET,
    Request,
    Script,
    Server,
    chunk,
    delta,
    head,
    serving,
    stream,
    usage_chunk,
    whole,
)

# Says that it closes, and does.
CLOSING: Script = [0.02, head("200 OK", "Connection: close"), *stream(2)[2:], CLOSE]

Play = Callable[[Coroutine[Any, Any, Any]], Any]
Runner = ClosedLoop | OpenLoop


@pytest.fixture(params=["uvloop", "asyncio"])
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    """Runs a coroutine on the loop that the program uses, and on the standard one."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


def wires(server: Server, ahead: int = 4) -> Wires:
    top = request_head(parse_url(server.url), "/v1/chat/completions", {})
    return Wires((Ready(i, wire(top, b"%d" % i)) for i in count()), ahead)


def dialer(server: Server) -> Dialer:
    return Dialer(parse_url(server.url), None, 2.0)


def closed(server: Server, concurrency: int, **plan: Any) -> ClosedLoop:
    made = Plan("concurrency", concurrency=concurrency, **plan)
    return ClosedLoop(made, dialer(server), wires(server))


def opened(server: Server, rate: float, kind: str = "constant", **plan: Any) -> OpenLoop:
    made = Plan("rate", rate_rps=rate, arrival=kind, **plan)
    return OpenLoop(
        made, dialer(server), wires(server), arrival.instants(kind, rate, Random("seed"))
    )


def numbers(server: Server) -> list[int]:
    """Which requests reached the server: their bodies are their places in the order of issue."""
    return [int(request.body) for request in server.requests]


def kinds(rec: Recording) -> Counter[str]:
    return Counter(
        "ok" if outcome == OK else rec.error_kinds[error]
        for outcome, error in zip(rec.outcome, rec.error, strict=True)
    )


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.005)


# ---------------------------------------------------------------------------------- closed loop


def test_a_closed_loop_holds_its_streams_and_sends_its_requests(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(4, gap_s=0.01, first_s=0.01)) as server:
            rec = await closed(server, 5, requests=40).run()
            assert server.busy_max == 5
            assert server.connections == 5  # one warm connection a slot
            assert sorted(numbers(server)) == list(range(40))
            assert kinds(rec) == {"ok": 40}
            assert sorted(rec.index) == list(range(40))
            assert rec.chunks.tolist() == [4] * 40
            assert (rec.due_ns <= rec.sent_ns).all()
            assert (rec.sent_ns < rec.end_ns).all()
            assert rec.cpu_s > 0
            assert rec.wall_s > 0.3
            assert rec.loop_lag_ns.size >= 5

    play(main())


THOUGHT, ANSWER = chunk(delta(reasoning_content="r")), chunk(delta(content="x"))
END_OF = [chunk(delta("stop")), chunk(DONE) + END]


@pytest.mark.parametrize("counts", [True, False])
def test_reasoning_is_counted_and_timed_apart_as_far_as_the_level(counts: bool, play: Play) -> None:
    """40 ms of thought before the answer: in TTFO, not in TTFT."""
    told = [chunk(usage_chunk(7, 8, 5))] if counts else []
    script: Script = [
        head(), 0.02, THOUGHT, 0.02, THOUGHT, 0.02, ANSWER, 0.01, ANSWER, *told, *END_OF,
    ]  # fmt: skip

    async def main() -> None:
        async with serving(script) as server:
            runner = closed(server, 2, requests=8)
            level = summarise(await runner.run(), runner.plan, started_at="")
        assert level.requests is not None
        assert level.requests.ok == 8
        assert level.tokens is not None
        expected = (64, 40) if counts else (32, 16)
        assert (level.tokens.output, level.tokens.reasoning) == expected
        # The server's own timers are a millisecond coarse.
        assert 19 <= (level.ttft_ms.p50 or 0) < 40
        thought_ms = (level.ttfo_ms.p50 or 0) - (level.ttft_ms.p50 or 0)
        assert 38 <= thought_ms < 60
        assert level.itl_ms.n == 3 * level.ttft_ms.n > 0

    play(main())


def test_slots_start_one_after_the_other_and_the_last_ends_the_ramp(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(3, gap_s=0.05, first_s=0.1)) as server:
            rec = await closed(server, 8, requests=32).run()
            first = np.sort(rec.sent_ns)[:8]
            # Steps of 5 ms; timers are a millisecond coarse.
            assert first[-1] - first[0] >= 7 * 5e6 - 2e6
            assert (np.diff(first) > 0).all()
            assert rec.ramp_end_ns == first[-1]
            # The window begins with the last slot's first request.
            window = steady_window(rec)
            assert window.steady
            assert window.start_ns == first[-1]
            # It ends with the first reply after which nothing was sent.
            ends = np.sort(rec.end_ns)
            assert rec.refill_end_ns == ends[32 - 8]

    play(main())


def test_a_slots_next_request_is_due_when_its_reply_has_ended(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(2, gap_s=0.01)) as server:
            rec = await closed(server, 1, requests=5).run()
            assert rec.due_ns[1:].tolist() == rec.end_ns[:-1].tolist()

    play(main())


def test_the_warm_up_is_flagged_and_not_counted_against_the_requests(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(2, gap_s=0.005)) as server:
            rec = await closed(server, 3, requests=12, warmup_requests=6).run()
            assert len(server.requests) == 18
            assert rec.warmup.sum() == 6
            assert set(rec.index[rec.warmup == 1]) == set(range(6))
            proper = rec.warmup == 0
            assert rec.ramp_end_ns > rec.sent_ns[proper].min() - 1
            assert rec.ramp_end_ns in rec.sent_ns[proper]
            level = summarise(rec, Plan("concurrency", concurrency=3), started_at="")
            assert level.requests is not None
            assert level.requests.ok == 12

    play(main())


def test_a_warm_up_by_time_takes_nothing_from_the_requests(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(1, first_s=0.02)) as server:
            rec = await closed(server, 2, requests=6, warmup_s=0.15).run()
            assert (rec.warmup == 0).sum() == 6
            warm = rec.due_ns[rec.warmup == 1]
            assert warm.size >= 2
            assert warm.max() < rec.due_ns[rec.warmup == 0].min()

    play(main())


@pytest.mark.parametrize("warmup_requests", [0, 4])
def test_a_level_of_a_duration_ends_and_drains(play: Play, warmup_requests: int) -> None:
    async def main() -> None:
        async with serving(stream(3, gap_s=0.02)) as server:
            level = closed(server, 4, duration_s=0.4, warmup_requests=warmup_requests)
            rec = await level.run()
            assert kinds(rec) == {"ok": len(server.requests)}  # what was sent was waited for
            proper = rec.warmup == 0
            began = rec.due_ns[proper].min()
            assert (rec.due_ns[proper] < began + 0.4e9).all()
            assert rec.end_ns.max() >= began + 0.38e9  # the duration is of the level proper
            assert rec.refill_end_ns >= began + 0.38e9
            assert (rec.warmup == 1).sum() == warmup_requests

    play(main())


def test_fewer_requests_than_slots(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(2)) as server:
            rec = await closed(server, 6, requests=2).run()
            assert kinds(rec) == {"ok": 2}
            assert not steady_window(rec).steady

    play(main())


def test_stop_keeps_what_came_and_cancels_the_rest(play: Play) -> None:
    async def main() -> None:
        def script(request: Request) -> Script:
            return stream(2) if request.number < 6 else [*stream(3)[:6], HANG]

        async with serving(script) as server:
            level = closed(server, 3, requests=1000)
            running = asyncio.create_task(level.run())
            await until(lambda: len(server.requests) == 9 and server.stuck.is_set())
            await asyncio.sleep(0.05)
            assert level.in_flight == 3
            level.stop()
            rec = await running
            assert kinds(rec) == {"ok": 6, "cancelled": 3}
            assert rec.chunks[rec.outcome == CANCELLED].tolist() == [2, 2, 2]
            assert level.in_flight == 0
            assert level.gave_up is None
            assert rec.refill_end_ns > 0
            await asyncio.sleep(0.1)
            assert len(server.requests) == 9  # nothing came after
            level.stop()  # and once more does nothing

    play(main())


def test_a_level_that_is_cancelled_leaves_nothing_behind(play: Play) -> None:
    async def main() -> None:
        async with serving([HANG]) as server:
            level = closed(server, 4, requests=100)
            running = asyncio.create_task(level.run())
            await until(lambda: len(server.requests) == 4)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert gc.isenabled()
            await asyncio.sleep(0.15)
            assert server.connections == 4  # nobody dialled again
            assert len(server.requests) == 4

    play(main())


def test_stop_while_the_connections_are_being_opened(play: Play) -> None:
    async def main() -> None:
        async with serving([HANG]) as server:
            level = closed(server, 2, requests=10)
            dialled = asyncio.Event()

            async def never(_: object) -> Connection:
                dialled.set()
                await asyncio.Event().wait()
                raise AssertionError

            level._dial = never  # type: ignore[assignment]
            running = asyncio.create_task(level.run())
            await dialled.wait()
            level.stop()
            rec = await asyncio.wait_for(running, 2)
            assert rec.n == 0

    play(main())


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_stop_records_requests_that_wait_for_a_connection(play: Play, mode: str) -> None:
    """None is lost: each index that was issued is in the recording once."""

    async def main() -> None:
        async with serving([HANG]) as server:
            level: Runner = (
                closed(server, 3, requests=10)
                if mode == "closed"
                else opened(server, 200, requests=10)
            )

            async def never(_: object) -> Connection:
                await asyncio.Event().wait()
                raise AssertionError

            async def nothing() -> None:
                level._dial = never  # type: ignore[assignment]
                if isinstance(level, ClosedLoop):
                    level._slots = [loops._Slot(level) for _ in range(3)]
                    level._started = level._retired = 0

            level._open = nothing  # type: ignore[method-assign]
            running = asyncio.create_task(level.run())
            await until(lambda: len(level._unsent) >= 3)
            issued = level._proper
            level.stop()
            rec = await asyncio.wait_for(running, 2)
            assert sorted(rec.index) == list(range(issued))
            assert kinds(rec) == {"cancelled": issued}

    play(main())


def test_it_reconnects_to_a_server_that_closes_after_each_reply(play: Play) -> None:
    async def main() -> None:
        async with serving(CLOSING) as server:
            rec = await closed(server, 2, requests=10).run()
            assert kinds(rec) == {"ok": 10}
            assert len(server.requests) == 10
            assert (rec.connect_ns > 0).sum() == 8  # the first two were warm
            level = summarise(rec, Plan("concurrency", concurrency=2), started_at="")
            assert level.connect_ms.n == 8

    play(main())


def test_a_server_that_closes_without_saying_so_is_met_again(play: Play) -> None:
    """What was already on its way to it is lost and counted, and nothing hangs."""

    async def main() -> None:
        async with serving([*stream(2), CLOSE]) as server:
            rec = await closed(server, 2, requests=12).run()
            seen = kinds(rec)
            assert rec.n == 12
            assert set(seen) <= {"ok", "reset"}
            assert seen["ok"] == len(server.requests) >= 6

    play(main())


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_a_connection_that_its_server_closes_serves_one_request(play: Play, mode: str) -> None:
    """llama.cpp ends a connection after a streamed reply, and nothing of the reply tells."""

    async def main() -> None:
        async with serving([*stream(2), CLOSE]) as server:
            dial = Dialer(parse_url(server.url), None, 2.0, keep_alive=False)
            level: Runner = closed(server, 2, requests=10)
            if mode == "open":
                level = opened(server, 100, requests=10)
            level._dial = dial
            rec = await level.run()
            assert kinds(rec) == {"ok": 10}
            assert len(server.requests) == 10
            assert max(request.on_connection for request in server.requests) == 0

    play(main())


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "IDLE_S_MAX", 0.0)

    async def main() -> None:
        async with serving(stream(1)) as server:
            rec = await closed(server, 1, requests=3).run()
            assert kinds(rec) == {"ok": 3}
            assert server.connections == 4  # one more was opened before the level

    play(main())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_server_that_resets_is_counted_and_not_hammered(
    play: Play, monkeypatch: pytest.MonkeyPatch, *, at_once: bool
) -> None:
    async def main() -> None:
        script: Script = [RESET] if at_once else [*stream(5)[:5], RESET]
        async with serving(script) as server:
            rec = await closed(server, 2, requests=8).run()
            assert kinds(rec) == {"reset": 8}
            assert len(server.requests) == 8
            paused = np.diff(np.sort(rec.due_ns)).max()
            assert (paused >= 0.04e9) == at_once

    if not at_once:
        monkeypatch.setattr(loops, "RETRY_S", (30.0, 30.0))  # would not end in time
    play(main())


def test_failed_replies_are_data_and_their_connections_go_on(play: Play) -> None:
    async def main() -> None:
        busy = whole("503 Busy", b'{"error":"busy"}', "Retry-After: 1")
        async with serving(lambda r: [busy] if r.number % 2 else stream(2)) as server:
            rec = await closed(server, 1, requests=10).run()
            assert kinds(rec) == {"ok": 5, "http_503": 5}
            assert rec.error_texts == {"http_503": "busy (Retry-After: 1)"}
            assert server.connections == 1
            assert len(server.requests) == 10  # never asked again

    play(main())


def test_timeouts_free_their_slots(play: Play) -> None:
    async def main() -> None:
        async with serving(lambda r: [HANG] if r.number < 2 else stream(1)) as server:
            rec = await closed(server, 2, requests=6, timeout_s=0.15).run()
            assert kinds(rec) == {"ok": 4, "timeout": 2}

    play(main())


def test_a_level_that_is_finished_early_lets_its_replies_end(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(5, gap_s=0.02)) as server:
            level = closed(server, 4, duration_s=60)
            running = asyncio.create_task(level.run())
            await until(lambda: level.recorder.ok >= 20)
            under_way = level.arrived - level.recorder.tokens
            assert 0 < under_way <= 4 * 5  # of the replies that have not ended yet
            sent = level.recorder.ok + level.in_flight  # some of it may not have been read yet
            level.finish()
            rec = await asyncio.wait_for(running, 5)
            assert len(server.requests) == sent
            assert kinds(rec) == {"ok": sent}
            assert level.arrived == 5 * sent
            # The window ends as that of a plan does: with the first slot that was not refilled.
            assert rec.refill_end_ns == np.sort(rec.end_ns)[-4]
            assert steady_window(rec).steady

    play(main())


def test_a_schedule_that_is_finished_early_ends_with_its_last_reply(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(3, gap_s=0.03)) as server:
            level = opened(server, 50, duration_s=60)
            running = asyncio.create_task(level.run())
            await until(lambda: level.recorder.ok >= 20)
            level.finish()
            rec = await asyncio.wait_for(running, 5)
            assert set(kinds(rec)) == {"ok"}
            assert rec.refill_end_ns == rec.due_ns.max()

    play(main())


def test_it_gives_up_when_the_server_has_gone(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(loops, "GIVE_UP_REQUESTS", 4)
    monkeypatch.setattr(loops, "RETRY_S", (0.02, 0.05))

    async def main() -> None:
        async with serving(stream(3, gap_s=0.01)) as server:
            level = closed(server, 2, duration_s=60)
            running = asyncio.create_task(level.run())
            await until(lambda: len(server.requests) >= 6)
            await server.stop()
            rec = await asyncio.wait_for(running, 20)
            assert level.gave_up is not None
            assert "in a row" in level.gave_up
            assert "connect" in level.gave_up
            seen = kinds(rec)
            assert seen["ok"] >= 4
            assert seen["connect"] >= 4
            # Every request that was issued is accounted for.
            assert sorted(rec.index) == list(range(rec.n))

    play(main())


def test_a_server_that_comes_back_is_not_given_up(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "RETRY_S", (0.02, 0.05))

    async def main() -> None:
        async with serving(stream(2)) as server:
            level = closed(server, 1, duration_s=1.0)
            running = asyncio.create_task(level.run())
            await until(lambda: len(server.requests) >= 2)
            await server.stop()
            before = len(server.requests)
            await asyncio.sleep(0.3)
            await server.start()
            rec = await running
            assert level.gave_up is None
            assert len(server.requests) > before
            assert kinds(rec)["connect"] >= 2

    play(main())


async def test_a_defect_in_a_task_ends_the_level_and_is_raised() -> None:
    async with serving(CLOSING) as server:
        level = closed(server, 1, requests=5)
        dial = level._dial

        async def once(done: Callable[[Connection, Exchange], None]) -> Connection:
            level._dial = broken  # type: ignore[assignment]
            return await dial(done)

        async def broken(_: object) -> Connection:
            raise ZeroDivisionError

        level._dial = once  # type: ignore[assignment]
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(level.run(), 5)


# ------------------------------------------------------------------------------------ open loop


def schedule(kind: str, rate: float, n: int) -> list[int]:
    return [int(at * 1e9) for at in islice(arrival.instants(kind, rate, Random("seed")), n)]


@pytest.mark.parametrize("kind", ["constant", "poisson"])
def test_an_open_loop_keeps_its_schedule_while_the_server_stalls(play: Play, kind: str) -> None:
    """The server holds every answer back until 0.5 s have gone by since the first request."""

    async def main() -> None:
        began: list[float] = []

        def script(request: Request) -> Script:
            began.append(time.monotonic())
            return stream(2, first_s=max(0.0, began[0] + 0.5 - began[-1]))

        async with serving(script) as server:
            level = opened(server, 100, kind, requests=40)
            rec = await level.run()
            assert kinds(rec) == {"ok": 40}
            order = np.argsort(rec.index)
            due = rec.due_ns[order]
            assert (due - level._start_ns).tolist() == schedule(kind, 100, 40)
            assert (rec.sent_ns >= rec.due_ns).all()
            assert server.busy_max > 10  # it did not wait for answers
            assert rec.refill_end_ns == due[-1]
            assert rec.ramp_end_ns == level._start_ns  # there is no warm-up
            figures = summarise(rec, level.plan, started_at="")
            # What waited longest saw nearly the whole stall, and from due it cannot be less.
            assert figures.ttft_ms.max is not None
            assert figures.ttft_from_due_ms.max is not None
            assert figures.ttft_ms.max >= 200
            assert figures.ttft_from_due_ms.max >= figures.ttft_ms.max

    play(main())


async def test_lateness_of_the_client_is_recorded_and_nothing_is_dropped() -> None:
    def script(request: Request) -> Script:
        if request.number == 10:
            time.sleep(0.1)  # the client lives on the same loop
        return stream(1)

    async with serving(script) as server:
        level = opened(server, 100, requests=30)
        rec = await level.run()
        assert kinds(rec) == {"ok": 30}
        assert (np.sort(rec.due_ns) - level._start_ns).tolist() == schedule("constant", 100, 30)
        lag_ms = (rec.sent_ns - rec.due_ns) / 1e6
        assert lag_ms.max() >= 50
        figures = summarise(rec, level.plan, started_at="")
        assert figures.measurement is not None
        assert not figures.measurement.valid
        assert any("send_lag" in reason for reason in figures.measurement.reasons)
        assert rec.loop_lag_ns.max() >= 50e6


def test_the_same_seed_gives_the_same_instants(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(1)) as server:
            runs = []
            for _ in range(2):
                level = opened(server, 300, "poisson", requests=30)
                rec = await level.run()
                runs.append((np.sort(rec.due_ns) - level._start_ns).tolist())
            assert runs[0] == runs[1]
            assert all(a < b for a, b in pairwise(runs[0]))

    play(main())


@pytest.mark.parametrize(
    ("plan", "warm", "proper"),
    [
        ({"requests": 20}, 0, 20),
        ({"requests": 20, "warmup_requests": 5}, 5, 20),
        ({"requests": 10, "warmup_s": 0.1}, 10, 10),
        ({"duration_s": 0.2}, 0, 20),
        ({"duration_s": 0.2, "warmup_s": 0.1}, 10, 20),
        ({"duration_s": 0.2, "warmup_requests": 5}, 5, 20),
    ],
)
def test_how_many_requests_an_open_loop_sends(
    play: Play, plan: dict[str, Any], warm: int, proper: int
) -> None:
    async def main() -> None:
        async with serving(stream(1)) as server:
            level = opened(server, 100, **plan)
            rec = await level.run()
            assert ((rec.warmup == 1).sum(), (rec.warmup == 0).sum()) == (warm, proper)
            warm_due = rec.due_ns[rec.warmup == 1]
            began = level._start_ns + int(plan.get("warmup_s", 0) * 1e9)
            if plan.get("warmup_requests"):
                began = warm_due.max()
            assert rec.ramp_end_ns == began
            assert began <= rec.due_ns[rec.warmup == 0].min()
            assert rec.refill_end_ns == rec.due_ns.max()
            assert len(server.requests) == warm + proper

    play(main())


def test_an_open_loop_drains(play: Play) -> None:
    async def main() -> None:
        async with serving(stream(2, gap_s=0.3)) as server:
            rec = await opened(server, 100, duration_s=0.1).run()
            assert kinds(rec) == {"ok": 10}
            assert server.busy_max == 10

    play(main())


def test_an_open_loop_over_a_server_that_closes_each_connection(play: Play) -> None:
    async def main() -> None:
        async with serving(CLOSING) as server:
            rec = await opened(server, 200, requests=60).run()
            assert kinds(rec) == {"ok": 60}
            assert len(server.requests) == 60
            figures = summarise(rec, Plan("rate", rate_rps=200), started_at="")
            assert figures.measurement is not None
            # Not 1: the last arrivals may be late on a busy machine.
            assert (figures.measurement.achieved_over_offered or 0) > 0.5

    play(main())


def test_an_open_loop_gives_up_when_nobody_is_there(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "GIVE_UP_S", 0.1)

    async def main() -> None:
        async with serving(stream(1)) as server:
            level = opened(server, 100, duration_s=60)
            running = asyncio.create_task(level.run())
            await until(lambda: len(server.requests) >= 5)
            await server.stop()
            rec = await asyncio.wait_for(running, 20)
            assert level.gave_up is not None
            assert "'connect'" in level.gave_up
            assert sorted(rec.index) == list(range(rec.n))
            figures = summarise(rec, level.plan, started_at="")
            assert figures.measurement is not None
            # The server was the limit, and is named: the client kept its schedule.
            assert not figures.measurement.valid
            assert any(reason.startswith("errors") for reason in figures.measurement.reasons)

    play(main())


async def test_stop_ends_an_open_loop() -> None:
    async with serving([HANG]) as server:
        level = opened(server, 100, duration_s=60)
        running = asyncio.create_task(level.run())
        await until(lambda: len(server.requests) >= 10)
        level.stop()
        rec = await asyncio.wait_for(running, 5)
        assert set(kinds(rec)) == {"cancelled"}
        assert sorted(rec.index) == list(range(rec.n))


# ------------------------------------------------------------------------------------ the wires


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_wires_come_in_order_however_far_ahead_they_are_made(ahead: int) -> None:
    made = Wires((Ready(i, b"") for i in count()), ahead)
    taken = []
    for i in range(12):
        taken.append(made.take().index)
        if i % 3:
            made.refill()
    assert taken == list(range(12))


async def test_index_and_bytes_belong_together_even_where_connections_fail() -> None:
    """The bytes carry the trace id of their index: a request never sent must not shift the rest."""
    async with serving(CLOSING) as server:
        level = closed(server, 1, requests=6)
        dial, calls = level._dial, count()

        async def flaky(done: Callable[[Connection, Exchange], None]) -> Connection:
            if next(calls) in (1, 3):
                raise ConnectionRefusedError
            return await dial(done)

        level._dial = flaky  # type: ignore[assignment]
        rec = await level.run()
        sent = sorted(rec.index[rec.outcome == OK])
        assert kinds(rec) == {"ok": 4, "connect": 2}
        assert sorted(numbers(server)) == sent
