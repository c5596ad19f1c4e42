"""Which chunks are known to mean one more token without being decoded."""

from __future__ import annotations

import pytest

from loadgen import api
from loadgen.usual import Usual

CHUNK = b'{"id":"c","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}'


def taught(*events: bytes) -> Usual:
    usual = Usual()
    for event in events:
        reply = api.decode(event)
        usual.learn(event, reply, api.meaning(reply))
    return usual


def frame(event: bytes) -> bytes:
    return b"data: " + event + b"\n\n"


@pytest.mark.parametrize("token", [b"x", b" house", b"0x7", b"c", b"{}[]:,", b"'", b"~ "])
def test_another_plain_token_fits(token: bytes) -> None:
    assert taught(CHUNK % b"a").fits(frame(CHUNK % token))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        frame(CHUNK % b""),
        frame(CHUNK % b'"'),
        frame(CHUNK % b"\\n"),
        frame(CHUNK % b"\n"),
        frame(CHUNK % b"\x7f"),
        frame(CHUNK % "é".encode()),
        frame(CHUNK % b'","x":"'),
        frame(CHUNK.replace(b'"c"', b'"d"') % b"x"),
        frame(CHUNK % b"x")[:-1],
        frame(CHUNK % b"x") * 2,
        b": ping\n\n" + frame(CHUNK % b"x"),
        frame(CHUNK[: CHUNK.index(b"%b")] + b"x"),
    ],
)
def test_what_is_not_sure_does_not_fit(data: bytes) -> None:
    assert not taught(CHUNK % b"a").fits(data)


@pytest.mark.parametrize(
    "event",
    [
        CHUNK % b"",
        CHUNK % b"\\n",
        CHUNK % "é".encode(),
        CHUNK.replace(b"null", b'"stop"') % b"x",
        CHUNK.replace(b"]}", b'],"usage":{"completion_tokens":1}}') % b"x",
        CHUNK.replace(b'"delta":{', b'"delta":{"refusal":"no",') % b"x",
        CHUNK.replace(b'"delta"', b'\n"delta"') % b"x",
        CHUNK % b":",  # stands between two strings before it stands in one
        b'{"error":"x"}',
    ],
)
def test_what_is_no_example_teaches_nothing(event: bytes) -> None:
    usual = taught(event)
    assert not usual.fits(frame(event))
    assert not usual.fits(frame(event.replace(b'"x"', b'"y"')))
    assert not usual.fits(frame(event.replace(b'"id":"c"', b'"id"x"c"')))


def test_a_token_that_also_stands_elsewhere_is_found_in_its_own_place_or_not_at_all() -> None:
    usual = taught(CHUNK % b"c")
    assert not usual.fits(frame(CHUNK.replace(b'"id":"c"', b'"id":"z"') % b"c"))


def test_reasoning_is_told_from_an_answer() -> None:
    thought = CHUNK.replace(b"content", b"reasoning")
    assert not taught(CHUNK % b"a").reasoning
    assert taught(thought % b"a").reasoning
    assert taught(thought % b"a", CHUNK % b"a").fits(frame(CHUNK % b"b"))


def test_a_stream_whose_chunks_all_differ_is_given_up() -> None:
    numbered = [CHUNK.replace(b'"c"', b'"%d"' % i) % b"a" for i in range(10, 30)]
    assert taught(*numbered[:3]).fits(frame(numbered[2]))
    assert not taught(*numbered).fits(frame(numbered[-1]))
    usual = Usual()
    for event in numbered:
        reply = api.decode(event)
        usual.learn(event, reply, api.meaning(reply))
        assert usual.fits(frame(event))  # one that fits pays for the lesson
