"""NIXL: a one-sided READ of the source's registered memory, with its UCX back end over one transport.

The source is passive, but for NIXL's progress thread; the reader polls. Descriptor lists are prepared once; a read
makes a transfer of one pair of them, posts it, and waits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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


def _rows(pieces: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    return np.array([(piece.ctypes.data, piece.nbytes, 0) for piece in pieces], dtype=np.uint64)


class NixlSource:
    """Registers its slots, and is read.

    Args:
        transports: as `UCX_TLS`.
    """

    def __init__(self, transports: str) -> None:
        self._slots = Slots()
        self._agent = _agent(SOURCE, transports)
        self._registered: Any = None

    def open(self, *, size_bytes: int, slots: int) -> None:
        self.close()
        self._slots.open(size_bytes=size_bytes, slots=slots)
        self._registered = self._agent.register_memory(_rows(self._slots.memory), MEMORY)

    def fill(self) -> list[Offer]:
        addresses = [piece.ctypes.data for piece in self._slots.memory]
        metadata = self._agent.get_agent_metadata()
        return [(number, (slot, addresses, metadata)) for number, (_, slot) in self._slots.fill(0)]

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
        rows = _rows([np.frombuffer(received.buffer, np.uint8) for received in self._buffers.received])
        self._registered = self._agent.register_memory(rows, MEMORY)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, MEMORY)
        self._remote: Any = None

    def resolve(self, reference: Sequence[Any]) -> int:
        slot, addresses, metadata = reference
        if self._remote is None:
            name = self._agent.add_remote_agent(metadata)
            self._name = name.decode() if isinstance(name, bytes) else name
            rows = np.array([(address, self._size_bytes, 0) for address in addresses], dtype=np.uint64)
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
