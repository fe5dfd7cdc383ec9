"""When a job that is trained is given up: far beyond its predicted time, or for heat and battery.

A job may take TIMES what was predicted, and twice that as far as it gets on: a board that is
throttled to a third of its clock, where the prediction is off by two, ends within it. Only steps
done stretch the time, so a job that stands still ends early. Parts on a slow link do not count."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_sdk.agent.pipe import Progress
from edge_sdk.capacity.chooser import LONGEST_S

TIMES = 10.0
LEAST_S = 60.0  # that any job counts as predicted
UNPREDICTED_S = LONGEST_S  # all of it, where neither speed nor deadline is known


def limit_s(predicted_s: float, deadline_s: float) -> float:
    """Seconds of training after which a job without a step done ends. 0: not known, none."""
    known = [seconds for seconds in (predicted_s, deadline_s) if seconds]
    return TIMES * max(LEAST_S, min(known)) if known else UNPREDICTED_S


@dataclass
class JobWatch:
    """One job while it is trained. Times are those of time.monotonic()."""

    predicted_s: float = 0.0
    deadline_s: float = 0.0
    began: float | None = None  # None: its parts are not all here
    last: Progress = field(default_factory=Progress)
    _reason: str = ""  # why the device has to rest
    _epochs: int = 0  # that were done when it had to

    def note_conditions(self, reason: str) -> None:
        """reason: why the device may do no work now; "": it may."""
        if reason and not self._reason:
            self._epochs = self.last.epochs
        self._reason = reason

    def why_ended(self, now: float) -> tuple[str, str] | None:
        """Code and reason, if the job has to end now."""
        done = self.last
        if self._reason and (self.began is None or done.epochs > self._epochs):
            return "conditions", f"ended after {done.epochs} epochs: {self._reason}"
        share = min(1.0, done.batches / done.total) if done.total else 0.0
        most_s = limit_s(self.predicted_s, self.deadline_s) * (1 + share)
        if self.began is None or now - self.began <= most_s:
            return None
        return "trainer", (
            f"given up after {now - self.began:.0f} s with {done.batches} of {done.total} batches "
            f"done: predicted were {self.predicted_s:.0f} s, the deadline is "
            f"{self.deadline_s:.0f} s (0: not known)"
        )

    def in_words(self) -> str:
        of = f" of {self.last.total}" if self.last.total else ""
        return f"{self.last.batches}{of} batches done"
