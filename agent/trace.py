"""Recorded requests: when each came and how long its prompt and reply were.

Three published formats are read, told apart by what is in the file:

    Azure      CSV, TIMESTAMP (date and time), ContextTokens, GeneratedTokens
    BurstGPT   CSV, Timestamp (s), Model, Request tokens, Response tokens and others
    Mooncake   JSONL, timestamp (ms), input_length, output_length, hash_ids

Sources: github.com/Azure/AzurePublicDataset, github.com/HPMLL/BurstGPT and
github.com/kvcache-ai/Mooncake. A trace of millions of requests is held in columns, about 20 bytes
a request and 8 for each hash id.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.datafile import Skipped, Unusable, check_length, lines
from agent.model import UsageError
from agent.words import is_whole

HASH_BLOCK_TOKENS = 512  # what one of Mooncake's hash ids stands for
PEAK_WINDOW_S = 60.0
INSTANT_S_MAX = (
    1e11  # about 3,000 years: seconds since 1970 fit, milliseconds taken for them do not
)

FORMATS = (
    "a trace's first line is TIMESTAMP,ContextTokens,GeneratedTokens (Azure) or "
    "Timestamp,Model,Request tokens,Response tokens,… (BurstGPT), or each line is an object with "
    "timestamp, input_length, output_length and hash_ids (Mooncake)"
)


class Arrival(msgspec.Struct, frozen=True):
    """One recorded request."""

    at_s: float  # after the trace's first request
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[
        int, ...
    ] = ()  # equal ids are equal blocks of HASH_BLOCK_TOKENS, from the start
    model: str | None = None


class Rows(Sequence[Arrival]):
    """The requests of a trace by instant: a sequence that makes each Arrival when asked for it."""

    __slots__ = (
        "_begin",
        "_end",
        "_ids",
        "_model",
        "_names",
        "at_s",
        "input_tokens",
        "output_tokens",
    )

    def __init__(self, columns: _Columns, order: NDArray[np.intp]) -> None:
        at_s = np.asarray(columns.at_s)[order]
        ends = np.asarray(columns.ends)
        begins = np.concatenate((ends[:1] * 0, ends[:-1]))
        self.at_s = at_s - at_s[0]
        self.input_tokens = np.asarray(columns.input_tokens)[order]
        self.output_tokens = np.asarray(columns.output_tokens)[order]
        self._ids = columns.ids
        self._begin, self._end = begins[order], ends[order]
        self._model = np.asarray(columns.model)[order]
        self._names = tuple(columns.names)

    def __len__(self) -> int:
        return len(self.at_s)

    @overload
    def __getitem__(self, index: int) -> Arrival: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Arrival, ...]: ...
    def __getitem__(self, index: int | slice) -> Arrival | tuple[Arrival, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return Arrival(
            self.at_s.item(index),
            self.input_tokens.item(index),
            self.output_tokens.item(index),
            tuple(self._ids[self._begin.item(index) : self._end.item(index)]),
            self._names[self._model.item(index)],
        )


class Trace(msgspec.Struct, frozen=True):
    """A trace that was read, and what of it was not used."""

    format: str  # "azure", "burstgpt" or "mooncake"
    rows: Rows
    skipped: dict[str, tuple[int, int]]  # reason → how many lines, the first one's number
    notes: list[str]  # what a user should know of it, one line each

    @property
    def window_s(self) -> float:
        """Seconds from the first request to the last."""
        return float(self.rows.at_s[-1])

    def mean_rps(self, first: int | None = None) -> float:
        """Requests per second over the gaps, of the `first` so many; where there is no gap, one."""
        at_s = self.rows.at_s[:first]
        return (len(at_s) - 1) / float(at_s[-1]) if len(at_s) and at_s[-1] else 1.0

    def within(self, window_s: float) -> int:
        """How many requests come in the first so many seconds."""
        return int(np.searchsorted(self.rows.at_s, window_s))


def read(path: str | Path, option: str = "--trace", data: bytes | None = None) -> Trace:
    """The requests of a file, by instant; `data`: what it holds, where that was read already.

    Lines that cannot be used are counted in `skipped`; a reply of no tokens is one, because
    BurstGPT writes failures so. Raises UsageError where the file cannot be read, is of no known
    format, or has no line that can be used.
    """
    skipped = Skipped()
    numbered = lines(path, option, skipped, data)
    number, first = next(numbered, (0, b""))
    parse: Parse
    if first.startswith(b"{"):
        name, parse = "mooncake", _mooncake
        numbered = chain([(number, first)], numbered)
    else:
        name, parse = _csv(first, path, option)
    columns = _Columns()
    for number, line in numbered:
        try:
            columns.append(parse(line), number)
        except Unusable as why:
            skipped.add(why, number)
    if not columns.at_s:
        raise skipped.nothing_left(path, option, FORMATS)
    notes = skipped.notes(path)
    at_s = np.asarray(columns.at_s)
    order = np.argsort(at_s, kind="stable")
    if columns.back:
        count, first_back = columns.back
        notes.append(
            f"{Path(path).name}: {count} of {len(at_s)} requests come before the one above them "
            f"(first line {first_back}): sorted by instant"
        )
    return Trace(name, Rows(columns, order), skipped.counts, notes)


def demand(trace: Trace) -> dict[str, Any]:
    """What a trace asks of a server: rates per second and lengths in tokens.

    The mean rate is of the gaps (n requests have n − 1); the peak is of the busiest 60 s, and the
    mean where the trace is shorter. Null where there is one request only.
    """
    at_s, window_s = trace.rows.at_s, trace.window_s
    mean = (len(at_s) - 1) / window_s if window_s else None
    peak = mean
    if mean is not None and window_s >= PEAK_WINDOW_S:
        held = np.searchsorted(at_s, at_s + PEAK_WINDOW_S) - np.arange(len(at_s))
        peak = max(mean, float(held.max()) / PEAK_WINDOW_S)
    return {
        "window_s": window_s,
        "requests_per_s": {"mean": mean, "peak": peak},
        "input_tokens": _lengths(trace.rows.input_tokens),
        "output_tokens": _lengths(trace.rows.output_tokens),
    }


def _lengths(tokens: NDArray[np.int32]) -> dict[str, float]:
    p50, p95 = (float(q) for q in np.quantile(tokens, (0.5, 0.95)))
    return {"mean": float(tokens.mean()), "p50": p50, "p95": p95}


class _Columns:
    """Columns that grow line by line, in the file's order."""

    def __init__(self) -> None:
        self.at_s = array("d")
        self.input_tokens = array("i")
        self.output_tokens = array("i")
        self.ids = array("q")
        self.ends = array("q")  # where a request's ids end
        self.model = array("i")
        self.names: dict[str | None, int] = {}
        self.back: tuple[int, int] | None = None  # how many instants go back, the first one's line

    def append(self, row: Row, number: int) -> None:
        check_length(row.output_tokens, "output")
        check_length(row.input_tokens, "input")
        if row.hash_ids:
            try:
                self.ids.extend(array("q", row.hash_ids))
            except OverflowError as error:
                raise Unusable("a hash id out of range") from error
        if self.at_s and row.at_s < self.at_s[-1]:
            count, first = self.back or (0, number)
            self.back = (count + 1, first)
        self.at_s.append(row.at_s)
        self.input_tokens.append(row.input_tokens)
        self.output_tokens.append(row.output_tokens)
        self.ends.append(len(self.ids))
        self.model.append(self.names.setdefault(row.model, len(self.names)))


