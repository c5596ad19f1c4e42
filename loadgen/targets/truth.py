"""A server of exactly known timing, in a process of its own, and what it says it really did.

`truth.c` where it can be compiled: one thread that spends 10 µs a token. Elsewhere
`truth_server.py`, the same addresses and the same summary in Python, several times as slow. Either
says how late it was itself (`own_lag_ms`), and `Truth.kind` which one it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loadgen.targets.process import StartError, announced, running

Kind = Literal["c", "python"]

SOURCE = Path(__file__).with_name("truth.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-std=gnu11")
COMPILE_TIMEOUT_S = 60.0


def compiler() -> str | None:
    """A C compiler of this machine, where there is one that can be of use."""
    if sys.platform != "linux":  # epoll
        return None
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def program() -> Path | None:
    """The compiled server, from the user's cache directory; None where it cannot be made.

    A cache directory may be shared by machines of several kinds, so the name has the source's and
    the machine's.
    """
    from platformdirs import user_cache_path

    source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = user_cache_path("servefit", appauthor=False)
    made = folder / f"truth-{source}-{platform.machine()}"
    if made.exists():
        return made
    command = compiler()
    return made if command is not None and _compile(command, made) else None


def _compile(command: str, made: Path) -> bool:
    """True where it worked. Written beside its place and moved, as two may do this at once."""
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f"{made.name}.", dir=made.parent)
        os.close(handle)
    except OSError:
        return False
    try:
        subprocess.run(
            [command, *FLAGS, "-o", part, str(SOURCE), "-lm"],
            stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S,
        )  # fmt: skip
        os.chmod(part, 0o755)
        os.replace(part, made)
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        with suppress(OSError):
            os.unlink(part)
    return True


class Truth:
    """The running server."""

    def __init__(self, url: str, kind: Kind) -> None:
        self.url = url
        self.kind = kind

    def reset(self) -> None:
        self._ask("POST", "/reset")

    def summary(self, *, skip: int = 0, rate: float = 0.0) -> dict[str, Any]:
        """What it did since the reset, without the first `skip` requests (probes, warm-up).

        `rate` is what an open loop of constant gaps was asked to send: `late_ms` is against it.
        """
        return self._ask("GET", f"/truth?skip={skip}&rate={rate:g}")

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, method=method)
        # A proxy of the environment has no business between us and our own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer


@contextmanager
def serving(
    *, ttft_ms: float = 50, itl_ms: float = 10, jitter: float = 0.3, stall: bool = False,
    kind: Kind | None = None,
) -> Iterator[Truth]:  # fmt: skip
    """Runs the server on a free port. `jitter` 0.3 is ±30 %, evenly spread; `stall` lets it send
    nothing for 300 ms of every second. `kind` None takes the compiled one if it can be had.

    Raises TargetError where it does not start.
    """
    options = (f"--ttft-ms={ttft_ms}", f"--itl-ms={itl_ms}", f"--jitter={jitter}",
               *(("--stall",) if stall else ()))  # fmt: skip
    with ExitStack() as stack:
        yield _started(stack, options, kind)


def _started(stack: ExitStack, options: Sequence[str], kind: Kind | None) -> Truth:
    if kind != "python" and (made := program()) is not None:
        try:
            return _enter(stack, [str(made), *options], "c")
        except StartError:
            if kind == "c":
                raise
    if kind == "c":
        raise StartError("the server of known timing needs Linux and a C compiler (cc)", None, "")
    return _enter(stack, [sys.executable, "-m", "loadgen.targets.truth_server", *options], "python")


def _enter(stack: ExitStack, argv: Sequence[str], kind: Kind) -> Truth:
    server = stack.enter_context(running(argv, ready=announced, name="the server of known timing"))
    return Truth(server.url, kind)
