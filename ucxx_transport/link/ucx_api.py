"""All that is called of ucxx and UCX: the one place that imports ucxx, and that looks at UCX's shared libraries.

`ucxx._lib` is private API: extras pin its minor version, and a test names every symbol of `SYMBOLS`. What it does not
reach is called natively; what such a call cannot say is unknown. Structures are those of `ucp/api/ucp.h` of UCX 1.19 to
1.21, to the last field used; a field mask says which those are.

Importing ucxx writes `UCX_*` defaults into `os.environ`, from where child processes would take them for the user's.
They are removed again here; those that matter are passed to each context by `ucx`. Where the program has imported
ucxx before, they are there already and count as the environment's.

One process holds one UCX. A second one, of torch's, mpi4py's or LD_PRELOAD's, has the same names inside, so what is
loaded later is bound to parts of what was loaded first: undefined symbols, aborts, and hangs. So files are compared
before ucxx is imported, by which UCX initialises itself.

| `RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY` | what ucxx loads                                                              |
|---------------------------------------|------------------------------------------------------------------------------|
| unset or `false`                      | the files of the wheel `libucx`; without that wheel, the loader's            |
| any other value                       | the loader's (`ld.so`); what that does not find, from the wheel              |
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib
import importlib.util
import os
import re
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ucxx_transport.errors import BusyError, ConfigError, TransportError
from ucxx_transport.link.base import LostReason, lost
from ucxx_transport.machine import check_proc, open_standard_streams

Meaning: TypeAlias = LostReason | Literal["busy", "config"]

_MEANINGS: Final[dict[Meaning, tuple[str, tuple[int, ...]]]] = {
    "truncated": ("MessageTruncated", (-9,)),
    "cancelled": ("Canceled", (-16,)),
    "reset": ("ConnectionReset EndpointTimeout TimedOut", (-25, -80, -20)),
    "refused": ("NotConnected Rejected", (-24, -23)),  # `reset` once it was connected
    "unreachable": ("Unreachable InvalidAddr", (-6, -7)),
    "busy": ("NoMemory NoResource Busy ExceedsLimit", (-4, -2, -15, -21)),
    "config": ("Config InvalidParam Unsupported NotImplemented NoDevice", (-5, -22, -8, -14)),
}
"""What UCX's errors mean, by class of ucxx and by status (ucs/type/status.h); any other is `aborted`."""


def _members(of: str, names: str) -> list[str]:
    return [f"{of}.{name}" for name in names.split()]


SYMBOLS: Final = {
    "ucxx._lib.arr": ("Array",),
    "ucxx._lib.libucxx": (
        *_members("Feature", "STREAM TAG WAKEUP"),
        *_members("UCXEndpoint", "alive close_blocking create handle raise_on_error set_close_callback"),
        *_members("UCXListener", "create create_endpoint_from_conn_request port"),
        *_members("UCXWorker", "arm epoll_file_descriptor handle init_blocking_progress_mode"),
        *(f"UCX{name}Error" for names, _ in _MEANINGS.values() for name in names.split()),
        *("UCXContext", "UCXError", "UCXWorker"),
    ),
}
"""Every private symbol that this package uses, by module."""

UcxEndpoint: TypeAlias = Any  # ucxx has no stubs; its `close()` is not used: see `Endpoint.close`


class Binding(NamedTuple):
    """What of ucxx is used: its library, whose errors are all of class `UCXError`, and its `Array`."""

    lib: Any
    make_array: Callable[[object], Any]

    def error(self, exc: Exception, *, peer: str, connected: bool) -> TransportError:
        """Our error for one of UCX's, of a connection that had been up or not; raise it `from exc`."""
        meanings = (
            meaning
            for meaning, (names, _) in _MEANINGS.items()
            if any(isinstance(exc, getattr(self.lib, f"UCX{name}Error")) for name in names.split())
        )
        return _error(next(meanings, "aborted"), f"{type(exc).__name__}: {exc}", peer=peer, connected=connected)


def status_error(status: int, *, peer: str, connected: bool) -> TransportError:
    """Our error for a status with which an operation ended."""
    meanings = (meaning for meaning, (_, statuses) in _MEANINGS.items() if status in statuses)
    return _error(next(meanings, "aborted"), status_in_words(status), peer=peer, connected=connected)


def _error(meaning: Meaning, words: str, *, peer: str, connected: bool) -> TransportError:
    if meaning == "busy":
        return BusyError("UCX is out of a resource for now; try again", peer=peer, ucx=words)
    if meaning == "config":
        return ConfigError("UCX refuses this setting or operation", peer=peer, ucx=words)
    return lost("reset" if connected and meaning == "refused" else meaning, peer=peer, ucx=words)


_lock = threading.Lock()
NOT_INSTALLED: Final = (
    'UCX is not installed; run pip install "ucxx_transport[cpu]" ([cu12] or [cu13] with a GPU), or stay on one '
    "host, where episodes are read in place, with writers that have no server: serve=False"
)


