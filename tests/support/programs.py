"""Programs of `tests/e2e/programs`, run as processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

__all__ = ["Program", "program"]

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """One running program; it talks as `tests.e2e.programs.request_lines` says."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        """Its process, which is also its process group."""
        return self.process.pid

    def tell(self, **facts: object) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(facts).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line; fails when the program ended without one. Bounded by the test run's own limit on hangs."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended without an answer, status {self.process.wait()}"
        heard = json.loads(line)
        assert isinstance(heard, dict)
        return heard

    def has_spoken(self) -> bool:
        """Whether there is a line, or an end, to `hear` now; for a program that has been heard up to here."""
        assert self.process.stdout is not None
        return bool(select([self.process.stdout], [], [], 0)[0])

    def ask(self, **facts: object) -> dict[str, Any]:
        """`tell`, then `hear`."""
        self.tell(**facts)
        return self.hear()

    def end_input(self) -> None:
        """Close its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it alone."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, minus the signal's number when one ended it; fails when it hangs."""
        return self.process.wait(timeout=60)


@contextmanager
def program(
    module: str, *words: str, package: str = "tests.e2e.programs", prefix: Sequence[str] = ()
) -> Iterator[Program]:
    """Run `python -m PACKAGE.MODULE` in a process group of its own; killed at the end if it still runs.

    Args:
        module: what runs.
        words: its arguments.
        package: where the module is.
        prefix: what its command line begins with, such as `Host.prefix`.
    """
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", f"{package}.{module}", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            yield Program(process)
        finally:
            process.kill()
