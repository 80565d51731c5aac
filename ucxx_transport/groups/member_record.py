"""MemberRecord: what a live member says of itself, in a key of its own, under its lease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.groups.group_view import MAX_INCARNATION_CHARS
from ucxx_transport.groups.stored_form import from_stored, take_count, take_text, to_stored
from ucxx_transport.schema.wire_form import WIRE_VERSION, check_version, describe, take_fields

__all__ = ["MemberRecord"]

MAX_ADDRESS_CHARS: Final = 1024
MAX_META_BYTES: Final = 64 << 10
_KEYS: Final = ("version", "rank", "incarnation", "address", "meta", "epoch", "ttl_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """One live member.

    Attributes:
        rank: its own.
        incarnation: which life of that rank.
        epoch: the largest epoch of a view that it has applied, in this life or an earlier one of its process: its
            acknowledgement of that view, and what a later one must exceed. 0: none yet.
        ttl_s: how long its lease lives without being renewed, as granted.
        address: where it can be reached; "" when it said nothing.
        meta: plain values of its own for the others.
    """

    rank: int
    incarnation: str
    epoch: int
    ttl_s: float
    address: str = ""
    meta: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Check what the caller chose.

        Raises:
            ConfigError: `address` or `meta` cannot be stored.
        """
        if len(self.address) > MAX_ADDRESS_CHARS:
            raise ConfigError(
                f"address must be text of at most {MAX_ADDRESS_CHARS} characters, not {describe(self.address)}",
                field="address",
            )
        try:
            nbytes = len(to_stored(dict(self.meta)))
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"meta must be a mapping of plain JSON values: {exc}", field="meta") from exc
        if nbytes > MAX_META_BYTES:
            raise ConfigError(f"meta of {nbytes} bytes; at most {MAX_META_BYTES}", field="meta", nbytes=nbytes)

    def of_new_life(self, incarnation: str, *, known_epoch: int) -> MemberRecord:
        """The record of another life of the same rank, whose process has applied views up to `known_epoch`."""
        return replace(self, incarnation=incarnation, epoch=known_epoch)

    def having_applied(self, epoch: int) -> MemberRecord:
        """The record once its member has applied the view of `epoch`."""
        return replace(self, epoch=max(self.epoch, epoch))

    def to_bytes(self) -> bytes:
        """For the store."""
        return to_stored(
            {
                "version": WIRE_VERSION,
                "rank": self.rank,
                "incarnation": self.incarnation,
                "epoch": self.epoch,
                "ttl_s": self.ttl_s,
                "address": self.address,
                "meta": dict(self.meta),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> MemberRecord:
        """From the store.

        Raises:
            ProtocolError: it is malformed, or of another version.
        """
        form = take_fields(from_stored(raw, "member record"), "member record", required=_KEYS)
        check_version(form["version"], "member record")
        ttl_s, meta = form["ttl_s"], form["meta"]
        if type(ttl_s) not in (int, float) or not isinstance(meta, dict):
            raise ProtocolError("a member record without a TTL or meta", field="ttl_s")
        return cls(
            rank=take_count(form["rank"], "rank"),
            incarnation=take_text(form["incarnation"], "incarnation", max_chars=MAX_INCARNATION_CHARS),
            epoch=take_count(form["epoch"], "epoch"),
            ttl_s=float(ttl_s),  # type: ignore[arg-type]  # checked above, exactly
            address=take_text(form["address"], "address", max_chars=MAX_ADDRESS_CHARS),
            meta=MappingProxyType(meta),
        )
