"""RingHandle: what a process has of a ring: its name, sizes, state, statistics, address, and the end of its use.

The address of a ring's server is in the segment: written under the lock, read without it by everyone who makes a
reference. Two banks; the version's lowest bit says which one holds. A new address goes into the other bank and counts
with one store of the version, so a writer killed half-way leaves the old address, and a reader sees either.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError, SlotError
from ucxx_transport.ring import holds, layout
from ucxx_transport.ring.layout import Counter, Identity
from ucxx_transport.ring.owner import Owner, current_owner, host_id, owner_alive
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import SlotState, state_of
from ucxx_transport.ring.transitions import RingStatistics, Transitions
from ucxx_transport.schema import Schema, SlotRef

MAX_PORTS: Final = 64
MAX_HOST_BYTES: Final = 255
_BANK: Final = struct.Struct(f"<2Q{MAX_PORTS}H{8 * layout.ADDRESS_BANK_WORDS - 16 - 2 * MAX_PORTS}s")
"""Number of ports, bytes of the host, the ports, the host."""

_READY: Final = layout.STATE_COUNT_WORD + SlotState.READY


class RingHandle:
    """The part of `SharedRingBuffer` that moves no payload.

    `owner` takes its holds, None for this process; `alive` says whether a process (pid, start time) lives.
    """

    def __init__(
        self,
        segment: Segment,
        identity: Identity,
        schema: Schema | None,
        *,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        geometry = identity.geometry
        self.name, self.folder = segment.name, segment.path.parent
        self.ring_id, self.schema, self.fingerprint = identity.ring_id, schema, identity.fingerprint
        self.slots, self.slot_bytes, self.readers = geometry.slots, geometry.slot_bytes, geometry.readers
        self.closed = False
        self._segment, self._identity = segment, identity
        self._words = segment.words
        self._transitions = Transitions(segment, identity, clock=clock)
        self._owner: Callable[[], Owner] = current_owner if owner is None else lambda: owner
        self._alive, self._clock = alive, clock
        template = SlotRef(
            ring_id=identity.ring_id,
            ring_name=segment.name,
            slot=0,
            generation=0,
            nbytes=0,
            host_id=host_id(self.folder),
            fingerprint=identity.fingerprint,
        )
        self._addressed: tuple[int, SlotRef] = (0, template)

    @property
    def schema_bytes(self) -> bytes:
        """The schema as msgpack, b"" for a raw ring."""
        return b"" if self.schema is None else self.schema.to_bytes()

    @property
    def is_creator(self) -> bool:
        """Whether closing this handle removes the ring."""
        return self._segment.is_creator

    @property
    def mapping(self) -> npt.NDArray[np.uint8]:
        """All of the ring's memory in this process, for registering it with a device: mapped while this array lives."""
        self._require_open()
        return self._segment.memory

    @property
    def server_words(self) -> memoryview:
        """`SERVER_WORDS` unsigned 64-bit words for the server's own shared statistics; each should have one writer."""
        self._require_open()
        return self._words[layout.SERVER_WORD : layout.SERVER_WORD + layout.SERVER_WORDS]

    @property
    def write_sequence(self) -> int:
        """Number of the write that was completed last; 0 before the first."""
        self._require_open()
        return self._words[layout.SEQUENCE_WORD]

    def duplicate(self) -> int | None:
        """A descriptor of its segment for a process that is to `attach` whatever became of the name; to be closed.

        None where this handle did not make the ring, in this process.
        """
        self._require_open()
        return self._segment.duplicate()

    def slot_state(self, slot: int) -> SlotState:
        """What a slot holds now.

        Raises:
            SlotError: the ring has no such slot.
        """
        self._require_open()
        if not 0 <= slot < self.slots:
            raise SlotError("the ring has no such slot", slot=slot, slots=self.slots)
        geometry = self._identity.geometry
        return state_of(self._words[geometry.first_slot_word + slot * geometry.slot_words])

    def slot_states(self) -> list[SlotState]:
        """What each slot holds now, in order."""
        self._require_open()
        geometry = self._identity.geometry
        first, step = geometry.first_slot_word, geometry.slot_words
        return [state_of(word) for word in self._words[first : first + geometry.slots * step : step].tolist()]

    def get_ready_count(self) -> int:
        """How many payloads wait to be read."""
        self._require_open()
        return self._words[_READY]

    def creator_alive(self) -> bool:
        """Whether the process that made the ring lives."""
        return owner_alive(self._identity.creator_pid, self._identity.creator_start)

    def publish_address(self, host: str | None, ports: Sequence[int]) -> None:
        """Store where the ring's server listens; every SlotRef made after that, in any process, carries it.

        None and no ports withdraw it: the server has stopped.

        Raises:
            ConfigError: no host of 1 to 255 bytes, or not 1 to 64 ports.
        """
        self._require_open()
        name = (host or "").encode()
        if (host is not None or ports) and not 1 <= len(name) <= MAX_HOST_BYTES:
            raise ConfigError(f"a host has 1 to {MAX_HOST_BYTES} bytes", field="host", value=host)
        if len(ports) > MAX_PORTS or (name and not ports) or not all(1 <= port <= 65535 for port in ports):
            raise ConfigError(f"1 to {MAX_PORTS} ports from 1 to 65535", field="ports", value=tuple(ports))
        self._transitions.publish(_BANK.pack(len(ports), len(name), *ports, *[0] * (MAX_PORTS - len(ports)), name))

    def address(self) -> tuple[str | None, tuple[int, ...]]:
        """Host and ports as published last; (None, ()) before, and after a withdrawal."""
        self._require_open()
        template = self._template()
        return template.host, template.ports

    def statistics(self) -> RingStatistics:
        """What has happened since the ring was made, and what its slots hold now."""
        self._require_open()
        return self._transitions.statistics()

    def reclaim_dead(self) -> int:
        """Give back the slots that dead processes hold. Writes do so by themselves when the ring is full.

        It ends every hold whose process is dead, and those of this process whose objects are gone.

        Returns:
            How many holds were ended.

        Raises:
            DeadlineExceededError: the lock was not to be had in time.
        """
        self._require_open()
        return self._reclaim()

    def unlink(self) -> bool:
        """Remove the ring from the host, if this handle made it: processes that have it keep it, no other can attach.

        Returns:
            Whether this call removed it; False for a handle that attached.
        """
        return self._segment.unlink()

    def close(self) -> None:
        """End the use of this handle; the one that made the ring removes it. Leases stay valid. Idempotent."""
        self.closed = True
        self._segment.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Name, sizes and role."""
        role = "closed" if self.closed else "creator" if self.is_creator else "attached"
        return f"<SharedRingBuffer {self.name!r} {self.slots} × {self.slot_bytes} bytes, {role}, pid {os.getpid()}>"

    def _require_open(self) -> None:
        if self.closed:
            raise SlotError("this handle of the ring is closed", name=self.name)

    def _reclaim(self) -> int:
        holds.settle()
        mine = self._owner()
        verdicts: dict[tuple[int, int], bool] = {}
        reclaimed = 0
        # Looking at a process takes 20 µs (/proc): done between two critical sections, the second compares again.
        for words in self._transitions.holds():
            owner = (words[layout.HOLD_PID], words[layout.HOLD_START])
            if owner == mine:
                alive = holds.is_live(words[layout.HOLD_LEASE])
            else:
                if owner not in verdicts:
                    verdicts[owner] = self._alive(*owner)
                alive = verdicts[owner]
            if alive:
                continue
            if state_of(words[layout.HOLD_STATE]) is SlotState.WRITING:
                reclaimed += self._transitions.abort(words, Counter.RECLAIMED_WRITES)
            else:
                reclaimed += self._transitions.finalise(words, Counter.RECLAIMED_READS)
        return reclaimed

    def _template(self) -> SlotRef:
        """What a reference made now has in common with the ring's others: its name, and where its server is."""
        words = self._words
        known, template = self._addressed
        version = words[layout.ADDRESS_VERSION_WORD]
        while version != known:
            bank = layout.ADDRESS_WORD + (version & 1) * layout.ADDRESS_BANK_WORDS
            # copied before it is looked at; the other bank is being written at most while the version stands still
            content = words[bank : bank + layout.ADDRESS_BANK_WORDS].tobytes()
            known, version = version, words[layout.ADDRESS_VERSION_WORD]
            if known == version:
                count, length, *ports, name = _BANK.unpack(content)
                host = name[: min(length, MAX_HOST_BYTES)].decode(errors="replace") if count else None
                template = replace(template, host=host, ports=tuple(ports[:count]))
                self._addressed = (version, template)
        return template
