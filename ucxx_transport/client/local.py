"""Reads of rings on this host: the slot itself, in place or copied out. No UCX."""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from ucxx_transport import errors
from ucxx_transport.client.errands import Discard
from ucxx_transport.client.jobs import ClientBase, Job, Outcome, Takeable, clear_traceback
from ucxx_transport.client.payload import Bytes, Payload
from ucxx_transport.errors import StaleSlotError, TransportError
from ucxx_transport.link.base import raised_limit
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.layout import HOLD_NBYTES
from ucxx_transport.ring.reading import verify_checksum
from ucxx_transport.ring.segment import host_id, segment_folder

if TYPE_CHECKING:
    from ucxx_transport.client.errands import Take
    from ucxx_transport.client.jobs import Entry
    from ucxx_transport.ring.leases import ReadLease
    from ucxx_transport.schema import SlotRef

Begun: TypeAlias = "tuple[SharedRingBuffer, ReadLease, Bytes | None]"
"""A ring, the read attempt in flight, and the copy if the mode asks for one."""

LOCK_TURN_S: Final = 0.003
"""How long a ring's lock is waited for while other rings wait their turn. It is held for microseconds: a holder that
takes longer is stopped, or without a core."""

_LISTENING: Final = "0A"  # in /proc/net/tcp (proc(5))

PRUNE_INTERVAL_S: Final = 5.0
"""Rings whose worker died are closed this often: their memory is freed only when no process maps it any more."""


