"""What is kept comes back as it was; what cannot be kept or read is said in one line."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import store as module
from agent.model import Level, Run, StoreError, Sweep, Target, UsageError, Workload, decode_sweep
from agent.model import encode as to_json
from agent.store import Store

# Whatever JSON holds: any Unicode but lone surrogates, numbers that are no NaN and no infinity.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
    Any: st.none() | st.booleans() | st.integers(-9, 9) | st.lists(TEXT, max_size=2),
}


def of_struct(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of a msgspec struct, field by field."""
    return st.builds(
        kind, **{field.name: of_type(field.type) for field in msgspec.structs.fields(kind)}
    )


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is None:
        return of_struct(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    inner = [of_type(argument) for argument in arguments]
    if origin is list:
        return st.lists(inner[0], max_size=2)
    if origin is dict:
        return st.dictionaries(*inner, max_size=2)
    return st.tuples(*inner) if origin is tuple else st.one_of(inner)


def sweep(run_id: str = "20260101-000000-abcd", at: str = "2026-01-01T00:00:00Z") -> Sweep:
    run = Run(run_id, at, "loadgen sweep", 0, "0", "h")
    return Sweep(run, Target("u", "m"), Workload("chat", "1", "1"), [], [Level(concurrency=1)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "runs.db") as opened:
        yield opened


# ------------------------------------------------------------------------------------ round trip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store") / "runs.db") as opened:
        yield opened


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(kept=of_struct(Sweep))
def test_any_sweep_comes_back_as_it_was(shared: Store, kept: Sweep) -> None:
    assert decode_sweep(to_json(kept)) == kept
    shared.save(kept)
    for index in range(len(kept.levels)):
        shared.save(kept, level=index)
    if kept.run.id not in ("latest", "last"):
        assert shared.load(kept.run.id) == kept


def test_saving_again_replaces(store: Store) -> None:
    first = sweep()
    store.save(first)
    second = msgspec.structs.replace(first, levels=[*first.levels, Level(concurrency=2)])
    rows = [{"request": i, "due_ms": 0.0, "ttft_ms": 2.0, "error": None} for i in range(3)]
    store.save(second, level=1, requests=rows)
    store.save(second, level=1, requests=rows)
    assert store.load("latest") == second
    assert [row["levels"] for row in store.runs()] == [2]
    kept = store.requests(first.run.id)
    assert [(row["level"], row["request"], row["error"]) for row in kept] == [
        (1, 0, None), (1, 1, None), (1, 2, None),
    ]  # fmt: skip


def test_an_older_database_gets_the_columns_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as store:
        store.save(sweep(), level=0, requests=[{"request": 0, "ttft_ms": 2.0}])
    with closing(sqlite3.connect(path)) as older, older:
        older.execute("alter table requests drop column gaps_ms")
        older.execute("alter table requests drop column end_ms")
        older.execute("pragma user_version = 1")
    with Store(path) as store:
        row = {"request": 1, "end_ms": 3.0, "gaps_ms": b"four"}
        store.save(sweep("new"), level=0, requests=[row])
        [old], [new] = store.requests(sweep().run.id), store.requests("new")
        assert (old["ttft_ms"], old["end_ms"], old["gaps_ms"]) == (2.0, None, None)
        assert (new["end_ms"], new["gaps_ms"]) == (3.0, b"four")
        assert store.load(sweep().run.id) == sweep()
    with closing(sqlite3.connect(path)) as again:
        assert again.execute("pragma user_version").fetchone() == (module.SCHEMA,)


def test_requests_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUESTS_PER_LEVEL_MAX", 7)
    rows = ({"request": i, "due_ms": 0.0, "error": "cut"} for i in range(50))
    store.save(sweep(), level=0, requests=rows)
    assert len(store.requests(sweep().run.id)) == 7


def test_runs_are_newest_first_and_as_many_as_asked(store: Store) -> None:
    for day in (3, 1, 2):
        store.save(sweep(f"run-{day}", f"2026-01-0{day}T00:00:00Z"))
    assert [row["id"] for row in store.runs()] == ["run-3", "run-2", "run-1"]
    assert [row["id"] for row in store.runs(limit=1)] == ["run-3"]
    assert store.load("latest").run.id == "run-3"


def test_a_run_by_the_beginning_of_its_id(store: Store) -> None:
    for name in ("abc-1", "abc-2", "abc"):
        store.save(sweep(name))
    assert store.load("abc-2").run.id == "abc-2"
    assert store.load("abc").run.id == "abc"  # exact comes before a beginning
    with pytest.raises(UsageError, match="begins 3 runs"):
        store.load("ab")
    for nothing in ("xyz", "%", "'; drop table runs; --"):
        with pytest.raises(UsageError, match="loadgen runs"):
            store.load(nothing)


def test_an_empty_store_has_no_latest(store: Store) -> None:
    assert store.runs() == []
    with pytest.raises(UsageError, match="no run 'latest'"):
        store.load("latest")


def test_the_default_is_the_users_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with Store() as opened:
        assert opened.path == module.default_path()
    assert module.default_path().exists()


def test_a_killed_process_leaves_its_finished_levels(tmp_path: Path) -> None:
    """The write-ahead log is there after a death without a farewell."""
    path = tmp_path / "runs.db"
    code = (
        "import os, sys; from pathlib import Path; from agent.store import Store\n"
        "from tests.agent.test_store import sweep\n"
        "Store(Path(sys.argv[1])).save(sweep(), level=0); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == 9
    with Store(path) as opened:
        assert opened.load("latest") == sweep()


# -------------------------------------------------------------------------------------- failures


def refused(path: Path, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        Store(path)
    assert "another --db" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"hello, this is a text file and by no means a database\n" * 100)
    refused(path, "not a database; it is damaged or not ours: move it away")
    refused(tmp_path, "unable to open")
    file = tmp_path / "file"
    file.touch()
    refused(file / "runs.db", "directory|exists")


def test_a_damaged_database(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as opened:
        for i in range(40):
            opened.save(sweep(f"run-{i}"))
    whole = bytearray(path.read_bytes())
    whole[4096:] = os.urandom(len(whole) - 4096)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="move it away, or give another --db"), Store(path) as bad:
        bad.load("latest")


def test_a_run_that_is_none(store: Store) -> None:
    store.save(sweep())
    with closing(sqlite3.connect(store.path)) as other, other:
        other.execute("update runs set sweep = '{\"run\": 1}'")
    with pytest.raises(StoreError, match=r"run 20260101-000000-abcd in .*: not a sweep"):
        store.load("latest")


def test_what_a_run_needs_to_be_taken_up_again(store: Store) -> None:
    store.save(sweep(), options='{"a": 1}', state="running")
    store.save(sweep(), level=0)  # says nothing of either, and leaves them
    assert store.kept("latest") == (sweep(), '{"a": 1}', "running")
    store.save(sweep(), state="done")
    assert store.kept("2026")[1:] == ('{"a": 1}', "done")
    assert set(store.runs()[0]) & {"sweep", "options", "state"} == set()


def test_a_level_measured_again_leaves_no_request_of_the_first_time(store: Store) -> None:
    rows = [{"request": i, "due_ms": 0.0} for i in range(9)]
    store.save(sweep(), level=0, requests=rows)
    store.save(sweep(), level=0, requests=rows[:4])
    assert len(store.requests(sweep().run.id)) == 4


def test_an_older_schema_gets_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with Store(path) as opened:
        opened.save(sweep(), level=0)
    with closing(sqlite3.connect(path)) as older, older:  # as schema 1 was
        older.execute("alter table runs drop column options")
        older.execute("alter table runs drop column state")
        older.execute("pragma user_version = 1")
    with Store(path) as opened:
        assert opened.kept("latest") == (sweep(), None, None)
        opened.save(sweep("new"), options="{}", state="cut")
        assert opened.kept("new")[1:] == ("{}", "cut")
    with closing(sqlite3.connect(path)) as now:
        assert now.execute("pragma user_version").fetchone() == (module.SCHEMA,)


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with closing(sqlite3.connect(path)) as newer, newer:
        newer.execute(f"pragma user_version = {module.SCHEMA + 1}")
    refused(path, "written by a newer servefit .*: update servefit")
    with closing(sqlite3.connect(path)) as newer:
        assert newer.execute("select count(*) from sqlite_master").fetchone() == (0,)


def test_a_locked_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("begin exclusive")
        with Store(store.path) as reader:
            assert reader.runs() == []  # readers are not in the way of a writer
            with pytest.raises(StoreError, match="another program is writing to it: wait"):
                reader.save(sweep())
        other.execute("rollback")
    store.save(sweep())


def test_two_sweeps_write_to_one_database(store: Store) -> None:
    with Store(store.path) as other:
        for i in range(5):
            store.save(sweep(f"a-{i}"), level=0)
            other.save(sweep(f"b-{i}"), level=0)
    assert len(store.runs()) == 10


@pytest.mark.skipif(os.name != "posix", reason="setrlimit")
def test_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, because a limit on file sizes holds for all of a process."""
    code = (
        "import resource, sys; from pathlib import Path; from agent.store import Store\n"
        "from agent.model import StoreError; from tests.agent.test_store import sweep\n"
        "store = Store(Path(sys.argv[1])); store.save(sweep('kept'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "try:\n"
        "    for i in range(500): store.save(sweep(f'run-{i}'), level=0)\n"
        "except StoreError as error: print(error)\n"
        "print(store.load('kept').run.id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs.db")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    failure, kept = done.stdout.splitlines()
    assert "or give another --db" in failure, done.stderr
    assert "space" in failure
    assert kept == "kept"
