"""A Hypothesis state machine drives whole clients and server ports over the in-memory link, while messages are lost.

Any message of either side may vanish, be cut short, be altered, or break its connection; ports die and come back, or
are stopped for a while; reads are given up at any turn; time passes. A *step* is one of `_SHARES`. A payload comes
whole, as it was written, and once to a client; whenever all connections have ended no slot is held and no buffer is
lent. The model is a dictionary: what was written, and who was given it. What the two sessions of a connection owe each
other, the wire machine shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.support.exchange_rig import RigClient, open_rig
from tests.support.exhaustive import exhaustive
from tests.support.machines import CountedMachine, run_steps
from ucxx_transport.client import Payload
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import RingFullError, StaleSlotError, TransportError
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.testing import Faults

BURST = 20
PORTS = (1, 2)
SIZES = (0, 40, 5000, 20_000)
# Longer than any limit of the server: afterwards no connection of before is left.
EVERY_LIMIT_S = 10.0
# How many messages pass before one is hit: those of a first read, and of several after it.
POSITIONS = range(8)
KINDS = ("reset", "drop", "truncate", "flip")

_SHARES = {
    "write": 30,
    "read": 20,
    "read_together": 15,
    "give_up": 12,
    "take": 10,
    "discard": 3,
    "sabotage": 12,
    "behave": 8,
    "kill_or_start": 3,
    "freeze_or_thaw": 3,
    "time_passes": 6,
    "all_connections_end": 2,
}

Key = tuple[int, int]
"""Slot and generation."""


class ExchangeMachine(CountedMachine):
    """See the module. The client's rules are checked by `judge`, the server's by `nothing_is_held`."""

    rules_an_example = 15
    steps_an_example = 180  # most are bursts

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()

    @initialize(token=st.booleans())
    def open(self, *, token: bool) -> None:
        secret = "secret" if token else None
        limits: dict[str, Any] = {
            "first_frame_timeout_s": 1.0,
            "idle_timeout_s": 6.0,
            "send_timeout_s": 3.0,
            "ack_timeout_s": 2.0,
        }
        self.rig = self.stack.enter_context(
            open_rig(
                ring=RingConfig(slots=3, slot_bytes=32 << 10, prefault=False, checksum=True),
                server=ServerConfig(mode="thread", token=secret, **limits),
            )
        )
        self.clients = [
            self.rig.client(token=secret, pool_endpoint_max_age_s=5.0, port_quarantine_s=3.0) for _ in range(2)
        ]
        self.contents: dict[Key, bytes] = {}
        self.given: list[set[Key]] = [set(), set()]
        self.discarded: set[Key] = set()
        self.latest: dict[int, SlotRef] = {}
        self.refs: deque[SlotRef] = deque(maxlen=6)
        self.up = set(PORTS)
        self.frozen: dict[int, Callable[[], None]] = {}
        # Whether messages have vanished or changed that a connection of now may still be missing.
        self.suspect = False

    @rule(kind=st.sampled_from(list(_SHARES)), choice=st.randoms(use_true_random=False))
    def step(self, kind: str, choice: Random) -> None:
        getattr(self, kind)(choice)
        self.count_steps()

    @rule(seed=st.integers(0, (1 << 32) - 1))
    def burst(self, seed: int) -> None:
        choice = Random(seed)
        for kind in choice.choices(list(_SHARES), list(_SHARES.values()), k=BURST):
            self.step(kind, choice)

    def all_faults(self) -> list[Faults]:
        return [self.rig.faults, *(self.rig.faults_of(port) for port in self.up - set(self.frozen))]

    @property
    def sabotaged(self) -> bool:
        return bool(self.frozen) or any(switches != Faults() for switches in self.all_faults())

    # --- What writers and readers do ---

    def write(self, choice: Random) -> None:
        content = (len(self.contents).to_bytes(8, "little") * 2500)[: choice.choice(SIZES)]
        try:
            ref = self.rig.write(content)
        except RingFullError:
            assert all(state is SlotState.READING for state in self.rig.ring.slot_states())
            return
        self.contents[ref.slot, ref.generation] = content
        self.latest[ref.slot] = ref
        self.refs.append(ref)

    def read(self, choice: Random) -> None:
        if not self.refs:
            return
        who, ref, deadline_s = choice.randrange(2), choice.choice(self.refs), choice.choice((0.0004, 0.5, 10.0))
        must_come = (
            deadline_s == 10.0
            and not self.suspect
            and not self.sabotaged
            and bool(self.up)
            and self.is_ready(ref)
            and (ref.slot, ref.generation) not in self.given[who]
        )
        [outcome] = self.read_by(self.clients[who], [ref], deadline_s)
        self.judge(who, [ref], [outcome])
        assert not must_come or (ref.slot, ref.generation) in self.given[who], f"nothing was in the way: {outcome!r}"

    def read_by(self, client: RigClient, refs: Sequence[SlotRef], deadline_s: float) -> list[Payload | TransportError]:
        return client.read_many(refs, deadline_s=deadline_s)

    def read_together(self, choice: Random) -> None:
        """Both clients read several at once, each in one call."""
        if not self.refs:
            return
        refs = [choice.choices(self.refs, k=choice.randint(1, 5)) for _ in self.clients]
        jobs = [client.core.begin(some, 5.0) for client, some in zip(self.clients, refs, strict=True)]
        self.rig.run_until(lambda: all(job.done for job in jobs))
        for who, job in enumerate(jobs):
            outcomes = [outcome for outcome in job.outcomes if outcome is not None]
            self.judge(who, refs[who], outcomes)

    def give_up(self, choice: Random) -> None:
        """A read is abandoned after some turns."""
        if not self.refs:
            return
        who, refs = choice.randrange(2), choice.choices(self.refs, k=choice.randint(1, 3))
        client = self.clients[who]
        job = client.core.begin(refs, 5.0)
        for _ in range(choice.randrange(12)):
            self.rig.turn()
        if job.done:
            self.judge(who, refs, [outcome for outcome in job.outcomes if outcome is not None])
        else:
            before = [outcome for outcome in job.outcomes if isinstance(outcome, Payload)]
            self.note_given(who, before)
            client.abandon(job)

    def take(self, choice: Random) -> None:
        if not self.refs:
            return
        who = choice.randrange(2)
        core = self.clients[who].core
        take = core.take_call(
            self.refs[-1],
            max_payloads=choice.randint(1, 4),
            max_bytes=choice.choice((30, 6000, 1 << 20)),
            selector=choice.choice(("oldest", "newest")),
            wait_s=choice.choice((0.0, 0.0, 0.3)),
        )
        core.reads.go_on(take)
        self.rig.run_until(lambda: take.done)
        try:
            payloads = take.result()
        except TransportError:
            return
        self.judge(who, [payload.ref for payload in payloads], payloads)

    def discard(self, choice: Random) -> None:
        if self.refs:
            ref = choice.choice(self.refs)
            self.discarded.add((ref.slot, ref.generation))
            self.clients[choice.randrange(2)].discard([ref], deadline_s=3.0)

    # --- What goes wrong ---

    def sabotage(self, choice: Random) -> None:
        faults = choice.choice(self.all_faults())
        kind, position, offset = choice.choice(KINDS), choice.choice(POSITIONS), choice.randrange(150)
        if kind == "flip" and faults is self.rig.faults:
            offset %= 60  # one bit of an end, whether it was delivered, is the client's word
        faults.reset_after = position if kind == "reset" else None
        faults.spare = 0 if kind == "reset" else position
        faults.drop = 1 if kind == "drop" else 0
        faults.truncate_to = offset if kind == "truncate" else None
        faults.flip_byte = offset if kind == "flip" else None
        self.suspect |= kind != "reset"

    def behave(self, _: Random) -> None:
        for thaw in list(self.frozen.values()):
            thaw()
            self.suspect = True
        self.frozen.clear()
        for faults in self.all_faults():
            faults.reset_after, faults.spare, faults.drop = None, 0, 0
            faults.truncate_to = faults.flip_byte = None

    def kill_or_start(self, choice: Random) -> None:
        down = set(PORTS) - self.up
        port = choice.choice(sorted(down or PORTS))  # one that is down comes back first
        if port in self.frozen:
            return
        if port in self.up:
            self.rig.stop_port(port)
        else:
            self.rig.start_port(port)
        self.up ^= {port}

    def freeze_or_thaw(self, choice: Random) -> None:
        """A port's process is stopped, or goes on."""
        port = choice.choice(PORTS)
        if port in self.frozen:
            self.frozen.pop(port)()
            self.suspect = True
        elif port in self.up:
            self.frozen[port] = self.rig.freeze_port(port)

    def time_passes(self, choice: Random) -> None:
        self.rig.advance(choice.choice((0.3, 2.5, 5.5)))

    def all_connections_end(self, choice: Random) -> None:
        self.behave(choice)
        self.rig.advance(EVERY_LIMIT_S)
        self.suspect = False
        self.nothing_is_held()

    # --- What must always hold ---

    def judge(self, who: int, refs: Sequence[SlotRef], outcomes: Sequence[Payload | TransportError]) -> None:
        before = set(self.given[who])
        assert len(refs) == len(outcomes)
        for ref, outcome in zip(refs, outcomes, strict=True):
            key = (ref.slot, ref.generation)
            if isinstance(outcome, Payload):
                assert outcome.ref.name == ref.name
            elif key in before:
                assert isinstance(outcome, StaleSlotError), f"a duplicate is refused by name, not by {outcome!r}"
        self.note_given(who, [outcome for outcome in outcomes if isinstance(outcome, Payload)])

    def note_given(self, who: int, payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            key = (payload.ref.slot, payload.ref.generation)
            assert bytes(payload.buffer) == self.contents[key], "never another episode, never a torn one"
            payload.release()
            assert key not in self.given[who], "delivered twice"
            self.given[who].add(key)

    def is_ready(self, ref: SlotRef) -> bool:
        return (ref.slot, ref.generation) in {(ready.slot, ready.generation) for ready in self.rig.ring.ready_refs()}

    def nothing_is_held(self) -> None:
        states = self.rig.ring.slot_states()
        assert set(states) <= {SlotState.FREE, SlotState.READY}, "a slot is stuck"
        for slot, ref in self.latest.items():
            if states[slot] is SlotState.READY:
                assert self.is_ready(ref)
            else:
                key = (slot, ref.generation)
                assert key in self.discarded or any(key in given for given in self.given), "freed, and no one has it"
        assert [client.counts.lent_buffers for client in self.clients] == [0, 0]

    def teardown(self) -> None:
        try:
            if hasattr(self, "rig"):
                self.all_connections_end(Random(0))
        finally:
            self.stack.close()


@pytest.mark.parametrize("steps", [3000, exhaustive(60_000)])
def test_every_payload_comes_whole_and_at_most_once_whatever_the_network_does(
    steps: int, log_events: list[MutableMapping[str, Any]]
) -> None:
    run_steps(ExchangeMachine, steps)
    assert not [event for event in log_events if event["log_level"] in {"error", "critical"}]
