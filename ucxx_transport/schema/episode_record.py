"""EpisodeRecord: what a rollout worker reports of one episode, as plain JSON- and msgpack-safe values.

| key            | value                                                                         |
|----------------|-------------------------------------------------------------------------------|
| ucxx_transport | 1: this dict is one of ours, and its format's version                         |
| worker_id      | 1-128 printable characters                                                    |
| sequence       | u64: the worker's count of episodes, dropped ones too                         |
| ref            | `SlotRef.to_dict()`, or null when the episode was dropped                     |
| dropped        | null, or why: the error's class and words                                     |
| episode_length | null, or steps                                                                |
| rewards        | null, or {"sum", "mean", "min", "max"}: finite floats                         |
| policy_version | null, or i64: the weights that it was played with                             |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from operator import itemgetter
from typing import Any, Final

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.envelope import MARK, checked_meta
from ucxx_transport.schema.slot_ref import SlotRef
from ucxx_transport.schema.wire_form import (
    WIRE_VERSION,
    check_version,
    describe,
    draft_of,
    is_plain_text,
    is_unsigned,
    pack,
    take_fields,
)

MAX_WORKER_ID_CHARS = 128
MAX_REASON_CHARS = 1000

_KEYS = (MARK, "worker_id", "sequence", "ref", "dropped", "episode_length", "rewards", "policy_version")
_MAX_I64 = 1 << 63
_REWARD_KEYS = ("sum", "mean", "min", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSummary:
    """Rewards of one episode.

    Attributes:
        total: their sum.
        mean: total over their number.
        least: of one step.
        most: of one step.
    """

    total: float
    mean: float
    least: float
    most: float

    def __post_init__(self) -> None:
        """Check that all are finite: JSON has no others."""
        for name, value in zip(_REWARD_KEYS, (self.total, self.mean, self.least, self.most), strict=True):
            if type(value) is not float or not isfinite(value):
                raise ConfigError(f"rewards.{name} must be a finite float, not {describe(value)}", field="rewards")

    def to_dict(self) -> dict[str, float]:
        """Under the keys "sum", "mean", "min" and "max"."""
        return {"sum": self.total, "mean": self.mean, "min": self.least, "max": self.most}

    @classmethod
    def from_dict(cls, data: Any) -> RewardSummary:
        """Rebuild from `to_dict`'s form; a ProtocolError where it is malformed."""
        try:
            total, mean, least, most = _rewards_of(data)
            # a number that is not finite makes the sum one, and that times 0 is not 0
            if (
                len(data) == 4
                and (total + mean + least + most) * 0.0 == 0.0
                and type(total) is type(mean) is type(least) is type(most) is float
            ):
                summary = _DraftSummary()
                summary.total, summary.mean, summary.least, summary.most = total, mean, least, most
                summary.__class__ = RewardSummary
                made: RewardSummary = summary
                return made
        except (KeyError, TypeError, IndexError, OverflowError):
            pass  # said below
        form = take_fields(data, "reward summary", required=_REWARD_KEYS)
        try:
            return cls(**dict(zip(cls.__slots__, _rewards_of(form), strict=True)))  # takes it, or names what is wrong
        except ConfigError as exc:
            raise ProtocolError(exc.message, **exc.facts) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode, as the control plane sees it.

    Attributes:
        worker_id: who played it.
        sequence: the worker's count of episodes before it, dropped ones too: a gap is a loss on the way.
        ref: where its payload is; None when it was dropped.
        dropped: why there is no payload; None when there is one.
        episode_length: its steps, None when the worker does not know them.
        rewards: a summary, None without rewards.
        policy_version: of the weights it was played with, None when unknown.
    """

    worker_id: str
    sequence: int
    ref: SlotRef | None = None
    dropped: str | None = None
    episode_length: int | None = None
    rewards: RewardSummary | None = None
    policy_version: int | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: one is out of its bounds; `facts["field"]` names it.
        """
        if not is_plain_text(self.worker_id, MAX_WORKER_ID_CHARS):
            raise ConfigError(
                f"worker_id must be 1 to {MAX_WORKER_ID_CHARS} printable characters, not {describe(self.worker_id)}",
                field="worker_id",
            )
        if not is_unsigned(self.sequence, 64):
            raise ConfigError(f"sequence must be an u64, not {describe(self.sequence)}", field="sequence")
        if (self.ref is None) == (self.dropped is None):
            raise ConfigError("a record has either a ref, or the reason why it was dropped", field="dropped")
        if self.ref is not None and not isinstance(self.ref, SlotRef):
            raise ConfigError(f"ref must be a SlotRef, not {describe(self.ref)}", field="ref")
        if self.rewards is not None and not isinstance(self.rewards, RewardSummary):
            raise ConfigError(f"rewards must be a RewardSummary, not {describe(self.rewards)}", field="rewards")
        if self.dropped is not None and (
            type(self.dropped) is not str or not 0 < len(self.dropped) <= MAX_REASON_CHARS
        ):
            raise ConfigError(f"dropped must be 1 to {MAX_REASON_CHARS} characters", field="dropped")
        if self.episode_length is not None and not is_unsigned(self.episode_length, 64):
            raise ConfigError(
                f"episode_length must be an u64, not {describe(self.episode_length)}", field="episode_length"
            )
        check_policy_version(self.policy_version)

    def to_dict(self) -> dict[str, object]:
        """The record as plain values, for any queue."""
        return {
            MARK: WIRE_VERSION,
            "worker_id": self.worker_id,
            "sequence": self.sequence,
            "ref": None if self.ref is None else self.ref.to_dict(),
            "dropped": self.dropped,
            "episode_length": self.episode_length,
            "rewards": None if self.rewards is None else self.rewards.to_dict(),
            "policy_version": self.policy_version,
        }

    @classmethod
    def from_envelope(cls, envelope: Mapping[str, object], ref: SlotRef) -> EpisodeRecord:
        """The record of a payload that was taken, from its envelope, which is not trusted, and its reference.

        Raises:
            ProtocolError: the envelope is no record's.
        """
        record = cls.from_dict({**envelope, "ref": None, "dropped": "not yet known"})
        return replace(record, ref=ref, dropped=None)

    @classmethod
    def from_dict(cls, data: Any) -> EpisodeRecord:
        """Rebuild a record from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: it is malformed or of another version; the message and `facts["field"]` name the field.
        """
        try:
            values = _record_of(data) if len(data) == 8 else None
        except (KeyError, TypeError, IndexError):
            values = None
        if values is None:
            values = _record_of(take_fields(data, "episode record", required=_KEYS))
        mark, worker_id, sequence, ref, dropped, steps, rewards, version = values
        if mark is not WIRE_VERSION:
            check_version(mark, "episode record")
        if ref is not None:
            ref = SlotRef.from_dict(ref)
        if rewards is not None:
            rewards = RewardSummary.from_dict(rewards)
        if (
            type(worker_id) is str
            and 0 < len(worker_id) <= MAX_WORKER_ID_CHARS
            and worker_id.isprintable()
            and type(sequence) is int
            and not sequence >> 64  # of a negative number all bits are left
            and (steps is None or (type(steps) is int and not steps >> 64))
            and (version is None or (type(version) is int and -_MAX_I64 <= version < _MAX_I64))
            and ref is not None
            and dropped is None
        ):
            record = _DraftRecord()
            record.worker_id, record.sequence, record.ref, record.dropped = worker_id, sequence, ref, None
            record.episode_length, record.rewards, record.policy_version = steps, rewards, version
            record.__class__ = EpisodeRecord
            made: EpisodeRecord = record
            return made
        try:
            # takes it, or names what is wrong
            return cls(
                **dict(zip(cls.__slots__, (worker_id, sequence, ref, dropped, steps, rewards, version), strict=True))
            )
        except ConfigError as exc:
            raise ProtocolError(exc.message, **exc.facts) from exc


