"""A trainer's end: batches of episodes fetched ahead, each episode once, each loss with its reason."""

from ucxx_transport.trainer.accounts import PrefetchStatistics
from ucxx_transport.trainer.batch import Batch, fetch_batch
from ucxx_transport.trainer.episode_stream import EpisodeStream, StreamedEpisode
from ucxx_transport.trainer.loss_policy import Loss, LossReason
from ucxx_transport.trainer.mixin import UCXXDataPackerMixin
from ucxx_transport.trainer.prefetcher import PendingBatch, Prefetcher
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
