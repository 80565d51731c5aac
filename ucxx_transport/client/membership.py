"""Membership: which sources a client knows to be gone, and the reads that wait for one of them.

A read of a source that is gone fails at once, in whatever it was waiting, instead of by its deadline.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from ucxx_transport.errors import PeerLostError

if TYPE_CHECKING:
    from ucxx_transport.membership.sources import SourceRecord
    from ucxx_transport.schema import SlotRef

ResultT = TypeVar("ResultT")

REMEMBERED_RINGS: Final = 1 << 16
"""Rings that are gone, 100 bytes each: more than a job loses."""


class Watcher(Protocol):
    """What a client needs of a `SourceWatcher`."""

    def subscribe(
        self,
        *,
        on_add: Callable[[SourceRecord], None] | None = None,
        on_update: Callable[[SourceRecord], None] | None = None,
        on_remove: Callable[[SourceRecord], None] | None = None,
    ) -> Callable[[], None]: ...


class Membership:
    """What a watcher says, from here on. Told in the watcher's thread, asked in the client's loop."""

    def __init__(self, watcher: Watcher) -> None:
        # until `subscribe` nobody reads over UCX, so nothing is open
        self._on_gone: Callable[[SourceRecord], None] = lambda _: None
        self._on_there: Callable[[SourceRecord], None] = lambda _: None
        self._lock = threading.Lock()
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scopes: dict[bytes, set[asyncio.Timeout]] = {}
        self._unsubscribe: Callable[[], None] | None = watcher.subscribe(on_add=self._added, on_remove=self._removed)

    def subscribe(self, on_gone: Callable[[SourceRecord], None], on_there: Callable[[SourceRecord], None]) -> None:
        """Pass it on, in the loop of the reads: a source that is gone, and one that is there."""
        self._on_gone, self._on_there = on_gone, on_there

    def close(self) -> None:
        """Hear no more. Idempotent."""
        unsubscribe, self._unsubscribe = self._unsubscribe, None
        if unsubscribe is not None:
            unsubscribe()

    async def guarded(self, ref: SlotRef, reading: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Read, unless the source of `ref` is gone or goes meanwhile: a PeerLostError with the reason "removed"."""
        self._loop = asyncio.get_running_loop()
        scope = asyncio.timeout(None)
        scopes = self._scopes.setdefault(ref.ring_id, set())
        scopes.add(scope)
        try:
            if ref.ring_id in self._gone:  # looked at after it was entered: either this sees it, or the other does
                raise _gone(ref)
            async with scope:
                return await reading()
        except TimeoutError:
            if not scope.expired():
                raise
            raise _gone(ref) from None
        finally:
            scopes.discard(scope)
            if not scopes:
                self._scopes.pop(ref.ring_id, None)

    def _removed(self, record: SourceRecord) -> None:
        with self._lock:
            self._gone[record.ring_id] = None
            while len(self._gone) > REMEMBERED_RINGS:
                self._gone.popitem(last=False)
        self._in_loop(self._end_reads, record)

    def _added(self, record: SourceRecord) -> None:
        with self._lock:
            self._gone.pop(record.ring_id, None)
        self._in_loop(self._on_there, record)

    def _in_loop(self, action: Callable[[SourceRecord], None], record: SourceRecord) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return  # nothing was read yet, so nothing is open
        with suppress(RuntimeError):  # it was closed in between
            loop.call_soon_threadsafe(action, record)

    def _end_reads(self, record: SourceRecord) -> None:
        assert self._loop is not None
        for scope in self._scopes.get(record.ring_id, ()):
            if not scope.expired():
                scope.reschedule(self._loop.time())
        self._on_gone(record)


def _gone(ref: SlotRef) -> PeerLostError:
    message = "the source of this payload is gone: its worker died, left, or published itself again"
    return PeerLostError(message, host=ref.host, ring=ref.ring_name, slot=ref.slot, reason="removed")
