"""An attempt: one payload asked for over one connection; and the message that several answers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.connection import Connection
    from ucxx_transport.client.jobs import Read
    from ucxx_transport.link.base import Operation
    from ucxx_transport.wire.answers import Named


class Attempt:
    """One payload asked for over one connection.

    Attributes:
        read: who waits for it; None: the answer is not wanted any more, and ended as not delivered.
        ref: the payload.
        number: the session's.
        message: the buffer, or part of one, that its answer lies in.
        due_s: when it has taken too long.
        late: it has.
    """

    __slots__ = ("connection", "due_s", "late", "message", "number", "read", "ref")

    def __init__(  # noqa: PLR0917 - a keyword costs on this path
        self, connection: Connection, read: Read | None, ref: Named, number: int, message: Bytes, due_s: float
    ) -> None:
        self.connection = connection
        self.read = read
        self.ref = ref
        self.number = number
        self.message = message
        self.due_s = due_s
        self.late = False

    def arrived(self, operation: Operation) -> None:
        """Its receive is over."""
        connection = self.connection
        if operation.error is None:
            connection.proved = True
            if not connection.take(self):
                connection.after_answers()
        else:
            connection.receive_failed(operation.error)


class SharedMessage:
    """One message that brings the answers to several attempts."""

    __slots__ = ("attempts",)

    def __init__(self, attempts: list[Attempt]) -> None:
        self.attempts = attempts

    def arrived(self, operation: Operation) -> None:
        """The receive is over."""
        connection = self.attempts[0].connection
        if operation.error is not None:
            connection.receive_failed(operation.error)
            return
        connection.proved = True
        for attempt in self.attempts:
            if connection.closed:
                return  # the answer before was not as the protocol has it
            connection.take(attempt)
        connection.after_answers()
