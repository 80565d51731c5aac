"""Faults: what a `MemoryNetwork` does wrong on purpose."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches of a `MemoryNetwork`; each message sent takes them in this order. All are off by default.

    Attributes:
        reset_after: this many further messages pass, then the connection of the next one breaks instead.
        spare: this many further messages pass, then the next three faults are looked at.
        drop: this many messages vanish; their sends succeed.
        truncate_to: the next message loses what is beyond this many bytes.
        flip_byte: the next message arrives with the byte at this offset inverted.
        hold: while set to an event, messages are delivered only once it is set, in order.
        refuse: connections are refused.
        hang_connect: connections neither succeed nor fail.
        never_complete: further receives never end, not even by `close()`, which then returns False.
    """

    reset_after: int | None = None
    spare: int = 0
    drop: int = 0
    truncate_to: int | None = None
    flip_byte: int | None = None
    hold: asyncio.Event | None = None
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

    def apply(self, content: bytes | memoryview) -> bytes | memoryview | None:
        """What of the next message arrives; None when it vanishes."""
        if self.spare > 0:
            self.spare -= 1
            return content
        if self.drop > 0:
            self.drop -= 1
            return None
        if self.truncate_to is not None:
            content, self.truncate_to = bytes(content[: self.truncate_to]), None
        if self.flip_byte is not None:
            flipped = bytearray(content)
            flipped[self.flip_byte] ^= 0xFF
            content, self.flip_byte = bytes(flipped), None
        return content
