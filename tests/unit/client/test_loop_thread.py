from __future__ import annotations

from concurrent.futures import Future

import pytest

from ucxx_transport import ConfigError
from ucxx_transport.client.loop_thread import LoopThread


class LastMoment(Future[int]):
    """Its result comes just after somebody has given up waiting for this time."""

    def result(self, timeout: float | None = None) -> int:
        if not self.done():
            self.set_result(7)
            raise TimeoutError
        return super().result(timeout)


def test_a_result_that_comes_in_the_last_moment_is_not_lost() -> None:
    thread = LoopThread("test")
    try:
        assert thread.result(LastMoment()) == 7
    finally:
        thread.stop()


def test_a_timeout_of_the_work_s_own_is_raised() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    thread = LoopThread("test")
    try:
        with pytest.raises(TimeoutError, match="its own"):
            thread.call(late)
    finally:
        thread.stop()
    with pytest.raises(ConfigError, match="closed"):
        thread.call(late)
