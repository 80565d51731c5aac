"""Work for everybody: payloads written to both rings and read from them by all readers, with the books kept."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.soak.actors import Actor, Message, Stage
from tests.soak.ledger import Ledger
from tests.soak.sources import SLOTS, Source, dwell_s
from tests.soak.summary import Summary
from ucxx_transport import SlotRef

__all__ = ["STEP_DEADLINE_S", "TAKER", "Traffic"]

READER = "tests.e2e.programs.reader"
TAKER = "taker"
"""Ends the names of readers that take, instead of reading what they are given."""
READS_AT_ONCE = 4
MOST_TAKEN = 3
TAKE_WAIT_S = 0.02
TAKE_REST_S = 0.05
WRITES_AT_ONCE = 2
READ_DEADLINE_S = 15.0
STEP_DEADLINE_S = 90.0
# A reader whose read failed gets the next one only then: while a server is away, failures come by the thousand.
REST_S = 0.02


class Traffic:
    """Hands out writes and reads, takes their outcomes.

    Args:
        sources: the rings. rng: sizes and who reads what. folder: for logs. summary: counts go here.
    """

    def __init__(self, sources: Sequence[Source], rng: random.Random, folder: Path, summary: Summary) -> None:
        self.stage = Stage(folder, hand_out=self._hand_out, on_answer=self._on_answer)
        self.readers: dict[str, Actor] = {}
        self.writing = True
        self.reading = True
        self.answered = 0
        self.done: Counter[str] = Counter()
        self._sources = sources
        self._rng = rng
        self._summary = summary
        self._books: dict[bytes, tuple[Source, Ledger]] = {}
        self._rest_until_s: dict[str, float] = {}

    def start_reader(self, kind: str, client: Message) -> None:
        """A reader, new or in place of the one that was killed."""
        self.readers[kind] = self.stage.spawn(kind.replace(" ", "-"), READER, {"client": client})

    def reader_killed(self, reader: Actor) -> None:
        """A reader was killed: what it was asked for is in doubt."""
        for source in self._sources:
            source.ledger.reader_killed(reader.name)
        for request in reader.unanswered.values():
            if request["what"] == "take":
                _, ledger = self._books[_ring_id(request["source"])]
                ledger.take_unheard(request["max_payloads"])

    def run_until(self, reached: Callable[[], object], what: str) -> None:
        """Go on until `reached()`; fails after `STEP_DEADLINE_S`."""
        self.stage.run_until(reached, STEP_DEADLINE_S, what)

    def run_dry(self, *, empty: bool = False) -> None:
        """Hand out nothing new (with `empty`: until all that was written is read) and wait for every answer."""
        self.writing, self.reading = False, empty
        self.run_until(lambda: self._is_dry(empty=empty), "every request is answered")

    def go_on(self) -> None:
        """Hand out work again."""
        self.writing = self.reading = True

    def find_server(self, source: Source) -> int:
        """The process that serves a source, once there is one."""
        self.run_until(lambda: self.server_of(source), f"a server for {source.name}")
        return self.server_of(source)

    def server_of(self, source: Source) -> int:
        """The process that serves a source now, as far as is known; asks its worker when it is not."""
        pid = source.find_server()
        writer = source.writer if source.home_server is None else None
        if not pid and writer is not None and all(asked["what"] != "server" for asked in writer.unanswered.values()):
            writer.request("server")
        return pid

    def _is_dry(self, *, empty: bool) -> bool:
        if any(actor.unanswered or not actor.ready for actor in self.stage.actors):
            return False
        return not empty or not any(source.ledger.waiting for source in self._sources)

    def _hand_out(self) -> None:
        now = time.monotonic()
        opened = [source for source in self._sources if source.is_open()]
        for source in opened:
            assert source.ring is not None
            assert source.writer is not None
            self._books.setdefault(source.ring.ring_id, (source, source.ledger))
            room = SLOTS - source.ledger.waiting - source.ledger.handed_out
            if self.writing and len(source.writer.unanswered) < min(room, WRITES_AT_ONCE):
                source.request_write(self._rng)
        if self.reading:
            readers = list(self.readers.items())
            self._rng.shuffle(readers)
            for kind, reader in readers:
                if reader.ready and now >= self._rest_until_s.get(reader.name, 0.0):
                    hand = self._hand_take if kind.endswith(TAKER) else self._hand_reads
                    hand(reader, opened)

    def _hand_reads(self, reader: Actor, opened: Sequence[Source]) -> None:
        while len(reader.unanswered) < READS_AT_ONCE:
            offers = [source for source in opened if source.ledger.waiting]
            if not offers:
                return
            source = self._rng.choice(offers)
            ref = source.ledger.hand_out(reader.name)
            reader.request(
                "read",
                ref=ref.to_bytes().hex(),
                deadline_s=READ_DEADLINE_S,
                dwell_s=dwell_s(self._rng),
                server_kills=source.server_kills,
            )

    def _hand_take(self, taker: Actor, opened: Sequence[Source]) -> None:
        """One take at a time, with a rest after it: readers by name would get nothing otherwise."""
        known = [source for source in opened if source.ledger.newest is not None]
        if taker.unanswered or not known:
            return
        source = self._rng.choice(known)
        assert source.ledger.newest is not None
        taker.request(
            "take",
            source=source.ledger.newest.to_bytes().hex(),
            max_payloads=self._rng.randint(1, MOST_TAKEN),
            selector=self._rng.choice(("oldest", "newest")),
            wait_s=self._rng.uniform(0, TAKE_WAIT_S),
            dwell_s=dwell_s(self._rng),
            server_kills=source.server_kills,
        )

    def _on_answer(self, actor: Actor, request: Message, answer: Message) -> None:
        self.answered += 1
        match request["what"]:
            case "write":
                self._on_write(actor, answer)
            case "read":
                self._on_read(actor, request, answer)
            case "take":
                self._on_take(actor, request, answer)
            case "server":
                source = next(source for source in self._sources if source.writer is actor)
                source.find_server_among(answer["pids"])

    def _on_write(self, actor: Actor, answer: Message) -> None:
        source = next(source for source in self._sources if source.writer is actor)
        if answer["outcome"] == "written":
            self.done[actor.name] += 1
            source.ledger.written(SlotRef.from_bytes(bytes.fromhex(answer["ref"])))
        elif answer["outcome"] == "RingFullError":
            source.ledger.counts["ring_full"] += 1
        else:
            raise self.stage.failure(f"{actor.name} could not write: {answer}")

    def _on_read(self, actor: Actor, request: Message, answer: Message) -> None:
        ref = SlotRef.from_bytes(bytes.fromhex(request["ref"]))
        source, ledger = self._books[ref.ring_id]
        try:
            ledger.answered(ref, answer["outcome"], answer.get("message", ""))
        except AssertionError as error:
            raise self.stage.failure(f"{actor.name}: {error}") from error
        self._summary.slowest_read_s = max(self._summary.slowest_read_s, answer["seconds"])
        if answer["outcome"] != "delivered":
            self._rest_until_s[actor.name] = time.monotonic() + REST_S
            return
        self._count_delivery(actor, source, request, answer["transport"])

    def _on_take(self, actor: Actor, request: Message, answer: Message) -> None:
        self._rest_until_s[actor.name] = time.monotonic() + self._rng.uniform(0, TAKE_REST_S)
        source, ledger = self._books[_ring_id(request["source"])]
        try:
            if answer["outcome"] != "taken":
                ledger.take_failed(answer["outcome"], answer["message"])
                return
            for payload in answer["payloads"]:
                assert not payload["wrong"], payload["wrong"]
                ref = SlotRef.from_bytes(bytes.fromhex(payload["ref"]))
                ledger.taken(ref, actor.name, in_doubt=request["server_kills"] != source.server_kills)
                self._count_delivery(actor, source, request, payload["transport"])
        except AssertionError as error:
            raise self.stage.failure(f"{actor.name}: {error}") from error

    def _count_delivery(self, actor: Actor, source: Source, request: Message, transport: str) -> None:
        self.done[actor.name] += 1
        self._summary.transports[transport] += 1
        if transport == "ucx" and request["server_kills"] == source.server_kills:
            self.done[f"ucx from {source.name}"] += 1


def _ring_id(ref: str) -> bytes:
    return SlotRef.from_bytes(bytes.fromhex(ref)).ring_id
