"""What is tried again, and how the one deadline is shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.rows import row
from ucxx_transport.client.ports import (
    BACKOFF_LIMIT_S,
    BLAMING,
    ROTATING,
    SHORTEST_ATTEMPT_S,
    backoff_s,
    retries_slot,
)
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    SlotError,
    StaleSlotError,
    TransportError,
)

QUARANTINE, ROTATE, PROPAGATE = (True, True), (False, True), (False, False)

# The module's own table: whether the port is blamed and whether the next one is tried, whether the slot layer repeats,
# whether it waits first.
TABLE: dict[type[TransportError], tuple[tuple[bool, bool], bool, bool]] = {
    PeerLostError: (QUARANTINE, True, False),
    DeadlineExceededError: (QUARANTINE, True, False),
    BusyError: (ROTATE, True, True),
    NotReadyError: (PROPAGATE, True, True),
    ChecksumError: (PROPAGATE, True, False),
    StaleSlotError: (PROPAGATE, False, False),
    SlotError: (PROPAGATE, False, False),
    ProtocolError: (PROPAGATE, False, False),
    AuthenticationError: (PROPAGATE, False, False),
    ConfigError: (PROPAGATE, False, False),
}


def test_each_failure_is_judged_as_the_table_says() -> None:
    for cls, (verdict, repeats, waits) in TABLE.items():
        with row(cls=cls):
            error = cls("it failed")
            assert (isinstance(error, BLAMING), isinstance(error, ROTATING)) == verdict
            assert retries_slot(error, attempt=1, read_attempts=2, remaining_s=5.0) is repeats
            assert (backoff_s(error, 1) > 0) is waits


def test_the_last_attempt_is_the_last() -> None:
    for cls in [cls for cls in TABLE if cls is not NotReadyError]:
        with row(cls=cls):
            assert not retries_slot(cls("x"), attempt=2, read_attempts=2, remaining_s=5.0)
            assert not retries_slot(cls("x"), attempt=1, read_attempts=1, remaining_s=5.0)


def test_a_source_that_is_not_ready_is_asked_again_as_long_as_the_deadline_allows() -> None:
    error = NotReadyError("x")
    assert retries_slot(error, attempt=1000, read_attempts=2, remaining_s=5.0)
    assert not retries_slot(error, attempt=1000, read_attempts=2, remaining_s=backoff_s(error, 1000))


def test_nothing_is_tried_again_without_time_for_a_round_trip() -> None:
    error = PeerLostError("x")
    assert not retries_slot(error, attempt=1, read_attempts=2, remaining_s=0.0)
    assert not retries_slot(error, attempt=1, read_attempts=2, remaining_s=-1.0)
    assert not retries_slot(error, attempt=1, read_attempts=2, remaining_s=SHORTEST_ATTEMPT_S)
    assert retries_slot(error, attempt=1, read_attempts=2, remaining_s=2 * SHORTEST_ATTEMPT_S)


def test_a_wait_that_would_use_up_the_deadline_is_not_begun() -> None:
    error = BusyError("x")
    assert not retries_slot(error, attempt=1, read_attempts=9, remaining_s=backoff_s(error, 1))
    assert retries_slot(error, attempt=1, read_attempts=9, remaining_s=backoff_s(error, 1) + 0.1)


@given(st.integers(1, 200))
def test_waits_grow_and_stay_bounded(attempt: int) -> None:
    error = BusyError("x")
    assert 0 < backoff_s(error, attempt) <= backoff_s(error, attempt + 1) <= BACKOFF_LIMIT_S
