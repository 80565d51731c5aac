"""Holds: this process's writes and read attempts as objects, and what becomes of one that is dropped unfinished.

A hold is registered here *before* its transition happens in the segment. So for every hold in a segment that names this
process, either its object is alive here, or the hold is an orphan (its call was cut off by an exception, or its owner
dropped it while the lock was taken) and may be reclaimed. Arrays over a hold's memory keep it alive.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final

from ucxx_transport.errors import SlotError, TransportError
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Counter
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.transitions import HoldWords, Transitions, Words

_LOST_WAIT_S: Final = 0.05
"""How long a finaliser waits for the lock, which runs wherever a reference goes. While others are to be settled it does
not wait: a thousand arrays that go while the lock's holder is stopped cost their thread this once."""

# An attribute of an enum costs 0.3 µs in Python 3.11; these are on the hot path.
ABORTED: Final = Counter.ABORTED
CONSUMED: Final = Counter.CONSUMED
RELEASED: Final = Counter.RELEASED

_fill: Final = struct.Struct("<7Q").pack_into  # a third of the time that the type takes with values

_next_lease_id = itertools.count(1).__next__
_live: dict[int, Guard] = {}
unsettled: list[Guard] = []
"""Holds that were dropped while the lock was not to be had: `settle` ends them."""
_detaching = threading.RLock()


class Guard(weakref.ref["Hold"]):
    """What outlives a hold's object: its words, the transitions, and what a drop is counted as (`ABORTED`: a write)."""

    __slots__ = ("reason", "transitions", "words")

    transitions: Transitions
    words: Words
    reason: Counter


_ENDED: Final = Guard(Guard)  # type: ignore[arg-type]
"""Stands for the guard of a hold that has ended, whose own is gone with that, and is not called when the hold goes."""


class Hold:
    """One hold on one slot, by this process. numpy arrays made over it keep it.

    A write is given its slot and generation by its transition. `reason` says what a drop is counted as: `ABORTED` for a
    write, `RELEASED` for a read.

    Attributes:
        lease_id: unique in this process.
        words: the hold, as the transitions take it; `layout` names the words.
    """

    __slots__ = ("__weakref__", "_guard", "lease_id", "transitions", "words")

    kind: ClassVar = "write"
    """Of lease, for messages."""

    def __init__(  # noqa: PLR0917 - one is made at every write and read
        self,
        transitions: Transitions,
        owner: Owner,
        slot: int = 0,
        generation: int = 0,
        reader: int = 0,
        reason: Counter = ABORTED,
    ) -> None:
        words = HoldWords()
        lease_id = self.lease_id = _next_lease_id()
        _fill(words, 0, slot, generation, lease_id, owner[0], owner[1], reader, transitions.address)
        guard = Guard(self, _lost)
        guard.transitions = self.transitions = transitions
        guard.words = self.words = words
        guard.reason = reason
        self._guard = guard
        _live[lease_id] = guard

    @property
    def slot(self) -> int:
        """The slot's index."""
        return self.words[layout.HOLD_SLOT]

    @property
    def generation(self) -> int:
        """Which write to that slot it is, or reads."""
        return self.words[layout.HOLD_GENERATION]

    @property
    def is_live(self) -> bool:
        """Whether this process took the hold and has not ended it. A forked child inherits the object only."""
        return _live.get(self.lease_id) is self._guard

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The payload's bytes for numpy, read-only for a read. An array made of this keeps the hold."""
        words, transitions = self.words, self.transitions
        start = transitions.first_payload + words[layout.HOLD_SLOT] * transitions.stride
        return {
            "shape": (words[layout.HOLD_NBYTES],),
            "typestr": "|u1",
            "data": (start, self._guard.reason is not ABORTED),
            "version": 3,
        }

    def require_live(self) -> None:
        """Refuse, by a SlotError, one that has ended, or is another process's."""
        if not self.is_live:
            raise SlotError(
                f"this {self.kind} lease has ended, or was inherited by a forked process",
                slot=self.slot,
                generation=self.generation,
            )

    def end(self, reason: Counter) -> bool:
        """End it without a payload (`ABORTED`), or the read attempt that it is (`CONSUMED`, `RELEASED`).

        Returns:
            Whether this call ended it. False changes nothing: it had ended, was reclaimed, or is another process's.
        """
        if _live.get(self.lease_id) is not self._guard:
            return False
        transitions = self.transitions
        ended = transitions.abort(self.words) if reason is ABORTED else transitions.finalise(self.words, reason)
        _live.pop(self.lease_id, None)  # `forget`, without the call
        self._guard = _ENDED
        return ended

    def rest(self) -> None:
        """Take a live one out of the registry: it has ended, and may be used again."""
        _live.pop(self.lease_id, None)

    def renew(self) -> None:
        """Make another hold of one that rests, by the same process for the same reader: making a new one takes 1 µs."""
        lease_id = self.lease_id = self.words[layout.HOLD_LEASE] = _next_lease_id()
        _live[lease_id] = self._guard

    def forget(self) -> None:
        """Take a live one out of the registry: it has ended, or never began."""
        _live.pop(self.lease_id, None)
        self._guard = _ENDED


class DetachedRead(Hold):
    """A read attempt, a live hold before, that arrays alone keep: consumed when the last of them is gone.

    Raises:
        SlotError: the hold has ended. Of two threads that detach it at once the second gets this: with two arrays that
            do not know of each other, the slot would be written to when the first of them is gone.
    """

    __slots__ = ()

    def __init__(self, lease: Hold) -> None:
        with _detaching:
            lease.require_live()
            guard = Guard(self, _lost)
            guard.transitions = self.transitions = lease.transitions
            guard.words = self.words = lease.words
            guard.reason = CONSUMED
            self._guard = guard
            lease_id = self.lease_id = lease.lease_id
            _live[lease_id] = guard
            lease._guard = _ENDED  # noqa: SLF001 - of this class


def is_live(lease_id: int) -> bool:
    """Whether a hold of this process with that id has its object."""
    guard = _live.get(lease_id)
    return guard is not None and guard() is not None


def settle() -> None:
    """End the holds whose objects are gone and that could not be ended then."""
    unsettled.clear()
    for guard in list(_live.values()):
        if guard() is None:
            _lost(guard)


def _lost(guard: weakref.ref[Hold], is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
    """Callback of a hold's last reference going. It may run anywhere, and must not raise."""
    # at the end of the process, which is reclaimed, the names of this module may be gone
    if is_ending() or not isinstance(guard, Guard) or not hasattr(guard, "reason"):
        return  # or cut off before it was registered
    words = guard.words
    if _live.get(words[layout.HOLD_LEASE]) is not guard:
        return  # ended, or detached
    wait_s = 0.0 if unsettled else _LOST_WAIT_S
    try:
        if guard.reason is ABORTED:
            guard.transitions.abort(words, ABORTED, wait_s)
        else:
            guard.transitions.finalise(words, guard.reason, wait_s)
    except TransportError:
        unsettled.append(guard)
        return
    _live.pop(words[layout.HOLD_LEASE], None)


def _forget_inherited() -> None:
    global _detaching  # noqa: PLW0603 - a module has one
    _live.clear()
    unsettled.clear()
    _detaching = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_forget_inherited)
