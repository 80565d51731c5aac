"""The process that keeps a worker's lease: `python -m ucxx_transport.membership.keeper_child`.

It renews while the worker can run, whatever the worker's interpreter is busy with, and never a moment longer:

| the worker           | its lease                                  |
|----------------------|--------------------------------------------|
| runs, however busy   | is renewed every `interval_s`              |
| is stopped (SIGSTOP) | is not renewed: it does not answer anybody |
| is dead              | is ended at once, and this process with it |
| says `end`           | is left to it                              |
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Final

from ucxx_transport.companion import DYING_S, LOOK_S, WorkerEnd
from ucxx_transport.errors import LeaseLostError, StoreResetError, TransportError
from ucxx_transport.logs import log_to_stderr
from ucxx_transport.membership.keeper import keep_twice
from ucxx_transport.membership.keeper_protocol import KeeperOrder, KeeperReport
from ucxx_transport.membership.store import Store
from ucxx_transport.membership.store_url import open_store

# After a failure the store is asked again this soon, so that a short outage costs no lease.
_RETRY_S: Final = 0.25


class _Keeper:
    """Renews one lease at a time.

    Args:
        store: where it is. interval_s: how often.
    """

    def __init__(self, store: Store, interval_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._said = ""
        self.lease_id: int | None = None
        self.due_s = 0.0

    def take(self, lease_id: int | None) -> None:
        """Keep another lease, or none."""
        self.lease_id = lease_id
        self.due_s = 0.0
        self._said = ""

    def renew(self) -> None:
        """Renew once, and say what came of it if that is news."""
        lease_id = self.lease_id
        self.due_s = time.monotonic() + self._interval_s
        if lease_id is None:
            return
        try:
            # a call that hangs must leave time for another before the lease is over
            keep_twice(self._store, lease_id, timeout_s=self._interval_s)
        except (LeaseLostError, StoreResetError) as error:
            self.lease_id = None
            self._say(lease_id, "lost", str(error))
        except TransportError as error:
            self.due_s = time.monotonic() + min(_RETRY_S, self._interval_s)
            self._say(lease_id, "unavailable", str(error))
        else:
            self._say(lease_id, "kept")

    def end_lease(self) -> None:
        """The worker is dead: say so at once."""
        if self.lease_id is not None:
            with suppress(TransportError):  # then it runs out by itself
                self._store.revoke(self.lease_id)

    def _say(self, lease_id: int, word: str, reason: str = "") -> None:
        if word == self._said:
            return
        self._said = word
        with suppress(OSError):  # the worker died meanwhile: what follows notices
            os.write(1, KeeperReport(lease_id=lease_id, word=word, reason=reason).to_line())


def _serve(worker: WorkerEnd, keeper: _Keeper) -> bool:
    """Keep what the worker says until it ends; returns whether it ended without a word."""
    watched = select.poll()
    watched.register(0, select.POLLIN | select.POLLHUP)
    if worker.pidfd >= 0:
        watched.register(worker.pidfd, select.POLLIN)
    heard = b""
    while True:
        left_s = max(0.0, keeper.due_s - time.monotonic()) if keeper.lease_id is not None else LOOK_S
        seen = {descriptor for descriptor, _ in watched.poll(min(left_s, LOOK_S) * 1000)}
        if 0 in seen:
            part = os.read(0, 65536)
            if not part:
                return True
            *lines, heard = (heard + part).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if said.get("end"):
                    return False
                keeper.take(said["lease_id"])
        elif worker.is_gone:  # and all that it had said was heard
            return True
        elif keeper.lease_id is not None and time.monotonic() >= keeper.due_s:
            if worker.is_stopped:
                keeper.due_s = time.monotonic() + _RETRY_S
            else:
                keeper.renew()


def main() -> int:
    """Keep leases until told to end or orphaned; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what asks a whole job to end is the worker's affair
    log_to_stderr("lease keeper")
    with os.fdopen(0, "rb", buffering=0, closefd=False) as pipe:
        first = pipe.readline()
    if not first:
        return 1  # the worker died before its order
    order = KeeperOrder.from_line(first)
    worker = WorkerEnd(order.worker_pid)
    with open_store(order.url, order.config) as store:
        keeper = _Keeper(store, order.interval_s)
        if _serve(worker, keeper) and worker.wait_until_gone(DYING_S):
            keeper.end_lease()
    return 0


if __name__ == "__main__":
    sys.exit(main())
