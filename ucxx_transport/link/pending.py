"""Operations in flight over UCX."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from ucxx_transport.errors import PeerLostError, TransportError
from ucxx_transport.link.base import Counters
from ucxx_transport.link.binding import Binding, UcxEndpoint, UcxRequest, UcxWorker
from ucxx_transport.link.driver import ProgressDriver
from ucxx_transport.link.translate import Translator, raisable


class OperationOwner(Protocol):
    """The endpoint, as its operations see it."""

    driver: ProgressDriver
    counters: Counters
    in_flight: set[Operation]
    ucx_error: type[Exception]

    def explain(self, exc: Exception) -> TransportError:
        """The error to raise for one of UCX's."""


class LinkContext(Protocol):
    """The link, as its endpoints and listeners see it. See `UCXXLink`."""

    binding: Binding
    worker: UcxWorker
    driver: ProgressDriver
    translator: Translator
    counters: Counters

    def check_thread(self) -> None: ...
    def check_owner(self) -> None: ...
    def adopt(self, endpoint: Any, /) -> None: ...
    def forget(self, endpoint: Any, /) -> None: ...
    def forget_listener(self, listener: Any, /) -> None: ...
    def keep(self, task: asyncio.Task[Any], /) -> None: ...
    def leak(self, operation: Operation, ucx: UcxEndpoint | None, /) -> None: ...


class Operation:
    """Something that UCX was asked to do for an endpoint.

    Args:
        owner: whose `in_flight` it is in from `start()` until it ends.
        view: the buffer, pinned until UCX is done with it: dropping it sooner is a crash.
    """

    __slots__ = ("_owner", "_waiters", "done", "error", "given_up", "nbytes", "request", "view")

    def __init__(self, owner: OperationOwner, view: memoryview | None = None) -> None:
        self._owner = owner
        self._waiters: list[asyncio.Future[None]] | None = None
        self.done = False
        self.given_up = False
        self.error: TransportError | None = None
        self.nbytes = 0 if view is None else view.nbytes
        self.request: UcxRequest | None = None
        self.view = view

    def start(self, request: UcxRequest) -> None:
        """UCX has been asked; the operation ends now, or later in a turn of the driver."""
        self.request = request
        if request.completed:
            self.poll()
        else:
            self._owner.in_flight.add(self)
            self._owner.driver.watch(self)

    def poll(self) -> bool:
        """Ask UCX; ends the operation if it is over. Returns whether it is."""
        request = self.request
        if request is None or not request.completed:
            return self.done
        self.request = None
        self.error = None
        try:
            request.check_error()
        except self._owner.ucx_error as exc:
            self.error = self._owner.explain(exc)
            self.error.__cause__ = exc.with_traceback(None)
        self._end()
        return True

    def fail(self, error: TransportError) -> None:
        """End an operation that UCX was never given."""
        if not self.done and self.request is None:
            self.error = error
            self._end()

    def give_up(self, error: TransportError) -> None:
        """Wake the waiters with an error. UCX still holds the buffer: the operation has not ended."""
        if not self.done and not self.given_up:
            self.given_up = True
            self.error = error
            self._wake()

    def waiter(self) -> asyncio.Future[None]:
        """A future that is resolved when the operation ends, well or badly, or is given up."""
        waiter = self._owner.driver.loop.create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        return waiter

    def ended(self) -> None:
        """What a kind of operation does when it is over. Must not raise."""

    def _end(self) -> None:
        self.done = True
        self.ended()
        view, self.view = self.view, None
        if view is not None:
            view.release()
        self._owner.in_flight.discard(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for waiter in waiters:
                if not waiter.done() and not waiter.get_loop().is_closed():
                    waiter.set_result(None)


class UCXXPending(Operation):
    """One send or receive. See `base.Pending`."""

    __slots__ = ("sending",)

    def __init__(self, owner: OperationOwner, view: memoryview, *, sending: bool) -> None:
        super().__init__(owner, view)
        self.sending = sending

    @property
    def completed(self) -> bool:
        return self.done or self.poll()

    async def wait(self, until_s: float | None = None) -> None:
        driver = self._owner.driver
        if not self.done and not self.given_up and not driver.spin_for(self):
            driver.kick()
            async with asyncio.timeout_at(until_s):
                await self.waiter()
        elif driver.turn_is_over():
            await driver.take_turn()  # inline completions must not keep the other tasks out
        if self.error is not None:
            raise raisable(self.error)

    def ended(self) -> None:
        """Count it."""
        counters, error = self._owner.counters, self.error
        counters.ended += 1
        if error is not None:
            counters.failed += 1
            if isinstance(error, PeerLostError) and error.facts["reason"] == "truncated":
                counters.truncated += 1
        elif self.sending:
            counters.sent_bytes += self.nbytes
        else:
            counters.posted_receive_bytes += self.nbytes
