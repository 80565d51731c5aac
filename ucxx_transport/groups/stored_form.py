"""The values of a group's keys: one JSON object each, so that an operator can read them with the store's own tools.

Whoever may write the store is trusted not to be hostile, but not to be of this version: keys and types are checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ucxx_transport.errors import ProtocolError
from ucxx_transport.schema.wire_form import describe, is_unsigned

__all__ = ["from_stored", "take_count", "take_text", "to_stored"]


def to_stored(form: Mapping[str, object]) -> bytes:
    """Encode; equal forms give equal bytes.

    Raises:
        TypeError, ValueError: a value that JSON does not have.
    """
    return json.dumps(form, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def from_stored(raw: bytes, what: str) -> object:
    """Decode.

    Raises:
        ProtocolError: it is not JSON.
    """
    try:
        decoded: object = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"a {what} that is not JSON: {describe(raw)}", field=what) from exc
    return decoded


def take_count(value: object, field: str) -> int:
    """`value`, a number of at most 63 bits that is not negative.

    Raises:
        ProtocolError: it is none.
    """
    if not is_unsigned(value, 63):
        raise ProtocolError(f"{field} must be a number from 0 on, not {describe(value)}", field=field)
    return value


def take_text(value: object, field: str, *, max_chars: int) -> str:
    """`value`, text of at most so many characters.

    Raises:
        ProtocolError: it is none.
    """
    if not isinstance(value, str) or len(value) > max_chars:
        raise ProtocolError(
            f"{field} must be text of at most {max_chars} characters, not {describe(value)}", field=field
        )
    return value
