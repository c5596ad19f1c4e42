"""What this machine can measure: our own error, against a server of exactly known timing.

The levels are those of a sweep (`loadgen.loops`, `loadgen.level`), the server a process of its own
that says what it really did. The largest load at which the report is still within a bound of the
truth is kept per machine; `sweep` starts as many processes as that makes necessary.

It cannot say how the network between this machine and another one behaves.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import resource
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import __version__
from agent.model import Stats, UsageError
from agent.words import ms, number

if TYPE_CHECKING:
    from loadgen.level import Plan
    from loadgen.loops import ClosedLoop, OpenLoop
    from loadgen.targets.truth import Truth

BOUND_MS = 5.0
RATE_ERROR_MAX = 0.02  # |reported / true − 1| of tokens/s
OFFERED_MIN = 0.9  # of the tokens/s asked of the server: below, it was not the client alone
ACHIEVED_MIN = 0.999  # open loop: sent in time
HEADROOM = 0.8  # of what was held, a level is given to one process


# --------------------------------------------------------------------------------------- the result


class Machine(msgspec.Struct, frozen=True):
    """What a calibration is true of; with any of it changed it is worth nothing."""

    host: str
    cpu_model: str
    cores: int
    python: str
    tool_version: str


class Calibration(msgspec.Struct, frozen=True):
    """What one client process holds on this machine with its error within `bound_ms`."""

    machine: Machine
    at: str
    bound_ms: float
    server: str  # "c" or "python": which server of known timing it was held against
    token_events_per_s_max: float
    token_streams: int  # the streams they came over
    streams_max: int  # slow ones (1 token/s) held at once
    requests_per_s_max: float  # one token, not streamed, as fast as they go
    open_rps_max: float  # an open loop keeps its schedule up to here; 0: kept none that was tried
    us_per_event: float  # CPU of the client, its requests included
    us_per_request: float
    memory_mb: float  # at its peak, with `streams_max` streams

    @property
    def cores(self) -> int:
        return self.machine.cores


# What is assumed of a machine that was never calibrated: half of what one 2-core machine holds with
# the server on it (`make bench`), so that another one rather gets a process too many.
DEFAULT_TOKEN_EVENTS_PER_S = 50_000.0
DEFAULT_STREAMS = 10_000
DEFAULT_OPEN_RPS = 2_000.0


def processes_for(
    calibration: Calibration | None,
    *,
    streams: float,
    token_events_per_s: float,
    requests_per_s: float,
    cores: int,
) -> int:
    """Client processes that a level needs: at least 1, at most `cores`. Pure.

    Each is given at most 80 % of what one holds: token events and requests share its processor, and
    so add up; streams need memory and descriptors, and count by themselves.
    """
    known = calibration
    events_max = known.token_events_per_s_max if known else DEFAULT_TOKEN_EVENTS_PER_S
    requests_max = max(known.open_rps_max, RPS_MIN) if known else DEFAULT_OPEN_RPS
    streams_max = known.streams_max if known else DEFAULT_STREAMS
    work = token_events_per_s / events_max + requests_per_s / requests_max
    need = max(work / HEADROOM, streams / streams_max)
    return max(1, min(math.ceil(need - 1e-9), cores))


def this_machine() -> Machine:
    return Machine(
        host=platform.node(),
        cpu_model=_cpu_model(),
        cores=cores(),
        python=platform.python_version(),
        tool_version=__version__,
    )


def cores() -> int:
    """Those that this process may use, not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def path_of(machine: Machine) -> Path:
    """A file a machine: a home directory may be shared by several."""
    import platformdirs

    key = hashlib.sha256(msgspec.json.encode(machine)).hexdigest()[:12]
    return Path(platformdirs.user_data_dir("servefit")) / f"calibration-{key}.json"


def load() -> Calibration | None:
    """The calibration of this machine as it is now; None where there is none, or none to read."""
    machine = this_machine()
    try:
        kept = msgspec.json.decode(path_of(machine).read_bytes(), type=Calibration)
    except (OSError, ValueError):
        return None
    return kept if kept.machine == machine and kept.token_events_per_s_max > 0 else None


