"""Prefetcher: batches fetched side by side while a trainer does something else, by one plain thread with one client.

| a batch    | its outcome | in `untaken` | counts, when the prefetcher is closed           |
|------------|-------------|--------------|-------------------------------------------------|
| added      |             | yes          | its episodes, as lost by "closed"               |
| begun      |             | yes          | the same                                        |
| come       | is there    | yes          | its payloads, the same; its losses, as they are |
| taken      | is there    | no           | nothing more: counted then                      |
| given up   | is released | no           | nothing more: counted then                      |

Fetches begin and end in the thread, which runs the reactor of the client's core; others wait for `changed`.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, Unpack

from ucxx_transport.client.core import ClientCore
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.schema.episode_record import several
from ucxx_transport.settings import check_names, known_options
from ucxx_transport.teardown import Closing, refuse_forked
from ucxx_transport.trainer.accounts import Accounts, PrefetchStatistics
from ucxx_transport.trainer.batch import Batch, BatchFetch, FetchLimits, FetchSettings, LimitSettings, given_up
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, Sources, discardable_of
from ucxx_transport.trainer.unpacking import unpacker_for

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.reads import Watcher
    from ucxx_transport.link.reactor import LinkFactory

_log = get_logger(__name__)

_GRACE_S: Final = 5.0
"""A fetch keeps its own deadline; who waits for it gives the thread this much more before the batch counts as lost."""

_JOIN_TIMEOUT_S: Final = 5.0

PendingT = TypeVar("PendingT", bound="PendingBatch")

_TAKEN: Final = "the batch was taken or cancelled; take each once"


class PendingBatch(BatchFetch):
    """A batch to come, of `Prefetcher.begin`. Take its `result`, or `cancel` it."""

    _outcome: Batch | Exception | None = None
    _is_late = False

    def __init__(
        self,
        prefetcher: Prefetcher,
        outputs: Mapping[int, object],
        policy_version: int | None,
        *,
        alone: bool = False,
    ) -> None:
        self._prefetcher = prefetcher
        core, limits, uploader = prefetcher.core, prefetcher.limits, prefetcher.uploader
        super().__init__(core, limits, outputs, policy_version, uploader=uploader, alone=alone)

    @property
    def is_ready(self) -> bool:
        """Whether it has come, so that its result need not be waited for."""
        refuse_forked(self._core.pid, "PendingBatch")
        return self._outcome is not None

    def begin(self, after_s: float = 0.0) -> None:
        """Begin to fetch it, in so many seconds, and return at once. Idempotent."""
        refuse_forked(self._core.pid, "PendingBatch")
        self._core.reactor.submit(partial(self._begin, after_s))

    def result(self, timeout_s: float | str | None = None) -> Batch:
        """Wait for it, count it and report its losses; one that has not begun is begun. The caller releases it.

        Args:
            timeout_s: how long at most; None: its own deadline, and some seconds for the thread.

        Returns:
            The batch. One that does not come in time is given up: then every episode that was on its way is lost by
            "timeout", and whatever still comes of it is released. A call that is interrupted leaves it to be taken.

        Raises:
            ConfigError: it was taken or cancelled, or the prefetcher is closed.
            TransportError: all of it is lost for a reason that cannot heal, or a source has not answered in
                `unreachable_batches` in a row.
            Exception: what ended the fetch, if that was no `TransportError` of one episode; or what `on_loss` raised,
                when all losses were reported. What came is not lost by it: call `result` again.
        """
        batch, untaken = self.settle(timeout_s), self._prefetcher.untaken
        try:
            self._prefetcher.accounts.report(self)
        except Exception:
            if not batch.payloads:
                untaken.pop(self, None)
            raise
        try:
            del untaken[self]  # no call: an interrupt comes before it, or to who has the batch
        except KeyError:
            raise ConfigError(_TAKEN) from None
        return batch

    def settle(self, timeout_s: float | str | None = None) -> Batch:
        """As `result`, and report nothing, and leave it to be taken: interrupted anywhere, it may be called again."""
        prefetcher = self._prefetcher
        prefetcher.check_usable()  # before a lock is taken, which a forked child may never get
        own_s = prefetcher.limits.deadline_s + _GRACE_S
        limit_s = own_s if timeout_s is None else checked_seconds(timeout_s, "timeout_s")
        if not self.has_begun:
            self.begin()
        with prefetcher.lock:
            prefetcher.changed.wait_for(self._is_over, min(limit_s, threading.TIMEOUT_MAX))
            prefetcher.check_usable()
            if self not in prefetcher.untaken:
                raise ConfigError(_TAKEN)
            outcome = self._outcome
            self._is_late = outcome is None
        if self.is_counted:
            return self.batch
        if isinstance(outcome, Batch):
            batch, failure = outcome, None
        else:
            batch, failure = given_up(self.sorted_out(), outcome), outcome
            self._core.reactor.submit(self.abandon)
            self._core.reactor.submit(partial(prefetcher.discard, batch.losses))
        prefetcher.accounts.count(self, batch, failure)
        return batch

    def fetch(self) -> Batch:
        """Begin it and wait for it, as `result`; what came of one that raises is released."""
        try:
            return self.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give it up: what came of it is released, and counted as lost by "closed". Idempotent."""
        prefetcher = self._prefetcher
        if prefetcher.core.inherited:
            return  # a forked child's copy
        with prefetcher.lock:
            if self not in prefetcher.untaken:
                return
            del prefetcher.untaken[self]
            prefetcher.changed.notify_all()
            outcome = self._outcome
        came, losses = (outcome.payloads, outcome.losses) if isinstance(outcome, Batch) else (self.outputs, ())
        prefetcher.accounts.count_closed(len(came), losses, fetch=self)
        if isinstance(outcome, Batch):
            outcome.release()
        else:
            self._core.reactor.submit(self.abandon)

    def ended(self, outcome: Batch | Exception) -> None:
        prefetcher = self._prefetcher
        if isinstance(outcome, Batch):
            prefetcher.discard(outcome.losses)
            if prefetcher.uploader is None:  # made here and kept, the arrays cost the trainer no time
                with suppress(TransportError):  # raised to who takes those arrays
                    any(payload.arrays is None for payload in outcome.payloads.values())
        with prefetcher.lock:
            if self in prefetcher.untaken and not self._is_late:
                self._outcome = outcome
                prefetcher.changed.notify_all()
                return
        if isinstance(outcome, Batch):
            outcome.release()  # whose episodes were counted as lost

    def _begin(self, after_s: float) -> None:
        if not (self.has_begun or self._is_over()):
            self.start(after_s)

    def _is_over(self) -> bool:
        return self._outcome is not None or self._is_late or self not in self._prefetcher.untaken


