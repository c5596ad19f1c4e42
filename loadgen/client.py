"""The only module that touches the socket of the target.

One `Connection` carries one request at a time. The clock is read once, as the first thing when
bytes arrive; parsing comes after. A failed request is data: it ends as an `Exchange` with an error
kind, never as an exception.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import zlib
from array import array
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from agent.model import UsageError
from loadgen import api, sse
from loadgen.usual import Usual

REPLY_BYTES_MAX = 64 * 2**20
# No connection, and it is this machine that has none to give.
OUR_LIMITS = {
    errno.EMFILE: "no_descriptor",
    errno.ENFILE: "no_descriptor",
    errno.EADDRNOTAVAIL: "no_port",
}
GRACE_AFTER_DONE_S = 1.0  # a stream said [DONE]; the end of its body may take this long


class Address(msgspec.Struct, frozen=True):
    """Where to connect, and what every request's head says."""

    host: str
    port: int
    tls: bool
    base_path: str  # "" or e.g. "/v1" replaced by the endpoint's own path
    host_header: str

    @property
    def origin(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.base_path}"


def parse_url(url: str) -> Address:
    """Base URL, with or without /v1, to an address. Raises UsageError that says what to write."""
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"not a URL: {url!r} ({error}); write http://HOST:PORT") from error
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"{url!r}: scheme {parts.scheme!r} is neither http nor https")
    if not parts.hostname:
        raise UsageError(f"{url!r} names no host; write http://HOST:PORT")
    if parts.username or parts.password:
        raise UsageError("no user or password in the URL: use --api-key-file or --header")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        tls=parts.scheme == "https",
        base_path=path,
        host_header=parts.netloc,
    )


