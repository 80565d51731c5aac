"""Which episodes of a batch are worth fetching, and what becomes of one that could not be.

| episode                                                     | becomes                          |
|-------------------------------------------------------------|----------------------------------|
| dropped by its worker                                       | lost: `dropped`                  |
| of weights more than `max_staleness` versions old           | lost: `too_old`                  |
| a payload that the batch has already                        | lost: `duplicate`                |
| any other                                                   | is fetched                       |

| a fetch that failed with                                    | becomes                          |
|-------------------------------------------------------------|----------------------------------|
| `StaleSlotError`                                            | lost: `stale`, at once           |
| another error that trying again cannot help                 | lost: `failed`, at once          |
| a retryable error, while there are rounds and time          | is fetched again                 |
| `DeadlineExceededError`, after that                         | lost: `timeout`                  |
| another retryable error, after that                         | lost: `unreachable`              |

No I/O and no clock: times come in as arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from ucxx_transport.errors import ConfigError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord


class LossReason(enum.Enum):
    """Why an episode of a batch is not in it."""

    DROPPED = "dropped"
    TOO_OLD = "too_old"
    DUPLICATE = "duplicate"
    STALE = "stale"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One episode that is not in its batch.

    Attributes:
        index: its place in what was asked for.
        record: the episode. reason: why.
        error: what the last try raised; None when it was not fetched at all.
    """

    index: int
    record: EpisodeRecord
    reason: LossReason
    error: TransportError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One episode to fetch."""

    index: int
    record: EpisodeRecord
    ref: SlotRef


def sort_out(
    records: Sequence[EpisodeRecord], *, policy_version: int | None = None, max_staleness: int | None = None
) -> tuple[list[Wanted], list[Loss]]:
    """What to fetch of a batch, and what not.

    Args:
        records: the batch, in order.
        policy_version: of the trainer's weights now.
        max_staleness: versions that an episode's weights may be behind those; None: any. An episode that does not name
            its version is as old as can be.

    Returns:
        The episodes to fetch and those that are lost already, each in the batch's order.

    Raises:
        ConfigError: `max_staleness` is negative, or given without `policy_version`.
    """
    if max_staleness is not None:
        if policy_version is None:
            raise ConfigError(
                "max_staleness needs policy_version: how old is judged against it", field="policy_version"
            )
        if max_staleness < 0:
            raise ConfigError(f"max_staleness must not be negative, not {max_staleness}", field="max_staleness")
    wanted: list[Wanted] = []
    losses: list[Loss] = []
    seen: set[tuple[bytes, int, int]] = set()
    for index, record in enumerate(records):
        reason: LossReason | None = None
        if record.ref is None:
            reason = LossReason.DROPPED
        elif record.ref.name in seen:
            reason = LossReason.DUPLICATE
        elif (
            max_staleness is not None
            and policy_version is not None
            and (record.policy_version is None or policy_version - record.policy_version > max_staleness)
        ):
            reason = LossReason.TOO_OLD
        if reason is not None or record.ref is None:
            losses.append(Loss(index=index, record=record, reason=reason or LossReason.DROPPED))
            continue
        seen.add(record.ref.name)
        wanted.append(Wanted(index=index, record=record, ref=record.ref))
    return wanted, losses


def round_s(left_s: float, rounds_left: int) -> float:
    """Seconds for one round: half of what is left while others may follow, all of it in the last."""
    return left_s if rounds_left <= 1 else left_s / 2


def loss_of(wanted: Wanted, error: TransportError, *, again: bool) -> Loss | None:
    """What a failed fetch means: None to try it in the next round.

    Args:
        wanted: what was fetched.
        error: what came instead.
        again: whether there is another round and time for it.
    """
    if error.retryable and again:
        return None
    if isinstance(error, StaleSlotError):
        reason = LossReason.STALE
    elif isinstance(error, DeadlineExceededError):
        reason = LossReason.TIMEOUT
    else:
        reason = LossReason.UNREACHABLE if error.retryable else LossReason.FAILED
    return Loss(index=wanted.index, record=wanted.record, reason=reason, error=error)
