"""What a run of the kill soak is told, and what it saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["SoakSettings", "Summary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakSettings:
    """What a run does.

    Attributes:
        cycles: rounds of killing; one in eight kills two at once.
        seed: of everything random but the kernel's scheduling.
        shm_lanes: let UCX use shared memory.
    """

    cycles: int
    seed: int
    shm_lanes: bool = False


@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run saw; times in seconds.

    Attributes:
        kills: by victim. payloads: by fate. transports: deliveries by way. failures: reads tried again, by error.
        rings: counters of all rings that tell of kills.
        slots_idle_s: from the last answer of a cycle until no slot was WRITING or READING.
        server_back_s: from a server's kill until its worker has it replaced, seen between other work.
        port_pauses_s: of a client with two ports, the longest between two payloads while one of them is killed.
        swept_s: from a worker's kill until neither its server process nor its segment was left.
    """

    settings: SoakSettings
    cycles: int = 0
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    payloads: Counter[str] = field(default_factory=Counter)
    transports: Counter[str] = field(default_factory=Counter)
    rings: Counter[str] = field(default_factory=Counter)
    slots_idle_s: list[float] = field(default_factory=list)
    server_back_s: list[float] = field(default_factory=list)
    swept_s: list[float] = field(default_factory=list)
    port_pauses_s: list[float] = field(default_factory=list)
    slowest_read_s: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Everything, plain."""
        return {
            "seed": self.settings.seed,
            "shm_lanes": self.settings.shm_lanes,
            "cycles": self.cycles,
            "seconds": round(self.seconds, 1),
            "kills": {"all": self.kills.total(), **self.kills},
            "payloads": dict(self.payloads),
            "transports": dict(self.transports),
            "rings": dict(self.rings),
            "slowest_read_s": round(self.slowest_read_s, 3),
            "slots_idle_s": _spread(self.slots_idle_s),
            "server_back_s": _spread(self.server_back_s),
            "swept_s": _spread(self.swept_s),
            "port_pauses_s": _spread(self.port_pauses_s),
        }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    quantiles = {name: ordered[int(share * len(ordered))] for name, share in (("p50", 0.5), ("p95", 0.95))}
    return {"n": len(ordered), **{name: round(value, 3) for name, value in (*quantiles.items(), ("max", ordered[-1]))}}
