"""A source from its sampler to the store: what it keeps, what it says, and after whose death."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.history import History
from agent.minutes import Minutes
from agent.model import Reading
from agent.recall import Recall
from agent.samplers import SamplerError
from agent.sources import AWAY_SAMPLES, Group, Source, joules

TOTAL = "output_tokens_total"


class Counter:
    """A server that counts, on a monotonic clock that the test moves."""

    name = "server"

    def __init__(self) -> None:
        self.at_ns = time.monotonic_ns()
        self.total = 100.0
        self.labels: tuple[tuple[str, str], ...] = ()
        self.fails = ""
        self.closed = False

    async def sample(self) -> Sequence[Reading]:
        if self.fails:
            raise SamplerError(self.fails)
        return [
            Reading(self.at_ns, TOTAL, self.total),
            Reading(self.at_ns, "requests_running", 3.0, self.labels),
        ]

    async def close(self) -> None:
        self.closed = True

    def later(self, seconds: float, tokens: float) -> None:
        self.at_ns += int(seconds * 1e9)
        self.total += tokens


async def live(source: Source, server: Counter, turns: int = 20) -> None:
    """So many samples, 5 s and 50 tokens from one to the next."""
    for _ in range(turns):
        await source.turn()
        server.later(5, 50)


def total_of(path: Path) -> float:
    with Recall(path) as recall:
        minutes = list(recall.minutes("chat", 0, 2**33))
    return sum(v.increase or 0 for m in minutes for v in m.values if v.name == TOTAL)


async def test_an_agent_that_died_is_gone_on_from_without_loss(tmp_path: Path) -> None:
    """The second agent knows nothing but the store, as after a kill -9."""
    path, server = tmp_path / "agent.db", Counter()
    with History(path) as history:
        first = Source("chat", server, 5.0, history)
        await live(first, server)
        assert history.flush()
    with History(path) as history:
        second = Source("chat", server, 5.0, history)
        second.go_on()
        await live(second, server)
        await second.close()
        assert history.flush()
        current = second.minutes.current()
    assert current is not None
    (rest,) = (v.increase or 0 for v in current.values if v.name == TOTAL)
    assert total_of(path) + rest == pytest.approx(39 * 50)
    assert server.closed


async def test_a_clean_stop_goes_on_inside_the_minute(tmp_path: Path) -> None:
    path, server = tmp_path / "agent.db", Counter()
    with History(path) as history:
        first = Source("chat", server, 5.0, history)
        await first.turn()
        server.later(5, 50)
        await first.turn()
        await first.close()
    with History(path) as history:
        second = Source("chat", server, 5.0, history)
        second.go_on()
        assert second.minutes.newest_unix_s == first.minutes.newest_unix_s is not None
        server.later(5, 50)
        await second.turn()
        current = second.minutes.current()
        assert history.flush()  # a minute may have ended on the way
        finished = total_of(path)
    assert current is not None
    (rest,) = (v.increase or 0 for v in current.values if v.name == TOTAL)
    assert finished + rest == pytest.approx(100)
    assert current.marks == ()


async def test_what_a_stopped_agent_left_can_be_asked(tmp_path: Path) -> None:
    """By whoever comes, after a reboot too: nothing goes on from it."""
    path, server = tmp_path / "agent.db", Counter()
    with History(path) as history:
        one = Source("chat", server, 5.0, history)
        await live(one, server)
        await one.close()
        for name, state in (("new", Minutes("new").dump("boot")), ("odd", b"of no known form")):
            history.add_source(name, service=None)
            history.add_minutes(name, [], state)
        assert history.flush()
    with Recall(path) as recall:
        (left,) = recall.open_minutes()
    assert left == one.minutes.current()
    (rest,) = (v.increase or 0 for v in left.values if v.name == TOTAL)
    assert total_of(path) + rest == pytest.approx(19 * 50)


async def test_what_is_not_said_any_more_is_not_shown(tmp_path: Path) -> None:
    server = Counter()
    with History(tmp_path / "agent.db") as history:
        source = Source("chat", server, 5.0, history, labels=lambda: (("model", "m"),))
        await source.turn()
        batch = source.batch()
        assert {one.name for one in batch.readings} == {TOTAL, "requests_running"}
        assert batch.labels == (("model", "m"),)
        assert source.value("requests_running") == 3
        server.at_ns -= int(100e9)
        source._newest.clear()
        await source.turn()
        assert source.batch().readings == []
        assert source.value("requests_running") is None


async def test_a_source_that_goes_and_comes_back_says_each_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, path = Counter(), tmp_path / "agent.db"
    with History(path) as history, caplog.at_level(logging.INFO, "servefit"):
        source = Source("chat", server, 5.0, history)
        await source.turn()
        server.fails = "http://server/metrics: connection refused"
        for _ in range(AWAY_SAMPLES + 5):
            await source.turn()
        server.fails = ""
        server.later(60, 0)
        await source.turn()
        assert history.flush()
    assert caplog.messages == [
        "chat: http://server/metrics: connection refused",
        "chat: is back",
    ]
    with Recall(path) as recall:
        kinds = [one["kind"] for one in recall.events(0, 2**33)]
    assert kinds == ["source_away", "source_back"]


async def test_a_fingerprint_is_kept_when_it_changes(tmp_path: Path) -> None:
    path, server = tmp_path / "agent.db", Counter()
    known = [(("model", "a"),)]
    with History(path) as history:
        source = Source("chat", server, 5.0, history, fingerprint=lambda: known[0])
        for _ in range(3):
            await source.turn()
            server.later(5, 1)
        known[0] = (("model", "b"),)
        await source.turn()
        assert history.flush()
        current = source.minutes.current()
    assert current is not None
    assert "changed" in current.marks
    with Recall(path) as recall:
        assert [one["data"] for one in recall.fingerprints("chat")] == [
            {"model": "a"},
            {"model": "b"},
        ]


async def test_a_defect_of_one_stops_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(readings: Sequence[Reading]) -> None:
        raise ZeroDivisionError

    servers = Counter(), Counter()
    group = Group()
    with History(tmp_path / "agent.db") as history:
        group.start(Source("bad", servers[0], 0.01, history, heard=fails))
        group.start(Source("good", servers[1], 0.01, history))
        deadline = time.monotonic() + 5
        bad, good = group.get("bad"), group.get("good")
        assert bad is not None
        assert good is not None
        while (bad.defects < 2 or not good.batch().readings) and time.monotonic() < deadline:
            servers[0].later(0.01, 1)
            servers[1].later(0.01, 1)
            await asyncio.sleep(0.005)
        assert bad.defects >= 2
        assert [one.name for one in group] == ["bad", "good"]
        await group.stop()
    assert servers[0].closed
    assert servers[1].closed
    assert "a defect of servefit" in caplog.text


def test_energy_by_gpu() -> None:
    readings = [
        Reading(1, "gpu_energy_j", 5.0, (("gpu", "GPU-a"),)),
        Reading(1, "gpu_power_w", 300.0, (("gpu", "GPU-a"),)),
    ]
    assert joules(readings) == {"GPU-a": 5.0}
