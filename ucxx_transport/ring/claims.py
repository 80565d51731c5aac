"""Claims: this process's holds on slots as objects, and what becomes of one that is dropped without being ended.

A claim is registered here *before* its transition happens in the segment. So for every hold in a segment that names
this process, either its claim is alive here, or the hold is an orphan (its call was cut off by an exception between any
two bytecodes, or its owner forgot it) and may be reclaimed. Arrays over a claim's memory keep it alive.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.slot_headers import Hold

_NOWHERE: Final = -1

_next_lease_id = itertools.count(1).__next__
_live: dict[int, ClaimGuard] = {}
chores: deque[Callable[[], bool]] = deque()
"""What is queued by `defer`: run it when this is not empty."""


class ClaimHome(Protocol):
    """What a claim needs of the ring it belongs to."""

    def settle_lost(self, guard: ClaimGuard) -> bool:
        """End the hold of a claim that is gone; False when that cannot be done just now."""

    def payload_address(self, slot: int) -> int:
        """Where a slot's payload is in this process's memory."""


class ClaimGuard(weakref.ref["Claim"]):
    """What outlives a claim: its hold, and how to end it.

    Attributes:
        hold: the hold; its slot is `_NOWHERE` until a write has been given one.
        home: the ring.
        consumes: whether a lost claim counts as consumed (a detached payload) or as released.
    """

    __slots__ = ("consumes", "hold", "home")

    hold: Hold
    home: ClaimHome
    consumes: bool

    @property
    def placed(self) -> bool:
        """Whether the hold names a slot."""
        return self.hold.slot != _NOWHERE


class Claim:
    """One hold on one slot, by this process. numpy arrays made over it keep it.

    Attributes:
        guard: its entry in this module's registry.
        nbytes: bytes of the slot that it gives access to.
    """

    __slots__ = ("__weakref__", "_home", "guard", "nbytes")

    def __init__(self, home: ClaimHome, owner: Owner, *, slot: int = _NOWHERE, generation: int = 0) -> None:
        """Make and register a claim; a read names its slot and generation, a write is given them later."""
        guard = ClaimGuard(self, _lost)
        guard.home = home
        guard.consumes = False
        guard.hold = Hold(slot, generation, _next_lease_id(), owner, slot == _NOWHERE)
        self._home = home
        self.guard = guard
        self.nbytes = 0
        _live[guard.hold.lease_id] = guard

    @property
    def hold(self) -> Hold:
        """Slot, generation, lease id and owner."""
        return self.guard.hold

    @property
    def is_live(self) -> bool:
        """Whether this process made the claim and has not ended its hold. A forked child inherits the object only."""
        return self.guard.hold.lease_id in _live

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The payload's bytes for numpy, read-only for a read. An array made of this keeps the claim alive."""
        hold = self.guard.hold
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self._home.payload_address(hold.slot), not hold.is_write),
            "version": 3,
        }

    def forget(self) -> None:
        """Take it out of the registry: its hold has ended, or never began."""
        _live.pop(self.guard.hold.lease_id, None)


def is_live(lease_id: int) -> bool:
    """Whether a claim of this process with that id is alive."""
    guard = _live.get(lease_id)
    return guard is not None and guard() is not None


def defer(chore: Callable[[], bool]) -> None:
    """Queue what cannot be done inside a critical section of the same thread; it returns False to be queued again."""
    chores.append(chore)


def run_chores() -> None:
    """Do what is queued, each at most once. Safe from any thread, and from within a chore."""
    for _ in range(len(chores)):
        try:
            chore = chores.popleft()
        except IndexError:  # another thread took it
            return
        if not chore():
            chores.append(chore)


def settle_forgotten() -> None:
    """Do what `_lost` should have done for claims whose callback was itself cut off by an interrupt."""
    for guard in list(_live.values()):
        if guard() is None:
            _lost(guard)


def _lost(guard: weakref.ref[Claim]) -> None:
    """Callback of a claim's last reference going. It may run anywhere, so also inside a critical section."""
    if not isinstance(guard, ClaimGuard) or not hasattr(guard, "hold"):
        return  # cut off before it was registered
    if _live.pop(guard.hold.lease_id, None) is None:
        return  # ended
    chores.append(lambda: guard.home.settle_lost(guard))
    run_chores()


def _forget_inherited() -> None:
    _live.clear()
    chores.clear()


os.register_at_fork(after_in_child=_forget_inherited)
