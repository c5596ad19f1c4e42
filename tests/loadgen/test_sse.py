"""Bytes to events: what comes out does not depend on how the bytes were cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import sse

# bytes of a stream, and the data of its events when the stream has ended
SAMPLES: dict[str, tuple[bytes, list[bytes]]] = {
    "cr": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "lf": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "mixed line ends": (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
    "no space": (b"data:a\n\ndata:{}\n\n", [b"a", b"{}"]),
    "one space is taken off, not two": (b"data:  a\n\n", [b" a"]),
    "comments": (b": ping\n\n:\n\ndata: a\n: in between\n\n: ping\n\n", [b"a"]),
    "several lines of data": (b"data: a\ndata: b\ndata:c\n\n", [b"a\nb\nc"]),
    "other fields": (b"event: x\nid: 7\nretry: 10\ndata: a\n\nevent: error\n\n", [b"a"]),
    "names": (b"event: x\ndata: a\n\nevent: y\ndata: b\n\n", [b"a", b"b"]),
    "a name without data": (b"event: x\n\ndata: a\n\n", [b"a"]),
    "a name and two lines": (b"event: x\ndata: a\ndata: b\n\n", [b"a\nb"]),
    "empty data": (b"data:\n\ndata: \n\n", [b"", b""]),
    "utf-8": ("data: 日本 é 🙂\n\n".encode(), ["日本 é 🙂".encode()]),
    "a carriage return inside": (b"data: a\rdata: b\n\ndata: c\r\n\n", [b"a\nb", b"c"]),
    "[DONE] without a newline": (b"data: a\n\ndata: [DONE]", [b"a", b"[DONE]"]),
    "[DONE] with one newline": (b"data: a\n\ndata: [DONE]\n", [b"a", b"[DONE]"]),
    "[DONE] with half of a CRLF": (b"data: a\r\n\r\ndata: [DONE]\r", [b"a", b"[DONE]"]),
    "blank lines": (b"\n\n\r\ndata: a\n\n\n\n", [b"a"]),
    "data: inside data": (b"data: x data: y\n\n", [b"x data: y"]),
    "nothing": (b"", []),
    "only a comment": (b": ping", []),
}


def decode(pieces: list[bytes]) -> list[bytes]:
    decoder = sse.Decoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return events + decoder.close()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_cut_gives_the_same_events(name: str) -> None:
    data, events = SAMPLES[name]
    assert decode([data]) == events
    for cut in range(len(data) + 1):
        assert decode([data[:cut], data[cut:]]) == events, cut
    assert decode([data[i : i + 1] for i in range(len(data))]) == events


lines = st.sampled_from(
    [b"data: a", b"data:b", b"data: ", b"data", b": c", b"event: x", b"", b"", "data: é".encode()]
)
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


@settings(max_examples=200)
@given(st.lists(st.tuples(lines, ends), max_size=12), st.lists(st.integers(0, 120), max_size=6))
def test_any_cuts_of_any_stream_give_the_same_events(
    parts: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(line + end for line, end in parts)
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert decode(pieces) == decode([data[i : i + 1] for i in range(len(data))])


def test_an_event_comes_with_its_last_byte_and_not_later() -> None:
    decoder = sse.Decoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == [b"a"]
    assert decoder.feed(b"data: b\n\ndata: c\n\ndata: d") == [b"b", b"c"]
    assert decoder.feed(b"\n\n") == [b"d"]
    assert decoder.close() == []


@pytest.mark.parametrize(
    "data",
    [
        b"data: " + b"x" * 60 + b"\n\n",  # one line
        b"data: " + b"x" * 60,  # one line that does not end
        b"data: 0123456\n" * 6 + b"\n",  # one event of many lines
        b"data: a\n\ndata: " + b"x" * 60 + b"\n\n",
    ],
)
def test_an_event_that_is_too_long_is_refused_however_it_is_cut(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 40)
    for step in (1, 7, 50, len(data)):
        with pytest.raises(sse.EventTooLong, match="40 bytes"):
            decode([data[i : i + step] for i in range(0, len(data), step)])


def test_a_long_stream_of_short_events_is_not_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 40)
    data = b": ping\ndata: 0123456789\n\ndata: b\r\n\r\n" * 20 + b": ping\n" * 20
    for step in (1, 7, 16, len(data)):
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        assert decode(pieces) == [b"0123456789", b"b"] * 20
