"""A held interpreter: what a long call of C code that keeps the lock does to a process."""

from __future__ import annotations

import ctypes

__all__ = ["hold_interpreter"]


def hold_interpreter(seconds: float) -> None:
    """Sleep with the interpreter's lock held: no thread of this process runs Python."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL keeps the lock
