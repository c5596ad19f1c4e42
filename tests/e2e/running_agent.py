"""`agent run` as a user runs it: a process of its own, its configuration in a file; and a page."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from loadgen.targets.vllm import free_port
from tests.e2e.command import environment

T = TypeVar("T")


class RunningAgent:
    """The agent over one store; it may be killed and started again. Use it as a context.

    `more` is TOML behind `[agent]`; `env` what the process finds besides.
    """

    def __init__(self, folder: Path, more: str = "", env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}"
        self.db = folder / "agent.db"
        self.config = folder / "agent.toml"
        self.log = folder / "agent.log"
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(more)

    def configure(self, more: str) -> None:
        listen = self.url.removeprefix("http://")
        self.config.write_text(f'[agent]\ndb = "{self.db}"\nlisten = "{listen}"\n{more}')

    def __enter__(self) -> RunningAgent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent.cli", "run", "--config", str(self.config)],
                env=environment(self.folder, **self._env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.until(self._is_ready, 30, "is not ready")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        try:
            return bool(self.get("/readyz") is not None)
        except OSError:
            return False

    def until(self, ask: Callable[[], T], timeout_s: float, why: str) -> T:
        """Asks until the answer is true."""
        deadline = time.monotonic() + timeout_s
        while not (answer := ask()):
            assert time.monotonic() < deadline, (
                f"the agent {why} after {timeout_s:g} s: {self.said()}"
            )
            time.sleep(0.05)
        return answer

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            body = reply.read()
        is_json = reply.headers.get_content_type() == "application/json"
        return json.loads(body) if is_json else body.decode()

    def said(self) -> str:
        return self.log.read_text("utf-8")

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def reload(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        """By SIGTERM; its exit code."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(timeout=20)
        finally:
            self._process = None
            assert "Traceback" not in self.said(), self.said()
            assert "defect" not in self.said(), self.said()


def server(name: str, url: str, interval: str = "1s", more: str = "") -> str:
    return f'[[server]]\nname = "{name}"\nurl = "{url}"\ninterval = "{interval}"\n{more}\n'


def memory_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Page:
    """A vLLM page whose counter rises by 7 tokens with each look; it can go away, or be slow."""

    def __init__(self) -> None:
        self.looks = 0
        self.is_there = True
        self.slow_s = 0.0
        page = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not page.is_there:
                    self.send_error(503)
                    return
                time.sleep(page.slow_s)
                page.looks += 1
                body = page.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def text(self) -> str:
        labels = '{model_name="tiny",engine="0"}'
        return (
            f"vllm:num_requests_running{labels} 3\n"
            f"vllm:num_requests_waiting{labels} 0\n"
            f"vllm:kv_cache_usage_perc{labels} 0.25\n"
            f"vllm:generation_tokens_total{labels} {7 * self.looks}\n"
            f"vllm:prompt_tokens_total{labels} {11 * self.looks}\n"
        )


@contextmanager
def serving_page() -> Iterator[Page]:
    one = Page()
    thread = threading.Thread(target=one.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield one
    finally:
        one.http.shutdown()
        one.http.server_close()
        thread.join()
