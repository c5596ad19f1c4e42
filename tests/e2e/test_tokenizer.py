"""`--tokenizer` against a server that counts nothing: prompts and replies are counted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.e2e.command import loadgen
from tests.e2e.misbehaving import STREAM_HEAD, Writer, event, serving, token

TOKENS_A_CHUNK, CHUNKS = 3, 4


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer for which every word, and every space before one, is a token of its own."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


async def three_words_a_chunk(_: int, out: Writer) -> None:
    out.write(STREAM_HEAD)
    for i in range(CHUNKS):
        out.write(event(token("one two three ", finish="stop" if i == CHUNKS - 1 else None)))
        await out.drain()
    out.write(event("[DONE]") + b"0\r\n\r\n")


def test_replies_and_prompts_are_counted_here(tmp_path: Path, words: Path) -> None:
    with serving(three_words_a_chunk) as server:
        done = loadgen(
            tmp_path, "run", server, "--tokenizer", str(words), "--requests", "6",
            "--input-tokens", "100", "--output-tokens", "12", "--json", str(tmp_path / "run.json"),
        )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    (level,) = json.loads((tmp_path / "run.json").read_text())["levels"]
    assert level["tokens"]["source"] == "tokenizer"
    assert level["tokens"]["output"] == 6 * TOKENS_A_CHUNK * CHUNKS
    assert level["tokens"]["prompt"] == 6 * 100
    assert level["total_tokens_per_s"] > level["output_tokens_per_s"]


def test_without_one_the_events_are_counted_and_prompts_are_unknown(tmp_path: Path) -> None:
    with serving(three_words_a_chunk) as server:
        done = loadgen(
            tmp_path, "run", server, "--requests", "6", "--output-tokens", "12",
            "--json", str(tmp_path / "run.json"),
        )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    (level,) = json.loads((tmp_path / "run.json").read_text())["levels"]
    assert level["tokens"] == {
        "prompt": None,
        "output": 6 * CHUNKS,
        "reasoning": 0,
        "source": "events",
    }
    assert level["total_tokens_per_s"] is None
