"""An asyncio event loop whose clock jumps to the next timer as soon as nothing else can run.

Time limits of minutes are tested in microseconds and exactly: nothing depends on how busy the machine is. For code that
lives in one event loop and uses its clock; a worker thread's time does not count, so a test must not wait for one here.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

__all__ = ["VirtualTimeLoop", "settle"]

# A loop that waits for nothing at all is a test that hangs: better a failure with a stack than a frozen run.
STUCK_AFTER_S = 20.0
# The clock lands just behind a timer, never a rounding error before it.
NUDGE_S = 1e-6


class _JumpingSelector(selectors.BaseSelector):
    """Reports what is ready now; when nothing is, moves the clock instead of waiting."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now_s = 1000.0

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            ready = self._real.select(STUCK_AFTER_S)
            if not ready:
                raise RuntimeError("every task waits for something that nothing will do")
            return ready
        ready = self._real.select(0)
        if not ready and timeout > 0:
            self.now_s += timeout + NUDGE_S
        return ready

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module. As anyio backend: `("asyncio", {"loop_factory": VirtualTimeLoop})`."""

    def __init__(self) -> None:
        self._clockwork = _JumpingSelector()
        super().__init__(self._clockwork)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clockwork.now_s

    def pass_time(self, seconds: float) -> None:
        """Let `seconds` go by at once, as if the machine had been busy elsewhere."""
        self._clockwork.now_s += seconds


async def settle() -> None:
    """Return once every other task waits for something: under a `VirtualTimeLoop` only then does time go on."""
    await asyncio.sleep(NUDGE_S)
