"""The trainer: takes records, has their episodes fetched ahead, learns from them, sends new weights.

The next batch is fetched while this one is learnt from. What a dead worker takes with it is counted, not waited for.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from cartpole.environment import EnvironmentSpec
from cartpole.plan import Local, Plan, digest_of
from cartpole.policy import Array, Experience, Learner, log_softmax
from cartpole.processes import Seat
from cartpole.report import Episode, Results
from ucxx_transport import ClientConfig, SourceWatcher, UCXXDataPackerMixin, open_store

if TYPE_CHECKING:
    from ucxx_transport.trainer import Loss

__all__ = ["EpisodePacker", "Packer", "Trainer"]

_BATCH_STEPS = 2048
_BATCH_DEADLINE_S = 3.0  # what a worker's death costs the batch that it was in, at most
_MOST_WAITING_BYTES = 64 << 20


class Packer:
    """A framework's data packer: makes of an episode what is learnt from. It knows nothing of rings.

    Attributes:
        digests: episodes whose bytes were right and wrong, over and above the transport's own checksums.
    """

    def __init__(self, environment: EnvironmentSpec) -> None:
        self.environment = environment
        self.digests = Counter(verified=0, mismatched=0)

    def get_policy_input(
        self, sample: object, rollout_output: Mapping[str, Array], n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Experience | None:
        """What is learnt from an episode, copied out of it; None when its bytes are not those that were played.

        Args:
            sample: not used.
            rollout_output: the episode's arrays: views of shared memory or of a receive buffer.
            n_ignore_prefix_tokens: not used.
            **kwargs: `digest`: the episode's `digest_of` where it was played.
        """
        del sample, n_ignore_prefix_tokens
        episode = rollout_output
        right = digest_of(episode) == kwargs["digest"]
        self.digests["verified" if right else "mismatched"] += 1
        if not right:
            return None
        actions = episode["actions"].astype(np.int64)
        return Experience(
            inputs=self.environment.episode_inputs(episode["obs"]),
            actions=actions,
            rewards=np.array(episode["rewards"]),
            log_probabilities=log_softmax(episode["logits"])[np.arange(len(actions)), actions],
            terminated=bool(episode["terminated"][0]),
        )


class EpisodePacker(UCXXDataPackerMixin, Packer):
    """The same packer on rings: it is given records, and the mixin gets their episodes.

    Attributes:
        waiting: records to fetch with the next batch.
        lost: episodes that could not be had, by reason.
    """

    def __init__(self, environment: EnvironmentSpec, local: Local, watcher: SourceWatcher | None) -> None:
        super().__init__(environment)
        self.waiting: list[dict[str, Any]] = []
        self.lost = Counter(stale=0)
        self._fetching = False
        self.setup_ucxx_data_packer(client=ClientConfig(local=local), watcher=watcher, deadline_s=_BATCH_DEADLINE_S)

    def on_episode_lost(self, loss: Loss) -> None:
        """Count it."""
        self.lost[loss.reason.value] += 1

    def fetch(self) -> None:
        """Begin to fetch what waits, unless a batch is on its way already."""
        if self.waiting and not self._fetching:
            self.start_prefetch(self.waiting)
            self.waiting, self._fetching = [], True

    def take(self, *, wait: bool = False) -> list[tuple[dict[str, Any], Experience]]:
        """The references and episodes of the batch that has come; with `wait`, of that on its way."""
        if not self._fetching or not (wait or self.is_prefetch_ready):
            return []
        self._fetching = False
        taken = []
        for record in self.collect_prefetch():
            ref = record["ref"]
            experience = self.get_policy_input(None, record, digest=ref["meta"]["digest"])
            if experience is not None:
                taken.append((ref, experience))
        self.release_prefetch()
        return taken

    def reads(self) -> list[dict[str, Any]]:
        """What was read, by transport; GB/s while batches were fetched."""
        assert self.ucxx_feed is not None
        fetch_s = max(self.ucxx_feed.statistics().fetch_s, 1e-9)
        return [
            {"transport": transport, **asdict(way), "gb_per_s": way.nbytes / fetch_s / 1e9}
            for transport, way in self.ucxx_feed.client_statistics().ways.items()
        ]


class Trainer:
    """Learner, packers and the queues to the workers.

    Args:
        plan: the run.
        seats: the queues of every worker process that there may be.
        results: gets the episodes.
    """

    def __init__(self, plan: Plan, seats: Sequence[Seat], results: Results) -> None:
        self.plan = plan
        self.seats = seats
        self.results = results
        self.learner = Learner(plan.environment.width, plan.environment.actions, seed=plan.seed)
        self.joined: set[Any] = set()  # seats of the workers that have come into the store
        self.store = open_store(plan.store, plan.store_config) if plan.store is not None else None
        # Its news of a worker's death ends the reads from it at once.
        self.watcher = SourceWatcher(self.store) if self.store is not None else None
        if self.watcher is not None:
            self.watcher.start()
        ways = sorted({plan.local_of(worker) for worker in range(plan.workers)})
        self.packers = {local: EpisodePacker(plan.environment, local, self.watcher) for local in ways}
        self.batch: list[Experience] = []
        self.started_s = time.monotonic()
        self.send_weights()

    def turn(self) -> bool:
        """Take, fetch and learn what there is; returns False when there was nothing."""
        taken = self.take_records()
        for packer in self.packers.values():
            packer.fetch()
        if sum(len(experience.actions) for experience in self.batch) >= _BATCH_STEPS:
            self.learner.update(self.batch)
            self.batch.clear()
            self.send_weights()
        return bool(taken + self.take_episodes())

    def close(self) -> None:
        """End packers and watcher. Bounded."""
        for packer in self.packers.values():
            packer.shutdown_ucxx_data_packer()
        if self.watcher is not None and self.store is not None:
            self.watcher.stop()
            self.store.close()

    def take_records(self) -> int:
        """Hand the records that have come to the packers, as many as make a batch; returns how many."""
        taken = 0
        waiting_bytes = sum(record["ref"]["nbytes"] for packer in self.packers.values() for record in packer.waiting)
        if self.watcher is not None:
            self.joined.update(source.meta["seat"] for source in self.watcher.sources())
        for number, seat in enumerate(self.seats):
            if self.watcher is not None and number not in self.joined:
                continue
            with suppress(queue.Empty):
                while waiting_bytes < _MOST_WAITING_BYTES:
                    record = seat.records.get_nowait()
                    self.packers[self.plan.local_of(record["ref"]["meta"]["worker"])].waiting.append(record)
                    waiting_bytes += record["ref"]["nbytes"]
                    taken += 1
        return taken

    def take_episodes(self, *, wait: bool = False) -> int:
        """Keep the episodes that have come for the next update; with `wait`, those on their way. Returns how many."""
        taken = [each for packer in self.packers.values() for each in packer.take(wait=wait)]
        at_s = time.monotonic() - self.started_s
        for ref, experience in taken:
            self.batch.append(experience)
            total_reward, steps = float(experience.rewards.sum()), len(experience.actions)
            self.results.add(Episode(at_s, total_reward, steps, ref["nbytes"], ref["meta"]["seat"]))
        return len(taken)

    def send_weights(self) -> None:
        """Offer the policy to every seat; a worker that starts later finds it there."""
        for seat in self.seats:
            seat.offer_weights(self.learner.version, [parameter.copy() for parameter in self.learner.policy.parameters])

    def counters(self) -> dict[str, Any]:
        """What was counted since the start, JSON-safe."""
        packers, watcher = self.packers.values(), self.watcher
        feeds = [packer.ucxx_feed for packer in packers if packer.ucxx_feed is not None]
        lanes = {lane for feed in feeds for lane in feed.client_statistics().transports}
        left = watcher.statistics().removes if watcher is not None else 0
        digests, lost = Counter[str](), Counter[str]()
        for packer in packers:
            digests.update(packer.digests)
            lost.update(packer.lost)
        return {
            "updates": self.learner.version,
            "checksums": dict(digests),
            "lost": dict(lost),
            "retried": sum(feed.statistics().retried for feed in feeds),
            "store": watcher and {"url": self.plan.store, "joined": len(self.joined), "left": left},
            "ucx_lanes": sorted(lanes - {"unknown"}),
            "reads": [reads for packer in packers for reads in packer.reads()],
        }
