"""Rollout workers and a trainer that learn CartPole through ucxx_transport, each in a process of its own.

Read first `worker` (play, write into the ring, send the record) and `trainer` (fetch by record, learn, send weights).

| module        | what it is                                                                          |
|---------------|-------------------------------------------------------------------------------------|
| `command`     | the options of `ucxx-transport demo`                                                |
| `plan`        | one run's settings: the payload's schema and how large the rings are                |
| `worker`      | a rollout worker process: `UCXXRolloutMixin`                                        |
| `trainer`     | the trainer process: `UCXXDataPackerMixin`, and with `--store` a `SourceWatcher`    |
| `run`         | the parent process: starts both, kills one worker with SIGKILL, starts another, ends |
| `processes`   | starting, stopping and finding processes                                            |
| `report`      | the summary, its tables and the learning curve                                      |
| `environment` | Gymnasium environments, and what the policy sees of an observation                  |
| `policy`      | the learning, in numpy                                                              |
"""
