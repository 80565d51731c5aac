"""UCX's shared libraries: which files this process has loaded, and which it is about to load.

One process holds one UCX. A second one, of torch's, mpi4py's or LD_PRELOAD's, has the same names inside, so what is
loaded later is bound to parts of what was loaded first: undefined symbols, aborts, and hangs. So files are compared
before ucxx is imported, by which UCX initialises itself.

| `RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY` | what ucxx loads                                                              |
|---------------------------------------|------------------------------------------------------------------------------|
| unset or `false`                      | the files of the wheel `libucx`; without that wheel, the loader's            |
| any other value                       | the loader's (`ld.so`); what that does not find, from the wheel              |

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
import importlib.util
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ucxx_transport.errors import ConfigError

OLDEST: Final = (1, 19, 0)
"""The oldest UCX that the pinned ucxx takes: `__ucx_min_version__` in its `__init__.py`."""

PREFER_SYSTEM: Final = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"

_FILE: Final = re.compile(r"libuc[mpst]\.so(\.\d+)*")
_LOOK_LIMIT_S: Final = 30.0
_LOOK: Final = """
import ctypes, json, re, sys
sys.path.append(sys.argv[1])
import libucx
kept = libucx.load_library()
version = [ctypes.c_uint() for _ in range(3)]
files = sorted({line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/libuc" in line})
ctypes.CDLL(next(name for name in files if "/libucp.so" in name)).ucp_get_version(*map(ctypes.byref, version))
print(json.dumps([files, [part.value for part in version]]))
"""

_REMEDY: Final = "Remove one of them (an import, LD_PRELOAD, LD_LIBRARY_PATH), or move it to another process"


def check_loadable() -> None:
    """Refuse to load UCX beside another one, or one that ucxx cannot use. Call it before ucxx is imported.

    Raises:
        ConfigError: names both files, or the file and its version.
    """
    own = _wheel_folder()
    if own is None or os.environ.get(PREFER_SYSTEM, "false").lower() != "false":
        if in_use := library_in_use():
            _check_version(in_use, _version_of(in_use))
        elif own is not None:
            _check_what_the_loader_finds(own)
        return
    files = {file.resolve() for file in own.iterdir()}  # an installer may have made links of them
    other = [file for file in _loaded_files() if file not in files]
    if other:
        one, needed = other[0], own / "libucp.so"
        words = (
            f"two UCX libraries in one process: {one} is loaded, and ucxx needs {needed}. {_REMEDY}; or let ucxx use "
        )
        words += f"that one, if it is {_words(OLDEST)} or later, by {PREFER_SYSTEM}=true"
        raise ConfigError(words, loaded=str(one), needed=str(needed))


def check_loaded(files: list[Path] | None = None) -> None:
    """Refuse a UCX that was put together from two. Call it when ucxx is imported, before a context is made.

    Raises:
        ConfigError: names a file of each, among those that this process has loaded, or `files`.
    """
    by_folder = {file.parent: file for file in files or _loaded_files()}
    if len(by_folder) > 1:
        one, other, *_ = by_folder.values()
        words = f"two UCX libraries in one process: {one} and {other}. {_REMEDY}"
        raise ConfigError(words, loaded=str(one), needed=str(other))


def library_in_use() -> Path | None:
    """The file of `libucp` that this process has loaded; None before that."""
    return next((file for file in _loaded_files() if file.name.startswith("libucp")), None)


def _check_what_the_loader_finds(own: Path) -> None:
    """Look in a process of its own, since an unfit UCX may end it."""
    if not sys.executable:
        return
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(own.parent.parent)],
        capture_output=True,
        text=True,
        timeout=_LOOK_LIMIT_S,
        check=False,
    )
    try:
        files, version = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(
            f"{PREFER_SYSTEM} is set, and the system's UCX cannot be loaded: {reason}", status=done.returncode
        ) from None
    found = [Path(file) for file in files if _FILE.fullmatch(Path(file).name)]
    _check_version(next(file for file in found if file.name.startswith("libucp")), tuple(version))
    check_loaded(found)


def _check_version(file: Path, version: tuple[int, ...] | None) -> None:
    if version is not None and version < OLDEST:
        raise ConfigError(
            f"{file} is UCX {_words(version)}, and ucxx needs {_words(OLDEST)} or later: install a later one, or unset "
            f"{PREFER_SYSTEM} to use the wheel's",
            loaded=str(file),
            needed=_words(OLDEST),
        )


def _version_of(file: Path) -> tuple[int, ...] | None:
    try:
        ask = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD).ucp_get_version
    except (OSError, AttributeError):
        return None  # not to be asked
    parts = [ctypes.c_uint() for _ in range(3)]
    ask(*map(ctypes.byref, parts))
    return tuple(part.value for part in parts)


def _wheel_folder() -> Path | None:
    try:
        found = importlib.util.find_spec("libucx")
    except ValueError:  # an entry of sys.modules without a spec
        return None
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "lib"
    return folder.resolve() if (folder / "libucp.so").is_file() else None


def _loaded_files() -> list[Path]:
    """Of UCX proper, sorted: libucm, libucp, libucs, libuct."""
    return sorted(path for path in _mapped() if _FILE.fullmatch(path.name))


def _mapped() -> set[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(f"/{path}") for line in lines if (path := line.partition("/")[2])}


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@functools.cache
def loaded_library(name: str) -> ctypes.CDLL:
    """The library of that name which this process has loaded already, never another copy; an OSError without one."""
    for path in sorted(_mapped()):
        if path.name.startswith(name):
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    raise OSError(f"{name} is not loaded")


# --- Native calls ---

_REMOTE_SOCKADDR, _TRANSPORTS = 1 << 2, 1 << 3  # enum ucp_ep_attr_field
_CLIENT_ADDRESS = 1  # enum ucp_conn_request_attr_field
_LISTENER_FIELDS: Final = 1 << 0 | 1 << 2  # enum ucp_listener_params_field: the address, the connection handler
_MAX_LANES = 32
_SOCKADDR_WORDS = 16
_TCP_INFO_BYTES, _BYTES_RECEIVED = 136, 128  # struct tcp_info of linux/tcp.h, to the end of tcpi_bytes_received
_FATAL = 0  # UCS_LOG_LEVEL_FATAL
_OnRequest = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * _SOCKADDR_WORDS),
        ("remote_sockaddr", ctypes.c_uint64 * _SOCKADDR_WORDS),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class _RequestAttributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("client_sockaddr", ctypes.c_uint64 * _SOCKADDR_WORDS),
        ("client_id", ctypes.c_uint64),
    )


class _LogComponent(ctypes.Structure):
    _fields_ = (("log_level", ctypes.c_int), ("name", ctypes.c_char * 16))


class _ListenerParameters(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("address_bytes", ctypes.c_uint32),
        ("accept_handler", ctypes.c_void_p * 2),
        ("on_request", _OnRequest),
        ("on_request_argument", ctypes.c_void_p),
    )


def _call(library: str, name: str, *pointers: object) -> int | None:
    """The status (a byte) that a function returns, which takes nothing but pointers; None where there is none such."""
    try:
        function = loaded_library(library)[name]
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p,) * len(pointers), ctypes.c_int8
    return int(function(*pointers))


def _query(handle: int, **asked: Any) -> _EndpointAttributes | None:
    attributes = _EndpointAttributes(**asked)
    status = _call("libucp.so", "ucp_ep_query", handle, ctypes.byref(attributes))
    return attributes if status == 0 else None


def endpoint_lanes(handle: int) -> tuple[tuple[str, str], ...]:
    """(transport, device) of each lane of a live `ucp_ep_h`, such as `("tcp", "lo")`; empty where it is unknown."""
    entries = (_TransportEntry * _MAX_LANES)()
    found = _query(
        handle,
        field_mask=_TRANSPORTS,
        entries=ctypes.cast(entries, ctypes.POINTER(_TransportEntry)),
        num_entries=_MAX_LANES,
        entry_size=ctypes.sizeof(_TransportEntry),
    )
    lanes = entries[: min(found.num_entries, _MAX_LANES)] if found is not None else []
    return tuple((lane.transport.decode(), (lane.device or b"").decode()) for lane in lanes if lane.transport)


def endpoint_peer(handle: int) -> str | None:
    """`host:port` of the other end, or None where it is unknown."""
    found = _query(handle, field_mask=_REMOTE_SOCKADDR)
    return None if found is None else _in_words(bytes(found.remote_sockaddr))


def request_peer(handle: int) -> str | None:
    """`host:port` of a `ucp_conn_request_h` inside its listener's callback, or None where it cannot be told."""
    asked = _RequestAttributes(field_mask=_CLIENT_ADDRESS)
    status = _call("libucp.so", "ucp_conn_request_query", handle, ctypes.byref(asked))
    return _in_words(bytes(asked.client_sockaddr)) if status == 0 else None


def _in_words(raw: bytes) -> str | None:
    family, port = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, raw[4:8])}:{port}"
    if family == socket.AF_INET6:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw[8:24])}]:{port}"
    return None


