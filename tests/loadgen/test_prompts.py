"""Prompts hit their length without a tokenizer, and do not meet a warm prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen import workload
from loadgen.workload import Costs, Prompts, costs_of, expected_tokens, probe_prompts, shape_of

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
        st.fixed_dictionaries({word: st.integers(1, 4) for word in workload.WORDS}),
        st.integers(0, 40),
    ),
)


def probed(tokenizer: Tokenizer) -> Costs:
    return costs_of([tokenizer(prompt) for prompt in probe_prompts(Random(3))])


@settings(max_examples=60, deadline=None)
@given(tokenizers, st.integers(32, 8000))
def test_prompts_have_the_asked_length_within_2_percent(tokenizer: Tokenizer, n: int) -> None:
    costs = probed(tokenizer)
    prompts = Prompts(n, costs, Random(n))
    fits = n >= costs.fixed + costs.nonce_letter  # the template alone may be longer
    for _ in range(3):
        got = tokenizer(prompts.next())
        assert got == pytest.approx(expected_tokens(prompts.shape, costs), abs=0.01)
        if fits:
            assert abs(got - n) <= max(0.02 * n, 1)


def test_the_probes_tell_what_each_part_costs() -> None:
    costs = probed(by_word_length(3, template=9))
    block = sum(math.ceil(len(word) / 3) for word in workload.WORDS)
    assert costs == Costs(fixed=10, nonce_letter=1, block=block, unit=1)
    assert costs.nonce == 16


@settings(max_examples=100, deadline=None)
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
    prompts = Prompts(1000, workload.DEFAULT_COSTS, Random(1))
    opened = [tuple(prompts.next().split(" ")[:16]) for _ in range(500)]
    assert len(set(opened)) == len(opened)
    assert {words[0] for words in opened} == {"a"}
    assert len({words[1] for words in opened}) == 16
    assert all(len(set(words[1:])) == 15 for words in opened)  # each letter once


def test_two_runs_do_not_repeat_each_other_and_one_seed_does() -> None:
    def prompts(seed: int) -> list[str]:
        source = Prompts(200, workload.DEFAULT_COSTS, Random(seed))
        return [source.next() for _ in range(20)]

    assert prompts(1) == prompts(1)
    assert set(prompts(1)).isdisjoint(prompts(2))


def test_reuse_gives_one_prompt_for_ever() -> None:
    prompts = Prompts(300, workload.DEFAULT_COSTS, Random(1), reuse=True)
    assert len({prompts.next() for _ in range(20)}) == 1


def test_bodies_are_the_encoded_prompts_without_end() -> None:
    prompts = Prompts(40, workload.DEFAULT_COSTS, Random(1))
    made = list(islice(workload.bodies(prompts, str.encode), 30))
    assert len(set(made)) == 30
    assert all(body.startswith(b"a ") for body in made)


def test_a_server_that_counts_nonsense_gives_costs_that_can_be_divided_by() -> None:
    costs = costs_of([0, 0, 0, 0])
    assert min(costs.nonce_letter, costs.block, costs.unit) > 0
    assert Prompts(100, costs, Random(1)).next()
