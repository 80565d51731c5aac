"""RingCore: one handle's view of a segment, and the policy of who may end which hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import DeadlineExceededError, RingFullError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import holds, layout
from ucxx_transport.ring.holds import Hold
from ucxx_transport.ring.identity import Identity
from ucxx_transport.ring.layout import Counter
from ucxx_transport.ring.owner import Owner, current_owner, owner_alive
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import STATE_MASK
from ucxx_transport.ring.transitions import Transitions, Words

_RECLAIM_EVERY_S: Final = 0.1
"""While waiting for a slot: how often to look for holds of processes that died since."""

_WRITES_A_LOOK: Final = 1024
"""Writes, about, from one look whether the ring still has its name to the next: one takes 0.8 µs."""

_log = get_logger(__name__)


class RingCore:
    """Segment and transitions of one handle.

    Args:
        segment: the mapped memory.
        identity: what it says of itself.
        owner: in whose name holds are taken; None for this process.
        alive: whether the process (pid, start) lives.
        clock: monotonic seconds.

    Attributes:
        first_payload_byte: where slot 0's payload begins.
        owner: in whose name this handle takes holds.
        readable: the segment as bytes, read-only.
        stride_bytes: from one slot's payload to the next's.
        words: the segment as 64-bit words.
        transitions: of its slots.
    """

    __slots__ = (
        "_alive",
        "_look_every",
        "_state_words",
        "_warned_late",
        "_warned_name",
        "clock",
        "first_payload_byte",
        "identity",
        "owner",
        "readable",
        "segment",
        "stride_bytes",
        "transitions",
        "words",
    )

    def __init__(
        self,
        segment: Segment,
        identity: Identity,
        *,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        geometry = identity.geometry
        self.segment = segment
        self.identity = identity
        self.words = segment.words
        self.clock = clock
        self.readable = segment.memory.data.toreadonly()
        self.first_payload_byte, self.stride_bytes = geometry.payload_byte(0), geometry.stride_bytes
        self.transitions = Transitions(segment, geometry, lock_wait_s=identity.lock_timeout_ns / 1e9, clock=clock)
        headers = np.frombuffer(
            segment.words,
            np.uint64,
            count=geometry.slots * geometry.slot_words,
            offset=geometry.first_slot_word * layout.WORD_BYTES,
        ).reshape(geometry.slots, geometry.slot_words)
        self._state_words = headers[:, layout.STATE]
        self.owner: Callable[[], Owner] = current_owner if owner is None else lambda: owner
        self._alive = alive
        self._warned_late = self._warned_name = False
        self._look_every = max(1, _WRITES_A_LOOK // geometry.slots)

    def memory(self, hold: Hold) -> npt.NDArray[np.uint8]:
        """The bytes of a hold's payload, shape (nbytes,); they do not keep the hold."""
        start = self.first_payload_byte + hold.words[layout.HOLD_SLOT] * self.stride_bytes
        return self.segment.memory[start : start + hold.words[layout.HOLD_NBYTES]]

    def states(self) -> npt.NDArray[np.uint64]:
        """The state of every slot, shape (slots,), a copy taken without the lock."""
        return self._state_words & np.uint64(STATE_MASK)

    def state_word(self, slot: int) -> int:
        """A slot's state word; of the past when it is returned."""
        return int(self._state_words[slot])

    def end_read(self, hold: Hold, reason: Counter) -> bool:
        """End a read attempt by its lease.

        Args:
            hold: the attempt.
            reason: `CONSUMED` or `RELEASED`.

        Returns:
            Whether this call ended it. False changes nothing: it had ended, was reclaimed, or is another process's.
        """
        if hold.is_live:
            ended = self.transitions.finalise(hold.words, reason)
            hold.forget()
            if ended:
                return True
        self.note_late(hold)
        return False

    def end_write(self, hold: Hold) -> bool:
        """Abort a write by its lease; False when there was nothing to abort."""
        if not hold.is_live:
            return False
        ended = self.transitions.abort(hold.words)
        hold.forget()
        return ended

    def note_late(self, hold: Hold) -> None:
        """Count a finalise that came too late, and say so once for this handle."""
        self.transitions.count(Counter.LATE_FINALISE)
        if not self._warned_late:
            self._warned_late = True
            _log.warning(
                "finalise_ignored",
                ring=self.segment.name,
                slot=hold.slot,
                generation=hold.generation,
                attempt=hold.lease_id,
                pid=os.getpid(),
                reason="the lease had ended; counted from here on",
            )

    def look_for_name(self, generation: int) -> None:
        """Say once when another program removed the ring's name: readers on this host then go over the network.

        It looks at some generations of slot 0, which is written.
        """
        if generation % self._look_every == 0 and not self._warned_name and self.segment.lost_its_name:
            self._warned_name = True
            _log.warning(
                "ring_name_removed",
                ring=self.segment.name,
                path=str(self.segment.path),
                reason="removed by another program, such as systemd-logind (RemoveIPC; `loginctl enable-linger`); the "
                "ring works on, over UCX for those who have not attached yet",
            )

    def wait_for_slot(self, words: Words, deadline_s: float | None, *, overwrites: bool) -> None:
        """Reserve a slot for a write that found none, by the ring's policy.

        Raises:
            RingFullError: there is none, and the policy is not to wait.
            DeadlineExceededError: none became free in time.
        """
        self.reclaim_dead()
        # tried whatever it found: another process may have been the one who took the dead's slots back
        if self.transitions.reserve(words, overwrites=overwrites):
            return
        on_full = self.identity.on_full
        if on_full != "block":
            self.transitions.count(Counter.FULL)
            raise RingFullError(
                "no slot can be written: every one is being read or written"
                if overwrites
                else "no slot is free and the ring's policy is to raise",
                slots=self.identity.geometry.slots,
                on_full=on_full,
            )
        self.transitions.count(Counter.BLOCKED)
        started = self.clock()
        wait_s = self.identity.block_timeout_ns / 1e9 if deadline_s is None else deadline_s
        next_reclaim = started + _RECLAIM_EVERY_S
        while (now := self.clock()) - started < wait_s:
            # in slices: a signal is noticed between two, and so is a reader's death
            self.transitions.wait_for_free(words[layout.HOLD_STATE], min(started + wait_s - now, _RECLAIM_EVERY_S))
            if self.clock() >= next_reclaim:
                self.reclaim_dead()
                next_reclaim = self.clock() + _RECLAIM_EVERY_S
            if self.transitions.reserve(words, overwrites=False):
                return
        self.transitions.count(Counter.FULL)
        raise DeadlineExceededError(
            "no slot became free in time: the readers are too slow, or gone; enlarge ring.slots or choose "
            "on_full='overwrite'",
            waited_s=round(self.clock() - started, 3),
            slots=self.identity.geometry.slots,
        )

    def reclaim_dead(self) -> int:
        """End every hold whose process is dead, and those of this process whose objects are gone; returns how many.

        Raises:
            DeadlineExceededError: the lock was not to be had in time.
        """
        holds.settle()
        mine = self.owner()
        verdicts: dict[Owner, bool] = {}
        reclaimed = 0
        # Looking at a process takes 20 µs (/proc): done between two critical sections, the second compares again.
        for seen in self.transitions.holds():
            if seen.owner == mine:
                alive = holds.is_live(seen.lease_id)
            else:
                if seen.owner not in verdicts:
                    verdicts[seen.owner] = self._alive(*seen.owner)
                alive = verdicts[seen.owner]
            if alive:
                continue
            if seen.is_write:
                reclaimed += self.transitions.abort(seen.words, Counter.RECLAIMED_WRITES)
            else:
                reclaimed += self.transitions.finalise(seen.words, Counter.RECLAIMED_READS)
        return reclaimed
