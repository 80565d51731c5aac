"""The compiled part: `ring.c`, whose calls `ring/transitions.py` words. `hatch_build.py` builds it with the package."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from ucxx_transport.errors import ConfigError

__all__ = ["LIBRARY", "Library", "load"]

LIBRARY: Final = Path(__file__).with_name("libring.so")


class Library(NamedTuple):
    """One shared library, called in two ways.

    Attributes:
        brief: keeps the interpreter's lock (GIL): for calls that take a microsecond, and never sleep.
        patient: releases it: for calls that may sleep.
    """

    brief: ctypes.PyDLL
    patient: ctypes.CDLL


@cache
def load(path: Path = LIBRARY) -> Library:
    """The library, loaded once a process.

    Args:
        path: the file.

    Raises:
        ConfigError: it is missing or is of another platform; says how to build it.
    """
    try:
        return Library(ctypes.PyDLL(str(path)), ctypes.CDLL(str(path)))
    except OSError as exc:
        raise ConfigError(
            f"the compiled part of ucxx_transport cannot be loaded ({exc}): install the package again with pip, which "
            "builds it with $CC, cc, gcc or clang, else with the compiler of the PyPI package ziglang",
            field="library",
            path=str(path),
        ) from exc
