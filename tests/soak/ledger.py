"""What has become of every payload of one ring. Decisions only: it is told what happened and says what must not have.

| fate       | means                                        | may also be found                                        |
|------------|----------------------------------------------|----------------------------------------------------------|
| waiting    | written, nobody reads it                     | gone, if a killed reader had been given it, or took it   |
| handed out | a reader has been asked to read it           | stale, if a taker had it first                           |
| delivered  | a reader or taker has it, every byte right   | READY, if its acknowledgement died with reader or server |
| gone       | stale, and a killed reader had been given it |                                                          |

The rings of the harness never overwrite, so nothing else can make a payload disappear. A taker's answer may come
before the writer's, and after that of a reader which found its payload stale: the settlement explains what was stale.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ucxx_transport import SlotRef

__all__ = ["AccountError", "Ledger"]

Name = tuple[bytes, int, int]

# What a read may end with while something is being killed; all of these are tried again.
_RETRYABLE = frozenset({"PeerLostError", "DeadlineExceededError", "BusyError", "NotReadyError"})


class AccountError(AssertionError):
    """A payload was lost, doubled or changed without a kill that explains it."""


@dataclass(slots=True, kw_only=True)
class _Handed:
    ref: SlotRef
    reader: object


@dataclass(slots=True)
class Ledger:
    """The books of one ring.

    Attributes:
        closed: the ring's worker was killed; from then on any error is an answer.
        counts: outcomes by name.
        newest: what was reported last: a reference of the ring, for takers.
    """

    closed: bool = False
    newest: SlotRef | None = None
    counts: Counter[str] = field(default_factory=Counter)
    _waiting: OrderedDict[Name, SlotRef] = field(default_factory=OrderedDict)
    _handed: dict[Name, _Handed] = field(default_factory=dict)
    _delivered: dict[Name, object] = field(default_factory=dict)
    _doubtful: set[Name] = field(default_factory=set)
    _unacknowledged: set[Name] = field(default_factory=set)
    _stale: dict[Name, str] = field(default_factory=dict)
    _taken_unreported: set[Name] = field(default_factory=set)
    _unreported_writes: int = 0
    _unheard_takes: int = 0

    @property
    def waiting(self) -> int:
        """Payloads that nobody has been asked to read."""
        return len(self._waiting)

    @property
    def handed_out(self) -> int:
        """Reads without an answer."""
        return len(self._handed)

    def written(self, ref: SlotRef) -> None:
        """A writer has reported a payload."""
        self.counts["written"] += 1
        self.counts["written_bytes"] += ref.nbytes
        self.newest = ref
        if ref.name in self._taken_unreported:
            self._taken_unreported.remove(ref.name)
        else:
            self._waiting[ref.name] = ref

    def hand_out(self, reader: object) -> SlotRef:
        """The next payload for a reader."""
        name, ref = self._waiting.popitem(last=False)
        self._handed[name] = _Handed(ref=ref, reader=reader)
        return ref

    def answered(self, ref: SlotRef, outcome: str, message: str) -> None:
        """A reader's answer.

        Raises:
            AccountError: no kill explains it.
        """
        handed = self._handed.pop(ref.name)
        self.counts[outcome] += 1
        if outcome == "delivered":
            self._deliver(ref, handed.reader)
        elif outcome == "corrupt":
            raise AccountError(f"{ref.name}: {message}")
        elif self.closed:
            return
        elif outcome == "StaleSlotError":
            self._stale[ref.name] = message
        elif outcome in _RETRYABLE:
            self._put_back(ref)
        else:
            raise AccountError(f"{ref.name} of {ref.nbytes} bytes: {outcome}: {message}")

    def taken(self, ref: SlotRef, taker: object, *, in_doubt: bool) -> None:
        """A taker has a payload, every byte right.

        Args:
            ref: of it. taker: who. in_doubt: a server was killed meanwhile, perhaps with the acknowledgement.

        Raises:
            AccountError: another one had it before.
        """
        self.counts["taken"] += 1
        if in_doubt:
            self._unacknowledged.add(ref.name)
        reported = (self._waiting, self._handed, self._delivered, self._stale)
        if not any(ref.name in names for names in reported):
            self._taken_unreported.add(ref.name)
        self._waiting.pop(ref.name, None)
        self._deliver(ref, taker)

    def take_failed(self, outcome: str, message: str) -> None:
        """A take that brought nothing but an error.

        Raises:
            AccountError: no kill explains it.
        """
        self.counts[outcome] += 1
        if outcome not in _RETRYABLE and not self.closed:
            raise AccountError(f"take: {outcome}: {message}")

    def _put_back(self, ref: SlotRef) -> None:
        if ref.name not in self._delivered:
            self._waiting[ref.name] = ref

    def _deliver(self, ref: SlotRef, reader: object) -> None:
        if ref.name in self._delivered:
            if ref.name not in self._unacknowledged:
                raise AccountError(f"{ref.name} was delivered to {self._delivered[ref.name]} and to {reader}")
            self.counts["there_again"] += 1
        self.counts["delivered_bytes"] += ref.nbytes
        self._delivered[ref.name] = reader

    def writer_killed(self, unanswered: int) -> None:
        """Up to `unanswered` payloads may be in the ring that nobody reported."""
        self._unreported_writes += unanswered

    def take_unheard(self, most: int) -> None:
        """A taker was killed before it answered: up to `most` payloads may have gone with it."""
        self._unheard_takes += most

    def reader_killed(self, reader: object) -> None:
        """What it was reading goes back; what it had, and its last acknowledgements, are in doubt."""
        for name, handed in list(self._handed.items()):
            if handed.reader is reader:
                del self._handed[name]
                self._put_back(handed.ref)
                self._doubtful.add(name)
        self._unacknowledged.update(name for name, by in self._delivered.items() if by is reader)

    def server_killed(self) -> None:
        """Acknowledgements may have died with it: of what was delivered since the last settlement, or is being."""
        self._unacknowledged.update(self._delivered, self._handed)

    def settle(self, ready: Iterable[SlotRef]) -> list[SlotRef]:
        """Compare the books with the ring while nothing is going on, and begin a new account.

        Args:
            ready: every payload that waits in the ring.

        Returns:
            Those to discard: they were delivered, and only their acknowledgement was lost.

        Raises:
            AccountError: a payload is missing, or there again, without a kill that explains it.
        """
        found = {ref.name: ref for ref in ready}
        again = [ref for name, ref in found.items() if name in self._delivered]
        unknown = [ref for name, ref in found.items() if name not in self._delivered and name not in self._waiting]
        missing = [name for name in self._waiting if name not in found]
        gone = {*missing, *(name for name in self._stale if name not in self._delivered)}
        unreported = [*self._taken_unreported, *(ref.name for ref in unknown)]
        unexplained = {
            "delivered and there again": [ref.name for ref in again if ref.name not in self._unacknowledged],
            "lost": sorted(gone - self._doubtful)[self._unheard_takes :],
            "of unknown origin": unreported[self._unreported_writes :],
        }
        if any(unexplained.values()):
            raise AccountError(f"payloads that no kill explains: {unexplained}")
        for name in missing:
            del self._waiting[name]
        for ref in unknown:
            self._waiting[ref.name] = ref
        self.counts["there_again"] += len(again)
        self.counts["gone"] += len(gone)
        self.counts["taken_before_read"] += len(self._stale.keys() & self._delivered.keys())
        self.counts["unreported"] += len(unreported)
        self._delivered.clear()
        self._doubtful &= set(self._waiting)
        self._unacknowledged.clear()
        self._stale.clear()
        self._taken_unreported.clear()
        self._unreported_writes = self._unheard_takes = 0
        return again
