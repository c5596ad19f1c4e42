"""A continuous-batching inference engine as a discrete-event simulation, in virtual time.

`Engine` follows vLLM V1's scheduler and knows no clock: the caller submits requests and asks for
steps, each of which says how long it would have taken and who got a token. Whoever adds up the
durations has virtual time (`Virtual`, `closed_loop`, `agent.sizing.replay`); whoever sleeps through
them has a server (`loadgen.targets.sim`).

What it keeps of vLLM V1: a first-come-first-served queue; one token budget a step, given to the
decoding sequences first and to prompts in chunks after that; `max_num_seqs`; a KV cache in blocks,
allocated as they are needed; when they run out, the most recently admitted request is thrown out,
returns to the head of the queue and computes everything again. What it leaves out: speculative
decoding, priorities, a full queue, and of prefix caching all but what the caller says of a request:
its cached tokens are not computed, but take blocks of their own, as if nobody shared them.

The cost of a step does not depend on the batch: sequences that decode advance together, so that
one counter of steps says where each of them is. A heap holds the step each one finishes at, and an
array counts, for each phase modulo the block size, how many need a new block then.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from agent.model import Stats, UsageError
from agent.sizing.engine import (
    Cost,
    EngineSpec,
    attention_flops,
    check,
    decode_step_seconds,
    kv_blocks,
    max_model_len,
    prefill_seconds,
)
from agent.stats import Floats, summary


class Step(msgspec.Struct, gc=False):
    """What one step did, or several alike at once. Ids are those of `Engine.submit`."""

    duration_s: float
    steps: int  # how many alike; more than 1 only where every stream just got a token in each
    decoded: int  # sequences that got their next token in every one of the steps
    prefilled: int  # prompt tokens computed, those computed again after a preemption included
    running: int  # requests in the batch
    blocks: tuple[int, int]  # KV blocks in use in the first and in the last of the steps
    tokens: list[int]  # who the decoded are, where `with_ids` asked for it
    admitted: list[int]  # scheduled for the first time, at the start of the step
    first: list[int]  # got their first token, at the end of the step
    resumed: list[int]  # got their next token after having been preempted
    finished: list[int]  # got their last token; they are among the above too
    preempted: list[int]  # thrown out of the KV cache, at the start of the step


class _Request:
    """A request inside the engine; `done` counts the tokens it has been given."""

    __slots__ = (
        "admitted", "at_step", "cached", "computed", "computed_at", "done", "finish_at", "id",
        "output", "prompt",
    )  # fmt: skip

    def __init__(self, request_id: int, prompt: int, output: int, cached: int) -> None:
        self.id = request_id
        self.prompt = prompt
        self.output = output
        self.cached = cached  # tokens of the prompt that need no computing; the first time only
        self.done = 0
        self.admitted = False
        self.computed = 0  # KV entries while in prefill
        self.computed_at = 0  # KV entries when it began to decode, at engine step `at_step`
        self.at_step = 0
        self.finish_at = -1  # engine step after which it has all its tokens; -1: not decoding


class Engine:
    """The scheduler. Not thread-safe. `running` and the other gauges hold between steps."""

    def __init__(self, spec: EngineSpec) -> None:
        """Raises UsageError where the spec could not be started (`engine.check`)."""
        check(spec)
        self.spec = spec
        self.cost = Cost(spec)
        self.num_blocks = kv_blocks(spec)
        self.max_model_len = max_model_len(spec)
        self.preemptions = 0
        self._block = spec.block_size
        self._budget = spec.max_num_batched_tokens
        self._seats = spec.max_num_seqs
        self._waiting: OrderedDict[int, _Request] = OrderedDict()
        self._running: dict[int, _Request] = {}  # in order of admission; the prefilling one last
        self._decoding: dict[int, _Request] = {}
        self._partial: _Request | None = None  # prompt computed in part
        self._finishing: list[tuple[int, int, _Request]] = []
        self._crossing = [0] * spec.block_size  # decoders that need a block when step % size == i
        self._now = 0  # steps made
        self._used = 0  # blocks
        self._context = 0  # KV entries of all decoding sequences

    # ------------------------------------------------------------------------------- gauges

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    @property
    def blocks_used(self) -> int:
        return self._used

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self._used / self.num_blocks

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    # ----------------------------------------------------------------------------- requests

    def submit(
        self, request_id: int, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0
    ) -> None:
        """Queues a request that will be given exactly `output_tokens`.

        `cached_tokens` of its prompt are found in the prefix cache when it is first scheduled; one
        token is computed in any case. Raises UsageError where it has no tokens or does not fit in
        `max_model_len`; ValueError where the id is still in use.
        """
        if prompt_tokens < 1 or output_tokens < 1 or cached_tokens < 0:
            raise UsageError("a request needs at least one prompt token and one output token")
        if prompt_tokens + output_tokens > self.max_model_len:
            raise UsageError(
                f"{prompt_tokens} prompt and {output_tokens} output tokens are more than the "
                f"engine's max_model_len of {self.max_model_len}"
            )
        if request_id in self._running or request_id in self._waiting:
            raise ValueError(f"request {request_id} is already in the engine")
        cached = min(cached_tokens, prompt_tokens - 1)
        self._waiting[request_id] = _Request(request_id, prompt_tokens, output_tokens, cached)

    def abort(self, request_id: int) -> bool:
        """Drops a request wherever it is; False where it is not, or no longer, in the engine."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        request = self._running.get(request_id)
        if request is None:
            return False
        self._leave(request)
        return True

    # --------------------------------------------------------------------------------- step

    def step(
        self, max_steps: int = 1, within_s: float = math.inf, *, with_ids: bool = False
    ) -> Step | None:
        """Schedules and makes one step; None where there is nothing to do.

        With `max_steps` above 1, as many more as are exactly alike (nobody joins, leaves or is
        thrown out) are made at once, the last of them starting before `within_s`: the result is
        that of as many single steps.
        """
        if not self._running and not self._waiting:
            return None
        preempted = self._make_room()
        decoders = len(self._decoding)
        ids = list(self._decoding) if with_ids else []
        step = Step(0.0, 1, decoders, 0, 0, (0, 0), ids, [], [], [], [], preempted)
        prefill_flops = 0.0
        completed: list[_Request] = []
        if self._waiting or self._partial is not None:
            prefill_flops = self._schedule_prompts(step, self._budget - decoders, completed)
        if step.prefilled or preempted:
            step.duration_s = self.cost.step_s(
                decoders, self._context + decoders, step.prefilled, prefill_flops
            )
        else:
            # Nobody could be admitted, and until somebody leaves nobody can be.
            step.steps = k = self._steps_alike(max_steps, within_s)
            step.duration_s = self.cost.run_s(decoders, self._context + decoders, k)
        step.running, blocks = len(self._running), self._used
        self._advance(step.steps)
        step.blocks = (blocks, self._used)
        self._collect_finished(step)
        for request in completed:
            self._give_after_prefill(request, step)
        return step

    def _steps_alike(self, max_steps: int, within_s: float) -> int:
        """How many steps from now on are the same but for the growing context."""
        k = min(max_steps, self._next_finish() - self._now)
        if k > 1:
            k = self._steps_with_blocks(k)
        if k > 1 and within_s < math.inf:
            b = len(self._decoding)
            k = self.cost.steps_within(b, self._context + b, within_s, k)
        return max(1, k)

    def _next_finish(self) -> int:
        heap = self._finishing
        while heap[0][2].finish_at != heap[0][0]:  # aborted or preempted since
            heapq.heappop(heap)
        return heap[0][0]

    def _steps_with_blocks(self, most: int) -> int:
        """How many of the next steps, this one (already provided for) included, find blocks."""
        free = self.num_blocks - self._used
        size, b = self._block, len(self._decoding)
        if (most // size + 1) * b <= free:
            return most
        rounds = max(0, free // b - 1)  # every `size` steps each sequence takes one block
        k, free = 1 + rounds * size, free - rounds * b
        while k < most:
            free -= self._crossing[(self._now + k) % size]
            if free < 0:
                break
            k += 1
        return min(k, most)

    def _make_room(self) -> list[int]:
        """Allocates this step's blocks of the decoding sequences, the latest giving way."""
        size = self._block
        preempted: list[int] = []
        while (need := self._crossing[self._now % size]) > self.num_blocks - self._used:
            preempted.append(self._preempt_last())
        self._used += need
        return preempted

    def _preempt_last(self) -> int:
        request = self._running[next(reversed(self._running))]
        self._leave(request)
        request.computed = 0
        self._waiting[request.id] = request
        self._waiting.move_to_end(request.id, last=False)
        self.preemptions += 1
        return request.id

    def _schedule_prompts(self, step: Step, budget: int, completed: list[_Request]) -> float:
        """Gives the rest of the budget to prompts; FLOPs of attention."""
        flops = 0.0
        request = self._partial
        if request is not None:
            chunk = min(request.prompt + request.done - request.computed, budget)
            blocks = self._blocks(request.computed + chunk) - self._blocks(request.computed)
            if blocks > self.num_blocks - self._used:
                step.preempted.append(self._preempt_last())  # it is itself the latest
            elif chunk:
                self._used += blocks
                flops += self._compute(request, chunk, step, completed)
                budget -= chunk
        if step.preempted:
            return flops
        while budget > 0 and self._waiting and len(self._running) < self._seats:
            request = next(iter(self._waiting.values()))
            chunk = min(request.prompt + request.done - request.cached, budget)
            blocks = self._blocks(request.cached + chunk)
            if blocks > self.num_blocks - self._used:
                break
            self._used += blocks
            request.computed, request.cached = request.cached, 0
            del self._waiting[request.id]
            self._running[request.id] = request
            if not request.admitted:
                request.admitted = True
                step.admitted.append(request.id)
            flops += self._compute(request, chunk, step, completed)
            budget -= chunk
        return flops

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _compute(
        self, request: _Request, chunk: int, step: Step, completed: list[_Request]
    ) -> float:
        """Takes `chunk` tokens of a prompt into the step; returns the FLOPs of attention."""
        start = request.computed
        request.computed = end = start + chunk
        step.prefilled += chunk
        if end == request.prompt + request.done:
            completed.append(request)
            self._partial = None
        else:
            self._partial = request
        return attention_flops(self.cost.model, start, end)

    def _advance(self, steps: int) -> None:
        size, now = self._block, self._now
        b = len(self._decoding)
        if steps > 1 and b:
            # The first step's blocks are allocated; every full round takes one a sequence.
            rounds, rest = divmod(steps - 1, size)
            self._used += rounds * b
            for ahead in range(1, rest + 1):
                self._used += self._crossing[(now + ahead) % size]
        self._context += b * steps
        self._now = now + steps

    def _collect_finished(self, step: Step) -> None:
        heap, now = self._finishing, self._now
        while heap and heap[0][0] <= now:
            finish_at, _, request = heapq.heappop(heap)
            if request.finish_at == finish_at:
                request.done = request.output
                self._leave(request)
                step.finished.append(request.id)

    def _give_after_prefill(self, request: _Request, step: Step) -> None:
        """A prompt is computed: its token is given, and it decodes from the next step on."""
        (step.first if request.done == 0 else step.resumed).append(request.id)
        request.done += 1
        if request.done == request.output:
            self._leave(request)
            step.finished.append(request.id)
            return
        request.computed_at = request.computed
        request.at_step = self._now
        request.finish_at = self._now + request.output - request.done
        self._context += request.computed
        self._crossing[(self._now - request.computed) % self._block] += 1
        self._decoding[request.id] = request
        heapq.heappush(self._finishing, (request.finish_at, request.id, request))

    def _leave(self, request: _Request) -> None:
        """Takes a running request out and frees its blocks; what it was given stays counted."""
        del self._running[request.id]
        if request is self._partial:
            self._partial = None
        computed = request.computed
        if self._decoding.pop(request.id, None) is not None:
            passed = self._now - request.at_step
            computed = request.computed_at + passed
            request.done = min(request.output, request.done + passed)
            self._context -= computed
            self._crossing[(request.at_step - request.computed_at) % self._block] -= 1
            request.finish_at = -1
        self._used -= -(-computed // self._block)


# ------------------------------------------------------------------------------------ virtual time

_MANY = 1 << 30


class VirtualLevel(msgspec.Struct, frozen=True):
    """What a load did to the engine: the names and definitions of `agent.model.Level`.

    Rates and gauges are of the window; latencies of the requests sent inside it. `queue_ms` is
    the time a request waited to be scheduled for the first time.
    """

    requests: int
    rejected: int  # longer than the engine takes
    duration_s: float
    window_s: float
    output_tokens_per_s: float
    request_throughput: float
    ttft_ms: Stats
    itl_ms: Stats
    tpot_ms: Stats
    e2e_ms: Stats
    queue_ms: Stats
    running_mean: float
    running_max: int
    waiting_mean: float
    waiting_max: int
    kv_usage_mean: float
    kv_usage_max: float
    preemptions: int


class Record(NamedTuple):
    """What happened to one engine, in columns; instants in s of virtual time."""

    sent_s: Floats  # one entry a request, in order of `sent_s`
    output_tokens: Floats
    admitted_s: Floats  # NaN where it was rejected: longer than the engine takes
    first_s: Floats
    finished_s: Floats
    steps: Floats  # one row a run of steps alike, in order of time: `STEP_COLUMNS`
    odd_gaps: Floats  # gaps across a preemption, in order of time: (end, gap)
    num_blocks: int


STEP_COLUMNS = (
    "start_s", "end_s", "steps", "decoded", "after_prefill", "running", "waiting", "blocks_mean",
    "blocks_last", "preempted",
)  # fmt: skip


class Virtual:
    """An engine with virtual time and a record of what happened."""

    def __init__(self, spec: EngineSpec) -> None:
        self.engine = Engine(spec)
        self.now_s = 0.0
        # one entry a request; its id is its index
        self._sent_s = array("d")
        self._output = array("d")
        self._admitted_s = array("d")
        self._first_s = array("d")
        self._finished_s = array("d")
        self._lost_at_s: dict[int, float] = {}  # preempted: when their last token came
        self._steps = array("d")
        self._odd_gaps = array("d")

    @property
    def in_flight(self) -> int:
        return self.engine.running + self.engine.waiting

    def submit(
        self, prompt_tokens: int, output_tokens: int, sent_s: float, cached_tokens: int = 0
    ) -> None:
        """Hands a request to the engine, which may find it too long."""
        request_id = len(self._sent_s)
        self._sent_s.append(sent_s)
        self._output.append(output_tokens)
        self._admitted_s.append(math.nan)
        self._first_s.append(math.nan)
        self._finished_s.append(math.nan)
        with contextlib.suppress(UsageError):
            self.engine.submit(request_id, prompt_tokens, output_tokens, cached_tokens)

    def run_until(self, at_s: float) -> None:
        """Makes all steps that start before `at_s`; an idle engine waits for it."""
        while self.now_s < at_s:
            self.advance(at_s)

    def drain(self) -> None:
        while not self.engine.idle:
            self.advance(math.inf)

    def advance(self, until_s: float) -> list[int]:
        """Makes steps that are alike, none of them starting after `until_s`; who finished.

        Where the engine is idle, the time goes to `until_s` at once.
        """
        start_s = self.now_s
        step = self.engine.step(_MANY, until_s - start_s)
        if step is None:
            self.now_s = until_s
            return []
        self.now_s = end_s = start_s + step.duration_s
        for request_id in step.admitted:
            self._admitted_s[request_id] = start_s
        for request_id in step.first:
            self._first_s[request_id] = end_s
        for request_id in step.finished:
            self._finished_s[request_id] = end_s
        for request_id in step.preempted:
            if not math.isnan(self._first_s[request_id]):
                self._lost_at_s.setdefault(request_id, start_s)
        for request_id in step.resumed:
            self._odd_gaps.extend((end_s, end_s - self._lost_at_s.pop(request_id)))
        self._steps.extend((
            start_s, end_s, step.steps, step.decoded, len(step.first) + len(step.resumed),
            step.running, self.engine.waiting, (step.blocks[0] + step.blocks[1]) / 2,
            step.blocks[1], len(step.preempted),
        ))  # fmt: skip
        return step.finished

    def record(self) -> Record:
        """What happened until now."""
        return Record(
            sent_s=np.array(self._sent_s),
            output_tokens=np.array(self._output),
            admitted_s=np.array(self._admitted_s),
            first_s=np.array(self._first_s),
            finished_s=np.array(self._finished_s),
            steps=np.array(self._steps).reshape(-1, len(STEP_COLUMNS)),
            odd_gaps=np.array(self._odd_gaps).reshape(-1, 2),
            num_blocks=self.engine.num_blocks,
        )


def level(records: Sequence[Record], lo_s: float, hi_s: float) -> VirtualLevel:
    """The window from `lo_s` to before `hi_s`, of engines that share a load.

    The tokens of a step across its edge count in part. Of several engines rates and means are those
    of all together, maxima of the fullest one, shares of their caches' sum.
    """
    sent, output, admitted, first, finished = (
        np.concatenate(parts)
        for parts in zip(*(_sent_within(one, lo_s, hi_s) for one in records), strict=True)
    )
    kept = ~np.isnan(finished)
    sent, output, admitted, first, finished = (
        column[kept] for column in (sent, output, admitted, first, finished)
    )
    several = output > 1
    rates = _window(np.concatenate([_steps_within(one, lo_s, hi_s) for one in records]), lo_s, hi_s)
    odd = np.concatenate([one.odd_gaps for one in records])
    odd = odd[(odd[:, 0] >= lo_s) & (odd[:, 0] <= hi_s), 1]
    window_s = hi_s - lo_s
    done = sum(int(((one.finished_s >= lo_s) & (one.finished_s <= hi_s)).sum()) for one in records)
    return VirtualLevel(
        requests=sent.size,
        rejected=int((~kept).sum()),
        duration_s=max(float(one.steps[-1, 1]) if one.steps.size else 0.0 for one in records),
        window_s=window_s,
        output_tokens_per_s=rates.tokens / window_s if window_s else 0.0,
        request_throughput=done / window_s if window_s else 0.0,
        ttft_ms=summary(1e3 * (first - sent)),
        itl_ms=_weighted(
            1e3 * np.append(rates.gaps_s, odd), np.append(rates.gap_counts, np.ones(odd.size))
        ),
        tpot_ms=summary(1e3 * (finished - first)[several] / (output[several] - 1)),
        e2e_ms=summary(1e3 * (finished - sent)),
        queue_ms=summary(1e3 * (admitted - sent)),
        running_mean=rates.running_mean,
        running_max=rates.running_max,
        waiting_mean=rates.waiting_mean,
        waiting_max=rates.waiting_max,
        kv_usage_mean=rates.blocks_mean / sum(one.num_blocks for one in records),
        kv_usage_max=rates.blocks_max / min(one.num_blocks for one in records),
        preemptions=rates.preemptions,
    )


def _sent_within(one: Record, lo_s: float, hi_s: float) -> tuple[Floats, ...]:
    begin, end = np.searchsorted(one.sent_s, (lo_s, hi_s))
    columns = one.sent_s, one.output_tokens, one.admitted_s, one.first_s, one.finished_s
    return tuple(column[begin:end] for column in columns)


def _steps_within(one: Record, lo_s: float, hi_s: float) -> Floats:
    """Rows that overlap the window; they lie in order, one behind the other."""
    begin = np.searchsorted(one.steps[:, 1], lo_s, side="right")
    return one.steps[begin : np.searchsorted(one.steps[:, 0], hi_s)]


class _Window(msgspec.Struct):
    tokens: float
    gaps_s: Floats
    gap_counts: Floats
    running_mean: float
    running_max: int
    waiting_mean: float
    waiting_max: int
    blocks_mean: float
    blocks_max: int
    preemptions: int


def _window(runs: Floats, lo_s: float, hi_s: float) -> _Window:
    """Sums and time averages of the runs of steps over a window; nothing runs between them."""
    start, end, steps, decoded, after_prefill, running, waiting, blocks, blocks_last, out = runs.T
    overlap_s = np.minimum(end, hi_s) - np.maximum(start, lo_s)
    share = overlap_s / (end - start)
    window_s = max(hi_s - lo_s, 1e-12)
    within = (end <= hi_s) & (start >= lo_s) & (decoded > 0)
    return _Window(
        tokens=float((share * (decoded * steps + after_prefill)).sum()),
        gaps_s=((end - start) / steps)[within],
        gap_counts=(decoded * steps)[within],
        running_mean=float((overlap_s * running).sum() / window_s),
        running_max=int(running.max(initial=0)),
        waiting_mean=float((overlap_s * waiting).sum() / window_s),
        waiting_max=int(waiting.max(initial=0)),
        blocks_mean=float((overlap_s * blocks).sum() / window_s),
        blocks_max=int(blocks_last.max(initial=0)),
        preemptions=int(out[start >= lo_s].sum()),
    )


def _weighted(values: Floats, counts: Floats) -> Stats:
    """Summary of a sample in which each value stands `counts` times; as `stats.summary`."""
    n = int(counts.sum())
    if n == 0:
        return Stats()
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    last_index = np.cumsum(counts) - 1

    def quantile(q: float) -> float:
        at = q * (n - 1)
        below, above = values[np.searchsorted(last_index, (math.floor(at), math.ceil(at)))]
        return float(below + (above - below) * (at - math.floor(at)))

    mean = float((values * counts).sum() / n)
    variance = float((counts * (values - mean) ** 2).sum() / (n - 1)) if n > 1 else 0.0
    p50, p90, p95, p99, p999 = (quantile(q) for q in (0.5, 0.9, 0.95, 0.99, 0.999))
    return Stats(mean, math.sqrt(variance), p50, p90, p95, p99, p999, float(values[-1]), n)


def closed_loop(
    spec: EngineSpec,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    duration_s: float,
    *,
    ramp_s: float | None = None,
    turnaround_s: float = 0.001,
) -> VirtualLevel:
    """What `concurrency` clients see that each send their next request when they have the last.

    The clients start evenly over `ramp_s` (None: about one request's time), send until
    `duration_s` and then wait for what is under way. Rates are of the steady window, from the last
    client's start to `duration_s`; where that is shorter than two requests, of the whole.

    A client's next request arrives `turnaround_s` after its last token left. That it is more than
    nothing matters: the engine has begun its next step by then, and the request waits for its end.
    """
    virtual = Virtual(spec)
    if ramp_s is None:
        ramp_s = _request_s(spec, concurrency, prompt_tokens, output_tokens)
    due = deque(index * ramp_s / concurrency for index in range(concurrency))
    last_start_s = due[-1]
    while due or not virtual.engine.idle:
        while due and due[0] <= virtual.now_s:
            virtual.submit(prompt_tokens, output_tokens, due.popleft())
        until_s = min(
            due[0] if due else math.inf, duration_s if virtual.now_s < duration_s else math.inf
        )
        for _ in virtual.advance(until_s):
            next_s = virtual.now_s + turnaround_s
            if next_s < duration_s:
                _insert(due, next_s)
    record = virtual.record()
    whole = level([record], 0.0, virtual.now_s)
    if duration_s - last_start_s < 2e-3 * (whole.e2e_ms.mean or 0.0):
        return whole
    return level([record], last_start_s, duration_s)


def _insert(due: deque[float], at_s: float) -> None:
    """Keeps `due` in order; only while the clients still start is it not simply the last."""
    index = len(due)
    while index and due[index - 1] > at_s:
        index -= 1
    due.insert(index, at_s)


def _request_s(spec: EngineSpec, concurrency: int, prompt_tokens: int, output_tokens: int) -> float:
    """About how long one request takes among so many, from design equation 5."""
    together = min(concurrency, spec.max_num_seqs)
    step_s = decode_step_seconds(spec, together, prompt_tokens + output_tokens / 2)
    return prefill_seconds(spec, prompt_tokens) * together + output_tokens * step_s
