"""Native calls into the loaded libraries, for what ucxx's Python API does not reach; each may answer "unknown".

| call                        | of                 | for                                                            |
|-----------------------------|--------------------|----------------------------------------------------------------|
| `ucp_ep_query`              | libucp, public API | the lanes and the peer's address of one endpoint               |
| `ucp_conn_request_query`    | libucp, public API | who asks for a connection that then fails                      |
| `Endpoint.getCancelingSize` | libucxx, a symbol  | letting go of operations that a close has cancelled            |
| `ucxx_log_component_config` | libucxx, a symbol  | ucxx's log, on stdout, which only `UCXX_LOG_LEVEL` sets else   |

Structures are those of `ucp/api/ucp.h` and `ucs/config/types.h` of UCX 1.19 to 1.21; a field mask says which fields are
known here.
"""

from __future__ import annotations

import ctypes
import os
import socket

from ucxx_transport.link.libraries import loaded_library

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
