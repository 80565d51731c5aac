from __future__ import annotations

import gc
import threading
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.errors import BusyError, ChecksumError, ConfigError, SlotError, StaleSlotError
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import Schema, TensorSpec
from ucxx_transport.wire import codec, frames
from ucxx_transport.wire.codec import seal_of


def test_a_payload_is_read_in_place_and_freed_by_its_reader(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    with ring.acquire(ref) as lease:
        assert (lease.slot, lease.generation, lease.nbytes) == (ref.slot, ref.generation, 7)
        assert ring.slot_state(ref.slot) is SlotState.READING
        assert bytes(lease.buffer) == lease.arrays["data"].tobytes() == b"payload"
        assert lease.mark_consumed()
    assert ring.slot_state(ref.slot) is SlotState.FREE
    with pytest.raises(StaleSlotError):
        ring.acquire(ref)


def test_leaving_a_lease_without_a_word_makes_the_payload_ready_again(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    with ring.acquire(ref):
        pass
    with pytest.raises(KeyError), ring.acquire(ref):
        raise KeyError
    assert ring.slot_state(ref.slot) is SlotState.READY
    assert ring.read(ref)["data"].tobytes() == b"payload"


def test_nobody_can_write_through_a_read_lease(make_ring: MakeRing) -> None:
    ring = make_ring(schema=Schema([TensorSpec("a", (3,), "float32")]))
    with ring.acquire(ring.write({"a": np.ones(3, np.float32)})) as lease:
        assert lease.buffer.readonly
        array = lease.arrays["a"]
        for attempt in (array, np.asarray(lease.buffer)):
            assert not attempt.flags.writeable
            with pytest.raises(ValueError, match=r"(?i)writeable"):
                attempt.flags.writeable = True


def test_two_attempts_on_one_payload_end_one_by_one(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    first, second = ring.acquire(ref), ring.acquire(ref)
    assert first.lease_id != second.lease_id
    assert first.release_reading()
    assert ring.slot_state(ref.slot) is SlotState.READING
    assert second.mark_consumed()
    assert ring.slot_state(ref.slot) is SlotState.FREE


def test_a_payload_that_any_attempt_consumed_is_freed_when_the_last_ends(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    first, second = ring.acquire(ref), ring.acquire(ref)
    assert first.mark_consumed()
    # the second is mid-send: the writer must not have the slot yet
    assert ring.slot_state(ref.slot) is SlotState.READING
    for number in range(20):
        assert ring.write_raw(bytes([number])).slot != ref.slot
    assert bytes(second.buffer) == b"payload"
    with pytest.raises(StaleSlotError):
        ring.acquire(ref)
    assert second.release_reading()
    assert ring.slot_state(ref.slot) is SlotState.FREE


@pytest.mark.parametrize("finalise", ["mark_consumed", "release_reading"])
def test_a_finished_lease_cannot_finalise_again(
    ring: SharedRingBuffer, finalise: str, log_events: list[MutableMapping[str, Any]]
) -> None:
    lease = ring.acquire(ring.write_raw(b"payload"))
    assert getattr(lease, finalise)()
    again = ring.slot_states()
    for _ in range(3):
        assert not lease.mark_consumed()
        assert not lease.release_reading()
    assert ring.slot_states() == again
    assert ring.statistics().late_finalise == 6
    late = [event for event in log_events if event["event"] == "finalise_ignored"]
    assert [(event["log_level"], event["slot"], event["ring"]) for event in late] == [("warning", 0, ring.name)]


def test_a_stale_lease_cannot_free_a_recycled_slot(ring: SharedRingBuffer) -> None:
    """The predecessor's: a handler that timed out freed the slot under another one, which sent two episodes mixed."""
    ref = ring.write_raw(b"first")
    late = ring.acquire(ref)
    assert late.mark_consumed()
    refs = [ring.write_raw(bytes([number])) for number in range(4)]
    recycled = next(new for new in refs if new.slot == ref.slot)
    with ring.acquire(recycled) as current:
        assert not late.mark_consumed()
        assert not late.release_reading()
        assert ring.slot_state(ref.slot) is SlotState.READING
        assert current.mark_consumed()


def test_a_reference_to_an_earlier_episode_of_the_slot_is_stale(make_ring: MakeRing) -> None:
    """The predecessor's references had no generation: another episode came back as OK."""
    ring = make_ring(slots=1)
    first = ring.write_raw(b"first")
    ring.write_raw(b"second")
    with pytest.raises(StaleSlotError) as caught:
        ring.read(first)
    assert caught.value.facts["found_generation"] == 2
    assert not caught.value.retryable
    with pytest.raises(StaleSlotError):
        ring.acquire(replace(first, generation=3))


def test_a_reference_to_another_ring_is_stale(make_ring: MakeRing) -> None:
    one, other = make_ring(), make_ring()
    ref, foreign = one.write_raw(b"mine"), other.write_raw(b"other")
    with pytest.raises(StaleSlotError, match="another ring"):
        one.acquire(foreign)
    assert not one.discard(foreign)
    assert one.statistics().stale == 1
    assert one.read(ref)["data"].tobytes() == b"mine"


def test_a_slot_out_of_range_is_refused_and_discloses_nothing(ring: SharedRingBuffer) -> None:
    for slot in (-1, -4):
        with row(slot=slot), pytest.raises(SlotError):
            ring.slot_state(slot)
    rows: list[int] = [4, 5, 2**31, 2**64 - 1]
    for number, slot in enumerate(rows, start=1):
        with row(slot=slot):
            ref = ring.write_raw(b"payload")
            with pytest.raises(SlotError) as caught:
                ring.acquire_slot(slot, ref.generation)
            assert not isinstance(caught.value, StaleSlotError)
            with pytest.raises(SlotError):
                ring.slot_state(slot)
            assert ring.statistics().out_of_range == number
            assert ring.read(ref)["data"].tobytes() == b"payload"


def test_a_slot_never_written_is_stale(ring: SharedRingBuffer) -> None:
    for generation in (0, 1, 2**56, 2**64 - 1):
        with pytest.raises(StaleSlotError):
            ring.acquire_slot(2, generation)
    assert ring.statistics().stale == 4


def test_a_slot_being_written_cannot_be_read(ring: SharedRingBuffer) -> None:
    with ring.reserve(4) as lease, pytest.raises(StaleSlotError):
        ring.acquire_slot(lease.slot, lease.generation)


def test_attempts_beyond_a_slot_s_room_are_busy_and_may_come_back(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    leases = [ring.acquire(ref) for _ in range(8)]
    with pytest.raises(BusyError) as caught:
        ring.acquire(ref)
    assert caught.value.retryable
    assert leases.pop().release_reading()
    assert ring.acquire(ref).release_reading()
    for lease in leases:
        assert lease.release_reading()


@pytest.mark.parametrize("reader", [-1, 2**63])
def test_a_reader_s_id_has_bounds(ring: SharedRingBuffer, reader: int) -> None:
    with pytest.raises(ConfigError):
        ring.acquire(ring.write_raw(b"payload"), reader=reader)


def test_a_payload_for_three_readers_is_freed_by_the_third(make_ring: MakeRing) -> None:
    ring = make_ring(readers=3)
    ref = ring.write_raw(b"shared")
    for reader in (11, 12):
        assert ring.read(ref, reader=reader)["data"].tobytes() == b"shared"
        with pytest.raises(StaleSlotError):
            ring.acquire(ref, reader=reader)
        assert ring.slot_state(ref.slot) is SlotState.READY
    with ring.acquire(ref, reader=13):
        pass
    assert ring.slot_state(ref.slot) is SlotState.READY
    ring.read(ref, reader=13)
    assert ring.slot_state(ref.slot) is SlotState.FREE
    assert ring.statistics().freed == 1


def test_a_write_may_ask_for_fewer_readers_than_the_ring_has(make_ring: MakeRing) -> None:
    ring = make_ring(readers=3)
    ref = ring.write_raw(b"one", readers=1)
    ring.read(ref, reader=11)
    assert ring.slot_state(ref.slot) is SlotState.FREE


def test_a_half_read_payload_that_is_overwritten_starts_with_no_readers(make_ring: MakeRing) -> None:
    ring = make_ring(slots=1, readers=2)
    ring.read(ring.write_raw(b"first"), reader=1)
    second = ring.write_raw(b"second")
    for reader in (1, 2):
        assert ring.read(second, reader=reader)["data"].tobytes() == b"second"
    assert ring.slot_state(0) is SlotState.FREE


def test_discard_drops_what_nobody_reads(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    with ring.acquire(ref):
        assert not ring.discard(ref)
    assert not ring.discard(replace(ref, generation=ref.generation + 1))
    assert ring.discard(ref)
    assert not ring.discard(ref)
    assert ring.statistics().discarded == 1


def test_a_payload_damaged_in_memory_is_a_checksum_error_and_is_not_consumed(make_ring: MakeRing) -> None:
    ring = make_ring(checksum=True)
    ref = ring.write_raw(b"payload")
    first = ring.mapping.tobytes().index(b"payload")
    ring.mapping[first] ^= 1
    with pytest.raises(ChecksumError):
        ring.read(ref)
    ring.mapping[first] ^= 1
    assert ring.read(ref)["data"].tobytes() == b"payload"


def test_a_committed_slot_is_the_message_that_a_server_sends(make_ring: MakeRing) -> None:
    """`ring.c` writes what `wire.codec` reads: the two may not import each other, so this compares them."""
    fields = Schema([TensorSpec("obs", (3,), "uint8")])
    rows: list[tuple[bool, Schema | None, int]] = [
        (checksum, schema, nbytes)
        for checksum in (False, True)
        for schema, sizes in ((None, [0, 1, 7, 8, 61, 64]), (fields, [3]))
        for nbytes in sizes
    ]
    for checksum, schema, nbytes in rows:
        with row(checksum=checksum, schema=schema, nbytes=nbytes):
            ring = make_ring(slots=3, checksum=checksum, **({"schema": schema} if schema else {}))
            ring.mapping[-3 * 1300 :] = 0xEE  # what earlier payloads have left
            for slot in range(3):
                if schema is None:
                    ref = ring.write_raw(bytes([slot + 1]) * nbytes)
                else:
                    ref = ring.write({"obs": np.full(3, slot + 1, np.uint8)})
                with ring.acquire(ref) as lease:
                    message = lease.message
                    assert message.readonly
                    assert len(message) == frames.message_bytes(nbytes)
                    header = codec.decode_header(message)
                    codec.check_trailer(message, header)
                    begin, trailer, end, whole = seal_of(ref)
                    assert (bytes(message[: len(begin)]), bytes(message[end:whole])) == (begin, trailer)
                    assert header == frames.ReplyHeader(
                        status=frames.Status.OK,
                        nbytes=nbytes,
                        ring_id=ring.ring_id,
                        slot=slot,
                        generation=ref.generation,
                        checksum=ref.checksum,
                        fingerprint=ring.fingerprint,
                    )
                    assert codec.encode_reply(header, bytes(lease.buffer)) == message


def test_a_payload_handed_over_is_consumed_when_its_last_view_goes(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    array = ring.acquire(ref).hand_over()
    assert not array.flags.writeable
    chain: list[Any] = [array]
    del array
    for derive in (
        lambda last: last[0:].view(),
        lambda last: last.data[0:],
        lambda last: np.frombuffer(last, np.uint8),
        lambda last: last.reshape(7, 1)[:, 0],
        lambda last: memoryview(last).cast("c"),
    ):
        chain.append(derive(chain[-1]))
        del chain[0]
        assert bytes(chain[0]) == b"payload"
        assert ring.slot_state(ref.slot) is SlotState.READING
    chain.clear()
    assert ring.slot_state(ref.slot) is SlotState.FREE
    found = ring.statistics()
    assert (found.consumed, found.released, found.late_finalise) == (1, 0, 0)


def test_a_payload_handed_over_may_go_in_another_thread_and_in_a_cycle(ring: SharedRingBuffer) -> None:
    holder: list[Any] = [ring.acquire(ring.write_raw(b"payload")).hand_over()]
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join()
    assert ring.slot_states() == [SlotState.FREE] * 4
    cycle: list[Any] = [ring.acquire(ring.write_raw(b"payload")).hand_over()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert ring.slot_states() == [SlotState.FREE] * 4


def test_arrays_of_a_forgotten_read_lease_keep_the_payload(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    array = ring.acquire(ref).arrays["data"]
    for number in range(20):
        ring.write_raw(bytes([number]) * 8)
    assert bytes(array) == b"payload"
    del array
    assert ring.slot_state(ref.slot) is SlotState.READY
    assert ring.statistics().released == 1


def test_the_memory_lives_as_long_as_a_view_of_it(make_ring: MakeRing) -> None:
    ring = make_ring()
    array = ring.acquire(ring.write_raw(b"payload")).hand_over()
    ring.close()
    assert bytes(array) == b"payload"
    reader = make_ring()
    lease = reader.acquire(reader.write_raw(b"payload"))
    reader.close()
    assert bytes(lease.buffer) == b"payload"
    assert lease.mark_consumed()


def test_a_closed_handle_says_so(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    ring.close()
    ring.close()
    assert ring.closed
    for call in (
        lambda: ring.read(ref),
        lambda: ring.write_raw(b"x"),
        ring.reserve,
        ring.statistics,
        ring.slot_states,
        ring.reclaim_dead,
        ring.address,
    ):
        with pytest.raises(SlotError, match="closed"):
            call()
    assert ring.name == ref.ring_name


def test_of_two_readers_only_one_gets_a_payload_and_the_other_gets_it_if_it_is_given_back(make_ring: MakeRing) -> None:
    ring = make_ring(slot_bytes=64)
    ref = ring.write_raw(b"once")
    first = ring.acquire(ref, reader=1)
    with pytest.raises(BusyError) as refused:
        ring.acquire(ref, reader=2)
    assert refused.value.retryable
    again = ring.acquire(ref, reader=1)  # it timed out, and rotated
    assert again.release_reading()
    with pytest.raises(BusyError):
        ring.acquire(ref, reader=2)
    assert first.release_reading()
    assert ring.acquire(ref, reader=2).mark_consumed()
    with pytest.raises(StaleSlotError):
        ring.acquire(ref, reader=1)


def test_a_payload_of_several_readers_is_busy_only_while_attempts_have_all_its_reads(make_ring: MakeRing) -> None:
    ring = make_ring(slot_bytes=64, readers=2)
    ref = ring.write_raw(b"twice")
    first, second = ring.acquire(ref, reader=1), ring.acquire(ref, reader=2)
    with pytest.raises(BusyError):
        ring.acquire(ref, reader=3)
    assert first.mark_consumed()
    with pytest.raises(BusyError):
        ring.acquire(ref, reader=3)
    assert second.release_reading()
    assert ring.acquire(ref, reader=3).mark_consumed()
    assert ring.slot_state(ref.slot) is SlotState.FREE
