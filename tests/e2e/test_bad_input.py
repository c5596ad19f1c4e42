"""Whatever is wrong ends in the exit code of the contract, with one line that says what to do."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trustme

from agent.model import Sweep, decode_sweep
from agent.store import Store
from loadgen.targets.process import announced, running
from tests.e2e.command import SMALL, Started, environment, loadgen, the_line
from tests.e2e.misbehaving import (
    MODEL,
    Pages,
    Reply,
    always,
    cut,
    error_object,
    good,
    html,
    message,
    models,
    refusal,
    serving,
    silence,
)
from tests.support import require

# A level of twenty requests on two streams.
SWEEP = (*SMALL, "--concurrency", "2", "--requests", "20")


# ------------------------------------------------------------------ a target that cannot be used: 4

REFUSED: dict[str, tuple[Pages, Reply, list[str]]] = {
    "models 401": ({"/v1/models": refusal(401, "bad key")}, good, ["401 (bad key)", "--api-key"]),
    "models 403": ({"/v1/models": refusal(403)}, good, ["403", "may not use it"]),
    "models 404": ({"/v1/models": refusal(404)}, good, ["check host, port and path", "--model"]),
    "models 500": ({"/v1/models": refusal(500, "boom")}, good, ["500 (boom)", "log"]),
    "models html": ({"/v1/models": html()}, good, ["HTML", "check host, port and path"]),
    "models other": ({"/v1/models": message(200, {"a": 1})}, good, ["not an OpenAI-compatible"]),
    "no models": ({"/v1/models": models()}, good, ["lists no models", "load one"]),
    "chat 401": ({}, always(refusal(401)), ["401", "OPENAI_API_KEY"]),
    "chat 403": ({}, always(refusal(403)), ["403"]),
    "chat 404": ({}, always(refusal(404)), ["404", "--endpoint"]),
    "chat html": ({}, always(html()), ["not as an OpenAI-compatible API", "check host"]),
    "chat 400": (
        {},
        always(refusal(400, "no such field")),
        ["refuses every form", "no such field"],
    ),
    "chat silent": ({}, silence, ["no answer within 1 s", "log"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    pages, probe, said = REFUSED[case]
    result = tmp_path / "out.json"
    with serving(pages=pages, probe=probe) as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SWEEP, "--timeout", "1s", "--json", str(result)
        )
    assert done.returncode == 4, done.stderr
    line = the_line(done.stderr)
    for text in said:
        assert text in line
    assert done.stdout == ""
    assert not result.exists()


def test_an_unknown_model_names_the_nearest(tmp_path: Path) -> None:
    with serving(pages={"/v1/models": models("llama-8b", "qwen-7b")}) as address:
        done = loadgen(tmp_path, "run", f"http://{address}", *SMALL, "--model", "llama-9b")
    assert done.returncode == 4
    assert "no model 'llama-9b'" in the_line(done.stderr)
    assert "nearest is 'llama-8b'" in the_line(done.stderr)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        done = loadgen(tmp_path, "sweep", f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert done.returncode == 4
    assert "Connection refused; is the server up" in the_line(done.stderr)


def test_a_name_that_is_none(tmp_path: Path) -> None:
    done = loadgen(tmp_path, "sweep", "http://nobody.invalid:8000")
    assert done.returncode == 4
    assert "no connection to http://nobody.invalid:8000" in the_line(done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog drops packets on Linux")
def test_packets_that_vanish(tmp_path: Path) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # nobody accepts them: further ones get no answer at all
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        done = loadgen(tmp_path, "sweep", url, "--timeout", "1s")
    assert done.returncode == 4
    assert f"no connection to {url} in time" in the_line(done.stderr)


class Tls:
    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self.context)


def test_a_certificate_of_an_authority_of_ones_own(tmp_path: Path) -> None:
    tls = Tls(tmp_path)
    with serving(tls=tls.context) as address:
        url = f"https://{address}"
        refused = loadgen(tmp_path, "sweep", url, *SWEEP)
        wrong_scheme = loadgen(tmp_path, "sweep", f"http://{address}", *SWEEP)
        wrong_name = loadgen(
            tmp_path, "sweep", url.replace("127.0.0.1", "localhost"), *SWEEP,
            "--ca-file", str(tls.ca_file),
        )  # fmt: skip
        trusted = loadgen(tmp_path, "sweep", url, *SWEEP, "--ca-file", str(tls.ca_file))
        blind = loadgen(tmp_path, "sweep", url, *SWEEP, "--insecure")
    assert refused.returncode == wrong_name.returncode == 4
    assert "--ca-file" in the_line(refused.stderr)
    assert "--insecure" in the_line(refused.stderr)
    assert "localhost" in the_line(wrong_name.stderr)
    assert wrong_scheme.returncode == 4
    assert "is it not https://?" in the_line(wrong_scheme.stderr)
    for done in (trusted, blind):
        assert done.returncode in (0, 3)  # 3: a busy machine
        assert "20 ok" in done.stderr


def test_https_where_there_is_no_tls(tmp_path: Path) -> None:
    with serving() as address:
        done = loadgen(tmp_path, "sweep", f"https://{address}", *SWEEP, "--timeout", "1s")
    assert done.returncode == 4
    assert "http://" in the_line(done.stderr)


def test_a_busy_server_asks_for_yes(tmp_path: Path) -> None:
    name = f'{{model_name="{MODEL}"}}'
    page = f"vllm:num_requests_running{name} 3\nvllm:num_requests_waiting{name} 2\n"
    metrics = message(200, page.encode(), "text/plain; version=0.0.4")
    asked = ["--concurrency", "1", "--requests", "2", *SMALL[:4]]
    with serving(pages={"/metrics": metrics}) as address:
        done = loadgen(tmp_path, "sweep", f"http://{address}", *asked)
        all_the_same = loadgen(tmp_path, "run", f"http://{address}", *asked, "--yes")
    assert done.returncode == 2
    assert "3 requests running, 2 waiting" in the_line(done.stderr)
    assert "--yes" in the_line(done.stderr)
    assert all_the_same.returncode in (0, 3)
    assert "2 ok" in all_the_same.stderr


# ----------------------------------------------------------------------- failures within a level: 3

WITHIN: dict[str, tuple[Reply, str]] = {
    "cut short": (cut, "cut"),
    "an error object": (error_object, "stream_error"),
    "429": (always(refusal(429, "slow down")), "http_429"),
    "503": (always(refusal(503)), "http_503"),
    "html": (always(html(502)), "http_502"),
}


@pytest.mark.parametrize("case", WITHIN)
def test_failures_in_a_level_are_counted_by_kind(tmp_path: Path, case: str) -> None:
    """One in four fails: above the bound of 10 %, so the level is invalid and the run done."""
    bad, kind = WITHIN[case]

    async def reply(number: int, out: object) -> None:
        await (bad if number % 4 == 3 else good)(number, out)  # type: ignore[arg-type]

    result, page, table = (tmp_path / name for name in ("out.json", "out.html", "out.csv"))
    with serving(reply) as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SWEEP,
            "--json", str(result), "--html", str(page), "--csv", str(table),
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    [level] = json.loads(result.read_bytes())["levels"]
    assert level["requests"]["errors"] == {kind: 5}
    assert (level["requests"]["ok"], level["requests"]["failed"]) == (15, 5)
    assert level["measurement"]["valid"] is False
    assert f"5 {kind}" in done.stderr
    [row] = csv.DictReader(table.read_text().splitlines())
    assert row["requests.errors"] == f"{kind}=5"
    assert kind in page.read_text()


def test_a_few_failures_are_borne(tmp_path: Path) -> None:
    async def reply(number: int, out: object) -> None:
        await (cut if number == 7 else good)(number, out)  # type: ignore[arg-type]

    result = tmp_path / "out.json"
    with serving(reply) as address:
        loadgen(tmp_path, "sweep", f"http://{address}", *SWEEP, "--json", str(result))
    [level] = json.loads(result.read_bytes())["levels"]
    assert level["requests"]["errors"] == {"cut": 1}
    assert not any(why.startswith("errors") for why in level["measurement"]["reasons"])


def test_what_a_failed_request_of_the_warm_up_cost_the_server_is_told(tmp_path: Path) -> None:
    async def reply(number: int, out: object) -> None:
        await (cut if number == 1 else good)(number, out)  # type: ignore[arg-type]

    result = tmp_path / "out.json"
    with serving(reply) as address:
        loadgen(
            tmp_path, "sweep", f"http://{address}", *SWEEP, "--warmup", "4", "--json", str(result)
        )
    overhead = json.loads(result.read_bytes())["run"]["overhead"]
    assert overhead["warmup_requests"] == 3
    assert overhead["warmup_tokens"] == 3 * 3 + 2


@contextmanager
def simulated() -> Iterator[tuple[str, int]]:
    """The simulated engine in a process of its own, to be killed or stopped: (URL, pid)."""
    argv = [
        sys.executable, "-m", "loadgen.targets.sim", "sim:h100-sxm/llama-3.1-8b",
        "--port", "0", "--exit-with-parent",
    ]  # fmt: skip
    with running(argv, ready=announced) as server:
        yield server.url, server.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_server_that_dies_or_hangs_in_the_second_level(
    tmp_path: Path, number: signal.Signals
) -> None:
    result, database = tmp_path / "out.json", tmp_path / "runs.db"
    with simulated() as (url, pid):
        sweep = Started(
            tmp_path, "sweep", url, *SMALL[:2], "--output-tokens", "16", *SMALL[4:],
            "--concurrency", "4,12,16", "--duration", "3s", "--timeout", "1s",
            "--json", str(result), "--db", str(database),
        )  # fmt: skip
        sweep.wait_for("[2/3] 12 streams, simulated: running")
        with Store(database) as store:  # the first level is kept before the second begins
            assert store.runs()[0]["levels"] == 1
        os.kill(pid, number)
        code, out, said = sweep.end(timeout_s=100)
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    assert code == 3, said
    levels = json.loads(result.read_bytes())["levels"]
    first, second = levels[0]["requests"], levels[1]["requests"]
    assert first["failed"] == 0
    assert first["ok"] > 0
    assert second["failed"] > 0
    assert set(second["errors"]) <= {"connect", "reset", "cut", "timeout"}
    assert "INVALID" in out
    with Store(database) as store:
        assert store.load("latest").levels == decode_sweep(result.read_bytes()).levels


# ---------------------------------------------------------------------------------- files and disks


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """A data directory with one small run in it, and the run."""
    home = tmp_path_factory.mktemp("home")
    result = home / "out.json"
    with serving() as address:
        loadgen(home, "sweep", f"http://{address}", *SWEEP, "--json", str(result))
    return home, decode_sweep(result.read_bytes())


@pytest.mark.parametrize("option", ["--json", "--html", "--csv"])
def test_a_full_disk_keeps_the_result_elsewhere(tmp_path: Path, option: str) -> None:
    require(Path("/dev/full").exists(), "/dev/full")
    with serving() as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SWEEP, option, "/dev/full",
            env={"TMPDIR": str(tmp_path)},
        )  # fmt: skip
    assert done.returncode == 2
    line = the_line(done.stderr)
    assert line.startswith("/dev/full: No space left on device; it is kept as ")
    rescued = Path(line.rpartition(" ")[2])
    assert rescued.stat().st_size > 100
    assert "tok/s" in done.stdout  # the table is shown all the same


def test_no_disk_has_room(tmp_path: Path) -> None:
    """No file of ours may grow beyond 30 kB, the database neither: what a full disk is like."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    result = tmp_path / "out.html"
    with serving() as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SWEEP, "--html", str(result),
            env={"TMPDIR": str(tmp_path)}, preexec_fn=limit,
        )  # fmt: skip
    assert done.returncode == 2
    assert "out.html" in done.stderr
    assert "20 ok" in done.stderr
    assert not list(tmp_path.glob("servefit-*"))  # no half of a rescue


