"""Prompts that people wrote: ShareGPT's JSON, and JSON or JSONL of prompts or messages.

    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    {"messages": [{"role": "user", "content": "…"}, …]}
    {"prompt": "…"} or {"text": "…"}

as a list of such objects or one a line. How long the reply was is taken from `output_tokens`,
`max_tokens` and the like; else it is estimated from the reply's text where the file has it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from agent.datafile import Skipped, Unusable, check_length, entries

# What English text has in common tokenizers; other languages and code have fewer.
CHARS_PER_TOKEN = 4

WANTED = (
    'an entry is {"conversations": [{"from": "human", "value": …}]} (ShareGPT), {"messages": '
    '[{"role": "user", "content": …}]}, {"prompt": …} or {"text": …}, in a JSON list or one a line'
)

ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


class Entry(msgspec.Struct, frozen=True):
    """One conversation: what the user says in it, turn after turn."""

    turns: tuple[str, ...]  # at least one
    system: str | None = None
    output_tokens: tuple[int | None, ...] = ()  # of each turn's reply; None where nothing tells
    estimated: bool = False  # some of output_tokens are characters / CHARS_PER_TOKEN


class Dataset(msgspec.Struct, frozen=True):
    """A file of prompts that was read, and what of it was not used."""

    entries: tuple[Entry, ...]
    skipped: dict[str, tuple[int, int]]  # reason → how many entries, the first one's line or index
    notes: list[str]  # what a user should know of it, one line each


def read(path: str | Path, option: str = "--dataset") -> Dataset:
    """The conversations of a file, in its order.

    Entries that cannot be used are counted in `skipped`, by line, or by index from 0 where the file
    is a JSON list. Raises UsageError where the file cannot be read or nothing usable is left.
    """
    skipped = Skipped()
    found = []
    for place, data in entries(path, option, skipped):
        try:
            found.append(_entry(data))
        except Unusable as why:
            skipped.add(why, place)
    if not found:
        raise skipped.nothing_left(path, option, WANTED)
    notes = skipped.notes(path)
    if estimated := sum(entry.estimated for entry in found):
        notes.append(
            f"{Path(path).name}: reply lengths of {estimated} of {len(found)} entries are "
            f"estimated, characters / {CHARS_PER_TOKEN}"
        )
    return Dataset(tuple(found), skipped.counts, notes)


class _Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None


class _Message(msgspec.Struct):
    """A message in either notation: from and value, or role and content."""

    from_: str | None = msgspec.field(name="from", default=None)
    role: str | None = None
    value: str | None = None
    content: str | list[_Part] | None = None


class _Object(msgspec.Struct):
    conversations: list[_Message] | None = None
    messages: list[_Message] | None = None
    prompt: str | list[_Message] | None = None
    text: str | None = None
    system: str | None = None
    # How long the reply is, by the names that are met; the first that is there counts.
    output_tokens: int | None = None
    output_length: int | None = None
    output_len: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    completion_tokens: int | None = None
    # The reply itself, where it is text.
    completion: Any = None
    response: Any = None
    output: Any = None

    @property
    def tokens(self) -> int | None:
        names = (
            self.output_tokens, self.output_length, self.output_len, self.max_tokens,
            self.max_completion_tokens, self.completion_tokens,
        )  # fmt: skip
        return next((tokens for tokens in names if tokens is not None), None)


_decode = msgspec.json.Decoder(_Object).decode


def _entry(data: bytes) -> Entry:
    try:
        said = _decode(data)
    except msgspec.ValidationError as error:
        raise Unusable("a member of the wrong type") from error
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    except RecursionError as error:
        raise Unusable("nested too deeply") from error
    except ValueError as error:
        raise Unusable("no JSON object") from error
    if (tokens := said.tokens) is not None:
        check_length(tokens, "output")
    messages = next((m for m in (said.conversations, said.messages, said.prompt) if m), said.text)
    if isinstance(messages, str):
        messages = [_Message(role="user", content=messages)]
    if not messages:
        raise Unusable("no prompt, text, messages or conversations")
    replies = (said.completion, said.response, said.output)
    reply = next((text for text in replies if isinstance(text, str)), None)
    return _conversation(messages, said.system, tokens, _estimate(reply))


def _conversation(
    messages: list[_Message], system: str | None, tokens: int | None, estimate: int | None
) -> Entry:
    """The entry of messages in their order. A reply before the first question is left out: long
    conversations are published in pieces."""
    turns: list[str] = []
    replies: list[int | None] = []
    for message in messages:
        role = ROLES.get((message.role or message.from_ or "").lower())
        text = _text(message)
        if role == "user":
            if not text.strip():
                raise Unusable("a question without text")
            turns.append(text)
            replies.append(None)
        elif role == "system":
            system = f"{system}\n{text}" if system else text
        elif role is None:
            raise Unusable("a role that is not user, assistant or system")
        elif turns:
            replies[-1] = _estimate(text)
    if not turns:
        raise Unusable("no message of a user")
    if estimate is not None:
        replies[-1] = estimate
    estimated = any(replies if tokens is None else replies[:-1])
    if tokens is not None:
        replies[-1] = tokens
    return Entry(tuple(turns), system or None, tuple(replies), estimated)


def _text(message: _Message) -> str:
    content = message.content if message.content is not None else message.value
    if isinstance(content, list):
        if any(part.text is None or "text" not in part.type for part in content):
            raise Unusable("content that is not text")
        return "".join(part.text or "" for part in content)
    return content or ""


def _estimate(reply: str | None) -> int | None:
    """Tokens of a reply by its characters; None where there is none."""
    return math.ceil(len(reply) / CHARS_PER_TOKEN) if reply else None
