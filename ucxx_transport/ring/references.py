"""Makes SlotRefs of a ring's payloads: the name, and where its bytes can be fetched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ucxx_transport.ring.address_board import AddressBoard
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.owner import host_id
from ucxx_transport.schema import SlotRef

_NO_META: Final[Mapping[str, object]] = {}


class ReferenceMaker:
    """Knows what all references to one ring have in common."""

    __slots__ = ("_board", "_fingerprint", "_host_id", "_ring_id", "_ring_name")

    def __init__(self, core: RingCore, board: AddressBoard) -> None:
        """Bind to a ring; `board` says where its server is at the time a reference is made."""
        self._board = board
        self._ring_id = core.identity.ring_id
        self._ring_name = core.segment.name
        self._fingerprint = core.identity.fingerprint
        self._host_id = host_id()

    def make(
        self, slot: int, generation: int, nbytes: int, checksum: int | None, meta: Mapping[str, object] | None
    ) -> SlotRef:
        """The reference of one payload.

        Raises:
            ConfigError: `meta` cannot be written as msgpack and JSON, or is too large.
        """
        host, ports = self._board.read()
        return SlotRef(
            ring_id=self._ring_id,
            ring_name=self._ring_name,
            slot=slot,
            generation=generation,
            nbytes=nbytes,
            host_id=self._host_id,
            host=host,
            ports=ports,
            fingerprint=self._fingerprint,
            checksum=checksum,
            meta=meta or _NO_META,
        )
