from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.support.rows import row
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.errors import ConfigError, DeadlineExceededError, RingFullError, SlotError, StaleSlotError
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import Schema, SlotRef, TensorSpec

SCHEMA = Schema(
    [
        TensorSpec("obs/image", (50, 3), "uint8", varlen=True),
        TensorSpec("obs/state", (2,), "float32"),
        TensorSpec("layers/0", (2, 2), "bfloat16"),
        TensorSpec("layers/1", (), "int64"),
    ]
)


def episode(rows: int = 3) -> dict[str, object]:
    return {
        "obs": {"image": np.full((rows, 3), 7, np.uint8), "state": np.array([1.5, -2], np.float32)},
        "layers": [np.ones((2, 2)).astype(SCHEMA.fields[2].dtype), 2**40],
    }


def test_what_is_written_is_read_nested_as_it_was(make_ring: MakeRing) -> None:
    ring = make_ring(schema=SCHEMA)
    ref = ring.write(episode(), meta={"policy": 3})
    assert ref.nbytes == SCHEMA.layout({"obs/image": 3}).nbytes < SCHEMA.nbytes
    assert ref.meta == {"policy": 3}
    assert (ref.ring_id, ref.ring_name, ref.fingerprint) == (ring.ring_id, ring.name, SCHEMA.fingerprint)
    found = ring.read(ref)
    np.testing.assert_array_equal(found["obs"]["image"], np.full((3, 3), 7, np.uint8))
    np.testing.assert_array_equal(found["obs"]["state"], np.array([1.5, -2], np.float32))
    np.testing.assert_array_equal(found["layers"][0].astype(float), np.ones((2, 2)))
    assert found["layers"][1] == 2**40
    assert ring.slot_state(ref.slot) is SlotState.FREE


def test_a_copy_that_was_read_is_the_caller_s_own(ring: SharedRingBuffer) -> None:
    data = ring.read(ring.write_raw(b"first"))["data"]
    for _ in range(ring.slots):
        ring.write_raw(b"other")
    assert data.tobytes() == b"first"
    data[:] = 0


def test_arrays_of_a_reserved_slot_are_the_slot_s_own_memory(make_ring: MakeRing) -> None:
    ring = make_ring(schema=SCHEMA)
    with ring.reserve(lengths={"obs/image": 4}, meta={"n": 1}) as lease:
        arrays = lease.arrays
        arrays["obs"]["image"][:] = np.arange(12).reshape(4, 3)
        arrays["obs"]["state"][:] = 5
        arrays["layers"][0][:] = 2
        arrays["layers"][1][...] = -1
        assert ring.slot_state(lease.slot) is SlotState.WRITING
    found = ring.read(lease.ref)
    np.testing.assert_array_equal(found["obs"]["image"], np.arange(12).reshape(4, 3))
    assert found["layers"][1] == -1
    assert lease.ref.meta == {"n": 1}


def test_lengths_are_in_the_slot_though_only_its_buffer_is_written_to(make_ring: MakeRing) -> None:
    ring = make_ring(schema=SCHEMA)
    with ring.reserve(lengths={"obs/image": 2}) as lease:
        lease.buffer[64:70] = b"abcdef"
    assert ring.read(lease.ref)["obs"]["image"].tobytes() == b"abcdef"


def test_a_raw_slot_may_be_committed_with_fewer_bytes_than_reserved(ring: SharedRingBuffer) -> None:
    lease = ring.reserve()
    assert lease.nbytes == len(lease.buffer) == 64
    lease.buffer[:3] = b"abc"
    ref = lease.commit(3)
    assert ref is lease.ref is lease.commit()
    assert ring.read(ref)["data"].tobytes() == b"abc"
    for wrong in (65, -1):
        with ring.reserve() as lease, pytest.raises(ConfigError):
            lease.commit(wrong)