def load_binding() -> Binding:
    """Import ucxx once, leaving `os.environ` as it was; a ConfigError that says what to install where it is none."""
    with _lock:  # a race would take ucxx's own writes for the user's settings
        return _import_binding()


@functools.cache
def _import_binding() -> Binding:
    before = {name for name in os.environ if name.startswith("UCX")}
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # UCX logs to stdout, and reads this once, when it is loaded
    try:
        open_standard_streams()
        check_proc()
        check_loaded()
        lib = importlib.import_module("ucxx._lib.libucxx")
        arr = importlib.import_module("ucxx._lib.arr")
    except ModuleNotFoundError as exc:
        raise ConfigError(NOT_INSTALLED, missing=exc.name) from exc
    except (ImportError, OSError, AttributeError) as exc:  # a shared library, or a stand-in, does not fit the others
        raise ConfigError(
            "ucxx cannot be imported; another UCX or ucxx of this machine may be in its way",
            reason=f"{type(exc).__name__}: {exc}",
            ucx=library_in_use(),
        ) from exc
    finally:
        for name in [name for name in os.environ if name.startswith("UCX") and name not in before]:
            del os.environ[name]
    check_loaded()
    try:
        attrgetter(*SYMBOLS["ucxx._lib.libucxx"])(lib)
    except AttributeError as exc:
        raise ConfigError(
            'this ucxx lacks what the link uses; run pip install "ucxx_transport[cu12]" (or [cu13] with CUDA 13)',
            missing=exc.name,
            ucxx=getattr(importlib.import_module("ucxx"), "__version__", "unknown"),
        ) from exc
    _quiet_ucxx_log()
    return Binding(lib, arr.Array)


OLDEST: Final = (1, 19, 0)  # the oldest UCX that the pinned ucxx takes: `__ucx_min_version__` in its `__init__.py`
PREFER_SYSTEM: Final = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"

_FILE: Final = re.compile(r"libuc[mpst]\.so(\.\d+)*")


def check_loaded() -> None:
    """Refuse two UCX in one process, and one that is too old, with a ConfigError; before ucxx is imported, and after.

    An OSError: there is none that can be loaded.
    """
    own = _wheel_folder()
    if own is not None and os.environ.get(PREFER_SYSTEM, "false").lower() != "false":
        if library_in_use() is None:
            importlib.import_module("libucx").load_library()  # as ucxx does; it initialises nothing
        own = None
    loaded = _loaded_files()
    if own is not None:
        expected = [file.resolve() for file in own.iterdir()]  # an installer may have made links of them
    else:
        expected = [file for file in loaded if file.parent == loaded[0].parent]
    other = next((file for file in loaded if file not in expected), None)
    oldest = ".".join(map(str, OLDEST))
    if other is not None:
        remedy = f"; or let ucxx use that one, if it is {oldest} or later, by {PREFER_SYSTEM}=true" if own else ""
        raise ConfigError(
            f"two UCX libraries in one process: {other} is loaded, and ucxx uses {own or expected[0].parent}. Remove "
            f"one of them (an import, LD_PRELOAD, LD_LIBRARY_PATH), or move it to another process{remedy}"
        )
    try:
        ask = loaded_library("libucp.so").ucp_get_version
    except (OSError, AttributeError):
        return  # not loaded yet, or not to be asked
    parts = [ctypes.c_uint() for _ in range(3)]
    ask(*map(ctypes.byref, parts))
    version = tuple(part.value for part in parts)
    if version < OLDEST:
        found = ".".join(map(str, version))
        raise ConfigError(
            f"{library_in_use()} is UCX {found}, and ucxx needs {oldest} or later: install a later one, or "
            f"unset {PREFER_SYSTEM} to use the wheel's"
        )


def library_in_use() -> Path | None:
    """The file of `libucp` that this process has loaded; None before that."""
    return next((file for file in _loaded_files() if file.name.startswith("libucp")), None)


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
    lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    return {Path(f"/{path}") for line in lines if (path := line.partition("/")[2])}


@functools.cache
def loaded_library(name: str) -> ctypes.CDLL:
    """The library of that name which this process has loaded already, never another copy; an OSError without one."""
    for path in sorted(_mapped()):
        if path.name.startswith(name):
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    raise OSError(f"{name} is not loaded")


_TRANSPORTS = 1 << 3  # enum ucp_ep_attr_field
_CLIENT_ADDRESS = 1  # enum ucp_conn_request_attr_field
_LISTENER_FIELDS: Final = 1 << 0 | 1 << 2  # enum ucp_listener_params_field: the address, the connection handler
_MAX_LANES = 32
_SOCKADDR_WORDS = 16
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of asm-generic/socket.h
_DROP_ALL: Final = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # linux/filter.h: return 0 bytes
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
    )


