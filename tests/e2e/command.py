"""The commands as a user runs them: processes of their own, with a data directory of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOADGEN = [sys.executable, "-m", "loadgen.cli"]
AGENT = [sys.executable, "-m", "agent.cli"]
SMALL = ("--input-tokens", "16", "--output-tokens", "3", "--metrics-url", "none")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Ours, without what a user of this machine may have set for servefit or a terminal."""
    drop = ("LOADGEN_", "OPENAI_API_KEY", "SERVEFIT_DEBUG", "FORCE_COLOR", "COLUMNS", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return kept | {"XDG_DATA_HOME": str(home), "TERM": "xterm"} | more


def loadgen(
    home: Path, *args: str, env: dict[str, str] | None = None, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; a traceback anywhere is a failure."""
    return _run(LOADGEN, home, args, env, settings)


def agent(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The same of `agent`."""
    return _run(AGENT, home, args, None, {})


def _run(
    command: Sequence[str],
    home: Path,
    args: Sequence[str],
    env: dict[str, str] | None,
    settings: dict[str, Any],
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*command, *args],
        env=environment(home, **(env or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        **settings,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "defect" not in done.stderr, done.stderr
    return done


def the_line(stderr: str) -> str:
    """The one line of failure; notes, progress and names of written files may stand around it."""
    around = ("note: ", "[", "wrote ")
    lines = [line for line in stderr.splitlines() if line and not line.startswith(around)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("loadgen: ")
    return lines[0].removeprefix("loadgen: ")


class Started:
    """The command while it runs; `wait_for` reads its stderr until a line has some text."""

    def __init__(self, home: Path, *args: str) -> None:
        self.said = ""
        self.process = subprocess.Popen(
            [*LOADGEN, *args],
            env=environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        while text not in self.said:
            line = self.process.stderr.readline()
            assert line, f"ended before {text!r}: {self.said}"
            self.said += line

    def end(self, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """(exit code, stdout, all of stderr)."""
        try:
            out, rest = self.process.communicate(timeout=timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()
        self.said += rest
        assert "Traceback" not in out + self.said, self.said
        return self.process.returncode, out, self.said


def until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
