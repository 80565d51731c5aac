"""Clients, a port and the network between them, as small as they can be: shells around the sessions of `wire`.

A message is what its slot holds at the moment it leaves or arrives, whichever comes first, as with UCX: a slot that is
handed on too early gives a torn or foreign payload. Channels are independent of each other, a connection may break
between any two messages, and each side learns of that on its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tests.model.plain_ring import Key, ModelLease, ModelRing, key_of
from tests.support.numbered_session import NumberedSession
from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.actions import Attempt, Reply, Serve, Settle, Take
from ucxx_transport.wire.client_side import Asked
from ucxx_transport.wire.frames import (
    FRAME_BYTES,
    MAX_CHANNEL,
    OfferedPayload,
    Status,
    message_bytes,
    receive_bytes,
)
from ucxx_transport.wire.server_side import Phase, ServerSession, SessionSource


@dataclass
class Sending:
    """A message on its way; `attempts` are those that it carries, `read` its bytes as they lie now."""

    read: Callable[[], bytes]
    attempts: list[Attempt]
    is_shared: bool = False
    has_left: bool = False
    content: bytes | None = None

    def bytes_now(self) -> bytes:
        if self.content is None:
            self.content = self.read()
        return self.content


@dataclass
class Held:
    """A lease of the port's, to be finalised exactly once."""

    lease: ModelLease
    key: Key
    finalised: int = 0


@dataclass(eq=False)
class Connection:
    """Both ends of a connection, and what is between them.

    Attributes:
        posted: by channel, the attempt that a receive is posted for and its room.
        names: by attempt, the payloads that were asked for. shared: by attempt, those of a shared message.
        abandoned: attempts that no read waits for. taken: those that the server picked.
        is_cut: nothing passes any more. client_knows, server_knows: who has noticed.
    """

    client: Client
    session: NumberedSession
    server: ServerSession
    frames: deque[bytes] = field(default_factory=deque)
    answers: dict[int, deque[Sending]] = field(default_factory=dict)
    sending: list[Sending] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    posted: dict[int, tuple[int, int]] = field(default_factory=dict)
    judges: dict[int, Callable[[bytes], object]] = field(default_factory=dict)
    names: dict[int, SlotRef] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    taken: set[Attempt] = field(default_factory=set)
    is_cut: bool = False
    client_knows: bool = False
    server_knows: bool = False


class Client:
    """A client: what it has been given, what it still owes, and its connections."""

    def __init__(self, reader: int) -> None:
        self.reader = reader
        self.delivered: dict[Key, Connection] = {}
        self.discarded: set[Key] = set()
        self.owed: dict[Key, SlotRef] = {}
        self.connections: list[Connection] = []