# Made of checked values, not by the constructors: these take three times as long. Drafts are not frozen.
_rewards_of: Final[Callable[[Any], tuple[Any, ...]]] = itemgetter(*_REWARD_KEYS)
_record_of: Final[Callable[[Any], tuple[Any, ...]]] = itemgetter(*_KEYS)
_DraftSummary: Any = draft_of(RewardSummary)
_DraftRecord: Any = draft_of(EpisodeRecord)


def record_envelope(
    *,
    worker_id: str,
    sequence: int,
    episode_length: int | None = None,
    rewards: RewardSummary | None = None,
    policy_version: int | None = None,
    meta: Mapping[str, object] | None = None,
) -> bytes:
    """The envelope of a payload that a rollout worker is to write: its record, with the reference's meta as `ref`.

    Raises:
        ConfigError: no reference can have this `meta`.
    """
    words = (WIRE_VERSION, worker_id, sequence, dict(checked_meta(meta)[0]) if meta else None, None, episode_length)
    summary = None if rewards is None else rewards.to_dict()
    return pack(dict(zip(_KEYS, (*words, summary, policy_version), strict=True)))


def check_policy_version(version: object) -> None:
    """Refuse what a record cannot say of its weights, by a ConfigError: neither None nor an int of 64 bits."""
    if version is not None and (type(version) is not int or not -(1 << 63) <= version < 1 << 63):
        raise ConfigError(f"policy_version must be an i64, not {describe(version)}", field="policy_version")


def is_episode_record(value: object) -> bool:
    """Whether `value` claims to be a record: `EpisodeRecord.from_dict` then takes it or says what is wrong with it."""
    return isinstance(value, (dict, Mapping)) and MARK in value  # a dict first: an ABC's look takes longer
