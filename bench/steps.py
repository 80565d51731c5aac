"""What does one read over UCX consist of? Each step of both ends, over TCP and over shared-memory lanes.

Both ends note the time at their own steps, on the clock that processes of a host share; the port is a thread of its
worker, which waits meanwhile. Steps are in their order, and together the read, but for the last three: they are done
while something else goes on, as the second column says. A note takes 0.1 to 0.2 µs.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from statistics import median
from typing import Any, Final

from bench.core.cpu_time import ForeignLoad
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import DEADLINE_S, RingSource
from bench.core.rounds import Plan
from ucxx_transport import ClientConfig, SlotRef, SyncUCXXClient
from ucxx_transport.client.payload import Deduplicator
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.server.slots import Slots
from ucxx_transport.wire.client_side import ClientSession
from ucxx_transport.wire.server_side import ServerSession

__all__ = ["STEPS", "measure"]

SIZE_BYTES: Final = 4096
WAYS: Final = {"shared-memory lanes": True, "over TCP": False}

STEPS: Final[Mapping[str, tuple[str, str]]] = {
    "client: looks, makes the request, gives it to UCX": ("read", "sent"),
    "the request is under way, and noticed": ("sent", "heard"),
    "port: takes the frame to pieces": ("heard", "understood"),
    "port: acquires the slot": ("understood", "acquired"),
    "port: gives the answer to UCX": ("acquired", "answered"),
    "the answer is under way, and noticed": ("answered", "claimed"),
    "client: claims and counts the payload, makes its object": ("claimed", "concluded"),
    "client: says that it has it": ("concluded", "ended"),
    "client: returns": ("ended", "returned"),
    "the read": ("read", "returned"),
    "meanwhile, client: lends and posts a buffer": ("sent", "posted"),
    "meanwhile, port: posts the next receive": ("answered", "ready"),
    "afterwards, port: hears the end, frees the slot": ("end heard", "freed"),
}
"""Between which two notes."""


class _Notes:
    """Times of calls, by what was called."""

    def __init__(self) -> None:
        self.times: dict[str, array.array[int]] = {}

    def of(self, owner: type, name: str) -> None:
        """Note when each call of a method began and ended."""
        method: Callable[..., Any] = getattr(owner, name)
        times = self.times.setdefault(f"{owner.__name__}.{name}", array.array("q"))
        add, clock = times.append, time.monotonic_ns

        @wraps(method)
        def noted(*arguments: Any, **named: Any) -> Any:
            began_ns = clock()
            result = method(*arguments, **named)
            add(began_ns)
            add(clock())
            return result

        setattr(owner, name, noted)

    def taken(self) -> dict[str, bytes]:
        """All so far, which are forgotten."""
        said = {name: times.tobytes() for name, times in self.times.items()}
        for times in self.times.values():
            del times[:]
        return said


class NotingSource(RingSource):
    """A worker whose port notes its steps."""

    def __init__(self, server: Mapping[str, Any]) -> None:
        super().__init__(server)
        self._notes = notes = _Notes()
        notes.of(ServerSession, "receive")
        notes.of(Slots, "acquire")
        notes.of(Slots, "finish")
        notes.of(Endpoint, "post_send")
        notes.of(Endpoint, "post_receive")

    def notes(self) -> dict[str, bytes]:
        """Those so far."""
        return self._notes.taken()


class NotingClient:
    """A blocking client that notes its own.

    Args:
        shm_lanes: its setting.
    """

    def __init__(self, shm_lanes: bool) -> None:  # noqa: FBT001 - an argument of a process
        self._notes = notes = _Notes()
        notes.of(SyncUCXXClient, "read")
        notes.of(Deduplicator, "claim")
        notes.of(ClientSession, "conclude")
        notes.of(Endpoint, "post_send")
        notes.of(Endpoint, "post_receive")
        self._client = SyncUCXXClient(ClientConfig(local="off", deadline_s=DEADLINE_S, shm_lanes=shm_lanes))

    def read(self, references: Sequence[bytes]) -> dict[str, bytes]:
        """Read them one by one; the notes."""
        for ref in [SlotRef.from_bytes(reference) for reference in references]:
            self._client.read(ref).release()
        return self._notes.taken()

    def close(self) -> None:
        """Close the client."""
        self._client.close()


def measure(question: str, plan: Plan) -> list[Row]:
    """Both ways: the median of each step."""
    rows: list[Row] = []
    with Lineup() as lineup:
        for way, shm_lanes in WAYS.items():
            server = {"mode": "thread", "ports": 1, "shm_lanes": shm_lanes}
            source = lineup.source(f"source, {way}", NotingSource, server)
            client = lineup.source(f"client, {way}", NotingClient, shm_lanes)
            source.call("open", size_bytes=SIZE_BYTES, slots=plan.slots(SIZE_BYTES))
            figures: dict[str, list[float]] = {step: [] for step in STEPS}
            foreign_cores: list[float] = []
            for number in range(plan.rounds):
                taken: dict[str, list[float]] = {step: [] for step in STEPS}
                until_s = time.monotonic() + plan.turn_s
                foreign_load, warm = ForeignLoad(), False
                while not (warm and taken["the read"]) or time.monotonic() < until_s:
                    references = [reference for _, reference in source.call("fill")]
                    source.call("notes")  # of an end that came after the last were asked for
                    notes = client.call("read", references=references), source.call("notes")
                    if warm:  # the first connects
                        for step, values in _steps(*notes).items():
                            taken[step] += values
                    warm = True
                foreign_cores.append(foreign_load.cores())
                for step, values in taken.items():
                    figures[step].append(median(values))
                plan.on_turn(f"{question}: {way}, round {number + 1} of {plan.rounds}")
            rows += [
                Row(question=question, case=way, subject=step, figures={"us": us, "foreign_cores": foreign_cores})
                for step, us in figures.items()
            ]
    return rows


def _steps(client: Mapping[str, bytes], server: Mapping[str, bytes]) -> dict[str, list[float]]:
    """µs of each step, a read one after the other; those left out whose end the port had not heard yet."""
    noted = {
        name: array.array("q", times)
        for name, times in {**client, **{f"port {k}": v for k, v in server.items()}}.items()
    }
    # Each call has noted its begin and its end; of frames there are two a read, the request and the end.
    times = {
        "read": noted["SyncUCXXClient.read"][0::2],
        "sent": noted["Endpoint.post_send"][1::4],
        "posted": noted["Endpoint.post_receive"][1::2],
        "heard": noted["port ServerSession.receive"][0::4],
        "understood": noted["port ServerSession.receive"][1::4],
        "acquired": noted["port Slots.acquire"][1::2],
        "answered": noted["port Endpoint.post_send"][1::2],
        "ready": noted["port Endpoint.post_receive"][1::4],
        "claimed": noted["Deduplicator.claim"][0::2],
        "concluded": noted["ClientSession.conclude"][0::2],
        "ended": noted["Endpoint.post_send"][3::4],
        "returned": noted["SyncUCXXClient.read"][1::2],
        "end heard": noted["port ServerSession.receive"][2::4],
        "freed": noted["port Slots.finish"][1::2],
    }
    return {
        step: [(end - begin) / 1e3 for begin, end in zip(times[first], times[last], strict=False)]
        for step, (first, last) in STEPS.items()
    }
