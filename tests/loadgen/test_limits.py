"""What this machine can hold open is known before a run asks for more, and said with its cure."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from agent.model import UsageError
from loadgen import limits
from tests.e2e.command import SMALL, loadgen, the_line
from tests.e2e.misbehaving import good, serving

SLOW = partial(good, tokens=2, pause_s=1.5)


def files_limited(soft: int, hard: int) -> Callable[[], None]:
    """For a child, before it starts."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def child(code: str, soft: int, hard: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        preexec_fn=files_limited(soft, hard),
    )  # fmt: skip
    return done.stdout.strip()


# ---------------------------------------------------------------------------------- descriptors


def test_the_soft_limit_is_raised_as_far_as_it_must_be() -> None:
    code = (
        "import resource; from loadgen import limits; print(limits.allow_files({wanted}),"
        "resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert child(code.format(wanted=300), 256, 512) == "300 (300, 512)"
    assert child(code.format(wanted=200), 256, 512) == "256 (256, 512)"
    assert child(code.format(wanted=900), 256, 512) == "512 (512, 512)"


def test_what_the_hard_limit_forbids_is_refused_with_what_would_fit() -> None:
    code = (
        "from loadgen import limits\nfrom agent.model import UsageError\n"
        "limits.check_streams(400, processes=2)\n"
        "for streams in (400, {most}):\n"
        "  try: limits.check_streams(streams); print('fits')\n"
        "  except UsageError as error: print(error)"
    )
    said, *_ = child(code.format(most=1), 256, 300).splitlines()
    assert "--concurrency 400 takes" in said
    assert "and 300 are allowed here: raise the limit (`ulimit -n " in said
    most = int(said.rpartition(" at most ")[2].split()[0])
    assert 200 < most < 300
    assert child(code.format(most=most), 256, 300).splitlines()[1] == "fits"
    assert "takes" in child(code.format(most=most + 1), 256, 300).splitlines()[1]


def test_open_files_are_counted() -> None:
    before = limits.open_files()
    with open(os.devnull), open(os.devnull):
        assert limits.open_files() == before + 2


def test_a_sweep_beyond_the_descriptors_is_refused_before_it_starts(tmp_path: Path) -> None:
    with serving() as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SMALL, "--concurrency", "1,5000",
            preexec_fn=files_limited(256, 1024),
        )  # fmt: skip
    assert done.returncode == 2
    assert "--concurrency 5000" in the_line(done.stderr)
    assert "`ulimit -n" in the_line(done.stderr)
    assert "[1/" not in done.stderr


def test_streams_above_the_soft_limit_are_held(tmp_path: Path) -> None:
    """Of the simulated engine too, that takes a descriptor a stream as its client does."""
    result = tmp_path / "out.json"
    done = loadgen(
        tmp_path, "run", "sim:h100-sxm/llama-3.1-8b", *SMALL, "--concurrency", "120",
        "--requests", "120", "--json", str(result), preexec_fn=files_limited(100, 1024),
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    [level] = json.loads(result.read_bytes())["levels"]
    assert (level["requests"]["ok"], level["requests"]["failed"]) == (120, 0)


def test_a_rate_beyond_the_descriptors_is_refused_before_the_first_level(tmp_path: Path) -> None:
    slow = partial(good, tokens=1, pause_s=0)

    async def probe(number: int, out: object) -> None:
        import asyncio

        await asyncio.sleep(0.5)
        await slow(number, out)  # type: ignore[arg-type]

    with serving(probe=probe) as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SMALL, "--rate", "1,4000",
            preexec_fn=files_limited(256, 1024),
        )  # fmt: skip
    assert done.returncode == 2
    assert "--rate 4000 with replies of 0.5" in the_line(done.stderr)
    assert "ulimit -n" in the_line(done.stderr)


