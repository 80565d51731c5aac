"""The running counters behind `LinkStatistics`: plain integers, for the hot path to add to."""

from __future__ import annotations

from ucxx_transport.link.base import LinkStatistics

__all__ = ["Counters"]


class Counters:
    """Written by one thread; a snapshot may be taken from any."""

    __slots__ = ("ended", *(name for name in LinkStatistics.__dataclass_fields__ if name != "in_flight"))

    endpoints_connected: int
    endpoints_accepted: int
    endpoints_open: int
    sends: int
    receives: int
    sent_bytes: int
    posted_receive_bytes: int
    ended: int
    failed: int
    truncated: int
    peers_lost: int
    parked_buffers: int
    parked_bytes: int
    progress_turns: int
    inline_completions: int
    sleeps: int
    wakeups: int
    spins: int
    stray_messages: int
    swallowed_errors: int

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def snapshot(self) -> LinkStatistics:
        """The counters as they are now."""
        counted = {name: getattr(self, name) for name in self.__slots__ if name != "ended"}
        return LinkStatistics(in_flight=self.sends + self.receives - self.ended, **counted)
