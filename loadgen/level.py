"""A recording, and the readings of the same instants, to a `Level`: every definition of the README.

Pure: the same recording always gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model import GpuView, Lag, Level, Measurement, Requests, ServerView, Slo, Stats, Tokens
from agent.sizing.curve import slo_met
from agent.stats import batch_means_ci95, batches, lag, summary
from loadgen.api import ENDPOINTS
from loadgen.arrival import Stages
from loadgen.recorder import CANCELLED, FAILED, OK, Recording

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


TRACE = "trace"  # the arrivals of a plan whose instants were recorded
# One pause as long as this is a stall of the client, however seldom: it is of the order of a TTFT.
# Shorter ones come one by one on every machine that does something else too; p99 judges those.
STALL_MS = 150.0


class Bounds(msgspec.Struct, frozen=True):
    """Beyond these the client, not the server, was measured. Each is printed beside its number."""

    send_lag_p99_ms: float = 10.0
    late_requests: int = 3  # of fewer, p99 is only its largest: one stall of the machine decides
    loop_lag_p99_ms: float = 10.0
    stalled_share: float = 0.004  # of the level's time, the client's own stalls: 300 ms in 75 s
    client_cpu_share: float = 0.95  # of one core per client process
    achieved_over_offered: float = 0.99
    in_flight_over_concurrency: float = 0.9
    littles_law_error: float = 0.1  # and the share that the window's two edges may make up
    failed_share: float = 0.1
    bunched_share: float = 0.3  # only told: who asks through this proxy sees it just so
    foreign_share: float = 0.01  # and at least two requests


class Plan(msgspec.Struct, frozen=True):
    """What a level was asked to do; `loadgen.loops` does it."""

    mode: str  # "concurrency" or "rate"
    concurrency: int | None = None
    rate_rps: float | None = None
    arrival: str = "poisson"
    stages: Stages | None = None  # open loop: a rate that changes; `rate_rps` is its mean
    requests: int | None = None  # after the warm-up; either this …
    duration_s: float | None = None  # … or this ends the level
    warmup_requests: int = 0
    warmup_s: float = 0.0
    ramp_s: float = 0.0  # closed loop: the slots start over at least this time
    timeout_s: float = 300.0
    stream: bool = True
    endpoint: str = "chat"
    speedup: float = 1.0  # of a trace's instants
    think_s: float = 0.0  # between a reply and the next turn of its conversation
    processes: int = 1  # that share the level
    part: int = 0  # which of them this is

    @property
    def load(self) -> float:
        """Concurrency or requests/s, whichever the mode is of."""
        value = self.concurrency if self.mode == "concurrency" else self.rate_rps
        return float(value or 0)

    @property
    def varies(self) -> bool:
        """Whether the rate changes within the level, so that there is no steady state."""
        return self.stages is not None or self.arrival == TRACE

    def slots(self) -> range:
        """Closed loop: the numbers of the streams that this process holds."""
        return range(self.part, int(self.concurrency or 1), self.processes)

    def part_of(self, requests: int) -> int:
        """How many of so many requests are this process's."""
        return len(range(self.part, requests, self.processes))


class Window(msgspec.Struct, frozen=True):
    """The steady window, ns of the monotonic clock."""

    start_ns: int
    end_ns: int
    steady: bool  # false: too short to be steady, the whole level is used

    @property
    def seconds(self) -> float:
        return max(self.end_ns - self.start_ns, 0) / 1e9


def span(rec: Recording) -> tuple[int, int]:
    """From first request sent to last reply ended, of the level after its warm-up (else of all).

    An open loop begins with its schedule, however long the first arrival lets itself be waited for.
    """
    rows = rec.warmup == 0
    if not rows.any():
        rows = np.ones(rec.n, dtype=bool)
    if not rows.any():
        return 0, 0
    started = np.where(rec.sent_ns > 0, rec.sent_ns, rec.due_ns)
    began, ended = int(started[rows].min()), int(rec.end_ns[rows].max())
    return min(began, rec.ramp_end_ns or began), ended


def steady_window(rec: Recording) -> Window:
    """From the ramp's end to the first slot not refilled, or the whole level where that is short.

    Shorter than twice the mean E2E time a window sees mostly the ramp's own cohort of requests.
    """
    start, end = span(rec)
    e2e = _e2e_ms(rec)[_ok(rec)]
    low, high = rec.ramp_end_ns, rec.refill_end_ns
    if low and high and e2e.size and (high - low) / 1e6 >= 2 * e2e.mean():
        return Window(low, high, True)
    return Window(start, end, False)