class Port:
    """The server's shell, and the network. `on_consumed` hears of each payload that the ring has freed for a client."""

    def __init__(self, ring: ModelRing, source: SessionSource, settings: ServerConfig) -> None:
        self.ring = ring
        self.source = source
        self.settings = settings
        self.connections: list[Connection] = []
        self.clients: set[Client] = set()
        self.consumed: set[Key] = set()
        self.forgotten: set[Key] = set()
        self.finalised: list[Held] = []
        self.now = 0.0
        self._nonces = 0

    # --- The client's moves ---

    def connect(self, client: Client) -> Connection:
        self._nonces += 1
        nonce = self._nonces.to_bytes(32, "little")
        session = NumberedSession(reader=client.reader, nonce=nonce, token=self.settings.token_bytes)
        server = ServerSession(self.source, self.settings, nonce=nonce, now=self.now)
        connection = Connection(client, session, server)
        client.connections.append(connection)
        self.connections.append(connection)
        self.clients.add(client)
        self._ask(connection, session.hello(), lambda m: self._welcomed(connection, m))
        return connection

    def _welcomed(self, connection: Connection, message: bytes) -> None:
        asked = connection.session.on_welcome(message)
        if asked is not None:
            self._ask(connection, asked, connection.session.on_authenticated)

    def fetch(self, connection: Connection, names: Sequence[SlotRef], *, packed: bool) -> None:
        session = connection.session
        fetch = session.ask(names, packed=packed)
        connection.names.update(zip(fetch.attempts, names, strict=True))
        if packed:
            room = sum(message_bytes(name.nbytes) for name in names)
            asked = Asked(fetch.frame, fetch.shared, room)
            self._ask(connection, asked, lambda m: self._arrived_together(connection, fetch.attempts, m))
            return
        for attempt, name in zip(fetch.attempts, names, strict=True):
            self._post_payload(connection, attempt, name)
        self._send(connection, fetch.frame)

    def fetch_one(self, connection: Connection, name: SlotRef) -> None:
        frame, attempt, _ = connection.session.ask_one(name)
        connection.names[attempt] = name
        self._post_payload(connection, attempt, name)
        self._send(connection, frame)

    def take(self, connection: Connection, max_payloads: int, max_bytes: int, *, newest: bool, wait_ms: int) -> None:
        asked = connection.session.take(max_payloads, max_bytes, newest=newest, wait_ms=wait_ms)
        self._ask(connection, asked, lambda m: self._offered(connection, asked.attempt, m))

    def _offered(self, connection: Connection, attempt: int, message: bytes) -> None:
        for taken in connection.session.receive_offer(attempt, message):
            connection.names[taken.number] = taken.ref
            self._post_payload(connection, taken.number, taken.ref)

    def confirm(self, connection: Connection, names: Sequence[SlotRef]) -> None:
        asked = connection.session.confirm(names)

        def judge(message: bytes) -> None:
            for name, status in zip(names, connection.session.confirmed(asked.attempt, message), strict=True):
                if status is Status.BUSY:
                    connection.client.owed[name.slot, name.generation] = name

        for name in names:
            connection.client.owed.pop((name.slot, name.generation), None)
        self._ask(connection, asked, judge)

    def describe(self, connection: Connection) -> None:
        asked = connection.session.describe(self.ring.ring_id)

        def judge(message: bytes) -> None:
            assert connection.session.answered(asked.attempt, message) == self.source.schema_bytes

        self._ask(connection, asked, judge)

    def send_ends(self, connection: Connection) -> None:
        if connection.session.ends and not connection.client_knows:
            self._send(connection, connection.session.ends_frame())

    def _post_payload(self, connection: Connection, attempt: int, name: SlotRef) -> None:
        self._post(connection, attempt, receive_bytes(name.nbytes), partial(self._arrived, connection, attempt))

    def _post(self, connection: Connection, attempt: int, room: int, judge: Callable[[bytes], object]) -> None:
        channel = attempt & 0xFFFF
        assert channel, "channel 0 is the client's"
        assert channel not in connection.posted, "two receives on one channel"
        connection.posted[channel] = (attempt, room)
        connection.judges[attempt] = judge

    def _ask(self, connection: Connection, asked: Asked, judge: Callable[[bytes], object]) -> None:
        self._post(connection, asked.attempt, asked.receive_bytes, judge)
        self._send(connection, asked.frame)

    def _send(self, connection: Connection, frame: bytes) -> None:
        assert len(frame) <= FRAME_BYTES
        if not connection.is_cut:
            connection.frames.append(frame)

    def receive_answer(self, connection: Connection, channel: int) -> None:
        """The first message of a channel arrives, if a receive is posted for it."""
        if connection.client_knows or channel not in connection.posted:
            return
        queue = connection.answers[channel]
        message = queue.popleft().bytes_now()
        if not queue:
            del connection.answers[channel]
        attempt, room = connection.posted.pop(channel)
        assert len(message) <= room, "an answer longer than what is posted for it"
        try:
            connection.judges.pop(attempt)(message)
        except TransportError:
            assert not connection.session.broken

    def _arrived_together(self, connection: Connection, attempts: list[int], message: bytes) -> None:
        offset = 0
        for attempt in attempts:
            size = message_bytes(connection.names[attempt].nbytes)
            try:
                self._arrived(connection, attempt, message[offset : offset + size])
            except TransportError:
                assert not connection.session.broken
            offset += size
        assert offset == len(message)

    def _arrived(self, connection: Connection, attempt: int, message: bytes) -> None:
        """A payload: the first time it is this client's, and another time it is a duplicate that ends likewise."""
        client = connection.client
        name = connection.names.pop(attempt)
        key = name.slot, name.generation
        connection.session.judge(attempt, message)
        for connection_of_another in (other.delivered.get(key) for other in self.clients if other is not client):
            assert connection_of_another is None or connection_of_another.is_cut, "two clients have one payload"
        if key in client.delivered:
            connection.session.finish(attempt, delivered=True)
        elif attempt in connection.abandoned:
            connection.session.finish(attempt, delivered=False)
        else:
            client.delivered[key] = connection
            connection.session.finish(attempt, delivered=True)
            if name.generation % 3 == 0:
                self._send(connection, connection.session.ends_frame())

    # --- The server's moves ---

    def receive_frame(self, connection: Connection) -> None:
        """The next frame of a connection is handled."""
        if connection.server_knows or not connection.frames:
            return
        posted = connection.frames.popleft().ljust(FRAME_BYTES, b"\0")
        for action in connection.server.receive(posted, self.now):
            match action:
                case Attempt() as attempt:
                    if attempt.sent_s is not None:
                        self._finalise(connection, attempt)
                case Serve(attempts, shared):
                    self._serve(connection, attempts, shared)
                case Take():
                    self.look(connection, action)
                case Settle():
                    statuses = [self._settle(*name, connection.server.reader) for name in action.names]
                    self._reply(connection, connection.server.settled(action, statuses))
                case Reply():
                    assert action.status is Status.OK, action
                    self._reply(connection, action)

    def _serve(self, connection: Connection, attempts: list[Attempt], shared: int) -> None:
        parts: list[Callable[[], bytes]] = []
        acquired: list[Attempt] = []
        for attempt in attempts:
            try:
                lease = self.ring.acquire(attempt.slot, attempt.generation, connection.server.reader)
            except TransportError as error:
                status = Status.STALE if isinstance(error, StaleSlotError) else Status.BUSY
                if shared:
                    part = connection.server.refused_part(attempt, status, str(error))
                    parts.append(partial(bytes, part))
                else:
                    self._reply(connection, connection.server.refused(attempt, status, str(error)))
                continue
            self._hold(connection, attempt, lease)
            acquired.append(attempt)
            parts.append(lease.message)
            if not shared:
                self._put(connection, attempt.number & MAX_CHANNEL, Sending(lease.message, [attempt]))
        if shared:  # copied at once
            message = b"".join(part() for part in parts)
            self._put(connection, shared, Sending(lambda: message, acquired, is_shared=True))

    def _hold(self, connection: Connection, attempt: Attempt, lease: ModelLease) -> None:
        assert attempt.number not in connection.held
        connection.held[attempt.number] = Held(lease, (attempt.slot, attempt.generation))

    def look(self, connection: Connection, take: Take) -> None:
        """See whether there is something to take; where there is not, it waits until `give_up`."""
        payloads, nbytes = connection.server.take_room(take)
        ready = self.ring.ready()
        picked: list[tuple[SlotRef, ModelLease]] = []
        for name in reversed(ready) if take.newest else ready:
            if len(picked) == payloads or name.nbytes > nbytes:
                break
            nbytes -= name.nbytes
            picked.append((name, self.ring.acquire(name.slot, name.generation, connection.server.reader)))
        if not picked:
            return
        facts = [
            OfferedPayload(name.slot, name.generation, name.nbytes, name.checksum, 1, b"%d/%d" % key_of(name))
            for name, _ in picked
        ]
        reply, attempts = connection.server.taken(take, facts, self.now)
        self._reply(connection, reply)
        connection.taken.update(attempts)
        for attempt, (_, lease) in zip(attempts, picked, strict=True):
            self._hold(connection, attempt, lease)
            self._put(connection, attempt.number & MAX_CHANNEL, Sending(lease.message, [attempt]))

    def give_up(self, connection: Connection, take: Take) -> None:
        self._reply(connection, connection.server.nothing(take))

    def _settle(self, slot: int, generation: int, reader: int) -> Status:
        try:
            lease = self.ring.acquire(slot, generation, reader)
        except TransportError as error:
            return Status.BUSY if error.retryable else Status.STALE
        if not lease.mark_consumed():
            return Status.STALE
        self._note_consumed((slot, generation))
        return Status.OK

    def _reply(self, connection: Connection, reply: Reply) -> None:
        self._put(connection, reply.channel, Sending(lambda: reply.message, []))

    def _put(self, connection: Connection, channel: int, sending: Sending) -> None:
        connection.sending.append(sending)
        if not connection.is_cut:
            connection.answers.setdefault(channel, deque()).append(sending)

    def complete_send(self, connection: Connection, index: int) -> None:
        """A message has left: UCX is done with its memory."""
        sending = connection.sending.pop(index)
        sending.bytes_now()
        server = connection.server
        if sending.is_shared or not sending.attempts:
            server.replied()
        for attempt in sending.attempts:
            if server.sent(attempt, self.now):
                self._finalise(connection, attempt)

    def _finalise(self, connection: Connection, attempt: Attempt) -> None:
        held = connection.held.pop(attempt.number)
        held.finalised += 1
        self.finalised.append(held)
        if attempt.delivered:
            if held.lease.mark_consumed():
                self._note_consumed(held.key)
        else:
            held.lease.release_reading()

    def _note_consumed(self, key: Key) -> None:
        assert any(key in client.delivered or key in client.discarded for client in self.clients), (
            "consumed, and no client has it"
        )
        self.consumed.add(key)

    # --- Ends of connections ---

    def cut(self, connection: Connection) -> None:
        """Nothing passes any more; what is on its way is lost."""
        connection.is_cut = True
        connection.frames.clear()
        connection.answers.clear()

    def client_notices(self, connection: Connection) -> None:
        """It closes its end, and owes what no answer has proved."""
        if connection.client_knows:
            return
        self.cut(connection)
        connection.client_knows = True
        connection.session.close()
        connection.client.owed.update({(name.slot, name.generation): name for name in connection.session.owed()})
        connection.client.connections.remove(connection)

    def server_notices(self, connection: Connection) -> None:
        """It closes its end: every attempt is finalised, as far as its end is known."""
        if connection.server_knows:
            return
        self.cut(connection)
        connection.server_knows = True
        for sending in connection.sending:
            sending.bytes_now()
        for several in (connection.server.in_flight, connection.server.leaving):
            for attempt in several.values():
                self._finalise(connection, attempt)
        assert not connection.held

    def server_dies(self) -> None:
        """Its slots are reclaimed, whatever it knew of their ends.

        An end that it had heard, of a message that had not left, is forgotten though a later answer may have proved it.
        """
        for connection in self.connections:
            if connection.server_knows:
                continue
            self.cut(connection)
            connection.server_knows = True
            leaving = connection.server.leaving.values()
            self.forgotten |= {(attempt.slot, attempt.generation) for attempt in leaving if attempt.delivered}
            for held in connection.held.values():
                held.finalised += 1
                self.finalised.append(held)
                held.lease.release_reading()
            connection.held.clear()

    def is_open(self, connection: Connection) -> bool:
        """Whether the client may ask for payloads on it."""
        return not connection.client_knows and connection.session.is_open

    def is_quiet(self, connection: Connection) -> bool:
        """Whether nothing is on its way."""
        return not (connection.frames or connection.answers or connection.sending or connection.session.ends)

    def check(self) -> None:
        """What must hold between any two steps."""
        self.connections = [one for one in self.connections if not (one.client_knows and one.server_knows)]
        window = self.source.window
        for connection in self.connections:
            server, session = connection.server, connection.session
            assert server.phase is not Phase.CLOSING
            assert not session.broken
            for is_taken in (False, True):
                attempts = server.in_flight.values()
                sizes = [one.nbytes for one in attempts if (one in connection.taken) is is_taken]
                assert len(sizes) <= window.attempts
                if not is_taken:
                    assert sum(sizes) <= window.nbytes or len(sizes) == 1
            if not connection.server_knows:
                assert set(connection.held) == set(server.in_flight) | set(server.leaving)
        assert all(held.finalised == 1 for held in self.finalised)
        self.finalised.clear()
