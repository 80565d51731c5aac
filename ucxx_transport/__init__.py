"""RL trajectories from a rollout worker's shared memory to a trainer: in place on one host, over UCX between hosts.

The names below are the public ones. Each is imported when it is first used, so that a process pays for what it uses: a
server process that is started anew does not load the client, and nothing here loads ucxx, torch or cupy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics, Payload, SyncUCXXClient, UCXXClient
    from ucxx_transport.config import ClientConfig, PublisherConfig, RingConfig, ServerConfig, StoreConfig
    from ucxx_transport.errors import (
        AuthenticationError,
        BusyError,
        ChecksumError,
        CompactedError,
        ConfigError,
        ConflictError,
        DeadlineExceededError,
        DuplicateSourceError,
        LeaseLostError,
        NotReadyError,
        PeerLostError,
        ProtocolError,
        RegistryError,
        RingFullError,
        SlotError,
        StaleSlotError,
        StorePermissionError,
        StoreResetError,
        StoreUnavailableError,
        TransportError,
    )
    from ucxx_transport.packer import UCXXDataPackerMixin
    from ucxx_transport.registry import RankGroup, open_store
    from ucxx_transport.ring import ReadLease, RingStatistics, SharedRingBuffer, SlotState, WriteLease
    from ucxx_transport.rollout import UCXXRolloutMixin
    from ucxx_transport.schema import Schema, SlotRef, TensorSpec
    from ucxx_transport.server import ServerStatistics, UCXXServer

__version__ = "0.1.0"

_HOMES = {
    "client": ("ClientStatistics", "Payload", "SyncUCXXClient", "UCXXClient"),
    "config": ("ClientConfig", "PublisherConfig", "RingConfig", "ServerConfig", "StoreConfig"),
    "errors": (
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
    ),
    "packer": ("UCXXDataPackerMixin",),
    "registry": ("RankGroup", "open_store"),
    "ring": ("ReadLease", "RingStatistics", "SharedRingBuffer", "SlotState", "WriteLease"),
    "rollout": ("UCXXRolloutMixin",),
    "schema": ("Schema", "SlotRef", "TensorSpec"),
    "server": ("ServerStatistics", "UCXXServer"),
}

__all__ = [
    "AuthenticationError",
    "BusyError",
    "ChecksumError",
    "ClientConfig",
    "ClientStatistics",
    "CompactedError",
    "ConfigError",
    "ConflictError",
    "DeadlineExceededError",
    "DuplicateSourceError",
    "LeaseLostError",
    "NotReadyError",
    "Payload",
    "PeerLostError",
    "ProtocolError",
    "PublisherConfig",
    "RankGroup",
    "ReadLease",
    "RegistryError",
    "RingConfig",
    "RingFullError",
    "RingStatistics",
    "Schema",
    "ServerConfig",
    "ServerStatistics",
    "SharedRingBuffer",
    "SlotError",
    "SlotRef",
    "SlotState",
    "StaleSlotError",
    "StoreConfig",
    "StorePermissionError",
    "StoreResetError",
    "StoreUnavailableError",
    "SyncUCXXClient",
    "TensorSpec",
    "TransportError",
    "UCXXClient",
    "UCXXDataPackerMixin",
    "UCXXRolloutMixin",
    "UCXXServer",
    "WriteLease",
    "__version__",
    "open_store",
]

_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> object:
        """Import a public name on its first use (PEP 562)."""
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
