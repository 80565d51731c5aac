"""Hosts for one test: network namespaces with a wire between them, firewalls that drop, and a /dev/shm of its own.

A firewall here is a routing rule: the host sends nothing by TCP but from or to the ports that are open, so that the
answer to a connection request from outside is dropped in silence. That needs iproute2 alone, and no packet filter.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

__all__ = ["Host", "hosts_beside_this_one", "lone_host", "small_shared_memory", "two_hosts"]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace.

    Attributes:
        name: of the namespace.
        address: its IPv4 or IPv6 address.
    """

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command line begins with to run there."""
        return ("ip", "netns", "exec", self.name)

    def drop_what_comes(self, peer: str, *, reached: range, opened: Iterable[range] = ()) -> None:
        """Drop what `peer` begins; connections of this host's own go on.

        Args:
            peer: the other host's address.
            reached: ports of the peer that this host connects to.
            opened: ports of this host that are not dropped.
        """
        lanes = [f"dport {_span(reached)}", *(f"sport {_span(ports)}" for ports in opened)]
        for lane in lanes:
            _ip(f"-n {self.name} rule add to {peer} {lane} ipproto tcp priority 10 table main")
        _ip(f"-n {self.name} rule add to {peer} ipproto tcp priority 20 blackhole")

    def cut_off(self, peers: Iterable[Host]) -> None:
        """Send these others nothing any more, until `heal`; what they send arrives, and is not answered."""
        for peer in peers:
            _ip(f"-n {self.name} rule add to {peer.address} priority 10 blackhole")

    def heal(self) -> None:
        """Undo `cut_off` and `drop_what_comes`."""
        _ip(f"-n {self.name} rule flush")
        for table, priority in (("main", 32766), ("default", 32767)):  # as every namespace begins
            _ip(f"-n {self.name} rule add table {table} priority {priority}")


@contextmanager
def lone_host(address: str = "fd00::2") -> Iterator[Host]:
    """A host with loopback and one interface, `eth0`; skips the test where namespaces are not to be had."""
    with _namespaces(1) as (name,):
        _ip(f"-n {name} link add eth0 type veth peer name eth1")
        _interface(name, "eth0", address)
        _ip(f"-n {name} link set eth1 up")
        yield Host(name, address)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire; skips the test where namespaces are not to be had."""
    with _namespaces(2) as (one, other):
        ends = (f"{one}v", f"{other}v")
        _ip(f"link add {ends[0]} netns {one} type veth peer name {ends[1]} netns {other}")
        hosts = (Host(one, "10.77.0.1"), Host(other, "10.77.0.2"))
        for host, end in zip(hosts, ends, strict=True):
            _interface(host.name, end, host.address)
        yield hosts


@contextmanager
def hosts_beside_this_one(count: int) -> Iterator[list[Host]]:
    """Hosts on one wire with the test's own; skips the test where namespaces are not to be had."""
    bridge, net = f"ut{os.getpid()}br", f"10.78.{os.getpid() % 256}"
    with _namespaces(count) as names, ExitStack() as stack:
        _ip(f"link add {bridge} type bridge")
        stack.callback(_ip, f"link del {bridge}")
        _ip(f"addr add {net}.254/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        hosts = []
        for number, name in enumerate(names, 1):
            _ip(f"link add {name}b type veth peer name eth0 netns {name}")
            _ip(f"link set {name}b master {bridge} up")
            _interface(name, "eth0", f"{net}.{number}")
            hosts.append(Host(name, f"{net}.{number}"))
        yield hosts


def small_shared_memory(size: str) -> tuple[str, ...]:
    """What a command line begins with to run with an empty /dev/shm of that size; skips the test where none is had."""
    mount = f'mount --make-rprivate / && mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mount namespaces (root, util-linux): {getattr(error, 'stderr', error)}")
    return prefix


def _interface(host: str, interface: str, address: str) -> None:
    how = "/64 nodad" if ":" in address else "/24"  # nodad: it is usable at once
    _ip(f"-n {host} addr add {address}{how} dev {interface}")
    _ip(f"-n {host} link set {interface} up")


@contextmanager
def _namespaces(count: int) -> Iterator[list[str]]:
    if problem := _what_is_missing():
        pytest.skip(problem)
    names = [f"ut{os.getpid()}n{next(_numbers)}" for _ in range(count)]  # an interface's name has 15 characters at most
    with ExitStack() as stack:
        for name in names:
            _ip(f"netns add {name}")
            stack.callback(_ip, f"netns del {name}")
            _ip(f"-n {name} link set lo up")
        yield names


@functools.cache
def _what_is_missing() -> str:
    """Why there are no namespaces here, or ""."""
    name = f"ut{os.getpid()}try"
    try:
        _ip(f"netns add {name}")
    except (OSError, AssertionError) as error:
        return f"needs network namespaces (root, iproute2): {error}"
    try:
        _ip(f"-n {name} rule add ipproto tcp dport 1-2 priority 10 table main")
    except AssertionError as error:
        return f"needs routing rules by port: {error}"
    finally:
        _ip(f"netns del {name}")
    return ""


def _span(ports: range) -> str:
    return f"{ports.start}-{ports.stop - 1}"


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=20, check=False)  # noqa: S607 - wherever it is
    assert done.returncode == 0, f"ip {command}: {done.stderr.strip()}"
