"""Ends of a process that leaves a UCX link open: `python -m tests.e2e.programs.link_exit VARIANT [shm]`.

Each variant connects to itself, has a receive and a send of 64 MiB in flight, and ends without closing anything.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link.base import Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink

HOST = "127.0.0.1"
FACTORY = partial(UCXXLink, shm_lanes="shm" in sys.argv[2:])


class Owner:
    """Of both ends; what it hears is of no interest."""

    def lost(self, error: TransportError) -> None: ...


class Scene:
    """A link to itself, with operations in flight."""

    reactor: Reactor
    near: Endpoint
    far: Endpoint
    operations: list[Operation]

    def build(self) -> None:
        """Connect and post."""
        accepted: list[Endpoint] = []

        def accept(endpoint: Endpoint) -> Owner:
            accepted.append(endpoint)
            return Owner()

        self.reactor = Reactor(FACTORY)
        listener = self.reactor.link.listen(0, accept)
        self.near = self.reactor.link.connect(HOST, listener.port, Owner())
        while not accepted:
            self.reactor.run_once(math.inf)
        self.far = accepted[0]
        self.operations = [
            self.far.post_receive(bytearray(100), self._ended),
            self.near.post_send(bytearray(64 << 20), channel=1),
            self.near.post_receive(bytearray(64 << 20), self._ended),
            self.far.post_send(bytearray(64 << 20)),
        ]
        end = time.monotonic() + 0.002  # well into the transfer, or past it: the end must be clean at any moment
        while time.monotonic() < end:
            self.reactor.poll()

    def _ended(self, _operation: Operation) -> None: ...


KEPT = Scene()


def returns() -> None:
    """The scene is out of reach when the function ends."""
    Scene().build()


def returns_and_is_kept() -> None:
    """The same, reachable from a module until the interpreter ends."""
    KEPT.build()


def exits() -> None:
    """`sys.exit` with everything open."""
    KEPT.build()
    sys.exit(0)


def without_collector() -> None:
    """Cycles stay to the end."""
    gc.disable()
    Scene().build()


def drops_its_buffers() -> None:
    """Nothing of the program refers to what is in flight."""
    scene = Scene()
    scene.build()
    scene.operations.clear()
    del scene
    gc.collect()


def forks() -> None:
    """A forked child that uses the link gets a clear error and ends well, and the parent goes on."""
    KEPT.build()
    child = os.fork()
    if child == 0:
        status = _use_in_child()
        if status:
            os._exit(status)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    closed: list[bool] = []
    while not all(operation.completed for operation in KEPT.operations[2:]):
        KEPT.reactor.run_once(math.inf)
    assert [operation.error for operation in KEPT.operations[2:]] == [None, None]
    KEPT.near.close(closed.append)
    while not closed:
        KEPT.reactor.run_once(math.inf)
    assert closed == [True]


def _use_in_child() -> int:
    uses: list[Callable[[], object]] = [
        lambda: KEPT.near.post_send(b"x"),
        lambda: KEPT.far.post_receive(bytearray(1), lambda _: None),
        lambda: KEPT.reactor.run_once(0),
        lambda: Reactor(FACTORY).link,
    ]
    for use in uses:
        try:
            use()
        except ConfigError as exc:
            if "fork" not in str(exc):
                return 3
        else:
            return 4
    return 0


def in_a_thread(*, daemon: bool, forever: bool) -> None:
    """The reactor runs in a thread, which ends by itself or never."""
    built = threading.Event()

    def scene() -> None:
        KEPT.build()
        built.set()
        while forever:
            KEPT.reactor.run_once(math.inf)

    thread = threading.Thread(target=scene, daemon=daemon)
    thread.start()
    assert built.wait(30)
    if not forever:
        thread.join()


CHOICES: dict[str, Callable[[], None]] = {
    **{
        function.__name__: function
        for function in (returns, returns_and_is_kept, exits, without_collector, drops_its_buffers, forks)
    },
    "daemon_thread": lambda: in_a_thread(daemon=True, forever=True),
    "ended_thread": lambda: in_a_thread(daemon=False, forever=False),
}
VARIANTS = tuple(CHOICES)

if __name__ == "__main__":
    CHOICES[sys.argv[1]]()
