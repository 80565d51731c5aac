"""A ring, its ports and clients over the in-memory link; the test runs all sides, turn by turn, under its own clock.

Each port, and the client side, has its own `Faults`: what one side sends misbehaves without touching the other. Time
passes only when nothing moves, and then to the next timer: limits of minutes are tested exactly, in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from tests.support.interrupts import Interrupter
from tests.support.rows import row
from ucxx_transport.client import ClientStatistics, Payload
from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import Discard
from ucxx_transport.client.jobs import Call, Job
from ucxx_transport.client.reads import Watcher
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import EndpointEvents
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import PortCounters, PortStatistics
from ucxx_transport.server.port import Port
from ucxx_transport.testing import Faults, MemoryLink, MemoryNetwork

__all__ = ["HOST", "ExchangeRig", "RigClient", "SilentPeer", "cut_in_two_anywhere", "open_rig"]

HOST = "10.0.0.1"
MANY_PORTS = 840  # divisible by any number of ports up to 8
TURNS = 100_000
OVER_A_LINK = (
    "client/errands.py",
    "client/dispatch.py",
    "client/connection.py",
    "client/connections.py",
    "client/reads.py",
)

CallT = TypeVar("CallT", bound=Call)


class SilentPeer:
    """Events of an endpoint that nothing is done about."""

    def lost(self, error: TransportError) -> None:
        """Nothing."""


class RigClient:
    """A client as its fronts use the core; a call returns when it is done, in the rig's time."""

    def __init__(self, rig: ExchangeRig, core: ClientCore) -> None:
        self._rig = rig
        self.core = core

    def begin(self, *refs: SlotRef, deadline_s: float | None = None) -> Job:
        """Begin to read, and let everything happen that takes no time."""
        job = self.core.begin(refs, deadline_s)
        self._rig.settle()
        return job

    def read(self, ref: SlotRef, *, deadline_s: float | None = None, into: bytearray | None = None) -> Payload:
        """As `SyncUCXXClient.read`."""
        if into is not None:
            self.core.admit(ref, into)
        payload = self.result(self.core.begin((ref,), deadline_s))
        return payload if into is None else payload.copied_into(into)

    def result(self, job: Job) -> Payload:
        """What became of a job of one, once it is done."""
        self._rig.run_until(lambda: job.done)
        self._rig.settle()
        outcome = job.outcomes[0]
        job.outcomes.clear()
        assert outcome is not None
        if isinstance(outcome, TransportError):
            raise outcome
        return outcome

    def consume(self, *refs: SlotRef, deadline_s: float | None = None) -> None:
        """Read payloads together, and release them."""
        for outcome in self.read_many(refs, deadline_s=deadline_s):
            assert isinstance(outcome, Payload), outcome
            outcome.release()

    def read_many(self, refs: Sequence[SlotRef], *, deadline_s: float | None = None) -> list[Payload | TransportError]:
        """As `SyncUCXXClient.read_many`."""
        return self.outcomes(self.core.begin(refs, deadline_s))

    def outcomes(self, *jobs: Job) -> list[Payload | TransportError]:
        """What became of jobs, once they are done."""
        self._rig.run_until(lambda: all(job.done for job in jobs))
        self._rig.settle()
        found = [outcome for job in jobs for outcome in job.outcomes if outcome is not None]
        for job in jobs:
            job.outcomes.clear()
        return found

    def discard(self, refs: Sequence[SlotRef], *, deadline_s: float | None = None) -> int:
        """As `SyncUCXXClient.discard`, but for the count."""
        call = self.begin_discard(*refs, deadline_s=deadline_s)
        self._rig.run_until(lambda: call.done)
        return call.found

    def begin_discard(self, *refs: SlotRef, deadline_s: float | None) -> Discard:
        """Begin to discard; nothing has happened yet."""
        call = self.core.discard_call(refs, deadline_s)
        self.core.reads.go_on(call)
        return call

    def repair(self) -> None:
        """As any call does behind one of another thread whose interrupt has cut a step in two."""
        self.core.damaged = True
        self.core.repair()

    def abandon(self, job: Job) -> None:
        """As a cancelled call does."""
        self.core.abandon(job)
        self._rig.settle()

    def close(self) -> None:
        """As `SyncUCXXClient.close`, in the rig's time."""
        if self.core.reactor.closed:
            return
        goodbye = Call(math.inf)
        self.core.begin_goodbye(goodbye)
        if self.core.reactor.has_link:
            self._rig.run_until(lambda: goodbye.done)
        self.core.end()
        self._rig.settle()

    @property
    def counts(self) -> ClientStatistics:
        """Its statistics."""
        return self.core.statistics()

    @property
    def link(self) -> MemoryLink:
        """Its link, which it has opened."""
        link = self.core.reactor.link
        assert isinstance(link, MemoryLink)
        return link


