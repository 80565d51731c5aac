"""Writes into a full ring that blocks: woken when a slot becomes FREE, ended by Ctrl-C, and never by looking again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from tests.support.interrupts import signalled_when
from tests.support.waiting import is_asleep, wait_until
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.ring import SharedRingBuffer, SlotState, transitions
from ucxx_transport.ring.layout import SLEEPERS_WORD
from ucxx_transport.schema import SlotRef

LONG_S = 600.0


@pytest.fixture(autouse=True)
def _never_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is not woken sleeps until long after the test has failed."""
    monkeypatch.setattr(transitions, "LOOK_EVERY_S", LONG_S)


@pytest.fixture
def full(make_ring: MakeRing) -> tuple[SharedRingBuffer, SlotRef]:
    ring = make_ring(slots=1, on_full="block", block_timeout_s=LONG_S)
    return ring, ring.write_raw(b"first")


def awaits_a_slot(ring: SharedRingBuffer, thread_id: int) -> bool:
    """Whether a thread sleeps on the count of freed slots: it has said so, and runs nothing."""
    return bool(ring.mapping.view("u8")[SLEEPERS_WORD]) and is_asleep(thread_id)


def consume(ring: SharedRingBuffer, ref: SlotRef) -> None:
    assert ring.read(ref)["data"].tobytes() == b"first"


def discard(ring: SharedRingBuffer, ref: SlotRef) -> None:
    assert ring.discard(ref)


def consume_elsewhere(ring: SharedRingBuffer, ref: SlotRef) -> None:
    program = (
        "import sys; from ucxx_transport.ring import SharedRingBuffer; from ucxx_transport.schema import SlotRef\n"
        "ring = SharedRingBuffer.attach(sys.argv[1]); ring.read(SlotRef.from_bytes(bytes.fromhex(sys.argv[2])))"
    )
    subprocess.run([sys.executable, "-c", program, ring.name, ref.to_bytes().hex()], check=True)


@pytest.mark.parametrize("free", [consume, discard, consume_elsewhere])
def test_a_blocked_write_is_woken_when_a_slot_becomes_free(
    full: tuple[SharedRingBuffer, SlotRef], free: Callable[[SharedRingBuffer, SlotRef], None]
) -> None:
    ring, ref = full
    written: list[SlotRef] = []
    thread = threading.Thread(target=lambda: written.append(ring.write_raw(b"second")), daemon=True)
    thread.start()
    assert thread.native_id is not None
    sleeper = thread.native_id
    wait_until(lambda: awaits_a_slot(ring, sleeper))
    free(ring, ref)
    thread.join(60)
    assert [ring.read(found)["data"].tobytes() for found in written] == [b"second"]


def test_every_blocked_write_gets_its_turn(full: tuple[SharedRingBuffer, SlotRef]) -> None:
    ring, ref = full
    threads = [threading.Thread(target=ring.write_raw, args=(b"more",), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert ring.discard(ref)
    for _ in threads:
        wait_until(lambda: ring.get_ready_count() == 1)
        ring.read(ring.ready_refs()[0])
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_an_interrupt_ends_a_blocked_write_at_once(full: tuple[SharedRingBuffer, SlotRef]) -> None:
    ring, ref = full
    main = threading.get_native_id()

    with pytest.raises(KeyboardInterrupt), signalled_when(lambda: awaits_a_slot(ring, main)):
        ring.write_raw(b"second")
    assert ring.slot_states() == [SlotState.READY]
    assert ring.discard(ref)
    assert ring.write_raw(b"third").generation == 2
