"""A listener that is closed while clients connect: `python -m tests.e2e.programs.late_clients [without_descriptors]`.

They were accepted, and say only then what a client of UCX begins with, which it has been heard to say before. The
process has sockets of its own, too, some with the number of the listener's port, and one is waiting for that port.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ucxx_transport.errors import TransportError
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink

HOST, HOST_6 = "127.0.0.1", "::1"
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
    with ExitStack() as own:
        talks = [own.enter_context(each) for talk in own_talks(listener.port) for each in talk]
        heir = Heir(listener.port)
        socket.setdefaulttimeout(30)
        with no_descriptors() if sys.argv[1:] else ExitStack():
            listener.close()
        socket.setdefaulttimeout(None)
        heir.join()
        switched = [each for each in talks if not os.get_blocking(each.fileno())]
        cut = [one for one, other in zip(talks[::2], talks[1::2], strict=True) if not are_heard(one, other)]
        cut += [heir.server for _ in range(not heir.is_reached())]
    for client in clients:
        with suppress(OSError):
            client.send(said[1:] if client in clients[::2] else said)
    heard = [client for client in clients if not closed(client)]
    reactor.close()
    sys.stdout.write(f"closed with {len(heard)} clients that hear on; of its own {len(switched + cut)} hurt\n")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 10, hard))
    with suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)


def own_talks(port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Pairs of connected sockets that are no link's; of all but the first, one has a listener's port."""
    yield socket.socketpair()
    with socket.create_server((HOST_6, port), family=socket.AF_INET6) as server:
        yield socket.create_connection((HOST_6, port)), server.accept()[0]
    near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    far.bind((HOST, port))
    near.connect((HOST, port))
    yield near, far


def are_heard(one: socket.socket, other: socket.socket) -> bool:
    other.settimeout(30)
    with suppress(OSError):
        one.send(b"x")
        return other.recv(1) == b"x"
    return False


class Heir(threading.Thread):
    """Takes a port as soon as it is free."""

    server: socket.socket

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.start()

    def run(self) -> None:
        while not hasattr(self, "server"):
            with suppress(OSError):
                self.server = socket.create_server((HOST, self.port))

    def is_reached(self) -> bool:
        with self.server, suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=30).close()
            return True
        return False


def closed(client: socket.socket) -> bool:
    """Whether the listener's side has ended the connection, which it does before it goes."""
    client.settimeout(30)
    with suppress(ConnectionError):
        return client.recv(1) == b""
    return True


if __name__ == "__main__":
    main()
