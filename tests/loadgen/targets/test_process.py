"""Child processes: ready is ready, last words are kept, and nothing is left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from agent.model import TargetError, UsageError
from loadgen.targets.process import StartError, announced, running, started

SERVER = "print('hello');print('ready http://127.0.0.1:9',flush=True);import sys;sys.stdin.read()"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("line", "url"),
    [
        ("ready http://127.0.0.1:80", "http://127.0.0.1:80"),
        ("ready", None),
        ("already http://x", None),
        ("", None),
    ],
)
def test_announced(line: str, url: str | None) -> None:
    assert announced(line) == url


def test_runs_until_the_block_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(python(SERVER), ready=announced, log=log) as server:
        assert server.url == "http://127.0.0.1:9"
        assert is_alive(server.pid)
    assert not is_alive(server.pid)
    assert log.read_text().splitlines() == ["hello", "ready http://127.0.0.1:9"]


def test_a_child_that_dies_leaves_its_last_words() -> None:
    code = "import sys; print('out'); print('the reason', file=sys.stderr); sys.exit(7)"
    with (
        pytest.raises(StartError, match=r"thing stopped with exit code 7 .*: the reason") as caught,
        running(python(code), ready=announced, name="thing"),
    ):
        pass
    assert (caught.value.returncode, caught.value.last_words) == (7, "the reason")
    assert isinstance(caught.value, TargetError)


def test_a_child_that_is_never_ready_is_stopped() -> None:
    code = "import os,time; print(os.getpid(), flush=True); time.sleep(60)"
    with (
        pytest.raises(StartError, match=r"not ready within 0\.5 s") as caught,
        running(python(code), ready=announced, timeout_s=0.5),
    ):
        pass
    assert caught.value.returncode is None
    assert not is_alive(int(caught.value.last_words))


def test_a_program_that_does_not_exist() -> None:
    with (
        pytest.raises(TargetError, match="could not be started"),
        running(["/nonexistent/program"], ready=announced),
    ):
        pass


def test_a_stubborn_child_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadgen.targets.process.STOP_TIMEOUT_S", 0.3)
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('ready', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with running(python(code), ready=announced) as server:
        child = int(server.url)
        assert is_alive(child)
    assert not is_alive(server.pid)
    for _ in range(100):  # it is init's to reap
        if not is_alive(child) or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.02)
    pytest.fail("the grandchild lives on")


def test_health_is_polled_where_asked_for() -> None:
    code = (
        "import http.server, threading, time\n"
        "at = time.monotonic() + 0.5\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        ok = self.path == '/health' and time.monotonic() > at\n"
        "        self.send_response(200 if ok else 503); self.end_headers()\n"
        "    def log_message(self, *args): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Handler)\n"
        "print('ready', f'http://127.0.0.1:{server.server_port}', flush=True)\n"
        "server.serve_forever()\n"
    )
    started_s = time.monotonic()
    with running(python(code), ready=announced, health="/health"):
        assert time.monotonic() - started_s > 0.5


def test_an_exception_in_the_block_still_stops_the_child() -> None:
    pids = []

    def fails() -> None:
        with running(python(SERVER), ready=announced) as server:
            pids.append(server.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not is_alive(pids[0])


def test_a_wrong_spec_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*H100-SXM"), started("sim:h1000/llama"):
        pass
