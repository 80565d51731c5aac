"""What a ring must do, as plain dicts: no lock, no memory, no processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from ucxx_transport.machine import Owner
from ucxx_transport.ring import SlotState


@dataclass
class ModelHold:
    """A write in progress or a read attempt in flight."""

    owner: Owner
    reader: int = 0


@dataclass
class ModelSlot:
    """One slot. `holds` are by lease id; `had` are the readers whose reads count."""

    state: SlotState = SlotState.FREE
    generation: int = 0
    sequence: int = 0
    payload: bytes = b""
    meta: dict[str, object] | None = None
    required: int = 1
    holds: dict[int, ModelHold] = field(default_factory=dict)
    had: list[int] = field(default_factory=list)


@dataclass
class RingModel:
    """A ring of `slots` slots that overwrites or not."""

    slots: list[ModelSlot]
    overwrites: bool
    max_attempts: int
    sequence: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    # writing

    def writable(self) -> list[int]:
        """The slots that a write may take now: any free one, else the oldest unread one, if that may be dropped."""
        free = [index for index, slot in enumerate(self.slots) if slot.state is SlotState.FREE]
        if free or not self.overwrites:
            return free
        ready = [index for index, slot in enumerate(self.slots) if slot.state is SlotState.READY]
        return sorted(ready, key=lambda index: self.slots[index].sequence)[:1]

    def reserve(self, index: int, lease: int, owner: Owner) -> None:
        slot = self.slots[index]
        self.count("written")
        if slot.state is SlotState.READY:
            self.count("overwritten")
        slot.state, slot.generation, slot.had = SlotState.WRITING, slot.generation + 1, []
        slot.holds = {lease: ModelHold(owner)}

    def commit(self, index: int, payload: bytes, required: int, meta: dict[str, object] | None = None) -> None:
        slot = self.slots[index]
        self.sequence += 1
        self.count("committed")
        slot.state, slot.payload, slot.sequence = SlotState.READY, payload, self.sequence
        slot.required, slot.holds, slot.meta = required, {}, meta

    def abort(self, index: int, reason: str = "aborted") -> None:
        slot = self.slots[index]
        self.count(reason)
        slot.state, slot.holds = SlotState.FREE, {}

    def discard(self, index: int, generation: int) -> bool:
        slot = self.slots[index]
        if slot.state is not SlotState.READY or slot.generation != generation:
            return False
        self.count("discarded")
        slot.state = SlotState.FREE
        return True

    # reading

    def refusal(self, index: int, generation: int, reader: int) -> str:
        """Why a read is refused: "" when it is not."""
        slot = self.slots[index]
        if slot.generation != generation or slot.state not in (SlotState.READY, SlotState.READING):
            return "stale"
        if len(slot.had) >= slot.required or (reader and reader in slot.had):
            return "stale"
        if len(slot.holds) >= self.max_attempts:
            return "busy"
        in_flight = {hold.reader for hold in slot.holds.values()}
        taken = len(slot.had) + len({other for other in in_flight if not other or other not in slot.had})
        return "busy" if reader and reader not in in_flight and taken >= slot.required else ""

    def takeable(self, reader: int, *, newest: bool) -> list[int]:
        """The slots that a take gives this reader, in order."""
        held = [index for index, slot in enumerate(self.slots) if slot.state in (SlotState.READY, SlotState.READING)]
        by_age = sorted(held, key=lambda index: self.slots[index].sequence, reverse=newest)
        return [index for index in by_age if self._may_take(self.slots[index], reader)]

    def _may_take(self, slot: ModelSlot, reader: int) -> bool:
        in_flight = {hold.reader for hold in slot.holds.values()}
        taken = len(slot.had) + len({other for other in in_flight if not other or other not in slot.had})
        mine = reader in in_flight or (reader and reader in slot.had)
        return not mine and taken < slot.required and len(slot.holds) < self.max_attempts

    def acquire(self, index: int, lease: int, owner: Owner, reader: int) -> bytes:
        slot = self.slots[index]
        self.count("acquired")
        slot.state = SlotState.READING
        slot.holds[lease] = ModelHold(owner, reader)
        return slot.payload

    def finalise(self, index: int, lease: int, reason: str) -> None:
        slot = self.slots[index]
        hold = slot.holds.pop(lease)
        self.count(reason)
        counts = reason == "consumed" and len(slot.had) < slot.required
        if counts and not (hold.reader and hold.reader in slot.had):
            slot.had.append(hold.reader)
        if slot.holds:
            return
        if len(slot.had) >= slot.required:
            self.count("freed")
            slot.state, slot.had = SlotState.FREE, []
        else:
            slot.state = SlotState.READY

    # recovery

    def reclaim(self, dead: set[Owner]) -> int:
        reclaimed = 0
        for index, slot in enumerate(self.slots):
            for lease in [lease for lease, hold in slot.holds.items() if hold.owner in dead]:
                reclaimed += 1
                if slot.state is SlotState.WRITING:
                    self.abort(index, "reclaimed_writes")
                else:
                    self.finalise(index, lease, "reclaimed_reads")
        return reclaimed
