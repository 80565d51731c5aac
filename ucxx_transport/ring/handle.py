"""RingHandle: what a process has of a ring: its making, name, state, statistics, address, and the end of its use.

The address of a ring's server is in the segment: written under the lock, read without it by everyone who makes a
reference. Two banks; the version's lowest bit says which one holds. A new address goes into the other bank and counts
with one store of the version, so a writer killed half-way leaves the old address, and a reader sees either.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import monotonic_ns
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ucxx_transport.config import RingConfig
from ucxx_transport.errors import SlotError
from ucxx_transport.machine import owner_alive
from ucxx_transport.ring import layout, leases
from ucxx_transport.ring.layout import RingStatistics
from ucxx_transport.ring.segment import host_id
from ucxx_transport.ring.states import STATE_MASK, SlotState, state_of
from ucxx_transport.ring.transitions import Transitions, create_ring, open_ring
from ucxx_transport.schema.slot_ref import MAX_HOST_CHARS, Common, are_ports
from ucxx_transport.schema.wire_form import is_plain_text, refuse
from ucxx_transport.settings import made_of
from ucxx_transport.teardown import Closing
from ucxx_transport.units import MAX_PORTS

_BANK: Final = struct.Struct(f"<2Q{MAX_PORTS}H{8 * layout.ADDRESS_BANK_WORDS - 16 - 2 * MAX_PORTS}s")
"""Number of ports, bytes of the host, the ports, the host."""

_NAMED: Final = 3  # holders of slots in a message; of the others it says how many there are
_SIDECAR: Final = b"ucxx_transport/sidecar/boot.py\0"  # in the command line of a process that serves a port
_SnapshotWords = ctypes.c_uint64 * (len(layout.COUNTERS) + len(SlotState))


class Holder(NamedTuple):
    """A reader that has attempts in flight: its process, on the ring's host, and its id (0: unnamed).

    `slots` is how many it holds; `held_s` how long the one that it has held longest. `process` names it in a message:
    what it runs, or that it is the ring's server, which reads for a client of another host.
    """

    pid: int
    reader: int
    process: str
    slots: int
    held_s: float


class RingHandle(Closing):
    """The part of `SharedRingBuffer` that moves no payload."""

    def __init__(self, transitions: Transitions) -> None:
        self.transitions = transitions
        self.alive: Callable[[int, int], bool] = owner_alive
        self._creation, self._words = transitions.creation, transitions.words
        self._identity = identity = transitions.identity
        self.name, self.folder = self._creation.name, self._creation.path.parent
        self.ring_id, self.schema, self.fingerprint = identity.ring_id, transitions.schema, identity.fingerprint
        self.slots, self.slot_bytes, self.readers = identity.slots, identity.slot_bytes, identity.readers
        self.mapping = np.frombuffer(transitions.memory, np.uint8)
        self.server_words = self._words[layout.SERVER_WORD : layout.SERVER_WORD + layout.SERVER_WORDS]
        self.closed = False
        self._host_id = host_id(self.folder)
        self._addressed: tuple[int, Common] = -1, (b"", "", "", None, (), 0)  # of no version

    @classmethod
    def create(cls, config: RingConfig | Mapping[str, object]) -> Self:
        """Make a ring, after removing those of dead creators on this host.

        Args:
            config: sizes and policies, a dict or a `RingConfig`.

        Raises:
            ConfigError: a setting is wrong, the name is in use by a live creator, or the ring does not fit its folder.
        """
        return cls(create_ring(made_of(RingConfig, config, "config")))

    @classmethod
    def attach(
        cls, name: str, *, folder: Path | str | None = None, descriptor: int | None = None, populate: bool = True
    ) -> Self:
        """Open a ring that another process, or another handle, made.

        Args:
            name: its `name`, or that of a SlotRef (`ring_name`).
            folder: where its segment is; None for the setting `ring.folder` of this process.
            descriptor: of its segment (`duplicate`), whose name may be gone; stays the caller's.
            populate: map all its pages now; the first read of each is half as fast otherwise.

        Raises:
            ConfigError: no such ring on this host (`facts["reason"]` "missing"), or it is of another pid namespace.
            NotReadyError: it is still being made.
            ProtocolError: no ring, another layout version, or damaged; says what was found.
        """
        return cls(open_ring(name, folder, descriptor, populates=populate))

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
        fd = self._creation.descriptor()
        # opened again, not dup: flock's lock goes with the open file, and would outlive this process in the other
        return None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def slot_state(self, slot: int) -> SlotState:
        """What a slot holds now; a SlotError where the ring has no such slot."""
        self._require_open()
        if not 0 <= slot < self.slots:
            raise SlotError("the ring has no such slot", slot=slot, slots=self.slots)
        return state_of(self._words[self._identity.first_slot_word + slot * self._identity.slot_words])

    def slot_states(self) -> list[SlotState]:
        """What each slot holds now, in order."""
        self._require_open()
        first, step = self._identity.first_slot_word, self._identity.slot_words
        return [state_of(word) for word in self._words[first : first + self.slots * step : step].tolist()]

    def get_ready_count(self) -> int:
        """How many payloads wait to be read."""
        self._require_open()
        return self._words[layout.STATE_COUNT_WORD + SlotState.READY]

    def creator_alive(self) -> bool:
        """Whether the process that made the ring lives."""
        return owner_alive(self._identity.creator_pid, self._identity.creator_start)

    def publish_address(self, host: str | None, ports: Sequence[int]) -> None:
        """Store where the ring's server listens; every SlotRef made after that, in any process, carries it.

        None and no ports withdraw it: the server has stopped. A ConfigError: no host of 1 to 255 bytes of
        printable characters, or not 1 to 64 ports.
        """
        self._require_open()
        ports = tuple(ports)
        if host is not None or ports:
            if not (is_plain_text(host, MAX_HOST_CHARS) and len(host.encode()) <= MAX_HOST_CHARS):
                refuse("host", host, f"1 to {MAX_HOST_CHARS} bytes of printable characters")
            if not (are_ports(ports) and ports):
                refuse("ports", ports, f"1 to {MAX_PORTS} ports from 1 to 65535")
        name = (host or "").encode()
        bank = _BANK.pack(len(ports), len(name), *ports, *[0] * (MAX_PORTS - len(ports)), name)
        self.transitions.call("publish", bank)

    def address(self) -> tuple[str | None, tuple[int, ...]]:
        """Host and ports as published last; (None, ()) before, and after a withdrawal."""
        self._require_open()
        _, _, _, host, ports, _ = self._common()
        return host, ports

    def statistics(self) -> RingStatistics:
        """What has happened since the ring was made, and what its slots hold now, of one moment."""
        self._require_open()
        found = _SnapshotWords()
        self.transitions.call("snapshot", found)
        return RingStatistics(self.slots, *found)

    def holders(self) -> list[Holder]:
        """Whose read attempts hold slots now, and for how long; the one with the most first."""
        self._require_open()
        return _holders(*_headers(self.transitions))

    def reclaim_dead(self) -> int:
        """Give back the slots that dead processes hold. Writes do so by themselves when the ring is full.

        It ends every hold whose process is dead, and those of this process whose objects are gone, and returns how many
        these were. A DeadlineExceededError: the lock was not to be had in time.
        """
        self._require_open()
        return self._reclaim()

    def unlink(self) -> bool:
        """Remove the ring from the host: processes that have it keep it, no other can attach.

        False: it was removed before, or this handle did not make it.
        """
        return self._creation()

    def close(self) -> None:
        """End the use of this handle; the one that made the ring removes it. Leases stay valid. Idempotent."""
        self.closed = True
        self._creation()

    def __repr__(self) -> str:
        """Name, sizes and role."""
        role = "closed" if self.closed else "attached" if self._creation.descriptor() is None else "creator"
        return f"<SharedRingBuffer {self.name!r} {self.slots} × {self.slot_bytes} bytes, {role}, pid {os.getpid()}>"

    def _require_open(self) -> None:
        if self.closed:
            raise SlotError("this handle of the ring is closed", name=self.name)

    def _reclaim(self) -> int:
        leases.settle()
        transitions = self.transitions
        mine, alive = transitions.owner(), cache(self.alive)
        reclaimed = 0
        # Looking at a process takes 20 µs (/proc): done between two critical sections, the second compares again.
        for words in transitions.holds(SlotState.WRITING, SlotState.READING):
            owner = (words[layout.HOLD_PID], words[layout.HOLD_START])
            if not (leases.is_live(words[layout.HOLD_LEASE]) if owner == mine else alive(*owner)):
                is_write = state_of(words[layout.HOLD_STATE]) is SlotState.WRITING
                reason = layout.RECLAIMED_WRITES if is_write else layout.RECLAIMED_READS
                reclaimed += transitions.finalise(words, reason)
        return reclaimed

    def _common(self) -> Common:
        """What a reference made now has in common with the ring's others: its name, and where its server is."""
        words = self._words
        known, common = self._addressed
        version = words[layout.ADDRESS_VERSION_WORD]
        while version != known:
            bank = layout.ADDRESS_WORD + (version & 1) * layout.ADDRESS_BANK_WORDS
            # copied before it is looked at; the other bank is being written at most while the version stands still
            content = words[bank : bank + layout.ADDRESS_BANK_WORDS].tobytes()
            known, version = version, words[layout.ADDRESS_VERSION_WORD]
            if known == version:
                count, length, *ports, name = _BANK.unpack(content)
                host = name[:length].decode(errors="replace") if count else None
                common = (self.ring_id, self.name, self._host_id, host, tuple(ports[:count]), self.fingerprint)
                self._addressed = version, common
        return common


