"""Traces: the published formats, and whatever else a file may hold."""

from __future__ import annotations

import gzip
import json
import math
import pickle
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import datafile, trace
from agent.model import TOKENS_MAX, UsageError
from agent.trace import Arrival, demand, read

GOLDEN = Path(__file__).parent.parent / "golden/traces"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"

any_file = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(tmp_path: Path, content: str | bytes, name: str = "t") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---------------------------------------------------------------------------- published formats


def test_azure() -> None:
    found = read(GOLDEN / "azure-2023-code.csv")
    assert (found.format, len(found.rows), found.skipped, found.notes) == ("azure", 20, {}, [])
    assert found.rows[0] == Arrival(0.0, 4808, 10)
    assert found.rows[1].at_s == pytest.approx(0.052)  # 18:17:04.03196 − 18:17:03.97996
    assert found.rows[1].input_tokens == 3180
    assert found.rows[-1] == found.rows[19]


def test_mooncake_with_its_prefixes() -> None:
    found = read(GOLDEN / "mooncake-conversation.jsonl")
    assert (found.format, len(found.rows), found.notes) == ("mooncake", 20, [])
    assert found.rows[1] == Arrival(0.0, 7322, 490, (0, *range(14, 28)))
    assert found.rows[-1].at_s == 3.0  # 3000 ms
    blocks = [math.ceil(row.input_tokens / trace.HASH_BLOCK_TOKENS) for row in found.rows]
    assert [len(row.hash_ids) for row in found.rows] == blocks


def test_burstgpt_of_both_layouts() -> None:
    found = read(GOLDEN / "burstgpt-1.csv")
    assert found.format == "burstgpt"
    assert found.rows[2] == Arrival(113.0, 417, 276, model="GPT-4")
    assert found.skipped == {"zero output tokens": (1, 22)}
    assert found.notes == ["burstgpt-1.csv: 1 line skipped: zero output tokens (first line 22)"]
    later = read(GOLDEN / "burstgpt-3.csv")  # with Session ID and Elapsed time
    assert later.rows[:] == (
        Arrival(0.0, 906, 446, (), "GPT-4"),
        Arrival(51.0, 36, 29, (), "ChatGPT"),
    )


def test_dates_with_a_zone_as_azure_wrote_them_in_2024(tmp_path: Path) -> None:
    text = f"{AZURE}\n2024-05-10 00:00:00+00:00,5,6\n2024-05-10 02:00:01.500000+02:00,7,8\n"
    assert read(written(tmp_path, text)).rows[:] == (Arrival(0.0, 5, 6), Arrival(1.5, 7, 8))


