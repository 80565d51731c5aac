"""A trainer without learning: `python -m tests.e2e.programs.reader`.

Settings: `client`, those of its `ClientConfig`. Requests, any number at once: `read` (`ref`, `deadline_s`) and `take`
(`source`, `max_payloads`, `selector`, `wait_s`), both with `dwell_s` on a payload. Each payload is verified byte by
byte, in place where it is read in place, and released.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping

import numpy as np

from tests.e2e.programs import content
from tests.e2e.programs.request_lines import Message, answer, log_to_stderr
from ucxx_transport import ClientConfig, Payload, SlotRef, TransportError, UCXXClient


async def look_at(payload: Payload, meta: Mapping[str, object] | None, dwell_s: float) -> str:
    """What is wrong with a payload, empty when every byte is right; it is released. Without `meta` it names itself."""
    with payload:
        await asyncio.sleep(dwell_s)
        found = np.frombuffer(payload.buffer, dtype=np.uint8)
        match (meta["stream"], meta["sequence"]) if meta else content.name_of(found):
            case (int(stream), int(sequence)):
                return content.mismatch(found, stream, sequence)
            case unnamed:
                return str(unnamed)


async def read(client: UCXXClient, request: Message) -> Message:
    """Read one payload and look at every byte of it."""
    ref = SlotRef.from_bytes(bytes.fromhex(request["ref"]))
    began = time.monotonic()
    try:
        payload = await client.read(ref, deadline_s=request["deadline_s"])
    except TransportError as error:
        return {"outcome": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    seconds = time.monotonic() - began
    wrong = await look_at(payload, ref.meta, request["dwell_s"])
    if wrong:
        return {"outcome": "corrupt", "message": wrong, "seconds": seconds}
    return {"outcome": "delivered", "transport": payload.transport, "seconds": seconds}


async def take(client: UCXXClient, request: Message) -> Message:
    """Take some payloads and look at every byte of them."""
    source = SlotRef.from_bytes(bytes.fromhex(request["source"]))
    how = {name: request[name] for name in ("max_payloads", "selector", "wait_s")}
    try:
        payloads = await client.take(source, **how)
    except TransportError as error:
        return {"outcome": type(error).__name__, "message": str(error)}
    taken = [
        {
            "ref": payload.ref.to_bytes().hex(),
            "transport": payload.transport,
            "wrong": await look_at(payload, payload.record, request["dwell_s"]) if payload.record else "no record",
        }
        for payload in payloads
    ]
    return {"outcome": "taken", "payloads": taken}


async def answer_reads() -> None:
    """Read on request until told to stop."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 20)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = json.loads(await lines.readline())
    async with UCXXClient(ClientConfig(**settings["client"])) as client, asyncio.TaskGroup() as tasks:

        async def handle(request: Message) -> None:
            work = take if request["what"] == "take" else read
            answer({"id": request["id"], **await work(client, request)})

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
