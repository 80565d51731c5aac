"""A rollout worker without an environment: `python -m tests.e2e.programs.writer`.

Settings: `ring` (attach and write there) or `create` (make a ring, and serve it in a process of its own); `stream`, the
number that its payloads carry. Requests: `write` (`sequence`, `nbytes`, `how`, `dwell_s` in the slot), `server`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import numpy as np

from tests.e2e.programs import content
from tests.e2e.programs.request_lines import Message, answer, answer_requests, log_to_stderr, requests
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer, SlotRef, TransportError, UCXXServer


def write(ring: SharedRingBuffer, stream: int, request: Message) -> SlotRef:
    """Write one payload, in place or by a copy."""
    sequence, nbytes = request["sequence"], request["nbytes"]
    meta = {"stream": stream, "sequence": sequence}
    if request["how"] == "write_raw":
        return ring.write_raw(content.make(stream, sequence, nbytes), meta=meta)
    with ring.reserve(nbytes, meta=meta) as lease:
        time.sleep(request["dwell_s"])  # the length of the write itself: a kill shall find one half done
        content.fill(np.frombuffer(lease.buffer, dtype=np.uint8), stream, sequence)
    return lease.ref


def main() -> None:
    """Write on request until told to stop."""
    log_to_stderr()
    settings = next(requests())
    with ExitStack() as stack:
        server: UCXXServer | None = None
        if "create" in settings:
            ring = stack.enter_context(SharedRingBuffer.create(RingConfig(**settings["create"])))
            server = stack.enter_context(UCXXServer(ring, ServerConfig(**settings["server"])))
        else:
            ring = stack.enter_context(SharedRingBuffer.attach(settings["ring"]))

        def handle(request: Message) -> Message:
            if request["what"] == "server":
                assert server is not None
                now = server.statistics()
                return {"pids": now.pids, "ports": list(server.ports), "restarts": now.restarts}
            try:
                ref = write(ring, settings["stream"], request)
            except TransportError as error:
                return {"outcome": type(error).__name__, "message": str(error)}
            return {"outcome": "written", "ref": ref.to_bytes().hex()}

        answer({"ready": True, "ring": ring.name, "ports": list(server.ports) if server else []})
        answer_requests(handle)


if __name__ == "__main__":
    main()
