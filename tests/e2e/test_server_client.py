"""A worker's payloads as a trainer gets them: real processes, real UCX, every kind of ring, client and transport."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from tests.e2e.programs import content
from tests.support.exhaustive import exhaustive
from tests.support.ports import free_ports
from tests.support.rows import row
from tests.support.served_ring import LOOPBACK, ServedRing, client_of, open_ring, served_ring
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    Payload,
    ProtocolError,
    Schema,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SlotState,
    StaleSlotError,
    SyncUCXXClient,
    TensorSpec,
    TransportError,
    UCXXClient,
    UCXXServer,
)

MiB = 1 << 20
RING = {"slots": 8, "slot_bytes": 16 * MiB, "checksum": True}
SIZES = (1, 7, 64, 4096, 65_537, 1 * MiB, 16 * MiB)
Mode = Literal["process", "thread"]


def read_sync(ref: SlotRef, **settings: Any) -> bytes:
    with client_of(**settings) as client, client.read(ref) as payload:
        return bytes(payload.buffer)


def read_async(ref: SlotRef, **settings: Any) -> bytes:
    async def read() -> bytes:
        async with UCXXClient(ClientConfig(**{"local": "off", "deadline_s": 60.0, **settings})) as client:
            with await client.read(ref) as payload:
                return bytes(payload.buffer)

    return asyncio.run(read())


def write(ring: SharedRingBuffer, sequence: int, nbytes: int = 1000, **settings: Any) -> SlotRef:
    return ring.write_raw(content.make(1, sequence, nbytes), meta={"sequence": sequence}, **settings)


def holds(payload: Payload | memoryview | bytes, sequence: int) -> bool:
    raw = payload.buffer if isinstance(payload, Payload) else payload
    return content.mismatch(np.frombuffer(raw, dtype=np.uint8), 1, sequence) == ""


def is_free(ring: SharedRingBuffer, ref: SlotRef) -> bool:
    return ring.slot_state(ref.slot) is SlotState.FREE


@pytest.fixture(scope="module")
def source() -> Iterator[ServedRing]:
    """A raw ring with checksums, served by a process."""
    with served_ring(ring=RING, ports=2) as served:
        yield served


@pytest.mark.parametrize(("mode", "shm_lanes"), [("process", False), ("process", True), ("thread", False)])
def test_payloads_of_any_size_arrive_byte_by_byte(mode: Mode, shm_lanes: bool) -> None:
    with served_ring(ring=RING, mode=mode, shm_lanes=shm_lanes) as served:
        for sequence, nbytes in enumerate(SIZES * 2):
            read = (read_sync, read_async)[sequence % 2]
            ref = write(served.ring, sequence, nbytes)
            received = read(ref, shm_lanes=shm_lanes)
            assert (len(received), holds(received, sequence)) == (nbytes, True), f"{nbytes} bytes, {read.__name__}"
            wait_until(partial(is_free, served.ring, ref), 60)


def test_empty_payload_arrives(source: ServedRing) -> None:
    assert read_sync(source.ring.write_raw(b"")) == b""


def test_references_carry_address_ports_and_checksum(source: ServedRing) -> None:
    ref = write(source.ring, 1)
    assert (ref.host, ref.ports) == (LOOPBACK, source.server.ports)
    assert (source.server.address, len(source.server.ports)) == (LOOPBACK, 2)
    assert ref.checksum is not None
    assert SlotRef.from_bytes(ref.to_bytes()) == ref
    assert source.ring.discard(ref)


def test_one_client_reads_hundreds_of_payloads_over_few_connections(source: ServedRing) -> None:
    random.seed(11)
    with client_of() as client:
        for sequence in range(300):
            with client.read(write(source.ring, sequence, random.randrange(1, 100_000))) as payload:
                assert holds(payload, sequence)
        seen = client.statistics()
    assert (seen.reads, seen.ucx, seen.failed, seen.retries) == (300, 300, 0, 0)
    assert seen.connections <= len(source.server.ports)


def test_checksum_is_verified_over_ucx(source: ServedRing) -> None:
    ref = write(source.ring, 1)
    assert ref.checksum is not None
    with client_of(read_attempts=1) as client:
        with pytest.raises(Exception, match="not those that were written"):
            client.read(replace(ref, checksum=ref.checksum ^ 1))
        assert client.statistics().checksum_errors == 1
        with client.read(ref) as payload:  # the refusal gave the slot back
            assert holds(payload, 1)


def nested_schema() -> Schema:
    return Schema(
        [
            TensorSpec("obs/image", (20, 84, 84, 3), "uint8", varlen=True),
            TensorSpec("obs/state", (20, 17), "float64", varlen=True),
            TensorSpec("layers/0/w", (64, 32), "bfloat16"),
            TensorSpec("layers/1/w", (32, 4), "float8_e4m3fn"),
            TensorSpec("done", (20,), "bool", varlen=True),
            TensorSpec("phase", (3,), "complex64"),
            TensorSpec("episode", (), "int64"),
        ]
    )


def nested_payload(rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "obs": {
            "image": rng.integers(0, 256, (rows, 84, 84, 3), dtype=np.uint8),
            "state": rng.standard_normal((rows, 17)),
        },
        "layers": [
            {"w": rng.standard_normal((64, 32)).astype(ml_dtypes.bfloat16)},
            {"w": rng.standard_normal((32, 4)).astype(ml_dtypes.float8_e4m3fn)},
        ],
        "done": rng.random(rows) < 0.5,
        "phase": rng.standard_normal(3).astype(np.complex64),
        "episode": seed,
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        wanted = np.asarray(expected)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()


def test_nested_variable_length_arrays_arrive_as_written() -> None:
    schema = nested_schema()
    with served_ring(ring={"slots": 8, "schema": schema}) as served:
        for local in ("off", "view", "copy"):
            with client_of(local=local) as client:
                for rows in (0, 1, 7, 20):
                    ref = served.ring.write(nested_payload(rows, seed=rows))
                    assert rows == 20 or ref.nbytes < schema.nbytes  # never padded
                    with client.read(ref) as payload:
                        assert_same(payload.arrays, nested_payload(rows, seed=rows))
                assert client.statistics().connections == (1 if local == "off" else 0), local


def test_reads_of_two_rings_go_side_by_side_and_one_failure_costs_no_other() -> None:
    with served_ring() as left, served_ring(mode="thread") as right:
        refs = [write(served.ring, sequence) for sequence in range(6) for served in (left, right)]
        assert left.ring.discard(refs[4])

        async def read_all() -> list[Payload | TransportError]:
            async with UCXXClient(ClientConfig(local="off")) as client:
                return await client.read_many(refs, deadline_s=60)

        outcomes = asyncio.run(read_all())
        assert isinstance(outcomes.pop(4), StaleSlotError)
        del refs[4]
        for ref, outcome in zip(refs, outcomes, strict=True):
            assert isinstance(outcome, Payload)
            assert outcome.ref == ref
            assert holds(outcome, int(str(ref.meta["sequence"])))
        del outcomes, outcome
        with client_of() as client:
            again = client.read_many([write(served.ring, 9) for served in (left, right)], deadline_s=60)
            assert [isinstance(outcome, Payload) and holds(outcome, 9) for outcome in again] == [True, True]


def test_payload_for_two_readers_is_free_after_the_second() -> None:
    with served_ring(ring={"readers": 2}) as served, client_of() as one, client_of() as two, client_of() as three:
        ref = write(served.ring, 1)
        with one.read(ref) as payload:
            assert holds(payload, 1)
        with pytest.raises(StaleSlotError):
            one.read(ref)
        wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.READY, 60)
        with two.read(ref) as payload:
            assert holds(payload, 1)
        wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.FREE, 60)
        with pytest.raises(StaleSlotError):
            three.read(ref)


def test_right_token_reads_and_is_shown_nowhere() -> None:
    token = "correct horse battery staple"
    with served_ring(token=token) as served, client_of(token=token) as client:
        for sequence in range(4):
            with client.read(write(served.ring, sequence)) as payload:
                assert holds(payload, sequence)
        assert token not in repr(client.config)


def test_ring_of_this_host_is_read_as_the_setting_says(source: ServedRing) -> None:
    for local, transport in {"auto": "view", "view": "view", "copy": "copy", "off": "ucx"}.items():
        ref = write(source.ring, 5, 70_000)
        with client_of(local=local) as client:
            with client.read(ref) as payload:
                assert (payload.transport, holds(payload, 5)) == (transport, True), local
            seen = client.statistics()
        assert {"view": seen.views, "copy": seen.copies, "ucx": seen.ucx}[transport] == seen.reads == 1, local
        wait_until(partial(is_free, source.ring, ref), 60)


def test_overwritten_consumed_and_foreign_payloads_are_stale_and_not_retried() -> None:
    with served_ring(ring={"slots": 2}) as served:
        for local in ("view", "off"):
            with client_of(local=local) as client, client_of(local=local) as other:
                overwritten = write(served.ring, 0)
                _, consumed = write(served.ring, 1), write(served.ring, 2)
                with other.read(consumed) as payload:
                    assert holds(payload, 2)
                foreign = replace(write(served.ring, 3), ring_id=bytes(16))
                del payload
                for ref in (overwritten, consumed, foreign):
                    with pytest.raises(StaleSlotError):
                        client.read(ref)
                seen = client.statistics()
            found = (seen.failed, seen.stale, seen.retries, seen.quarantined, seen.reads)
            assert found == (3, 3, 0, 0, 0), local


def test_client_gets_a_payload_once(source: ServedRing) -> None:
    ref = write(source.ring, 1)
    with client_of() as client:
        with client.read(ref):
            pass
        with pytest.raises(StaleSlotError):
            client.read(ref)
        assert client.statistics().duplicates == 1


def test_array_of_a_view_keeps_its_slot_until_it_is_gone() -> None:
    with open_ring(slots=1) as ring, client_of(local="view") as client:
        ref = write(ring, 1)
        payload = client.read(ref)
        part = payload.arrays["data"][100:200:3]
        expected = part.copy()
        payload.release()
        del payload
        gc.collect()
        assert ring.slot_state(ref.slot) is SlotState.READING
        with pytest.raises(Exception, match="slot"):
            write(ring, 2)
        assert np.array_equal(part, expected)
        del part
        gc.collect()
        assert ring.slot_state(ref.slot) is SlotState.FREE
        write(ring, 2)


def test_array_of_a_received_payload_is_never_written_to_again(source: ServedRing) -> None:
    with client_of() as client:
        with client.read(write(source.ring, 0, 50_000)) as payload:
            kept = payload.arrays["data"][1:]
        for sequence in range(1, 30):
            with client.read(write(source.ring, sequence, 50_000)) as payload:
                assert holds(payload, sequence)
        assert np.array_equal(kept, content.make(1, 0, 50_000)[1:])
        del payload
        assert client.statistics().lent_buffers == 1
        del kept
        assert client.statistics().lent_buffers == 0


def test_into_takes_the_payload_and_gives_the_slot_back(source: ServedRing) -> None:
    for local in ("view", "copy", "off"):
        target = bytearray(b"\xaa" * 70_000)
        ref = write(source.ring, 3, 65_000)
        with client_of(local=local) as client, client.read(ref, into=target) as payload:
            wait_until(partial(is_free, source.ring, ref), 60)
            assert holds(payload, 3), local
            assert holds(memoryview(target)[:65_000], 3), local
            assert bytes(target[65_000:]) == b"\xaa" * 5000, local


def test_unfit_into_is_refused_before_anything_is_read(source: ServedRing) -> None:
    unfit: list[Any] = [bytearray(999), bytes(1000), [0] * 1000, np.zeros((1000, 2), np.uint8)[:, 0]]
    with client_of() as client:
        for target in unfit:
            ref = write(source.ring, 1, 1000)
            with pytest.raises(ConfigError, match="into"):
                client.read(ref, into=target)
            assert source.ring.discard(ref)


def test_explicit_ports_are_the_ones_that_listen() -> None:
    first = free_ports(3)[0]
    wanted = (first + 2, first)
    with served_ring(ports=list(wanted)) as served, client_of() as client:
        assert served.server.ports == wanted
        outcomes = client.read_many([write(served.ring, sequence) for sequence in range(8)], deadline_s=60)
        for sequence, payload in enumerate(outcomes):  # so many are spread over the ports
            assert isinstance(payload, Payload)
            assert holds(payload, sequence)
            payload.release()
        wait_until(lambda: [port.delivered for port in served.server.statistics().ports] == [4, 4], 60)


def test_base_port_skips_what_is_taken() -> None:
    first = free_ports(6)[0]
    with (
        socket.create_server(("", first)),
        socket.create_server(("", first + 2)),
        served_ring(base_port=first, ports=2) as served,
    ):
        assert sorted(served.server.ports) == [first + 1, first + 3]  # they start side by side


def test_taken_port_is_named_in_a_config_error() -> None:
    port = free_ports(1)[0]
    with socket.create_server(("", port)), open_ring() as ring:
        server = UCXXServer(ring, ServerConfig(host=LOOPBACK, ports=[port], start_timeout_s=60))
        with pytest.raises(ConfigError, match=str(port)):
            server.start()
        assert (server.ports, server.address, ring.address()) == ((), None, (None, ()))


@pytest.mark.parametrize("mode", [exhaustive("process"), "thread"])
def test_server_stops_and_starts_again_on_its_ports_leaving_nothing(mode: Mode) -> None:
    first = free_ports(2)[0]
    config = ServerConfig(host=LOOPBACK, ports=[first, first + 1], mode=mode, start_timeout_s=60, stop_timeout_s=20)
    with open_ring() as ring, client_of(port_quarantine_s=0) as client:
        server = UCXXServer(ring, config)
        for sequence in range(5):
            server.start()
            with client.read(write(ring, sequence)) as payload:
                assert holds(payload, sequence)
            server.stop()
            assert (server.ports, ring.address()) == ((), (None, ()))
        assert server.statistics().total("delivered") == 5


def test_async_server_serves_within_its_block() -> None:
    async def scenario() -> bool:
        with open_ring() as ring:
            async with (
                UCXXServer(ring, ServerConfig(host=LOOPBACK, ports=1, start_timeout_s=60)),
                UCXXClient(ClientConfig(local="off", deadline_s=60)) as client,
            ):
                with await client.read(write(ring, 1)) as payload:
                    return holds(payload, 1)

    assert asyncio.run(scenario())


def test_statistics_of_both_sides_agree() -> None:
    with served_ring() as served, client_of() as client:
        refs = [write(served.ring, sequence, 10_000) for sequence in range(6)]
        for outcome in client.read_many(refs):
            assert isinstance(outcome, Payload)
            outcome.release()
        del outcome
        with pytest.raises(StaleSlotError):
            client.read(replace(refs[0], generation=99))
        wait_until(lambda: served.server.statistics().total("bytes_sent") == 60_000, 60)  # counted last
        server, mine, ring = served.server.statistics(), client.statistics(), served.ring.statistics()
        assert (server.total("requests"), server.total("bytes_sent"), server.total("stale")) == (7, 60_000, 1)
        assert (server.host, server.restarts) == (LOOPBACK, 0)
        assert tuple(port.port for port in server.ports) == served.server.ports
        assert server.total("connections") == server.total("accepted") == mine.connections
        assert (mine.reads, mine.ucx, mine.bytes_read, mine.stale) == (6, 6, 60_000, 1)
        assert (ring.written, ring.consumed, ring.freed) == (6, 6, 6)
        assert None not in server.pids
        served.server.stop()
        assert set(served.server.statistics().pids) == {None}
        assert served.server.statistics().total("delivered") == 6


@pytest.mark.parametrize("damage", [{"fingerprint": 1}, {"nbytes": 3}])
def test_a_damaged_reference_is_refused_the_same_way_in_place_and_over_ucx(damage: dict[str, Any]) -> None:
    with served_ring(ring={"schema": Schema([TensorSpec("x", (4,), "uint8")])}) as served:
        ways: tuple[Literal["auto", "copy", "off"], ...] = ("auto", "copy", "off")
        for local in ways:
            ref = served.ring.write({"x": b"abcd"})
            with SyncUCXXClient(ClientConfig(local=local)) as client:
                with row(local=local), pytest.raises(ProtocolError, match=r"reference (promised|says)"):
                    client.read(replace(ref, **damage), deadline_s=10)
                with client.read(ref, deadline_s=10) as payload:  # it was not consumed
                    assert bytes(payload.arrays["x"]) == b"abcd"