def test_an_empty_payload_is_a_payload(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"")
    with ring.acquire(ref) as lease:
        assert bytes(lease.buffer) == b""
        assert lease.mark_consumed()


def test_a_raw_ring_takes_any_contiguous_buffer(ring: SharedRingBuffer) -> None:
    for buffer in (b"abcdefgh", bytearray(b"abcdefgh"), memoryview(b"abcdefgh").cast("Q"), np.frombuffer(b"abcdefgh")):
        assert ring.read(ring.write_raw(buffer))["data"].tobytes() == b"abcdefgh"


def test_what_does_not_fit_is_refused_and_costs_no_unread_payload(make_ring: MakeRing) -> None:
    raw, shaped = make_ring(slots=1), make_ring(slots=1, schema=SCHEMA)
    kept, kept_arrays = raw.write_raw(b"kept"), shaped.write(episode())
    for call in (
        lambda: raw.write_raw(b"x" * 65),
        lambda: raw.write_raw(b"x", readers=2),
        lambda: raw.write_raw(b"x", readers=0),
        lambda: raw.write({"data": b"x"}),
        lambda: raw.write_raw("no buffer"),  # type: ignore[arg-type]
        lambda: raw.write_raw(np.zeros((4, 4))[:, 1]),
        lambda: raw.write_raw(np.zeros(4, bfloat16)),
        lambda: raw.reserve(65),
        lambda: raw.reserve(lengths={"a": 1}),
        lambda: shaped.write({"obs": {}}),
        lambda: shaped.write(episode(rows=51)),
        lambda: shaped.write_raw(b"x"),
        lambda: shaped.reserve(10),
        lambda: shaped.reserve(lengths={"obs/image": 51}),
        lambda: shaped.write(episode(), readers=2),
    ):
        with pytest.raises(ConfigError):
            call()
    assert raw.read(kept)["data"].tobytes() == b"kept"
    assert shaped.read(kept_arrays)["layers"][1] == 2**40


def test_a_write_whose_reference_cannot_be_made_touches_no_slot(ring: SharedRingBuffer) -> None:
    with pytest.raises(ConfigError, match="meta"):
        ring.write_raw(b"x", meta={"set": {1, 2}})
    with pytest.raises(ConfigError, match="meta"), ring.reserve(meta={"n": object()}):
        pass
    assert ring.slot_states() == [SlotState.FREE] * 4
    assert ring.statistics().written == 0


def test_a_write_that_fails_half_way_leaves_the_slot_free_and_the_ring_writable(make_ring: MakeRing) -> None:
    ring = make_ring(slots=2, on_full="raise")

    def crash_half_way() -> None:
        with ring.reserve() as lease:
            lease.buffer[0] = 1
            raise RuntimeError("environment crashed")

    for _ in range(20):
        with pytest.raises(RuntimeError, match="environment"):
            crash_half_way()
    assert ring.slot_states() == [SlotState.FREE] * 2
    assert ring.read(ring.write_raw(b"fine"))["data"].tobytes() == b"fine"


def test_a_reserved_slot_is_given_back_by_abort_once(ring: SharedRingBuffer) -> None:
    with ring.reserve() as lease:
        assert lease.abort()
        assert not lease.abort()
        with pytest.raises(SlotError):
            lease.commit()
        with pytest.raises(SlotError):
            _ = lease.ref
        for ended in ("buffer", "arrays"):
            with pytest.raises(SlotError):
                getattr(lease, ended)
    assert ring.slot_states() == [SlotState.FREE] * 4


def test_an_abort_after_commit_changes_nothing(ring: SharedRingBuffer) -> None:
    with ring.reserve(1) as lease:
        ref = lease.commit()
        assert not lease.abort()
    assert ring.slot_state(ref.slot) is SlotState.READY


def test_a_forgotten_lease_gives_its_slot_back(ring: SharedRingBuffer) -> None:
    lease = ring.reserve()
    assert ring.slot_states().count(SlotState.WRITING) == 1
    del lease
    assert ring.slot_states() == [SlotState.FREE] * 4


