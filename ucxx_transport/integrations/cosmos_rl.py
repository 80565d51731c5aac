"""cosmos-rl: this package as one of its payload transports. Needs cosmos-rl (0.4.7 is what it was written against).

Importing this module registers it; docs/frameworks.md has a job's configuration, and what its classes inherit. Several
ranks may read one payload (`setup_ucxx(ring={"readers": tp_size * cp_size * pp_size})`), so the check that cosmos-rl
makes of its own point-to-point transports does not apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmos_rl.utils.payload_transport.registry import PayloadTransport, PayloadTransportRegistry

from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu import on_host
from ucxx_transport.logs import get_logger
from ucxx_transport.settings import made_of
from ucxx_transport.trainer.mixin import UCXXDataPackerMixin
from ucxx_transport.worker import UCXXRolloutMixin

NAME = "ucxx_transport"
"""Of the transport in `payload_transfer`, and of its table of settings."""

REFERENCE = "_ucxx_transport"
"""Under which a completion carries the record of its episode."""

REWARDS = "rewards"
EPISODE_LENGTH = "episode_length"

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


class CosmosPayloadTransport(PayloadTransport):  # type: ignore[misc]  # cosmos-rl is not always there to be looked at
    """The registry's entry. References are dicts and slots recycle themselves, so it has no prefix and no clean-up."""

    name = NAME
    completion_prefix = None

    def attach_data_packer(self, packer: Any, *, config: Any, device: Any = None, redis_endpoint: Any = None) -> None:
        """Give a data packer its transport.

        Args:
            packer: with `CosmosDataPackerMixin`; another one is left as it is.
            config: the job's; `config.custom["ucxx_transport"]` has the settings.
            device: of the trainer; where that is a GPU, episodes are given on the CPU unless the settings name it too.
            redis_endpoint: not needed.

        Raises:
            TransportSetupError: a setting is wrong or unknown, or the device is not there.
        """
        del redis_endpoint
        if not isinstance(packer, UCXXDataPackerMixin):
            # as cosmos-rl's own transports do: a job without a validation packer gets a plain one, attached too
            _log.warning("data_packer_skipped", packer=type(packer).__name__)
            return
        try:
            settings = dict((getattr(config, "custom", None) or {}).get(NAME, {}))
            client = made_of(ClientConfig, settings.pop("client", None), "client")
            # the trainer's own device is a GPU; episodes go there if the job's settings say so, since they take room
            where = settings.pop("device", "cpu" if str(device).startswith("cuda") else device)
            packer.setup_ucxx_data_packer(where, client=client, **settings)
        except (ConfigError, TypeError, ValueError) as error:
            raise TransportSetupError(f"[custom.{NAME}]: {error}", field=NAME) from error

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


PayloadTransportRegistry.register(CosmosPayloadTransport())
