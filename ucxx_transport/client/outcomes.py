"""Several reads at once: each one's payload or error, and nothing kept when the whole is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import TransportError
from ucxx_transport.schema import SlotRef


async def read_all(
    read: Callable[[SlotRef], Awaitable[Payload]], refs: Sequence[SlotRef]
) -> list[Payload | TransportError]:
    """Read concurrently; one that fails costs none of the others.

    Args:
        read: reads one payload.
        refs: what to read.

    Returns:
        A list as long as `refs`: the payload, or the error that `read` raised. Cancelled, or ended by an error of
        another kind, it releases what it has.
    """

    async def outcome(ref: SlotRef) -> Payload | TransportError:
        try:
            return await read(ref)
        except TransportError as error:
            return error

    reads: list[asyncio.Task[Payload | TransportError]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            reads.extend(tasks.create_task(outcome(ref)) for ref in refs)
    except BaseException:
        for done in reads:  # the traceback keeps the tasks, they their results, and these their slots and buffers
            if not done.cancelled() and done.exception() is None and isinstance(payload := done.result(), Payload):
                payload.release()
        raise
    return [done.result() for done in reads]
