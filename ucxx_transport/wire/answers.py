"""What a server's answer means to a client: a payload as promised, a body, or the error that its status stands for."""

from __future__ import annotations

from typing import Final, Protocol, TypeAlias

from ucxx_transport import errors
from ucxx_transport.wire.codec import Message, check_trailer, decode_header, error_text, pack_header, pack_trailer
from ucxx_transport.wire.frames import FLAG_CHECKSUM, HEADER_BYTES, TRAILER_BYTES, TRAILER_MAGIC, ReplyHeader, Status

_ERRORS: Final[dict[Status, tuple[type[errors.TransportError], str]]] = {
    Status.STALE: (errors.StaleSlotError, "the slot no longer holds this payload"),
    Status.NOT_READY: (errors.NotReadyError, "the source is not bound to its ring yet"),
    Status.BUSY: (errors.BusyError, "the server is at a limit"),
    Status.BAD_REQUEST: (errors.ProtocolError, "the server refused the request"),
    Status.UNAUTHORIZED: (errors.AuthenticationError, "the server refused this client"),
    Status.INTERNAL: (errors.PeerLostError, "the server failed inside"),
    Status.EMPTY: (errors.ProtocolError, "the server answered EMPTY to what was no TAKE"),
}
_OK: Final = Status.OK  # an enum's attribute costs 0.3 µs in Python 3.11

Seal: TypeAlias = tuple[bytes, bytes, int, int]
"""Header and trailer of an answer, and from where to where the trailer lies."""


class Named(Protocol):
    """What names a payload and promises how it looks; a `SlotRef` does."""

    @property
    def ring_id(self) -> bytes: ...
    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def checksum(self) -> int | None: ...
    @property
    def fingerprint(self) -> int: ...


def seal_of(named: Named) -> Seal:
    """How the OK answer with this payload begins and ends; to be worked out while it is waited for.

    An answer that has both is one that `refusal_in` has nothing against, found by two comparisons.
    """
    checksum, generation, nbytes = named.checksum, named.generation, named.nbytes
    flags, end = 0 if checksum is None else FLAG_CHECKSUM, HEADER_BYTES + ((nbytes + 7) & ~7)
    header = pack_header(generation, nbytes, checksum or 0, named.ring_id, named.slot, flags, named.fingerprint)
    return header, pack_trailer(TRAILER_MAGIC ^ generation, nbytes), end, end + TRAILER_BYTES


def refusal_in(named: Named, message: Message) -> errors.TransportError | None:
    """Why `message` is not sealed as the payload it should bring.

    Returns:
        The error of a server that refuses it; None where it is that payload and only its checksum was not promised.

    Raises:
        ProtocolError: another name, another length, a missing trailer, or not our protocol.
    """
    header = decode_header(message)
    if header.status is not _OK:
        return error_of(header, message)
    check_trailer(message, header)
    if (header.ring_id, header.slot, header.generation) != (named.ring_id, named.slot, named.generation):
        raise errors.ProtocolError(
            "the server sent another payload than was asked for",
            asked=f"{named.slot}/{named.generation}",
            got=f"{header.slot}/{header.generation}",
        )
    if (header.nbytes, header.fingerprint) != (named.nbytes, named.fingerprint):
        raise errors.ProtocolError(
            "the payload is not what its reference promised",
            promised_bytes=named.nbytes,
            nbytes=header.nbytes,
            promised_fingerprint=named.fingerprint,
            fingerprint=header.fingerprint,
        )
    return None


def body_of(message: Message) -> tuple[ReplyHeader, bytes]:
    """Header and body of an answer that is no payload; no body after a status that is not OK. Raises ProtocolError."""
    header = decode_header(message)
    if header.status is not _OK:
        return header, b""
    check_trailer(message, header)
    return header, bytes(message[HEADER_BYTES : HEADER_BYTES + header.nbytes])


def error_of(header: ReplyHeader, message: Message) -> errors.TransportError:
    """The error that a status stands for, with the server's words."""
    cls, words = _ERRORS[header.status]
    detail = error_text(message, header)
    facts = {"slot": header.slot, "generation": header.generation} if header.generation else {}
    return cls(f"{words}: {detail}" if detail else words, status=header.status.name, **facts)
