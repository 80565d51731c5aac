"""Bytes to frames and back, and what an answer means: a payload as promised, a body, or the error of its status.

Every word of a peer is range-checked as an unsigned number before it is used. Encoders return immutable bytes or write
into memory the caller owns; decoders raise `ProtocolError` and nothing else. No allocation is sized by a word of a
peer: the lengths in a frame are bounded by the buffer that it came in.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

from ucxx_transport import errors
from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire import frames
from ucxx_transport.wire.frames import HEADER_BYTES, TRAILER_BYTES, VERSION, Frame, Kind, ReplyHeader, Status

if TYPE_CHECKING:
    from ucxx_transport.schema import SlotRef

Message = bytes | bytearray | memoryview
Seal: TypeAlias = tuple[bytes, bytes, int, int]
"""Header and trailer of an answer, and from where to where the trailer lies."""

_HEAD: Final = struct.Struct("<IHHQ16sHHIQQII32s")
_HEADS: Final = tuple(struct.Struct(_HEAD.format + "IIQQQ" * count) for count in range(frames.MAX_NAMES + 1))
_HEADER: Final = struct.Struct("<IHHQQQ16sIIQ")
_TRAILER: Final = struct.Struct("<QQ")
_NAME: Final = struct.Struct("<IIQQQ")
_ENDS: Final = tuple(struct.Struct(f"<{count + 1}Q") for count in range(frames.MAX_ENDS + 1))  # and the end mark
_OFFER: Final = struct.Struct("<II")
_WELCOME: Final = struct.Struct(f"<{frames.NONCE_BYTES}sIIQ")
WELCOME_BYTES: Final = _WELCOME.size
_OFFERED: Final = struct.Struct("<IIQQQQQ")
_ERRORS: Final[dict[Status, tuple[type[errors.TransportError], str]]] = {
    Status.STALE: (errors.StaleSlotError, "the slot no longer holds this payload"),
    Status.NOT_READY: (errors.NotReadyError, "the source is not bound to its ring yet"),
    Status.BUSY: (errors.BusyError, "the server is at a limit"),
    Status.BAD_REQUEST: (ProtocolError, "the server refused the request"),
    Status.UNAUTHORIZED: (errors.AuthenticationError, "the server refused this client"),
    Status.INTERNAL: (errors.PeerLostError, "the server failed inside"),
    Status.EMPTY: (ProtocolError, "the server answered EMPTY to what was no TAKE"),
}
"""What each status stands for at the client; of the server's errors a status is the first one whose class fits."""
_STATUSES: Final = {int(status): status for status in Status}
# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_OK: Final = Status.OK
_FETCH, _TAKE = int(Kind.FETCH), int(Kind.TAKE)
# The frames of a client that reads one by one, in one call each that is none in Python.
pack_one_name: Final = partial(struct.Struct("<IHHQ16sHH60xI4xQQQQ").pack, frames.REQUEST_MAGIC, VERSION, _FETCH)
"""A FETCH of one name: sequence, ring_id, 1, 0, slot, generation, attempt, nbytes, end mark."""
pack_one_end: Final = partial(struct.Struct("<IHHQ16sHH60xQQ").pack, frames.REQUEST_MAGIC, VERSION, _FETCH)
"""A FETCH of one end: sequence, ring_id, 0, 1, end, end mark."""
glance: Final = struct.Struct("<QQ16sQ56x5Q").unpack_from
"""Such frames at the server: `FETCH_HEAD`, sequence, ring_id, `ONE_NAME`, slot, generation, attempt, nbytes, end mark;
or `FETCH_HEAD`, sequence, ring_id, `ONE_END`, end, end mark, and nothing."""
FETCH_HEAD: Final = frames.REQUEST_MAGIC | VERSION << 32 | _FETCH << 48
ONE_NAME, ONE_END = 1, 1 << 16
clear_trailer: Final = struct.Struct(f"{TRAILER_BYTES}x").pack_into
"""Before a receive is posted: forget the trailer that an earlier answer left in a pooled buffer, at its offset; what is
cut short brings no other."""
pack_header: Final = partial(_HEADER.pack, frames.REPLY_MAGIC, VERSION, 0)
"""The header of a payload: generation, nbytes, checksum, ring_id, slot, flags, fingerprint."""
pack_trailer: Final = _TRAILER.pack  # its trailer: `TRAILER_MAGIC` ^ generation, nbytes


def encode_frame(frame: Frame) -> bytes:
    """Any frame."""
    kind, sequence, ring_id, *words, names, ends = frame
    head = (frames.REQUEST_MAGIC, VERSION, kind, sequence, ring_id, len(names), len(ends), *words)
    tail = _ENDS[len(ends)].pack(*ends, frames.END_MARK ^ sequence)
    return _HEADS[len(names)].pack(*head, *chain.from_iterable(names)) + tail


