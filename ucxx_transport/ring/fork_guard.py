"""A fork inside a critical section, by a signal handler or finaliser of the thread that holds it.

The child would run the rest of the transition too, without the lock: that stays with the parent's thread. So the child
gets a private copy of the headers, in their place, in which it may do so unnoticed; its handle is then of
no more use, and says so. A fork anywhere else needs nothing: the child is one more process with a handle.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ucxx_transport.ring.core import RingCore

_MAP_FIXED: Final = 0x10
"""<bits/mman-linux.h>; `mmap` has no name for it."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]

_cores: weakref.WeakSet[RingCore] = weakref.WeakSet()
_inside: list[RingCore] = []


def watch(core: RingCore) -> None:
    """Have a handle's headers made private in a child that is forked inside its critical section."""
    _cores.add(core)


def _before() -> None:
    # Asked before the fork: when the child runs, the parent may have left the section already.
    thread_id = threading.get_native_id()
    _inside[:] = [core for core in list(_cores) if core.holder_thread_id == thread_id]


def _in_parent() -> None:
    _inside.clear()


def _in_child() -> None:
    for core in _inside:
        _make_private(core)
        core.severed = True
    _inside.clear()


def _make_private(core: RingCore) -> None:
    nbytes = core.identity.geometry.header_bytes
    headers = core.segment.memory[:nbytes].copy()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    mapped = _libc.mmap(core.segment.address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if mapped != core.segment.address:
        os._exit(70)  # EX_SOFTWARE: to go on would corrupt the ring of processes that did nothing wrong
    core.segment.memory[:nbytes] = headers


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
