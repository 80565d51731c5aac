"""All that is called of ucxx and UCX: the one place that imports it, and the typed shape of what is used of it.

`ucxx._lib` is private API: extras pin its minor version, and a test names every symbol of `SYMBOLS`.

Importing ucxx writes `UCX_*` defaults into `os.environ`, from where child processes would take them for the user's.
They are removed again here; those that matter are passed to each context by `settings`. Where the program has imported
ucxx before, they are there already and count as the environment's.

What ucxx's Python API does not reach is called natively; each such call may answer "unknown":

| call                        | of                 | for                                                            |
|-----------------------------|--------------------|----------------------------------------------------------------|
| `ucp_ep_query`              | libucp, public API | the lanes and the peer's address of one endpoint               |
| `ucp_conn_request_query`    | libucp, public API | who asks for a connection that then fails                      |
| `Endpoint.getCancelingSize` | libucxx, a symbol  | releasing operations that a close has cancelled                |
| `ucxx_log_component_config` | libucxx, a symbol  | ucxx's log, on stdout, which only `UCXX_LOG_LEVEL` sets else   |

Structures are those of `ucp/api/ucp.h` and `ucs/config/types.h` of UCX 1.19 to 1.21; a field mask says which fields are
known here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final, Protocol

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.libraries import check_loadable, check_loaded, library_in_use, loaded_library


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


_REMOTE_SOCKADDR, _TRANSPORTS = 1 << 2, 1 << 3  # enum ucp_ep_attr_field
_CLIENT_ADDRESS = 1  # enum ucp_conn_request_attr_field
_MAX_LANES = 32
_SOCKADDR_BYTES = 128
_TCP_INFO_BYTES, _BYTES_RECEIVED = 136, 128  # struct tcp_info of linux/tcp.h, to the end of tcpi_bytes_received
_FATAL = 0  # UCS_LOG_LEVEL_FATAL


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * (_SOCKADDR_BYTES // 8)),
        ("remote_sockaddr", ctypes.c_uint64 * (_SOCKADDR_BYTES // 8)),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class _RequestAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("client_sockaddr", ctypes.c_uint64 * (_SOCKADDR_BYTES // 8)),
        ("client_id", ctypes.c_uint64),
    )


class _LogComponent(ctypes.Structure):
    _fields_ = (("log_level", ctypes.c_int), ("name", ctypes.c_char * 16))


def endpoint_lanes(handle: int) -> tuple[tuple[str, str], ...]:
    """(transport, device) of each lane of a live `ucp_ep_h`, such as `("tcp", "lo")`; empty where it is unknown."""
    entries = (_TransportEntry * _MAX_LANES)()
    asked = _EndpointAttributes(
        field_mask=_TRANSPORTS,
        entries=ctypes.cast(entries, ctypes.POINTER(_TransportEntry)),
        num_entries=_MAX_LANES,
        entry_size=ctypes.sizeof(_TransportEntry),
    )
    if not _query(handle, asked):
        return ()
    lanes = ((entry.transport, entry.device) for entry in entries[: min(asked.num_entries, _MAX_LANES)])
    return tuple((transport.decode(), (device or b"").decode()) for transport, device in lanes if transport)


def endpoint_peer(handle: int) -> str | None:
    """`host:port` of the other end, or None where it is unknown."""
    asked = _EndpointAttributes(field_mask=_REMOTE_SOCKADDR)
    if not _query(handle, asked):
        return None
    return _in_words(bytes(asked.remote_sockaddr))


def request_peer(handle: int) -> str | None:
    """`host:port` of a `ucp_conn_request_h` inside its listener's callback, or None where it cannot be told."""
    asked = _RequestAttributes(field_mask=_CLIENT_ADDRESS)
    try:
        query = loaded_library("libucp.so").ucp_conn_request_query
    except (OSError, AttributeError):
        return None
    query.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    query.restype = ctypes.c_int
    return _in_words(bytes(asked.client_sockaddr)) if int(query(handle, ctypes.byref(asked))) == 0 else None


def _in_words(raw: bytes) -> str | None:
    family, port = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, raw[4:8])}:{port}"
    if family == socket.AF_INET6:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw[8:24])}]:{port}"
    return None


def listener_has_answered(host: str, port: int) -> bool:
    """Whether a TCP connection of this process to that address has received anything.

    UCX's connections are set up in two steps: over the listener's port, and then by a connection to a data port of each
    end. This tells whether the first one is done; a stopped peer accepts, too, but says nothing.

    Args:
        host: numeric.
        port: the listener's.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as probe:
                if probe.getpeername()[:2] == (host, port):
                    info = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                    if int.from_bytes(info[_BYTES_RECEIVED : _BYTES_RECEIVED + 8], "little"):
                        return True
        except OSError:  # not connected, of another kind, or closed meanwhile
            continue
    return False


def release_cancelled(pointer: int) -> bool:
    """Let a closed endpoint (`ucxx::Endpoint *`) forget its cancelled operations once they have ended.

    ucxx keeps them in a list of the endpoint, and they keep the endpoint: neither would ever be freed, nor the worker.
    Counting that list drops the ended ones.

    Returns:
        Whether nothing keeps the endpoint any more, as far as is known.
    """
    try:
        count = loaded_library("libucxx.so")["_ZNK4ucxx8Endpoint16getCancelingSizeEv"]
    except (OSError, AttributeError):
        return False
    count.argtypes = (ctypes.c_void_p,)
    count.restype = ctypes.c_size_t
    return int(count(pointer)) == 0


def quiet_ucxx_log() -> bool:
    """Keep ucxx's log of ordinary events off stdout, unless the user has chosen a level; whether it is quiet now."""
    if "UCXX_LOG_LEVEL" in os.environ:
        return False
    try:
        component = _LogComponent.in_dll(loaded_library("libucxx.so"), "_ZN4ucxx25ucxx_log_component_configE")
    except (OSError, ValueError):
        return False
    if component.name != b"UCXX":  # not the structure that we know
        return False
    component.log_level = _FATAL
    return True


def _query(handle: int, attributes: _EndpointAttributes) -> bool:
    try:
        query = loaded_library("libucp.so").ucp_ep_query
    except (OSError, AttributeError):
        return False
    query.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    query.restype = ctypes.c_int
    return int(query(handle, ctypes.byref(attributes))) == 0
