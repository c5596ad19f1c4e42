"""`python -m tests.bench.page FILE`: a recorded metrics page whose counters move, on a free port.

It stands for an inference server beside the agent, in a process of its own, so that its cost is
nobody else's. Its first line of output is its URL.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

DOUBLES_IN_S = 5.0  # what was recorded comes again so often: some 700 tokens/s
SWAYING = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc")


class Line(NamedTuple):
    """`text` whole, or what stands before a value that moves as `how` says."""

    text: str
    value: float = 0.0
    how: str = ""  # counter, sway


def lines(page: str) -> list[Line]:
    """The page, with what moves in it told from what does not."""
    kinds: dict[str, str] = {}
    found = []
    for text in page.splitlines():
        if text.startswith("# TYPE "):
            _, _, name, kind = text.split()
            kinds[name] = kind
        start, _, value = text.rpartition(" ")
        name = start.partition("{")[0]
        if text.startswith("#") or not start:
            found.append(Line(text))
        elif name.startswith(SWAYING):
            found.append(Line(start, float(value), "sway"))
        elif _counts(name, kinds):
            found.append(Line(start, float(value), "counter"))
        else:
            found.append(Line(text))
    return found


def _counts(name: str, kinds: dict[str, str]) -> bool:
    family, _, part = name.rpartition("_")
    is_part = part in ("bucket", "sum", "count") and kinds.get(family) in ("histogram", "summary")
    return is_part or kinds.get(name) == "counter"


def moved(page: Sequence[Line], elapsed_s: float) -> bytes:
    """The page some time later. All counters grow by one factor, so that they still agree."""
    factor = 1 + elapsed_s / DOUBLES_IN_S
    sway = 0.75 + 0.25 * math.sin(elapsed_s / 30)
    return "".join(f"{_text(line, factor, sway)}\n" for line in page).encode()


def _text(line: Line, factor: float, sway: float) -> str:
    if not line.how:
        return line.text
    value = line.value * (factor if line.how == "counter" else sway)
    return f"{line.text} {float(math.floor(value)) if line.value.is_integer() else value!r}"


def main() -> None:
    page, began = lines(Path(sys.argv[1]).read_text("utf-8")), time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 256 * 1024  # head and body at once

        def do_GET(self) -> None:
            is_there = self.path == "/metrics"
            body = moved(page, time.monotonic() - began) if is_there else b"not here\n"
            self.send_response(200 if is_there else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
