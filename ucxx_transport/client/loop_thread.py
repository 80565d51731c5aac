"""A daemon thread with an event loop, for blocking callers."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from ucxx_transport.errors import ConfigError

T = TypeVar("T")

_JOIN_TIMEOUT_S = 5.0
# A caller looks this often whether the loop still runs: what is handed to it in its last moment is never done.
_LOOK_S = 1.0


class LoopThread:
    """Runs coroutines for threads that have no event loop.

    A daemon that stops at exit: a trainer that forgets to close its client must still be able to end. Not anyio's
    blocking portal, which keeps the interpreter from exiting until it is stopped, and costs a call as much again as the
    two hops between the threads.
    """

    def __init__(self, name: str) -> None:
        self._up: Future[asyncio.AbstractEventLoop] = Future()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._loop = self._up.result()
        atexit.register(self.stop)

    def submit(self, function: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run `function()` in the loop; cancelling the future cancels the task. A ConfigError: it has been stopped."""
        coroutine = function()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise self._stopped() from None

    def call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`submit`, and wait for the `result`; errors as both."""
        return self.result(self.submit(function))

    def result(self, future: Future[T]) -> T:
        """Wait for what was submitted; interrupted, the task is cancelled. A ConfigError: the loop has been stopped."""
        try:
            while True:
                try:
                    return future.result(_LOOK_S)
                except TimeoutError:
                    if future.done():
                        return future.result()  # it came in this very moment; or it has a TimeoutError of its own
                    if not self._thread.is_alive():
                        raise self._stopped() from None
        except CancelledError:
            raise self._stopped() from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs in the loop and end the thread. Idempotent, bounded."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            try:
                self._loop.call_soon_threadsafe(self._stopping.set)
            except RuntimeError:
                return  # stopped already
            self._thread.join(_JOIN_TIMEOUT_S)

    def _stopped(self) -> ConfigError:
        return ConfigError("the client is closed; make another")

    def _run(self) -> None:
        async def main() -> None:
            self._up.set_result(asyncio.get_running_loop())
            await self._stopping.wait()

        try:
            asyncio.run(main())  # cancels what still runs
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: those who wait for the loop must hear of it
            if not self._up.done():
                self._up.set_exception(error)
