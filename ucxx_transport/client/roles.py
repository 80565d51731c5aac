"""What a connection asks of others: of all connections (`Connections`), of the reads (`Reads`), and of errands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sized
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.jobs import Attempt, Job, Read
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.errors import TransportError
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.schema import Schema
    from ucxx_transport.wire.answers import Named


class Errand(Protocol):
    """Something else than reads by name that a connection is needed for."""

    def start(self, connection: Any, /) -> None:
        """The connection is open."""

    def lost(self, error: TransportError, /) -> None:
        """It failed, or was never open."""


class Pool(Protocol):
    """All connections of a client. `Any` stands for one of them, here and elsewhere."""

    config: ClientConfig
    reactor: Reactor
    counters: ClientCounters
    lend: Callable[[int], Bytes]
    schemas: dict[int, Schema]

    @property
    def engine(self) -> Engine: ...
    @property
    def unsettled(self) -> MutableMapping[bytes, Any]: ...
    @property
    def waiting(self) -> Sized: ...
    def settle(self, connection: Any, ring_id: bytes) -> None: ...
    def delay_ends(self, connection: Any) -> None: ...
    def rested(self, connection: Any) -> None: ...
    def removed(self, connection: Any) -> None: ...
    def short(self, connection: Any, error: TransportError) -> bool: ...
    def descriptors_free(self, is_clean: bool, /) -> None: ...  # noqa: FBT001 - as a link calls it
    def owe(self, names: Iterable[Named]) -> None: ...


class Engine(Protocol):
    """All reads of a client.

    Attributes:
        reader: the client's id. finished: jobs whose outcomes are there. orphans: attempts that no read waits for.
        attempt_due_s: when an attempt that is asked now has taken too long.
        reassign: gives reads that were not asked yet a port again.
        connection_lost: takes a closed connection's reads.
    """

    reader: int
    finished: list[Job]
    orphans: set[Attempt]
    attempt_due_s: Callable[[Read], float]
    reassign: Callable[[Iterable[Read]], None]
    connection_lost: Callable[..., None]

    def arrived(self, attempt: Attempt) -> bool | None: ...
    def refused(self, attempt: Attempt, error: TransportError) -> None: ...
    def no_memory(self, read: Read, error: TransportError) -> None: ...
    def settle(self) -> None: ...