def save(calibration: Calibration) -> Path:
    """Raises UsageError where the data directory takes no file."""
    path = path_of(calibration.machine)
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.format(msgspec.json.encode(calibration)) + b"\n")
        part.replace(path)
    except OSError as error:
        raise UsageError(
            f"the calibration cannot be kept in {path.parent}: {error.strerror or error}; "
            "XDG_DATA_HOME names another data directory"
        ) from error
    return path


# --------------------------------------------------------------------------------------- the trials


class Figures(msgspec.Struct, frozen=True):
    """One side's figures of a trial, the server's or ours; None where there is no such figure."""

    ttft_ms: Stats = Stats()
    itl_ms: Stats = Stats()
    reply_ms: Stats = Stats()
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0


class Trial(msgspec.Struct, frozen=True):
    """One level against the server of known timing."""

    part: str  # its name
    what: str  # the load in words
    load: float  # streams, or requests/s
    true: Figures
    reported: Figures
    failed: int
    held: int  # the most streams that the server saw at once
    send_lag_p99_ms: float | None
    client_cpu: float | None  # cores
    us_per_event: float | None  # a token event, or a request where nothing streams
    own_lag_p99_ms: float | None  # how late the server itself was
    reasons: list[str]  # why this was too much; none: it was measured truly

    @property
    def ok(self) -> bool:
        return not self.reasons


class Result(msgspec.Struct, frozen=True):
    """What `--json` writes; `calibration` is null where not even the smallest load was held."""

    schema_version: int
    calibration: Calibration | None
    trials: list[Trial]
    notes: list[str]


class Part(msgspec.Struct, frozen=True):
    """One kind of load: the server it is held against, and what its levels look like."""

    name: str
    ttft_ms: float
    itl_ms: float
    tokens: int
    seconds: float = 0.0  # of a level, after its ramp; 0: one request a stream
    stream: bool = True
    open_loop: bool = False
    judged: bool = True  # false: as fast as they go, which is too fast to be right

    @property
    def e2e_s(self) -> float:
        return (self.ttft_ms + (self.tokens - 1) * self.itl_ms) / 1e3

    @property
    def pace(self) -> float:
        """Tokens/s of one stream."""
        return self.tokens / self.e2e_s


class Effort(msgspec.Struct, frozen=True):
    """How long to look: the loads to begin with, and how many levels at most."""

    tokens: Part
    slow: Part
    requests: Part
    arrivals: Part
    streams: int = 250  # × 100 tokens/s
    streams_steps: int = 7
    slow_streams: int = 10_000
    slow_steps: int = 2
    rps: int = 2_000
    rps_steps: int = 4


_TOKENS = Part("tokens", 50, 10, 64, seconds=1.6)
_REQUESTS = Part("requests", 0, 0, 1, seconds=2.0, stream=False, judged=False)
_ARRIVALS = Part("arrivals", 5, 0, 1, seconds=2.0, stream=False, open_loop=True)

FULL = Effort(_TOKENS, Part("slow streams", 1000, 1000, 5), _REQUESTS, _ARRIVALS)
QUICK = Effort(
    _TOKENS,
    Part("slow streams", 500, 500, 4),
    msgspec.structs.replace(_REQUESTS, seconds=0.5),
    msgspec.structs.replace(_ARRIVALS, seconds=0.5),
    streams=16, streams_steps=2, slow_streams=200, slow_steps=1, rps=200, rps_steps=1,
)  # fmt: skip

CONNECTIONS = 64  # of the requests that go as fast as they go
STREAMS_MIN, STREAMS_MAX = 4, 16_000
RPS_MIN = 50
CLOSE_ENOUGH = 1.2  # between the largest load that holds and the smallest that does not
CPU_USED_UP = 0.9  # of a core: a level that fails so has met its limit, and not a disturbance
PROMPT_TOKENS = 128
DESCRIPTORS_SPARE = 200
TIMEOUT_S = 20.0  # of a request; none that matters takes so long


def reasons_against(part: Part, trial: Trial, bound_ms: float) -> list[str]:
    """Why a trial was too much: where report and truth differ, or what did not happen. Pure."""
    found = [f"{trial.failed:,} requests failed"] if trial.failed else []
    if not part.judged:
        return found
    found += _latency_reasons(part, trial, bound_ms)
    if part.open_loop:
        if trial.send_lag_p99_ms is None or trial.send_lag_p99_ms > bound_ms:
            found.append(f"requests were sent {ms(trial.send_lag_p99_ms)} late (p99)")
        return found
    if trial.held < trial.load:
        found.append(f"{trial.held:,} of {trial.load:,.0f} streams were held")
    return found + (_rate_reasons(part, trial) if part.seconds else [])


