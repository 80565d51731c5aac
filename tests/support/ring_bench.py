"""A ring's transitions without leases: its holds as words, and what its headers, lists and counts say."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from time import monotonic_ns

from ucxx_transport.config import RingConfig
from ucxx_transport.machine import Owner
from ucxx_transport.native import Library
from ucxx_transport.ring import SlotState
from ucxx_transport.ring.layout import (
    ABORTED,
    ADDRESS_BANK_WORDS,
    ADDRESS_VERSION_WORD,
    ADDRESS_WORD,
    COMMIT_TIME,
    CONSUMED,
    COUNTER_WORD,
    COUNTERS,
    ENTRY_LEASE,
    ENTRY_READER,
    ENTRY_SINCE,
    ENTRY_WORDS,
    ENVELOPE_BYTES,
    FIRST_ENTRY,
    FREE_FIRST_WORD,
    HEADROOM_BYTES,
    HELD_FIRST_WORD,
    HOLD_ENVELOPE_BYTES,
    HOLD_GENERATION,
    HOLD_LEASE,
    HOLD_NBYTES,
    HOLD_PID,
    HOLD_SLOT,
    HOLD_START,
    HOLD_STATE,
    NBYTES,
    PREVIOUS,
    READY_FIRST_WORD,
    READY_PREVIOUS,
    RECLAIMED_READS,
    RECLAIMED_WRITES,
    REQUIRED_READS,
    SEQUENCE,
    SLEEPERS_WORD,
    STATE,
    STATE_COUNT_WORD,
    TAKE_NUMBER,
    TAKERS_WORD,
)
from ucxx_transport.ring.states import generation_of, state_of
from ucxx_transport.ring.transitions import HoldWords, TakeWords, Words, create_ring
from ucxx_transport.wire import codec
from ucxx_transport.wire.frames import message_bytes

LIVING = Owner(1, 1)
DYING = Owner(2, 2)


class RingBench:
    """A ring of three slots, and what its headers say of it."""

    def __init__(self, library: Library | None = None, *, slots: int = 3, readers: int = 3) -> None:
        config = RingConfig(slots=slots, slot_bytes=64, readers=readers, prefault=False)
        self.transitions = create_ring(config, library)
        self.identity, self.words = self.transitions.identity, self.transitions.words
        self.leases = 0

    def hold(self, owner: Owner, slot: int = 0, generation: int = 0, reader: int = 0) -> Words:
        self.leases += 1
        return HoldWords(slot, generation, self.leases, owner.pid, owner.start, reader, self.transitions.address)

    def base(self, slot: int) -> int:
        """Word of a slot's header."""
        return self.identity.first_slot_word + slot * self.identity.slot_words

    def state(self, slot: int) -> SlotState:
        return state_of(self.words[self.base(slot) + STATE])

    def generation(self, slot: int) -> int:
        return generation_of(self.words[self.base(slot) + STATE])

    def states(self) -> list[SlotState]:
        return [self.state(slot) for slot in range(self.identity.slots)]

    def listed(self, first: int, links: int = PREVIOUS) -> list[int]:
        """The slots of a list, from its first to its last; checked against the same backwards."""
        words, forwards, before = self.words, [], 0
        at = words[first]
        while at:
            base = self.base(at - 1)
            assert words[base + links] == before, "a list reads backwards as it does forwards"
            forwards.append(at - 1)
            assert len(forwards) <= self.identity.slots, "a list ends"
            before, at = at, words[base + links + 1]
        assert words[first + 1] == before, "a list's last word is its last slot"
        return forwards

    def check(self) -> None:
        """Lists and counts say what the state words say."""
        words, states = self.words, self.states()
        held = [slot for slot, state in enumerate(states) if state in (SlotState.READY, SlotState.READING)]
        by_age = sorted(held, key=lambda slot: words[self.base(slot) + SEQUENCE])
        assert self.listed(HELD_FIRST_WORD) == by_age
        ready = [slot for slot in by_age if states[slot] is SlotState.READY]
        assert self.listed(READY_FIRST_WORD, READY_PREVIOUS) == ready
        free = [slot for slot, state in enumerate(states) if state is SlotState.FREE]
        assert sorted(self.listed(FREE_FIRST_WORD)) == free
        counts = [words[STATE_COUNT_WORD + state] for state in SlotState]
        assert counts == [states.count(state) for state in SlotState]
        for slot, state in enumerate(states):
            first = self.base(slot) + FIRST_ENTRY
            entries = [first + ENTRY_WORDS * index for index in range(self.identity.entries)]
            leases = [words[entry] for entry in entries]
            if state in (SlotState.FREE, SlotState.WRITING):
                assert not any(leases), "a slot without a payload has no reader"
            elif state is SlotState.READY:
                assert all(lease & 1 for lease in leases if lease), "nothing is in flight on a READY slot"
            else:
                assert any(lease and not lease & 1 for lease in leases), "something is in flight on a READING slot"
            began_ns = [words[entry + ENTRY_SINCE] for entry in entries if words[entry]]
            assert all(0 < since <= monotonic_ns() for since in began_ns), "every attempt says when it began"

    def meaning(self, slot: int) -> tuple[object, ...]:
        """All of a slot that counts in its present state."""
        base, state = self.base(slot), self.state(slot)
        owners = sorted(
            (words[HOLD_PID], words[HOLD_START], words[HOLD_LEASE])
            for words in self.holds()
            if words[HOLD_SLOT] == slot
        )
        if state in (SlotState.FREE, SlotState.WRITING):
            return state, self.generation(slot), owners
        words, first = self.words, base + FIRST_ENTRY
        entries = [first + ENTRY_WORDS * index for index in range(self.identity.entries)]
        had = [words[entry + ENTRY_READER] for entry in entries if words[entry + ENTRY_LEASE] & 1]
        facts = [words[base + word] for word in (NBYTES, SEQUENCE, REQUIRED_READS, ENVELOPE_BYTES)]
        assert words[base + COMMIT_TIME]
        start = self.identity.first_payload_byte + slot * self.identity.stride_bytes - HEADROOM_BYTES
        message = self.transitions.memory[start : start + message_bytes(facts[0])]
        header = codec.decode_header(message)
        codec.check_trailer(message, header)
        assert (header.slot, header.generation, header.nbytes) == (slot, self.generation(slot), facts[0])
        return state, self.generation(slot), owners, facts, had

    def address(self) -> list[int]:
        """What is published."""
        bank = ADDRESS_WORD + (self.words[ADDRESS_VERSION_WORD] & 1) * ADDRESS_BANK_WORDS
        return self.words[bank : bank + ADDRESS_BANK_WORDS].tolist()

    def fall_asleep(self) -> None:
        """A write and a take say that they wait, as `ring_wait` and `ring_wait_ready` do."""
        self.words[SLEEPERS_WORD] = self.words[TAKERS_WORD] = 1

    def publish(self, word: int) -> int:
        """Publish an address of nothing but this word."""
        return self.transitions.call("publish", (ctypes.c_uint64 * ADDRESS_BANK_WORDS)(*[word] * ADDRESS_BANK_WORDS))

    # ways into a state

    def written(self, required: int = 1, *, nbytes: int = 8) -> Words:
        words = self.reserved()
        words[HOLD_NBYTES] = nbytes
        words[HOLD_ENVELOPE_BYTES] = 3
        self.transitions.commit(words, required)
        return words

    def reserved(self, owner: Owner = LIVING) -> Words:
        words = self.hold(owner)
        assert self.transitions.reserve(words, overwrites=True)
        return words

    def reading(self, payload: Words, owner: Owner = LIVING, reader: int = 0) -> Words:
        words = self.hold(owner, payload[HOLD_SLOT], payload[HOLD_GENERATION], reader)
        self.transitions.acquire(words)
        return words

    def taking(self, owner: Owner, reader: int, number: int = 2, *, newest: bool = False) -> list[Words]:
        holds = [self.hold(owner, reader=reader) for _ in range(number)]
        asked = TakeWords(number, 2**64 - 1, newest)
        self.take(holds, asked)
        return holds[: asked[TAKE_NUMBER]]

    def take(self, holds: list[Words], asked: Words) -> None:
        self.transitions.call("take", (ctypes.c_void_p * len(holds))(*map(ctypes.addressof, holds)), asked)

    # ways out of one

    def abort(self, words: Words) -> bool:
        return self.transitions.finalise(words, ABORTED)

    def discard(self, payload: Words) -> bool:
        return not self.transitions.call("discard", payload[HOLD_SLOT], payload[HOLD_GENERATION])

    def holds(self) -> Iterator[Words]:
        return self.transitions.holds(SlotState.WRITING, SlotState.READING)

    def counted(self, counter: str) -> int:
        return self.words[COUNTER_WORD + COUNTERS.index(counter)]

    def reclaim(self, owner: Owner) -> None:
        for words in list(self.holds()):
            if (words[HOLD_PID], words[HOLD_START]) == owner:
                is_write = state_of(words[HOLD_STATE]) is SlotState.WRITING
                assert self.transitions.finalise(words, RECLAIMED_WRITES if is_write else RECLAIMED_READS)

    def drain(self) -> None:
        """Every slot can be written, read and freed, whatever has happened."""
        for _ in range(2 * self.identity.slots):
            payload = self.written()
            assert self.transitions.finalise(self.reading(payload, LIVING), CONSUMED)
        self.check()
        assert SlotState.WRITING not in self.states()
        assert SlotState.READING not in self.states()
