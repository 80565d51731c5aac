"""The server's shared statistics: words in the ring's segment, so that they outlive a server process.

`ring.server_words` holds 64 port blocks of 32 words and one general block of 64 words, all u64. A port's are its counts
in the order of `PortStatistics`, and the last one its beat. Every word has one writer at a time (the thread that owns
the port; the worker for the general block), so no lock is taken; a reader may see a count that is a moment old.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from ucxx_transport.ring.layout import PORT_WORDS


@dataclass(frozen=True, slots=True, kw_only=True)
class PortStatistics:
    """What one port has done since its ring was created; server restarts do not reset it.

    Attributes:
        port: TCP port, 0 while not listening.
        connections: open now.
        accepted: connections, ever.
        refused: connections over the limit.
        requests: payloads asked for by name.
        delivered: acknowledged payloads.
        bytes_sent: their bytes.
        released: attempts that ended without an acknowledgement.
        stale, busy, bad_requests, unauthorized, internal: answers of that status.
        handshake_timeouts: connections closed by `first_frame_timeout_s`.
        idle_evictions: by `idle_timeout_s`.
        delivery_timeouts: by `send_timeout_s` or `ack_timeout_s`.
        stuck_sends: sends that UCX did not end when their connection closed; their slots stay in READING.
        confirms: late confirmations that still freed a slot.
        not_ready: reads while the source waited for its epoch.
        accepts_failed: connections that failed before they were accepted.
        takes: payloads that the port chose itself (TAKE).
        packed: payloads that shared their message with others.
    """

    port: int = 0
    connections: int = 0
    accepted: int = 0
    refused: int = 0
    requests: int = 0
    delivered: int = 0
    bytes_sent: int = 0
    released: int = 0
    stale: int = 0
    busy: int = 0
    bad_requests: int = 0
    unauthorized: int = 0
    internal: int = 0
    handshake_timeouts: int = 0
    idle_evictions: int = 0
    delivery_timeouts: int = 0
    stuck_sends: int = 0
    confirms: int = 0
    not_ready: int = 0
    accepts_failed: int = 0
    takes: int = 0
    packed: int = 0


_POSITIONS: Final = {spec.name: position for position, spec in enumerate(fields(PortStatistics))}
PORT: Final = _POSITIONS["port"]
CONNECTIONS: Final = _POSITIONS["connections"]
REQUESTS: Final = _POSITIONS["requests"]
DELIVERED: Final = _POSITIONS["delivered"]
BYTES_SENT: Final = _POSITIONS["bytes_sent"]
RELEASED: Final = _POSITIONS["released"]
BEAT: Final = PORT_WORDS - 1  # when the port's loop last turned, ns of CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """What a server has done, port by port; the counts survive its processes.

    Attributes:
        host: published address, None while it does not serve.
        pids: of the process of each port, None while it has none; with `mode="thread"` this process's, for each.
        restarts: of those processes, together.
        ports: one entry a port.
    """

    host: str | None
    pids: tuple[int | None, ...]
    restarts: int
    ports: tuple[PortStatistics, ...] = ()

    def total(self, name: str) -> int:
        """The sum of one counter over all ports."""
        return sum(int(getattr(port, name)) for port in self.ports)


class PortCounters:
    """The block of one port, as its single writer sees it; `words[REQUESTS] += 1` counts without a call."""

    __slots__ = ("words",)

    def __init__(self, words: memoryview, index: int) -> None:
        self.words = words[index * PORT_WORDS : (index + 1) * PORT_WORDS]

    def add(self, name: str, amount: int = 1) -> None:
        """Count so many more of a field of `PortStatistics`."""
        self.words[_POSITIONS[name]] += amount

    def retire(self) -> None:
        """State that the port listens no longer, and has no connection."""
        self.words[PORT] = self.words[CONNECTIONS] = 0

    def snapshot(self) -> PortStatistics:
        return PortStatistics(**{name: int(self.words[position]) for name, position in _POSITIONS.items()})
