"""Many small sources, and a client with few descriptors: `python -m tests.e2e.programs.many_sources ROLE`.

| ROLE   | request                                        | answer                                            |
|--------|------------------------------------------------|---------------------------------------------------|
| worker | `rings`: so many more, each with a thread      | `refs` of a new payload in each ring              |
| client | `descriptors`: its limit; then `refs`, `local` | how many were `read`, `errors`, and `connections` |

Both end with their standard input.
"""

from __future__ import annotations

import resource
import sys
from contextlib import ExitStack

from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from ucxx_transport import (
    ClientConfig,
    Payload,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SyncUCXXClient,
    UCXXServer,
)


def worker() -> None:
    """Serve rings, one thread each."""
    with ExitStack() as stack:
        rings: list[SharedRingBuffer] = []
        for request in requests():
            for _ in range(request.get("rings", 0)):
                ring = stack.enter_context(
                    SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=4096, prefault=False))
                )
                settings = ServerConfig(host="127.0.0.1", ports=1, mode="thread", start_timeout_s=60.0)
                stack.enter_context(UCXXServer(ring, settings))
                rings.append(ring)
            answer({"refs": [ring.write_raw(ring.ring_id).to_bytes().hex() for ring in rings]})


def client() -> None:
    """Read from all of them at once, and again."""
    asked = requests()
    limit = next(asked)["descriptors"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))  # the rest is the client's to take
    answer({"limit": limit})
    clients: dict[str, SyncUCXXClient] = {}
    with ExitStack() as stack:
        for request in asked:
            local = request["local"]
            if local not in clients:
                config = ClientConfig(local=local, deadline_s=120.0, connect_timeout_s=60.0, max_attached_rings=4096)
                clients[local] = stack.enter_context(SyncUCXXClient(config))
            refs = [SlotRef.from_bytes(bytes.fromhex(ref)) for ref in request["refs"]]
            outcomes = clients[local].read_many(refs)
            right = [
                isinstance(outcome, Payload) and bytes(outcome.buffer) == ref.ring_id
                for ref, outcome in zip(refs, outcomes, strict=True)
            ]
            errors = [f"{type(outcome).__name__}: {outcome}" for outcome in outcomes if isinstance(outcome, Exception)]
            statistics = clients[local].statistics()
            answer({"read": sum(right), "errors": errors[:3], "connections": statistics.connections})
            del outcomes


if __name__ == "__main__":
    log_to_stderr()
    {"worker": worker, "client": client}[sys.argv[1]]()
