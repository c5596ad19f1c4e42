"""Samplers: one module per source of readings, all behind the one Protocol below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.model import Reading, ServefitError


class SamplerError(ServefitError):
    """A source did not answer, or not with what it should: one line, without its credentials.

    The next `sample()` may well succeed; whoever samples keeps the line and goes on.
    """


class Sampler(Protocol):
    """One source, asked again and again.

    `sample` returns what the source says now, within a deadline of its own, and raises
    SamplerError where it says nothing; calls never overlap. `close` gives everything back and
    may be called twice.
    """

    @property
    def name(self) -> str: ...

    async def sample(self) -> Sequence[Reading]: ...

    async def close(self) -> None: ...
