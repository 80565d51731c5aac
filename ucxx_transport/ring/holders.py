"""Holders: whose read attempts keep slots, since when, and so why a write finds none."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from time import monotonic_ns
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Identity
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import STATE_MASK, SlotState

_NAMED: Final = 3
"""Holders of slots in a message; of the others it says how many there are."""


_SIDECAR: Final = b"ucxx_transport/sidecar/boot.py\0"
"""In the command line of a process that serves a port."""


class Holder(NamedTuple):
    """A reader that has attempts in flight: its process, on the ring's host, and its id (0: unnamed).

    `slots` is how many it holds; `held_s` how long the one that it has held longest. `process` names it in a message:
    what it runs, or that it is the ring's server, which reads for a client of another host.
    """

    pid: int
    reader: int
    process: str
    slots: int
    held_s: float


def process_name(pid: int) -> str:
    """A process in the words of a message: what it runs, or that it is one of a ring's server."""
    with suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        is_server = _SIDECAR in Path(f"/proc/{pid}/cmdline").read_bytes()
        return f"the ring's server, pid {pid}" if is_server else f"pid {pid} ({name})"
    return f"pid {pid}"


def find_holders(segment: Segment, identity: Identity) -> list[Holder]:
    """Who reads slots now, the one with the most first. Looked at without the lock, as `why_full`."""
    return _holders(*_headers(segment, identity))


def why_full(segment: Segment, identity: Identity) -> tuple[str, dict[str, object]]:
    """Why a write found no slot, in words that end with what helps, and the numbers behind them.

    It looks at all slots without the lock: one that changes meanwhile may be missing.
    """
    states, entries = _headers(segment, identity)
    holders = _holders(states, entries)
    had = (entries[:, :, layout.ENTRY_LEASE] & 1).sum(axis=1)[states == SlotState.READY]
    partly_read = dict(zip(*(column.tolist() for column in np.unique(had, return_counts=True)), strict=True))
    unread, writing = partly_read.pop(0, 0), int((states == SlotState.WRITING).sum())
    parts, remedies = [], []
    for holder in holders[:_NAMED]:
        name = holder.process + (f", reader {holder.reader:x}," if holder.reader else "")
        longest = "the longest for" if holder.slots > 1 else "for"
        parts.append(f"{name} holds {holder.slots}, {longest} {holder.held_s:.1f} s")
    if len(holders) > _NAMED:
        parts.append(f"{len(holders) - _NAMED} other readers hold some")
    if holders:
        remedies.append("a trainer that keeps arrays keeps their slots: clone them, or read with local='copy'")
    for readers, slots in partly_read.items():
        which = {1: "second", 2: "third"}.get(readers, f"{readers + 1}th")
        parts.append(f"{_wait(slots)} for a {which} reader")
    if partly_read:
        remedies.append(
            "start the missing reader; if it is gone for good, write(readers=1), and discard(refs) by a client that "
            "has not read them"
        )
    if unread:
        parts.append(f"{_wait(unread)} for a first reader")
        remedies.append("start more readers")
    if writing:
        parts.append(f"{writing} {'is' if writing == 1 else 'are'} being written")
    text = (
        f"of {identity.slots} on host {os.uname().nodename}: {'; '.join(parts)}. What helps: "
        f"{'; '.join([*remedies, 'more ring.slots'])}"
    )
    facts: dict[str, object] = {
        "slots": identity.slots,
        "reading": sum(holder.slots for holder in holders),
        "holders": tuple(dict.fromkeys(holder.pid for holder in holders)),
        "held_s": round(max((holder.held_s for holder in holders), default=0.0), 3),
        "unread": unread,
        "partly_read": sum(partly_read.values()),
        "writing": writing,
    }
    return text, facts


def _headers(segment: Segment, identity: Identity) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The slots' states, shape (slots,), and their read entries, (slots, entries, words), uint64."""
    first, step = identity.first_slot_word, identity.slot_words
    headers = np.array(segment.words[first : first + identity.slots * step]).reshape(identity.slots, step)
    entries = headers[:, layout.FIRST_ENTRY : layout.FIRST_ENTRY + identity.entries * layout.ENTRY_WORDS]
    return headers[:, layout.STATE] & STATE_MASK, entries.reshape(identity.slots, identity.entries, layout.ENTRY_WORDS)


def _holders(states: npt.NDArray[Any], entries: npt.NDArray[Any]) -> list[Holder]:
    now_ns, leases = monotonic_ns(), entries[:, :, layout.ENTRY_LEASE]
    in_flight = (leases != 0) & (leases & 1 == 0) & (states == SlotState.READING)[:, None]
    since_ns: dict[tuple[int, int], dict[int, int]] = {}  # by process and reader: of each slot that it holds
    for slot, index in np.argwhere(in_flight).tolist():
        _, pid, _, reader, since = entries[slot, index].tolist()
        held = since_ns.setdefault((pid, reader), {})
        held[slot] = min(since, held.get(slot, since))
    found = [
        Holder(pid, reader, process_name(pid), len(held), (now_ns - min(held.values())) / 1e9)
        for (pid, reader), held in since_ns.items()
    ]
    return sorted(found, key=lambda holder: -holder.slots)


def _wait(slots: int) -> str:
    return f"{slots} wait{'s' if slots == 1 else ''}"
