"""`agent query` and `agent import`: what they print, and what they refuse in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from agent.model import Level, Run, Sweep, Target, encode
from agent.recall import Recall
from tests.agent.recorded import NOON, Clocks, gauge, minute, store
from tests.agent.test_cli import Command, agent


@pytest.fixture
def db(tmp_path: Path) -> str:
    """Three minutes of one server."""
    path = tmp_path / "agent.db"
    with store(path, Clocks()) as history:
        for n in range(3):
            values = [gauge("kv_usage_ratio", 0.25 * n), gauge("requests_running", 1000.0 * n)]
            history.add_minute(minute(NOON + 60 * n, values))
    return str(path)


def test_a_series_as_json_csv_and_table(capsys: Command, db: str) -> None:
    window = ("--from", str(NOON), "--to", str(NOON + 179), "--step", "1m", "--db", db)
    code, out, err = agent(capsys, "query", "kv_usage_ratio", *window, "--format", "json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "metric": "kv_usage_ratio",
        "unit": "1",
        "points": [[NOON, 0.0], [NOON + 60, 0.25], [NOON + 120, 0.5]],
    }
    code, out, _ = agent(capsys, "query", "kv_usage_ratio", *window, "--format", "csv")
    assert list(csv.reader(out.splitlines())) == [
        ["unix_s", "kv_usage_ratio"], [str(NOON), "0.0"], [str(NOON + 60), "0.25"],
        [str(NOON + 120), "0.5"],
    ]  # fmt: skip
    code, out, _ = agent(capsys, "query", "requests_running", *window)
    assert out.splitlines()[0] == "requests_running, 1"
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["0", "1,000", "2,000"]


def test_the_last_hour_ends_with_the_newest_sample(capsys: Command, db: str) -> None:
    """The agent has stopped long ago: there is an answer all the same."""
    code, out, _ = agent(
        capsys, "query", "requests_running", "--step", "60", "--db", db, "--format", "json"
    )
    assert code == 0
    assert [value for _, value in json.loads(out)["points"]] == [0.0, 1000.0, 2000.0]


def test_a_window_without_samples(capsys: Command, db: str) -> None:
    code, out, _ = agent(capsys, "query", "ttft_mean_ms", "--db", db)
    assert (code, out) == (0, "ttft_mean_ms, ms\nno samples in this window\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["kv"], "no metric 'kv', nearest is 'kv_"),
        (["kv_usage_ratio", "--last", "soon"], "--last 'soon': write a time"),
        (["kv_usage_ratio", "--step", "0"], "--step '0': write a time"),
        (["kv_usage_ratio", "--last", "1h", "--from", "0"], "give one"),
        (["kv_usage_ratio", "--from", "noon"], "--from 'noon': write an instant"),
        (["kv_usage_ratio", "--from", "10", "--to", "5"], "the earlier first"),
        (["kv_usage_ratio", "--server", "cat"], "no server 'cat', nearest is 'chat'"),
        (["kv_usage_ratio", "--format", "xml"], "--format"),
        ([], "METRIC"),
    ],
)
def test_questions_that_make_no_sense(capsys: Command, db: str, args: list[str], said: str) -> None:
    code, out, err = agent(capsys, "query", *args, "--db", db)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_store_that_is_none(capsys: Command, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("dear")
    for path, said in ((tmp_path / "none", "no agent has written"), (letter, "not a database")):
        code, out, err = agent(capsys, "query", "kv_usage_ratio", "--db", str(path))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert said in err


def test_an_empty_store_says_so(capsys: Command, tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    store(path, Clocks()).close()
    code, _, err = agent(capsys, "query", "kv_usage_ratio", "--db", str(path))
    assert code == 2
    assert "holds no sample yet" in err


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    levels = [Level(concurrency=n, output_tokens_per_s=100.0 * n) for n in (1, 2)]
    path = tmp_path / "sweep.json"
    path.write_bytes(encode(Sweep(Run(id="r1"), Target(model="tiny"), levels=levels)))
    return path


def test_a_curve_is_imported_once(capsys: Command, tmp_path: Path, curve: Path) -> None:
    db = tmp_path / "agent.db"
    for _ in range(2):
        code, out, err = agent(capsys, "import", str(curve), "--server", "chat", "--db", str(db))
        assert (code, out, err) == (0, "curve 1 of tiny: 2 levels\n", "")
    with store(db, Clocks()):  # and beside a running agent
        assert agent(capsys, "import", str(curve), "--db", str(db))[0] == 0
    with Recall(db) as recall:
        assert [(one["key"], one["source"]) for one in recall.curves()] == [("r1", "chat")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a sweep"),
        (b"{}", "not a sweep"),
        (b"\xff", "not a sweep"),
        (b'{"levels": []}', "no level has both a load"),
        (b'{"levels": [{"concurrency": 3}]}', "no level has both a load"),
        (
            b'{"levels": [{"concurrency": 3, "output_tokens_per_s": -1}]}',
            "levels[0]: output_tokens_per_s is -1",
        ),
        (b'{"levels": [{"concurrency": 3, "output_tokens_per_s": NaN}]}', "not a sweep"),
    ],
)
def test_a_curve_that_is_none(capsys: Command, tmp_path: Path, content: bytes, said: str) -> None:
    file, db = tmp_path / "x.json", tmp_path / "agent.db"
    file.write_bytes(content)
    code, out, err = agent(capsys, "import", str(file), "--db", str(db))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"agent: {file}: ")
    assert not db.exists()
    assert said in err


def test_a_file_that_is_not_there(capsys: Command, tmp_path: Path) -> None:
    code, _, err = agent(capsys, "import", str(tmp_path / "none.json"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "No such file" in err
