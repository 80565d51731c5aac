"""Bytes to frames and back. Every word of a peer is range-checked as an unsigned number before it is used.

Encoders return immutable bytes or write into memory the caller owns; decoders raise `ProtocolError` and nothing else.
No allocation is sized by a word of a peer: the lengths in a frame are bounded by the buffer that it came in.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial
from typing import Final

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.frames import (
    END_BYTES,
    END_MARK,
    ERROR_TEXT_BYTES,
    FLAG_CHECKSUM,
    FLAG_NEWEST,
    FLAG_PACKED,
    FLAG_TOKEN_REQUIRED,
    FRAME_HEAD_BYTES,
    HEADER_BYTES,
    MAX_ATTEMPT,
    MAX_BODY_BYTES,
    MAX_CHANNEL,
    MAX_ENDS,
    MAX_ENVELOPE_BYTES,
    MAX_NAMES,
    MAX_READER,
    MAX_WAIT_MS,
    NAME_BYTES,
    OFFERED_BYTES,
    PACK_BYTES,
    REPLY_MAGIC,
    REQUEST_MAGIC,
    TRAILER_BYTES,
    TRAILER_MAGIC,
    VERSION,
    Frame,
    Kind,
    OfferedPayload,
    ReplyHeader,
    Status,
    message_bytes,
    padded,
)

Message = bytes | bytearray | memoryview

_HEAD: Final = struct.Struct("<IHHQ16sHHIQQII32s")
_HEADER: Final = struct.Struct("<IHHQQQ16sIIQ")
_TRAILER: Final = struct.Struct("<QQ")
_NAME: Final = struct.Struct("<IIQQQ")
_END: Final = struct.Struct("<Q")
_FETCHES: Final = tuple(struct.Struct("<IHHQ16sHHIQ48x" + "IIQQQ" * count) for count in range(MAX_NAMES + 1))
_ENDS: Final = tuple(struct.Struct(f"<{count + 1}Q") for count in range(MAX_ENDS + 1))  # and the end mark
_OFFER: Final = struct.Struct("<II")
_OFFERED: Final = struct.Struct("<IIQQQQQ")
_U64: Final = (1 << 64) - 1
_new: Final = tuple.__new__
_STATUSES: Final = {int(status): status for status in Status}
# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_OK: Final = Status.OK
_HELLO, _FETCH, _TAKE, _CONFIRM, _BYE = map(int, (Kind.HELLO, Kind.FETCH, Kind.TAKE, Kind.CONFIRM, Kind.BYE))
# The frames of a client that reads one by one, in one call each that is none in Python.
pack_one_name: Final = partial(struct.Struct("<IHHQ16sHH60xI4xQQQQ").pack, REQUEST_MAGIC, VERSION, _FETCH)
"""A FETCH of one name: sequence, ring_id, 1, 0, slot, generation, attempt, nbytes, end mark."""
pack_one_end: Final = partial(struct.Struct("<IHHQ16sHH60xQQ").pack, REQUEST_MAGIC, VERSION, _FETCH)
"""A FETCH of one end: sequence, ring_id, 0, 1, end, end mark."""
clear_header: Final = struct.Struct(f"{HEADER_BYTES}x").pack_into
clear_trailer: Final = struct.Struct(f"{TRAILER_BYTES}x").pack_into
"""`clear_ends` in two calls that are none in Python."""
pack_header: Final = partial(_HEADER.pack, REPLY_MAGIC, VERSION, 0)
"""The header of a payload: generation, nbytes, checksum, ring_id, slot, flags, fingerprint."""
pack_trailer: Final = _TRAILER.pack
"""Its trailer: `TRAILER_MAGIC` ^ generation, nbytes."""
assert _HEAD.size == FRAME_HEAD_BYTES
assert _NAME.size == NAME_BYTES
assert _HEADER.size == HEADER_BYTES
assert _TRAILER.size == TRAILER_BYTES
assert _OFFERED.size == OFFERED_BYTES


# --- Frames ----------------------------------------------------------------------------------------------------------


def encode_fetch(  # noqa: PLR0917 - the words of the frame, in its order; a keyword costs on this path
    sequence: int, ring_id: bytes, flags: int, attempt: int, words: Sequence[int], ends: Sequence[int]
) -> bytes:
    """A FETCH of any number of names and ends; `words` are the names, five words each."""
    count = len(words) // 5
    return _FETCHES[count].pack(
        REQUEST_MAGIC, VERSION, _FETCH, sequence, ring_id, count, len(ends), flags, attempt, *words
    ) + _ENDS[len(ends)].pack(*ends, END_MARK ^ sequence)


def encode_frame(frame: Frame) -> bytes:
    """Any frame."""
    kind, sequence, ring_id, flags, attempt, word, count, wait_ms, secret, names, ends = frame
    head = _HEAD.pack(
        REQUEST_MAGIC,
        VERSION,
        kind,
        sequence,
        ring_id,
        len(names),
        len(ends),
        flags,
        attempt,
        word,
        count,
        wait_ms,
        secret,
    )
    return head + b"".join(_NAME.pack(*name) for name in names) + _ENDS[len(ends)].pack(*ends, END_MARK ^ sequence)


def decode_frame(buffer: Message) -> Frame:
    """The frame at the start of `buffer`, or a ProtocolError: one of its words is not as the table says."""
    if len(buffer) < FRAME_HEAD_BYTES + END_BYTES:
        raise ProtocolError("a frame is shorter than its head", nbytes=len(buffer), expected=FRAME_HEAD_BYTES)
    magic, version, kind, sequence, ring_id, named, ended, flags, attempt, word, count, wait_ms, secret = (
        _HEAD.unpack_from(buffer)
    )
    if magic != REQUEST_MAGIC or version != VERSION:
        _refuse_stranger(magic, version)
    tail = FRAME_HEAD_BYTES + named * NAME_BYTES
    if named > MAX_NAMES or ended > MAX_ENDS or len(buffer) < tail + (ended + 1) * END_BYTES:
        raise ProtocolError("a frame has more names or ends than it may", names=named, ends=ended)
    ends = _ENDS[ended].unpack_from(buffer, tail)
    if ends[-1] != END_MARK ^ sequence:
        raise ProtocolError("a frame was cut short", kind=kind, sequence=sequence)
    if named == 1:
        names: tuple[tuple[int, int, int, int, int], ...] = (_NAME.unpack_from(buffer, FRAME_HEAD_BYTES),)
    else:
        names = tuple(_NAME.iter_unpack(memoryview(buffer)[FRAME_HEAD_BYTES:tail])) if named else ()
    if kind != _FETCH or flags:
        _check_words(kind, named, flags, attempt, word, count, wait_ms)
    for _, zero, generation, number, nbytes in names:
        if zero or generation == 0 or number > MAX_ATTEMPT or nbytes > MAX_BODY_BYTES:
            _refuse_name(zero, generation, number, nbytes)
    if flags and kind == _FETCH:
        _check_packed(names)
    # As `Frame(…)`, which is a call in Python.
    return _new(Frame, (kind, sequence, ring_id, flags, attempt, word, count, wait_ms, secret, names, ends[:-1]))


def answer_channel(buffer: Message) -> int:
    """Where to answer a frame that is none: on its attempt's channel if it has one, else on 1, that of a HELLO."""
    if len(buffer) < FRAME_HEAD_BYTES:
        return 1
    magic, version, *words = _HEAD.unpack_from(buffer)
    return words[6] & MAX_CHANNEL or 1 if (magic, version) == (REQUEST_MAGIC, VERSION) else 1