class LocalReader:
    """Attaches rings of this host as references to them come, and reads from them. Thread-safe.

    With `local="auto"` it falls back to UCX where a ring cannot be attached, or has lost its name and is served.
    `reads_host`: whose rings it reads, this host's or None.
    """

    def __init__(self, base: ClientBase, in_place: bool | Callable[[SharedRingBuffer], bool]) -> None:  # noqa: FBT001 - or a function
        self._base, config = base, base.config
        self._in_place = in_place if config.local == "auto" else config.local == "view"
        self._verify = config.verify_checksum
        self._claim = base.delivered.claim
        self._folder = segment_folder()
        self.host_id = host_id(self._folder)
        self.reads_host = None if config.local == "off" else self.host_id
        self._lock = threading.Lock()
        self._rings: OrderedDict[bytes, SharedRingBuffer] = OrderedDict()
        self._unreachable: set[bytes] = set()
        self._prune_at_s = base.clock() + PRUNE_INTERVAL_S

    def ring_of(self, ref: Takeable) -> SharedRingBuffer | None:
        """The attached ring of a reference or a source, or None when it is to be read over UCX.

        A StaleSlotError: it was on this host and is gone. A ConfigError: it cannot be attached, but has to be.
        """
        if ref.host_id != self.reads_host:
            return None
        ring = self._rings.get(ref.ring_id)
        if ring is not None and self._base.clock() < self._prune_at_s:
            return ring
        with self._lock:
            if (now := self._base.clock()) >= self._prune_at_s:
                self._prune_at_s = now + PRUNE_INTERVAL_S
                self._unreachable.clear()
                for dead in [known for known in self._rings.values() if not known.creator_alive()]:
                    del self._rings[dead.ring_id]
                    dead.close()
            return self._rings.get(ref.ring_id) or self._attach(ref)

    def close(self) -> None:
        with self._lock:
            for ring in self._rings.values():
                ring.close()
            self._rings.clear()

    def _attach(self, ref: Takeable) -> SharedRingBuffer | None:
        if ref.ring_id in self._unreachable:
            return None
        try:
            ring = self._opened(ref)
        except (errors.ConfigError, errors.ProtocolError) as error:
            is_gone = error.facts.get("reason") == "missing"
            if not (is_gone or self._base.config.local == "auto"):
                raise
        else:
            if ring.ring_id == ref.ring_id:
                self._rings[ref.ring_id] = ring
                while len(self._rings) > self._base.config.max_attached_rings:
                    self._rings.popitem(last=False)[1].close()
                return ring
            is_gone = True
            ring.close()
        if is_gone and not (self._base.config.local == "auto" and _is_served(ref)):
            message = (
                "the ring of this payload is gone: its worker closed it, or died and was swept; go "
                "on with the next record, and let workers wait for their readers: close(drain_s=…)"
            )
            raise StaleSlotError(message, ring=ref.ring_name)
        self._unreachable.add(ref.ring_id)
        self._base.counters.add("fallbacks")
        return None

    def _opened(self, ref: Takeable) -> SharedRingBuffer:
        """The ring of that name; where there is no descriptor to open it by, the limit is raised first."""
        try:
            return SharedRingBuffer.attach(ref.ring_name, folder=self._folder)
        except errors.ConfigError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.EMFILE, errno.ENFILE):
                raise
        raised_limit()
        return SharedRingBuffer.attach(ref.ring_name, folder=self._folder)

    def read(self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float, began_s: float) -> Payload:
        return self.deliver(ref, self.begin(ring, ref, limit_s), began_s)

    def begin(self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float) -> Begun:
        """The part of a read that touches the bytes, and may run in another thread; dropped, it leaves no trace."""
        reader = self._base.reader
        try:
            lease = ring.acquire_slot(ref.slot, ref.generation, reader=reader, deadline_s=limit_s, again=ring.again)
            if ref.fingerprint != ring.fingerprint or ref.nbytes != lease.words[HOLD_NBYTES]:
                ring.refuse(lease, ref)
        except errors.BusyError:
            if not ring.reclaim_dead():  # the one that holds it may be gone
                raise
            lease = ring.acquire(ref, reader=reader, deadline_s=limit_s)
        except errors.SlotError:
            # Another read may have closed this handle meanwhile: to make room, or because the worker died.
            other = self.ring_of(ref) if ring.closed else None
            if other is None:
                raise
            ring, lease = other, other.acquire(ref, reader=reader, deadline_s=limit_s)
        if self._in_place is True and not (self._verify and ref.checksum is not None):
            return ring, lease, None
        return ring, lease, self._copied(ring, ref, lease)

    def deliver(self, ref: SlotRef, begun: Begun, began_s: float) -> Payload:
        """Deliver what `begin` has read, counted from `began_s` (`perf_counter`); a StaleSlotError for a duplicate."""
        ring, lease, root = begun
        try:
            self._claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
        except StaleSlotError:
            lease.mark_consumed()
            raise
        if root is None:
            payload = Payload(ref, lease.hand_over(ring.again), ring.schema, "view")
        else:
            lease.mark_consumed()
            payload = Payload(ref, root, ring.schema, "copy")
        self._base.counters.delivered(payload.transport, ref.nbytes, time.perf_counter() - began_s)
        return payload

    def take(self, ring: SharedRingBuffer, asked: Take, limit_s: float) -> list[Payload]:
        """Take what a ring has ready now; `limit_s` is for its lock."""
        began_s, reader = time.perf_counter(), self._base.reader
        payloads = []
        for lease in ring.take(
            asked.max_payloads, max_bytes=asked.max_bytes, newest=asked.newest, reader=reader, deadline_s=limit_s
        ):
            try:
                payloads.append(self._taken(ring, lease, began_s))
            except TransportError as error:  # a duplicate, or its bytes have changed: the others are none the worse
                self._base.counters.failed(error)
        return payloads

    def copies(self, ref: SlotRef) -> bool:
        """Whether reading `ref` touches all of its bytes (worth a thread of its own when they are many)."""
        return self._in_place is not True or (self._verify and ref.checksum is not None)

    def in_turn(self, job: Job, entries: Iterable[Entry]) -> list[Entry]:
        """Read or discard payloads, each of its ring; while there is time, returns those whose rings are locked."""
        left: list[Entry] = []
        held: set[bytes] = set()
        for index, ring in entries:
            left_s = job.until_s - self._base.clock()
            if ring.ring_id not in held:
                try:
                    self.over(job, index, self._visited(job, index, ring, max(0.0, min(left_s, LOCK_TURN_S))))
                    continue
                except TransportError as error:
                    if not isinstance(error, errors.DeadlineExceededError) or left_s <= LOCK_TURN_S:
                        self.over(job, index, error)
                        continue
                held.add(ring.ring_id)
            left.append((index, ring))
        return left

    def _visited(self, job: Job, index: int, ring: SharedRingBuffer, limit_s: float) -> Outcome:
        ref = job.refs[index]
        self._base.delivered.check(ref)  # one that the call names twice
        if not isinstance(job, Discard):
            payload = self.read(ring, ref, limit_s, job.began_s)
            return payload if job.on_payload is None else job.on_payload(index, payload)
        lease = ring.acquire(ref, reader=self._base.reader, deadline_s=limit_s)
        with suppress(StaleSlotError):  # whose name another read has taken
            self._claim(ref)
        found = lease.mark_consumed()
        job.found += found
        self._base.counters.add("discarded", found)
        return StaleSlotError("discarded")

    def over(self, job: Job, index: int, outcome: Outcome) -> None:
        if isinstance(outcome, TransportError):
            if job.counts:
                self._base.counters.failed(outcome)
            clear_traceback(outcome)
        job.outcomes[index] = outcome
        job.left -= 1

    def _taken(self, ring: SharedRingBuffer, lease: ReadLease, began_s: float) -> Payload:
        """Deliver a payload that was taken; after an error it is READY again, unless it is a duplicate."""
        try:
            ref, record = ring.reference(lease), lease.record
        except BaseException:
            lease.release_reading()
            raise
        payload = self.deliver(ref, (ring, lease, self._copied(ring, ref, lease)), began_s)
        payload.record = record
        return payload

    def _copied(self, ring: SharedRingBuffer, ref: SlotRef, lease: ReadLease) -> Bytes | None:
        """The payload's copy, if the mode asks for one, and its checksum verified; after an error it is released."""
        try:
            stays = self._in_place(ring) if callable(self._in_place) else self._in_place
            root = None if stays else self._base.buffers.lend(lease.nbytes)
            if root is not None:
                np.copyto(root, np.frombuffer(lease.buffer, dtype=np.uint8))
            if self._verify and ref.checksum is not None:
                verify_checksum(root if root is not None else np.frombuffer(lease.buffer, dtype=np.uint8), ref)
        except BaseException:
            lease.release_reading()
            raise
        return root


def _is_served(ref: Takeable) -> bool:
    """Whether a program on this host listens on a port of the reference's: its ring may live, though its name is gone.

    Asked of the kernel, not of the network: a worker that is gone must cost no connection.
    """
    ports = {f"{port:04X}" for port in ref.ports}
    for table in ("/proc/net/tcp", "/proc/net/tcp6") if ports else ():
        with suppress(OSError), open(table, encoding="ascii") as sockets:
            for line in sockets:
                _, local, _, state, *_ = line.split()
                if state == _LISTENING and local.rpartition(":")[2] in ports:
                    return True
    return False
