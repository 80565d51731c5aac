"""The trainer's reading side: from references to episodes, each verified, every loss counted with its reason."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import xxhash

from ucxx_transport import ClientConfig, Payload, SlotRef, SyncUCXXClient
from ucxx_transport.cli.demo.plan import ClientLocal, DemoPlan
from ucxx_transport.cli.demo.tally import ReadTally
from ucxx_transport.errors import TransportError

__all__ = ["Receiver"]

READ_DEADLINE_S = 5.0
DEAD_READ_DEADLINE_S = 1.0

Accept = Callable[[int, Payload], None]


class Receiver:
    """Reads payloads by reference, in place from some workers and over UCX from the others.

    A reference that fails retryably is set aside and read once more with the others of its seat, all under one
    deadline, which is short when the worker is known to be dead: a death costs the trainer about a second, not a
    deadline for each reference that was left behind.

    Attributes:
        lost: references given up, by the reason's class name.
        retried: references read a second time.
        verified, mismatched: checksums compared here.
    """

    def __init__(self, plan: DemoPlan, accept: Accept) -> None:
        """Make the clients.

        Args:
            plan: says which worker is read how.
            accept: called with the seat and the payload of every delivered episode; it copies what it needs.
        """
        self._plan = plan
        self._accept = accept
        self._clients: dict[bool, SyncUCXXClient] = {}
        self._seat_local: dict[int, ClientLocal] = {}
        self._dead: set[int] = set()
        self._set_aside: dict[int, list[SlotRef]] = {}
        self._ways: dict[str, ReadTally] = {}
        self._lanes: set[str] = set()
        self.seat_transports: dict[int, str] = {}
        self.lost: Counter[str] = Counter()
        self.retried = 0
        self.verified = 0
        self.mismatched = 0

    def admit(self, seat: int, worker: int) -> None:
        """Read from the process of `worker` on this seat from now on, the way the plan says."""
        self._seat_local[seat] = self._plan.local_of(worker)

    def retire(self, seat: int) -> None:
        """The process on this seat is dead: what it left is still read, but not waited for long."""
        self._dead.add(seat)

    def read(self, seat: int, ref: SlotRef) -> None:
        """Read one payload, or set its reference aside, or count it as lost."""
        if seat in self._set_aside:
            self._set_aside[seat].append(ref)
            return
        started_s = time.perf_counter()
        try:
            payload = self._client(seat).read(ref, deadline_s=READ_DEADLINE_S)
        except TransportError as error:
            if error.retryable:
                self._set_aside[seat] = [ref]
            else:
                self.lost[type(error).__name__] += 1
            return
        self._deliver(seat, payload, time.perf_counter() - started_s)

    def read_again(self) -> None:
        """Give every reference set aside its second chance; those that fail again are lost."""
        for seat in list(self._set_aside):
            refs = self._set_aside.pop(seat)
            self.retried += len(refs)
            started_s = time.perf_counter()
            deadline_s = DEAD_READ_DEADLINE_S if seat in self._dead else READ_DEADLINE_S
            outcomes = self._client(seat).read_many(refs, deadline_s=deadline_s)
            elapsed_s = time.perf_counter() - started_s
            for outcome in outcomes:
                if isinstance(outcome, TransportError):
                    self.lost[type(outcome).__name__] += 1
                else:
                    self._deliver(seat, outcome, elapsed_s / len(refs))

    def ways(self) -> dict[str, dict[str, float]]:
        """The reads by transport."""
        return {way: tally.summary() for way, tally in self._ways.items()}

    def client_counters(self) -> dict[str, int]:
        """The counters of all clients, added up."""
        total: Counter[str] = Counter()
        for client in self._clients.values():
            numbers = {name: value for name, value in asdict(client.statistics()).items() if isinstance(value, int)}
            total.update(numbers)
        return dict(total)

    def ucx_lanes(self) -> tuple[str, ...]:
        """What UCX endpoints have really used so far, as the links tell."""
        for client in self._clients.values():
            self._lanes.update(lane for lane in client.statistics().transports if lane != "unknown")
        return tuple(sorted(self._lanes))

    def close(self) -> None:
        """Close the clients. Bounded."""
        for client in self._clients.values():
            client.close()

    def _client(self, seat: int) -> SyncUCXXClient:
        local = self._seat_local[seat]
        over_ucx = local == "off"
        if over_ucx not in self._clients:
            config = ClientConfig(local=local, shm_lanes=self._plan.shm_lanes)
            self._clients[over_ucx] = SyncUCXXClient(config)
        return self._clients[over_ucx]

    def _deliver(self, seat: int, payload: Payload, duration_s: float) -> None:
        with payload:
            ref = payload.ref
            # The client has compared it too; this is the demo's own look at the bytes it learns from.
            if ref.checksum is None or xxhash.xxh3_64_intdigest(payload.buffer) != ref.checksum:
                self.mismatched += 1
                return
            self.verified += 1
            self.seat_transports[seat] = payload.transport
            tally = self._ways.get(payload.transport)
            if tally is None:
                tally = self._ways[payload.transport] = ReadTally()
            tally.add(payload.nbytes, duration_s)
            self._accept(seat, payload)