def _refuse_stranger(magic: int, version: int) -> None:
    if magic != REQUEST_MAGIC:
        raise ProtocolError("not a ucxx_transport frame", magic=f"{magic:#010x}")
    raise ProtocolError(
        f"the client speaks protocol version {version}, this side {VERSION}; install one release on both",
        version=version,
    )


def _refuse_name(zero: int, generation: int, attempt: int, nbytes: int) -> None:
    if generation == 0:
        raise ProtocolError("a frame names generation 0, which no payload has; send a reference that a ring made")
    if nbytes > MAX_BODY_BYTES:
        raise ProtocolError("a frame names more bytes than a payload can have", nbytes=nbytes, limit=MAX_BODY_BYTES)
    raise ProtocolError("a name's words are out of range", zero=zero, attempt=attempt)


def _check_words(  # noqa: PLR0917 - the words of the head
    kind: int, named: int, flags: int, attempt: int, word: int, count: int, wait_ms: int
) -> None:
    """What is particular to a kind; a plain FETCH has nothing of it."""
    if not _HELLO <= kind <= _BYE:
        raise ProtocolError("unknown kind of frame", kind=kind)
    if flags > (FLAG_PACKED if kind == _FETCH else FLAG_NEWEST if kind == _TAKE else 0):
        raise ProtocolError("unknown flags in a frame", kind=kind, flags=flags)
    if not 0 < attempt <= MAX_ATTEMPT or not attempt & MAX_CHANNEL:
        raise ProtocolError("an attempt is out of range", attempt=attempt)
    if kind == _HELLO:
        if not 0 < word <= MAX_READER:
            raise ProtocolError("a HELLO's reader is a random id from 1 to 2**63 - 1", reader=word)
    elif kind == _TAKE:
        _check_take(attempt, word, count, wait_ms)
    if kind not in (_FETCH, _CONFIRM) and named:
        raise ProtocolError("a frame of this kind has no names", kind=kind, names=named)
    if kind == _CONFIRM and not named:
        raise ProtocolError("a CONFIRM names nothing")