@dataclass(slots=True, kw_only=True)
class _Served:
    port: Port
    reactor: Reactor
    faults: Faults


@dataclass(kw_only=True)
class ExchangeRig:
    """See the module; made by `open_rig`.

    Attributes:
        ring: that is served. settings: of every port. faults: of what clients send.
        now_s: the clock of all. opened_links: how many links clients have opened.
        idle_alone: clients whose reactor is not run, as that of a blocking client between two calls.
    """

    ring: SharedRingBuffer
    settings: ServerConfig
    faults: Faults = field(default_factory=Faults)
    now_s: float = 1000.0
    opened_links: int = 0
    idle_alone: tuple[RigClient, ...] = ()
    _network: MemoryNetwork = field(default_factory=MemoryNetwork)
    _ports: dict[int, _Served] = field(default_factory=dict)
    _others: list[Reactor] = field(default_factory=list)
    _clients: list[RigClient] = field(default_factory=list)
    _frozen: list[_Served] = field(default_factory=list)

    def clock(self) -> float:
        """Now."""
        return self.now_s

    def client(self, *, watcher: Watcher | None = None, **settings: Any) -> RigClient:
        """A client that reads everything over the link, its first read from the first port; closed with the rig."""
        config = ClientConfig(**{"local": "off", "spin_s": 0.0, **settings})
        core = ClientCore(config, self.client_link, watcher=watcher, clock=self.clock)
        core.reads.ports._first = MANY_PORTS  # noqa: SLF001 - otherwise random, as the reader's id is
        client = RigClient(self, core)
        self._clients.append(client)
        return client

    def client_link(self, reactor: Reactor) -> MemoryLink:
        """A link of the client side."""
        self.opened_links += 1
        return MemoryLink(MemoryNetwork(faults=self.faults, listeners=self._network.listeners), reactor)

    def start_port(self, number: int) -> None:
        """Serve the ring on a port."""
        faults = Faults()
        network = MemoryNetwork(faults=faults, listeners=self._network.listeners)
        reactor = Reactor(network.link, spin_s=0.0, clock=self.clock)
        port = Port(self.ring, self.settings, number - 1, reactor)
        port.start(number)
        self._ports[number] = _Served(port=port, reactor=reactor, faults=faults)

    def stop_port(self, number: int) -> None:
        """End the server of a port and every connection to it, as a death of its process does."""
        ended = self._ports.pop(number)
        ended.port.stop()
        for _ in range(TURNS):
            if ended.port.stopped or not ended.reactor.poll():
                break
        ended.reactor.close()
        ended.port.retire()

    def freeze_port(self, number: int) -> Callable[[], None]:
        """A port does nothing any more, as a stopped process; returns what lets it go on."""
        frozen = self._ports.pop(number)

        def thaw() -> None:
            self._ports[number] = frozen
            self._frozen.remove(frozen)

        self._frozen.append(frozen)
        return thaw

    def impostor(self, number: int, on_endpoint: Callable[[Endpoint], EndpointEvents]) -> None:
        """Something else listens on a port: every connection to it is handed to `on_endpoint`."""
        reactor = Reactor(MemoryNetwork(listeners=self._network.listeners).link, spin_s=0.0, clock=self.clock)
        reactor.link.listen(number, on_endpoint)
        self._others.append(reactor)

    def publish(self, *ports: int) -> None:
        """References written from now on name these ports; default all that serve."""
        self.ring.publish_address(HOST, ports or tuple(self._ports))

    def write(self, content: bytes) -> SlotRef:
        """A payload of a raw ring."""
        return self.ring.write_raw(content)

    def states(self, *refs: SlotRef) -> list[SlotState]:
        """Of their slots."""
        return [self.ring.slot_state(ref.slot) for ref in refs]

    def faults_of(self, number: int) -> Faults:
        """What happens to messages that this server port sends."""
        return self._ports[number].faults

    def statistics(self, number: int) -> PortStatistics:
        """The counts of one port; the ports are numbered from 1."""
        return PortCounters(self.ring.server_words, number - 1).snapshot()

    def requests(self) -> int:
        """Payloads that all ports were asked for."""
        return sum(self.statistics(number).requests for number in range(1, 9))

    # --- Time ---

    def turn(self) -> bool:
        """Each side has one turn; whether anything moved."""
        return sum(reactor.poll() for reactor in self._reactors()) > 0

    def settle(self) -> None:
        """All sides run until nothing moves."""
        for _ in range(TURNS):
            if not self.turn():
                return
        raise AssertionError("the sides never come to rest")

    def run_until(self, condition: Callable[[], bool]) -> None:
        """All sides run, and time passes whenever nothing moves, until the condition holds."""
        for _ in range(TURNS):
            if condition():
                return
            if not self.turn():
                next_s = min(reactor.next_timer_s for reactor in self._reactors())
                assert next_s < math.inf, "everyone waits for something that will not happen"
                self.now_s = max(self.now_s, next_s)
        raise AssertionError("it never comes to that")

    def advance(self, seconds: float) -> None:
        """Time passes, and whatever is due happens at its time."""
        until_s = self.now_s + seconds
        self.settle()
        while (due_s := min(reactor.next_timer_s for reactor in self._reactors())) <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.settle()
        self.now_s = until_s
        self.settle()

    def close(self) -> None:
        """Clients first, then the ports."""
        if self.faults.hold is not None:
            self.faults.hold.set()
        for client in self._clients:
            client.close()
        for number in list(self._ports):
            self.stop_port(number)
        for reactor in (*self._others, *(frozen.reactor for frozen in self._frozen)):
            reactor.close()

    def _reactors(self) -> list[Reactor]:
        reactors = [served.reactor for served in self._ports.values()] + self._others
        reactors += [client.core.reactor for client in self._clients if client not in self.idle_alone]
        return [reactor for reactor in reactors if not reactor.closed]


