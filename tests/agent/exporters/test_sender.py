"""The sender: what back ends answer on good and bad days, and what it makes of it."""

from __future__ import annotations

import asyncio
import random
import ssl
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from agent.config import read_headers
from agent.exporters.outbox import Outbox
from agent.exporters.sender import (
    DOUBTFUL_TRIES_MAX,
    RETRY_AFTER_S_MAX,
    Sender,
    answer_of,
    retry_after_s,
    signal_url,
)
from agent.model import UsageError
from tests.agent.exporters.nasty import (
    DIES,
    DIES_AFTER,
    GARBAGE,
    HALF,
    LOGIN_PAGE,
    OK,
    PROTOBUF,
    STALLS,
    Receiver,
    Say,
    receiving,
    rejects,
    rejects_spans,
)
from tests.agent.exporters.samples import counts, put

FAST = {"timeout_s": 0.3, "backoff_s": (0.005, 0.02), "rng": random.Random(1)}


# ----------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize(
    ("status", "form", "body", "outcome", "rejected"),
    [
        (200, "", b"", "taken", 0),
        (202, "text/plain", b"ok", "taken", 0),
        (204, "", b"", "taken", 0),
        (200, "application/json", b"{}", "taken", 0),
        (200, "application/json", b'{"partialSuccess":{"rejectedDataPoints":"4"}}', "taken", 4),
        (200, "application/json; charset=utf-8", b'{"partialSuccess":null}', "taken", 0),
        (200, "application/json", b"[1]", "doubtful", 0),
        (200, "application/json", b"{broken", "doubtful", 0),
        (200, "text/html", b"<html>", "doubtful", 0),
        (200, PROTOBUF, b"\xff\xfe\xfd garbage", "doubtful", 0),
        (200, PROTOBUF, rejects(5, "too old").body, "taken", 5),
        (301, "", b"", "refused", 0),
        (400, "text/plain", b"no such metric", "refused", 0),
        (401, "", b"", "refused", 0),
        (404, "", b"", "refused", 0),
        (408, "", b"", "doubtful", 0),
        (413, "", b"", "refused", 0),
        (429, "", b"", "later", 0),
        (500, "", b"", "doubtful", 0),
        (501, "", b"", "doubtful", 0),
        (502, "", b"", "later", 0),
        (503, "", b"", "later", 0),
        (504, "", b"", "later", 0),
    ],
)
def test_what_an_answer_means(
    status: int, form: str, body: bytes, outcome: str, rejected: int
) -> None:
    answer = answer_of("metrics", status, {"Content-Type": form}, body, 0.0)
    assert (answer.outcome, answer.rejected) == (outcome, rejected)
    assert (answer.why is None) == (outcome == "taken" and not rejected)


def test_partial_success_of_traces_has_its_own_message() -> None:
    body = rejects_spans(2, "too\nlong")
    answer = answer_of("traces", 200, {"Content-Type": PROTOBUF}, body, 0.0)
    assert (answer.rejected, answer.why) == (2, "rejected 2 points: too long")


@given(st.binary(max_size=300), st.sampled_from(["", PROTOBUF, "application/json", "text/html"]))
def test_no_answer_is_too_strange(body: bytes, form: str) -> None:
    for status in (200, 400, 503):
        answer = answer_of("metrics", status, {"Content-Type": form}, body, 0.0)
        assert "\n" not in (answer.why or "")
        assert answer.rejected >= 0


NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("1e300", RETRY_AFTER_S_MAX),
        ("soon", None),
        (format_datetime(NOW.replace(minute=2), usegmt=True), 120.0),
        (format_datetime(NOW.replace(hour=11), usegmt=True), 0.0),
        ("Mon, 99 Foo 2026 99:99:99 GMT", None),
    ],
)
def test_retry_after_in_all_its_forms(header: str | None, wait_s: float | None) -> None:
    assert retry_after_s(header, NOW.timestamp()) == wait_s


# ----------------------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("endpoint", "metrics"),
    [
        ("http://h:4318", "http://h:4318/v1/metrics"),
        ("http://h:4318/", "http://h:4318/v1/metrics"),
        ("http://h/opentelemetry", "http://h/opentelemetry/v1/metrics"),
        ("https://h/v1/metrics", "https://h/v1/metrics"),
        ("https://h/x/v1/traces/", "https://h/x/v1/metrics"),
    ],
)
def test_one_endpoint_makes_the_address_of_each_kind(endpoint: str, metrics: str) -> None:
    assert signal_url(endpoint, "metrics") == metrics
    assert signal_url(endpoint, "traces") == metrics.replace("/v1/metrics", "/v1/traces")


