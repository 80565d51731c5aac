"""A line: one endpoint to a server's port and the client's half of its protocol, opened and greeted.

It is open once the schema of the ring behind it is known. Everything here runs in the thread that runs the reactor.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Final

from ucxx_transport.client.ports import PortKey
from ucxx_transport.errors import PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.base import DATA_PORT_SILENT, loopback_hint
from ucxx_transport.schema import Schema
from ucxx_transport.wire.client_side import Asked, ClientSession
from ucxx_transport.wire.frames import MAX_CHANNEL, NONCE_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.link.base import Operation
    from ucxx_transport.link.endpoint import Endpoint
    from ucxx_transport.link.reactor import Timer


OWN_DELAY_S: Final = 0.05
"""A timer that is called so much later than it was due says that the reactor was not run: no fault of the port's."""


class Line(ABC):
    """See the module. It is the endpoint's `EndpointEvents`.

    Attributes:
        pool: it is one of these. key: where it leads to.
        rested: whether it has lain idle, and nothing has been answered since.
    """

    def __init__(self, pool: Connections, key: PortKey) -> None:
        self.pool = pool
        self.key = key
        self.schemas = pool.schemas
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.session = ClientSession(reader=pool.reader, nonce=nonce, token=pool.config.token_bytes)
        self.endpoint: Endpoint | None = None
        self.is_open = False
        self.closed = False
        self.rested = False
        self._reactor = pool.reactor
        self._timer: Timer | None = None

    @abstractmethod
    def opened(self) -> None:
        """The handshake is over."""

    @abstractmethod
    def fail(self, error: TransportError) -> None:
        """It is of no use any more."""

    def start(self) -> None:
        """Connect, and shake hands."""
        if not self.closed:
            self._start_timer()
            self._reactor.resolve(self.key[0], self._resolved)

    def lost(self, error: TransportError) -> None:
        """See `EndpointEvents`."""
        self.fail(error)

    def ask(self, asked: Asked, on_answer: Callable[[Asked, memoryview], None]) -> None:
        """Send a frame whose answer is small, and of which nothing is reused."""
        answer = memoryview(bytearray(asked.receive_bytes))

        def arrived(operation: Operation) -> None:
            if self.closed:
                return
            if operation.error is not None:
                self.fail(operation.error)
                return
            self.rested = False
            try:
                on_answer(asked, answer)
            except TransportError as error:
                self.fail(error)

        endpoint = self.endpoint
        assert endpoint is not None
        try:
            endpoint.post_receive(answer, arrived, channel=asked.attempt & MAX_CHANNEL)
            endpoint.post_send(asked.frame)
        except TransportError as error:
            self.fail(error)

    def _start_timer(self) -> None:
        due_s = self._reactor.now() + self.pool.config.connect_timeout_s
        self._timer = self._reactor.call_at(due_s, partial(self._too_slow_to_open, due_s))

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resolved(self, address: str | PeerLostError) -> None:
        if self.closed:
            return
        if isinstance(address, PeerLostError):
            self.fail(address)
            return
        try:
            self.endpoint = self._reactor.link.connect(address, self.key[1], self)
        except TransportError as error:
            self.fail(error)
            return
        self._go_on(self._handshake())

    def _too_slow_to_open(self, due_s: float) -> None:
        if self._reactor.now() - due_s > OWN_DELAY_S:
            self._start_timer()  # this client has not looked meanwhile, and may have its answer
            return
        endpoint = self.endpoint
        host, port = self.key
        if endpoint is not None and endpoint.listener_has_answered():
            words = DATA_PORT_SILENT
        else:
            hint = loopback_hint(host)
            words = f"no answer to the handshake within connect_timeout_s; is a ucxx_transport server there?{hint}"
        self.fail(PeerLostError(words, host=host, port=port, reason="unreachable"))

    def _handshake(self) -> Generator[Asked, memoryview, None]:
        """Each of its frames, for which it gets the answer."""
        session, schemas = self.session, self.schemas
        challenge = session.on_welcome((yield session.hello()))
        if challenge is not None:
            session.on_authenticated((yield challenge))
        expected = session.fingerprint
        if expected not in schemas:  # once a schema
            asked = session.describe(session.ring_id)
            schema = Schema.from_bytes(session.answered(asked.attempt, (yield asked)))
            if schema.fingerprint != expected:
                raise ProtocolError(
                    "the server's schema is not the one that its ring names",
                    expected=f"{expected:#018x}",
                    found=f"{schema.fingerprint:#018x}",
                )
            schemas[expected] = schema

    def _go_on(self, handshake: Generator[Asked, memoryview, None], answer: memoryview | None = None) -> None:
        try:
            asked = next(handshake) if answer is None else handshake.send(answer)
        except StopIteration:
            self.stop_timer()
            self.is_open = True
            self.opened()
        else:
            self.ask(asked, lambda _, answer: self._go_on(handshake, answer))
