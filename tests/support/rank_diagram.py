"""The picture of a rank's life in docs/UCXX.md, drawn from the transition table itself.

`python -m tests.support.rank_diagram` writes it into the page; a test compares the two.
"""

from __future__ import annotations

import re

from tests.support.slot_diagram import PAGE
from ucxx_transport.registry.groups.rank_states import TRANSITIONS

_SPAN = re.compile(r"(?<=<!-- rank-diagram -->\n).*?(?=<!-- /rank-diagram -->)", re.DOTALL)


def draw() -> str:
    """The table as a Mermaid state diagram: one arrow for all events that lead from one state to another."""
    events: dict[tuple[str, str], list[str]] = {}
    for (source, event), target in TRANSITIONS.items():
        events.setdefault((source.name, target.name), []).append(event.name.lower())
    arrows = [f"    {source} --> {target}: {', '.join(names)}" for (source, target), names in events.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> ISOLATED", *arrows, "```", ""])


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
