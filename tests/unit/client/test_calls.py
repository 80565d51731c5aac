"""What one read costs a client in Python calls: how long a small read takes follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.support.calls import LINK, counting
from tests.support.port_beside import port_beside
from ucxx_transport.client import Payload

A_FURTHER_NAME = 18
A_FURTHER_SOURCE = 17
READS = 20


def fewest(work: Callable[[], list[str]]) -> list[str]:
    """Of several tries: one that found nothing of what is done now and then, such as a timer that is due."""
    return min((work() for _ in range(READS)), key=len)


def test_a_further_name_of_a_batch_costs_less_than_a_read_of_its_own() -> None:
    with port_beside(slots=64) as beside, beside.client() as client:
        client.read(beside.ring.write_raw(b"first")).release()

        def read(count: int) -> list[str]:
            names: list[str] = []
            refs = [beside.ring.write_raw(bytes(1000)) for _ in range(count)]
            with counting(names, but=LINK):
                outcomes = client.read_many(refs)
            assert all(isinstance(outcome, Payload) for outcome in outcomes)
            return names

        one, many = fewest(lambda: read(1)), fewest(lambda: read(16))
        assert len(many) - len(one) <= 15 * A_FURTHER_NAME, "\n".join(many)


def test_a_name_of_a_further_source_costs_a_batch_as_little_as_one_of_the_same() -> None:
    with port_beside(slots=64) as beside, beside.client() as client:

        def read(count: int) -> list[str]:
            names: list[str] = []
            written = [beside.ring.write_raw(bytes(1000)) for _ in range(count)]
            refs = [replace(ref, host=f"10.0.0.{number}") for number, ref in enumerate(written, 1)]
            with counting(names, but=LINK):
                outcomes = client.read_many(refs)
            assert all(isinstance(outcome, Payload) for outcome in outcomes)
            return names

        read(16)  # so that a connection to each is open
        one, many = fewest(lambda: read(1)), fewest(lambda: read(16))
        assert len(many) - len(one) <= 15 * A_FURTHER_SOURCE, "\n".join(many)