@contextmanager
def open_rig(
    *, ports: int = 2, ring: RingConfig | None = None, server: ServerConfig | None = None
) -> Iterator[ExchangeRig]:
    """A rig whose ports 1 to `ports` serve and are published; closed at the end, whatever happened."""
    config = ring or RingConfig(slots=4, slot_bytes=64 << 10, prefault=False)
    with SharedRingBuffer.create(config) as made:
        rig = ExchangeRig(ring=made, settings=server or ServerConfig(mode="thread"))
        try:
            for number in range(1, ports + 1):
                rig.start_port(number)
            rig.publish()
            yield rig
        finally:
            rig.close()


def cut_in_two_anywhere(
    begin: Callable[[ExchangeRig, RigClient], CallT], *, ring: RingConfig | None = None, refused: bool = False
) -> Iterator[tuple[ExchangeRig, CallT, object]]:
    """A call that is done although another call's interrupt has cut a step of its in two, at one point later each time.

    Yields its rig, the call, and where the interrupt was: last None, for a call that has come through.

    Args:
        begin: what begins it, in a rig of one port.
        ring: settings of the rig's ring.
        refused: whether no connection is to be had after an interrupt.
    """
    for at in count():
        interrupter = Interrupter(at, OVER_A_LINK)
        with open_rig(ports=1, ring=ring) as rig:
            client = rig.client()
            call = begin(rig, client)
            with suppress(KeyboardInterrupt), interrupter:
                rig.settle()
            with row(where=interrupter.where):
                rig.faults.refuse = refused and interrupter.where is not None
                client.repair()
                rig.run_until(lambda: call.done)  # noqa: B023 - called before the next one
            yield rig, call, interrupter.where
        if interrupter.where is None:
            return
