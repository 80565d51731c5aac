"""A namespace of a store: what keys and values may be, and the bytes that a store knows them by.

Every key of the namespace `job` lies in the store at `/ucxx_transport/job/<key>`, in UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import ConfigError

__all__ = ["MAX_KEY_BYTES", "MAX_VALUE_BYTES", "Namespace", "checked_expected", "checked_lease_id", "checked_value"]

ROOT: Final = "/ucxx_transport/"
MAX_KEY_BYTES: Final = 4096
MAX_VALUE_BYTES: Final = 1 << 20
_MAX_INT64: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Namespace:
    """The keys below one namespace.

    Attributes:
        name: as `StoreConfig.namespace`.
    """

    name: str

    @property
    def root(self) -> bytes:
        """What all stored keys of the namespace begin with."""
        return f"{ROOT}{self.name}/".encode()

    def stored(self, key: str) -> bytes:
        """The bytes that a store knows `key` by.

        Raises:
            ConfigError: it is no key: empty, with a leading "/", longer than `MAX_KEY_BYTES`, or not text.
        """
        if key == "":
            raise ConfigError("key = '': a key has at least one character", field="key")
        return self.root + _encoded(key, "key")

    def bounds(self, prefix: str) -> tuple[bytes, bytes]:
        """The stored keys that begin with `prefix`: from the first of these on, below the second.

        Raises:
            ConfigError: `prefix` cannot begin a key.
        """
        first = self.root + _encoded(prefix, "prefix")
        return first, _successor(first)

    def key(self, stored: bytes) -> str:
        """The key that a store knows by these bytes, which begin with `root`."""
        return stored[len(self.root) :].decode(errors="surrogateescape")


def checked_value(value: object) -> bytes:
    """A value that a store takes.

    Raises:
        ConfigError: it is not `bytes`, or longer than `MAX_VALUE_BYTES`.
    """
    if not isinstance(value, bytes):
        raise ConfigError(f"value is of {type(value).__name__}: a store keeps bytes", field="value")
    if len(value) > MAX_VALUE_BYTES:
        raise ConfigError(
            f"value has {len(value)} bytes: a store keeps at most {MAX_VALUE_BYTES}", field="value", nbytes=len(value)
        )
    return value


def checked_lease_id(lease_id: object) -> int:
    """A number that a lease can have.

    Raises:
        ConfigError: it is none: a `Lease.lease_id` is wanted.
    """
    if isinstance(lease_id, bool) or not isinstance(lease_id, int) or not 0 < lease_id <= _MAX_INT64:
        raise ConfigError(f"lease_id = {lease_id!r}: not the number of a lease", field="lease_id")
    return lease_id


def checked_expected(expected: object) -> int | None:
    """A revision that a key can be expected to have; 0: none; None: any.

    Raises:
        ConfigError: it is no revision.
    """
    if expected is None:
        return None
    if isinstance(expected, bool) or not isinstance(expected, int) or not 0 <= expected <= _MAX_INT64:
        raise ConfigError(f"expected = {expected!r}: not a revision", field="expected")
    return expected


def _encoded(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise ConfigError(f"{what} is of {type(text).__name__}: text is wanted", field=what)
    if text.startswith("/"):
        raise ConfigError(f"{what} = {text!r}: it lies below the namespace, without a leading '/'", field=what)
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
