"""What cosmos-rl 0.4.7 asks of a payload transport, as far as this package uses it: for where it is not installed.

It is the module `cosmos_rl.utils.payload_transport.registry`.
`tests/unit/integrations/test_cosmos_rl.py` compares the signatures with the real ones where these are to be had.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

PACKAGE = "cosmos_rl.utils.payload_transport"


class PayloadTransport:
    name: str = ""
    completion_prefix: str | None = None

    def attach_data_packer(self, packer: Any, *, config: Any, device: Any = None, redis_endpoint: Any = None) -> None:
        pass

    def close_data_packer(self, packer: Any, *, timeout: float = 5.0) -> None:
        packer.close_transport(timeout=timeout)

    def close_producer(self, producer: Any, *, timeout: float = 5.0) -> None:
        pass


class PayloadTransportRegistry:
    _registry: ClassVar[dict[str, PayloadTransport]] = {}

    @classmethod
    def register(cls, transport: PayloadTransport) -> None:
        cls._registry[transport.name] = transport

    @classmethod
    def get_optional(cls, name: str) -> PayloadTransport | None:
        return cls._registry.get(name)


NAMES = {
    "registry": ("PayloadTransport", "PayloadTransportRegistry"),
}


def modules() -> dict[str, ModuleType]:
    """The contract as modules under their real names."""
    parts = PACKAGE.split(".")
    made = {name: ModuleType(name) for name in (".".join(parts[: end + 1]) for end in range(len(parts)))}
    for stem, names in NAMES.items():
        module = made[f"{PACKAGE}.{stem}"] = ModuleType(f"{PACKAGE}.{stem}")
        for name in names:
            setattr(module, name, globals()[name])
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
    return made
