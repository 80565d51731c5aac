"""The critical section round a segment's headers: one robust mutex in the segment itself, shared by all its processes.

What must hold, and what makes it hold:

| threat                                    | answer                                                                   |
|-------------------------------------------|--------------------------------------------------------------------------|
| the holder is killed, at any instruction  | robust mutex: the kernel hands it on (`EOWNERDEAD`); `repair` tidies up  |
| KeyboardInterrupt, at any bytecode        | lock and unlock are C functions called by the `with` statement itself,   |
|                                           | with no bytecode between them and the block they protect; `repair` again |
| the holder is stopped (SIGSTOP)           | a bounded wait, then `DeadlineExceededError`; never a take-over          |
| a finaliser or signal handler runs inside | the mutex is recursive and counts: a section in a section is refused     |
| the section, in the same thread           | with `ReenteredError`, which finalisers answer by queueing               |

CPython handles signals at the start of a function, at a backward jump, and after a call that is a bytecode of its own.
`with` calls `__enter__` within `BEFORE_WITH`, and on leaving a block nothing of the three lies before `__exit__`. Both
are `functools.partial` over the ctypes function here, so neither is a Python function that could be interrupted at its
start.

Waiting is polling: first 40 turns that only yield (a section takes a few µs), then sleeps of 50 µs doubling to 1 ms. A
blocking `pthread_mutex_clocklock` would not notice Ctrl-C, and its `EOWNERDEAD` would come back through a call that can
be interrupted before the mutex is made consistent.
"""

from __future__ import annotations

import ctypes
import errno
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple, cast

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import BusyError, ConfigError, DeadlineExceededError, SlotError
from ucxx_transport.ring.layout import IN_TRANSITION_WORD, MUTEX_BYTE, MUTEX_BYTES

ArgumentTs = TypeVarTuple("ArgumentTs")
ResultT = TypeVar("ResultT")

# <pthread.h> of glibc on Linux, the same on every architecture.
_PROCESS_SHARED: Final = 1
_RECURSIVE: Final = 1
_ROBUST: Final = 1

# pthread_mutex_t begins with `int lock; unsigned count` (<bits/struct_mutex.h>): the static initialisers of compiled
# programs spell this layout out, so it cannot change. `initialise_mutex` verifies it nevertheless.
_LOCK_INDEX: Final = 0
_COUNT_INDEX: Final = 1
_THREAD_ID_MASK: Final = 0x3FFFFFFF

_OWNER_DEAD: Final = errno.EOWNERDEAD
_YIELDING_TURNS: Final = 40
_FIRST_SLEEP_S: Final = 50e-6
_LONGEST_SLEEP_S: Final = 1e-3

# PyDLL keeps the GIL: the calls take a fraction of a microsecond and never block.
_libc: Final = ctypes.PyDLL(None)


class ReenteredError(BusyError):
    """The ring was used from inside its own critical section: by a finaliser or a signal handler of this thread."""


class _Guard(Protocol):
    """`with guard as code:` tries the lock: 0 taken, EOWNERDEAD taken from the dead, EBUSY not. Leaving unlocks."""

    def __enter__(self) -> int: ...
    def __exit__(self, *exc_info: object) -> None: ...


