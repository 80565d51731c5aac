"""A UCX peer without manners: it sends whatever frames it is given, on a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ucxx_transport import SlotRef
from ucxx_transport.link.base import Endpoint
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.wire.codec import decode_header, encode_request, error_text
from ucxx_transport.wire.frames import Ack, Hello, ReadReply, ReadRequest, receive_bytes

__all__ = ["RawPeer", "raw_peer", "request_of"]

NONCE = bytes(range(32))


class RawPeer:
    """One connection to a server; the handshake of the link is done, nothing else.

    Args:
        endpoint: the connection.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def send(self, frame: bytes) -> None:
        """Send one message of any length."""
        await self.endpoint.post_send(frame).wait()

    async def receive(self, body_bytes: int = 0) -> tuple[ReadReply, str]:
        """The next reply, and the text of its error; fails with `PeerLostError` once the server has hung up.

        Args:
            body_bytes: of the longest body to expect.
        """
        message = bytearray(receive_bytes(max(body_bytes, 4096)))
        await self.endpoint.post_receive(message).wait()
        reply = decode_header(message)
        return reply, error_text(message, reply) if reply.status else ""

    async def ask(self, frame: bytes, body_bytes: int = 0) -> tuple[ReadReply, str]:
        """`send`, then `receive`."""
        await self.send(frame)
        return await self.receive(body_bytes)

    async def greet(self, reader: int = 7) -> ReadReply:
        """HELLO, properly."""
        return (await self.ask(encode_request(Hello(reader=reader, nonce=NONCE))))[0]

    async def read(self, ref: SlotRef, attempt: int = 1) -> tuple[ReadReply, str]:
        """READ, properly; no acknowledgement."""
        return await self.ask(encode_request(request_of(ref, attempt)), ref.nbytes)

    async def acknowledge(self, ref: SlotRef, attempt: int = 1, *, delivered: bool = True) -> None:
        """ACK, properly."""
        ack = Ack(slot=ref.slot, generation=ref.generation, attempt=attempt, delivered=delivered)
        await self.send(encode_request(ack))

    async def wait_for_hang_up(self) -> None:
        """Return when the server has closed the connection; `PeerLostError` is how that shows."""
        while True:
            await self.endpoint.post_receive(bytearray(4096)).wait()


def request_of(ref: SlotRef, attempt: int = 1) -> ReadRequest:
    """The READ of a reference."""
    return ReadRequest(
        ring_id=ref.ring_id, slot=ref.slot, generation=ref.generation, attempt=attempt, nbytes=ref.nbytes
    )


@asynccontextmanager
async def raw_peer(port: int, host: str = "127.0.0.1") -> AsyncIterator[RawPeer]:
    """A connection of a link of its own."""
    async with UCXXLink.open() as link:
        endpoint = await link.connect(host, port)
        try:
            yield RawPeer(endpoint)
        finally:
            await endpoint.close()
