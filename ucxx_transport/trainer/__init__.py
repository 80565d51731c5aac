"""A trainer's end: batches of episodes fetched ahead, each episode once, each loss with its reason."""

from ucxx_transport.trainer.batch import Batch, PrefetchStatistics, fetch_batch
from ucxx_transport.trainer.episode_stream import EpisodeStream, StreamedEpisode
from ucxx_transport.trainer.loss_policy import Loss, LossReason
from ucxx_transport.trainer.mixin import UCXXDataPackerMixin
from ucxx_transport.trainer.pending import PendingBatch
from ucxx_transport.trainer.prefetcher import Prefetcher
from ucxx_transport.trainer.rollout_feed import RolloutFeed

__all__ = [
    "Batch",
    "EpisodeStream",
    "Loss",
    "LossReason",
    "PendingBatch",
    "PrefetchStatistics",
    "Prefetcher",
    "RolloutFeed",
    "StreamedEpisode",
    "UCXXDataPackerMixin",
    "fetch_batch",
]
