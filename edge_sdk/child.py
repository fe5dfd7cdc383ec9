"""The agent's side of the training process: start it, talk to it, see how it ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence

from edge_sdk.capacity import TRAINER_ENVIRONMENT
from edge_sdk.errors import TrainerError
from edge_sdk.notify import SILENT_S, THRASHING_S
from edge_sdk.pipe import Pipe, PipeMessage
from edge_sdk.pressure import Usage, is_thrashing, usage
from edge_sdk.transport import Payload


class TrainerProcess:
    """A running `edge_sdk.worker_main`. Sending never blocks: what the process does not take yet
    waits here, so that the agent can always read what it says. Raises TrainerError where the system
    starts no process."""

    def __init__(
        self,
        data: str,
        *,
        threads: int = 0,
        device: str = "cpu",
        measure_compute: bool = False,
        calibration: str = "",
        kept: str = "",
        imports: Sequence[str] = (),
        search_path: Sequence[str] = (),
    ) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "edge_sdk.worker_main", "--fd", str(theirs.fileno()),
            "--data", data, "--threads", str(threads), "--device", device,
        ]  # fmt: skip
        command += ["--calibration", calibration] if calibration else []
        command += ["--kept", kept] if kept else []
        command += ["--measure-compute"] if measure_compute else []
        command += [part for module in imports for part in ("--import", module)]
        environment = os.environ | TRAINER_ENVIRONMENT
        if search_path:
            environment["PYTHONPATH"] = os.pathsep.join(search_path)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the agent, which ends the trainer
            )
        except OSError as error:
            ours.close()
            raise TrainerError(f"the training process cannot be started: {error}") from error
        finally:
            theirs.close()
        self._socket = ours
        self._pipe = Pipe(ours)
        self._outbox: deque[memoryview] = deque()
        self._verdict = ""
        self._used: Usage | None = None  # up to its last message

    def fileno(self) -> int:
        return self._pipe.fileno()

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
        self._used = usage(self._process.pid)
        return received

    def own_bytes(self) -> int:
        """Its memory but for library pages: those count as available already."""
        import psutil

        try:
            held = psutil.Process(self._process.pid).memory_info()
        except psutil.Error:
            return 0
        return int(held.rss - getattr(held, "shared", 0))

    def end(self) -> None:
        """Stop it now."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def end_if_stuck(self, silent_s: float) -> bool:
        """Stop it if it has said nothing for so long that it does not get on."""
        if silent_s <= min(SILENT_S, THRASHING_S):
            return False
        has_thrashed = is_thrashing(self._process.pid, self._used, silent_s)
        if silent_s <= (THRASHING_S if has_thrashed else SILENT_S):
            return False
        # Signal 9: both count as a lack of memory.
        why = ", as memory was too short to get on," if has_thrashed else ""
        self._verdict = f"said nothing for {silent_s:.0f} s{why} and was ended by signal 9"
        self._process.kill()
        return True

    def cause_of_death(self) -> str:
        """How it ended; waits for the end, which the closed pipe has announced."""
        self._pipe.close()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._verdict:
            return self._verdict
        if status == -signal.SIGKILL:
            return "was killed by signal 9, most likely for memory"
        return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
