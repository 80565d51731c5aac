"""All that is called of ucxx and UCX: the one place that imports it.

`ucxx._lib` is private API: extras pin its minor version, and a test names every symbol of `SYMBOLS`.

Importing ucxx writes `UCX_*` defaults into `os.environ`, from where child processes would take them for the user's.
They are removed again here; those that matter are passed to each context by `settings`. Where the program has imported
ucxx before, they are there already and count as the environment's.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ucxx_transport.errors import BusyError, ConfigError, TransportError
from ucxx_transport.link.base import LostReason, lost
from ucxx_transport.link.libraries import check_loaded, library_in_use, status_in_words
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
        *_members("UCXListener", "create create_endpoint_from_conn_request ip port"),
        *_members("UCXWorker", "arm epoll_file_descriptor handle init_blocking_progress_mode"),
        *(f"UCX{name}Error" for names, _ in _MEANINGS.values() for name in names.split()),
        *("UCXContext", "UCXError", "UCXWorker"),
    ),
}
"""Every private symbol that this package uses, by module."""

# ucxx has no stubs.
UcxEndpoint: TypeAlias = Any  # its `close()` is not used: see `Endpoint.close`
UcxListener: TypeAlias = Any  # UCX keeps a raw pointer into it until every endpoint that it accepted is gone


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
    try:
        attrgetter(*SYMBOLS["ucxx._lib.libucxx"])(lib)
    except AttributeError as exc:
        raise ConfigError(
            'this ucxx lacks what the link uses; run pip install "ucxx_transport[cu12]" (or [cu13] with CUDA 13)',
            missing=exc.name,
            ucxx=getattr(importlib.import_module("ucxx"), "__version__", "unknown"),
        ) from exc
    return Binding(lib, arr.Array)
