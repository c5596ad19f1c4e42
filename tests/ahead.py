"""The real servers that the tests share, started while the tests before them run.

They take half a minute each, most of it on one core. `python -m tests.ahead NAME…` starts one
after the other and says of each, as a line of JSON, where it answers or why it does not; where
memory is short it says `later`. It reads `want NAME` (somebody waits, so never mind the memory) and
`stop NAME`, and ends with its stdin. It is a process of its own, so that no patch, signal or limit
of a test reaches it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from agent.model import ServefitError
from loadgen.targets.process import running
from loadgen.targets.vllm import VllmOptions, free_port, serve

ROOT = Path(__file__).parent.parent
MEMORY_BYTES = 6 << 30  # of two vLLMs: what must be free to start one that nobody waits for
PHOENIX_START_TIMEOUT_S = 180.0
SPANS_TO = "SERVEFIT_TEST_SPANS_TO"  # where `spanning_vllm` sends its spans
# What limits `planted_vllm`: six requests of 224 tokens overfill its cache (40 blocks of 32 tokens,
# and vLLM's own), eight of 32 leave most of it free.
PLANTED_SEQS, PLANTED_BLOCKS, PLANTED_LENGTH = 8, 41, 512


def real_dir() -> Path:
    """Where tests/real/install.sh puts the real parts."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SERVEFIT_REAL") or cache / "servefit" / "real")


def find_vllm_python() -> str | None:
    """The interpreter that has vLLM: the one named, the one installed for the tests, else ours."""
    if named := os.environ.get("LOADGEN_VLLM_PYTHON"):
        return named
    installed = real_dir() / "vllm" / "bin" / "python"
    if installed.exists():
        return str(installed)
    return sys.executable if importlib.util.find_spec("vllm") else None


def find_phoenix() -> Path | None:
    command = real_dir() / "phoenix" / "bin" / "phoenix"
    return command if command.exists() else None


# ---------------------------------------------------------------------------------- the servers


@contextmanager
def _vllm(*extra: str, **options: Any) -> Iterator[str]:
    with serve(VllmOptions(python=find_vllm_python(), extra=extra, **options)) as started:
        yield started.url


@contextmanager
def _phoenix() -> Iterator[str]:
    port = free_port("127.0.0.1", 0)
    with tempfile.TemporaryDirectory(prefix="servefit-phoenix-") as folder:
        env = {
            **os.environ,
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(port),
            "PHOENIX_GRPC_PORT": str(free_port("127.0.0.1", 0)),
            "PHOENIX_WORKING_DIR": folder,
            "PHOENIX_TELEMETRY_ENABLED": "false",
        }
        with running(
            [str(find_phoenix()), "serve"],
            url=f"http://127.0.0.1:{port}",
            health="/healthz",
            timeout_s=PHOENIX_START_TIMEOUT_S,
            env=env,
            name="Phoenix",
        ) as started:
            yield started.url


# By the names of their fixtures, in the order in which they are needed and started.
SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "phoenix": _phoenix,
    "spanning_vllm": lambda: _vllm(otlp_traces_endpoint=os.environ[SPANS_TO]),
    "planted_vllm": lambda: _vllm(
        max_num_seqs=PLANTED_SEQS, num_gpu_blocks=PLANTED_BLOCKS, max_model_len=PLANTED_LENGTH
    ),
    "real_vllm": _vllm,
    "pooling_vllm": lambda: _vllm("--runner", "pooling", "--convert", "embed"),
}


# --------------------------------------------------------------------------- the process of theirs


def _memory_bytes() -> int:
    """What is free or could be; where that cannot be read, as if it were enough."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return MEMORY_BYTES
    [kib] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kib) << 10


def _say(name: str, what: str, text: str) -> None:
    print(json.dumps([name, what, text]), flush=True)


class _Servers:
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._wanted = {name: threading.Event() for name in names}
        self._running = {name: ExitStack() for name in names}
        self._at_end = False

    def _start_all(self) -> None:
        for name in self._names:
            if _memory_bytes() < MEMORY_BYTES:
                _say(name, "later", "")
                while _memory_bytes() < MEMORY_BYTES and not self._wanted[name].wait(0.5):
                    pass
            if self._at_end:
                return
            try:
                _say(name, "url", self._running[name].enter_context(SERVERS[name]()))
            except ServefitError as error:
                _say(name, "error", str(error))

    def serve(self, asked: Iterator[str]) -> None:
        starting = threading.Thread(target=self._start_all)
        starting.start()
        for line in asked:
            verb, name = line.split()
            if verb == "want":
                for one in self._names[: self._names.index(name) + 1]:  # those before it come first
                    self._wanted[one].set()
            else:
                self._running[name].close()
        self._at_end = True
        for wanted in self._wanted.values():
            wanted.set()
        starting.join()
        for stack in self._running.values():
            stack.close()


# ----------------------------------------------------------------------------------- for the tests


class Ahead:
    """That process, as the fixtures use it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._reserved = socket.socket()  # bound and not listening: a receiver may take its port
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.spans_port: int = self._reserved.getsockname()[1]
        self._names = names
        self._said: dict[str, tuple[str, str]] = {}  # by name: url, error or later; and the text
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ahead", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, SPANS_TO: f"http://127.0.0.1:{self.spans_port}"},
            start_new_session=True,  # Ctrl-C is for the tests
        )

    def _ask(self, verb: str, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {name}\n")
        self._process.stdin.flush()

    def _hear(self, name: str) -> tuple[str, str]:
        assert self._process.stdout is not None
        while name not in self._said:
            line = self._process.stdout.readline()
            assert line, f"{name} did not start: its process ended"
            about, what, text = json.loads(line)
            self._said[about] = what, text
        return self._said[name]

    def settle(self) -> None:
        """Waits until none is starting: a measurement needs the core."""
        for name in self._names:
            if self._hear(name)[0] == "later":
                return

    @contextmanager
    def running(self, name: str) -> Iterator[str]:
        """The URL of a server once it answers; it is stopped at the end of the block."""
        self._ask("want", name)
        if self._hear(name)[0] == "later":
            del self._said[name]
        what, text = self._hear(name)
        assert what == "url", text
        try:
            yield text
        finally:
            self._ask("stop", name)

    def close(self) -> None:
        """Stops all of them; one that is just starting is awaited first."""
        self._process.communicate()
        self._reserved.close()


if __name__ == "__main__":
    _Servers(sys.argv[1:]).serve(sys.stdin)
