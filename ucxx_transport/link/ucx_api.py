"""All that is called of ucxx and UCX: the one place that imports it, and the typed shape of what is used of it.

`ucxx._lib` is private API: extras pin its minor version, and a test names every symbol of `SYMBOLS`.

Importing ucxx writes `UCX_*` defaults into `os.environ`, from where child processes would take them for the user's.
They are removed again here; those that matter are passed to each context by `settings`. Where the program has imported
ucxx before, they are there already and count as the environment's.

UCX's errors are translated by class:

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

import functools
import importlib
import os
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, Protocol

from ucxx_transport.errors import BusyError, ConfigError, TransportError
from ucxx_transport.link.base import LostReason, lost
from ucxx_transport.link.libraries import check_loadable, check_loaded, library_in_use


def _members(of: str, names: str) -> list[str]:
    return [f"{of}.{name}" for name in names.split()]


_ERRORS = (
    "Busy Canceled Config ConnectionReset EndpointTimeout ExceedsLimit InvalidAddr InvalidParam MessageTruncated "
    "NoDevice NoMemory NoResource NotConnected NotImplemented Rejected TimedOut Unreachable Unsupported"
)
SYMBOLS = MappingProxyType(
    {
        "ucxx._lib.arr": ("Array",),
        "ucxx._lib.libucxx": (
            *_members("Feature", "STREAM TAG WAKEUP"),
            *_members("UCXEndpoint", "alive close_blocking create handle raise_on_error set_close_callback ucxx_ptr"),
            *_members("UCXEndpoint", "stream_recv stream_send tag_recv tag_send"),
            *_members("UCXListener", "create create_endpoint_from_conn_request ip port"),
            *_members("UCXRequest", "check_error status"),
            *_members("UCXWorker", "arm cancel_inflight_requests epoll_file_descriptor init_blocking_progress_mode"),
            *_members("UCXWorker", "handle progress_once tag_probe tag_recv"),
            *(f"UCX{name}Error" for name in _ERRORS.split()),
            *("UCXContext", "UCXError", "UCXWorker", "UCXXTag", "UCXXTagMask"),
        ),
    }
)
"""Every private symbol that this package uses, by module."""


class UcxArray(Protocol):
    """`ucxx._lib.arr.Array`: address and size of a buffer, with a reference to it."""

    @property
    def nbytes(self) -> int: ...


class UcxTag(Protocol):
    """`UCXXTag`: what a tagged send and receive are matched by, in the whole worker of the receiver."""

    @property
    def value(self) -> int: ...


IN_PROGRESS: Final = 1  # UCS_INPROGRESS, ucs/type/status.h; 0 is a success, an error is negative


class UcxRequest(Protocol):
    """`UCXRequest`. Dropping one that is in progress cancels it; dropping its buffer then is a crash."""

    @property
    def status(self) -> int: ...
    def check_error(self) -> None: ...


class UcxEndpoint(Protocol):
    """`UCXEndpoint`. Its `close()` is not used: see `UCXXEndpoint.close`."""

    @property
    def alive(self) -> bool: ...
    @property
    def handle(self) -> int: ...
    @property
    def ucxx_ptr(self) -> int: ...
    def raise_on_error(self) -> None: ...
    def close_blocking(self) -> None: ...
    def set_close_callback(self, cb_func: Callable[[], None]) -> None: ...
    def stream_recv(self, arr: UcxArray) -> UcxRequest: ...
    def stream_send(self, arr: UcxArray) -> UcxRequest: ...
    def tag_recv(self, arr: UcxArray, tag: UcxTag) -> UcxRequest: ...
    def tag_send(self, arr: UcxArray, tag: UcxTag) -> UcxRequest: ...


class UcxListener(Protocol):
    """`UCXListener`. UCX keeps a raw pointer into it until every endpoint it accepted is gone."""

    def create_endpoint_from_conn_request(self, conn_request: int, endpoint_error_handling: bool) -> UcxEndpoint: ...  # noqa: FBT001
    @property
    def ip(self) -> str: ...
    @property
    def port(self) -> int: ...


class UcxProbe(Protocol):
    """`TagProbeResult`."""

    @property
    def matched(self) -> bool: ...
    @property
    def sender_tag(self) -> UcxTag: ...


class UcxWorker(Protocol):
    """`UCXWorker`."""

    @property
    def epoll_file_descriptor(self) -> int: ...
    @property
    def handle(self) -> int: ...
    def init_blocking_progress_mode(self) -> None: ...
    def progress_once(self) -> bool: ...
    def cancel_inflight_requests(self) -> int: ...
    def arm(self) -> bool: ...
    def tag_probe(self, tag: UcxTag, tag_mask: object) -> UcxProbe: ...
    def tag_recv(self, arr: UcxArray, tag: UcxTag) -> UcxRequest: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The imported modules."""

    lib: Any  # ucxx._lib.libucxx, which has no stubs
    make_array: Callable[[object], UcxArray]


_lock = threading.Lock()


def load_binding() -> Binding:
    """Import ucxx once, leaving `os.environ` as it was.

    Raises:
        ConfigError: ucxx is not installed, or is of a version that lacks what is used; says what to install.
    """
    with _lock:  # a race would take ucxx's own writes for the user's settings
        return _import_binding()


@functools.cache
def _import_binding() -> Binding:
    check_loadable()
    before = {name for name in os.environ if name.startswith("UCX")}
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # UCX logs to stdout, and reads this once, when it is loaded
    try:
        lib = importlib.import_module("ucxx._lib.libucxx")
        arr = importlib.import_module("ucxx._lib.arr")
    except ModuleNotFoundError as exc:
        raise ConfigError(
            'UCX is not installed; run pip install "ucxx_transport[cu12]" (or [cu13] with CUDA 13)', missing=exc.name
        ) from exc
    except (ImportError, OSError) as exc:  # OSError: a shared library does not fit the others
        raise ConfigError(
            "ucxx cannot be imported; another UCX or ucxx of this machine may be in its way",
            reason=f"{type(exc).__name__}: {exc}",
            ucx=library_in_use(),
        ) from exc
    finally:
        for name in [name for name in os.environ if name.startswith("UCX") and name not in before]:
            del os.environ[name]
    check_loaded()
    missing = [name for name in SYMBOLS["ucxx._lib.libucxx"] if not _has(lib, name)]
    if missing:
        raise ConfigError(
            'this ucxx lacks what the link uses; run pip install "ucxx_transport[cu12]" (or [cu13] with CUDA 13)',
            missing=", ".join(missing),
            ucxx=getattr(importlib.import_module("ucxx"), "__version__", "unknown"),
        )
    # ucxx asks for `Feature.TAG.value` at every post, which Python's enum answers in two calls of 0.2 µs.
    lib.Feature.value = property(attrgetter("_value_"))
    return Binding(lib=lib, make_array=arr.Array)


def _has(lib: Any, dotted: str) -> bool:
    found = lib
    for part in dotted.split("."):
        found = getattr(found, part, None)
    return found is not None


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
