"""Compiles and runs `truth.c`, the server of exactly known timing, and asks it what it did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("truth.c")
COMPILERS = ("cc", "gcc", "clang")


def compiler() -> str | None:
    """A C compiler of this machine, where there is one that can be of use."""
    if sys.platform != "linux":  # epoll
        return None
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@contextmanager
def compiled() -> Iterator[Path]:
    """The server's program, for as long as the block runs."""
    command = compiler()
    if command is None:
        raise RuntimeError("the ground-truth server needs Linux and a C compiler (cc)")
    with tempfile.TemporaryDirectory(prefix="servefit-bench-") as directory:
        program = Path(directory) / "truth"
        arguments = ["-O2", "-std=gnu11", "-o", str(program), str(SOURCE), "-lm"]
        subprocess.run([command, *arguments], check=True)
        yield program


class Truth:
    """The running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

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
    program: Path, *, ttft_ms: float = 50, itl_ms: float = 10, jitter: float = 0.3,
    stall: bool = False,
) -> Iterator[Truth]:  # fmt: skip
    """Runs the server on a free port. `jitter` 0.3 is ±30 %, evenly spread."""
    command = [
        str(program), f"--ttft-ms={ttft_ms}", f"--itl-ms={itl_ms}", f"--jitter={jitter}",
        *(["--stall"] if stall else []),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Truth(json.loads(process.stdout.readline())["port"])
        finally:
            process.terminate()
