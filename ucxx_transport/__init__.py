"""RL trajectories from a rollout worker's shared memory to a trainer: in place on one host, over UCX between hosts."""
