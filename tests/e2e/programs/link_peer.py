"""The other end of a UCX link: `python -m tests.e2e.programs.link_peer`.

Settings: `shm_lanes`, `port` (0 for any); the answer names the port. Each connection sends requests of 16 bytes, a
kind and a size, both u64; every request is announced on standard output as `{"request": kind}`:

| kind | what happens                                       |
|------|----------------------------------------------------|
| 1    | a reply of that many bytes 0x5a, at once           |
| 2    | no reply                                           |
| 3    | the connection is closed                           |
| 4    | a receive of that many bytes is posted             |
| 5    | the reply of kind 1, after the next line on stdin  |
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections import deque
from functools import partial

from tests.e2e.programs.request_lines import answer, log_to_stderr
from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink

REPLY, SILENT, CLOSE, RECEIVE, LATE = 1, 2, 3, 4, 5
CONTENT = 0x5A


def request(kind: int, nbytes: int = 0) -> bytes:
    """One request."""
    return kind.to_bytes(8, "little") + nbytes.to_bytes(8, "little")


class Connection:
    """Answers one connection until it ends.

    Args:
        endpoint: its end here.
        late: replies of kind 5 that wait for a line.
    """

    def __init__(self, endpoint: Endpoint, late: deque[tuple[Connection, int]]) -> None:
        self._endpoint = endpoint
        self._late = late
        self._asked = bytearray(16)
        endpoint.post_receive(self._asked, self._take)

    def lost(self, error: TransportError) -> None:
        """The client has gone."""
        answer({"lost": str(error)})
        self._endpoint.close()

    def reply(self, nbytes: int) -> None:
        """Send that many bytes."""
        if self._endpoint.alive:
            self._endpoint.post_send(bytes([CONTENT]) * nbytes)

    def _take(self, operation: Operation) -> None:
        if operation.error is not None:
            return
        kind, nbytes = (int.from_bytes(self._asked[at : at + 8], "little") for at in (0, 8))
        answer({"request": kind})
        if kind == REPLY:
            self.reply(nbytes)
        elif kind == LATE:
            self._late.append((self, nbytes))
        elif kind == CLOSE:
            self._endpoint.close()
            return
        elif kind == RECEIVE:
            self._endpoint.post_receive(bytearray(nbytes), lambda _: answer({"received": nbytes}))
            return  # what comes next is for that receive
        self._endpoint.post_receive(self._asked, self._take)


def main() -> None:
    """Serve until the end of standard input."""
    log_to_stderr()
    settings = json.loads(sys.stdin.readline())
    reactor = Reactor(partial(UCXXLink, shm_lanes=settings["shm_lanes"]))
    late: deque[tuple[Connection, int]] = deque()
    stopping = threading.Event()

    def go() -> None:
        connection, nbytes = late.popleft()
        connection.reply(nbytes)

    def read_lines() -> None:
        for _ in sys.stdin:
            reactor.submit(go)
        stopping.set()
        reactor.submit(lambda: None)

    listener = reactor.link.listen(settings["port"], lambda endpoint: Connection(endpoint, late))
    answer({"port": listener.port})
    threading.Thread(target=read_lines).start()
    while not stopping.is_set():
        reactor.run_once(math.inf)
    reactor.close()


if __name__ == "__main__":
    main()
