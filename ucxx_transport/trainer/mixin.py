"""UCXXDataPackerMixin: the transport in a trainer's data packer of any framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.settings import known_options, made_of
from ucxx_transport.trainer.batch import HostFetchSettings
from ucxx_transport.trainer.loss_policy import Loss, is_ours
from ucxx_transport.trainer.rollout_feed import OnMissing, RolloutFeed, completion_of


class UCXXDataPackerMixin:
    """Resolves our references before a data packer sees them. It has no `__init__`, and comes first among the bases.

    ```python
    class Packer(UCXXDataPackerMixin, MyDataPacker):  # MyDataPacker has get_policy_input
        def on_episode_lost(self, loss):
            print(loss.index, loss.reason.value)

    packer = Packer()
    packer.setup_ucxx_data_packer(device="cpu")
    packer.start_prefetch(next_rollouts())
    while training:
        rollouts = packer.collect_prefetch()
        packer.start_prefetch(next_rollouts())
        train([packer.get_policy_input(None, rollout.completion) for rollout in rollouts])
    packer.shutdown_ucxx_data_packer()
    ```

    What is not ours passes through to the packer untouched, with or without a set-up.
    """

    ucxx_feed: RolloutFeed | None = None
    """The feed behind it, from `setup_ucxx_data_packer` to `shutdown_ucxx_data_packer`."""

    def setup_ucxx_data_packer(
        self,
        device: object = None,
        *,
        client: ClientConfig | Mapping[str, object] | None = None,
        on_missing: OnMissing = "shrink",
        **settings: Unpack[HostFetchSettings],
    ) -> None:
        """Make this packer's feed: one thread, one client.

        Args:
            device: where episodes are given: None for numpy views, "cpu" for torch tensors, "cuda:N" and "cupy:N" for
                tensors and arrays on a GPU.
            client: settings of the client, or a mapping of them.
            on_missing: what `collect_prefetch` gives of a batch of which episodes are lost: "shrink", "refill", or a
                function of the rollouts left and the losses; see `RolloutFeed`.
            **settings: as for `RolloutFeed`: `deadline_s`, `max_fetch_rounds`, `max_staleness`, `discard_lost`,
                `unreachable_batches`, `watcher`, `link_factory`.

        Raises:
            ConfigError: a setting is wrong, this packer is set up already, or no base behind the mixin has a
                `get_policy_input`.
        """
        if self.ucxx_feed is not None:
            raise ConfigError("this packer is set up already; shutdown_ucxx_data_packer() first")
        if not callable(getattr(super(), "get_policy_input", None)):
            raise ConfigError(
                f"no base of {type(self).__name__} behind UCXXDataPackerMixin has a get_policy_input; "
                "write class Packer(UCXXDataPackerMixin, YourDataPacker), in this order"
            )
        for word, method in (("on_loss", "on_episode_lost"), ("output_of", "rollout_output_of")):
            if word in settings:
                raise ConfigError(f"{word} is no setting of a packer; override {method}", field=word)
        self.ucxx_feed = RolloutFeed(
            made_of(ClientConfig, client, "client"),
            device=device,
            on_loss=self.on_episode_lost,
            on_missing=on_missing,
            output_of=self.rollout_output_of,
            **settings,
        )

    def on_episode_lost(self, loss: Loss) -> None:
        """Called once with every episode that could not be had, in the trainer's thread; for subclasses. Does nothing.

        Losses are logged in any case, one line a batch and reason. What it raises is raised when it was called with all
        of a batch's losses, and the batch is in use.
        """

    def rollout_output_of(self, rollout: object) -> object:
        """The output of a rollout, as `get_policy_input` is given it; for subclasses whose rollouts keep it elsewhere.

        Returns:
            The rollout's `completion` where it has one, else the rollout itself.
        """
        return completion_of(rollout)

    @known_options
    def start_prefetch(self, rollouts: Sequence[object], *, policy_version: int | None = None) -> None:
        """Begin to fetch the episodes of these rollouts; see `RolloutFeed.start`."""
        self._feed().start(rollouts, policy_version=policy_version)

    def wait_prefetch(self, timeout_s: float | str | None = None) -> bool:
        """Wait for the batch on its way and take it into use; see `RolloutFeed.wait`."""
        return self._feed().wait(timeout_s)

    def collect_prefetch(self, timeout_s: float | str | None = None) -> list[Any]:
        """The rollouts to train on now; see `RolloutFeed.collect`."""
        return self._feed().collect(timeout_s)

    @known_options
    def defer_prefetch(self, rollouts: Sequence[object], *, policy_version: int | None = None) -> None:
        """Leave these rollouts to a later `collect_prefetch`; see `RolloutFeed.defer`."""
        self._feed().defer(rollouts, policy_version=policy_version)

    def release_prefetch(self) -> None:
        """Use the rollouts in use no longer, their slots and buffers come back now; see `RolloutFeed.release`."""
        self._feed().release()

    @property
    def is_cold_start(self) -> bool:
        """Whether there is no batch in use, and none on its way."""
        return self._feed().is_cold_start

    @property
    def is_prefetch_ready(self) -> bool:
        """Whether a batch has come, so that `collect_prefetch` need not wait for it."""
        return self._feed().is_ready

    @property
    def prefetch_buffer(self) -> list[Any] | None:
        """The rollouts in use, None before the first; see `RolloutFeed.buffer`."""
        return self._feed().buffer

    @property
    def prefetch_missing(self) -> tuple[Loss, ...]:
        """What is lost of the batch in use, each with its reason; see `RolloutFeed.missing`."""
        return self._feed().missing

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        """The packer's own `get_policy_input`, with the episode in the place of a reference of ours.

        Returns:
            What the packer makes of it; None for an episode that is lost (`on_episode_lost` was called).
        """
        if is_ours(rollout_output):
            rollout_output = self._feed().resolve(rollout_output)
            if rollout_output is None:
                return None
        return super().get_policy_input(sample, rollout_output, n_ignore_prefix_tokens, **kwargs)  # type: ignore[misc]  # of the packer behind the mixin

    def shutdown_ucxx_data_packer(self) -> None:
        """Give up what is on its way, release what is held, end the thread. Idempotent."""
        feed, self.ucxx_feed = self.ucxx_feed, None
        if feed is not None:
            feed.close()

    def _feed(self) -> RolloutFeed:
        if self.ucxx_feed is None:
            raise ConfigError("this packer is not set up: call setup_ucxx_data_packer() first")
        return self.ucxx_feed
