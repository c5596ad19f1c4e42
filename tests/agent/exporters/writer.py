"""A process that writes points into an outbox and sends them meanwhile, for a test to kill.

`python -m tests.agent.exporters.writer OUTBOX ENDPOINT RUN FIRST LAST BEGIN_UNIX_S` writes the
points FIRST to LAST of a run, one a second of their own time from BEGIN_UNIX_S, as fast as they are
kept; prints the number of each once it is kept; then sends until nothing waits, and ends.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from agent.exporters.otlp import MetricsEncoder
from agent.exporters.outbox import Outbox
from agent.exporters.sender import Sender, signal_url
from tests.agent.exporters.samples import gpus, server


async def write(path: Path, endpoint: str, run: str, first: int, last: int, begin_s: int) -> None:
    outbox = Outbox(path)
    encoder = MetricsEncoder(
        {"host.name": "test", "servefit.run": run}, state=outbox.state("metrics")
    )
    sender = Sender(
        outbox,
        "metrics",
        signal_url(endpoint, "metrics"),
        timeout_s=2.0,
        backoff_s=(0.02, 0.2),
        rng=random.Random(first),
    )
    sending = asyncio.create_task(sender.run())
    for k in range(first, last + 1):
        batches = [server(k, start_unix_s=begin_s - 5), gpus(k)]
        [message] = encoder.encode(batches, lambda at_ns: begin_s * 10**9 + at_ns)
        assert await sender.put(message.body, message.points, encoder.take_state())
        print(k, flush=True)
        await asyncio.sleep(0.002)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    while True:
        pause_s = await sender.turn()
        if pause_s is None:
            break
        await asyncio.sleep(pause_s)
    await sender.close()
    print("dropped", outbox.status().dropped, flush=True)
    outbox.close()


if __name__ == "__main__":
    path, endpoint, run, first, last, begin_s = sys.argv[1:]
    asyncio.run(write(Path(path), endpoint, run, int(first), int(last), int(begin_s)))
