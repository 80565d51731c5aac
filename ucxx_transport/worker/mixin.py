"""UCXXRolloutMixin: the transport in a rollout worker class of any framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucxx_transport.errors import ConfigError
from ucxx_transport.worker.trajectory_writer import TrajectoryWriter


class UCXXRolloutMixin:
    """Gives a rollout worker `write_to_buffer`. It has no `__init__`, so its place among the bases does not matter.

    ```python
    class Worker(UCXXRolloutMixin):
        def run(self, queue):
            self.setup_ucxx("worker-0", reward="reward", varlen={"obs": 500, "reward": 500})
            queue.put(self.write_to_buffer(self.play(), policy_version=3))
            ...
            self.cleanup_ucxx()
    ```
    """

    ucxx_writer: TrajectoryWriter | None = None
    """The writer behind it, from `setup_ucxx` to `cleanup_ucxx`."""

    def setup_ucxx(self, worker_id: str, **settings: Any) -> None:
        """Make this worker's writer.

        Args:
            worker_id: the worker's name in every record.
            **settings: as for `TrajectoryWriter`: `schema`, `varlen`, `ring`, `server`, `serve`, `on_error`, `narrow`,
                `reward`, `store`, `publisher`, `store_config`, `store_meta`, `runtimes`.

        Raises:
            ConfigError: a setting is wrong, or this worker is set up already.
            TransportError: the server did not start.
        """
        if self.ucxx_writer is not None:
            raise ConfigError("this worker is set up already; cleanup_ucxx() first")
        self.ucxx_writer = TrajectoryWriter(worker_id, **settings)

    def write_to_buffer(
        self,
        trajectory: Mapping[str, object],
        *,
        policy_version: int | None = None,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, object]:
        """Write one trajectory; arguments and errors as `TrajectoryWriter.write`.

        Returns:
            Its record as plain values (`EpisodeRecord.to_dict`), for the control plane to hand to a trainer.
        """
        if self.ucxx_writer is None:
            raise ConfigError("this worker is not set up: call setup_ucxx(worker_id, …) first")
        record = self.ucxx_writer.write(
            trajectory, policy_version=policy_version, readers=readers, meta=meta, deadline_s=deadline_s
        )
        return record.to_dict()

    def cleanup_ucxx(self) -> None:
        """Stop the server and remove the ring. Unread payloads are gone with it. Idempotent."""
        writer, self.ucxx_writer = self.ucxx_writer, None
        if writer is not None:
            writer.close()
