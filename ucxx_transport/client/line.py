"""A line: one endpoint to a server's port and the client's half of its protocol, opened and greeted.

It is open once the schema of the ring behind it is known. Everything here runs in the thread that runs the reactor.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from ucxx_transport.client.ports import PortKey
from ucxx_transport.errors import PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.base import DATA_PORT_SILENT, loopback_hint
from ucxx_transport.schema import Schema
from ucxx_transport.wire.client_side import ClientSession
from ucxx_transport.wire.frames import MAX_CHANNEL, NONCE_BYTES

if TYPE_CHECKING:
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import Operation
    from ucxx_transport.link.endpoint import Endpoint
    from ucxx_transport.link.reactor import Reactor, Timer
    from ucxx_transport.wire.actions import Asked


OWN_DELAY_S: Final = 0.05
"""A timer that is called so much later than it was due says that the reactor was not run: no fault of the port's."""


class Line(ABC):
    """See the module. It is the endpoint's `EndpointEvents`.

    Attributes:
        key: where it leads to.
        session: what to send, and what answers mean.
        endpoint: once it is being opened.
        is_open: whether the handshake is over.
        closed: whether it is.
        rested: whether it has lain idle, and nothing has been answered since.
        schemas: by fingerprint, those of the rings behind all lines so far.
    """

    def __init__(
        self, config: ClientConfig, reactor: Reactor, reader: int, schemas: dict[int, Schema | None], key: PortKey
    ) -> None:
        self.key = key
        self.schemas = schemas
        self.session = ClientSession(reader=reader, nonce=secrets.token_bytes(NONCE_BYTES), token=config.token_bytes)
        self.endpoint: Endpoint | None = None
        self.is_open = False
        self.closed = False
        self.rested = False
        self._connect_timeout_s = config.connect_timeout_s
        self._reactor = reactor
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

    def connected(self) -> None:  # noqa: B027 - of the endpoint's events, and not to be overridden
        """See `EndpointEvents`: the handshake's frames are under way already."""

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
        due_s = self._reactor.now() + self._connect_timeout_s
        self._timer = self._reactor.call_at(due_s, partial(self._too_slow_to_open, due_s))

    def stop_timer(self) -> None:
        """It is open, or closed: connecting takes no more time."""
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
        self.ask(self.session.hello(), self._welcomed)

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

    def _welcomed(self, _: Asked, answer: memoryview) -> None:
        challenge = self.session.on_welcome(answer)
        if challenge is None:
            self._greeted()
        else:
            self.ask(challenge, self._authenticated)

    def _authenticated(self, _: Asked, answer: memoryview) -> None:
        self.session.on_authenticated(answer)
        self._greeted()

    def _greeted(self) -> None:
        session = self.session
        if session.fingerprint not in self.schemas:  # once a schema
            self.ask(session.describe(session.ring_id), self._described)
            return
        self.stop_timer()
        self.is_open = True
        self.opened()

    def _described(self, asked: Asked, answer: memoryview) -> None:
        schema, expected = Schema.from_bytes(self.session.answered(asked.attempt, answer)), self.session.fingerprint
        if schema.fingerprint != expected:
            raise ProtocolError(
                "the server's schema is not the one that its ring names",
                expected=f"{expected:#018x}",
                found=f"{schema.fingerprint:#018x}",
            )
        self.schemas[expected] = schema
        self._greeted()
