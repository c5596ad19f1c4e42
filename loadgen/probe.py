"""What is at the URL: found out with a few small requests before the first level.

Who cannot be used at all is refused here (`TargetError`, exit code 4); what fails later is data.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import ssl
from collections.abc import Callable
from random import Random
from typing import Any
from urllib.parse import urljoin

import msgspec

from agent.model import TargetError, UsageError
from loadgen import api, prompts
from loadgen.client import (
    Address,
    Connection,
    Dialer,
    Exchange,
    connect_error_kind,
    request_head,
    wire,
)

PROBE_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
COST_BOUNDS = {"block": (8.0, 160.0), "unit": (0.25, 4.0), "nonce_letter": (0.25, 4.0)}
REFUSED = ("http_400", "http_413", "http_422")
BUSY = ("http_429", "http_500", "http_502", "http_503", "http_504")  # may well pass
UNTOLD = (403, 405, 500, 501)  # where the requests themselves may well be answered
GATEWAY = (502, 504)  # said by a proxy, never by an engine
CLOSING_S = 0.1  # after a reply: a server that closes without saying so has done so by then
PAUSES_S = (0.2, 0.8)  # before a probe that met a busy server is sent again
LENGTH_TOLERANCE = 0.02
PROBE_TOKEN_IDS = 32
SAFE_TOKEN_IDS = range(100, 1000)  # ordinary tokens of every vocabulary; the special ones lie apart


class Known(msgspec.Struct, frozen=True):
    """What `/v1/models` says."""

    ids: list[str]
    lengths: dict[str, int] = {}  # longest prompt and reply together, in tokens, where it is said
    simulated: bool = False  # the target is our own simulated engine, whoever started it


class Probed(msgspec.Struct):
    """What the probes found out, and what they cost the server."""

    dialect: api.Dialect = api.Dialect()
    costs: prompts.Costs = prompts.DEFAULT_COSTS
    token_ids: bool = False  # takes token ids as a prompt, and counts just these; see `run`
    requests: int = 0
    tokens: int = 0
    fastest_s: float | None = None  # the quickest reply of one token
    keeps_open: bool = True  # the connection, after a reply that does not say it will be closed
    notes: list[str] = []


# ---------------------------------------------------------------------------------------- models


async def models(
    address: Address,
    headers: dict[str, str],
    tls: ssl.SSLContext | None,
    timeout_s: float = PROBE_TIMEOUT_S,
    *,
    optional: bool = False,
) -> Known:
    """What `/v1/models` lists; nothing where the server has no such page. Raises TargetError.

    `optional`: the model is named, so a page that is empty (of `transformers serve`, which loads
    what it is asked for), broken or refused is as good as none.
    """
    import aiohttp

    url = f"{address.origin}/v1/models"
    connect_s = min(timeout_s, CONNECT_TIMEOUT_S)
    timeout = aiohttp.ClientTimeout(total=connect_s + timeout_s, connect=connect_s)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            # Not followed: the key would go with it, perhaps to somebody else's server.
            session.get(url, ssl=tls if tls is not None else True, allow_redirects=False) as reply,
        ):
            body = await reply.read()
            if 300 <= reply.status < 400:
                raise TargetError(_redirected(url, reply.status, reply.headers.get("Location")))
            if optional and reply.status in UNTOLD:
                return Known([])
            return _known(url, reply.status, body, optional=optional)
    except (aiohttp.ClientSSLError, ssl.SSLError) as error:
        raise TargetError(_tls_advice(address, error)) from error
    except aiohttp.ClientConnectorError as error:
        raise TargetError(
            f"no connection to {address.origin}: {_why(error.os_error)}; "
            "is the server up, and are host and port right?"
        ) from error
    except aiohttp.ConnectionTimeoutError as error:
        raise TargetError(_no_connection_in_time(address)) from error
    except TimeoutError as error:
        raise TargetError(
            f"{url}: connected, but no answer within {timeout_s:g} s; is the server still loading, "
            "or does it hang? see its log"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        other = "https" if tls is None else "http"
        raise TargetError(
            f"{url}: {str(error) or type(error).__name__}; is this an OpenAI-compatible server, "
            f"and is it not {other}://?"
        ) from error


def _redirected(url: str, status: int, location: str | None = None) -> str:
    to = urljoin(url, location).partition("?")[0].removesuffix("/models") if location else ""
    where = to if to.startswith(("http://", "https://")) and "@" not in to else "the address there"
    return (
        f"{url} answered {status}, a redirect, which no request here follows: give {where[:200]} "
        "(https:// instead of http://, or another path?)"
    )


def _why(error: OSError) -> str:
    """What the system says: asyncio's own text of a refused connect names no reason."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def _no_connection_in_time(address: Address) -> str:
    tls = ", and does the port speak TLS (else it is http://)" if address.tls else ""
    return (
        f"no connection to {address.origin} in time: is the server up, does a firewall drop "
        f"packets{tls}?"
    )