class _ListenerParameters(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("address_bytes", ctypes.c_uint32),
        ("accept_handler", ctypes.c_void_p * 2),
        ("on_request", _OnRequest),
        ("on_request_argument", ctypes.c_void_p),
    )


def _call(name: str, *pointers: object) -> int:
    """The status (a byte) that a function of UCX returns, which takes nothing but pointers."""
    function = loaded_library("libucp.so")[name]
    function.argtypes, function.restype = (ctypes.c_void_p,) * len(pointers), ctypes.c_int8
    return int(function(*pointers))


def ucp_functions(*names: str) -> list[int]:
    """The addresses of functions of UCX."""
    library = loaded_library("libucp.so")
    return [ctypes.cast(library[name], ctypes.c_void_p).value or 0 for name in names]


def status_in_words(status: int) -> str:
    """What UCX calls a status."""
    word = loaded_library("libucs.so").ucs_status_string
    word.argtypes, word.restype = (ctypes.c_int8,), ctypes.c_char_p
    return f"{word(status).decode()} ({status})"


def endpoint_lanes(handle: int) -> tuple[tuple[str, str], ...]:
    """(transport, device) of each lane of a live `ucp_ep_h`, such as `("tcp", "lo")`; empty where it is unknown."""
    entries = (_TransportEntry * _MAX_LANES)()
    found = _EndpointAttributes(
        field_mask=_TRANSPORTS,
        entries=ctypes.cast(entries, ctypes.POINTER(_TransportEntry)),
        num_entries=_MAX_LANES,
        entry_size=ctypes.sizeof(_TransportEntry),
    )
    status = _call("ucp_ep_query", handle, ctypes.byref(found))
    lanes = entries[: min(found.num_entries, _MAX_LANES)] if status == 0 else []
    return tuple((lane.transport.decode(), (lane.device or b"").decode()) for lane in lanes if lane.transport)


def request_peer(handle: int) -> str | None:
    """`host:port` of a `ucp_conn_request_h` inside its listener's callback, or None where it is unknown."""
    asked = (ctypes.c_uint64 * (1 + _SOCKADDR_WORDS))(_CLIENT_ADDRESS)  # ucp_conn_request_attr_t: the mask, the address
    if _call("ucp_conn_request_query", handle, ctypes.byref(asked)) != 0:
        return None
    raw = bytes(asked)[8:]
    family, port = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, raw[4:8])}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw[8:24])}]:{port}" if family == socket.AF_INET6 else None


def tcp_sockets() -> Iterator[socket.socket]:
    """This process's TCP sockets, each by a descriptor of its own that the next one ends; fewer where none is left."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir("/proc/self/fd")
    for name in names:
        with suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK  # told, or a default timeout switches the other, too
                with socket.socket(socket.AF_INET6, kind, socket.IPPROTO_TCP, os.dup(int(name))) as each:
                    if each.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_TCP:
                        yield each


def bytes_received(each: socket.socket) -> int:
    """How many bytes a TCP socket has got so far, as the kernel counts them."""
    return int.from_bytes(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)[128:], sys.byteorder)


def close_door(each: socket.socket) -> int:
    """Let a TCP socket bring nothing more; how much of it waits to be accepted, or read.

    A listening one keeps its port, and its owner hears of nothing: a filter drops what comes (socket(7)).
    """
    with suppress(OSError):  # a sandbox that has no filters
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(_DROP_ALL)))
            return int.from_bytes(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[24:], sys.byteorder)
    with suppress(OSError):  # its peer has
        each.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):  # of such a listener
        return int.from_bytes(fcntl.ioctl(each, termios.FIONREAD, bytes(4)), sys.byteorder)
    return 0


def _quiet_ucxx_log() -> None:
    """Keep ucxx's log of ordinary events off stdout, unless the user has chosen a level."""
    if "UCXX_LOG_LEVEL" in os.environ:
        return
    with suppress(OSError, ValueError):
        # The first field of the structure of that name is the level.
        ctypes.c_int.in_dll(loaded_library("libucxx.so"), "_ZN4ucxx25ucxx_log_component_configE").value = _FATAL


class IPv6Listener:
    """UCX's listener on one IPv6 address of this host, which ucxx cannot make; it ends with its last reference.

    `on_request` gets each `ucp_conn_request_h`, inside progress. An OSError: UCX cannot listen there.
    """

    def __init__(self, worker: int, address: str, port: int, on_request: Callable[[int], None]) -> None:
        self._handle = ctypes.c_void_p()
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
        asked, handle = ctypes.byref(parameters), ctypes.byref(self._handle)
        status = _call("ucp_listener_create", worker, asked, handle)
        if status != 0:
            raise OSError(f"UCX cannot listen on [{address}]:{port}, status {status}")

    def __del__(self) -> None:
        if self._handle.value:
            _call("ucp_listener_destroy", self._handle)
