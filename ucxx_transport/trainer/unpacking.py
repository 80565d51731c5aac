"""Payloads as the arrays that a trainer works with, on its device.

What lies in host memory lies in a receive buffer or, read in place, in the worker's slot. It comes back when nothing
refers to it any more, a tensor neither. numpy's arrays are read-only. A tensor cannot be, and so it never lies in a
slot, which others read too, unless `local="view"` says so: payloads are copied from their slots, each as a whole.

To a GPU a payload of this host is copied from its slot, once a thread beside the reads has page-locked the ring's
memory. Until then, where that cannot be, and from other hosts, it is copied from a receive buffer, which is page-locked
when it is allocated.

| when                        | the payload's bytes                                       | its slot or receive buffer |
|-----------------------------|-----------------------------------------------------------|----------------------------|
| it has been read            | `upload`: the copy begins, and the next read goes on      | held for the copy          |
| the copy has ended          | on the device                                             | released when that is seen:|
|                             |                                                           | by a timer, or an `upload` |
| `arrays` are taken          | the consumer's stream waits for the copy, its thread does | as before                  |
|                             | not; fields are views by the schema's offsets             |                            |
| it is released, whenever    | freed when the last array is gone, and used again only    | held until the copy has    |
| that is                     | after what its streams had to do with it                  | ended                      |
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from mmap import PAGESIZE, mmap
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from ucxx_transport.client import Payload
from ucxx_transport.errors import ConfigError, SlotError, TransportError
from ucxx_transport.gpu import receiver_for
from ucxx_transport.gpu.runtime import Bytes, PageLockError, Receiver, Upload, import_library
from ucxx_transport.gpu.torch import host_tensor
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread

if TYPE_CHECKING:
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema.fields import ArrayTree
    from ucxx_transport.schema.tensors import Placement

FIRST_LOOK_S: Final = 0.25e-3  # from an upload to the first look whether copies have ended
LONGEST_LOOK_S: Final = 4e-3  # from one look to the next, at most
_JOIN_TIMEOUT_S: Final = 5.0

_log = get_logger(__name__)

_DEVICE: Final = re.compile("numpy|cpu|(cuda|cupy)(:[0-9]+)?")

Unpack: TypeAlias = "Callable[[Payload], ArrayTree]"
"""Gives a payload's arrays, in its own nesting; valid for as long as they live, whatever becomes of the payload."""

InPlace: TypeAlias = "bool | Callable[[SharedRingBuffer], bool]"  # whose payloads stay in their slots: `LocalReader`


def unpacker_for(device: object = None) -> tuple[Unpack, DeviceUploader | None, InPlace]:
    """How payloads become arrays on `device`, what takes them to a GPU, from where; a ConfigError: no such is here."""
    as_they_are = attrgetter("arrays")
    name = checked_device(device)
    if name == "numpy":
        return as_they_are, None, True
    if name == "cpu":
        as_tensor = partial(host_tensor, import_library("torch", name))
        return lambda payload: map_leaves(as_tensor, payload.arrays), None, False
    uploader = DeviceUploader(device if isinstance(device, Receiver) else receiver_for(name))
    return as_they_are, uploader, uploader.is_locked


def checked_device(device: object) -> str:
    """A device in words, be it here or not: None, a word (a `torch.device` too) or a `Receiver`; else a ConfigError."""
    name = "numpy" if device is None else str(device)
    if isinstance(device, Receiver) or _DEVICE.fullmatch(name):
        return name
    text = f"device must be None, 'numpy', 'cpu', 'cuda', 'cuda:N', 'cupy' or 'cupy:N', not {name!r}"
    raise ConfigError(text, field="device")


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same nesting with `function` of every leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_leaves(function, child) for child in tree]
    return function(tree)


class DevicePayload(Payload):
    """A payload on a device, or on its way there, with `arrays` of its library. Its host memory is given back."""

    __slots__ = ("_placement", "_upload")

    def __init__(self, payload: Payload, upload: Upload, placement: Placement | None) -> None:
        super().__init__(payload.ref, np.empty(0, np.uint8), payload.schema, payload.transport)
        self._upload: Upload | None = upload
        self._placement = placement

    @property
    def buffer(self) -> memoryview:
        raise SlotError("the payload's bytes are on a GPU; take its arrays", slot=self.ref.slot)

    @property
    def arrays(self) -> ArrayTree:
        """The payload's fields as nested dicts and lists of arrays on the device; `{"data": bytes}` for a raw ring.

        The calling thread's current stream waits for the copy; on another stream, order it yourself.

        Raises:
            SlotError: the payload has been released.
            ConfigError: the device's library has not the dtype of a field; the message names it.
        """
        upload = self._upload  # once: another thread may release meanwhile
        if upload is None:
            raise SlotError("the payload has been released; read its arrays before release()", slot=self.ref.slot)
        upload.ready()
        schema, placement = self.schema, self._placement
        if schema is None or placement is None:
            return {"data": upload.view(0, (self.nbytes,), np.dtype(np.uint8))}
        places = zip(placement.offsets, placement.shapes, placement.dtypes, strict=True)
        return schema.nest([upload.view(*place) for place in places])

    def release(self) -> None:
        super().release()
        self._upload = None


