"""Processes that use one ring, each in a role: `python -m tests.e2e.programs.ring_roles ROLE RING [ARGUMENT …]`.

Each says in a line of JSON that it is ready and in another what came of it; the roles made to be killed say no
more. `hammer` talks to its twin through two inherited pipes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import struct
import sys
from collections import deque
from collections.abc import Callable
from types import FrameType

import numpy as np
import xxhash

from tests.e2e.programs import content
from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import RingFullError, StaleSlotError, TransportError
from ucxx_transport.logs import log_to_stderr
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.layout import IN_TRANSITION_WORD, MUTEX_BYTE
from ucxx_transport.ring.transitions import open_ring
from ucxx_transport.schema import SlotRef

RAMP = np.arange(1 << 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def say(word: object) -> None:
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


def payload_of(stream: int, sequence: int, nbytes: int) -> bytes:
    """16 bytes that name it, then bytes that no other payload has at that place. `content` is for larger ones."""
    head = struct.pack("<QQ", stream, sequence)
    key = np.uint64(xxhash.xxh3_64_intdigest(head))
    return (head + (RAMP ^ key).tobytes())[:nbytes]


class Hammer:
    """Writes its stream for its twin and reads the twin's, both to the last payload, as fast as it can."""

    def __init__(self, ring: SharedRingBuffer, stream: int, payloads: int, read_fd: int, write_fd: int) -> None:
        self.ring, self.stream, self.payloads = ring, stream, payloads
        self.read_fd, self.write_fd = read_fd, write_fd
        self.random = random.Random(stream)
        self.unread: deque[SlotRef] = deque()
        self.received = bytearray()
        self.read_sequences: list[int] = []
        self.problems: list[str] = []

    def run(self) -> dict[str, object]:
        written = 0
        while written < self.payloads or len(self.read_sequences) < self.payloads:
            if written < self.payloads:
                with contextlib.suppress(RingFullError):
                    self.write(written)
                    written += 1
            self.receive(wait=written == self.payloads and not self.unread)
            while self.unread:
                self.read(self.unread.popleft())
        in_order = self.read_sequences == sorted(set(self.read_sequences))
        return {"written": written, "read": len(self.read_sequences), "in_order": in_order, "problems": self.problems}

    def write(self, sequence: int) -> None:
        payload = payload_of(self.stream, sequence, self.random.randrange(16, self.ring.slot_bytes + 1))
        if sequence % 3:
            ref = self.ring.write_raw(payload)
        else:
            with self.ring.reserve(len(payload)) as lease:
                lease.buffer[:] = payload
            ref = lease.ref
        raw = ref.to_bytes()
        os.write(self.write_fd, struct.pack("<I", len(raw)) + raw)

    def receive(self, *, wait: bool) -> None:
        os.set_blocking(self.read_fd, wait)
        with contextlib.suppress(BlockingIOError):
            self.received += os.read(self.read_fd, 1 << 16)
        while len(self.received) >= 4:
            end = 4 + struct.unpack_from("<I", self.received)[0]
            if len(self.received) < end:
                break
            self.unread.append(SlotRef.from_bytes(bytes(self.received[4:end])))
            del self.received[:end]

    def read(self, ref: SlotRef) -> None:
        """Eight transitions of a payload: its writer's two, and three attempts, of which two overlap and one counts."""
        with self.ring.acquire(ref):
            pass  # an attempt that fails: the payload stays
        lease, other = self.ring.acquire(ref), self.ring.acquire(ref)
        payload = bytes(lease.buffer)
        stream, sequence = struct.unpack_from("<QQ", payload)
        if stream == self.stream or payload != payload_of(stream, sequence, ref.nbytes):
            self.problems.append(f"{ref.slot}, {ref.generation}: not what was written")
        first, second = (lease, other) if sequence % 2 else (other, lease)
        if not first.mark_consumed() or not second.release_reading():
            self.problems.append("a live attempt could not be ended")
        self.read_sequences.append(sequence)
        if sequence % 20 == 0:
            try:
                self.ring.acquire(ref).release_reading()
            except StaleSlotError:
                return
            self.problems.append("a consumed payload could be read again")


def hammer(ring_name: str, stream: str, payloads: str, read_fd: str, write_fd: str) -> None:
    with SharedRingBuffer.attach(ring_name) as ring:
        say("ready")
        sys.stdin.readline()
        say(Hammer(ring, int(stream), int(payloads), int(read_fd), int(write_fd)).run())


def victim_writer(ring_name: str, seed: str) -> None:
    """Writes in every way there is until it is killed."""
    ring, choice = SharedRingBuffer.attach(ring_name), random.Random(int(seed))
    say("ready")
    kept: deque[object] = deque(maxlen=1)
    sequence = 0
    while True:
        nbytes = choice.randrange(content.NAMED_BYTES, ring.slot_bytes + 1)
        with contextlib.suppress(TransportError):
            if choice.random() < 0.5:
                ring.write_raw(content.make(7, sequence, nbytes))
            else:
                with ring.reserve(nbytes) as lease:
                    content.fill(np.frombuffer(lease.buffer, np.uint8), 7, sequence)
                    if choice.random() < 0.2:
                        lease.abort()
            if choice.random() < 0.1:
                kept.append(ring.reserve())
        sequence += 1


