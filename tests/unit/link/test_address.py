"""Which address a server publishes: the decision, case by case."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError
from ucxx_transport.link.address import (
    Interface,
    choose_address,
    decide_address,
    default_route_source,
    list_interfaces,
    other_family,
)

LO = Interface(name="lo", address="127.0.0.1")
ETH = Interface(name="eth0", address="10.0.0.5")
SECOND = Interface(name="eth1", address="10.1.0.5")
DOCKER = Interface(name="docker0", address="172.17.0.1")
RDMA = Interface(name="ib0", address="192.168.7.5", rdma_device="mlx5_0")


def test_rdma_then_route_then_any_then_loopback() -> None:
    rows: list[tuple[list[Interface], str | None, str]] = [
        ([LO, ETH, RDMA], "10.0.0.5", "192.168.7.5"),
        ([LO, ETH, SECOND], "10.1.0.5", "10.1.0.5"),
        ([LO, ETH, SECOND], None, "10.0.0.5"),
        ([LO, ETH], "10.9.9.9", "10.0.0.5"),
        ([DOCKER, LO, SECOND], None, "10.1.0.5"),
        ([DOCKER, LO], None, "172.17.0.1"),
        ([LO], None, "127.0.0.1"),
        ([LO], "127.0.0.1", "127.0.0.1"),
    ]
    for interfaces, route_source, expected in rows:
        with row(interfaces=interfaces, route_source=route_source, expected=expected):
            assert decide_address(None, interfaces=interfaces, route_source=route_source) == expected


def test_interface_that_is_down_is_not_published() -> None:
    down = Interface(name="ib0", address="192.168.7.5", rdma_device="mlx5_0", up=False)
    assert decide_address(None, interfaces=[LO, ETH, down], route_source=None) == "10.0.0.5"


def test_devices_that_ucx_is_limited_to_limit_the_choice() -> None:
    rows: list[tuple[str, str]] = [
        ("eth1", "10.1.0.5"),
        ("mlx5_0:1", "192.168.7.5"),
        ("mlx5_0:1,eth1", "192.168.7.5"),
        ("lo", "127.0.0.1"),
        ("all", "192.168.7.5"),
        ("no_such", "192.168.7.5"),
        ("", "192.168.7.5"),
    ]
    for net_devices, expected in rows:
        with row(net_devices=net_devices, expected=expected):
            interfaces = [LO, ETH, SECOND, RDMA]
            chosen = decide_address(None, interfaces=interfaces, route_source="10.0.0.5", net_devices=net_devices)
            assert chosen == expected


def test_host_that_was_asked_for_wins() -> None:
    rows: list[tuple[str, str]] = [
        ("eth1", "10.1.0.5"),
        ("lo", "127.0.0.1"),
        ("10.2.3.4", "10.2.3.4"),
        ("trainer.example", "trainer.example"),
    ]
    for host, expected in rows:
        with row(host=host, expected=expected):
            assert decide_address(host, interfaces=[LO, ETH, SECOND, RDMA], route_source="10.0.0.5") == expected


def test_wildcard_cannot_be_published() -> None:
    rows: list[str] = [str(ipaddress.IPv4Address(0)), "::", "", "  "]
    for host in rows:
        with row(host=host), pytest.raises(ConfigError):
            decide_address(host, interfaces=[LO, ETH], route_source=None)


def test_ipv6_is_published_where_there_is_no_ipv4_besides_loopback() -> None:
    rows: list[tuple[str | None, list[Interface], str | None, str]] = [
        (None, [LO], None, "fd00::2"),
        (None, [LO], "eth0", "fd00::2"),
        (None, [LO], "lo", "127.0.0.1"),
        (None, [LO, SECOND], None, "10.1.0.5"),
        ("eth0", [LO], None, "fd00::2"),
        ("eth0", [LO, ETH], None, "10.0.0.5"),
        ("fd00::2", [LO, ETH], None, "fd00::2"),
        ("lo", [LO], None, "127.0.0.1"),
    ]
    for host, interfaces, net_devices, expected in rows:
        with row(host=host, interfaces=interfaces, net_devices=net_devices):
            assert expected == decide_address(
                host, interfaces=interfaces, route_source=None, net_devices=net_devices, ipv6={"eth0": "fd00::2"}
            )


def test_name_that_nobody_can_look_up_is_refused() -> None:
    rows: list[tuple[str, str]] = [
        ("no-such-host.invalid", "name that resolves: give one"),
        ("10.0.0.5:5000", "a port goes into"),
        ("a..b", ""),
    ]
    for host, problem in rows:
        with row(host=host), pytest.raises(ConfigError) as caught:
            choose_address(host)
        assert problem in str(caught.value)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_ipv6_loopback_is_published_only_where_clients_of_this_host_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TCP_AF_PRIO", raising=False)
    with pytest.raises(ConfigError, match="UCX_TCP_AF_PRIO=inet6,inet"):
        choose_address("::1")
    monkeypatch.setenv("UCX_TCP_AF_PRIO", "inet6,inet")
    assert choose_address("::1") == "::1"


def test_address_of_another_host_is_refused_and_what_may_be_published_instead_is_said() -> None:
    for host in ("255.255.255.254", "192.0.2.1"):
        with row(host=host), pytest.raises(ConfigError, match="not an address of this machine") as caught:
            choose_address(host)
        assert "publish_host" in str(caught.value)


def test_machine_without_any_address_is_told_so() -> None:
    with pytest.raises(ConfigError):
        decide_address(None, interfaces=[], route_source=None)


def test_this_machine_has_an_address_that_can_be_bound() -> None:
    interfaces = list_interfaces()
    assert any(interface.loopback for interface in interfaces)
    with socket.create_server((choose_address(), 0)):
        pass
    assert choose_address("lo") == "127.0.0.1"


def test_route_source_is_an_address_of_this_machine_or_none() -> None:
    source = default_route_source()
    assert source is None or source in {interface.address for interface in list_interfaces()}


def test_family_that_ucx_would_not_connect_back_by_is_refused() -> None:
    v6_first = {"TCP_AF_PRIO": "inet6,inet"}
    rows: list[tuple[str, dict[str, str], dict[str, str], str | None]] = [
        ("10.0.0.5", {}, {}, None),
        ("127.0.0.1", {}, {}, None),
        ("::1", {}, {}, "UCX_TCP_AF_PRIO=inet6,inet"),
        ("::1", v6_first, {}, None),
        ("::1", {}, {"UCX_TCP_AF_PRIO": "inet6"}, None),
        ("127.0.0.1", v6_first, {}, "UCX_TCP_AF_PRIO=inet,inet6"),
        ("127.0.0.1", v6_first, {"UCX_TCP_AF_PRIO": "inet,inet6"}, None),
    ]
    for address, given, environment, remedy in rows:
        with row(address=address, given=given, environment=environment):
            error = other_family(address, given, environment)
            assert (error is None) if remedy is None else (error is not None and remedy in str(error))
