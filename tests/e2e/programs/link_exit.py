"""Ends of a process that leaves a UCX link open: `python -m tests.e2e.programs.link_exit VARIANT [shm]`.

Each variant connects to itself, has a receive and a send of 64 MiB in flight, and ends without closing anything.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable

from ucxx_transport import ConfigError
from ucxx_transport.link.base import Endpoint, Pending
from ucxx_transport.link.ucxx import UCXXLink

HOST = "127.0.0.1"
SHM_LANES = "shm" in sys.argv[2:]


class Scene:
    """A link to itself, with operations in flight."""

    link: UCXXLink
    near: Endpoint
    far: Endpoint
    pendings: list[Pending]

    async def build(self) -> None:
        """Connect and post."""
        accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
        self.link = UCXXLink.create(shm_lanes=SHM_LANES)
        listener = await self.link.listen(0, accepted.put_nowait)
        self.near = await self.link.connect(HOST, listener.port)
        self.far = await accepted.get()
        self.pendings = [
            self.far.post_receive(bytearray(100)),
            self.near.post_send(bytearray(64 << 20)),
            self.near.post_receive(bytearray(64 << 20)),
            self.far.post_send(bytearray(64 << 20)),
        ]
        await asyncio.sleep(0.002)  # well into the transfer, or past it: the end must be clean at any moment


KEPT = Scene()


async def returns() -> None:
    """The loop is closed by `asyncio.run`, and what was open is forgotten."""
    await Scene().build()


async def returns_and_is_kept() -> None:
    """The same, reachable from a module until the interpreter ends."""
    await KEPT.build()


async def exits() -> None:
    """`sys.exit` in a task."""
    await KEPT.build()
    sys.exit(0)


async def without_collector() -> None:
    """Cycles stay to the end."""
    gc.disable()
    await Scene().build()


async def drops_its_buffers() -> None:
    """Nothing of the program refers to what is in flight."""
    scene = Scene()
    await scene.build()
    scene.pendings.clear()
    del scene
    gc.collect()


async def forks() -> None:
    """A forked child that uses the link gets a clear error and ends well, and the parent goes on."""
    await KEPT.build()
    child = os.fork()
    if child == 0:
        os._exit(
            _use_in_child()
        )  # as a child of multiprocessing does; asyncio's own clean-up would break the parent's loop
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    await KEPT.pendings[2].wait()
    await KEPT.pendings[3].wait()
    assert await KEPT.near.close()


def _use_in_child() -> int:
    uses: list[Callable[[], object]] = [
        lambda: KEPT.near.post_send(b"x"),
        lambda: KEPT.far.post_receive(bytearray(1)),
        lambda: UCXXLink(shm_lanes=False, spin_s=0.0, ucx={}),
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
    """The loop runs in a thread, which ends by itself or never."""
    built = threading.Event()

    async def scene() -> None:
        await KEPT.build()
        built.set()
        if forever:
            await asyncio.Event().wait()

    thread = threading.Thread(target=lambda: asyncio.run(scene()), daemon=daemon)
    thread.start()
    assert built.wait(30)
    if not forever:
        thread.join()


COROUTINES = {
    function.__name__: function
    for function in (returns, returns_and_is_kept, exits, without_collector, drops_its_buffers, forks)
}
THREADS = {
    "daemon_thread": lambda: in_a_thread(daemon=True, forever=True),
    "ended_thread": lambda: in_a_thread(daemon=False, forever=False),
}
VARIANTS = (*COROUTINES, *THREADS)

if __name__ == "__main__":
    chosen = sys.argv[1]
    if chosen in THREADS:
        THREADS[chosen]()
    else:
        asyncio.run(COROUTINES[chosen]())
