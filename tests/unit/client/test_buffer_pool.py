"""Receive buffers: lent to one, back only when nobody can see them any more, and not for ever kept."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from ucxx_transport import ConfigError
from ucxx_transport.client.payload import BufferPool, size_class

Bytes = npt.NDArray[np.uint8]
PLENTY = 1 << 30


def where(array: npt.NDArray[np.generic]) -> int:
    """The address of an array's memory."""
    return int(array.ctypes.data)


VIEWS: dict[str, Callable[[Bytes], object]] = {
    "slice": lambda lent: lent[64:128],
    "strided": lambda lent: lent[::7],
    "reshape": lambda lent: lent[:4096].reshape(64, 64),
    "other_type": lambda lent: lent[:4096].view(np.float32),
    "transpose": lambda lent: lent[:4096].reshape(64, 64).T,
    "view_of_a_view": lambda lent: lent[64:].view(np.float64)[3:][::2],
    "memoryview": lambda lent: lent.data,
    "slice_of_memoryview": lambda lent: memoryview(lent.data)[100:200],
    "cast_memoryview": lambda lent: lent[:4096].data.cast("B").cast("Q"),
    "frombuffer": lambda lent: np.frombuffer(lent.data[64:128], dtype=np.uint16),
    "asarray": np.asarray,
    "read_only": lambda lent: np.lib.stride_tricks.as_strided(lent, writeable=False),
    "dlpack": np.from_dlpack,
    "ctypes": lambda lent: lent.ctypes.data_as(ctypes.c_void_p),
    "in_a_container": lambda lent: {"deep": [(lent[1:2],)]},
}


def test_a_buffer_is_not_lent_again_while_anything_made_from_it_is_left() -> None:
    for name, view in VIEWS.items():
        with row(view=name):
            pool = BufferPool(PLENTY)
            lent = pool.lend(8192)
            address = where(lent)
            left = view(lent)
            del lent
            others = [pool.lend(8192) for _ in range(3)]
            assert address not in {where(other) for other in others}
            assert pool.statistics().lent == 4
            del left
            gc.collect()
            assert pool.statistics().lent == 3
            assert where(pool.lend(8192)) == address


def test_a_buffer_that_is_free_is_used_again_instead_of_a_new_one() -> None:
    pool = BufferPool(PLENTY)
    addresses = set()
    for _ in range(50):
        addresses.add(where(pool.lend(100_000)))
    assert len(addresses) == 1
    assert pool.statistics().allocations == 1


def test_the_last_view_may_die_in_another_thread() -> None:
    pool = BufferPool(PLENTY)
    held = [pool.lend(4096)[10:20]]
    address = where(held[0]) - 10
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pool.statistics().lent == 0
    assert where(pool.lend(4096)) == address


def test_threads_that_lend_and_drop_at_once_never_share_a_buffer() -> None:
    pool = BufferPool(PLENTY)
    clashes: list[int] = []
    start = threading.Barrier(4)

    def work(mark: int) -> None:
        start.wait()
        for turn in range(500):
            lent = pool.lend(4096)
            lent[:16] = mark
            view = lent[:16]
            del lent
            if turn % 3 == 0:
                pool.lend(4096)[:] = 255 - mark
            clashes.extend(int(byte) for byte in view if byte != mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert pool.statistics().lent == 0
    assert pool.statistics().allocations <= 8


def test_a_view_that_dies_inside_the_pools_own_lock_does_not_deadlock() -> None:
    pool = BufferPool(PLENTY)

    class Cycle:
        """Keeps a lent buffer alive until the garbage collector, which runs at any allocation, finds it."""

        def __init__(self, lent: Bytes) -> None:
            self.lent = lent
            self.me = self

    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            Cycle(pool.lend(4096))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert pool.statistics().lent == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 20))
def test_a_lent_array_is_writable_aligned_and_exactly_as_long_as_asked(nbytes: int) -> None:
    lent = BufferPool(PLENTY).lend(nbytes)
    assert lent.nbytes == nbytes
    assert lent.dtype == np.uint8
    assert lent.flags.writeable
    assert lent.flags.c_contiguous
    assert where(lent) % 64 == 0
    lent[:] = 7
    assert lent.data.nbytes == nbytes


