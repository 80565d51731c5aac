"""Ports of a source, and the retry policy. Decisions: `now` comes in, nothing waits or opens.

| failure                                  | port layer            | slot layer          |
|------------------------------------------|-----------------------|---------------------|
| `PeerLostError`, attempt timed out       | quarantine, next port | fresh call          |
| `BusyError`                              | next port             | fresh call, backoff |
| `NotReadyError`                          | propagate             | fresh calls, as many as the deadline allows |
| `ChecksumError`                          | propagate             | fresh call          |
| `StaleSlotError`, protocol, token, config| propagate             | propagate           |
| the caller's deadline passed             | propagate             | propagate           |

Reads that overlap take a source's healthy ports in turn, so that its server's processes share them; a group of many,
or of much, is spread over them at once. A read that is alone at its source stays at the port that served the last one:
that port is still polling, and the others sleep (the p50 of a 64 KiB read over 4 ports: 840 µs in turn, 620 µs by
staying, in one run on 2 cores).

While all ports of a source are in quarantine, they are tried, for `PROBE_S` at most by a batch that reads from others.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import BusyError, DeadlineExceededError, NotReadyError, PeerLostError, TransportError

REMEMBERED_SOURCES: Final = 4096
"""Sources whose position is remembered; beyond it the longest unused starts again at its first port."""

SPREAD_READS: Final = 8
SPREAD_BYTES: Final = 2 << 20
"""A group of so many reads, or of two and so many bytes, goes to all healthy ports of its source at once."""

PROBE_S: Final = 0.5
"""What a source whose ports are all in quarantine may cost a batch that has others to read from."""

BACKOFF_BASE_S: Final = 0.01
BACKOFF_LIMIT_S: Final = 0.5
WAIT_PAUSE_S: Final = 0.1
"""A source that is waited for is asked again after this."""

SHORTEST_ATTEMPT_S: Final = 0.001
"""What is left is worth a try only if a round trip may fit into it."""

BLAMING: Final = (PeerLostError, DeadlineExceededError)
"""Failures that put the port they came through into quarantine."""

ROTATING: Final = (*BLAMING, BusyError)
"""Failures after which the port layer goes on at the next port."""

PortKey = tuple[str, int]


def backoff_s(error: TransportError, attempt: int) -> float:
    """Seconds to wait before fresh call number `attempt` (1 is the first repetition)."""
    if isinstance(error, BusyError | NotReadyError):
        return pause_s(attempt, first_s=BACKOFF_BASE_S, longest_s=BACKOFF_LIMIT_S)
    return 0.0


def retries_slot(error: TransportError, *, attempt: int, read_attempts: int, remaining_s: float) -> bool:
    """Whether the slot layer makes another fresh call after attempt number `attempt` (from 1).

    A source that is not bound yet says so itself and asks to come again: that is no failure to give up on.
    """
    if not error.retryable or (attempt >= read_attempts and not isinstance(error, NotReadyError)):
        return False
    return remaining_s - backoff_s(error, attempt) > SHORTEST_ATTEMPT_S


class Source:
    """One source's ports, at least one: the `key` that is due, and the `alternate` after it, if there are others.

    `position`: of the one that is due, counted on for ever. `under_way`: how many reads are.
    """

    def __init__(self, keys: tuple[PortKey, ...], position: int) -> None:
        self.keys = keys
        self.position = position - 1
        self.under_way = 0
        self.advance()

    def first(self, keys: tuple[PortKey, ...], *, alone: bool) -> int:
        """Which of `keys`, some of its ports, is due for what is to be read now, alone or beside other reads."""
        # In turn among the candidates themselves: stepping over a sick port would give its share to the next one.
        if not alone:
            self.advance()
        return self.position % len(keys)

    def advance(self) -> None:
        """An attempt failed, or there are others: the next port is due."""
        self.position = position = self.position + 1
        keys = self.keys
        self.key = keys[position % len(keys)]
        self.alternate = keys[(position + 1) % len(keys)] if len(keys) > 1 else None


class Ports:
    """All ports that are read from, by source, and those to avoid since their last transport-class failure.

    `first`: the port that a source's first read takes; clients should differ in it.

    Attributes:
        sources: by address and ports; use `source`, which keeps their order, unless one has just been used.
        avoided: those in quarantine, until when; some of them maybe not any more.
    """

    def __init__(self, quarantine_s: float, first: int = 0) -> None:
        self.sources: OrderedDict[tuple[str, tuple[int, ...]], Source] = OrderedDict()
        self._quarantine_s = quarantine_s
        self._first = first
        self.avoided: dict[PortKey, float] = {}

    def source(self, host: str, ports: tuple[int, ...]) -> Source:
        """A source by its address and ports, at least one."""
        name = (host, ports)
        source = self.sources.get(name)
        if source is None:
            source = self.sources[name] = Source(tuple((host, port) for port in ports), self._first)
            if len(self.sources) > REMEMBERED_SOURCES:
                self.sources.popitem(last=False)
        else:
            self.sources.move_to_end(name)
        return source

    def healthy(self, source: Source, now: float) -> tuple[PortKey, ...]:
        return tuple(key for key in source.keys if not self.avoids(key, now))

    def avoids(self, key: PortKey, now: float) -> bool:
        return now < self.avoided.get(key, now)

    def quarantine(self, key: PortKey, now: float) -> None:
        self.avoided[key] = now + self._quarantine_s

    def forgive(self, key: PortKey, now: float) -> None:
        """A port has just answered, or is said to be there: it is healthy. Those avoided long enough are forgotten."""
        self.avoided = {port: until_s for port, until_s in self.avoided.items() if port != key and now < until_s}


def shares(count: int, nbytes: int, ports: int) -> list[int]:
    """How many reads of a group each of `ports` healthy ports is given, one after the other: all to one, or even."""
    if count < SPREAD_READS and nbytes < SPREAD_BYTES:
        return [count]
    parts = min(ports, count)
    return [count // parts + (part < count % parts) for part in range(parts)]
