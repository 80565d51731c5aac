"""A daemon thread with an event loop and a portal into it, for blocking callers."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import anyio
from anyio.from_thread import BlockingPortal

T = TypeVar("T")

_JOIN_TIMEOUT_S = 5.0


class LoopThread:
    """Runs coroutines for threads that have no event loop.

    anyio's own `start_blocking_portal` would keep the interpreter from exiting until it is stopped; a trainer that
    forgets to close its client must still be able to end, so this thread is a daemon and stops at exit.

    Args:
        name: of the thread. on_exit: run at interpreter exit, before the loop stops.
    """

    def __init__(self, name: str) -> None:
        self._up: Future[BlockingPortal] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._portal = self._up.result()
        atexit.register(self.stop)

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run `function()` in the loop and return its result; interrupted, the task is cancelled there."""
        future = self._portal.start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs in the loop and end the thread. Idempotent, bounded."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            try:
                self._portal.start_task_soon(partial(self._portal.stop, cancel_remaining=True))
            except RuntimeError:
                return  # stopped already
            self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        async def main() -> None:
            async with BlockingPortal() as portal:
                self._up.set_result(portal)
                await portal.sleep_until_stopped()

        try:
            anyio.run(main)
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: whoever waits for the portal must hear of it
            if not self._up.done():
                self._up.set_exception(error)
