"""Server-sent events without I/O: bytes in, the data of whole events out.

What comes out does not depend on how the bytes were cut on their way. Comments, `event:`, `id:` and
`retry:` lines carry no token and are dropped; several `data:` lines of one event are joined by a
newline, as the HTML standard says. Lines end with LF or CRLF.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 * 2**20


class EventTooLong(ValueError):
    """A server sent one event of more than MAX_EVENT_BYTES."""


class Decoder:
    """Decoder of one stream. `feed` what arrives, `close` at its end."""

    __slots__ = ("_lines", "_tail", "_tail_bytes")

    def __init__(self) -> None:
        self._tail: list[bytes] = []  # pieces of a line that is not complete yet
        self._tail_bytes = 0
        self._lines: list[bytes] = []  # data lines of an event that is not complete yet

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes. Raises EventTooLong."""
        if not self._tail and not self._lines and data[:6] == b"data: " and data[-2:] == b"\n\n":
            # What nearly every read is: whole events of one line each, told by counting newlines.
            events = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(events) and b"\r" not in data:
                return events
        return self._feed_lines(data)

    def _feed_lines(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        *complete, rest = data.split(b"\n")
        for line in complete:
            if self._tail:
                line = b"".join((*self._tail, line))
                self._tail.clear()
                self._tail_bytes = 0
            self._line(line, events)
        if rest:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
            if self._tail_bytes > MAX_EVENT_BYTES:
                raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if not line:
            if self._lines:
                events.append(b"\n".join(self._lines))
                self._lines.clear()
        elif line.startswith(b"data:"):
            self._lines.append(line[6:] if line.startswith(b"data: ") else line[5:])

    def close(self) -> list[bytes]:
        """The event that a stream ended in the middle of, if any: `[DONE]` without a newline."""
        events: list[bytes] = []
        if self._tail:
            line = b"".join(self._tail)
            self._tail.clear()
            self._tail_bytes = 0
            self._line(line, events)
        self._line(b"", events)
        return events
