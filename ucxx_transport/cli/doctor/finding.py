"""Finding: one thing that was looked at, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Verdict"]

Verdict = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: software, ucx, network, host or loopback.
        name: what was looked at.
        value: what was found, in words.
        verdict: `failure`: the transport cannot work; `warning`: something will hurt; `note`: good to know.
        remedy: what to do about it; "" when nothing is to be done.
    """

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""
