"""Which port a read is given: in turn, healthy ones first, never none; one that has just failed is avoided."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.payloads import ref_to
from tests.support.rows import row
from ucxx_transport.client.jobs import OWN_WINDOW_BYTES, SMALL_BYTES, Job, Read, next_request
from ucxx_transport.client.ports import REMEMBERED_SOURCES, SPREAD_BYTES, SPREAD_READS, Ports, Source, shares
from ucxx_transport.wire.client_side import ClientSession
from ucxx_transport.wire.frames import PACK_BYTES, Window

HOST = "10.0.0.1"
PORTS = (5001, 5002, 5003, 5004)
KEYS = tuple((HOST, port) for port in PORTS)


def due(ports: Ports, *, alone: bool = True, sick: tuple[int, ...] = ()) -> int:
    """The port that is due at second 1, where some have failed at second 0."""
    for port in sick:
        ports.quarantine((HOST, port), 0.0)
    source = ports.source(HOST, PORTS)
    keys = ports.healthy(source, 1.0)
    return keys[source.first(keys, alone=alone)][1]


def test_reads_that_overlap_take_the_ports_in_turn() -> None:
    ports = Ports(30.0)
    assert [due(ports, alone=number == 0) for number in range(6)] == [5001, 5002, 5003, 5004, 5001, 5002]


def test_a_read_that_is_alone_stays_at_the_port_that_served_the_last() -> None:
    ports = Ports(30.0)
    assert [due(ports) for _ in range(3)] == [5001, 5001, 5001]
    assert [due(ports, alone=False) for _ in range(3)] == [5002, 5003, 5004]
    assert [due(ports) for _ in range(3)] == [5004, 5004, 5004]


def test_ports_in_quarantine_are_stepped_over_and_their_share_goes_to_all_others() -> None:
    ports = Ports(30.0)
    taken = [due(ports, alone=False, sick=(5002,)) for _ in range(300)]
    assert {port: taken.count(port) for port in PORTS} == {5001: 100, 5002: 0, 5003: 100, 5004: 100}


def test_a_source_whose_ports_are_all_in_quarantine_has_no_healthy_one() -> None:
    ports = Ports(30.0)
    for key in KEYS:
        ports.quarantine(key, 0.0)
    assert ports.healthy(ports.source(HOST, PORTS), 1.0) == ()
    assert ports.healthy(ports.source(HOST, PORTS), 31.0) == KEYS


def test_a_failed_attempt_makes_the_next_port_due() -> None:
    ports = Ports(30.0)
    ports.source(HOST, PORTS).advance()
    assert due(ports) == 5002


def test_clients_differ_in_the_port_they_begin_with() -> None:
    assert [due(Ports(30.0, first)) for first in range(5)] == [5001, 5002, 5003, 5004, 5001]
    assert due(Ports(30.0, 2**63 - 1)) == 5004


def test_sources_rotate_independently() -> None:
    ports = Ports(30.0)
    busy, quiet = ports.source("busy", PORTS), ports.source("quiet", PORTS)
    for _ in range(3):
        busy.first(busy.keys, alone=False)
    assert (busy.first(busy.keys, alone=True), quiet.first(quiet.keys, alone=True)) == (3, 0)
    assert ports.source("busy", PORTS) is busy


def test_sources_remembered_are_bounded_and_the_longest_unused_is_forgotten() -> None:
    ports = Ports(30.0)
    for host in ("first", "kept"):
        ports.source(host, PORTS).advance()
    for number in range(REMEMBERED_SOURCES - 1):
        ports.source(f"host-{number}", PORTS)
    kept, first = ports.source("kept", PORTS), ports.source("first", PORTS)
    assert (kept.first(kept.keys, alone=True), first.first(first.keys, alone=True)) == (1, 0)


def test_a_group_goes_to_one_port_unless_it_is_of_many_or_of_much() -> None:
    rows: list[tuple[int, int, int, list[int]]] = [
        (1, 1 << 30, 4, [1]),
        (SPREAD_READS - 1, SPREAD_BYTES - 1, 4, [SPREAD_READS - 1]),
        (SPREAD_READS, 0, 4, [2, 2, 2, 2]),
        (SPREAD_READS, 0, 1, [SPREAD_READS]),
        (2, SPREAD_BYTES, 4, [1, 1]),
        (10, 0, 4, [3, 3, 2, 2]),
    ]
    for count, nbytes, ports, expected in rows:
        with row(count=count, nbytes=nbytes, ports=ports):
            assert shares(count, nbytes, ports) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(0, 1 << 40), st.integers(1, 64))
def test_shares_are_of_all_reads_and_even(count: int, nbytes: int, ports: int) -> None:
    given_out = shares(count, nbytes, ports)
    assert sum(given_out) == count
    assert len(given_out) <= ports
    assert max(given_out) - min(given_out) <= 1


def test_a_port_is_avoided_for_the_whole_duration_and_not_longer() -> None:
    ports = Ports(30.0)
    ports.quarantine((HOST, 5001), 100.0)
    assert ports.avoids((HOST, 5001), 100.0)
    assert ports.avoids((HOST, 5001), 129.999)
    assert not ports.avoids((HOST, 5001), 130.0)


def test_a_further_failure_restarts_the_duration() -> None:
    ports = Ports(30.0)
    ports.quarantine((HOST, 5001), 100.0)
    ports.quarantine((HOST, 5001), 120.0)
    assert ports.avoids((HOST, 5001), 149.0)


def test_only_the_port_that_failed_is_avoided() -> None:
    ports = Ports(30.0)
    ports.quarantine((HOST, 5001), 100.0)
    assert not ports.avoids((HOST, 5002), 100.0)
    assert not ports.avoids(("10.0.0.2", 5001), 100.0)


def test_a_port_that_served_a_read_is_forgiven() -> None:
    ports = Ports(30.0)
    ports.quarantine((HOST, 5001), 100.0)
    ports.forgive((HOST, 5001), 100.0)
    ports.forgive((HOST, 5002), 100.0)
    assert not ports.avoids((HOST, 5001), 100.0)


def test_a_duration_of_zero_avoids_nothing() -> None:
    ports = Ports(0.0)
    ports.quarantine((HOST, 5001), 100.0)
    assert not ports.avoids((HOST, 5001), 100.0)


def test_ports_are_remembered_as_avoided_until_the_last_one_that_failed_is_no_more() -> None:
    ports = Ports(30.0)
    for number in range(100):
        ports.quarantine((HOST, number), float(number))
    ports.quarantine((HOST, 0), 100.0)
    ports.forgive((HOST, 1), 128.0)
    assert ports.avoided
    ports.forgive((HOST, 0), 129.0)
    assert not ports.avoided


# --- What one frame asks for ---


def session(attempts: int = 64, nbytes: int = 1 << 40, named: int = 0, named_bytes: int = 0) -> ClientSession:
    """One whose server has this window, of which so much is in use."""
    made = ClientSession(reader=1, nonce=bytes(32), token=None)
    made.window, made.named, made.named_bytes = Window(attempts, nbytes), named, named_bytes
    return made


def waiting(nbytes: int, ring_id: bytes = b"R" * 16, *, over: bool = False) -> Read:
    """A read in a queue."""
    ref = ref_to(ring_id, 0, 1, nbytes)
    return Read(None if over else Job([ref], 1.0), 0, ref, Source(KEYS, 0), 1.0)


def asked_for(sizes: list[int], *window: int) -> tuple[list[int], int]:
    """The sizes of what the next frame names, and the length of the message that its answers share."""
    queue = deque(map(waiting, sizes))
    reads, shared = next_request(queue, session(*window))
    assert [read.ref.nbytes for read in (*reads, *queue)] == sizes
    return [read.ref.nbytes for read in reads], shared


def test_the_server_s_window_bounds_attempts_and_bytes_but_never_one_alone() -> None:
    rows: list[tuple[tuple[int, ...], list[int], int]] = [
        ((3, 1000), [1000], 1),
        ((3, 1000), [1001], 1),
        ((3, 1000), [1 << 40], 1),
        ((3, 1000), [500, 300, 200], 3),
        ((3, 1000), [500, 501], 1),
        ((3, 1000), [0, 0, 0, 0], 3),
        ((3, 1000, 1, 600), [400], 1),
        ((3, 1000, 1, 600), [401], 0),
        ((3, 1000, 1, 600), [200, 200], 2),
        ((3, 1000, 1, 600), [0, 0, 0], 2),
    ]
    for window, sizes, fits in rows:
        with row(window=window, sizes=sizes):
            assert asked_for(sizes, *window)[0] == sizes[:fits]


def test_the_client_s_own_window_bounds_the_bytes_of_all_but_two() -> None:
    half, more = OWN_WINDOW_BYTES // 2, OWN_WINDOW_BYTES + 1
    rows = [
        ([half, half, 1], 0, 0, 2), ([more, more, 1], 0, 0, 2), ([more], 1, more, 1), ([1], 2, OWN_WINDOW_BYTES, 0),
        ([half, 1], 2, half, 1),
    ]  # fmt: skip
    for sizes, named, named_bytes, fits in rows:
        with row(sizes=sizes, named=named, named_bytes=named_bytes):
            assert asked_for(sizes, 64, 1 << 40, named, named_bytes)[0] == sizes[:fits]


def test_small_answers_share_a_message_and_others_have_each_its_own() -> None:
    small, large, packed = 1000 - 80, SMALL_BYTES, min(PACK_BYTES // 1000, 64)
    rows = [
        ([small], 1, 0), ([small] * 5, 5, 5000), ([small] * 70, packed, 1000 * packed),
        ([small, large], 1, 0), ([large, large, small], 2, 0), ([small, small, large], 2, 2000),
        ([0] * 70, 64, 64 * 80),
    ]  # fmt: skip
    for sizes, count, shared in rows:
        with row(sizes=sizes):
            assert asked_for(sizes) == (sizes[:count], shared)


def test_a_frame_is_of_one_ring_and_names_nothing_that_is_over() -> None:
    queue = deque([waiting(1, over=True), waiting(2), waiting(3, over=True), waiting(4), waiting(5, b"S" * 16)])
    frames = [next_request(queue, session())[0] for _ in range(3)]
    assert [[read.ref.nbytes for read in reads] for reads in frames] == [[2, 4], [5], []]
