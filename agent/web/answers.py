"""What the addresses of /api/v1 answer, worked out of the store.

Each function runs in a thread, over a `Recall` of its own; what only the running agent knows is
handed in with `Now`. Raises UsageError for a question that makes no
sense, NotKnown for what there is none of, StoreError where the store does not answer.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from agent.live import ServerStatus
from agent.minutes import Minute
from agent.model import Sweep, UsageError, encode
from agent.recall import Recall, Series
from agent.sizing.passive import Passive, passive_curve
from agent.sizing.pattern import Pattern, pattern
from agent.sizing.window import COUNTERS, GAUGES, GPU, HISTOGRAMS, Window
from agent.when import parse_instant_s, parse_span_s

# Minutes by the ten thousand are read and reckoned for seconds, beside a server in production.
WINDOW_MAX_S = 35 * 86_400.0
READINGS_SPAN_MAX_S = 3600.0
READINGS_MAX = 500_000  # 40 MB of JSON
_PIECE = 5_000
By = Literal["source", "url", "model"]
_SERVER_SERIES = GAUGES | COUNTERS | frozenset(HISTOGRAMS)


class NotKnown(UsageError):
    """There is no such thing: 404."""


class Measured(msgspec.Struct, frozen=True):
    """A stored curve. `by`: why it is taken for the server's."""

    id: int
    started_at: str
    received_unix_s: float
    by: By
    sweep: Sweep


class Curves(msgspec.Struct, frozen=True):
    """`/api/v1/curve`: the newest that was measured, and what production showed by itself."""

    measured: Measured | None
    passive: Passive


class Now(NamedTuple):
    """What the running agent alone knows, at one moment."""

    unix_s: float
    servers: Sequence[ServerStatus]
    intervals_s: Mapping[str, float]  # how often each server is sampled
    newest_unix_s: Mapping[str, float]  # when each source was sampled last
    open_minutes: Sequence[Minute]


class Asked(NamedTuple):
    """Whom a question is about: a server, the servers of a service, or all that are configured."""

    server: str | None = None
    service: str | None = None

    @property
