"""The picture of a slot's life in docs/UCXX.md, drawn from the transition table itself.

`python -m tests.support.slot_diagram` writes it into the page; a test compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

from ucxx_transport.ring.states import TRANSITIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "UCXX.md"
_SPAN = re.compile(r"(?<=<!-- slot-diagram -->\n).*?(?=<!-- /slot-diagram -->)", re.DOTALL)


def draw() -> str:
    """The table as a Mermaid state diagram, one arrow a transition."""
    arrows = [
        f"    {source.name} --> {target.name}: {event.name.lower()}" for (source, event), target in TRANSITIONS.items()
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> FREE", *arrows, "```", ""])


def drawn() -> str:
    """What the page shows now."""
    found = _SPAN.search(PAGE.read_text(encoding="utf-8"))
    return found.group() if found else ""


def main() -> None:
    """Draw it into the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_SPAN.sub(lambda _: draw(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
