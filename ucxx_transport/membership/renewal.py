"""Renewal of leases: by a sidecar, whatever the interpreter is busy with; by a thread; and once by a call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.store import Store
from ucxx_transport.membership.store_url import open_store
from ucxx_transport.sidecar.launch import Order, Sidecar

_log = get_logger(__name__)

CLOSE_S: Final = 0.5
"""A sidecar that only renews is killed after that: it may be in a call of a store that does not answer."""
FRESH: Final = 1.25
"""A renewal counts for so many intervals: the next one that its owner makes is in time for a lease of three."""
_NEVER_S: Final = -float("inf")
_RETRIES_AN_INTERVAL: Final = 4
"""After a renewal that failed the next comes this much sooner: a lease of three intervals is then tried eight times."""


class Renewal:
    """Renews one lease at a time: a process does, that no blocked interpreter starves, or else its owner's calls.

    Those do until the sidecar is up, and while that is stopped or dead, or cannot reach the store. Thread-safe; close
    it.

    The sidecar opens the store's URL with `store_config`: a password in that travels in its pipe and nowhere else.
    `on_news` is called in the sidecar's thread when `keeps` may answer differently; `restarts` counts how often the
    sidecar died, or could not be started.
    """

    def __init__(
        self,
        store: Store,
        store_config: StoreConfig,
        config: PublisherConfig,
        *,
        on_news: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = {spec.name: getattr(store_config, spec.name) for spec in fields(store_config)}
        settings["password"] = store_config.password_text
        self._store = store
        self._opening = {"url": store.url, "config": settings, "interval_s": config.interval_s}
        self._by_process = config.keeper == "process"
        self._fresh_s = FRESH * config.interval_s
        self._on_news, self._clock = on_news, clock
        self._lock = threading.RLock()
        self._lease_id: int | None = None
        self._renewed_s, self._lost = _NEVER_S, ""
        self._host: Sidecar | None = None
        self._owns_host = False
        self.restarts = 0

    @property
    def order(self) -> Order:
        """What a sidecar is sent."""
        return {"lease_id": self._lease_id, "store": self._opening}

    @property
    def is_kept(self) -> bool:
        """Whether the lease has just been renewed by the sidecar."""
        with self._lock:
            return not self._lost and self._clock() - self._renewed_s < self._fresh_s

    @property
    def pid(self) -> int | None:
        """Of the sidecar that is up, None while there is none."""
        return None if self._host is None else self._host.status.pid

    def start(self, host: Sidecar | None = None) -> None:
        """Find the process, before there is a lease: an interpreter takes a moment to be there.

        `host` renews the lease beside its other work; where there is none, or it has a lease to renew already, one is
        started that does nothing else.
        """
        if not self._by_process:
            return
        if host is None or not host.keep(self.hear, self.order):
            host, self._owns_host = Sidecar("ucxx lease", pauses_s=(1.0, 60.0)), True
            host.keep(self.hear, self.order)
            host.start()
        self._host = host

    def keep(self, lease_id: int | None) -> None:
        """Renew this lease from now on, or none."""
        with self._lock:
            self._lease_id, self._lost, self._renewed_s = lease_id, "", _NEVER_S
        if self._host is not None:
            self._host.keep(self.hear, self.order)

    def keeps(self, lease_id: int) -> bool:
        """Whether the sidecar has just renewed this lease, else its owner must; a LeaseLostError when it has ended."""
        with self._lock:
            if lease_id != self._lease_id:
                return False
            if self._lost:
                raise LeaseLostError(self._lost, lease_id=lease_id)
            return self.is_kept

    def renew(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """Renew this lease now, unless the sidecar has just done so; errors as `renew`."""
        if not self.keeps(lease_id):
            renew(self._store, lease_id, timeout_s=timeout_s)

    def close(self) -> None:
        """Renew nothing any more; the lease stays as it is. Bounded; idempotent."""
        self.keep(None)
        if self._host is not None:
            self._host.keep(self.hear, None)
            if self._owns_host:
                self._host.stop(time.monotonic() + CLOSE_S)

    def hear(self, report: Mapping[str, Any] | None) -> None:
        """A report of the sidecar has arrived; None: it has died, and nothing that it has reported counts any more."""
        with self._lock:
            if report is not None and report.get("lease_id") != self._lease_id:
                return  # of one before
            was_kept = self.is_kept
            if report is None:
                self.restarts += 1
                self._renewed_s = _NEVER_S
            else:
                self._lost, self._renewed_s = report.get("lost", ""), report.get("renewed_s", _NEVER_S)
            is_news = report is None or bool(self._lost) or was_kept != self.is_kept
        if is_news:
            self._on_news()


def open_ordered(order: Mapping[str, Any]) -> Store:
    """The store that an order names, opened in the sidecar; errors as `open_store`."""
    return open_store(order["url"], StoreConfig(**order["config"]))


def renew(store: Store, lease_id: int, *, timeout_s: float | None = None) -> None:
    """Renew a lease. A LeaseLostError: the store answered twice that there is none; once is evidence, no verdict."""
    try:
        store.keep_alive(lease_id, timeout_s=timeout_s)
    except LeaseLostError:
        store.keep_alive(lease_id, timeout_s=timeout_s)


class LeaseRenewer:
    """Renews one lease until it is stopped, or the store says that the lease has ended. A daemon thread.

    `on_lost` is called once, in that thread, when the store answers twice that the lease has ended. A store that does
    not answer says nothing: it is asked again, for as long as it takes.
    """

    def __init__(
        self,
        store: Store,
        store_config: StoreConfig,
        lease_id: int,
        config: PublisherConfig,
        on_lost: Callable[[], object],
    ) -> None:
        self._lease_id, self._interval_s = lease_id, config.interval_s
        self._on_lost = on_lost
        self._renewal = Renewal(store, store_config, config)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ucxx-lease", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End, bounded; the lease stays as it is. Idempotent, and callable from `on_lost`."""
        self._stopping.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * self._interval_s)
            if self._thread.is_alive():
                _log.warning("lease_renewer_hung", lease=self._lease_id)

    def _run(self) -> None:
        try:
            self._renewal.keep(self._lease_id)  # first: the process starts with it
            self._renewal.start()
            self._renew_until_stopped()
        except LeaseLostError as error:
            if not self._stopping.is_set():
                _log.warning("lease_lost", lease=self._lease_id, reason=str(error))
                self._on_lost()
        finally:
            self._renewal.close()

    def _renew_until_stopped(self) -> None:
        pause_s, failures = self._interval_s, 0
        while not self._stopping.wait(pause_s):
            try:
                self._renewal.renew(self._lease_id, timeout_s=self._interval_s)
            except LeaseLostError:
                raise
            except Exception as error:  # noqa: BLE001 - the edge of a thread: whatever it was, the lease is to live
                failures += 1
                if failures == 1:
                    reason = f"{type(error).__name__}: {error}"
                    _log.warning("lease_not_renewed", lease=self._lease_id, reason=reason)
            else:
                if failures:
                    _log.info("lease_renewed_again", lease=self._lease_id, attempts=failures)
                failures = 0
            pause_s = self._interval_s / (_RETRIES_AN_INTERVAL if failures else 1)
