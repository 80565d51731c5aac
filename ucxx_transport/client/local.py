"""Reads of rings on this host: the slot itself, in place or copied out. No UCX."""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import numpy as np
import xxhash

from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import (
    BusyError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    ProtocolError,
    SlotError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.link.descriptors import raised_limit
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.owner import host_id, segment_folder

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import BufferPool, Bytes
    from ucxx_transport.client.ports import Takeable
    from ucxx_transport.ring.leases import ReadLease
    from ucxx_transport.schema import SlotRef

_LISTENING = "0A"  # in /proc/net/tcp (proc(5))

# Rings whose worker died are closed this often: their memory is freed only when no process maps it any more.
PRUNE_INTERVAL_S = 5.0


def verify_checksum(content: Bytes, ref: SlotRef) -> None:
    """Compare the payload with the checksum its reference may carry; a ChecksumError where they differ."""
    if ref.checksum is None:
        return
    found = xxhash.xxh3_64_intdigest(content.data)
    if found != ref.checksum:
        raise ChecksumError(
            "the payload's bytes are not those that were written",
            slot=ref.slot,
            generation=ref.generation,
            expected=f"{ref.checksum:#018x}",
            found=f"{found:#018x}",
        )


class LocalReader:
    """Attaches rings of this host as references to them come, and reads from them. Thread-safe.

    Args:
        mode: "auto" falls back to UCX where a ring cannot be attached, or has lost its name and is served; "off" never
            reads locally.
        in_place: of which rings payloads stay in their slots; of others they are copied out, and the slots are free at
            once.
        reader: this client's id.
        pool: where copies go.
        max_rings: mappings kept.
        verify: whether checksums are checked.
        on_fallback: called when "auto" gives a local read to UCX.
        claim: called with a reference whose payload is here and not consumed yet; raises when it is a duplicate.

    Attributes:
        is_off: whether nothing is read locally. host_id: of this host.
    """

    def __init__(
        self,
        mode: Literal["auto", "view", "copy", "off"],
        *,
        in_place: bool | Callable[[SharedRingBuffer], bool],
        reader: int,
        pool: BufferPool,
        max_rings: int,
        verify: bool,
        on_fallback: Callable[[], None],
        claim: Callable[[SlotRef], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self.is_off = mode == "off"
        self._in_place = in_place if isinstance(in_place, bool) else False
        self._is_in_place = None if isinstance(in_place, bool) else in_place
        self._reader = reader
        self._pool = pool
        self._max_rings = max_rings
        self._verify = verify
        self._on_fallback = on_fallback
        self._claim = claim
        self._clock = clock
        self._folder = segment_folder()
        self.host_id = host_id(self._folder)
        self._lock = threading.Lock()
        self._rings: OrderedDict[bytes, SharedRingBuffer] = OrderedDict()
        self._unreachable: set[bytes] = set()
        self._prune_at_s = clock() + PRUNE_INTERVAL_S

    def ring_of(self, ref: Takeable) -> SharedRingBuffer | None:
        """The attached ring of a reference or a source, or None when it is to be read over UCX.

        Raises:
            StaleSlotError: the ring was on this host and is gone.
            ConfigError: it is on this host but cannot be attached, and the mode is not "auto".
        """
        if self.is_off or ref.host_id != self.host_id:
            return None
        ring = self._rings.get(ref.ring_id)
        if ring is not None and self._clock() < self._prune_at_s:
            return ring
        with self._lock:
            self._prune()
            return self._rings.get(ref.ring_id) or self._attach(ref)

    def begin(
        self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float
    ) -> tuple[SharedRingBuffer, ReadLease, Bytes | None]:
        """The part of a read that touches the bytes, and may run in another thread; dropped, it leaves no trace.

        Returns:
            The ring, the attempt in flight, and the copy if the mode asks for one; for `finish`.

        Raises:
            StaleSlotError: the slot no longer holds it. BusyError: too many attempts on the slot.
            ChecksumError: its bytes have changed since they were written.
            DeadlineExceededError: the lock was not to be had in `limit_s`.
        """
        try:
            lease = ring.acquire(ref, reader=self._reader, deadline_s=limit_s)
        except BusyError:
            if not ring.reclaim_dead():  # the one that holds it may be gone
                raise
            lease = ring.acquire(ref, reader=self._reader, deadline_s=limit_s)
        except SlotError:
            # Another read may have closed this handle meanwhile: to make room, or because the worker died.
            other = self.ring_of(ref) if ring.closed else None
            if other is None:
                raise
            ring, lease = other, other.acquire(ref, reader=self._reader, deadline_s=limit_s)
        if self._in_place and not (self._verify and ref.checksum is not None):
            return ring, lease, None
        return ring, lease, self._copied(ring, ref, lease)

    def discard(self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float) -> bool:
        """Discard a payload of an attached ring; whether it was still there. DeadlineExceededError: as for `begin`."""
        try:
            lease = ring.acquire(ref, reader=self._reader, deadline_s=limit_s)
            with suppress(StaleSlotError):  # whose name another read has taken
                self._claim(ref)
            return lease.mark_consumed()
        except DeadlineExceededError:
            raise
        except TransportError:
            return False

    def _copied(self, ring: SharedRingBuffer, ref: SlotRef, lease: ReadLease) -> Bytes | None:
        """The payload's copy, if the mode asks for one, and its checksum verified; after an error it is released."""
        try:
            stays = self._in_place or (self._is_in_place is not None and self._is_in_place(ring))
            root = None if stays else self._pool.lend(lease.nbytes)
            if root is not None:
                np.copyto(root, np.frombuffer(lease.buffer, dtype=np.uint8))
            if self._verify and ref.checksum is not None:
                verify_checksum(root if root is not None else np.frombuffer(lease.buffer, dtype=np.uint8), ref)
        except BaseException:
            lease.release_reading()
            raise
        return root

    def taken(self, ring: SharedRingBuffer, lease: ReadLease) -> Payload:
        """Deliver a payload that was taken.

        Raises:
            StaleSlotError: a duplicate. ChecksumError, ProtocolError: it is damaged, and READY again.
        """
        try:
            ref, record = ring.reference(lease), lease.record
        except BaseException:
            lease.release_reading()
            raise
        payload = self.finish(ref, ring, lease, self._copied(ring, ref, lease))
        payload.record = record
        return payload

    def finish(self, ref: SlotRef, ring: SharedRingBuffer, lease: ReadLease, root: Bytes | None) -> Payload:
        """Deliver what `begin` has read; a StaleSlotError for a duplicate."""
        try:
            self._claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
        except StaleSlotError:
            lease.mark_consumed()
            raise
        if root is None:
            return Payload(ref, lease.detach(), ring.schema, "view")
        lease.mark_consumed()
        return Payload(ref, root, ring.schema, "copy")

    def copies(self, ref: SlotRef) -> bool:
        """Whether reading `ref` touches all of its bytes (worth a thread of its own when they are many)."""
        return not self._in_place or (self._verify and ref.checksum is not None)

    def close(self) -> None:
        """Close all rings. Views still held keep their mapping."""
        with self._lock:
            for ring in self._rings.values():
                ring.close()
            self._rings.clear()

    def _attach(self, ref: Takeable) -> SharedRingBuffer | None:
        if ref.ring_id in self._unreachable:
            return None
        try:
            ring = self._attached(ref)
        except (ConfigError, ProtocolError) as error:
            if error.facts.get("reason") == "missing" and not (self._mode == "auto" and _is_served(ref)):
                raise _gone(ref) from None
            if self._mode != "auto":
                raise
            self._unreachable.add(ref.ring_id)
            self._on_fallback()
            return None
        if ring.ring_id != ref.ring_id:
            ring.close()
            if self._mode != "auto" or not _is_served(ref):
                raise _gone(ref)
            self._unreachable.add(ref.ring_id)
            self._on_fallback()
            return None
        self._rings[ref.ring_id] = ring
        while len(self._rings) > self._max_rings:
            self._rings.popitem(last=False)[1].close()
        return ring

    def _attached(self, ref: Takeable) -> SharedRingBuffer:
        """Attach a ring; where there is no descriptor for it, others are closed."""
        try:
            return SharedRingBuffer.attach(ref.ring_name, folder=self._folder)
        except ConfigError as error:
            if not _is_out_of_descriptors(error):
                raise
        limit = raised_limit()
        for _ in range((len(self._rings) + 1) // 2):
            self._rings.popitem(last=False)[1].close()
        try:
            return SharedRingBuffer.attach(ref.ring_name, folder=self._folder)
        except ConfigError as error:
            if not _is_out_of_descriptors(error):
                raise
            words = "this process has no file descriptors for another ring; release payloads, or raise its limit"
            raise BusyError(f"{words} (ulimit -n)", limit=limit, rings=len(self._rings)) from None

    def _prune(self) -> None:
        now = self._clock()
        if now < self._prune_at_s:
            return
        self._prune_at_s = now + PRUNE_INTERVAL_S
        self._unreachable.clear()
        for ring_id, ring in tuple(self._rings.items()):
            if not ring.creator_alive():
                del self._rings[ring_id]
                ring.close()


def _is_out_of_descriptors(error: ConfigError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EMFILE, errno.ENFILE)


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


def _gone(ref: Takeable) -> StaleSlotError:
    return StaleSlotError(
        "the ring of this payload is gone: its worker closed it, or died and was swept", ring=ref.ring_name
    )
