"""Prompts of an exact number of tokens, without a tokenizer, each different from its first tokens.

Tokenizers split at spaces first, so the tokens of a text of common words are the sum of the words'.
A prompt is built from parts whose cost four probes tell (`usage.prompt_tokens` of the server):

    a | nonce: the letters b … q in its own order | blocks of 16 words | " a" as often as needed

Every block holds the same 16 words in a random order and so costs the same; the nonce too. What the
blocks leave over is filled with the cheapest unit, " a".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

import msgspec

WORDS = (
    "time", "people", "water", "house", "world", "music", "paper", "light",
    "river", "story", "table", "number", "garden", "winter", "morning", "window",
)  # fmt: skip
NONCE_LETTERS = "bcdefghijklmnopq"  # 16! orders are 44 bits
OPENING = "a"
UNIT = " a"


class Costs(msgspec.Struct, frozen=True):
    """Prompt tokens of the parts, as the target counts them."""

    fixed: float  # the opening and whatever the chat template adds
    nonce_letter: float
    block: float
    unit: float

    @property
    def nonce(self) -> float:
        return self.nonce_letter * len(NONCE_LETTERS)


# A word a token: what is assumed of a server that never says what it counted.
DEFAULT_COSTS = Costs(fixed=1.0, nonce_letter=1.0, block=16.0, unit=1.0)

PROBE_BLOCKS = 8
PROBE_UNITS = 64
PROBE_LETTERS = 4


def probe_prompts(rng: Random) -> list[str]:
    """The four prompts whose token counts `costs_of` needs, in its order."""
    return [
        _assemble(_letters(rng, 16), [], 0),
        _assemble(_letters(rng, 16), [_block(rng) for _ in range(PROBE_BLOCKS)], 0),
        _assemble(_letters(rng, 16), [], PROBE_UNITS),
        _assemble(_letters(rng, PROBE_LETTERS), [], 0),
    ]


def costs_of(counts: list[int]) -> Costs:
    """Costs from the token counts of `probe_prompts`, in tokens."""
    plain, with_blocks, with_units, short = counts
    letter = (plain - short) / (len(NONCE_LETTERS) - PROBE_LETTERS)
    return Costs(
        fixed=plain - letter * len(NONCE_LETTERS),
        nonce_letter=max(letter, 0.1),
        block=max((with_blocks - plain) / PROBE_BLOCKS, 1.0),
        unit=max((with_units - plain) / PROBE_UNITS, 0.1),
    )


class Shape(msgspec.Struct, frozen=True):
    """How many of each part make a prompt of the asked length."""

    letters: int
    blocks: int
    units: int


def shape_of(tokens: int, costs: Costs) -> Shape:
    """The parts of a prompt of `tokens` tokens: at least the opening and one letter."""
    room = tokens - costs.fixed
    letters = min(len(NONCE_LETTERS), max(1, math.floor(room / costs.nonce_letter)))
    room -= letters * costs.nonce_letter
    blocks = max(0, math.floor(room / costs.block))
    room -= blocks * costs.block
    return Shape(letters, blocks, max(0, round(room / costs.unit)))


def expected_tokens(shape: Shape, costs: Costs) -> float:
    return (
        costs.fixed
        + shape.letters * costs.nonce_letter
        + shape.blocks * costs.block
        + shape.units * costs.unit
    )


class Prompts:
    """A source of prompts; `next()` takes microseconds, because blocks are made beforehand."""

    POOL = 256

    def __init__(self, tokens: int, costs: Costs, rng: Random, *, reuse: bool = False) -> None:
        self.shape = shape_of(tokens, costs)
        self._rng = rng
        self._pool = [_block(rng) for _ in range(self.POOL)] if self.shape.blocks else []
        self._reused = self._build() if reuse else None

    def next(self) -> str:
        return self._reused or self._build()

    def _build(self) -> str:
        blocks = self._rng.choices(self._pool, k=self.shape.blocks) if self._pool else []
        return _assemble(_letters(self._rng, self.shape.letters), blocks, self.shape.units)


def _letters(rng: Random, n: int) -> list[str]:
    return rng.sample(NONCE_LETTERS, n)


def _block(rng: Random) -> str:
    return " ".join(rng.sample(WORDS, len(WORDS)))


def _assemble(letters: list[str], blocks: list[str], units: int) -> str:
    return " ".join((OPENING, *letters, *blocks)) + UNIT * units


def bodies(prompts: Prompts, encode: Callable[[str], bytes]) -> Iterator[bytes]:
    """Endless request bodies."""
    while True:
        yield encode(prompts.next())
