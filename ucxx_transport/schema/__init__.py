"""Schemas and references: what a payload looks like, and the name under which it is found."""

from ucxx_transport.schema.fields import TensorSpec
from ucxx_transport.schema.schema import Schema
from ucxx_transport.schema.slot_ref import SlotRef

__all__ = ["Schema", "SlotRef", "TensorSpec"]
