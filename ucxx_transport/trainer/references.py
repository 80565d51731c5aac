"""Which of the things that a framework hands about are ours.

| a rollout's output                   | is                                                                |
|--------------------------------------|-------------------------------------------------------------------|
| `EpisodeRecord`, or its `to_dict()`  | ours                                                              |
| `SlotRef`                            | ours: an episode of which only the place is known                 |
| a dict that claims to be a record    | ours, and malformed: `ProtocolError`                              |
| anything else                        | not ours: it passes through untouched                             |

No I/O and no clock.
"""

from __future__ import annotations

from collections.abc import Hashable

from ucxx_transport.errors import ProtocolError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord, is_episode_record
from ucxx_transport.trainer.triage import AskedFor


def is_ours(output: object) -> bool:
    """Whether `output` refers to an episode of a ring."""
    return isinstance(output, (EpisodeRecord, SlotRef)) or is_episode_record(output)


def record_of(output: object) -> AskedFor:
    """The episode that an output of ours refers to, or why that cannot be said."""
    if isinstance(output, EpisodeRecord):
        return output
    if isinstance(output, SlotRef):
        return EpisodeRecord(worker_id=output.ring_name, sequence=output.generation, ref=output)
    try:
        return EpisodeRecord.from_dict(output)
    except ProtocolError as error:
        return error


def key_of(output: object, record: AskedFor) -> Hashable:
    """By what an output is found again: its payload's name; the object itself where there is none."""
    if isinstance(record, EpisodeRecord) and record.ref is not None:
        return record.ref.name
    return id(output)