def decode_frame(buffer: Message) -> Frame:
    """The frame at the start of `buffer`, or a ProtocolError: one of its words is not as the table says."""
    if len(buffer) < frames.FRAME_HEAD_BYTES + 8:
        raise ProtocolError("a frame is shorter than its head", nbytes=len(buffer), expected=frames.FRAME_HEAD_BYTES)
    magic, version, kind, sequence, ring_id, named, ended, flags, attempt, word, count, wait_ms, secret = (
        _HEAD.unpack_from(buffer)
    )
    if magic != frames.REQUEST_MAGIC:
        raise ProtocolError("not a ucxx_transport frame", magic=f"{magic:#010x}")
    if version != VERSION:
        message = f"the client speaks protocol version {version}, this side {VERSION}; install one release on both"
        raise ProtocolError(message, version=version)
    tail = frames.FRAME_HEAD_BYTES + named * frames.NAME_BYTES
    if named > frames.MAX_NAMES or ended > frames.MAX_ENDS or len(buffer) < tail + 8 * ended + 8:
        raise ProtocolError("a frame has more names or ends than it may", names=named, ends=ended)
    ends = _ENDS[ended].unpack_from(buffer, tail)
    if ends[-1] != frames.END_MARK ^ sequence:
        raise ProtocolError("a frame was cut short", kind=kind, sequence=sequence)
    names = tuple(_NAME.iter_unpack(memoryview(buffer)[frames.FRAME_HEAD_BYTES : tail]))
    for name in names:
        _, zero, generation, number, nbytes = name
        if zero or generation == 0 or number > frames.MAX_ATTEMPT or nbytes > frames.MAX_BODY_BYTES:
            raise ProtocolError("a frame names what no payload is; send a reference that a ring made", name=name)
    frame = Frame(kind, sequence, ring_id, flags, attempt, word, count, wait_ms, secret, names, ends[:-1])
    if kind != _FETCH or flags:  # else the words are blank
        _check_words(frame)
    return frame


_BLANK, _U32, _U64, _SEVERAL = range(1), range(1 << 32), range(1 << 64), range(1, frames.MAX_NAMES + 1)
_RANGES: Final[dict[int, tuple[range, ...]]] = {
    # of how many names there are, flags, word, payloads, wait
    Kind.HELLO: (_BLANK, _BLANK, range(1, frames.MAX_READER + 1), _U32, _U32),
    Kind.FETCH: (range(2, frames.MAX_NAMES + 1), range(2), _U64, _U32, _U32),  # one whose answers share a message
    Kind.TAKE: (_BLANK, range(2), range(frames.MAX_BODY_BYTES + 1), _SEVERAL, range(frames.MAX_WAIT_MS + 1)),
    Kind.CONFIRM: (_SEVERAL, _BLANK, _U64, _U32, _U32),
    **dict.fromkeys((Kind.AUTH, Kind.DESCRIBE, Kind.BYE), (_BLANK, _BLANK, _U64, _U32, _U32)),
}


def _check_words(frame: Frame) -> None:
    """What is particular to a kind; a plain FETCH has nothing of it."""
    kind, names, flags, attempt = frame.kind, frame.names, frame.flags, frame.attempt
    ranges = _RANGES.get(kind)
    if ranges is None:
        raise ProtocolError("unknown kind of frame", kind=kind)
    words = (len(names), flags, frame.word, frame.max_payloads, frame.wait_ms)
    if not all(word in allowed for word, allowed in zip(words, ranges, strict=True)):
        raise ProtocolError("a frame has words that its kind may not have", kind=kind, names=len(names), flags=flags)
    last = attempt + frame.max_payloads if kind == _TAKE else attempt
    if not 0 < attempt <= last <= frames.MAX_ATTEMPT or attempt >> 16 != last >> 16 or not attempt & frames.MAX_CHANNEL:
        raise ProtocolError("an attempt is out of range, or of no channel", attempt=attempt, last=last)
    if kind == _FETCH and sum([frames.message_bytes(name[4]) for name in names]) > frames.PACK_BYTES:
        raise ProtocolError(f"answers of at most {frames.PACK_BYTES} bytes together share a message", names=len(names))


def answer_channel(buffer: Message) -> int:
    """Where the client of a faulty frame may listen: on its attempt's or first name's channel, else on 1, a HELLO's."""
    magic, version, kind, _, _, named, _, flags, attempt, *_ = _HEAD.unpack_from(buffer)
    if magic != frames.REQUEST_MAGIC or version != VERSION:
        return 1
    if kind == _FETCH and not flags:
        attempt = named and glance(buffer)[6]
    return attempt & frames.MAX_CHANNEL or 1


