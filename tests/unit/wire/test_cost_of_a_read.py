"""What one read costs in this package's calls: it is the floor under every read over UCX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from tests.unit.wire.session_rig import Pair, payload, ref
from ucxx_transport.wire import codec
from ucxx_transport.wire.client_side import Asked, Attempt
from ucxx_transport.wire.frames import FRAME_BYTES

WIRE = codec.__file__.rpartition("/")[0]


def calls_of(work: Callable[[], object]) -> list[str]:
    """The functions of wire/ that `work` calls, in order."""
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(WIRE):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def test_one_read_and_its_end_cost_at_most_six_calls_at_the_client_and_five_at_the_server() -> None:
    pair, named = Pair().open(), ref()
    message = memoryview(payload(named))
    pair.deliver(named)
    pair.actions(pair.client.ends_frame())
    client: list[str] = []
    server: list[str] = []

    fetched: list[Asked] = []
    client += calls_of(lambda: fetched.append(pair.client.ask_one(named)))
    frame, number, _ = fetched[0]
    server += calls_of(lambda: pair.server.receive(frame.ljust(FRAME_BYTES, b"\0"), 1.0))
    attempt = pair.server.in_flight[number]
    server += calls_of(lambda: pair.server.sent(attempt, 1.0))
    client += calls_of(lambda: pair.client.judge(number, message))
    ends: list[bytes] = []
    client += calls_of(lambda: pair.client.finish(number, delivered=True))
    client += calls_of(lambda: ends.append(pair.client.ends_frame()))
    server += calls_of(lambda: pair.server.receive(ends[0].ljust(FRAME_BYTES, b"\0"), 1.0))

    assert attempt.delivered
    assert len(client) <= 6, client
    assert len(server) <= 5, server


def test_names_of_a_batch_add_one_call_each_at_the_server_and_none_at_the_client() -> None:
    pair, names = Pair().open(), [ref(slot) for slot in range(40)]
    attempts = [Attempt(name) for name in names]
    assert len(calls_of(lambda: pair.client.fetch(attempts))) == 2
    pair = Pair().open()
    fetch = pair.client.ask(names)
    calls = calls_of(lambda: pair.server.receive(fetch.frame.ljust(FRAME_BYTES, b"\0"), 1.0))
    assert len(calls) <= 4 + len(names), calls
