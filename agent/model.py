"""The nouns of servefit: what is measured, what is concluded, and what can go wrong.

Everything here is plain data. The structs mirror, field for field, the JSON that `loadgen --json`
writes (schema_version 1): times in ms, rates per second, energy in J, instants as ISO 8601 UTC.
A field that could not be measured is null, never zero.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 1
TOKENS_MAX = 10_000_000  # of one prompt or reply; more is no length

# ---------------------------------------------------------------------------------------- errors


class ServefitError(Exception):
    """What we could not do: one line for the user, and the exit code that goes with it."""

    exit_code = 2


class UsageError(ServefitError):
    """Wrong option, file or configuration; the text says what to change."""

    exit_code = 2


class TargetError(ServefitError):
    """The target cannot be used at all, found out before the first level."""

    exit_code = 4


class StoreError(ServefitError):
    """The database could not be opened, read or written."""

    exit_code = 2


# -------------------------------------------------------------------------------------- readings


class Reading(msgspec.Struct, frozen=True):
    """One value of one series at one instant. `name` is a canonical name of `agent.metrics`."""

    at_ns: int  # time.monotonic_ns() when the answer arrived
    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()  # sorted pairs, e.g. (("gpu", "GPU-uuid"),)


# ----------------------------------------------------------------------------------------- level


class Served(msgspec.Struct, frozen=True):
    """One request as the server tells it; what it does not tell is null."""

    trace_id: bytes
    span_id: bytes
    arrived_unix_ns: int
    ended_unix_ns: int
    model: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    ttft_s: float | None = None
    energy_j: float | None = None  # its share of the GPUs' energy: agent.receiver.EnergyShare


class Stats(msgspec.Struct, frozen=True):
    """Summary of a sample. All null when n is 0."""

    mean: float | None = None
    std: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None
    n: int = 0


class Requests(msgspec.Struct, frozen=True):
    ok: int
    failed: int
    cancelled: int
    errors: dict[str, int]  # kind → how many; kinds: timeout, connect, reset, http_429, …


class Tokens(msgspec.Struct, frozen=True):
    prompt: int | None  # null where neither server nor tokenizer said
    output: int
    reasoning: int
    source: Literal["usage", "tokenizer", "events"]


class Lag(msgspec.Struct, frozen=True):
    p50: float | None = None
    p99: float | None = None
    max: float | None = None


class Measurement(msgspec.Struct, frozen=True):
    """How far the level can be believed: is it the server that was measured, or the client?"""

    valid: bool
    reasons: list[str]
    send_lag_ms: Lag = Lag()
    loop_lag_ms: Lag = Lag()
    client_cpu: float | None = None  # cores used by all client processes, 0 … n
    achieved_over_offered: float | None = None  # open loop only
    in_flight_mean: float | None = None
    littles_law_error: float | None = None  # |in-flight / (throughput · mean E2E) − 1|
    foreign_requests: int | None = None  # requests the server finished that were not ours
    stalled_share: float | None = None  # of the level's time the client itself stood still, 0 … n


class ServerView(msgspec.Struct, frozen=True):
    """What the server itself said during the level; means over the steady window.

    `queue_ms`, `prefill_ms` and `decode_ms` are means per request over the level. The `*_total`
    fields are increases of the server's counters over the level and its warm-up.
    """

    running_mean: float | None = None
    running_max: float | None = None
    waiting_mean: float | None = None
    waiting_max: float | None = None
    kv_usage_mean: float | None = None  # 0 … 1
    kv_usage_max: float | None = None
    preemptions: int | None = None
    prefix_hit_rate: float | None = None  # 0 … 1
    queue_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    kv_capacity_tokens: int | None = None
    requests_total: int | None = None
    prompt_tokens_total: int | None = None
    output_tokens_total: int | None = None
    samples: int = 0


class GpuView(msgspec.Struct, frozen=True):
    """One GPU during the level."""

    uuid: str
    memory_used_bytes_max: float | None = None
    utilization_mean: float | None = None  # 0 … 1
    power_w_mean: float | None = None
    energy_j: float | None = None
    temperature_c_max: float | None = None
    clocks_throttled: bool | None = None


class Level(msgspec.Struct, frozen=True):
    """One load point: what was offered, what came back, and what server and GPU did meanwhile.

    Only `output_tokens_per_s` (`request_throughput` where nothing is generated) and one of
    `concurrency` and `offered_rps` are needed, so that other tools' numbers can be written in this
    form too.
    """

    mode: Literal["concurrency", "rate"] = "concurrency"
    concurrency: int | None = None  # closed loop: streams held; open loop: null
    offered_rps: float | None = None  # open loop: requests/s asked for; closed loop: null
    started_at: str | None = None
    duration_s: float | None = None  # the whole level after its warm-up, ramp and drain included
    window_s: float | None = None  # the steady window that the rates are of
    window_start_s: float | None = None  # when it began, since the level's start
    requests: Requests | None = None
    tokens: Tokens | None = None
    request_throughput: float | None = None
    request_throughput_ci95: tuple[float, float] | None = None
    output_tokens_per_s: float | None = None  # null where nothing is generated, as of embeddings
    total_tokens_per_s: float | None = None
    output_tokens_per_s_ci95: tuple[float, float] | None = None
    ttft_ms: Stats = Stats()
    ttft_from_due_ms: Stats = Stats()
    ttfo_ms: Stats = Stats()
    itl_ms: Stats = Stats()
    tpot_ms: Stats = Stats()
    e2e_ms: Stats = Stats()
    connect_ms: Stats = Stats()  # TCP and TLS set-up, kept apart from TTFT
    prompt_tokens: Stats = Stats()  # as the server counted them, per request
    output_tokens: Stats = Stats()
    goodput_rps: float | None = None  # null without an SLO
    slo_attainment: float | None = None  # share of requests due in the window that met every SLO
    slo_met: bool | None = None  # did the level's statistics meet every SLO? null without an SLO
    measurement: Measurement | None = None
    server: ServerView | None = None
    gpu: list[GpuView] = []
    energy_j_per_output_token: float | None = None
    cost_usd_per_million_output_tokens: float | None = None


# ------------------------------------------------------------------------------- curve and verdict


class Knee(msgspec.Struct, frozen=True):
    """Where more load stops buying throughput: the smallest level within 5 % of the best."""

    concurrency: float
    output_tokens_per_s: float


class SloCapacity(msgspec.Struct, frozen=True):
    """The most load that still meets the SLO. `lo` and `hi` are in the unit of the sweep's mode.

    `lo` is the highest load tested that surely (95 %) held, `hi` the lowest that surely broke it.
    Not `bracketed`: the sweep never saw the SLO surely broken, so `lo` is a lower bound and `hi`
    null, or (`lo` null) never saw it surely held.
    """

    concurrency: float | None
    rps: float | None
    lo: float | None
    hi: float | None
    bracketed: bool


class Curve(msgspec.Struct, frozen=True):
    knee: Knee | None = None
    saturated: bool = False
    slo_capacity: SloCapacity | None = None
    limit: str | None = None  # a reason code


class Reason(msgspec.Struct, frozen=True):
    code: str
    because: str  # one sentence with its numbers
    evidence: dict[str, Any] = {}


class Confidence(msgspec.Struct, frozen=True):
    level: Literal["none", "low", "medium", "high"]
    limited_by: str


class Ratio(msgspec.Struct, frozen=True):
    """Demand over capacity; above 1 the demand does not fit."""

    value: float
    lo: float | None = None
    hi: float | None = None


class Recommendation(msgspec.Struct, frozen=True):
    action: str
    configuration: str | None = None
    saving_lo: float | None = None
    saving_hi: float | None = None
    error_bar: str | None = None
    confirm_with: str | None = None
    overturned_by: str | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Is the hardware too big, too small or the wrong kind, how sure are we, and what to do."""

    finding: str
    summary: str  # the verdict in one sentence
    confidence: Confidence
    since: str | None = None
    reasons: list[Reason] = []
    demand: dict[str, Any] = {}
    capacity: dict[str, Any] = {}
    ratio: Ratio | None = None
    qualifier: dict[str, Any] | None = None
    rests_on: list[str] = []
    stability: dict[str, Any] = {}
    questions: dict[str, Any] = {}
    energy: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    recommendation: Recommendation | None = None
    missing: list[str] = []
    found: str | None = None  # what this window alone says, where it takes more to be the finding


