"""Most chunks of a stream are the one before but for the token: these need no parser. Bytes only.

A chunk that was decoded tells which of its bytes are the token. What has the same bytes before and
behind, and plain characters between them, is the same JSON with another text in it, and so means
the same: one more token. Everything else is decoded. It saves a good third of a chunk's CPU time.
"""

from __future__ import annotations

import re

from loadgen import api

# What stands for itself in a JSON string: no quote, no backslash, nothing beyond ASCII.
_PLAIN = re.compile(rb"[ !#-\[\]-~]+")
_ANOTHER = "0x7"  # a token to try out with whether the token, and nothing else, was cut out
_MISSES_MAX = 8  # in a row: each chunk of this stream differs elsewhere too
_NEVER = b"\n"  # no event begins so


class Usual:
    """The chunk that one stream repeats, as far as it is known."""

    __slots__ = ("_head", "_misses", "_tail", "reasoning")

    def __init__(self) -> None:
        self._head = self._tail = _NEVER
        self._misses = 0
        self.reasoning = False  # is its token one of reasoning, or of an answer?

    def fits(self, data: bytes) -> bool:
        """Is `data` this chunk, whole, with whatever token? False where that is not sure."""
        head, tail = self._head, self._tail
        if (
            data.startswith(head)
            and data.endswith(tail)
            and _PLAIN.fullmatch(data, len(head), len(data) - len(tail))
        ):
            self._misses = 0
            return True
        return False

    def learn(self, event: bytes, reply: api.Reply, bits: int) -> None:
        """Takes an event that was decoded to `reply`, of meaning `bits`, as the example."""
        self._misses += 1
        if self._misses > _MISSES_MAX:
            self._head = _NEVER
        elif ends := _around_token(event, reply, bits):
            self._head, self._tail = b"data: " + ends[0], ends[1] + b"\n\n"
            self.reasoning = bits == api.REASONING


def _around_token(event: bytes, reply: api.Reply, bits: int) -> tuple[bytes, bytes] | None:
    """The bytes before and behind the token; None where there is not just one, or more than it.

    They are tried out: with another token between them the event must be that token's. Whatever
    else is read from an event then does not depend on the token.
    """
    token = _token(reply, bits)
    if token is None or b"\n" in event or b"\r" in event:
        return None
    at = event.find(b'"%b"' % token) + 1
    head, tail = event[:at], event[at + len(token) :]
    try:
        other = api.decode(head + _ANOTHER.encode() + tail)
    except ValueError:
        return None
    is_so = api.meaning(other) == bits and _token(other, bits) == _ANOTHER.encode()
    return (head, tail) if is_so else None


def _token(reply: api.Reply, bits: int) -> bytes | None:
    """The only text of a chunk that carries nothing else, where it is plain."""
    if bits not in (api.ANSWER, api.REASONING) or reply.usage is not None:
        return None
    told = [text for text in api.texts(reply) if text]
    token = told[0].encode() if len(told) == 1 else b""
    return token if _PLAIN.fullmatch(token) else None