def _ok(rec: Recording) -> Mask:
    rows: Mask = (rec.outcome == OK) & (rec.warmup == 0)
    return rows


def _first_ns(rec: Recording) -> NDArray[np.int64]:
    """First token-bearing chunk of every request; 0 where there was none."""
    return _edge_ns(rec, np.cumsum(rec.chunks) - rec.chunks)


def _last_ns(rec: Recording) -> NDArray[np.int64]:
    return _edge_ns(rec, np.cumsum(rec.chunks) - 1)


def _edge_ns(rec: Recording, at: NDArray[np.int64]) -> NDArray[np.int64]:
    if rec.stamps_ns.size == 0:
        return np.zeros(rec.n, dtype=np.int64)
    stamps = rec.stamps_ns[np.clip(at, 0, rec.stamps_ns.size - 1)]
    return np.where(rec.chunks > 0, stamps, 0)


def _e2e_ms(rec: Recording) -> Floats:
    """Last token-bearing chunk − sent; a reply that was not streamed ends with its body."""
    last = np.where(rec.chunks > 0, _last_ns(rec), rec.end_ns)
    return (last - rec.sent_ns) / 1e6


def _since_ms(until_ns: NDArray[np.int64], since_ns: NDArray[np.int64]) -> Floats:
    """NaN where the event never came."""
    return np.where(until_ns > 0, (until_ns - since_ns) / 1e6, np.nan)


def _tpot_ms(rec: Recording) -> Floats:
    tokens = rec.output_tokens
    gap = (_last_ns(rec) - _first_ns(rec)) / 1e6
    return np.where((rec.chunks > 1) & (tokens > 1), gap / np.maximum(tokens - 1, 1), np.nan)


def _gaps(rec: Recording) -> tuple[Floats, NDArray[np.int64]]:
    """All gaps between consecutive token-bearing chunks of one request, in ms, and whose they are.

    A chunk that the server says carries k tokens is k gaps of one k-th each.
    """
    if rec.stamps_ns.size < 2:
        return np.empty(0), np.empty(0, dtype=np.int64)
    owner = np.repeat(np.arange(rec.n), rec.chunks)
    same = owner[1:] == owner[:-1]
    gaps = (np.diff(rec.stamps_ns) / 1e6)[same]
    owner = owner[1:][same]
    if not rec.chunks_counted.any():
        return gaps, owner
    counted = rec.chunks_counted[owner] == 1
    k = np.where(counted, np.maximum(rec.weights[1:][same], 1), 1).astype(np.int64)
    return np.repeat(gaps / k, k), np.repeat(owner, k)


def _stats(values: Floats, rows: Mask) -> Stats:
    chosen = values[rows]
    return summary(chosen[~np.isnan(chosen)])


# ------------------------------------------------------------------------------------------ rates


def _tokens_per_s(rec: Recording, low_ns: int, high_ns: int) -> float:
    """Output tokens that arrived in the half-open interval, per second.

    Tokens of replies that were not streamed arrive with the body.
    """
    if high_ns <= low_ns:
        return 0.0
    inside = (rec.stamps_ns > low_ns) & (rec.stamps_ns <= high_ns)
    whole = (rec.chunks == 0) & (rec.end_ns > low_ns) & (rec.end_ns <= high_ns)
    tokens = float(rec.weights[inside].sum()) + float(rec.output_tokens[whole].sum())
    return tokens * 1e9 / (high_ns - low_ns)


def _requests_per_s(rec: Recording, low_ns: int, high_ns: int) -> float:
    """Requests completed in the half-open interval, per second."""
    if high_ns <= low_ns:
        return 0.0
    ended = (rec.end_ns > low_ns) & (rec.end_ns <= high_ns)
    return float(((rec.outcome == OK) & ended).sum()) * 1e9 / (high_ns - low_ns)


def _interval(
    rate: Callable[[Recording, int, int], float],
    rec: Recording,
    window: Window,
    mean_e2e_ms: float,
) -> tuple[float, float] | None:
    """95 % interval of a rate by batch means."""
    if window.seconds <= 0 or not window.steady:
        return None
    count = batches(window.seconds * 1e3, mean_e2e_ms)
    edges = np.linspace(window.start_ns, window.end_ns, count + 1).astype(np.int64)
    return batch_means_ci95(np.array([rate(rec, int(a), int(b)) for a, b in pairwise(edges)]))


