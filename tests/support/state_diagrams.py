"""The pictures of a slot's and a rank's life in docs/UCXX.md, drawn from the transition tables themselves.

`python -m tests.support.state_diagrams` writes them into the page; tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ucxx_transport.groups import rank_states
from ucxx_transport.ring import states

__all__ = ["DIAGRAMS", "PAGE", "StateDiagram"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "UCXX.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDiagram:
    """One table and its place in the page.

    Attributes:
        name: of the place, between comments.
        first: the state that a life begins in.
        transitions: (state, event) → state.
    """

    name: str
    first: Enum
    transitions: Mapping[Any, Enum]  # pairs of any two enumerations: a Mapping takes no narrower keys

    def draw(self) -> str:
        """The table as a Mermaid state diagram: one arrow for all events that lead from one state to another."""
        events: dict[tuple[str, str], list[str]] = {}
        for (source, event), target in self.transitions.items():
            events.setdefault((source.name, target.name), []).append(event.name.lower())
        arrows = [f"    {source} --> {target}: {', '.join(names)}" for (source, target), names in events.items()]
        return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {self.first.name}", *arrows, "```", ""])

    def drawn(self) -> str:
        """What the page shows now."""
        found = self._place.search(PAGE.read_text(encoding="utf-8"))
        return found.group() if found else ""

    def write(self) -> None:
        """Draw it into the page."""
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(self._place.sub(lambda _: self.draw(), page), encoding="utf-8")

    @property
    def _place(self) -> re.Pattern[str]:
        return re.compile(rf"(?<=<!-- {self.name} -->\n).*?(?=<!-- /{self.name} -->)", re.DOTALL)


DIAGRAMS = (
    StateDiagram(name="slot-diagram", first=states.SlotState.FREE, transitions=states.TRANSITIONS),
    StateDiagram(name="rank-diagram", first=rank_states.RankState.ISOLATED, transitions=rank_states.TRANSITIONS),
)


if __name__ == "__main__":
    for diagram in DIAGRAMS:
        diagram.write()
