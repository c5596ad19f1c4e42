"""Starts a server as a child process, waits until it can be used, and stops it again.

One way for every local target: the simulated engine and a real vLLM differ in their command line
and in how they say that they are ready, nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from agent.model import TargetError, UsageError

STOP_TIMEOUT_S = 5.0  # between SIGTERM and SIGKILL
_POLL_S = 0.05


class StartError(TargetError):
    """The child ended, or was not ready in time; `returncode` is None where it still ran."""

    def __init__(self, text: str, returncode: int | None, last_words: str) -> None:
        super().__init__(text)
        self.returncode = returncode
        self.last_words = last_words


class Started(msgspec.Struct, frozen=True):
    """A child process that answers at `url`."""

    url: str
    pid: int
    wait: Callable[[], int]  # returns its exit code once it has ended


def announced(line: str) -> str | None:
    """The address in a line `ready http://…`, which is how our own servers say they listen."""
    word, _, url = line.partition(" ")
    return url.strip() if word == "ready" and url else None


class _Output:
    """Reads the child's two streams on threads, so that a full pipe never blocks the child."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ready: Callable[[str], str | None] | None,
        log: IO[bytes] | None,
    ) -> None:
        self.url: str | None = None
        self.last_stdout = ""
        self.last_stderr = ""
        self._ready = ready
        self._log = log
        self._lock = threading.Lock()
        assert process.stdout is not None
        assert process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout, False), daemon=True),
            threading.Thread(target=self._read, args=(process.stderr, True), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[bytes], is_stderr: bool) -> None:
        with stream:
            for raw in stream:
                if self._log is not None:
                    with self._lock:
                        self._log.write(raw)
                        self._log.flush()
                line = raw.decode(errors="replace").strip()
                if line and is_stderr:
                    self.last_stderr = line
                elif line:
                    self.last_stdout = line
                    if self.url is None and self._ready is not None:
                        self.url = self._ready(line)

    def join(self) -> None:
        """Waits for the end of both streams; a grandchild that holds them open is not waited for"""
        for thread in self._threads:
            thread.join(timeout=1.0)

    def last_words(self) -> str:
        return self.last_stderr or self.last_stdout or "it said nothing"


def _answers(url: str) -> bool:
    """True where GET `url` answers 200; a proxy in the environment is not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def _wait(
    process: subprocess.Popen[bytes],
    output: _Output,
    url: str | None,
    health: str | None,
    timeout_s: float,
    name: str,
) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            output.join()
            code, words = process.returncode, output.last_words()
            raise StartError(
                f"{name} stopped with exit code {code} before it was ready: {words}", code, words
            )
        base = url or output.url
        if base is not None and (health is None or _answers(base + health)):
            return base
        time.sleep(_POLL_S)
    words = output.last_words()
    raise StartError(f"{name} was not ready within {timeout_s:g} s: {words}", None, words)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """To the child's whole group: it may have workers of its own, as vLLM does."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_TIMEOUT_S)
    _signal_group(process, signal.SIGKILL)
    process.wait()


@contextmanager
def running(
    argv: Sequence[str],
    *,
    ready: Callable[[str], str | None] | None = None,
    url: str | None = None,
    health: str | None = None,
    timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    name: str = "the server",
) -> Iterator[Started]:
    """Runs `argv` for as long as the block lasts, from the moment it can be used.

    It is usable once its base address is known (`url` given, or the first value other than None
    that `ready` makes of a line of its stdout) and, where `health` is a path, GET address + path
    answers 200. `env` replaces the environment; `log` is appended both of its streams.

    The child gets a session of its own, so that Ctrl-C in a terminal reaches us and not it, and a
    pipe as stdin that closes when we die, however we die. At the end it is terminated, and killed
    with its whole process group after 5 s.

    Raises StartError (a TargetError) with the child's last words where it ends or is not ready
    within `timeout_s`.
    """
    if ready is None and url is None:
        raise ValueError("either ready or url must say where the server listens")
    log_file = log.open("ab") if log is not None else None
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        if log_file is not None:
            log_file.close()
        raise TargetError(f"{name} could not be started: {error}") from error
    output = _Output(process, ready, log_file)
    try:
        yield Started(
            _wait(process, output, url, health, timeout_s, name), process.pid, process.wait
        )
    finally:
        _stop(process)
        output.join()
        if log_file is not None:
            log_file.close()


@contextmanager
def started(spec: str, *, host: str = "127.0.0.1", timeout_s: float = 30.0) -> Iterator[str]:
    """The simulated engine of `spec` (`sim:GPU/MODEL?…`) in a process of its own; gives its URL.

    A process of its own because client and server would otherwise share one interpreter, and the
    client would measure itself. Raises UsageError where the spec is wrong, else TargetError.
    """
    argv = [
        sys.executable, "-m", "loadgen.targets.sim", spec,
        "--host", host, "--port", "0", "--exit-with-parent",
    ]  # fmt: skip
    name = "the simulated engine"
    with ExitStack() as stack:
        try:
            server = stack.enter_context(
                running(argv, ready=announced, timeout_s=timeout_s, name=name)
            )
        except StartError as error:
            if error.returncode == 2:
                raise UsageError(error.last_words.removeprefix("error: ")) from error
            raise
        yield server.url
