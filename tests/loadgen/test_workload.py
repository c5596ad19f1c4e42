"""The n-th request is a function of the spec, the level and n: whoever makes it, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import trace
from agent.model import UsageError
from loadgen.lengths import Fixed, Uniform, parse
from loadgen.prompts import DEFAULT_COSTS
from loadgen.workload import Ask, Source, Spec, parse_mix

WORDY = Spec(
    endpoint="chat",
    stream=True,
    models=(("m", 1.0),),
    input_tokens=parse("lognormal:300:200", "--input-tokens"),
    output_tokens=Uniform(10, 50),
    costs=DEFAULT_COSTS,
    seed=7,
    nonce=1,
)


def spec(**changes: Any) -> Spec:
    return msgspec.structs.replace(WORDY, **changes)


def words(ask: Ask) -> list[str]:
    assert isinstance(ask.prompt, str)
    return ask.prompt.split(" ")


@settings(max_examples=30)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.booleans(), st.integers(1, 9))
def test_any_order_gives_the_same_requests(order: list[int], ids: bool, level: int) -> None:
    made = spec(token_ids=ids, endpoint="completions", prefix_tokens=40, prefixes=3)
    first, second = Source(made, level), Source(made, level)
    expected = [first.ask(n) for n in range(max(order) + 1)]
    assert [second.ask(n) for n in order] == [expected[n] for n in order]


def test_another_run_asks_the_same_behind_another_nonce() -> None:
    first, second = Source(spec(nonce=1), 1), Source(spec(nonce=2), 1)
    for n in range(50):
        one, two = first.ask(n), second.ask(n)
        assert (one.output_tokens, one.prompt_tokens) == (two.output_tokens, two.prompt_tokens)
        assert words(one)[1:17] != words(two)[1:17]
        assert words(one)[17:] == words(two)[17:]


def test_another_seed_or_level_asks_something_else() -> None:
    asked = [
        [source.ask(n).prompt_tokens for n in range(20)]
        for source in (Source(spec(), 1), Source(spec(), 2), Source(spec(seed=8), 1))
    ]
    assert asked[0] != asked[1] != asked[2] != asked[0]


@pytest.mark.parametrize("ids", [False, True])
def test_prompts_are_as_long_as_was_drawn(ids: bool) -> None:
    made = Source(spec(token_ids=ids, input_tokens=Uniform(30, 400), prefix_tokens=100), 1)
    asks = [made.ask(n) for n in range(200)]
    lengths = [len(ask.prompt if ids else words(ask)) for ask in asks]
    assert lengths == [ask.prompt_tokens for ask in asks]
    assert min(lengths) >= 130
    assert max(lengths) <= 500
    assert len(set(lengths)) > 100


def test_prefixes_are_shared_and_nothing_else_is() -> None:
    made = Source(spec(input_tokens=Fixed(100), prefix_tokens=64, prefixes=3), 1)
    asks = [words(made.ask(n)) for n in range(100)]
    assert len({tuple(ask[1:65]) for ask in asks}) == 3
    assert len({tuple(ask[65:81]) for ask in asks}) == 100
    again = Source(spec(input_tokens=Fixed(100), prefix_tokens=64, prefixes=3), 2)
    assert {tuple(ask[1:65]) for ask in asks} >= {tuple(words(again.ask(0))[1:65])}


def test_what_a_model_cannot_take_is_cut_off() -> None:
    made = Source(spec(input_tokens=parse("normal:900:300", ""), longest=1000), 1)
    asks = [made.ask(n) for n in range(300)]
    assert all(ask.prompt_tokens + ask.output_tokens <= 1000 for ask in asks)
    assert any(ask.prompt_tokens + ask.output_tokens == 1000 for ask in asks)


def test_reuse_is_one_prompt_for_all() -> None:
    made = Source(spec(reuse=True), 1)
    assert made.ask(0) is made.ask(99)


def test_a_mix_asks_the_models_by_their_weights() -> None:
    made = Source(spec(models=parse_mix("base=3,lora-a=1")), 1)
    asked = [made.ask(n).model for n in range(2000)]
    assert set(asked) == {"base", "lora-a"}
    assert 0.7 < asked.count("base") / 2000 < 0.8


@pytest.mark.parametrize(
    "text", ["", "a=", "a=0", "a=-1", "a=x", "=1", "a=1,a=2", "a=nan", "a=inf"]
)
def test_a_mix_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--mix"):
        parse_mix(text)


# ------------------------------------------------------------------------------------ conversations


def test_a_conversation_sends_its_own_history() -> None:
    made = Source(spec(turns=3, input_tokens=Fixed(30), output_tokens=Fixed(9)), 1)
    talk = made.talk(5)
    first = talk.first.prompt
    second, third = talk.follow("one"), talk.follow("two")
    assert second is not None
    assert third is not None
    assert talk.follow("three") is None
    history: Any = third.prompt
    assert history[:3] == second.prompt
    assert history[:1] == first
    assert [message["role"] for message in history] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"] for message in history[1::2]] == ["one", "two"]
    other = Source(spec(turns=3, input_tokens=Fixed(30), output_tokens=Fixed(9)), 1).talk(5)
    other.follow("one")
    assert other.follow("two") == third  # and the history of the first is not touched again
    assert made.talk(6).first.prompt != first


# ------------------------------------------------------------------------------------------ traces


def traced(tmp_path: Path, *lines: str) -> trace.Trace:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return trace.read(file)


@pytest.mark.parametrize("ids", [False, True])
def test_equal_hash_ids_are_equal_prompts_at_the_same_place(tmp_path: Path, ids: bool) -> None:
    recorded = traced(
        tmp_path,
        '{"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 3]}',
        '{"timestamp": 10, "input_length": 1100, "output_length": 6, "hash_ids": [1, 2, 4]}',
        '{"timestamp": 20, "input_length": 700, "output_length": 7, "hash_ids": [1, 5]}',
    )
    made = Source(spec(token_ids=ids, trace=recorded, output_tokens=None, prefixes=1), 1)
    asks = [made.ask(n) for n in range(3)]
    prompts: list[Any] = [ask.prompt if ids else words(ask)[1:] for ask in asks]
    assert [ask.output_tokens for ask in asks] == [5, 6, 7]
    assert [ask.prompt_tokens for ask in asks] == [1300, 1100, 700]
    assert [len(prompt) + (not ids) for prompt in prompts] == [1300, 1100, 700]
    assert prompts[0][:1024] == prompts[1][:1024]
    assert prompts[0][1024:1090] != prompts[1][1024:1090]
    assert prompts[0][:512] == prompts[2][:512]
    assert prompts[0][512:600] != prompts[2][512:600]
    assert made.ask(3) == asks[0]  # a closed loop begins again from the front
    later_run = Source(spec(token_ids=ids, trace=recorded, output_tokens=None, nonce=9), 1)
    assert later_run.ask(0).prompt != asks[0].prompt


def test_requests_of_a_trace_without_hash_ids_share_nothing(tmp_path: Path) -> None:
    recorded = traced(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.97,400,10",
        "2023-11-16 18:17:04.97,400,20",
    )
    made = Source(spec(trace=recorded, output_tokens=None), 1)
    one, two = words(made.ask(0)), words(made.ask(1))
    assert len(one) == len(two) == 400
    assert one[1:17] != two[1:17]


def test_numbers_of_a_string_do_not_depend_on_the_process() -> None:
    """Python's own hash of a string does; what is asked must not."""
    asked = Source(spec(), 1).ask(0)
    assert (asked.prompt_tokens, asked.output_tokens) == (414, 33)
