"""The recorder loses nothing, and merging recordings is the same as having had one worker."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from loadgen.client import Exchange
from loadgen.level import _gaps
from loadgen.recorder import (
    CANCELLED,
    FAILED,
    OK,
    Counts,
    Recorder,
    Row,
    added,
    merge,
    rows,
)  # fmt: skip

MS = 1_000_000


def exchange(index: int = 0, **fields: object) -> Exchange:
    made = Exchange(index, 1000 * MS)
    made.sent_ns = 1001 * MS
    made.end_ns = 1100 * MS
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def stamps(*at_ms: int) -> array[int]:
    return array("q", [(1000 + ms) * MS for ms in at_ms])


def record(*exchanges: Exchange) -> Recorder:
    recorder = Recorder()
    for each in exchanges:
        recorder.add(each)
    return recorder


def test_a_row_a_request_and_the_stamps_one_behind_the_other() -> None:
    recorder = record(
        exchange(0, stamps=stamps(10, 20), output_tokens=2, prompt_tokens=5, answer_ns=7),
        exchange(1, error="cut", error_text="gone", stamps=stamps(30), connect_ns=3),
        exchange(2, error="cancelled", warmup=True),
    )
    rec = recorder.freeze(cpu_s=0.5, wall_s=2.0)
    assert rec.n == 3
    assert rec.index.tolist() == [0, 1, 2]
    assert rec.outcome.tolist() == [OK, FAILED, CANCELLED]
    assert rec.warmup.tolist() == [0, 0, 1]
    assert rec.prompt_tokens.tolist() == [5, -1, -1]
    assert rec.answer_ns.tolist() == [7, 0, 0]
    assert rec.connect_ns.tolist() == [0, 3, 0]
    assert rec.chunks.tolist() == [2, 1, 0]
    assert rec.stamps_ns.tolist() == [1010 * MS, 1020 * MS, 1030 * MS]
    assert rec.error_kinds == ("cut", "cancelled")
    assert rec.error_texts == {"cut": "gone", "cancelled": ""}
    assert (rec.cpu_s, rec.wall_s) == (0.5, 2.0)
    assert (recorder.ok, recorder.failed, recorder.tokens) == (1, 1, 3)


@pytest.mark.parametrize(
    ("output", "counts", "weights", "counted"),
    [
        (3, (), [1, 1, 1], False),
        (6, (), [2, 2, 2], False),  # shared out evenly
        (6, (1, 2, 3), [1, 2, 3], True),  # the server said it chunk by chunk
        (3, (1, 1, 3), [1, 1, 1], False),  # usage only in the last chunk: no counts of chunks
        (7, (3, 3), [7 / 3] * 3, False),
        (-1, (), [1, 1, 1], False),  # no usage: a chunk is a token
        (0, (), [1, 1, 1], False),  # a count that the stream itself belies
    ],
)
def test_weights_are_the_servers_counts_or_an_even_share(
    output: int, counts: tuple[int, ...], weights: list[float], counted: bool
) -> None:
    made = exchange(
        stamps=stamps(1, 2, 3), output_tokens=output, token_counts=array("i", counts)
    )  # fmt: skip
    rec = record(made).freeze(cpu_s=0, wall_s=0)
    assert rec.weights.tolist() == weights
    assert rec.chunks_counted.tolist() == [int(counted)]
    assert rec.output_tokens[0] == round(sum(weights))
    assert rec.usage_rows == (output > 0)


def test_running_means_are_those_of_the_recording() -> None:
    """Of the requests that were answered after the warm-up, whatever a chunk carries."""
    answered = [
        exchange(0, stamps=stamps(40, 50, 65), output_tokens=3),
        exchange(1, stamps=stamps(20, 60), output_tokens=6, token_counts=array("i", (1, 5))),
        exchange(2, stamps=stamps(30), output_tokens=1),
        exchange(3, output_tokens=4),
    ]
    others = [
        exchange(4, stamps=stamps(5, 90), output_tokens=2, warmup=True),
        exchange(5, stamps=stamps(5, 90), error="cut"),
        exchange(6, error="cancelled"),
    ]
    gaps_ms, _ = _gaps(record(*answered).freeze(cpu_s=0, wall_s=1))
    counts = record(*answered, *others).counts
    assert counts.itl_sum_ns / counts.gaps / 1e6 == pytest.approx(gaps_ms.mean())
    assert (counts.ttfts, counts.ttft_sum_ns) == (3, (39 + 19 + 29) * MS)
    assert (counts.ok, counts.failed, dict(counts.failures)) == (5, 1, {"cut": 1})
    parts = [record(*answered[:2]).counts, record(*answered[2:], *others).counts]
    assert added(parts) == counts


def test_a_ramp_of_several_ends_with_the_last_that_began() -> None:
    assert added([Counts(ramp_end_ns=3), Counts(ramp_end_ns=5)]).ramp_end_ns == 5
    assert added([Counts(ramp_end_ns=3), Counts()]).ramp_end_ns == 0
    kinds = [Counts(failures={"cut": 1}), Counts(failures={"cut": 2, "reset": 1})]
    assert added(kinds).failures == {"cut": 3, "reset": 1}


def test_a_reply_that_was_not_streamed_has_tokens_and_no_stamps() -> None:
    rec = record(exchange(output_tokens=9), exchange(output_tokens=0)).freeze(cpu_s=0, wall_s=0)
    assert rec.output_tokens.tolist() == [9, 0]
    assert rec.usage_rows == 2
    assert rec.stamps_ns.size == rec.weights.size == 0


def test_reasoning_tokens_are_the_servers_or_the_share_of_their_chunks() -> None:
    four = stamps(1, 2, 3, 4)
    rec = record(
        exchange(stamps=four, reasoning_tokens=4, reasoning_chunks=2),
        exchange(stamps=four, reasoning_chunks=2),
        exchange(stamps=four, reasoning_chunks=3, output_tokens=8),
        exchange(stamps=four),
        exchange(),
    ).freeze(cpu_s=0, wall_s=0)
    assert rec.reasoning_tokens.tolist() == [4, 2, 6, 0, 0]


def test_the_first_of_each_kind_of_failure_is_kept_in_words() -> None:
    rec = record(
        exchange(error="cut", error_text="first"), exchange(error="cut", error_text="second")
    ).freeze(cpu_s=0, wall_s=0)
    assert rec.error_texts == {"cut": "first"}
    assert rec.error.tolist() == [0, 0]


def test_rows_leave_the_warm_up_out_and_never_say_zero_for_never() -> None:
    rec = record(
        exchange(0, warmup=True, stamps=stamps(5, 6)),
        exchange(1, stamps=stamps(10, 20, 30), output_tokens=3, prompt_tokens=0),
        exchange(2, error="connect", sent_ns=0),
    ).freeze(cpu_s=0, wall_s=0)
    due, sent, end, none = 1000 * MS, 1001 * MS, 1100 * MS, np.array([], dtype=np.int64)
    found = list(rows(rec))
    assert found == [
        Row(1, due, sent, 0, 1010 * MS, None, 1030 * MS, end, None, 0, 3, 0, none),
        Row(2, due, None, 0, None, None, None, end, "connect", None, 0, 0, none),
    ]
    assert [row.stamps_ns.tolist() for row in found] == [list(stamps(10, 20, 30)), []]


def test_merging_renumbers_the_kinds_of_failures() -> None:
    one = record(exchange(0, error="cut", error_text="a"), exchange(1))
    two = record(exchange(2, error="reset"), exchange(3, error="cut", error_text="b"), exchange(4))
    rec = merge([one.freeze(cpu_s=1, wall_s=5), two.freeze(cpu_s=2, wall_s=4)])
    named = [None if o == OK else rec.error_kinds[e]
             for o, e in zip(rec.outcome, rec.error, strict=True)]  # fmt: skip
    assert named == ["cut", None, "reset", "cut", None]
    assert rec.error_texts["cut"] == "a"
    assert (rec.cpu_s, rec.wall_s) == (3, 5)


def test_a_merged_ramp_ends_with_the_last_worker_and_its_steady_time_with_the_first() -> None:
    def part(ramp_end_ns: int, refill_end_ns: int) -> Recorder:
        recorder = record(exchange())
        recorder.ramp_end_ns, recorder.refill_end_ns = ramp_end_ns, refill_end_ns
        recorder.loop_lag_ns.append(ramp_end_ns)
        return recorder

    def merged(*parts: Recorder) -> tuple[int, int]:
        rec = merge([part.freeze(cpu_s=0, wall_s=1) for part in parts])
        return rec.ramp_end_ns, rec.refill_end_ns

    assert merged(part(5, 90), part(7, 80)) == (7, 80)
    assert merged(part(5, 90), part(0, 0)) == (0, 90)  # a worker whose ramp never ended
    rec = merge([part(5, 1).freeze(cpu_s=0, wall_s=1), part(6, 1).freeze(cpu_s=0, wall_s=1)])
    assert rec.loop_lag_ns.tolist() == [5, 6]


def test_merging_empty_recordings() -> None:
    rec = merge([Recorder().freeze(cpu_s=0, wall_s=0)] * 3)
    assert rec.n == 0
    assert rec.stamps_ns.dtype == np.int64
    assert list(rows(rec)) == []
