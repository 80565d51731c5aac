"""The trainer's packer: what a framework's packer does with an episode, and the mixin that gets the episode for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cartpole.features import FeatureMap
from cartpole.lesson import Lesson
from cartpole.network import Array
from cartpole.trajectory import Episode
from ucxx_transport import UCXXDataPackerMixin

if TYPE_CHECKING:
    from ucxx_transport.trainer import Loss

__all__ = ["EpisodePacker", "LessonPacker"]


class LessonPacker:
    """Makes a lesson of an episode's arrays; knows nothing of where they come from.

    Attributes:
        verified, mismatched: digests compared.
    """

    def __init__(self, features: FeatureMap) -> None:
        self._features = features
        self.verified = 0
        self.mismatched = 0

    def get_policy_input(
        self, sample: object, rollout_output: Mapping[str, Array], n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Lesson | None:
        """The lesson of one episode; None when its bytes are not those that were played.

        Args:
            sample: not needed here.
            rollout_output: the episode's arrays.
            n_ignore_prefix_tokens: not needed here.
            **kwargs: `digest`: what `Episode.digest` was where it was played.
        """
        del sample, n_ignore_prefix_tokens
        episode = Episode.from_arrays(rollout_output)
        if episode.digest() != kwargs["digest"]:
            self.mismatched += 1
            return None
        self.verified += 1
        return Lesson.of(episode, self._features)


class EpisodePacker(UCXXDataPackerMixin, LessonPacker):
    """A `LessonPacker` that is given records instead of episodes.

    Attributes:
        lost: episodes that could not be had, by the reason's word.
    """

    def __init__(self, features: FeatureMap) -> None:
        super().__init__(features)
        self.lost: Counter[str] = Counter()

    def on_episode_lost(self, loss: Loss) -> None:
        """Count it."""
        self.lost[loss.reason.value] += 1