def victim_reader(ring_name: str, seed: str) -> None:
    """Reads in every way there is until it is killed."""
    ring, choice = SharedRingBuffer.attach(ring_name), random.Random(int(seed))
    say("ready")
    kept: deque[object] = deque(maxlen=1)
    while True:
        with contextlib.suppress(TransportError, IndexError):
            if choice.random() < 0.5:
                leases = ring.take(choice.randint(1, 4), newest=choice.random() < 0.5)
                ring.wait_for_ready(0.0 if leases else 0.001)
            else:
                leases = [ring.acquire(choice.choice(ring.ready_refs()))]
            for lease in leases:
                how = choice.randrange(4)
                if how == 0:
                    kept.append(lease.hand_over())
                elif how == 1:
                    kept.append(lease)
                elif how == 2:
                    lease.release_reading()
                else:
                    lease.mark_consumed()


def take_and_stay(ring_name: str, number: str) -> None:
    """Takes so many payloads, says which, and holds them until it is killed."""
    ring = SharedRingBuffer.attach(ring_name)
    sys.stdin.readline()
    leases = ring.take(int(number))
    say([(lease.record or {})["number"] for lease in leases])
    sys.stdin.readline()
    del leases


def keep_arrays(ring_name: str, *refs: str) -> None:
    """A trainer that keeps what it read in place, until it is killed."""
    with SyncUCXXClient(ClientConfig(local="view")) as client:
        kept = [client.read(SlotRef.from_bytes(bytes.fromhex(ref))).arrays for ref in refs]
        say(ring_name)
        sys.stdin.readline()
        del kept


def sit_in_section(ring_name: str, how: str) -> None:
    """Enters the critical section and stays there until it is killed, or told to go on."""
    segment = open_ring(ring_name, None, None, populates=False)
    libc, mutex = ctypes.CDLL(None), ctypes.byref(ctypes.c_char.from_buffer(segment.memory, MUTEX_BYTE))
    assert libc.pthread_mutex_lock(mutex) == 0
    if how == "in transition":
        segment.words[IN_TRANSITION_WORD] = 1
    say("ready")
    sys.stdin.readline()
    segment.words[IN_TRANSITION_WORD] = 0
    assert libc.pthread_mutex_unlock(mutex) == 0
    say("left")


def read_and_leave(ring_name: str, ref: str) -> None:
    """Attaches, reads one payload in place, and ends as any script does: nothing is closed."""
    ring = SharedRingBuffer.attach(ring_name)
    lease = ring.acquire(SlotRef.from_bytes(bytes.fromhex(ref)))
    payload = bytes(lease.buffer)
    lease.mark_consumed()
    say(payload.hex())


class Alarm(BaseException):
    """Raised by a signal handler, as KeyboardInterrupt is."""


def actions_on(ring: SharedRingBuffer, choice: random.Random) -> list[Callable[[], object]]:
    """Every kind of call on a ring."""

    def read_one() -> None:
        with ring.acquire(choice.choice(ring.ready_refs())) as lease:
            if choice.random() < 0.5:
                lease.mark_consumed()

    def reserve_one() -> None:
        with ring.reserve(64) as lease:
            content.fill(np.frombuffer(lease.buffer, np.uint8), 9, 1)

    return [
        lambda: ring.write_raw(content.make(9, 1, 64)),
        reserve_one,
        read_one,
        lambda: ring.acquire(ring.ready_refs()[0]).hand_over(),
        ring.reclaim_dead,
    ]


def interrupted(ring_name: str, seed: str, alarms: str) -> None:
    """Does everything there is to do while signals interrupt it at any moment."""
    ring, choice = SharedRingBuffer.attach(ring_name), random.Random(int(seed))
    armed = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal armed
        del signum, frame
        armed = False
        raise Alarm

    actions = actions_on(ring, choice)
    signal.signal(signal.SIGALRM, handler)
    # what is raised within a finaliser is reported and lost; the loop below then ends by itself
    sys.unraisablehook = lambda _: None
    say("ready")
    for _ in range(int(alarms)):
        with contextlib.suppress(Alarm):
            armed = True
            signal.setitimer(signal.ITIMER_REAL, choice.uniform(20e-6, 400e-6))
            while True:  # `while armed` jumps back where Python 3.12 and 3.13 have no handler (python/cpython#108214)
                if not armed:
                    break
                with contextlib.suppress(TransportError, IndexError):
                    choice.choice(actions)()
    gc.collect()
    ring.reclaim_dead()
    say([state.name for state in ring.slot_states()])


ROLES: dict[str, Callable[..., None]] = {
    role.__name__: role
    for role in (
        *(hammer, victim_writer, victim_reader, take_and_stay, keep_arrays, sit_in_section),
        *(read_and_leave, interrupted),
    )
}

if __name__ == "__main__":
    log_to_stderr("test")
    ROLES[sys.argv[1]](*sys.argv[2:])
