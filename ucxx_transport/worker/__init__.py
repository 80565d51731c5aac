"""A rollout worker's end: trajectories into a ring, records of them out to the control plane."""

from ucxx_transport.worker.mixin import UCXXRolloutMixin
from ucxx_transport.worker.trajectory_writer import RolloutStatistics, TrajectoryWriter

__all__ = ["RolloutStatistics", "TrajectoryWriter", "UCXXRolloutMixin"]