@pytest.mark.parametrize(
    "endpoint", ["", "h:4318", "grpc://h", "http://", "http://h:x", "http://h?k=s"]
)
def test_what_is_no_address_is_wrong_usage(endpoint: str) -> None:
    with pytest.raises(UsageError, match="endpoint"):
        signal_url(endpoint, "metrics")


# ------------------------------------------------------------------------------------ the sender


async def deliver(
    outbox: Outbox, receiver: Receiver, budget_s: float = 10.0, **options: Any
) -> None:
    """Runs a sender until nothing waits."""
    sender = Sender(outbox, "metrics", f"{receiver.url}/v1/metrics", **{**FAST, **options})
    task = asyncio.create_task(sender.run())
    try:
        async with asyncio.timeout(budget_s):
            while outbox.status("metrics").pending:
                assert not task.done()
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sender.close()


async def test_requests_go_out_as_they_were_put(outbox: Outbox) -> None:
    headers = {"Authorization": "Bearer s3cret", "Content-Type": "text/wrong"}
    put(outbox, b"one", b"two")
    async with receiving() as receiver:
        await deliver(outbox, receiver, headers=lambda: headers)
    assert receiver.taken == [b"one", b"two"]
    assert receiver.headers[0]["Authorization"] == "Bearer s3cret"
    sent = {name.lower(): value for name, value in receiver.headers[0].items()}
    assert (sent["content-type"], sent["content-encoding"]) == (PROTOBUF, "gzip")
    assert counts(outbox) == (0, 2, 0)
    assert outbox.status().last_error is None


@pytest.mark.parametrize(
    "trouble",
    [
        Say(503),
        Say(429, headers={"Retry-After": "0"}),
        Say(502),
        Say(504),
        Say(500),
        DIES,
        DIES_AFTER,
        HALF,
        STALLS,
        GARBAGE,
        LOGIN_PAGE,
    ],
    ids=lambda say: f"{say.status}-{say.how}-{say.body[:6]!r}",
)
async def test_trouble_that_passes_loses_nothing(outbox: Outbox, trouble: Say) -> None:
    put(outbox, b"one", b"two", b"three")
    async with receiving(lambda n: trouble if n < 3 else OK) as receiver:
        await deliver(outbox, receiver)
    # Sent again it is the same, byte for byte: whoever tells them apart has each once.
    assert list(dict.fromkeys(receiver.taken)) == [b"one", b"two", b"three"]
    assert counts(outbox) == (0, 3, 0)
    assert f"metrics to {receiver.url}" in (outbox.status().last_error or "")


async def test_a_back_end_that_is_not_there_is_waited_for(outbox: Outbox) -> None:
    put(outbox, b"one")
    sender = Sender(outbox, "metrics", "http://user:s3cret@127.0.0.1:1/v1?k=s3cret", **FAST)
    assert 0 < (await sender.turn() or 0) <= 0.02
    assert counts(outbox) == (1, 0, 0)
    assert outbox.status().last_error == "metrics to http://127.0.0.1:1/v1: connection refused"
    await sender.close()


async def test_pauses_double_up_to_a_bound_and_are_spread(outbox: Outbox) -> None:
    put(outbox, b"one")
    sender = Sender(
        outbox, "metrics", "http://127.0.0.1:1", backoff_s=(1.0, 8.0), rng=random.Random(1)
    )
    pauses = [await sender.turn() or 0.0 for _ in range(7)]
    for pause, longest in zip(pauses, [1, 2, 4, 8, 8, 8, 8], strict=True):
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == 7
    await sender.close()


async def test_retry_after_is_honoured(outbox: Outbox) -> None:
    put(outbox, b"one")
    answers = [Say(429, headers={"Retry-After": "0.4"}), OK]
    async with receiving(lambda n: answers[n]) as receiver:
        await deliver(outbox, receiver)
    assert receiver.at_s[1] - receiver.at_s[0] >= 0.4


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413])
async def test_a_refusal_is_final_counted_and_named(outbox: Outbox, status: int) -> None:
    put(outbox, b"poison", b"good")
    said = {"Content-Type": "text/plain", "Location": "http://127.0.0.1:1/"}
    no = Say(status, b"never\nthis", headers=said)
    async with receiving(lambda n: no if n == 0 else OK) as receiver:
        await deliver(outbox, receiver)
        assert outbox.status().last_error == (
            f"metrics to {receiver.url}/v1/metrics: HTTP {status}: never this; request dropped"
        )
    assert receiver.taken == [b"good"]
    assert counts(outbox) == (0, 1, 1)


