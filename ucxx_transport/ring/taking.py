"""SlotTaker: read attempts on whatever is there, in the order of the writes, and the wait for more.

What a reader gets where one read frees a payload: the READY ones, in that order, each given to one taker. Where several
readers share a ring (`readers` > 1): those too that others are reading, but none that it has had or holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.ring import layout
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.reading import ReadLease
from ucxx_transport.ring.states import SlotState
from ucxx_transport.ring.transitions import TakeWords

_READY: Final = layout.STATE_COUNT_WORD + SlotState.READY
_READING: Final = layout.STATE_COUNT_WORD + SlotState.READING
_U32: Final = (1 << 32) - 1
_NO_LIMIT: Final = (1 << 64) - 1

_LOOK_EVERY_S: Final = 0.1
"""While waiting: how often signals are looked for, and takers that died with payloads."""

_REMEMBERED_READERS: Final = 1024


_NOWHERE: Final[tuple[int, int, int, int | None]] = (0, 0, 0, None)
"""Where a reader's last take ended: `TAKE_SLOT`, `_SEQUENCE`, `_RETURNS`, and, where nothing was left, `TAKE_SEEN`."""


class SlotTaker:
    """The taking half of a ring handle."""

    __slots__ = ("_core", "_is_shared", "_new_lease", "_places", "_slots")

    def __init__(self, core: RingCore, new_lease: Callable[[int, int, int], ReadLease]) -> None:
        """Bind to a ring; `new_lease` makes one for a slot, generation and reader, whose attempt is yet to begin."""
        self._core = core
        self._new_lease = new_lease
        self._slots = core.identity.geometry.slots
        self._is_shared = core.identity.geometry.readers > 1
        self._places: dict[int, tuple[int, int, int, int | None]] = {}

    def take(
        self, max_payloads: int, max_bytes: int | None, reader: int, wait_s: float | None, *, newest: bool
    ) -> list[ReadLease]:
        """See `SharedRingBuffer.take`."""
        if max_payloads < 1:
            raise ConfigError("take at least one payload", field="max_payloads", value=max_payloads)
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError("max_bytes is 0 or more, or None", field="max_bytes", value=max_bytes)
        core, words = self._core, self._core.words
        there = words[_READY] + (words[_READING] if self._is_shared else 0)
        room = max(1, min(max_payloads, there))
        limit = _NO_LIMIT if max_bytes is None else min(max_bytes, _NO_LIMIT)
        asked = TakeWords(room, limit, newest, *self._places.get(reader, _NOWHERE)[:3])
        # registered before their attempts begin, as every hold is
        leases = [self._new_lease(0, 0, reader) for _ in range(room)]
        try:
            walked, holds = 0, [lease.words for lease in leases]
            core.transitions.take(holds, asked, wait_s)
            while asked[layout.TAKE_NEXT] and walked <= 2 * self._slots:
                # a place that is gone by then costs the walk its beginning again: not without end
                walked += asked[layout.TAKE_STEPS]
                core.transitions.take(holds, asked, wait_s)
        except TransportError:
            if not asked[layout.TAKE_NUMBER]:
                raise
        finally:
            number = asked[layout.TAKE_NUMBER]
            for lease in leases[number:]:
                lease.forget()
        seen = (
            asked[layout.TAKE_SEEN]
            if number < room and not (asked[layout.TAKE_LARGE] or asked[layout.TAKE_NEXT])
            else None
        )
        self._places[reader] = (asked[layout.TAKE_SLOT], asked[layout.TAKE_SEQUENCE], asked[layout.TAKE_RETURNS], seen)
        if len(self._places) > _REMEMBERED_READERS:
            self._places.pop(next(iter(self._places)), None)
        if asked[layout.TAKE_LARGE] and not number:
            nbytes = asked[layout.TAKE_LARGE] - 1
            raise ConfigError(
                f"the next payload has {nbytes} bytes, which is more than max_bytes = {max_bytes}",
                field="max_bytes",
                nbytes=nbytes,
                max_bytes=max_bytes,
            )
        return leases[:number]

    def wait(self, wait_s: float, reader: int) -> bool:
        """See `SharedRingBuffer.wait_for_ready`."""
        if not wait_s >= 0:
            raise ConfigError("wait_s is seconds, 0 or more", field="wait_s", value=wait_s)
        core, words = self._core, self._core.words
        started = core.clock()
        seen = self._places.get(reader, _NOWHERE)[3]
        if seen is None:
            seen = (
                words[layout.READIED_WORD] & _U32
            )  # looked at first: one that comes in between is waited for no longer
            if words[_READY]:
                return True
        while words[layout.READIED_WORD] & _U32 == seen:
            left_s = started + wait_s - core.clock()
            if left_s <= 0:
                return False
            core.transitions.wait_for_ready(seen, min(left_s, _LOOK_EVERY_S))
            if left_s > _LOOK_EVERY_S and words[_READING] and words[layout.READIED_WORD] & _U32 == seen:
                core.reclaim_dead()
        return True
