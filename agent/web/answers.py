"""What the addresses of /api/v1 answer, worked out of the store.

Each function runs in a thread, over a `Recall` of its own; what only the running agent knows (its
open minutes, which GPUs are whose) is handed in. Raises UsageError for a question that makes no
sense, NotKnown for what there is none of, StoreError where the store does not answer.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from agent.live import ServerStatus, Status
from agent.minutes import Minute
from agent.model import Sweep, UsageError, encode
from agent.recall import Recall, Series
from agent.sizing.passive import Passive, passive_curve
from agent.sizing.pattern import Pattern, pattern
from agent.sizing.window import COUNTERS, GAUGES, GPU, HISTOGRAMS, Window

# Minutes by the ten thousand are read and reckoned for seconds, beside a server in production.
WINDOW_MAX_S = 35 * 86_400.0
READINGS_SPAN_MAX_S = 3600.0
READINGS_MAX = 500_000  # 40 MB of JSON
_PIECE = 5_000
_SERVER_SERIES = GAUGES | COUNTERS | frozenset(HISTOGRAMS)


class NotKnown(UsageError):
    """There is no such thing: 404."""


class Measured(msgspec.Struct, frozen=True):
    """A stored curve. `by`: why it is taken for the server's."""

    id: int
    started_at: str
    received_unix_s: float
    by: Literal["source", "url", "model"]
    sweep: Sweep


class Curves(msgspec.Struct, frozen=True):
    """`/api/v1/curve`: the newest that was measured, and what production showed by itself."""

    measured: Measured | None
    passive: Passive


# ------------------------------------------------------------------------------------------- whose


class Whose(NamedTuple):
    """The servers that a question is about. `gpus`: their UUIDs, None where they are not known."""

    servers: tuple[ServerStatus, ...]
    gpus: frozenset[str] | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.servers)


def whose(
    status: Status,
    stored: Iterable[Mapping[str, Any]],
    server: str | None,
    service: str | None,
) -> Whose:
    """One server, the servers of a service, or all of the configuration.

    `stored`: `Recall.sources()`; it also knows servers that the configuration no longer does.
    Raises NotKnown.
    """
    known = {
        one["name"]: ServerStatus(one["name"], "", one["service"], gpus=tuple(one["gpus"]))
        for one in stored
    } | {one.name: one for one in status.servers}
    if server is None and service is None:
        chosen = status.servers
    else:
        chosen = tuple(
            one
            for one in known.values()
            if server in (None, one.name) and service in (None, one.service)
        )
        if not chosen:
            raise NotKnown(_unknown(server, service, known.values()))
    gpus = frozenset(uuid for one in chosen for uuid in one.gpus)
    return Whose(chosen, gpus if all(one.gpus for one in chosen) else None)


def _unknown(server: str | None, service: str | None, known: Collection[ServerStatus]) -> str:
    kind, name = ("server", server) if server is not None else ("service", service)
    names = {one.name if kind == "server" else one.service for one in known} - {None}
    near = difflib.get_close_matches(str(name), sorted(map(str, names)), n=1, cutoff=0.0)
    return f"no {kind} {name!r}" + (f", nearest is {near[0]!r}" if near else "")


# ----------------------------------------------------------------------------- pattern and curves


def observed_pattern(
    recall: Recall, about: Whose, start_s: float, end_s: float, open_minutes: Sequence[Minute]
) -> Pattern:
    """What was asked of the servers, and the energy of their GPUs.

    The GPUs of one server among several are nobody's where it is not known which they are.
    """
    everybody = not about.servers
    gpus = about.gpus if about.gpus is not None else (None if everybody else frozenset[str]())
    window = _window(recall, about, start_s, end_s, open_minutes, gpus)
    for source in recall.gpu_sources():
        window.add_all(recall.minutes(source, window.origin_unix_s, end_s, GPU))
    window.add_all(
        _until(one, end_s) for one in open_minutes if one.source not in about.names
    )
    return pattern(window)


def curves(
    recall: Recall, about: Whose, start_s: float, end_s: float, open_minutes: Sequence[Minute]
) -> Curves:
    window = _window(recall, about, start_s, end_s, open_minutes, frozenset())
    return Curves(_measured(recall, about), passive_curve(window))


def _window(
    recall: Recall,
    about: Whose,
    start_s: float,
    end_s: float,
    open_minutes: Sequence[Minute],
    gpus: Collection[str] | None,
) -> Window:
    """The servers' minutes; the store's, and the open ones, which it does not have yet."""
    window = Window(start_s, end_s, servers=about.names, gpus=gpus)
    for name in about.names:
        window.add_all(recall.minutes(name, window.origin_unix_s, end_s, _SERVER_SERIES))
    return window.add_all(one for one in open_minutes if one.source in about.names)
