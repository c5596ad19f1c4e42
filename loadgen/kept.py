"""The requests of one level as the store keeps them, in columns: what comparisons and other tools'
definitions are worked out of.

The store keeps at most 20,000 requests of a level, in the order in which they ended, and the gaps
between the chunks of as many of them as its limit on gaps allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.model import Slo

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Kept:
    """Columns of equal length, a row a request; NaN is 'never' or 'not known'.

    Instants are ms since the level's start. `start_ms` is when the client turned to the request:
    before a connection was opened for it, where one was, which is where other tools' clocks start.
    """

    due_ms: Floats
    start_ms: Floats
    sent_ms: Floats
    first_ms: Floats  # first token-bearing chunk
    answer_ms: Floats  # first token of the answer, after any reasoning
    last_ms: Floats  # last token-bearing chunk; the body's end where nothing was streamed
    end_ms: Floats  # the whole of the reply had come, or it had failed
    prompt_tokens: Floats
    output_tokens: Floats
    reasoning_tokens: Floats
    chunks: Floats
    gaps_ms: tuple[Floats | None, ...]  # between token-bearing chunks; None where not kept
    error: tuple[str | None, ...]

    @property
    def n(self) -> int:
        return len(self.error)

    @property
    def ok(self) -> Mask:
        return np.array([error is None for error in self.error], dtype=bool)

    @property
    def cancelled(self) -> Mask:
        """Cut off by us at the end of the level: neither an answer nor a failure."""
        return np.array([error == "cancelled" for error in self.error], dtype=bool)

    @property
    def failed(self) -> Mask:
        return ~(self.ok | self.cancelled)

    @property
    def ttft_ms(self) -> Floats:
        return self.first_ms - self.sent_ms

    @property
    def e2e_ms(self) -> Floats:
        return self.last_ms - self.sent_ms

    @property
    def tpot_ms(self) -> Floats:
        """NaN where there is no second token, or all came in one chunk."""
        several = (self.output_tokens > 1) & (self.last_ms > self.first_ms)
        gap = self.last_ms - self.first_ms
        return np.where(several, gap / np.maximum(self.output_tokens - 1, 1), np.nan)

    def where(self, rows: Mask) -> Kept:
        """The chosen rows only."""
        chosen: dict[str, Any] = {
            name: column[rows]
            if isinstance(column, np.ndarray)
            else tuple(value for value, take in zip(column, rows, strict=True) if take)
            for name, column in vars(self).items()
        }
        return Kept(**chosen)


def kept(rows: Sequence[Mapping[str, Any]]) -> Kept:
    """Rows of the store's table `requests`, of one level; a column that is missing is not known."""

    def column(name: str) -> Floats:
        return np.array([row.get(name) for row in rows], dtype=np.float64)  # None is NaN

    sent = column("sent_ms")
    last = sent + column("e2e_ms")
    connect = np.nan_to_num(column("connect_ms"))
    return Kept(
        due_ms=column("due_ms"),
        start_ms=sent - connect,
        sent_ms=sent,
        first_ms=sent + column("ttft_ms"),
        answer_ms=sent + column("ttfo_ms"),
        last_ms=last,
        end_ms=np.fmax(column("end_ms"), last),  # not before it by a rounding either
        prompt_tokens=column("prompt_tokens"),
        output_tokens=column("output_tokens"),
        reasoning_tokens=column("reasoning_tokens"),
        chunks=column("chunks"),
        gaps_ms=tuple(_gaps(row.get("gaps_ms")) for row in rows),
        error=tuple(row.get("error") for row in rows),
    )


def _gaps(blob: bytes | None) -> Floats | None:
    return None if blob is None else np.frombuffer(blob, dtype="<f4").astype(np.float64)


def by_level(rows: Sequence[Mapping[str, Any]], levels: int) -> list[Kept]:
    """The rows of a whole run, one `Kept` for each of its levels."""
    parts: list[list[Mapping[str, Any]]] = [[] for _ in range(levels)]
    for row in rows:
        parts[row["level"]].append(row)
    return [kept(part) for part in parts]


def pooled_gaps(requests: Kept) -> tuple[Floats, NDArray[np.int64]]:
    """All gaps that were kept, in ms, and the row each belongs to."""
    sizes = [0 if gaps is None else gaps.size for gaps in requests.gaps_ms]
    known = [gaps for gaps in requests.gaps_ms if gaps is not None]
    pooled = np.concatenate(known) if known else np.empty(0)
    return pooled, np.repeat(np.arange(requests.n), sizes)


def arrivals(requests: Kept) -> tuple[Floats, Floats]:
    """When tokens arrived, ms, and how many each time.

    The tokens of a request are shared out evenly over its chunks, and where the gaps were not kept
    its chunks evenly over the time between the first and the last.
    """
    at: list[Floats] = []
    tokens: list[Floats] = []
    for row in range(requests.n):
        first, last = requests.first_ms[row], requests.last_ms[row]
        gaps = requests.gaps_ms[row]
        if np.isnan(first):
            stamps = np.array([last])
        elif gaps is not None:
            stamps = first + np.concatenate([[0.0], np.cumsum(gaps)])
        else:
            known = requests.chunks[row]
            chunks = requests.output_tokens[row] if np.isnan(known) else known
            stamps = np.linspace(first, last, max(int(np.nan_to_num(chunks)), 1))
        at.append(stamps)
        share = np.nan_to_num(requests.output_tokens[row]) / stamps.size
        tokens.append(np.full(stamps.size, share))
    return (np.concatenate(at), np.concatenate(tokens)) if at else (np.empty(0), np.empty(0))


def meets(requests: Kept, slo: Sequence[Slo]) -> Mask:
    """Which requests met every target, as a level's goodput counts them.

    Of ITL a request's own statistic over its own gaps is taken. What cannot be measured is no miss.
    """
    values = {
        "ttft": requests.ttft_ms,
        "ttfo": requests.answer_ms - requests.sent_ms,
        "tpot": requests.tpot_ms,
        "e2e": requests.e2e_ms,
    }
    met = requests.ok
    for target in slo:
        if target.metric == "itl":
            own = [_statistic(gaps, target.statistic) for gaps in requests.gaps_ms]
            value = np.array(own, dtype=np.float64)
        else:
            value = values[target.metric]
        met &= ~(value >= target.bound_ms)
    return met


def _statistic(gaps: Floats | None, name: str) -> float:
    if gaps is None or not gaps.size:
        return float("nan")
    if name in ("mean", "max"):
        return float(gaps.mean() if name == "mean" else gaps.max())
    return float(np.quantile(gaps, float(name[1:]) / 100))
