"""Something to publish that has no ring and no server, and does what a test sets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ucxx_transport.errors import SlotError
from ucxx_transport.membership import Offer
from ucxx_transport.server import RingSource
from ucxx_transport.server.port import SWEEP_INTERVAL_S
from ucxx_transport.sidecar.launch import Sidecar

__all__ = ["FakeSource"]

OFFER = Offer(ring_id=b"R" * 16, ring_name="ucxx_transport-test", host_id="here", host="10.0.0.1", ports=(5001,))


@dataclass
class FakeSource(RingSource):
    """A `RingSource` without a ring.

    Attributes:
        offered: what it offers; None: it is closed, and asking is an error.
        serves: what a read would be answered: "held", "bound" or "released"; "new" before any call.
        healthy: whether it shows that it serves.
        bind_error: what binding fails with; None: it succeeds.
        old: payloads that an ended epoch has left; one goes with every `discard_old`.
        calls: those that change what it serves, in order.
    """

    offered: Offer | None = OFFER
    serves: str = "new"
    healthy: bool = True
    bind_error: Exception | None = None
    old: int = 0
    binds: int = 0
    calls: list[str] = field(default_factory=list)
    sidecar: Sidecar | None = None

    def offer(self) -> Offer:
        if self.offered is None:
            raise SlotError("closed")
        return self.offered

    def move(self, *ports: int) -> None:
        """Offer other ports from now on."""
        self.offered = replace(OFFER, ports=ports)

    def hold(self) -> None:
        self._now("held")

    def bind(self) -> None:
        self.binds += 1
        if self.bind_error is not None:
            raise self.bind_error
        self._now("bound")

    def release(self) -> None:
        self._now("released")

    def discard_old(self) -> None:
        self.old = max(0, self.old - 1)

    def is_healthy(self, within_s: float) -> bool:
        assert within_s >= 2 * SWEEP_INTERVAL_S, "a port's loop shows no sooner that it turns"
        return self.healthy

    def _now(self, word: str) -> None:
        self.serves = word
        self.calls.append(word)
