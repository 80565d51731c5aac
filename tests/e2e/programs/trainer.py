"""A trainer on a `RolloutFeed`: `python -m tests.e2e.programs.trainer LOCAL`, LOCAL as in `ClientConfig(local=…)`.

| asked                   | does and answers                                                                 |
|-------------------------|----------------------------------------------------------------------------------|
| `{"start": [record …]}` | begins to fetch; `{}`                                                            |
| `{"collect": true}`     | compares every byte of the next batch; `{"trained": [sequence …], "lost": {…}}`  |
| `{"hold": true}`        | the same, and keeps the arrays until its end                                     |

`lost` counts by reason since its start.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np

from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from tests.e2e.programs.rollout_worker import play
from ucxx_transport import ClientConfig
from ucxx_transport.trainer import RolloutFeed


def trained_on(feed: RolloutFeed, kept: list[object] | None) -> list[int]:
    """Take the next batch and look at every byte of it."""
    trained = []
    for rollout in feed.collect():
        record = cast("dict[str, Any]", rollout)
        tree = feed.resolve(record)
        assert tree is not None
        expected = play(record["episode_length"])
        np.testing.assert_array_equal(tree["obs"]["image"], expected["obs"]["image"])
        np.testing.assert_array_equal(tree["obs"]["speed"], expected["obs"]["speed"])
        np.testing.assert_array_equal(tree["reward"], expected["reward"])
        trained.append(record["sequence"])
        if kept is not None:
            kept.append(tree)
    return trained


def main(local: Any) -> None:
    """Answer until the end of the input."""
    config = ClientConfig(local=local, connect_timeout_s=1.0, deadline_s=10.0)
    kept: list[object] = []
    with RolloutFeed(config, deadline_s=60.0) as feed:
        for request in requests():
            if "start" in request:
                feed.start(request["start"])
                answer({})
                continue
            trained = trained_on(feed, kept if "hold" in request else None)
            answer({"trained": trained, "lost": dict(feed.statistics().losses)})


if __name__ == "__main__":
    log_to_stderr()
    main(sys.argv[1])
