"""The compiled part: `ring.c`, whose calls `ring/transitions.py` words. `hatch_build.py` builds it with the package."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from ucxx_transport.errors import ConfigError

__all__ = ["LIBRARY", "Calls", "Library", "RingStruct", "load"]

LIBRARY: Final = Path(__file__).with_name("libring.so")


class RingStruct(ctypes.Structure):
    """`struct ring` of `ring.c`: where a segment lies in this process, and its sizes."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("slots", ctypes.c_uint64),
        ("slot_bytes", ctypes.c_uint64),
        ("first_slot_word", ctypes.c_uint64),
        ("slot_words", ctypes.c_uint64),
        ("entries", ctypes.c_uint64),
        ("max_attempts", ctypes.c_uint64),
        ("first_payload", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
        ("envelope_bytes", ctypes.c_uint64),
    )


class Calls:
    """The functions of `ring.c`, with their types, of one loading of the library; the source says what each does."""

    library: ctypes.CDLL
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., int]: ...

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        memory, word, number, wait_ns = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_int64
        for name, types in (
            ("initialise", ()),
            ("reserve", (memory, ctypes.c_int, wait_ns)),
            ("commit", (memory, word, wait_ns)),
            ("abort", (memory, number, wait_ns)),
            ("discard", (word, word, wait_ns)),
            ("discard_until", (word, memory, wait_ns)),
            ("acquire", (memory, word, wait_ns)),
            ("finalise", (memory, word, number, wait_ns)),
            ("holds", (memory, memory, word, memory, wait_ns)),
            ("ready", (memory, word, memory, wait_ns)),
            ("take", (memory, memory, wait_ns)),
            ("count", (number, wait_ns)),
            ("snapshot", (memory, wait_ns)),
            ("publish", (memory, wait_ns)),
            ("wait", (ctypes.c_uint32, wait_ns)),
            ("wait_ready", (ctypes.c_uint32, wait_ns)),
        ):
            function = library[f"ring_{name}"]
            function.argtypes = (memory, *types)
            function.restype = ctypes.c_int
            setattr(self, name, function)
        for name in ("reserve_now", "commit_now", "acquire_now", "finalise_now"):
            # without argument types an array is passed as it is: half the time of a call
            setattr(self, name, library[f"ring_{name}"])
        self.abi = library.ring_abi
        self.abi.restype = ctypes.c_uint64


class Library(NamedTuple):
    """One shared library, called in two ways.

    Attributes:
        brief: keeps the interpreter's lock (GIL): for calls that take a microsecond, and never sleep.
        sleeping: releases it: for calls that may sleep.
    """

    brief: Calls
    sleeping: Calls


@cache
def load(path: Path = LIBRARY) -> Library:
    """The library, loaded once a process.

    Raises:
        ConfigError: it is missing, or of another platform or state of the source; says how to build it.
    """
    try:
        return Library(Calls(ctypes.PyDLL(str(path))), Calls(ctypes.CDLL(str(path))))
    except (OSError, AttributeError) as exc:
        raise ConfigError(
            f"the compiled part of ucxx_transport cannot be loaded ({exc}): install the package again with pip, which "
            "builds it with $CC, cc, gcc or clang, else with the compiler of the PyPI package ziglang",
            field="library",
            path=str(path),
        ) from exc