def test_arrays_of_a_forgotten_lease_keep_its_slot(ring: SharedRingBuffer) -> None:
    array = ring.reserve().arrays["data"]
    assert ring.slot_states().count(SlotState.WRITING) == 1
    del array
    assert ring.slot_states() == [SlotState.FREE] * 4


def test_overwriting_drops_the_payload_that_was_written_first(make_ring: MakeRing) -> None:
    ring = make_ring(slots=3)
    first, second, third = (ring.write_raw(bytes([n])) for n in range(3))
    held = ring.acquire(first)
    fourth = ring.write_raw(b"3")
    assert fourth.slot == second.slot
    assert held.release_reading()
    # released, it is the oldest again, though others were written since
    fifth = ring.write_raw(b"4")
    assert fifth.slot == first.slot
    assert [ref.name for ref in ring.ready_refs()] == [third.name, fourth.name, fifth.name]
    for stale in (first, second):
        with pytest.raises(StaleSlotError):
            ring.read(stale)
    assert ring.statistics().overwritten == 2


def test_a_slot_being_read_is_passed_over_and_the_others_stay_writable(make_ring: MakeRing) -> None:
    ring = make_ring(slots=3)
    held = ring.acquire(ring.write_raw(b"held"))
    for number in range(30):
        assert ring.write_raw(bytes([number])).slot != held.slot
    assert bytes(held.buffer) == b"held"
    assert held.mark_consumed()


def test_a_ring_whose_every_slot_is_in_use_is_full_under_every_policy(make_ring: MakeRing) -> None:
    for on_full, error in (("overwrite", RingFullError), ("raise", RingFullError), ("block", DeadlineExceededError)):
        ring = make_ring(slots=2, on_full=on_full, block_timeout_s=0.01)
        held = [ring.acquire(ring.write_raw(b"x")) for _ in range(1)]
        writing = ring.reserve()
        with pytest.raises(error):
            ring.write_raw(b"y")
        assert ring.statistics().full == 1
        assert held[0].mark_consumed()
        assert ring.write_raw(b"y").slot == held[0].slot
        writing.abort()


def test_the_error_of_a_full_ring_names_who_holds_its_slots_what_they_wait_for_and_what_helps(
    make_ring: MakeRing,
) -> None:
    here = f"pid {os.getpid()} ("
    rows: list[
        tuple[int, Callable[[SharedRingBuffer, list[SlotRef]], object], tuple[str, ...], tuple[int, int, int]]
    ] = [
        (
            1,
            lambda ring, refs: [ring.acquire(ref) for ref in refs],
            (here, "holds 4, the longest for ", "clone them"),
            (4, 0, 0),
        ),
        (
            1,
            lambda ring, refs: [ring.acquire(refs[0], reader=0xABC)],
            ("reader abc, holds 1, for ", "3 wait for a first reader"),
            (1, 3, 0),
        ),
        (
            1,
            lambda ring, refs: [ring.acquire(ref, reader=1 + ref.slot) for ref in refs],
            ("1 other readers hold some",),
            (4, 0, 0),
        ),
        (
            2,
            lambda ring, refs: [ring.read(ref, reader=1) for ref in refs],
            ("4 wait for a second reader", "write(readers=1)", "discard"),
            (0, 0, 4),
        ),
        (
            3,
            lambda ring, refs: [ring.read(refs[0], reader=reader) for reader in (1, 2)],
            ("1 waits for a third reader",),
            (0, 3, 1),
        ),
        (1, lambda ring, refs: [ring.discard(refs[0]), ring.reserve()], ("1 is being written",), (0, 3, 0)),
    ]
    for readers, prepare, words, facts in rows:
        for on_full, error in (("raise", RingFullError), ("block", DeadlineExceededError)):
            with row(readers=readers, words=words, on_full=on_full):
                ring = make_ring(slots=4, on_full=on_full, readers=readers, block_timeout_s=1e-3)
                kept = prepare(ring, [ring.write_raw(b"x") for _ in range(4)])
                with pytest.raises(error) as caught:
                    ring.write_raw(b"y")
                message = caught.value.message
                assert all(word in message for word in (*words, "more ring.slots"))
                assert "overwrite" not in message
                assert [caught.value.facts[name] for name in ("reading", "unread", "partly_read")] == [*facts]
                del kept


