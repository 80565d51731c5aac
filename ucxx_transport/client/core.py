"""ClientCore, which the async and the sync client share: identity, settings, local reads, delivery by name, counts."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import Buffer

from ucxx_transport.client.buffer_pool import BufferPool, Bytes, PageLocker
from ucxx_transport.client.local import LocalReader
from ucxx_transport.client.membership import Membership, Watcher
from ucxx_transport.client.payload import Payload, writable_bytes
from ucxx_transport.client.remote import RemoteReader
from ucxx_transport.client.results import clear_traceback_frames
from ucxx_transport.client.statistics import ClientCounters, ClientStatistics
from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, SlotError, StaleSlotError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.link.base import Link
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.ring.reading import ReadLease
    from ucxx_transport.schema import Schema, SlotRef

LinkFactory = Callable[[], AbstractAsyncContextManager["Link"]]
Into = Buffer

# Rings whose delivered names are remembered, 100 bytes and 50 a slot each: more than a job has sources at a time.
REMEMBERED_RINGS = 1 << 16


class ClientCore:
    """The part of a client that needs no event loop; arguments and errors as `UCXXClient`. Thread-safe."""

    def __init__(
        self,
        config: ClientConfig | None,
        link_factory: LinkFactory | None,
        *,
        watcher: Watcher | None = None,
        page_locker: PageLocker | None = None,
    ) -> None:
        self.config = config if config is not None else ClientConfig()
        if page_locker is not None and self.config.local == "view":
            raise ConfigError(
                "local='view' reads in place, but a GPU takes payloads from page-locked buffers: leave local at "
                "'auto', which then copies into those, or receive with device='cpu'",
                field="local",
            )
        self.reader = secrets.randbits(63) + 1
        self.counters = ClientCounters()
        self.pool = BufferPool(self.config.buffer_pool_bytes, page_locker)
        self._delivered = Deduplicator(REMEMBERED_RINGS)
        self._link_factory = link_factory or _ucxx_links(self.config)
        self._membership = Membership(watcher) if watcher is not None else None
        self._pid = os.getpid()
        self.closed = False
        self.local = LocalReader(
            self.config.local,
            in_place=self.config.local != "copy" and page_locker is None,
            reader=self.reader,
            pool=self.pool,
            max_rings=self.config.max_attached_rings,
            verify=self.config.verify_checksum,
            on_fallback=partial(self.counters.add, "fallbacks"),
            claim=self._delivered.claim,
        )

    def remote(self) -> RemoteReader:
        """A reader over UCX for the running event loop."""
        return RemoteReader(
            self.config,
            self._link_factory,
            reader=self.reader,
            pool=self.pool,
            counters=self.counters,
            membership=self._membership,
        )

    def admit(self, ref: SlotRef, into: Into | None) -> SharedRingBuffer | None:
        """First look at a reference: refuse what must not be read; returns its ring if it is read locally.

        Raises:
            StaleSlotError: delivered before, or its ring on this host is gone.
            ConfigError: the client is closed, the payload is larger than `max_payload_bytes` or does not fit `into`,
                or this is a forked copy of the client.
        """
        if self.closed or os.getpid() != self._pid:
            self._require_usable()
        if ref.nbytes > self.config.max_payload_bytes:
            raise ConfigError(
                f"ref.nbytes = {ref.nbytes} is larger than client.max_payload_bytes = "
                f"{self.config.max_payload_bytes}; raise the setting if such payloads are real",
                field="max_payload_bytes",
                value=self.config.max_payload_bytes,
            )
        if into is not None:
            writable_bytes(into, ref.nbytes)
        self._delivered.check(ref)
        return self.local.ring_of(ref)

    def _require_usable(self) -> None:
        if self.closed:
            raise ConfigError("the client is closed; make another")
        if self.inherited:
            raise ConfigError("a client cannot be used in a forked child; make one in the process that reads")

    def read_local(
        self, ring: SharedRingBuffer, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        """Read from an attached ring, counted from `began_s` (`perf_counter`); `limit_s` is for the ring's lock."""
        try:
            begun = ring, *self.local.begin(ring, ref, limit_s)
        except SlotError:
            begun = self._begin_elsewhere(ring, ref, limit_s)
        payload = self.local.finish(ref, *begun)
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, ref.nbytes, time.perf_counter() - began_s)
        return payload

    def discard_local(self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float) -> bool:
        """Discard a payload of an attached ring; whether it was still there."""
        try:
            lease = ring.acquire(ref, reader=self.reader, deadline_s=limit_s)
            self.claim(ref)
            return lease.mark_consumed()
        except TransportError:
            return False

    def discard_here(self, refs: Sequence[SlotRef], limit_s: float) -> tuple[int, list[list[SlotRef]]]:
        """Discard those of rings on this host: how many were still there; and the others by ring, their names taken."""
        self._require_usable()
        until_s = time.monotonic() + limit_s
        found = 0
        elsewhere: dict[bytes, list[SlotRef]] = {}
        for ref in refs:
            try:
                self._delivered.check(ref)
                ring = self.local.ring_of(ref)
            except TransportError:
                continue  # gone, delivered before, or out of this client's reach
            if ring is not None:
                found += self.discard_local(ring, ref, max(0.0, until_s - time.monotonic()))
            elif self.claim(ref):
                elsewhere.setdefault(ref.ring_id, []).append(ref)
        return found, list(elsewhere.values())

    def claim(self, ref: SlotRef) -> bool:
        """Take a payload's name, so that this client never delivers it; whether it was not taken yet."""
        try:
            self._delivered.claim(ref)
        except StaleSlotError:
            return False
        return True

    async def read_local_aside(
        self, ring: SharedRingBuffer, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        """`read_local` with its copying and waiting in a thread. Cancelled, the payload stays in its slot."""
        begun = await asyncio.to_thread(self._begin_local, ring, ref, limit_s)
        return self._counted(self.local.finish(ref, *begun), into, began_s)

    def _begin_local(
        self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float
    ) -> tuple[SharedRingBuffer, ReadLease, Bytes | None]:
        try:
            return ring, *self.local.begin(ring, ref, limit_s)
        except SlotError:
            return self._begin_elsewhere(ring, ref, limit_s)

    def _begin_elsewhere(
        self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float
    ) -> tuple[SharedRingBuffer, ReadLease, Bytes | None]:
        """While an error is handled: begin by another handle, if another read has closed this one meanwhile.

        It does so to make room, or because the worker died.
        """
        replacement = self.local.ring_of(ref) if ring.closed else None
        if replacement is None:
            raise  # noqa: PLE0704 - the error being handled
        return replacement, *self.local.begin(replacement, ref, limit_s)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: connections and threads are its parent's."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Refuse further reads, close all rings and release idle buffers."""
        self.closed = True
        if self._membership is not None:
            self._membership.close()
        self.local.close()
        self.pool.close()

    def deliver_remote(
        self, ref: SlotRef, content: Bytes, schema: Schema | None, into: Into | None, began_s: float
    ) -> Payload:
        """Hand over what came over UCX, counted. A StaleSlotError: another read of this client was faster."""
        self._delivered.claim(ref)
        return self._counted(Payload(ref, content, schema, "ucx"), into, began_s)

    def count_failure(self, error: TransportError) -> None:
        """Count a read that raised; the error may be kept, its buffers are not."""
        clear_traceback_frames(error)
        count = self.counters.add
        count("failed")
        if isinstance(error, StaleSlotError):
            count("duplicates" if "delivered" in error.facts else "stale")
        elif isinstance(error, DeadlineExceededError):
            count("deadlines")

    def _counted(self, payload: Payload, into: Into | None, began_s: float) -> Payload:
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, payload.nbytes, time.perf_counter() - began_s)
        return payload

    def statistics(self, remote: RemoteReader | None) -> ClientStatistics:
        """The counts now."""
        pool = self.pool.statistics()
        link = remote.connections.link if remote is not None else None
        return self.counters.snapshot(
            pooled_endpoints=remote.connections.pooled_endpoints if remote is not None else 0,
            lent_buffers=pool.lent,
            idle_buffer_bytes=pool.idle_bytes,
            leaked_buffers=link.statistics().leaked_buffers if link is not None else 0,
            transports=link.transports() if link is not None else (),
        )


