"""LeaseRenewer: what a rank's place in its group lives by."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from ucxx_transport.errors import LeaseLostError, RegistryError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keeper import keep_twice
from ucxx_transport.membership.keeper_process import KeeperProcess
from ucxx_transport.membership.store import Store

__all__ = ["LeaseRenewer"]

_log = get_logger(__name__)

_RETRIES_AN_INTERVAL: Final = 4
"""After a renewal that failed the next comes this much sooner: a lease of three intervals is then tried eight times."""


class LeaseRenewer:
    """Renews one lease until it is stopped, or the store says that the lease has ended. A daemon thread.

    Args:
        store: where the lease is.
        interval_s: between two renewals.
        on_lost: called once, in the renewer's thread, when the store answers twice that the lease has ended. A store
            that does not answer says nothing: it is asked again, for as long as it takes.
        keeper: renews in its stead from when it can, and is closed at the end; None: an interpreter that a long call
            blocks (the GIL held for longer than a lease lives) starves the lease.
    """

    def __init__(
        self, store: Store, interval_s: float, on_lost: Callable[[], None], *, keeper: KeeperProcess | None = None
    ) -> None:
        self._store = store
        self._interval_s = interval_s
        self._on_lost = on_lost
        self._keeper = keeper
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.renewals = 0
        self.failures = 0

    def start(self, lease_id: int) -> None:
        """Begin; returns at once."""
        assert self._thread is None, "a renewer renews one lease"
        self._thread = threading.Thread(target=self._run, args=(lease_id,), name="ucxx-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, bounded; the lease stays as it is. Idempotent, and callable from `on_lost`."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * self._interval_s)
            if self._thread.is_alive():
                _log.warning("lease renewer did not stop in time")

    def _run(self, lease_id: int) -> None:
        keeper = self._keeper
        if keeper is None:
            self._renew_on(lease_id)
            return
        try:
            keeper.keep(lease_id)
            self._renew_on(lease_id)
        finally:
            keeper.close()

    def _renew(self, lease_id: int) -> None:
        if self._keeper is None or not self._keeper.keeps(lease_id):
            keep_twice(self._store, lease_id, timeout_s=self._interval_s)

    def _renew_on(self, lease_id: int) -> None:
        pause_s = self._interval_s
        unanswered = 0
        while not self._stopping.wait(pause_s):
            try:
                self._renew(lease_id)
            except LeaseLostError as error:
                self._lost(lease_id, error)
                return
            except RegistryError as error:
                if not unanswered:
                    _log.warning("lease not renewed; trying on", lease=lease_id, reason=str(error))
                unanswered += 1
                self.failures += 1
                pause_s = self._interval_s / _RETRIES_AN_INTERVAL
            except Exception:  # noqa: BLE001 - the edge of a thread: whatever it was, the lease is to live
                _log.exception("lease not renewed", lease=lease_id)
                pause_s = self._interval_s / _RETRIES_AN_INTERVAL
            else:
                if unanswered:
                    _log.info("lease renewed again", lease=lease_id, attempts=unanswered)
                unanswered = 0
                self.renewals += 1
                pause_s = self._interval_s

    def _lost(self, lease_id: int, error: LeaseLostError) -> None:
        if self._stopping.is_set():
            return
        _log.warning("lease lost", lease=lease_id, reason=str(error))
        try:
            self._on_lost()
        except Exception:  # noqa: BLE001 - the edge of a thread
            _log.exception("what is told of a lost lease failed")
