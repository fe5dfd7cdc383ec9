"""A coordinator and devices as real processes behind a bad link, and the faults done to them.

Nothing here waits by sleeping for a while: a phase is known by what a device's log says, by the
bytes that have passed the relay, and by the work of the training process.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.net import CONGESTION, Net, network
from tests.support.processes import Running, World, kill_marked, read_rows, wait_until

BUSY_S = 0.2  # CPU seconds of a training process, far more than it needs to receive a model
FAULT_PATIENCE_S = 180.0  # a device that is back may be waiting out its longest pause
CHECKPOINT = re.compile(r"round-(\d{6})\.safetensors")
PHASES = ("download", "train", "upload")
LARGE, SMALL = ("128,256", 1_843_792), ("8,8", 12_000)  # channels of two stages, bytes
FLAGS = (
    "--method",
    "owners-mean",
    "--exits",
    "2",
    "--optimizer",
    "sgd",
    "--lr",
    "0.05",
    "--quorum",
    "1.0",
    "--eval-every",
    "1000000",
    "--rounds",
    "100000",
)


class Bed(World):
    """Devices a, b, ... on links 1, 2, ...; further links are spare. flags: of every coordinator.

    mount: the run folder is a small file system of its own, in the coordinator's mount namespace:
    "" (none), "tmpfs" or "ext4"."""

    def __init__(
        self,
        folder: Path,
        net: Net,
        num_devices: int,
        flags: Sequence[str] = (),
        *,
        model: tuple[str, int] = LARGE,
        mount: str = "",
        mount_mib: int = 0,
    ) -> None:
        super().__init__(folder, num_devices)
        self.net = net
        self.flags = [*FLAGS, "--option", f"channels={model[0]}", *flags]
        self.model_bytes = model[1]
        self.links = {name: number for number, name in enumerate(sorted(self.shards), 1)}
        self.agents: dict[str, Running] = {}
        self.server: Running | None = None
        self.kept = folder / "kept"
        self.kept.mkdir()
        self.run_dir.mkdir()
        self._reader: subprocess.Popen[bytes] | None = None
        if mount:
            self._mount(mount, mount_mib)
            self._reader = subprocess.Popen(
                [
                    *net.hosts[0].inside(mount=True),
                    sys.executable,
                    "-m",
                    "tests.chaos.rows",
                    str(self.run_dir),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        self._has_run = False
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    # -- processes -----------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return f"tcp://{self.net.hosts[0].address}:{self.port}"

    @property
    def seen_dir(self) -> Path:
        """The run folder as this process can open it."""
        return self.net.hosts[0].seen(self.run_dir)

    def serve(self, prefix: Sequence[str] = (), **environment: str) -> Running:
        """Start the coordinator, or start it again on what there is. prefix: of its command."""
        resume = ["--resume"] if self._has_run else []
        command = ["coordinator.cli", *self.serve_flags(*self.flags, *resume)]
        inside = self.net.hosts[0].inside(*_texts(environment), mount=True)
        program = [*inside, *prefix, sys.executable, "-m"]
        self.server = self.start("coordinator", command, program)
        return self.server

    def serve_until_listening(self, prefix: Sequence[str] = (), **environment: str) -> Running:
        server = self.serve(prefix, **environment)
        server.wait_said("listening on", FAULT_PATIENCE_S)
        self._has_run = True
        return server

    def device(self, name: str, prefix: Sequence[str] = (), **environment: str) -> Running:
        """Start a device's agent, or start it again."""
        self.agents[name] = self._device(name, self.links[name], prefix, environment)
        return self.agents[name]

    def second_device(self, name: str, link: int) -> Running:
        """Another device with the keys of one, on another link."""
        return self._device(name, link, (), {}, suffix="-second")

    def move_device(self, name: str, link: int) -> Running:
        """Start a device that had ended on another link, which is its own from now on."""
        self.links[name] = link
        return self.device(name)

    def _device(
        self,
        name: str,
        link: int,
        prefix: Sequence[str],
        environment: dict[str, str],
        suffix: str = "",
    ) -> Running:
        cache = self.folder / name / f"cache{suffix}"
        own = {"CACHE_DIRECTORY": str(cache)}
        inside = self.net.hosts[link].inside(*_texts(own | environment))
        command = ["edge_sdk.cli", *self.device_flags(name)]
        return self.start(name + suffix, command, [*inside, *prefix, sys.executable, "-m"])

    def device_flags(self, name: str, *flags: str) -> list[str]:
        """A real device: it measures itself and keeps what it has trained over a restart."""
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
            "--threads",
            "1",
            "--ignore-conditions",
            *flags,
        ]

    def start_all(self) -> None:
        self.serve_until_listening()
        for name in self.links:
            self.device(name)

    def revive(self) -> None:
        """Whatever happened before: every link mended, everybody running."""
        for name, link in self.links.items():
            self.net.mend(link)
            if not self.agents[name].is_alive:
                self.device(name)
        if self.server is None or not self.server.is_alive:
            self.serve_until_listening()

    def stop(self) -> None:
        """Kill everything that runs."""
        kill_marked(self.mark)

    def kill_agent(self, name: str) -> None:
        """Its trainer ends with it: it reads the end of the pipe."""
        self.agents[name].process.kill()
        self.agents[name].process.wait()

    def kill_trainer(self, name: str) -> None:
        self.agents[name].trainer().kill()

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.process.kill()
        self.server.process.wait()

    def kill(self, victim: str, name: str) -> None:
        """victim: agent, trainer or coordinator; of the device `name`."""
        if victim == "coordinator":
            self.kill_server()
        elif victim == "agent":
            self.kill_agent(name)
        else:
            self.kill_trainer(name)

    def restart(self, victim: str, name: str) -> None:
        if victim == "coordinator":
            self.serve_until_listening()
        elif victim == "agent":
            self.device(name)

    # -- phases --------------------------------------------------------------------------------

    def wait_phase(self, name: str, phase: str, *, is_cut: bool) -> int:
        """Until the device is in this phase of its first job after `forget`; the job's round.
        is_cut: its link is cut then, in the middle of a transfer."""
        agent, link = self.agents[name], self.links[name]
        round = self._wait_event(agent, "job")
        if phase == "download":
            self._wait_bytes(link, "down", is_cut)
        elif phase == "train":
            self._wait_training(agent, round)
            if is_cut:
                self.net.cut(link)
        else:
            self._wait_event(agent, "trained")
            self._wait_bytes(link, "up", is_cut)
        return round

    def forget(self) -> None:
        """Phases are those of jobs given from now on."""
        for agent in self.agents.values():
            agent.forget()

    def _wait_event(self, agent: Running, word: str) -> int:
        """The round of the next job given or trained, as the log says it."""

        def look() -> int:
            assert agent.is_alive, f"{agent.name} has ended:\n{agent.text()}"
            found = re.findall(rf"round (\d+): {word}\b", agent.text())
            return int(found[0]) if found else 0

        return wait_until(look, f"{agent.name} says {word!r}", FAULT_PATIENCE_S)

    def _wait_training(self, agent: Running, round: int) -> None:
        """Until its training process has been busy: a download costs it next to nothing."""
        trainer = agent.trainer()
        begin = sum(trainer.cpu_times()[:2])
        wait_until(
            lambda: sum(trainer.cpu_times()[:2]) - begin > BUSY_S,
            f"{agent.name} trains in round {round}",
            FAULT_PATIENCE_S,
            agent,
        )

    def _wait_bytes(self, link: int, way: str, is_cut: bool) -> None:
        """Until a third of the model has passed. With is_cut the relay cuts the link just then."""
        share = self.model_bytes // 3
        if is_cut:
            self.net.cut_after(link, way, share)
            what = f"link {link} is cut"
            wait_until(lambda: self.net.is_cut(link), what, FAULT_PATIENCE_S)
            return
        begin = self._passed(link, way)
        what = f"{share} bytes go {way} link {link}"
        wait_until(lambda: self._passed(link, way) - begin > share, what, FAULT_PATIENCE_S)

    def _passed(self, link: int, way: str) -> int:
        return int(self.net.ask()[str(link)][way]["passed"])

    # -- what the run has come to ---------------------------------------------------------------

    def rows(self, query: str, *values: object) -> list[tuple]:
        if self._reader is None:
            return read_rows(self.run_dir, query, *values)
        assert self._reader.stdin is not None
        assert self._reader.stdout is not None
        self._reader.stdin.write(json.dumps([query, values]).encode() + b"\n")
        self._reader.stdin.flush()
        return [tuple(row) for row in json.loads(self._reader.stdout.readline())]

    def wait_round(self, number: int, timeout_s: float = FAULT_PATIENCE_S) -> None:
        super().wait_round(number, timeout_s)

    def wait_rounds(self, count: int, timeout_s: float = FAULT_PATIENCE_S) -> int:
        """Until so many rounds more are committed; the last one."""
        goal = self.last_round() + count
        self.wait_round(goal, timeout_s)
        return self.last_round()

    def _watch(self) -> None:
        """Copy every round's checkpoint: the coordinator keeps the last few only."""
        while not self._is_over.wait(0.05):
            self.keep_checkpoints()

    def keep_checkpoints(self) -> None:
        """Copy those that are new."""
        with contextlib.suppress(OSError):
            for path in self.seen_dir.iterdir():
                copy = self.kept / path.name
                if CHECKPOINT.fullmatch(path.name) and not copy.exists():
                    draft = copy.with_suffix(f".{threading.get_ident()}")
                    shutil.copyfile(path, draft)
                    draft.rename(copy)

    def checkpoint(self, round: int) -> Path:
        return self.kept / f"round-{round:06d}.safetensors"

    # -- the run folder's file system -----------------------------------------------------------

    def _mount(self, kind: str, size_mib: int) -> None:
        host = self.net.hosts[0]
        if kind == "tmpfs":
            host.run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(self.run_dir))
            return
        image = self.folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(size_mib * 2**20)
        host.run("mkfs.ext4", "-q", str(image))
        host.run("mount", "-o", "loop,errors=remount-ro", str(image), str(self.run_dir))

    def mount_again(self) -> None:
        """The same ext4 image, as after a reboot."""
        host, folder = self.net.hosts[0], str(self.run_dir)
        host.run("umount", folder)
        host.run("mount", "-o", "loop,errors=remount-ro", str(self.folder / "disk.img"), folder)

    def remount(self, options: str) -> None:
        self.net.hosts[0].run("mount", "-o", f"remount,{options}", str(self.run_dir))

    def fill_disk(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free_disk(self) -> None:
        self._filler.unlink()

    @property
    def _filler(self) -> Path:
        return self.seen_dir / "filler"

    def print_logs(self, num_lines: int = 40) -> None:
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-num_lines:]
            print(f"--- {log.name}", *lines, sep="\n", file=sys.stderr)

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *about: object) -> None:
        self._is_over.set()
        self._watcher.join()
        self.keep_checkpoints()
        super().__exit__(*about)
        if self._reader is not None:
            for pipe in (self._reader.stdin, self._reader.stdout):
                pipe.close()  # type: ignore[union-attr]
            self._reader.wait()


def _texts(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


@contextlib.contextmanager
def bed_of(
    folder: Path,
    num_devices: int,
    *flags: str,
    congestion: str = CONGESTION[0],
    spare: int = 0,
    **options: Any,
) -> Iterator[Bed]:
    """A Bed on a network of its own with spare links. Where the block fails, the logs' ends go to
    stderr."""
    with (
        network(num_devices + spare, congestion) as net,
        Bed(folder, net, num_devices, flags, **options) as bed,
    ):
        try:
            yield bed
        except BaseException:
            bed.print_logs()
            raise
