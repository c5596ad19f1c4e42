"""A closed loop in its steady state, in closed form: what so many clients at once would see.

Equations 2 to 6 of the design put together. `simulate.closed_loop` plays the same engine step by
step; this says the same in microseconds and without noise, so that it can be fitted to a sweep and
asked about a thousand configurations. The tests hold the two together.
"""

from __future__ import annotations

import msgspec

from agent.model import UsageError
from agent.sizing.engine import Cost, EngineSpec, check, prefill_seconds, sequences_that_fit


class Steady(msgspec.Struct, frozen=True):
    """What one engine does under `concurrency` clients that never stop. Times are means, in ms."""

    output_tokens_per_s: float
    ttft_ms: float  # queueing included
    tpot_ms: float
    decoding: float  # sequences in the batch: D
    waiting: float  # clients beyond it
    sequences_that_fit: float  # in the KV cache, half written
    kv_bound: bool  # more clients than that: the cache decides the batch

    @property
    def fits(self) -> bool:
        """Is nobody waiting for a seat in the batch?"""
        return self.waiting <= 0


def steady(
    spec: EngineSpec,
    concurrency: float,
    input_tokens: float,
    output_tokens: float,
    *,
    reserves: bool = False,
) -> Steady:
    """The steady state of `concurrency` clients with requests of these lengths.

    - B = min(concurrency, sequences that fit, max_num_seqs); who is beyond it queues
    - tokens/s = B / (t(B) + B·p/OSL): each output token takes a step, and each of the B requests
      brings its prompt once; p is the prompt's arithmetic alone, for it is computed in chunks
      within steps that read the weights anyway
    - D = min(B, max_num_batched_tokens / (1 + ISL/OSL)) of them decode at once: where prompts are
      long and replies short, the token budget of a step admits no more
    - TPOT = t(D) + (D - 1)·p/OSL: a step, and the other requests' prompts in between
    - TTFT = queue + the step it finds running + its own prompt; queue = (concurrency - D) / rate
      (Little)

    An engine that `reserves` holds the cache of the whole answer from its beginning, so that half
    of it stands empty; others hold what is written, and what their preemptions cost is not in it.
    Raises UsageError where the engine could not be started so.
    """
    check(spec)
    if not (concurrency > 0 and input_tokens >= 1 and output_tokens >= 1):
        raise UsageError("concurrency must be above 0, input and output tokens at least 1")
    held = input_tokens + output_tokens / 2 if reserves else input_tokens
    cost, fit = Cost(spec), sequences_that_fit(spec, held, output_tokens)
    context = input_tokens + output_tokens / 2
    prompt_s = cost.prompt_s(input_tokens)

    def token_s(batch: float, prompts: float) -> float:
        return cost.step_s(batch, batch * context) + prompts * prompt_s / output_tokens

    batch = max(1.0, min(concurrency, fit, spec.max_num_seqs))
    per_s = min(concurrency, batch) / token_s(batch, batch)
    budget = spec.max_num_batched_tokens / (1 + input_tokens / output_tokens)
    decoding = max(1.0, min(batch, budget))
    waiting = max(0.0, concurrency - decoding)
    tpot_s = token_s(decoding, decoding - 1)
    queue_s = waiting * output_tokens / per_s
    found_s = (1 - 1 / decoding) * tpot_s  # who is alone finds none running
    ttft_s = queue_s + found_s + prefill_seconds(spec, input_tokens)
    return Steady(
        output_tokens_per_s=per_s,
        ttft_ms=1e3 * ttft_s,
        tpot_ms=1e3 * tpot_s,
        decoding=decoding,
        waiting=waiting,
        sequences_that_fit=fit,
        kv_bound=concurrency > fit,
    )
