"""What a run is doing, as data: RUN/status.json for people and programs, a Snapshot for metrics.

The file is replaced whole, so a reader never sees half of it, and says how old it is and whether
its process lives. It is worth nothing after a power cut, so it is not synced, and a disk that does
not take it stops no run. monitor.py writes it. Imports no torch: looking is quick.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
import psutil

from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import write_whole
from edge_sdk.helpers.logs import event
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ExitResult

log = logging.getLogger(__name__)
FILE = "status.json"
FRESH_S = 60.0  # a run on another machine that told something within this time is running

Utc: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]
ClientPhase: TypeAlias = Literal[
    "connected",  # it has not said yet what it can train
    "resting",  # it can train nothing now: too small, too hot, battery low
    "ready",
    "download",  # it has a job and not all of its tensors
    "train",
    "queued",  # it has trained; its update waits for its turn in the memory budget
    "upload",
    "late",  # its round went on without it, its update is still taken
    "away",
    "duplicate",  # another live device claims its key; who was there first is being asked
]
RunPhase: TypeAlias = Literal[
    "starting",
    "waiting for devices",
    "round open",
    "aggregating",
    "evaluating",
    "saving",
    "finished",
    "gave up",
    "stopped",
    "failed",
]
Health: TypeAlias = Literal["running", "finished", "dead", "unknown"]


class ClientState(msgspec.Struct, frozen=True, kw_only=True):
    """One client. Bytes and counts are those since the coordinator's start."""

    name: str
    phase: ClientPhase
    address: str = ""
    platform: str = ""
    exit: int = 0  # the deepest that it can train; 0: not known, or none
    variant: int = 0  # that it has chosen; 0: the method offers none
    round: int = 0  # of the job in hand; 0: none
    bytes_down: int = 0
    bytes_up: int = 0
    last_seen_s: float = 0.0  # before the snapshot was made
    updates: int = 0  # that count
    exits: tuple[ExitResult, ...] = ()  # of the last of them, on what it trained on
    faults: dict[str, int] = {}  # by code
    failure: str = ""  # why its last job that failed did, also of the round in progress
    duplicates: int = 0  # other live devices that came with its key


class LinkCounts(msgspec.Struct, kw_only=True):
    """What the coordinator did not hear since its start, but for strangers."""

    frames_refused: int = 0  # that break the protocol
    messages_dropped: int = 0  # beyond what a peer may say
    peers_ended: int = 0  # disconnected, and kept out for a while
    connections_ended: int = 0  # for their descriptor, or more than is read


class UnfitDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that tries to take part and is refused, or can train nothing."""

    name: str  # or its address
    code: str  # of the fault; capacity: it can train nothing now
    reason: str
    count: int = 1  # times that it was heard of so
    age_s: float = 0.0  # since the last time


class CohortState(msgspec.Struct, frozen=True, kw_only=True):
    """What the cohort knows; the counts without "round" are those since the coordinator's start."""

    clients: tuple[ClientState, ...] = ()
    chosen: int = 0  # participants of the round; how many must return and have returned
    needed: int = 0
    returned: int = 0
    bytes_in_flight: int = 0
    budget_bytes: int = 0
    spool_bytes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    updates_accepted: int = 0  # in their own round
    updates_late: int = 0  # not there at its end; of these, counted in a later one: stale
    updates_stale: int = 0
    updates_failed: int = 0
    faults: dict[str, int] = {}  # by code
    strangers: int = 0  # connections with a key that is not admitted
    links: LinkCounts = msgspec.field(default_factory=LinkCounts)
    unfit: tuple[UnfitDevice, ...] = ()  # the one heard of last first


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The run and its process at one moment, which is `written_utc`."""

    run: str
    phase: RunPhase
    round: int  # in progress, or the next one
    rounds: int  # planned
    pid: int
    host: str
    process: str  # tells it from a later one with this pid, see identity
    started_utc: Utc  # of the process
    phase_utc: Utc  # since when it has been in this phase
    written_utc: Utc
    reason: str = ""  # why it ended, if it did not finish
    rounds_done: int = 0  # by this process, and the seconds they took
    rounds_s: float = 0.0
    last_round_s: float = 0.0
    # of that round, exit 1 first: on the test set; of its participants, on what they trained on
    task: Task = "classify"  # whose metric this is
    metric: tuple[float | None, ...] = ()  # None: no finite one
    loss: tuple[float | None, ...] = ()
    train_metric: tuple[float | None, ...] = ()
    holdout_metric: float | None = None  # see reader.RoundRow
    personal_metric: float | None = None
    cohort: CohortState = CohortState()


class StatusFile:
    """RUN/status.json, readable by everybody. A failure to write is logged once until it works."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_failed = False

    def write(self, snapshot: Snapshot) -> None:
        """Replace the file; after an OSError the last one stays."""
        try:
            content = msgspec.json.encode(snapshot)
            write_whole(self.path, content, mode=0o644, is_synced=False)
        except OSError as error:
            if not self._has_failed:
                said = "%s is not written, the run goes on: %s"
                log.warning(said, self.path, error, extra=event("status_lost"))
            self._has_failed = True
        else:
            self._has_failed = False


def read_status(folder: Path) -> Snapshot | None:
    """The last that a coordinator told in this folder, None if none has. Raises StoreError."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Snapshot)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}; ask as the user who runs the coordinator"
        ) from error
    except msgspec.DecodeError as error:
        raise StoreError(f"{path} cannot be read: {error}; is it of this version?") from error


def health(snapshot: Snapshot) -> Health:
    """Whether the run goes on. A process on another machine (or in another container) cannot be
    looked at, so what it told lately counts."""
    if snapshot.phase == "finished":
        return "finished"
    if snapshot.host != socket.gethostname():
        return "running" if age_s(snapshot) < FRESH_S else "unknown"
    return "running" if is_alive(snapshot.pid, snapshot.process) else "dead"


def age_s(snapshot: Snapshot) -> float:
    return seconds_since(snapshot.written_utc)


def seconds_since(moment: datetime) -> float:
    """Not negative, whatever the clock did."""
    return max(0.0, (utc() - moment).total_seconds())


def is_alive(pid: int, process: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    now = identity(pid)
    return not now or now == process  # where /proc hides others' processes it is ""


def identity(pid: int) -> str:
    """Tells processes with the same pid apart by their start: on Linux in clock ticks since boot,
    which setting the clock does not change. "dead" for one that is not waited for; "" where it
    cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        with suppress(psutil.Error):
            return str(psutil.Process(pid).create_time())
        return ""
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "dead" if state in "ZX" else fields[18]


def utc() -> datetime:
    return datetime.now(timezone.utc)
