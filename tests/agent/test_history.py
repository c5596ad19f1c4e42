"""The store on good days and on bad ones: what is taken in comes back, and nothing acknowledged
is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import schema
from agent.database import Locked
from agent.history import History, import_curve
from agent.model import Confidence, Level, Run, StoreError, Sweep, TargetGpu, UsageError, Verdict
from agent.recall import Recall
from agent.tiers import Settings
from tests.agent.recorded import NOON, Clocks, counter, gauge, histogram, minute, store

HOUR = 3600


def rows(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def events(path: Path) -> list[str]:
    return [kind for (kind,) in rows(path, "select kind from events order by id")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


# -------------------------------------------------------------------------------- what comes back


def test_a_minute_comes_back_as_it_was(path: Path, clocks: Clocks) -> None:
    kept = minute(
        NOON,
        [gauge("requests_running", 1, 2, 6.5, engine="0"), gauge("kv_usage_ratio", 0.25, 0.25),
         counter("output_tokens_total", 812.0, 12.5)],
        [histogram("ttft_seconds", 0, 3, 0), histogram("itl_seconds", 1.25, 0, 2)],
        marks=("restart",),
    )  # fmt: skip
    with store(path, clocks) as history:
        history.add_minute(kept)
        assert history.flush()
        with Recall(path) as recall:
            assert list(recall.minutes("chat", NOON, NOON + 60)) == [kept]
        clocks.pass_s(2 * HOUR)  # its hour is closed
        assert history.flush()
        with Recall(path) as recall:
            assert list(recall.minutes("chat", NOON, NOON + 60)) == [kept]
            assert list(recall.minutes("chat", NOON + 60, NOON + 120)) == []
            assert list(recall.minutes("other", NOON, NOON + 60)) == []


def test_plain_sql_reads_minutes_and_hours(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        for n in range(60):
            values = [
                gauge("kv_usage_ratio", n / 100, n / 100),
                counter("output_tokens_total", n, 1),
            ]
            history.add_minute(
                minute(NOON + 60 * n, values, [histogram("ttft_seconds", 1, 0.5, 0)])
            )
        clocks.pass_s(2 * HOUR)
        assert history.flush()
        clocks.pass_s(HOUR)
        assert history.flush()  # and once more: closing an hour is idempotent
    db = sqlite_utils.Database(path)
    (usage,) = db["hours"].rows_where("name = 'kv_usage_ratio'")
    assert usage["source"] == "chat"
    assert (usage["start_unix_s"], usage["n"]) == (NOON, 120)
    assert (usage["mean"], usage["min"]) == (pytest.approx(0.295), 0)
    assert (usage["max"], usage["last"], usage["increase"]) == (0.59, 0.59, None)
    (tokens,) = db["hours"].rows_where("name = 'output_tokens_total'")
    assert (tokens["increase"], tokens["last"]) == (60, 59)
    (ttft,) = db["hours"].rows_where("name = 'ttft_seconds'")
    assert (json.loads(ttft["counts"]), json.loads(ttft["bounds"])) == ([60, 30], [0.1, 0.5, None])
    starts = [row["start_unix_s"] for row in db["minutes"].rows_where("name = 'kv_usage_ratio'")]
    assert sorted(starts) == [NOON + 60 * n for n in range(60)]
    db.close()


def test_an_unfinished_minute_is_replaced_and_a_finished_one_is_not(
    path: Path, clocks: Clocks
) -> None:
    with store(path, clocks) as history:
        for tokens, is_finished in ((3.0, False), (7.0, False), (9.0, True), (5.0, True)):
            one = minute(NOON, [counter("output_tokens_total", tokens, tokens)])
            history.add_minute(one, finished=is_finished)
        assert history.flush()
        with Recall(path) as recall:
            parts = list(recall.minutes("chat", NOON, NOON + 60))
    assert [part.values[0].increase for part in parts] == [9.0, 5.0]


def test_what_a_source_goes_on_from_is_kept_with_its_minutes(path: Path, clocks: Clocks) -> None:
    one = minute(NOON, [gauge("requests_running", 1)])
    with store(path, clocks) as history:
        history.add_minutes(one.source, [one], b"state")
        assert history.flush()
    with Recall(path) as recall:
        assert recall.source_state(one.source) == b"state"
        assert recall.source_state("nobody") is None
        assert [m.start_unix_s for m in recall.minutes(one.source, 0, NOON + 60)] == [NOON]


def test_a_restart_inside_a_minute_keeps_both_parts(path: Path, clocks: Clocks) -> None:
    for tokens in (3.0, 4.0):
        with store(path, clocks) as history:
            one = minute(NOON, [counter("output_tokens_total", tokens, tokens)], covered_s=20)
            history.add_minute(one, finished=False)
    with Recall(path) as recall:
        points = recall.series("output_tokens_total", NOON, NOON + 59, 60).points
    assert points == [(NOON, pytest.approx(7 / 40))]


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(-1e12, 1e12)), min_size=1, max_size=60).map(
        sorted
    )
)
def test_raw_readings_come_back_packed_or_not(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[int, float]]
) -> None:
    path, clocks = tmp_path_factory.mktemp("raw") / "agent.db", Clocks()
    sums: dict[float, list[float]] = {}
    with store(path, clocks) as history:
        begin = clocks.monotonic_ns
        for at, value in points:
            clocks.monotonic_ns = begin + at * 10**9
            history.add_readings("nvml", [clocks.reading("gpu_power_w", value, gpu="a")])
            sums.setdefault(NOON + at, []).append(value)
        clocks.monotonic_ns = begin
        means = [(at, sum(values) / len(values)) for at, values in sorted(sums.items())]
        for _ in range(2):
            assert history.flush()
            with Recall(path) as recall:
                series = recall.series("gpu_power_w", NOON, NOON + 200, 20)
            assert series.unit == "W"
            for at, value in series.points:
                inside = [v for t, vs in sums.items() if at <= t < at + 20 for v in vs]
                assert value == pytest.approx(sum(inside) / len(inside), rel=1e-9, abs=1e-3)
            assert {at for at, _ in series.points} == {at // 20 * 20 for at, _ in means}
            clocks.pass_s(1000)  # the block is packed
    assert rows(path, "select count(*) from raw_open") == [(0,)]


def test_what_no_series_can_hold_is_left_out(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        history.add_readings(
            "chat",
            [
                clocks.reading("kv_usage_ratio", float("nan")),
                clocks.reading("ttft_seconds_bucket", 1, le="0.5"),
            ],
        )
        history.add_readings("chat", [clocks.reading("\udc80", 1)])
        history.add_readings("chat", [clocks.reading("requests_running", 2)])
        history.add_minute(minute(NOON, [gauge("\udc80", 1)]))
        assert history.flush()
        state = history.state()
    assert rows(path, "select name, value from recent") == [("requests_running", 2)]
    assert (state.readings_dropped, state.minutes_dropped, state.error) == (1, 1, None)


def test_everything_else_that_is_kept(path: Path, clocks: Clocks) -> None:
    curve = Sweep(Run(id="r1"), levels=[Level(concurrency=1, output_tokens_per_s=100)])
    longer = Sweep(
        Run(id="r1"), levels=[Level(concurrency=n, output_tokens_per_s=9) for n in (1, 2)]
    )
    verdict = Verdict("RIGHT_SIZED", "It fits.", Confidence("high", "nothing"))
    with store(path, clocks) as history:
        history.add_source("chat", service="chat", gpus=["b", "a"])
        history.add_gpus([TargetGpu("NVIDIA L4", "a", 24 << 30), TargetGpu("odd", "c")])
        history.add_gpus([TargetGpu("odd", "a"), TargetGpu("NVIDIA L4", "b", 23 << 30)])
        first = history.add_fingerprint("chat", "f1", {"model": "tiny"})
        again = history.add_fingerprint("chat", "f1", {"model": "tiny"})
        other = history.add_fingerprint("chat", "f2", {"model": "large"})
        one = history.add_curve(curve, "chat")
        same = history.add_curve(longer)
        history.add_assessment("chat", verdict)
        history.add_event("changed", "another model", source="chat", data={"from": "tiny"})
        assert history.flush()
        assert (first.result(0), again.result(0), other.result(0)) == (True, False, True)
        assert one.result(0) == same.result(0)
    with Recall(path) as recall:
        assert recall.sources() == [{"name": "chat", "service": "chat", "gpus": ["a", "b"]}]
        assert recall.gpus(["b", "a", "z"]) == [
            TargetGpu("odd", "a"), TargetGpu("NVIDIA L4", "b", 23 << 30)
        ]  # fmt: skip
        assert [one["fingerprint"] for one in recall.fingerprints("chat")] == ["f1", "f2"]
        (about,) = recall.curves()
        assert about["levels"] == 2
        assert recall.curve(about["id"]) == longer
        (assessed,) = recall.assessments("chat")
        assert assessed["verdict"]["summary"] == "It fits."
        assert recall.assessments("other") == []
        (event,) = recall.events(NOON - 1, NOON + 1)
        assert (event["kind"], event["data"]) == ("changed", {"from": "tiny"})
        with pytest.raises(UsageError, match="no curve 7"):
            recall.curve(7)


@pytest.mark.parametrize(
    "levels",
    [[], [Level()], [Level(concurrency=4)], [Level(output_tokens_per_s=3)],
     [Level(concurrency=1, output_tokens_per_s=1), Level(concurrency=2, output_tokens_per_s=-1)]],
)  # fmt: skip
def test_a_curve_that_says_nothing_is_refused(
    path: Path, clocks: Clocks, levels: list[Level]
) -> None:
    with store(path, clocks) as history, pytest.raises(UsageError, match="level"):
        history.add_curve(Sweep(levels=levels))


# ------------------------------------------------------------------------------------------- jobs


def test_a_job_that_fails_undoes_only_itself(path: Path, clocks: Clocks) -> None:
    def half(db: sqlite_utils.Database) -> None:
        db.execute("insert into meta values ('half', 1)")
        raise ValueError("midway")

    with store(path, clocks) as history:
        done = [
            history.submit(half),
            history.submit(lambda db: db.execute("insert into nothing values (1)")),
            history.submit(lambda db: db.execute("insert into meta values ('clean', 2)")),
            history.submit(lambda db: db.execute("insert into meta values (?, 1)", [])),
        ]
        good: Future[Any] = history.submit(
            lambda db: db.execute("insert into meta values ('good', 1)").rowcount
        )
        history.submit(half).cancel()
        itself = history.submit(lambda db: db.execute("pragma wal_checkpoint"))
        assert good.result(timeout=10) == 1
        assert isinstance(done[0].exception(0), ValueError)
        assert isinstance(itself.exception(0), sqlite3.OperationalError)
        assert isinstance(done[1].exception(0), sqlite3.OperationalError)
        assert isinstance(done[2].exception(0), sqlite3.IntegrityError)
        assert isinstance(done[3].exception(0), sqlite3.ProgrammingError)
    assert rows(path, "select key from meta where key in ('half', 'good')") == [("good",)]


def test_after_the_end_nothing_is_taken(path: Path, clocks: Clocks) -> None:
    history = store(path, clocks)
    history.close()
    history.close()
    history.add_readings("chat", [clocks.reading("requests_running", 2)])
    with pytest.raises(StoreError, match="closed"):
        history.submit(lambda db: None).result(0)
    assert history.state().readings_dropped == 1


# ----------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("is_late", [False, True])
def test_a_clock_set_back_an_hour_loses_nothing(path: Path, clocks: Clocks, is_late: bool) -> None:
    """The hour happens twice; with `is_late` it was closed before."""
    total = 0
    with store(path, clocks) as history:
        for way in (0, 1):
            for n in range(60):
                total += 2
                tokens = counter("output_tokens_total", total, 2)
                history.add_minute(minute(NOON + 60 * n, [tokens, gauge("kv_usage_ratio", way)]))
                history.add_readings("chat", [clocks.reading("output_tokens_total", total)])
                clocks.pass_s(60)
            if is_late:
                clocks.pass_s(300)
            assert history.flush()
            if way == 0:
                clocks.wall_ns -= round(3600e9) + (300 * 10**9 if is_late else 0)
        clocks.pass_s(HOUR)
        assert history.flush()
    with Recall(path) as recall:
        kept = list(recall.minutes("chat", NOON, NOON + HOUR))
        assert len(kept) == 120
        assert sum(one.values[0].increase or 0 for one in kept) == 240
        for step in (60, 3600):
            rates = recall.series("output_tokens_total", NOON, NOON + HOUR - 1, step).points
            assert [rate for _, rate in rates] == pytest.approx([2 / 60] * (HOUR // step))
            usage = recall.series("kv_usage_ratio", NOON, NOON + HOUR - 1, step).points
            assert [value for _, value in usage] == [0.5] * (HOUR // step)
        raw = recall.series("output_tokens_total", NOON + 600, NOON + 1200, 20).points
        assert [rate for _, rate in raw] == pytest.approx([2 / 60] * len(raw))
    (jump,) = rows(path, "select text, data from events where kind = 'clock_jump'")
    assert "set back by" in jump[0]
    assert json.loads(jump[1])["by_s"] < -3599
    assert rows(path, f"select count(*) from hour where hour = {NOON // HOUR}") == [(2,)]


def test_a_clock_far_ahead_makes_nothing_old(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        history.add_readings("nvml", [clocks.reading("gpu_power_w", 1)])
        clocks.pass_s(1200)
        assert history.flush()
        clocks.wall_ns += 400 * 86_400 * 10**9
        clocks.pass_s(600)
        assert history.flush()
        assert len(rows(path, "select * from raw")) == 1
        clocks.wall_ns -= 400 * 86_400 * 10**9
        clocks.pass_s(7200)
        assert history.flush()
    assert len(rows(path, "select * from raw")) == 1
    assert events(path) == ["clock_jump", "clock_jump"]


# -------------------------------------------------------------------------------------- retention


def test_each_tier_is_kept_its_time(path: Path, clocks: Clocks) -> None:
    limits = Settings(raw_s=HOUR, minutes_s=5 * HOUR, hours_s=24 * HOUR)
    with store(path, clocks, settings=limits) as history:
        for hour in range(30):
            at = NOON + hour * HOUR
            for n in range(6):
                history.add_readings("chat", [clocks.reading("requests_running", n)])
                clocks.pass_s(600)
                history.add_minute(minute(at + 600 * n, [gauge("requests_running", n)]))
                assert history.flush()
        for _ in range(8):  # a step at a time
            assert history.flush()
    now = NOON + 30 * HOUR
    (raw,), (minutes,), (hours,) = (
        rows(path, "select min(block) * 600 from raw"),
        rows(path, "select min(hour) * 3600 from minute"),
        rows(path, "select min(hour) * 3600 from hour"),
    )
    assert now - HOUR - 600 <= raw[0] <= now - HOUR
    assert now - 6 * HOUR <= minutes[0] <= now - 5 * HOUR
    assert now - 25 * HOUR <= hours[0] <= now - 24 * HOUR
    with Recall(path) as recall:  # the finest that is left answers
        points = recall.series("requests_running", NOON, now, 600).points
    assert len([at for at, _ in points if at < minutes[0]]) == len(
        range(hours[0], minutes[0], HOUR)
    )
    assert {value for at, value in points if at < minutes[0]} == {2.5}


def test_what_is_forgotten_goes_back_to_the_disk(
    path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.tiers.VACUUM_PAGES", 5)
    with store(path, clocks, settings=Settings(raw_s=HOUR)) as history:
        for n in range(40_000):
            if n % 100 == 0:
                clocks.pass_s(20)
            history.add_readings(
                "nvml", [clocks.reading("gpu_power_w", n * 1.000001, gpu=str(n % 7))]
            )
            if n % 10_000 == 0:
                assert history.flush()
        clocks.pass_s(1200)
        assert history.flush()
    most = path.stat().st_size
    with store(path, clocks, settings=Settings(raw_s=HOUR)) as history:
        assert history.flush()
        clocks.pass_s(2 * HOUR)
        for _ in range(60):
            assert history.flush()
        assert rows(path, "select count(*) from raw") == [(0,)]
        free, pages = (
            rows(path, "pragma freelist_count")[0][0],
            rows(path, "pragma page_count")[0][0],
        )
    assert path.stat().st_size < most
    assert free <= 0.02 * pages + 5


# --------------------------------------------------------------------------------------- bad days


def test_below_the_floor_raw_is_shed_and_minutes_go_on(path: Path, clocks: Clocks) -> None:
    free = [10**12]
    with store(path, clocks, free_bytes=lambda: free[0]) as history:
        for _ in range(3):
            for n in range(6):
                history.add_readings("nvml", [clocks.reading("gpu_power_w", n)])
                clocks.pass_s(600)
                assert history.flush()
        assert len(rows(path, "select * from raw")) >= 17
        free[0] = 10**6
        assert history.flush()
        assert history.state().shedding
        for _ in range(5):
            assert history.flush()
        assert rows(path, "select count(*) from raw") == [(0,)]
        history.add_readings("nvml", [clocks.reading("gpu_power_w", 1)])
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert history.flush()
        state = history.state()
        assert (state.readings_dropped, state.raw_shed_blocks) == (1, 18)
        assert rows(path, "select count(*) from minutes") == [(1,)]
        free[0] = 10**12
        assert history.flush()
        history.add_readings("nvml", [clocks.reading("gpu_power_w", 1)])
        assert history.flush()
        assert not history.state().shedding
        assert rows(path, "select count(*) from raw_open") == [(1,)]
    assert events(path) == ["shedding_began", "shedding_ended"]


def test_two_agents_on_one_store(path: Path, clocks: Clocks) -> None:
    with store(path, clocks), pytest.raises(Locked) as refused:
        History(path)
    assert str(refused.value) == (
        f"{path} is written by another agent, process {os.getpid()}: stop that one, or give this "
        "one another db"
    )
    with store(path, clocks) as history:
        assert history.flush()


def test_a_curve_comes_in_beside_a_running_agent(path: Path, clocks: Clocks) -> None:
    curve = Sweep(levels=[Level(concurrency=1, output_tokens_per_s=100)])
    first = import_curve(path, curve)
    with store(path, clocks) as history:
        assert import_curve(path, curve, "chat") == first
        other = Sweep(Run(id="x"), levels=curve.levels)
        assert import_curve(path, other) == first + 1
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert history.flush()
    with Recall(path) as recall:
        assert {one["source"] for one in recall.curves()} == {"chat", None}
        assert len(list(recall.minutes("chat", NOON, NOON + 60))) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.database.BUSY_TIMEOUT_S", 0.3)
    monkeypatch.setattr("agent.history.RETRY_AFTER_S", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_database_that_another_program_locks(path: Path, clocks: Clocks) -> None:
    """What is handed over waits, and is written when the other lets go."""
    with store(path, clocks) as history, contextlib.closing(sqlite3.connect(path)) as other:
        assert history.flush()
        other.execute("begin immediate")
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert not history.flush(1)
        state = history.state()
        assert state.error == "database is locked"
        assert state.writer_lag_s > 0.9
        other.rollback()
        assert history.flush(15)
        assert history.state().error is None
    assert rows(path, "select count(*) from minutes") == [(1,)]


def test_reading_while_it_is_written(path: Path, clocks: Clocks) -> None:
    stop, trouble, answers = threading.Event(), [], []

    def read() -> None:
        try:
            with Recall(path) as recall:
                while not stop.is_set():
                    answers.append(len(list(recall.minutes("chat", NOON, NOON + 2 * HOUR))))
                    recall.series("requests_running", NOON, NOON + 2 * HOUR, 60)
        except BaseException as error:
            trouble.append(error)

    with store(path, clocks) as history:
        assert history.flush()
        reader = threading.Thread(target=read)
        reader.start()
        for n in range(100):
            history.add_minute(minute(NOON + 60 * n, [gauge("requests_running", n)]))
            clocks.pass_s(60)
            assert history.flush()
        stop.set()
        reader.join()
    assert trouble == []
    assert answers == sorted(answers)
    assert len(answers) > 2


def test_a_damaged_file_is_set_aside_after_an_unclean_stop(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        for n in range(500):
            history.add_minute(minute(NOON + 60 * n, [gauge("requests_running", n, a=str(n))]))
        assert history.flush()
        history.submit(lambda db: db.execute("insert or replace into meta values ('clean', 0)"))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("update meta set value = 0 where key = 'clean'")
        db.commit()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for at in range(8192, size, 8192):
            file.seek(at)
            file.write(b"\xff" * 2000)
    with store(path, clocks) as history:
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert history.flush()
        assert history.state().set_aside == 1
    (aside,) = [one for one in path.parent.iterdir() if ".damaged-" in one.name]
    assert aside.stat().st_size == size
    assert events(path) == ["store_damaged"]
    assert rows(path, "select count(*) from minutes") == [(1,)]


@pytest.mark.usefixtures("impatient")
def test_a_file_damaged_while_it_is_written(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        for n in range(300):
            history.add_minute(minute(NOON + 60 * n, [gauge("requests_running", n, a=str(n))]))
        history.submit(lambda db: None)
        assert history.flush()
        assert history.flush()
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("pragma wal_checkpoint(truncate)")
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        history.submit(lambda db: db.execute("pragma shrink_memory"))  # drops the cached pages
        assert history.flush()
        history.add_minute(minute(NOON, [gauge("requests_waiting", 1)]))
        history.flush(1)
        assert history.flush(20)
        assert history.state().set_aside == 1
    assert rows(path, "select name from minutes") == [("requests_waiting",)]


def test_a_file_that_was_never_ours_is_left_alone(path: Path, clocks: Clocks) -> None:
    path.write_text("a letter\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        store(path, clocks)
    assert path.read_text() == "a letter\n" * 100
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("create table letters(text)")
    with pytest.raises(StoreError, match="something else"):
        store(path, clocks)
    with pytest.raises(StoreError, match="not an agent's store"):
        Recall(path)
    assert [one.name for one in path.parent.iterdir() if "damaged" in one.name] == []


def test_a_file_that_is_removed_is_begun_anew(path: Path, clocks: Clocks) -> None:
    with store(path, clocks) as history:
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert history.flush()
        for one in ("", "-wal", "-shm"):
            Path(f"{path}{one}").unlink()
        assert history.flush()
        history.add_minute(minute(NOON + 60, [gauge("requests_running", 1)]))
        assert history.flush()
    assert rows(path, "select start_unix_s from minutes") == [(NOON + 60,)]
    assert events(path) == ["store_removed"]


@pytest.mark.usefixtures("impatient")
def test_a_file_that_is_replaced_by_anothers(path: Path, clocks: Clocks) -> None:
    """It is not written to; what was handed over waits for a place."""
    theirs = path.with_name("theirs.db")
    with contextlib.closing(sqlite3.connect(theirs)) as db:
        db.execute("create table letters(text)")
    with store(path, clocks) as history:
        assert history.flush()
        theirs.rename(path)
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink()
        history.flush()
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
        assert not history.flush(1)
        assert "something else" in (history.state().error or "")
        assert rows(path, "select name from sqlite_master") == [("letters",)]
        path.unlink()
        assert history.flush()
    assert rows(path, "select count(*) from minutes") == [(1,)]


def test_schemas_older_and_newer(
    path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(path, clocks) as history:
        history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
    step = ("create table later(x)", "insert into later values (7)")
    with monkeypatch.context() as newer:
        newer.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
        with pytest.raises(StoreError, match="older servefit: start `agent run` once"):
            Recall(path)
        for _ in range(2):
            with store(path, clocks) as history:
                assert history.flush()
        assert rows(path, "select x from later") == [(7,)]
        assert rows(path, "select count(*) from minutes") == [(1,)]
    for opened in (lambda: store(path, clocks), lambda: Recall(path)):
        known = len(schema.MIGRATIONS)
        said = rf"newer servefit \(schema {known + 1}, this one knows {known}\)"
        with pytest.raises(StoreError, match=said):
            opened()


def test_a_migration_that_fails_leaves_the_old_schema(
    path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(path, clocks).close()
    with monkeypatch.context() as newer:
        step = ("create table later(x)", "create table later(x)")
        newer.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
        with pytest.raises(StoreError, match="already exists"):
            store(path, clocks)
    store(path, clocks).close()
    assert rows(path, "select name from sqlite_master where name = 'later'") == []


def test_where_no_store_can_be(tmp_path: Path, clocks: Clocks) -> None:
    with pytest.raises(StoreError, match="no agent has written"):
        Recall(tmp_path / "none.db")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "agent.db", tmp_path):
        with pytest.raises(StoreError, match=r"^database .*; .*, or give another db$"):
            store(path, clocks)


# Writes minutes and jobs as fast as it is acknowledged, and prints what was.
WRITER = """
import sys
from pathlib import Path
from agent.history import History
from tests.agent.recorded import NOON, Clocks, gauge, minute, store
clocks = Clocks()
with store(Path(sys.argv[1]), clocks) as history:
    for n in range(int(sys.argv[2]), 10**9):
        history.add_minute(minute(NOON + 60 * n, [gauge("requests_running", n, a=str(n % 50))]))
        history.add_readings("nvml", [clocks.reading("gpu_power_w", n)])
        clocks.pass_s(60)
        if history.flush():
            print(n, flush=True)
