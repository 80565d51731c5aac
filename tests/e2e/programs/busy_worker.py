"""A worker that holds its interpreter's lock until told to go on: `python -m tests.e2e.programs.busy_worker`."""

from __future__ import annotations

import ctypes

from tests.e2e.programs.request_lines import answer, log_to_stderr
from tests.support.waiting import wait_until
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer, SlotState, UCXXServer


def hold_the_lock_until_a_byte_comes() -> None:
    """Block in `read(0, …)` called through `PyDLL`, which keeps the lock: no thread of this process runs Python."""
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)


def main() -> None:
    """Write two payloads, sit on the lock, then say what has become of their slots."""
    log_to_stderr()
    with (
        SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096)) as ring,
        UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=1)),
    ):
        answer({"refs": [ring.write_raw(bytes(1000)).to_bytes().hex() for _ in range(2)]})
        hold_the_lock_until_a_byte_comes()
        wait_until(lambda: set(ring.slot_states()) == {SlotState.FREE}, 60)
        answer({"states": [state.name for state in ring.slot_states()]})


if __name__ == "__main__":
    main()
