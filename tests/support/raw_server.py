"""A UCX server without manners: it answers a client's frames with whatever it is given, on a real port."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ucxx_transport import PeerLostError, SlotRef
from ucxx_transport.link.base import Endpoint
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.wire.codec import decode_request, encode_reply
from ucxx_transport.wire.frames import REQUEST_BYTES, ReadReply, Request, Status

__all__ = ["Behaviour", "RawServer", "payload_of", "raw_server", "reply_to", "welcome"]


class RawServer:
    """One accepted connection, seen from the server's side.

    Args:
        endpoint: the connection. ref: what its client will ask for.
    """

    def __init__(self, endpoint: Endpoint, ref: SlotRef) -> None:
        self.endpoint = endpoint
        self.ref = ref

    async def hear(self) -> Request:
        """The client's next frame."""
        frame = bytearray(REQUEST_BYTES)
        await self.endpoint.post_receive(frame).wait()
        return decode_request(frame)

    async def say(self, message: bytes) -> None:
        """Send one message of any kind."""
        await self.endpoint.post_send(message).wait()

    async def greet(self) -> None:
        """Shake hands properly, without a token."""
        await self.hear()
        await self.say(welcome())

    async def be_asked(self) -> None:
        """Shake hands properly and hear the READ."""
        await self.greet()
        await self.hear()


Behaviour = Callable[[RawServer], Awaitable[None]]


def payload_of(ref: SlotRef) -> bytes:
    """A payload of the right length."""
    return hashlib.shake_128(repr(ref.name).encode()).digest(ref.nbytes)


def welcome(*, nonce_bytes: int = 32, token_required: bool = False) -> bytes:
    """A proper answer to HELLO."""
    body = bytes(nonce_bytes)
    return encode_reply(ReadReply(status=Status.OK, nbytes=len(body), token_required=token_required), body)


def reply_to(ref: SlotRef, **changes: object) -> bytes:
    """A whole and proper answer to READ, but for the `changes` in its header; the body has the length that says."""
    header = ReadReply(
        status=Status.OK,
        nbytes=ref.nbytes,
        ring_id=ref.ring_id,
        slot=ref.slot,
        generation=ref.generation,
        checksum=ref.checksum,
        fingerprint=ref.fingerprint,
    )
    changed = header._replace(**changes)  # type: ignore[arg-type]  # fields of the header, by name
    return encode_reply(changed, payload_of(replace(ref, nbytes=changed.nbytes)))


@dataclass(slots=True)
class Port:
    """Where a raw server listens, and how many connections came."""

    number: int
    connections: int = 0


@asynccontextmanager
async def raw_server(behave: Behaviour, ref: SlotRef) -> AsyncIterator[Port]:
    """Listen on a free port, and treat every connection by `behave`; it then stays open until the client closes it."""
    async with UCXXLink.open() as link, asyncio.TaskGroup() as tasks:

        async def treat(endpoint: Endpoint) -> None:
            with suppress(PeerLostError):  # a client that has had enough hangs up
                await behave(RawServer(endpoint, ref))
                await endpoint.post_receive(bytearray(REQUEST_BYTES)).wait()

        def accept(endpoint: Endpoint) -> None:
            port.connections += 1
            treated.append(tasks.create_task(treat(endpoint)))

        treated: list[asyncio.Task[None]] = []
        port = Port(0)
        listener = await link.listen(0, accept)
        port.number = listener.port
        try:
            yield port
        finally:
            await listener.close()
            for task in treated:
                task.cancel()
