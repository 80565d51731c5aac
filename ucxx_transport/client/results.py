"""Results of reads: several at once, a payload or an error each, without the memory that a failed one holds."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import TransportError
from ucxx_transport.schema import SlotRef

_OWN_CODE = str(Path(__file__).parent)


async def gather_results(
    read: Callable[[SlotRef], Awaitable[Payload]], refs: Sequence[SlotRef]
) -> list[Payload | TransportError]:
    """Read concurrently; one that fails costs none of the others.

    Returns:
        A list as long as `refs`: the payload, or the error that `read` raised. Cancelled, or ended by an error of
        another kind, it releases what it has.
    """

    async def result(ref: SlotRef) -> Payload | TransportError:
        try:
            return await read(ref)
        except TransportError as error:
            return error

    reads: list[asyncio.Task[Payload | TransportError]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            reads.extend(tasks.create_task(result(ref)) for ref in refs)
    except BaseException:
        for done in reads:  # the traceback keeps the tasks, they their results, and these their slots and buffers
            if not done.cancelled() and done.exception() is None and isinstance(payload := done.result(), Payload):
                payload.release()
        raise
    return [done.result() for done in reads]


def clear_traceback_frames(error: BaseException) -> None:
    """Empty the variables of the frames that `error` has left behind, from this package on downwards.

    They refer to receive buffers of any size, which an error that is kept (a batch's result, a log) must not keep.
    Frames of the package's callers, and those that still run, stay as they are; so do the traceback's lines.
    """
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
            trace = trace.tb_next
        traceback.clear_frames(trace)
        link = link.__context__
