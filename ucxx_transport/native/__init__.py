"""The compiled part: `ring.c`, whose calls `ring/transitions.py` words, and `flight.c`, likewise `link/ucx_flight.py`.

`hatch_build.py` builds it with the package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ucxx_transport.errors import ConfigError
from ucxx_transport.native.build import BUILD, LIBRARY, source_hash

__all__ = ["LIBRARY", "Calls", "Library", "load"]


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
            ("discard", (word, word, wait_ns)),
            ("holds", (number, memory, memory, word, memory, wait_ns)),
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
        for name in ("reserve", "commit", "acquire", "finalise"):
            # of a hold alone: without argument types an array is passed as it is, in half the time of a call
            setattr(self, name, library[f"ring_{name}"])


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
        ConfigError: it is missing, of another platform, or compiled from another source than the one beside it; says
            how to build it.
    """
    try:
        library = ctypes.PyDLL(str(path))
        source = library.ring_source
        source.restype = ctypes.c_uint64
        if (found := source()) == source_hash():
            return Library(Calls(library), Calls(ctypes.CDLL(str(path))))
        why = f"it was compiled from another source, {found:016x}"
    except (OSError, AttributeError) as exc:
        why = str(exc)
    raise ConfigError(
        f"the compiled part of ucxx_transport cannot be used ({why}). Build it with `python {BUILD}`, or install the "
        "package again with pip: either takes $CC, cc, gcc or clang, else the compiler of the PyPI package ziglang",
        field="library",
        path=str(path),
    )