def _latency_reasons(part: Part, trial: Trial, bound_ms: float) -> list[str]:
    true, told = trial.true, trial.reported
    pairs = [("reply mean", true.reply_ms.mean, told.reply_ms.mean)]
    if part.stream:
        pairs = [
            ("TTFT mean", true.ttft_ms.mean, told.ttft_ms.mean),
            ("TTFT p99", true.ttft_ms.p99, told.ttft_ms.p99),
            ("ITL p99", true.itl_ms.p99, told.itl_ms.p99),
        ]
        pairs = pairs if part.seconds else pairs[:1]  # one request a stream has no steady p99
    found = []
    for what, one, other in pairs:
        if one is None or other is None:
            found.append(f"{what} was not measured")
        elif abs(other - one) > bound_ms:
            found.append(f"{what} is off by {other - one:+.3g} ms")
    return found


def _rate_reasons(part: Part, trial: Trial) -> list[str]:
    true, told = trial.true.tokens_per_s, trial.reported.tokens_per_s
    possible = trial.load * part.pace
    if true <= 0:
        return ["the server sent nothing"]
    if abs(told / true - 1) > RATE_ERROR_MAX:
        return [f"tokens/s are off by {told / true - 1:+.1%}"]
    if true < OFFERED_MIN * possible:
        return [f"server and client together reached {true / possible:.0%} of the pace asked for"]
    return []


