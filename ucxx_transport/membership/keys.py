"""Where everything lies in the store, below its namespace.

| key                             | value                                              | lease         |
|---------------------------------|----------------------------------------------------|---------------|
| `sources/<worker id>`           | `SourceRecord`: who serves which ring, and where   | the worker's  |
| `epochs/<worker id>`            | the last epoch given to this worker id, in digits  | –             |
| `groups/<group>/view`           | `GroupView`: the members at one epoch              | –             |
| `groups/<group>/members/<rank>` | `MemberRecord`: a rank that is alive               | the member's  |
| `groups/<group>/policy`         | the policy version that the group trains, in digits | –            |

Ids are percent-encoded, so that one with a "/" stays one segment of its key.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, unquote

SOURCES: Final = "sources/"
EPOCHS: Final = "epochs/"
GROUPS: Final = "groups/"


def source_key(worker_id: str) -> str:
    """The key of a worker's record."""
    return SOURCES + quote(worker_id, safe="")


def worker_id_of(key: str) -> str:
    """The worker whose record lies at `key`, which begins with `SOURCES`."""
    return unquote(key.removeprefix(SOURCES))


def epoch_key(worker_id: str) -> str:
    """The key of a worker id's last epoch."""
    return EPOCHS + quote(worker_id, safe="")


def group_prefix(group: str) -> str:
    """What the keys of a group begin with."""
    return f"{GROUPS}{quote(group, safe='')}/"


def view_key(group: str) -> str:
    """The key of a group's view."""
    return f"{group_prefix(group)}view"


def policy_key(group: str) -> str:
    """The key of a group's policy version."""
    return f"{group_prefix(group)}policy"


def members_prefix(group: str) -> str:
    """What the keys of a group's members begin with."""
    return f"{group_prefix(group)}members/"


def member_key(group: str, rank: int) -> str:
    """The key of a member."""
    return f"{members_prefix(group)}{rank}"


def rank_of(key: str, group: str) -> int | None:
    """The rank whose member key it is; None: it is another key of the group, or none of a member."""
    rank = key.removeprefix(members_prefix(group))
    return int(rank) if rank != key and rank.isascii() and rank.isdecimal() else None
