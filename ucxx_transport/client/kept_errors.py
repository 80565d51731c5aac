"""Errors that are kept (a batch's outcome, a log) must not keep the memory of the read that raised them.

The traceback of an error refers to the frames it came through, and their variables to receive buffers of any size.
"""

from __future__ import annotations

import traceback
from pathlib import Path

_OWN_CODE = str(Path(__file__).parent)


def forget_frames(error: BaseException) -> None:
    """Empty the variables of the frames that `error` has left behind, from this package on downwards.

    Frames of whoever called into the package, and those that still run, stay as they are; so do the traceback's lines.
    """
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
            trace = trace.tb_next
        traceback.clear_frames(trace)
        link = link.__context__
