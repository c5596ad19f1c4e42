"""`--agent`: what a remote agent saw of each level, and the finished curve handed to it.

The agent stands beside the server and its GPUs and samples them always; a level takes from it what
this machine cannot see. It is asked before the first level, between levels and at the end, never
while a level runs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl as tls
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import aiohttp
import msgspec
from yarl import URL

from agent.join import GPU_SERIES, SERVER_SERIES
from agent.model import Reading, Sweep, TargetError, TargetGpu, UsageError, encode
from loadgen.config import parse_agent

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

EXCHANGES = 3  # of which the quickest tells the clocks' difference
EXCHANGE_S = 15.0  # an agent gives up reading its store after 10
PATIENCE_S = 12.0  # for a sample from after a level's end: two of a server's usual intervals
HURRY_S = 2.0  # the same once the user wants an end
POLL_S = 0.5
MARGIN_S = 15.0  # before a level: its first sample lies at most an interval before its start
PIECE_S = 600.0  # of readings in one answer
AHEAD_S = 1.0  # the newest sample may be newer than our reckoning of the agent's clock
JUMP_S = 1.0  # more than two clocks drift apart in a level
ANSWER_BYTES_MAX = 64 * 1024 * 1024  # an agent's own bound is 40 MB
NAMES_SHOWN = 5

Instant = Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # unix, s
Row = tuple[Instant, str, dict[str, str], float | None]  # null: no number


class AgentError(TargetError):
    """The agent did not answer, or not as one: one line, without the token."""


class Server(msgspec.Struct, frozen=True):
    """An inference server as the agent knows it."""

    name: str
    url: str = ""
    model: str | None = None
    engine: str | None = None
    gpus: tuple[str, ...] = ()  # UUIDs; none: it is not known which


class _Gpu(msgspec.Struct, frozen=True):
    uuid: str
    name: str
    memory_total_bytes: int | None = None


class _Status(msgspec.Struct, frozen=True):
    now_unix_s: Instant
    servers: tuple[Server, ...]
    gpus: tuple[_Gpu, ...]


class _Readings(msgspec.Struct, frozen=True):
    readings: list[Row]


class _Taken(msgspec.Struct, frozen=True):
    id: int


class Agent:
    """A running agent. After `meet` it is known which of its servers is the target.

    `notes` are of the newest level, a line each.
    """

    def __init__(
        self, where: str, *, token: str | None = None, ssl: tls.SSLContext | None = None
    ) -> None:
        """`where`: as `--agent` takes it. Raises UsageError."""
        self.url, self._named = parse_agent(where)
        self.server = Server("")
        self.known_by = ""  # why this server, where that could be doubted
        self.gpus: list[TargetGpu] = []
        self.gives_server = False  # whether the server's series are taken from it, too
        self.notes: list[str] = []
        self._headers = {"Accept-Encoding": "identity"}  # so that the bound on its size holds
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._ssl = ssl
        self._ahead_ns = 0  # its wall clock − our monotonic clock

    # -------------------------------------------------------------------------------- before

    async def meet(self, target_url: str, model: str) -> None:
        """Finds the target among its servers, and the target's GPUs.

        Raises AgentError where it is no agent, UsageError where no server of it is the target.
        """
        async with self._session() as session:
            status = await self._look(session)
        self.server, self.known_by = choose(
            status.servers, named=self._named, target_url=target_url, model=model, agent=self.url
        )
        mine = set(self.server.gpus) or {gpu.uuid for gpu in status.gpus}
        self.gpus = [
            TargetGpu(gpu.name, gpu.uuid, gpu.memory_total_bytes)
            for gpu in status.gpus
            if gpu.uuid in mine
        ]

    async def _look(self, session: aiohttp.ClientSession) -> _Status:
        """Its status, and its clock: read half-way through the quickest of some exchanges."""
        quickest_ns = None
        for _ in range(EXCHANGES):
            began_ns = time.monotonic_ns()
            status = await self._get(session, "status", _Status, {})
            took_ns = time.monotonic_ns() - began_ns
            if quickest_ns is None or took_ns < quickest_ns:
                quickest_ns = took_ns
                self._ahead_ns = round(status.now_unix_s * 1e9) - (began_ns + took_ns // 2)
        return status

    # ------------------------------------------------------------------------------ each level

    async def sample(self) -> list[Reading]:
        """What it saw of the server last, in order of time. Raises AgentError."""
        now_ns = time.monotonic_ns()
        async with self._session() as session:
            return await self._between(session, now_ns - _ns(PATIENCE_S), now_ns + _ns(AHEAD_S))

    async def readings(
        self, start_ns: int, end_ns: int, hurry: Callable[[], bool]
    ) -> list[Reading]:
        """What it saw from just before a level to just after it, by our monotonic clock.

        Waits until it has sampled beyond the level's end; less long once `hurry` says so. What
        fails is in `notes`, for it never ends a measurement.
        """
        self.notes = []
        if not self._wanted():
            return []
        try:
            async with self._session() as session:
                await self._follow_clock(session)
                await self._sampled_beyond(session, end_ns, hurry)
                until_ns = time.monotonic_ns() + _ns(AHEAD_S)
                return await self._between(session, start_ns - _ns(MARGIN_S), until_ns)
        except AgentError as error:
            self.notes = [f"nothing of the agent in this level: {error}"]
            return []

    async def _follow_clock(self, session: aiohttp.ClientSession) -> None:
        """Raises AgentError where a clock was set: the level's instants are not comparable."""
        before_ns = self._ahead_ns
        await self._look(session)
        moved_s = (self._ahead_ns - before_ns) / 1e9
        if abs(moved_s) > JUMP_S:
            raise AgentError(f"its clock and ours moved {moved_s:+.1f} s against each other")

    async def _sampled_beyond(
        self, session: aiohttp.ClientSession, end_ns: int, hurry: Callable[[], bool]
    ) -> None:
        began = time.monotonic()
        while True:
            newest = await self._between(session, end_ns, time.monotonic_ns() + _ns(AHEAD_S))
            missing = self._wanted() - {
                "GPUs" if one.name in GPU_SERIES else "server" for one in newest
            }
            if not missing:
                return
            if time.monotonic() - began > (HURRY_S if hurry() else PATIENCE_S):
                self.notes.append(
                    f"the agent has no sample of the {' and the '.join(sorted(missing))} from after"
                    " the level's end: what it saw of the level may end too early"
                )
                return
            await asyncio.sleep(POLL_S)

    async def _between(
        self, session: aiohttp.ClientSession, start_ns: int, end_ns: int
    ) -> list[Reading]:
        """Readings of the target and its GPUs that a level is made of, in order of time."""
        found: list[Reading] = []
        while start_ns < end_ns:
            until_ns = min(start_ns + _ns(PIECE_S), end_ns)
            query = {  # a little more on both sides: what is asked for is rounded to ms
                "server": self.server.name,
                "from": f"{(start_ns + self._ahead_ns) / 1e9 - 0.001:.3f}",
                "to": f"{(until_ns + self._ahead_ns) / 1e9 + 0.001:.3f}",
            }
            answer = await self._get(session, "readings", _Readings, query)
            for unix_s, name, labels, value in answer.readings:
                at_ns = round(unix_s * 1e9) - self._ahead_ns
                inside = start_ns <= at_ns < until_ns
                if inside and value is not None and self._wants(name, labels):
                    found.append(Reading(at_ns, name, value, tuple(sorted(labels.items()))))
            start_ns = until_ns
        return sorted(found, key=lambda one: one.at_ns)

    def _wanted(self) -> set[str]:
        return {
            what for what, there in (("GPUs", self.gpus), ("server", self.gives_server)) if there
        }

    def _wants(self, name: str, labels: Mapping[str, str]) -> bool:
        if name in GPU_SERIES:
            return any(gpu.uuid == labels.get("gpu") for gpu in self.gpus)
        return self.gives_server and name in SERVER_SERIES

    # ------------------------------------------------------------------------------ at the end

    async def hand_over(self, sweep: Sweep) -> None:
        """Gives it the finished curve. Raises AgentError."""
        async with self._session() as session:
            data = await self._exchange(
                session, "curve", {"server": self.server.name}, body=encode(sweep)
            )
        self._decoded("curve", data, _Taken)

    # ------------------------------------------------------------------------------ exchanges

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1, ssl=self._ssl or True),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=EXCHANGE_S),
            auto_decompress=False,
        )

    async def _get(
        self, session: aiohttp.ClientSession, page: str, kind: type[T], query: Mapping[str, str]
    ) -> T:
        return self._decoded(page, await self._exchange(session, page, query), kind)

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        page: str,
        query: Mapping[str, str],
        body: bytes | None = None,
    ) -> bytes:
        """The answer to a GET, or to a POST of JSON. Raises AgentError."""
        url = self._page(page)
        method, headers = ("GET", {}) if body is None else ("POST", _JSON)
        try:
            async with session.request(
                method, url, params=query, data=body, headers=headers, allow_redirects=False
            ) as reply:
                data = await _bounded(reply)
        except TimeoutError as error:
            raise AgentError(f"{url}: no answer within {EXCHANGE_S:.0f} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise AgentError(f"{url}: {_cause(error)}") from error
        if reply.status not in (200, 201):
            raise AgentError(f"{url} answered {reply.status}{self._refusal(reply.status, data)}")
        return data

    def _decoded(self, page: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (ValueError, RecursionError) as error:
            what = "HTML" if data.lstrip()[:1] == b"<" else "something else than an agent does"
            raise AgentError(
                f"{self._page(page)} answers {what}: check the host and port of --agent"
            ) from error

    def _refusal(self, status: int, data: bytes) -> str:
        said = f" ({_said(data)})" if _said(data) else ""
        if status == 401 and "Authorization" in self._headers:
            return f"{said}: this token is not the agent's; see its token_file"
        if status == 401:
            return f"{said}: give its token by --agent-token-file or SERVEFIT_AGENT_TOKEN"
        if 300 <= status < 400:
            return ", a redirect, which is not followed: give the address it leads to as --agent"
        if status == 404 and not said:
            return ": there is no agent, or an older one; check the host and port of --agent"
        return said

    def _page(self, page: str) -> str:
        return f"{self.url}/api/v1/{page}"


_JSON = {"Content-Type": "application/json"}


async def _bounded(reply: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in reply.content.iter_chunked(64 * 1024):
        data += piece
        if len(data) > ANSWER_BYTES_MAX:
            raise ValueError(f"more than {ANSWER_BYTES_MAX} bytes, which is no agent's answer")
    return bytes(data)


def _cause(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its TLS certificate is not trusted; --ca-file names who signed it"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno
        why = os.strerror(code).lower() if code and code > 0 else str(error.os_error)
        return f"{why}; is the agent running there?"
    return str(error) or type(error).__name__


def _said(data: bytes) -> str:
    """The line of an error answer; empty where there is none."""

    class Refusal(msgspec.Struct):
        error: str

    try:
        return msgspec.json.decode(data, type=Refusal).error[:200]
    except (ValueError, RecursionError):
        return ""


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


# ----------------------------------------------------------------------------- which of its servers


def choose(
    servers: Sequence[Server], *, named: str | None, target_url: str, model: str, agent: str
) -> tuple[Server, str]:
    """The agent's server that is the target, and why it is taken for it, where that can be doubted.

    By its name, where one is given; else at the target's address; else the only one; else the only
    one with the target's model. Raises UsageError that names those it knows.
    """
    if not servers:
        raise UsageError(
            f"the agent {agent} watches no server: name the target's in a [[server]] of its "
            "configuration"
        )
    if named is not None:
        found = [one for one in servers if one.name == named]
        if not found:
            raise UsageError(f"the agent {agent} knows no server {named!r}: {_names(servers)}")
        return found[0], ""
    here = _place(target_url, agent)
    for found, why in (
        ([one for one in servers if _place(one.url, agent) == here], ""),
        (list(servers), "the only server that it watches"),
        ([one for one in servers if one.model == model], "the only one with this model"),
    ):
        if len(found) == 1:
            return found[0], why
    raise UsageError(
        f"which server of the agent {agent} is {target_url}? Add ?server=NAME to --agent: "
        f"{_names(servers)}"
    )


def _place(url: str, agent: str) -> tuple[str | None, int | None]:
    """Host and port as seen from here: what is local to the agent is on its machine."""
    try:
        place, beside = URL(url), URL(agent)
        host = beside.host if _is_loopback(place.host) else place.host
        return "localhost" if _is_loopback(host) else host, place.port
    except ValueError:
        return None, None  # the agent's configuration has something else there


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def _names(servers: Sequence[Server]) -> str:
    shown = [f"{one.name[:60]} ({one.url[:100]})" for one in servers[:NAMES_SHOWN]]
    return ", ".join(shown) + (", …" if len(servers) > NAMES_SHOWN else "")
