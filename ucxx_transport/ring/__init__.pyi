from ucxx_transport.ring.layout import RingStatistics as RingStatistics
from ucxx_transport.ring.leases import ReadLease as ReadLease
from ucxx_transport.ring.leases import WriteLease as WriteLease
from ucxx_transport.ring.shared_ring_buffer import SharedRingBuffer as SharedRingBuffer
from ucxx_transport.ring.states import SlotState as SlotState
