"""Prompts hit their length without a tokenizer, and do not meet a warm prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import prompts
from loadgen.prompts import (
    NONCES,
    Costs,
    Piece,
    Texts,
    TokenIds,
    costs_of,
    expected_tokens,
    nonce_letters,
    probe_prompts,
    shape_of,
)

Tokenizer = Callable[[str], int]


def by_word_length(per_token: int, template: int) -> Tokenizer:
    """A word costs a token for every `per_token` letters begun, as small vocabularies do it."""
    return lambda text: template + sum(math.ceil(len(word) / per_token) for word in text.split(" "))


def by_words(costs: dict[str, int], template: int) -> Tokenizer:
    """Additive over words, every word with a cost of its own: any BPE that splits at spaces."""
    return lambda text: template + sum(costs.get(word, 1) for word in text.split(" "))


tokenizers = st.one_of(
    st.builds(by_word_length, st.integers(1, 12), st.integers(0, 40)),
    st.builds(
        by_words,
        st.fixed_dictionaries({word: st.integers(1, 4) for word in prompts.WORDS}),
        st.integers(0, 40),
    ),
)


def probed(tokenizer: Tokenizer) -> Costs:
    return costs_of([tokenizer(prompt) for prompt in probe_prompts(Random(3))])


def text_of(maker: Texts, tokens: float, nonce: int | None, *shared: Piece, seed: int = 1) -> str:
    return str(maker.prompt(tokens, Random(seed), nonce, shared).content)


@settings(max_examples=60)
@given(tokenizers, st.integers(32, 8000), st.integers(0, 3000))
def test_texts_have_the_asked_length_within_2_percent(
    tokenizer: Tokenizer, n: int, prefix: int
) -> None:
    costs = probed(tokenizer)
    maker = Texts(costs, seed=n)
    fits = n >= costs.fixed + costs.nonce_letter  # the template alone may be longer
    shared = maker.piece(prefix, Random(4))
    for nonce in (0, 12345, NONCES - 1):
        made = maker.prompt(n, Random(nonce), nonce, (shared,))
        got = tokenizer(str(made.content))
        assert got == pytest.approx(made.tokens, abs=0.01)
        if fits:
            assert abs(got - n - prefix) <= max(0.02 * (n + prefix), 2)


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(0, NONCES - 1))
def test_token_ids_are_exact(n: int, prefix: int, nonce: int) -> None:
    maker = TokenIds(seed=1)
    shared = maker.piece(prefix, Random(4))
    made = maker.prompt(n, Random(2), nonce, (shared,))
    assert len(made.content) == made.tokens == n + prefix
    assert made.content[:prefix] == shared.content
    assert set(made.content) <= set(prompts.IDS)


def test_the_probes_tell_what_each_part_costs() -> None:
    costs = probed(by_word_length(3, template=9))
    block = sum(math.ceil(len(word) / 3) for word in prompts.WORDS)
    assert costs == Costs(fixed=10, nonce_letter=1, block=block, unit=1)
    assert costs.nonce == 16


@settings(max_examples=100)
@given(
    st.integers(0, 10_000),
    st.builds(
        Costs, st.floats(0, 100), st.floats(0.5, 4), st.floats(8, 160), st.floats(0.5, 4)
    ),
)  # fmt: skip
def test_a_shape_is_never_empty_and_off_by_half_a_unit_at_most(n: int, costs: Costs) -> None:
    shape = shape_of(n, costs)
    assert 1 <= shape.letters <= 16
    assert min(shape.blocks, shape.units) >= 0
    if n >= costs.fixed + costs.nonce_letter:
        assert abs(expected_tokens(shape, costs) - n) <= costs.unit / 2 + 1e-6


def test_prompts_differ_from_their_first_tokens_on() -> None:
    """A prefix cache works in blocks of 16 tokens: the first block must already differ."""
    maker = Texts(prompts.DEFAULT_COSTS, seed=1)
    opened = [tuple(text_of(maker, 1000, nonce).split(" ")[:16]) for nonce in range(500)]
    assert len(set(opened)) == len(opened)
    assert {words[0] for words in opened} == {"a"}
    assert len({words[1] for words in opened}) == 16
    assert all(len(set(words[1:])) == 15 for words in opened)  # each letter once
    ids = TokenIds(seed=1)
    fronts = {tuple(ids.prompt(100, Random(1), nonce).content[:4]) for nonce in range(500)}
    assert len(fronts) == 500


@given(st.integers(0, NONCES - 1))
def test_every_nonce_is_an_order_of_all_letters(nonce: int) -> None:
    assert sorted(nonce_letters(nonce)) == sorted(prompts.NONCE_LETTERS)


@settings(max_examples=30)
@given(st.sets(st.integers(0, NONCES - 1), min_size=2, max_size=50))
def test_different_nonces_are_different_orders(nonces: set[int]) -> None:
    assert len({tuple(nonce_letters(nonce)) for nonce in nonces}) == len(nonces)


def test_the_same_seed_makes_the_same_prompt_and_shared_pieces_stand_in_front() -> None:
    first, second = (Texts(prompts.DEFAULT_COSTS, seed=1) for _ in range(2))
    assert text_of(first, 200, 7) == text_of(second, 200, 7)
    assert text_of(first, 200, 7) != text_of(first, 200, 8)
    assert text_of(first, 200, 7) != text_of(first, 200, 7, seed=2)
    shared = first.piece(64, Random(1))
    made = [text_of(first, 200, nonce, shared) for nonce in (1, 2)]
    assert all(text.startswith(f"a {shared.content} ") for text in made)
    assert text_of(first, 50, None, shared) == text_of(first, 50, None, shared)
    assert "  " not in made[0]


def test_a_server_that_counts_nonsense_gives_costs_that_can_be_divided_by() -> None:
    costs = costs_of([0, 0, 0, 0])
    assert min(costs.nonce_letter, costs.block, costs.unit) > 0
    assert text_of(Texts(costs, seed=1), 100, 3)
