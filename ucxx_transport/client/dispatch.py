"""Dispatch: which port each read is given, over which connection, and which ports are distrusted.

Everything here runs in the thread that runs the reactor. The decisions are in `ports`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ucxx_transport.client.ports import PROBE_S, PortKey, Quarantine, Source, Sources, shares
from ucxx_transport.logs import get_logger

if TYPE_CHECKING:
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.jobs import Read
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.errors import TransportError

_log = get_logger(__name__)


class Dispatch:
    """See the module.

    Attributes:
        sources: all that are read from.
        wary: whether any port is in quarantine, or probed.
        again: reads that are to be given a port, by source, until `run`.
        moved: reads that go on at this port, until `run`.
    """

    def __init__(
        self,
        config: ClientConfig,
        connections: Connections,
        *,
        first: int,
        now: Callable[[], float],
        look_at: Callable[[float], None],
        counters: ClientCounters,
    ) -> None:
        self.sources: Sources[Read] = Sources(first)
        self.wary = False
        self.again: dict[Source[Read], list[Read]] = {}
        self.moved: dict[PortKey, list[Read]] = {}
        self._connections = connections
        self._now = now
        self._look_at = look_at
        self._counters = counters
        self._read_attempts = config.read_attempts
        self._quarantine = Quarantine(config.port_quarantine_s)
        self._probed: set[Source[Read]] = set()

    def run(self) -> None:
        """Give every read that waits for one a port."""
        while self.again or self.moved:
            if self.again:
                source, reads = self.again.popitem()
                self.assign(source, reads, self._now())
            else:
                key, reads = self.moved.popitem()
                wanted = [read for read in reads if read.job is not None]
                if wanted:
                    self._enqueue(key, wanted, self._now())

    def healthy(self, source: Source[Read], now: float) -> tuple[PortKey, ...]:
        """The ports of a source that are not in quarantine."""
        return source.healthy(self._quarantine, now)

    def avoids(self, key: PortKey, now: float) -> bool:
        """Whether a port is in quarantine."""
        return self._quarantine.holds(key, now)

    def assign(self, source: Source[Read], reads: list[Read], now: float) -> None:
        """Give reads, of one source, a port each."""
        keys = source.keys
        if self.wary:
            keys = source.healthy(self._quarantine, now)
            if not keys:
                self._probe(source, reads, now)
                return
        first = source.first(keys, alone=source.under_way <= len(reads))
        ports = len(keys)
        if ports == 1 or len(reads) == 1:
            alternate = keys[(first + 1) % ports] if ports > 1 else None
            for read in reads:
                read.alternate = alternate
            self._enqueue(keys[first], reads, now)
            return
        start = 0
        for part, count in enumerate(shares(len(reads), sum(read.ref.nbytes for read in reads), ports)):
            group = reads[start : start + count]
            start += count
            for read in group:
                read.alternate = keys[(first + part + 1) % ports]
            self._enqueue(keys[(first + part) % ports], group, now)

    def _enqueue(self, key: PortKey, reads: list[Read], now: float) -> None:
        """Let reads wait for their turn on a connection, which may have come."""
        connection = self._connections.to(key, now)
        is_open = connection.is_open
        for read in reads:
            read.place = "queued"
            read.connection = connection
            limit_s = read.limit_s
            is_last = is_open or (read.alternate is None and read.call >= self._read_attempts)
            read.due_s = due_s = limit_s if is_last else (now + limit_s) / 2
            self._look_at(due_s)
        connection.queue.extend(reads)
        if is_open:
            connection.pump()

    def _probe(self, source: Source[Read], reads: list[Read], now: float) -> None:
        """All ports of a source are in quarantine: one read tries them, the others wait for what comes of it."""
        self._probed.add(source)
        for read in reads:
            job = read.job
            if job is None:
                continue
            if not job.alone:
                read.limit_s = min(read.limit_s, now + PROBE_S)
            if source.probe is None:
                source.probe = read
            if source.probe is not read:
                read.place = "waiting"
                read.connection = None
                read.due_s = read.limit_s
                source.waiting.append(read)
                self._look_at(read.due_s)
        probe = source.probe
        if probe is not None and probe in reads:
            first = source.first(source.keys, alone=True)
            ports = len(source.keys)
            probe.alternate = source.keys[(first + 1) % ports] if ports > 1 else None
            self._enqueue(source.keys[first], [probe], now)

    def forgive(self, key: PortKey) -> None:
        """A port has answered, or is said to be there."""
        if not self.wary:
            return
        self._quarantine.forgive(key)
        for source in tuple(self._probed):
            if key in source.keys:
                if source.probe is not None and source.probe.job is not None:
                    source.probe.limit_s = source.probe.job.until_s
                self.probe_over(source)
        self.wary = bool(len(self._quarantine) or self._probed)

    def probe_over(self, source: Source[Read]) -> None:
        """Reads that waited for a probe are given a port."""
        source.probe = None
        self._probed.discard(source)
        waiting = [read for read in source.waiting if read.job is not None]
        source.waiting.clear()
        if waiting:
            self.again.setdefault(source, []).extend(waiting)

    def quarantine(self, key: PortKey, error: TransportError) -> None:
        now = self._now()
        self._counters.add("quarantined")
        self._quarantine.prune(now)
        if not self._quarantine.holds(key, now):  # each further failure prolongs it, and is counted
            _log.warning("port_quarantined", host=key[0], port=key[1], reason=error.message)
        self._quarantine.add(key, now)
        self.wary = True
        self._connections.evict(key)

    def next_port(self, host: str, ports: tuple[int, ...]) -> PortKey:
        """The port that is due for something else than a read."""
        source = self.sources.of(host, ports)
        keys = source.healthy(self._quarantine, self._now()) or source.keys
        key = keys[source.first(keys, alone=True)]
        source.advance()
        return key

    def reassign(self, reads: Iterable[Read]) -> None:
        """Give reads that were not asked yet a port again."""
        for read in reads:
            if read.job is not None:
                read.connection = None
                self.again.setdefault(read.source, []).append(read)
