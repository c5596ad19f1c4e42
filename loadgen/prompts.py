"""Prompts of an exact number of tokens, without a tokenizer, each different from its first tokens.

Where the server takes token ids, a prompt is a list of them, and exact. Elsewhere it is a text:
tokenizers split at spaces first, so the tokens of a text of common words are the sum of the words'.
A prompt is built from parts whose cost four probes tell (`usage.prompt_tokens` of the server):

    a | shared prefix | nonce: the letters b … q in its own order | blocks of 16 words | " a" …

Every block holds the same 16 words in a random order and so costs the same; the nonce too. What the
blocks leave over is filled with the cheapest unit, " a". Both kinds are made of pieces, so that
what is shared between requests (a prefix, a block of a trace) is the same bytes in all of them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random
from typing import Protocol

import msgspec

WORDS = (
    "time", "people", "water", "house", "world", "music", "paper", "light",
    "river", "story", "table", "number", "garden", "winter", "morning", "window",
)  # fmt: skip
NONCE_LETTERS = "bcdefghijklmnopq"  # 16! orders are 44 bits
NONCES = math.factorial(len(NONCE_LETTERS))
OPENING = "a"
UNIT = " a"
POOL = 256  # blocks made beforehand, so that a prompt takes microseconds

# Ids that are plain tokens in every vocabulary of at least a thousand: no control token among them.
IDS = range(100, 1000)
NONCE_IDS = 4
BLOCK_TOKENS = 16


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
    whole = [nonce_letters(rng.randrange(NONCES)) for _ in range(4)]
    return [
        _join(whole[0], []),
        _join(whole[1], [_block(rng) for _ in range(PROBE_BLOCKS)]),
        _join(whole[2], []) + UNIT * PROBE_UNITS,
        _join(whole[3][:PROBE_LETTERS], []),
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
    """How many of each part make a piece of the asked length."""

    letters: int
    blocks: int
    units: int


def shape_of(tokens: float, costs: Costs, *, opened: bool = True) -> Shape:
    """The parts of a prompt of `tokens` tokens: at least the opening and one letter.

    Not `opened`: a piece in the middle of a prompt, with neither.
    """
    letters = 0
    room = float(tokens)
    if opened:
        room -= costs.fixed
        letters = min(len(NONCE_LETTERS), max(1, math.floor(room / costs.nonce_letter)))
        room -= letters * costs.nonce_letter
    blocks = max(0, math.floor(room / costs.block))
    room -= blocks * costs.block
    return Shape(letters, blocks, max(0, round(room / costs.unit)))


def expected_tokens(shape: Shape, costs: Costs) -> float:
    """Tokens of a whole prompt of that shape."""
    return costs.fixed + _inner_tokens(shape, costs)


def _inner_tokens(shape: Shape, costs: Costs) -> float:
    return (
        shape.letters * costs.nonce_letter + shape.blocks * costs.block + shape.units * costs.unit
    )


def nonce_letters(nonce: int) -> list[str]:
    """Order number `nonce` of the letters. Numbers that follow each other differ at the front."""
    left, order = list(NONCE_LETTERS), []
    for places in range(len(left), 0, -1):
        nonce, place = divmod(nonce, places)
        order.append(left.pop(place))
    return order


class Piece(msgspec.Struct, frozen=True):
    """Part of a prompt that several requests share: a text or token ids, and its tokens."""

    content: str | list[int]
    tokens: float


class Maker(Protocol):
    """Makes prompts of one kind, text or token ids."""

    def piece(self, tokens: float, rng: Random) -> Piece:
        """Something to share, of so many tokens; the same for the same state of `rng`."""
        ...

    def prompt(
        self, tokens: float, rng: Random, nonce: int | None, shared: tuple[Piece, ...] = ()
    ) -> Piece:
        """A whole prompt: `shared` in front, then `tokens` of its own, all counted.

        `nonce`: a number that no other request of the run has; None: nothing of its own in front.
        """
        ...


class Texts:
    """Prompts as text, of words whose costs the probes told."""

    def __init__(self, costs: Costs, seed: int) -> None:
        self.costs = costs
        rng = Random(seed)
        self._pool = [_block(rng) for _ in range(POOL)]
        self._shape = lru_cache(1024)(lambda tokens, opened: shape_of(tokens, costs, opened=opened))

    def piece(self, tokens: float, rng: Random) -> Piece:
        shape = self._shape(tokens, False)
        words = rng.choices(self._pool, k=shape.blocks) if shape.blocks else []
        words += ["a"] * shape.units
        return Piece(" ".join(words), _inner_tokens(shape, self.costs))

    def prompt(
        self, tokens: float, rng: Random, nonce: int | None, shared: tuple[Piece, ...] = ()
    ) -> Piece:
        if nonce is None:
            own = self.piece(max(0.0, tokens - self.costs.fixed), rng)
            parts = (OPENING, *(str(piece.content) for piece in shared), str(own.content))
            before = sum(piece.tokens for piece in shared)
            return Piece(
                " ".join(part for part in parts if part), self.costs.fixed + before + own.tokens
            )
        shape = self._shape(tokens, True)
        letters = nonce_letters(nonce)[: shape.letters]
        blocks = rng.choices(self._pool, k=shape.blocks) if shape.blocks else []
        front = [str(piece.content) for piece in shared if piece.content]
        return Piece(
            _join(front + letters, blocks) + UNIT * shape.units,
            expected_tokens(shape, self.costs) + sum(piece.tokens for piece in shared),
        )


class TokenIds:
    """Prompts as token ids: exact, where the server takes them."""

    def __init__(self, seed: int) -> None:
        rng = Random(seed)
        self._pool = [rng.choices(IDS, k=BLOCK_TOKENS) for _ in range(POOL)]

    def piece(self, tokens: float, rng: Random) -> Piece:
        ids = self._ids(round(tokens), rng)
        return Piece(ids, len(ids))

    def prompt(
        self, tokens: float, rng: Random, nonce: int | None, shared: tuple[Piece, ...] = ()
    ) -> Piece:
        ids: list[int] = []
        for piece in shared:
            ids += piece.content  # type: ignore[arg-type]  # pieces of our own making
        own = max(1, round(tokens))
        front = _nonce_ids(nonce)[:own] if nonce is not None else []
        ids += front
        ids += self._ids(own - len(front), rng)
        return Piece(ids, len(ids))

    def _ids(self, n: int, rng: Random) -> list[int]:
        blocks = rng.choices(self._pool, k=-(-n // BLOCK_TOKENS)) if n > 0 else []
        return [token for block in blocks for token in block][:n]


def _nonce_ids(nonce: int) -> list[int]:
    ids = []
    for _ in range(NONCE_IDS):
        nonce, place = divmod(nonce, len(IDS))
        ids.append(IDS[place])
    return ids


def _block(rng: Random) -> str:
    return " ".join(rng.sample(WORDS, len(WORDS)))


def _join(words: list[str], blocks: list[str]) -> str:
    return " ".join((OPENING, *words, *blocks))
