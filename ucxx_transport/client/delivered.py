"""What this client has delivered, or let go unread, by name.

The duplicates that a lost acknowledgement allows are dropped here. A generation only grows, so the newest one of each
slot is all there is to remember.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from ucxx_transport.errors import StaleSlotError
from ucxx_transport.schema import SlotRef


class DeliveredNames:
    """The newest delivered generation per ring and slot. Thread-safe.

    Args:
        max_rings: rings remembered; the one longest unused is forgotten first.
    """

    def __init__(self, max_rings: int) -> None:
        self._max_rings = max_rings
        self._rings: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, ref: SlotRef) -> None:
        """Refuse a payload that was delivered before.

        Raises:
            StaleSlotError: this payload, or a newer one of its slot, was delivered to this client already.
        """
        slots = self._rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            raise StaleSlotError(
                "this client has already received this payload or let it go, or a newer one of its slot",
                slot=ref.slot,
                generation=ref.generation,
                delivered=slots[ref.slot],
            )

    def claim(self, ref: SlotRef) -> None:
        """Deliver a payload, once: of several reads of it that came this far, one gets it.

        Call it while the slot is still held (before it is consumed): then no newer payload of the slot can be faster.

        Raises:
            StaleSlotError: as `check`.
        """
        with self._lock:
            self.check(ref)
            slots = self._rings.get(ref.ring_id)
            if slots is None:
                slots = self._rings[ref.ring_id] = {}
                while len(self._rings) > self._max_rings:
                    self._rings.popitem(last=False)
            else:
                self._rings.move_to_end(ref.ring_id)
            slots[ref.slot] = ref.generation
