"""RingSource: a ring as the registry knows it: what is offered, whether it has its epoch, what an old epoch leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.membership.publication import Offer
from ucxx_transport.ring.owner import host_id
from ucxx_transport.server.counters import Binding

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.sidecar.launch import Sidecar


class RingSource:
    """A ring that trainers of this host read in place; `UCXXServer` puts ports in front of it.

    Args:
        ring: the ring; its creator keeps and closes it.
    """

    def __init__(self, ring: SharedRingBuffer) -> None:
        self._ring = ring
        self._binding = Binding(ring.server_words)
        self._last_old: int | None = None
        self._was_bound = False

    @property
    def sidecar(self) -> Sidecar | None:
        """A process beside this one that may renew its lease: a ring alone has none."""
        return None

    def offer(self) -> Offer:
        """What a record says of it now."""
        host, ports = self._ring.address()
        return Offer(
            ring_id=self._ring.ring_id,
            ring_name=self._ring.name,
            host_id=host_id(self._ring.folder),
            host=host,
            ports=tuple(ports),
        )

    def hold(self) -> None:
        """Answer NOT_READY until it is bound; what is written up to now belongs to the epoch that ended, if any."""
        self._binding.awaited = True
        if self._was_bound:
            self._last_old = self._ring.write_sequence

    def bind(self) -> None:
        """Serve, without what was written under an epoch before.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time; it still answers NOT_READY.
        """
        self.discard_old()
        self._was_bound = True
        self._binding.awaited = False

    def discard_old(self) -> int:
        """Drop what an epoch before has left and nobody is reading now.

        Returns:
            How many of its payloads are still being read or written; call again until there are none.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time.
        """
        if self._last_old is None:
            return 0
        left = self._ring.discard_until(self._last_old)
        if left == 0:
            self._last_old = None
        return left

    def release(self) -> None:
        """Published no longer: serve everyone who has a reference."""
        self._binding.awaited = False

    def is_healthy(self, within_s: float) -> bool:
        """Whether it can be read; `within_s` as for `UCXXServer.is_healthy`."""
        del within_s
        return not self._ring.closed
