"""A store that hands every call on to another one, unless a test has it refuse, lose or hold some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership import Batch, Entry, Lease, Snapshot, Store, Watch

__all__ = ["Call", "StoreInFront", "WatchInFront"]

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a store.

    Attributes:
        name: of the method; "next" of a watch.
        key: that it names, or its prefix; "" without one.
        value: that is put.
        timeout_s: that it was given; None: the store's own.
    """

    name: str
    key: str = ""
    value: bytes = b""
    timeout_s: float | None = None


def _nothing(_: Call) -> None:
    """The call goes through."""


class StoreInFront(Store):
    """A `Store` in front of another one, which it closes.

    Attributes:
        behind: that one.
        calls: every call so far, in order.
        before: called with each call before it is made: what it raises is the call's outcome, and it may take its time.
        after: called with each call that was made: what it raises is an answer that was lost.
        reachable: whether calls reach the store; a watch that is being waited on loses what arrives in that time.
    """

    def __init__(self, behind: Store) -> None:
        self.behind, self.url, self.config = behind, behind.url, behind.config
        self.calls: list[Call] = []
        self.before: Callable[[Call], None] = _nothing
        self.after: Callable[[Call], None] = _nothing
        self.reachable = True

    def count(self, name: str) -> int:
        """How many calls of one method there were."""
        return sum(call.name == name for call in self.calls)

    def passed_on(self, call: Call, made: Callable[[], ResultT]) -> ResultT:
        """One call, from its arrival to its answer."""
        self.calls.append(call)
        self.before(call)
        self._require_reachable()
        answer = made()
        self._require_reachable()
        self.after(call)
        return answer

    def _require_reachable(self) -> None:
        if not self.reachable:
            raise StoreUnavailableError("the connection is cut", url=self.url)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        return self.passed_on(
            Call(name="grant", timeout_s=timeout_s), lambda: self.behind.grant(ttl_s, timeout_s=timeout_s)
        )

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        return self.passed_on(
            Call(name="keep_alive", timeout_s=timeout_s), lambda: self.behind.keep_alive(lease_id, timeout_s=timeout_s)
        )

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        self.passed_on(
            Call(name="revoke", timeout_s=timeout_s), lambda: self.behind.revoke(lease_id, timeout_s=timeout_s)
        )

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        return self.passed_on(
            Call(name="get", key=key, timeout_s=timeout_s), lambda: self.behind.get(key, timeout_s=timeout_s)
        )

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        return self.passed_on(
            Call(name="put", key=key, value=value, timeout_s=timeout_s),
            lambda: self.behind.put(key, value, lease_id=lease_id, expected=expected, timeout_s=timeout_s),
        )

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        return self.passed_on(
            Call(name="delete", key=key), lambda: self.behind.delete(key, expected=expected, timeout_s=timeout_s)
        )

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        return self.passed_on(
            Call(name="snapshot", key=prefix), lambda: self.behind.snapshot(prefix, timeout_s=timeout_s)
        )

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> WatchInFront:
        behind = self.passed_on(
            Call(name="watch", key=prefix), lambda: self.behind.watch(prefix, after=after, identity=identity)
        )
        return WatchInFront(self, behind)

    def close(self) -> None:
        self.behind.close()


class WatchInFront(Watch):
    """A `Watch` of a `StoreInFront`."""

    def __init__(self, front: StoreInFront, behind: Watch) -> None:
        self._front = front
        self.behind = behind

    def next(self, timeout_s: float) -> Batch | None:
        return self._front.passed_on(Call(name="next"), lambda: self.behind.next(timeout_s))

    def close(self) -> None:
        self.behind.close()