# ----------------------------------------------------------------------------------------- sweep


class Slo(msgspec.Struct, frozen=True):
    """One target, as `ttft:p95<500ms` says it."""

    metric: Literal["ttft", "ttfo", "itl", "tpot", "e2e"]
    statistic: Literal["mean", "p50", "p90", "p95", "p99", "max"]
    bound_ms: float


class Overhead(msgspec.Struct, frozen=True):
    """What we asked of the server besides the levels: levels + overhead = what it counted."""

    probe_requests: int = 0
    probe_tokens: int = 0
    warmup_requests: int = 0
    warmup_tokens: int = 0


class Run(msgspec.Struct, frozen=True):
    """Who measured, when and how; all of it may be missing from another tool's numbers."""

    id: str = ""
    started_at: str = ""
    command: str = ""
    seed: int = 0
    tool_version: str = ""
    host: str = ""
    overhead: Overhead = Overhead()
    interrupted: bool = False
    simulated: bool = False  # true: every number below comes from the simulated engine


class TargetGpu(msgspec.Struct, frozen=True):
    name: str
    uuid: str = ""  # another tool may not tell it
    memory_total_bytes: int | None = None


class Target(msgspec.Struct, frozen=True):
    url: str = ""
    model: str = ""
    engine: str | None = None
    engine_version: str | None = None
    gpus: list[TargetGpu] = []
    fingerprint: str | None = None
    settings: dict[str, str] = {}  # the server's own, as its metrics page tells them
    server_note: str | None = None  # why `server` is null in the levels, where it is
    gpu_note: str | None = None  # why `gpu` is empty in the levels, where it is


