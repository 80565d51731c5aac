"""Log events: a name and keys, through the standard library's `logging`.

Each module logs to the logger of its own name, below `ucxx_transport`. That one has a `NullHandler`: the library is
quiet until the application configures logging, and never writes to standard output.

| formatter                                          | what it sees of `_log.warning("lease_lost", lease=7)` |
|----------------------------------------------------|-------------------------------------------------------|
| `logging.Formatter`                                | the message `lease_lost lease=7`                      |
| one of attributes, as for JSON                     | the attributes `event` and `lease` of the record, too |
| structlog's `ProcessorFormatter` with `ExtraAdder` | the event `lease_lost` with the key `lease`           |

A logged exception is text, made here: no formatter can show the local variables of its frames, which may hold a token.
It is the record's `exc_text`, and its key `exception`, where structlog has it.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from functools import partialmethod
from typing import Final

ROOT: Final = "ucxx_transport"
logging.getLogger(ROOT).addHandler(logging.NullHandler())

_RESERVED: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "event", "exception"}


class EventLogger:
    """Logs a module's events with keys; one whose name a `LogRecord` needs itself gets a `_` behind it there."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, trace_of: Callable[[], str] | None, event: str, /, **keys: object) -> None:
        logger = self._logger
        if not logger.isEnabledFor(level):
            return
        extra = {f"{name}_" if name in _RESERVED else name: value for name, value in keys.items()}
        extra["event"] = event
        file, line, function, _ = logger.findCaller(stacklevel=2)
        trace = None if trace_of is None else trace_of().rstrip()
        if trace is not None:
            extra["exception"] = trace
        text = " ".join([event, *(f"{name}={value!r}" for name, value in keys.items())])
        record = logger.makeRecord(logger.name, level, file, line, text, (), None, function, extra)
        record.exc_text = trace
        logger.handle(record)

    debug = partialmethod(_log, logging.DEBUG, None)
    info = partialmethod(_log, logging.INFO, None)
    warning = partialmethod(_log, logging.WARNING, None)
    error = partialmethod(_log, logging.ERROR, None)
    exception = partialmethod(_log, logging.ERROR, traceback.format_exc)  # with the one that is being handled


get_logger = EventLogger


def effective_level() -> int:
    """The level below which the application drops this library's events; helper processes log from it on, too."""
    return logging.getLogger(ROOT).getEffectiveLevel()


def log_to_stderr(role: str, level: int = logging.INFO) -> None:
    """Log this process's events from `level` on to standard error, its role in front; for helper processes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{role}] %(levelname)s %(message)s"))
    root = logging.getLogger(ROOT)
    root.addHandler(handler)
    root.setLevel(level)
