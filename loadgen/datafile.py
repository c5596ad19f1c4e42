"""Files of data that others wrote: unpacked and cut into lines, whatever is in them.

What a reader cannot use is counted by its reason, with the first place it was met, and never
silently left out.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.model import UsageError

LINE_BYTES_MAX = 16 * 2**20
FILE_BYTES_MAX = 2 * 2**30  # of a file that must be held as a whole


class Unusable(Exception):
    """Why one line or entry of a file cannot be used, in words that fit many."""


class Skipped:
    """How many lines or entries of a file were left out, by reason."""

    def __init__(self, place: str = "line") -> None:
        self.place = place
        self.counts: dict[str, tuple[int, int]] = {}  # reason → how many, the first one's place

    def add(self, reason: object, at: int) -> None:
        count, first = self.counts.get(str(reason), (0, at))
        self.counts[str(reason)] = (count + 1, first)

    def notes(self, path: str | Path) -> list[str]:
        """One line for each reason, the most frequent first."""
        things = {"line": ("line", "lines"), "index": ("entry", "entries")}[self.place]
        ranked = sorted(self.counts.items(), key=lambda item: -item[1][0])
        return [
            f"{Path(path).name}: {n} {things[n > 1]} skipped: {reason} (first {self.place} {first})"
            for reason, (n, first) in ranked
        ]

    def nothing_left(self, path: str | Path, option: str, wanted: str) -> UsageError:
        """The error of a file in which every line was skipped, or that has none."""
        why = "; ".join(note.partition(": ")[2] for note in self.notes(path)[:3])
        return UsageError(
            f"{option} {path}: nothing in it can be used ({why or 'it is empty'}); {wanted}"
        )


def lines(path: str | Path, option: str, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without their ends, a BOM or gzip around them.

    Lines above LINE_BYTES_MAX are skipped without being held. Raises UsageError where the file
    cannot be read to its end.
    """
    number = 0
    try:
        with _opened(path, option) as file:
            while line := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
                    skipped.add(f"longer than {LINE_BYTES_MAX >> 20} MiB", number)
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LINE_BYTES_MAX)
                elif line := line.strip():
                    yield number, line
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise _unreadable(path, option, error, number) from error


def whole(path: str | Path, option: str) -> bytes:
    """All of a file, without a BOM or gzip around it. Raises UsageError, if it is too large too."""
    try:
        with _opened(path, option) as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise _unreadable(path, option, error, 0) from error
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(
            f"{option} {path}: one JSON value of more than {FILE_BYTES_MAX >> 30} GiB; write it as "
            "JSONL, an object a line"
        )
    return data


@contextmanager
def _opened(path: str | Path, option: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where they begin as gzip does, behind the BOM."""
    if stat.S_ISCHR(os.stat(path).st_mode):
        raise UsageError(f"{option} {path}: this is a device; name a file")
    with ExitStack() as open_files:
        file = open_files.enter_context(open(path, "rb"))
        if file.peek(2)[:2] == b"\x1f\x8b":
            unpacked = open_files.enter_context(gzip.GzipFile(fileobj=file))
            file = open_files.enter_context(io.BufferedReader(unpacked))
        begin = file.peek(3)[:3]
        if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UsageError(f"{option} {path}: this is UTF-16; write it as UTF-8 (iconv -t UTF-8)")
        if begin == b"\xef\xbb\xbf":
            file.read(3)
        yield file


def _unreadable(path: str | Path, option: str, error: Exception, line: int) -> UsageError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return UsageError(
            f"{option} {path}: the gzip data is damaged or cut after line {line}; fetch it again"
        )
    why = error.strerror if isinstance(error, OSError) else None
    return UsageError(f"{option} {path}: {why or error}")