class Deduplicator:
    """The newest generation of each ring's slots that this client has delivered or discarded. Thread-safe.

    It drops the duplicates that a lost acknowledgement allows. A generation only grows, so the newest one of each slot
    is all there is to remember. Beyond `max_rings` the ring longest unused is forgotten.
    """

    def __init__(self, max_rings: int) -> None:
        self._max_rings = max_rings
        self._rings: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, ref: SlotRef) -> None:
        """Refuse (StaleSlotError) a payload that this client, or a newer one of its slot, was delivered before."""
        slots = self._rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            raise StaleSlotError(
                "this client has already received or discarded this payload, or a newer one of its slot",
                slot=ref.slot,
                generation=ref.generation,
                delivered=slots[ref.slot],
            )

    def claim(self, ref: SlotRef) -> None:
        """Deliver a payload, once: of several reads of it that came this far, one gets it. Errors as `check`.

        Call it while the slot is still held (before it is consumed): then no newer payload of the slot can be faster.
        """
        with self._lock:
            slots = self._rings.get(ref.ring_id)
            if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
                self.check(ref)
            if slots is None:
                slots = self._rings[ref.ring_id] = {}
                while len(self._rings) > self._max_rings:
                    self._rings.popitem(last=False)
            else:
                self._rings.move_to_end(ref.ring_id)
            slots[ref.slot] = ref.generation


def _ucxx_links(config: ClientConfig) -> LinkFactory:
    def open_link() -> AbstractAsyncContextManager[Link]:
        from ucxx_transport.link.ucxx import UCXXLink

        return UCXXLink.open(shm_lanes=config.shm_lanes, spin_s=config.spin_s, ucx=config.link_settings)

    return open_link
