"""References to payloads that need not exist, for the decisions that only look at names."""

from __future__ import annotations

from ucxx_transport.schema import SlotRef

RING_ID = b"R" * 16


def reference(
    *,
    ring_id: bytes = RING_ID,
    slot: int = 3,
    generation: int = 8,
    nbytes: int = 100,
    fingerprint: int = 0,
    checksum: int | None = None,
    host: str | None = "10.0.0.1",
    ports: tuple[int, ...] = (5001, 5002),
) -> SlotRef:
    """A reference to a payload of another host's ring."""
    return SlotRef(
        ring_id=ring_id,
        ring_name="ucxx_transport-test",
        slot=slot,
        generation=generation,
        nbytes=nbytes,
        host_id="another host",
        host=host,
        ports=ports,
        fingerprint=fingerprint,
        checksum=checksum,
    )
