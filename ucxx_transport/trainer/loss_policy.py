"""The policy of a batch: which outputs are episodes of ours, which are worth fetching, and what a failed fetch means.

| episode                                                     | becomes                          |
|-------------------------------------------------------------|----------------------------------|
| a record that cannot be read                                | lost: `malformed`                |
| dropped by its worker                                       | lost: `dropped`                  |
| of weights more than `max_staleness` versions old           | lost: `too_old`, discarded       |
| a payload that the batch has already                        | lost: `duplicate`                |
| any other                                                   | is fetched                       |

| a fetch that failed with                                    | becomes                          |
|-------------------------------------------------------------|----------------------------------|
| `StaleSlotError`: delivered before, or discarded            | lost: `duplicate`, at once       |
| `StaleSlotError`: the slot was used again, or its ring gone | lost: `stale`, at once           |
| another error that trying again cannot help                 | lost: `failed`, at once          |
| a retryable error, while there are rounds and time          | is fetched again                 |
| `DeadlineExceededError`, after that                         | lost: `timeout`                  |
| another retryable error, after that                         | lost: `unreachable`              |

What is lost as `failed`, `timeout` or `unreachable` may still lie in its slot: it is discarded too, unless
`discard_lost` is off.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ucxx_transport.errors import ConfigError, DeadlineExceededError, ProtocolError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord, reader_of
from ucxx_transport.schema.wire_form import describe

AskedFor: TypeAlias = EpisodeRecord | TransportError
"""One episode of a batch, or why its record could not be read."""


class LossReason(enum.Enum):
    """Why an episode of a batch is not in it."""

    MALFORMED = "malformed"
    DROPPED = "dropped"
    TOO_OLD = "too_old"
    DUPLICATE = "duplicate"
    STALE = "stale"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    CLOSED = "closed"
    """Asked for and not taken when the feed was closed: counted, and reported to no hook."""


_MAY_BE_THERE = frozenset({LossReason.TOO_OLD, LossReason.FAILED, LossReason.TIMEOUT, LossReason.UNREACHABLE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One episode that is not in its batch.

    Attributes:
        index: its place in what was asked for.
        record: the episode; None when its record was malformed.
        reason: why.
        error: what the last try raised, or what is wrong with the record; None where its reason says it all.
    """

    index: int
    record: EpisodeRecord | None
    reason: LossReason
    error: TransportError | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """One episode to fetch."""

    index: int
    record: EpisodeRecord
    ref: SlotRef


def sort_out(
    records: Sequence[object], *, policy_version: int | None = None, max_staleness: int | None = None
) -> tuple[list[Wanted], list[Loss]]:
    """What to fetch of a batch, and what is lost already, each in the batch's order.

    With `max_staleness`, an episode that does not name its version is as old as can be.
    """
    wanted: list[Wanted] = []
    losses: list[Loss] = []
    seen: set[tuple[bytes, int, int]] = set()
    for index, asked in enumerate(records):
        record = asked if isinstance(asked, (EpisodeRecord, TransportError)) else record_of(asked)
        if not isinstance(record, EpisodeRecord):
            losses.append(Loss(index=index, record=None, reason=LossReason.MALFORMED, error=record))
            continue
        error: ConfigError | None = None
        if record.ref is None:
            reason = LossReason.DROPPED
        elif record.ref.name in seen:
            reason = LossReason.DUPLICATE
        elif _too_old(record, policy_version, max_staleness):
            reason = LossReason.TOO_OLD
            if record.policy_version is None:
                error = ConfigError(
                    f"max_staleness = {max_staleness}, and worker {record.worker_id!r} did not say of which "
                    "weights its episode is: give its writer's write policy_version=",
                    field="policy_version",
                    value=None,
                )
        else:
            seen.add(record.ref.name)
            wanted.append(Wanted(index, record, record.ref))
            continue
        losses.append(Loss(index=index, record=record, reason=reason, error=error))
    return wanted, losses


def discardable_of(losses: Sequence[Loss], *, discard_lost: bool = True) -> list[SlotRef]:
    """Payloads that are not fetched and may be there: too old, and with `discard_lost` those that could not be."""
    reasons = _MAY_BE_THERE if discard_lost else {LossReason.TOO_OLD}
    return [loss.record.ref for loss in losses if loss.reason in reasons and loss.record and loss.record.ref]


def _too_old(record: EpisodeRecord, policy_version: int | None, max_staleness: int | None) -> bool:
    if max_staleness is None or policy_version is None:
        return False
    return record.policy_version is None or policy_version - record.policy_version > max_staleness


def loss_of(wanted: Wanted, error: TransportError) -> Loss:
    """What a fetch that failed with this, and is not tried again, means."""
    if isinstance(error, StaleSlotError):
        had_it = error.facts.get("delivered") == wanted.ref.generation
        reason = LossReason.DUPLICATE if had_it else LossReason.STALE
    elif isinstance(error, DeadlineExceededError):
        reason = LossReason.TIMEOUT
    else:
        reason = LossReason.UNREACHABLE if error.retryable else LossReason.FAILED
    return Loss(index=wanted.index, record=wanted.record, reason=reason, error=error)


def is_ours(output: object) -> bool:
    """Whether `output` looks like a reference of ours to an episode, in any of the forms that `reader_of` knows."""
    return reader_of(output) is not None


def record_of(output: object) -> AskedFor:
    """The episode that an output refers to, or why that cannot be said."""
    try:
        reader = reader_of(output)
        if reader is None:
            return ProtocolError(f"{describe(output)} is no episode record and no SlotRef", field="episode record")
        found = reader(output)
    except ProtocolError as error:
        return error
    if isinstance(found, EpisodeRecord):
        return found
    return EpisodeRecord(worker_id=found.ring_name, sequence=found.generation, ref=found)


def key_of(output: object, record: AskedFor) -> Hashable:
    """By what an output is found again: its payload's name; the object itself where there is none."""
    if isinstance(record, EpisodeRecord) and record.ref is not None:
        return record.ref.name
    return id(output)
