"""Files of data that others wrote: unpacked and cut into lines, whatever is in them.

What a reader cannot use is counted by its reason, with the first place it was met, and never
silently left out.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import msgspec

from agent.model import TOKENS_MAX, UsageError

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
        return [f"{Path(path).name}: {said}" for said in self._said()]

    def _said(self) -> list[str]:
        things = {"line": ("line", "lines"), "index": ("entry", "entries")}[self.place]
        ranked = sorted(self.counts.items(), key=lambda item: -item[1][0])
        return [
            f"{n} {things[n > 1]} skipped: {reason} (first {self.place} {first})"
            for reason, (n, first) in ranked
        ]

    def nothing_left(self, path: str | Path, option: str, wanted: str) -> UsageError:
        """The error of a file in which every line was skipped, or that has none."""
        why = "; ".join(self._said()[:3]) or "it is empty"
        return UsageError(f"{option} {path}: nothing in it can be used ({why}); {wanted}")


def lines(
    path: str | Path, option: str, skipped: Skipped, data: bytes | None = None
) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without their ends, a BOM or gzip around them.

    `data`: what the file holds, where that was read already. Lines above LINE_BYTES_MAX are
    skipped without being held. Raises UsageError where the file cannot be read to its end.
    """
    with _opened(path, option, data) as file:
        yield from _lines(file, skipped)


def entries(path: str | Path, option: str, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON list by index from 0, where the file begins as one; else its lines.

    A list is held as a whole. Raises UsageError where it is no valid JSON, or the file cannot be
    read to its end.
    """
    with _opened(path, option) as file:
        if not file.peek(1).lstrip().startswith(b"["):
            yield from _lines(file, skipped)
            return
        skipped.place = "index"
        data = bytearray()
        while piece := file.read(2**20):
            data += piece
            if len(data) > FILE_BYTES_MAX:
                raise UsageError(
                    f"{option} {path}: a JSON list above {FILE_BYTES_MAX >> 30} GiB; write it as "
                    "JSONL, an object a line"
                )
    try:
        elements = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} {path}: no valid JSON list: {_place(error, data)}") from error
    yield from ((index, bytes(element)) for index, element in enumerate(elements))


def _place(error: Exception, data: bytearray) -> str:
    """What is wrong with JSON, and in which line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    found = re.search(r"\(byte (\d+)\)", str(error))
    if found is None:
        return "it ends too early" if "truncated" in str(error) else str(error)
    line = data.count(b"\n", 0, int(found[1])) + 1
    return f"line {line} cannot be read"


def check_length(tokens: int, what: str) -> None:
    """Raises Unusable where this is no number of tokens that a request can have."""
    if tokens < 0:
        raise Unusable("negative length")
    if tokens == 0:
        raise Unusable(f"zero {what} tokens")
    if tokens > TOKENS_MAX:
        raise Unusable(f"length over {TOKENS_MAX}")


def _lines(file: io.BufferedReader, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    for number in count(1):
        line = file.readline(LINE_BYTES_MAX + 1)
        if not line:
            return
        if len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
            skipped.add(f"longer than {LINE_BYTES_MAX >> 20} MiB", number)
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES_MAX)
        elif line := line.strip():
            yield number, line


@contextmanager
def _opened(
    path: str | Path, option: str, data: bytes | None = None
) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where they begin as gzip does, behind the BOM. Raises UsageError,
    also for what goes wrong while it is read."""
    try:
        if data is None and stat.S_ISCHR(os.stat(path).st_mode):
            raise UsageError(f"{option} {path}: this is a device; name a file")
        with ExitStack() as open_files:
            file: io.BufferedReader
            if data is None:
                file = open_files.enter_context(open(path, "rb"))
            else:
                file = io.BufferedReader(io.BytesIO(data))
            if file.peek(2)[:2] == b"\x1f\x8b":
                unpacked = open_files.enter_context(gzip.GzipFile(fileobj=file))
                file = open_files.enter_context(io.BufferedReader(unpacked))
            begin = file.peek(3)[:3]
            if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UsageError(
                    f"{option} {path}: this is UTF-16; write it as UTF-8 (iconv -t UTF-8)"
                )
            if begin == codecs.BOM_UTF8:
                file.read(len(begin))
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(
            f"{option} {path}: the gzip data is damaged or cut; fetch it again"
        ) from error
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from error
    except ValueError as error:  # a path that is none, such as one with a NUL
        raise UsageError(f"{option} {path!r}: {error}") from error
