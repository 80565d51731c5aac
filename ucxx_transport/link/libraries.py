"""UCX's shared libraries: which files this process has loaded, and which it is about to load.

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
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from ucxx_transport.errors import ConfigError

__all__ = ["check_loadable", "check_loaded", "library_in_use", "loaded_library"]

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