class Workload(msgspec.Struct, frozen=True):
    endpoint: str = "chat"
    input_tokens: int | str = ""  # a fixed length is a number, a distribution its text
    output_tokens: int | str = ""
    arrival: str | None = None
    dataset: str | None = None
    trace: str | None = None
    prefix_tokens: int | None = None
    turns: int | None = None
    stream: bool = True


class Sweep(msgspec.Struct, frozen=True):
    """The whole of a run, as `--json` writes it and the store keeps it.

    Other tools' curves may be written in this form too: of them `levels` alone is needed.
    """

    run: Run = Run()
    target: Target = Target()
    workload: Workload = Workload()
    slo: list[Slo] = []
    levels: list[Level] = []
    curve: Curve = Curve()
    verdict: Verdict | None = None
    schema_version: int = SCHEMA_VERSION

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from agent.words import sweep_html

        return sweep_html(self)


class _AtLeast(msgspec.Struct):
    """Without this any JSON object at all would be a sweep."""

    levels: msgspec.Raw


def encode(value: Any) -> bytes:
    """JSON of any noun here; NaN never occurs, a missing measurement is null."""
    return msgspec.json.encode(value)


def decode_sweep(data: bytes) -> Sweep:
    """Reads what `encode` wrote. Raises UsageError naming the field that does not fit."""
    try:
        msgspec.json.decode(data, type=_AtLeast)
        return msgspec.json.decode(data, type=Sweep)
    except (ValueError, RecursionError) as error:  # the former is msgspec's, and bad UTF-8
        raise UsageError(f"not a sweep in schema_version {SCHEMA_VERSION}: {error}") from error
