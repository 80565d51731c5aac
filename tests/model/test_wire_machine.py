"""A Hypothesis state machine connects clients to a port, over a network that does anything that UCX may do.

Frames of a connection stay in order, its channels overtake each other, sends complete before or after their messages
arrive; connections break between any two messages and each side learns of it on its own; clients give up, die and come
back; the port dies. Between any two steps no attempt has two owners, no window is exceeded,
nothing is consumed that no client has, and no two clients have one payload unless a connection broke. When all has
settled, a payload is consumed if and only if a client has it, and no one owes anything.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    rule,
)

from tests.model.plain_ring import Key, ModelRing, PlainRing, key_of
from tests.model.wire_model import Client, Connection, Port
from tests.support.exhaustive import exhaustive
from tests.support.machines import CountedMachine, run_steps
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import RingFullError
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.actions import Take
from ucxx_transport.wire.frames import MAX_CHANNEL, Window
from ucxx_transport.wire.server_side import SessionSource

T = TypeVar("T")

BURST = 25
SLOTS = 5
WINDOW = Window(4, 300)
CLIENTS = 3
SIZES = (0, 8, 40, 100, 200, 400)

# What happens to one connection next: (f) a frame arrives, (s) a send completes, (a) an answer arrives, (e) the ends
# are sent, (x) it breaks, (c) it breaks and the client notices, (p) the port does.
AS_IT_SHOULD = ("", "f", "fs", "fa", "fsa", "fas", "faa", "fsasa", "faaef", "fsaef", "fae", "ef", "aaa", "sss")
AS_IT_MAY = (
    "fc",
    "fp",
    "fac",
    "fsac",
    "facp",
    "fapc",
    "faecp",
    "fsaefcp",
    "faefpc",
    "x",
    "c",
    "p",
    "eafpsc",
    "faeac",
    "fsaeaxcp",
    "faeapc",
)

_SHARES = {
    "write": 8,
    "connect": 8,
    "fetch": 20,
    "take": 10,
    "describe": 1,
    "discard": 2,
    "abandon": 4,
    "confirm": 6,
    "go_on": 20,
    "look": 6,
    "numbers_pass": 2,
    "give_up": 3,
    "pump": 4,
    "notice": 3,
    "client_dies": 1,
    "port_dies": 1,
    "settle": 1,
}


class RealLease:
    """One attempt on a slot of a real ring."""

    def __init__(self, lease: ReadLease) -> None:
        self._lease = lease
        self._memory = lease.message  # as a port has it, which may look after the attempt has ended
        self.nbytes = lease.nbytes

    def message(self) -> bytes:
        return bytes(self._memory)

    def mark_consumed(self) -> bool:
        return self._lease.mark_consumed()

    def release_reading(self) -> bool:
        return self._lease.release_reading()


class RealRing:
    """The ring itself, with slots in shared memory."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        self._ring = ring
        self.ring_id = ring.ring_id

    def write(self, content: bytes) -> SlotRef | None:
        try:
            return self._ring.write_raw(content)
        except RingFullError:
            return None

    def acquire(self, slot: int, generation: int, reader: int) -> RealLease:
        return RealLease(self._ring.acquire_slot(slot, generation, reader=reader))

    def ready(self) -> list[SlotRef]:
        return self._ring.ready_refs()

    def is_reading(self) -> bool:
        return any(state is SlotState.READING for state in self._ring.slot_states())


