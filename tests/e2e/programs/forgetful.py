"""Programs that end without `stop()` or `close()`: `python -m tests.e2e.programs.forgetful WHAT`.

| WHAT           | has open at its end                                                   | ends                    |
|----------------|-----------------------------------------------------------------------|-------------------------|
| worker-process | a ring, a server process, a payload being read, another being written | with its standard input |
| worker-thread  | the same with server threads                                          | with its standard input |
| trainer-sync   | a blocking client, its connection, a payload                          | after its read          |
| trainer-async  | an async client whose loop was run and left, a payload                | after its read          |
| trainer-feed   | a prefetcher, a batch in use and one on its way that never comes       | after its read          |
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Any

from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from ucxx_transport import (
    ClientConfig,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SyncUCXXClient,
    UCXXClient,
    UCXXServer,
)
from ucxx_transport.trainer import RolloutFeed

kept: list[object] = []
"""Held to the very end, as a program's globals are."""


def worker(mode: Any) -> None:
    """Write, start to read and to write, say where, wait."""
    ring = SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=1 << 20))
    server = UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=2, mode=mode))
    server.start()
    refs = [ring.write_raw(bytes(1000)) for _ in range(2)]
    lease = ring.acquire(refs[1])
    kept.extend([ring, server, lease, lease.buffer, ring.reserve(1000)])
    answer({"ref": refs[0].to_bytes().hex(), "ring": ring.name, "servers": server.statistics().pids})
    for _ in requests():
        pass


def trainer_sync(ref: SlotRef) -> None:
    """Read, and keep all of it."""
    client = SyncUCXXClient(ClientConfig(local="off", deadline_s=60, connect_timeout_s=20))
    payload = client.read(ref)
    kept.extend([client, payload, payload.arrays])
    answer({"nbytes": payload.nbytes})


def trainer_async(ref: SlotRef) -> None:
    """Read in a loop that ends with everything open."""

    async def read() -> None:
        client = UCXXClient(ClientConfig(local="off", deadline_s=60, connect_timeout_s=20))
        payload = await client.read(ref)
        kept.extend([client, payload, payload.arrays])
        answer({"nbytes": payload.nbytes})

    asyncio.run(read())


def trainer_feed(ref: SlotRef) -> None:
    """Train on a batch, the next of which is of a worker that no packet reaches."""
    feed = RolloutFeed(ClientConfig(local="off", deadline_s=60, connect_timeout_s=20))
    feed.start([ref])
    feed.collect()
    feed.start([replace(ref, ring_id=bytes(16), host="192.0.2.1")])
    tree = feed.resolve(ref)
    kept.extend([feed, tree])
    answer({"nbytes": 0 if tree is None else len(tree["data"])})


def main(what: str) -> None:
    """Do `what`, and fall off the end."""
    log_to_stderr()
    if what.startswith("worker-"):
        worker(what.removeprefix("worker-"))
        return
    ref = SlotRef.from_bytes(bytes.fromhex(next(requests())["ref"]))
    {"trainer-sync": trainer_sync, "trainer-async": trainer_async, "trainer-feed": trainer_feed}[what](ref)


if __name__ == "__main__":
    main(sys.argv[1])
