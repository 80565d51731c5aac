"""Every error of the transport: one tree, one question answered by each class.

| class                    | retryable | what the caller does                                               |
|--------------------------|-----------|--------------------------------------------------------------------|
| `ConfigError`            | no        | fix the setting or argument that the message names                 |
| `SlotError`              | no        | report: the slot or lease cannot do what was asked                 |
| `StaleSlotError`         | no        | drop the episode: its slot was recycled, overwritten or is foreign |
| `RingFullError`          | yes       | wait for readers, enlarge the ring, or choose another policy       |
| `BusyError`              | yes       | try again: the peer or slot is at a limit that will pass           |
| `NotReadyError`          | yes       | try again: the source is up but not bound to its ring yet          |
| `PeerLostError`          | yes       | try another port or source; nothing of the payload was delivered   |
| `ProtocolError`          | no        | report: the peer is not ours, of another version, or lying         |
| `AuthenticationError`    | no        | give both sides the same token                                     |
| `ChecksumError`          | yes       | read again; the bytes that came are not those that were written    |
| `DeadlineExceededError`  | yes       | call again with a longer deadline                                  |
| `RegistryError`          | no        | root of what membership raises                                     |
| `StoreUnavailableError`  | yes       | try again: the store does not answer; says nothing of its sources  |
| `LeaseLostError`         | no        | take a new lease and publish anew; what was under the old is gone  |
| `CompactedError`         | yes       | take a snapshot: the changes since that revision are not kept      |
| `StoreResetError`        | yes       | start over: the store's data were wiped                            |
| `ConflictError`          | no        | look again: somebody else has changed the key                      |
| `DuplicateSourceError`   | no        | give this worker or rank another id, or end the live one           |
| `StorePermissionError`   | no        | give this user the right to the store's keys                       |
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "BusyError",
    "ChecksumError",
    "CompactedError",
    "ConfigError",
    "ConflictError",
    "DeadlineExceededError",
    "DuplicateSourceError",
    "LeaseLostError",
    "NotReadyError",
    "PeerLostError",
    "ProtocolError",
    "RegistryError",
    "RingFullError",
    "SlotError",
    "StaleSlotError",
    "StorePermissionError",
    "StoreResetError",
    "StoreUnavailableError",
    "TransportError",
]


class TransportError(Exception):
    """Root of every error this package raises on purpose.

    Attributes:
        message: what happened and what to do about it, one sentence or two.
        facts: the values behind the message (`slot`, `generation`, `port`, `elapsed_s` …), for logs.
        retryable: whether the same call may succeed if made again.
    """

    retryable: bool = False

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

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from message and facts, so that an error survives a trip through a process pool."""
        return (_rebuild, (type(self), self.message, self.facts))


def _rebuild(cls: type[TransportError], message: str, facts: dict[str, object]) -> TransportError:
    return cls(message, **facts)


class ConfigError(TransportError, ValueError):
    """A setting or argument is wrong; the message names the field, the value and the remedy."""


class SlotError(TransportError):
    """A slot or a lease cannot do what was asked of it."""


class StaleSlotError(SlotError):
    """The slot no longer holds the payload that the reference names. Never retried."""


class RingFullError(SlotError):
    """No slot can be written now: all are being read, or are READY under the policy `raise`."""

    retryable = True


class BusyError(TransportError):
    """The peer or the slot is at a limit (connections, concurrent attempts) that will pass."""

    retryable = True


class NotReadyError(TransportError):
    """The source answers but is not bound yet."""

    retryable = True


class PeerLostError(TransportError):
    """The connection failed or ended: unreachable, refused, reset, cancelled, truncated."""

    retryable = True


class ProtocolError(TransportError):
    """The peer broke the protocol, or speaks another one. The connection is closed."""


class AuthenticationError(TransportError):
    """The shared-secret handshake failed, in either direction."""


class ChecksumError(TransportError):
    """The bytes received are not the bytes that were written."""

    retryable = True


class DeadlineExceededError(TransportError, TimeoutError):
    """The call's deadline passed; nothing it held is still held."""

    retryable = True


class RegistryError(TransportError):
    """Root of what the registry raises: stores, publishers, watchers, groups."""


class StoreUnavailableError(RegistryError):
    """The store does not answer, or not in time. It says nothing of the sources in it."""

    retryable = True


class LeaseLostError(RegistryError):
    """A lease has run out or was revoked; its keys are gone."""


class CompactedError(RegistryError):
    """The store no longer keeps the changes since a watch's revision."""

    retryable = True


class StoreResetError(RegistryError):
    """The store's data are not those of before: it was wiped, or another one stands in its place."""

    retryable = True


class ConflictError(RegistryError):
    """A key does not have the revision that the change expected; nothing was changed."""


class DuplicateSourceError(RegistryError):
    """Another live worker has this id, or another live member this rank."""


class StorePermissionError(RegistryError):
    """The store refuses this user, or asks for one."""
