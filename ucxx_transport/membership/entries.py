"""Entries: which keys there are, what each may hold, the bytes that a store knows it by, and how a store shows both.

| key                             | value                                               | changed by                  |
|---------------------------------|-----------------------------------------------------|-----------------------------|
| `sources/<worker id>`           | `SourceRecord`: who serves which ring, and where    | the worker, under its lease |
| `epochs/<worker id>`            | the last epoch given to this worker id, in digits   | the worker                  |
| `groups/<group>/view`           | `GroupView`: the members at one epoch               | any live member             |
| `groups/<group>/members/<rank>` | `MemberRecord`: a rank that is alive                | the rank, under its lease   |
| `groups/<group>/policy`         | the policy version that the group trains, in digits | any member                  |

What has no lease stays, and is changed by compare-and-swap. Ids are percent-encoded, so that one with a "/" stays one
segment of its key. A key of the namespace `job` lies in the store at `/ucxx_transport/job/<key>`, in UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote

from ucxx_transport.errors import ConfigError

SOURCES: Final = "sources/"
MAX_KEY_BYTES: Final = 4096
MAX_VALUE_BYTES: Final = 1 << 20


def source_key(worker_id: str) -> str:
    """The key of a worker's record."""
    return SOURCES + quote(worker_id, safe="")


def epoch_key(worker_id: str) -> str:
    """The key of a worker id's last epoch."""
    return f"epochs/{quote(worker_id, safe='')}"


class GroupKeys:
    """The keys of a group: all begin with `prefix`."""

    def __init__(self, group: str) -> None:
        self.prefix = f"groups/{quote(group, safe='')}/"
        self.view, self.policy, self._members = (self.prefix + name for name in ("view", "policy", "members/"))

    def member(self, rank: int) -> str:
        """The key of a member."""
        return f"{self._members}{rank}"

    def rank_of(self, key: str) -> int | None:
        """The rank whose member key it is; None: it is another key of the group, or none of a member."""
        rank = key.removeprefix(self._members)
        return int(rank) if rank != key and rank.isascii() and rank.isdecimal() else None


class Namespace:
    """The keys below one namespace, `StoreConfig.namespace`: as stored, they all begin with `root`."""

    def __init__(self, name: str) -> None:
        self.root = f"/ucxx_transport/{name}/".encode()

    def stored(self, key: str) -> bytes:
        """The bytes that a store knows a key by; a ConfigError: empty, too long, not text, or with a leading "/"."""
        if key == "":
            raise ConfigError("key = '': a key has at least one character", field="key")
        return self.root + _encoded(key, "key")

    def bounds(self, prefix: str) -> tuple[bytes, bytes]:
        """The stored keys with `prefix`: from the first of these on, below the second. Errors as `stored`."""
        first = self.root + _encoded(prefix, "prefix")
        return first, first[:-1] + bytes([first[-1] + 1])  # it ends with a byte of UTF-8, and so below 0xFF

    def key(self, stored: bytes) -> str:
        """The key that a store knows by these bytes."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What keeps keys alive as long as it is renewed every `ttl_s` seconds: not less than asked for, maybe more."""

    lease_id: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key, with the revision of its last change, and the lease it dies with; None: it stays."""

    key: str
    value: bytes
    revision: int
    lease_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys below a prefix, in order, at one moment.

    Attributes:
        revision: the store's, then: a watch after it misses nothing and repeats nothing.
        identity: a random word that the store's data keep: another one later means that the data were wiped. "" in a
            store that has none yet, and to which this user may give none.
    """

    revision: int
    entries: tuple[Entry, ...]
    identity: str

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Entry):
    """One change of one key; deleted, by hand or with its lease, it has no value and no lease from then on."""

    kind: Literal["put", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All changes of one revision below a watch's prefix: a watch after it goes on where this one was cut off."""

    revision: int
    events: tuple[Event, ...]
