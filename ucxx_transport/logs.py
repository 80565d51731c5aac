"""Log events: a name and keys, through the standard library's `logging`.

Each module logs to the logger of its own name, below `ucxx_transport`, which has a `NullHandler`: the library is quiet
until the application configures logging.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

__all__ = ["EventLogger", "get_logger", "log_to_stderr"]

ROOT: Final = "ucxx_transport"
logging.getLogger(ROOT).addHandler(logging.NullHandler())

_RESERVED: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _Message:
    """An event and its keys, worded when a handler asks for it."""

    __slots__ = ("event", "keys")

    def __init__(self, event: str, keys: dict[str, object]) -> None:
        self.event = event
        self.keys = keys

    def __str__(self) -> str:
        return " ".join([self.event, *(f"{name}={value!r}" for name, value in self.keys.items())])


class EventLogger:
    """Logs events with keys; the keys are attributes of the `LogRecord` too, with a `_` behind a reserved name.

    Args:
        name: the logger's, usually `__name__`.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **keys: object) -> None:
        """Log at DEBUG."""
        self._log(logging.DEBUG, event, keys)

    def info(self, event: str, /, **keys: object) -> None:
        """Log at INFO."""
        self._log(logging.INFO, event, keys)

    def warning(self, event: str, /, **keys: object) -> None:
        """Log at WARNING."""
        self._log(logging.WARNING, event, keys)

    def error(self, event: str, /, **keys: object) -> None:
        """Log at ERROR."""
        self._log(logging.ERROR, event, keys)

    def exception(self, event: str, /, **keys: object) -> None:
        """Log at ERROR, with the exception that is being handled."""
        self._log(logging.ERROR, event, keys, exc_info=True)

    def _log(self, level: int, event: str, keys: dict[str, object], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            extra = {f"{name}_" if name in _RESERVED else name: value for name, value in keys.items()}
            extra["event"] = event
            self._logger.log(level, _Message(event, keys), exc_info=exc_info, extra=extra, stacklevel=3)


def get_logger(name: str) -> EventLogger:
    """The event logger of a module.

    Args:
        name: the module's `__name__`.
    """
    return EventLogger(name)


def log_to_stderr(role: str) -> None:
    """Log this process's events to standard error, each line with the role in front; for helper processes.

    Args:
        role: what the process is to its worker, such as "ucxx server".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{role}] %(levelname)s %(message)s"))
    root = logging.getLogger(ROOT)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
