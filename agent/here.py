"""Whether an address is this machine's own."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit


def on_this_machine(url: str) -> bool:
    """Whether every address of a URL's host is one of this machine's own.

    A tunnel (ssh -L) or a proxy on such an address is taken for the server. Asks the resolver, so
    it may take seconds. Raises OSError where the name has no address.
    """
    host = urlsplit(url).hostname
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    return bool(infos) and all(is_own_address(info[4]) for info in infos)


def is_own_address(address: tuple[object, ...]) -> bool:
    """Whether a socket address (IPv4 or IPv6, as getaddrinfo gives it) belongs to this machine.

    Own addresses can be bound to, and are their own source towards themselves. Both are asked:
    with ip_nonlocal_bind (common where addresses move between machines) any can be bound to.
    """
    ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
    if ip.is_loopback or ip.is_unspecified:
        return True
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    here = (str(address[0]), 0, *address[2:])
    there = (str(address[0]), 9, *address[2:])  # nothing is sent by connecting a datagram socket
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as bound:
            bound.bind(here)
        with socket.socket(family, socket.SOCK_DGRAM) as routed:
            routed.connect(there)
            source = str(routed.getsockname()[0]).partition("%")[0]
    except OSError:
        return False
    return ipaddress.ip_address(source) == ip
