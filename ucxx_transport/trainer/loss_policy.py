"""The policy of a batch: which outputs are episodes of ours, which are worth fetching, and what a failed fetch means.

An episode is lost for a `LossReason`. One whose fetch failed with a retryable error is fetched again while there are
rounds and time; any other error costs it at once. What is lost as `failed`, `timeout` or `unreachable` may still lie in
its slot: it is discarded too, unless `discard_lost` is off.

| a batch                                                                          | is                           |
|----------------------------------------------------------------------------------|------------------------------|
| nothing came; a token, a release or a setting is wrong                           | raised: trying cannot help   |
| `unreachable_batches` in a row without an answer of a source that never answered | raised, with where it is     |
| as many in a row of which nothing came at all                                    | raised, for the first source |
| of one episode, asked for by itself: other sources that have answered live on    | the same                     |
| any other                                                                        | trained on, as far as it came|
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ucxx_transport import errors
from ucxx_transport.errors import ConfigError, DeadlineExceededError, ProtocolError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import MAX_WORKER_ID_CHARS, EpisodeRecord, form_of, reference_of
from ucxx_transport.schema.wire_form import describe

MOST_SOURCES: Final = 4096  # that are remembered: those heard of, or missed, last

AskedFor: TypeAlias = EpisodeRecord | TransportError  # one episode of a batch, or why its record could not be read


class LossReason(enum.Enum):
    """Why an episode of a batch is not in it."""

    MALFORMED = "malformed"  # its record cannot be read
    DROPPED = "dropped"  # by its worker
    TOO_OLD = "too_old"  # of weights more than `max_staleness` versions old: it is discarded
    DUPLICATE = "duplicate"  # the batch has its payload already; or `StaleSlotError`: delivered before, or discarded
    STALE = "stale"  # `StaleSlotError`: the slot was used again, or its ring is gone
    FAILED = "failed"  # another error that trying again cannot help
    TIMEOUT = "timeout"  # `DeadlineExceededError` in the last round that there was time for
    UNREACHABLE = "unreachable"  # another retryable error, likewise
    CLOSED = "closed"  # asked for and not taken when the feed was closed: counted, and reported to no hook


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

    @property
    def worker(self) -> str | None:
        """Who played it; None when its record does not even say that."""
        return self.record.worker_id if self.record is not None else _said_by(self.error, "worker_id")

    @property
    def sequence(self) -> int | None:
        """Its number among its worker's episodes; None likewise."""
        return self.record.sequence if self.record is not None else _said_by(self.error, "sequence")

    @property
    def host(self) -> str | None:
        """The address that its reference names."""
        return None if self.record is None or self.record.ref is None else self.record.ref.host


def _said_by(error: TransportError | None, key: str) -> Any:
    return None if error is None else error.facts.get(key)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One episode to fetch."""

    index: int
    record: EpisodeRecord
    ref: SlotRef


def sort_out(
    records: Mapping[int, AskedFor], *, policy_version: int | None = None, max_staleness: int | None = None
) -> tuple[list[Wanted], list[Loss]]:
    """What to fetch of a batch, by places, and what is lost already, each in the batch's order.

    With `max_staleness`, an episode that does not name its version is as old as can be.
    """
    wanted: list[Wanted] = []
    losses: list[Loss] = []
    seen: set[tuple[bytes, int, int]] = set()
    oldest = None if max_staleness is None or policy_version is None else policy_version - max_staleness
    for index, record in records.items():
        if not isinstance(record, EpisodeRecord):
            losses.append(Loss(index=index, record=None, reason=LossReason.MALFORMED, error=record))
            continue
        error: ConfigError | None = None
        if record.ref is None:
            reason = LossReason.DROPPED
        elif record.ref.name in seen:
            reason = LossReason.DUPLICATE
        elif oldest is not None and (record.policy_version is None or record.policy_version < oldest):
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
    """Whether `output` looks like a reference of ours to an episode, in any of the forms that `form_of` knows."""
    return form_of(output) is not None


def record_of(output: object) -> AskedFor:
    """The episode that an output refers to, or why that cannot be said; what says so already is taken as it is."""
    if isinstance(output, EpisodeRecord | TransportError):
        return output
    try:
        found = reference_of(output)
        if found is None:
            return ProtocolError(f"{describe(output)} is no episode record and no SlotRef", field="episode record")
    except ProtocolError as error:
        if isinstance(output, Mapping):  # what can be read of it says whose it is
            worker, sequence = output.get("worker_id"), output.get("sequence")
            if type(worker) is str:
                error.facts.setdefault("worker_id", worker[:MAX_WORKER_ID_CHARS])
            if type(sequence) is int and not sequence >> 64:
                error.facts.setdefault("sequence", sequence)
        return error
    if isinstance(found, EpisodeRecord):
        return found
    return EpisodeRecord(worker_id=found.ring_name, sequence=found.generation, ref=found)


def key_of(output: object, record: AskedFor) -> Hashable:
    """By what an output is found again: its payload's name; the object itself where there is none."""
    if isinstance(record, EpisodeRecord) and record.ref is not None:
        return record.ref.name
    return id(output)


