"""What is measured: each way a payload reaches a trainer, under one name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["COPY_SUBJECTS", "MEMCPY", "SHM_SUBJECTS", "TCP_SUBJECTS", "VIEW_SUBJECTS", "Subject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One way to read.

    Attributes:
        name: its key in the JSON.
        label: its name for people.
        client: which client reads, on an event loop or blocking.
        local: the client's `local` setting.
        shm_lanes: whether UCX may use its shared-memory lanes, on both sides.
        touch: whether the reader also reads every byte once, inside the timed part.
    """

    name: str
    label: str
    client: Literal["async", "sync"]
    local: Literal["view", "copy", "off"] = "off"
    shm_lanes: bool = False
    touch: bool = False

    @property
    def brings_bytes(self) -> bool:
        """Whether a read brings every byte to the reader's processor or memory; a view that is not touched does not."""
        return self.local != "view" or self.touch


VIEW_SUBJECTS: Final = (
    Subject(name="view_async", label="local view, nothing touched (async)", client="async", local="view"),
    Subject(name="view_sync", label="local view, nothing touched (sync)", client="sync", local="view"),
    Subject(
        name="view_read_sync", label="local view + every byte read once (sync)", client="sync", local="view", touch=True
    ),
)
COPY_SUBJECTS: Final = (
    Subject(name="copy_async", label="local copy (async)", client="async", local="copy"),
    Subject(name="copy_sync", label="local copy (sync)", client="sync", local="copy"),
)
SHM_SUBJECTS: Final = (
    Subject(name="ucx_shm_async", label="UCX, shared-memory lanes (async)", client="async", shm_lanes=True),
    Subject(name="ucx_shm_sync", label="UCX, shared-memory lanes (sync)", client="sync", shm_lanes=True),
)
TCP_SUBJECTS: Final = (
    Subject(name="ucx_tcp_async", label="UCX over TCP (async)", client="async"),
    Subject(name="ucx_tcp_sync", label="UCX over TCP (sync)", client="sync"),
)
MEMCPY: Final = Subject(name="memcpy", label="ceiling: memcpy in one process", client="sync")