def process_name(pid: int) -> str:
    """A process in the words of a message: what it runs, or that it is one of a ring's server."""
    with suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        is_server = _SIDECAR in Path(f"/proc/{pid}/cmdline").read_bytes()
        return f"the ring's server, pid {pid}" if is_server else f"pid {pid} ({name})"
    return f"pid {pid}"


def why_full(ring: Transitions) -> tuple[str, dict[str, object]]:
    """Why a write found no slot, in words that end with what helps, and the numbers behind them."""
    states, entries = _headers(ring)  # without the lock: a slot that changes meanwhile may be missing
    holders = _holders(states, entries)
    readers_of = (entries[:, :, layout.ENTRY_LEASE] & 1).sum(axis=1)  # of each slot: how many have had the payload
    waiting = Counter(readers_of[states == SlotState.READY].tolist())
    writing = int((states == SlotState.WRITING).sum())
    parts, remedies = [], []
    for holder in holders[:_NAMED]:
        name = holder.process + (f", reader {holder.reader:x}," if holder.reader else "")
        longest = "the longest for" if holder.slots > 1 else "for"
        parts.append(f"{name} holds {holder.slots}, {longest} {holder.held_s:.1f} s")
    if len(holders) > _NAMED:
        parts.append(f"{len(holders) - _NAMED} other readers hold some")
    if holders:
        remedies.append("a trainer that keeps arrays keeps their slots: clone them, or read with local='copy'")
    for readers, slots in sorted(waiting.items()):
        which = {0: "first", 1: "second", 2: "third"}.get(readers, f"{readers + 1}th")
        parts.append(f"{slots} wait{'s' if slots == 1 else ''} for a {which} reader")
    if waiting.keys() - {0}:
        gone = "if it is gone for good, write(readers=1), and discard(refs) by a client that has not read them"
        remedies.append(f"start the missing reader; {gone}")
    if waiting[0]:
        remedies.append("start more readers")
    if writing:
        parts.append(f"{writing} {'is' if writing == 1 else 'are'} being written")
    helps = "; ".join([*remedies, "more ring.slots"])
    text = f"of {ring.identity.slots} on host {os.uname().nodename}: {'; '.join(parts)}. What helps: {helps}"
    facts: dict[str, object] = {
        "slots": ring.identity.slots,
        "reading": sum(holder.slots for holder in holders),
        "holders": tuple(dict.fromkeys(holder.pid for holder in holders)),
        "held_s": round(max((holder.held_s for holder in holders), default=0.0), 3),
        "unread": waiting[0],
        "partly_read": waiting.total() - waiting[0],
        "writing": writing,
    }
    return text, facts


