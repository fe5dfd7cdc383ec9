"""Ours against Flower: one exchange of tensors, seconds, CPU, memory and bytes on both ends.

    python -m tools.peer [--megabytes 1,10,50] [--clients 1,4,16] [--systems ...]
        [--rounds 3] [--cores 0,1] [--flwr 1.42.0] [--csv FILE [--resume]]

A round: the server sends 20 float32 tensors to every client, each sends back as many, the server
takes the weighted mean. Nothing is trained, no client imports torch. Systems: ours over CURVE and
plain (tools/bench/wire.py's processes), Flower's legacy gRPC server (flwr.server.start_server) and
its SuperLink with SuperNodes and `flwr run`, both unencrypted and otherwise as they come. Flower is
installed into build/peer-venv by this command. The first round warms up.

Each cell runs in a network namespace of its own where the rights allow, so that its loopback's
bytes are the cell's; the SuperLink path's include those between its own processes on one machine.
Memory: resident bytes of a tree of processes, looked at 4 times a second, and at least the largest
peak that the kernel kept of one process; base is that of the server before the model was made.
All processes are pinned to the same cores, this watching one too. The floor is one raw TCP stream
moving a round's bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tools.bench import wire
from tools.peer.processes import (
    Tree,
    available_bytes,
    children_of_all,
    enter_own_network,
    free_ports,
    keep_orphans,
    loopback_bytes,
    started,
)
from tools.peer.table import ROOT, VENV, judge, markdown, print_row, read_rows, write_rows

APP = ROOT / "tools" / "peer" / "superlink"
FLWR = "1.42.0"
SYSTEMS = ("curve", "plain", "flower-grpc", "flower-superlink")
LOOK_S = 0.25
START_S = 600  # until all clients are there
ROUND_S = 900
LEAST_FREE_BYTES = 10**9  # a cell is stopped below this
# models resident in all processes together, per client, and MB of one client's processes at rest
NEEDS = {
    "curve": (2, 40),
    "plain": (2, 40),
    "flower-grpc": (22, 80),
    "flower-superlink": (10, 400),
}


class CellError(Exception):
    """Why a cell has no figures."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--megabytes", default="1,10,50")
    add("--clients", default="1,4,16")
    add("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    add("--rounds", type=int, default=3, help="measured ones; more where they are short")
    add("--cores", default="0,1")
    add("--flwr", default=FLWR, help="its version")
    add("--csv", type=Path)
    add("--resume", action="store_true", help="keep the rows of --csv, measure what lacks")
    add("--cell", nargs=4, metavar=("SYSTEM", "MB", "CLIENTS", "ROUNDS"), help=argparse.SUPPRESS)
    add(
        "--serve",
        nargs=5,
        metavar=("MB", "CLIENTS", "ROUNDS", "KEYS", "MARKS"),
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what it started ends with it
    if args.serve:
        return serve(*args.serve)
    if args.cell:
        system, megabytes, clients, rounds = args.cell
        try:
            print(json.dumps(run_cell(system, int(megabytes), int(clients), int(rounds))))
        except CellError as error:
            print(json.dumps({"skipped": str(error)}))
        return 0
    systems = args.systems.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems {','.join(sorted(unknown))}: known are {', '.join(SYSTEMS)}")
    if any(system.startswith("flower") for system in systems):
        install(args.flwr)
    os.sched_setaffinity(0, set(map(int, args.cores.split(","))))
    rows = read_rows(args.csv) if args.csv and args.resume else []
    for megabytes in map(int, args.megabytes.split(",")):
        for clients in map(int, args.clients.split(",")):
            measure(rows, megabytes, clients, systems, args.rounds)
            if args.csv:
                write_rows(args.csv, rows, sys.argv[1:] if argv is None else argv)
    print("\n" + markdown(rows))
    judge(rows)
    return 0


def install(version: str) -> None:
    """Make the virtual environment unless it has this version."""
    python = VENV / "bin" / "python"
    ask = "from importlib.metadata import version; print(version('flwr'))"
    if python.exists():
        got = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        if got.stdout.strip() == version:
            return
    print(f"installing flwr {version} into {VENV.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", f"flwr=={version}"])
    if done.returncode:
        raise SystemExit(f"pip could not install flwr {version}; choose another with --flwr")


def measure(
    rows: list[dict[str, object]], megabytes: int, clients: int, systems: list[str], rounds: int
) -> None:
    """The systems that lack in `rows`, one after the other, and the floor beside them."""
    have = {(r["system"], int(str(r["MB"])), int(str(r["clients"]))) for r in rows}
    wanted = [system for system in systems if (system, megabytes, clients) not in have]
    if not wanted:
        return
    floor_s = statistics.median(wire.raw_tcp(2 * megabytes * clients) for _ in range(3))
    for system in wanted:
        few = rounds if system == "flower-superlink" else max(rounds, 60 // megabytes)
        command = [sys.executable, "-m", "tools.peer", "--cell", system]
        command += [str(megabytes), str(clients), str(few)]
        with (
            tempfile.TemporaryDirectory() as folder,
            started(command, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": folder}) as cell,
        ):
            assert cell.stdout is not None
            said = cell.stdout.read().decode().splitlines()
        if not said:
            raise SystemExit(f"{system} {megabytes} MB x {clients}: its cell has failed, see above")
        figures = json.loads(said[-1])
        if "skipped" in figures:
            print(f"{system} {megabytes} MB x {clients}: skipped: {figures['skipped']}", flush=True)
            continue
        row = {"system": system, "MB": megabytes, "clients": clients, "rounds": few} | figures
        row["floor_s"] = round(floor_s, 4)
        row["over_floor"] = round(figures["round_s"] / floor_s, 1)
        rows.append(row)
        print_row(row, is_first=len(rows) == 1)


# -- one cell, in a process of its own --------------------------------------------------------


@dataclass
class Watch:
    """What was seen of a cell so far."""

    server: Tree
    clients: list[Tree] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    base_bytes: int = 0
    begun: float = 0.0
    first: tuple[float, float, int] = (0.0, 0.0, 0)  # after the warm-up, see totals()
    last: tuple[float, float, int] = (0.0, 0.0, 0)

    def look(self) -> None:
        children = children_of_all()
        for tree in (self.server, *self.clients):
            tree.look(children)

    def totals(self) -> tuple[float, float, int]:
        """CPU seconds of the server, of all clients; bytes on the loopback."""
        clients = sum(tree.cpu_s() for tree in self.clients)
        return self.server.cpu_s(), clients, loopback_bytes()

    def note(self, what: str, when: float) -> None:
        if what.startswith("failed:"):
            raise CellError(what.removeprefix("failed:"))
        if what == "base":
            self.look()
            self.base_bytes = self.server.rss_bytes
        elif what == "begin":
            self.begun = when
        elif what == "end":
            self.seconds.append(when - self.begun)
            self.look()
            self.last = self.totals()
            if len(self.seconds) == 1:
                self.first = self.last


@dataclass(frozen=True)
class Cell:
    """What a system has to move. rounds: with the one that warms up; folder: of its files."""

    system: str
    megabytes: int
    clients: int
    rounds: int
    folder: Path

    @property
    def marks(self) -> Path:
        """The pipe that its server writes to."""
        return self.folder / "marks"


def run_cell(system: str, megabytes: int, clients: int, rounds: int) -> dict[str, object]:
    models, rest = NEEDS[system]
    needed = (models * megabytes + rest) * clients * 10**6 + LEAST_FREE_BYTES
    if available_bytes() < needed:
        raise CellError(
            f"{available_bytes() / 1e9:.1f} GB are free, about {needed / 1e9:.0f} GB are needed"
        )
    keep_orphans()
    is_alone = enter_own_network()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        cell = Cell(system, megabytes, clients, rounds + 1, Path(name))
        os.mkfifo(cell.marks)
        marks = os.open(cell.marks, os.O_RDWR | os.O_NONBLOCK)
        pipe = stack.enter_context(os.fdopen(marks, "rb", 0))
        start = {"flower-grpc": start_grpc, "flower-superlink": start_superlink}
        watch = start.get(system, start_ours)(stack, cell)
        try:
            follow(watch, pipe, cell.rounds)
        except CellError:
            log = cell.folder / "log"
            if log.exists():  # what its programs said, for whoever looks for the cause
                print(log.read_text()[-4000:], file=sys.stderr)
            raise
    server_cpu, clients_cpu, lo_bytes = (
        (last - first) / rounds for first, last in zip(watch.first, watch.last, strict=True)
    )
    peaks = [tree.peak_bytes for tree in watch.clients]
    return {
        "round_s": round(statistics.median(watch.seconds[1:]), 4),
        "server_cpu_s": round(server_cpu, 4),
        "clients_cpu_s": round(clients_cpu, 4),
        "server_base_MB": round(watch.base_bytes / 1e6),
        "server_peak_MB": round(watch.server.peak_bytes / 1e6),
        "server_growth_MB": round((watch.server.peak_bytes - watch.base_bytes) / 1e6),
        "client_peak_MB": round(max(peaks) / 1e6),
        "clients_peak_MB": round(sum(peaks) / 1e6),
        "wire_MB": round(lo_bytes / 1e6, 1) if is_alone else "",
    }


def follow(watch: Watch, pipe: IO[bytes], rounds: int) -> None:
    """Read the marks and look at memory until the server is done."""
    text, give_up = b"", time.monotonic() + START_S
    while True:
        readable, _, _ = select.select([pipe], [], [], LOOK_S)
        if not readable:
            watch.look()
            if any(tree.is_over for tree in (watch.server, *watch.clients)):
                raise CellError("stopped: one of its processes has ended")
            if available_bytes() < LEAST_FREE_BYTES:
                raise CellError("stopped: less than 1 GB of memory was left")
            if time.monotonic() > give_up:
                raise CellError(f"stopped: {len(watch.seconds)} rounds, then nothing for long")
            continue
        *lines, text = (text + pipe.read(4096)).split(b"\n")
        for line in lines:
            what, when = line.decode().split()
            watch.note(what, float(when))
            give_up = time.monotonic() + ROUND_S
            if what == "done":
                assert len(watch.seconds) == rounds, watch.seconds
                return


def start_ours(stack: contextlib.ExitStack, cell: Cell) -> Watch:
    keys = "-"
    if cell.system == "curve":
        wire.make_client_list(cell.folder, cell.clients)
        keys = str(cell.folder)
    module = [sys.executable, "-m", "tools.peer", "--serve"]
    figures = [str(cell.megabytes), str(cell.clients), str(cell.rounds - 1)]
    server = stack.enter_context(
        started([*module, *figures, keys, str(cell.marks)], stdout=subprocess.PIPE)
    )
    assert server.stdout is not None
    endpoint = server.stdout.readline().decode().strip()
    client = [sys.executable, str(Path(wire.__file__)), "--client"]
    commands = [[*client, f"c{number}", endpoint, keys] for number in range(cell.clients)]
    trees = [Tree(stack.enter_context(started(command)).pid) for command in commands]
    return Watch(Tree(server.pid), trees)


def serve(megabytes: str, clients: str, rounds: str, keys: str, marks: str) -> int:
    """Our server's process; the client of it is that of tools/bench/wire.py."""

    def mark(what: str) -> None:
        with Path(marks).open("a") as file:
            file.write(f"{what} {time.monotonic()}\n")

    return wire.serve(int(megabytes), int(clients), int(rounds), keys, mark)


def start_grpc(stack: contextlib.ExitStack, cell: Cell) -> Watch:
    program = [str(VENV / "bin" / "python"), str(ROOT / "tools" / "peer" / "flower.py")]
    address = f"127.0.0.1:{free_ports(1)[0]}"
    environment = flower_environment(cell.folder)
    figures = [str(cell.megabytes), str(cell.clients), str(cell.rounds), str(cell.marks)]
    log = stack.enter_context((cell.folder / "log").open("wb"))
    server = stack.enter_context(
        started([*program, "server", address, *figures], env=environment, stderr=log, stdout=log)
    )
    wait_for_port(address)  # its client ends when nobody listens yet
    trees = []
    for number in range(cell.clients):
        command = [*program, "client", address, str(number)]
        one = stack.enter_context(started(command, env=environment, stderr=log, stdout=log))
        trees.append(Tree(one.pid))
    return Watch(Tree(server.pid), trees)


def start_superlink(stack: contextlib.ExitStack, cell: Cell) -> Watch:
    port, *ports = free_ports(cell.clients + 1)
    log = stack.enter_context((cell.folder / "log").open("wb"))
    environment = flower_environment(cell.folder)
    (cell.folder / "config.toml").write_text(
        f'[superlink.peer]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment["FLWR_HOME"] = str(cell.folder)
    command = ["flower-superlink", "--insecure", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    server = stack.enter_context(started(command, env=environment, stderr=log, stdout=log))
    trees = []
    for number, own_port in enumerate(ports):
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        command += ["--port", str(own_port), "--node-config", f"number={number}"]
        one = stack.enter_context(started(command, env=environment, stderr=log, stdout=log))
        trees.append(Tree(one.pid))
    app = shutil.copytree(APP, cell.folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    config = f"megabytes={cell.megabytes} clients={cell.clients} rounds={cell.rounds}"
    config += f" marks='{cell.marks}'"
    submit(["flwr", "run", str(app), "peer", "--run-config", config], environment)
    return Watch(Tree(server.pid), trees)


def wait_for_port(address: str) -> None:
    host, _, port = address.partition(":")
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.1)
    raise CellError(f"nothing listens on {address}")


def submit(command: list[str], environment: dict[str, str]) -> None:
    """`flwr run`, again while the SuperLink is still starting."""
    give_up = time.monotonic() + START_S
    while True:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            executable=shutil.which(command[0], path=environment["PATH"]),
        )
        if done.returncode == 0:
            return
        if time.monotonic() > give_up:
            raise CellError(f"flwr run failed: {(done.stdout + done.stderr)[-1000:]}")
        time.sleep(2)


def flower_environment(folder: Path) -> dict[str, str]:
    """Its programs call each other by name; nothing is to be told or asked outside."""
    return os.environ | {
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HOME": str(folder),
    }


if __name__ == "__main__":
    sys.exit(main())
