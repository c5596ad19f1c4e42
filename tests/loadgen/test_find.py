"""Finding the server that runs here by what each engine answers, and what is said of none."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.model import TargetError, UsageError
from loadgen import asked, cli, config, find
from loadgen.find import Found
from tests.e2e.misbehaving import Pages, html, message, refusal, serving, silence

VLLM_METRICS = b'vllm:num_requests_running{model_name="tiny"} 0\n'


def listing(owner: str | None, *names: str) -> bytes:
    entries = [{"id": name, "object": "model", "owned_by": owner} for name in names]
    return message(200, {"object": "list", "data": entries})


def look(*addresses: str, key: str = "") -> list[Found]:
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return asyncio.run(find.look(headers, ports))


def page(value: dict[str, Any]) -> bytes:
    return message(200, value)


# What each engine answers, from its source or as it was seen.
ENGINES: dict[str, tuple[Pages, str | None]] = {
    "vllm": (
        {"/v1/models": listing("vllm", "m"), "/version": page({"version": "0.32.0"})},
        "0.32.0",
    ),
    "sglang": (
        {"/v1/models": listing("sglang", "m"), "/get_server_info": page({"version": "0.5.1"})},
        "0.5.1",
    ),
    "tgi": (
        {"/v1/models": listing("m", "m"), "/info": page({"model_id": "m", "version": "3.3.4"})},
        "3.3.4",
    ),
    "llama.cpp": (
        {"/v1/models": listing("llamacpp", "m"), "/props": page({"build_info": "b9222-1a2b3c"})},
        "b9222-1a2b3c",
    ),
    "lm-studio": ({"/v1/models": listing("organization_owner", "m")}, None),
    "ollama": (
        {"/v1/models": listing("library", "m"), "/api/version": page({"version": "0.12.0"})},
        "0.12.0",
    ),
    "servefit-sim": (
        {
            "/v1/models": listing("servefit-sim", "m"),
            "/version": page({"version": "servefit-sim 0.1.0"}),
        },
        "0.1.0",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_each_engine_is_recognised(name: str) -> None:
    pages, version = ENGINES[name]
    with serving(pages=pages) as address:
        [found] = look(address)
    assert found == Found(f"http://{address}", name, version, ("m",))


def test_the_table_is_tested_whole() -> None:
    assert {engine.name for engine in find.ENGINES} == set(ENGINES)


def test_a_server_behind_another_name_is_known_by_its_metrics() -> None:
    pages: Pages = {
        "/v1/models": listing("someone", "a", "b"),
        "/metrics": message(200, VLLM_METRICS, "text/plain"),
    }
    with serving(pages=pages) as address:
        [found] = look(address)
    assert (found.engine, found.version) == ("vllm", None)
    assert found.line() == f"vllm with model a (and 1 more) on http://{address}"


def test_a_server_that_nobody_knows_can_be_measured_all_the_same() -> None:
    with serving(pages={"/v1/models": listing(None, "m")}) as address:
        [found] = look(address)
    assert found == Found(f"http://{address}", None, None, ("m",))
    assert found.line() == f"a server with model m on http://{address}"


PROBLEMS: dict[str, tuple[Pages, str]] = {
    "html": ({"/v1/models": html()}, "not as an OpenAI-compatible API"),
    "nothing": ({"/v1/models": refusal(404)}, "not as an OpenAI-compatible API"),
    "other json": ({"/v1/models": page({"data": 3})}, "not as an OpenAI-compatible API"),
    "a redirect": (
        {"/v1/models": message(302, b"", extra="location: http://example.org/\r\n")},
        "not as an OpenAI-compatible API",
    ),
    "no model": ({"/v1/models": listing("vllm")}, "serves no model yet"),
    "a key": ({"/v1/models": refusal(401)}, "asks for a key: --api-key-file"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_answers_and_cannot_be_measured_is_told(case: str) -> None:
    pages, said = PROBLEMS[case]
    with serving(pages=pages) as address:
        found = look(address)
        with pytest.raises(TargetError, match=said) as caught:
            find.the_one(found, "sweep")
    assert f"http://{address} " in str(caught.value)


def test_a_server_that_hangs_costs_a_second() -> None:
    began = time.monotonic()
    with serving(pages={"/v1/models": silence}) as hanging, serving() as good:
        found = look(hanging, good)
        took_s = time.monotonic() - began
    assert "gave no answer in 1 s" in found[0].problem
    assert find.the_one(found, "run").url == f"http://{good}"
    assert took_s < 2.5  # aiohttp's import included


def test_the_key_is_shown_only_to_a_server_that_asks_for_one() -> None:
    heads: list[str] = []

    async def handle(lines: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while head := await lines.readuntil(b"\r\n\r\n"):
                heads.append(head.decode())
                refused = locked and b"Bearer secret" not in head
                reply = refusal(401) if refused else listing("vllm", "m")
                out.write(reply if b"/v1/models" in head else page({"version": "1"}))
        out.close()

    async def against() -> list[Found]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await find.look({"Authorization": "Bearer secret"}, [port])
        finally:
            server.close()

    for locked in (False, True):
        heads.clear()
        [found] = asyncio.run(against())
        assert (found.engine, found.version) == ("vllm", "1")
        assert "secret" not in heads[0]
        assert ("secret" in "".join(heads)) is locked


def test_one_server_on_both_address_families_is_told_once() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6 and IPv4 on one socket")

    async def handle(lines: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while head := await lines.readuntil(b"\r\n\r\n"):
                out.write(listing("vllm", "m") if b"/v1/models" in head else refusal(404))
        out.close()

    async def against(host: str, dual: bool) -> list[Found]:
        sock = socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6=dual)
        server = await asyncio.start_server(handle, sock=sock)
        try:
            return await find.look({}, [sock.getsockname()[1]])
        finally:
            server.close()

    try:
        [both] = asyncio.run(against("::", True))
        [alone] = asyncio.run(against("::1", False))
    except OSError:
        pytest.skip("needs ::1")
    assert both.url.startswith("http://127.0.0.1:")
    assert alone.url.startswith("http://[::1]:")


def test_nothing_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        assert look(f":{bound.getsockname()[1]}") == []
    with pytest.raises(TargetError) as caught:
        find.the_one([], "sweep")
    assert (
        "looked on this machine for vllm (port 8000), sglang (port 30000), tgi and llama.cpp "
        "(port 8080), lm-studio (port 1234), ollama (port 11434); start one, give the URL of one, "
        "or see a simulated one by `loadgen sweep --demo`"
    ) in str(caught.value)


def test_several_are_not_chosen_from() -> None:
    two = [Found("http://127.0.0.1:8000", "vllm", None, ("m",)),
           Found("http://127.0.0.1:1", problem="asks for a key"),
           Found("http://[::1]:8080", "tgi", None, ("m",))]  # fmt: skip
    with pytest.raises(UsageError) as caught:
        find.the_one(two, "run")
    assert str(caught.value) == (
        "2 servers found on this machine, say which: `loadgen run http://127.0.0.1:8000`, or "
        "`loadgen run http://[::1]:8080`"
    )


def test_a_model_for_embeddings_is_not_the_one_to_chat_with() -> None:
    names = ("nomic-embed-text:latest", "qwen3:8b", "text-embedding-3", "llama3.2:3b")
    with serving(pages={"/v1/models": listing("library", *names)}) as address:
        [found] = look(address)
    assert found.models == ("qwen3:8b", "llama3.2:3b", names[0], names[2])


# ---------------------------------------------------------------------------- on the command line


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Lets the command look at these ports and no others."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def at(*addresses: str) -> None:
        ports = tuple(int(address.rpartition(":")[2]) for address in addresses)
        monkeypatch.setattr(find, "PORTS", ports)

    return at


def loadgen(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli._guarded(args)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "run"])
def test_none_is_one_line_and_4(
    only: Any, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    only()
    code, err = loadgen(capsys, command)
    assert code == 4
    assert len(err.splitlines()) == 1
    assert err.startswith("loadgen: no inference server found")


def test_several_are_listed_and_2(only: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as one, serving() as two:
        only(one, two)
        code, err = loadgen(capsys, "sweep")
    assert code == 2
    *listed, refused = err.splitlines()
    assert [line.split(" on ")[1] for line in listed] == [f"http://{one}", f"http://{two}"]
    assert f"`loadgen sweep http://{two}`" in refused


def test_what_is_asked_of_a_server_that_was_found(
    only: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quick, unless something else was said; and the command that is kept repeats it."""
    seen: list[config.Options] = []

    def measure(url: str, given: dict[str, Any], *, single: bool = False) -> int:
        seen.append(asked.options_of(url, given))
        return 0

    monkeypatch.setattr(cli, "_measure", measure)
    monkeypatch.setattr("sys.argv", ["loadgen", "sweep"])
    with serving() as address:
        only(address)
        for args in (
            ["sweep"], ["sweep", "--requests", "90"], ["sweep", "--rate", "1"], ["run"]
        ):  # fmt: skip
            code, err = loadgen(capsys, *args)
            assert (code, err) == (0, f"found: a server with model tiny on http://{address}\n")
    with serving(pages={"/v1/models": listing("library", "my-embed", "m")}) as address_2:
        only(address_2)
        assert loadgen(capsys, "run") == (
            0,
            f"found: a server with model m (and 1 more) on http://{address_2}\n",
        )
        assert loadgen(capsys, "run", "--model", "my-embed")[0] == 0
    quick, counted, rate, one, *several = seen
    assert [options.model for options in several] == ["m", "my-embed"]
    assert "--model m" in several[0].command
    assert {options.url for options in seen[:4]} == {f"http://{address}"}
    flags = [f"--{name} {value}" for name, value in config.QUICK.items()]
    assert quick.command == " ".join(["loadgen sweep", f"http://{address}", *flags])
    assert (quick.auto, quick.budget_s) == ("concurrency", 60)
    assert (counted.auto, counted.requests) == ("concurrency", 90)
    assert (rate.rates_rps, rate.concurrency) == ((1.0,), ())
    assert (one.concurrency, one.duration_s) == ((1,), None)
