"""Publishing: what a publisher's thread does: publish until it is done, keep it until it is lost, and again."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.config import PublisherConfig
from ucxx_transport.errors import (
    ConfigError,
    ConflictError,
    DuplicateSourceError,
    LeaseLostError,
    ProtocolError,
    StorePermissionError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keys import source_key
from ucxx_transport.membership.publication import Publication, next_epoch
from ucxx_transport.membership.publishable import Publishable
from ucxx_transport.membership.publisher_board import PublisherBoard, PublisherState
from ucxx_transport.membership.renewal import Renewal, renew
from ucxx_transport.membership.source_record import SourceRecord, SourceStatus
from ucxx_transport.membership.store import Store

_log = get_logger(__name__)

LOOK_EVERY: Final = 5
"""Every so many intervals the record itself is looked for: a lease that lives does not prove it is there."""


class Publishing:
    """The work of a publisher. Every method but `withdraw` is for its thread.

    Args:
        store: where. worker_id: whose record. source: what is published. config: settings.
        meta: what else the record says.
        board: where it is told how far it is.
        keeper: keeps the lease; None: this thread does.
        pause: waits that many seconds, or until a stop or a word of the keeper.
        stopping: whether a stop is asked for.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        worker_id: str,
        source: Publishable,
        config: PublisherConfig,
        *,
        meta: Mapping[str, object],
        board: PublisherBoard,
        keeper: Renewal | None,
        pause: Callable[[float], None],
        stopping: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._source = source
        self._config = config
        self._meta = dict(meta)
        self._board = board
        self._keeper = keeper
        self._pause = pause
        self._stopping = stopping
        self._clock = clock
        self._session = secrets.token_hex(16)
        self._publication: Publication | None = None
        self._double: tuple[tuple[str, int], float] | None = None
        self._away = False
        self._record(1).to_bytes()  # refused here rather than by the thread

    def run(self) -> None:
        """Publish and keep until a stop is asked for, or it has failed for good."""
        try:
            while not self._stopping():
                publication = self._publish()
                if publication is None:
                    return
                self._live(publication)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: whoever waits must hear of it
            _log.exception("publisher died", worker=self._worker_id)
            told = error if isinstance(error, TransportError) else TransportError(f"{type(error).__name__}: {error}")
            self._board.enter(PublisherState.FAILED, told)

    def withdraw(self, timeout_s: float) -> None:
        """Take the record out of the store, if there is one; the thread has ended, or hangs in the store.

        If it hangs it cannot publish any more: its lease ends here, and with it the revision that it expects.
        """
        publication, self._publication = self._publication, None
        if publication is None:
            return
        try:
            publication.withdraw(timeout_s)
        except TransportError as error:
            _log.warning("record not withdrawn; it runs out", worker=self._worker_id, reason=str(error))

    def _record(self, epoch: int) -> SourceRecord:
        offer = self._source.offer()
        return SourceRecord(
            worker_id=self._worker_id,
            epoch=epoch,
            session=self._session,
            status=SourceStatus.STARTING,
            ring_id=offer.ring_id,
            ring_name=offer.ring_name,
            host_id=offer.host_id,
            host=offer.host,
            ports=offer.ports,
            meta=self._meta,
        )

    def _publish(self) -> Publication | None:
        """Try until the source is published and bound; None when it was given up or stopped."""
        began_s = self._clock()
        attempt = 0
        while not self._stopping():
            attempt += 1
            self._board.count("attempts")
            try:
                return self._attempt()
            except (StorePermissionError, DuplicateSourceError, ConfigError, ProtocolError) as error:
                self._fail(error)
                return None
            except TransportError as error:
                if isinstance(error, StoreUnavailableError):
                    self._double = None  # while nobody could look, a dead one's lease may have been given time anew
                late = self._clock() - began_s >= self._config.publish_timeout_s
                if late and self._config.on_timeout == "stop":
                    self._fail(error)
                    return None
                self._tell_of(error, attempt, late=late)
            self._pause(self._pause_after(attempt, began_s))
        return None

    def _attempt(self) -> Publication | None:
        publication, is_new = self._publication, self._publication is None
        if publication is None:
            publication = self._become_visible()
        if self._stopping():
            return None
        try:
            if not is_new:
                self._renew(publication)
            self._source.bind()
            publication.say(SourceStatus.READY, self._source.offer())
        except (ConflictError, LeaseLostError):
            self._lose("record replaced or lost before it was ready")
            raise
        self._board.count("publications")
        self._away = False
        self._board.enter(PublisherState.LIVE)
        return publication

    def _become_visible(self) -> Publication:
        self._yield_to_double()
        epoch = next_epoch(self._store, self._worker_id, known=self._board.epoch)
        publication = Publication.begin(self._store, self._record(epoch), ttl_s=self._config.ttl_s)
        # From here on there is something to withdraw, whatever happens.
        self._publication, self._board.epoch, self._double = publication, epoch, None
        self._board.enter(PublisherState.STARTING)
        self._keep(publication.lease.lease_id)
        return publication

    def _yield_to_double(self) -> None:
        """Look who has this worker id now.

        Raises:
            ConflictError: somebody has, and may be about to end.
            DuplicateSourceError: somebody has for longer than a dead one could.
        """
        entry = self._store.get(source_key(self._worker_id))
        if entry is None:
            return
        try:
            other = SourceRecord.from_bytes(entry.value)
            who, ttl_s = (other.session, other.epoch), other.ttl_s
        except ProtocolError:
            who, ttl_s = ("", entry.revision), 0.0
        if who[0] == self._session and entry.lease_id is not None:
            self._store.revoke(entry.lease_id)  # written by a try whose answer was lost
            return
        now = self._clock()
        if self._double is None or self._double[0] != who:
            self._double = (who, now)
        if now - self._double[1] > 2 * max(ttl_s, self._config.ttl_s) + 1.0:
            raise DuplicateSourceError(
                f"another live worker is published as {self._worker_id!r}; give each worker an id of its own",
                worker_id=self._worker_id,
                epoch=who[1],
            )
        raise ConflictError("a worker of this id is still in the store", worker_id=self._worker_id, epoch=who[1])

    def _live(self, publication: Publication) -> None:
        """Keep it until it is lost or a stop is asked for."""
        turn = 0
        while not self._stopping():
            self._pause(self._config.interval_s)
            if self._stopping():
                return
            turn += 1
            try:
                self._renew(publication)
                self._show_health(publication)
                self._source.discard_old()
                if turn % LOOK_EVERY == 0:
                    publication.require_there()
                self._away = False
            except (LeaseLostError, ConflictError, StoreResetError) as error:
                self._lose(str(error))
                return
            except TransportError as error:
                if not self._away:
                    self._away = True
                    self._board.count("outages")
                    _log.warning("store away; the source goes on", worker=self._worker_id, reason=str(error))

    def _renew(self, publication: Publication) -> None:
        lease_id = publication.lease.lease_id
        if self._keeper is None or not self._keeper.keeps(lease_id):
            renew(self._store, lease_id)

    def _show_health(self, publication: Publication) -> None:
        healthy = self._source.is_healthy(2 * self._config.interval_s)
        if healthy:
            told = publication.say(SourceStatus.READY, self._source.offer())
        else:
            told = publication.say(SourceStatus.STALE)  # it may be closed, and offer nothing
        state = PublisherState.LIVE if healthy else PublisherState.UNWELL
        if told and state is not self._board.state:
            _log.warning("source's health has changed", worker=self._worker_id, healthy=healthy)
            self._board.enter(state)

    def _lose(self, reason: str) -> None:
        publication, self._publication = self._publication, None
        self._source.hold()
        self._keep(None)
        self._board.count("losses")
        _log.warning(
            "source lost its lease; publishing anew", worker=self._worker_id, epoch=self._board.epoch, reason=reason
        )
        if publication is not None:
            with suppress(TransportError):
                self._store.revoke(publication.lease.lease_id)
        self._board.enter(PublisherState.PUBLISHING)

    def _keep(self, lease_id: int | None) -> None:
        if self._keeper is not None:
            self._keeper.keep(lease_id)

    def _fail(self, error: TransportError) -> None:
        _log.error("source not published", worker=self._worker_id, store=self._store.url, reason=str(error))
        publication, self._publication = self._publication, None
        if publication is not None:
            with suppress(TransportError):
                self._store.revoke(publication.lease.lease_id)
        self._board.enter(PublisherState.FAILED, error)

    def _tell_of(self, error: TransportError, attempt: int, *, late: bool) -> None:
        self._board.note(error)
        if attempt == 1:
            _log.warning("source not published yet; trying on", worker=self._worker_id, reason=str(error))
        elif late:
            _log.error(
                "source still not published; trying on", worker=self._worker_id, reason=str(error), attempt=attempt
            )

    def _pause_after(self, attempt: int, began_s: float) -> float:
        most_s = self._config.max_backoff_s
        if self._double is not None:
            most_s = min(most_s, self._config.interval_s / 4)  # it ends any moment
        jitter = random.random()  # noqa: S311 - spreads those who try
        pause = pause_s(attempt, first_s=self._config.backoff_s, longest_s=most_s, jitter=jitter)
        left_s = began_s + self._config.publish_timeout_s - self._clock()
        return min(pause, left_s) if left_s > 0 else pause
