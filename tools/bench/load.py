"""What a client costs the coordinator: memory, CPU and seconds per round for 10 to 1,000 of them.

    python -m tools.bench.load [--clients 10,100,1000] [--megabytes 5] [--rounds 5] [--csv FILE]

`edge-coordinator serve` itself, with fedavg-l on an mlp of the size asked for and a run folder on
disk, is looked at from outside: /proc for memory and CPU time, the run's database for seconds per
round. Its clients are sockets of their own with CURVE keys of their own in a few processes that
train nothing (tools/light_client.py), so a round is transfers, checks, aggregation and commit.
With --slow N, as many clients take --part-s seconds for each part of their updates in even rounds;
`fast_s` is when the last of the others had its update accepted, in odd and in even rounds.

Everything runs on the machine at hand, so seconds per round hold the clients' own CPU time too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import zmq

from edge_sdk.protocol.keys import KeyPair, make_keys
from tools.bench.light_fleet import write_clients
from tools.tables import made_by, print_row, write_csv

INPUTS, CLASSES = 1000, 10
SAMPLE_S = 0.1
PATIENCE_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
SERVER_PHASES = """SELECT phase, SUM(COALESCE(cpu_s, wall_s)) FROM phases
    WHERE round = ? AND client_id IS NULL GROUP BY phase"""
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--clients", default="10,100,1000")
    add("--megabytes", type=float, default=5.0)
    add("--rounds", type=int, default=5)
    add("--link", choices=("curve", "plain"), default="curve")
    add("--processes", type=int, default=2, help="that hold the clients")
    add("--slow", type=int, default=0, help="so many clients are slow in even rounds")
    add("--part-s", type=float, default=2.0, help="that a slow client takes for a part")
    add("--folder", type=Path, help="where the runs live meanwhile, default a temporary folder")
    add("--csv", type=Path)
    add("--keep-log", type=Path, help="write the coordinators' logs into this folder")
    add("serve_flags", nargs="*", help="after --: more flags for edge-coordinator serve")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process behind
    rows = []
    for clients in map(int, args.clients.split(",")):
        rows.append(measure(args, clients))
        print_row(rows[-1], is_first=len(rows) == 1)
    if args.csv:
        flags = " ".join(argv or sys.argv[1:]).partition(" --csv")[0]
        write_csv(args.csv, rows, made_by(f"python -m tools.bench.load {flags}", "shared"))
    return 0


def measure(args: argparse.Namespace, clients: int) -> Row:
    """One line of the table: a fresh coordinator and fresh clients."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        needed, free = clients * args.megabytes * 1e6, shutil.disk_usage(folder).free
        if free < 1.5 * needed:
            raise SystemExit(f"{folder} has {free:.0f} bytes free, {1.5 * needed:.0f} are needed")
        server_key = make_client_list(folder, clients) if args.link == "curve" else None
        with coordinator(args, folder, clients) as server:
            endpoint = wait_for_endpoint(folder / "run" / "endpoint", server)
            watch = Watch(server.pid)
            told = run_fleets(args, folder, endpoint, clients, server_key)
            if server.wait(PATIENCE_S):
                raise SystemExit(f"the coordinator ended with {server.returncode}")
            watch.thread.join()
        rounds = read_rounds(folder / "run")
    return summary(args, clients, watch, rounds, told)


def make_client_list(folder: Path, clients: int) -> bytes:
    """The coordinator's keys and list, the clients' keys in one file; the server's public key."""
    server = make_keys(folder, "server")
    pairs = [(f"c{number}", KeyPair(*zmq.curve_keypair())) for number in range(clients)]
    write_clients(folder / "pairs", pairs)
    (folder / "clients").write_text("".join(f"{n} {p.public.decode()}\n" for n, p in pairs))
    return server.public


