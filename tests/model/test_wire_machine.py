"""A Hypothesis state machine connects clients to a port, over a network that does anything that UCX may do.

Frames of a connection stay in order, its channels overtake each other, sends complete before or after their messages
arrive; connections break between any two messages and each side learns of it on its own; clients give up, die and come
back; the port dies. A *step* is one rule. Between any two steps no attempt has two owners, no window is exceeded,
nothing is consumed that no client has, and no two clients have one payload unless a connection broke. When all has
settled, a payload is consumed if and only if a client has it, and no one owes anything.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.wire_model import Client, Connection, Key, ModelRing, Name, PlainRing, Port
from tests.support.exhaustive import exhaustive
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import RingFullError
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState
from ucxx_transport.wire.codec import seal
from ucxx_transport.wire.frames import PACK_BYTES, ReplyHeader, Status, Window, message_bytes
from ucxx_transport.wire.server_side import SessionLimits, SessionSource

STEPS_AN_EXAMPLE = 60
SLOTS = 5
WINDOW = Window(4, 300)
CLIENTS = 3
SIZES = st.sampled_from([0, 8, 40, 100, 200, 400])
STEPS = st.lists(st.sampled_from(["frame", "send", "answer"]), max_size=4)
"""What happens to one connection next, of what is on its way."""
INDEX = st.integers(0, 1 << 20)
"""Picks among what is there, whatever is there."""


class RealLease:
    """One attempt on a slot of a real ring."""

    def __init__(self, lease: ReadLease, name: Name) -> None:
        self._lease = lease
        self._name = name
        self.nbytes = lease.nbytes

    def message(self) -> bytes:
        frame = self._lease.frame()
        name = self._name
        seal(frame, ReplyHeader(Status.OK, name.nbytes, name.ring_id, name.slot, name.generation))
        return bytes(frame[: message_bytes(name.nbytes)])

    def mark_consumed(self) -> bool:
        return self._lease.mark_consumed()

    def release_reading(self) -> bool:
        return self._lease.release_reading()


class RealRing:
    """The ring itself, with slots in shared memory."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        self._ring = ring
        self.ring_id = ring.ring_id

    def write(self, content: bytes) -> Name | None:
        try:
            ref = self._ring.write_raw(content)
        except RingFullError:
            return None
        return Name(self.ring_id, ref.slot, ref.generation, ref.nbytes)

    def acquire(self, slot: int, generation: int, reader: int) -> RealLease:
        lease = self._ring.acquire_slot(slot, generation, reader=reader)
        return RealLease(lease, Name(self.ring_id, slot, generation, lease.nbytes))

    def ready(self) -> list[Name]:
        return [Name(self.ring_id, ref.slot, ref.generation, ref.nbytes) for ref in self._ring.ready_refs()]

    def is_reading(self) -> bool:
        return any(state is SlotState.READING for state in self._ring.slot_states())


