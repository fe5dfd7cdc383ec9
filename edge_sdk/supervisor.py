"""Keeps a training process beside the agent: one that died has a successor after a pause, which
grows so that a cause that stays does not eat the device's time. Times are of time.monotonic()."""

from __future__ import annotations

import time

from edge_sdk.agent_options import AgentOptions
from edge_sdk.child import TrainerProcess
from edge_sdk.errors import TrainerError
from edge_sdk.pipe import Cancel, PipeMessage
from edge_sdk.transport import Payload
from edge_sdk.wire import Fault, Fetch, Part, Update

RESTART_S = 1.0  # pause before another trainer, doubles to RESTART_MAX_S
RESTART_MAX_S = 60.0


class Supervisor:
    """Starts the first process at once; only that one measures. process None: none runs now.

    Raises TrainerError where the system starts no process."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self.process: TrainerProcess | None = options.start_trainer(options.measure_compute)
        self.restart_at: float | None = None
        self._pause_s = RESTART_S
        self._num_cancels = 0  # said, and not answered

    def send(self, message: PipeMessage, payload: Payload = b"") -> None:
        """What is said while no process runs is lost: a new one begins without a job."""
        if self.process:
            self._num_cancels += isinstance(message, Cancel)
            self.process.send(message, payload)

    def receive(self) -> tuple[PipeMessage, memoryview] | None:
        """What the process has said, None: nothing, or about a job that was dropped, which may be
        of the same round as the one in hand. Raises EOFError or OSError once it has ended: then
        bury() it."""
        if self.process is None:
            return None
        self.process.flush()
        if not self.process.is_readable():
            return None
        message, payload = self.process.receive()
        if isinstance(message, Cancel):
            self._num_cancels -= 1
            return None
        is_of_job = isinstance(message, Fetch | Part | Update) or (
            isinstance(message, Fault) and message.round > 0
        )
        return None if is_of_job and self._num_cancels else (message, payload)

    def own_bytes(self) -> int:
        return self.process.own_bytes() if self.process else 0

    def end_if_stuck(self, silent_s: float) -> bool:
        """Whether it was ended for having said nothing for so long: then bury() it."""
        return self.process is not None and self.process.end_if_stuck(silent_s)

    def bury(self) -> tuple[str, float]:
        """How it ended, and in how many seconds there is another."""
        assert self.process is not None
        cause, self.process = self.process.cause_of_death(), None
        self._num_cancels = 0
        return cause, self._put_off()

    def restart(self) -> None:
        """Raises TrainerError if that fails; `restart_at` is then the time of the next try."""
        self.restart_at = None
        try:
            self.process = self._options.start_trainer(measure_compute=False)
        except TrainerError as error:
            raise TrainerError(f"{error}; again in {self._put_off():.0f} s") from error

    def is_well(self) -> None:
        """It has done a whole job: the next death is not of the cause that the pause grew for."""
        self._pause_s = RESTART_S

    def end(self) -> None:
        if self.process:
            self.process.end()

    def _put_off(self) -> float:
        pause_s = self._pause_s
        self.restart_at = time.monotonic() + pause_s
        self._pause_s = min(RESTART_MAX_S, 2 * pause_s)
        return pause_s
