"""The command `ucxx-transport` as a test calls it: inside this process, or as a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ucxx_transport.cli.program import main

__all__ = ["COMMAND", "Answer", "call", "running"]

COMMAND = (sys.executable, "-m", "ucxx_transport")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call gave."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document of stdout."""
        (line,) = self.out.splitlines()
        return json.loads(line)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Answer:
    """Run the command in this process, which logs afterwards as before: its standard error is this test's alone."""
    capsys.readouterr()
    logger = logging.getLogger("ucxx_transport")
    handlers, level = list(logger.handlers), logger.level
    try:
        with pytest.raises(SystemExit) as caught:
            main(words)
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return Answer(code=caught.value.code, out=out, err=err)


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command as a process; killed on leaving, should it still run."""
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