class SegmentLock:
    """Runs functions one at a time among all threads and processes that map a segment."""

    __slots__ = ("_clock", "_guard", "_key", "_make_consistent", "_mutex", "_repair", "_unlock", "_words")

    def __init__(
        self,
        words: memoryview,
        *,
        key: bytes,
        repair: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind to the initialised mutex of a segment.

        Args:
            words: the segment as 64-bit words; they keep the mapping alive.
            key: names the mutex whatever the mapping: two handles on one segment in one process share it.
            repair: tidies up after a holder that was cut off in the middle of a transition; given 1 when that holder
                died, 0 when it lives. Called with the lock held, and again when it is itself cut off.
            clock: monotonic seconds.
        """
        mutex = words.cast("B")[MUTEX_BYTE : MUTEX_BYTE + MUTEX_BYTES]
        self._words = words
        self._mutex = mutex.cast("I")
        self._key = key
        self._repair = repair
        self._clock = clock
        address = _address_of(mutex)
        self._guard = _make_guard(address)
        self._unlock = partial(_unlock, address)
        self._make_consistent = partial(_consistent, address)

    @property
    def holder_thread_id(self) -> int:
        """Kernel id of the thread that holds the lock now, 0 when none does."""
        return self._mutex[_LOCK_INDEX] & _THREAD_ID_MASK

    def run(self, wait_s: float, body: Callable[[*ArgumentTs], ResultT], *args: *ArgumentTs) -> ResultT:
        """Call `body(*args)` inside the critical section and return what it returns.

        Args:
            wait_s: how long to wait for the lock at most.
            body: must not wait, and must commit each change by one store.
            *args: its arguments.

        Raises:
            DeadlineExceededError: the lock was not to be had in time: its holder is stopped.
            ReenteredError: this thread is inside the section already.
            SlotError: the mutex is damaged.
        """
        waiter: _Waiter | None = None
        while True:
            with self._guard as code:
                died = code == _OWNER_DEAD
                if died:
                    # Nothing may come in between: unlocked as it is now, the mutex would be unusable for ever.
                    self._make_consistent()
                if died or code == 0:
                    if self._mutex[_COUNT_INDEX] != 1:
                        self._settle_nesting()
                    if died or self._words[IN_TRANSITION_WORD]:
                        self._repair(int(died))
                    return body(*args)
            if code != errno.EBUSY:
                raise SlotError("the lock of the segment is damaged; recreate the ring", errno=code)
            if waiter is None:
                waiter = _Waiter(self, wait_s, self._clock)
            waiter.pause()

    def _settle_nesting(self) -> None:
        """Refuse a section within a section; take over one that no frame of this thread is in any more.

        The latter cannot happen by a signal (see above), but by an exception out of a debugger's trace function.
        """
        frame = sys._getframe(1).f_back  # noqa: SLF001 - the only way to see whether an outer section is still running
        while frame is not None:
            if frame.f_code is _RUN_CODE and frame.f_locals["self"]._key == self._key:  # noqa: SLF001 - of this class
                raise ReenteredError(
                    "the ring was used by a finaliser or signal handler in the middle of one of its own transitions; "
                    "set a flag there and act on it later"
                )
            frame = frame.f_back
        while self._mutex[_COUNT_INDEX] > 1:
            self._unlock(None, None, None)


_RUN_CODE: Final = SegmentLock.run.__code__


class _Waiter:
    """The pauses of one wait for the lock, and its end."""

    __slots__ = ("_clock", "_deadline", "_lock", "_turns", "_wait_s")

    def __init__(self, lock: SegmentLock, wait_s: float, clock: Callable[[], float]) -> None:
        self._lock = lock
        self._wait_s = wait_s
        self._clock = clock
        self._deadline = clock() + wait_s
        self._turns = 0

    def pause(self) -> None:
        """Let the holder get on.

        Raises:
            DeadlineExceededError: the wait is over.
        """
        self._turns += 1
        if self._turns <= _YIELDING_TURNS:
            time.sleep(0)
            return
        remaining_s = self._deadline - self._clock()
        if remaining_s <= 0:
            raise DeadlineExceededError(
                "the ring's lock is held by a thread that does not get on (stopped?)",
                waited_s=self._wait_s,
                holder_thread_id=self._lock.holder_thread_id,
            )
        sleep_s = pause_s(self._turns - _YIELDING_TURNS, first_s=_FIRST_SLEEP_S, longest_s=_LONGEST_SLEEP_S)
        time.sleep(min(sleep_s, remaining_s))


def initialise_mutex(words: memoryview) -> None:
    """Make the robust, recursive mutex of a segment that nobody else uses yet.

    Args:
        words: the segment as 64-bit words.

    Raises:
        ConfigError: this C library's mutex is not the one this module knows.
    """
    mutex = words.cast("B")[MUTEX_BYTE : MUTEX_BYTE + MUTEX_BYTES]
    address = ctypes.c_void_p(_address_of(mutex))
    attributes = ctypes.create_string_buffer(64)
    steps = (
        (_libc.pthread_mutexattr_init, attributes),
        (_libc.pthread_mutexattr_settype, attributes, _RECURSIVE),
        (_libc.pthread_mutexattr_setpshared, attributes, _PROCESS_SHARED),
        (_libc.pthread_mutexattr_setrobust, attributes, _ROBUST),
        (_libc.pthread_mutex_init, address, attributes),
        (_libc.pthread_mutexattr_destroy, attributes),
    )
    for function, *arguments in steps:
        code = function(*arguments)
        if code != 0:
            raise ConfigError(f"{function.__name__} failed: robust mutexes are not supported here", errno=code)
    guard = _make_guard(address.value or 0)
    with guard, guard:
        if mutex.cast("I")[_COUNT_INDEX] != 2:
            raise ConfigError("this C library's pthread_mutex_t is unknown; ucxx_transport runs on Linux with glibc")


def _address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _make_guard(address: int) -> _Guard:
    # `__enter__` and `__exit__` are looked up on the type, hence a type for each mutex.
    members: dict[str, Any] = {
        "__slots__": (),
        "__enter__": staticmethod(partial(_trylock, address)),
        "__exit__": staticmethod(partial(_unlock, address)),
    }
    return cast("_Guard", type("_Guard", (), members)())


# `__exit__` is given three arguments that pthread_mutex_unlock ignores, as every C calling convention of Linux lets it.
# `callable` turns each into an integer without running any Python code: half the cost of `py_object`.
_ignored: Final = SimpleNamespace(from_param=callable)

_trylock: Final = _libc["pthread_mutex_trylock"]
_trylock.argtypes = [ctypes.c_void_p]
_trylock.restype = ctypes.c_int
_unlock: Final = _libc["pthread_mutex_unlock"]
# ctypes asks of an argument's type only that it has `from_param`; mypy expects one of ctypes' own
_unlock.argtypes = [ctypes.c_void_p, *cast("list[type[ctypes.c_void_p]]", [_ignored] * 3)]
_unlock.restype = None
_consistent: Final = _libc["pthread_mutex_consistent"]
_consistent.argtypes = [ctypes.c_void_p]
_consistent.restype = ctypes.c_int