def _in_flight_mean(rec: Recording, window: Window) -> float | None:
    if window.seconds <= 0:
        return None
    rows = rec.sent_ns > 0
    low = np.maximum(rec.sent_ns[rows], window.start_ns)
    high = np.minimum(rec.end_ns[rows], window.end_ns)
    return float(np.maximum(high - low, 0).sum()) / (window.end_ns - window.start_ns)


# -------------------------------------------------------------------------------------------- SLO


def _request_meets(rec: Recording, slo: Sequence[Slo]) -> Mask:
    """Which requests met every target.

    Of ITL, a request's own statistic over its own gaps is taken; of the others, the request's one
    value, whatever statistic the target names.
    """
    meets: Mask = rec.outcome == OK
    first = _first_ns(rec)
    values = {
        "ttft": _since_ms(first, rec.sent_ns),
        "ttfo": _since_ms(rec.answer_ns, rec.sent_ns),
        "tpot": _tpot_ms(rec),
        "e2e": _e2e_ms(rec),
    }
    for target in slo:
        value = (
            _itl_of_requests(rec, target.statistic)
            if target.metric == "itl"
            else values[target.metric]
        )
        meets &= ~(value >= target.bound_ms)  # not measurable (NaN) is not a miss
    return meets


def _itl_of_requests(rec: Recording, statistic: str) -> Floats:
    gaps, owner = _gaps(rec)
    result = np.full(rec.n, np.nan)
    if owner.size == 0:
        return result
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    for at, part in zip(starts, np.split(gaps, starts[1:]), strict=True):
        result[owner[at]] = _statistic(part, statistic)
    return result


def _statistic(sample: Floats, name: str) -> float:
    if name == "mean":
        return float(sample.mean())
    if name == "max":
        return float(sample.max())
    return float(np.quantile(sample, float(name[1:]) / 100))


# ------------------------------------------------------------------------------------- validity


def _measurement(
    rec: Recording,
    plan: Plan,
    window: Window,
    server: ServerView | None,
    bounds: Bounds,
) -> Measurement:
    sent = (rec.sent_ns > 0) & (rec.warmup == 0)
    # How long a connection takes is the server's and the network's doing, and kept apart.
    send_lags_ms = (rec.sent_ns - rec.due_ns - rec.connect_ns)[sent] / 1e6
    send_lag = lag(send_lags_ms)
    late = int((send_lags_ms > bounds.send_lag_p99_ms).sum())
    loop_lag = lag(rec.loop_lag_ns / 1e6)
    in_flight = _in_flight_mean(rec, window)
    overloaded = plan.mode == "rate" and _open_loop_overloaded(rec, window)
    achieved = _achieved_over_offered(rec, plan, window)
    littles = None if overloaded or plan.varies else _littles_law_error(rec, window, in_flight)
    foreign = _foreign(rec, server, ENDPOINTS[plan.endpoint].sequences)
    stalled = _stalled_share(rec)
    cpu = rec.cpu_s / rec.wall_s if rec.wall_s else None
    total = int((rec.warmup == 0).sum())
    failed = int(((rec.outcome == FAILED) & (rec.warmup == 0)).sum())
    too_late = _above("send_lag_p99_ms", send_lag.p99, bounds.send_lag_p99_ms, "client_limited")
    checks = [
        *(_ran_out(rec, *limit) for limit in RAN_OUT),
        too_late if late >= min(bounds.late_requests, send_lags_ms.size) else None,
        _above("loop_lag_p99_ms", loop_lag.p99, bounds.loop_lag_p99_ms, "client_limited"),
        _above("stalled_share", stalled, bounds.stalled_share, "client_limited"),
        _above("client_cpu", cpu, bounds.client_cpu_share * plan.processes, "client_limited"),
        _below("achieved_over_offered", achieved, bounds.achieved_over_offered, "client_limited"),
        _above(
            "littles_law_error",
            littles,
            bounds.littles_law_error + _edge_share(rec, window),
            "unsteady",
        ),
        _above("failed_share", failed / total if total else None, bounds.failed_share, "errors"),
        _foreign_reason(foreign, total, bounds),
    ]
    holds = plan.mode == "concurrency" and not plan.think_s  # who thinks holds no stream
    if holds and in_flight is not None and window.steady:
        share = in_flight / (plan.concurrency or 1)
        checks.append(
            _below("in_flight_over_concurrency", share, bounds.in_flight_over_concurrency,
                   "client_limited")
        )  # fmt: skip
    reasons = [reason for reason in checks if reason]
    if total == 0 or not (rec.outcome[rec.warmup == 0] == OK).any():
        reasons.append("errors: no request of the level was completed")
    valid = not reasons
    notes = []
    if too_late and too_late not in reasons:
        notes.append(
            f"late: {late} of {send_lags_ms.size} requests were sent later than "
            f"{bounds.send_lag_p99_ms:g} ms after they were due, too few to be the rule"
        )
    if stalled and stalled <= bounds.stalled_share:
        notes.append(
            f"stalled: the client itself stood still for {stalled * rec.wall_s * 1e3:.0f} ms, "
            f"{stalled:.2%} of the level; the bound is {bounds.stalled_share:.2%}"
        )
    bunched = _bunched_share(rec)
    if bunched is not None and bunched > bounds.bunched_share:
        notes.append(
            f"bunched: {bunched:.0%} of the chunks came in one read with the one before: something "
            "on the way holds the stream back (nginx: proxy_buffering off), or the engine writes "
            "several chunks a step; TTFT, TPOT and ITL are those of the bunches"
        )
    if not window.steady:
        notes.append(
            "window: the steady window is shorter than twice the mean E2E time; "
            "the whole level is used"
        )
    if overloaded:
        notes.append("saturated: more was offered than the server completed; no steady state")
    return Measurement(
        valid=valid,
        reasons=reasons + notes,
        send_lag_ms=send_lag,
        loop_lag_ms=loop_lag,
        stalled_share=stalled,
        client_cpu=cpu,
        achieved_over_offered=achieved,
        in_flight_mean=in_flight,
        littles_law_error=littles,
        foreign_requests=foreign,
    )