class DeviceUploader:
    """Copies payloads to one device as they come, and holds their memory meanwhile. Thread-safe."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._page_lock = partial(receiver.runtime.page_lock, device=receiver.device)
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[Upload, Bytes]] = deque()
        self._is_watched = False
        self._closed = False
        self._rings: WeakKeyDictionary[SharedRingBuffer, bool] = WeakKeyDictionary()
        self._locking: set[threading.Thread] = set()
        a_page = np.frombuffer(mmap(-1, PAGESIZE), np.uint8)
        self.page_locker(a_page)  # that none can be locked here is said now rather than with every read

    def page_locker(self, memory: Bytes) -> object:
        """Page-lock a receive buffer for as long as it lives, or raise a PageLockError; see `BufferPool`."""
        return self._page_lock(memory, what="a receive buffer", remedy="lower client.buffer_pool_bytes")

    def is_locked(self, ring: SharedRingBuffer) -> bool:
        """Whether an attached ring's memory is page-locked; the first time that it is asked for, this begins."""
        locked = self._rings.get(ring)
        if locked is None:
            self._rings[ring] = locked = False
            try:
                self._locking.add(start_thread(self._lock_ring, ring, name="ucxx-page-lock"))
            except TransportError as error:
                _log_unlocked(ring, error)
        return locked

    def upload(self, payload: Payload, timers: Reactor) -> DevicePayload:
        """Begin to copy a payload, which lies in page-locked memory, to the device; it is released in any case.

        `timers`, of the calling thread, release that memory soon after the copy. A ProtocolError: the bytes are not a
        payload of the schema. A ConfigError: the device has no memory for it, or the uploader is closed.
        """
        with payload:
            source = np.frombuffer(payload.buffer, np.uint8)
            placement = None if payload.schema is None else payload.schema.placement_in(payload.buffer)
            with self._lock:
                if self._closed:
                    raise ConfigError("the prefetcher is closed; make another")
                self._release_copied()
                upload = self._receiver.upload(source)
                self._in_flight.append((upload, source))
        if not self._is_watched:
            self._look(timers, FIRST_LOOK_S)
        return DevicePayload(payload, upload, placement)

    def close(self) -> None:
        """Wait for the copies under way and release their memory; nothing is uploaded any more. Idempotent."""
        with self._lock:
            self._closed = True
            for _ in range(len(self._in_flight)):
                self._in_flight[0][0].wait()
                self._in_flight.popleft()
        until_s = time.monotonic() + _JOIN_TIMEOUT_S
        for thread in tuple(self._locking):
            thread.join(max(0.0, until_s - time.monotonic()))

    def _look(self, timers: Reactor, after_s: float) -> None:
        """Release what has been copied, and look again, ever later, as long as anything is in flight."""
        with self._lock:
            self._release_copied()
            self._is_watched = bool(self._in_flight)
        if self._is_watched:
            timers.call_at(timers.now() + after_s, partial(self._look, timers, min(2 * after_s, LONGEST_LOOK_S)))

    def _release_copied(self) -> None:
        while self._in_flight and self._in_flight[0][0].done():  # they end in the order in which they began
            self._in_flight.popleft()

    def _lock_ring(self, ring: SharedRingBuffer) -> None:
        """In a thread of its own: it takes 0.7 s a GB (H200)."""
        try:
            self._page_lock(ring.mapping, what="a ring", remedy="make the ring smaller")
            self._rings[ring] = True
        except PageLockError as error:
            _log_unlocked(ring, error)
        except SlotError:  # it was closed meanwhile
            pass
        finally:
            self._locking.discard(threading.current_thread())


def _log_unlocked(ring: SharedRingBuffer, error: TransportError) -> None:
    _log.warning("ring_not_page_locked", ring=ring.name, reason=error.message)