def test_no_room_behind_stdout(measured: tuple[Path, Sweep]) -> None:
    require(Path("/dev/full").exists(), "/dev/full")
    home, _ = measured
    for args in (["runs"], ["report"], ["export"], ["export", "--format", "csv"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "loadgen.cli", *args],
                env=os.environ | {"XDG_DATA_HOME": str(home), "TMPDIR": str(home)},
                stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            )  # fmt: skip
        assert done.returncode == 2, args
        assert "No space left on device" in the_line(done.stderr)


def test_files_that_cannot_be_written_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"
    cases = {str(tmp_path): "this is a directory", str(tmp_path / "no" / "x"): "make it first"}
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        cases[str(locked / "x")] = "no permission"
    for path, said in cases.items():
        done = loadgen(tmp_path, "sweep", url, "--html", path)
        assert done.returncode == 2
        assert said in the_line(done.stderr)


def test_a_database_that_is_none(tmp_path: Path, measured: tuple[Path, Sweep]) -> None:
    home, _ = measured
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all, but long enough to have a header " * 40)
    broken = tmp_path / "broken.db"
    whole = (home / "servefit" / "servefit.db").read_bytes()
    broken.write_bytes(whole[:4096] + b"\xff" * 4096 + whole[8192:])
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()
    for path, said in (
        (garbage, "move it away, or give another --db"),
        (newer, "update servefit"),
        (tmp_path, "give another --db"),
    ):
        for command in (["sweep", "http://127.0.0.1:9"], ["runs"]):
            done = loadgen(tmp_path, *command, "--db", str(path))
            assert done.returncode == 2
            assert said in the_line(done.stderr)
    done = loadgen(tmp_path, "export", "--db", str(broken))
    assert done.returncode == 2
    assert "--db" in the_line(done.stderr)
    done = loadgen(tmp_path, "runs", "--db", str(tmp_path / "none.db"))
    assert done.returncode == 2
    assert "no such file" in the_line(done.stderr)


