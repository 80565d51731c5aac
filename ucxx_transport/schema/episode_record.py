"""EpisodeRecord: what a rollout worker reports of one episode, as plain JSON- and msgpack-safe values.

As a dict it has the record's fields and `ucxx_transport`, the version of the form: by that key a queue's other messages
are told apart. `ref` is `SlotRef.to_dict()`, `rewards` is {"sum", "mean", "min", "max"}.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, NamedTuple, TypeAlias

from ucxx_transport.errors import ConfigError, ProtocolError, StaleSlotError
from ucxx_transport.schema import wire_form
from ucxx_transport.schema.slot_ref import MAX_SLOT_REF_BYTES, SlotRef
from ucxx_transport.schema.wire_form import MARK, WIRE_VERSION, checked_meta, is_plain_text, is_unsigned, pack, refuse

MAX_WORKER_ID_CHARS = 128
MAX_REASON_CHARS = 1000

_SIGNS = (0, -1)  # what is left of an int of 64 bits but its sign
_MAX_DOUBLE: Final = sys.float_info.max


class RewardSummary(NamedTuple):
    """Rewards of one episode, finite floats: `least` and `most` are of one step."""

    total: float
    mean: float
    least: float
    most: float

    def to_dict(self) -> dict[str, float]:
        """Under the keys "sum", "mean", "min" and "max"."""
        total, mean, least, most = self
        return {"sum": total, "mean": mean, "min": least, "max": most}

    @classmethod
    def from_dict(cls, data: Any) -> RewardSummary:
        """Rebuild from `to_dict`'s form; a ProtocolError where it is malformed."""
        try:
            values = _rewards_of(data if len(data) == len(_REWARDS) else ())
        except (KeyError, TypeError, IndexError):
            values = _rewards_of(wire_form.take_fields(data, "reward summary", required=_REWARDS))
        total, mean, least, most = values
        if (
            type(total) is type(mean) is type(least) is type(most) is float
            and (total + mean + least + most) * 0.0 == 0.0  # where one is not finite, that is no number
        ):
            return _make(cls, values)
        if all(type(value) in (int, float) and abs(value) <= _MAX_DOUBLE for value in values):
            return cls(*map(float, values))  # in many languages 6.0 is written as 6
        raise ProtocolError("rewards must be finite floats", field="rewards")


_REWARDS: Final = ("sum", "mean", "min", "max")
_rewards_of: Final[Callable[[Any], tuple[Any, ...]]] = operator.itemgetter(*_REWARDS)
_make: Final[Callable[..., RewardSummary]] = tuple.__new__


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode, as the control plane sees it; a ConfigError names the field that is out of its bounds.

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
        if not is_plain_text(self.worker_id, MAX_WORKER_ID_CHARS):
            refuse("worker_id", self.worker_id, f"1 to {MAX_WORKER_ID_CHARS} printable characters")
        if not is_unsigned(self.sequence, 64):
            refuse("sequence", self.sequence, "an u64")
        if self.ref is not None and not isinstance(self.ref, SlotRef):
            refuse("ref", self.ref, "a SlotRef")
        dropped = self.dropped
        if dropped is not None and (type(dropped) is not str or not 0 < len(dropped) <= MAX_REASON_CHARS):
            refuse("dropped", dropped, f"1 to {MAX_REASON_CHARS} characters")
        if self.episode_length is not None and not is_unsigned(self.episode_length, 64):
            refuse("episode_length", self.episode_length, "an u64")
        rewards = self.rewards
        if rewards is not None and not (
            type(rewards) is RewardSummary and all(type(value) is float and isfinite(value) for value in rewards)
        ):
            refuse("rewards", rewards, "a RewardSummary of finite floats")
        _check_policy_version(self.policy_version)
        if (self.ref is None) == (self.dropped is None):
            raise ConfigError("a record must have a ref, or else the reason why it was dropped", field="dropped")

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
        """The record of a payload that was taken, from its reference and its envelope; errors as `from_dict`."""
        return cls.from_dict({**envelope, "ref": ref, "dropped": None})

    @classmethod
    def from_dict(cls, data: Any) -> EpisodeRecord:
        """Rebuild a record from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: it is malformed or of another version; the message and `facts["field"]` name the field.
        """
        try:
            values = _values_of(data if len(data) == _FIELDS else ())
        except (KeyError, TypeError, IndexError):
            values = _values_of(wire_form.take_fields(data, "episode record", required=_KEYS))
        mark, worker_id, sequence, ref, dropped, steps, rewards, version = values
        if mark is not WIRE_VERSION:
            mark, sequence, steps, version = map(wire_form.whole, (mark, sequence, steps, version))
            wire_form.check_version(mark, "episode record")
        if ref is not None and type(ref) is not SlotRef:
            ref = _slot_ref_of(ref)
        if rewards is not None:
            rewards = _summary_of(rewards)
        if (
            type(worker_id) is str
            and 0 < len(worker_id) <= MAX_WORKER_ID_CHARS
            and worker_id.isprintable()
            and type(sequence) is int
            and not sequence >> 64  # of a negative number all bits are left
            and (steps is None or (type(steps) is int and not steps >> 64))
            and (version is None or (type(version) is int and version >> 63 in _SIGNS))
            and ref is not None
            and dropped is None
        ):
            record = _Draft()
            record.worker_id, record.sequence, record.ref = worker_id, sequence, ref
            record.dropped, record.episode_length = None, steps
            record.rewards, record.policy_version = rewards, version
            record.__class__ = EpisodeRecord
            made: EpisodeRecord = record
            return made
        values = (worker_id, sequence, ref, dropped, steps, rewards, version)
        with wire_form.untrusted():  # takes it, or names what is wrong
            return cls(**dict(zip(cls.__slots__, values, strict=True)))


