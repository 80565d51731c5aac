"""What a client has delivered, by name; and errors that are kept without what they would keep."""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ucxx_transport.errors import StaleSlotError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.schema import SlotRef

_OWN_CODE: Final = str(Path(__file__).parent)


class Deduplicator:
    """The newest generation of each ring's slots that this client has delivered or discarded. Thread-safe.

    It drops the duplicates that a lost acknowledgement allows. A generation only grows, so the newest one of each slot
    is all there is to remember. Beyond `max_rings` the ring longest unused is forgotten.

    Attributes:
        rings: by id, the newest generation of each slot.
    """

    def __init__(self, max_rings: int) -> None:
        self._max_rings = max_rings
        self.rings: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, ref: SlotRef) -> None:
        """Refuse (StaleSlotError) a payload that this client, or a newer one of its slot, was delivered before."""
        slots = self.rings.get(ref.ring_id)
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
            slots = self.rings.get(ref.ring_id)
            if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
                self.check(ref)
            if slots is None:
                slots = self.rings[ref.ring_id] = {}
                while len(self.rings) > self._max_rings:
                    self.rings.popitem(last=False)
            else:
                self.rings.move_to_end(ref.ring_id)
            slots[ref.slot] = ref.generation


def clear_traceback_frames(error: BaseException) -> None:
    """Empty the variables of the frames that `error` has left behind, from this package on downwards.

    They refer to receive buffers of any size, which an error that is kept (a batch's result, a log) must not keep.
    Frames of the package's callers, and those that still run, stay as they are; so do the traceback's lines.
    """
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
            trace = trace.tb_next
        traceback.clear_frames(trace)
        link = link.__context__


def without_traceback(error: TransportError) -> TransportError:
    """The error, to be kept as a value: its frames, and those they were called from, would keep a whole batch."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    return error
