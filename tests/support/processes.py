"""Real coordinators and devices on loopback for tests: started here, watched by their logs and the
run's database, and gone at the end of the test whatever happened.

Every process carries a mark in its environment, which its children inherit, so even an orphan of a
killed parent is found.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import psutil

from coordinator.admission.client_list import add_client
from edge_sdk.data.loading import Examples, load_dataset, save_shard
from edge_sdk.data.partition import partition_iid
from edge_sdk.protocol.keys import make_keys

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
MARK = f"EDGE_TEST_MARK_{os.getpid()}"  # suites that run side by side leave each other alone
SHARD = 60  # examples of a device: the deadlines in the tests count on it
HOST_GFLOPS = "30"  # named, so that no device spends time on a benchmark
PATIENCE_S = 60.0  # two busy cores import torch in 2 to 10 s


class Running:
    """One process and its log, stdout and stderr together."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        mark: str,
        program: Sequence[str] = (sys.executable, "-m"),
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as file:
            self._begin = file.tell()
            self.process = subprocess.Popen(
                [*program, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment(mark),
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        """What it has said since it was started."""
        return self.log.read_bytes()[self._begin :].decode()

    def said(self, words: str) -> bool:
        return words in self.text()

    def wait_said(self, words: str, timeout_s: float = PATIENCE_S) -> None:
        def check() -> bool:
            has_said, is_alive = self.said(words), self.is_alive
            assert has_said or is_alive, f"{self.name} ended without {words!r}:\n{self.text()}"
            return has_said

        wait_until(check, f"{self.name} says {words!r}", timeout_s, self)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, once it has ended by itself."""
        wait_until(lambda: not self.is_alive, f"{self.name} ends", timeout_s, self)
        return self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def trainer(self) -> psutil.Process:
        """The device's training process."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "edge_sdk.training" in child.cmdline()
        ]
        assert len(found) == 1, f"{self.name} has {len(found)} trainers"
        return found[0]

    def forget(self) -> None:
        """Only what it says from now on counts."""
        self._begin = self.log.stat().st_size

    @contextlib.contextmanager
    def held_in_training(self) -> Iterator[int]:
        """The device's trainer stands still with a job in hand; the job's round."""
        trainer = self.trainer()
        trainer.suspend()
        try:
            time.sleep(0.2)  # what it said before reaches the agent
            yield wait_until(self._open_job, f"{self.name} has a job", PATIENCE_S, self)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.resume()

    def _open_job(self) -> int:
        """The round of the job in hand, 0 for none."""
        assert self.is_alive, f"{self.name} has ended:\n{self.text()}"
        events = re.findall(r"round (\d+): (job|trained)", self.text())
        return int(events[-1][0]) if events and events[-1][1] == "job" else 0


class World:
    """A folder with a coordinator's keys, its test set, and devices with keys and data.

    Used as a context manager; leaving it kills everything that was started."""

    def __init__(self, folder: Path, num_devices: int = 2) -> None:
        self.folder = folder
        self.mark = uuid4().hex
        self.port = free_port()
        self.keys = folder / "keys"
        self.run_dir = folder / "run"
        self.shards: dict[str, Examples] = {}
        self.running: list[Running] = []
        data = load_dataset("digits", 0, examples=num_devices * SHARD, test_examples=40)
        self.test = data.test
        make_keys(self.keys, "server")
        save_shard(folder / "test.npz", data.test)
        parts = partition_iid(len(data.train), num_devices, 0)
        for name, part in zip("abcdef", parts, strict=False):
            self.admit(name, data.train.take(part))

    def admit(self, name: str, shard: Examples) -> None:
        home = self.folder / name
        pair = make_keys(home, "device")
        (home / "server.public").write_bytes((self.keys / "server.public").read_bytes())
        add_client(self.keys / "clients", name, pair.public)
        save_shard(home / "data.npz", shard)
        self.shards[name] = shard

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def serve_flags(self, *flags: str) -> list[str]:
        """Later flags win, so `flags` may replace any of these."""
        return [
            "serve",
            "--method",
            "stage-rotation",
            "--test",
            str(self.folder / "test.npz"),
            "--listen",
            self.endpoint,
            "--keys",
            str(self.keys),
            "--run-dir",
            str(self.run_dir),
            "--min-clients",
            str(len(self.shards)),
            "--batch-size",
            "16",
            "--epochs",
            "1",
            "--device",
            "cpu",
            *flags,
        ]

    def serve(self, *flags: str) -> Running:
        command = ["coordinator.cli", *self.serve_flags(*flags)]
        return self.start("coordinator", command)

    def device_flags(self, name: str, *flags: str) -> list[str]:
        home = self.folder / name
        return [
            "run",
            "--coordinator",
            self.endpoint,
            "--data",
            str(home / "data.npz"),
            "--id",
            name,
            "--keys",
            str(home),
            "--board",
            "raspberry-pi-4",
            "--host-gflops",
            HOST_GFLOPS,
            "--threads",
            "1",
            *flags,
        ]

    def device(self, name: str, *flags: str) -> Running:
        return self.start(
            name, ["tests.support.fast_device_program", *self.device_flags(name, *flags)]
        )

    def start(
        self, name: str, command: Sequence[str], program: Sequence[str] = (sys.executable, "-m")
    ) -> Running:
        running = Running(name, command, self.folder / f"{name}.log", self.mark, program)
        self.running.append(running)
        return running

    def rows(self, query: str, *values: object) -> list[tuple]:
        """From the run's database, which another process may be writing; [] before it is there."""
        return read_rows(self.run_dir, query, *values)

    def last_round(self) -> int:
        found = self.rows("SELECT COALESCE(MAX(round), 0) FROM rounds")
        return found[0][0] if found else 0

    def wait_round(self, number: int, timeout_s: float = PATIENCE_S) -> None:
        """Until the round is committed."""
        what = f"round {number} is committed"
        wait_until(lambda: self.last_round() >= number, what, timeout_s, *self.running)

    def outcomes(self, name: str) -> dict[int, str]:
        """By round: what became of this client's part in it."""
        return dict(
            self.rows("SELECT round, outcome FROM participations WHERE client_id = ?", name)
        )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        for running in self.running:
            running.process.wait(10)


def environment(mark: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", MARK: mark}


def wait_until(
    condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S, *watched: Running
) -> T:
    """The condition's value once it is true. An error with the logs' last lines after timeout_s, or
    at once when one that is watched has crashed."""
    give_up = time.monotonic() + timeout_s
    while not (value := condition()):
        has_crashed = any(running.said("Traceback") for running in watched)
        if has_crashed or time.monotonic() > give_up:
            tails = [f"--- {running.name}\n{running.text()[-2000:]}" for running in watched]
            why = "a traceback" if has_crashed else f"{timeout_s:g} s passed"
            raise AssertionError("\n".join([f"{why} before: {what}", *tails]))
        time.sleep(0.02)
    return value


def mapped_libraries(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def marked(mark: str) -> list[psutil.Process]:
    """Every live process that was started with this mark, or by one that was."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            if not is_dead and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kill_marked(mark: str) -> None:
    for _ in range(5):  # one may be starting another
        if not (left := marked(mark)):
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        give_up = time.monotonic() + 5
        while not all(map(has_ended, left)) and time.monotonic() < give_up:
            time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    """Also as a zombie without threads, which holds nothing: init may take seconds to reap it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.NoSuchProcess:
        return True


def run_cli(
    module: str, *arguments: str, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    mark = uuid4().hex
    try:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(mark),
            timeout=timeout_s,
            check=False,
        )
    finally:
        kill_marked(mark)


def read_rows(run_dir: Path, query: str, *values: object) -> list[tuple]:
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{run_dir / 'run.sqlite'}?mode=ro", uri=True, timeout=5)
        ) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "unable to open" in str(error) or "no such table" in str(error):
            return []
        raise


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    for _ in range(100):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port between 20000 and 32000")
