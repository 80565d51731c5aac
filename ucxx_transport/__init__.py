"""RL trajectories from a rollout worker's shared memory to a trainer: in place on one host, over UCX between hosts.

The names below are the public ones. Each is imported when it is first used, so that a process pays for what it uses: a
server process that is started anew does not load the client, and nothing here loads ucxx, torch or cupy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.late_names import late_names

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
    from ucxx_transport.groups import RankGroup
    from ucxx_transport.membership import HeartbeatPublisher, SourceWatcher, open_store
    from ucxx_transport.ring import ReadLease, RingStatistics, SharedRingBuffer, SlotState, WriteLease
    from ucxx_transport.schema import Schema, SlotRef, TensorSpec
    from ucxx_transport.server import ServerStatistics, UCXXServer
    from ucxx_transport.trainer import UCXXDataPackerMixin
    from ucxx_transport.worker import UCXXRolloutMixin

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
    "trainer": ("UCXXDataPackerMixin",),
    "groups": ("RankGroup",),
    "membership": ("HeartbeatPublisher", "SourceWatcher", "open_store"),
    "ring": ("ReadLease", "RingStatistics", "SharedRingBuffer", "SlotState", "WriteLease"),
    "worker": ("UCXXRolloutMixin",),
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
    "HeartbeatPublisher",
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
    "SourceWatcher",
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

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__, __dir__ = late_names(__name__, globals(), _HOMES)
