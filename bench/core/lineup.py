"""The processes of a question, which end with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.core.control import ControlledProcess
from bench.core.ends import Reader, run_async_reader, run_reader, run_source
from bench.core.ours import AsyncClientReader, BlockingReader, RingSource

__all__ = ["Lineup"]


class Lineup(ExitStack):
    """Starts sources and readers; ends them all when it is left."""

    def source(self, name: str, make: Callable[..., Any], *arguments: Any) -> ControlledProcess:
        """A process that carries out orders with what `make(*arguments)` makes; it has a `close()`."""
        return self._start(f"source of {name}", run_source, make, *arguments)

    def reader(self, name: str, make: Callable[[], Reader]) -> ControlledProcess:
        """A process with a blocking client."""
        return self._start(f"reader of {name}", run_reader, make)

    def async_reader(self, name: str, make: Callable[[], Reader]) -> ControlledProcess:
        """A process with a client on an event loop."""
        return self._start(f"reader of {name}", run_async_reader, make)

    def ring(self, name: str, **server: Any) -> ControlledProcess:
        """A worker of this package, whose server has these settings."""
        return self.source(name, RingSource, server)

    def blocking(self, name: str = "blocking client") -> ControlledProcess:
        """`SyncUCXXClient`."""
        return self.reader(name, BlockingReader)

    def asyncio(self, name: str = "asyncio client") -> ControlledProcess:
        """`UCXXClient`."""
        return self.async_reader(name, AsyncClientReader)

    def _start(self, name: str, main: Callable[..., None], *arguments: Any) -> ControlledProcess:
        process = ControlledProcess(name, main, *arguments)
        self.callback(process.close)
        return process
