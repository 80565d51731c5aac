"""How long does a client with two ports wait while one of them is killed?

One ring of this process with two ports; this thread writes a payload, reads it over UCX, and so on without a rest. At a
random moment one port gets SIGKILL, each in its turn. The pause of a kill is the longest time between two payloads that
arrived, from the kill until that port is back.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time

from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer

__all__ = ["port_pauses"]

PORTS = 2
PAYLOAD = bytes(range(256)) * 64
MOMENT_S = 0.05
BACK_WITHIN_S = 30.0
READ_DEADLINE_S = 30.0


def port_pauses(kills: int, rng: random.Random, *, shm_lanes: bool = False) -> list[float]:
    """The longest pause of each kill, in seconds.

    Raises:
        AssertionError: a payload came that is not the one that was written, or a port does not come back.
    """
    pauses = []
    with (
        SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=len(PAYLOAD), on_full="raise")) as ring,
        UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=PORTS, shm_lanes=shm_lanes)) as server,
        SyncUCXXClient(ClientConfig(local="off", shm_lanes=shm_lanes)) as client,
    ):
        for turn in range(kills):
            for _ in range(2 * PORTS):
                _pass_one_on(ring, client)
            victim = server.statistics().pids[turn % PORTS]
            assert victim, "every port has a process"
            killer = threading.Thread(target=_kill_later, args=(victim, rng.uniform(0, MOMENT_S)), name="killer")
            killer.start()
            pauses.append(_longest_pause(ring, client, server, victim, turn % PORTS))
            killer.join()
    return pauses


def _kill_later(pid: int, delay_s: float) -> None:
    time.sleep(delay_s)  # the random moment itself, not a wait for anything
    os.kill(pid, signal.SIGKILL)


def _longest_pause(
    ring: SharedRingBuffer, client: SyncUCXXClient, server: UCXXServer, victim: int, place: int
) -> float:
    longest_s, arrived_s = 0.0, time.monotonic()
    end_s = arrived_s + BACK_WITHIN_S
    while server.statistics().pids[place] in (victim, None):
        assert arrived_s < end_s, f"port {place} is not back"
        _pass_one_on(ring, client)
        now_s = time.monotonic()
        longest_s, arrived_s = max(longest_s, now_s - arrived_s), now_s
    return longest_s


def _pass_one_on(ring: SharedRingBuffer, client: SyncUCXXClient) -> None:
    """Write a payload and read it over UCX."""
    payload = client.read(ring.write_raw(PAYLOAD), deadline_s=READ_DEADLINE_S)
    with payload:
        assert payload.buffer == PAYLOAD, "another payload came than was written"
