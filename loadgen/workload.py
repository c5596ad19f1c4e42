"""What the requests of a level say: the n-th is a function of the spec, the level and n alone.

So any worker can make any request, and the same seed gives the same models, lengths, texts and
order, whoever makes them. Only the nonce in front of each prompt is a run's own: a new run must not
meet the prefix cache that an earlier one with the same seed has filled.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING

import msgspec

from agent.model import UsageError
from loadgen import api
from loadgen.api import Prompt
from loadgen.lengths import Length
from loadgen.prompts import NONCES, Costs, Maker, Piece, Texts, TokenIds, nonce_letters

if TYPE_CHECKING:
    from agent.trace import Arrival, Trace
    from loadgen.dataset import Dataset, Entry

TRACE_BLOCK_TOKENS = 512  # what one of Mooncake's hash_ids stands for
NONCE_STEP = 12_934_567_890_121  # odd, and of no factor of 16!: all nonces come before one repeats

Message = dict[str, str]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """All that says what a run's requests are, once the target is probed."""

    endpoint: str
    stream: bool
    models: tuple[tuple[str, float], ...]  # names with their weights
    input_tokens: Length
    output_tokens: Length | None  # None: as the dataset or trace has them
    costs: Costs
    dialect: api.Dialect = api.Dialect()
    token_ids: bool = False  # the server takes them as a prompt
    prefix_tokens: int = 0  # shared, in front of a prompt's own tokens
    prefixes: int = 1  # so many different ones
    reuse: bool = False  # one prompt for all requests, and no nonce
    dataset: Dataset | None = None
    trace: Trace | None = None
    turns: int = 1  # of a conversation that sends its own history
    longest: int | None = None  # prompt and reply together, in tokens, as the model takes them
    default_output_tokens: int = 128  # where neither option nor dataset says it
    seed: int = 0
    nonce: int = 0  # the run's


class Ask(msgspec.Struct, frozen=True):
    """What one request says."""

    model: str
    prompt: Prompt
    output_tokens: int
    prompt_tokens: int  # expected of the parts' costs; −1: nobody knows

    def body(self, spec: Spec) -> bytes:
        """The JSON of the request."""
        return api.body(
            spec.endpoint, self.model, self.prompt, self.output_tokens,
            stream=spec.stream, dialect=spec.dialect,
        )  # fmt: skip


class Talk:
    """A conversation: every turn sends the whole history, and needs the reply before it."""

    def __init__(self, model: str, later: list[tuple[str, int]], first: Ask) -> None:
        """`later`: the user's further messages, with the tokens to ask for in reply."""
        self._model = model
        self._later = later
        self._history: list[Message] = []
        self.first = msgspec.structs.replace(first, prompt=self._said(first.prompt))

    def _said(self, prompt: Prompt) -> list[Message]:
        if isinstance(prompt, str):
            self._history.append({"role": "user", "content": prompt})
        else:
            self._history += prompt  # type: ignore[arg-type]  # messages: ids make no conversation
        return list(self._history)

    def follow(self, reply: str) -> Ask | None:
        """The next turn; None where everything is said."""
        if not self._later:
            return None
        text, output_tokens = self._later.pop(0)
        self._history.append({"role": "assistant", "content": reply})
        return Ask(self._model, self._said(text), output_tokens, -1)