# --------------------------------------------------------------------------------------- formats


class Row(NamedTuple):
    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: Sequence[int] = ()
    model: str | None = None


Parse = Callable[[bytes], Row]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


_decode_mooncake = msgspec.json.Decoder(_MooncakeLine).decode


def _mooncake(line: bytes) -> Row:
    try:
        said = _decode_mooncake(line)
    except msgspec.ValidationError as error:
        lacks = "missing required" in str(error)
        raise Unusable("a member is missing" if lacks else "a member of the wrong type") from error
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError, wrong UTF-8, deep nesting
        raise Unusable("no JSON object") from error
    if len(said.hash_ids) > max(0, math.ceil(said.input_length / HASH_BLOCK_TOKENS)):
        raise Unusable(f"more hash_ids than input_length has blocks of {HASH_BLOCK_TOKENS} tokens")
    at_s = _instant(said.timestamp / 1000)
    return Row(at_s, said.input_length, said.output_length, said.hash_ids)


def _csv(header: bytes, path: str | Path, option: str) -> tuple[str, Parse]:
    """The format that a CSV's first line names, and the parser of the others. Raises UsageError."""
    try:
        names = [name.strip().lower() for name in _cells(header)]
    except Unusable:
        names = []
    for name, wanted, when in (
        ("azure", ("timestamp", "contexttokens", "generatedtokens"), _date),
        ("burstgpt", ("timestamp", "request tokens", "response tokens"), _seconds),
    ):
        if all(column in names for column in wanted):
            places = [names.index(column) for column in wanted]
            model = names.index("model") if "model" in names else None
            return name, partial(_csv_row, len(names), places, model, when)
    raise UsageError(f"{option} {path}: no trace that can be read; {FORMATS}")


def _csv_row(
    width: int, places: list[int], model: int | None, when: Callable[[str], float], line: bytes
) -> Row:
    cells = _cells(line)
    if len(cells) != width:
        raise Unusable(f"not {width} columns")
    at, inputs, outputs = (cells[place].strip() for place in places)
    named = cells[model].strip() if model is not None else None
    return Row(when(at), _tokens(inputs), _tokens(outputs), model=named or None)


def _cells(line: bytes) -> list[str]:
    """The cells of one line of CSV; a line of its own, so that an open quote ends with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    if "\0" in text:
        raise Unusable("a NUL character")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text]), [])
    except csv.Error as error:
        raise Unusable("broken quotes") from error


def _tokens(cell: str) -> int:
    word = cell.removesuffix(".0")
    if is_whole(word.removeprefix("-")):
        return int(word)
    raise Unusable("a length that is no whole number")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _date(cell: str) -> float:
    """Seconds since 1970; UTC where the date names no zone, as Azure's of 2023 do not."""
    try:
        when = datetime.fromisoformat(cell)
    except ValueError as error:
        raise Unusable("no date and time") from error
    return ((when if when.tzinfo else when.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def _seconds(cell: str) -> float:
    try:
        return _instant(float(cell))
    except ValueError as error:
        raise Unusable("no instant in seconds") from error


def _instant(at_s: float) -> float:
    if not abs(at_s) <= INSTANT_S_MAX:  # NaN too
        raise Unusable("an instant out of range")
    return at_s
