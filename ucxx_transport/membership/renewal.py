"""Renewal of leases: by their owner, and by a sidecar too, which no blocked interpreter starves.

Either alone is enough, so neither has to know how the other fares.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ucxx_transport.config import PublisherConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.membership.store import Store
from ucxx_transport.sidecar.launch import Order, Sidecar

_log = get_logger(__name__)

CLOSE_S: Final = 0.5
"""A sidecar that only renews is killed after that: it may be in a call of a store that does not answer."""

RETRIES_AN_INTERVAL: Final = 4
"""After a renewal that failed the next comes this much sooner: a lease of three intervals is then tried eight times."""


def renew(store: Store, lease_id: int, *, timeout_s: float) -> float:
    """Renew a lease; returns the seconds it now has. A LeaseLostError: the store says twice that there is none."""
    try:
        return store.keep_alive(lease_id, timeout_s=timeout_s)
    except LeaseLostError:
        return store.keep_alive(lease_id, timeout_s=timeout_s)


@dataclass(eq=False)
class LeaseRenewer:
    """Renews one lease in a daemon thread, until it is stopped, or the store says that the lease has ended.

    A store that does not answer is asked again, for as long as it takes; a call has a third of the lease's time. All
    callables are called in that thread: `store` opens it, `is_held` is asked whether to leave a renewal out.
    """

    store: Callable[[], Store]
    lease_id: int
    interval_s: float
    on_renewed: Callable[[], object] = lambda: None
    on_lost: Callable[[], object] = lambda: None
    is_held: Callable[[], bool] = lambda: False
    _stopping: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Begin, with a renewal; returns at once."""
        self._thread = start_thread(self._run, name="ucxx-lease")

    def stop(self, wait_s: float) -> None:
        """End; the lease stays as it is. Waits for a call under way, at most so long. Idempotent."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(wait_s)

    def _run(self) -> None:
        pause_s, failures, timeout_s = 0.0, 0, self.interval_s
        while not self._stopping.wait(pause_s):
            pause_s = self.interval_s / RETRIES_AN_INTERVAL
            if self.is_held():
                continue
            try:
                timeout_s = renew(self.store(), self.lease_id, timeout_s=timeout_s) / 3
            except LeaseLostError as error:
                if not self._stopping.is_set():
                    _log.warning("lease_lost", lease=self.lease_id, reason=str(error))
                    self.on_lost()
                return
            except Exception as error:  # noqa: BLE001 - the edge of a thread: whatever it was, the lease is to live
                failures += 1
                if failures == 1:
                    _log.warning("lease_not_renewed", lease=self.lease_id, reason=f"{type(error).__name__}: {error}")
            else:
                if failures:
                    _log.info("lease_renewed_again", lease=self.lease_id, attempts=failures)
                pause_s, failures = self.interval_s, 0
                self.on_renewed()


class Keeper:
    """The process that renews its owner's lease too, in the store as that was opened; none with `keeper="thread"`."""

    def __init__(self, store: Store, config: PublisherConfig) -> None:
        # a password travels to it, since it opens the URL as the store was opened, and nowhere else
        self._order: Order = {"url": store.url, "config": store.config, "interval_s": config.interval_s}
        self._is_wanted = config.keeper == "process"
        self._lease_id: int | None = None
        self._own = self.host = Sidecar("ucxx lease", pauses_s=(1.0, 60.0))

    @property
    def keeps(self) -> bool:
        """Whether it has renewed the lease."""
        return self._lease_id in self.host.kept

    def start(self, host: Sidecar | None = None) -> None:
        """Have `host` renew beside its other work; None: a process of its own, which takes a moment to be there."""
        if self._is_wanted and host is not None:
            self.host = host
        elif self._is_wanted:
            self._own.start()

    def keep(self, lease_id: int | None) -> None:
        """Renew this lease from now on, or none."""
        last, self._lease_id = self._lease_id, lease_id
        if last is not None:
            self.host.keep(last, None)
        if lease_id is not None:
            self.host.keep(lease_id, self._order)

    def close(self) -> None:
        """Renew nothing any more; the lease stays as it is. Bounded; idempotent."""
        self.keep(None)
        self._own.stop(time.monotonic() + CLOSE_S)