"""


@contextlib.contextmanager
def writing(path: Path, begin: int, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(path), str(begin)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


def test_killed_at_any_moment_nothing_acknowledged_is_lost(path: Path) -> None:
    acknowledged, begin = [-1], 0
    for wait_s in (0.05, 0.31, 0.12):
        with writing(path, begin) as child:
            assert child.stdout
            acknowledged.append(int(child.stdout.readline()))
            time.sleep(wait_s)
            child.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in child.stdout if line.endswith("\n")]
        begin = acknowledged[-1] + 1
        kept = {at for (at,) in rows(path, "select start_unix_s from minutes")}
        assert {NOON + 60 * n for n in range(begin)} <= kept
    with store(path, Clocks(NOON + 10**6)) as history:
        assert history.flush()
        assert history.state().set_aside == 0
    raw = rows(path, "select sum(value) from recent")  # all blocks are packed by now
    assert raw == [(None,)]


def test_a_full_disk(path: Path) -> None:
    """A limit on the size of files: it ends, is said, and goes on by itself when lifted."""
    child_code = f"""
import resource, sys
from pathlib import Path
from agent.history import History
import agent.history
agent.history.RETRY_AFTER_S = 0.2
from tests.agent.recorded import NOON, Clocks, gauge, minute, store
clocks = Clocks()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
history = store(Path({str(path)!r}), clocks)
history.add_minute(minute(NOON, [gauge("requests_running", 1)]))
assert history.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
n = 1
while history.state().error is None:
    values = [gauge("requests_running", n, a=str(k)) for k in range(200)]
    history.add_minute(minute(NOON + 60 * n, values))
    history.flush(2)
    n += 1
    assert n < 5000