@given(st.integers(0, 1 << 46))
def test_size_classes_cover_with_at_most_a_quarter_of_slack(nbytes: int) -> None:
    size = size_class(nbytes)
    assert size >= nbytes
    assert size <= max(4096, nbytes * 5 // 4 + 1)
    assert size_class(size) == size
    assert size_class(nbytes + 1) >= size


def test_idle_memory_is_bounded() -> None:
    pool = BufferPool(64 << 10)
    lent = [pool.lend(16 << 10) for _ in range(20)]
    assert pool.statistics().lent == 20
    lent.clear()
    statistics = pool.statistics()
    assert statistics.lent == 0
    assert statistics.idle_bytes == 64 << 10


def test_buffers_larger_than_the_whole_bound_are_given_back_at_once() -> None:
    pool = BufferPool(64 << 10)
    lent = pool.lend(1 << 20)
    del lent
    assert pool.statistics().idle_bytes == 0


def test_a_bound_of_zero_keeps_nothing_and_still_lends() -> None:
    pool = BufferPool(0)
    for _ in range(3):
        lent = pool.lend(4096)
        lent[:] = 1
        del lent
    statistics = pool.statistics()
    assert (statistics.lent, statistics.idle_bytes, statistics.allocations) == (0, 0, 3)


def test_sizes_no_longer_asked_for_make_room_for_those_that_are() -> None:
    pool = BufferPool(64 << 10)
    old = [pool.lend(16 << 10) for _ in range(4)]
    old.clear()
    new = [pool.lend(32 << 10) for _ in range(2)]
    new.clear()
    assert pool.statistics().idle_bytes <= 64 << 10
    before = pool.statistics().allocations
    again = [pool.lend(32 << 10) for _ in range(2)]
    assert pool.statistics().allocations == before
    assert len(again) == 2


def test_a_buffer_that_a_link_still_holds_is_not_lent_again() -> None:
    pool = BufferPool(PLENTY)
    lent = pool.lend(8192)
    address = where(lent)
    held_by_the_link = memoryview(lent.data)[:100]  # what a posted receive keeps until UCX has released it
    del lent
    gc.collect()
    others = [pool.lend(8192) for _ in range(4)]
    assert address not in {where(other) for other in others}
    assert pool.statistics().lent == 5
    held_by_the_link.release()
    assert where(pool.lend(8192)) == address


def test_a_lent_buffer_outlives_its_pool() -> None:
    pool = BufferPool(PLENTY)
    lent = pool.lend(4096)
    lent[:] = 9
    view = lent[5:10]
    del pool, lent
    gc.collect()
    assert view.tolist() == [9] * 5


class Locked:
    """Notes which memory was page-locked, and that it is no more when its array goes."""

    def __init__(self) -> None:
        self.pieces: dict[int, int] = {}
        self.ever = 0

    def __call__(self, memory: Bytes) -> None:
        address = where(memory)
        self.pieces[address] = memory.nbytes
        self.ever += 1
        weakref.finalize(memory, self.pieces.pop, address)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8))
def test_page_locked_buffers_share_no_page(sizes: list[int]) -> None:
    locked = Locked()
    pool = BufferPool(PLENTY, locked)
    lent = [pool.lend(nbytes) for nbytes in sizes]
    for array in lent:
        address = where(array)
        assert address % 4096 == 0
        assert locked.pieces[address] % 4096 == 0
        assert locked.pieces[address] >= array.nbytes
    assert len(locked.pieces) == len(sizes)


def test_a_buffer_is_page_locked_once_for_as_long_as_it_is_kept() -> None:
    locked = Locked()
    pool = BufferPool(1 << 20, locked)
    for _ in range(5):
        pool.lend(100_000)
    assert (locked.ever, len(locked.pieces)) == (1, 1)
    view = pool.lend(2 << 20)[5:10]  # more than the pool keeps
    assert len(locked.pieces) == 2
    del view
    assert pool.statistics().lent == 0
    assert 2 << 20 not in locked.pieces.values()
    pool.lend(4096)
    assert pool.statistics().idle_bytes > 0
    assert len(locked.pieces) > 0
    pool.close()
    assert locked.pieces == {}


def test_a_closed_pool_keeps_nothing_of_what_comes_back() -> None:
    locked = Locked()
    pool = BufferPool(PLENTY, locked)
    lent = pool.lend(4096)
    lent[:] = 3
    pool.close()
    assert lent.tolist() == [3] * 4096
    assert len(locked.pieces) == 1
    del lent
    assert pool.statistics().idle_bytes == 0
    assert locked.pieces == {}


def test_a_buffer_that_cannot_be_page_locked_is_not_lent_and_the_next_may_be() -> None:
    def refuse(memory: Bytes) -> None:
        raise ConfigError(f"no {memory.nbytes} bytes")

    pool = BufferPool(PLENTY, refuse)
    with pytest.raises(ConfigError, match="no 8192 bytes"):
        pool.lend(5000)
    assert pool.statistics().lent == 0