# Failures that are this machine's doing: one alone makes the level this client's limit.
RAN_OUT = (
    ("no_descriptor", "file descriptor (`ulimit -n`)"),
    ("no_port", "local port (net.ipv4.ip_local_port_range, or more addresses)"),
)


def _ran_out(rec: Recording, kind: str, what: str) -> str | None:
    if kind not in rec.error_kinds:
        return None
    failed = (rec.outcome == FAILED) & (rec.error == rec.error_kinds.index(kind))
    return f"client_limited: {int(failed.sum())} requests found no free {what}, the bound is 0"


def _bunched_share(rec: Recording) -> float | None:
    """Of the chunks behind a reply's first, the share that arrived together with the one before."""
    together = rec.stamps_ns[1:] == rec.stamps_ns[:-1]
    firsts = np.cumsum(rec.chunks[rec.chunks > 0])[:-1]  # of the replies after the first one
    behind = together.size - firsts.size
    return float(together.sum() - together[firsts - 1].sum()) / behind if behind > 0 else None


def _stalled_share(rec: Recording) -> float | None:
    """Share of the level's time in which a client process stood still for STALL_MS or longer.

    A p99 hides one stall of 300 ms in a level of 30 s, and so does every p99 of the requests; what
    arrived meanwhile was stamped late all the same, and a closed loop sent nothing.
    """
    if not rec.wall_s or not rec.loop_lag_ns.size:
        return None
    lags_ms = rec.loop_lag_ns / 1e6
    return float(lags_ms[lags_ms >= STALL_MS].sum()) / 1e3 / rec.wall_s


def _above(name: str, value: float | None, bound: float, code: str) -> str | None:
    if value is None or value <= bound:
        return None
    return f"{code}: {name} {value:.3g} is above its bound {bound:g}"


def _below(name: str, value: float | None, bound: float, code: str) -> str | None:
    if value is None or value >= bound:
        return None
    return f"{code}: {name} {value:.3g} is below its bound {bound:g}"


def _achieved_over_offered(rec: Recording, plan: Plan, window: Window) -> float | None:
    """Open loop: of the requests due in the window, the share that were sent in it too.

    A request that found no server was tried in time; that it failed is counted elsewhere.
    """
    if plan.mode != "rate":
        return None
    due = (rec.due_ns >= window.start_ns) & (rec.due_ns <= window.end_ns)
    due &= rec.outcome != CANCELLED
    if not due.any():
        return None
    # One loop lag of grace, or the very last arrival of every window would count as not achieved.
    tried = np.where(rec.sent_ns > 0, rec.sent_ns - rec.connect_ns, rec.due_ns)
    return float((due & (tried <= window.end_ns + 10_000_000)).sum()) / float(due.sum())


