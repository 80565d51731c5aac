"""A peer that says exactly what a test wants, and nothing else: bytes in, replies out."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.exchange_rig import HOST, ExchangeRig
from ucxx_transport.schema import SlotRef
from ucxx_transport.testing.memory_link import MemoryEndpoint
from ucxx_transport.wire.codec import decode_header, encode_request
from ucxx_transport.wire.frames import HEADER_BYTES, Ack, Hello, ReadReply, ReadRequest, Request, receive_bytes

__all__ = ["RawPeer", "ack_of", "request_of"]

ROOM_BYTES = receive_bytes(64 << 10)


def request_of(ref: SlotRef, attempt: int = 1) -> ReadRequest:
    """The READ that a proper client would send."""
    return ReadRequest(
        ring_id=ref.ring_id, slot=ref.slot, generation=ref.generation, attempt=attempt, nbytes=ref.nbytes
    )


def ack_of(ref: SlotRef, attempt: int = 1, *, delivered: bool = True) -> Ack:
    """The ACK that a proper client would send."""
    return Ack(slot=ref.slot, generation=ref.generation, attempt=attempt, delivered=delivered)


@dataclass(slots=True, kw_only=True)
class RawPeer:
    """One connection to a server port.

    Attributes:
        endpoint: as the link gave it.
    """

    endpoint: MemoryEndpoint

    @classmethod
    async def connect(cls, rig: ExchangeRig, port: int = 1) -> RawPeer:
        """Connect, and say nothing."""
        return cls(endpoint=await rig.client_link().connect(HOST, port))

    @classmethod
    async def greeted(cls, rig: ExchangeRig, port: int = 1) -> RawPeer:
        """Connect and shake hands, without a token."""
        peer = await cls.connect(rig, port)
        await peer.ask(Hello(reader=5, nonce=bytes(32)))
        return peer

    def say(self, message: bytes | Request) -> None:
        """Send without waiting for an answer."""
        self.endpoint.post_send(message if isinstance(message, bytes) else encode_request(message))

    async def listen(self) -> tuple[ReadReply, bytes]:
        """The next reply: its header, and what follows it."""
        room = bytearray(ROOM_BYTES)
        await self.endpoint.post_receive(room).wait()
        reply = decode_header(room)
        return reply, bytes(room[HEADER_BYTES : HEADER_BYTES + reply.nbytes])

    async def ask(self, message: bytes | Request) -> tuple[ReadReply, bytes]:
        """Send, and wait for the reply."""
        self.say(message)
        return await self.listen()