def listener_has_answered(host: str, port: int) -> bool:
    """Whether a TCP connection of this process to that address (numeric) has received anything.

    UCX's connections are set up in two steps: over the listener's port, and then by a connection to a data port of each
    end. This tells whether the first one is done; a stopped peer accepts, too, but says nothing.
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


def release_cancelled(pointer: int) -> None:
    """Let a closed endpoint (`ucxx::Endpoint *`) forget its cancelled operations once they have ended.

    ucxx keeps them in a list of the endpoint, and they keep the endpoint: neither would ever be freed, nor the worker.
    Counting that list drops the ended ones.
    """
    _call("libucxx.so", "_ZNK4ucxx8Endpoint16getCancelingSizeEv", pointer)


def quiet_ucxx_log() -> None:
    """Keep ucxx's log of ordinary events off stdout, unless the user has chosen a level."""
    if "UCXX_LOG_LEVEL" in os.environ:
        return
    with suppress(OSError, ValueError):
        component = _LogComponent.in_dll(loaded_library("libucxx.so"), "_ZN4ucxx25ucxx_log_component_configE")
        if component.name == b"UCXX":  # the structure that we know
            component.log_level = _FATAL


class IPv6Listener:
    """UCX's listener on one IPv6 address, which ucxx cannot make. Close it once all that it accepted are closed.

    Args:
        worker: the `ucp_worker_h`.
        address: numeric, of this host.
        port: to listen on.
        on_request: gets each `ucp_conn_request_h`, inside progress.

    Raises:
        OSError: the port is in use there, or UCX cannot listen.
    """

    def __init__(self, worker: int, address: str, port: int, on_request: Callable[[int], None]) -> None:
        self._called = _OnRequest(lambda request, _: on_request(request))  # UCX holds its address only
        numeric = socket.inet_pton(socket.AF_INET6, address)
        raw = struct.pack("=HHI16sI", socket.AF_INET6, socket.htons(port), 0, numeric, 0)  # sockaddr_in6, ipv6(7)
        buffer = ctypes.create_string_buffer(raw)
        parameters = _ListenerParameters(
            field_mask=_LISTENER_FIELDS,
            address=ctypes.addressof(buffer),
            address_bytes=len(raw),
            on_request=self._called,
        )
        self._handle = ctypes.c_void_p()
        asked, handle = ctypes.byref(parameters), ctypes.byref(self._handle)
        status = _call("libucp.so", "ucp_listener_create", worker, asked, handle)
        if status != 0:
            raise OSError(f"UCX cannot listen on [{address}]:{port}, status {status}")

    def close(self) -> None:
        """Stop listening."""
        _call("libucp.so", "ucp_listener_destroy", self._handle)
