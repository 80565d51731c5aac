"""A trainer without learning: `python -m tests.e2e.programs.reader`.

Settings: `client`, those of its `ClientConfig`. Requests: `read` (`ref`, `deadline_s`, `dwell_s` on the payload), any
number at once; each payload is verified byte by byte, in place where it is read in place, and released.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np

from tests.e2e.programs import content
from tests.e2e.programs.request_lines import Message, answer, log_to_stderr
from ucxx_transport import ClientConfig, SlotRef, TransportError, UCXXClient


def what_is_wrong(payload: content.Bytes, ref: SlotRef) -> str:
    """Empty when every byte is right. A reference found in the ring has no `meta`: the payload names itself."""
    name = (ref.meta["stream"], ref.meta["sequence"]) if ref.meta else content.name_of(payload)
    match name:
        case (int(stream), int(sequence)):
            return content.mismatch(payload, stream, sequence)
        case _:
            return str(name)


async def read(client: UCXXClient, request: Message) -> Message:
    """Read one payload and look at every byte of it."""
    ref = SlotRef.from_bytes(bytes.fromhex(request["ref"]))
    began = time.monotonic()
    try:
        payload = await client.read(ref, deadline_s=request["deadline_s"])
    except TransportError as error:
        return {"outcome": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    seconds = time.monotonic() - began
    with payload:
        await asyncio.sleep(request["dwell_s"])
        wrong = what_is_wrong(np.frombuffer(payload.buffer, dtype=np.uint8), ref)
        transport = payload.transport
    if wrong:
        return {"outcome": "corrupt", "message": wrong, "seconds": seconds}
    return {"outcome": "delivered", "transport": transport, "seconds": seconds}


async def answer_reads() -> None:
    """Read on request until told to stop."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 20)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = json.loads(await lines.readline())
    async with UCXXClient(ClientConfig(**settings["client"])) as client, asyncio.TaskGroup() as tasks:

        async def handle(request: Message) -> None:
            answer({"id": request["id"], **await read(client, request)})

        answer({"ready": True})
        while line := await lines.readline():
            tasks.create_task(handle(json.loads(line)))
    pipe.close()


def main() -> None:
    """The program."""
    log_to_stderr()
    asyncio.run(answer_reads())


if __name__ == "__main__":
    main()
