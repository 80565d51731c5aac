"""Compilation of the sources into one library: by `$CC`, else by cc, gcc, clang or the compiler of ziglang (PyPI).

Run as a program it builds the package's own library in place. Standard library only: the package's build hook loads
this file by its path, before the package can be imported. What only a compilation needs is imported there: each process
that uses a ring loads this module for the names.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BUILD = Path(__file__)
LIBRARY = Path(__file__).with_name("libnative.so")
SOURCES = (Path(__file__).with_name("ring.c"), Path(__file__).with_name("flight.c"))
HEADER = Path(__file__).with_name("ring_layout.h")
FLAGS = ("-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")

ZIG_GLIBC = "2.28"  # the glibc that ziglang links for: manylinux_2_28, the oldest that a supported distribution has


class CompilationError(RuntimeError):
    """Nothing on this machine compiles the sources."""


class Compiler(NamedTuple):
    """A command that compiles C, where it comes from, and the tag of a wheel that holds what it makes (PEP 425)."""

    name: str
    command: tuple[str, ...]
    platform_tag: str


def source_hash() -> int:
    """64 bits that name the sources; a library has those of its own."""
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in (*SOURCES, HEADER)), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def compilers() -> list[Compiler]:
    """The compilers that are there, the preferred one first; `$CC` and no other where it is set."""
    import importlib.util
    import platform
    import shlex
    import shutil

    machine = platform.machine()
    own = f"linux_{machine}"
    if chosen := os.environ.get("CC"):
        return [Compiler(f"$CC ({chosen})", tuple(shlex.split(chosen)), own)]
    found = [Compiler(name, (path,), own) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        target = f"{machine}-linux-gnu.{ZIG_GLIBC}"
        command = (sys.executable, "-m", "ziglang", "cc", "-target", target)
        found.append(Compiler("ziglang", command, f"manylinux_{ZIG_GLIBC.replace('.', '_')}_{machine}"))
    return found


def compile_library(target: Path, flags: Sequence[str] = ()) -> Compiler:
    """Compile the sources into a shared library; the compiler that did it, or a CompilationError with what all said."""
    from subprocess import PIPE, STDOUT, CalledProcessError, run

    tried = []
    flags = (*FLAGS, f"-DRING_SOURCE={source_hash():#x}ULL", *flags)
    made = target.with_suffix(f".{os.getpid()}.tmp")
    for compiler in compilers():
        command = [*compiler.command, *flags, *map(str, SOURCES), "-o", str(made)]
        try:
            run(command, stdout=PIPE, stderr=STDOUT, text=True, errors="replace", check=True)
            made.replace(target)  # a process that has the old one mapped keeps it
        except OSError as exc:  # it is not there, or has made nothing
            tried.append(f"{compiler.name}: {exc.strerror}: {exc.filename}")
        except CalledProcessError as exc:
            tried.append(f"{compiler.name}: exit {exc.returncode}: {exc.stdout.strip()[-400:]}")
        else:
            return compiler
    made.unlink(missing_ok=True)
    raise CompilationError(
        "the sources cannot be compiled. Tried: "
        + ("; ".join(tried) or "nothing: there is no $CC, cc, gcc, clang or ziglang")
        + (". Unset CC, or name one that works" if os.environ.get("CC") else ". Install gcc, or `pip install ziglang`")
        + ", and install ucxx_transport again"
    )


if __name__ == "__main__":
    sys.stderr.write(f"{LIBRARY}: compiled with {compile_library(LIBRARY).name}\n")
