"""Which addresses are this machine's own."""

from __future__ import annotations

import socket

import pytest

from agent.here import is_own_address, on_this_machine


def test_own_addresses() -> None:
    assert is_own_address(("127.0.0.1", 0))
    assert is_own_address(("127.8.9.1", 80))
    assert is_own_address(("0.0.0.0", 80))
    assert is_own_address(("::1", 80, 0, 0))
    assert not is_own_address(("192.0.2.1", 80))  # TEST-NET-1: nobody's
    assert not is_own_address(("2001:db8::1", 80, 0, 0))


def test_this_machines_address_is_its_own() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as routed:
        try:
            routed.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no network: loopback is the only address")
        assert is_own_address(routed.getsockname())


def test_a_url_is_here_by_its_host() -> None:
    assert on_this_machine("http://localhost:8000/v1")
    assert not on_this_machine("http://192.0.2.1:8000/v1")
    with pytest.raises(OSError, match=r"."):
        on_this_machine("http://no-such-name.invalid/v1")