def test_a_default_database_that_is_none_does_not_stop_the_sweep(tmp_path: Path) -> None:
    database = tmp_path / "servefit" / "servefit.db"
    database.parent.mkdir()
    database.write_bytes(b"x" * 5000)
    with serving() as address:
        done = loadgen(tmp_path, "run", f"http://{address}", *SMALL, "--requests", "3")
    assert done.returncode in (0, 3)
    assert the_line(done.stderr).endswith("this run is not kept")
    assert "3 ok" in done.stderr
    assert database.read_bytes() == b"x" * 5000


# --------------------------------------------------------------------------------- pipes and quiet


def test_json_on_stdout_is_nothing_else(tmp_path: Path) -> None:
    with serving() as address:
        done = loadgen(tmp_path, "sweep", f"http://{address}", *SWEEP, "--json", "-")
        quiet = loadgen(tmp_path, "sweep", f"http://{address}", *SWEEP, "--quiet", "--json", "-")
        table = loadgen(tmp_path, "sweep", f"http://{address}", *SWEEP, "--csv", "-", "--quiet")
    assert decode_sweep(done.stdout.encode()).levels
    assert "tok/s" in done.stderr  # the table went there
    assert decode_sweep(quiet.stdout.encode()).levels
    assert all(line.startswith("note: ") for line in quiet.stderr.splitlines())
    assert len(list(csv.reader(table.stdout.splitlines()))) == 2