@pytest.mark.parametrize("name", ["azure-2023-code.csv", "mooncake-conversation.jsonl"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_however_it_is_packed_it_is_the_same(
    tmp_path: Path, name: str, pack: object, bom: bytes, end: bytes
) -> None:
    assert callable(pack)
    content = (GOLDEN / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", end)
    found = read(written(tmp_path, pack(bom + content.rstrip()), "no-such-suffix"))
    assert found.rows[:] == read(GOLDEN / name).rows[:]


# ------------------------------------------------------------------------------------------ laws

arrivals = st.lists(
    st.tuples(st.integers(0, 10**9), st.integers(1, TOKENS_MAX), st.integers(1, TOKENS_MAX)),
    min_size=1,
    max_size=50,
)


@any_file
@given(arrivals, st.sampled_from(("azure", "burstgpt", "mooncake")))
def test_what_is_written_is_read_by_instant(
    tmp_path: Path, asked: list[tuple[int, int, int]], name: str
) -> None:
    day = datetime(2023, 11, 16, tzinfo=UTC)
    if name == "azure":
        text = AZURE + "".join(
            f"\n{(day + timedelta(milliseconds=ms)).replace(tzinfo=None)},{i},{o}"
            for ms, i, o in asked
        )
    elif name == "burstgpt":
        text = BURST + "".join(f"\n{ms / 1000},GPT-4,{i},{o},{i + o},API log" for ms, i, o in asked)
    else:
        keys = ("timestamp", "input_length", "output_length")
        text = "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in asked)
    found = read(written(tmp_path, text))
    begin = min(ms for ms, _, _ in asked)
    expected = sorted(asked, key=lambda row: row[0])  # stable: what came together stays in order
    assert found.format == name
    assert [(r.input_tokens, r.output_tokens) for r in found.rows] == [r[1:] for r in expected]
    assert [r.at_s for r in found.rows] == pytest.approx(
        [(ms - begin) / 1000 for ms, _, _ in expected], abs=1e-6
    )
    assert all(a.at_s <= b.at_s for a, b in pairwise(found.rows))
    back = sum(a[0] > b[0] for a, b in pairwise(asked))
    assert [f"{back} of {len(asked)} requests" in note for note in found.notes] == [True] * bool(
        back
    )
    assert pickle.loads(pickle.dumps(found.rows))[:] == found.rows[:]  # for another process


FILES = tuple(path.read_bytes() for path in sorted(GOLDEN.glob("*-*")))


@any_file
@given(st.sampled_from(FILES), st.data())
def test_cut_or_spoilt_anywhere_it_is_read_or_refused(
    tmp_path: Path, content: bytes, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    noise = data.draw(st.binary(max_size=5) | st.sampled_from((b'"', b"\x00", b"{", b",", b"-1")))
    spoilt = data.draw(st.sampled_from((
        content[:end], content[begin:], content[:begin] + noise + content[end:],
        gzip.compress(content)[:end],
    )))  # fmt: skip
    with suppress(UsageError):
        found = read(written(tmp_path, spoilt))
        assert len(found.rows) >= 1
        assert all(row.input_tokens >= 1 and row.output_tokens >= 1 for row in found.rows)


@any_file
@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_file_is_a_trace_or_a_usage_error(tmp_path: Path, content: bytes) -> None:
    with suppress(UsageError):
        read(written(tmp_path, content))


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2023-11-16 18:17:05,-5,10", "negative length"),
        (b"2023-11-16 18:17:05,5,-10", "negative length"),
        (b"2023-11-16 18:17:05,10000001,10", "length over 10000000"),
        (b"2023-11-16 18:17:05," + b"9" * 5000 + b",10", "a length that is no whole number"),
        (b"2023-11-16 18:17:05,5.5,10", "a length that is no whole number"),
        (b"2023-11-16 18:17:05,\xd9\xa1,10", "a length that is no whole number"),
        (b"2023-11-16 18:17:05,1_0,10", "a length that is no whole number"),
        (b"2023-11-16 18:17:05,,10", "a length that is no whole number"),
        (b"2023-11-16 18:17:05,5,0", "zero output tokens"),
        (b"2023-11-16 18:17:05,0,5", "zero input tokens"),
        (b"yesterday,5,5", "no date and time"),
        (b"2023-11-16 18:17:05,5", "not 3 columns"),
        (b"2023-11-16 18:17:05,1,234,10", "not 3 columns"),
        (b"\xff\xfe2023-11-16 18:17:05,5,5", "not UTF-8"),
        (b'"2023-11-16 18:17:05,5,5', "not 3 columns"),
        (b'"' + b"x" * 200_000 + b'",5,5', "broken quotes"),
        (b"2023-11-16 18:17:05\x00,5,5", "a NUL character"),
    ],
)
def test_lines_of_csv_that_are_none_are_named(tmp_path: Path, row: bytes, reason: str) -> None:
    good = b"2023-11-16 18:17:04,7,8\r\n"
    found = read(
        written(tmp_path, AZURE.encode() + b"\r\n" + good + row + b"\r\n" + good + row, "a.csv")
    )
    assert len(found.rows) == 2
    assert found.skipped == {reason: (2, 3)}
    assert found.notes == [f"a.csv: 2 lines skipped: {reason} (first line 3)"]


def mooncake(**changes: str | None) -> bytes:
    members = {"timestamp": "1", "input_length": "5", "output_length": "5"} | changes
    said = ", ".join(f'"{name}": {value}' for name, value in members.items() if value)
    return f"{{{said}}}".encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (mooncake(output_length=None), "a member is missing"),
        (mooncake(timestamp='"1"'), "a member of the wrong type"),
        (mooncake(input_length="5.5"), "a member of the wrong type"),
        (mooncake(timestamp="1e999"), "a member of the wrong type"),
        (mooncake(timestamp="1e20"), "an instant out of range"),
        (mooncake(input_length="-5"), "negative length"),
        (mooncake(output_length="0"), "zero output tokens"),
        (mooncake(hash_ids="[1, 2]"), "more hash_ids than input_length has blocks of 512 tokens"),
        (mooncake(hash_ids="[99999999999999999999]"), "a hash id out of range"),
        (mooncake(hash_ids='["a"]'), "a member of the wrong type"),
        (b'{"timestamp": 1, "input_len', "no JSON object"),
        (b"[1, 2, 3]", "a member of the wrong type"),
        (mooncake(more='"\udcff"'), None),  # not UTF-8, in a member that nobody reads
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON object"),
        (b"\x00\x00", "no JSON object"),
    ],
)  # fmt: skip
def test_lines_of_jsonl_that_are_none_are_named(
    tmp_path: Path, line: bytes, reason: str | None
) -> None:
    good = b'{"timestamp": 7, "input_length": 7, "output_length": 8, "more": [{}]}\n'
    found = read(written(tmp_path, good + b"\n" + line + b"\n" + good))
    assert found.skipped == ({reason: (1, 3)} if reason else {})
    assert len(found.rows) == (2 if reason else 3)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "", "x", "12:00"])
