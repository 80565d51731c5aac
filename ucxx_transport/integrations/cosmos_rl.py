"""cosmos-rl: this package as one of its payload transports. Needs cosmos-rl (0.4.7 is what it was written against).

A job switches by its configuration, in a program of which one module imports this one (that registers it):

```toml
[custom]
payload_transfer = "ucxx_transport"

[custom.ucxx_transport]          # all optional
device = "cpu"                   # as for RolloutFeed; the default is torch tensors on the CPU, "cuda:0" is a GPU
deadline_s = 30.0                # of a batch
max_fetch_rounds = 3
client = { local = "auto" }      # as ClientConfig
```

| end     | the job's class has                       | and gets                                        |
|---------|-------------------------------------------|-------------------------------------------------|
| rollout | `CosmosRolloutMixin`                      | `write_to_buffer`, whose dict is the completion |
| trainer | cosmos-rl's own `PrefetchDataPackerMixin` | a `UCXXStrategy`, composed                      |
| trainer | or `CosmosDataPackerMixin`                | its `setup_ucxx_data_packer`                    |

cosmos-rl 0.4.7 fetches ahead for its own transports alone: with this one a job's trainer fetches an episode when it
needs it, unless it calls `start_prefetch` and `wait_prefetch` itself.

A payload may go to several ranks here (`setup_ucxx(ring={"readers": tp_size * cp_size * pp_size})`), so the check that
cosmos-rl makes of its own point-to-point transports does not apply.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Unpack

from cosmos_rl.utils.payload_transport.registry import PayloadTransport, PayloadTransportRegistry
from cosmos_rl.utils.payload_transport.strategy import PayloadTransportStrategy

from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu import on_host
from ucxx_transport.logs import get_logger
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer.batch import FetchSettings, PrefetchStatistics
from ucxx_transport.trainer.loss_policy import AskedFor, is_ours, record_of
from ucxx_transport.trainer.mixin import UCXXDataPackerMixin
from ucxx_transport.trainer.prefetcher import Prefetcher
from ucxx_transport.worker import UCXXRolloutMixin

NAME = "ucxx_transport"
"""Of the transport in `payload_transfer`, and of its table of settings."""

REFERENCE = "_ucxx_transport"
"""Under which a completion carries the record of its episode."""

REWARDS = "rewards"
EPISODE_LENGTH = "episode_length"
_SETTINGS = ("device", "deadline_s", "max_fetch_rounds", "client")
_REMEMBERED_LOSSES = 1 << 16

_log = get_logger(__name__)


class TransportSetupError(ConfigError, RuntimeError):
    """The transport cannot be attached. A `RuntimeError`, which is what cosmos-rl does not swallow."""


class CosmosRolloutMixin(UCXXRolloutMixin):
    """`UCXXRolloutMixin` whose records are completions as cosmos-rl's controller reads them."""

    def write_to_buffer(self, trajectory: Mapping[str, object], **settings: Any) -> dict[str, object]:
        """Write one trajectory; arguments and errors as `UCXXRolloutMixin.write_to_buffer`.

        Returns:
            A completion: the record under `REFERENCE`, and beside it what the controller looks for: the rewards
            of every step (`trajectory["rewards"]`, a list of floats) and the episode's length.
        """
        rewards = trajectory.get(REWARDS)
        values = [] if rewards is None else on_host(rewards, REWARDS).astype(float).reshape(-1).tolist()
        record = super().write_to_buffer(trajectory, **settings)
        length = record[EPISODE_LENGTH]
        return {REFERENCE: record, REWARDS: values, EPISODE_LENGTH: len(values) if length is None else length}


def unwrapped(completion: Any) -> Any:
    """The record in a completion of ours; any other completion as it is."""
    if isinstance(completion, Mapping) and REFERENCE in completion:
        return completion[REFERENCE]
    return completion


class CosmosDataPackerMixin(UCXXDataPackerMixin):
    """`UCXXDataPackerMixin` for completions as `CosmosRolloutMixin` writes them."""

    def rollout_output_of(self, rollout: object) -> object:
        """The record that a rollout's completion carries, or the completion of another transport."""
        return unwrapped(super().rollout_output_of(rollout))

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        """As `UCXXDataPackerMixin.get_policy_input`."""
        return super().get_policy_input(sample, unwrapped(rollout_output), n_ignore_prefix_tokens, **kwargs)


