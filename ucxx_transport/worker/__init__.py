"""A rollout worker's end: trajectories into a ring, records of them out to the control plane."""

from ucxx_transport.worker.trajectory_writer import RolloutStatistics, TrajectoryWriter, UCXXRolloutMixin

__all__ = ["RolloutStatistics", "TrajectoryWriter", "UCXXRolloutMixin"]
