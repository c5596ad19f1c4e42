"""A sampler that cannot fail, and says how it does: what keeps one bad source from all others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from agent.model import Reading
from agent.samplers import Sampler, SamplerError
from agent.words import defect

# A source is busy with us for at most a third of the time: after a slow answer we wait twice as
# long as it took.
REST_PER_WORK = 2.0


def pause_s(interval_s: float, took_s: float) -> float:
    """How long to leave a source alone that took so long to answer."""
    return max(interval_s - took_s, REST_PER_WORK * took_s)


class SamplerStatus(msgspec.Struct, frozen=True):
    """How a sampler does; the first five fields are those of /api/v1/status."""

    name: str
    ok: bool  # the last sample came
    age_s: float | None  # since the last one that came; null where none ever did
    duration_s: float | None  # of the last one, come or not
    errors: int
    line: str | None  # why the last one did not come


class Watched:
    """One sampler with a record of how it does, under `name` (the sampler's own by default).

    `sample()` never raises and never overlaps itself: a call that finds one under way gives
    nothing. `deadline_s`, where given, bounds the sampler from outside; its own is the better
    one, because it knows what it waits for. `clock` is time.monotonic_ns or a test's.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        name: str | None = None,
        deadline_s: float | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.sampler = sampler
        self.name = name or sampler.name
        self._deadline_s = deadline_s
        self._clock = clock
        self._labels = (("sampler", self.name),)
        self._busy = False
        self._ok = False
        self._ok_at_ns: int | None = None
        self._duration_s: float | None = None
        self._errors = 0
        self._line: str | None = None

    async def sample(self) -> list[Reading]:
        """The sampler's readings; none where it failed."""
        if self._busy:
            return []
        self._busy = True
        began_ns = self._clock()
        try:
            readings = list(await self._within_deadline())
        except SamplerError as error:
            self._failed(began_ns, str(error))
        except Exception as error:  # a defect of one sampler is no reason to stop the others
            self._failed(began_ns, defect(error))
        else:
            self._ok, self._line, self._ok_at_ns = True, None, self._clock()
            self._duration_s = (self._ok_at_ns - began_ns) / 1e9
            return readings
        finally:
            self._busy = False
        return []

    async def _within_deadline(self) -> Sequence[Reading]:
        if self._deadline_s is None:
            return await self.sampler.sample()
        try:
            return await asyncio.wait_for(self.sampler.sample(), self._deadline_s)
        except TimeoutError:
            raise SamplerError(f"nothing within {self._deadline_s:g} s") from None

    def _failed(self, began_ns: int, line: str) -> None:
        self._ok, self._line = False, line
        self._errors += 1
        self._duration_s = (self._clock() - began_ns) / 1e9

    def status(self) -> SamplerStatus:
        return SamplerStatus(
            name=self.name,
            ok=self._ok,
            age_s=self._age_s(),
            duration_s=self._duration_s,
            errors=self._errors,
            line=self._line,
        )

    def pause_s(self, interval_s: float) -> float:
        """How long to wait for the next sample: a slow source is asked less often."""
        return pause_s(interval_s, self._duration_s or 0.0)

    async def close(self) -> None:
        """Closes the sampler; one that cannot be closed is left."""
        try:
            await self.sampler.close()
        except Exception as error:
            self._line = defect(error)

    def _age_s(self) -> float | None:
        return None if self._ok_at_ns is None else (self._clock() - self._ok_at_ns) / 1e9

    def record(self) -> list[Reading]:
        """How it does, as the `sampler_*` readings."""
        values: dict[str, float | None] = {
            "sampler_ok": float(self._ok),
            "sampler_duration_s": self._duration_s,
            "sampler_age_s": self._age_s(),
            "sampler_errors_total": self._errors,
        }
        at_ns = self._clock()
        return [
            Reading(at_ns, name, value, self._labels)
            for name, value in values.items()
            if value is not None
        ]
