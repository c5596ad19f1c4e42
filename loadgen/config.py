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
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from agent.model import Slo, UsageError
from loadgen.arrival import ARRIVALS
from loadgen.level import Plan

T = TypeVar("T", int, float)

DEFAULT_CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_INPUT_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
DEFAULT_REQUESTS_PER_STREAM = 5
DEFAULT_REQUESTS_MIN = 20
DEFAULT_OPEN_LOOP_S = 30.0
CONCURRENCY_MAX = 100_000
TOKENS_MAX = 10_000_000
SEED_MAX = 2**63 - 1
DURATION_S_MAX = 365 * 86_400.0

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


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """All options of `run` and `sweep`, as numbers."""

    url: str
    model: str | None = None
    endpoint: str = "chat"
    stream: bool = True
    concurrency: tuple[int, ...] = ()
    rates_rps: tuple[float, ...] = ()
    arrival: str = "poisson"
    input_tokens: int = 512
    output_tokens: int = 128
    tokenizer: str | None = None
    reuse_prompts: bool = False
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
    seed: int = 0
    expect_concurrency: float | None = None
    expect_rps: float | None = None
    fail_on: tuple[str, ...] = ()
    otlp_endpoint: str | None = None
    yes: bool = False
    command: str = ""

    def plans(self) -> list[Plan]:
        """The levels to run, in the order asked for; repeats go round the whole list, so that a
        drift of the server shows as a spread and not as a slope of the curve."""
        if self.rates_rps:
            plans = [self._plan(rate_rps=rate) for rate in self.rates_rps]
        else:
            plans = [self._plan(concurrency=n) for n in self.concurrency]
        return plans * self.repeats

    def _plan(self, *, concurrency: int | None = None, rate_rps: float | None = None) -> Plan:
        requests, duration_s = self.requests, self.duration_s
        if requests is None and duration_s is None:
            if concurrency is not None:
                requests = max(DEFAULT_REQUESTS_MIN, DEFAULT_REQUESTS_PER_STREAM * concurrency)
            else:
                duration_s = DEFAULT_OPEN_LOOP_S
        return Plan(
            mode="concurrency" if concurrency is not None else "rate",
            concurrency=concurrency,
            rate_rps=rate_rps,
            arrival=self.arrival,
            requests=requests,
            duration_s=duration_s,
            warmup_requests=self.warmup_requests,
            warmup_s=self.warmup_s,
            timeout_s=self.timeout_s,
            stream=self.stream,
        )


def check(options: Options) -> Options:
    """Raises UsageError for what contradicts itself; returns the options unchanged."""
    if options.concurrency and options.rates_rps:
        raise UsageError("--concurrency and --rate together: a level is either closed or open loop")
    if not options.concurrency and not options.rates_rps:
        raise UsageError("no level asked for: give --concurrency or --rate")
    if options.requests is not None and options.duration_s is not None:
        raise UsageError("--requests and --duration together: one of them ends a level")
    if options.arrival not in ARRIVALS:
        raise UsageError(f"--arrival {options.arrival!r}: choose one of {', '.join(ARRIVALS)}")
    if options.requests is not None and any(n > options.requests for n in options.concurrency):
        raise UsageError(
            f"--requests {options.requests} is fewer than the {max(options.concurrency)} streams "
            "asked for: every stream sends at least one"
        )
    if any(s.metric in ("ttft", "ttfo", "itl", "tpot") for s in options.slo) and not options.stream:
        raise UsageError("--no-stream gives no TTFT or ITL: an --slo on them cannot be judged")
    if "slo" in options.fail_on and not options.slo:
        raise UsageError("--fail-on slo without an --slo would never fail: say which, by --slo")
    for option, demand in (
        ("--expect-concurrency", options.expect_concurrency), ("--expect-rps", options.expect_rps),
    ):  # fmt: skip
        if demand is not None and not math.isfinite(demand):
            raise UsageError(f"{option} {demand}: write a finite number above 0")
    for option, value, low, high in (
        ("--input-tokens", options.input_tokens, 1, TOKENS_MAX),
        ("--output-tokens", options.output_tokens, 1, TOKENS_MAX),
        ("--seed", options.seed, 0, SEED_MAX),
    ):
        if not low <= value <= high:
            raise UsageError(f"{option}: write a whole number from {low} to {high}")
    if options.ca_file is not None and not Path(options.ca_file).is_file():
        raise UsageError(f"--ca-file {options.ca_file}: no such file")
    _check_metrics_url(options.metrics_url)
    return options


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

_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str, option: str) -> float:
    """`30`, `30s`, `500ms`, `2m` or `1h` to seconds, above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _SECONDS:
        raise UsageError(f"{option} {text!r}: write a time such as 30s, 500ms or 2m")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= DURATION_S_MAX:
        raise UsageError(f"{option} {text[:40]!r}: it must be above 0 and at most a year")
    return seconds


def parse_concurrency(text: str) -> tuple[int, ...]:
    """`1,2,4,8` to whole numbers from 1, each once."""
    values = []
    for word in _words(text, "--concurrency"):
        if not _is_whole(word) or not 1 <= int(word) <= CONCURRENCY_MAX:
            raise UsageError(
                f"--concurrency {word[:40]!r}: write whole numbers from 1 to {CONCURRENCY_MAX}, "
                "such as 1,4,16,64"
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
            raise UsageError(f"--rate {word!r}: write requests per second above 0, such as 0.5,1,2")
        values.append(value)
    return _once(values, "--rate")


def _is_whole(word: str) -> bool:
    """Plain digits, and not so many of them that int() refuses."""
    return word.isascii() and word.isdigit() and len(word) <= 18


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text!r}: an empty place between two commas")
    return words


def _once(values: Sequence[T], option: str) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise UsageError(f"{option}: a level is named twice")
    return tuple(values)


def parse_warmup(text: str) -> tuple[int, float]:
    """`20` to (20 requests, 0 s); `10s` to (0, 10 s)."""
    if _is_whole(text.strip()):
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


def api_key(path: str | None) -> str | None:
    """The key from `path`, else from OPENAI_API_KEY; None where there is neither."""
    if path is None:
        where, key = "OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", "").strip()
        if not key:
            return None
    else:
        where, key = f"--api-key-file {path}", read_text(path, "--api-key-file").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{where}: it must hold the key and nothing else")
    return key


def read_text(path: str, option: str) -> str:
    """The text of a file that an option names. Raises UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{option} {path}: this is no text in UTF-8") from error


FINDINGS = (
    "INVALID_MEASUREMENT", "IDLE", "INFEASIBLE_SLO", "UNDER_SIZED", "OVER_SIZED", "OVER_OFF_PEAK",
    "RIGHT_SIZED", "BORDERLINE", "INSUFFICIENT_DATA", "CAPACITY_ONLY",
)  # fmt: skip


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