def encode_header(header: ReplyHeader) -> bytes:
    """The 64 bytes of a header."""
    status, nbytes, ring_id, slot, generation, checksum, fingerprint, token_required = header
    flags = frames.FLAG_CHECKSUM * (checksum is not None) | frames.FLAG_TOKEN_REQUIRED * token_required
    return _HEADER.pack(
        frames.REPLY_MAGIC, VERSION, status, generation, nbytes, checksum or 0, ring_id, slot, flags, fingerprint
    )


def encode_reply(header: ReplyHeader, body: bytes = b"") -> bytes:
    """A whole OK answer with a small body."""
    trailer = pack_trailer(frames.TRAILER_MAGIC ^ header.generation, header.nbytes)
    return encode_header(header) + body + bytes(-len(body) % 8) + trailer


def encode_error(
    status: Status, text: str, *, slot: int = 0, generation: int = 0, room: int = HEADER_BYTES + frames.ERROR_TEXT_BYTES
) -> bytes:
    """An answer that carries no body: the header and the text, as much of it as 1024 bytes and the room hold."""
    words = text.encode("utf-8", "replace")[: min(frames.ERROR_TEXT_BYTES, room - HEADER_BYTES)]
    return encode_header(ReplyHeader(status=status, nbytes=len(words), slot=slot, generation=generation)) + words


def decode_header(buffer: Message) -> ReplyHeader:
    """The header in the first 64 bytes of `buffer`; a ProtocolError: a word of it is not as the table says."""
    if len(buffer) < HEADER_BYTES:
        raise ProtocolError("an answer is shorter than its header", nbytes=len(buffer), expected=HEADER_BYTES)
    magic, version, code, generation, nbytes, checksum, ring_id, slot, flags, fingerprint = _HEADER.unpack_from(buffer)
    if magic != frames.REPLY_MAGIC:
        raise ProtocolError("not an answer of ucxx_transport", magic=f"{magic:#010x}")
    if version != VERSION:
        message = f"the server speaks protocol version {version}, this side {VERSION}; install one release on both"
        raise ProtocolError(message, version=version)
    status = _STATUSES.get(code)
    if status is None:
        raise ProtocolError("unknown status in an answer", status=code)
    limit = frames.MAX_BODY_BYTES if status is _OK else frames.ERROR_TEXT_BYTES
    if nbytes > limit:
        raise ProtocolError("an answer claims more bytes than its kind may have", nbytes=nbytes, limit=limit)
    there, token_required = checksum if flags & frames.FLAG_CHECKSUM else None, bool(flags & frames.FLAG_TOKEN_REQUIRED)
    return ReplyHeader(status, nbytes, ring_id, slot, generation, there, fingerprint, token_required)


def error_text(buffer: Message, header: ReplyHeader) -> str:
    """The text after the header of an answer that is not OK; printable, at most 1024 bytes of it."""
    text = bytes(buffer[HEADER_BYTES : HEADER_BYTES + header.nbytes]).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def check_trailer(buffer: Message, header: ReplyHeader) -> None:
    """Verify that the body arrived to its end; a ProtocolError where the message was shorter than its header says."""
    end = frames.message_bytes(header.nbytes) - TRAILER_BYTES
    if len(buffer) < end + TRAILER_BYTES:
        raise ProtocolError("an answer claims more bytes than were posted for it", nbytes=header.nbytes)
    mark, nbytes = _TRAILER.unpack_from(buffer, end)
    if mark != frames.TRAILER_MAGIC ^ header.generation or nbytes != header.nbytes:
        raise ProtocolError("an answer was cut short: its trailer is missing", nbytes=header.nbytes)


def seal_of(ref: SlotRef) -> Seal:
    """How the OK answer with this payload begins and ends: `refusal_in` has nothing against one that has both."""
    checksum, generation, nbytes = ref.checksum, ref.generation, ref.nbytes
    flags, end = 0 if checksum is None else frames.FLAG_CHECKSUM, HEADER_BYTES + ((nbytes + 7) & ~7)
    header = pack_header(generation, nbytes, checksum or 0, ref.ring_id, ref.slot, flags, ref.fingerprint)
    return header, pack_trailer(frames.TRAILER_MAGIC ^ generation, nbytes), end, end + TRAILER_BYTES


