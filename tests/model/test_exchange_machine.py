"""A Hypothesis state machine drives clients and server ports over the in-memory link, while messages are lost.

Any message of either side may vanish, be cut short, be altered, or break its connection; ports die and come back; reads
are cancelled at any step; time passes. A *step* is one rule. After every step no buffer is lent; whenever all
connections have ended no slot is held. The model is a dictionary: what was written, and who was given it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.exchange_rig import open_rig
from tests.support.exhaustive import exhaustive
from tests.support.virtual_time import VirtualTimeLoop, settle
from ucxx_transport.client import Payload, UCXXClient
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import StaleSlotError, TransportError
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.testing import Faults

STEPS_AN_EXAMPLE = 40
PORTS = (1, 2)
# Longer than any limit of the server: afterwards no connection of before is left.
EVERY_LIMIT_S = 10.0
# Handshake, request and acknowledgement of a first read, and of the next one: every position of a message that matters.
POSITIONS = st.integers(0, 5)

T = TypeVar("T")


class ExchangeMachine(RuleBasedStateMachine):
    """See the module. The client's rules are checked by `judge`, the server's by `nothing_is_held`."""

    @initialize(token=st.booleans(), pooled=st.integers(0, 2))
    def open(self, *, token: bool, pooled: int) -> None:
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        secret = "secret" if token else None
        self.opening = open_rig(
            ring=RingConfig(slots=3, slot_bytes=32 << 10, prefault=False, checksum=True),
            server=ServerConfig(
                mode="thread",
                token=secret,
                first_frame_timeout_s=1.0,
                idle_timeout_s=6.0,
                send_timeout_s=3.0,
                ack_timeout_s=2.0,
            ),
        )
        self.rig = self.run(self.opening.__aenter__())
        self.clients = [
            self.rig.client(
                token=secret,
                max_concurrent_reads=2,
                max_pooled_endpoints=pooled,
                pool_endpoint_max_age_s=5.0,
                port_quarantine_s=3.0,
            )
            for _ in range(2)
        ]
        self.contents: dict[tuple[int, int], bytes] = {}
        self.given: list[set[tuple[int, int]]] = [set(), set()]
        self.latest: dict[int, SlotRef] = {}
        self.refs: deque[SlotRef] = deque(maxlen=6)
        self.up = set(PORTS)
        # Whether messages have vanished or changed that a connection of now may still be missing.
        self.suspect = False

    def run(self, work: Awaitable[T]) -> T:
        async def main() -> T:
            return await work

        return self.runner.run(main())

    @property
    def sabotaged(self) -> bool:
        return any(switches != Faults() for switches in self.all_faults())

    def all_faults(self) -> list[Faults]:
        return [self.rig.faults, *(self.rig.faults_of(port) for port in self.up)]

    # What writers and readers do.

    @rule(nbytes=st.sampled_from([0, 40, 5000, 20_000]))
    def write(self, nbytes: int) -> None:
        number = len(self.contents)
        content = (number.to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]
        try:
            ref = self.rig.write(content)
        except TransportError:
            assert all(state is SlotState.READING for state in self.rig.ring.slot_states())
            return
        self.contents[ref.slot, ref.generation] = content
        self.latest[ref.slot] = ref
        self.refs.append(ref)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), who=st.integers(0, 1), deadline_s=st.sampled_from([0.0, 0.5, 10.0]))
    def read(self, data: st.DataObject, who: int, deadline_s: float) -> None:
        ref = data.draw(st.sampled_from(list(self.refs)), label="ref")
        must_come = (
            deadline_s == 10.0
            and not self.suspect
            and not self.sabotaged
            and bool(self.up)
            and self.is_ready(ref)
            and (ref.slot, ref.generation) not in self.given[who]
        )
        outcome = self.run(self.outcome(self.clients[who], ref, deadline_s))
        self.judge(who, ref, outcome)
        assert isinstance(outcome, Payload) or not must_come, f"nothing was in the way, and yet: {outcome!r}"

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), count=st.integers(2, 5))
    def read_at_once(self, data: st.DataObject, count: int) -> None:
        whos = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count), label="who")
        refs = data.draw(st.lists(st.sampled_from(list(self.refs)), min_size=count, max_size=count), label="refs")

        async def all_of_them() -> list[Payload | TransportError]:
            reads = (self.outcome(self.clients[who], ref, 5.0) for who, ref in zip(whos, refs, strict=True))
            return list(await asyncio.gather(*reads))

        before = [set(given) for given in self.given]
        for who, ref, outcome in zip(whos, refs, self.run(all_of_them()), strict=True):
            self.judge(who, ref, outcome, given_before=before[who])

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), who=st.integers(0, 1), turns=st.integers(0, 30))
    def read_and_give_up(self, data: st.DataObject, who: int, turns: int) -> None:
        ref = data.draw(st.sampled_from(list(self.refs)), label="ref")

        async def cancelled_after_turns() -> Payload | TransportError | None:
            reading = asyncio.create_task(self.outcome(self.clients[who], ref, 5.0))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            try:
                return await reading
            except asyncio.CancelledError:
                return None

        outcome = self.run(cancelled_after_turns())
        if outcome is not None:
            self.judge(who, ref, outcome)

    # What goes wrong.

    @precondition(lambda self: self.up)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["reset", "drop", "truncate", "flip"]),
        position=POSITIONS,
        offset=st.integers(0, 150),
    )
    def sabotage(self, data: st.DataObject, kind: str, position: int, offset: int) -> None:
        faults = data.draw(st.sampled_from(self.all_faults()), label="side")
        faults.reset_after = position if kind == "reset" else None
        faults.spare = 0 if kind == "reset" else position
        faults.drop = 1 if kind == "drop" else 0
        faults.truncate_to = offset if kind == "truncate" else None
        faults.flip_byte = min(offset, 60) if kind == "flip" else None
        self.suspect |= kind != "reset"

    @precondition(lambda self: self.sabotaged)
    @rule()
    def behave(self) -> None:
        for faults in self.all_faults():
            faults.reset_after, faults.spare, faults.drop = None, 0, 0
            faults.truncate_to = faults.flip_byte = None

    @rule(port=st.sampled_from(PORTS))
    def kill_or_start(self, port: int) -> None:
        if port in self.up:
            self.run(self.rig.stop_port(port))
        else:
            self.run(self.rig.start_port(port))
        self.up ^= {port}

    @rule(seconds=st.sampled_from([0.3, 2.5, 5.5]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def all_connections_end(self) -> None:
        self.behave()
        self.run(asyncio.sleep(EVERY_LIMIT_S))
        self.suspect = False
        self.nothing_is_held()

    # What must always hold.

    @invariant()
    def no_buffer_is_lent_between_reads(self) -> None:
        if hasattr(self, "clients"):
            self.run(settle())
            assert [client.statistics().lent_buffers for client in self.clients] == [0, 0]

    def judge(
        self,
        who: int,
        ref: SlotRef,
        outcome: Payload | TransportError,
        *,
        given_before: set[tuple[int, int]] | None = None,
    ) -> None:
        name = (ref.slot, ref.generation)
        if isinstance(outcome, TransportError):
            if name in (self.given[who] if given_before is None else given_before):
                assert isinstance(outcome, StaleSlotError), f"a duplicate is refused by name, not by {outcome!r}"
            return
        assert bytes(outcome.buffer) == self.contents[name], "never another episode, never a torn one"
        outcome.release()
        assert name not in self.given[who], "delivered twice"
        self.given[who].add(name)

    def is_ready(self, ref: SlotRef) -> bool:
        ready = {(ready.slot, ready.generation) for ready in self.rig.ring.ready_refs()}
        return (ref.slot, ref.generation) in ready

    def nothing_is_held(self) -> None:
        states = self.rig.ring.slot_states()
        assert set(states) <= {SlotState.FREE, SlotState.READY}, "a slot is stuck"
        for slot, ref in self.latest.items():
            if states[slot] is SlotState.READY:
                assert self.is_ready(ref)
            else:
                assert any((slot, ref.generation) in given for given in self.given), "freed, and nobody has it"

    async def outcome(self, client: UCXXClient, ref: SlotRef, deadline_s: float) -> Payload | TransportError:
        try:
            return await client.read(ref, deadline_s=deadline_s)
        except TransportError as error:
            return error

    def teardown(self) -> None:
        if not hasattr(self, "clients"):
            return
        try:
            self.all_connections_end()
        finally:
            with suppress(StopAsyncIteration):
                self.run(self.opening.__aexit__(None, None, None))
            self.runner.close()


@pytest.mark.parametrize("steps", [1000, exhaustive(4000)])
def test_every_payload_comes_whole_and_at_most_once_whatever_the_network_does(
    steps: int,
    log_events: list[MutableMapping[str, Any]],
) -> None:
    run_state_machine_as_test(
        ExchangeMachine,
        settings=settings(
            max_examples=max(1, steps // STEPS_AN_EXAMPLE),
            stateful_step_count=STEPS_AN_EXAMPLE,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert not [event for event in log_events if event["log_level"] in {"error", "critical"}]