def test_a_rate_that_the_level_before_shows_to_be_too_much_is_not_tried(tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    with serving(SLOW) as address:
        done = loadgen(
            tmp_path, "sweep", f"http://{address}", *SMALL, "--rate", "2,300", "--duration", "3s",
            "--json", str(result), preexec_fn=files_limited(256, 256),
        )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert "note: no further level is tried: --rate 300 with replies of 1.5" in done.stderr
    assert [level["offered_rps"] for level in json.loads(result.read_bytes())["levels"]] == [2.0]


def test_descriptors_that_run_out_within_a_level_are_the_clients_limit(tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    with serving(SLOW) as address:
        done = loadgen(
            tmp_path, "run", f"http://{address}", *SMALL, "--rate", "60", "--duration", "3s",
            "--json", str(result), preexec_fn=files_limited(72, 72),
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    [level] = json.loads(result.read_bytes())["levels"]
    assert level["requests"]["errors"].get("no_descriptor", 0) > 0
    reasons = level["measurement"]["reasons"]
    assert any(
        why.startswith("client_limited") and "file descriptor (`ulimit -n`)" in why
        for why in reasons
    )
    assert "CLIENT_LIMITED" in done.stdout


# ----------------------------------------------------------------------------------------- ports

TABLE = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   1: 0100007F:D431 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0
   2: 0100007F:D432 0100007F:1F40 06 00000000:00000000 00:00000000 00000000     0
   3: 0100007F:1F40 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0
   4: 0100007F:D433 0100007F:01BB 01 00000000:00000000 00:00000000 00000000     0
"""


def proc(folder: Path, ports: str = "32768\t60999\n") -> Path:
    (folder / "sys/net/ipv4").mkdir(parents=True)
    (folder / "net").mkdir()
    (folder / "sys/net/ipv4/ip_local_port_range").write_text(ports)
    (folder / "net/tcp").write_text(TABLE)
    return folder


def test_free_ports(tmp_path: Path) -> None:
    here = proc(tmp_path)
    assert limits.free_ports(8000, here) == 28_232 - 2
    assert limits.free_ports(443, here) == 28_232 - 1
    assert limits.free_ports(None, here) == 28_232
    assert limits.free_ports(8000, tmp_path / "none") is None  # macOS


@pytest.mark.parametrize(("reuse", "here", "away"), [("0", 2, 1), ("1", 1, 0), ("2", 1, 1)])
def test_a_closed_connections_port_is_free_where_the_kernel_uses_it_again(
    tmp_path: Path, reuse: str, here: int, away: int
) -> None:
    folder = proc(tmp_path)
    (folder / "sys/net/ipv4/tcp_tw_reuse").write_text(f"{reuse}\n")
    (folder / "net/tcp6").write_text(
        f"head\n  0: {'0' * 32}:D440 {'F' * 32}:1F41 06 00000000:00000000 00:00000000 00000000\n"
    )
    assert limits.free_ports(8000, folder) == 28_232 - here
    assert limits.free_ports(8001, folder) == 28_232 - away


def test_connections_of_ours_take_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = limits.free_ports(port)
        if before is None:
            pytest.skip("needs /proc")
        with socket.create_connection(("127.0.0.1", port)):
            assert limits.free_ports(port) == before - 1


def test_more_streams_than_ports_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "free_ports", lambda port: 500)
    monkeypatch.setattr(limits, "allow_files", lambda wanted: wanted)
    limits.check_streams(500, 8000)
    with pytest.raises(UsageError) as caught:
        limits.check_streams(501, 8000)
    assert str(caught.value) == (
        "--concurrency 501 takes 501 local ports and 500 are free: widen their range "
        "(`sysctl -w net.ipv4.ip_local_port_range='1024 65535'`), measure from more addresses "
        "(another machine or container), or ask for at most 500 streams"
    )
    limits.check_rate(50, 10.0, 8000)
    with pytest.raises(UsageError, match=r"--rate 60 with replies of 10 s takes 600 local ports"):
        limits.check_rate(60, 10.0, 8000)


def test_the_messages_of_the_system_are_told_apart() -> None:
    import errno

    from loadgen.client import connect_error_kind

    assert connect_error_kind(OSError(errno.EMFILE, "x")) == "no_descriptor"
    assert connect_error_kind(OSError(errno.EADDRNOTAVAIL, "x")) == "no_port"
    assert connect_error_kind(OSError(errno.ECONNREFUSED, "x")) == "connect"
    assert connect_error_kind(TimeoutError()) == "connect"
