"""RingHandle: what a process has of a ring: its making, name, state, statistics, address, and the end of its use.

The address of a ring's server is in the segment: written under the lock, read without it by everyone who makes a
reference. Two banks; the version's lowest bit says which one holds. A new address goes into the other bank and counts
with one store of the version, so a writer killed half-way leaves the old address, and a reader sees either.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError, SlotError
from ucxx_transport.ring import layout, leases
from ucxx_transport.ring.holders import Holder, find_holders
from ucxx_transport.ring.layout import Identity, RingStatistics, round_up
from ucxx_transport.ring.owner import Owner, boot_id, current_owner, host_id, owner_alive, pid_namespace
from ucxx_transport.ring.segment import Segment, create_segment, open_segment, sweep_orphans
from ucxx_transport.ring.states import SlotState, state_of
from ucxx_transport.ring.transitions import Transitions
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.slot_ref import Common, common_of
from ucxx_transport.settings import made_of
from ucxx_transport.units import MAX_PORTS

MAX_HOST_BYTES: Final = 255
_BANK: Final = struct.Struct(f"<2Q{MAX_PORTS}H{8 * layout.ADDRESS_BANK_WORDS - 16 - 2 * MAX_PORTS}s")
"""Number of ports, bytes of the host, the ports, the host."""

_SnapshotWords = ctypes.c_uint64 * (len(layout.COUNTERS) + len(SlotState))
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
    ) -> None:
        self.name, self.folder = segment.name, segment.path.parent
        self.ring_id, self.schema, self.fingerprint = identity.ring_id, schema, identity.fingerprint
        self.slots, self.slot_bytes, self.readers = identity.slots, identity.slot_bytes, identity.readers
        self.mapping = np.frombuffer(segment.memory, np.uint8)
        self.server_words = segment.words[layout.SERVER_WORD : layout.SERVER_WORD + layout.SERVER_WORDS]
        self.closed = False
        self._segment, self._identity = segment, identity
        self._words = segment.words
        own = current_owner if owner is None else lambda: owner
        self._transitions = Transitions(segment, identity, schema, owner=own)
        self._alive = alive
        template = SlotRef(
            ring_id=identity.ring_id,
            ring_name=segment.name,
            slot=0,
            generation=0,
            nbytes=0,
            host_id=host_id(self.folder),
            fingerprint=identity.fingerprint,
        )
        self._addressed = 0, template, common_of(template)

    @classmethod
    def create(cls, config: RingConfig | Mapping[str, object], **seams: Any) -> Self:
        """Make a ring, after removing those of dead creators on this host.

        Args:
            config: sizes and policies, a dict or a `RingConfig`.
            **seams: `owner` and `alive` of `RingHandle`.

        Raises:
            ConfigError: a setting is wrong, the name is in use by a live creator, or the ring does not fit its folder.
        """
        return cls(*create_ring(made_of(RingConfig, config, "config")), **seams)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        folder: Path | str | None = None,
        descriptor: int | None = None,
        populate: bool = True,
        **seams: Any,
    ) -> Self:
        """Open a ring that another process, or another handle, made.

        Args:
            name: its `name`, or that of a SlotRef (`ring_name`).
            folder: where its segment is; None for the setting `ring.folder` of this process.
            descriptor: of its segment (`duplicate`), whose name may be gone; stays the caller's.
            populate: map all its pages now; the first read of each is half as fast otherwise.
            **seams: as for `create`.

        Raises:
            ConfigError: no such ring on this host (`facts["reason"]` "missing"), or it is of another pid namespace.
            NotReadyError: it is still being made.
            ProtocolError: no ring, another layout version, or damaged; says what was found.
        """
        segment = open_segment(name, None if folder is None else Path(folder), descriptor)
        identity, schema = _read_identity(segment)
        if populate:
            segment.populate()
        return cls(segment, identity, schema, **seams)

    @property
    def schema_bytes(self) -> bytes:
        """The schema as msgpack, b"" for a raw ring."""
        return b"" if self.schema is None else self.schema.to_bytes()

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
        return self._words[_READY]

    def creator_alive(self) -> bool:
        """Whether the process that made the ring lives."""
        return owner_alive(self._identity.creator_pid, self._identity.creator_start)

    def publish_address(self, host: str | None, ports: Sequence[int]) -> None:
        """Store where the ring's server listens; every SlotRef made after that, in any process, carries it.

        None and no ports withdraw it: the server has stopped. A ConfigError: no host of 1 to 255 bytes, or not 1 to 64
        ports.
        """
        self._require_open()
        name = (host or "").encode()
        if (host is not None or ports) and not 1 <= len(name) <= MAX_HOST_BYTES:
            raise ConfigError(f"a host has 1 to {MAX_HOST_BYTES} bytes", field="host", value=host)
        if len(ports) > MAX_PORTS or (name and not ports) or not all(1 <= port <= 65535 for port in ports):
            raise ConfigError(f"1 to {MAX_PORTS} ports from 1 to 65535", field="ports", value=tuple(ports))
        bank = _BANK.pack(len(ports), len(name), *ports, *[0] * (MAX_PORTS - len(ports)), name)
        self._transitions.call("publish", bank)

    def address(self) -> tuple[str | None, tuple[int, ...]]:
        """Host and ports as published last; (None, ()) before, and after a withdrawal."""
        self._require_open()
        _, _, _, host, ports, _ = self._common()
        return host, ports

    def statistics(self) -> RingStatistics:
        """What has happened since the ring was made, and what its slots hold now, of one moment."""
        self._require_open()
        found = _SnapshotWords()
        self._transitions.call("snapshot", found)
        return RingStatistics(self.slots, *found)

    def holders(self) -> list[Holder]:
        """Whose read attempts hold slots now, and for how long; the one with the most first."""
        self._require_open()
        return find_holders(self._segment, self._identity)

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
        """Remove the ring from the host: processes that have it keep it, no other can attach.

        False: it was removed before, or this handle did not make it.
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
        role = "closed" if self.closed else "creator" if self._segment.is_creator else "attached"
        return f"<SharedRingBuffer {self.name!r} {self.slots} × {self.slot_bytes} bytes, {role}, pid {os.getpid()}>"

    def _require_open(self) -> None:
        if self.closed:
            raise SlotError("this handle of the ring is closed", name=self.name)

    def _reclaim(self) -> int:
        leases.settle()
        transitions = self._transitions
        mine, alive = transitions.owner(), cache(self._alive)
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
        known, template, common = self._addressed
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
                common = common_of(template)
                self._addressed = version, template, common
        return common