def _tls_advice(address: Address, error: BaseException) -> str:
    reason = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    text = getattr(reason, "verify_message", "") or str(getattr(reason, "reason", "") or reason)
    return (
        f"TLS with {address.origin} failed: {text}; give the server's CA by --ca-file, "
        "or --insecure if you mean it; a server without TLS is http://"
    )


def _known(url: str, status: int, body: bytes, *, optional: bool) -> Known:
    _refuse_status(url, status, body, missing_is_fatal=False)
    if status == 404:
        return Known([])
    if status in GATEWAY:
        raise TargetError(
            f"{url} answered {_with_words(status, body)}: that is a proxy whose server does not "
            "answer; is the server behind it up, and does the proxy know where it is?"
        )
    if status != 200:
        raise TargetError(
            f"{url} answered {_with_words(status, body)}: is this the right address? if it is, see "
            "the server's log"
        )
    try:
        reply = msgspec.json.decode(body)
        ids = [str(entry["id"]) for entry in reply["data"]]
        simulated = any(entry.get("owned_by") == "servefit-sim" for entry in reply["data"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise TargetError(_not_an_api(url, body)) from error
    if not ids and not optional:
        raise TargetError(
            f"{url} lists no models: load one on the server first, or name by --model one that it "
            "loads when it is asked for it"
        )
    lengths = {str(entry["id"]): _longest(entry) for entry in reply["data"]}
    told = {model: longest for model, longest in lengths.items() if longest is not None}
    return Known(ids, told, simulated)


def _longest(entry: dict[str, Any]) -> int | None:
    """vLLM's and SGLang's word for it, or llama.cpp's: the context of one of its slots."""
    meta = entry.get("meta")
    longest = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _not_an_api(url: str, body: bytes) -> str:
    what = "HTML" if body.lstrip()[:1] == b"<" else "something else than JSON of this API"
    if not body:
        what = "nothing at all"
    return f"{url} answers {what}: this is not an OpenAI-compatible API; check host, port and path"


def _with_words(status: int, body: bytes) -> str:
    """`503 (loading)`, or the status alone where nothing was said beside it."""
    said = api.error_message(body)
    return f"{status} ({said})" if said else str(status)


def _refuse_status(url: str, status: int, body: bytes, *, missing_is_fatal: bool) -> None:
    answered = f"{url} answered {_with_words(status, body)}"
    if status == 401:
        raise TargetError(f"{answered}: give a key by --api-key-file or OPENAI_API_KEY")
    if status == 403:
        raise TargetError(f"{answered}: this key or address may not use it")
    if status == 404 and missing_is_fatal:
        raise TargetError(
            f"{answered}: has this server that --endpoint and that --model, and "
            "is the path before /v1 right?"
        )
    if 300 <= status < 400:
        raise TargetError(_redirected(url, status))
    if status == 405:
        raise TargetError(
            f"{answered}: this is not an OpenAI-compatible API; check host, port and path"
        )


def choose_model(asked: str | None, known: list[str]) -> str:
    """The model to ask for. Raises TargetError that names the nearest known one."""
    if asked is None:
        if not known:
            raise TargetError(
                "there is no /v1/models at this address: check host, port and path, or name the "
                "model by --model"
            )
        return known[0]
    if known and asked not in known:
        near = difflib.get_close_matches(asked, known, n=1, cutoff=0.0)
        raise TargetError(
            f"no model {asked!r} on this server; nearest is {near[0]!r} "
            f"(of {len(known)}: {', '.join(known[:5])}{', …' if len(known) > 5 else ''})"
        )
    return asked


def check_length(
    model: str, known: Known, input_tokens: int, output_tokens: int, sequences: int = 1
) -> None:
    """Raises UsageError where prompt and reply together are longer than the model takes.

    `sequences`: over how many of its own the endpoint deals out one prompt.
    """
    longest = known.lengths.get(model)
    if longest is None or -(-input_tokens // sequences) + output_tokens <= longest:
        return
    asked = f"--input-tokens {input_tokens}"
    if sequences > 1:
        asked += f", {sequences} documents with their query,"
    asked += f" and --output-tokens {output_tokens} are" if output_tokens else " are"
    raise UsageError(f"{asked} together more than the {longest} tokens that {model!r} takes here")


# ---------------------------------------------------------------------------------------- probes


class Prober:
    """Sends single requests over the very path that the levels use, with next to no output."""

    def __init__(
        self,
        address: Address,
        dial: Dialer,
        headers: dict[str, str],
        endpoint: str,
        model: str,
        *,
        stream: bool,
        timeout_s: float = PROBE_TIMEOUT_S,
        count: Callable[[str], int] | None = None,
    ) -> None:
        """`count`: tokens of a text by a local tokenizer, where one was given."""
        self._count_locally = count
        self._api = api.ENDPOINTS[endpoint]
        self._url = address.origin + self._api.path
        self._address = address
        self._dial = dial
        self._head = request_head(address, self._api.path, headers)
        self._endpoint = endpoint
        self._model = model
        self._stream = stream and self._api.generates
        self._timeout_s = timeout_s
        self.found = Probed(notes=[])

    async def run(self, input_tokens: int, rng: Random, *, try_token_ids: bool = False) -> Probed:
        """Dialect first, then the costs of prompt parts, then a prompt of the asked length.

        `try_token_ids`: finds out, too, whether a prompt may be token ids.
        """
        texts = prompts.probe_prompts(rng)
        first = await self._agree(texts[0])
        if first.error is not None:
            self._note_failed(first)
            return self.found
        if not self.found.keeps_open:
            self.found.notes.append(
                "the server closes each connection after its reply without saying so; every "
                "request gets one of its own"
            )
        if try_token_ids and api.TOKEN_IDS in self._api.takes:
            ids = rng.choices(SAFE_TOKEN_IDS, k=PROBE_TOKEN_IDS)
            self.found.token_ids = (await self._ask(ids)).prompt_tokens == PROBE_TOKEN_IDS
        counts = await self._counts(first, texts)
        if counts is None:
            return self.found
        costs = prompts.costs_of(counts)
        if not _plausible(costs):
            self.found.notes.append(
                "the server's prompt token counts do not follow the prompts; lengths are assumed "
                "at one token a word"
            )
            return self.found
        self.found.costs = costs
        if first.prompt_tokens >= 0:
            await self._verify(input_tokens, rng)
        return self.found

    async def _counts(self, first: Exchange, texts: list[str]) -> list[int] | None:
        """Token counts of the probe prompts: the local tokenizer's, else the server's.

        None, and a note that says why, where there are none.
        """
        if self._count_locally is not None:
            return [self._count_locally(text) for text in texts]
        exchanges = [first, *[await self._ask(text) for text in texts[1:]]]
        failed = next((e for e in exchanges if e.error is not None), None)
        if failed is not None:
            self._note_failed(failed)
            return None
        if any(e.prompt_tokens < 0 for e in exchanges):
            self.found.notes.append(
                "the server does not say how long a prompt was; lengths are assumed at one token "
                "a word; --tokenizer would tell"
            )
            return None
        return [e.prompt_tokens for e in exchanges]

    def _note_failed(self, probe: Exchange) -> None:
        self.found.notes.append(
            f"the probe failed ({probe.error}: {probe.error_text[:120]}); "
            "prompt lengths are assumed at one token a word"
        )

    async def _verify(self, tokens: int, rng: Random) -> None:
        """Asks for a prompt as the levels will send it, and corrects the fixed cost by its error"""
        prompt = _prompt(tokens, self.found.costs, rng)
        exchange = await self._ask(prompt)
        if exchange.error in REFUSED:
            raise UsageError(
                f"--input-tokens {tokens}: {self._url} refuses a prompt of that length "
                f"({exchange.error}: {exchange.error_text})"
            )
        if exchange.error is not None:
            self.found.notes.append(
                f"a prompt of {tokens} tokens could not be tried ({exchange.error}: "
                f"{exchange.error_text[:120]})"
            )
            return
        expected = prompts.expected_tokens(
            prompts.shape_of(tokens, self.found.costs), self.found.costs
        )
        off = exchange.prompt_tokens - expected
        if abs(off) >= 1:
            costs = self.found.costs
            self.found.costs = msgspec.structs.replace(costs, fixed=costs.fixed + off)
            exchange = await self._ask(_prompt(tokens, self.found.costs, rng))
        off = exchange.prompt_tokens - tokens
        if exchange.error is None and abs(off) > LENGTH_TOLERANCE * tokens:
            self.found.notes.append(
                f"prompts come out at {exchange.prompt_tokens} tokens where {tokens} were asked for"
            )

    async def _agree(self, prompt: str) -> Exchange:
        """The first dialect that the server accepts."""
        for dialect in self._api.dialects:
            self.found.dialect = dialect
            exchange = await self._ask(prompt)
            if exchange.error not in REFUSED:
                return exchange
        raise TargetError(
            f"{self._url} refuses every form of request, the last with {exchange.status}: "
            f"{exchange.error_text}"
        )

    async def _ask(self, prompt: api.Prompt) -> Exchange:
        """One request of hardly any output, again where the server was only busy.

        Raises TargetError where nobody can use the target.
        """
        exchange = await self._ask_once(prompt)
        for pause_s in PAUSES_S:
            if exchange.error not in BUSY:
                break
            await asyncio.sleep(pause_s)
            exchange = await self._ask_once(prompt)
        return exchange

    async def _ask_once(self, prompt: api.Prompt) -> Exchange:
        ended: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()

        def done(_: Connection, exchange: Exchange) -> None:
            if not ended.done():
                ended.set_result(exchange)

        try:
            connection = await self._dial(done)
        except TimeoutError as error:
            raise TargetError(_no_connection_in_time(self._address)) from error
        except OSError as error:
            if connect_error_kind(error) == "tls":
                raise TargetError(_tls_advice(self._address, error)) from error
            raise TargetError(f"no connection to {self._address.origin}: {_why(error)}") from error
        body = api.body(
            self._endpoint, self._model, prompt, self._api.output_min, stream=self._stream,
            dialect=self.found.dialect,
        )  # fmt: skip
        connection.start(Exchange(0, 0), wire(self._head, body), self._timeout_s,
                         stream=self._stream)  # fmt: skip
        exchange = await ended
        if exchange.error is None and not self.found.requests and connection.usable:
            await asyncio.sleep(CLOSING_S)
            self.found.keeps_open = connection.usable
        connection.close()
        self._count(exchange)
        self._refuse(exchange)
        return exchange

    def _count(self, exchange: Exchange) -> None:
        if exchange.error is None:
            self.found.requests += 1
            took_s = (exchange.end_ns - exchange.sent_ns) / 1e9
            self.found.fastest_s = min(took_s, self.found.fastest_s or took_s)
        # A server has counted the tokens of a reply that was cut off, too.
        known = exchange.output_tokens >= 0
        self.found.tokens += exchange.output_tokens if known else len(exchange.stamps)

    def _refuse(self, exchange: Exchange) -> None:
        body = exchange.error_text.encode()
        _refuse_status(self._url, exchange.status, body, missing_is_fatal=True)
        if exchange.error == "bad_reply":
            raise TargetError(
                f"{self._url} answers, but not as an OpenAI-compatible API "
                f"({exchange.error_text}); check host, port and path"
            )
        if exchange.error == "timeout":
            raise TargetError(
                f"{self._url} took the request and gave no answer within {self._timeout_s:g} s: "
                "is the engine alive? see the server's log"
            )


def _prompt(tokens: int, costs: prompts.Costs, rng: Random) -> str:
    """A prompt as the levels will send it."""
    made = prompts.Texts(costs, rng.getrandbits(63)).prompt(
        tokens, rng, rng.randrange(prompts.NONCES)
    )
    return str(made.content)


def _plausible(costs: prompts.Costs) -> bool:
    values: dict[str, Any] = msgspec.structs.asdict(costs)
    # A server that rounds its counts may leave nothing, or a little less, for the fixed part.
    return costs.fixed >= -1 and all(
        low <= values[name] <= high for name, (low, high) in COST_BOUNDS.items()
    )
