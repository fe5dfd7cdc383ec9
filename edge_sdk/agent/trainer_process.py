"""The agent's side of the trainer: start the process, talk to it, see how it ended."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from msgspec.structs import replace

from edge_sdk.agent.pipe import Cancel, LastWords, Pipe, PipeMessage, TrainerOptions
from edge_sdk.agent.watchdog import SILENT_S, THRASHING_S
from edge_sdk.capacity.costs import TRAINER_ENVIRONMENT
from edge_sdk.errors import DataError, EdgeError, TrainerError
from edge_sdk.hardware import killed_for_memory
from edge_sdk.hardware.memory_pressure import Usage, is_thrashing, usage
from edge_sdk.helpers.files import Stamp, stamp_of
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Fault, Fetch, Part, Update

log = logging.getLogger(__name__)
RESTART_S = 1.0  # pause before another trainer, doubles to RESTART_MAX_S
RESTART_MAX_S = 60.0
# Trainers that end alike before any job, after which the device rests: the next one would, too.
MOST_ALIKE = 4
REST_S = 300.0  # doubles to REST_MAX_S
REST_MAX_S = 3600.0
WELL_S = 600.0  # of life, after which an end is not like the one before
MOST_STAMPS = 1000  # files of a folder of data that are looked at
LOOK_S = 1.0  # between looks at the memory


@dataclass(frozen=True)
class Ending:
    """How a trainer ended. is_for_memory: it was killed for memory, or as it did not get on, so its
    job is taken to be too large. status: of the process, negative for a signal. last_words: what it
    said of that itself."""

    how: str
    is_for_memory: bool
    status: int = 0
    last_words: LastWords | None = None

    def before_data(self) -> EdgeError:
        """The error of an agent whose first trainer ended so, before it had read its data."""
        if words := self.last_words:
            return (DataError if words.code == DataError.code else TrainerError)(words.detail)
        what = f"the trainer {self.how} before it had read its data"
        return TrainerError(f"{what}; ask edge-sdk doctor why")


class TrainerProcess:
    """A running `edge_sdk.training`. Sending never blocks: what the process does not take yet
    waits here, so the agent can always read what it says. Raises TrainerError if none starts."""

    def __init__(self, options: TrainerOptions, search_path: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "edge_sdk.training", "--fd", str(theirs.fileno())]
        environment = os.environ | TRAINER_ENVIRONMENT
        if search_path:
            environment["PYTHONPATH"] = os.pathsep.join(search_path)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Where there was none at the start, a file of the program's may have its number.
                stdout=None if sys.__stdout__ else subprocess.DEVNULL,
                stderr=None if sys.__stderr__ else subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the agent, which ends the trainer
            )
        except OSError as error:
            ours.close()
            raise TrainerError(f"the trainer cannot be started: {error}") from error
        finally:
            theirs.close()
        self._socket = ours
        self._pipe = Pipe(ours)
        self._outbox: deque[memoryview] = deque()
        self.last_words: LastWords | None = None
        self._verdict = ""
        self._usage: Usage | None = None  # of the processor, at its last message
        self._memory = killed_for_memory.look(self._process.pid)
        self._look_at = time.monotonic() + LOOK_S
        self.send(options)

    def fileno(self) -> int:
        return self._pipe.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_unsent(self) -> bool:
        return bool(self._outbox)

    def is_readable(self) -> bool:
        return bool(select.select([self], [], [], 0)[0])

    def send(self, message: PipeMessage, payload: Payload = b"") -> None:
        """Queue a message. A dead trainer's end shows when it is read."""
        self._outbox += [memoryview(block) for block in self._pipe.blocks(message, payload)]
        self.flush()

    def flush(self) -> None:
        """Hand over as much as the process takes now."""
        while self._outbox:
            block = self._outbox[0]
            try:
                taken = self._socket.send(block, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self._outbox.clear()
                return
            if taken == len(block):
                self._outbox.popleft()
            else:
                self._outbox[0] = block[taken:]

    def receive(self) -> tuple[PipeMessage, memoryview]:
        """The next message, waiting for it. Raises EOFError or OSError when the process is gone."""
        received = self._pipe.receive()
        self._usage = usage(self._process.pid)
        return received

    def own_bytes(self) -> int:
        """Bytes that the process holds, without library pages: those count as available already."""
        import psutil

        try:
            held = psutil.Process(self._process.pid).memory_info()
        except psutil.Error:
            return 0
        return int(held.rss - getattr(held, "shared", 0))

    def look_at_memory(self) -> None:
        """Remember what it holds and what is free, if it is time: that is gone when it is dead."""
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            self._memory = killed_for_memory.look(self._process.pid)

    def end(self) -> None:
        """Kill the process now."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def end_if_stuck(self, silent_s: float) -> bool:
        """Kill a process that, silent for so long, must be stuck; whether that was done."""
        if silent_s <= min(SILENT_S, THRASHING_S):
            return False
        has_thrashed = is_thrashing(self._process.pid, self._usage, silent_s)
        if silent_s <= (THRASHING_S if has_thrashed else SILENT_S):
            return False
        why = ", as memory was too short to get on," if has_thrashed else ""
        self._verdict = f"said nothing for {silent_s:.0f} s{why} and was ended by signal 9"
        self._process.kill()
        return True

    def wait_for_end(self) -> Ending:
        """Wait for the end of the process, which its closed pipe has announced."""
        self._pipe.close()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._verdict:
            return Ending(self._verdict, True, status)
        if status == -signal.SIGKILL:
            is_for_memory = killed_for_memory.was_for_memory(
                self._memory, killed_for_memory.kills()
            )
            why = "most likely for memory" if is_for_memory else "and memory was not short"
            return Ending(f"was killed by signal 9, {why}", is_for_memory, status)
        how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if self.last_words:
            how += f": {self.last_words.detail}"
        return Ending(how, False, status, self.last_words)


class Supervisor:
    """Keeps a trainer running: starts the first at once, and another some time after one has ended,
    a long time after MOST_ALIKE that ended alike before any job, unless the data changes. Only the
    first measures this machine's speed. process: the one that runs, None: none does. num_alike: how
    many have ended so.

    Raises TrainerError where the system starts no process."""

    def __init__(self, options: TrainerOptions, search_path: Sequence[str] = ()) -> None:
        self._options = options
        self._search_path = search_path
        self._stamps = _stamps(options.data)  # of the data, as the last process began to read them
        self.process: TrainerProcess | None = TrainerProcess(options, search_path)
        self.restart_at: float | None = None
        self._pause_s = RESTART_S
        self._num_cancels = 0  # sent, and not answered yet
        self.num_alike, self._status = 0, 0
        self._started = time.monotonic()

    def send(self, message: PipeMessage, payload: Payload = b"") -> None:
        """Queue a message. While no process runs it is dropped: a new one begins without a job."""
        if self.process:
            self._num_cancels += isinstance(message, Cancel)
            self.process.send(message, payload)

    def receive(self) -> tuple[PipeMessage, memoryview] | None:
        """The next message of the process. None: there is none, or it is about a job that was
        dropped, which may be of the same round as the one in hand. Raises EOFError or OSError once
        the process has ended: then reap() it."""
        if self.process is None:
            return None
        self.process.flush()
        self.process.look_at_memory()
        if not self.process.is_readable():
            return None
        message, payload = self.process.receive()
        if isinstance(message, Cancel):
            self._num_cancels -= 1
            return None
        if isinstance(message, LastWords):
            self.process.last_words = message
            return None
        is_of_job = isinstance(message, Fetch | Part | Update) or (
            isinstance(message, Fault) and message.round > 0
        )
        return None if is_of_job and self._num_cancels else (message, payload)

    def own_bytes(self) -> int:
        return self.process.own_bytes() if self.process else 0

    def end_if_stuck(self, silent_s: float) -> bool:
        """Whether the process was killed for having said nothing for so long: then reap() it."""
        return self.process is not None and self.process.end_if_stuck(silent_s)

    @property
    def is_resting(self) -> bool:
        """Whether so many have ended alike that the next one is put off for long."""
        return self.num_alike >= MOST_ALIKE

    @property
    def pause(self) -> str:
        """What is done where no process runs, in words; "" where one does."""
        if self.restart_at is None:
            return ""
        return "resting (see the log)" if self.is_resting else "starting another"

    def is_due(self, now: float) -> bool:
        """Whether another process is to be started: it is time, or the data changed meanwhile."""
        if self.restart_at is None or now >= self.restart_at:
            return self.restart_at is not None
        return self.is_resting and _stamps(self._options.data) != self._stamps

    def reap(self, *, had_job: bool) -> tuple[Ending, float]:
        """Collect a process that has ended: how it ended, and seconds until another is started."""
        assert self.process is not None
        ending, self.process = self.process.wait_for_end(), None
        self._num_cancels = 0
        is_alike = ending.status == self._status and time.monotonic() - self._started < WELL_S
        self.num_alike = 0 if had_job else 1 + self.num_alike * is_alike
        self._status = ending.status
        return ending, self._put_off()

    def restart(self) -> None:
        """Start another process, which reads the data anew. Raises TrainerError: the next try is
        at `restart_at`."""
        self.restart_at = None
        if (stamps := _stamps(self._options.data)) != self._stamps:
            log.warning("%s changed since it was read, read again", self._options.data)
        self._stamps = stamps
        try:
            options = replace(self._options, measure_compute=False)
            self.process = TrainerProcess(options, self._search_path)
            self._started = time.monotonic()
        except TrainerError as error:
            raise TrainerError(f"{error}; again in {self._put_off():.0f} s") from error

    def mark_well(self) -> None:
        """The process has done a whole job, so its next death is none that the pause grew for."""
        self._pause_s, self.num_alike = RESTART_S, 0

    def end(self) -> None:
        if self.process:
            self.process.end()

    def _put_off(self) -> float:
        pause_s = self._pause_s
        self._pause_s = min(RESTART_MAX_S, 2 * pause_s)
        if self.is_resting:
            pause_s = min(REST_MAX_S, REST_S * 2 ** min(10, self.num_alike - MOST_ALIKE))
        self.restart_at = time.monotonic() + pause_s
        return pause_s


def _stamps(data: str) -> list[Stamp]:
    """Of a file, or of a folder and the files in it; of the name of a data set [NOWHERE]."""
    path, inside = Path(data), list[Path]()
    with suppress(OSError):
        inside = sorted(islice(path.iterdir(), MOST_STAMPS))
    return [stamp_of(file) for file in (path, *inside)]