def _check_take(attempt: int, word: int, count: int, wait_ms: int) -> None:
    if not 0 < count <= MAX_NAMES:
        raise ProtocolError("a TAKE is for 1 to 64 payloads", count=count)
    if word > MAX_BODY_BYTES:
        raise ProtocolError("a TAKE asks for more bytes than a ring can have", nbytes=word, limit=MAX_BODY_BYTES)
    if wait_ms > MAX_WAIT_MS:
        raise ProtocolError("a TAKE waits longer than it may", wait_ms=wait_ms, limit=MAX_WAIT_MS)
    if attempt + count > MAX_ATTEMPT or (attempt & MAX_CHANNEL) + count > MAX_CHANNEL:
        raise ProtocolError("the attempts of a TAKE leave their range", attempt=attempt, count=count)


def _check_packed(names: Sequence[tuple[int, int, int, int, int]]) -> None:
    """Verify that the answers to `names` may share a message."""
    if len(names) < 2 or sum([message_bytes(name[4]) for name in names]) > PACK_BYTES:
        raise ProtocolError(f"two answers or more of at most {PACK_BYTES} bytes share a message", names=len(names))


# --- Answers ---------------------------------------------------------------------------------------------------------


def encode_header_into(buffer: memoryview | bytearray, header: ReplyHeader) -> None:
    """Write the 64 bytes of `header` at the start of `buffer`."""
    status, nbytes, ring_id, slot, generation, checksum, fingerprint, token_required = header
    flags = (FLAG_CHECKSUM if checksum is not None else 0) | (FLAG_TOKEN_REQUIRED if token_required else 0)
    _HEADER.pack_into(
        buffer, 0, REPLY_MAGIC, VERSION, status, generation, nbytes, checksum or 0, ring_id, slot, flags, fingerprint
    )


def seal(message: memoryview | bytearray, header: ReplyHeader) -> int:
    """Put header, padding and trailer round the body at offset 64 of `message`; returns the length of it all."""
    encode_header_into(message, header)
    end = HEADER_BYTES + header.nbytes
    pad = padded(header.nbytes) - header.nbytes
    if pad:
        message[end : end + pad] = bytes(pad)
    _TRAILER.pack_into(message, end + pad, (TRAILER_MAGIC ^ header.generation) & _U64, header.nbytes)
    return end + pad + TRAILER_BYTES


def encode_reply(header: ReplyHeader, body: bytes = b"") -> bytes:
    """A whole OK answer with a small body."""
    message = bytearray(message_bytes(len(body)))
    message[HEADER_BYTES : HEADER_BYTES + len(body)] = body
    seal(message, header)
    return bytes(message)


def encode_error(
    status: Status, text: str, *, slot: int = 0, generation: int = 0, room: int = HEADER_BYTES + ERROR_TEXT_BYTES
) -> bytes:
    """An answer that carries no body: the header and the text, as much of it as 1024 bytes and the room hold."""
    words = text.encode("utf-8", "replace")[: min(ERROR_TEXT_BYTES, room - HEADER_BYTES)]
    message = bytearray(HEADER_BYTES + len(words))
    encode_header_into(message, ReplyHeader(status=status, nbytes=len(words), slot=slot, generation=generation))
    message[HEADER_BYTES:] = words
    return bytes(message)


