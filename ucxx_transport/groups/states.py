"""The states of a rank in a group: events, one table of transitions, and the one function that makes a new state.

| from     | event        | to       | meaning                                                                       |
|----------|--------------|----------|-------------------------------------------------------------------------------|
| ISOLATED | `ADMIT`      | JOINING  | it has published itself, and the view has a seat for it                       |
| GONE     | `ADMIT`      | JOINING  | a new incarnation of it has                                                   |
| JOINING  | `ACTIVATE`   | ACTIVE   | all live active members, and the rank itself, have acknowledged that it joins |
| JOINING  | `DEACTIVATE` | INACTIVE | `deactivate_ranks`, before it was active                                      |
| ACTIVE   | `DEACTIVATE` | INACTIVE | `deactivate_ranks`                                                            |
| INACTIVE | `RECALL`     | JOINING  | `activate_ranks`: it joins once more, and all acknowledge it                  |
| JOINING  | `LEAVE`      | GONE     | it left, or gave up waiting                                                   |
| ACTIVE   | `LEAVE`      | GONE     | it left                                                                       |
| INACTIVE | `LEAVE`      | GONE     | it left                                                                       |
| JOINING  | `LOSE`       | GONE     | its lease ended: it died, or was cut off from the store for as long           |
| ACTIVE   | `LOSE`       | GONE     | the same                                                                      |
| INACTIVE | `LOSE`       | GONE     | the same                                                                      |
| JOINING  | `DROP`       | GONE     | its lease lives, but it did not acknowledge in time that a rank joins         |
| ACTIVE   | `DROP`       | GONE     | the same                                                                      |

JOINING awaits activation. An INACTIVE rank's acknowledgement is never waited for, so it is never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from ucxx_transport.errors import RegistryError


class RankState(Enum):
    """What a rank is to its group. The values are part of the stored view."""

    ISOLATED = "isolated"
    JOINING = "joining"
    ACTIVE = "active"
    INACTIVE = "inactive"
    GONE = "gone"

    @property
    def is_seated(self) -> bool:
        """Whether the rank is in the group, active or not."""
        return self in _SEATED


class RankEvent(Enum):
    """What can happen to a rank. The values are part of the stored view."""

    ADMIT = "admit"
    ACTIVATE = "activate"
    DEACTIVATE = "deactivate"
    RECALL = "recall"
    LEAVE = "leave"
    LOSE = "lose"
    DROP = "drop"


_SEATED: Final = frozenset({RankState.JOINING, RankState.ACTIVE, RankState.INACTIVE})

TRANSITIONS: Final[Mapping[tuple[RankState, RankEvent], RankState]] = MappingProxyType(
    {
        (RankState.ISOLATED, RankEvent.ADMIT): RankState.JOINING,
        (RankState.GONE, RankEvent.ADMIT): RankState.JOINING,
        (RankState.JOINING, RankEvent.ACTIVATE): RankState.ACTIVE,
        (RankState.JOINING, RankEvent.DEACTIVATE): RankState.INACTIVE,
        (RankState.ACTIVE, RankEvent.DEACTIVATE): RankState.INACTIVE,
        (RankState.INACTIVE, RankEvent.RECALL): RankState.JOINING,
        (RankState.JOINING, RankEvent.LEAVE): RankState.GONE,
        (RankState.ACTIVE, RankEvent.LEAVE): RankState.GONE,
        (RankState.INACTIVE, RankEvent.LEAVE): RankState.GONE,
        (RankState.JOINING, RankEvent.LOSE): RankState.GONE,
        (RankState.ACTIVE, RankEvent.LOSE): RankState.GONE,
        (RankState.INACTIVE, RankEvent.LOSE): RankState.GONE,
        (RankState.JOINING, RankEvent.DROP): RankState.GONE,
        (RankState.ACTIVE, RankEvent.DROP): RankState.GONE,
    }
)


def advance(state: RankState, event: RankEvent) -> RankState:
    """The state after `event`: the only maker of states. A RegistryError: the table has no such transition."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise RegistryError(f"a rank cannot {event.name} while {state.name}", state=state.name, event=event.name)
    return after