@pytest.mark.parametrize("args", ["runs", "report", "export", "--help", "sweep --help"])
def test_a_reader_that_leaves_is_no_error(measured: tuple[Path, Sweep], args: str) -> None:
    home, _ = measured
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "loadgen.cli", *args.split()],
        env=os.environ | {"XDG_DATA_HOME": str(home)},
        stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_reader_that_leaves_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """`loadgen sweep … 2>&1 | head -1`"""
    result = tmp_path / "out.json"
    with serving(partial(good, tokens=20, pause_s=0.005)) as address:
        process = subprocess.Popen(
            [sys.executable, "-m", "loadgen.cli", "sweep", f"http://{address}", *SWEEP,
             "--concurrency", "1,2", "--json", str(result)],
            env=os.environ | {"XDG_DATA_HOME": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.wait(60)
    assert len(decode_sweep(result.read_bytes()).levels) == 2


def test_nothing_steers_the_terminal(tmp_path: Path) -> None:
    """A server's words may hold anything; a pipe gets no escape sequence, nor does a terminal."""
    evil = "\x1b[2J\x1b]0;owned\x07 [bold]x[/bold]"
    with serving(pages={"/v1/models": refusal(401, evil)}) as address:
        refused = loadgen(tmp_path, "sweep", f"http://{address}")
    with serving(pages={"/v1/models": models(evil)}) as address:
        done = loadgen(tmp_path, "run", f"http://{address}", *SMALL, "--requests", "3")
        listed = loadgen(tmp_path, "runs")
    for text in (refused.stderr, done.stderr, done.stdout, listed.stdout):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "[bold]x[/bold]" in done.stdout
    assert "[bold]x[/bold]" in listed.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_letters(tmp_path: Path, encoding: str) -> None:
    with serving() as address:
        done = loadgen(
            tmp_path, "run", f"http://{address}", *SMALL, "--requests", "3",
            env={"PYTHONIOENCODING": encoding}, encoding=encoding,
        )  # fmt: skip
    assert done.returncode in (0, 3)
    assert "tok/s" in done.stdout


def test_closed_streams_are_no_defect(measured: tuple[Path, Sweep]) -> None:
    """`loadgen runs >&-`, as a badly written cron job may have it."""
    home, _ = measured
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" -m loadgen.cli runs {closed}', sys.executable],
            env=environment(home), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, closed
        assert done.stderr == ""


def test_an_address_without_a_scheme_is_http(tmp_path: Path) -> None:
    with serving(good) as url:
        done = loadgen(tmp_path, "run", url.removeprefix("http://"), "--requests", "3")
    assert done.returncode in (0, 3), done.stderr