state = history.state()
print(state.error, state.write_errors > 0, state.writer_lag_s > 0, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert history.flush(20)
assert history.state().error is None
history.close()
print(n, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", child_code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, count = done.stdout.splitlines()
    assert said == "disk I/O error True True"
    kept = rows(path, "select count(distinct start_unix_s) from minutes")
    assert kept == [(int(count),)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB, where the machine lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk_that_others_fill(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw makes room for minutes, and what waited is written when the disk has room again."""
    monkeypatch.setattr("agent.history.RETRY_AFTER_S", 0.1)
    path, clocks, minutes = small_disk / "agent.db", Clocks(), 0
    limits = Settings(free_bytes_min=0)
    with store(path, clocks, settings=limits) as history:
        for n in range(2000):
            noise = [
                clocks.reading("gpu_power_w", (n * k) % 7919 / 7, gpu=str(k)) for k in range(40)
            ]
            history.add_readings("nvml", noise)
            clocks.pass_s(5)
            if n % 100 == 0:
                assert history.flush()
        clocks.pass_s(1200)
        assert history.flush()
        with contextlib.suppress(OSError), open(small_disk / "others", "wb") as others:
            while True:
                others.write(b"x" * 65536)
                others.flush()
        for n in range(150):
            values = [gauge("requests_running", n, n + k, a=str(k)) for k in range(20)]
            history.add_minute(minute(NOON + 60 * n, values))
            history.flush(0.05)
            minutes += 1
        assert history.state().write_errors > 0
        (small_disk / "others").unlink()
        assert history.flush(20)
        state = history.state()
    assert state.error is None
    assert (state.minutes_dropped, state.set_aside) == (0, 0)
    assert rows(path, "select count(distinct start_unix_s) from minutes") == [(minutes,)]


@pytest.mark.usefixtures("impatient")
def test_a_backlog_is_bounded_and_raw_goes_first(
    path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.history.WAITING_READINGS_MAX", 100)
    monkeypatch.setattr("agent.history.WAITING_RECORDS_MAX", 50)
    with store(path, clocks) as history, contextlib.closing(sqlite3.connect(path)) as other:
        assert history.flush()
        other.execute("begin immediate")
        first = history.submit(lambda db: None)
        for n in range(300):
            history.add_readings("nvml", [clocks.reading("gpu_power_w", n)])
            history.add_minute(minute(NOON + 60 * n))
        assert not history.flush(1)
        state = history.state()
        assert state.readings_dropped >= 200
        assert state.minutes_dropped >= 250
        with pytest.raises(StoreError, match="not written"):
            first.result(0)
        other.rollback()
        assert history.flush(15)
    assert 0 < rows(path, "select count(*) from minutes_covered")[0][0] <= 50
    assert 0 < rows(path, "select count(*) from raw_open")[0][0] <= 100
