"""A terminal, and what a person would see on it: a terminal emulator shows what was written."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

import pyte


class Terminal:
    """A pseudo-terminal of so many columns and rows. `raw` is all that was written to it."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.raw = ""
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._leader, self.follower = pty.openpty()
        self._tell_size(columns, rows)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        os.close(self._leader)
        os.close(self.follower)

    def file(self, encoding: str = "utf-8") -> TextIO:
        """To write to it from here. To be closed."""
        return os.fdopen(os.dup(self.follower), "w", encoding=encoding)

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
            assert self.read(0.05), "\n".join(["ended:", *self.lines()])
        return self.lines()

    def settled(self) -> list[str]:
        """The screen once nothing more comes."""
        before = -1
        while len(self.raw) != before:
            before = len(self.raw)
            self.read(0.03)
        return self.lines()

    def resize(self, columns: int, rows: int) -> None:
        """As a window that is drawn wider or narrower: the kernel tells the program (SIGWINCH)."""
        self.settled()
        self.screen.resize(rows, columns)
        self._tell_size(columns, rows)

    def read(self, timeout_s: float) -> bool:
        """Takes what was written; whether there may be more."""
        if not select.select([self._leader], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._leader, 65_536)
        except OSError:  # what Linux says when the last writer has closed
            return False
        self.raw += data.decode(errors="replace")
        self._stream.feed(data)
        return bool(data)

    def _tell_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class OnTerminal(Terminal):
    """A program that runs on a terminal of its own."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24
    ) -> None:
        super().__init__(columns, rows)
        self.process = subprocess.Popen(
            command, env=dict(env), stdin=self.follower, stdout=self.follower,
            stderr=self.follower, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(self.follower)

    def __enter__(self) -> OnTerminal:
        return self

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._leader)

    def press(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def ended(self, timeout_s: float = 60.0) -> list[str]:
        """The screen once the program has ended."""
        deadline = time.monotonic() + timeout_s
        while self.read(0.1):
            assert time.monotonic() < deadline, "\n".join(self.lines())
        self.process.wait(10)
        return self.lines()


def _own_terminal() -> None:
    """The terminal is the program's own, so that its keys and its size reach it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
