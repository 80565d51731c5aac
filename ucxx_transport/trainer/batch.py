"""Batches of episodes: the rounds in which one is fetched under one deadline, and what drives them.

| driver        | a round is                            | the pause after it is  | runs in                    |
|---------------|---------------------------------------|------------------------|----------------------------|
| `BatchFetch`  | a job of a client's core              | a timer of its reactor | the thread of that reactor |
| `fetch_batch` | `read_many` of an asynchronous client | a sleep                | the task that awaits it    |
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict, cast

import anyio

from ucxx_transport.client.ports import attempt_budget_s
from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, Wanted, loss_of, sort_out

if TYPE_CHECKING:
    from ucxx_transport.client import Payload, UCXXClient
    from ucxx_transport.client.core import ClientCore
    from ucxx_transport.client.jobs import Job
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.link.reactor import LinkFactory, Timer
    from ucxx_transport.schema import SlotRef

_log = get_logger(__name__)

DEFAULT_FETCH_ROUNDS: Final = 3

ROUND_PAUSE_S: Final = 0.1
"""Between two rounds: a server process that died takes a second or two to be back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What became of a batch: every episode asked for is in one of the two.

    Attributes:
        payloads: by the episode's place in what was asked for, in that order.
        losses: the others, in that order, each with its reason.
        nbytes: of the payloads.
        rounds: how many it took.
        retried: episodes asked for again, once for each round after the first.
        took_s: seconds.
    """

    payloads: dict[int, Payload]
    losses: tuple[Loss, ...]
    nbytes: int
    rounds: int
    retried: int
    took_s: float

    def release(self) -> None:
        """Release all payloads."""
        for payload in self.payloads.values():
            payload.release()


Records: TypeAlias = Sequence[AskedFor] | Callable[[], Sequence[AskedFor]]
"""The episodes of a batch; or what gives them, called in the background thread."""


class FetchRequest:
    """A batch to fetch; arguments and errors as `fetch_batch`."""

    def __init__(
        self,
        given: Records,
        policy_version: int | None,
        *,
        deadline_s: float | str,
        max_fetch_rounds: int,
        max_staleness: int | None,
    ) -> None:
        if max_fetch_rounds < 1:
            raise ConfigError(f"max_fetch_rounds must be at least 1, not {max_fetch_rounds}", field="max_fetch_rounds")
        self.deadline_s = checked_seconds(deadline_s, "deadline_s")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s must be positive, not {deadline_s}", field="deadline_s")
        if max_staleness is not None and max_staleness < 0:
            raise ConfigError(f"max_staleness must not be negative, not {max_staleness}", field="max_staleness")
        if max_staleness is not None and policy_version is None:
            raise ConfigError(
                "max_staleness needs policy_version: how old is judged against it", field="policy_version"
            )
        self._given = given if callable(given) else tuple(given)
        self._policy_version = policy_version
        self._max_staleness = max_staleness
        self.max_fetch_rounds = max_fetch_rounds

    @cached_property
    def records(self) -> tuple[AskedFor, ...]:
        """Its episodes."""
        return tuple(self._given()) if callable(self._given) else self._given

    def sort_out(self) -> tuple[list[Wanted], list[Loss]]:
        """What to fetch of it, and what is lost already."""
        return sort_out(self.records, policy_version=self._policy_version, max_staleness=self._max_staleness)


Outcomes: TypeAlias = "Sequence[Payload | TransportError]"

Rounds: TypeAlias = "Generator[tuple[list[SlotRef], float] | None, Outcomes | None, Batch]"


def rounds_of(request: FetchRequest, clock: Callable[[], float]) -> Rounds:
    """The rounds of one batch, written once for every driver. Closed before its end, it releases what it has.

    Args:
        request: the batch.
        clock: seconds.

    Yields:
        What to read, and in how many seconds: to be sent the outcomes. None: to be resumed after ROUND_PAUSE_S.

    Returns:
        The batch.
    """
    began_s = clock()
    until_s = began_s + request.deadline_s
    wanted, losses = request.sort_out()
    payloads: dict[int, Payload] = {}
    rounds = retried = 0
    try:
        while wanted:
            rounds_left = request.max_fetch_rounds - rounds
            rounds += 1
            limit_s = attempt_budget_s(max(0.0, until_s - clock()), rounds_left)
            outcomes = yield [entry.ref for entry in wanted], limit_s
            assert outcomes is not None
            may_follow = rounds_left > 1 and until_s - clock() > ROUND_PAUSE_S
            again: list[Wanted] = []
            for entry, outcome in zip(wanted, outcomes, strict=True):
                if not isinstance(outcome, Exception):
                    payloads[entry.index] = outcome
                elif (loss := loss_of(entry, outcome, again=may_follow)) is not None:
                    losses.append(loss)
                else:
                    again.append(entry)
            wanted = again
            if wanted:
                retried += len(wanted)
                yield None
    except BaseException:
        for payload in payloads.values():  # the traceback would hold them, and they their slots
            payload.release()
        raise
    return Batch(
        payloads=dict(sorted(payloads.items())),
        losses=tuple(sorted(losses, key=lambda loss: loss.index)),
        nbytes=sum(payload.nbytes for payload in payloads.values()),
        rounds=rounds,
        retried=retried,
        took_s=clock() - began_s,
    )


def log_loss(loss: Loss) -> None:
    """Log an episode that is in no batch: what is done about each unless you say otherwise."""
    episode = loss.record.ref if loss.record is not None else None
    _log.warning(
        "episode_lost",
        reason=loss.reason.value,
        ring=episode.ring_name if episode is not None else None,
        slot=episode.slot if episode is not None else None,
        error=str(loss.error) if loss.error is not None else None,
    )


async def fetch_batch(
    client: UCXXClient,
    records: Sequence[AskedFor],
    *,
    deadline_s: float | str,
    max_fetch_rounds: int = DEFAULT_FETCH_ROUNDS,
    policy_version: int | None = None,
    max_staleness: int | None = None,
) -> Batch:
    """Fetch a batch; an episode that cannot be had costs the others nothing.

    Without an event loop, use `Prefetcher.fetch`.

    Args:
        client: reads.
        records: the episodes, as their workers described them; an error stands for a record that could not be read.
        deadline_s: seconds for the whole batch.
        max_fetch_rounds: how often an episode is asked for while its error is retryable, at least 1.
        policy_version: of the trainer's weights now; needed for `max_staleness`.
        max_staleness: versions that an episode's weights may be behind; None: any.

    Returns:
        What was fetched and what was lost. The caller releases the payloads (`Batch.release`), and discards what may
        still lie in its slot (`loss_policy.discardable_of`).

    Raises:
        ConfigError: an argument is out of its bounds.
    """
    request = FetchRequest(
        records, policy_version, deadline_s=deadline_s, max_fetch_rounds=max_fetch_rounds, max_staleness=max_staleness
    )
    outcomes: Outcomes | None = None
    with closing(rounds_of(request, anyio.current_time)) as rounds:
        try:
            while True:
                asked = rounds.send(outcomes)
                outcomes = None if asked is None else await client.read_many(asked[0], deadline_s=asked[1])
                if asked is None:
                    await anyio.sleep(ROUND_PAUSE_S)
        except StopIteration as end:
            return cast("Batch", end.value)


class BatchFetch:
    """The fetch of one batch, by the thread that runs the core's reactor. `start` it; its outcome goes to `on_done`.

    Args:
        core: reads.
        request: the batch.
        on_done: called once, in that thread, with the batch, or what ended it that was no TransportError of one
            episode; not called after `abandon`. Must not raise.
        on_payload: given every payload as it comes, gives what stands in its place; what it raises beside
            TransportErrors ends the fetch.
    """

    __slots__ = ("_core", "_error", "_job", "_on_done", "_on_payload", "_over", "_rounds", "_timer")

    def __init__(
        self,
        core: ClientCore,
        request: FetchRequest,
        on_done: Callable[[Batch | Exception], None],
        on_payload: Callable[[Payload], Payload] | None = None,
    ) -> None:
        self._core = core
        self._on_done = on_done
        self._on_payload = on_payload
        self._rounds = rounds_of(request, core.reactor.now)
        self._job: Job | None = None
        self._timer: Timer | None = None
        self._error: Exception | None = None
        self._over = False

    def start(self, after_s: float = 0.0) -> None:
        """Begin, or `after_s` seconds later; a batch of which nothing is to be fetched is over at once."""
        if after_s > 0:
            self._timer = self._core.reactor.call_at(self._core.reactor.now() + after_s, self.start)
        elif not self._over:
            self._step(None)

    def abandon(self) -> None:
        """Give it up: what came of it is released, and `on_done` is not called. Idempotent."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        job, self._job = self._job, None
        if job is not None:
            self._core.abandon(job)
        self._rounds.close()

    def fail(self, error: Exception) -> None:
        """Give it up: `on_done` is called with this."""
        self.abandon()
        self._on_done(error)

    def _step(self, outcomes: Outcomes | None) -> None:
        """Go on, within a callback of the reactor: what is raised here ends this fetch and nothing else."""
        reactor = self._core.reactor
        try:
            asked = self._rounds.send(outcomes)
            if asked is None:
                self._timer = reactor.call_at(reactor.now() + ROUND_PAUSE_S, partial(self._step, None))
                return
            on_payload = None if self._on_payload is None else self._replaced
            job = self._core.begin(*asked, on_done=self._round_over, on_payload=on_payload)
            if not job.done:
                self._job = job
        except StopIteration as end:
            self._over = True
            self._on_done(end.value)
        except Exception as error:  # noqa: BLE001 - raised to the trainer, in the thread that takes the batch
            self.fail(error)

    def _round_over(self, job: Job) -> None:
        if self._error is None:
            self._job = None
            self._step([outcome for outcome in job.outcomes if outcome is not None])
        else:
            self._job = job
            self.fail(self._error)

    def _replaced(self, index: int, payload: Payload) -> Payload:
        del index
        assert self._on_payload is not None
        try:
            return self._on_payload(payload)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the payload's memory, and the error may be kept
            if isinstance(error, TransportError):
                raise
            self._error = error
            raise TransportError(f"the payload could not be taken: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched.
        episodes: their payloads.
        nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; the trainer did not wait for what was fetched ahead.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
        given_up: batches that did not come in time; their episodes are lost by "timeout".
        unlocked_rings: rings of this host that could not be page-locked for a GPU: their payloads go through a buffer.
    """

    batches: int = 0
    episodes: int = 0
    nbytes: int = 0
    fetch_s: float = 0.0
    retried: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)
    given_up: int = 0
    unlocked_rings: int = 0


class FetchSettings(TypedDict, total=False):
    """How batches are fetched; see `Prefetcher`."""

    deadline_s: float | str
    max_fetch_rounds: int
    max_staleness: int | None
    discard_lost: bool
    watcher: Watcher | None
    link_factory: LinkFactory | None
