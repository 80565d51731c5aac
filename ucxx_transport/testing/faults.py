"""What goes wrong on a `MemoryNetwork`, on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


class Hold:
    """Keeps messages back until it is set, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], object]] = []
        self._is_set = False

    def is_set(self) -> bool:
        """Whether messages pass."""
        return self._is_set

    def set(self) -> None:
        """Let what was kept back pass, and all that follows."""
        with self._lock:
            self._is_set = True
            waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def when_set(self, action: Callable[[], object]) -> None:
        """Call this when it is set: now, or by the thread that sets it."""
        with self._lock:
            if not self._is_set:
                self._waiting.append(action)
                return
        action()


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches of a `MemoryNetwork`; each message sent takes them in this order. All are off by default.

    Attributes:
        reset_after: this many further messages pass, then the connection of the next one breaks instead.
        spare: this many further messages pass, then the next three faults are looked at.
        drop: this many messages vanish; their sends succeed.
        truncate_to: the next message loses what is beyond this many bytes.
        flip_byte: the next message arrives with the byte at this offset inverted, if it has one.
        hold: messages are delivered only once it is set, in order.
        refuse: connections are refused.
        hang_connect: connections neither succeed nor fail.
        never_complete: further receives never end, not even by `close()`, which then is not clean.
    """

    reset_after: int | None = None
    spare: int = 0
    drop: int = 0
    truncate_to: int | None = None
    flip_byte: int | None = None
    hold: Hold | None = None
    refuse: bool = False
    hang_connect: bool = False
    never_complete: bool = False

    def breaks_connection(self) -> bool:
        """Whether the connection breaks in the place of the next message."""
        if self.reset_after is None:
            return False
        self.reset_after -= 1
        if self.reset_after >= 0:
            return False
        self.reset_after = None
        return True

    def apply(self, content: bytes) -> bytes | None:
        """What of the next message arrives; None when it vanishes."""
        if self.spare > 0:
            self.spare -= 1
            return content
        if self.drop > 0:
            self.drop -= 1
            return None
        if self.truncate_to is not None:
            content, self.truncate_to = content[: self.truncate_to], None
        if self.flip_byte is not None:
            flipped = bytearray(content)
            if self.flip_byte < len(flipped):
                flipped[self.flip_byte] ^= 0xFF
            content, self.flip_byte = bytes(flipped), None
        return content