class Prefetcher(Closing):
    """One background thread with one client, for a trainer's life. Thread-safe; not usable in a forked child.

    ```python
    with Prefetcher(config) as prefetcher:
        pending = prefetcher.begin(next_records())
        while training:
            batch = pending.result()
            pending = prefetcher.begin(next_records())    # fetched while this one is trained on
            train(batch.payloads)
            batch.release()
    ```

    Args:
        config: settings of the client, or a mapping of them.
        device: where episodes are given: None for numpy views, "cpu" for torch tensors, "cuda:N" and "cupy:N" for
            tensors and arrays on a GPU.
        deadline_s: of one batch; 30.
        max_fetch_rounds: as for `fetch_batch`; 3.
        max_staleness: as for `fetch_batch`.
        discard_lost: discard episodes that were given up although they may still lie in their slots (`failed`,
            `timeout`, `unreachable`). False leaves them there, for another trainer that is given their records; but if
            none is, a ring that does not overwrite loses those slots.
        unreachable_batches: after so many batches in a row without an answer of a source that has never answered, or of
            which nothing came at all, `result` raises; 3; None: never.
        on_loss: called with every episode that is in no batch, by `result` and `fetch` in the caller's thread. One line
            a batch and reason is logged in any case (`episodes_lost`), once a minute while it lasts.
        watcher: as for `UCXXClient`.
        link_factory: as for `UCXXClient`.

    Attributes:
        unpack: gives the arrays of a payload, where episodes are given; valid for as long as they live.
        in_a_batch: its own batches that count as one for `unreachable_batches`.

    Raises:
        ConfigError: an argument is out of its bounds, or this machine has no such device.
    """

    in_a_batch = 1

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        device: object = None,
        on_loss: Callable[[Loss], None] | None = None,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        **limits: Unpack[LimitSettings],
    ) -> None:
        others = {"config", *FetchSettings.__annotations__, *(type(self).__init__.__kwdefaults__ or ())}
        check_names(f"setting of {type(self).__name__}", limits, LimitSettings.__annotations__.keys() | others)
        self.limits = FetchLimits(**limits, on_loss=on_loss)
        self.unpack, self.uploader, in_place = unpacker_for(device)
        self.core = ClientCore(
            config,
            link_factory,
            watcher=watcher,
            page_locker=None if self.uploader is None else self.uploader.page_locker,
            in_place=in_place,
        )
        self.lock = threading.RLock()  # of what follows; it is taken by no code of Python's, which an interrupt ends
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self._failure: Exception | None = None  # that ended the thread
        self.untaken: dict[PendingBatch, None] = {}
        sources = Sources(self.core.local.host_id, self.limits.unreachable_batches, self.in_a_batch)
        self.accounts = Accounts(sources, on_loss=on_loss, clock=self.core.reactor.now)
        self._stopping = threading.Event()
        try:
            self._thread = start_thread(self._run, name="ucxx-prefetch")
        except BaseException:
            self._end_core()
            raise
        atexit.register(self.close)

    @known_options
    def fetch(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> Batch:
        """Fetch a batch beside whatever is on its way, and wait for it; see `begin` and `PendingBatch.result`.

        What came of a batch that raises is released.
        """
        return self.begin(records, policy_version=policy_version).fetch()

    @known_options
    def begin(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> PendingBatch:
        """Begin to fetch a batch beside whatever is on its way, and return at once.

        Raises:
            ConfigError: `records` is no list, `policy_version` is missing, or the prefetcher is closed.
        """
        given = dict(enumerate(several(records, "records")))
        pending = self.add(PendingBatch(self, given, policy_version))
        pending.begin()
        return pending

    def check_usable(self) -> None:
        """Refuse, by a ConfigError, one that is closed, or its parent process's."""
        refuse_forked(self.core.pid, type(self).__name__)
        if self.closed:
            raise ConfigError(f"the {type(self).__name__} is closed; make another") from self._failure

    def statistics(self) -> PrefetchStatistics:
        """Counts since this was made."""
        refuse_forked(self.core.pid, type(self).__name__)
        return self.accounts.statistics()

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this was made: what was read which way, and how long it took."""
        refuse_forked(self.core.pid, type(self).__name__)
        found: Future[ClientStatistics] = Future()
        self.core.reactor.submit(lambda: found.set_result(self.core.statistics()))  # in the thread that has the link
        while self._thread.is_alive():  # one that ends does not answer
            with suppress(TimeoutError):
                return found.result(1.0)
        return self.core.statistics()

    def close(self) -> None:
        """Give up what is not taken, take leave of the servers, end the thread. Idempotent, bounded."""
        if self.core.inherited:
            return
        atexit.unregister(self.close)
        try:
            self._leave_all()
        finally:
            self.core.reactor.submit(self._stopping.set)
            self._thread.join(_JOIN_TIMEOUT_S)

    # for its batches, and what is built on one

    def add(self, pending: PendingT) -> PendingT:
        """Keep a batch, which is begun later, where closing finds it until it is taken; errors as `begin`."""
        self.check_usable()
        self.limits.sorter(pending.policy_version)  # refuses one that is missing, or no number
        with self.lock:
            self.check_usable()
            self.untaken[pending] = None
        return pending

    def discard(self, losses: Sequence[Loss]) -> None:  # in the thread
        refs = discardable_of(losses, discard_lost=self.limits.discard_lost)
        if refs:
            try:
                self.core.reads.go_on(self.core.discard_call(refs, self.limits.deadline_s))
            except Exception as error:  # noqa: BLE001 - of what is lost already: it costs no other fetch
                _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")

    def _leave_all(self) -> None:
        with self.lock:
            self.closed = True
            untaken = [*self.untaken]
            self.changed.notify_all()
        for pending in untaken:
            pending.cancel()
        if untaken:
            _log.info("episodes_not_taken", episodes=self.accounts.statistics().losses.get("closed", 0))

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self.core.reactor.run_once(math.inf)
                except Exception as error:
                    # of a copy: what is taken leaves without the lock
                    running = [each for each in [*self.untaken] if each.has_begun and not each.is_ready]
                    if not running:
                        raise
                    for pending in running:
                        pending.fail(error)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait hear that it is closed
            self._failure = error.with_traceback(None)  # which would keep frames, and payloads by them
            _log.error("prefetcher_failed", reason=f"{type(error).__name__}: {error}")
            self._leave_all()
        finally:
            self._end_core()

    def _end_core(self) -> None:
        if self.uploader is not None:
            self.uploader.close()  # before the core, which frees the buffers that come back
        self.core.close()