def decode_header(buffer: Message) -> ReplyHeader:
    """The header in the first 64 bytes of `buffer`.

    Raises:
        ProtocolError: wrong magic, version or status, or a length beyond its limit.
    """
    if len(buffer) < HEADER_BYTES:
        raise ProtocolError("an answer is shorter than its header", nbytes=len(buffer), expected=HEADER_BYTES)
    magic, version, code, generation, nbytes, checksum, ring_id, slot, flags, fingerprint = _HEADER.unpack_from(buffer)
    if magic != REPLY_MAGIC:
        raise ProtocolError("not an answer of ucxx_transport", magic=f"{magic:#010x}")
    if version != VERSION:
        raise ProtocolError(
            f"the server speaks protocol version {version}, this side {VERSION}; install one release on both",
            version=version,
        )
    status = _STATUSES.get(code)
    if status is None:
        raise ProtocolError("unknown status in an answer", status=code)
    limit = MAX_BODY_BYTES if status is _OK else ERROR_TEXT_BYTES
    if nbytes > limit:
        raise ProtocolError("an answer claims more bytes than its kind may have", nbytes=nbytes, limit=limit)
    return ReplyHeader(
        status=status,
        nbytes=nbytes,
        ring_id=ring_id,
        slot=slot,
        generation=generation,
        checksum=checksum if flags & FLAG_CHECKSUM else None,
        fingerprint=fingerprint,
        token_required=bool(flags & FLAG_TOKEN_REQUIRED),
    )


def error_text(buffer: Message, header: ReplyHeader) -> str:
    """The text after the header of an answer that is not OK; printable, at most 1024 bytes of it."""
    raw = bytes(buffer[HEADER_BYTES : HEADER_BYTES + header.nbytes])
    text = raw.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clear_ends(buffer: memoryview, nbytes: int, offset: int = 0) -> None:
    """Before a receive is posted: forget the header and trailer an earlier answer left in a pooled buffer.

    Of a message that answers share, for each of them at its offset.
    """
    clear_header(buffer, offset)
    clear_trailer(buffer, offset + HEADER_BYTES + ((nbytes + 7) & ~7))


def check_trailer(buffer: Message, header: ReplyHeader) -> None:
    """Verify that the body arrived to its end; a ProtocolError where the message was shorter than its header says."""
    end = HEADER_BYTES + padded(header.nbytes)
    if len(buffer) < end + TRAILER_BYTES:
        raise ProtocolError("an answer claims more bytes than were posted for it", nbytes=header.nbytes)
    mark, nbytes = _TRAILER.unpack_from(buffer, end)
    if mark != (TRAILER_MAGIC ^ header.generation) & _U64 or nbytes != header.nbytes:
        raise ProtocolError("an answer was cut short: its trailer is missing", nbytes=header.nbytes)


# --- Offers ----------------------------------------------------------------------------------------------------------


def encode_offer(payloads: Sequence[OfferedPayload]) -> bytes:
    """The body of the answer to a TAKE."""
    rows = [
        _OFFERED.pack(
            payload.slot,
            len(payload.envelope),
            payload.generation,
            payload.nbytes,
            payload.checksum or 0,
            0 if payload.checksum is None else FLAG_CHECKSUM,
            payload.commit_time_ns,
        )
        for payload in payloads
    ]
    return b"".join((_OFFER.pack(len(payloads), 0), *rows, *(payload.envelope for payload in payloads)))


def decode_offer(body: Message) -> list[OfferedPayload]:
    """What a server has picked; a ProtocolError where its lengths do not add up."""
    if len(body) < _OFFER.size:
        raise ProtocolError("an offer is shorter than its head", nbytes=len(body))
    count, _ = _OFFER.unpack_from(body)
    end = _OFFER.size + count * OFFERED_BYTES
    if not 0 < count <= MAX_NAMES or len(body) < end:
        raise ProtocolError("an offer has more or fewer payloads than it may", count=count)
    payloads = []
    for slot, envelope, generation, nbytes, checksum, flags, time_ns in _OFFERED.iter_unpack(
        memoryview(body)[_OFFER.size : end]
    ):
        if generation == 0 or nbytes > MAX_BODY_BYTES or envelope > MAX_ENVELOPE_BYTES or len(body) < end + envelope:
            raise ProtocolError("an offered payload is out of range", slot=slot, nbytes=nbytes, envelope=envelope)
        said = bytes(body[end : end + envelope])
        payloads.append(
            OfferedPayload(slot, generation, nbytes, checksum if flags & FLAG_CHECKSUM else None, time_ns, said)
        )
        end += envelope
    if end != len(body):
        raise ProtocolError("an offer is longer than its envelopes", nbytes=len(body), expected=end)
    return payloads