class Source:
    """The requests of one level."""

    def __init__(self, spec: Spec, level: int) -> None:
        self._spec = spec
        self._base = _number(f"{spec.seed}:{level}")
        self._first_nonce = _number(f"{spec.nonce}:{level}") % NONCES
        self._maker: Maker = TokenIds(spec.seed) if spec.token_ids else Texts(spec.costs, spec.seed)
        self._rng = Random()
        self._bounds = list(accumulate(weight for _, weight in spec.models))
        self._order = _shuffled(spec)
        self._reused = self._made(0) if spec.reuse and not (spec.dataset or spec.trace) else None

    def ask(self, n: int) -> Ask:
        """Request number `n`, or the first turn of conversation number `n`."""
        return self._reused or self._made(n)

    def talk(self, n: int) -> Talk:
        """Conversation number `n`."""
        spec = self._spec
        first = self._made(n)
        rng = Random(f"{self._base + n}:turns")
        if spec.dataset is not None:
            entry = self._entry(n)
            later = [
                (text, self._entry_output(entry, turn, rng))
                for turn, text in enumerate(entry.turns[1 : spec.turns], 1)
            ]
            return Talk(first.model, later, first)
        later = []
        for _ in range(spec.turns - 1):
            own, output = spec.input_tokens.sample(rng), self._output_tokens(rng)
            later.append((str(self._maker.piece(own, rng).content), output))
        return Talk(first.model, later, first)

    def _made(self, n: int) -> Ask:
        spec, rng = self._spec, self._rng
        rng.seed(self._base + n)
        model = self._model(rng)
        if spec.dataset is not None:
            return self._of_entry(self._entry(n), model, n)
        if spec.trace is not None:
            rows = spec.trace.rows
            return self._of_arrival(rows[n % len(rows)], model, n)
        tokens, output = spec.input_tokens.sample(rng), self._output_tokens(rng)
        if spec.longest is not None:
            room = spec.longest - output - spec.prefix_tokens
            tokens = max(1, min(tokens, room))
        shared: tuple[Piece, ...] = ()
        if spec.prefix_tokens:
            which = rng.randrange(spec.prefixes)
            shared = (self._prefix(which),)
        made = self._maker.prompt(tokens, rng, self._nonce(n), shared)
        return Ask(model, made.content, output, round(made.tokens))

    def _model(self, rng: Random) -> str:
        models = self._spec.models
        if len(models) == 1:
            return models[0][0]
        point = rng.random() * self._bounds[-1]
        return next(m for (m, _), bound in zip(models, self._bounds, strict=True) if point < bound)

    def _output_tokens(self, rng: Random) -> int:
        length = self._spec.output_tokens
        return self._spec.default_output_tokens if length is None else length.sample(rng)

    def _nonce(self, n: int) -> int | None:
        return None if self._spec.reuse else (self._first_nonce + n * NONCE_STEP) % NONCES

    @lru_cache(1024)  # noqa: B019 - as long as the level lives
    def _prefix(self, which: int) -> Piece:
        rng = Random(f"{self._spec.nonce}:prefix:{which}")
        return self._maker.piece(self._spec.prefix_tokens, rng)

    @lru_cache(4096)  # noqa: B019
    def _block(self, block: int) -> Piece:
        return self._maker.piece(TRACE_BLOCK_TOKENS, Random(f"{self._spec.nonce}:block:{block}"))

    def _entry(self, n: int) -> Entry:
        assert self._spec.dataset is not None
        return self._spec.dataset.entries[self._order[n % len(self._order)]]

    def _entry_output(self, entry: Entry, turn: int, rng: Random) -> int:
        """What was replied then, unless an option says what to ask for now."""
        recorded = None
        if self._spec.output_tokens is None and turn < len(entry.output_tokens):
            recorded = entry.output_tokens[turn]
        return self._output_tokens(rng) if recorded is None else recorded

    def _of_entry(self, entry: Entry, model: str, n: int) -> Ask:
        """An entry's first message, behind a nonce unless prompts are to be reused."""
        spec, text = self._spec, entry.turns[0]
        output = self._entry_output(entry, 0, self._rng)
        nonce = self._nonce(n)
        if nonce is not None:
            text = f"{' '.join(nonce_letters(nonce))}\n{text}"
        if entry.system is None or spec.endpoint == "completions":
            return Ask(model, text, output, -1)
        system = {"role": "system", "content": entry.system}
        return Ask(model, [system, {"role": "user", "content": text}], output, -1)

    def _of_arrival(self, row: Arrival, model: str, n: int) -> Ask:
        """A request of a trace. Equal hash_ids become equal text at the same place: a prefix that
        is really shared, which the server's cache may use as it could when this was recorded."""
        spec = self._spec
        output = row.output_tokens
        if spec.output_tokens is not None:
            output = self._output_tokens(self._rng)
        tokens = row.input_tokens
        if spec.longest is not None:
            output = max(1, min(output, spec.longest - 1))
            tokens = max(1, min(tokens, spec.longest - output))
        if not row.hash_ids:
            made = self._maker.prompt(tokens, self._rng, self._nonce(n))
            return Ask(model, made.content, output, round(made.tokens))
        whole = min(tokens // TRACE_BLOCK_TOKENS, len(row.hash_ids))
        shared = tuple(self._block(block) for block in row.hash_ids[:whole])
        rest = tokens - whole * TRACE_BLOCK_TOKENS
        rng = self._rng
        if len(row.hash_ids) > whole:
            rng = Random(f"{spec.nonce}:block:{row.hash_ids[whole]}")
        made = self._maker.prompt(rest, rng, None, shared)
        return Ask(model, made.content, output, round(made.tokens))


def _shuffled(spec: Spec) -> list[int]:
    """The entries in the order they are asked: a dataset's own order is often by topic."""
    if spec.dataset is None:
        return []
    order = list(range(len(spec.dataset.entries)))
    Random(f"{spec.seed}:order").shuffle(order)
    return order


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def parse_mix(text: str) -> tuple[tuple[str, float], ...]:
    """`MODEL=WEIGHT,MODEL=WEIGHT` (a weight alone is 1). Raises UsageError."""
    mix: dict[str, float] = {}
    for word in text.split(","):
        name, _, share = word.strip().rpartition("=") if "=" in word else (word.strip(), "", "1")
        try:
            weight = float(share)
        except ValueError:
            weight = -1.0
        if not name or not 0 < weight < float("inf"):
            raise UsageError(f"--mix {word.strip()!r}: write MODEL=WEIGHT,…, weights above 0")
        if name in mix:
            raise UsageError(f"--mix: {name!r} is named twice")
        mix[name] = weight
    return tuple(mix.items())