_KEYS: Final = (MARK, *EpisodeRecord.__slots__)
_FIELDS: Final = len(_KEYS)
# Made of checked values, not by the constructor: that takes three times as long. A draft is not frozen.
_Draft: Any = wire_form.draft_of(EpisodeRecord)
# Bound once: that takes as long as a call.
_slot_ref_of: Final[Callable[[Any], SlotRef]] = SlotRef.from_dict
_summary_of: Final[Callable[[Any], RewardSummary]] = RewardSummary.from_dict
_values_of: Final[Callable[[Any], tuple[Any, ...]]] = operator.itemgetter(*_KEYS)


def record_envelope(
    *,
    worker_id: str,
    sequence: int,
    episode_length: int | None = None,
    rewards: RewardSummary | None = None,
    policy_version: int | None = None,
    meta: Mapping[str, object] | None = None,
) -> bytes:
    """The envelope of a payload that a rollout worker is to write; a ConfigError: no reference can have this `meta`."""
    ref, summary = dict(checked_meta(meta)[0]) if meta else None, None if rewards is None else rewards.to_dict()
    values = (WIRE_VERSION, worker_id, sequence, ref, None, episode_length, summary, policy_version)
    return pack(dict(zip(_KEYS, values, strict=True)))


def _check_policy_version(version: object) -> None:
    """Refuse, by a ConfigError, what is neither None nor an int of 64 bits."""
    if version is not None and (type(version) is not int or version >> 63 not in _SIGNS):
        refuse("policy_version", version, "an i64")


def as_policy_version(version: Any) -> int | None:
    """A policy version as a record has it: of numpy's integers, and torch's of one element, too; a ConfigError."""
    with suppress(TypeError):
        version = version if isinstance(version, bool) else operator.index(version)
    _check_policy_version(version)
    return version  # type: ignore[no-any-return]  # checked


_REF_KEYS: Final = frozenset({"ring_id", "slot", "generation"})
_PACKED_REF: Final = b"\x9c" + pack(WIRE_VERSION) + b"\xc4\x10"  # an array of 12: the version, 16 bytes
_PACKED_RECORD: Final = b"\x88" + pack(MARK)  # a map of 8
_PYTHONS: Final = (f"{{'{MARK}': ", f'b\'{{"{MARK}"', "{'version': 1, 'ring_id': ", "EpisodeRecord(", "SlotRef(")
_CARRIERS: Final = ("completion", "output")

Reference: TypeAlias = "EpisodeRecord | SlotRef"

Referring: TypeAlias = "Reference | Mapping[str, object] | str | bytes"
"""What a caller may give where a reference is wanted; see `form_of`."""

Form: TypeAlias = "Reference | Mapping[str, object] | bytes | ProtocolError"


