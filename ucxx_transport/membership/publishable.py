"""Publishable: what a publisher needs of the thing that it publishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ucxx_transport.sidecar.launch import Sidecar


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What can be read, and where.

    Attributes:
        ring_id: 16 bytes. ring_name: the segment's name on its host. host_id: which host and namespace that is.
        host: the server's address, None without a server. ports: its ports.
    """

    ring_id: bytes
    ring_name: str
    host_id: str
    host: str | None
    ports: tuple[int, ...]


class Publishable(Protocol):
    """A ring with or without a server; `UCXXServer` is one."""

    @property
    def sidecar(self) -> Sidecar | None:
        """A process beside this one that may renew the lease of what is published, None where there is none."""

    def offer(self) -> Offer:
        """What can be read now."""

    def hold(self) -> None:
        """There is no epoch: answer NOT_READY until `bind`."""

    def bind(self) -> None:
        """There is an epoch: serve. Raises a `TransportError` when it cannot be done now; then it holds on."""

    def discard_old(self) -> int:
        """Drop what an ended epoch has left; returns how much of it is still in use."""

    def release(self) -> None:
        """Nothing is published any more, by wish: serve as if there were no registry."""

    def is_healthy(self, within_s: float) -> bool:
        """Whether it has shown, within the last `within_s` seconds, that it serves."""
