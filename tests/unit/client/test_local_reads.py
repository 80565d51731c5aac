"""Rings of this host: read in place or copied out, without a link."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socket import socket
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import pytest

from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.client.core import ClientCore
from ucxx_transport.config import ClientConfig, RingConfig
from ucxx_transport.errors import ChecksumError, ConfigError, StaleSlotError
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.ring.segment import segment_path

EPISODE = bytes(range(256)) * 16


def no_link(_: Reactor) -> NoReturn:
    raise AssertionError("a local read opened a link")


def client_of(**settings: Any) -> SyncUCXXClient:
    return SyncUCXXClient(ClientConfig(**settings), link_factory=no_link)


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=8192, prefault=False, checksum=True)) as made:
        yield made


@pytest.mark.parametrize(("local", "transport"), [("auto", "view"), ("view", "view"), ("copy", "copy")])
def test_a_ring_of_this_host_is_read_without_a_link(ring: SharedRingBuffer, local: str, transport: str) -> None:
    with client_of(local=local) as client:
        ref = ring.write_raw(EPISODE)
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert payload.transport == transport
        assert ring.slot_state(ref.slot) is SlotState.FREE
        statistics = client.statistics()
        assert (statistics.reads, statistics.views + statistics.copies, statistics.ucx) == (1, 1, 0)
        assert statistics.bytes_read == len(EPISODE)


def test_a_view_keeps_its_slot_until_the_last_array_is_gone(ring: SharedRingBuffer) -> None:
    with client_of() as client:
        ref = ring.write_raw(EPISODE)
        payload = client.read(ref)
        kept = np.frombuffer(payload.buffer, dtype=np.uint8)[100:110]
        payload.release()
        assert ring.slot_state(ref.slot) is SlotState.READING
        for _ in range(4):
            ring.write_raw(b"\xee" * 4096)
        assert kept.tolist() == list(EPISODE[100:110])
        del kept
        assert ring.slot_state(ref.slot) is SlotState.FREE


def test_a_copy_frees_the_slot_at_once(ring: SharedRingBuffer) -> None:
    with client_of(local="copy") as client:
        ref = ring.write_raw(EPISODE)
        with client.read(ref) as payload:
            assert ring.slot_state(ref.slot) is SlotState.FREE
            ring.write_raw(b"other")
            ring.write_raw(b"other")
            assert bytes(payload.buffer) == EPISODE


def test_a_view_outlives_client_and_ring() -> None:
    config = RingConfig(slots=1, slot_bytes=8192, prefault=False)
    with SharedRingBuffer.create(config) as ring, client_of() as client:
        payload = client.read(ring.write_raw(EPISODE))
    assert bytes(payload.buffer) == EPISODE


@pytest.mark.parametrize("local", ["view", "copy"])
def test_stale_references_are_refused_and_counted(ring: SharedRingBuffer, local: str) -> None:
    with client_of(local=local) as client:
        ref = ring.write_raw(EPISODE)
        ring.discard(ref)
        with pytest.raises(StaleSlotError):
            client.read(ref)
        with pytest.raises(StaleSlotError):
            client.read(replace(ring.write_raw(EPISODE), generation=77))
        assert (client.statistics().failed, client.statistics().stale) == (2, 2)


@pytest.mark.parametrize("local", ["view", "copy"])
def test_bytes_that_changed_since_they_were_written_are_a_checksum_error(ring: SharedRingBuffer, local: str) -> None:
    with client_of(local=local) as client:
        ref = ring.write_raw(EPISODE)
        with pytest.raises(ChecksumError):
            client.read(replace(ref, checksum=1))
        assert ring.slot_state(ref.slot) is SlotState.READY, "not consumed: another reader may still want it"
        assert client.statistics().lent_buffers == 0
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_checksums_can_be_left_unchecked(ring: SharedRingBuffer) -> None:
    with (
        client_of(verify_checksum=False) as client,
        client.read(replace(ring.write_raw(EPISODE), checksum=1)) as payload,
    ):
        assert bytes(payload.buffer) == EPISODE


def test_a_ring_that_is_gone_is_stale_and_nobody_is_asked_over_the_network() -> None:
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=8192, prefault=False)) as ring:
        ref = replace(ring.write_raw(EPISODE), host="10.0.0.1", ports=(5001,))
    with client_of() as client, pytest.raises(StaleSlotError, match="gone"):
        client.read(ref)


def test_a_served_ring_that_lost_its_name_is_read_over_the_network_and_never_by_name_alone() -> None:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=8192, prefault=False)) as ring, socket() as listener:
        listener.bind(("127.0.0.1", 0))
        ref = replace(ring.write_raw(EPISODE), host="127.0.0.1", ports=(1, listener.getsockname()[1]))
        segment_path(ring.name).unlink()
        with client_of(local="auto") as client, pytest.raises(StaleSlotError, match="gone"):
            client.read(ref)  # bound, but nobody listens
        listener.listen()
        for local in ("view", "copy"):
            with client_of(local=local) as client, pytest.raises(StaleSlotError, match="gone"):
                client.read(ref)
        core = ClientCore(ClientConfig(local="auto"), no_link)
        assert [core.local.ring_of(ref), core.local.ring_of(ref)] == [None, None]
        assert core.statistics().fallbacks == 1, "once for a ring, until it is looked for again"
        core.close()


def test_a_new_ring_of_the_same_name_is_not_the_one_the_reference_names() -> None:
    config = RingConfig(slots=1, slot_bytes=8192, prefault=False, name="reused-name")
    with SharedRingBuffer.create(config) as ring:
        ref = ring.write_raw(EPISODE)
    with SharedRingBuffer.create(config) as ring:
        ring.write_raw(b"another episode")
        with client_of() as client, pytest.raises(StaleSlotError):
            client.read(ref)


@pytest.mark.parametrize("local", ["view", "copy"])
def test_a_duplicate_is_refused_by_name_before_the_ring_is_asked(local: str) -> None:
    config = RingConfig(slots=1, slot_bytes=8192, prefault=False, readers=3)
    with SharedRingBuffer.create(config) as ring, client_of(local=local) as client:
        ref = ring.write_raw(EPISODE)
        client.read(ref).release()
        with pytest.raises(StaleSlotError, match="already received"):
            client.read(ref)
        assert client.statistics().duplicates == 1


def test_the_callers_memory_is_filled_and_the_slot_given_back(ring: SharedRingBuffer) -> None:
    for local in ("view", "copy"):
        with client_of(local=local) as client:
            into, ref = bytearray(5000), ring.write_raw(EPISODE)
            payload = client.read(ref, into=into)
            assert into[: len(EPISODE)] == EPISODE
            assert ring.slot_state(ref.slot) is SlotState.FREE
            assert not payload.buffer.readonly


def test_a_batch_mixes_outcomes(ring: SharedRingBuffer) -> None:
    with client_of() as client:
        good, gone = ring.write_raw(EPISODE), ring.write_raw(EPISODE)
        ring.discard(gone)
        outcomes = client.read_many([gone, good])
        assert isinstance(outcomes[0], StaleSlotError)
        assert not isinstance(outcomes[1], Exception)
        outcomes.clear()
        gc.collect()


def test_rings_kept_mapped_are_bounded() -> None:
    rings = [SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64, prefault=False)) for _ in range(5)]
    try:
        with client_of(max_attached_rings=2) as client:
            for _ in range(2):
                for ring in rings:
                    client.read(ring.write_raw(b"x")).release()
            assert client.statistics().views == 10
    finally:
        for ring in rings:
            ring.close()


def test_a_closed_client_reads_nothing(ring: SharedRingBuffer) -> None:
    client = client_of()
    ref = ring.write_raw(EPISODE)
    client.close()
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.read(ref)
    assert ring.slot_state(ref.slot) is SlotState.READY


def test_a_read_in_place_is_twenty_calls_of_the_package(ring: SharedRingBuffer) -> None:
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "ucxx_transport" in Path(frame.f_code.co_filename).parts:
            calls.append(frame.f_code.co_qualname)

    with client_of(local="view", verify_checksum=False) as client:
        client.read(ring.write_raw(EPISODE)).release()  # attaches
        ref = ring.write_raw(EPISODE)
        sys.setprofile(note)
        try:
            payload = client.read(ref)
        finally:
            sys.setprofile(None)
        payload.release()
    assert len(calls) <= 20, calls


def test_a_failed_read_of_a_batch_keeps_none_of_its_payloads(ring: SharedRingBuffer) -> None:
    with client_of() as client:
        refs = [ring.write_raw(EPISODE), replace(ring.write_raw(EPISODE), generation=77)]
        gc.collect()
        gc.disable()
        try:
            error = client.read_many(refs)[1]
            assert isinstance(error, StaleSlotError)
            assert ring.slot_state(refs[0].slot) is SlotState.FREE
        finally:
            gc.enable()


def test_views_that_go_in_any_order_free_their_own_slots_alone() -> None:
    """A lease that has ended serves a later read."""
    with SharedRingBuffer.create(RingConfig(slots=3, slot_bytes=64, prefault=False)) as ring, client_of() as client:
        for order in itertools.permutations(range(3)):
            held = {ref.slot: client.read(ref) for ref in [ring.write_raw(bytes([turn])) for turn in order]}
            wanted = {slot: bytes(payload.buffer) for slot, payload in held.items()}
            assert sorted(wanted.values()) == [b"\0", b"\1", b"\2"]
            for slot in order:
                assert bytes(held[slot].buffer) == wanted[slot]
                held.pop(slot).release()
                assert {each for each in range(3) if ring.slot_state(each) is SlotState.READING} == set(held)
        found = ring.statistics()
    assert (found.acquired, found.consumed, found.released, found.late_finalise) == (18, 18, 0, 0)
