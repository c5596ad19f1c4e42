"""Sources: a sampler each, asked at its interval; what it says goes to the store and the exporters.

Nothing here knows what is sampled. A source that fails, hangs or lies is its own trouble: it says
so once when that begins and once when it ends, and all others go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from agent.exporters import Batch
from agent.history import History
from agent.minutes import Labels, Minutes
from agent.model import Reading, StoreError
from agent.recall import Recall
from agent.samplers import Sampler
from agent.samplers.watched import Watched

log = logging.getLogger("servefit")

SHOWN_S_MIN = 30.0  # a reading is exported so long after it was taken, or for three intervals
AWAY_SAMPLES = 3  # so many failures in a row are worth a mark in the store
GPU, HOST, AGENT = "gpu", "host", "agent"  # sources that are no servers


def boot() -> str:
    """What tells this boot's monotonic clock from another's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # by when it was, which a step of the wall clock changes
        return f"{(time.time() - time.monotonic()) / 60:.0f}"


class Source:
    """One source under `name`, from its sampler to the store.

    `labels` tells what goes to its exported series; `fingerprint`, what its server is, as pairs;
    `heard` is given each sample. `keeps_raw`: whether single readings are kept, besides minutes.
    """

    def __init__(
        self,
        name: str,
        sampler: Sampler,
        interval_s: float,
        history: History,
        *,
        labels: Callable[[], Labels] = tuple,
        fingerprint: Callable[[], Labels] = tuple,
        heard: Callable[[Sequence[Reading]], None] | None = None,
        keeps_raw: bool = True,
    ) -> None:
        self.name = name
        self.sampler = sampler
        self.interval_s = interval_s
        self.watched = Watched(sampler, name=name)
        self.minutes = Minutes(name, interval_s=interval_s)
        self._history = history
        self._labels = labels
        self._fingerprint_of = fingerprint
        self._heard = heard
        self._keeps_raw = keeps_raw
        self._boot = boot()
        self._newest: dict[tuple[str, Labels], Reading] = {}
        self._fingerprint: tuple[Labels, str | None] = ((), None)
        self._failures = 0
        self._is_kept = False
        self.defects = 0

    def go_on(self) -> None:
        """Takes up the minutes where an earlier agent left them, if the store tells it."""
        try:
            with Recall(self._history.path) as recall:
                dumped = recall.source_state(self.name)
        except StoreError:
            return
        if dumped is not None:
            self.minutes.load(dumped, self._boot)

    async def run(self) -> None:
        """Samples until it is cancelled."""
        while True:
            try:
                await self.turn()
            except Exception:  # a defect of ours in one source is no reason to stop the others
                self.defects += 1
                log.exception("%s: a defect of servefit", self.name)
            await asyncio.sleep(self.watched.pause_s(self.interval_s))

    async def turn(self) -> None:
        """One sample, wherever it belongs."""
        readings = await self.watched.sample()
        self._tell_health()
        at_ns = max((one.at_ns for one in readings), default=time.monotonic_ns())
        at_unix_s = self._history.timeline.unix_s(at_ns)
        done = self.minutes.add(readings, at_unix_s, at_ns, fingerprint=self._known_as())
        if readings and self._keeps_raw:
            self._history.add_readings(self.name, readings)
        if done or (readings and not self._is_kept):
            self._is_kept = True  # from the first sample on a death loses no count
            self._history.add_minutes(self.name, done, self.minutes.dump(self._boot))
            self._forget(at_ns)
        self._newest.update(((one.name, one.labels), one) for one in readings)
        if self._heard is not None and readings:
            self._heard(readings)

    def batch(self) -> Batch:
        """What it said last; what it has not said for a while is left out."""
        since_ns = time.monotonic_ns() - self._shown_ns()
        newest = [one for one in self._newest.values() if one.at_ns >= since_ns]
        return Batch(self.name, newest, self._labels())

    def value(self, name: str) -> float | None:
        """The newest value of a series without labels, while it is shown."""
        one = self._newest.get((name, ()))
        is_fresh = one is not None and one.at_ns >= time.monotonic_ns() - self._shown_ns()
        return one.value if one is not None and is_fresh else None

    def keep(self) -> None:
        """Hands over what the next agent goes on from."""
        self._history.add_minutes(self.name, [], self.minutes.dump(self._boot))

    async def close(self) -> None:
        self.keep()
        await self.watched.close()

    def _shown_ns(self) -> int:
        return int(max(SHOWN_S_MIN, 3 * self.interval_s) * 1e9)

    def _forget(self, at_ns: int) -> None:
        """A series that is gone, a removed GPU's say, takes no memory for ever."""
        since_ns = at_ns - self._shown_ns()
        self._newest = {key: one for key, one in self._newest.items() if one.at_ns >= since_ns}

    def _known_as(self) -> str | None:
        """The fingerprint as one word; the store hears of it when it changes."""
        pairs = self._fingerprint_of()
        if not pairs:
            return None
        if pairs != self._fingerprint[0]:
            word = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
            self._fingerprint = (pairs, word)
            self._history.add_fingerprint(self.name, word, dict(pairs))
        return self._fingerprint[1]

    def _tell_health(self) -> None:
        """One line when a source has gone, one when it is back."""
        status = self.watched.status()
        was_away = self._failures >= AWAY_SAMPLES
        self._failures = 0 if status.ok else self._failures + 1
        if self._failures == AWAY_SAMPLES:
            log.warning("%s: %s", self.name, status.line)
            self._history.add_event("source_away", status.line or "", source=self.name)
        elif was_away and status.ok:
            log.info("%s: is back", self.name)
            self._history.add_event("source_back", "it answers again", source=self.name)


class Group:
    """Sources that run, each in a task of its own."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Source, asyncio.Task[None]]] = {}

    def __iter__(self) -> Iterator[Source]:
        return iter([source for source, _ in self._tasks.values()])

    def get(self, name: str) -> Source | None:
        found = self._tasks.get(name)
        return found[0] if found else None

    def start(self, source: Source) -> None:
        source.go_on()
        task = asyncio.create_task(source.run(), name=source.name)
        self._tasks[source.name] = (source, task)

    async def halt(self) -> None:
        """Samples no more; what was sampled last can still be asked."""
        tasks = [task for _, task in self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, names: Iterable[str] | None = None) -> None:
        """Ends some sources, or all; what each goes on from is handed over."""
        chosen = list(self._tasks if names is None else names)
        stopped = [self._tasks.pop(name) for name in chosen]
        for _, task in stopped:
            task.cancel()
        await asyncio.gather(*(task for _, task in stopped), return_exceptions=True)
        await asyncio.gather(*(source.close() for source, _ in stopped), return_exceptions=True)


class Own:
    """The sampler of the agent itself: whatever `ask` says."""

    name = AGENT

    def __init__(self, ask: Callable[[], Sequence[Reading]]) -> None:
        self._ask = ask

    async def sample(self) -> Sequence[Reading]:
        return self._ask()

    async def close(self) -> None:
        return


def joules(readings: Iterable[Reading]) -> Mapping[str, float]:
    """The energy counters among readings, by GPU."""
    return {
        dict(one.labels).get("gpu", ""): one.value for one in readings if one.name == "gpu_energy_j"
    }
