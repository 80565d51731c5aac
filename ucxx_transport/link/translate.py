"""Translation of UCX's errors into ours, by class.

| UCX                                                     | ours                          |
|---------------------------------------------------------|-------------------------------|
| MessageTruncated                                        | PeerLostError `truncated`     |
| ConnectionReset, EndpointTimeout, TimedOut              | PeerLostError `reset`         |
| NotConnected, Rejected                                  | PeerLostError `refused`, or `reset` once it was connected |
| Unreachable, InvalidAddr                                | PeerLostError `unreachable`   |
| Canceled                                                | PeerLostError `cancelled`     |
| NoMemory, NoResource, Busy, ExceedsLimit                | BusyError                     |
| Config, InvalidParam, Unsupported, NotImplemented, NoDevice | ConfigError               |
| any other                                               | PeerLostError `aborted`       |
"""

from __future__ import annotations

from copy import copy
from typing import Any

from ucxx_transport.errors import BusyError, ConfigError, TransportError
from ucxx_transport.link.base import LostReason, lost


class Translator:
    """Maps exceptions of one imported `ucxx._lib.libucxx`, whose classes exist only once it is imported."""

    def __init__(self, lib: Any) -> None:
        self.root: type[Exception] = lib.UCXError
        self.truncated: type[Exception] = lib.UCXMessageTruncatedError
        self._cancelled: type[Exception] = lib.UCXCanceledError
        self._reset = (lib.UCXConnectionResetError, lib.UCXEndpointTimeoutError, lib.UCXTimedOutError)
        self._refused = (lib.UCXNotConnectedError, lib.UCXRejectedError)
        self._unreachable = (lib.UCXUnreachableError, lib.UCXInvalidAddrError)
        self._busy = (lib.UCXNoMemoryError, lib.UCXNoResourceError, lib.UCXBusyError, lib.UCXExceedsLimitError)
        self._config = (
            lib.UCXConfigError,
            lib.UCXInvalidParamError,
            lib.UCXUnsupportedError,
            lib.UCXNotImplementedError,
            lib.UCXNoDeviceError,
        )

    def error(self, exc: Exception, *, peer: str, connected: bool) -> TransportError:
        """Our error for one of UCX's, of a connection that had been up or not; raise it `from exc`."""
        words = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, self._busy):
            return BusyError("UCX is out of a resource for now; try again", peer=peer, ucx=words)
        if isinstance(exc, self._config):
            return ConfigError("UCX refuses this setting or operation", peer=peer, ucx=words)
        return lost(self.reason(exc, connected=connected), peer=peer, ucx=words)

    def reason(self, exc: Exception, *, connected: bool) -> LostReason:
        """Which `LostReason` a connection's error is."""
        if isinstance(exc, self.truncated):
            return "truncated"
        if isinstance(exc, self._cancelled):
            return "cancelled"
        if isinstance(exc, self._reset):
            return "reset"
        if isinstance(exc, self._refused):
            return "reset" if connected else "refused"
        if isinstance(exc, self._unreachable):
            return "unreachable"
        return "aborted"


def raisable(error: TransportError) -> TransportError:
    """A copy of a stored error.

    Raised itself, it would get a traceback, whose frames lead back to where it is stored: a cycle that keeps the
    worker, and so its port, until garbage is collected.
    """
    fresh = copy(error)
    fresh.__cause__ = error.__cause__
    return fresh
