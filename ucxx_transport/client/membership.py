"""Membership: which sources a client knows to be gone.

A read of a source that is gone fails at once, in whatever it was waiting, instead of by its deadline.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ucxx_transport.settings import check_can

if TYPE_CHECKING:
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.membership.sources import SourceChange, SourceRecord

REMEMBERED_RINGS: Final = 1 << 16
"""Rings that are gone, 100 bytes each: more than a job loses."""


class Watcher(Protocol):
    """What a client needs of a `SourceWatcher`."""

    def report_to(self, report: Callable[[SourceChange], object]) -> Callable[[], None]: ...


class Membership:
    """What a watcher reports, in its thread, and what follows from it for the reads, in the reactor's.

    Attributes:
        gone: rings whose sources are.
        news: the newest report of each ring that the reads have not seen. A client that lies idle runs no reactor, and
            what waits for it must not grow with every report.
    """

    def __init__(self, watcher: Watcher) -> None:
        check_can(watcher, "report_to", "watcher", "a SourceWatcher")
        self.gone: OrderedDict[bytes, None] = OrderedDict()
        self.news: dict[bytes, tuple[SourceRecord, bool]] = {}
        self._lock = threading.Lock()
        self._announce: Callable[[], None] | None = None
        self._end_reports: Callable[[], None] | None = watcher.report_to(self._report)

    def bind(self, reactor: Reactor, on_news: Callable[[], None]) -> None:
        """From now on the reactor calls `on_news` when there are news."""
        self._announce = partial(reactor.submit, on_news)
        if self.news:
            self._announce()

    def close(self) -> None:
        """Hear no more. Idempotent."""
        end, self._end_reports = self._end_reports, None
        if end is not None:
            end()

    def take_news(self) -> Iterable[tuple[SourceRecord, bool]]:
        """The news, which are none then: whose, and whether it is there."""
        with self._lock:
            news, self.news = self.news, {}
        return news.values()

    def _report(self, change: SourceChange) -> None:
        if change.kind == "update":
            return
        record, is_there = change.record, change.kind == "add"
        ring_id = record.ring_id
        with self._lock:
            if is_there:
                self.gone.pop(ring_id, None)
            else:
                self.gone[ring_id] = None
                if len(self.gone) > REMEMBERED_RINGS:
                    self.gone.popitem(last=False)
            is_first = not self.news
            was_removed = ring_id in self.news and not self.news[ring_id][1]
            # One that was removed and is back ends its reads all the same: it is another epoch.
            self.news[ring_id] = (record, is_there and not was_removed)
        if is_first and self._announce is not None:
            self._announce()
