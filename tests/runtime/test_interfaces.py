"""Hosts connect over the interface that leads to the first one, whatever their names lead to."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from sp3llm.runtime import interfaces
from sp3llm.runtime.interfaces import address_towards, gloo_uses, interface_towards

SET = "GLOO_SOCKET_IFNAME"
# As the operating system of the first of two hosts answers whose own names lead to themselves, and
# that of the second.
FIRST = {"first": "127.0.1.1", "10.0.0.2": "10.0.0.1", "fe80::2": "fe80::1%slow"}
SECOND = {"first": "10.0.0.2", "second": "127.0.1.1"}


@pytest.fixture
def on_host(monkeypatch):
    """Be the host of an address, which has three interfaces and knows some ways."""

    def be(ways: dict[str, str]) -> None:
        own = {
            "lo": ["127.0.0.1", "::1"],
            "slow": ["192.168.0.7", "fe80::1%slow"],
            "fast": ["00:16:3e:00:00:01", "10.0.0.1", "10.0.0.2"],
        }
        own = {name: [SimpleNamespace(address=each) for each in its] for name, its in own.items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: own)
        monkeypatch.setattr(interfaces, "address_towards", lambda host: ways.get(host, ""))

    return be


@pytest.mark.parametrize(
    ("ways", "hosts", "expected"),
    [
        (SECOND, ["first", "127.0.1.1", "10.0.0.2"], "fast"),
        (FIRST, ["first", "127.0.1.1", "10.0.0.2"], "fast"),  # by the other's address
        (FIRST, ["first", "127.0.1.1", "fe80::2"], "slow"),
        (FIRST, ["first", "127.0.1.1", ""], None),  # all on one machine
        (FIRST, ["first", "elsewhere"], None),
        ({"first": "10.9.9.9"}, ["first"], None),  # the address of no interface
    ],
)
def test_the_interface_is_that_which_leads_to_another_host(ways, hosts, expected, on_host):
    on_host(ways)
    assert interface_towards(hosts) == expected


def test_the_operating_system_says_from_where_a_host_is_reached():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") == ""
    for its in psutil.net_if_addrs().values():
        for each in its:
            if each.family == socket.AF_INET:
                assert address_towards(each.address) == each.address


@pytest.mark.parametrize("by_user", [None, "", "theirs"])
def test_torch_is_told_the_interface_while_it_connects_and_what_the_user_set_stays(
    by_user, monkeypatch
):
    monkeypatch.delenv(SET, raising=False)
    if by_user is not None:
        monkeypatch.setenv(SET, by_user)
    before = dict(os.environ)
    with gloo_uses("ours"):
        assert os.environ[SET] == ("ours" if by_user is None else by_user)
    assert os.environ == before
    with gloo_uses(None):
        assert os.environ == before