def form_of(value: Any) -> Form | None:
    """What in `value` looks like a reference of ours, or why it is none though it does; None where nothing does.

    | `value`                                                              | is                               |
    |----------------------------------------------------------------------|----------------------------------|
    | a record or a reference; its `to_dict()`, packed or as JSON text too; | that record or reference         |
    | the `to_bytes()` of a reference; a memoryview of any bytes above      |                                  |
    | an object or a mapping whose `completion` or `output` is one of these | that of it                       |
    | text that `str` made of one, or that was cut off; a list of these    | refused                          |
    """
    form = _form_of(value)
    if form is None and not isinstance(value, (str, bytes, bytearray, memoryview, list, tuple)):
        for name in _CARRIERS:
            form = _form_of(value.get(name) if isinstance(value, (dict, Mapping)) else getattr(value, name, None))
            if form is not None:
                break
    return form


def reference_of(value: Any) -> Reference | None:
    """The record or reference that is in `value` (see `form_of`), which is not trusted, or None; a ProtocolError."""
    form: Any = form_of(value)
    if isinstance(form, ProtocolError):
        raise form
    if isinstance(form, bytes):
        if form.startswith(_PACKED_REF):
            return SlotRef.from_bytes(form)
        form = wire_form.unpack(form, "episode record", max_bytes=MAX_SLOT_REF_BYTES)
    if isinstance(form, (dict, Mapping)):
        return EpisodeRecord.from_dict(form) if MARK in form else SlotRef.from_dict(form)
    found: Reference | None = form
    return found


def slot_ref_of(value: Any) -> SlotRef:
    """The payload that a caller names, in whatever form (see `form_of`); a ConfigError where it names none.

    A ProtocolError: it is malformed. A StaleSlotError: a record without a payload.
    """
    found = reference_of(value)
    if found is None:
        refuse("ref", value, "a SlotRef or an episode record, as an object, its to_dict() or JSON")
    if isinstance(found, SlotRef):
        return found
    if found.ref is None:
        text = "this record has no payload, because its worker could not write it; go on with the next"
        raise StaleSlotError(text, worker=found.worker_id, sequence=found.sequence, dropped=found.dropped)
    return found.ref


def several(given: Iterable[Any], field: str) -> Iterable[Any]:
    """The argument `field` as it was given; a ConfigError where that is one thing in the place of several."""
    if type(given) is list:
        return given
    are_several = any(hasattr(type(given), name) for name in ("__iter__", "__getitem__"))
    is_one = isinstance(given, (str, bytes, bytearray, memoryview, Mapping))
    if not are_several or is_one or any(_form_of(getattr(given, name, None)) is not None for name in _CARRIERS):
        words = f"{field} must be a list, not {wire_form.describe(given)}; give a list: [{field.removesuffix('s')}]"
        raise ConfigError(words, field=field)
    return given


def _form_of(value: Any) -> Form | None:
    if isinstance(value, (EpisodeRecord, SlotRef)):
        return value
    if isinstance(value, (dict, Mapping)):  # a dict first: an ABC's look takes longer
        return value if MARK in value or value.keys() >= _REF_KEYS else None
    if isinstance(value, memoryview):  # a message's, such as pyzmq's frames have
        value = value.tobytes() if value.nbytes <= MAX_SLOT_REF_BYTES else b""
    if isinstance(value, (bytes, bytearray)):
        if value.startswith((_PACKED_REF, _PACKED_RECORD)):
            return bytes(value)
        value = value.decode(errors="replace") if value.lstrip()[:1] in (b"{", b'"') else ""
    if isinstance(value, str):
        return _form_of_text(value)
    if isinstance(value, (list, tuple)) and value and _form_of(value[0]) is not None:
        return _refusal(value, "records is not one; give each of them by itself")
    return None


def _form_of_text(text: str) -> Form | None:
    if text.startswith(_PYTHONS):
        words = "is Python's text for a record, which cannot be read back; send the dict itself, or json.dumps(record)"
        return _refusal(text, words)
    if not text.lstrip().startswith(("{", '"')) or not (MARK in text or "ring_id" in text):
        return None
    try:
        return _form_of(json.loads(text))  # text again, where it became JSON twice
    except (ValueError, RecursionError):
        if not text.lstrip(" \t\r\n{").startswith(f'"{MARK}":'):
            return None
    words = "begins as a record and is no JSON: it was cut off, or is more than one; send all of json.dumps(record)"
    return _refusal(text, words)


def _refusal(value: object, words: str) -> ProtocolError:
    return ProtocolError(f"{wire_form.describe(value)} {words}", field="episode record")
