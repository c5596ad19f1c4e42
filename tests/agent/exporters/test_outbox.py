"""The outbox: nothing acknowledged is lost, nothing else goes silently, on any bad day."""

from __future__ import annotations

import gzip
import random
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.exporters.outbox import Outbox
from agent.exporters.sender import Sender
from agent.model import StoreError
from tests.agent.exporters.samples import counts, put


def test_what_was_put_is_there_after_a_restart_oldest_first(tmp_path: Path) -> None:
    first = Outbox(tmp_path / "outbox.db", clock=lambda: 12.5)
    put(first, b"one", b"two")
    put(first, b"a span", kind="traces")
    first.close()
    first.close()
    again = Outbox(tmp_path / "outbox.db")
    request = again.oldest("metrics")
    assert request is not None
    assert (gzip.decompress(request.body), request.points, request.attempts) == (b"one", 3, 0)
    again.settle(request)
    second = again.oldest("metrics")
    assert second is not None
    assert gzip.decompress(second.body) == b"two"
    traces = again.status("traces")
    assert (traces.pending, traces.oldest_unix_s, traces.sent) == (1, 12.5, 0)
    assert counts(again) == (2, 1, 0)
    assert again.status().pending_bytes == len(second.body) + traces.pending_bytes
    again.close()


def test_the_same_message_is_the_same_bytes(tmp_path: Path) -> None:
    bodies = []
    for name in ("a", "b"):
        box = Outbox(tmp_path / name)
        put(box, b"the same")
        request = box.oldest("metrics")
        assert request is not None
        bodies.append(request.body)
        box.close()
    assert bodies[0] == bodies[1]


def test_the_oldest_make_room_and_are_counted(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox.db", count_max=3)
    put(box, *(b"%d" % n for n in range(5)))
    assert counts(box) == (3, 0, 2)
    request = box.oldest("metrics")
    assert request is not None
    assert gzip.decompress(request.body) == b"2"
    assert box.status().last_error == "the outbox is full: the oldest requests are dropped"
    box.close()


def test_it_is_bounded_in_bytes(tmp_path: Path) -> None:
    noise = random.Random(3)
    box = Outbox(tmp_path / "outbox.db", bytes_max=10_000)
    put(box, *(noise.randbytes(3000) for _ in range(9)))
    assert counts(box) == (3, 0, 6)
    assert box.status().pending_bytes <= 10_000
    assert not box.put("metrics", noise.randbytes(20_000), points=1)
    assert counts(box) == (3, 0, 7)
    box.close()


def test_the_file_shrinks_after_an_outage(tmp_path: Path) -> None:
    noise, path = random.Random(3), tmp_path / "outbox.db"
    box = Outbox(path)
    put(box, *(noise.randbytes(100_000) for _ in range(100)))
    while (request := box.oldest("metrics")) is not None:
        box.settle(request)
    box.close()
    assert path.stat().st_size < 3_000_000


def test_a_request_dropped_while_it_was_under_way_is_counted_once(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox.db", count_max=1)
    put(box, b"one")
    under_way = box.oldest("metrics")
    assert under_way is not None
    put(box, b"two")
    box.settle(under_way)
    assert counts(box) == (1, 0, 1)
    box.close()


def test_two_agents_cannot_share_it(outbox: Outbox) -> None:
    with pytest.raises(StoreError, match="another agent has it open"):
        Outbox(outbox.path)


@pytest.mark.parametrize("damage", ["not a database", "torn"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "outbox.db"
    if damage == "torn":
        box = Outbox(path)
        put(box, *(random.Random(n).randbytes(5000) for n in range(50)))
        box.close()
        whole = path.read_bytes()
        path.write_bytes(whole[:8192] + b"\x55" * 40_000 + whole[48_192:])
    else:
        path.write_bytes(b"not a database at all" * 500)
    box = Outbox(path, clock=lambda: 99.0)
    assert box.set_aside == tmp_path / "outbox.db.damaged-99"
    assert box.set_aside.exists()
    assert "damaged" in (box.status().last_error or "")
    put(box, b"goes on")
    assert counts(box) == (1, 0, 0)
    box.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    db = sqlite3.connect(path)
    db.execute("pragma user_version = 99")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="newer servefit"):
        Outbox(path)
    assert list(tmp_path.glob("*damaged*")) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"outbox .*file.outbox\.db: .*permissions"):
        Outbox(tmp_path / "file" / "outbox.db")


async def test_a_full_disk_costs_what_it_cannot_keep_and_says_so(outbox: Outbox) -> None:
    put(outbox, b"kept before")
    outbox._db.execute("pragma max_page_count = 12")
    sender = Sender(outbox, "metrics", "http://127.0.0.1:1")
    noise = random.Random(1)
    kept = [await sender.put(noise.randbytes(8000), 1) for _ in range(8)]
    assert not all(kept)
    assert counts(outbox) == (1 + sum(kept), 0, kept.count(False))
    assert "free some space" in (outbox.status().last_error or "")
    outbox._db.execute("pragma max_page_count = 100000")
    assert await sender.put(b"the day is better", 1)
    await sender.close()


def test_state_is_kept_with_the_request_it_belongs_to(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox.db")
    assert box.state("metrics") is None
    box.put("metrics", b"m", 1, state=b"s1")
    box.put("metrics", b"m", 1)
    box.put("traces", b"t", 1, state=b"other")
    box.close()
    again = Outbox(tmp_path / "outbox.db")
    assert (again.state("metrics"), again.state("traces")) == (b"s1", b"other")
    again.close()


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["put", "settle", "drop", "keep", "reopen"]), max_size=40))
def test_everything_put_waits_was_sent_or_was_dropped(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "outbox.db", 0
        box = Outbox(path, count_max=4)
        for step in steps:
            request = box.oldest("metrics")
            if step == "put":
                n += box.put("metrics", b"%d" % n, 1)
            elif step == "reopen":
                box.close()
                box = Outbox(path, count_max=4)
            elif request is not None and step == "keep":
                box.keep(request, "why", counts=True)
            elif request is not None:
                box.settle(request, dropped=step == "drop")
            assert sum(counts(box)) == n
        box.close()


def test_its_readings_are_of_the_catalogue(outbox: Outbox) -> None:
    from agent.metrics import CATALOGUE

    put(outbox, b"x")
    readings = outbox.readings(7)
    assert {r.name for r in readings} <= set(CATALOGUE)
    assert [r.value for r in readings if r.name == "agent_outbox_pending"] == [1.0, 0.0]