def create_ring(config: RingConfig) -> tuple[Segment, Identity, Schema | None]:
    """Make a segment that describes itself, after a sweep of what dead creators left; errors as `create_segment`."""
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
    segment = create_segment(name, identity.total_bytes, folder)
    try:
        if config.prefault:
            segment.populate()
        Transitions(segment, identity).initialise()
        for first, content in ((layout.SCHEMA_BYTE, described), (0, identity.to_bytes())):
            segment.memory[first : first + len(content)] = content
        segment.words[layout.COMPLETE_WORD] = 1  # the last store
    except BaseException:
        segment.unlink()
        raise
    return segment, identity, schema


def _read_identity(segment: Segment) -> tuple[Identity, Schema | None]:
    """Check that a segment is a ring which this process can use, and what it says of itself; errors as `attach`."""
    words = segment.words[: layout.COMPLETE_WORD + 1].tolist()
    of_ours = words[layout.MAGIC_WORD] == layout.MAGIC and words[layout.VERSION_WORD] == layout.LAYOUT_VERSION
    if not any(words) or (of_ours and not words[layout.COMPLETE_WORD]):  # its sizes may not be there yet
        raise NotReadyError("the ring is still being made; try again", name=segment.name)
    identity = Identity.from_bytes(segment.memory[: layout.IDENTITY_BYTES].tobytes(), segment.nbytes)
    if identity.boot_id != boot_id() or identity.pid_namespace != pid_namespace():
        raise ConfigError(
            "the ring was made in another pid namespace, so dead owners and live ones look the same: share the "
            "namespace (docker: --pid=container:…; Kubernetes: shareProcessNamespace), or read over UCX (local='off')",
            field="name",
            name=segment.name,
            reason="pid_namespace",
            creator_namespace=identity.pid_namespace,
            own_namespace=pid_namespace(),
        )
    if not identity.schema_bytes:
        return identity, None
    schema = Schema.from_bytes(segment.memory[layout.SCHEMA_BYTE :][: identity.schema_bytes].tobytes())
    if schema.fingerprint != identity.fingerprint or schema.nbytes > identity.slot_bytes:
        raise ProtocolError("a ring whose schema is not the one it names", field="schema", name=segment.name)
    return identity, schema
