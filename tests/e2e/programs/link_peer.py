"""The other end of a UCX link: `python -m tests.e2e.programs.link_peer`.

Settings: `shm_lanes`, `port` (0 for any); the answer names the port. Each connection sends requests of 16 bytes, a
kind and a size, both u64; every request is announced on standard output as `{"request": kind}`:

| kind | what happens                                       |
|------|----------------------------------------------------|
| 1    | a reply of that many bytes 0x5a, at once           |
| 2    | no reply                                           |
| 3    | the connection is closed                           |
| 4    | a receive of that many bytes is posted             |
| 5    | the reply of kind 1, after the next line on stdin  |
"""

from __future__ import annotations

import asyncio
import json
import sys

from tests.e2e.programs.request_lines import answer, log_to_stderr
from ucxx_transport import TransportError
from ucxx_transport.link.base import Endpoint
from ucxx_transport.link.ucxx import UCXXLink

REPLY, SILENT, CLOSE, RECEIVE, LATE = 1, 2, 3, 4, 5
CONTENT = 0x5A


def request(kind: int, nbytes: int = 0) -> bytes:
    """One request."""
    return kind.to_bytes(8, "little") + nbytes.to_bytes(8, "little")


async def serve(endpoint: Endpoint, go: asyncio.Queue[None]) -> None:
    """Answer one connection until it ends."""
    asked = bytearray(16)
    try:
        while True:
            await endpoint.post_receive(asked).wait()
            kind, nbytes = (int.from_bytes(asked[at : at + 8], "little") for at in (0, 8))
            answer({"request": kind})
            if kind == LATE:
                await go.get()
            if kind in {REPLY, LATE}:
                await endpoint.post_send(bytes([CONTENT]) * nbytes).wait()
            elif kind == CLOSE:
                break
            elif kind == RECEIVE:
                await endpoint.post_receive(bytearray(nbytes)).wait()
                answer({"received": nbytes})
    except TransportError as exc:
        answer({"lost": str(exc)})
    await endpoint.close()


async def main() -> None:
    """Serve until the end of standard input."""
    log_to_stderr()
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = json.loads(await lines.readline())
    tasks: set[asyncio.Task[None]] = set()
    go: asyncio.Queue[None] = asyncio.Queue()
    asked_to_stop = asyncio.Event()

    async def read_lines() -> None:
        while await lines.readline():
            go.put_nowait(None)
        asked_to_stop.set()

    tasks.add(loop.create_task(read_lines()))
    async with UCXXLink.open(shm_lanes=settings["shm_lanes"]) as link:
        listener = await link.listen(
            settings["port"], lambda endpoint: tasks.add(loop.create_task(serve(endpoint, go)))
        )
        answer({"port": listener.port})
        await asked_to_stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    pipe.close()


if __name__ == "__main__":
    asyncio.run(main())
