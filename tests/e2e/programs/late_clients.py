"""A listener that is closed while clients connect: `python -m tests.e2e.programs.late_clients`.

They were accepted, and say only then what a client of UCX begins with, which it has been heard to say before.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress

from ucxx_transport.errors import TransportError
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink

HOST = "127.0.0.1"
CLIENTS = 16


class Owner:
    """What it hears is of no interest."""

    def lost(self, error: TransportError) -> None: ...


def words_of_a_client() -> bytes:
    """What a client of UCX sends first."""
    reactor = Reactor(UCXXLink)
    with socket.create_server((HOST, 0)) as plain:
        reactor.link.connect(HOST, plain.getsockname()[1], Owner())
        plain.settimeout(0)
        said = b""
        heard: socket.socket | None = None
        while not said:
            reactor.run_once(reactor.now() + 0.01)
            with suppress(BlockingIOError):
                if heard is None:
                    heard, _ = plain.accept()
                    heard.settimeout(0)
                said = heard.recv(4096)
    reactor.close()
    return said


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refuse(_endpoint: Endpoint) -> None:
    return None


def main() -> None:
    said = words_of_a_client()
    reactor = Reactor(UCXXLink)
    listener = reactor.link.listen(0, refuse)
    before = descriptors()
    clients = [socket.create_connection((HOST, listener.port)) for _ in range(CLIENTS)]
    while descriptors() < before + 2 * CLIENTS:
        reactor.run_once(reactor.now() + 0.01)  # UCX accepts in a thread of its own
    for client in clients[::2]:
        client.send(said[:1])
    listener.close()
    for client in clients:
        with suppress(OSError):
            client.send(said[1:] if client in clients[::2] else said)
    heard = [client for client in clients if not closed(client)]
    reactor.close()
    sys.stdout.write(f"closed with {len(heard)} clients that hear on\n")


def closed(client: socket.socket) -> bool:
    """Whether the listener's side has ended the connection, which it does before it goes."""
    client.settimeout(30)
    with suppress(ConnectionError):
        return client.recv(1) == b""
    return True


if __name__ == "__main__":
    main()
