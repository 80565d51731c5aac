"""The ring: payloads in shared memory, and who may touch them when."""

from ucxx_transport.ring.lease import ReadLease, WriteLease
from ucxx_transport.ring.shared_ring_buffer import SharedRingBuffer
from ucxx_transport.ring.states import SlotState
from ucxx_transport.ring.statistics import RingStatistics

__all__ = ["ReadLease", "RingStatistics", "SharedRingBuffer", "SlotState", "WriteLease"]
