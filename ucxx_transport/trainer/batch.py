"""Batches of episodes: the rounds in which one is fetched under one deadline.

They are driven by a client's core and the timers of its reactor (`PendingBatch`), or by a task (`fetch_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict, cast

import anyio

from ucxx_transport.config import checked_count, checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.schema.episode_record import as_policy_version, several
from ucxx_transport.schema.wire_form import refuse
from ucxx_transport.settings import known_options
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, Wanted, loss_of, record_of, sort_out

if TYPE_CHECKING:
    from ucxx_transport.client import Payload, UCXXClient
    from ucxx_transport.client.reads import Watcher
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.schema import SlotRef

_log = get_logger(__name__)

MAX_FETCH_ROUNDS: Final = 3
ROUND_PAUSE_S: Final = 0.1  # between two of them: a server process that died takes a second or two to be back


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What became of a batch: every episode asked for is in one of the two.

    Attributes:
        payloads: by the episode's place in what was asked for, in that order.
        losses: the others, in that order, each with its reason.
        retried: episodes asked for again, once for each round after the first.
        took_s: seconds.
        in_time: False: it was given up, or its fetch failed, and every episode is lost.
    """

    payloads: dict[int, Payload]
    losses: tuple[Loss, ...]
    retried: int
    took_s: float
    in_time: bool = True

    def release(self) -> None:
        """Release all payloads."""
        for payload in self.payloads.values():
            payload.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched; those that were given up, or whose fetch failed, are losses alone.
        episodes: their payloads.
        nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; the trainer did not wait for what was fetched ahead.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
    """

    batches: int = 0
    episodes: int = 0
    nbytes: int = 0
    fetch_s: float = 0.0
    retried: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)


class FetchLimits:
    """Settings of a `Prefetcher` that no device and no thread is needed to check; arguments and errors as there."""

    def __init__(
        self,
        *,
        deadline_s: float | str = 30.0,
        max_fetch_rounds: int = MAX_FETCH_ROUNDS,
        max_staleness: int | None = None,
        discard_lost: object = True,
        unreachable_batches: int | None = 3,
        on_loss: object = None,
    ) -> None:
        self.deadline_s = checked_seconds(deadline_s, "deadline_s")
        if self.deadline_s == 0:
            refuse("deadline_s", deadline_s, "more than 0", value=deadline_s)
        self.max_fetch_rounds = checked_count(max_fetch_rounds, "max_fetch_rounds", at_least=1)
        self.max_staleness = max_staleness
        if max_staleness is not None:
            self.max_staleness = checked_count(max_staleness, "max_staleness", at_least=0, unset="any")
        self.unreachable_batches = unreachable_batches
        if unreachable_batches is not None:
            self.unreachable_batches = checked_count(
                unreachable_batches, "unreachable_batches", at_least=1, unset="never"
            )
        if on_loss is not None and not callable(on_loss):
            refuse("on_loss", on_loss, "a function of a Loss, or None", value=on_loss)
        self.on_loss = on_loss
        if not isinstance(discard_lost, bool):
            refuse("discard_lost", discard_lost, "True or False", value=discard_lost)
        self.discard_lost = discard_lost

    def sorter(self, policy_version: int | None) -> Callable[[Mapping[int, AskedFor]], SortedOut]:
        """What sorts the episodes of a batch out, for a trainer with weights of this version."""
        if self.max_staleness is not None and policy_version is None:
            text = f"max_staleness = {self.max_staleness} needs the trainer's policy_version: give it with the rollouts"
            raise ConfigError(text, field="policy_version")
        return partial(sort_out, policy_version=as_policy_version(policy_version), max_staleness=self.max_staleness)


SortedOut: TypeAlias = tuple[list[Wanted], list[Loss]]

Outcomes: TypeAlias = "Sequence[Payload | TransportError]"

Rounds: TypeAlias = "Generator[tuple[list[SlotRef], float] | None, Outcomes | None, Batch]"


def rounds_of(sorted_out: Callable[[], SortedOut], limits: FetchLimits, clock: Callable[[], float]) -> Rounds:
    """The rounds of one batch, written once for every driver. Closed before its end, it releases what it has.

    It yields what to read, and in how many seconds, and is sent the outcomes; None: to be resumed after ROUND_PAUSE_S.
    """
    began_s = clock()
    until_s = began_s + limits.deadline_s
    wanted, losses = sorted_out()
    payloads: dict[int, Payload] = {}
    rounds_left, retried = limits.max_fetch_rounds, 0
    try:
        while True:
            if not wanted:
                break
            left_s = max(0.0, until_s - clock())
            limit_s = left_s / 2 if rounds_left > 1 else left_s  # as an attempt's, see `Dispatch.asked`
            outcomes = yield [entry.ref for entry in wanted], limit_s
            assert outcomes is not None
            rounds_left -= 1
            may_follow = rounds_left > 0 and until_s - clock() > ROUND_PAUSE_S
            again: list[Wanted] = []
            for entry, outcome in zip(wanted, outcomes, strict=True):
                if not isinstance(outcome, Exception):
                    payloads[entry.index] = outcome
                elif outcome.retryable and may_follow:
                    again.append(entry)
                else:
                    losses.append(loss_of(entry, outcome))
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
        losses=tuple(sorted(losses, key=attrgetter("index"))),
        retried=retried,
        took_s=clock() - began_s,
    )


def given_up(sorted_out: SortedOut, failure: Exception | None) -> Batch:
    """A batch of which nothing came: its fetch failed, or did not end in time."""
    wanted, losses = sorted_out
    reason = LossReason.TIMEOUT if failure is None else LossReason.FAILED
    if failure is None:
        error: TransportError = DeadlineExceededError("the batch did not come in time")
        _log.warning("batch_abandoned", episodes=len(wanted) + len(losses))
    elif isinstance(failure, TransportError):
        error = failure
    else:
        error = TransportError(f"the batch could not be fetched: {type(failure).__name__}: {failure}")
        error.__cause__ = failure
    losses += [Loss(index=each.index, record=each.record, reason=reason, error=error) for each in wanted]
    lost = tuple(sorted(losses, key=attrgetter("index")))
    return Batch(payloads={}, losses=lost, retried=0, took_s=0.0, in_time=False)


@known_options
async def fetch_batch(
    client: UCXXClient,
    records: Sequence[AskedFor],
    *,
    deadline_s: float | str,
    max_fetch_rounds: int = MAX_FETCH_ROUNDS,
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
    limits = FetchLimits(deadline_s=deadline_s, max_fetch_rounds=max_fetch_rounds, max_staleness=max_staleness)
    asked_for = {place: record_of(each) for place, each in enumerate(several(records, "records"))}
    sorted_out = partial(limits.sorter(policy_version), asked_for)
    outcomes: Outcomes | None = None
    with closing(rounds_of(sorted_out, limits, anyio.current_time)) as rounds:
        try:
            while True:
                asked = rounds.send(outcomes)
                outcomes = None if asked is None else await client.read_many(asked[0], deadline_s=asked[1])
                if asked is None:
                    await anyio.sleep(ROUND_PAUSE_S)
        except StopIteration as end:
            return cast("Batch", end.value)


class LimitSettings(TypedDict, total=False):
    """Settings of a `Prefetcher` for its `FetchLimits`; see there."""

    deadline_s: float | str
    max_fetch_rounds: int
    max_staleness: int | None
    discard_lost: bool
    unreachable_batches: int | None


class HostFetchSettings(LimitSettings, total=False):
    """Settings of a `Prefetcher` beside its device; see there."""

    watcher: Watcher | None
    link_factory: LinkFactory | None


class FetchSettings(HostFetchSettings, total=False):
    """Settings of a `Prefetcher`, for what is built on one; see there."""

    device: object