def test_instants_in_seconds_that_are_none(tmp_path: Path, text: str) -> None:
    found = read(written(tmp_path, f"{BURST}\n1,m,5,5,10,x\n{text},m,5,5,10,x\n"))
    assert [(count, line) for count, line in found.skipped.values()] == [(1, 3)]


def test_instants_that_go_back_are_sorted_and_said(tmp_path: Path) -> None:
    text = f"{BURST}\n30,a,1,1,2,x\n10,b,2,1,3,x\n20,c,3,1,4,x\n5,d,4,1,5,x\n"
    found = read(written(tmp_path, text, "b.csv"))
    assert [(r.at_s, r.model) for r in found.rows] == [(0, "d"), (5, "b"), (15, "c"), (25, "a")]
    assert found.notes == [
        "b.csv: 2 of 4 requests come before the one above them (first line 3): sorted by instant"
    ]


def test_a_line_too_long_is_left_out_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datafile, "LINE_BYTES_MAX", 1000)
    good = b'{"timestamp": 7, "input_length": 7, "output_length": 8}\n'
    found = read(written(tmp_path, good + b"x" * 5000 + b"\n" + good + b"y" * 1001))
    assert len(found.rows) == 2
    assert list(found.skipped.values()) == [(2, 2)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no trace that can be read; a trace's first line is TIMESTAMP,ContextTokens,Gen"),
        (b"a,b,c\n1,2,3\n", "no trace that can be read"),
        (b"TIMESTAMP,ContextTokens\n1,2\n", "no trace that can be read"),
        (b"\x00\xff\x00", "no trace that can be read"),
        (b"2023-11-16 18:17:05,5,5\n", "no trace that can be read"),
        (AZURE.encode(), r"nothing in it can be used \(it is empty\); a trace's first line"),
        (AZURE.encode() + b"\nx,1,1\n2023-11-16,0,1",
         r"nothing in it can be used \(1 line skipped: no date and time \(first line 2\); 1 line"),
        (b'{"prompt": "x"}\n', "a member is missing"),
        (AZURE.encode("utf-16"), "UTF-16; write it as UTF-8"),
        (gzip.compress(AZURE.encode())[:-9], "gzip data is damaged or cut"),
        (gzip.compress(AZURE.encode())[:-8] + b"12345678", "gzip data is damaged or cut"),
        (b"\x1f\x8b no gzip", "gzip data is damaged or cut"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(f"--trace {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [("none.csv", "No such file"), (".", "directory"), ("a\x00b", "null"), ("/dev/zero", "device")],
)
def test_paths_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        read(path)


# ---------------------------------------------------------------------------------------- demand


def test_demand_is_what_the_trace_asks_for(tmp_path: Path) -> None:
    rows = [(at, 100, 10) for at in range(0, 601, 10)]  # 0.1/s for ten minutes
    rows += [(300 + k / 100, 200, 20) for k in range(60)]  # and a burst of 60 within a second
    text = BURST + "".join(f"\n{at},m,{i},{o},0,x" for at, i, o in rows)
    found = demand(read(written(tmp_path, text)))
    assert found["window_s"] == 600
    assert found["requests_per_s"]["mean"] == pytest.approx(120 / 600)
    assert found["requests_per_s"]["peak"] == pytest.approx(66 / 60)
    assert found["input_tokens"] == pytest.approx(
        {"mean": 149.587, "p50": 100, "p95": 200}, rel=1e-4
    )
    assert found["output_tokens"]["mean"] == pytest.approx(14.9587, rel=1e-4)


def test_demand_of_little_says_what_it_can(tmp_path: Path) -> None:
    one = demand(read(written(tmp_path, f"{BURST}\n5,m,3,4,7,x")))
    assert one["window_s"] == 0
    assert one["requests_per_s"] == {"mean": None, "peak": None}
    assert one["input_tokens"] == {"mean": 3, "p50": 3, "p95": 3}
    two = demand(read(written(tmp_path, f"{BURST}\n5,m,3,4,7,x\n7,m,3,4,7,x")))
    assert two["requests_per_s"] == {"mean": 0.5, "peak": 0.5}
