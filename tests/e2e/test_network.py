"""The network as it is: firewalls that drop, hosts without IPv4, in network namespaces."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.support.namespaces import Host, lone_host, two_hosts
from tests.support.programs import Program, program
from tests.support.rows import row
from tests.support.waiting import wait_until

PORTS = range(15001, 15002)
DATA_PORTS = range(15100, 15132)
LONG_S = 60.0
READS = 20


@contextmanager
def worker(host: Host, **server: Any) -> Iterator[Program]:
    """A ring that is served on `PORTS`, by a thread."""
    settings = {"host": host.address, "ports": list(PORTS), "mode": "thread", "start_timeout_s": 60.0, **server}
    with program("writer", prefix=host.prefix) as running:
        running.ask(create={"slots": 8, "slot_bytes": 4096}, server=settings, stream=1)
        yield running
        running.end_input()
        assert running.wait() == 0


@contextmanager
def trainer(host: Host, **client: Any) -> Iterator[Program]:
    """A client that reads everything over UCX."""
    with program("reader", prefix=host.prefix) as running:
        running.ask(client={"local": "off", "connect_timeout_s": 1.0, **client})
        yield running
        running.end_input()
        assert running.wait() == 0


def written(at: Program, sequence: int) -> str:
    """The reference of one more payload."""
    answer = at.ask(id=sequence, what="write", sequence=sequence, nbytes=1000, how="write_raw", dwell_s=0)
    assert answer["outcome"] == "written", answer
    return str(answer["ref"])


def begin_read(by: Program, ref: str, *, deadline_s: float) -> None:
    by.tell(id=0, what="read", ref=ref, deadline_s=deadline_s, dwell_s=0)


def asked_and_unanswered(host: Host, peer: Host) -> list[str]:
    """Connections that `host` has begun to `peer`, whose first packet has no answer yet: the state SYN_SENT."""
    command = [*host.prefix, "cat", "/proc/net/tcp"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    there = socket.inet_aton(peer.address)[::-1].hex().upper()
    rows = [line.split() for line in table.splitlines()[1:]]
    return [f"{own} {other}" for _, own, other, state, *_ in rows if state == "02" and other.startswith(there)]


def test_others_read_while_a_client_whose_firewall_drops_what_comes_is_connected() -> None:
    with two_hosts() as (near, far), ExitStack() as stack:
        far.drop_what_comes(near.address, reached=PORTS)
        source = stack.enter_context(worker(near))
        walled = stack.enter_context(trainer(far, connect_timeout_s=LONG_S))
        free = stack.enter_context(trainer(near, connect_timeout_s=LONG_S))
        begin_read(walled, written(source, 1), deadline_s=LONG_S)
        wait_until(lambda: asked_and_unanswered(near, far), what="the port connects to the walled client")
        for sequence in range(2, 2 + READS):
            begin_read(free, written(source, sequence), deadline_s=LONG_S)
            assert free.hear()["outcome"] == "delivered", sequence
        assert asked_and_unanswered(near, far), "the port still connects to the walled client"
        assert not walled.has_spoken(), "its attempt has not ended"
        far.heal()
        assert walled.hear()["outcome"] == "delivered", "once it lets the port in, its packets are sent again"


def test_a_client_whose_firewall_drops_what_comes_learns_why() -> None:
    with two_hosts() as (near, far), ExitStack() as stack:
        far.drop_what_comes(near.address, reached=PORTS)
        source = stack.enter_context(worker(near))
        walled = stack.enter_context(trainer(far))
        begin_read(walled, written(source, 1), deadline_s=5.0)
        outcome = walled.hear()
        assert outcome["outcome"] in {"PeerLostError", "DeadlineExceededError"}, outcome
        assert "the listener answered, the data port did not" in outcome["message"], outcome


def test_data_ports_that_both_firewalls_open_are_all_that_ucx_needs() -> None:
    span = (DATA_PORTS.start, DATA_PORTS.stop - 1)
    with two_hosts() as (near, far), ExitStack() as stack:
        near.drop_what_comes(far.address, reached=DATA_PORTS, opened=[PORTS, DATA_PORTS])
        far.drop_what_comes(near.address, reached=range(PORTS.start, DATA_PORTS.stop), opened=[DATA_PORTS])
        source = stack.enter_context(worker(near, data_ports=span))
        reads = stack.enter_context(trainer(far, data_ports=span))
        begin_read(reads, written(source, 1), deadline_s=30.0)
        assert reads.hear()["outcome"] == "delivered"


SERVE = """
import json, sys
from ucxx_transport import (
    ClientConfig, ConfigError, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer
)
with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=1024)) as ring:
    for host in json.loads(sys.argv[1]):
        try:
            with (
                UCXXServer(ring, ServerConfig(ports=1, host=host, mode="thread")) as server,
                SyncUCXXClient(ClientConfig(local="off", deadline_s=30, connect_timeout_s=20)) as client,
                client.read(ring.write_raw(bytes(1024))) as payload,
            ):
                print(json.dumps(["read", f"{server.address} {len(payload.buffer)}"]))
        except ConfigError as error:
            print(json.dumps(["refused", error.message]))
"""


def test_host_without_ipv4_is_read_from_and_publishes_no_address_that_clients_cannot_reach() -> None:
    rows: list[tuple[str | None, str, str]] = [
        (None, "read", "fd00::2 1024"),
        ("fd00::2", "read", "fd00::2 1024"),
        ("eth0", "read", "fd00::2 1024"),
        ("127.0.0.1", "read", "127.0.0.1 1024"),
        ("1.2.3.4", "refused", "not an address of this machine"),
        ("1.2.3.4:5000", "refused", "a port in it"),
        ("fd00::7", "refused", "fd00::7"),
        ("::1", "refused", "UCX_TCP_AF_PRIO=inet6,inet"),
    ]
    with lone_host("fd00::2") as host:
        command = [*host.prefix, sys.executable, "-c", SERVE, json.dumps([asked for asked, _, _ in rows])]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    for (asked, outcome, words), line in zip(rows, lines, strict=True):
        with row(asked=asked, line=line):
            found, text = json.loads(line)
            assert found == outcome
            assert words in text
