"""A trainer's end: batches of episodes fetched ahead, each episode once, each loss with its reason."""

from ucxx_transport.packer.batch import Batch, fetch_batch
from ucxx_transport.packer.episode_stream import EpisodeStream, StreamedEpisode
from ucxx_transport.packer.mixin import UCXXDataPackerMixin
from ucxx_transport.packer.prefetch_statistics import PrefetchStatistics
from ucxx_transport.packer.prefetcher import Prefetcher
from ucxx_transport.packer.rollout_feed import RolloutFeed
from ucxx_transport.packer.triage import Loss, LossReason

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
