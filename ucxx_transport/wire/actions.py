"""The values that pass between a server's session and the shell around it, which sends, receives and holds the ring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from ucxx_transport.wire.frames import Status


class Lease(Protocol):
    """What a server's shell holds for an attempt; a ring's `ReadLease` is one."""

    def mark_consumed(self) -> bool: ...
    def release_reading(self) -> bool: ...


class Send(Protocol):
    """The operation that sends an attempt's message."""

    @property
    def completed(self) -> bool: ...


@dataclass(slots=True)
class Load:
    """What of a connection's window is in use: by what was named, or by what was taken."""

    attempts: int = 0
    nbytes: int = 0


@dataclass(eq=False)
class Attempt:
    """One payload under way to the client, as the server knows it."""

    number: int  # the client's
    slot: int
    generation: int
    nbytes: int
    since_s: float  # when it was named
    load: Load  # where it counts
    sent_s: float | None = field(default=None, init=False)  # when its message had left
    delivered: bool | None = field(default=None, init=False)  # how the client ended it
    # the shell's
    lease: Lease | None = field(default=None, init=False)
    send: Send | None = field(default=None, init=False)
    is_recorded: bool = field(default=False, init=False)


class Reply(NamedTuple):
    """Send these bytes, and call `replied()` when they have left. After the last one (CLOSING) nothing more is read."""

    message: bytes
    channel: int
    status: Status


class Serve(NamedTuple):
    """Acquire each slot and send it on its attempt's channel, or all in one message on channel `shared` (if not 0).

    What has left is `sent()`, a shared message also `replied()`. What the ring refuses is `refused()`, or, as a part of
    a shared message, `refused_part()`.
    """

    attempts: list[Attempt]
    shared: int


class Take(NamedTuple):
    """Pick READY payloads, `newest` or oldest first, within `take_room()`; answer by `taken()`, or `nothing()`.

    The latter once `until_s` has come. What the client asked for is the most that may be picked.
    """

    attempt: int
    max_payloads: int
    max_bytes: int
    newest: bool
    until_s: float


class Settle(NamedTuple):
    """The client says that these (slot, generation) were delivered, or need not be; answer by `settled()`."""

    names: list[tuple[int, int]]
    attempt: int


Action: TypeAlias = Attempt | Reply | Serve | Take | Settle
"""An attempt: the client has ended it (`delivered`). If its message has left (`sent_s`), its lease is finalised now."""
