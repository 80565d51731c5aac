"""What every link does the same."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.conformance.conftest import HOST, Owner, Pair, Sides
from tests.support.links import endpoints_open, in_flight
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import EndpointEvents, OnDone, Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.ucx import UCXXLink

LARGE_BYTES = 64 << 20


def ignore(_operation: Operation) -> None:
    """Nothing is done when it ends."""


def noting(notes: list[int], number: int) -> Callable[[object], None]:
    """A callback that notes the number."""
    return lambda _: notes.append(number)


def outcome(operation: Operation) -> str:
    """`in flight`, `ok`, or the reason it failed with."""
    if operation.error is None:
        return "ok" if operation.completed else "in flight"
    return str(operation.error.facts["reason"])


def pattern(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


class Done:
    """Calls back into a list, and knows when."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def __call__(self, operation: Operation) -> None:
        self.operations.append(operation)

    def outcomes(self) -> list[str]:
        return [outcome(operation) for operation in self.operations]


def finish(sides: Sides, *operations: Operation) -> None:
    """The operations are over, well."""
    sides.until(lambda: all(operation.completed for operation in operations), "operations")
    assert [outcome(operation) for operation in operations] == ["ok"] * len(operations)


def send_later(endpoint: Endpoint, content: object, on_done: OnDone, *, channel: int = 0) -> Operation:
    """Post a send that does not leave at once, to be called back."""
    send = endpoint.post_send(content, channel=channel)
    assert not send.completed
    send.on_done = on_done
    return send


def exchange(sides: Sides, sender: Endpoint, receiver: Endpoint, content: bytes, channel: int = 0) -> None:
    """A message arrives as it is."""
    got = bytearray(len(content))
    receive = receiver.post_receive(got, ignore, channel=channel)
    send = sender.post_send(content, channel=channel)
    finish(sides, receive, send)
    assert got == content


# --- messages ---------------------------------------------------------------------------------------------------------


def test_message_arrives_as_it_was_sent(sides: Sides) -> None:
    pair = sides.connect()
    ends = ((pair.near, pair.far), (pair.far, pair.near))
    sizes = (1, 128, 8191, 8192, 65536, 300_000, 1 << 20)
    for (sender, receiver), nbytes, first in itertools.product(ends, sizes, ("receive", "send")):
        with row(nbytes=nbytes, first=first):
            sent, got = pattern(nbytes, 1), bytearray(nbytes)
            if first == "receive":
                receive = receiver.post_receive(got, ignore)
                send = sender.post_send(sent)
            else:
                send = sender.post_send(sent)
                sides.turn()
                receive = receiver.post_receive(got, ignore)
            finish(sides, receive, send)
            assert got == sent