class WireMachine(RuleBasedStateMachine):
    """See the module."""

    real: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()

    @initialize(token=st.booleans(), payloads=st.integers(0, SLOTS))
    def open(self, *, token: bool, payloads: int) -> None:
        self.ring: ModelRing = PlainRing(SLOTS)
        if self.real:
            config = RingConfig(slots=SLOTS, slot_bytes=512, prefault=False)
            self.ring = RealRing(self.stack.enter_context(SharedRingBuffer.create(config)))
        source = SessionSource(
            ring_id=self.ring.ring_id, fingerprint=0, schema_bytes=b"schema", token=b"secret" if token else None
        )
        limits = SessionLimits(
            first_frame_timeout_s=1e6, idle_timeout_s=1e6, send_timeout_s=1e6, ack_timeout_s=1e6, window=WINDOW
        )
        self.port = Port(self.ring, source, limits)
        self.clients = [Client(number + 1) for number in range(CLIENTS)]
        self.born = CLIENTS
        self.names: list[Name] = []
        self.contents: dict[Key, bytes] = {}
        self.steps_of = {"frame": self.port.receive_frame, "send": self.first_send, "answer": self.first_answer}
        for number in range(payloads):
            self.write(number * 60)
        for client in self.clients[:2]:
            self.pump(self.port.connect(client))

    def first_send(self, connection: Connection) -> None:
        if connection.sending and not connection.server_knows:
            self.port.complete_send(connection, 0)

    def first_answer(self, connection: Connection) -> None:
        if connection.answers:
            self.port.receive_answer(connection, next(iter(connection.answers)))

    def connections(self) -> list[Connection]:
        return [one for one in self.port.connections if not (one.client_knows and one.server_knows)]

    def opened(self) -> list[Connection]:
        return [one for one in self.port.connections if self.port.is_open(one)]

    # --- What writers and clients do ---

    @rule(nbytes=SIZES)
    def write(self, nbytes: int) -> None:
        content = (b"%06d-" % len(self.contents) * 60)[:nbytes]
        name = self.ring.write(content)
        if name is None:
            return
        assert name.key not in self.contents
        self.contents[name.key] = content
        self.names.append(name)

    @rule(which=INDEX)
    def connect(self, which: int) -> None:
        client = self.clients[which % CLIENTS]
        if len(client.connections) < 2:
            self.port.connect(client)

    @precondition(lambda self: self.names and self.opened())
    @rule(which=INDEX, picks=st.lists(st.integers(0, 7), min_size=1, max_size=4), packed=st.booleans(), then=STEPS)
    def fetch(self, which: int, picks: list[int], then: list[str], *, packed: bool) -> None:
        connection = pick(self.opened(), which)
        names: list[Name] = []
        for offset in picks:  # the latest ones, mostly still there
            name = self.names[-1 - offset % len(self.names)]
            total = sum(one.nbytes for one in names) + name.nbytes
            if connection.session.room(total, len(names) + 1):
                names.append(name)
        if names:
            fits = len(names) > 1 and sum(message_bytes(name.nbytes) for name in names) <= PACK_BYTES
            self.port.fetch(connection, names, packed=packed and fits)
        self.go_on(connection, then)

    @precondition(lambda self: self.opened())
    @rule(
        which=INDEX,
        count=st.integers(1, 5),
        nbytes=st.sampled_from([0, 50, 300, 5000]),
        newest=st.booleans(),
        then=STEPS,
    )
    def take(self, which: int, count: int, nbytes: int, then: list[str], *, newest: bool) -> None:
        connection = pick(self.opened(), which)
        if len(connection.server.takes) + len(connection.frames) < 6:
            self.port.take(connection, count, nbytes, newest=newest, wait_ms=1000)
        self.go_on(connection, then)

    @precondition(lambda self: self.opened())
    @rule(which=INDEX)
    def describe(self, which: int) -> None:
        self.port.describe(pick(self.opened(), which))

    @precondition(lambda self: self.opened())
    @rule(which=INDEX, then=STEPS)
    def send_ends(self, which: int, then: list[str]) -> None:
        connection = pick(self.opened(), which)
        self.port.send_ends(connection)
        self.go_on(connection, then)

    @precondition(lambda self: self.names and self.opened())
    @rule(which=INDEX, offset=st.integers(0, 7))
    def discard(self, which: int, offset: int) -> None:
        connection = pick(self.opened(), which)
        name = self.names[-1 - offset % len(self.names)]
        connection.client.discarded.add(name.key)
        self.port.confirm(connection, [name])

    @precondition(lambda self: any(one.names for one in self.opened()))
    @rule(which=INDEX, attempt=INDEX)
    def abandon(self, which: int, attempt: int) -> None:
        connection = pick([one for one in self.opened() if one.names], which)
        connection.abandoned.add(pick(list(connection.names), attempt))

    @precondition(lambda self: any(one.client.owed for one in self.opened()))
    @rule(which=INDEX)
    def confirm_what_is_owed(self, which: int) -> None:
        connection = pick([one for one in self.opened() if one.client.owed], which)
        self.port.confirm(connection, list(connection.client.owed.values())[:64])

    # --- What the network and the port do ---

    def go_on(self, connection: Connection, steps: list[str]) -> None:
        for step in steps:
            self.steps_of[step](connection)

    @precondition(lambda self: self.connections())
    @rule(which=INDEX, steps=STEPS)
    def things_arrive(self, which: int, steps: list[str]) -> None:
        self.go_on(pick(self.connections(), which), steps)

    @precondition(lambda self: any(one.answers for one in self.connections()))
    @rule(which=INDEX, channel=INDEX)
    def an_answer_arrives(self, which: int, channel: int) -> None:
        connection = pick([one for one in self.connections() if one.answers], which)
        self.port.receive_answer(connection, pick(list(connection.answers), channel))

    @precondition(lambda self: any(one.sending for one in self.connections() if not one.server_knows))
    @rule(which=INDEX, message=INDEX)
    def a_send_completes(self, which: int, message: int) -> None:
        connection = pick([one for one in self.connections() if one.sending and not one.server_knows], which)
        self.port.complete_send(connection, message % len(connection.sending))

    @precondition(lambda self: any(one.server.takes for one in self.connections() if not one.server_knows))
    @rule(which=INDEX, take=INDEX, gives_up=st.booleans())
    def a_take_is_looked_at(self, which: int, take: int, *, gives_up: bool) -> None:
        connection = pick([one for one in self.connections() if one.server.takes and not one.server_knows], which)
        waiting = pick(list(connection.server.takes.values()), take)
        self.port.look(connection, waiting)
        if gives_up and waiting.attempt in connection.server.takes:
            self.port.give_up(connection, waiting)

    @precondition(lambda self: self.opened())
    @rule(which=INDEX)
    def all_goes_well_for_one(self, which: int) -> None:
        self.pump(pick(self.opened(), which))

    # --- What goes wrong ---

    @precondition(lambda self: self.connections())
    @rule(which=INDEX, who=st.sampled_from(["neither", "client", "server"]))
    def a_connection_breaks(self, which: int, who: str) -> None:
        connection = pick(self.connections(), which)
        self.port.cut(connection)
        if who == "client":
            self.port.client_notices(connection)
        elif who == "server":
            self.port.server_notices(connection)

    @precondition(lambda self: any(one.is_cut for one in self.connections()))
    @rule(which=INDEX, client=st.booleans())
    def one_side_notices(self, which: int, *, client: bool) -> None:
        connection = pick([one for one in self.connections() if one.is_cut], which)
        (self.port.client_notices if client else self.port.server_notices)(connection)

    @rule(which=INDEX)
    def a_client_dies(self, which: int) -> None:
        client = self.clients[which % CLIENTS]
        for connection in list(client.connections):
            self.port.client_notices(connection)
        self.born += 1
        self.clients[which % CLIENTS] = Client(self.born)

    @rule()
    def the_port_dies(self) -> None:
        self.port.server_dies()

    # --- What must always hold ---

    @invariant()
    def nothing_has_two_owners(self) -> None:
        WireMachine.steps += 1
        if hasattr(self, "port"):
            self.port.check()

    @rule()
    def all_settles(self) -> None:
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
                self.pump(connection)
                if connection.client.owed and self.port.is_open(connection):
                    self.port.confirm(connection, list(connection.client.owed.values())[:64])
            if all(map(self.port.is_quiet, self.connections())) and not any(client.owed for client in self.clients):
                break
        else:
            raise AssertionError("what is owed never comes to an end")
        self.everything_is_settled()

    def pump(self, connection: Connection) -> None:
        """Everything between the two ends arrives, and is answered."""
        port = self.port
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
            assert connection.names == {}
        ready = {name.key for name in self.ring.ready()}
        wanted = {key for client in self.clients for key in (*client.delivered, *client.discarded)}
        assert not ready & wanted, "delivered, and still there for others"
        latest = {slot: generation for slot, generation in self.contents}  # noqa: C416 - the last one of each slot
        lost = {(slot, latest[slot]) for slot in latest} - ready - self.port.consumed
        assert not lost, "neither consumed nor there"

    def teardown(self) -> None:
        try:
            if hasattr(self, "port"):
                self.all_settles()
        finally:
            self.stack.close()


def pick(several: list[Any], index: int) -> Any:
    """One of them."""
    return several[index % len(several)]


class RealRingMachine(WireMachine):
    """The same over a ring in shared memory."""

    real = True


@pytest.mark.parametrize("steps", [3000, exhaustive(100_000)])
@pytest.mark.parametrize("machine", [WireMachine, RealRingMachine], ids=["plain", "real"])
def test_every_payload_has_one_owner_and_one_end_whatever_the_network_does(
    machine: type[WireMachine], steps: int, log_events: list[MutableMapping[str, Any]]
) -> None:
    WireMachine.steps = 0
    while WireMachine.steps < steps:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max(1, (steps - WireMachine.steps) // STEPS_AN_EXAMPLE),
                stateful_step_count=STEPS_AN_EXAMPLE,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert not [event for event in log_events if event["log_level"] in {"error", "critical"}]