def _headers(ring: Transitions) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The slots' states, shape (slots,), and their read entries, (slots, entries, words), uint64."""
    identity = ring.identity
    first, step = identity.first_slot_word, identity.slot_words
    headers = np.array(ring.words[first : first + identity.slots * step]).reshape(identity.slots, step)
    entries = headers[:, layout.FIRST_ENTRY : layout.FIRST_ENTRY + identity.entries * layout.ENTRY_WORDS]
    return headers[:, layout.STATE] & STATE_MASK, entries.reshape(identity.slots, identity.entries, layout.ENTRY_WORDS)


def _holders(states: npt.NDArray[Any], entries: npt.NDArray[Any]) -> list[Holder]:
    now_ns, leases = monotonic_ns(), entries[:, :, layout.ENTRY_LEASE]
    in_flight = (leases != 0) & (leases & 1 == 0) & (states == SlotState.READING)[:, None]
    since_ns: dict[tuple[int, int], dict[int, int]] = {}  # by process and reader: of each slot that it holds
    for slot, index in np.argwhere(in_flight).tolist():
        _, pid, _, reader, since = entries[slot, index].tolist()
        held = since_ns.setdefault((pid, reader), {})
        held[slot] = min(since, held.get(slot, since))
    found = [
        Holder(pid, reader, process_name(pid), len(held), (now_ns - min(held.values())) / 1e9)
        for (pid, reader), held in since_ns.items()
    ]
    return sorted(found, key=lambda holder: -holder.slots)
