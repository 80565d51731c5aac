"""What cosmos-rl 0.4.7 asks of a payload transport, as far as this package uses it: for where it is not installed.

| module of `cosmos_rl.utils.payload_transport` | names                                                          |
|-----------------------------------------------|----------------------------------------------------------------|
| `registry`                                    | `PayloadTransport`, `PayloadTransportRegistry`                 |
| `strategy`                                    | `PayloadTransportStrategy`                                     |
| `prefetch_mixin`                              | `PrefetchDataPackerMixin`: here it fetches in who waits for it |

`tests/unit/integrations/test_cosmos_rl.py` compares the signatures with the real ones where these are to be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class PayloadTransportStrategy(ABC):
    def setup(self, **kwargs: Any) -> None:  # noqa: B027 - a hook that may be left out
        pass

    def shutdown(self) -> None:  # noqa: B027 - a hook that may be left out
        pass

    def before_join(self) -> None:  # noqa: B027 - a hook that may be left out
        pass

    @abstractmethod
    def should_intercept(self, rollout_output: Any) -> bool: ...

    @abstractmethod
    def cache_key(self, rollout_output: Any) -> str: ...

    @abstractmethod
    def fetch_batch(self, tasks: list[Any]) -> dict[str, Any]: ...

    def sync_fetch(self, rollout_output: Any) -> Any | None:
        del rollout_output
        return None


class PrefetchDataPackerMixin:
    _strategy: PayloadTransportStrategy | None = None

    def set_transport_strategy(self, strategy: PayloadTransportStrategy | None) -> None:
        self._strategy = strategy

    def _setup_prefetch(self, *, prefetch_timeout: float = 300.0, thread_name: str = "PrefetchDataPacker") -> None:
        del prefetch_timeout, thread_name
        self._cache: dict[str, Any] = {}
        self._tasks: list[Any] = []

    def close_transport(self, timeout: float = 5.0) -> None:
        del timeout
        if self._strategy is not None:
            self._strategy.before_join()
            self._strategy.shutdown()

    def start_prefetch(self, rollouts: list[Any]) -> None:
        assert self._strategy is not None
        outputs = [getattr(rollout, "completion", rollout) for rollout in rollouts]
        self._tasks = [entry for entry in enumerate(outputs) if self._strategy.should_intercept(entry[1])]

    def wait_prefetch(self) -> None:
        assert self._strategy is not None
        self._cache = self._strategy.fetch_batch(self._tasks)

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        strategy = self._strategy
        if strategy is not None and strategy.should_intercept(rollout_output):
            rollout_output = self._cache.get(strategy.cache_key(rollout_output)) or strategy.sync_fetch(rollout_output)
            if rollout_output is None:
                return None
        return super().get_policy_input(sample, rollout_output, n_ignore_prefix_tokens, **kwargs)  # type: ignore[misc]  # of the packer behind it


NAMES = {
    "registry": ("PayloadTransport", "PayloadTransportRegistry"),
    "strategy": ("PayloadTransportStrategy",),
    "prefetch_mixin": ("PrefetchDataPackerMixin",),
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