async def largest(
    start: int, least: int, most: int, steps: int, holds: Callable[[int], Awaitable[bool]]
) -> int:
    """The largest load found to hold, 0 for none: doubling or halving first, then bisection.

    Ends after `steps` loads, or where the largest that holds and the smallest that does not are
    within a fifth of each other.
    """
    good, bad, load = 0, 0, max(least, min(start, most))
    for _ in range(steps):
        if await holds(load):
            good = max(good, load)
        else:
            bad = min(bad, load) if bad else load
        if good >= most or (bad and bad <= least) or (good and bad and bad <= CLOSE_ENOUGH * good):
            break
        if good and bad:
            load = round(math.sqrt(good * bad))
        else:
            load = min(2 * good, most) if good else max(bad // 2, least)
    return good


def raise_descriptors() -> int:
    """Lets this process and its children open as many files as the system allows; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return STREAMS_MAX + DESCRIPTORS_SPARE if soft == resource.RLIM_INFINITY else soft


class Calibrator:
    """One calibration. `say` is told a line after every trial, `note` what bears on all."""

    def __init__(
        self, *, bound_ms: float = BOUND_MS, effort: Effort = FULL,
        say: Callable[[str], None] = lambda _: None, note: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._bound_ms = bound_ms
        self._effort = effort
        self._say = say
        self._tell = note
        self._trials: list[Trial] = []
        self._notes: list[str] = []
        self._server = ""
        self._again = False  # one load of the present search may be tried twice

    async def run(self) -> Result:
        """About a minute. Raises TargetError where the server does not start."""
        from loadgen.worker import ask_for_the_processor

        ask_for_the_processor()  # as a sweep does
        effort = self._effort
        descriptors = raise_descriptors() - DESCRIPTORS_SPARE
        self._note_load()
        streams_max = max(STREAMS_MIN, min(STREAMS_MAX, descriptors))
        best_streams = await self._search(
            effort.tokens, effort.streams, STREAMS_MIN, streams_max, effort.streams_steps
        )
        if not best_streams:
            return Result(1, None, self._trials, self._notes)
        slow = min(effort.slow_streams, streams_max)
        if slow < effort.slow_streams:
            self._note(
                f"only {slow:,} streams can be opened: `ulimit -n` is {descriptors:,} and cannot "
                "be raised from here"
            )
        held = await self._search(effort.slow, slow, best_streams, slow, effort.slow_steps)
        memory_mb = _peak_memory_mb()
        await self._search(effort.requests, CONNECTIONS, CONNECTIONS, CONNECTIONS, 1)
        # Beyond half of that there is no schedule to keep, only a queue to work off.
        rps_max = int(self._trial("requests", CONNECTIONS).true.requests_per_s / 2)
        rps = await self._search(
            effort.arrivals, effort.rps, RPS_MIN, max(RPS_MIN, rps_max), effort.rps_steps
        )
        return Result(
            1, self._calibration(best_streams, held, rps, memory_mb), self._trials, self._notes
        )

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._tell(text)

    def _note_load(self) -> None:
        load, n = os.getloadavg()[0], cores()
        if load > 0.3 * n:
            self._note(
                f"this machine does other work (load average {load:.1f}, {n} cores): "
                "what is found is what is left of it"
            )

    def _calibration(
        self, streams: int, slow_streams: int, rps: int, memory_mb: float
    ) -> Calibration:
        best = self._trial("tokens", streams)
        fast = self._trial("requests", CONNECTIONS)
        return Calibration(
            machine=this_machine(),
            at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            bound_ms=self._bound_ms,
            server=self._server,
            token_events_per_s_max=best.true.tokens_per_s,
            token_streams=streams,
            streams_max=max(streams, slow_streams),
            requests_per_s_max=fast.true.requests_per_s,
            open_rps_max=float(rps),
            us_per_event=best.us_per_event or 0.0,
            us_per_request=fast.us_per_event or 0.0,
            memory_mb=memory_mb,
        )

    def _trial(self, part: str, load: float) -> Trial:
        """The last one of a load, which is the one that counted."""
        return next(t for t in reversed(self._trials) if t.part == part and t.load == load)

    async def _search(self, part: Part, start: int, least: int, most: int, steps: int) -> int:
        from loadgen.targets import truth

        self._again = steps > 1
        with truth.serving(ttft_ms=part.ttft_ms, itl_ms=part.itl_ms) as server:
            if not self._server:
                self._server = server.kind
                if server.kind == "python":
                    self._note(
                        "no C compiler (cc) here: the server of known timing is the slow one, in "
                        "Python, and may be the limit before the client is"
                    )

            async def holds(load: int) -> bool:
                return await self._holds(part, load, server)

            return await largest(start, least, most, steps, holds)

    async def _holds(self, part: Part, load: int, server: Truth) -> bool:
        """A load that fails with the processor at hand was perhaps disturbed: once more, once."""
        trial = await self._once(part, load, server)
        if not trial.ok and self._again and (trial.client_cpu or 0.0) < CPU_USED_UP:
            self._again = False
            trial = await self._once(part, load, server)
        return trial.ok

    async def _once(self, part: Part, load: int, server: Truth) -> Trial:
        from loadgen.level import summarise

        plan = plan_of(part, load)
        server.reset()
        recording = await runner_of(part, plan, server.url).run()
        level = summarise(recording, plan, started_at="")
        true = server.summary(rate=load if part.open_loop else 0.0)
        told = level.measurement
        assert told is not None
        events = recording.stamps_ns.size if part.stream else recording.n
        trial = Trial(
            part=part.name,
            what=load_words(part, load),
            load=load,
            true=_true_figures(true),
            reported=Figures(
                ttft_ms=level.ttft_ms,
                itl_ms=level.itl_ms,
                reply_ms=level.e2e_ms,
                tokens_per_s=level.output_tokens_per_s or 0.0,
                requests_per_s=level.request_throughput or 0.0,
            ),
            failed=level.requests.failed if level.requests else 0,
            held=int(true.get("streams_max", 0)),
            send_lag_p99_ms=told.send_lag_ms.p99,
            client_cpu=told.client_cpu,
            us_per_event=recording.cpu_s * 1e6 / events if events else None,
            own_lag_p99_ms=(true.get("own_lag_ms") or {}).get("p99"),
            reasons=[],
        )
        reasons = reasons_against(part, trial, self._bound_ms)
        # Of one request a stream all is ramp: its requests may be sent late and yet all be held.
        if part.judged and part.seconds and not told.valid:
            reasons += told.reasons
        trial = msgspec.structs.replace(trial, reasons=reasons)
        self._trials.append(trial)
        self._say(trial_line(part, trial))
        return trial


def plan_of(part: Part, load: int) -> Plan:
    """The level: its slots are spread over a request's time, its window is two of them and more.

    Of one request a stream, the last begins well before the first ends, so that all are open.
    """
    from loadgen.level import Plan
    from loadgen.loops import RAMP_S_MAX, RAMP_S_PER_STREAM

    if part.open_loop:
        return Plan(
            mode="rate", rate_rps=float(load), arrival="constant", duration_s=part.seconds,
            stream=part.stream, timeout_s=TIMEOUT_S,
        )  # fmt: skip
    spread_s = part.e2e_s if part.seconds else 0.6 * part.e2e_s
    ramp_s = max(spread_s, min(RAMP_S_PER_STREAM * load, RAMP_S_MAX))
    timed = {"duration_s": ramp_s + part.seconds} if part.seconds else {"requests": load}
    return Plan(
        mode="concurrency", concurrency=load, ramp_s=ramp_s, stream=part.stream,
        timeout_s=TIMEOUT_S, **timed,
    )  # fmt: skip


def runner_of(part: Part, plan: Plan, url: str) -> ClosedLoop | OpenLoop:
    """The same loops as in a sweep, with requests of the same kind."""
    from loadgen.api import ENDPOINTS
    from loadgen.client import parse_url, request_head
    from loadgen.lengths import Fixed
    from loadgen.prompts import DEFAULT_COSTS
    from loadgen.worker import Job, runner
    from loadgen.workload import Spec

    address = parse_url(url)
    spec = Spec(
        endpoint="chat", stream=part.stream, models=(("truth", 1.0),), costs=DEFAULT_COSTS,
        input_tokens=Fixed(PROMPT_TOKENS), output_tokens=Fixed(part.tokens),
    )  # fmt: skip
    head = request_head(address, ENDPOINTS["chat"].path, {})
    return runner(Job(plan=plan, number=1, spec=spec, address=address, head=head))


def _true_figures(true: dict[str, Any]) -> Figures:
    def stats(name: str) -> Stats:
        return msgspec.convert(true.get(name) or {}, Stats)

    return Figures(
        ttft_ms=stats("ttft_ms"),
        itl_ms=stats("itl_ms"),
        reply_ms=stats("reply_ms"),
        tokens_per_s=true.get("tokens_per_s", 0.0),
        requests_per_s=true.get("requests_per_s", 0.0),
    )


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------- the words


def load_words(part: Part, load: float) -> str:
    if part.open_loop:
        return f"{load:,.0f} requests/s on schedule"
    if not part.stream:
        return f"one token as fast as they go, {load:,.0f} connections"
    return f"{load:,.0f} streams × {part.pace:.3g} tokens/s"


def trial_line(part: Part, trial: Trial) -> str:
    verdict = "ok" if trial.ok else f"too much: {trial.reasons[0]}"
    if part.stream:
        true, told = trial.true.ttft_ms.mean, trial.reported.ttft_ms.mean
        what = f"TTFT {ms(told)} (true {ms(true)}), {number(trial.reported.tokens_per_s)} tok/s"
    else:
        what = f"{number(trial.reported.requests_per_s)} requests/s"
    return f"{trial.what}: {what}: {verdict}"


def conclusion(result: Result) -> list[str]:
    """What it means, in plain words, a sentence a line."""
    found = result.calibration
    if found is None:
        why = result.trials[-1].reasons[0] if result.trials else "nothing was tried"
        return [
            f"Nothing: even {result.trials[-1].load:,.0f} streams were too much here ({why}).",
            "Leave the machine alone for a minute and try again, or allow more with --bound.",
        ]
    schedule = f"a schedule of {found.open_rps_max:,.0f} requests/s"
    if not found.open_rps_max:
        schedule = "no schedule that was tried"
    server = "" if found.server == "c" else ", and less than with the fast one (install cc)"
    return [
        f"One process measures {found.token_events_per_s_max:,.0f} token events/s "
        f"({found.token_streams:,} streams) with TTFT and ITL within {found.bound_ms:g} ms of the "
        f"truth, for {number(found.us_per_event)} µs of CPU each{server}.",
        f"It holds {found.streams_max:,} streams open, in {found.memory_mb:,.0f} MB.",
        f"It sends {found.requests_per_s_max:,.0f} one-token requests/s as fast as they go "
        f"({number(found.us_per_request)} µs of CPU each), and keeps {schedule}.",
        f"Server and client shared {found.cores} cores: against a server elsewhere it is no less.",
    ]
