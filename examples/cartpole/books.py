"""The orchestrator's books: what the processes reported, put together for the view and the report."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from cartpole.director import WINDOW
from cartpole.messages import FinishedEpisode, TrainerStatus, WorkerStatus

__all__ = ["Books", "Event", "KillRecord", "SeatBook"]

_RATE_WINDOW_S = 3.0


@dataclass(slots=True, kw_only=True)
class SeatBook:
    """What is known of one worker process.

    Attributes:
        seat: its place in the run's books. worker: which worker it is (a replacement has its predecessor's number).
        way: "in place" or "over UCX", as the plan has it.
        state: "starting", "running", "stopped", "failed", or "killed".
        status: its last report. delivered: episodes that reached the trainer.
    """

    seat: int
    worker: int
    pid: int
    way: str
    state: str = "starting"
    status: WorkerStatus | None = None
    delivered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something worth a line: seconds since the run's start, and what."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KillRecord:
    """The one SIGKILL of the run, and who took over."""

    at_s: float
    episode: int
    worker: int
    pid: int
    seat: int
    replacement_seat: int
    replacement_pid: int


@dataclass(slots=True)
class Books:
    """Everything the orchestrator knows.

    Attributes:
        trainer: the trainer's last report, None before the first.
        finished: every delivered episode in order of arrival.
        best_mean: highest mean return over a full window so far.
        goal_at_s: when the window's mean first reached the goal, seconds since the run's start.
        dead_rings_swept: rings of dead workers that somebody of the run has removed, before its end.
    """

    seats: dict[int, SeatBook] = field(default_factory=dict)
    trainer: TrainerStatus | None = None
    finished: list[FinishedEpisode] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    kill: KillRecord | None = None
    best_mean: float | None = None
    goal_at_s: float | None = None
    dead_rings_swept: int = 0
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)

    def note(self, at_s: float, text: str) -> None:
        """Write down an event."""
        self.events.append(Event(at_s=at_s, text=text))

    def hear_trainer(self, status: TrainerStatus, at_s: float) -> None:
        """Take in the trainer's report."""
        self.trainer = status
        for episode in status.finished:
            self.finished.append(episode)
            self.seats[episode.seat].delivered += 1
        mean = self.window_mean
        if mean is not None and (self.best_mean is None or mean > self.best_mean):
            self.best_mean = mean
        self._recent.append((at_s, status.episodes, status.payload_bytes))
        while len(self._recent) > 2 and at_s - self._recent[0][0] > _RATE_WINDOW_S:
            self._recent.popleft()

    def hear_worker(self, seat: int, status: WorkerStatus) -> None:
        """Take in a worker's report; one that was killed stays so, whatever it had said before."""
        book = self.seats[seat]
        if book.state != "killed":
            book.status = status
            book.state = status.state

    def bury(self, seat: int, ring: dict[str, int]) -> None:
        """Take in what a dead worker's ring counted up to the end, instead of what the worker last reported of it."""
        book = self.seats[seat]
        known = book.status if book.status is not None else WorkerStatus(pid=book.pid, state="killed")
        book.status = replace(known, ring=ring)

    @property
    def window_mean(self) -> float | None:
        """Mean return over the last episodes, None before the window is full."""
        if len(self.finished) < WINDOW:
            return None
        return sum(episode.total_reward for episode in self.finished[-WINDOW:]) / WINDOW

    @property
    def recent_mean(self) -> float | None:
        """Mean return over the last episodes, however few; None before the first."""
        last = self.finished[-WINDOW:]
        return sum(episode.total_reward for episode in last) / len(last) if last else None

    @property
    def replacement_episodes(self) -> int:
        """Delivered by the worker that took the killed one's place."""
        return self.seats[self.kill.replacement_seat].delivered if self.kill is not None else 0

    @property
    def episodes_meanwhile(self) -> int:
        """Delivered by the others between the kill and the first episode of the replacement."""
        if self.kill is None:
            return 0
        after = self.finished[self.kill.episode :]
        seats = [episode.seat for episode in after]
        first = seats.index(self.kill.replacement_seat) if self.kill.replacement_seat in seats else len(seats)
        return sum(seat not in (self.kill.seat, self.kill.replacement_seat) for seat in seats[:first])

    def rates(self) -> tuple[float, float]:
        """Episodes and payload bytes per second, over the last few seconds."""
        if len(self._recent) < 2:
            return 0.0, 0.0
        (first_s, episodes, nbytes), (last_s, episodes_now, nbytes_now) = self._recent[0], self._recent[-1]
        span_s = max(last_s - first_s, 1e-6)
        return (episodes_now - episodes) / span_s, (nbytes_now - nbytes) / span_s

    def worker_total(self, name: str) -> int:
        """A counter of all workers' last reports, added up."""
        return sum(int(getattr(book.status, name)) for book in self.seats.values() if book.status is not None)

    def ring_totals(self) -> Counter[str]:
        """The rings' counters of all workers' last reports, added up."""
        total: Counter[str] = Counter()
        for book in self.seats.values():
            if book.status is not None:
                total.update(book.status.ring)
        return total
