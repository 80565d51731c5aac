"""A Hypothesis state machine drives real rings beside `RingModel`.

Several handles act for owners that live and die as told; leases are finalised in time, late, twice, by the wrong hand,
never, or after their owner's death; payloads are unlike each other and compared byte by byte at every look. A *step* is
one rule: a call on the ring whose outcome the model foretold, followed by a comparison of all slots.
"""

from __future__ import annotations

import random
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.model.ring_model import ModelSlot, RingModel
from tests.support.exhaustive import exhaustive
from tests.support.machines import CountedMachine, run_steps
from tests.support.ring_owners import acting_for
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import BusyError, ConfigError, RingFullError, SlotError, StaleSlotError
from ucxx_transport.machine import Owner
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState, WriteLease
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.codec import check_trailer, decode_header

BURST = 300
SLOT_BYTES = 96
HANDLES = 3
REMEMBERED = 12
"""References and ended leases kept for late use."""

ENDINGS = ("consumed", "released", "forgotten", "consumed")

_SHARES = {
    "write": 10,
    "reserve": 5,
    "commit": 5,
    "abort": 2,
    "discard": 2,
    "acquire": 13,
    "read": 6,
    "take": 6,
    "finalise": 8,
    "detach": 3,
    "drop": 4,
    "late": 3,
    "nonsense": 1,
    "kill": 1,
    "reclaim": 1,
}
WHAT = [step for step, share in _SHARES.items() for _ in range(share)]
"""What a byte of a burst means."""

indices = st.integers(0, 63)


@dataclass
class Held:
    """A lease in use, who has it, and what its payload must be."""

    lease: ReadLease | WriteLease | npt.NDArray[np.uint8]
    owner: Owner
    slot: int
    lease_id: int
    payload: bytes = b""