@pytest.mark.parametrize("lie", [GARBAGE, LOGIN_PAGE, Say(500)], ids=["garbage", "login", "500"])
async def test_what_never_passes_is_given_up_and_counted(outbox: Outbox, lie: Say) -> None:
    put(outbox, b"one")
    async with receiving(lambda n: lie) as receiver:
        await deliver(outbox, receiver)
    assert len(receiver.seen) == DOUBTFUL_TRIES_MAX
    assert counts(outbox) == (0, 0, 1)
    assert "tries" in (outbox.status().last_error or "")


async def test_tries_are_remembered_over_a_restart(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox.db")
    put(box, b"one")
    async with receiving(lambda n: Say(500)) as receiver:
        for _ in range(DOUBTFUL_TRIES_MAX):
            assert box.status().pending == 1
            sender = Sender(box, "metrics", receiver.url, **FAST)
            await sender.turn()
            await sender.close()
            box.close()
            box = Outbox(tmp_path / "outbox.db")
    assert counts(box) == (0, 0, 1)
    box.close()


async def test_partial_success_is_counted_and_not_repeated(outbox: Outbox) -> None:
    put(outbox, b"one")
    async with receiving(lambda n: rejects(2, "out of order")) as receiver:
        await deliver(outbox, receiver)
    status = outbox.status()
    assert (len(receiver.seen), status.sent, status.rejected_points) == (1, 1, 2)
    assert "rejected 2 points: out of order" in (status.last_error or "")


async def test_a_liar_cannot_reject_more_than_there_was(outbox: Outbox) -> None:
    put(outbox, b"one")
    async with receiving(lambda n: rejects(10**12, "")) as receiver:
        await deliver(outbox, receiver)
    assert outbox.status().rejected_points == 3


async def test_an_endless_answer_is_cut(outbox: Outbox) -> None:
    put(outbox, b"one")
    endless = Say(400, b"x" * 5_000_000, headers={"Content-Type": "text/plain"})
    async with receiving(lambda n: endless) as receiver:
        await deliver(outbox, receiver)
    assert len(outbox.status().last_error or "") < 400


async def test_traces_go_on_while_metrics_are_refused(outbox: Outbox) -> None:
    put(outbox, b"a metric")
    put(outbox, b"a span", kind="traces")
    async with receiving() as receiver:
        down = Sender(outbox, "metrics", "http://127.0.0.1:1", **FAST)
        up = Sender(outbox, "traces", receiver.url, **FAST)
        assert await down.drain(0.05) == 1
        assert await up.drain(5.0) == 0
        await down.close()
        await up.close()
    assert receiver.taken == [b"a span"]


async def test_put_wakes_the_sender(outbox: Outbox) -> None:
    async with receiving() as receiver:
        sender = Sender(outbox, "metrics", receiver.url, **FAST)
        task = asyncio.create_task(sender.run())
        await asyncio.sleep(0.05)
        assert await sender.put(b"news", 1)
        await asyncio.wait_for(receiver.came.wait(), 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await sender.close()


async def test_a_credential_that_is_changed_is_used_at_the_next_turn(
    outbox: Outbox, tmp_path: Path
) -> None:
    path = tmp_path / "headers"
    put(outbox, b"one", b"two")
    async with receiving() as receiver:
        sender = Sender(outbox, "metrics", receiver.url, headers=lambda: read_headers(path), **FAST)
        assert await sender.turn() != 0.0  # no file: nothing is sent, and nothing lost
        assert not receiver.seen
        for token in ("old", "new"):
            path.write_text(f"X-Token: {token}")
            assert await sender.turn() == 0.0
        await sender.close()
    assert [one["X-Token"] for one in receiver.headers] == ["old", "new"]


async def test_tls_needs_the_right_authority(outbox: Outbox) -> None:
    import trustme

    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    receiver = Receiver(lambda n: OK)
    app = web.Application()
    app.router.add_post("/v1/metrics", receiver.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site: Any = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server)
    await site.start()
    url = f"https://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1/metrics"
    put(outbox, b"one")
    stranger = Sender(outbox, "metrics", url, **FAST)
    await stranger.turn()
    await stranger.close()
    assert "its TLS certificate is not trusted" in (outbox.status().last_error or "")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    friend = Sender(outbox, "metrics", url, ssl=trusted, **FAST)
    assert await friend.turn() == 0.0
    await friend.close()
    await runner.cleanup()
    assert receiver.taken == [b"one"]


def test_the_status_is_json(outbox: Outbox) -> None:
    assert msgspec.json.decode(msgspec.json.encode(outbox.status()))["pending"] == 0