def test_an_absent_reader_costs_no_payload_that_the_others_have_not_had(make_ring: MakeRing) -> None:
    ring = make_ring(slots=2, on_full="raise", readers=2)
    refs = [ring.write_raw(b"x"), ring.write_raw(b"y")]
    for ref in refs:
        ring.read(ref, reader=1)
    with pytest.raises(RingFullError, match="2 wait for a second reader"):
        ring.write_raw(b"z")
    assert all(ring.discard(ref) for ref in refs)
    ref = ring.write_raw(b"z", readers=1)
    ring.read(ref, reader=1)
    assert ring.slot_states() == [SlotState.FREE] * 2


def test_raise_never_drops_an_unread_payload(make_ring: MakeRing) -> None:
    ring = make_ring(slots=2, on_full="raise")
    refs = [ring.write_raw(b"a"), ring.write_raw(b"b")]
    with pytest.raises(RingFullError) as caught:
        ring.write_raw(b"c")
    assert caught.value.retryable
    assert [ring.read(ref)["data"].tobytes() for ref in refs] == [b"a", b"b"]
    ring.write_raw(b"c")


def test_block_waits_no_longer_than_its_deadline(make_ring: MakeRing) -> None:
    ring = make_ring(slots=1, on_full="block", block_timeout_s=600)
    kept = ring.write_raw(b"a")
    with pytest.raises(DeadlineExceededError) as caught:
        ring.write_raw(b"b", deadline_s=0.02)
    assert caught.value.retryable
    assert float(str(caught.value.facts["waited_s"])) >= 0.02
    found = ring.statistics()
    assert (found.blocked, found.full, found.overwritten) == (1, 1, 0)
    assert ring.read(kept)["data"].tobytes() == b"a"


def test_slots_are_taken_in_ring_order_and_any_free_one_when_the_next_are_taken(make_ring: MakeRing) -> None:
    ring = make_ring(slots=12, on_full="raise")
    refs = [ring.write_raw(b"x") for _ in range(12)]
    assert [ref.slot for ref in refs] == list(range(12))
    assert ring.discard(refs[10])
    assert ring.write_raw(b"y").slot == 10
    for slot in (9, 0):
        ring.discard(refs[slot])
    assert {ring.write_raw(b"z").slot, ring.write_raw(b"z").slot} == {0, 9}


def test_two_writes_at_once_never_share_a_slot(make_ring: MakeRing) -> None:
    ring = make_ring(slots=4, on_full="raise")
    leases = [ring.reserve() for _ in range(4)]
    assert {lease.slot for lease in leases} == {0, 1, 2, 3}
    refs = [lease.commit(1) for lease in reversed(leases)]
    # age is the order of commits
    assert [ref.name for ref in ring.ready_refs()] == [ref.name for ref in refs]


def test_a_checksum_is_taken_of_the_bytes_used(make_ring: MakeRing) -> None:
    ring = make_ring(checksum=True)
    first, again, other = (ring.write_raw(data) for data in (b"abc", b"abc", b"abd"))
    assert first.checksum == again.checksum != other.checksum
    with ring.acquire(first) as lease:
        assert lease.checksum == first.checksum
    assert [ref.checksum for ref in ring.ready_refs()] == [first.checksum, again.checksum, other.checksum]
    assert make_ring().write_raw(b"abc").checksum is None