@contextlib.contextmanager
def coordinator(
    args: argparse.Namespace, folder: Path, clients: int
) -> Iterator[subprocess.Popen[bytes]]:
    width = model_width(args.megabytes)
    link = ["--insecure"] if args.link == "plain" else ["--keys", str(folder)]
    command = [sys.executable, "-m", "coordinator.cli", "serve", "--method", "fedavg-l", *link]
    command += ["--server-momentum", "0", "--server-lr", "1"]  # so that the mean can be foretold
    command += ["--model", "mlp", "--exits", "2", "--option", f"widths={width},{width}"]
    command += ["--input", str(INPUTS), "--classes", str(CLASSES), "--device", "cpu"]
    command += ["--rounds", str(args.rounds), "--min-clients", str(clients), "--quorum", "1"]
    command += ["--listen", "tcp://127.0.0.1:*", "--run-dir", str(folder / "run")]
    command += args.serve_flags
    log = folder / "coordinator.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield server
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        if server.returncode:
            sys.stderr.write(log.read_text()[-2000:])
        if args.keep_log:
            args.keep_log.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, args.keep_log / f"load-{clients}.log")


def model_width(megabytes: float) -> int:
    """Of both stages, so that inputs x width + width^2 + two exits' weights are 4-byte floats."""
    linear = INPUTS + 2 * CLASSES
    return round((math.sqrt(linear**2 + 4 * megabytes * 1e6 / 4) - linear) / 2)


def wait_for_endpoint(path: Path, server: subprocess.Popen[bytes]) -> str:
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up and server.poll() is None:
        if path.exists() and (endpoint := path.read_text().strip()):
            return endpoint
        time.sleep(0.05)
    raise SystemExit("the coordinator does not listen")


def run_fleets(
    args: argparse.Namespace, folder: Path, endpoint: str, clients: int, key: bytes | None
) -> list[Row]:
    """The clients, spread over processes, until each was told that the run is over."""
    number = min(args.processes, clients)
    starts = [clients * index // number for index in range(number + 1)]
    flags = ["--clients", str(folder / "pairs"), f"--server-key={key.decode()}"] if key else []
    fleets = []
    for index in range(number):
        count = starts[index + 1] - starts[index]
        command = [sys.executable, "-m", "tools.bench.light_fleet", endpoint, *flags]
        command += ["--input", str(INPUTS), "--classes", str(CLASSES), "--part-s", str(args.part_s)]
        command += ["--from", str(starts[index]), "--count", str(count)]
        command += ["--slow", str(args.slow if index == 0 else 0)]
        fleets.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        return [json.loads(fleet.communicate()[0]) for fleet in fleets]
    finally:
        for fleet in fleets:
            fleet.kill()
            fleet.wait()


@dataclass(frozen=True)
class Sample:
    """Of the coordinator's process at one moment. Bytes of memory, seconds of CPU."""

    utc_s: float
    cpu_s: float
    main_cpu_s: float  # of the thread that runs Python; ZeroMQ's have the rest
    resident: int
    anonymous: int  # without mapped files
    peak: int


class Watch:
    """Samples a process until it is gone."""

    def __init__(self, pid: int) -> None:
        self.samples = [sample(pid)]
        self.thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self.thread.start()

    def _run(self, pid: int) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):
            while True:
                time.sleep(SAMPLE_S)
                self.samples.append(sample(pid))

    def cpu_at(self, utc_s: float, field: str = "cpu_s") -> float:
        """CPU seconds used until then, interpolated."""
        before = self.samples[0]
        for after in self.samples[1:]:
            if after.utc_s >= utc_s:
                share = (utc_s - before.utc_s) / (after.utc_s - before.utc_s)
                low, high = getattr(before, field), getattr(after, field)
                return float(low + max(0.0, share) * (high - low))
            before = after
        return float(getattr(before, field))


