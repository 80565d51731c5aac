from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ucxx_transport.errors import ConfigError
from ucxx_transport.trainer.prefetch import Closed, DoubleBuffer, FetchOrder


def buffer() -> DoubleBuffer[str, str]:
    return DoubleBuffer()


def test_a_batch_is_fetched_while_the_one_before_is_trained_on() -> None:
    double = buffer()
    cold = [double.is_cold_start]
    first = double.start("one")
    cold.append(double.is_cold_start)
    assert cold == [True, False]
    assert double.finished(first.batch_id, "ONE")
    collected = double.collect()
    assert (collected.batch, collected.done, collected.order, double.in_use) == ("ONE", None, None, "ONE")
    second = double.start("two")
    assert double.finished(second.batch_id, "TWO")
    assert (double.in_use, double.fetched) == ("ONE", True)
    collected = double.collect()
    assert (collected.batch, collected.done, double.in_use) == ("TWO", "ONE", "TWO")


def test_what_is_deferred_is_fetched_when_the_one_before_is_collected() -> None:
    double = buffer()
    order = double.defer("one")
    assert order is not None
    assert double.defer("two") is None
    double.finished(order.batch_id, "ONE")
    assert double.defer("three") is None
    following = double.collect().order
    assert following is not None
    assert (following.rollouts, double.deferred, double.fetching) == ("two", 1, following.batch_id)


def test_what_is_released_is_not_given_back_again_by_the_next_collect() -> None:
    double = buffer()
    assert double.release() is None
    double.finished(double.start("one").batch_id, "ONE")
    assert double.release() is None  # it is not in use yet
    double.collect()
    second = double.start("two")
    assert (double.release(), double.in_use) == ("ONE", None)
    double.finished(second.batch_id, "TWO")
    assert double.collect().done is None
    assert double.close().done == "TWO"


def test_a_late_result_is_not_the_next_batch() -> None:
    double = buffer()
    first = double.start("one")
    assert double.defer("two") is None
    second = double.abandon(first.batch_id)
    assert second is not None
    assert second.rollouts == "two"
    assert not double.finished(first.batch_id, "ONE")
    assert double.finished(second.batch_id, "TWO")
    assert not double.finished(second.batch_id, "TWO AGAIN")
    assert double.collect().batch == "TWO"


def test_a_batch_that_came_in_time_is_not_abandoned() -> None:
    double = buffer()
    order = double.start("one")
    double.finished(order.batch_id, "ONE")
    assert double.abandon(order.batch_id) is None
    assert double.collect().batch == "ONE"


def test_what_is_out_of_turn_is_refused_and_changes_nothing() -> None:
    double = buffer()
    with pytest.raises(ConfigError, match="start_prefetch"):
        double.collect()
    order = double.start("one")
    with pytest.raises(ConfigError, match="defer_prefetch"):
        double.start("two")
    with pytest.raises(ConfigError, match="wait_prefetch"):
        double.collect()
    double.finished(order.batch_id, "ONE")
    with pytest.raises(ConfigError, match="collect_prefetch"):
        double.start("two")
    assert double.collect().batch == "ONE"


def test_closing_gives_back_what_is_held() -> None:
    double = buffer()
    double.finished(double.start("one").batch_id, "ONE")
    double.collect()
    double.finished(double.start("two").batch_id, "TWO")
    double.defer("three")
    assert double.close() == Closed("ONE", "TWO", ("three",))
    assert (double.in_use, double.deferred, double.is_cold_start) == (None, 0, True)
    assert double.close() == Closed(None, None, ())


class Machine(RuleBasedStateMachine):
    """Every batch fetched is collected once, in order, or released once; ids are never used again."""

    def __init__(self) -> None:
        super().__init__()
        self.double: DoubleBuffer[int, int] = DoubleBuffer()
        self.asked = 0
        self.orders: list[FetchOrder[int]] = []
        self.running: list[FetchOrder[int]] = []
        self.held: list[int] = []
        self.collected: list[int] = []
        self.released: list[int] = []

    def take(self, order: FetchOrder[int] | None) -> None:
        if order is not None:
            assert all(order.batch_id != earlier.batch_id for earlier in self.orders)
            self.orders.append(order)
            self.running.append(order)

    @rule()
    def defer(self) -> None:
        self.asked += 1
        self.take(self.double.defer(self.asked))

    @precondition(lambda self: self.double.is_cold_start)
    @rule()
    def start(self) -> None:
        self.asked += 1
        self.take(self.double.start(self.asked))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.running))
        self.running.remove(order)
        expected = order.batch_id == self.double.fetching
        assert self.double.finished(order.batch_id, order.rollouts) == expected
        (self.held if expected else self.released).append(order.rollouts)

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        self.take(self.double.abandon(data.draw(st.sampled_from(self.orders)).batch_id))

    @precondition(lambda self: self.double.fetched)
    @rule()
    def collect(self) -> None:
        found = self.double.collect()
        self.collected.append(found.batch)
        if found.done is not None:
            self.held.remove(found.done)
            self.released.append(found.done)
        self.take(found.order)

    @rule()
    def release(self) -> None:
        done = self.double.release()
        if done is not None:
            self.held.remove(done)
            self.released.append(done)

    @invariant()
    def nothing_is_lost_or_given_twice(self) -> None:
        assert self.collected == sorted(set(self.collected))
        assert len(set(self.released)) == len(self.released)
        assert len(self.held) <= 2
        assert [order.rollouts for order in self.orders] == list(range(1, len(self.orders) + 1))
        assert self.asked == len(self.orders) + self.double.deferred
        # whatever waits has something before it
        assert not (self.double.is_cold_start and self.double.deferred)


TestDoubleBuffer = Machine.TestCase
TestDoubleBuffer.settings = settings(stateful_step_count=40)
