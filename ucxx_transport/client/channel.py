"""One connection of a client to one server port: opened, greeted, used for one exchange at a time."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from ucxx_transport.client.exchange import (
    DESCRIBE_RECEIVE_BYTES,
    HANDSHAKE_RECEIVE_BYTES,
    Handshake,
    ReadExchange,
    bye_request,
    check_ok,
    describe_request,
    described,
)
from ucxx_transport.wire.frames import NONCE_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.ports import PortKey
    from ucxx_transport.link.base import Endpoint, Link


class Channel:
    """An endpoint behind its handshake.

    Attributes:
        key: the (address, port) it leads to.
        unsettled: the last delivered exchange, as long as no later answer has proved that its acknowledgement arrived.
    """

    __slots__ = ("_endpoint", "key", "unsettled")

    def __init__(self, endpoint: Endpoint, key: PortKey) -> None:
        self._endpoint = endpoint
        self.key = key
        self.unsettled: ReadExchange | None = None

    @classmethod
    async def open(cls, link: Link, key: PortKey, *, reader: int, token: bytes | None) -> Channel:
        """Connect and shake hands; bound it by a timeout.

        Raises:
            PeerLostError: nothing answers there. BusyError: the port is at its limit.
            ProtocolError: something else answers there. AuthenticationError: wrong or missing token, on either side.
        """
        endpoint = await link.connect(*key)
        channel = cls(endpoint, key)
        try:
            handshake = Handshake(reader=reader, nonce=secrets.token_bytes(NONCE_BYTES), token=token)
            auth = handshake.welcome(await channel.ask(handshake.hello(), HANDSHAKE_RECEIVE_BYTES))
            if auth is not None:
                handshake.authenticated(await channel.ask(auth, HANDSHAKE_RECEIVE_BYTES))
        except BaseException:
            await endpoint.close()
            raise
        return channel

    @property
    def alive(self) -> bool:
        """Whether the connection is believed to work."""
        return self._endpoint.alive

    async def ask(self, frame: bytes, receive_nbytes: int) -> bytearray:
        """Send a frame and return the answer; for small messages of which nothing must be reused."""
        answer = bytearray(receive_nbytes)
        arriving = self._endpoint.post_receive(answer)
        self._endpoint.post_send(frame)
        await arriving.wait()
        return answer

    async def fetch(self, exchange: ReadExchange, message: memoryview, until_s: float) -> None:
        """Ask for a payload and wait until the whole answer lies in `message`, posted first, or `until_s` has come."""
        arriving = self._endpoint.post_receive(message)
        self._endpoint.post_send(exchange.request())
        await arriving.wait(until_s)
        self.unsettled = None  # the server answered, so it has handled every frame before

    def acknowledge(self, exchange: ReadExchange, *, delivered: bool) -> None:
        """End an attempt, without waiting for this to be sent. A PeerLostError: the connection is gone already."""
        if delivered:
            self.unsettled = exchange
        self._endpoint.post_send(exchange.ack(delivered=delivered))

    async def describe(self, ring_id: bytes) -> bytes:
        """The schema of the ring behind this connection, as msgpack."""
        return described(await self.ask(describe_request(ring_id), DESCRIBE_RECEIVE_BYTES))

    async def confirm(self, exchange: ReadExchange) -> None:
        """Say again that a payload arrived, after its connection was lost. A StaleSlotError: it was settled already."""
        check_ok(await self.ask(exchange.confirm(), HANDSHAKE_RECEIVE_BYTES))

    async def say_goodbye(self) -> None:
        """Wait until the server has handled everything this side sent; bound it by a timeout."""
        check_ok(await self.ask(bye_request(), HANDSHAKE_RECEIVE_BYTES))
        self.unsettled = None

    async def close(self) -> bool:
        """Close; True once no buffer of this connection is touched any more."""
        return await self._endpoint.close()
