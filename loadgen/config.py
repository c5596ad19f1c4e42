"""What the flags, the environment and the TOML file say, checked and in one struct.

Everything that can be wrong with an option is found here, before a request is sent.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

import msgspec

from agent.model import TOKENS_MAX, Slo, UsageError
from agent.terms import FINDINGS
from agent.words import is_whole
from loadgen.api import ENDPOINTS
from loadgen.arrival import Stages, parse_arrival, stages
from loadgen.lengths import AnyLength, Fixed
from loadgen.level import TRACE, Plan
from loadgen.units import parse_duration as parse_duration
from loadgen.units import parse_number

if TYPE_CHECKING:
    from agent.sizing.money import Prices
    from agent.trace import Trace

T = TypeVar("T", int, float)
Mode = Literal["concurrency", "rate"]

DEFAULT_CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_INPUT_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
DEFAULT_REQUESTS_PER_STREAM = 5
DEFAULT_REQUESTS_MIN = 20
DEFAULT_OPEN_LOOP_S = 30.0
DEFAULT_BUDGET_S = 300.0  # of a search
BUDGET_S_MIN = 5.0
CONCURRENCY_MAX = 100_000
SEED_MAX = 2**63 - 1
PREFIXES_MAX = 1_000_000
TURNS_MAX = 1000
PROCESSES_MAX = 256
CONVERSING = ("chat", "responses")

# Headers that belong to how a request is framed, not to what it says.
OWN_HEADERS = ("host", "content-length", "content-type", "transfer-encoding", "connection")

# A consumer card with a KV cache made small: its knee and its limit show within seconds.
DEMO_SPEC = "sim:rtx-4090/llama-3.1-8b?precision=fp8&num_gpu_blocks=768"
DEMO_INPUT_TOKENS = 256
DEMO_OUTPUT_TOKENS = 64
DEMO_CONCURRENCY = (1, 4, 16, 32, 48, 64)
DEMO_DURATION_S = 5.5
DEMO_SLO = "ttft:p95<500ms,itl:p95<60ms"
DEMO_EXPECT_CONCURRENCY = 20

# What `sweep` asks of a server that it found by itself, where no level was asked for: an answer in
# about a minute. By the names of the options; none of them where a flag says otherwise.
QUICK = {"concurrency": "auto", "budget": "60s"}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """All options of `run` and `sweep`, as numbers."""

    url: str
    model: str | None = None
    endpoint: str = "chat"
    stream: bool = True
    concurrency: tuple[int, ...] = ()
    rates_rps: tuple[float, ...] = ()
    auto: Mode | None = None  # the loads are searched, not listed
    budget_s: float | None = None  # for all levels together
    arrival: str = "poisson"
    stages: Stages | None = None  # a rate that changes within the one level
    mix: tuple[tuple[str, float], ...] = ()  # models with their weights, instead of the one
    input_tokens: AnyLength = Fixed(DEFAULT_INPUT_TOKENS)
    output_tokens: AnyLength | None = Fixed(DEFAULT_OUTPUT_TOKENS)  # None: as recorded
    prefix_tokens: int = 0
    prefixes: int = 1
    dataset: str | None = None  # files
    trace: str | None = None
    speedups: tuple[float, ...] = (1.0,)  # of the trace's instants, a level each
    turns: int = 1
    think_s: float = 0.0
    tokenizer: str | None = None
    reuse_prompts: bool = False
    processes: int | None = None  # None: as many as a level needs
    repeats: int = 1  # how often the whole list of levels is run
    requests: int | None = None
    duration_s: float | None = None
    warmup_requests: int = 0
    warmup_s: float = 0.0
    slo: tuple[Slo, ...] = ()
    timeout_s: float = 300.0
    headers: dict[str, str] = {}
    ca_file: str | None = None
    insecure: bool = False
    metrics_url: str | None = None  # "none": do not look for it
    agent: str | None = None
    agent_token_file: str | None = None  # read where it is used
    seed: int = 0
    expect_concurrency: float | None = None
    expect_rps: float | None = None
    prices: str | None = None  # a file
    fail_on: tuple[str, ...] = ()
    otlp_endpoint: str | None = None
    yes: bool = False
    command: str = ""
    notes: tuple[str, ...] = ()  # what was assumed where nothing was said, a line each

    @property
    def own_lengths(self) -> bool:
        """Whether prompts are as long as they were recorded."""
        return bool(self.dataset or self.trace)

    def rate_rps_max(self, trace: Trace | None) -> float:
        """The highest rate of an open loop here; 0 where all levels are closed loops."""
        if self.concurrency:
            return 0.0
        if trace is not None:
            return trace.mean_rps() * max(self.speedups)
        return self.stages.peak_rps if self.stages else max(self.rates_rps, default=0.0)

    def plans(self, trace: Trace | None = None) -> list[Plan]:
        """The levels to run, in the order asked for; repeats go round the whole list, so that a
        drift of the server shows as a spread and not as a slope of the curve.

        `trace`: what `self.trace` holds, once it is read."""
        if self.concurrency:
            plans = [self._plan(concurrency=n) for n in self.concurrency]
        elif trace is not None:
            plans = [self._traced(trace, speedup) for speedup in self.speedups]
        elif self.stages is not None:
            plans = [self._plan(rate_rps=self.stages.mean_rps)]
        else:
            plans = [self._plan(rate_rps=rate) for rate in self.rates_rps]
        return plans * self.repeats

    def _traced(self, trace: Trace, speedup: float) -> Plan:
        """The whole of a trace, unless an option ends it before."""
        plan = self._plan(rate_rps=1.0)
        rows = len(trace.rows)
        if self.duration_s is not None:
            rows = trace.within((self.warmup_s + self.duration_s) * speedup)
        elif self.requests is not None:
            rows = self.warmup_requests + self.requests
        else:
            plan = msgspec.structs.replace(
                plan, requests=max(1, rows - self.warmup_requests), duration_s=None
            )
        return msgspec.structs.replace(
            plan, arrival=TRACE, speedup=speedup, rate_rps=trace.mean_rps(rows) * speedup
        )

    @property
    def _opens(self) -> bool:
        recorded = self.trace is not None and not self.concurrency
        return bool(self.rates_rps or self.stages or recorded)

    @property
    def mode(self) -> Mode:
        return self.auto or ("rate" if self._opens else "concurrency")

    def plan_at(self, load: float) -> Plan:
        """The level of a load that was not listed."""
        if self.mode == "rate":
            return self._plan(rate_rps=load)
        return self._plan(concurrency=int(load))

    def _plan(self, *, concurrency: int | None = None, rate_rps: float | None = None) -> Plan:
        requests, duration_s = self.requests, self.duration_s
        if requests is None and duration_s is None:
            if concurrency is not None:
                requests = max(DEFAULT_REQUESTS_MIN, DEFAULT_REQUESTS_PER_STREAM * concurrency)
            else:
                duration_s = self.stages.total_s if self.stages else DEFAULT_OPEN_LOOP_S
        return Plan(
            mode="concurrency" if concurrency is not None else "rate",
            concurrency=concurrency,
            rate_rps=rate_rps,
            stages=self.stages if rate_rps is not None else None,
            think_s=self.think_s,
            arrival=self.arrival,
            requests=requests,
            duration_s=duration_s,
            warmup_requests=self.warmup_requests,
            warmup_s=self.warmup_s,
            timeout_s=self.timeout_s,
            stream=self.stream,
            endpoint=self.endpoint,
        )


def check(options: Options) -> Options:
    """Raises UsageError for what contradicts itself.

    Returns the options, without what an endpoint that generates nothing has no use for.
    """
    generates = ENDPOINTS[options.endpoint].generates
    if not generates:
        options = msgspec.structs.replace(options, stream=False, output_tokens=Fixed(0))
    rates = bool(options.rates_rps or options.stages)
    if options.concurrency and rates:
        raise UsageError("--concurrency and --rate together: a level is either closed or open loop")
    if not (options.concurrency or rates or options.trace or options.auto):
        raise UsageError("no level asked for: give --concurrency, --rate or --trace")
    _check_workload(options)
    if options.auto and options.repeats > 1:
        raise UsageError(
            f"--repeats with --{options.auto} auto: the search repeats the levels that decide; "
            "leave it away"
        )
    if options.budget_s is not None and options.budget_s < BUDGET_S_MIN:
        raise UsageError(f"--budget: write at least {BUDGET_S_MIN:.0f}s, such as 5m")
    if options.requests is not None and options.duration_s is not None:
        raise UsageError("--requests and --duration together: one of them ends a level")
    parse_arrival(options.arrival)
    if options.requests is not None and any(n > options.requests for n in options.concurrency):
        raise UsageError(
            f"--requests {options.requests} is fewer than the {max(options.concurrency)} streams "
            "asked for: every stream sends at least one"
        )
    if any(s.metric in ("ttft", "ttfo", "itl", "tpot") for s in options.slo) and not options.stream:
        why = "--no-stream" if generates else f"--endpoint {options.endpoint}"
        raise UsageError(f"{why} gives no TTFT or ITL: an --slo on them cannot be judged")
    if "slo" in options.fail_on and not options.slo:
        raise UsageError("--fail-on slo without an --slo would never fail: say which, by --slo")
    for option, demand in (
        ("--expect-concurrency", options.expect_concurrency), ("--expect-rps", options.expect_rps),
    ):  # fmt: skip
        if demand is not None and not math.isfinite(demand):
            raise UsageError(f"{option} {demand}: write a finite number above 0")
    for option, value, low, high in (
        ("--prefix-tokens", options.prefix_tokens, 0, TOKENS_MAX),
        ("--prefixes", options.prefixes, 1, PREFIXES_MAX),
        ("--turns", options.turns, 1, TURNS_MAX),
        ("--seed", options.seed, 0, SEED_MAX),
    ):
        if not low <= value <= high:
            raise UsageError(f"{option}: write a whole number from {low} to {high}")
    if options.ca_file is not None and not Path(options.ca_file).is_file():
        raise UsageError(f"--ca-file {options.ca_file}: no such file")
    _check_metrics_url(options.metrics_url)
    if options.prices is not None:
        read_prices(options.prices)
    if options.agent is not None:
        parse_agent(options.agent)
        agent_token(options.agent_token_file)
    return options


def read_prices(path: str) -> Prices:
    """What GPUs cost, from a file such as config/prices.toml. Raises UsageError naming it."""
    from agent.config import read_prices as read  # 0.1 s, for who gives a file alone

    return read(Path(path))


def _check_workload(options: Options) -> None:
    """What of the requests contradicts itself."""
    recorded = "--trace" if options.trace else "--dataset"
    contradictions = [
        (options.dataset and options.trace, "--dataset and --trace together: requests come from "
         "one of them"),
        (options.trace and (options.rates_rps or options.stages), "--trace and --rate together: a "
         "trace has instants of its own; --speedup makes them come faster"),
        (options.speedups != (1.0,) and not (options.trace and not options.concurrency),
         "--speedup is for the recorded instants of a --trace"),
        (options.own_lengths and options.prefix_tokens, f"{recorded} and --prefix-tokens together: "
         "its prompts are shared as they were recorded"),
        (options.prefixes > 1 and not options.prefix_tokens, "--prefixes without --prefix-tokens: "
         "say how long they are"),
        (options.turns > 1 and options.trace, "--turns and --trace together: a trace holds single "
         "requests"),
        (options.turns > 1 and options.endpoint not in CONVERSING, "--turns sends a conversation: "
         f"it needs --endpoint {' or '.join(CONVERSING)}"),
        (options.think_s and options.turns == 1, "--think-time without --turns: nobody thinks "
         "between the turns of one"),
        (options.mix and options.model, "--mix and --model together: the mix names the models"),
    ]  # fmt: skip
    for wrong, why in contradictions:
        if wrong:
            raise UsageError(why)


def _check_metrics_url(text: str | None) -> None:
    if text is None or text == "none":
        return
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"--metrics-url {text!r} is no address: http://HOST:PORT/metrics, or none")


# --------------------------------------------------------------------------------------- parsing


def parse_agent(text: str) -> tuple[str, str | None]:
    """`http://HOST:PORT?server=NAME` to the agent's base URL and the name. Raises UsageError."""
    try:
        parts = urlsplit(text)
        query = parse_qs(parts.query, keep_blank_values=True)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if "@" in text:
        raise UsageError("--agent: no user or password in the URL: use --agent-token-file")
    names = query.get("server", []) if usable else []
    if not usable or parts.fragment or set(query) - {"server"} or len(names) > 1 or "" in names:
        raise UsageError(
            f"--agent {text[:80]!r} is no address: http://HOST:9477, with ?server=NAME where it "
            "watches several"
        )
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return base, names[0] if names else None


