"""TAKE: clients of a port that name no payloads are given what is there, or wait for it.

```
 begin ──► offer ──payloads──► the offer, then each payload on a channel of its own
             │ ▲
        none │ │ 0.5 ms after the last look, ever later up to 5 ms; soon again once one of the clients was served
             ▼ │
           waiting ──its time is up──► EMPTY
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ucxx_transport.errors import ConfigError, DeadlineExceededError
from ucxx_transport.wire.actions import Take
from ucxx_transport.wire.frames import OfferedPayload, Status

if TYPE_CHECKING:
    from ucxx_transport.ring.reading import ReadLease
    from ucxx_transport.server.connection import Connection
    from ucxx_transport.server.port import Port

SOON_S: Final = 0.5e-3
LATER_S: Final = 5e-3
"""The first and the longest pause between two looks for a payload that a client waits for."""

NO_EPOCH: Final = "the worker has no epoch yet"


class Takes:
    """The TAKEs of a port's connections.

    Args:
        port: the port.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._waiting: list[tuple[Connection, Take]] = []
        self._pause_s = SOON_S

    def begin(self, connection: Connection, take: Take) -> None:
        """Answer it, now or later."""
        if self._answer(connection, take):
            return
        if not self._waiting:
            self._pause_s = SOON_S
            self._look_after(SOON_S)
        self._waiting.append((connection, take))

    def clear(self) -> None:
        """Forget those that wait."""
        self._waiting.clear()

    def _look_after(self, pause_s: float) -> None:
        reactor = self._port.reactor
        reactor.call_at(reactor.now() + pause_s, self._look)

    def _look(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection, take in waiting:
            try:
                if not self._answer(connection, take):
                    self._waiting.append((connection, take))
            except Exception as error:  # noqa: BLE001 - the edge of a callback
                connection.fail(error)
        if self._waiting:
            has_served = len(self._waiting) < len(waiting)
            self._pause_s = SOON_S if has_served else min(2 * self._pause_s, LATER_S)
            self._look_after(self._pause_s)

    def _answer(self, connection: Connection, take: Take) -> bool:
        """By payloads, or by nothing once its time has come. False: there is none, and it has time."""
        port, session = self._port, connection.session
        if not connection.is_serving:
            return True
        if port.awaited[0]:
            connection.reply(session.nothing(take, NO_EPOCH, Status.NOT_READY))
            return True
        max_payloads, max_bytes = session.take_room(take)
        leases: list[ReadLease] = []
        try:
            if max_payloads and port.locked_turn != port.reactor.turns:
                leases = port.ring.take(max_payloads, max_bytes=max_bytes, newest=take.newest, reader=session.reader)
        except DeadlineExceededError as error:
            port.note_lock(error)
        except ConfigError as error:  # the next one is larger than that
            if max_bytes == take.max_bytes:
                connection.reply(session.nothing(take, error.message))
                return True
        if leases:
            self._offer(connection, take, leases)
        elif port.now() < take.until_s:
            return False
        else:
            connection.reply(session.nothing(take))
        return True

    def _offer(self, connection: Connection, take: Take, leases: list[ReadLease]) -> None:
        offered = [
            OfferedPayload(
                lease.slot, lease.generation, lease.nbytes, lease.checksum, lease.commit_time_ns, lease.envelope
            )
            for lease in leases
        ]
        reply, attempts = connection.session.taken(take, offered, self._port.now())
        for attempt, lease in zip(attempts, leases, strict=True):
            attempt.lease = lease
        self._port.counters.add("takes", len(leases))
        connection.reply(reply)
        connection.serve(attempts)