def request_head(address: Address, path: str, headers: dict[str, str]) -> bytes:
    """The head of a POST up to where `Content-Length` and perhaps `traceparent` follow."""
    lines = [
        f"POST {address.base_path}{path} HTTP/1.1",
        f"Host: {address.host_header}",
        "Content-Type: application/json",
        "Accept: text/event-stream, application/json",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    head = "\r\n".join(lines)
    if any(c in line for line in lines for c in "\r\n"):
        raise UsageError("a header with a line break in it")
    return head.encode("utf-8") + b"\r\n"


def wire(head: bytes, body: bytes, traceparent: str | None = None) -> bytes:
    """All bytes of one request."""
    trace = f"traceparent: {traceparent}\r\n" if traceparent else ""
    return b"%b%bContent-Length: %d\r\n\r\n%b" % (head, trace.encode(), len(body), body)


class Exchange:
    """One request and what came back. Instants in ns of the monotonic clock; 0 is 'never'."""

    __slots__ = (
        "answer_ns", "connect_ns", "counted_here", "due_ns", "end_ns", "error",
        "error_text", "finished", "follow", "index", "output_tokens", "prompt_tokens",
        "reasoning_chunks", "reasoning_tokens", "sent_ns", "stamps", "status", "texts",
        "token_counts", "warmup",
    )  # fmt: skip

    def __init__(self, index: int, due_ns: int, *, warmup: bool = False) -> None:
        self.index = index
        self.due_ns = due_ns
        self.warmup = warmup
        self.connect_ns = 0  # how long the connection took, where one was opened for this request
        self.sent_ns = 0
        self.answer_ns = 0  # first chunk that carries an answer token, not reasoning
        self.end_ns = 0
        self.status = 0
        self.error: str | None = None  # None: complete
        self.error_text = ""
        self.finished = False  # [DONE] or a finish_reason was seen
        self.prompt_tokens = -1  # −1: the server did not say
        self.counted_here = -1  # prompt tokens as we count them, where we do
        self.follow: Callable[[str], Any] | None = None  # of a conversation: the next turn
        self.output_tokens = -1
        self.reasoning_tokens = 0
        self.reasoning_chunks = 0
        self.stamps = array("q")  # arrival of every token-bearing chunk
        self.texts: list[str] | None = None  # the reply, kept only where we shall count its tokens
        self.token_counts = array("i")  # tokens of each chunk; only where the server says so


class Connection(asyncio.Protocol):
    """One connection to the target; `done(connection, exchange)` is called when a reply ended."""

    def __init__(
        self, done: Callable[[Connection, Exchange], None], *, keep_alive: bool = True
    ) -> None:
        self._done = done
        self._keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._fd = -1  # plain TCP: written to directly, so that `sent` is the system call
        self._exchange: Exchange | None = None
        self._ended: Exchange | None = None  # ended inside the parser, not handed over yet
        self._timer: asyncio.TimerHandle | None = None
        self._stream_asked = False
        self.idle_since_ns = 0
        self._reset_reply()

    # ------------------------------------------------------------------------------ connecting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        if transport.get_extra_info("ssl_object") is None:
            self._fd = transport.get_extra_info("socket").fileno()
        # resume_writing shall come when the last byte has gone to the socket, not before.
        self._transport.set_write_buffer_limits(high=0)
        self.idle_since_ns = monotonic_ns()

    @property
    def usable(self) -> bool:
        """Open, idle, and not about to be closed."""
        transport = self._transport
        return self._exchange is None and transport is not None and not transport.is_closing()

    @property
    def arrived(self) -> int:
        """Token-bearing chunks so far of the reply under way."""
        return len(self._exchange.stamps) if self._exchange is not None else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------------------------- sending

    def start(self, exchange: Exchange, data: bytes, timeout_s: float, *, stream: bool) -> None:
        """Sends a request. One at a time; a connection that is gone ends it as `reset`."""
        assert self._exchange is None
        self._exchange = exchange
        self._stream_asked = stream
        self._reset_reply()
        transport = self._transport
        if transport is None or transport.is_closing():
            self._finish("reset", "the connection was closed before the request was sent")
            return
        self._timer = self._loop.call_later(timeout_s, self._timed_out)
        if self._fd >= 0:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._finish(_reset_kind(error), str(error))
                return
        if data:
            self._pending_send = True
            transport.write(data)
            if transport.get_write_buffer_size() == 0:
                self.resume_writing()
        else:
            exchange.sent_ns = monotonic_ns()

    def pause_writing(self) -> None:
        """Nothing to do: one request is in flight at a time."""

    def resume_writing(self) -> None:
        if self._pending_send and self._exchange is not None:
            self._pending_send = False
            self._exchange.sent_ns = monotonic_ns()

    # -------------------------------------------------------------------------------- receiving

    def data_received(self, data: bytes) -> None:
        self._now_ns = monotonic_ns()
        if self._exchange is None:
            self.close()  # bytes that nobody asked for: the stream of replies is out of step
            return
        self._parsing = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # a defect of ours, not the server's failure
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._finish("bad_http", str(error) or type(error).__name__)
            self.close()  # also where the reply was whole and something else came behind it
        finally:
            self._parsing = False
            if self._ended is not None:  # only now: no request may begin inside the parser
                ended, self._ended = self._ended, None
                self._done(self, ended)

    def _reset_reply(self) -> None:
        self._now_ns = 0
        self._parsing = False
        self._pending_send = False
        self._done_said = False
        self._events = sse.Decoder()
        self._usual = Usual()
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._tokens_before = 0
        self._reset_head()

    def _reset_head(self) -> None:
        self._status = 0
        self._framed = False  # has a length or is chunked: its end is not the connection's end
        self._headers_complete = False
        self._content_type = b""
        self._event_stream = False
        self._undeclared = False  # a stream was asked for, and the reply does not say what it is
        self._coding = b""
        self._inflate: Any = None
        self._retry_after = ""  # said to the user, never obeyed: a failed request is data

    # Called by httptools, in this order.

    def on_message_begin(self) -> None:
        if self._exchange is None:
            self.close()  # a second reply to one request
        self._reset_head()  # an interim reply (1xx) may have come before

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key in (b"content-length", b"transfer-encoding"):
            self._framed = True
        elif key == b"content-type":
            self._content_type = value.strip().lower()
        elif key == b"content-encoding":
            self._coding = value.strip().lower()
            if self._coding in (b"gzip", b"x-gzip", b"deflate"):
                self._inflate = zlib.decompressobj(wbits=47)
        elif key == b"retry-after":
            self._retry_after = f" (Retry-After: {value[:40].decode('latin-1')})"

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._headers_complete = True
        kind = self._content_type
        if self._status == 200:
            self._event_stream = b"event-stream" in kind
            self._undeclared = self._stream_asked and (not kind or kind.startswith(b"text/plain"))
        if self._exchange is not None:
            self._exchange.status = self._status

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._inflate is not None:
            try:
                body = self._inflate.decompress(body)
            except zlib.error as error:
                self._finish("bad_http", f"broken gzip: {error}")
                return
        elif self._coding not in (b"", b"identity"):
            coding = self._coding[:20].decode("latin-1")
            self._finish("bad_http", f"a reply compressed as {coding}, which is not read here")
            return
        if self._undeclared and body:
            self._undeclared = False
            self._event_stream = body.lstrip()[:1] not in (b"{", b"[", b"<")
        if self._event_stream:
            self._on_stream(exchange, body)
            return
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > REPLY_BYTES_MAX:
            self._finish("bad_http", f"a reply of more than {REPLY_BYTES_MAX} bytes")

    def on_message_complete(self) -> None:
        # 1xx replies precede the real one.
        if self._exchange is not None and self._status >= 200:
            self._complete(reusable=self._parser.should_keep_alive())

    # ---------------------------------------------------------------------------------- meaning

    def _on_stream(self, exchange: Exchange, data: bytes) -> None:
        usual = self._usual
        if usual.fits(data) and not self._events.pending_bytes and not self._done_said:
            exchange.stamps.append(self._now_ns)
            exchange.reasoning_chunks += usual.reasoning
            return
        try:
            events = self._events.feed(data)
        except sse.EventTooLong as error:
            self._finish("bad_stream", str(error))
            return
        for event in events:
            self._on_event(exchange, event)

    def _on_event(self, exchange: Exchange, data: bytes) -> None:
        if self._exchange is not exchange or self._done_said:
            return  # it ended with an earlier event
        if data == api.DONE:
            self._stream_done(exchange)
            return
        try:
            reply = api.decode(data)
        except ValueError as error:
            self._finish("bad_stream", f"a frame that is no JSON of a chunk: {error}")
            return
        bits = api.meaning(reply)
        if bits & api.FAILED:
            self._finish("stream_error", reply.error_text)
            return
        if bits & api.TOKEN:
            exchange.stamps.append(self._now_ns)
            if exchange.texts is not None:
                exchange.texts.append(api.text(reply))
            else:
                self._usual.learn(data, reply, bits)
            if bits & api.ANSWER:
                if not exchange.answer_ns:
                    exchange.answer_ns = self._now_ns
            else:
                exchange.reasoning_chunks += 1
        if reply.usage is not None:
            self._on_usage(exchange, reply.usage, carries_token=bool(bits & api.TOKEN))
        if bits & api.FINISH:
            exchange.finished = True
            if isinstance(reply, api.Event):  # the last one, as [DONE] is elsewhere
                if reply.response is not None and reply.response.usage is not None:
                    self._on_usage(exchange, reply.response.usage, carries_token=False)
                self._stream_done(exchange)

    def _on_usage(self, exchange: Exchange, usage: api.Usage, *, carries_token: bool) -> None:
        if (prompt := usage.prompt) is not None:
            exchange.prompt_tokens = prompt
        if (total := usage.output) is None:
            return
        exchange.output_tokens = total
        exchange.reasoning_tokens = usage.reasoning
        if carries_token:  # usage in every chunk: this one carries what the count grew by
            while len(exchange.token_counts) < len(exchange.stamps) - 1:
                exchange.token_counts.append(1)
            exchange.token_counts.append(max(total - self._tokens_before, 0))
        self._tokens_before = total

    def _stream_done(self, exchange: Exchange) -> None:
        exchange.finished = True
        self._done_said = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(
            GRACE_AFTER_DONE_S, lambda: self._complete(reusable=False)
        )

    def _complete(self, *, reusable: bool) -> None:
        """The body ended as HTTP wants it; is the reply complete too?"""
        exchange = self._exchange
        if exchange is None:
            return
        if not self._now_ns:
            self._now_ns = monotonic_ns()
        if self._status != 200:
            text = api.error_message(b"".join(self._body)) + self._retry_after
            self._finish(f"http_{self._status}", text.strip(), reusable=reusable)
        elif self._event_stream:
            for event in self._events.close():
                self._on_event(exchange, event)
            if self._exchange is None:
                return
            if exchange.finished:
                self._finish(None, "", reusable=reusable)
            else:
                self._finish("cut", "the stream ended without [DONE] and without finish_reason")
        else:
            self._complete_whole(exchange, b"".join(self._body), reusable=reusable)

    def _complete_whole(self, exchange: Exchange, body: bytes, *, reusable: bool) -> None:
        try:
            reply = api.decode_whole(body)
        except ValueError as error:
            self._finish("bad_reply", f"a reply that is no JSON of an answer: {error}")
            return
        if reply.error is not None:
            self._finish("stream_error", reply.error_text, reusable=reusable)
            return
        if not reply.is_answer:
            self._finish("bad_reply", "a reply without an answer in it", reusable=reusable)
            return
        exchange.finished = True
        if exchange.texts is not None:
            exchange.texts.append(api.text(reply))
        if reply.usage is not None:
            self._on_usage(exchange, reply.usage, carries_token=False)
            if reply.data or reply.results:
                exchange.output_tokens = 0  # embeddings and scores: nothing is generated
        self._finish(None, "", reusable=reusable)

    # --------------------------------------------------------------------------------- the ends

    def eof_received(self) -> bool:
        self._now_ns = monotonic_ns()
        self._closed(None)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._now_ns = monotonic_ns()
        self._closed(error)
        self._transport = None
        del self._parser  # it refers to us, and nobody collects cycles during a level

    def _closed(self, error: Exception | None) -> None:
        if self._exchange is None:
            return
        if error is None and self._headers_complete and not self._framed:
            self._complete(reusable=False)  # HTTP/1.0: the end of the connection ends the body
        elif self._done_said:
            self._complete(reusable=False)  # everything was said before the connection went
        elif error is not None:
            self._finish(_reset_kind(error), str(error) or type(error).__name__)
        elif self._headers_complete:
            self._finish("cut", "the connection was closed in the middle of the reply")
        else:
            self._finish("reset", "the connection was closed without a reply")

    def _timed_out(self) -> None:
        self._now_ns = monotonic_ns()
        if self._exchange is not None and self._exchange.finished:
            self._finish(None, "")  # a finish_reason, and then neither [DONE] nor an end
        else:
            self._finish("timeout", "no complete reply within the time limit")

    def cancel(self) -> None:
        """Gives up the request in flight; it ends as `cancelled`."""
        if self._exchange is not None:
            self._now_ns = monotonic_ns()
            self._finish("cancelled", "")

    def _finish(self, error: str | None, text: str, *, reusable: bool = False) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pending_send:
            reusable = False  # the rest of this request would go before the next
            if error is None:
                error, text = "bad_http", "answered before the whole request was sent"
        exchange.error = error
        exchange.error_text = text
        exchange.end_ns = self._now_ns or monotonic_ns()
        self.idle_since_ns = exchange.end_ns
        self._exchange = None
        if not (reusable and self._keep_alive):
            self.close()
        if self._parsing:
            self._ended = exchange
        else:
            self._done(self, exchange)


def _reset_kind(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
        return "connect"
    return "reset"


class Dialer:
    """Opens connections to one address. Raises OSError or ssl.SSLError as the system gives them."""

    def __init__(
        self,
        address: Address,
        tls: ssl.SSLContext | None,
        timeout_s: float,
        *,
        keep_alive: bool = True,
    ) -> None:
        """Without `keep_alive` a connection serves one request: of a server that closes it after
        its reply without saying so, the next request would be lost."""
        self.keep_alive = keep_alive
        self._address = address
        self._tls = tls
        self._timeout_s = timeout_s

    async def __call__(self, done: Callable[[Connection, Exchange], None]) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout_s):
            _, protocol = await loop.create_connection(
                lambda: Connection(done, keep_alive=self.keep_alive),
                self._address.host,
                self._address.port,
                ssl=self._tls,
            )
        return protocol


def tls_context(*, ca_file: str | None, insecure: bool) -> ssl.SSLContext:
    """Raises UsageError where the CA file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--ca-file {ca_file}: {error}") from error
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def connect_error_kind(error: BaseException) -> str:
    """`tls`, `connect`, or what was missing on our side: why no connection could be made."""
    if isinstance(error, ssl.SSLError):
        return "tls"
    return OUR_LIMITS.get(getattr(error, "errno", None) or 0, "connect")
