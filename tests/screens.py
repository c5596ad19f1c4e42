"""A program on a pseudo-terminal, and what a person would see: a terminal emulator shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import pyte


class OnTerminal:
    """Runs a program on a terminal of so many columns and rows. `raw` is all that it wrote."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24
    ) -> None:
        self.raw = ""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._leader, follower = pty.openpty()
        self._tell_size(columns, rows)
        self.process = subprocess.Popen(
            command, env=dict(env), stdin=follower, stdout=follower, stderr=follower,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(follower)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._leader)

    def lines(self) -> list[str]:
        """What is on the screen, without the blanks that fill it up."""
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def until(self, true: Callable[[list[str]], object], timeout_s: float = 20.0) -> list[str]:
        """The screen as soon as it is as it should be."""
        deadline = time.monotonic() + timeout_s
        while not true(self.lines()):
            assert time.monotonic() < deadline, "\n".join(self.lines())
            assert self._read(0.1), "\n".join(["ended:", *self.lines()])
        return self.lines()

    def ended(self, timeout_s: float = 60.0) -> list[str]:
        """The screen once the program has ended."""
        deadline = time.monotonic() + timeout_s
        while self._read(0.1):
            assert time.monotonic() < deadline, "\n".join(self.lines())
        self.process.wait(10)
        return self.lines()

    def resize(self, columns: int, rows: int) -> None:
        """As a window that is drawn wider or narrower: the kernel tells the program (SIGWINCH)."""
        self.screen.resize(rows, columns)
        self._tell_size(columns, rows)

    def press(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def _tell_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self, timeout_s: float) -> bool:
        """Whether there may be more."""
        if not select.select([self._leader], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._leader, 65_536)
        except OSError:  # what Linux says when the last writer has closed
            return False
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        return bool(data)


def _own_terminal() -> None:
    """The terminal is the program's own, so that its keys and its size reach it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
