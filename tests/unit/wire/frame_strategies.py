"""Hypothesis strategies for every frame and reply header a peer may legally send."""

from __future__ import annotations

from hypothesis import strategies as st

from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    MAC_BYTES,
    MAX_BODY_BYTES,
    MAX_READER,
    NONCE_BYTES,
    RING_ID_BYTES,
    Ack,
    Auth,
    Bye,
    Confirm,
    Describe,
    Hello,
    ReadReply,
    ReadRequest,
    Request,
    Status,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NOT_ZERO = st.integers(1, (1 << 64) - 1)
RING_IDS = st.binary(min_size=RING_ID_BYTES, max_size=RING_ID_BYTES)
LENGTHS = st.integers(0, MAX_BODY_BYTES)

READ_REQUESTS = st.builds(ReadRequest, ring_id=RING_IDS, slot=U32, generation=NOT_ZERO, attempt=U64, nbytes=LENGTHS)

REQUESTS: st.SearchStrategy[Request] = st.one_of(
    st.builds(Hello, reader=st.integers(1, MAX_READER), nonce=st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)),
    st.builds(Auth, mac=st.binary(min_size=MAC_BYTES, max_size=MAC_BYTES)),
    READ_REQUESTS,
    st.builds(Confirm, request=READ_REQUESTS),
    st.builds(Ack, slot=U32, generation=U64, attempt=U64, delivered=st.booleans()),
    st.builds(Describe, ring_id=RING_IDS),
    st.just(Bye()),
)

OK_HEADERS = st.builds(
    ReadReply,
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
    ReadReply,
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
