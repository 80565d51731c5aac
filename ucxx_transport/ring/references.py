"""References to a ring's payloads, and the server's address that they carry.

The address is in the segment: written under the lock, read without it by everyone who makes a reference. Two banks; the
version's lowest bit says which one holds. A new address goes into the other bank and counts with one store of the
version, so a writer killed half-way leaves the old address, and a reader sees either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ucxx_transport.errors import ConfigError
from ucxx_transport.ring import layout
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.owner import host_id
from ucxx_transport.schema import SlotRef

MAX_PORTS: Final = 64
MAX_HOST_BYTES: Final = 255

# Words of a bank: number of ports, bytes of the host, 16 words of 4 ports each, 32 words of the host.
_PORT_WORDS: Final = MAX_PORTS // 4
_HOST_WORDS: Final = (MAX_HOST_BYTES + 1) // 8

Address = tuple[str | None, tuple[int, ...]]


class AddressBoard:
    """Reads the address, remembering the last one."""

    __slots__ = ("_last", "_last_version", "_words")

    def __init__(self, words: memoryview) -> None:
        """Bind to the segment as 64-bit words."""
        self._words = words
        self._last: Address = (None, ())
        self._last_version = 0

    def read(self) -> Address:
        """Host and ports as last published, (None, ()) before the first time."""
        words = self._words
        version = words[layout.ADDRESS_VERSION_WORD]
        while version != self._last_version:
            bank = layout.ADDRESS_WORD + (version & 1) * layout.ADDRESS_BANK_WORDS
            # copied before it is looked at; the other bank is being written at most while the version stands still
            content = list(words[bank : bank + layout.ADDRESS_BANK_WORDS])
            after = words[layout.ADDRESS_VERSION_WORD]
            if after == version:
                self._last, self._last_version = _decode(content), version
                break
            version = after
        return self._last


def check_address(host: str | None, ports: Sequence[int]) -> None:
    """Refuse (ConfigError) a host of no or over 255 bytes, and no ports or over 64; None and no ports withdraw."""
    if host is None and not ports:
        return
    if host is None or not 1 <= len(host.encode()) <= MAX_HOST_BYTES:
        raise ConfigError(f"a host has 1 to {MAX_HOST_BYTES} bytes", field="host", value=host)
    if not 1 <= len(ports) <= MAX_PORTS or not all(1 <= port <= 65535 for port in ports):
        raise ConfigError(f"1 to {MAX_PORTS} ports from 1 to 65535", field="ports", value=tuple(ports))


def packed_address(host: str | None, ports: Sequence[int]) -> bytes:
    """The bytes of a bank, for an address that `check_address` has passed."""
    name = (host or "").encode()
    packed_ports = b"".join(port.to_bytes(2, "little") for port in ports).ljust(8 * _PORT_WORDS, b"\0")
    lengths = len(ports).to_bytes(8, "little") + len(name).to_bytes(8, "little")
    return (lengths + packed_ports + name).ljust(8 * layout.ADDRESS_BANK_WORDS, b"\0")


def _decode(content: list[int]) -> Address:
    raw = b"".join(word.to_bytes(8, "little") for word in content[2 : 2 + _PORT_WORDS + _HOST_WORDS])
    count = min(content[0], MAX_PORTS)
    ports = tuple(int.from_bytes(raw[2 * index : 2 * index + 2], "little") for index in range(count))
    if not count:
        return None, ()
    host = raw[8 * _PORT_WORDS :][: min(content[1], MAX_HOST_BYTES)]
    return host.decode(errors="replace"), ports


class ReferenceMaker:
    """Knows what all references to one ring have in common."""

    __slots__ = ("_board", "_template", "_version", "_words")

    def __init__(self, core: RingCore, board: AddressBoard) -> None:
        """Bind to a ring; `board` says where its server is at the time a reference is made."""
        self._board = board
        self._words = core.words
        self._version = 0
        self._template = SlotRef(
            ring_id=core.identity.ring_id,
            ring_name=core.segment.name,
            slot=0,
            generation=0,
            nbytes=0,
            host_id=host_id(core.segment.path.parent),
            fingerprint=core.identity.fingerprint,
        )

    def template(self) -> SlotRef:
        """What a reference made now has in common with the ring's others."""
        version = self._words[layout.ADDRESS_VERSION_WORD]
        if version != self._version:
            host, ports = self._board.read()  # of this version, or of a later one, which is then read again
            self._template, self._version = replace(self._template, host=host, ports=ports), version
        return self._template
