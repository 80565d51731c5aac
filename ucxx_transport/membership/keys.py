"""Which keys there are, what each may be, and the bytes that a store knows it by, below a namespace.

| key                             | value                                              | lease         |
|---------------------------------|----------------------------------------------------|---------------|
| `sources/<worker id>`           | `SourceRecord`: who serves which ring, and where   | the worker's  |
| `epochs/<worker id>`            | the last epoch given to this worker id, in digits  | –             |
| `groups/<group>/view`           | `GroupView`: the members at one epoch              | –             |
| `groups/<group>/members/<rank>` | `MemberRecord`: a rank that is alive               | the member's  |
| `groups/<group>/policy`         | the policy version that the group trains, in digits | –            |

Ids are percent-encoded, so that one with a "/" stays one segment of its key. A key of the namespace `job` lies in the
store at `/ucxx_transport/job/<key>`, in UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from ucxx_transport.errors import ConfigError

SOURCES: Final = "sources/"
EPOCHS: Final = "epochs/"
GROUPS: Final = "groups/"
ROOT: Final = "/ucxx_transport/"
MAX_KEY_BYTES: Final = 4096
MAX_VALUE_BYTES: Final = 1 << 20


def source_key(worker_id: str) -> str:
    """The key of a worker's record."""
    return SOURCES + quote(worker_id, safe="")


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


@dataclass(frozen=True, slots=True)
class Namespace:
    """The keys below one namespace, named as `StoreConfig.namespace`."""

    name: str

    @property
    def root(self) -> bytes:
        """What all stored keys of the namespace begin with."""
        return f"{ROOT}{self.name}/".encode()

    def stored(self, key: str) -> bytes:
        """The bytes that a store knows `key` by, or a ConfigError: empty, too long, not text, or with a leading "/"."""
        if key == "":
            raise ConfigError("key = '': a key has at least one character", field="key")
        return self.root + _encoded(key, "key")

    def bounds(self, prefix: str) -> tuple[bytes, bytes]:
        """The stored keys with `prefix`: from the first of these on, below the second. Errors as `stored`."""
        first = self.root + _encoded(prefix, "prefix")
        return first, _successor(first)

    def key(self, stored: bytes) -> str:
        """The key that a store knows by these bytes, which begin with `root`."""
        return stored[len(self.root) :].decode(errors="surrogateescape")


def _encoded(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise ConfigError(f"{what} must be text, not {type(text).__name__}", field=what)
    if text.startswith("/"):
        raise ConfigError(f"{what} = {text!r}: leave out the leading '/', it lies below the namespace", field=what)
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} = {text!r}: {error.reason}", field=what) from None
    if len(encoded) > MAX_KEY_BYTES:
        raise ConfigError(f"{what} has {len(encoded)} bytes: at most {MAX_KEY_BYTES}", field=what)
    return encoded


def _successor(prefix: bytes) -> bytes:
    """The first bytes after all that begin with `prefix`, which ends with a byte of UTF-8 and so below 0xFF."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
