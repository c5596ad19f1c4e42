"""Server-sent events without I/O: bytes in, the data of whole events out.

What comes out does not depend on how the bytes were cut on their way. Comments, `event:`, `id:` and
`retry:` lines carry no token and are dropped; several `data:` lines of one event are joined by a
newline, as the HTML standard says. Lines end with LF, CRLF or CR.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 * 2**20


class EventTooLong(ValueError):
    """A server sent one event of more than MAX_EVENT_BYTES."""


class Decoder:
    """Decoder of one stream. `feed` what arrives, `close` at its end."""

    __slots__ = ("_after_cr", "_lines", "_tail", "pending_bytes")

    def __init__(self) -> None:
        self._tail: list[bytes] = []  # pieces of a line that is not complete yet
        self._lines: list[bytes] = []  # data lines of an event that is not complete yet
        self.pending_bytes = 0  # of both; 0: it stands between two events
        self._after_cr = False  # an LF that comes next belongs to the line end before it

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes. Raises EventTooLong."""
        has_cr = data.find(b"\r") >= 0  # quicker than `in`
        if not (self.pending_bytes or has_cr) and data.endswith(b"\n\n"):
            events = _whole_events(data)
            if events is not None:
                return events
        return self._feed_lines(self._plain(data) if has_cr or self._after_cr else data)

    def _plain(self, data: bytes) -> bytes:
        """The same lines, each ended by LF."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _feed_lines(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        *complete, rest = data.split(b"\n")
        for line in complete:
            self._grow(line)
            if self._tail:
                line = b"".join((*self._tail, line))
                self._tail.clear()
            self._line(line, events)
        if rest:
            self._grow(rest)
            self._tail.append(rest)
        return events

    def _grow(self, piece: bytes) -> None:
        self.pending_bytes += len(piece)
        if self.pending_bytes > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            self.pending_bytes = 0
            if self._lines:
                events.append(b"\n".join(self._lines))
                self._lines.clear()
        elif line.startswith(b"data:"):
            self._lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not self._lines:
            self.pending_bytes = 0  # comments between events belong to none

    def close(self) -> list[bytes]:
        """The event that a stream ended in the middle of, if any: `[DONE]` without a newline."""
        events: list[bytes] = []
        if self._tail:
            line = b"".join(self._tail)
            self._tail.clear()
            self._line(line, events)
        self._line(b"", events)
        return events


def _whole_events(data: bytes) -> list[bytes] | None:
    """What nearly every read is: events of one line each, whole; very often it is one.

    Of the Responses API one, with its name in a line before. None where it is something else.
    """
    length = len(data)
    start = 0 if data.startswith(b"data: ") else data.find(b"\n") + 1
    if length > MAX_EVENT_BYTES or not data.startswith(b"data: ", start):
        return None
    if data.find(b"\n", start) == length - 2:
        return [data[start + 6 : -2]] if not start or data.startswith(b"event: ") else None
    events = data[6:-2].split(b"\n\ndata: ")
    return events if not start and data.count(b"\n") == 2 * len(events) else None
