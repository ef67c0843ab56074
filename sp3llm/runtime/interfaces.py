"""The network interface over which hosts reach each other, whatever they call themselves."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator

_GLOO = "GLOO_SOCKET_IFNAME"


def address_towards(host: str) -> str:
    """From which of its addresses this host would send to another one, given by name or address;
    nothing where it knows no such host or no way there. Nothing is sent.
    """
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return probe.getsockname()[0]
    return ""


def interface_towards(hosts: Iterable[str]) -> str | None:
    """The network interface that leads to the first of several hosts, by name or address, which is
    another than this one as this one sees it; None where there is none.

    A host's own name often leads to 127.0.0.1, which is another host's own too.
    """
    import psutil

    for address in map(address_towards, filter(None, hosts)):
        if address and not ipaddress.ip_address(address).is_loopback:
            for interface, its in psutil.net_if_addrs().items():
                if any(each.address == address for each in its):
                    return interface
    return None


@contextlib.contextmanager
def gloo_uses(interface: str | None) -> Iterator[None]:
    """Have groups of processes that are made in the block connect through an interface; None: what
    the host's own name leads to. What the user has set in the environment stays.
    """
    if interface is None or _GLOO in os.environ:
        yield
        return
    os.environ[_GLOO] = interface  # torch takes it from nowhere else
    try:
        yield
    finally:
        del os.environ[_GLOO]