class UCXXStrategy(PayloadTransportStrategy):  # type: ignore[misc]  # cosmos-rl is not always there to be looked at
    """What a packer that schedules by itself needs of a transport: which completions are ours, and their episodes."""

    def __init__(self) -> None:
        self._prefetcher: Prefetcher | None = None
        self._lost: OrderedDict[str, None] = OrderedDict()

    def setup(self, *, client: ClientConfig | None = None, **settings: Unpack[FetchSettings]) -> None:
        """Make the client, with a thread of its own.

        Args:
            client: settings of the client.
            **settings: as for `Prefetcher`.

        Raises:
            ConfigError: an argument is out of its bounds, or this machine has no such device.
        """
        self._prefetcher = Prefetcher(client, **settings)

    def shutdown(self) -> None:
        """Take leave of the servers. Idempotent."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def before_join(self) -> None:
        """End what is being fetched, so that the scheduler's thread can be joined."""
        self.shutdown()

    def should_intercept(self, rollout_output: Any) -> bool:
        """Whether a completion is ours; never raises."""
        return is_ours(unwrapped(rollout_output))

    def cache_key(self, rollout_output: Any) -> str:
        """The payload's name as text; of a malformed record, the object's own identity."""
        return _key_of(record_of(unwrapped(rollout_output)), rollout_output)

    def fetch_batch(self, tasks: list[Any]) -> dict[str, Any]:
        """The episodes of `(index, completion)` pairs, by `cache_key`; the lost ones are not among them."""
        records = [record_of(unwrapped(completion)) for _, completion in tasks]
        prefetcher = self._open()
        batch = prefetcher.fetch(records)
        found = {}
        try:
            for place, payload in batch.payloads.items():
                found[_key_of(records[place], tasks[place][1])] = prefetcher.unpack(payload)
        finally:
            batch.release()  # the arrays hold the payloads' memory
        for loss in batch.losses:
            self._lost[_key_of(records[loss.index], tasks[loss.index][1])] = None
        while len(self._lost) > _REMEMBERED_LOSSES:
            self._lost.popitem(last=False)
        return found

    def sync_fetch(self, rollout_output: Any) -> Any | None:
        """One episode, or None when it is lost: logged and counted, and not tried again."""
        key = self.cache_key(rollout_output)
        if key in self._lost:
            return None
        try:
            return self.fetch_batch([(0, rollout_output)]).get(key)
        except Exception as error:  # noqa: BLE001 - the interface's rule: it must not raise here
            _log.warning("fetch_failed", reason=f"{type(error).__name__}: {error}")
            return None

    def statistics(self) -> PrefetchStatistics:
        """Counts since `setup`."""
        return self._open().statistics()

    def _open(self) -> Prefetcher:
        if self._prefetcher is None:
            raise ConfigError("the strategy is not set up; call setup() first")
        return self._prefetcher


class CosmosPayloadTransport(PayloadTransport):  # type: ignore[misc]  # cosmos-rl is not always there to be looked at
    """The registry's entry. References are dicts and slots recycle themselves, so it has no prefix and no clean-up."""

    name = NAME
    completion_prefix = None

    def attach_data_packer(self, packer: Any, *, config: Any, device: Any = None, redis_endpoint: Any = None) -> None:
        """Give a data packer its transport.

        Args:
            packer: with cosmos-rl's `PrefetchDataPackerMixin`, or `CosmosDataPackerMixin`.
            config: the job's; `config.custom["ucxx_transport"]` has the settings.
            device: of the trainer; where that is a GPU, episodes are given on the CPU unless the settings name it too.
            redis_endpoint: not needed.

        Raises:
            TransportSetupError: a setting is wrong or unknown, or the device is not there.
        """
        del redis_endpoint
        settings = _settings_of(config)
        # the trainer's own device is a GPU; episodes go there if the job's settings say so, since they take room there
        where = settings.pop("device", "cpu" if str(device).startswith("cuda") else device)
        composes = callable(getattr(packer, "set_transport_strategy", None))
        if not composes and not isinstance(packer, UCXXDataPackerMixin):
            # as cosmos-rl's own transports do: a job without a validation packer gets a plain one, attached too
            _log.warning("data_packer_skipped", packer=type(packer).__name__)
            return
        try:
            if composes:
                _compose(packer, where, settings)
            else:
                packer.setup_ucxx_data_packer(where, **settings)
        except ConfigError as error:
            raise TransportSetupError(error.message, **error.facts) from error

    def close_data_packer(self, packer: Any, *, timeout: float = 5.0) -> None:
        """Close what `attach_data_packer` made."""
        if isinstance(packer, UCXXDataPackerMixin):
            packer.shutdown_ucxx_data_packer()
        else:
            super().close_data_packer(packer, timeout=timeout)

    def close_producer(self, producer: Any, *, timeout: float = 5.0) -> None:
        """Stop a rollout backend's server and remove its ring; bounded by the server's own `stop_timeout_s`."""
        del timeout
        if isinstance(producer, UCXXRolloutMixin):
            producer.cleanup_ucxx()


def _compose(packer: Any, device: object, settings: Mapping[str, Any]) -> None:
    strategy = UCXXStrategy()
    packer.set_transport_strategy(strategy)
    strategy.setup(device=device, **settings)
    # a batch keeps its own deadline; the scheduler's must not come first, since it ends the job
    limit_s = 2 * checked_seconds(settings.get("deadline_s", 30.0), "deadline_s") + 10.0
    packer._setup_prefetch(prefetch_timeout=limit_s, thread_name="ucxx-cosmos")  # noqa: SLF001 - as its own transports do


def _settings_of(config: Any) -> dict[str, Any]:
    custom = getattr(config, "custom", None) or {}
    table = custom.get(NAME, {}) if isinstance(custom, Mapping) else {}
    if not isinstance(table, Mapping):
        raise TransportSetupError(f"[custom.{NAME}] must be a table, not {table!r}", field=NAME)
    unknown = sorted(set(table) - set(_SETTINGS))
    if unknown:
        raise TransportSetupError(
            f"[custom.{NAME}] has an unknown setting {unknown[0]!r}; there are {', '.join(_SETTINGS)}", field=unknown[0]
        )
    settings = dict(table)
    if "client" in settings:
        try:
            settings["client"] = ClientConfig(**settings["client"])
        except (ConfigError, TypeError) as error:
            raise TransportSetupError(f"[custom.{NAME}] client: {error}", field="client") from error
    return settings


def _key_of(record: AskedFor, completion: object) -> str:
    if isinstance(record, EpisodeRecord) and record.ref is not None:
        ring_id, slot, generation = record.ref.name
        return f"{ring_id.hex()}/{slot}/{generation}"
    return f"object {id(completion):#x}"


PayloadTransportRegistry.register(CosmosPayloadTransport())
