"""Datasets: ShareGPT, messages, prompts, and whatever else a file may hold."""

from __future__ import annotations

import gzip
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import datafile
from agent.model import UsageError
from loadgen.dataset import Entry, read

any_file = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

SHAREGPT: list[dict[str, Any]] = [
    {
        "id": "dsOTKpn_0",
        "conversations": [
            {"from": "human", "value": "Why does the tide rise?"},
            {"from": "gpt", "value": "Because of the moon."},  # 20 characters
            {"from": "human", "value": "And fall?"},
            {"from": "gpt", "value": "x" * 401},
        ],
    },
    {
        "id": "piece",
        "conversations": [{"from": "gpt", "value": "…"}, {"from": "user", "value": "?"}],
    },
]


def written(tmp_path: Path, content: object, name: str = "d") -> Path:
    """A file of these bytes, or of these objects one a line."""
    if not isinstance(content, bytes):
        assert isinstance(content, list)
        content = "\n".join(json.dumps(each) for each in content).encode()
    path = tmp_path / name
    path.write_bytes(content)
    return path


def one(tmp_path: Path, entry: dict[str, Any]) -> Entry:
    [found] = read(written(tmp_path, [entry])).entries
    return found


# --------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_sharegpt(tmp_path: Path, indent: int | None, pack: object, bom: bytes) -> None:
    assert callable(pack)
    content = pack(bom + json.dumps(SHAREGPT, indent=indent).encode())
    found = read(written(tmp_path, content, "sg.json"))
    assert found.entries == (
        Entry(("Why does the tide rise?", "And fall?"), None, (5, 101), True),
        Entry(("?",), None, (None,), False),  # what came before the first question is left out
    )
    assert found.notes == ["sg.json: reply lengths of 1 of 2 entries are estimated, characters / 4"]
    assert read(written(tmp_path, SHAREGPT)).entries == found.entries  # the same as JSONL


def test_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "user", "content": "More"},
    ]
    assert one(tmp_path, {"messages": said}) == Entry(("Hello", "More"), "Be brief.", (None, None))
    assert one(tmp_path, {"prompt": said, "max_tokens": 7}).output_tokens == (None, 7)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"prompt": "a"}, Entry(("a",), None, (None,))),
        ({"text": "a"}, Entry(("a",), None, (None,))),
        ({"prompt": "a", "system": "s"}, Entry(("a",), "s", (None,))),
        ({"prompt": "a", "output_tokens": 5, "completion": "long"}, Entry(("a",), None, (5,))),
        ({"prompt": "a", "max_tokens": 6}, Entry(("a",), None, (6,))),
        ({"prompt": "a", "max_tokens": None, "completion_tokens": 9}, Entry(("a",), None, (9,))),
        ({"prompt": "a", "completion": "12345"}, Entry(("a",), None, (2,), True)),
        ({"prompt": "a", "response": {"id": 1}}, Entry(("a",), None, (None,))),
        ({"prompt": "a\x00b 🌊 é", "other": {"x": [1]}}, Entry(("a\x00b 🌊 é",), None, (None,))),
    ],
)
def test_prompts(tmp_path: Path, entry: dict[str, Any], expected: Entry) -> None:
    assert one(tmp_path, entry) == expected


# ------------------------------------------------------------------------------------------ laws

texts = st.text(min_size=1).filter(lambda text: text.strip())
talks = st.lists(st.tuples(texts, st.text()), min_size=1, max_size=4)


@any_file
@given(st.lists(talks, min_size=1, max_size=5), st.booleans())
def test_what_is_written_is_read(
    tmp_path: Path, asked: list[list[tuple[str, str]]], as_list: bool
) -> None:
    content = [
        {
            "conversations": [
                {"from": role, "value": value}
                for turn in talk
                for role, value in zip(("human", "gpt"), turn, strict=True)
            ]
        }
        for talk in asked
    ]
    data = json.dumps(content, ensure_ascii=not as_list).encode() if as_list else content
    found = read(written(tmp_path, data))
    assert [entry.turns for entry in found.entries] == [
        tuple(question for question, _ in talk) for talk in asked
    ]
    assert [entry.output_tokens for entry in found.entries] == [
        tuple(math.ceil(len(reply) / 4) or None for _, reply in talk) for talk in asked
    ]


FILES = (
    json.dumps(SHAREGPT).encode(),
    json.dumps(SHAREGPT, indent=1).encode(),
    b'{"prompt": "caf\xc3\xa9", "max_tokens": 5}\n{"messages": [{"role": "user", "content": "a"}]}',
)