def _open_loop_overloaded(rec: Recording, window: Window) -> bool:
    """In flight at the window's end clearly more than in its middle: the queue only grows."""

    def in_flight_between(low: float, high: float) -> float:
        part = Window(int(low), int(high), True)
        return _in_flight_mean(rec, part) or 0.0

    quarter = (window.end_ns - window.start_ns) / 4
    if quarter <= 0:
        return False

    def due_between(low: float, high: float) -> int:
        return max(1, int(((rec.due_ns >= low) & (rec.due_ns < high)).sum()))

    early = window.start_ns + quarter, window.start_ns + 2 * quarter
    late = window.end_ns - quarter, window.end_ns
    # A rate that changes has more in flight where more is due; a queue has more than that.
    more_due = due_between(*late) / due_between(*early)
    return in_flight_between(*late) > 1.5 * in_flight_between(*early) * max(1.0, more_due) + 2


def _littles_law_error(rec: Recording, window: Window, in_flight: float | None) -> float | None:
    """|in-flight / (throughput · mean E2E) − 1| in a steady window.

    Throughput is output tokens/s over mean output tokens: it has no edges of whole requests. Where
    nothing is generated it is requests/s.
    """
    rows = _ok(rec)
    if not window.steady or not in_flight or not rows.any():
        return None
    inside = rows & (rec.sent_ns >= window.start_ns) & (rec.sent_ns <= window.end_ns)
    if not inside.any():
        return None
    if (rec.outcome == FAILED).any():
        return None
    mean_tokens = float(rec.output_tokens[rows].mean())
    if mean_tokens > 0:
        throughput = _tokens_per_s(rec, window.start_ns, window.end_ns) / mean_tokens
    else:
        throughput = _requests_per_s(rec, window.start_ns, window.end_ns)
    expected = throughput * float(_e2e_ms(rec)[inside].mean()) / 1e3
    return abs(in_flight / expected - 1) if expected > 0 else None


def _edge_share(rec: Recording, window: Window) -> float:
    """Half a mean E2E time over the window: what requests cut by its edges may bend the law by."""
    e2e = _e2e_ms(rec)[_ok(rec)]
    return float(e2e.mean()) / 2e3 / window.seconds if e2e.size and window.seconds else 0.0


def _foreign(rec: Recording, server: ServerView | None, sequences: Sequence[int]) -> int | None:
    """Requests that the server finished and that were not ours, warm-up included.

    `sequences`: as how many it may count one of ours; of several the most that fits is taken.
    """
    if server is None or server.requests_total is None:
        return None
    ok, total = int((rec.outcome == OK).sum()), server.requests_total
    ours = max((ok * k for k in sequences if ok * k <= total), default=ok)
    # A request of ours that was cut off may or may not have been counted by the server.
    unsure = int((rec.outcome != OK).sum()) * max(sequences)
    return max(0, total - ours - unsure)


def _foreign_reason(foreign: int | None, total: int, bounds: Bounds) -> str | None:
    if foreign is None or foreign < 2 or foreign <= bounds.foreign_share * total:
        return None
    return (
        f"foreign_traffic: the server finished {foreign} requests that were not ours, "
        f"above the bound of {bounds.foreign_share:.0%} of {total}"
    )


# ------------------------------------------------------------------------------------- the level


