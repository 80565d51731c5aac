"""The public names are a contract: adding one is a decision, losing one is a break."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest

import ucxx_transport

NAMES = {
    *("TensorSpec", "Schema", "SlotRef", "SlotState"),
    *("RingConfig", "SharedRingBuffer", "RingStatistics", "WriteLease", "ReadLease"),
    *("ServerConfig", "UCXXServer", "ServerStatistics"),
    *("ClientConfig", "UCXXClient", "SyncUCXXClient", "Payload", "ClientStatistics"),
    *("TransportError", "SlotError", "StaleSlotError", "RingFullError", "ProtocolError", "AuthenticationError"),
    *("DeadlineExceededError", "PeerLostError", "ChecksumError", "ConfigError", "BusyError", "NotReadyError"),
    *("UCXXRolloutMixin", "TrajectoryWriter", "UCXXDataPackerMixin", "RolloutFeed", "EpisodeStream"),
    *("StoreConfig", "PublisherConfig", "RegistryError", "LeaseLostError", "StoreUnavailableError", "CompactedError"),
    *("StoreResetError", "ConflictError", "DuplicateSourceError", "StorePermissionError"),
    *("open_store", "HeartbeatPublisher", "SourceWatcher", "RankGroup"),
    "__version__",
}


def test_the_public_names_are_these() -> None:
    assert set(vars(ucxx_transport)["__all__"]) == NAMES
    assert sorted(NAMES) == vars(ucxx_transport)["__all__"]


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in NAMES:
        value = getattr(ucxx_transport, name)
        assert name in dir(ucxx_transport), name
        if inspect.isclass(value):
            assert value.__name__ == name
            assert inspect.getdoc(value), name


def test_type_checkers_see_the_names_that_programs_get() -> None:
    stub = Path(ucxx_transport.__file__).with_suffix(".pyi")
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert set(seen) == NAMES - {"__version__"}
    for name, (module, original) in seen.items():
        assert name == original
        assert getattr(importlib.import_module(str(module)), name) is getattr(ucxx_transport, name)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'UCXClient'"):
        _ = ucxx_transport.UCXClient  # type: ignore[attr-defined]  # the point of the test


def test_every_error_is_a_transport_error_that_says_whether_to_try_again() -> None:
    errors = [getattr(ucxx_transport, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, ucxx_transport.TransportError) for error in errors)
    assert all(isinstance(error.retryable, bool) for error in errors)
    assert issubclass(ucxx_transport.DeadlineExceededError, TimeoutError)


def test_the_version_is_that_of_the_package() -> None:
    assert ucxx_transport.__version__ == importlib.metadata.version("ucxx_transport")
