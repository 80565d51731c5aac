"""Makes SlotRefs of a ring's payloads: the name, and where its bytes can be fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Final

from ucxx_transport.ring.address_board import Address, AddressBoard
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.owner import host_id
from ucxx_transport.schema import SlotRef

_FIELDS: Final = tuple(field.name for field in fields(SlotRef))


class ReferenceMaker:
    """Knows what all references to one ring have in common."""

    __slots__ = ("_address", "_board", "_template")

    def __init__(self, core: RingCore, board: AddressBoard) -> None:
        """Bind to a ring; `board` says where its server is at the time a reference is made."""
        self._board = board
        self._address: Address = (None, ())
        self._template = SlotRef(
            ring_id=core.identity.ring_id,
            ring_name=core.segment.name,
            slot=0,
            generation=0,
            nbytes=0,
            host_id=host_id(core.segment.path.parent),
            fingerprint=core.identity.fingerprint,
        )

    def make(
        self, slot: int, generation: int, nbytes: int, checksum: int | None, meta: Mapping[str, object] | None
    ) -> SlotRef:
        """The reference of one payload.

        Raises:
            ConfigError: `meta` cannot be written as msgpack and JSON, or is too large.
        """
        address = self._board.read()
        if address is not self._address:
            self._template = replace(self._template, host=address[0], ports=address[1])
            self._address = address
        template = self._template
        if meta:
            template = replace(template, meta=meta)
        # A copy of a checked reference with the slot's own numbers, which cannot be out of bounds. Checking all of it
        # again took 6 µs of the 15 of a small write.
        ref = object.__new__(SlotRef)
        own = {"slot": slot, "generation": generation, "nbytes": nbytes, "checksum": checksum}
        for name in _FIELDS:
            object.__setattr__(ref, name, own[name] if name in own else getattr(template, name))
        return ref
