"""What a `MemoryLink` can be told to do wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

__all__ = ["Faults"]


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches of a `MemoryNetwork`; each message sent takes them in this order.

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
