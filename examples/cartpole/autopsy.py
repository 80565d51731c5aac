"""The last counters of a killed worker's ring: they live in the segment, and outlive the process until it is swept."""

from __future__ import annotations

from dataclasses import asdict

from ucxx_transport import SharedRingBuffer

__all__ = ["last_counters"]


def last_counters(ring_name: str) -> dict[str, int]:
    """Give back the slots that the dead hold, and read the counters, those reclaims included.

    Raises:
        TransportError: the ring is gone already: the dead worker's server process sweeps it.
    """
    ring = SharedRingBuffer.attach(ring_name, populate=False)
    try:
        ring.reclaim_dead()
        return {name: value for name, value in asdict(ring.statistics()).items() if isinstance(value, int)}
    finally:
        ring.close()