def is_auto(text: str | None) -> bool:
    """Whether the loads are to be searched: --concurrency auto, --rate auto."""
    return text is not None and text.strip().lower() == "auto"


def parse_loads(
    concurrency: str | None, rate: str | None
) -> tuple[tuple[int, ...], tuple[float, ...], Stages | None, Mode | None]:
    """The lists of levels that two options name, or the stages of one, or what is searched."""
    if concurrency and rate:
        raise UsageError("--concurrency and --rate together: a level is either closed or open loop")
    if is_auto(concurrency):
        return (), (), None, "concurrency"
    if is_auto(rate):
        return (), (), None, "rate"
    if rate and "@" in rate:
        return (), (), stages(rate), None
    return (
        parse_concurrency(concurrency) if concurrency else (),
        parse_rates(rate) if rate else (),
        None,
        None,
    )


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,2,4,8` to whole numbers from 1, each once."""
    values = []
    for word in _words(text, "--concurrency"):
        if not is_whole(word) or not 1 <= int(word) <= CONCURRENCY_MAX:
            raise UsageError(
                f"--concurrency {word[:40]!r}: write whole numbers from 1 to {CONCURRENCY_MAX}, "
                "such as 1,4,16,64, or auto"
            )
        values.append(int(word))
    return _once(values, "--concurrency")


def parse_rates(text: str) -> tuple[float, ...]:
    """`0.5,1,2` to requests per second above 0, each once."""
    values = []
    for word in _words(text, "--rate"):
        try:
            value = float(word)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise UsageError(
                f"--rate {word!r}: write requests per second above 0, such as 0.5,1,2, or auto"
            )
        values.append(value)
    return _once(values, "--rate")


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text!r}: an empty place between two commas")
    return words


def _once(values: Sequence[T], option: str) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise UsageError(f"{option}: a level is named twice")
    return tuple(values)


def parse_speedups(text: str) -> tuple[float, ...]:
    """`1,2,4` to factors above 0, each once."""
    values = [parse_number(word) or 0.0 for word in _words(text, "--speedup")]
    if not all(0 < value <= 1e6 for value in values):
        raise UsageError(f"--speedup {text[:40]!r}: write factors above 0, such as 1,2,4")
    return _once(values, "--speedup")


def rates_around(rate_rps: float | None, *, single: bool) -> tuple[float, ...]:
    """What to try where production has so many requests a second."""
    factors = () if not rate_rps else (1.0,) if single else (0.5, 1.0, 1.5, 2.0)
    return tuple(float(f"{factor * (rate_rps or 0):.4g}") for factor in factors)


def parse_processes(text: str) -> int | None:
    """A number from 1, or None for `auto`."""
    if text.strip() == "auto":
        return None
    if not is_whole(text.strip()) or not 1 <= int(text) <= PROCESSES_MAX:
        raise UsageError(f"--processes {text[:40]!r}: write auto, or 1 to {PROCESSES_MAX}")
    return int(text)


def parse_warmup(text: str) -> tuple[int, float]:
    """`20` to (20 requests, 0 s); `10s` to (0, 10 s)."""
    if is_whole(text.strip()):
        return int(text), 0.0
    return 0, parse_duration(text, "--warmup")


def parse_headers(lines: Sequence[str]) -> dict[str, str]:
    """`Name: value` lines to a dict; a value is never shown again in an error."""
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
            raise UsageError(f"--header: write 'Name: value', got a line that begins {name[:20]!r}")
        if any(ord(c) < 32 and c != "\t" for c in value.strip()) or not _encodes(value):
            raise UsageError(f"--header {name.strip()}: a control character in the value")
        if name.strip().lower() in OWN_HEADERS:
            raise UsageError(f"--header {name.strip()}: this one is written by loadgen itself")
        headers[name.strip()] = value.strip()
    return headers


def _encodes(text: str) -> bool:
    """False where the command line had bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def request_headers(lines: Sequence[str], key_file: str | None) -> dict[str, str]:
    """The headers of every request: those asked for, and the key unless one of them carries it."""
    headers = parse_headers(lines)
    key = api_key(key_file)
    if key and not any(name.lower() == "authorization" for name in headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def api_key(path: str | None) -> str | None:
    """The key from `path`, else from OPENAI_API_KEY; None where there is neither."""
    return _secret("key", path, "--api-key-file", "OPENAI_API_KEY")


def agent_token(path: str | None) -> str | None:
    """The token from `path`, else from SERVEFIT_AGENT_TOKEN; None where there is neither."""
    return _secret("token", path, "--agent-token-file", "SERVEFIT_AGENT_TOKEN")


def _secret(what: str, path: str | None, option: str, variable: str) -> str | None:
    if path is None:
        where, value = variable, os.environ.get(variable, "").strip()
        if not value:
            return None
    else:
        where, value = f"{option} {path}", read_text(path, option).strip()
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise UsageError(f"{where}: it must hold the {what} and nothing else")
    return value


def read_text(path: str, option: str) -> str:
    """The text of a file that an option names. Raises UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{option} {path}: this is no text in UTF-8") from error


def parse_fail_on(text: str | None) -> tuple[str, ...]:
    """`slo,invalid,UNDER_SIZED` to its rules; findings in any case of letters."""
    if not text:
        return ()
    known = ("slo", "invalid", *FINDINGS)
    rules = []
    for word in _words(text, "--fail-on"):
        rule = next((name for name in known if name.lower() == word.lower()), None)
        if rule is None:
            near = difflib.get_close_matches(word.lower(), [n.lower() for n in known], 1, 0.0)[0]
            raise UsageError(
                f"--fail-on {word!r}: neither slo, invalid nor a finding; nearest is {near!r}"
            )
        rules.append(rule)
    return tuple(rules)


def make_directory(path: Path, option: str) -> None:
    """Makes a directory and those above it. Raises UsageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from error


def check_writable(path: str | None, option: str) -> None:
    """Raises UsageError where a file cannot be written, before anything is measured."""
    if path is None or path == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{option} {path}: this is a directory; name a file in it")
    parent = file.parent
    if not parent.is_dir():
        raise UsageError(f"{option} {path}: there is no directory {parent}; make it first")
    if not os.access(file if file.exists() else parent, os.W_OK):
        raise UsageError(f"{option} {path}: no permission to write there")