def test_messages_of_one_channel_keep_their_order(sides: Sides) -> None:
    pair = sides.connect()
    sizes = [random.Random(seed).choice([1, 100, 9000, 70_000, 600_000]) for seed in range(40)]
    sent = [pattern(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    got = [bytearray(nbytes) for nbytes in sizes]
    receives = [pair.far.post_receive(buffer, ignore, channel=3) for buffer in got[:20]]
    sends = [pair.near.post_send(buffer, channel=3) for buffer in sent]
    receives += [pair.far.post_receive(buffer, ignore, channel=3) for buffer in got[20:]]
    finish(sides, *receives, *sends)
    assert [bytes(buffer) for buffer in got] == sent


def test_channels_are_independent(sides: Sides) -> None:
    pair = sides.connect()
    channels = (0, 1, 2, 7, 255, 65535)
    blocked = bytearray(10)
    pair.far.post_receive(blocked, ignore, channel=4)  # nothing is ever sent there
    for sent_order, posted_order in ((channels, channels[::-1]), (channels[::-1], channels)):
        got = {channel: bytearray(8) for channel in channels}
        receives = [pair.far.post_receive(got[channel], ignore, channel=channel) for channel in posted_order]
        sends = [pair.near.post_send(channel.to_bytes(8, "little"), channel=channel) for channel in sent_order]
        finish(sides, *receives, *sends)
        assert {int.from_bytes(buffer, "little"): channel for channel, buffer in got.items()} == {
            channel: channel for channel in channels
        }
    assert blocked == bytes(10)


def test_thousands_of_messages_on_many_channels_of_many_connections_never_mix(sides: Sides) -> None:
    pairs = [sides.connect() for _ in range(8)]
    rng = random.Random(11)
    over = Done()
    sends: list[Operation] = []
    expected: list[tuple[bytearray, bytes]] = []
    for turn in range(4):
        plan = [(number, channel, way) for number in range(8) for channel in range(1, 41) for way in (0, 1)]
        jobs = []
        for number, channel, way in plan:
            ends = (pairs[number].near, pairs[number].far)
            sender, receiver = ends if way else ends[::-1]
            content = f"{turn}/{number}/{channel}/{way}".encode() * rng.choice((1, 10, 1000))
            got = bytearray(len(content))
            expected.append((got, content))
            jobs.append((sender, receiver, content, got, channel))
        rng.shuffle(jobs)
        for _sender, receiver, _content, got, channel in jobs:
            receiver.post_receive(got, over, channel=channel)
        rng.shuffle(jobs)
        for sender, _receiver, content, _got, channel in jobs:
            sends.append(sender.post_send(content, channel=channel))
    sides.until(lambda: len(over.operations) == len(expected), "all of them")
    finish(sides, *sends)
    assert len(expected) == len(sends) == 2560
    assert set(over.outcomes()) == {"ok"}
    assert all(got == content for got, content in expected)


def test_large_message_is_exact(sides: Sides) -> None:
    pair = sides.connect()
    sent = np.random.default_rng(7).integers(0, 256, LARGE_BYTES, dtype=np.uint8)
    got = np.zeros(LARGE_BYTES, dtype=np.uint8)
    finish(sides, pair.far.post_receive(got, ignore), pair.near.post_send(sent))
    assert np.array_equal(got, sent)


def test_both_directions_at_once(sides: Sides) -> None:
    pair = sides.connect()
    up, down = pattern(2 << 20, 3), pattern(3 << 20, 4)
    got_up, got_down = bytearray(len(up)), bytearray(len(down))
    finish(
        sides,
        pair.near.post_receive(got_down, ignore),
        pair.far.post_receive(got_up, ignore),
        pair.near.post_send(up),
        pair.far.post_send(down),
    )
    assert (bytes(got_up), bytes(got_down)) == (up, down)


def test_shorter_message_is_a_silent_success_that_leaves_the_tail(sides: Sides) -> None:
    pair = sides.connect()
    for nbytes in (10, 300_000):
        got = bytearray(b"\xaa" * (2 * nbytes))
        finish(sides, pair.far.post_receive(got, ignore), pair.near.post_send(b"\x55" * nbytes))
        assert got == b"\x55" * nbytes + b"\xaa" * nbytes


def test_empty_message_fills_one_receive(sides: Sides) -> None:
    pair = sides.connect()
    first, second = bytearray(4), bytearray(4)
    receives = [pair.far.post_receive(first, ignore), pair.far.post_receive(second, ignore)]
    finish(sides, pair.near.post_send(b""), pair.near.post_send(b"next"), *receives)
    assert (first, second) == (bytearray(4), bytearray(b"next"))


@pytest.mark.parametrize(("posted", "sent"), [(10, 100), (128, 65536), (1000, 3 << 20)])
def test_longer_message_is_truncated_and_the_endpoint_lives(sides: Sides, posted: int, sent: int) -> None:
    pair = sides.connect()
    guard = bytearray(posted + 64)
    receive = pair.far.post_receive(memoryview(guard)[:posted], ignore, channel=9)
    pair.near.post_send(b"\x77" * sent, channel=9)
    sides.until(lambda: receive.completed)
    assert outcome(receive) == "truncated"
    assert guard[posted:] == bytes(64)
    assert pair.far.alive
    for channel in (9, 0):
        exchange(sides, pair.near, pair.far, b"still", channel)
    assert pair.far_owner.error is None


def test_messages_may_be_posted_before_the_connection_is_up(sides: Sides) -> None:
    got = [bytearray(6) for _ in range(3)]
    answer = bytearray(6)
    far_receives: list[Operation] = []

    def answer_at_once(endpoint: Endpoint) -> EndpointEvents:
        far_receives.extend(endpoint.post_receive(buffer, ignore, channel=2) for buffer in got)
        endpoint.post_send(b"answer")
        return Owner()

    listener = sides.server.link.listen(0, answer_at_once)
    over = Done()
    near = sides.client.link.connect(HOST, listener.port, Owner())
    receive = near.post_receive(answer, over)
    sends = [send_later(near, f"first{number}".encode(), over, channel=2) for number in range(3)]
    sides.until(lambda: len(far_receives) == 3)
    finish(sides, receive, *sends, *far_receives)
    assert answer == b"answer"
    assert got == [b"first0", b"first1", b"first2"]
    sides.until(lambda: len(over.operations) == 4)


def test_prepared_message_is_sent_as_it_is_at_the_time_and_received_into(sides: Sides) -> None:
    pair = sides.connect()
    source, target = bytearray(1000), bytearray(1000)
    message, into = sides.client.link.message(source), sides.server.link.message(target)
    for value in range(1, 20):
        source[:] = bytes([value]) * 1000
        finish(sides, pair.far.post_receive(into, ignore), pair.near.post_send(message))
        assert target == bytes([value]) * 1000
    with pytest.raises(ConfigError):
        pair.near.post_receive(sides.client.link.message(b"read-only"), ignore)


def test_buffers_of_every_kind_are_taken(sides: Sides) -> None:
    pair = sides.connect()
    region = mmap.mmap(-1, 8192)
    sources: list[Any] = [
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"xbytesx")[1:6],
        np.frombuffer(b"bytes", dtype=np.uint8),
        memoryview(region)[100:105],
        np.arange(6, dtype=np.float32).reshape(2, 3),
    ]
    region[100:105] = b"bytes"
    targets: list[Any] = [
        bytearray(5),
        memoryview(bytearray(9))[2:7],
        np.zeros(5, dtype=np.uint8),
        memoryview(region)[4096:4101],
        bytearray(5),
        np.zeros((3, 2), dtype=np.float32),
    ]
    for source, target in zip(sources, targets, strict=True):
        finish(sides, pair.far.post_receive(target, ignore), pair.near.post_send(source))
        assert bytes(memoryview(target).cast("B")) == bytes(memoryview(source).cast("B"))
    del sources, targets, source, target
    region.close()  # nothing pins it any more


def test_unusable_buffers_are_refused_with_the_reason(sides: Sides) -> None:
    near = sides.connect().near
    uses: list[tuple[type[Exception], str, Callable[[], Operation]]] = [
        (ConfigError, "read-only", lambda: near.post_receive(b"read-only", ignore)),
        (ConfigError, "read-only", lambda: near.post_receive(memoryview(bytearray(10)).toreadonly(), ignore)),
        (ConfigError, "not C-contiguous", lambda: near.post_receive(np.zeros((4, 4))[:, 1], ignore)),
        (ConfigError, "not C-contiguous", lambda: near.post_send(np.zeros((4, 4))[:, 1])),
        (TypeError, "a bytes-like object is required", lambda: near.post_receive([1, 2, 3], ignore)),
        (TypeError, "a bytes-like object is required", lambda: near.post_send([1, 2, 3])),
        (TypeError, "a bytes-like object is required", lambda: near.post_send("text")),
    ]
    for error, reason, use in uses:
        with row(reason=reason), pytest.raises(error, match=reason):
            use()
    assert in_flight(sides.client.link) == 0


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_run_in_a_turn_alone_and_once(sides: Sides) -> None:
    pair = sides.connect()
    over = Done()
    closed: list[bool] = []
    for _ in range(3):
        send_later(pair.near, bytes(1 << 20), over)
        pair.far.post_receive(bytearray(1 << 20), over)
    assert over.operations == []
    sides.until(lambda: len(over.operations) == 6)
    pair.near.post_receive(bytearray(1), over)
    pair.near.close(closed.append)
    assert (len(over.operations), closed) == (6, [])
    sides.until(lambda: closed)
    assert over.outcomes()[6:] == ["closed"]
    for _ in range(20):
        sides.turn()
    assert (len(over.operations), closed) == (7, [True])


def test_callback_of_a_send_is_set_when_the_operation_is_there_already(sides: Sides) -> None:
    pair = sides.connect()
    over = Done()
    send = send_later(pair.near, bytes(1 << 20), over)
    pair.far.post_receive(bytearray(1 << 20), lambda _: None)
    sides.until(lambda: over.operations)
    assert over.operations == [send]


def test_callbacks_come_in_the_order_of_the_messages_of_their_channel(sides: Sides) -> None:
    pair = sides.connect()
    order: list[int] = []
    for number in range(200):
        pair.far.post_receive(bytearray(8), noting(order, number), channel=5)
    for _ in range(200):
        pair.near.post_send(bytes(8), channel=5)
    sides.until(lambda: len(order) == 200)
    assert order == list(range(200))


def test_every_call_is_allowed_inside_a_callback(sides: Sides) -> None:
    pair = sides.connect()
    got = bytearray(4)
    answers: list[bool] = []

    def answer(_operation: Operation) -> None:
        pair.far.post_send(b"pong")
        pair.far.post_receive(got, end)

    def end(_operation: Operation) -> None:
        other = sides.server.link.listen(0, lambda _endpoint: None)
        other.close()
        sides.server.link.connect(HOST, sides.port, Owner()).close()
        pair.far.close(answers.append)

    pair.far.post_receive(got, answer)
    into = bytearray(4)
    receive = pair.near.post_receive(into, ignore)
    pair.near.post_send(b"ping")
    finish(sides, receive)
    assert into == b"pong"
    pair.near.post_send(b"last")
    sides.until(lambda: answers)
    assert answers == [True]
    sides.until(lambda: not pair.near.alive)


def test_callback_that_raises_ends_its_turn_and_the_next_one_goes_on(sides: Sides) -> None:
    pair = sides.connect()
    over = Done()

    def fail(_operation: Operation) -> None:
        raise RuntimeError("on purpose")

    pair.far.post_receive(bytearray(1), fail)
    for _ in range(3):
        pair.far.post_receive(bytearray(1), over)
    for _ in range(4):
        pair.near.post_send(b"x")
    with pytest.raises(RuntimeError, match="on purpose"):
        sides.until(lambda: len(over.operations) == 3)
    sides.until(lambda: len(over.operations) == 3)
    exchange(sides, pair.near, pair.far, b"goes on")


def test_a_message_that_was_there_is_called_back_before_those_that_came_later(sides: Sides) -> None:
    pair = sides.connect()
    order: list[int] = []
    for first in range(0, 40, 2):
        finish(sides, pair.near.post_send(b"x", channel=3))
        for _ in range(10):
            sides.turn()  # now it is there, most likely
        for number in (first, first + 1):
            pair.far.post_receive(bytearray(1), noting(order, number), channel=3)
        pair.near.post_send(b"y", channel=3)
        sides.until(partial(order.count, first + 1))
    assert order == list(range(40))


def test_what_ends_at_once_is_called_back_before_its_endpoint_is_said_to_be_closed(sides: Sides) -> None:
    pair = sides.connect()
    heard: list[object] = []

    def receive_and_close(_operation: Operation) -> None:
        pair.near.post_receive(bytearray(1), lambda _: heard.append("received"))
        pair.near.close(heard.append)

    pair.near.post_receive(bytearray(1), receive_and_close)
    for _ in range(2):
        pair.far.post_send(b"x")
    sides.until(lambda: True in heard)
    assert heard == ["received", True]


def test_a_loss_is_said_however_busy_other_connections_are(sides: Sides) -> None:
    pump, lost = sides.connect(), sides.connect()

    def send_on(_operation: Operation) -> None:
        if lost.near_owner.error is None:
            pump.far.post_send(b"x")
            pump.near.post_receive(bytearray(1), send_on)

    for _ in range(50):
        pump.far.post_send(b"x")
        pump.near.post_receive(bytearray(1), send_on)
    lost.far.close()
    sides.until(lambda: lost.near_owner.error)


def test_a_callback_that_raises_keeps_no_loss_and_no_end_from_being_said(sides: Sides) -> None:
    def fail(_operation: Operation) -> None:
        raise RuntimeError("on purpose")

    def lose(kind: str) -> None:
        pair = sides.connect()
        over, closed = Done(), list[bool]()

        if kind == "send":
            send_later(pair.near, bytes(1 << 24), fail)
        elif kind == "receive":
            pair.near.post_receive(bytearray(1), fail, channel=1)
        for _ in range(3):
            pair.near.post_receive(bytearray(1), over, channel=1)
        pair.far.close()
        if kind == "deferred":
            sides.client.submit(partial(send_later, pair.near, bytes(1 << 24), fail))
        for _ in range(3):
            with suppress(RuntimeError):
                sides.until(lambda: pair.near_owner.error and len(over.operations) == 3)
        assert (len(over.operations), pair.near_owner.error is None) == (3, False)
        pair.near.close(closed.append)
        sides.until(lambda: closed)

    for kind in ("send", "receive", "deferred"):
        with row(kind=kind):
            lose(kind)


def test_all_that_had_arrived_is_called_back_before_the_loss_though_it_be_more_than_a_turn_takes(sides: Sides) -> None:
    count = 300
    busy, pair = sides.connect(), sides.connect()
    came: list[bool] = []  # of each message that arrived whole: before the loss was said

    def note(operation: Operation) -> None:
        if operation.error is None:
            came.append(pair.near_owner.error is None)

    def pump(_operation: Operation) -> None:
        if pair.near_owner.error is None:
            busy.near.post_receive(bytearray(8), pump)
            busy.far.post_send(bytes(8))

    receives = [pair.near.post_receive(bytearray(8), note) for _ in range(count)]
    for _ in range(count):
        pair.far.post_send(bytes(8))
    pair.far.close()
    busy.near.post_receive(bytearray(8), pump)
    busy.far.post_send(bytes(8))
    sides.until(lambda: pair.near_owner.error and all(receive.completed for receive in receives))
    assert came
    assert all(came)


def test_owner_that_fails_costs_only_its_own_connection(sides: Sides) -> None:
    def refuse(_endpoint: Endpoint) -> None:
        raise RuntimeError("no thanks")

    first = sides.connect()
    other = sides.server.link.listen(0, refuse)
    owner = Owner()
    near = sides.client.link.connect(HOST, other.port, owner)
    with pytest.raises(RuntimeError, match="no thanks"):
        sides.until(lambda: owner.error)
    sides.until(lambda: owner.error, "lost")
    near.close()
    exchange(sides, first.near, first.far, b"x")


def test_refused_connection_is_lost_to_the_one_who_connects(sides: Sides) -> None:
    seen: list[Endpoint] = []
    listener = sides.server.link.listen(0, seen.append)  # returns None
    owner = Owner()
    near = sides.client.link.connect(HOST, listener.port, owner)
    receive = near.post_receive(bytearray(1), ignore)
    sides.until(lambda: owner.error and receive.completed)
    assert isinstance(owner.error, PeerLostError)
    assert (near.alive, seen[0].alive) == (False, False)
    near.close()
    sides.until(lambda: endpoints_open(sides.server.link) == 0)


# --- closing ----------------------------------------------------------------------------------------------------------


def close(sides: Sides, endpoint: Endpoint) -> bool:
    """The endpoint is closed; whether it was clean."""
    clean: list[bool] = []
    endpoint.close(clean.append)
    sides.until(lambda: clean, "closed")
    return clean[0]


@pytest.mark.parametrize("nbytes", [100, 200_000, 8 << 20])
def test_buffer_is_untouched_after_close_even_by_a_late_sender(sides: Sides, nbytes: int) -> None:
    pair = sides.connect()
    buffer = bytearray(nbytes)
    receive = pair.far.post_receive(buffer, ignore)
    for _ in range(5):
        sides.turn()
    assert close(sides, pair.far)
    assert receive.completed
    buffer[:] = b"\xee" * nbytes
    with suppress(PeerLostError):  # it may have been seen already
        pair.near.post_send(b"\x11" * nbytes)
    sides.until(lambda: pair.near_owner.error)
    assert buffer == b"\xee" * nbytes


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
def test_buffer_is_untouched_after_close_in_the_middle_of_a_transfer(sides: Sides, turns: int) -> None:
    pair = sides.connect()
    buffer = bytearray(LARGE_BYTES)
    receive, send = pair.far.post_receive(buffer, ignore), pair.near.post_send(b"\x11" * LARGE_BYTES)
    for _ in range(turns):
        sides.turn()
    assert close(sides, pair.far)
    assert receive.completed
    was = bytes(buffer)
    sides.until(lambda: pair.near_owner.error and outcome(send) != "in flight")
    assert outcome(send) in {"ok", "reset", "cancelled"}
    assert buffer == was
    assert close(sides, pair.near)


def test_send_cut_off_by_close_releases_its_buffer(sides: Sides) -> None:
    pair = sides.connect()
    source = bytearray(LARGE_BYTES)
    send = pair.near.post_send(source)
    with pytest.raises(BufferError):
        source.extend(b"x")  # pinned while in flight
    assert close(sides, pair.near)
    assert send.completed
    source.extend(b"x")


def test_close_ends_what_is_in_flight_before_it_is_said_to_be_over(sides: Sides) -> None:
    pair = sides.connect()
    heard: list[str] = []
    for channel in range(5):
        pair.near.post_receive(bytearray(100), lambda operation: heard.append(outcome(operation)), channel=channel)
    send_later(pair.near, bytearray(LARGE_BYTES), lambda operation: heard.append(outcome(operation)), channel=1)
    pair.near.close(lambda clean: heard.append(f"clean={clean}"))
    sides.until(lambda: "clean=True" in heard)
    assert heard == ["closed"] * 6 + ["clean=True"]
    assert in_flight(sides.client.link) == 0
    assert not pair.near_owner.heard  # nothing is lost to the one who closes


def test_close_ends_sends_that_wait_for_the_connection(sides: Sides) -> None:
    port = sides.port
    over = Done()
    closed: list[bool] = []
    near = sides.client.link.connect(HOST, port, Owner())
    for _ in range(3):
        send_later(near, bytes(100_000), over)
    near.close(closed.append)
    sides.until(lambda: closed)
    assert (over.outcomes(), closed) == (["closed"] * 3, [True])
    assert in_flight(sides.client.link) == 0


def test_close_is_idempotent_and_says_so_to_every_caller(sides: Sides) -> None:
    near = sides.connect().near
    heard: list[tuple[int, bool]] = []

    def close_once(number: int) -> None:
        near.close(lambda clean: heard.append((number, clean)))

    for number in range(5):
        close_once(number)
    near.close()
    sides.until(lambda: len(heard) == 5)
    assert close(sides, near)
    assert heard == [(number, True) for number in range(5)]
    assert not near.alive


def test_closed_endpoint_refuses_operations(sides: Sides) -> None:
    near = sides.connect().near
    near.close()
    posts: list[Callable[[], Operation]] = [
        lambda: near.post_receive(bytearray(1), ignore),
        lambda: near.post_send(b"x"),
    ]
    for moment in ("closing", "closed"):
        for post in posts:
            with row(moment=moment), pytest.raises(PeerLostError) as caught:
                post()
            assert caught.value.facts["reason"] == "closed"
        close(sides, near)


def test_peers_close_ends_what_is_in_flight_and_is_said_once(sides: Sides) -> None:
    pair = sides.connect()
    over = Done()
    pair.far.post_receive(bytearray(100), over)
    send_later(pair.far, bytearray(LARGE_BYTES), over, channel=1)
    sides.turn()
    pair.near.close()
    sides.until(lambda: len(over.operations) == 2 and pair.far_owner.error)
    assert over.outcomes() == ["reset", "reset"]
    assert isinstance(pair.far_owner.error, PeerLostError)
    assert pair.far_owner.error.facts["reason"] == "reset"
    assert not pair.far.alive
    for _ in range(20):
        sides.turn()
    assert len(pair.far_owner.heard) == 1
    for _ in range(2):  # each time a copy: with the frames of one time, the stored error would keep the link
        with pytest.raises(PeerLostError) as caught:
            pair.far.post_receive(bytearray(1), ignore)
        assert caught.value.facts == pair.far_owner.error.facts
        assert caught.value is not pair.far_owner.error
    assert pair.far_owner.error.__traceback__ is None
    assert close(sides, pair.far)


def test_last_words_before_a_close_arrive_and_come_before_the_loss(sides: Sides) -> None:
    def hear_last_words(nbytes: int) -> None:
        pair = sides.connect()
        errors: list[TransportError | None] = []
        got = bytearray(nbytes)
        pair.near.post_receive(got, lambda _: errors.append(pair.near_owner.error))
        finish(sides, pair.far.post_send(pattern(nbytes, nbytes)))
        pair.far.close()
        sides.until(lambda: pair.near_owner.error)
        assert (errors, bytes(got)) == ([None], pattern(nbytes, nbytes))
        assert close(sides, pair.near)

    for nbytes in (64, 1024, 8000):
        with row(nbytes=nbytes):
            hear_last_words(nbytes)


def test_loss_that_nobody_was_looking_at_is_found_by_the_next_turns(sides: Sides) -> None:
    pair = sides.connect()
    pair.near.close()
    for _ in range(20):
        sides.client.poll()  # the other side alone
    sides.until(lambda: pair.far_owner.error)


def test_closed_listener_takes_no_further_connection(sides: Sides) -> None:
    pair = sides.connect()
    port = sides.port
    listener = sides.listen()
    listener.close()
    listener.close()
    owner = Owner()
    late = sides.client.link.connect(HOST, port, owner)
    for _ in range(2000):  # with UCX it may neither fail nor succeed
        sides.turn()
    assert not late.handle
    assert len(sides.accepted) == 1
    assert close(sides, late)
    exchange(sides, pair.near, pair.far, b"ok")


def test_closed_link_has_given_its_port_back_without_a_collector(sides: Sides) -> None:
    pair = sides.connect()
    port = sides.port
    pair.far.post_receive(bytearray(10), ignore)
    pair.near.post_send(bytearray(LARGE_BYTES))
    gc.disable()
    try:
        sides.server.close()
        again = sides.client.link.listen(port, sides.accept)
    finally:
        gc.enable()
    assert again.port == port


def test_port_is_free_again_once_listener_and_endpoints_are_closed(sides: Sides) -> None:
    pair = sides.connect()
    port = sides.port
    sides.listen().close()
    close(sides, pair.near)
    close(sides, pair.far)
    again = sides.server.link.listen(port, sides.accept)
    assert again.port == port


def test_closing_the_link_ends_everything_in_flight(sides: Sides) -> None:
    pairs = [sides.connect() for _ in range(4)]
    over = Done()
    for pair in pairs:
        pair.near.post_receive(bytearray(1000), over)
    for pair in pairs[:2]:
        send_later(pair.near, bytearray(LARGE_BYTES), over)
    for _ in range(3):
        sides.turn()
    link = sides.client.link
    sides.client.close()
    link.close()
    assert len(over.operations) == 6
    assert set(over.outcomes()) <= {"closed", "reset"}
    assert (in_flight(link), endpoints_open(link), link.leaked_buffers) == (0, 0, 0)
    sides.until(lambda: all(pair.far_owner.error for pair in pairs))


def test_owners_that_post_in_every_callback_need_not_know_of_the_link_s_close(sides: Sides) -> None:
    pairs = [sides.connect() for _ in range(3)]
    ended: list[str] = []

    def keep_going(endpoint: Endpoint, buffer: bytearray) -> None:
        def again(operation: Operation) -> None:
            if operation.error is None:
                endpoint.post_send(bytes(100))
                endpoint.post_receive(buffer, again)
            else:
                ended.append(outcome(operation))

        endpoint.post_receive(buffer, again)
        endpoint.post_send(bytes(100))

    for pair in pairs:
        for endpoint in (pair.near, pair.far):
            for _ in range(5):
                keep_going(endpoint, bytearray(100))
    for _ in range(30):
        sides.turn()
    sides.client.close()
    sides.until(lambda: len(ended) == 30)
    assert ended[:15] == ["closed"] * 15
    sides.until(lambda: all(pair.far_owner.error for pair in pairs))


def test_an_owner_that_posts_again_whenever_one_ends_holds_neither_a_loss_nor_a_close(sides: Sides) -> None:
    """Each end is called back in a turn; what is posted there ends in another one."""
    ends: list[str] = []

    def keep_going(endpoint: Endpoint) -> None:
        def again(operation: Operation) -> None:
            ends.append(outcome(operation))
            with suppress(TransportError):
                endpoint.post_receive(bytearray(8), again)

        endpoint.post_receive(bytearray(8), again)

    pair, other = sides.connect(), sides.connect()
    keep_going(pair.near)
    pair.far.close()
    sides.until(lambda: pair.near_owner.error, "the loss")
    assert set(ends) == {"reset"}
    keep_going(other.near)
    sides.client.close()
    assert ends[-1] == "closed"


def test_closed_link_refuses_everything(sides: Sides) -> None:
    pair = sides.connect()
    port, link = sides.port, sides.client.link
    link.close()
    uses: list[Callable[[], object]] = [
        lambda: link.connect(HOST, port, Owner()),
        lambda: link.listen(0, sides.accept),
        lambda: link.message(b""),
        link.progress,
        lambda: pair.near.post_send(b""),
    ]
    for use in uses:
        with pytest.raises(TransportError):
            use()
    pair.near.close()


# --- connecting -------------------------------------------------------------------------------------------------------


def test_connecting_to_nothing_ends_with_a_clear_error_or_the_caller_s_own_time(sides: Sides) -> None:
    sides.connect()
    for _ in range(5):
        owner, over = Owner(), Done()
        near = sides.client.link.connect(HOST, 1, owner)
        send_later(near, b"never", over)
        for _ in range(500):
            sides.turn()
        assert not near.handle
        if owner.error is not None:
            assert isinstance(owner.error, PeerLostError)
            assert owner.error.facts["reason"] in {"refused", "unreachable", "reset"}
            assert owner.error.facts["peer"] == f"{HOST}:1"
        assert close(sides, near)
        assert over.outcomes()[0] != "ok"
    assert endpoints_open(sides.client.link) == 1


def test_connections_that_are_given_up_at_once_leave_nothing(sides: Sides) -> None:
    sides.connect()
    owners = [Owner() for _ in range(10)]
    for turns, owner in enumerate(owners):
        near = sides.client.link.connect(HOST, sides.port, owner)
        for _ in range(turns % 3):
            sides.turn()
        near.close()
    sides.until(lambda: endpoints_open(sides.client.link) == 1)
    pair = sides.connect()
    exchange(sides, pair.near, pair.far, b"x")
    given_up = [(far, owner) for far, owner in sides.accepted if far not in {pair.far, sides.accepted[0][0]}]
    sides.until(lambda: all(owner.error for _, owner in given_up))
    for far, _ in given_up:
        far.close()
    sides.until(lambda: endpoints_open(sides.server.link) == 2)


def test_port_in_use_is_a_configuration_error_that_names_it(sides: Sides) -> None:
    port = sides.port
    for side in (sides.server, sides.client):
        with pytest.raises(ConfigError) as caught:
            side.link.listen(port, sides.accept)
        assert caught.value.facts["port"] == port


def test_each_end_names_its_peer(sides: Sides) -> None:
    pair = sides.connect()
    assert pair.near.peer == f"{HOST}:{sides.port}"
    assert pair.far.peer


def test_transports_in_use_are_named(sides: Sides) -> None:
    sides.connect()
    names = sides.client.link.transports()
    expected = {"memory": "memory", "ucx-tcp": "tcp", "ucx-shm": "sysv"}[sides.kind]
    assert names[0] in {expected, "unknown", "posix"}


# --- the whole --------------------------------------------------------------------------------------------------------


def test_another_thread_may_take_over(sides: Sides) -> None:
    pair = sides.connect()
    for _ in range(3):
        exchange(sides, pair.near, pair.far, b"from here")
        with ThreadPoolExecutor(1) as another:
            another.submit(exchange, sides, pair.near, pair.far, b"from there").result()


def test_forked_child_is_refused_and_costs_the_parent_nothing(sides: Sides) -> None:
    pair = sides.connect()
    pair.far.post_receive(bytearray(100), ignore)
    uses: list[Callable[[], object]] = [
        lambda: pair.near.post_send(b"x"),
        lambda: pair.far.post_receive(bytearray(1), ignore, channel=1),
        sides.client.poll,
        lambda: sides.client.link.connect(HOST, 1, Owner()),
        lambda: sides.client.submit(lambda: None),
    ]
    child = os.fork()
    if child == 0:
        os._exit(sum(1 << number for number, use in enumerate(uses) if not _is_refused_for_the_fork(use)))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    exchange(sides, pair.near, pair.far, pattern(100_000, 1), channel=1)


def _is_refused_for_the_fork(use: Callable[[], object]) -> bool:
    try:
        use()
    except ConfigError as exc:
        return "fork" in str(exc)
    return False


def test_messages_that_are_never_received_do_not_outlive_their_endpoint(sides: Sides) -> None:
    pair = sides.connect()
    link = sides.server.link
    for channel in range(20):
        pair.near.post_send(bytes(1000), channel=channel % 3)
    finish(sides, pair.far.post_receive(bytearray(1000), ignore))
    if isinstance(link, UCXXLink):
        tag, mask = link.binding.lib.UCXXTag(0), link.binding.lib.UCXXTagMask(0)
        worker = link.worker
        sides.until(lambda: worker.tag_probe(tag, mask).matched)
        close(sides, pair.far)
        assert not worker.tag_probe(tag, mask).matched
    else:
        close(sides, pair.far)
    assert 0 < link.unexpected_messages < 20


def test_statistics_count_exactly(sides: Sides) -> None:
    pair = sides.connect()
    finish(sides, pair.far.post_receive(bytearray(1000), ignore), pair.near.post_send(bytes(600)))
    open_receive = pair.far.post_receive(bytearray(10), ignore)
    client, server = sides.client.link, sides.server.link
    assert (endpoints_open(client), in_flight(client)) == (1, 0)
    assert (endpoints_open(server), in_flight(server)) == (1, 1)
    pair.near.close()
    sides.until(lambda: open_receive.completed and pair.far_owner.error)
    assert outcome(open_receive) == "reset"
    assert (in_flight(server), server.leaked_buffers) == (0, 0)


def test_sleep_ends_when_a_message_comes(sides: Sides) -> None:
    pair = sides.connect()
    stop = threading.Event()
    got = bytearray(8)

    def serve() -> None:
        def again(operation: Operation) -> None:
            if operation.error is None:
                pair.far.post_send(bytes(got), channel=1)
                pair.far.post_receive(got, again)

        pair.far.post_receive(got, again)
        while not stop.is_set():
            sides.server.run_once(sides.server.now() + 60)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for number in range(300):
            answer, over = bytearray(8), Done()
            pair.near.post_receive(answer, over, channel=1)
            pair.near.post_send(number.to_bytes(8, "little"))
            end = sides.client.now() + 20
            while not over.operations:
                assert sides.client.now() < end, number
                sides.client.run_once(end)
            assert answer == number.to_bytes(8, "little")
            if number % 10 == 0:
                wait_until(lambda: sides.server.asleep, 20, what="the other side sleeps")
    finally:
        stop.set()
        sides.server.submit(lambda: None)
        thread.join()


def pair_is_quiet(pair: Pair) -> bool:
    """Neither end has lost the other."""
    return not (pair.near_owner.heard or pair.far_owner.heard)


def test_connections_of_one_side_do_not_suffer_from_the_loss_of_one(sides: Sides) -> None:
    pairs = [sides.connect() for _ in range(6)]
    receives = [pair.far.post_receive(bytearray(4), ignore) for pair in pairs]
    pairs[2].near.close()
    sides.until(lambda: pairs[2].far_owner.error and receives[2].completed)
    for number, pair in enumerate(pairs):
        if number != 2:
            finish(sides, pair.near.post_send(b"fine"))
    finish(sides, *(receive for number, receive in enumerate(receives) if number != 2))
    assert all(pair_is_quiet(pair) for number, pair in enumerate(pairs) if number != 2)
    assert close(sides, pairs[2].far)
