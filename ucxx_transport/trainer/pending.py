"""Batches on their way: begun by a thread, awaited by another, counted, logged and reported when they are taken.

| a batch    | its outcome | in `untaken` | counts, when the prefetcher is closed           |
|------------|-------------|--------------|-------------------------------------------------|
| added      |             | yes          | its episodes, as lost by "closed"               |
| begun      |             | yes          | the same                                        |
| come       | is there    | yes          | its payloads, the same; its losses, as they are |
| taken      | is there    | no           | nothing more: counted then                      |
| given up   | is released | no           | nothing more: counted then                      |

Fetches begin and end in the thread that runs the reactor of the client's core; others wait for `changed`.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, TypeVar

from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import wait_for
from ucxx_transport.teardown import refuse_forked
from ucxx_transport.trainer.batch import ROUND_PAUSE_S, Batch, PrefetchStatistics, given_up, rounds_of
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, Sources, discardable_of, record_of, remember

if TYPE_CHECKING:
    from ucxx_transport.client import Payload
    from ucxx_transport.client.core import ClientCore
    from ucxx_transport.client.jobs import Job
    from ucxx_transport.link.reactor import Timer
    from ucxx_transport.trainer.batch import FetchLimits, Outcomes, SortedOut
    from ucxx_transport.trainer.unpacking import DeviceUploader

_log = get_logger(__name__)

LOG_PAUSE_S: Final = 60.0  # between two log lines of one reason and the same workers; the first comes at once
MOST_LOGGED: Final = 8  # lines of one reason in that time; workers, and sequences, of one line

_GRACE_S: Final = 5.0  # for the thread, which keeps a fetch's own deadline, before who waits counts it as lost
_TAKEN: Final = "the batch was taken or cancelled; take each once"

PendingT = TypeVar("PendingT", bound="PendingBatch")


class PendingBatch:
    """A batch to come, of `Prefetcher.begin`. Take its `result`, or `cancel` it.

    Attributes:
        outputs: what its episodes were given as, by their places.
        alone: whether it is of one episode, asked for by itself.
        policy_version: of the trainer's weights.
        unreported: its losses that are to be reported, one by one.
        problem: what is to be raised after that, once.
    """

    batch: Batch
    is_counted = False
    problem: Exception | None = None
    has_begun = False
    _outcome: Batch | Exception | None = None
    _is_late = False
    _job: Job | None = None
    _timer: Timer | None = None
    _error: Exception | None = None

    def __init__(
        self, fetches: Fetches, outputs: Mapping[int, object], policy_version: int | None, *, alone: bool = False
    ) -> None:
        self._fetches, self._core = fetches, fetches.core
        self.outputs, self.policy_version, self.alone = outputs, policy_version, alone
        self.unreported: Iterator[Loss] = iter(())
        self._rounds = rounds_of(self._sorted_out, fetches.limits, self._core.reactor.now)

    @cached_property
    def records(self) -> Mapping[int, AskedFor]:
        """Its episodes, by their places; read by the thread, once the fetch begins, since that takes long."""
        return {place: record_of(output) for place, output in self.outputs.items()}

    @property
    def is_ready(self) -> bool:
        """Whether it has come, so that its result need not be waited for."""
        refuse_forked(self._core.pid, "PendingBatch")
        return self._outcome is not None

    def begin(self, after_s: float = 0.0) -> None:
        """Begin to fetch it, in so many seconds, and return at once. Idempotent."""
        refuse_forked(self._core.pid, "PendingBatch")
        self._core.reactor.submit(partial(self.start, after_s))

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
        batch, untaken = self.settle(timeout_s), self._fetches.untaken
        try:
            self._fetches.report(self)
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
        fetches = self._fetches
        fetches.check_usable()  # before a lock is taken, which a forked child may never get
        own_s = fetches.limits.deadline_s + _GRACE_S
        limit_s = own_s if timeout_s is None else checked_seconds(timeout_s, "timeout_s")
        if not self.has_begun:
            self.begin()
        with fetches.lock:
            wait_for(fetches.changed, self._is_over, limit_s)
            fetches.check_usable()
            if self not in fetches.untaken:
                raise ConfigError(_TAKEN)
            outcome = self._outcome
            self._is_late = outcome is None
        if self.is_counted:
            return self.batch
        if isinstance(outcome, Batch):
            batch, failure = outcome, None
        else:
            batch, failure = given_up(self._sorted_out(), outcome), outcome
            self._core.reactor.submit(self.abandon)
            self._core.reactor.submit(partial(fetches.discard, batch.losses))
        if not fetches.count(self, batch, failure):
            fetches.check_usable()
            raise ConfigError(_TAKEN)
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
        fetches = self._fetches
        if self._core.inherited:
            return  # a forked child's copy
        with fetches.lock:
            try:
                del fetches.untaken[self]
            except KeyError:
                return  # what is taken leaves without the lock, at any moment
            fetches.changed.notify_all()
            outcome = self._outcome
        came, losses = (outcome.payloads, outcome.losses) if isinstance(outcome, Batch) else (self.outputs, ())
        fetches.count_closed(len(came), losses, fetch=self)
        if isinstance(outcome, Batch):
            outcome.release()
        else:
            self._core.reactor.submit(self.abandon)

    # what follows is for the thread

    def start(self, after_s: float = 0.0) -> None:
        """Begin, or `after_s` seconds later; a batch of which nothing is to be fetched is over at once."""
        if self.has_begun or self._is_over():
            return
        self.has_begun = True
        if after_s > 0:
            self._timer = self._core.reactor.call_at(self._core.reactor.now() + after_s, self._step)
        else:
            self._step()

    def abandon(self) -> None:
        """Give it up: what came of it is released, and it does not end. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        job, self._job = self._job, None
        if job is not None:
            self._core.abandon(job)
        self._rounds.close()

    def fail(self, error: Exception) -> None:
        """Give it up: it ends with this."""
        self.abandon()
        self.ended(error)

    def ended(self, outcome: Batch | Exception) -> None:
        """What comes of it, a batch or what ended it that was no TransportError of one episode. Must not raise."""
        fetches = self._fetches
        if isinstance(outcome, Batch):
            fetches.discard(outcome.losses)
            if fetches.uploader is None:  # made here and kept, the arrays cost the trainer no time
                with suppress(TransportError):  # raised to who takes those arrays
                    any(payload.arrays is None for payload in outcome.payloads.values())
        with fetches.lock:
            if not self._is_over():
                self._outcome = outcome
                fetches.changed.notify_all()
                return
        if isinstance(outcome, Batch):
            outcome.release()  # whose episodes were counted as lost

    def _is_over(self) -> bool:
        return self._outcome is not None or self._is_late or self not in self._fetches.untaken

    def _sorted_out(self) -> SortedOut:
        return self._fetches.limits.sorter(self.policy_version)(self.records)

    def _step(self, outcomes: Outcomes | None = None) -> None:
        """Go on, within a callback of the reactor: what is raised here ends this fetch and nothing else."""
        reactor = self._core.reactor
        on_payload = None if self._fetches.uploader is None else self._uploaded
        try:
            asked = self._rounds.send(outcomes)
            if asked is None:
                self._timer = reactor.call_at(reactor.now() + ROUND_PAUSE_S, self._step)
                return
            job = self._core.begin(*asked, on_done=self._round_over, on_payload=on_payload)
            self._job = None if job.done else job
        except StopIteration as end:
            self.ended(end.value)
        except Exception as error:  # noqa: BLE001 - raised to the trainer, in the thread that takes the batch
            self.fail(error)

    def _round_over(self, job: Job) -> None:
        if self._error is None:
            self._job = None
            self._step([outcome for outcome in job.outcomes if outcome is not None])
        else:
            self._job = job
            self.fail(self._error)

    def _uploaded(self, _: int, payload: Payload) -> Payload:
        assert self._fetches.uploader is not None
        try:
            return self._fetches.uploader.upload(payload, self._core.reactor)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the payload's memory, and the error may be kept
            if isinstance(error, TransportError):
                raise
            self._error = error  # beside TransportErrors: it ends the fetch
            raise TransportError(f"the payload could not be taken: {type(error).__name__}: {error}") from error