def refusal_in(ref: SlotRef, message: Message) -> errors.TransportError | None:
    """The error of a server that refuses the payload; None where it is there, and only its checksum was not promised.

    A ProtocolError: another name, another length, a missing trailer, or not our protocol.
    """
    header = decode_header(message)
    if header.status is not _OK:
        return error_of(header, message)
    check_trailer(message, header)
    if (header.ring_id, header.slot, header.generation) != (ref.ring_id, ref.slot, ref.generation):
        asked, got = f"{ref.slot}/{ref.generation}", f"{header.slot}/{header.generation}"
        raise ProtocolError("the server sent another payload than was asked for", asked=asked, got=got)
    if (header.nbytes, header.fingerprint) != (ref.nbytes, ref.fingerprint):
        raise ProtocolError(
            "the payload is not what its reference promised",
            promised_bytes=ref.nbytes,
            nbytes=header.nbytes,
            promised_fingerprint=ref.fingerprint,
            fingerprint=header.fingerprint,
        )
    return None


def error_of(header: ReplyHeader, message: Message) -> errors.TransportError:
    """The error that a status stands for, with the server's words."""
    cls, words = _ERRORS[header.status]
    detail = error_text(message, header)
    facts = {"slot": header.slot, "generation": header.generation} if header.generation else {}
    return cls(f"{words}: {detail}" if detail else words, status=header.status.name, **facts)


def status_of(error: errors.TransportError) -> Status:
    """What an error is called on the wire: the status that its class is at the client, if it is one."""
    for status, (cls, _) in _ERRORS.items():
        if isinstance(error, cls):
            return status
    if isinstance(error, errors.SlotError):
        return Status.BAD_REQUEST
    return Status.BUSY if error.retryable else Status.INTERNAL


def encode_offer(payloads: Sequence[frames.OfferedPayload]) -> bytes:
    """The body of the answer to a TAKE."""
    rows, envelopes = [_OFFER.pack(len(payloads), 0)], []
    for slot, generation, nbytes, checksum, time_ns, envelope in payloads:
        flags = 0 if checksum is None else frames.FLAG_CHECKSUM
        rows.append(_OFFERED.pack(slot, len(envelope), generation, nbytes, checksum or 0, flags, time_ns))
        envelopes.append(envelope)
    return b"".join(rows + envelopes)


def decode_offer(body: Message) -> list[frames.OfferedPayload]:
    """What a server has picked; a ProtocolError where its lengths do not add up."""
    if len(body) < _OFFER.size:
        raise ProtocolError("an offer is shorter than its head", nbytes=len(body))
    count, _ = _OFFER.unpack_from(body)
    end = _OFFER.size + count * frames.OFFERED_BYTES
    if not 0 < count <= frames.MAX_NAMES or len(body) < end:
        raise ProtocolError("an offer has more or fewer payloads than it may", count=count)
    payloads = []
    # All at once: an iterator over a view, in the frames of an error that is garbage in a cycle, crashes CPython.
    rows = tuple(_OFFERED.iter_unpack(memoryview(body)[_OFFER.size : end]))
    for slot, length, generation, nbytes, checksum, flags, time_ns in rows:
        start, end = end, end + length
        if generation == 0 or nbytes > frames.MAX_BODY_BYTES or length > frames.MAX_ENVELOPE_BYTES or len(body) < end:
            raise ProtocolError("an offered payload is out of range", slot=slot, nbytes=nbytes, envelope=length)
        there = checksum if flags & frames.FLAG_CHECKSUM else None
        payloads.append(frames.OfferedPayload(slot, generation, nbytes, there, time_ns, bytes(body[start:end])))
    if end != len(body):
        raise ProtocolError("an offer is longer than its envelopes", nbytes=len(body), expected=end)
    return payloads


def token_mac(token: bytes, role: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """HMAC-SHA256 over the role of who sends it ("client" or "server") and both nonces.

    The token never travels, and a mac can be neither reflected nor replayed.
    """
    text = b"ucxx_transport/2 " + role.encode() + b"\0" + client_nonce + server_nonce
    return hmac.new(token, text, hashlib.sha256).digest()


def pack_welcome(nonce: bytes, window: frames.Window) -> bytes:
    """The body of the answer to HELLO."""
    return _WELCOME.pack(nonce, window.attempts, 0, window.nbytes)


def unpack_welcome(body: bytes) -> tuple[bytes, frames.Window]:
    """The server's nonce, and what it grants; a ProtocolError where this is no welcome."""
    if len(body) != WELCOME_BYTES:
        raise ProtocolError("a welcome has a wrong length", nbytes=len(body), expected=WELCOME_BYTES)
    nonce, attempts, _, nbytes = _WELCOME.unpack(body)
    if not 0 < attempts <= frames.MAX_NAMES or nbytes == 0:
        raise ProtocolError("a welcome grants no possible window", attempts=attempts, nbytes=nbytes)
    return nonce, frames.Window(attempts, nbytes)