@any_file
@given(st.sampled_from(FILES), st.data())
def test_cut_or_spoilt_anywhere_it_is_read_or_refused(
    tmp_path: Path, content: bytes, data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    noise = data.draw(st.binary(max_size=5) | st.sampled_from((b'"', b"\x00", b"{", b"[", b"\\u")))
    spoilt = data.draw(st.sampled_from((
        content[:end], content[begin:], content[:begin] + noise + content[end:],
        gzip.compress(content)[:end],
    )))  # fmt: skip
    with suppress(UsageError):
        for entry in read(written(tmp_path, spoilt)).entries:
            assert entry.turns
            assert len(entry.output_tokens) == len(entry.turns)


@any_file
@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_file_is_a_dataset_or_a_usage_error(tmp_path: Path, content: bytes) -> None:
    with suppress(UsageError):
        read(written(tmp_path, content))


# ------------------------------------------------------------------------------------- bad input

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a"}', "no prompt, text, messages or conversations"),
        (b'{"prompt": ""}', "no prompt, text, messages or conversations"),
        (b'{"conversations": []}', "no prompt, text, messages or conversations"),
        (b'{"prompt": " \\n"}', "a question without text"),
        (b'{"messages": [{"role": "user"}]}', "a question without text"),
        (b'{"prompt": 5}', "a member of the wrong type"),
        (b'{"prompt": ["a", "b"]}', "a member of the wrong type"),
        (b'["prompt"]', "a member of the wrong type"),
        (b"17", "a member of the wrong type"),
        (b'{"prompt": "a", "max_tokens": 0}', "zero output tokens"),
        (b'{"prompt": "a", "max_tokens": -1}', "negative length"),
        (b'{"prompt": "a", "max_tokens": 10000001}', "length over 10000000"),
        (b'{"prompt": "a", "max_tokens": 1e400}', "a member of the wrong type"),
        (b'{"prompt": "a", "max_tokens": true}', "a member of the wrong type"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "no message of a user"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}',
         "a role that is not user, assistant or system"),
        (b'{"messages": [{"content": "a"}]}', "a role that is not user, assistant or system"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
         "content that is not text"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        (b'{"prompt": "a\x00b"}', "no JSON object"),
        (b'{"prompt": "\\ud800"}', "no JSON object"),
        (b'{"prompt": "a"', "no JSON object"),
        (b"prompt,reply", "no JSON object"),
        (b'{"prompt": "a", "more": ' + DEEP + b"}", "nested too deeply"),
    ],
)  # fmt: skip
def test_lines_that_are_none_are_named(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"prompt": "good"}\r\n'
    found = read(written(tmp_path, good + b"\r\n" + line + b"\r\n" + good + line, "d.jsonl"))
    assert [entry.turns for entry in found.entries] == [("good",)] * 2
    assert found.skipped == {reason: (2, 3)}
    assert found.notes == [f"d.jsonl: 2 lines skipped: {reason} (first line 3)"]


def test_entries_of_a_list_are_named_by_index(tmp_path: Path) -> None:
    content = b'[{"prompt": "a"},\n 5, {"prompt": "b"}, {"prompt": "caf\xe9"}, null]'
    found = read(written(tmp_path, content, "d.json"))
    assert [entry.turns for entry in found.entries] == [("a",), ("b",)]
    assert found.notes == [
        "d.json: 2 entries skipped: a member of the wrong type (first index 1)",
        "d.json: 1 entry skipped: not UTF-8 (first index 3)",
    ]


def test_a_line_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafile, "LINE_BYTES_MAX", 1000)
    found = read(written(tmp_path, [{"prompt": "a"}, {"prompt": "b" * 5000}, {"prompt": "c"}]))
    assert [entry.turns for entry in found.entries] == [("a",), ("c",)]
    assert [place for _, place in found.skipped.values()] == [2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"nothing in it can be used \(it is empty\); an entry is"),
        (b"\n \n", "it is empty"),
        (b"[]", "it is empty"),
        (b"[1, 2]", r"2 entries skipped: a member of the wrong type \(first index 0\)"),
        (b'[{"prompt": "a"},\n{"prompt": }]', "no valid JSON list: line 2 cannot be read"),
        (b'[{"prompt": "a"}', "no valid JSON list: it ends too early"),
        (b'[{"prompt": "a"}] x', "no valid JSON list: line 1"),
        (DEEP, "no valid JSON list: it is nested too deeply"),
        (b"[" * 100_000, "no valid JSON list"),
        (json.dumps({"data": SHAREGPT}, indent=1).encode(), "nothing in it can be used"),
        (json.dumps(SHAREGPT).encode("utf-16"), "UTF-16"),
        (gzip.compress(b'[{"prompt": "a"}]')[:-4], "gzip data is damaged or cut"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UsageError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(f"--dataset {path}: ")
    assert "\n" not in str(caught.value)


def test_a_list_too_large_to_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datafile, "FILE_BYTES_MAX", 10)
    with pytest.raises(UsageError, match="write it as JSONL"):
        read(written(tmp_path, json.dumps(SHAREGPT).encode()))
