"""SIGTERM as an orderly end: by default it ends a Python program without any of its clean-up."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Final

_STATUS: Final = 128 + signal.SIGTERM


def exit_on_sigterm() -> None:
    """From now on SIGTERM is `SystemExit(143)` in the main thread: `with` blocks and exit handlers run.

    So a publisher says that its source goes, instead of leaving it to be missed. A handler that the program has
    already is left alone. Call it in the main thread.

    Raises:
        ValueError: called in another thread.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def _exit(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up is bounded; a second one must not cut it short
    sys.exit(_STATUS)
