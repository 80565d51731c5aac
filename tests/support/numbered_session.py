"""A client's session as tests drive it: attempts by number, which both sides have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.support.payloads import ref_to
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.client_side import Asked, Attempt, ClientSession
from ucxx_transport.wire.codec import Message


class Fetch(NamedTuple):
    """A FETCH, the numbers of its attempts, and of the message that they share."""

    frame: bytes
    attempts: list[int]
    shared: int = 0


class NumberedSession(ClientSession):
    """A client's session whose attempts are known by their numbers, as both sides have them."""

    def __init__(self, *, reader: int, nonce: bytes, token: bytes | None) -> None:
        super().__init__(reader=reader, nonce=nonce, token=token)
        self.by_number: dict[int, Attempt] = {}

    @property
    def in_flight(self) -> int:
        """Attempts that have not ended, named and taken."""
        return self.named + self._taken

    def ask(self, names: Sequence[SlotRef], *, packed: bool = False) -> Fetch:
        """`fetch`."""
        attempts = [Attempt(name) for name in names]
        frame = self.fetch(attempts, packed=packed)
        self.by_number |= {attempt.number: attempt for attempt in attempts}
        return Fetch(frame, [attempt.number for attempt in attempts], attempts[0].shared)

    def ask_one(self, name: SlotRef) -> Asked:
        """`fetch_one`."""
        attempt = Attempt(name)
        frame = self.fetch_one(attempt)
        self.by_number[attempt.number] = attempt
        return Asked(frame, attempt.number, name.nbytes)

    def judge(self, number: int, message: Message) -> None:
        """`verify`."""
        self.verify(self.by_number[number], message)

    def finish(self, number: int, *, delivered: bool) -> None:
        """`end`."""
        self.end(self.by_number[number], delivered=delivered)

    def room(self, nbytes: int, names: int = 1) -> bool:
        """Whether so many more names, of so many bytes together, fit the window. A name alone always does."""
        named = self.named + names
        return named <= self.window.attempts and (self.named_bytes + nbytes <= self.window.nbytes or named == 1)

    def receive_offer(self, attempt: int, message: Message) -> list[Attempt]:
        """`on_offer` and `receive`: the attempts of what the server has picked."""
        offer = self.on_offer(attempt, message)
        names = [(one.slot, one.generation, one.nbytes, one.checksum) for one in offer.payloads]
        attempts = [Attempt(ref_to(offer.ring_id, *name, fingerprint=offer.fingerprint)) for name in names]
        self.receive(offer, attempts)
        self.by_number |= {taken.number: taken for taken in attempts}
        return attempts
