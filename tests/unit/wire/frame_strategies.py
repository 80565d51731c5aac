"""Hypothesis strategies for every frame, header and offer a peer may legally send."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    FLAG_PACKED,
    MAC_BYTES,
    MAX_ATTEMPT,
    MAX_BODY_BYTES,
    MAX_CHANNEL,
    MAX_ENDS,
    MAX_ENVELOPE_BYTES,
    MAX_NAMES,
    MAX_READER,
    MAX_WAIT_MS,
    NONCE_BYTES,
    RING_ID_BYTES,
    Frame,
    Kind,
    OfferedPayload,
    ReplyHeader,
    Status,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NOT_ZERO = st.integers(1, (1 << 64) - 1)
RING_IDS = st.binary(min_size=RING_ID_BYTES, max_size=RING_ID_BYTES)
LENGTHS = st.integers(0, MAX_BODY_BYTES)
ATTEMPTS = st.integers(1, MAX_ATTEMPT).filter(lambda attempt: attempt & MAX_CHANNEL)
NONCES = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)


def frames_of(kind: Kind, **words: st.SearchStrategy[Any]) -> st.SearchStrategy[Frame]:
    """Frames of one kind with these words and any sequence; `st.builds` alone would invent the others."""
    return st.fixed_dictionaries({"sequence": U64, **words}).map(lambda drawn: Frame(kind=int(kind), **drawn))


def a_few(element: st.SearchStrategy[object], most: int, least: int = 0) -> st.SearchStrategy[tuple[object, ...]]:
    """A few of them, or as many as there may be."""
    few = st.lists(element, min_size=least, max_size=4).map(tuple)
    return few | element.map(lambda one: (one,) * most)


NAMES = a_few(st.tuples(U32, st.just(0), NOT_ZERO, ATTEMPTS, LENGTHS), MAX_NAMES)
PACKED = a_few(st.tuples(U32, st.just(0), NOT_ZERO, ATTEMPTS, st.integers(0, 900)), MAX_NAMES, 2)
CONFIRMED = a_few(st.tuples(U32, st.just(0), NOT_ZERO, st.just(0), st.just(0)), MAX_NAMES, 1)
ENDS = a_few(U64, MAX_ENDS)
TAKE_ATTEMPTS = st.integers(0, 1 << 40).map(lambda attempt: attempt << 16 | 1)

FRAMES: st.SearchStrategy[Frame] = st.one_of(
    frames_of(Kind.HELLO, attempt=ATTEMPTS, word=st.integers(1, MAX_READER), secret=NONCES),
    frames_of(Kind.AUTH, attempt=ATTEMPTS, secret=st.binary(min_size=MAC_BYTES, max_size=MAC_BYTES)),
    frames_of(Kind.FETCH, ring_id=RING_IDS, names=NAMES, ends=ENDS),
    frames_of(Kind.FETCH, ring_id=RING_IDS, flags=st.just(FLAG_PACKED), attempt=ATTEMPTS, names=PACKED, ends=ENDS),
    frames_of(
        Kind.TAKE,
        ring_id=RING_IDS,
        flags=st.integers(0, 1),
        attempt=TAKE_ATTEMPTS,
        word=LENGTHS,
        max_payloads=st.integers(1, MAX_NAMES),
        wait_ms=st.integers(0, MAX_WAIT_MS),
        ends=ENDS,
    ),
    frames_of(Kind.CONFIRM, ring_id=RING_IDS, attempt=ATTEMPTS, names=CONFIRMED, ends=ENDS),
    frames_of(Kind.DESCRIBE, ring_id=RING_IDS, attempt=ATTEMPTS, ends=ENDS),
    frames_of(Kind.BYE, attempt=ATTEMPTS, ends=ENDS),
)

OK_HEADERS = st.builds(
    ReplyHeader,
    status=st.just(Status.OK),
    nbytes=LENGTHS,
    ring_id=RING_IDS,
    slot=U32,
    generation=U64,
    checksum=st.none() | U64,
    fingerprint=U64,
    token_required=st.booleans(),
)
ERROR_HEADERS = st.builds(
    ReplyHeader,
    status=st.sampled_from([status for status in Status if status is not Status.OK]),
    nbytes=st.integers(0, ERROR_TEXT_BYTES),
    ring_id=RING_IDS,
    slot=U32,
    generation=U64,
    checksum=st.none(),
    fingerprint=U64,
    token_required=st.just(value=False),
)
HEADERS = OK_HEADERS | ERROR_HEADERS

OFFERED = st.builds(
    OfferedPayload,
    slot=U32,
    generation=NOT_ZERO,
    nbytes=LENGTHS,
    checksum=st.none() | U64,
    commit_time_ns=U64,
    envelope=st.binary(max_size=40) | st.binary(min_size=MAX_ENVELOPE_BYTES, max_size=MAX_ENVELOPE_BYTES),
)
