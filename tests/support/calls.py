"""Calls of Python functions: what a read costs in them says how long a small one takes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ucxx_transport
from ucxx_transport.machine import Wakeup

__all__ = ["LINK", "PACKAGE", "counting"]

PACKAGE = str(Path(ucxx_transport.__file__).parent)
# A link, and the one call of its that lies outside: whether it has to wake the other end depends on that one's speed.
LINK = (str(Path(PACKAGE, "testing")), str(Path(PACKAGE, "link")), Wakeup.notify.__code__.co_filename)


@contextmanager
def counting(names: list[str], *, but: tuple[str, ...] = ()) -> Iterator[None]:
    """Note this thread's calls into the package, and those of threads that begin meanwhile.

    Args:
        names: gets the name of each function called.
        but: folders and files whose functions are left out.
    """

    def note(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and not file.startswith(but):
            names.append(frame.f_code.co_qualname)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
