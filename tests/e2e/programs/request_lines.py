"""How the programs of the end-to-end tests talk: one JSON object a line, a request in, its answer out.

The first line is the program's settings and its answer says that it is ready. End of standard input is the wish to
stop, and also what ends a program whose test died. Standard error is for logs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ucxx_transport import logs

__all__ = ["Message", "answer", "answer_requests", "log_to_stderr", "requests"]

Message = dict[str, Any]


_answers = 1


def log_to_stderr() -> None:
    """Keep logs away from the answers: they go where standard output went, and that becomes standard error.

    UCX logs to standard output by itself.
    """
    global _answers  # noqa: PLW0603 - a process has one standard output
    _answers = os.dup(1)
    os.dup2(2, 1)
    logs.log_to_stderr("test")


def requests() -> Iterator[Message]:
    """The requests, until the end of standard input."""
    for line in sys.stdin:
        yield json.loads(line)


def answer(message: Message) -> None:
    """Send one line, whole or not at all."""
    line = json.dumps(message).encode() + b"\n"
    os.write(_answers, line)


def answer_requests(handle: Callable[[Message], Message]) -> None:
    """Answer one request after the other; each answer carries its request's id."""
    for request in requests():
        answer({"id": request["id"], **handle(request)})