class WireMachine(CountedMachine):
    """See the module. A step is one of `_SHARES`; what it is done to is drawn by `Random`."""

    real: ClassVar[bool] = False
    rules_an_example = 15
    steps_an_example = 250  # most are bursts

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()

    @initialize(token=st.booleans())
    def open(self, *, token: bool) -> None:
        self.ring: ModelRing = PlainRing(SLOTS)
        if self.real:
            config = RingConfig(slots=SLOTS, slot_bytes=512, prefault=False)
            self.ring = RealRing(self.stack.enter_context(SharedRingBuffer.create(config)))
        source = SessionSource(ring_id=self.ring.ring_id, fingerprint=0, schema_bytes=b"schema", window=WINDOW)
        settings = ServerConfig(
            token=b"secret" if token else None,
            first_frame_timeout_s=1e6,
            idle_timeout_s=1e6,
            send_timeout_s=1e6,
            ack_timeout_s=1e6,
        )
        self.port = port = Port(self.ring, source, settings)
        self.clients = [Client(number + 1) for number in range(CLIENTS)]
        self.born = CLIENTS
        self.names: list[SlotRef] = []
        self.contents: dict[Key, bytes] = {}
        self.letters = {"f": port.receive_frame, "s": self.first_send, "a": self.first_answer, "e": port.send_ends}
        self.letters |= {"x": port.cut, "c": port.client_notices, "p": port.server_notices}

    @rule(kind=st.sampled_from(list(_SHARES)), choice=st.randoms(use_true_random=False))
    def step(self, kind: str, choice: Random) -> None:
        getattr(self, kind)(choice)
        self.count_steps()
        self.port.check()

    @rule(seed=st.integers(0, (1 << 32) - 1))
    def burst(self, seed: int) -> None:
        choice = Random(seed)
        for kind in choice.choices(list(_SHARES), list(_SHARES.values()), k=BURST):
            self.step(kind, choice)

    def connections(self) -> list[Connection]:
        return [one for one in self.port.connections if not (one.client_knows and one.server_knows)]

    def opened(self) -> list[Connection]:
        return [one for one in self.port.connections if self.port.is_open(one)]

    # --- What writers and clients do ---

    def write(self, choice: Random) -> None:
        content = (b"%06d-" % len(self.contents) * 60)[: choice.choice(SIZES)]
        name = self.ring.write(content)
        if name is not None:
            assert key_of(name) not in self.contents
            self.contents[key_of(name)] = content
            self.names.append(name)

    def connect(self, choice: Random) -> None:
        client = choice.choice(self.clients)
        if len(client.connections) < 2:
            connection = self.port.connect(client)
            if choice.random() < 0.8:
                self.pump(choice, connection)

    def fetch(self, choice: Random) -> None:
        """Some of the latest names, mostly still there."""
        connection = one_of(self.opened(), choice)
        if connection is None:
            return
        names: list[SlotRef] = []
        for name in choice.choices(self.names[-8:], k=choice.randint(1, 4)) if self.names else ():
            total = sum(one.nbytes for one in names) + name.nbytes
            if connection.session.room(total, len(names) + 1):
                names.append(name)
        if len(names) == 1:
            self.port.fetch_one(connection, names[0])
        elif names:
            self.port.fetch(connection, names, packed=len(names) > 1 and choice.random() < 0.5)
        self.go_on(choice, connection)

    def take(self, choice: Random) -> None:
        connection = one_of(self.opened(), choice)
        if connection is not None and len(connection.server.takes) + len(connection.frames) < 6:
            newest, nbytes = choice.random() < 0.5, choice.choice((0, 50, 300, 5000))
            self.port.take(connection, choice.randint(1, 5), nbytes, newest=newest, wait_ms=1000)
            self.go_on(choice, connection)

    def describe(self, choice: Random) -> None:
        connection = one_of(self.opened(), choice)
        if connection is not None:
            self.port.describe(connection)

    def discard(self, choice: Random) -> None:
        connection, name = one_of(self.opened(), choice), one_of(self.names[-8:], choice)
        if connection is not None and name is not None:
            connection.client.discarded.add(key_of(name))
            self.port.confirm(connection, [name])

    def abandon(self, choice: Random) -> None:
        connection = one_of([one for one in self.opened() if one.names], choice)
        if connection is not None:
            connection.abandoned.add(choice.choice(list(connection.names)))

    def confirm(self, choice: Random) -> None:
        connection = one_of([one for one in self.opened() if one.client.owed], choice)
        if connection is not None:
            self.port.confirm(connection, list(connection.client.owed.values())[:64])

    def numbers_pass(self, choice: Random) -> None:
        """As many attempts as there are channels have been, nearly: those in flight are met again."""
        connection = one_of(self.opened(), choice)
        if connection is not None:
            connection.session._last += MAX_CHANNEL + 1 - choice.randint(1, 12)  # noqa: SLF001 - 65,536 reads take long

    # --- What the network and the port do ---

    def go_on(self, choice: Random, connection: Connection | None = None) -> None:
        connection = connection or one_of(self.connections(), choice)
        if connection is None:
            return
        chance = choice.random()
        letters = choice.choice(AS_IT_SHOULD if chance < 0.7 else AS_IT_MAY)
        for letter in choice.choices("fsafsaexcp", k=4) if chance > 0.9 else letters:
            self.letters[letter](connection)

    def first_send(self, connection: Connection) -> None:
        if connection.sending and not connection.server_knows:
            self.port.complete_send(connection, 0)

    def first_answer(self, connection: Connection) -> None:
        if connection.answers:
            self.port.receive_answer(connection, list(connection.answers)[-1])  # the last first: channels overtake

    def look(self, choice: Random) -> None:
        connection = one_of([one for one in self.connections() if one.server.takes and not one.server_knows], choice)
        if connection is not None:
            self.port.look(connection, choice.choice(list(connection.server.takes.values())))

    def give_up(self, choice: Random) -> None:
        connection = one_of([one for one in self.connections() if one.server.takes and not one.server_knows], choice)
        if connection is not None:
            self.port.give_up(connection, choice.choice(list(connection.server.takes.values())))

    # --- What goes wrong ---

    def notice(self, choice: Random) -> None:
        connection = one_of([one for one in self.connections() if one.is_cut], choice)
        if connection is not None:
            choice.choice((self.port.client_notices, self.port.server_notices))(connection)

    def client_dies(self, choice: Random) -> None:
        which = choice.randrange(CLIENTS)
        for connection in list(self.clients[which].connections):
            self.port.client_notices(connection)
        self.born += 1
        self.clients[which] = Client(self.born)

    def port_dies(self, _: Random) -> None:
        self.port.server_dies()

    # --- What must come of it ---

    def settle(self, choice: Random) -> None:
        """Nothing breaks any more, everything in flight arrives, and what is owed is confirmed."""
        for _ in range(20):
            for connection in self.connections():
                if connection.is_cut:
                    self.port.client_notices(connection)
                    self.port.server_notices(connection)
            for client in self.clients:
                if client.owed and not client.connections:
                    self.port.connect(client)
            for connection in self.connections():
                self.pump(choice, connection)
                if connection.client.owed and self.port.is_open(connection):
                    self.port.confirm(connection, list(connection.client.owed.values())[:64])
            if all(map(self.port.is_quiet, self.connections())) and not any(client.owed for client in self.clients):
                break
        else:
            raise AssertionError("what is owed never comes to an end")
        for connection in self.opened():
            self.port.describe(connection)  # whose answer proves all ends
            self.pump(choice, connection)
        self.everything_is_settled()

    def pump(self, choice: Random, connection: Connection | None = None) -> None:
        """Everything between the two ends arrives, and is answered."""
        port, connection = self.port, connection or one_of(self.connections(), choice)
        if connection is None:
            return
        while not connection.is_cut:
            port.send_ends(connection)
            while connection.frames:
                port.receive_frame(connection)
            while connection.sending:
                port.complete_send(connection, 0)
            for take in list(connection.server.takes.values()):
                port.give_up(connection, take)
            for channel in list(connection.answers):
                port.receive_answer(connection, channel)
            if port.is_quiet(connection):
                return

    def everything_is_settled(self) -> None:
        assert not self.ring.is_reading(), "a slot is stuck"
        for connection in self.connections():
            assert (connection.held, connection.session.in_flight) == ({}, 0)
            assert (connection.server.in_flight, connection.server.leaving, connection.posted) == ({}, {}, {})
            assert (connection.names, connection.session.owed()) == ({}, [])
            assert connection.session.room(WINDOW.nbytes, WINDOW.attempts)
            everything = Take(1, WINDOW.attempts, WINDOW.nbytes, newest=False, until_s=0.0)
            assert connection.server.take_room(everything) == WINDOW
        ready = {key_of(name) for name in self.ring.ready()}
        wanted = {key for client in self.clients for key in (*client.delivered, *client.discarded)}
        assert not (ready & wanted) - self.port.forgotten, "delivered, and still there for others"
        latest = dict(self.contents.keys())  # the last generation of each slot
        lost = {(slot, latest[slot]) for slot in latest} - ready - self.port.consumed
        assert not lost, "neither consumed nor there"

    def teardown(self) -> None:
        try:
            if hasattr(self, "port"):
                self.settle(Random(0))
        finally:
            self.stack.close()


def one_of(several: Sequence[T], choice: Random) -> T | None:
    """One of them, if there are any."""
    return choice.choice(several) if several else None


class RealRingMachine(WireMachine):
    """The same over a ring in shared memory."""

    real = True


@pytest.mark.parametrize("steps", [10_000, exhaustive(200_000)])
@pytest.mark.parametrize("machine", [WireMachine, RealRingMachine], ids=["plain", "real"])
def test_every_payload_has_one_owner_and_one_end_whatever_the_network_does(
    machine: type[WireMachine], steps: int, log_events: list[MutableMapping[str, Any]]
) -> None:
    run_steps(machine, steps)
    assert not [event for event in log_events if event["log_level"] in {"error", "critical"}]
