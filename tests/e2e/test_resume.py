"""A sweep killed with -9 in its fifth level goes on and ends as an undisturbed one."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from pathlib import Path

import pytest

from agent.model import Sweep, decode_sweep
from agent.store import Store
from loadgen.targets.process import started
from tests.e2e.command import Started, loadgen, the_line, until
from tests.e2e.misbehaving import good, serving
from tests.e2e.test_auto import assert_replays
from tests.e2e.together import waiting

SPEC = "sim:h100-sxm/llama-3.1-8b?max_num_seqs=8&t0_ms=2"
SIZE = ("--input-tokens", "64", "--output-tokens", "16", "--metrics-url", "none")
LIST = ("--concurrency", "1,2,3,4,5,6,7", "--requests", "40", "--slo", "ttft:p95<1s")


def killed(home: Path, url: str, *args: str, at: str) -> None:
    """The sweep, killed as soon as it said `at`."""
    running = Started(home, "sweep", url, *args, "--db", str(home / "runs.db"))
    running.wait_for(at)
    running.process.kill()
    running.process.communicate()


def resumed(home: Path, *args: str) -> tuple[Sweep, str]:
    result = home / "resumed.json"
    done = loadgen(
        home, "sweep", "--resume", "latest", "--db", str(home / "runs.db"),
        "--json", str(result), *args,
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr
    return decode_sweep(result.read_bytes()), done.stderr


@waiting
def test_a_list_ends_with_the_levels_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    whole = tmp_path / "whole.json"
    with started(SPEC) as url:
        done = loadgen(tmp_path, "sweep", url, *LIST, *SIZE, "--json", str(whole))
        assert done.returncode in (0, 3), done.stderr
        killed(tmp_path, url, *LIST, *SIZE, at="[5/7] 5 streams, simulated: running")
        with Store(tmp_path / "runs.db") as store:
            before = store.kept("latest")
        assert before.state == "running"
        assert len(before.sweep.levels) == 4
        again, said = resumed(tmp_path)
        assert "[5/7] 5 streams" in said
        assert "[4/7]" not in said

        undisturbed = decode_sweep(whole.read_bytes())
        assert again.run.id == before.sweep.run.id
        assert again.levels[:4] == before.sweep.levels
        for ours, theirs in zip(again.levels, undisturbed.levels, strict=True):
            assert ours.concurrency == theirs.concurrency
            assert ours.requests == theirs.requests
        assert again.verdict is not None
        with Store(tmp_path / "runs.db") as store:
            assert store.kept("latest").state == "done"
            kept = store.requests(again.run.id)
        assert [sum(row["level"] == at for row in kept) for at in range(7)] == [40] * 7

        done = loadgen(tmp_path, "sweep", "--resume", "latest", "--db", str(tmp_path / "runs.db"))
        assert "is finished: nothing is left of it" in done.stderr
        assert "[" not in done.stderr
        assert "streams" in done.stdout  # the table again


@waiting
def test_a_search_goes_on_from_its_fifth_level(tmp_path: Path) -> None:
    args = ("--concurrency", "auto", "--budget", "30s", "--slo", "ttft:p95<60ms")
    with started(SPEC) as url:
        killed(tmp_path, url, *args, *SIZE, at="[5] ")
        with Store(tmp_path / "runs.db") as store:
            before = store.load("latest")
        again, said = resumed(tmp_path)
    assert len(before.levels) == 4
    assert again.levels[:4] == before.levels
    assert len(again.levels) > 4
    assert "[5] " in said
    found = again.curve.slo_capacity
    assert found is not None
    assert found.bracketed, said
    assert_replays(again, 30.0)


def answers(port: int) -> bool:
    with closing(socket.socket()) as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_another_server_is_refused(tmp_path: Path) -> None:
    with started(SPEC) as url:
        killed(tmp_path, url, *LIST, *SIZE, at="[2/7]")
        port = url.rsplit(":", 1)[1]
    database = tmp_path / "runs.db"
    with Store(database) as store:
        before = store.kept("latest")
    other = Started(tmp_path, "serve", "sim", "sim:l4/llama-3.2-1b", "--port", port)
    try:
        until(lambda: answers(int(port)))
        done = loadgen(tmp_path, "sweep", "--resume", before.sweep.run.id, "--db", str(database))
    finally:
        other.process.terminate()
        other.end()
    assert done.returncode == 2
    line = the_line(done.stderr)
    assert "this is not the server that it measured: llama-3.1-8b" in line
    assert "llama-3.2-1b" in line
    with Store(database) as store:
        assert store.kept("latest") == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["http://127.0.0.1:9"], "the URL is not what the run began with"),
        (["--concurrency", "auto"], "--concurrency is not what the run began with"),
        (["--requests", "9"], "--requests is not what the run began with"),
    ],
)
def test_what_contradicts_the_run_is_refused(tmp_path: Path, args: list[str], said: str) -> None:
    with serving(good) as address:
        killed(tmp_path, f"http://{address}", *LIST, *SIZE, at="[2/7]")
        done = loadgen(
            tmp_path, "sweep", *args, "--resume", "latest", "--db", str(tmp_path / "runs.db")
        )
    assert done.returncode == 2
    assert said in the_line(done.stderr)


def test_a_key_is_asked_for_again_and_was_never_kept(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-very-secret")
    with serving(good) as address:
        url = f"http://{address}"
        killed(tmp_path, url, *LIST, *SIZE, "--api-key-file", str(key), at="[2/7]")
        database = tmp_path / "runs.db"
        assert b"sk-very-secret" not in database.read_bytes()
        done = loadgen(tmp_path, "sweep", "--resume", "latest", "--db", str(database))
        assert done.returncode == 2
        assert "the header Authorization, whose value is not kept" in the_line(done.stderr)
        again, _ = resumed(tmp_path, "--api-key-file", str(key), url)
    assert len(again.levels) == 7
    assert "sk-very-secret" not in json.dumps(again.run.command)
    assert b"sk-very-secret" not in database.read_bytes()
