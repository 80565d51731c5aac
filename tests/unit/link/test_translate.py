"""UCX's errors into ours: every class of ucxx has an answer."""

from __future__ import annotations

from tests.support.rows import row
from ucxx_transport.errors import BusyError, ConfigError, PeerLostError, TransportError
from ucxx_transport.link.ucx_api import load_binding

BINDING = load_binding()
LIB = BINDING.lib


def test_connection_errors_are_a_lost_peer_with_a_reason() -> None:
    rows: list[tuple[str, bool, str]] = [
        ("UCXMessageTruncatedError", True, "truncated"),
        ("UCXMsgTruncated", True, "truncated"),
        ("UCXCanceledError", True, "cancelled"),
        ("UCXCanceled", True, "cancelled"),
        ("UCXConnectionResetError", True, "reset"),
        ("UCXConnectionResetError", False, "reset"),
        ("UCXEndpointTimeoutError", True, "reset"),
        ("UCXTimedOutError", True, "reset"),
        ("UCXNotConnectedError", True, "reset"),
        ("UCXNotConnectedError", False, "refused"),
        ("UCXRejectedError", False, "refused"),
        ("UCXUnreachableError", False, "unreachable"),
        ("UCXInvalidAddrError", False, "unreachable"),
        ("UCXIOError", True, "aborted"),
        ("UCXError", True, "aborted"),
    ]
    for name, connected, reason in rows:
        with row(name=name, connected=connected, reason=reason):
            error = BINDING.error(getattr(LIB, name)("words"), peer="host:1", connected=connected)
            assert isinstance(error, PeerLostError)
            assert error.facts["reason"] == reason
            assert error.facts["peer"] == "host:1"
            assert error.retryable


def test_lack_of_a_resource_is_busy() -> None:
    rows: list[str] = ["UCXNoMemoryError", "UCXNoResourceError", "UCXBusyError", "UCXExceedsLimitError"]
    for name in rows:
        with row(name=name):
            assert isinstance(BINDING.error(getattr(LIB, name)(), peer="p", connected=True), BusyError)


def test_what_ucx_refuses_is_a_configuration_error() -> None:
    rows: list[str] = [
        "UCXConfigError",
        "UCXInvalidParamError",
        "UCXUnsupportedError",
        "UCXNotImplementedError",
        "UCXNoDeviceError",
    ]
    for name in rows:
        with row(name=name):
            assert isinstance(BINDING.error(getattr(LIB, name)(), peer="p", connected=True), ConfigError)


def test_every_class_of_ucxx_has_an_answer() -> None:
    classes = [
        found
        for found in vars(LIB).values()
        if isinstance(found, type) and issubclass(found, LIB.UCXError) and issubclass(found, Exception)
    ]
    assert len(classes) > 30
    for found in classes:
        assert isinstance(BINDING.error(found(), peer="p", connected=True), TransportError)


def test_translation_goes_by_class_not_by_name() -> None:
    other = type("UCXXMessageTruncatedError", (LIB.UCXIOError,), {})
    error = BINDING.error(other("Message truncated"), peer="p", connected=True)
    assert error.facts["reason"] == "aborted"
