"""A trainer's end: batches of episodes fetched ahead, each episode once, each loss with its reason."""

from ucxx_transport.trainer.batch import Batch, fetch_batch
from ucxx_transport.trainer.episode_stream import EpisodeStream, StreamedEpisode
from ucxx_transport.trainer.mixin import UCXXDataPackerMixin
from ucxx_transport.trainer.prefetch_statistics import PrefetchStatistics
from ucxx_transport.trainer.prefetcher import Prefetcher
from ucxx_transport.trainer.rollout_feed import RolloutFeed
from ucxx_transport.trainer.triage import Loss, LossReason

__all__ = [
    "Batch",
    "EpisodeStream",
    "Loss",
    "LossReason",
    "PrefetchStatistics",
    "Prefetcher",
    "RolloutFeed",
    "StreamedEpisode",
    "UCXXDataPackerMixin",
    "fetch_batch",
]
