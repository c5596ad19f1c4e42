"""A local tokenizer counts as the one on the server would, and says what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from agent.model import UsageError
from loadgen import prompts
from loadgen.tokenizer import counter


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer as most models have one, trained on this package's own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([Path(prompts.__file__).read_text()], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("tokens", [64, 500, 4000])
def test_its_costs_give_prompts_of_the_asked_length(tokenizer_file: Path, tokens: int) -> None:
    count = counter(str(tokenizer_file))
    rng = Random(1)
    costs = prompts.costs_of([count(text) for text in prompts.probe_prompts(rng)])
    maker = prompts.Texts(costs, seed=1)
    lengths = [count(str(maker.prompt(tokens, rng, nonce).content)) for nonce in range(20)]
    assert all(abs(length - tokens) <= 0.02 * tokens for length in lengths)


def test_a_directory_means_the_file_in_it(tokenizer_file: Path) -> None:
    assert counter(str(tokenizer_file.parent))("a b c") == counter(str(tokenizer_file))("a b c")


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*tokenizer\.json"):
        counter(str(tmp_path))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(UsageError, match=r"not a tokenizer\.json"):
        counter(str(broken))
