"""The compiled part: `ring.c`, whose calls `ring/transitions.py` words, and `flight.c`, likewise `link/flight.py`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from ucxx_transport.errors import ConfigError
from ucxx_transport.native.build import BUILD, LIBRARY, source_hash

_memory, _word, _number, _wait_ns = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_int64
_ARGUMENTS: Final = {
    "initialise": (),
    "discard": (_word, _word, _wait_ns),
    "holds": (_number, _memory, _memory, _word, _memory, _wait_ns),
    "take": (_memory, _memory, _wait_ns),
    "count": (_number, _wait_ns),
    "snapshot": (_memory, _wait_ns),
    "publish": (_memory, _wait_ns),
    "wait": (ctypes.c_uint32, _wait_ns),
    "wait_ready": (ctypes.c_uint32, _wait_ns),
}
"""What the functions `ring_…` take behind the address of their `struct ring`. The others take a hold alone: without
argument types an array is passed as it is, in half the time of a call."""


class Library(NamedTuple):
    """One library: calls of `sleeping` release the interpreter's lock (GIL), those of `brief`, of 1 µs, do not."""

    brief: ctypes.PyDLL
    sleeping: ctypes.CDLL


@cache
def load(path: Path = LIBRARY) -> Library:
    """The library, loaded once a process; a ConfigError where it is missing, or of another source or platform."""
    try:
        library = Library(ctypes.PyDLL(str(path)), ctypes.CDLL(str(path)))
        source = library.brief.ring_source
        source.restype = _word
        if (found := source()) == source_hash():
            for way in library:
                for name, types in _ARGUMENTS.items():
                    getattr(way, f"ring_{name}").argtypes = (_memory, *types)
            return library
        why = f"it was compiled from another source, {found:016x}"
    except (OSError, AttributeError) as exc:
        why = str(exc)
    raise ConfigError(
        f"the compiled part of ucxx_transport cannot be used ({why}). Build it with `python {BUILD}`, or install the "
        "package again with pip: either takes $CC, else cc, gcc, clang, or the compiler of the PyPI package ziglang",
        field="library",
        path=str(path),
    )