def sample(pid: int) -> Sample:
    """Raises KeyError for a process that has ended and is not waited for."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in status if line.endswith(" kB")}
    return Sample(
        utc_s=time.time(),
        cpu_s=cpu_seconds(Path(f"/proc/{pid}/stat")),
        main_cpu_s=cpu_seconds(Path(f"/proc/{pid}/task/{pid}/stat")),
        resident=int(kilobytes["VmRSS"]) * 1024,
        anonymous=int(kilobytes["RssAnon"]) * 1024,
        peak=int(kilobytes["VmHWM"]) * 1024,
    )


def cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def read_rounds(run_dir: Path) -> list[Row]:
    with contextlib.closing(sqlite3.connect(run_dir / "run.sqlite")) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM rounds ORDER BY round")]
        for row in rows:
            row["phases"] = dict(db.execute(SERVER_PHASES, (row["round"],)))
    return rows


def summary(
    args: argparse.Namespace, clients: int, watch: Watch, rounds: list[Row], told: list[Row]
) -> Row:
    """Medians over all rounds but the first. Raises SystemExit unless every client's update of
    every round counted once and came back in the next round's model."""
    devices = [client for fleet in told for client in fleet["clients"]]
    check_counts(devices, clients, args.rounds, rounds)
    cpu: dict[str, list[float]] = {"cpu_s": [], "main_cpu_s": []}
    for row in rounds:
        begin = datetime.fromisoformat(row["started_utc"]).timestamp()
        for field, found in cpu.items():
            used = watch.cpu_at(begin + row["wall_s"], field) - watch.cpu_at(begin, field)
            found.append(used / row["returned"])
    later = slice(1 if len(rounds) > 1 else 0, None)
    base, peak = watch.samples[0].resident, watch.samples[-1].peak
    begin = datetime.fromisoformat(rounds[0]["started_utc"]).timestamp()
    row = {
        "clients": clients,
        "MB": args.megabytes,
        "link": args.link,
        "rounds": len(rounds),
        "assemble_s": begin - watch.samples[0].utc_s,
        "assemble_cpu_s": watch.cpu_at(begin) - watch.samples[0].cpu_s,
        "round_s": statistics.median(r["wall_s"] for r in rounds[later]),
        "cpu_ms_per_update": 1000 * statistics.median(cpu["cpu_s"][later]),
        "python_ms_per_update": 1000 * statistics.median(cpu["main_cpu_s"][later]),
        "clients_ms_per_update": 1000
        * sum(fleet["cpu_s"] for fleet in told)
        / (clients * len(rounds)),
        "base_MB": base / 1e6,
        "peak_MB": peak / 1e6,
        "anonymous_MB": max(s.anonymous for s in watch.samples) / 1e6,
        "peak_MB_per_client": (peak - base) / 1e6 / clients,
    }
    if args.slow:
        row |= {"fast_s": fast_s(devices, 1), "fast_s_with_slow": fast_s(devices, 0)}
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


def check_counts(devices: list[Row], clients: int, rounds: int, done: list[Row]) -> None:
    counts: Counter[str] = Counter()
    for device in devices:
        counts.update(device["counts"])
    print(f"  {clients} clients: {dict(sorted(counts.items()))}", file=sys.stderr)
    for row in done:
        phases = {name: round(seconds, 2) for name, seconds in row["phases"].items()}
        print(f"  round {row['round']}: {row['wall_s']:.1f} s {phases}", file=sys.stderr)
    want = clients * rounds
    got = {
        "returned": sum(row["returned"] for row in done),
        "accepted": counts["accepted"],
        "models compared": counts["models compared"] + clients,
        "models right": want - counts["models wrong"],
    }
    if wrong := {name: number for name, number in got.items() if number != want}:
        raise SystemExit(f"{clients} clients x {rounds} rounds: got {wrong}, expected {want} each")


def fast_s(devices: list[Row], remainder: int) -> float:
    """Median over odd (1) or even (0) rounds, without the first: seconds from the first job to the
    last update of a client that is never slow."""
    found = []
    rounds = {int(number) for device in devices for number in device["given_at"]} - {1}
    for number in rounds:
        if number % 2 == remainder:
            key = str(number)
            last = max(d["accepted_at"][key] for d in devices if not d["is_slow"])
            found.append(last - min(d["given_at"][key] for d in devices))
    return statistics.median(found) if found else math.nan


if __name__ == "__main__":
    sys.exit(main())
