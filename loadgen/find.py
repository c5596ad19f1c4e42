"""Which inference server runs on this machine, where nobody said.

Looks at the usual ports of the loopback addresses and nowhere else, at all of them at once, and
asks each for the pages that any of these servers gives to anybody: nothing is generated.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from agent.model import TargetError, UsageError
from agent.samplers import dialects

if TYPE_CHECKING:
    import aiohttp

HOSTS = ("127.0.0.1", "[::1]")
LOOK_S = 1.0  # for all of it: a server that is up answers these pages within milliseconds
PAGE_BYTES_MAX = 4 * 2**20  # vLLM's metrics page has 60 kB
VERSION_LENGTH_MAX = 40


class Engine(NamedTuple):
    """How one server tells itself from the others, which all speak the same API."""

    name: str
    port: int  # where it listens unless it was told otherwise
    owner: str | None  # `owned_by` of its models; None: it writes no name there, its page tells
    page: str  # gives its version …
    member: str  # … in this member


# From their sources: vLLM and SGLang `protocol.py`, TGI `router/src/server.rs`, llama.cpp
# `tools/server`, Ollama `openai/openai.go`; LM Studio as it answers.
ENGINES = (
    Engine("vllm", 8000, "vllm", "/version", "version"),
    Engine("sglang", 30000, "sglang", "/get_server_info", "version"),
    Engine("tgi", 8080, None, "/info", "version"),
    Engine("llama.cpp", 8080, "llamacpp", "/props", "build_info"),
    Engine("lm-studio", 1234, "organization_owner", "", ""),
    Engine("ollama", 11434, None, "/api/version", "version"),
    Engine("servefit-sim", 8000, "servefit-sim", "/version", "version"),
)
PORTS = tuple(dict.fromkeys(engine.port for engine in ENGINES))


class Found(msgspec.Struct, frozen=True):
    """What answers at one address. It can be measured unless there is a `problem`."""

    url: str
    engine: str | None = None
    version: str | None = None
    models: tuple[str, ...] = ()
    problem: str = ""

    def line(self) -> str:
        """`vllm 0.32.0 with model tiny on http://127.0.0.1:8000`"""
        name = " ".join(part for part in (self.engine or "a server", self.version) if part)
        more = f" (and {len(self.models) - 1} more)" if len(self.models) > 1 else ""
        return f"{name} with model {self.models[0]}{more} on {self.url}"


async def look(headers: Mapping[str, str], ports: Sequence[int] = PORTS) -> list[Found]:
    """What answers on `ports` of this machine's loopback addresses, within `LOOK_S`.

    `headers` (the key) are shown only to a server that asked for a key. One server on both address
    families is told once, by its IPv4 address.
    """
    import aiohttp

    places = [f"http://{host}:{port}" for port in ports for host in HOSTS]
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(_look_at(session, url, headers) for url in places))
    found = [one for one in answers if one is not None]
    same: dict[Any, Found] = {}
    for one in found:
        port = one.url.rpartition(":")[2]
        same.setdefault((port, one.engine, one.version, one.models, one.problem), one)
    return list(same.values())


async def _look_at(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]
) -> Found | None:
    """None where nobody listens."""
    import aiohttp

    deadline = asyncio.get_running_loop().time() + LOOK_S
    try:
        async with asyncio.timeout_at(deadline):
            status, body = await _get(session, url + "/v1/models", {})
            shown = headers if status in (401, 403) else {}
            if shown:
                status, body = await _get(session, url + "/v1/models", shown)
    except TimeoutError:
        return Found(url, problem=f"takes connections and gave no answer in {LOOK_S:g} s")
    except aiohttp.ClientConnectorError:
        return None
    except (aiohttp.ClientError, OSError):
        status, body, shown = 0, b"", {}
    if status in (401, 403):
        how = "refuses this key" if headers else "asks for a key"
        return Found(url, problem=f"{how}: --api-key-file or OPENAI_API_KEY")
    models = _models(body) if status == 200 else None
    if models is None:
        return Found(url, problem="answers, but not as an OpenAI-compatible API")
    if not models:
        return Found(url, problem="serves no model yet: load one")
    names = tuple(str(model["id"]) for model in models)
    engine, version = _by_owner(models[0].get("owned_by")), None
    with suppress(TimeoutError, aiohttp.ClientError, OSError):  # then it is only not known
        async with asyncio.timeout_at(deadline):
            if engine is None:
                return Found(url, *await _by_pages(session, url, shown), names)
            version = await _version(session, url, shown, engine)
    return Found(url, engine.name if engine else None, version, names)


def _by_owner(owner: object) -> Engine | None:
    return next((engine for engine in ENGINES if engine.owner and engine.owner == owner), None)


async def _by_pages(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """Engine and version, by a page that only one engine has, else by the names of its metrics."""
    for engine in ENGINES:
        if engine.owner is None and (version := await _version(session, url, headers, engine)):
            return engine.name, version
    status, page = await _get(session, url + "/metrics", headers)
    dialect = dialects.detect(page) if status == 200 else None
    return (dialect.name if dialect else None), None


async def _version(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], engine: Engine
) -> str | None:
    if not engine.page:
        return None
    status, body = await _get(session, url + engine.page, headers)
    try:
        value = msgspec.json.decode(body)[engine.member] if status == 200 else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    if not isinstance(value, str) or not value:
        return None
    return value.removeprefix(f"{engine.name} ")[:VERSION_LENGTH_MAX]


async def _get(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    body = b""
    async with session.get(url, headers=headers, allow_redirects=False) as reply:
        async for chunk in reply.content.iter_any():
            body += chunk
            if len(body) > PAGE_BYTES_MAX:
                break
        return reply.status, body


def _models(body: bytes) -> list[dict[str, Any]] | None:
    """The entries of `/v1/models`, models for embeddings last; None where this is no such page.

    Ollama and LM Studio list whatever was downloaded, in no order that tells what it is for.
    """
    try:
        entries = [entry for entry in msgspec.json.decode(body)["data"] if entry["id"]]
        return sorted(entries, key=lambda entry: "embed" in str(entry["id"]).lower())
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


# --------------------------------------------------------------------------------------- choosing


def usable(found: Sequence[Found]) -> list[Found]:
    return [one for one in found if not one.problem]


def the_one(found: Sequence[Found], command: str) -> Found:
    """The server to measure by `command`, where there is no doubt about it.

    Raises UsageError with the commands to choose from where several can be measured, for measuring
    is not harmless to whom it was not meant for; TargetError where none can.
    """
    candidates = usable(found)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        commands = ", or ".join(f"`loadgen {command} {one.url}`" for one in candidates)
        raise UsageError(f"{len(candidates)} servers found on this machine, say which: {commands}")
    problems = "".join(f"; {one.url} {one.problem}" for one in found)
    raise TargetError(
        f"no inference server found: looked on this machine for {_places()}{problems}; start one, "
        "give the URL of one, or see a simulated one by `loadgen sweep --demo`"
    )


def _places() -> str:
    """`vllm (port 8000), …, tgi and llama.cpp (port 8080), …`"""
    names: dict[int, list[str]] = defaultdict(list)
    for engine in ENGINES:
        if engine.name != "servefit-sim":
            names[engine.port].append(engine.name)
    return ", ".join(f"{' and '.join(known)} (port {port})" for port, known in names.items())
