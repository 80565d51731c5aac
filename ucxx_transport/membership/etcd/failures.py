"""What etcd and httpx say, as this package's errors: by gRPC code and by class.

| gRPC code (https://grpc.github.io/grpc/core/md_doc_statuscodes.html)  | raised                                  |
|-----------------------------------------------------------------------|-----------------------------------------|
| 5 not found                                                           | `LeaseLostError`: only leases are named |
| 7 permission denied                                                   | `StorePermissionError`                  |
| 3 invalid argument ("user name is empty"), 16 unauthenticated         | a new token, then `StorePermissionError` |
| 11 out of range                                                       | `CompactedError`                        |
| all others: unavailable, deadline exceeded, no space, unknown …       | `StoreUnavailableError`                 |
| none, with an HTTP status of a server that is not etcd's gateway      | `ConfigError`                           |
"""

from __future__ import annotations

import ssl
from typing import Final

from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership.etcd.messages import Json

__all__ = ["NOT_LOGGED_IN", "code_of", "refusal", "unreachable"]

_INVALID_ARGUMENT: Final = 3
_NOT_FOUND: Final = 5
_PERMISSION_DENIED: Final = 7
FAILED_PRECONDITION: Final = 9
_OUT_OF_RANGE: Final = 11
_UNAUTHENTICATED: Final = 16
NOT_LOGGED_IN: Final = frozenset({_INVALID_ARGUMENT, _UNAUTHENTICATED})
"""A request without a user, or with a token that is not known any more. All requests here are well-formed otherwise."""
_NOT_A_GATEWAY: Final = frozenset({400, 404, 405, 415, 426})


def code_of(body: Json) -> int:
    """The gRPC code of an error's body; 0 when it has none."""
    error = body.get("error")
    code = error.get("grpc_code") if isinstance(error, dict) else body.get("code")  # a stream's error, or a call's
    return code if isinstance(code, int) else 0


def refusal(status: int, body: Json, endpoint: object) -> TransportError:
    """The error for an answer that is none.

    Args:
        status: of HTTP.
        body: of the answer; empty when it is not JSON.
        endpoint: whose answer it is.
    """
    code = code_of(body)
    facts: dict[str, object] = {"endpoint": str(endpoint), "status": status, "code": code, "reason": _words(body)}
    if code == _NOT_FOUND:
        return LeaseLostError("the lease has ended: take another one and put its keys anew", **facts)
    if code == _PERMISSION_DENIED:
        return StorePermissionError(
            "etcd does not let this user do that: grant its role READWRITE on the namespace's prefix", **facts
        )
    if code in NOT_LOGGED_IN:
        return StorePermissionError("etcd refuses this user: see to store.user and store.password", **facts)
    if code == _OUT_OF_RANGE:
        return CompactedError("etcd no longer keeps this revision; take a snapshot", **facts)
    if not code and status in _NOT_A_GATEWAY:
        return ConfigError(
            "what answers there is not etcd's JSON gateway (/v3, etcd 3.4 or later, --enable-grpc-gateway): name its "
            "client URL; etcds:// where it speaks TLS",
            **facts,
        )
    return StoreUnavailableError("etcd does not answer as asked", **facts)


def unreachable(error: Exception, endpoint: object) -> TransportError:
    """The error for a request that httpx could not bring to an answer.

    Args:
        error: of httpx.
        endpoint: where it was sent to.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                "etcd's certificate is not trusted: store.ca_file must hold the authority that signed it, and the "
                "certificate must name the host",
                endpoint=str(endpoint),
                reason=cause.verify_message,
            )
        cause = cause.__cause__ or cause.__context__
    return StoreUnavailableError(
        "etcd cannot be reached", endpoint=str(endpoint), reason=type(error).__name__, detail=str(error)
    )


def _words(body: Json) -> str:
    error = body.get("error")
    found = error.get("message") if isinstance(error, dict) else body.get("message", error)
    return str(found or "")
