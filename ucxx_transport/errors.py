"""Every error of the transport: one tree, one question answered by each class.

| class                    | retryable | what the caller does                                               |
|--------------------------|-----------|--------------------------------------------------------------------|
| `ConfigError`            | no        | fix the setting or argument that the message names                 |
| `SlotError`              | no        | report it: a lease was used after its end, or a slot out of turn   |
| `StaleSlotError`         | no        | drop the episode                                                   |
| `RingFullError`          | yes       | wait for readers, enlarge the ring, or choose another policy       |
| `BusyError`              | yes       | try again a little later                                           |
| `NotReadyError`          | yes       | try again until the deadline, as clients do by themselves          |
| `PeerLostError`          | yes       | try another port or source; nothing of the payload was delivered   |
| `ProtocolError`          | no        | report it: a stranger, another version, or a hostile peer          |
| `AuthenticationError`    | no        | give both sides the same token                                     |
| `ChecksumError`          | yes       | read again                                                         |
| `DeadlineExceededError`  | yes       | call again with a longer deadline                                  |
| `RegistryError`          | no        | see its subclasses                                                 |
| `StoreUnavailableError`  | yes       | try again                                                          |
| `LeaseLostError`         | no        | take a new lease and publish again                                 |
| `CompactedError`         | yes       | take a snapshot, and watch from its revision on                    |
| `StoreResetError`        | yes       | start over                                                         |
| `ConflictError`          | no        | read the key again                                                 |
| `DuplicateSourceError`   | no        | give this worker or rank another id, or end the live one           |
| `StorePermissionError`   | no        | give this user the right to the store's keys                       |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self


class TransportError(Exception):
    """Root of every error this package raises on purpose.

    Attributes:
        message: what happened and what to do about it, one sentence or two.
        facts: the values behind the message (`slot`, `generation`, `port`, `elapsed_s` …), for logs.
        retryable: whether the same call may succeed if made again.
    """

    retryable: bool = False

    def __init_subclass__(cls, *, retryable: bool | None = None, **others: object) -> None:
        super().__init_subclass__(**others)
        if retryable is not None:
            cls.retryable = retryable

    def __init__(self, message: str, /, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __str__(self) -> str:
        """The message, then the facts as `key=value`."""
        if not self.facts:
            return self.message
        words = " ".join(f"{key}={value}" for key, value in self.facts.items())
        return f"{self.message} [{words}]"

    def __copy__(self) -> Self:
        """One with facts of its own, where several calls fail by one event."""
        return type(self)(self.message, **self.facts)


FOREIGN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, ImportError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""What numpy and the libraries of arrays and mappings raise when a value of theirs is not what it is taken for."""


def article(name: str) -> str:
    """A name with its article, for an error: "an episode record", "a slot reference", "a UCXXServer"."""
    return f"an {name}" if name[:1] in "aeioAEIO" else f"a {name}"


def nearest_remedy(name: str, choices: Iterable[str]) -> str:
    """For the error of a name that is none of `choices`: a question for the nearest of them; "" where none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name.lower(), sorted(choices), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


class ConfigError(TransportError, ValueError):
    """A setting or argument is wrong; the message names the field, the value and the remedy."""


class SlotError(TransportError):
    """A slot or a lease cannot do what was asked of it."""


class StaleSlotError(SlotError):
    """The slot no longer holds the payload that the reference names. Never retried."""


class RingFullError(SlotError, retryable=True):
    """No slot can be written now: all are being read, or are READY under the policy `raise`."""


class BusyError(TransportError, retryable=True):
    """The peer or the slot is at a limit (connections, concurrent attempts) that will pass."""


class NotReadyError(TransportError, retryable=True):
    """The source answers but is not bound yet."""


class PeerLostError(TransportError, retryable=True):
    """The connection failed or ended: unreachable, refused, reset, cancelled, truncated."""


class ProtocolError(TransportError):
    """The peer broke the protocol, or speaks another one. The connection is closed."""


class AuthenticationError(TransportError):
    """The shared-secret handshake failed, in either direction."""


class ChecksumError(TransportError, retryable=True):
    """The bytes received are not the bytes that were written."""


class DeadlineExceededError(TransportError, TimeoutError, retryable=True):
    """The call's deadline passed; nothing it held is still held."""


class RegistryError(TransportError):
    """Root of what membership raises: stores, publishers, watchers, groups."""


class StoreUnavailableError(RegistryError, retryable=True):
    """The store does not answer, or not in time. It says nothing of the sources in it."""


class LeaseLostError(RegistryError):
    """A lease has run out or was revoked; its keys are gone."""


class CompactedError(RegistryError, retryable=True):
    """The store no longer keeps the changes since a watch's revision."""


class StoreResetError(RegistryError, retryable=True):
    """The store's data are not those of before: it was wiped or replaced."""


class ConflictError(RegistryError):
    """A key does not have the revision that the change expected; nothing was changed."""


class DuplicateSourceError(RegistryError):
    """Another live worker has this id, or another live member this rank."""


class StorePermissionError(RegistryError):
    """The store refuses this user, or asks for one."""