def summarise(
    rec: Recording,
    plan: Plan,
    *,
    started_at: str,
    slo: Sequence[Slo] = (),
    server: ServerView | None = None,
    gpu: Sequence[GpuView] = (),
    bounds: Bounds | None = None,
) -> Level:
    """The level's figures. Rates are of the steady window, latencies of the requests sent in it."""
    window = steady_window(rec)
    start, end = span(rec)
    level_rows: Mask = rec.warmup == 0
    in_window = (rec.sent_ns >= window.start_ns) & (rec.sent_ns <= window.end_ns)
    rows = _ok(rec) & in_window
    e2e = _e2e_ms(rec)
    mean_e2e = float(e2e[rows].mean()) if rows.any() else 0.0
    first = _first_ns(rec)
    gaps, owner = _gaps(rec)
    edges = (window.start_ns, window.end_ns)
    generates = ENDPOINTS[plan.endpoint].generates
    output_rate = _tokens_per_s(rec, *edges)
    tokens = _tokens(rec, level_rows)
    due = level_rows & (rec.outcome != CANCELLED)  # by us: they met nothing and missed nothing
    if window.steady:  # else the whole level counts, whose first request was due before it was sent
        due &= (rec.due_ns >= window.start_ns) & (rec.due_ns <= window.end_ns)
    meets = _request_meets(rec, slo) & due if slo else None
    energy = _energy_j(gpu)
    level = Level(
        mode="concurrency" if plan.mode == "concurrency" else "rate",
        concurrency=plan.concurrency,
        offered_rps=plan.rate_rps,
        started_at=started_at,
        duration_s=(end - start) / 1e9,
        window_s=window.seconds,
        window_start_s=(window.start_ns - start) / 1e9,
        requests=_requests(rec, level_rows),
        tokens=tokens,
        request_throughput=_requests_per_s(rec, *edges) if window.seconds > 0 else None,
        request_throughput_ci95=_interval(_requests_per_s, rec, window, mean_e2e),
        output_tokens_per_s=output_rate if generates else None,
        total_tokens_per_s=None
        if tokens.prompt is None
        else output_rate + _prompt_tokens_per_s(rec, window, first),
        output_tokens_per_s_ci95=_interval(_tokens_per_s, rec, window, mean_e2e)
        if generates
        else None,
        ttft_ms=_stats(_since_ms(first, rec.sent_ns), rows),
        ttft_from_due_ms=_stats(_since_ms(first, rec.due_ns), rows),
        ttfo_ms=_stats(_since_ms(rec.answer_ns, rec.sent_ns), rows),
        itl_ms=summary(gaps[rows[owner]]),
        tpot_ms=_stats(_tpot_ms(rec), rows),
        e2e_ms=_stats(e2e, rows),
        connect_ms=summary(rec.connect_ns[rec.connect_ns > 0] / 1e6),
        prompt_tokens=summary(
            rec.prompt_tokens[_ok(rec) & (rec.prompt_tokens >= 0)].astype(np.float64)
        ),
        output_tokens=summary(rec.output_tokens[_ok(rec)].astype(np.float64)),
        goodput_rps=float(meets.sum()) / window.seconds
        if meets is not None and window.seconds
        else None,
        slo_attainment=float(meets.sum()) / float(due.sum())
        if meets is not None and due.any()
        else None,
        measurement=_measurement(rec, plan, window, server, bounds or Bounds()),
        server=server,
        gpu=list(gpu),
        energy_j_per_output_token=energy / tokens.output if energy and tokens.output else None,
    )
    return msgspec.structs.replace(level, slo_met=slo_met(level, slo)) if slo else level


def _requests(rec: Recording, rows: Mask) -> Requests:
    failed = rows & (rec.outcome == FAILED)
    counts = np.bincount(rec.error[failed], minlength=len(rec.error_kinds))
    return Requests(
        ok=int((rows & (rec.outcome == OK)).sum()),
        failed=int(failed.sum()),
        cancelled=int((rows & (rec.outcome == CANCELLED)).sum()),
        errors={kind: int(n) for kind, n in zip(rec.error_kinds, counts, strict=True) if n},
    )


def _tokens(rec: Recording, rows: Mask) -> Tokens:
    known = rows & (rec.prompt_tokens >= 0)
    return Tokens(
        prompt=int(rec.prompt_tokens[known].sum()) if known.any() else None,
        output=int(rec.output_tokens[rows].sum()),
        reasoning=int(rec.reasoning_tokens[rows].sum()),
        source="usage" if rec.usage_rows else "tokenizer" if rec.tokenizer_rows else "events",
    )


def _prompt_tokens_per_s(rec: Recording, window: Window, first: NDArray[np.int64]) -> float:
    """Prompt tokens are worked off when the first token comes."""
    if window.seconds <= 0:
        return 0.0
    at = np.where(first > 0, first, rec.end_ns)
    inside = (at > window.start_ns) & (at <= window.end_ns) & (rec.outcome == OK)
    return float(np.maximum(rec.prompt_tokens[inside], 0).sum()) / window.seconds


def _energy_j(gpu: Sequence[GpuView]) -> float | None:
    energies = [view.energy_j for view in gpu if view.energy_j is not None]
    return sum(energies) if energies else None


__all__ = ["Bounds", "Lag", "Plan", "Window", "span", "steady_window", "summarise"]
