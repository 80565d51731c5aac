"""What one read over UCX costs in calls of this package, at both sides together: how long a small one takes follows."""

from __future__ import annotations

from tests.support.calls import counting
from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer

A_READ = 57
A_TURN = {"Reactor.run_once", "LinkCore.progress", "Flight.turn"}
"""Calls of each turn of a reactor. How many turns a read takes depends on what arrives together, and so on the machine;
where nothing does, they are three: with the request, with the answer, and with its end."""
TURNS = 3
READS = 20
TRIES = 10


def test_a_lone_read_and_its_end_cost_few_calls_of_client_and_port_together() -> None:
    names: list[str] = []
    with SharedRingBuffer.create(RingConfig(slots=2 * READS, slot_bytes=4096, prefault=False)) as ring, counting(names):
        # Their spin is long: a side that sleeps in between costs some calls more.
        server = UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=1, mode="thread", spin_s=0.05))
        with server, SyncUCXXClient(ClientConfig(local="off", spin_s=0.05)) as client:
            client.read(ring.write_raw(b"first")).release()
            tries: list[list[str]] = []
            for _ in range(TRIES):
                refs = [ring.write_raw(bytes(4096)) for _ in range(READS)]
                names.clear()
                payloads = [client.read(ref) for ref in refs]
                tries.append([name for name in names if name not in A_TURN])
                for payload in payloads:
                    payload.release()
    fewest = min(tries, key=len)
    assert len(fewest) + TURNS * len(A_TURN) * READS <= A_READ * READS, "\n".join(fewest[: 3 * A_READ])
