"""The ring: payloads in shared memory, and who may touch them when.

A lease is the right to one slot for a while, and finalises exactly once. It is left in one of three ways: by its own
call (`commit`, `mark_consumed` …), by leaving its `with` block, or by being dropped. Arrays and buffers made from it
keep its slot even when the lease object is gone, but not beyond its finalise.
"""

from ucxx_transport.ring.reading import ReadLease
from ucxx_transport.ring.shared_ring_buffer import SharedRingBuffer
from ucxx_transport.ring.states import SlotState
from ucxx_transport.ring.statistics import RingStatistics
from ucxx_transport.ring.writing import WriteLease

__all__ = ["ReadLease", "RingStatistics", "SharedRingBuffer", "SlotState", "WriteLease"]