class RingMachine(CountedMachine):
    """See the module."""

    rules_an_example = 25
    steps_an_example = 400  # one in 15 is a burst

    @initialize(slots=st.integers(1, 4), readers=st.integers(1, 3), overwrites=st.booleans(), checksum=st.booleans())
    def make(self, *, slots: int, readers: int, overwrites: bool, checksum: bool) -> None:
        config = RingConfig(
            slots=slots,
            slot_bytes=SLOT_BYTES,
            readers=readers,
            checksum=checksum,
            on_full="overwrite" if overwrites else "raise",
        )
        self.births = 0
        self.living: set[Owner] = set()
        self.dead: set[Owner] = set()
        self.readers = readers
        owner = self.born()
        ring = acting_for(SharedRingBuffer.create(config), owner, self.alive)
        self.handles = [(ring, owner)]
        for _ in range(HANDLES - 1):
            self.attach()
        self.model = RingModel(
            [ModelSlot() for _ in range(slots)], overwrites=overwrites, max_attempts=max(8, 2 * readers + 2)
        )
        self.writing: list[Held] = []
        self.reading: list[Held] = []
        self.detached: list[Held] = []
        self.ended: list[Held] = []
        self.ghosts: list[Held] = []
        self.refs: list[SlotRef] = []
        self.lease_ids = 0
        self.payloads = 0

    def born(self) -> Owner:
        self.births += 1
        owner = Owner(2**22 + 1, self.births)  # one pid for all: only the start time tells them apart
        self.living.add(owner)
        return owner

    def attach(self) -> None:
        owner = self.born()
        ring = acting_for(SharedRingBuffer.attach(self.handles[0][0].name), owner, self.alive)
        self.handles.append((ring, owner))

    def alive(self, pid: int, start: int) -> bool:
        return Owner(pid, start) in self.living

    def payload(self, size: int) -> bytes:
        """Bytes that no other write has, so that a mixture of two cannot pass for one."""
        self.payloads += 1
        seed = np.arange(size, dtype=np.uint64) * np.uint64(31) + np.uint64(self.payloads * 7919)
        return (seed ^ (seed >> np.uint64(5))).astype(np.uint8).tobytes()

    def remember(self, ref: SlotRef) -> None:
        self.refs = [*self.refs[-REMEMBERED:], ref]

    def retire(self, held: Held) -> None:
        self.ended = [*self.ended[-REMEMBERED:], held]

    def allowed_slots(self) -> list[int]:
        """Where the next write may go. With nothing to take, the ring looks for the dead first, and so does this."""
        allowed = self.model.writable()
        if not allowed:
            self.model.reclaim(self.dead)
            allowed = self.model.writable()
        return allowed

    # writing

    @rule(index=indices, size=st.integers(0, SLOT_BYTES), required=st.integers(0, 3))
    def write(self, index: int, size: int, required: int) -> None:
        self.count_steps()
        ring, owner = self.handles[index % HANDLES]
        payload, readers = self.payload(size), min(required, self.readers) or None
        allowed = self.allowed_slots()
        if not allowed:
            with pytest.raises(RingFullError):
                ring.write_raw(payload, readers=readers)
            self.model.count("full")
            return
        meta: dict[str, object] | None = {"size": size} if index % 3 else None
        ref = ring.write_raw(payload, readers=readers, meta=meta)
        assert ref.slot in allowed
        self.lease_ids += 1
        self.model.reserve(ref.slot, self.lease_ids, owner)
        self.model.commit(ref.slot, payload, readers or self.readers, meta)
        assert (ref.generation, ref.nbytes) == (self.model.slots[ref.slot].generation, size)
        self.remember(ref)

    @rule(index=indices)
    def reserve(self, index: int) -> None:
        self.count_steps()
        ring, owner = self.handles[index % HANDLES]
        allowed = self.allowed_slots()
        if not allowed:
            with pytest.raises(RingFullError):
                ring.reserve()
            self.model.count("full")
            return
        lease = ring.reserve()
        assert lease.slot in allowed
        self.lease_ids += 1
        self.model.reserve(lease.slot, self.lease_ids, owner)
        self.writing.append(Held(lease, owner, lease.slot, self.lease_ids))

    @precondition(lambda self: self.writing)
    @rule(index=indices, size=st.integers(0, SLOT_BYTES))
    def commit(self, index: int, size: int) -> None:
        self.count_steps()
        held = self.writing.pop(index % len(self.writing))
        assert isinstance(held.lease, WriteLease)
        payload = self.payload(size)
        held.lease.buffer[:size] = payload
        ref = held.lease.commit(size)
        self.model.commit(held.slot, payload, self.readers)
        self.remember(ref)
        self.retire(held)

    @precondition(lambda self: self.writing)
    @rule(index=indices, forget=st.booleans())
    def abort(self, index: int, *, forget: bool) -> None:
        self.count_steps()
        held = self.writing.pop(index % len(self.writing))
        assert isinstance(held.lease, WriteLease)
        if forget:
            held.lease.buffer[:] = b"\xaa" * SLOT_BYTES
            del held.lease
        else:
            assert held.lease.abort()
            self.retire(held)
        self.model.abort(held.slot)

    @precondition(lambda self: self.refs)
    @rule(index=indices)
    def discard(self, index: int) -> None:
        self.count_steps()
        ring, _ = self.handles[index % HANDLES]
        ref = self.refs[index % len(self.refs)]
        assert ring.discard(ref) == self.model.discard(ref.slot, ref.generation)

    # reading

    def is_refused(self, ref: SlotRef, reader: int, call: Callable[..., object]) -> bool:
        """Whether the model refuses this reader the payload; then the ring does."""
        refusal = self.model.refusal(ref.slot, ref.generation, reader)
        if not refusal:
            return False
        self.model.count(refusal)
        with pytest.raises(StaleSlotError if refusal == "stale" else BusyError):
            call(ref, reader=reader)
        return True

    @precondition(lambda self: self.refs)
    @rule(index=indices, age=indices, reader=st.integers(0, 3))
    def acquire(self, index: int, age: int, reader: int) -> None:
        self.count_steps()
        ring, owner = self.handles[index % HANDLES]
        ref = self.refs[-1 - age % len(self.refs)]
        if self.is_refused(ref, reader, ring.acquire):
            return
        lease = ring.acquire(ref, reader=reader)
        self.lease_ids += 1
        payload = self.model.acquire(ref.slot, self.lease_ids, owner, reader)
        self.reading.append(Held(lease, owner, ref.slot, self.lease_ids, payload))

    @precondition(lambda self: self.refs)
    @rule(index=indices, age=indices, reader=st.integers(0, 3))
    def read(self, index: int, age: int, reader: int) -> None:
        self.count_steps()
        ring, owner = self.handles[index % HANDLES]
        ref = self.refs[-1 - age % len(self.refs)]
        if self.is_refused(ref, reader, ring.read):
            return
        self.lease_ids += 1
        payload = self.model.acquire(ref.slot, self.lease_ids, owner, reader)
        self.model.finalise(ref.slot, self.lease_ids, "consumed")
        assert ring.read(ref, reader=reader)["data"].tobytes() == payload

    @precondition(lambda self: self.reading)
    @rule(index=indices, how=st.sampled_from(["consumed", "released", "forgotten"]))
    def finalise(self, index: int, how: str) -> None:
        self.count_steps()
        held = self.reading.pop(index % len(self.reading))
        assert isinstance(held.lease, ReadLease)
        assert bytes(held.lease.buffer) == held.payload
        if how == "consumed":
            assert held.lease.mark_consumed()
        elif how == "released":
            assert held.lease.release_reading()
        else:
            del held.lease
        self.model.finalise(held.slot, held.lease_id, "consumed" if how == "consumed" else "released")
        if how != "forgotten":
            self.retire(held)

    @precondition(lambda self: self.reading)
    @rule(index=indices)
    def detach(self, index: int) -> None:
        self.count_steps()
        held = self.reading.pop(index % len(self.reading))
        assert isinstance(held.lease, ReadLease)
        array = held.lease.hand_over()
        self.detached.append(replace(held, lease=array[:]))

    @precondition(lambda self: self.detached)
    @rule(index=indices)
    def drop(self, index: int) -> None:
        self.count_steps()
        held = self.detached.pop(index % len(self.detached))
        assert not isinstance(held.lease, ReadLease | WriteLease)
        assert held.lease.tobytes() == held.payload
        del held.lease
        self.model.finalise(held.slot, held.lease_id, "consumed")

    @rule(
        index=indices,
        number=st.integers(1, 5),
        size=st.integers(0, 2 * SLOT_BYTES),
        reader=st.integers(0, 3),
        newest=st.booleans(),
    )
    def take(self, index: int, number: int, size: int, reader: int, *, newest: bool) -> None:
        self.count_steps()
        ring, owner = self.handles[index % HANDLES]
        max_bytes = None if size > SLOT_BYTES else size
        expected, left = [], size
        for slot in self.model.takeable(reader, newest=newest)[:number]:
            left -= len(self.model.slots[slot].payload)
            if max_bytes is not None and left < 0:
                break
            expected.append(slot)
        if not expected and left < 0 and max_bytes is not None:
            with pytest.raises(ConfigError):
                ring.take(number, max_bytes=max_bytes, newest=newest, reader=reader)
            return
        leases = ring.take(number, max_bytes=max_bytes, newest=newest, reader=reader)
        assert [lease.slot for lease in leases] == expected
        for lease in leases:
            self.lease_ids += 1
            payload = self.model.acquire(lease.slot, self.lease_ids, owner, reader)
            assert lease.record == self.model.slots[lease.slot].meta
            assert ring.reference(lease).meta == (lease.record or {})
            self.reading.append(Held(lease, owner, lease.slot, self.lease_ids, payload))

    # late, twice, foreign

    @precondition(lambda self: self.ended)
    @rule(index=indices)
    def finalise_late(self, index: int) -> None:
        self.count_steps()
        lease = self.ended[index % len(self.ended)].lease
        if isinstance(lease, ReadLease):
            assert not (lease.mark_consumed() if index % 2 else lease.release_reading())
            self.model.count("late_finalise")
        elif isinstance(lease, WriteLease):
            assert not lease.abort()
            with suppress(SlotError):  # aborted or reclaimed; a committed one gives its reference again
                before = lease.ref
                assert lease.commit() is before

    @rule(index=indices, slot=st.integers(0, 6), generation=st.integers(0, 2**56))
    def ask_for_nonsense(self, index: int, slot: int, generation: int) -> None:
        self.count_steps()
        ring, _ = self.handles[index % HANDLES]
        inside = 0 <= slot < ring.slots
        if inside and self.model.slots[slot].generation == generation:
            return
        self.model.count("stale" if inside else "out_of_range")
        with pytest.raises(StaleSlotError if inside else SlotError):
            ring.acquire_slot(slot, generation)
        foreign = SlotRef(ring_id=b"x" * 16, ring_name=ring.name, slot=0, generation=1, nbytes=1, host_id="here")
        self.model.count("stale")
        with pytest.raises(StaleSlotError):
            ring.acquire(foreign)
        assert not ring.discard(foreign)

    # death

    @rule(index=indices)
    def kill(self, index: int) -> None:
        self.count_steps()
        _, victim = self.handles.pop(1 + index % (HANDLES - 1))
        self.living.discard(victim)
        self.dead.add(victim)
        self.attach()
        # What the dead hold stays as it is until somebody takes it back: their leases do nothing any more, and are
        # kept, since letting go of one ends it.
        self.ghosts += [held for held in (*self.writing, *self.reading, *self.detached) if held.owner == victim]
        self.writing = [held for held in self.writing if held.owner != victim]
        self.reading = [held for held in self.reading if held.owner != victim]
        self.detached = [held for held in self.detached if held.owner != victim]

    @rule(index=indices)
    def reclaim(self, index: int) -> None:
        self.count_steps()
        ring, _ = self.handles[index % HANDLES]
        assert ring.reclaim_dead() == self.model.reclaim(self.dead)

    # all of these, many at a time

    @rule(seed=st.integers(0, 2**32 - 1), steps=st.integers(BURST // 2, BURST))
    def burst(self, seed: int, steps: int) -> None:
        """Steps drawn by a seed: drawing one from Hypothesis costs ten times what taking it does."""
        program = random.Random(seed).randbytes(4 * steps)
        for at in range(0, len(program), 4):
            what, index, size, small = program[at : at + 4]
            self.step(what, index, size % (SLOT_BYTES + 1), small % 4)
            self.slots_are_as_foretold()

    def step(self, what: int, index: int, size: int, small: int) -> None:
        steps: dict[str, tuple[object, Callable[[], None]]] = {
            "write": (True, lambda: self.write(index, size, small)),
            "reserve": (True, lambda: self.reserve(index)),
            "commit": (self.writing, lambda: self.commit(index, size)),
            "abort": (self.writing, lambda: self.abort(index, forget=size % 2 == 0)),
            "discard": (self.refs, lambda: self.discard(index)),
            "acquire": (self.refs, lambda: self.acquire(index, size, small)),
            "read": (self.refs, lambda: self.read(index, size, small)),
            "take": (True, lambda: self.take(index, small + 1, 2 * size, index // 64, newest=size % 2 == 0)),
            "finalise": (self.reading, lambda: self.finalise(index, ENDINGS[small])),
            "detach": (self.reading, lambda: self.detach(index)),
            "drop": (self.detached, lambda: self.drop(index)),
            "late": (self.ended, lambda: self.finalise_late(index)),
            "nonsense": (True, lambda: self.ask_for_nonsense(index, small, size)),
            "kill": (True, lambda: self.kill(index)),
            "reclaim": (True, lambda: self.reclaim(index)),
        }
        possible, take = steps[WHAT[what % len(WHAT)]]
        if possible:
            take()

    # what must hold at all times

    @invariant()
    def slots_are_as_foretold(self) -> None:
        if not hasattr(self, "model"):
            return
        self.lay_to_rest()
        ring = self.handles[0][0]
        assert ring.slot_states() == [slot.state for slot in self.model.slots]
        for held in self.reading:
            assert isinstance(held.lease, ReadLease)
            assert bytes(held.lease.buffer) == held.payload
            header = decode_header(held.lease.message)
            check_trailer(held.lease.message, header)
            assert (header.slot, header.generation, header.nbytes) == (
                held.slot,
                held.lease.generation,
                len(held.payload),
            )
        for held in self.detached:
            assert not isinstance(held.lease, ReadLease | WriteLease)
            assert held.lease.tobytes() == held.payload

    def lay_to_rest(self) -> None:
        """A ghost whose hold was taken back may finalise, late and in vain, like any ended lease."""
        for held in [held for held in self.ghosts if held.lease_id not in self.model.slots[held.slot].holds]:
            self.ghosts.remove(held)
            if isinstance(held.lease, ReadLease | WriteLease):
                self.retire(held)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.handles[0][0].reclaim_dead() == self.model.reclaim(self.dead)
        self.lay_to_rest()
        assert not self.ghosts
        ring = self.handles[0][0]
        found = ring.statistics()
        expected = self.model.counts
        counted = {name: getattr(found, name) for name in expected}
        assert counted == expected
        assert (found.lock_recoveries, found.repaired_slots) == (0, 0)
        ready = sorted(
            (slot.sequence, index, slot.generation)
            for index, slot in enumerate(self.model.slots)
            if slot.state is SlotState.READY
        )
        assert [(ref.slot, ref.generation) for ref in ring.ready_refs()] == [entry[1:] for entry in ready]
        for handle, _ in self.handles:
            handle.close()
        # A ring is kept by its leases, and here it keeps them, by way of `alive`.
        vars(self).clear()


@pytest.mark.parametrize("steps", [10_000, exhaustive(50_000)])
def test_a_ring_does_what_its_model_foretells(steps: int, log_events: list[MutableMapping[str, Any]]) -> None:
    run_steps(RingMachine, steps)
    assert all(event["log_level"] == "warning" for event in log_events)
