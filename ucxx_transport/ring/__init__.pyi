from ucxx_transport.ring.reading import ReadLease as ReadLease
from ucxx_transport.ring.ring_handle import RingStatistics as RingStatistics
from ucxx_transport.ring.shared_ring_buffer import SharedRingBuffer as SharedRingBuffer
from ucxx_transport.ring.states import SlotState as SlotState
from ucxx_transport.ring.writing import WriteLease as WriteLease
