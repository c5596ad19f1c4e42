"""What one worker saw of one level, in columns: no Python object per token or per request is kept.

Recordings of several workers merge without loss, because they only have to be put one behind the
other. 8 bytes a token and about 100 a request.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadgen.client import Exchange

OK, FAILED, CANCELLED = 0, 1, 2

Ints = NDArray[np.int64]

_COLUMNS = (
    "index", "due_ns", "sent_ns", "connect_ns", "answer_ns", "end_ns", "outcome", "error",
    "warmup", "prompt_tokens", "output_tokens", "reasoning_tokens", "chunks", "chunks_counted",
)  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """Columns of equal length n, a row a request, in the order in which the requests ended.

    `stamps_ns` and `weights` hold the token-bearing chunks of all requests, one request behind the
    other, `chunks` of them each. `weights` are tokens per chunk: the server's own counts where it
    gives them, else the request's tokens shared out evenly over its chunks.
    """

    index: Ints
    due_ns: Ints
    sent_ns: Ints
    connect_ns: Ints
    answer_ns: Ints
    end_ns: Ints
    outcome: Ints  # OK, FAILED, CANCELLED
    error: Ints  # index into error_kinds; meaningless where outcome is OK
    warmup: Ints  # 1: before the level proper
    prompt_tokens: Ints  # −1: unknown
    output_tokens: Ints
    reasoning_tokens: Ints
    chunks: Ints
    chunks_counted: Ints  # 1: the server said how many tokens each chunk carries
    stamps_ns: Ints
    weights: NDArray[np.float64]
    error_kinds: tuple[str, ...]
    error_texts: dict[str, str]  # kind → what the first of its kind said
    usage_rows: int  # requests whose tokens the server counted itself
    tokenizer_rows: int  # requests whose tokens a local tokenizer counted
    ramp_end_ns: int  # when the last slot (open loop: the warm-up) had started; 0: never
    refill_end_ns: int  # when a slot was first not refilled (open loop: the last due instant)
    loop_lag_ns: Ints
    cpu_s: float
    wall_s: float

    @property
    def n(self) -> int:
        return int(self.sent_ns.size)


Count = Callable[[str], int]  # tokens of a text, as `--tokenizer` counts them


class Counts(NamedTuple):
    """How far a level has come: what a recorder counts as requests end, under the same names."""

    ok: int = 0
    failed: int = 0
    tokens: int = 0
    ramp_end_ns: int = 0  # 0: some have not all begun
    failures: Mapping[str, int] = {}  # by kind
    # Of what was answered after the warm-up, as a `Level` has it of its window:
    ttft_sum_ns: int = 0
    ttfts: int = 0
    itl_sum_ns: int = 0
    gaps: float = 0.0


def added(counts: Sequence[Counts]) -> Counts:
    """Those of several workers of one level as one."""
    failures = sum((Counter(one.failures) for one in counts), Counter[str]())
    ramps = [one.ramp_end_ns for one in counts]
    sums = {
        name: sum(getattr(one, name) for one in counts)
        for name in Counts._fields
        if name not in ("failures", "ramp_end_ns")
    }
    return Counts(**sums, failures=failures, ramp_end_ns=max(ramps) if all(ramps) else 0)


class Recorder:
    """Collects exchanges as they end; one of these per worker and level."""

    def __init__(self, count: Count | None = None) -> None:
        """`count` is used where the server says nothing."""
        self._count = count
        self._uncounted: dict[int, str] = {}  # row → reply of which the server gave no count
        self._columns = {name: array("q") for name in _COLUMNS}
        self._stamps = array("q")
        self._weights = array("d")
        self._kinds: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._usage_rows = 0
        self.loop_lag_ns = array("q")
        self.ramp_end_ns = 0
        self.refill_end_ns = 0
        # Running counts for the progress display and for the decision to give up: see `Counts`.
        self.ok = 0
        self.failed = 0
        self.tokens = 0
        self.failures: dict[str, int] = {}
        self.ttft_sum_ns = 0
        self.ttfts = 0
        self.itl_sum_ns = 0
        self.gaps = 0.0

    @property
    def counts(self) -> Counts:
        return Counts(**{name: getattr(self, name) for name in Counts._fields})

    def add(self, exchange: Exchange) -> None:
        """Takes over what the exchange holds; the exchange can be dropped afterwards."""
        chunks = len(exchange.stamps)
        # A count of none is no count where tokens were seen to arrive.
        counted = exchange.output_tokens > 0 or (exchange.output_tokens == 0 and not chunks)
        tokens = exchange.output_tokens if counted else chunks
        self._usage_rows += counted
        if not counted and exchange.texts:
            self._uncounted[len(self._columns["index"])] = "".join(exchange.texts)
        if exchange.error is None:
            outcome, error = OK, -1
            self.ok += 1
        else:
            outcome = CANCELLED if exchange.error == "cancelled" else FAILED
            error = self._kind(exchange.error, exchange.error_text)
            if outcome == FAILED:
                self.failed += 1
                self.failures[exchange.error] = 1 + self.failures.get(exchange.error, 0)
        prompt_tokens = exchange.prompt_tokens
        if prompt_tokens < 0:
            prompt_tokens = exchange.counted_here
        # A server that does not count them: their chunks' even share of the tokens.
        share = exchange.reasoning_chunks / chunks if chunks else 0.0
        reasoning = exchange.reasoning_tokens or round(share * tokens)
        weights, chunks_counted = _weights(exchange, tokens)
        row = (
            exchange.index, exchange.due_ns, exchange.sent_ns, exchange.connect_ns,
            exchange.answer_ns, exchange.end_ns, outcome, error, int(exchange.warmup),
            prompt_tokens, tokens, reasoning, chunks, int(chunks_counted),
        )  # fmt: skip
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        self._stamps.extend(exchange.stamps)
        self._weights.extend(weights)
        self.tokens += tokens
        if chunks and outcome == OK and not exchange.warmup:
            self.ttft_sum_ns += exchange.stamps[0] - exchange.sent_ns
            self.ttfts += 1
            self.itl_sum_ns += exchange.stamps[-1] - exchange.stamps[0]
            self.gaps += tokens - weights[0] if chunks_counted else chunks - 1

    def _kind(self, kind: str, text: str) -> int:
        self._texts.setdefault(kind, text)
        return self._kinds.setdefault(kind, len(self._kinds))

    def freeze(self, *, cpu_s: float, wall_s: float) -> Recording:
        """The finished recording."""
        columns = {name: _ints(column) for name, column in self._columns.items()}
        weights = np.array(self._weights, dtype=np.float64)
        if self._count is not None:
            self._count_replies(self._count, columns, weights)
        return Recording(
            **columns,
            stamps_ns=_ints(self._stamps),
            weights=weights,
            error_kinds=tuple(self._kinds),
            error_texts=self._texts,
            usage_rows=self._usage_rows,
            tokenizer_rows=len(self._uncounted),
            ramp_end_ns=self.ramp_end_ns,
            refill_end_ns=self.refill_end_ns,
            loop_lag_ns=_ints(self.loop_lag_ns),
            cpu_s=cpu_s,
            wall_s=wall_s,
        )

    def _count_replies(
        self, count: Count, columns: dict[str, Ints], weights: NDArray[np.float64]
    ) -> None:
        """Fills in what the server did not count, once nothing is being measured any more."""
        ends = np.cumsum(columns["chunks"])
        for row, text in self._uncounted.items():
            tokens, chunks = count(text), int(columns["chunks"][row])
            columns["output_tokens"][row] = tokens
            weights[ends[row] - chunks : ends[row]] = tokens / max(chunks, 1)


def _ints(column: array[int]) -> Ints:
    return np.array(column, dtype=np.int64)


def _weights(exchange: Exchange, tokens: int) -> tuple[array[float], bool]:
    chunks = len(exchange.stamps)
    counts = exchange.token_counts
    if chunks and len(counts) == chunks and sum(counts) == tokens:
        return array("d", counts), True
    return array("d", [tokens / chunks if chunks else 0.0]) * chunks, False


@dataclass(frozen=True, slots=True)
class Row:
    """One request after the warm-up; instants in ns of the monotonic clock, None is 'never'."""

    index: int
    due_ns: int
    sent_ns: int | None
    connect_ns: int  # 0: a warm connection was there
    first_ns: int | None
    answer_ns: int | None  # first token of the answer, after any reasoning
    last_ns: int | None
    end_ns: int
    error: str | None
    prompt_tokens: int | None
    output_tokens: int
    reasoning_tokens: int
    stamps_ns: Ints = field(compare=False)  # every token-bearing chunk


def rows(rec: Recording) -> Iterator[Row]:
    """The requests one by one, for the store and for traces; the figures are made of columns."""
    offset = 0
    for i in range(rec.n):
        chunks = int(rec.chunks[i])
        first, last = offset, offset + chunks - 1
        offset += chunks
        if rec.warmup[i]:
            continue
        prompt_tokens = int(rec.prompt_tokens[i])
        yield Row(
            index=int(rec.index[i]),
            due_ns=int(rec.due_ns[i]),
            sent_ns=int(rec.sent_ns[i]) or None,
            connect_ns=int(rec.connect_ns[i]),
            first_ns=int(rec.stamps_ns[first]) if chunks else None,
            answer_ns=int(rec.answer_ns[i]) or None,
            last_ns=int(rec.stamps_ns[last]) if chunks else None,
            end_ns=int(rec.end_ns[i]),
            error=None if rec.outcome[i] == OK else rec.error_kinds[int(rec.error[i])],
            prompt_tokens=prompt_tokens if prompt_tokens >= 0 else None,
            output_tokens=int(rec.output_tokens[i]),
            reasoning_tokens=int(rec.reasoning_tokens[i]),
            stamps_ns=rec.stamps_ns[first : last + 1],
        )


def merge(parts: Sequence[Recording]) -> Recording:
    """One recording of several workers' of the same level: nothing is averaged, nothing is lost."""
    if len(parts) == 1:
        return parts[0]
    kinds = tuple(dict.fromkeys(kind for part in parts for kind in part.error_kinds))
    texts = {kind: part.error_texts[kind] for part in reversed(parts) for kind in part.error_texts}

    def renumbered(part: Recording) -> Ints:
        lookup = np.array([kinds.index(kind) for kind in part.error_kinds] + [-1], dtype=np.int64)
        return lookup[part.error]

    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (*_COLUMNS, "stamps_ns", "weights", "loop_lag_ns")
        if name != "error"
    }
    ramps = [part.ramp_end_ns for part in parts if part.n]
    refills = [part.refill_end_ns for part in parts if part.refill_end_ns]
    return Recording(
        **columns,
        error=np.concatenate([renumbered(part) for part in parts]),
        error_kinds=kinds,
        error_texts=texts,
        usage_rows=sum(part.usage_rows for part in parts),
        tokenizer_rows=sum(part.tokenizer_rows for part in parts),
        ramp_end_ns=max(ramps, default=0) if all(ramps) else 0,
        refill_end_ns=min(refills, default=0),
        cpu_s=sum(part.cpu_s for part in parts),
        wall_s=max(part.wall_s for part in parts),
    )