class Fetches:
    """The batches of one client: those that are not taken, and what came of the others, counted. Thread-safe."""

    in_a_batch = 1

    def __init__(self, core: ClientCore, limits: FetchLimits, uploader: DeviceUploader | None = None) -> None:
        self.core, self.limits, self.uploader = core, limits, uploader
        self._sources = Sources(core.local.host_id, limits.unreachable_batches, self.in_a_batch)
        self.lock = threading.RLock()  # of what follows; it is taken by no code of Python's, which an interrupt ends
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self.failure: Exception | None = None  # that closed it
        self.untaken: dict[PendingBatch, None] = {}
        self.counts = PrefetchStatistics()
        self._logged: dict[LossReason, tuple[float, int, int, dict[str | None, float]]] = {}  # see `_log_losses`

    def check_usable(self) -> None:
        """Refuse, by a ConfigError, one that is closed, or its parent process's."""
        refuse_forked(self.core.pid, type(self).__name__)
        if self.closed:
            raise ConfigError(f"the {type(self).__name__} is closed; make another") from self.failure

    def add(self, pending: PendingT) -> PendingT:
        """Keep a batch, which is begun later, where closing finds it until it is taken; errors as of `begin`."""
        self.check_usable()
        self.limits.sorter(pending.policy_version)  # refuses one that is missing, or no number
        with self.lock:
            self.check_usable()
            self.untaken[pending] = None
        return pending

    def discard(self, losses: Sequence[Loss]) -> None:
        """In the thread: free the slots of what is lost and may still be there."""
        refs = discardable_of(losses, discard_lost=self.limits.discard_lost)
        if refs:
            try:
                self.core.reads.go_on(self.core.discard_call(refs, self.limits.deadline_s))
            except Exception as error:  # noqa: BLE001 - of what is lost already: it costs no other fetch
                _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")

    def count(self, fetch: PendingBatch, batch: Batch, failure: Exception | None = None) -> bool:
        """Count a batch, once, and log its losses; `failure` is what ended the fetch. False: it is cancelled."""
        with self.lock:
            if fetch.is_counted or fetch not in self.untaken:
                return fetch.is_counted
            sources, before = copy(self._sources), self.counts
            came = [fetch.records[place] for place in batch.payloads]
            problem = sources.problem_in(came, batch.losses, alone=fetch.alone) if batch.in_time else failure
            now = replace(
                before,
                batches=before.batches + batch.in_time,
                episodes=before.episodes + len(batch.payloads),
                nbytes=before.nbytes + sum(payload.nbytes for payload in batch.payloads.values()),
                fetch_s=before.fetch_s + batch.took_s,
                retried=before.retried + batch.retried,
                losses=Counter(before.losses) + Counter(loss.reason.value for loss in batch.losses),
            )
            # all of it or nothing, wherever an interrupt comes
            fetch.unreported, fetch.problem, fetch.batch = iter(batch.losses), problem, batch
            self.counts, self._sources, fetch.is_counted = now, sources, True
        self._log_losses(batch.losses, of=len(fetch.records))
        return True

    def _log_losses(self, losses: Sequence[Loss], *, of: int) -> None:
        """One line a reason; of one that lasts, one in a while, and a few at once, of workers not lost so of late."""
        now = self.core.reactor.now()
        for reason in dict.fromkeys(loss.reason for loss in losses):
            alike = [loss for loss in losses if loss.reason is reason]
            workers = dict.fromkeys(loss.worker for loss in alike)
            with self.lock:
                due_s, lines, since, lost_s = self._logged.get(reason, (now, 0, 0, {}))
                fresh = [worker for worker in workers if now - lost_s.get(worker, -LOG_PAUSE_S) >= LOG_PAUSE_S]
                if now >= due_s:
                    due_s, lines = now + LOG_PAUSE_S, 0
                is_said = not lines or (bool(fresh) and lines < MOST_LOGGED)
                for worker in workers if is_said else workers.keys() - fresh:
                    remember(lost_s, worker, now)
                self._logged[reason] = (due_s, lines + is_said, 0 if is_said else since + len(alike), lost_s)
            if not is_said:
                continue
            named = [*dict.fromkeys([*fresh, *workers])]
            first, *more = (loss for loss in alike if loss.worker == named[0])
            _log.warning(
                "episodes_lost",
                lost=len(alike),
                of=of,
                reason=reason.value,
                worker=first.worker,
                sequences=tuple(loss.sequence for loss in [first, *more][:MOST_LOGGED]),
                others=tuple(named[1:MOST_LOGGED]),
                workers=len(named),
                host=first.host,
                error=None if first.error is None else str(first.error),
                hint=self._sources.hint_for(first),
                since=since,
            )

    def count_closed(self, episodes: int, losses: Sequence[Loss] = (), *, fetch: PendingBatch | None = None) -> None:
        """Count what was asked for and is not taken, of a fetch that is not counted yet."""
        with self.lock:
            if fetch is not None and fetch.is_counted:
                return
            lost = Counter(self.counts.losses) + Counter(loss.reason.value for loss in losses)
            self.counts = replace(self.counts, losses=lost + Counter({LossReason.CLOSED.value: episodes}))

    def report(self, fetch: PendingBatch) -> None:
        """Call the hook with each loss, whatever it raises; then raise the problem, or what it raised first.

        No loss is reported twice, or passed over, where an interrupt comes in between: report them again.
        """
        failed, hook = fetch.problem, self.limits.on_loss
        for loss in fetch.unreported:
            try:
                if hook is not None:
                    hook(loss)
            except Exception as error:  # noqa: BLE001 - raised below, or logged
                if failed is None:
                    failed = error
                else:
                    _log.exception("loss_hook_failed", worker=loss.worker, sequence=loss.sequence)
        fetch.problem = None
        if failed is not None:
            raise failed
