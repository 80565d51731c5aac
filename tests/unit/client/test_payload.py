"""A payload's hold on its memory: dropped by release(), kept by every array taken from it."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.payloads import ref_to
from ucxx_transport.client.payload import BufferPool, Payload, Transport
from ucxx_transport.errors import ConfigError, ProtocolError, SlotError
from ucxx_transport.schema import Schema, TensorSpec

SCHEMA = Schema([TensorSpec("obs", (4, 3), "float32"), TensorSpec("done", (4,), "bool")])
SPECIMEN = {"obs": np.arange(12, dtype=np.float32).reshape(4, 3), "done": np.array([True, False, True, True])}


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(1 << 20)


def content(pool: BufferPool) -> npt.NDArray[np.uint8]:
    """SPECIMEN, packed, in a pooled buffer."""
    lent = pool.lend(SCHEMA.nbytes)
    lent[:] = 0
    views = SCHEMA.views(lent.data, writable=True)
    assert isinstance(views, dict)
    for name, array in SPECIMEN.items():
        target = views[name]
        assert isinstance(target, np.ndarray)
        target[...] = array
    return lent


def payload(pool: BufferPool, transport: Transport = "ucx") -> Payload:
    return Payload(ref_to(nbytes=SCHEMA.nbytes), content(pool), SCHEMA, transport)


def field(held: Payload, name: str) -> npt.NDArray[np.generic]:
    arrays = held.arrays
    assert isinstance(arrays, dict)
    array = arrays[name]
    assert isinstance(array, np.ndarray)
    return array


def test_arrays_are_views_of_the_payloads_own_memory(pool: BufferPool) -> None:
    held = payload(pool)
    assert set(held.arrays) == {"obs", "done"}
    for name, expected in SPECIMEN.items():
        np.testing.assert_array_equal(field(held, name), expected)
        assert np.shares_memory(field(held, name), np.frombuffer(held.buffer, dtype=np.uint8))
    assert held.arrays is held.arrays, "views are made once"
    assert held.nbytes == len(held.buffer) == SCHEMA.nbytes


def test_release_gives_the_memory_back_at_once_when_nothing_else_holds_it(pool: BufferPool) -> None:
    held = payload(pool)
    assert field(held, "done")[0]
    assert pool.statistics().lent == 1
    held.release()
    held.release()
    assert pool.statistics().lent == 0


def test_an_array_stays_valid_after_release_until_it_is_gone(pool: BufferPool) -> None:
    held = payload(pool)
    row = field(held, "obs")[1:2]
    held.release()
    assert pool.statistics().lent == 1
    pool.lend(SCHEMA.nbytes)[:] = 0xEE
    assert row.tolist() == [[3.0, 4.0, 5.0]]
    del row
    assert pool.statistics().lent == 0


def test_a_payload_that_is_just_dropped_gives_its_memory_back_too(pool: BufferPool) -> None:
    held = payload(pool)
    assert field(held, "done")[0]
    del held
    assert pool.statistics().lent == 0


def test_a_payload_does_not_keep_the_arrays_it_no_longer_holds(pool: BufferPool) -> None:
    held = payload(pool)
    watched = weakref.ref(field(held, "obs"))
    held.release()
    assert watched() is None


def test_the_context_manager_releases(pool: BufferPool) -> None:
    with payload(pool) as held:
        assert field(held, "done")[0]
    assert pool.statistics().lent == 0


def test_a_released_payload_says_so_instead_of_showing_something_else(pool: BufferPool) -> None:
    held = payload(pool)
    held.release()
    with pytest.raises(SlotError, match="released"):
        _ = held.arrays
    with pytest.raises(SlotError, match="released"):
        _ = held.buffer
    assert "released" in repr(held)
    assert held.nbytes == SCHEMA.nbytes


def test_a_payload_is_read_only(pool: BufferPool) -> None:
    seen = payload(pool)
    assert seen.buffer.readonly
    for name in SPECIMEN:
        assert not field(seen, name).flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            field(seen, name)[...] = 0


def test_a_raw_payload_is_its_bytes(pool: BufferPool) -> None:
    lent = pool.lend(5)
    lent[:] = [1, 2, 3, 4, 5]
    held = Payload(ref_to(nbytes=5), lent, None, "ucx")
    assert field(held, "data").tolist() == [1, 2, 3, 4, 5]
    assert bytes(held.buffer) == b"\1\2\3\4\5"


def test_bytes_that_are_too_few_for_the_schema_are_a_protocol_error(pool: BufferPool) -> None:
    held = Payload(ref_to(nbytes=10), pool.lend(10), SCHEMA, "ucx")
    with pytest.raises(ProtocolError):
        _ = held.arrays


def test_copied_into_the_callers_memory_the_pools_is_free(pool: BufferPool) -> None:
    into = bytearray(SCHEMA.nbytes + 100)
    moved = payload(pool).copied_into(into)
    assert pool.statistics().lent == 0
    np.testing.assert_array_equal(field(moved, "obs"), SPECIMEN["obs"])
    assert field(moved, "obs").flags.writeable
    assert np.shares_memory(field(moved, "obs"), np.frombuffer(into, dtype=np.uint8))
    assert not any(into[SCHEMA.nbytes :])


@pytest.mark.parametrize(
    "into",
    [bytearray(10), bytes(SCHEMA.nbytes), memoryview(bytearray(4 * SCHEMA.nbytes))[::2]],
    ids=["short", "read_only", "strided"],
)
def test_memory_that_cannot_take_the_payload_is_refused_with_the_reason(
    pool: BufferPool, into: bytes | bytearray | memoryview
) -> None:
    with pytest.raises(ConfigError, match="writable, contiguous"):
        payload(pool).copied_into(into)


def test_any_writable_buffer_will_do(pool: BufferPool) -> None:
    into = np.zeros((SCHEMA.nbytes + 7) // 8, dtype=np.float64)
    moved = payload(pool).copied_into(into.data)
    assert np.shares_memory(field(moved, "done"), into)
