"""NIXL: a one-sided READ of the source's registered memory, with its UCX back end over one transport.

The source is passive, but for NIXL's progress thread; the reader polls. Descriptor lists are prepared once; a read
makes a transfer of one pair of them, posts it, and waits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.core.lineup import Lineup
from bench.core.rounds import Lane
from bench.peers.memory import ReceiveBuffers, Received, Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.core.ends import Offer

__all__ = ["NixlReader", "NixlSource", "nixl_lanes"]

SOURCE: Final = "bench-source"
MEMORY: Final = "DRAM"


def nixl_lanes(lineup: Lineup, transports: Mapping[str, str]) -> tuple[list[Lane], dict[str, str]]:
    """A lane a subject, each with its `UCX_TLS`; or why NIXL is skipped, by subject."""
    try:
        import nixl  # noqa: F401 - whether it is there, and with a back end that loads
    except ImportError as error:
        return [], dict.fromkeys(transports, f"pip install --no-deps nixl nixl-cu12 ({error})")
    lanes = [
        Lane(
            subject=subject,
            source=lineup.source(subject, NixlSource, words),
            reader=lineup.reader(subject, NixlReader),
            options={"transports": words},
            polls=True,
        )
        for subject, words in transports.items()
    ]
    return lanes, {}


def _agent(name: str, transports: str) -> Any:
    # NIXL has no settings of its own for these; it asks UCX for lanes that notice a peer's death.
    os.environ |= {"UCX_TLS": transports, "UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"}
    os.environ["UCX_WARN_UNUSED_ENV_VARS"] = "n"
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def _rows(first: int, count: int, size_bytes: int) -> NDArray[np.uint64]:
    """Address, length and device of so many pieces that lie one behind the other."""
    rows = np.zeros((count, 3), dtype=np.uint64)
    rows[:, 0] = first + size_bytes * np.arange(count, dtype=np.uint64)
    rows[:, 1] = size_bytes
    return rows


class NixlSource:
    """Registers its slots, and is read.

    Args:
        transports: as `UCX_TLS`.
    """

    def __init__(self, transports: str) -> None:
        self._slots = Slots()
        self._agent = _agent(SOURCE, transports)
        self._registered: Any = None
        self._metadata = NamedTemporaryFile()  # noqa: SIM115 - for each reader; too much to be in every reference

    def open(self, *, size_bytes: int, slots: int) -> None:
        self.close()
        self._slots.open(size_bytes=size_bytes, slots=slots)
        self._block = (self._slots.block.ctypes.data, slots, self._metadata.name)
        self._registered = self._agent.register_memory(_rows(self._block[0], 1, size_bytes * slots), MEMORY)
        self._metadata.seek(0)
        self._metadata.truncate()
        self._metadata.write(self._agent.get_agent_metadata())
        self._metadata.flush()

    def fill(self, *, count: int) -> list[Offer]:
        return [(number, (slot, *self._block)) for number, (_, slot) in self._slots.fill(0, count)]

    def close(self) -> None:
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


class NixlReader:
    """Reads into registered buffers in turn."""

    _agent: Any = None

    def open(self, *, size_bytes: int, slots: int, transports: str) -> None:
        self._size_bytes = size_bytes
        if self._agent is None:  # making one takes most of a second
            self._agent = _agent("bench-reader", transports)
        self._buffers = ReceiveBuffers(size_bytes, slots)
        block = self._buffers.block
        self._registered = self._agent.register_memory(_rows(block.ctypes.data, 1, block.nbytes), MEMORY)
        rows = _rows(block.ctypes.data, len(block), size_bytes)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, MEMORY)
        self._remote: Any = None

    def resolve(self, reference: Sequence[Any]) -> int:
        slot, first, slots, metadata = reference
        if self._remote is None:
            name = self._agent.add_remote_agent(Path(metadata).read_bytes())
            self._name = name.decode() if isinstance(name, bytes) else name
            rows = _rows(first, slots, self._size_bytes)
            self._remote = self._agent.prep_xfer_dlist(self._name, rows, MEMORY)
        return int(slot)

    def read(self, reference: int) -> Received:
        agent, place = self._agent, self._buffers.next()
        transfer = agent.make_prepped_xfer("READ", self._local, [place], self._remote, [reference])
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        if state != "DONE":
            raise ConnectionError(f"NIXL: {state}")
        transfer.release()
        return self._buffers.received[place]

    def close(self) -> None:
        self._local.release()
        if self._remote is not None:
            self._remote.release()
            self._agent.remove_remote_agent(self._name)
        self._agent.deregister_memory(self._registered)
