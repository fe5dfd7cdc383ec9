"""What one peer costs everybody else: rounds per second under each attack and without it.

    python -m tools.attacks [--only NAME,...] [--seconds 10] [--csv build/attacks.csv]

For each attack a real `edge-coordinator serve` with three honest devices that train nothing
(tools/light_client.py). Rounds are counted for as long without the attack and then under it, so
both figures are of one run; attacker, devices and coordinator share the machine. The attacks are in
peers.py. harmful only measures: what it does is in the last column.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import zmq

from coordinator.admission.invitations import Invitation, write_invitation
from edge_sdk.protocol.keys import KeyPair, make_keys
from tools.attacks.peers import ATTACKS
from tools.bench.light_fleet import write_clients
from tools.bench.load import CLASSES, INPUTS, Sample, model_width, sample
from tools.tables import made_by, print_row, write_csv

HONEST = 3
MEGABYTES = 2.0
START_S, SETTLE_S = 60.0, 2.0
FILES = 256  # that the coordinator may open, where that is attacked
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", default=",".join(ATTACKS), help=f"of {', '.join(ATTACKS)}")
    add("--seconds", type=float, default=10.0, help="without the attack, and under it")
    add("--label", default="", help="a column that says of what this is a table")
    add("--csv", type=Path, default=Path("build/attacks.csv"))
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in ATTACKS]:
        parser.error(f"--only {unknown[0]!r} is none of {', '.join(ATTACKS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    for name in names:
        label = {"of": args.label} if args.label else {}
        rows.append(label | measure(name, args.seconds))
        print_row(rows[-1], is_first=len(rows) == 1)
    command = f"python -m tools.attacks --seconds {args.seconds:g}"
    write_csv(args.csv, rows, made_by(command, "shared"))
    return 0


def measure(name: str, seconds: float) -> Row:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        server = start_coordinator(folder, name)
        stack.callback(end, server)
        wait_for(folder / "run" / "endpoint", server)
        fleet = start(
            *("-m", "tools.bench.light_fleet", (folder / "run" / "endpoint").read_text().strip()),
            *("--clients", str(folder / "pairs"), "--count", str(HONEST)),
            *("--server-key", (folder / "server.public").read_text().split()[-1]),
            *("--input", str(INPUTS), "--classes", str(CLASSES)),
        )
        stack.callback(end, fleet)
        give_up = time.monotonic() + START_S
        while num_rounds(folder) < 2:
            if time.monotonic() > give_up or server.poll() is not None:
                raise SystemExit(f"no round: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        calm = observe(folder, server.pid, seconds)
        bad = start("-m", "tools.attacks.peers", name, str(folder), str(seconds + SETTLE_S))
        stack.callback(end, bad)
        time.sleep(SETTLE_S)  # it starts, and has its place
        under = observe(folder, server.pid, seconds)
        told = json.loads(bad.communicate(timeout=60)[0] or "{}")
        after = observe(folder, server.pid, min(5.0, seconds))
        if server.poll() is not None:
            last = (folder / "log").read_text().strip().splitlines()[-1]
            told["told"] = f"the coordinator ended with {server.returncode}: {last[:200]}"
    return {
        "attack": name,
        "rounds_per_s_without": calm["rounds_per_s"],
        "rounds_per_s": under["rounds_per_s"],
        "ratio": round(under["rounds_per_s"] / max(calm["rounds_per_s"], 1e-9), 2),
        "longest_s": under["longest_s"],
        "peak_MB": max(under["peak_MB"], after["peak_MB"]),
        "cpu": under["cpu"],
        "log_kB_per_s": under["log_kB_per_s"],
        "ratio_after": round(after["rounds_per_s"] / max(calm["rounds_per_s"], 1e-9), 2),
        "sent": told.get("sent", ""),
        "told": told.get("told", ""),
    }


def observe(folder: Path, pid: int, seconds: float) -> Row:
    """What happens meanwhile. cpu: the coordinator's seconds for each of the clock. longest_s:
    without a round."""
    begin, log_bytes = num_rounds(folder), (folder / "log").stat().st_size
    before, started = look(pid), time.monotonic()
    last, longest, count = started, 0.0, begin
    while (now := time.monotonic()) < started + seconds:
        time.sleep(0.02)
        if (found := num_rounds(folder)) != count:
            longest, last, count = max(longest, now - last), now, found
    longest = max(longest, time.monotonic() - last)
    after, passed = look(pid), time.monotonic() - started
    return {
        "rounds_per_s": round((count - begin) / passed, 2),
        "longest_s": round(longest, 2),
        "peak_MB": round(after.peak / 1e6),
        "cpu": round(max(0.0, after.cpu_s - before.cpu_s) / passed, 2),
        "log_kB_per_s": round(((folder / "log").stat().st_size - log_bytes) / passed / 1e3, 1),
    }


def look(pid: int) -> Sample:
    """Zeros of a process that has ended."""
    try:
        return sample(pid)
    except (KeyError, FileNotFoundError):
        return Sample(time.time(), 0.0, 0.0, 0, 0, 0)


def start_coordinator(folder: Path, attack: str) -> subprocess.Popen[bytes]:
    """With keys for the honest, an admitted device `bad` and an invitation that was used."""
    make_keys(folder, "server")
    pairs = [(f"c{number}", KeyPair(*zmq.curve_keypair())) for number in range(HONEST)]
    others = [(name, KeyPair(*zmq.curve_keypair())) for name in ("bad", "invited")]
    write_clients(folder / "pairs", pairs)
    write_clients(folder / "others", others)
    admitted = [*pairs, others[0]]
    (folder / "clients").write_text("".join(f"{n} {p.public.decode()}\n" for n, p in admitted))
    key = pairs[0][1].public.decode()
    used = Invitation(
        public_key=others[1][1].public.decode(),
        expires=time.time() + 3600,
        client="c0",
        client_key=key,
        is_done=True,
    )
    write_invitation(folder / "invitations", used)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    (folder / "metrics").write_text(str(port))
    width = model_width(MEGABYTES)
    flags = ["--metrics", f"127.0.0.1:{port}"] if attack == "metrics" else []
    command = ["-m", "coordinator.cli", "serve", "--method", "fedavg-l", "--keys", str(folder)]
    command += ["--model", "mlp", "--exits", "2", "--option", f"widths={width},{width}"]
    command += ["--input", str(INPUTS), "--classes", str(CLASSES), "--device", "cpu"]
    command += ["--rounds", "100000", "--min-clients", str(HONEST), "--quorum", "0.5"]
    command += ["--deadline", "2", "--grace", "1", *flags]
    command += ["--listen", "tcp://127.0.0.1:*", "--run-dir", str(folder / "run")]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=limit_files if attack == "descriptors" else None,
        )


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while not path.exists() or not path.read_text().strip():
        if time.monotonic() > give_up or server.poll() is not None:
            raise SystemExit(f"it does not listen: {(path.parents[1] / 'log').read_text()[-2000:]}")
        time.sleep(0.05)


def num_rounds(folder: Path) -> int:
    path = folder / "run" / "run.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as db:
            return int(db.execute("SELECT COUNT(*) FROM rounds").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
