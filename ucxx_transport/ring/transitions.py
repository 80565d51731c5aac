"""Transitions: the calls into `native/ring.c`, and the errors that their outcomes are.

Each call is one whole transition under the segment's lock. It is tried without releasing the GIL first, since a
critical section takes a fraction of a microsecond; where the lock is taken for longer it is waited for with the GIL
released, in slices, so that Ctrl-C is noticed. A hold is passed as a `HoldWords`, whose words `layout` names.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ucxx_transport import errors
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import BusyError, ConfigError, SlotError, StaleSlotError
from ucxx_transport.machine import Owner, boot_id, current_owner, pid_namespace
from ucxx_transport.native import Library, load
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Identity, round_up
from ucxx_transport.ring.segment import Creation, map_segment, populate, remove_orphan, segment_path, sweep_orphans
from ucxx_transport.ring.states import SlotState, generation_of, state_of
from ucxx_transport.schema import Schema

HoldWords = ctypes.c_uint64 * layout.HOLD_WORDS
TakeWords = ctypes.c_uint64 * layout.TAKE_WORDS
Words = ctypes.Array[ctypes.c_uint64]
_RingWords = ctypes.c_uint64 * 10  # `struct ring` of ring.c

_HOLDS_A_CALL: Final = 1024  # listed in one critical section
LOOK_EVERY_S: Final = 0.1  # while waiting for a slot: for signals, and for processes that died with slots
_THREAD_ID_MASK: Final = 0x3FFFFFFF  # of a robust mutex's first word (<linux/futex.h>): who holds it


class Transitions:
    """A mapped segment, as one handle has it, and the transitions of its slots.

    Each waits for the lock as long as the segment says, or less if it is asked to. The memory stays mapped as long as
    this object or any view of it is referenced.

    `words` are for single aligned loads and stores. `address` is of what the calls know of the segment, `HOLD_RING` of
    the holds that they are given. Slot 0's payload is at `first_payload` in this process's memory, at `first_byte` in
    the segment, its envelope at `first_envelope`; the next slot's are `stride` bytes further. `owner` takes the holds.
    """

    def __init__(
        self, creation: Creation, mapping: mmap.mmap, identity: Identity, schema: Schema | None, library: Library
    ) -> None:
        self.creation, self.identity, self.schema = creation, identity, schema
        self.owner: Callable[[], Owner] = current_owner
        self.warned_late = False
        self.memory = memoryview(mapping)
        self.readable, self.words = self.memory.toreadonly(), self.memory.cast("Q")
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.first_byte, self.stride = identity.first_payload_byte, identity.stride_bytes
        self.first_payload = start + self.first_byte
        self.first_envelope = self.first_byte - layout.HEADROOM_BYTES - identity.envelope_bytes
        self._lock_wait_s = identity.lock_timeout_ns / 1e9
        self._struct = _RingWords(
            start,
            *(identity.slots, identity.slot_bytes, identity.first_slot_word, identity.slot_words, identity.entries),
            *(identity.max_attempts, self.first_byte, self.stride, identity.envelope_bytes),
        )
        self.address = ctypes.addressof(self._struct)
        self._brief, self._sleeping = library
        self._reserve, self._commit = self._brief.ring_reserve, self._brief.ring_commit
        self._acquire, self._finalise = self._brief.ring_acquire, self._brief.ring_finalise
        if creation.descriptor() is not None:
            # multiprocessing's forked children leave by os._exit, without atexit, but all its children run its own hook
            multiprocessing.util.Finalize(self, creation, exitpriority=0)
            if code := self._brief.ring_initialise(self.address):  # makes the lock and the lists of slots
                text = f"a robust process-shared mutex cannot be made (errno {code}): use Linux with glibc"
                raise ConfigError(text, errno=code)

    def payload(self, words: Words) -> npt.NDArray[np.uint8]:
        """The bytes of a hold's payload, shape (nbytes,), writable; they do not keep the hold."""
        start = self.first_byte + words[layout.HOLD_SLOT] * self.stride
        return np.frombuffer(self.memory, np.uint8, words[layout.HOLD_NBYTES], start)

    def reserve(self, words: Words, *, overwrites: bool, wait_s: float | None = None) -> bool:
        """FREE → WRITING, or the oldest READY one if `overwrites`; gives slot and generation. False: there is none."""
        words[layout.HOLD_ARGUMENT] = overwrites
        code = self._reserve(words)
        return not code or self._waited_for(code, wait_s, "reserve", words) != layout.FULL

    def commit(self, words: Words, required_reads: int) -> None:
        """WRITING → READY: the payload, whose size and checksum are in the words, is complete."""
        words[layout.HOLD_ARGUMENT] = required_reads
        code = self._commit(words)
        if code and self._waited_for(code, None, "commit", words):
            state = state_of(words[layout.HOLD_STATE]).name
            text = "this write lease no longer holds its slot; nothing was committed"
            raise SlotError(text, slot=words[layout.HOLD_SLOT], generation=words[layout.HOLD_GENERATION], state=state)

    def acquire(self, words: Words, wait_s: float | None = None) -> None:
        """READY → READING, or one attempt more within READING; gives nbytes and checksum; errors as in `_REFUSALS`."""
        code = self._acquire(words)
        if code == layout.LOCKED:
            code = self._waited_for(code, wait_s, "acquire", words)
        if code:
            kind, text = _REFUSALS[code]
            facts: dict[str, object] = {"slot": words[layout.HOLD_SLOT], "generation": words[layout.HOLD_GENERATION]}
            if kind is StaleSlotError:
                found = words[layout.HOLD_STATE]
                facts |= {"found_generation": generation_of(found), "state": state_of(found).name}
            elif kind is BusyError:
                facts["attempts"] = words[layout.HOLD_ATTEMPTS]
            raise kind(text, **facts)

    def finalise(self, words: Words, reason: int, wait_s: float | None = None) -> bool:
        """End a hold, counted by `reason`: `CONSUMED` when a reader has had the payload; False: it was over."""
        words[layout.HOLD_ARGUMENT] = reason
        code = self._finalise(words)
        return not (code and self._waited_for(code, wait_s, "finalise", words))

    def holds(self, *states: SlotState) -> Iterator[Words]:
        """Each write and each read attempt in slots of these states; of a READY slot its payload, under no lease."""
        mask = sum(1 << state for state in states)
        first, number = ctypes.c_uint64(0), ctypes.c_uint64(0)
        room = max(_HOLDS_A_CALL, self.identity.entries)
        seen = (HoldWords * room)()
        while first.value < self.identity.slots:  # each call is a critical section
            self.call("holds", mask, ctypes.addressof(first), seen, room, ctypes.addressof(number))
            for index in range(number.value):
                yield HoldWords(*seen[index])

    def count(self, counter: str) -> None:
        """Add one to a counter."""
        self.call("count", layout.COUNTERS.index(counter))

    def call(self, name: str, *arguments: Any, wait_s: float | None = None) -> int:
        """Make a call that takes the segment's address first and the wait last; returns its outcome.

        A DeadlineExceededError: the lock was not to be had in time. A SlotError: it or a list of slots is damaged.
        """
        code: int = getattr(self._brief, f"ring_{name}")(self.address, *arguments, 0)
        if code:
            waiting = partial(getattr(self._sleeping, f"ring_{name}"), self.address, *arguments)
            code = self._waited(code, wait_s, waiting)
        return code

    def sleep(self, seen: int, left_s: float, *, for_ready: bool = False) -> None:
        """Sleep until a slot has become FREE, or READY, since its count was `seen`; `LOOK_EVERY_S` at most."""
        wait = self._sleeping.ring_wait_ready if for_ready else self._sleeping.ring_wait
        wait(self.address, seen, int(min(left_s, LOOK_EVERY_S) * 1e9))

    def _waited_for(self, code: int, wait_s: float | None, name: str, words: Words) -> int:
        """`_waited` for a call with a hold alone."""
        function = getattr(self._sleeping, f"ring_{name}")

        def call(wait_ns: int) -> int:
            words[layout.HOLD_WAIT_NS] = wait_ns
            outcome: int = function(words)
            words[layout.HOLD_WAIT_NS] = 0
            return outcome

        return self._waited(code, wait_s, call)

    def _waited(self, code: int, wait_s: float | None, call: Callable[[int], int]) -> int:
        """Repeat a call that found the lock taken (`code` LOCKED), and return its outcome; errors as `call`."""
        if code == layout.LOCKED:
            bound_s = self._lock_wait_s if wait_s is None else min(wait_s, self._lock_wait_s)
            until_s = monotonic() + bound_s
            left_s = bound_s
            while (code := call(max(1, int(left_s * 1e9)))) == layout.LOCKED:
                left_s = until_s - monotonic()
                if left_s <= 0:
                    holder = self.words[layout.MUTEX_BYTE // 8] & _THREAD_ID_MASK
                    text = "the ring's lock is held by a thread that does not get on (stopped?)"
                    raise errors.DeadlineExceededError(text, waited_s=bound_s, holder_thread_id=holder)
        if code == layout.DAMAGED:
            raise SlotError("the lock or a list of slots of the segment is damaged; recreate the ring")
        return code


def create_ring(config: RingConfig, library: Library | None = None) -> Transitions:
    """Make a segment that describes itself, after a sweep of what dead creators left; errors as `RingHandle.create`."""
    folder = Path(config.folder)
    sweep_orphans(folder)
    given = config.schema
    schema = given if given is None or isinstance(given, Schema) else Schema.from_dict(given.to_dict())
    described = b"" if schema is None else schema.to_bytes()
    creator = current_owner()
    identity = Identity(
        ring_id=secrets.token_bytes(16),
        slots=config.slots,
        # a schema of empty arrays alone has payloads of no bytes
        slot_bytes=max(1, schema.nbytes) if schema is not None else (config.slot_bytes or 1),
        readers=config.readers,
        schema_bytes=len(described),
        fingerprint=0 if schema is None else schema.fingerprint,
        on_full=config.on_full,
        checksum=config.checksum,
        block_timeout_ns=int(config.block_timeout_s * 1e9),
        lock_timeout_ns=int(config.lock_timeout_s * 1e9),
        envelope_bytes=round_up(config.envelope_bytes, 64),
        creator_pid=creator.pid,
        creator_start=creator.start,
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
    )
    name = config.name or f"{os.getpid()}-{secrets.token_hex(6)}"
    creation = Creation(segment_path(name, folder))
    try:
        mapping = creation.make(identity.total_bytes)
        # first: it removes the file at an exit
        made = Transitions(creation, mapping, identity, schema, library or load())
        if config.prefault:
            populate(mapping)
        for first, content in ((layout.SCHEMA_BYTE, described), (0, identity.to_bytes())):
            made.memory[first : first + len(content)] = content
        made.words[layout.COMPLETE_WORD] = 1  # the last store
    except BaseException:
        creation()
        remove_orphan(creation.path)  # an interrupt may have come between the file and what removes it
        raise
    return made


def open_ring(name: str, folder: Path | str | None, descriptor: int | None, *, populates: bool) -> Transitions:
    """Map a segment, and check that it is a ring which this process can use; errors as `RingHandle.attach`."""
    creation = Creation(segment_path(name, folder))
    mapping = map_segment(creation.path, descriptor)
    memory = memoryview(mapping)
    words = memory.cast("Q")[: layout.COMPLETE_WORD + 1].tolist()
    of_ours = words[layout.MAGIC_WORD] == layout.MAGIC and words[layout.VERSION_WORD] == layout.LAYOUT_VERSION
    if not any(words) or (of_ours and not words[layout.COMPLETE_WORD]):  # its sizes may not be there yet
        raise errors.NotReadyError("the ring is still being made; try again", name=creation.name)
    identity = Identity.from_bytes(memory[: layout.IDENTITY_BYTES].tobytes(), len(mapping))
    if identity.boot_id != boot_id() or identity.pid_namespace != pid_namespace():
        text = (
            "the ring was made in another pid namespace, so dead owners and live ones look the same: share the "
            "namespace (docker: --pid=container:…; Kubernetes: shareProcessNamespace), or read over UCX (local='off')"
        )
        creator, own = identity.pid_namespace, pid_namespace()
        raise ConfigError(
            text, field="name", name=creation.name, reason="pid_namespace", creator_namespace=creator, own_namespace=own
        )
    schema = None
    if identity.schema_bytes:
        schema = Schema.from_bytes(memory[layout.SCHEMA_BYTE :][: identity.schema_bytes].tobytes())
        if schema.fingerprint != identity.fingerprint or schema.nbytes > identity.slot_bytes:
            raise errors.ProtocolError(
                "a ring whose schema is not the one it names", field="schema", name=creation.name
            )
    if populates:
        populate(mapping)
    return Transitions(creation, mapping, identity, schema, load())


_TAKEN_BY_OTHERS: Final = (
    "other readers have attempts in flight for all the reads that this payload asks for; it is theirs unless one of "
    "them gives it back"
)
_RECYCLED: Final = (
    "stale slot: the slot was recycled, or its payload was read, dropped or never written; go on with the next record, "
    "and write what several read with readers=N"
)
_REFUSALS: Final[Mapping[int, tuple[type[SlotError | BusyError], str]]] = {
    layout.OUT_OF_RANGE: (SlotError, "the ring has no such slot"),
    layout.DAMAGED: (SlotError, "the lock or the slot's header is damaged; recreate the ring"),
    layout.CROWDED: (BusyError, "the slot carries as many read attempts as it can"),
    layout.TAKEN: (BusyError, _TAKEN_BY_OTHERS),
    layout.HAD: (StaleSlotError, "stale slot: the payload was read already, though an attempt is still in flight"),
    layout.STALE: (StaleSlotError, _RECYCLED),
}
