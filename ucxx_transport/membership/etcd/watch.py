"""`EtcdWatch`: a thread of its own follows the stream, so that `next` waits exactly as long as its caller says."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from ucxx_transport.errors import StoreResetError, StoreUnavailableError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.etcd.calls import Caller
from ucxx_transport.membership.etcd.stream import Watched, WatchStream
from ucxx_transport.membership.store import Batch

__all__ = ["EtcdWatch"]

_log = get_logger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_JOIN_S: Final = 2.0
_WAITING_BATCHES: Final = 1024


class EtcdWatch:
    """Changes below a prefix, as etcd streams them. The first `next` starts it."""

    def __init__(self, caller: Caller, watched: Watched, *, on_reset: Callable[[], None]) -> None:
        """Nothing is asked for yet.

        Args:
            caller: knows the endpoints and the token.
            watched: which changes.
            on_reset: called when the store turns out to be another one.
        """
        self._stream = WatchStream(caller, watched, self._deliver, self._has_room)
        self._on_reset = on_reset
        self._pid = os.getpid()
        # Reentrant, as a condition's lock is: a signal handler may close the watch in the thread that is in `next`.
        self._changed = threading.Condition()
        self._batches: deque[Batch] = deque()
        self._trouble: StoreUnavailableError | None = None
        self._end: TransportError | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def next(self, timeout_s: float) -> Batch | None:
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch anew after a fork", pid=self._pid)
        until = time.monotonic() + max(0.0, timeout_s)
        with self._changed:
            self._start()
            while True:
                if self._closed:
                    raise StoreUnavailableError("the watch is closed")
                if self._batches:
                    return self._batches.popleft()
                if self._end is not None:
                    raise self._end
                if self._trouble is not None:
                    trouble, self._trouble = self._trouble, None
                    raise trouble
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # a lock of the parent's may be held for ever here, and its thread is not here
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._loop is not None and self._task is not None:
                with suppress(RuntimeError):  # the loop has ended meanwhile
                    self._loop.call_soon_threadsafe(self._task.cancel)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)  # a login that is under way ends by its own deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="ucxx-etcd-watch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - the thread's edge
            _log.exception("etcd_watch_failed", reason=repr(error))
            self._finish(StoreUnavailableError("the watch has failed: watch anew", reason=repr(error)))

    async def _follow(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await self._stream.follow(self._connected)
            except StoreUnavailableError as error:
                self._tell(error)
            except TransportError as error:
                self._finish(error)
                return
            pause_s = (
                _FIRST_PAUSE_S if time.monotonic() - began > _LONGEST_PAUSE_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            )
            await asyncio.sleep(pause_s)

    def _connected(self) -> None:
        with self._changed:
            self._trouble = None

    def _deliver(self, batch: Batch) -> None:
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._batches) < _WAITING_BATCHES

    def _tell(self, trouble: StoreUnavailableError) -> None:
        with self._changed:
            self._trouble = trouble
            self._changed.notify_all()

    def _finish(self, end: TransportError) -> None:
        if isinstance(end, StoreResetError):
            self._on_reset()
        with self._changed:
            self._end = end
            self._changed.notify_all()