_Source: TypeAlias = "tuple[str, str | None]"  # a worker, and where it is


class Sources:
    """Which sources have answered, batch by batch, and when their silence is a reason to stop.

    A source that has answered before and is silent beside others has died: its episodes are all that this costs.
    Without `unreachable_batches` silence is no reason; `in_a_batch` of the batches here count as one of those.
    """

    def __init__(self, host_id: str, unreachable_batches: int | None, in_a_batch: int = 1) -> None:
        self._host_id = host_id
        self._most = None if unreachable_batches is None else unreachable_batches * in_a_batch
        self._answered: dict[_Source, int] = {}
        self._silent: dict[_Source, int] = {}

    def hint_for(self, loss: Loss) -> str | None:
        """What may be in the way of a source that does not answer; None where nothing is known."""
        ref = None if loss.record is None else loss.record.ref
        if not _is_silence(loss) or ref is None or ref.host is None or ref.host_id == self._host_id:
            return None
        if ref.host in ("localhost", "::1") or ref.host.startswith("127."):
            return "loopback of another host? set ServerConfig(host=…) to an address that this host reaches"
        return "a firewall? both directions must be open: docs/operations.md#firewalls"

    def problem_in(
        self, came: Sequence[AskedFor], losses: Sequence[Loss], *, alone: bool = False
    ) -> TransportError | None:
        """Why the trainer should stop after a batch, or an episode asked for `alone`: an error of its losses' kind."""
        if not came:
            for loss in losses:
                if _cannot_heal(loss):
                    return _stop(loss, f"{len(losses)} of {len(losses)} episodes of a batch are lost", losses)
        answered = {
            (record.worker_id, record.ref.host) for record in came if isinstance(record, EpisodeRecord) and record.ref
        }
        self._answered, self._silent = {**self._answered}, {**self._silent}  # of a copy: see `Fetches.count`
        for source in answered:
            remember(self._answered, source)
        silent: dict[_Source, Loss] = {}
        for loss in losses:
            if loss.record is not None and loss.error is not None and loss.reason is not LossReason.TOO_OLD:
                source = (loss.record.worker_id, loss.host)
                if _is_silence(loss):
                    silent.setdefault(source, loss)
                else:
                    answered.add(source)
        for source in [each for each in self._silent if each in answered or (came and each in self._answered)]:
            del self._silent[source]
        others_live = came or (alone and len(self._answered) > 1)
        excused = {*answered, *self._answered} if others_live else answered
        return self._count({source: loss for source, loss in silent.items() if source not in excused}, losses)

    def _count(self, silent: Mapping[_Source, Loss], losses: Sequence[Loss]) -> TransportError | None:
        """Count a batch in which these sources did not answer."""
        problem: TransportError | None = None
        for source, loss in silent.items():
            count = self._silent.get(source, 0) + 1
            remember(self._silent, source, count)
            if self._most is not None and count >= self._most and problem is None:
                del self._silent[source]  # it may have as many more
                words = f"nothing came in {count} batches in a row"
                problem = _stop(loss, words, losses, self.hint_for(loss))
        return problem


def remember(memory: dict[Any, Any], source: Hashable, value: float = 0) -> None:
    """Keep a source as the newest of at most `MOST_SOURCES`."""
    memory.pop(source, None)
    memory[source] = value
    if len(memory) > MOST_SOURCES:
        del memory[next(iter(memory))]


def _stop(loss: Loss, words: str, losses: Sequence[Loss], hint: str | None = None) -> TransportError:
    error = loss.error
    assert error is not None
    worker = "an unknown worker" if loss.worker is None else f"worker {loss.worker!r}"
    where = worker if loss.host is None else f"{worker} at {loss.host}"
    own = {"worker": loss.worker, "host": loss.host, "sequence": loss.sequence, "lost": len(losses)}
    more = "" if hint is None or "loopback" in error.message else f"; {hint}"
    stop = type(error)(f"{words}: {where}: {error.message}{more}", **{**error.facts, **own})
    stop.__cause__ = error
    return stop


def _cannot_heal(loss: Loss) -> bool:
    """Whether another try, of this episode or of another one there, fails alike until somebody changes something."""
    error = loss.error
    if isinstance(error, ProtocolError):
        return "version" in error.facts
    return isinstance(error, errors.AuthenticationError | ConfigError)


def _is_silence(loss: Loss) -> bool:
    """Whether its source did not answer, for no reason that is known."""
    error = loss.error
    if isinstance(error, errors.PeerLostError):
        return error.facts.get("reason") != "removed"
    return isinstance(error, DeadlineExceededError)
