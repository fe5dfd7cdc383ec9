"""One long run under random faults, then its books.

    python -m tests.chaos.soak --faults 200 --seed 1 --csv tools/results/soak.csv

Three devices train small rounds over bad links while faults are drawn from the seed: what, to whom,
for how long. They overlap, but for one device at a time. At the end everything is mended, two
rounds more are waited for, and every update of the run is accounted for (ledger.py), every round
done again. Needs root and network namespaces.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from tests.chaos.bed import FAULT_PATIENCE_S, LARGE, Bed, bed_of
from tests.chaos.ledger import TOLERANCE, Ledger, read_ledger, replayed
from tests.chaos.net import CONGESTION, what_is_missing
from tests.chaos.table import write_table

NUM_DEVICES = 3
SPARE = NUM_DEVICES + 1  # the link of an impostor
FLAGS = ("--epochs", "2", "--quorum", "0.5", "--grace", "10")
SERVER = "coordinator"
# Kinds of fault, how often, and how many seconds each lasts, from and to.
KINDS: dict[str, tuple[int, float, float]] = {
    "cut": (5, 1, 15),
    "long cut": (1, 25, 30),
    "cut one way": (3, 1, 15),
    "loss 30 %": (2, 3, 15),
    "1 Mbit/s": (2, 3, 15),
    "new address": (3, 0, 0),
    "kill agent": (4, 0, 5),
    "kill trainer": (2, 0, 0),
    "trainer crashes": (2, 0, 0),
    "kill coordinator": (3, 0, 5),
    "duplicate": (2, 8, 15),
    "agent stands still": (2, 1, 15),
    "trainer stands still": (2, 1, 15),
    "coordinator stands still": (2, 1, 15),
}


@dataclass
class Fault:
    """begins: seconds after the one before began. Of the coordinator, or of a device. The rest is
    what came of it: when it began and ended, the rounds committed then and when the next one was.
    """

    kind: str
    target: str
    lasts_s: float
    begins_s: float
    way: str
    began: float = 0.0
    over: float = 0.0
    round: int = 0
    next_round_s: float = -1.0
    trouble: list[str] = field(default_factory=list)


def drawn(num_faults: int, seed: int, pause_s: float) -> list[Fault]:
    """Everything about the faults but what becomes of them."""
    generator = random.Random(seed)
    weights = [weight for weight, _, _ in KINDS.values()]
    faults = []
    for kind in generator.choices(list(KINDS), weights, k=num_faults):
        _, least, most = KINDS[kind]
        device = generator.choice("abc"[:NUM_DEVICES])
        faults.append(
            Fault(
                kind=kind,
                target=SERVER if SERVER in kind else device,
                lasts_s=generator.uniform(least, most),
                begins_s=generator.expovariate(1 / pause_s),
                way=generator.choice(("up", "down")),
            )
        )
    return faults


class Soak:
    """Does the faults to a bed. Nothing is done to a target while something else is."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self._busy: set[str] = set()
        self._ends: list[tuple[float, int, Callable[[], None], Fault]] = []
        self._watched: list[Fault] = []  # over, no round committed since

    def run(self, faults: Sequence[Fault], report: Callable[[str], None]) -> None:
        due = time.monotonic()
        for number, fault in enumerate(faults, 1):
            due = max(due + fault.begins_s, time.monotonic())
            self._wait(lambda due=due, fault=fault: time.monotonic() >= due and self._free(fault))
            fault.began, fault.round = time.monotonic(), self.bed.last_round()
            end = self._begin(fault)
            self._busy |= self._holds(fault)
            heapq.heappush(self._ends, (fault.began + fault.lasts_s, number, end, fault))
            what = f"{fault.kind} of {fault.target}, {fault.lasts_s:.0f} s"
            report(f"fault {number}: {what}; round {fault.round}")
        self._wait(lambda: not self._ends)
        self.bed.revive()
        goal = self.bed.last_round() + 2
        give_up = time.monotonic() + FAULT_PATIENCE_S
        self._wait(lambda: self.bed.last_round() >= goal or time.monotonic() > give_up)

    def _free(self, fault: Fault) -> bool:
        return not (self._holds(fault) & self._busy)

    def _holds(self, fault: Fault) -> set[str]:
        """The spare link has one impostor at a time."""
        return {fault.target, "spare"} if fault.kind == "duplicate" else {fault.target}

    def _wait(self, condition: Callable[[], bool]) -> None:
        """End what is due, see who died by itself, note rounds, until the condition holds."""
        while not condition():
            now = time.monotonic()
            while self._ends and self._ends[0][0] <= now:
                _, _, end, fault = heapq.heappop(self._ends)
                end()
                fault.over = time.monotonic()
                self._busy -= self._holds(fault)
                self._watched.append(fault)
            last = self.bed.last_round()
            for fault in [fault for fault in self._watched if last > fault.round]:
                fault.next_round_s = time.monotonic() - fault.began
                self._watched.remove(fault)
            self._look_after_the_dead()
            time.sleep(0.1)

    def _look_after_the_dead(self) -> None:
        """A process that ended without being killed is a finding; it is started again."""
        bed = self.bed
        for name in self.bed.links:
            if name not in self._busy and not bed.agents[name].is_alive:
                self._blame(f"agent {name} ended by itself")
                bed.device(name)
        if SERVER not in self._busy and not bed.server.is_alive:
            self._blame("the coordinator ended by itself: " + bed.server.text()[-200:])
            bed.serve_until_listening()

    def _blame(self, trouble: str) -> None:
        latest = max((fault for _, _, _, fault in self._ends), key=lambda f: f.began, default=None)
        for fault in [latest] if latest else self._watched[-1:]:
            fault.trouble.append(trouble)
        print("TROUBLE", trouble, file=sys.stderr)

    # -- the faults ------------------------------------------------------------------------------

    def _begin(self, fault: Fault) -> Callable[[], None]:
        """Do it; what ends it."""
        bed, name = self.bed, fault.target
        link, net = bed.links.get(name, 0), bed.net
        agent = bed.agents.get(name)
        if fault.kind in ("cut", "long cut"):
            net.cut(link)
            return lambda: net.mend(link)
        if fault.kind == "cut one way":
            net.ask(link, way=fault.way, is_cut=True)
            return lambda: net.mend(link)
        if fault.kind in ("loss 30 %", "1 Mbit/s"):
            key, value = ("loss", 0.3) if fault.kind == "loss 30 %" else ("rate_bit_s", 1e6)
            before = net.ask()[str(link)]["up"][key]
            net.ask(link, **{key: value})
            return lambda: net.ask(link, **{key: before}) and None
        if fault.kind == "new address":
            net.hosts[link].move()
            return lambda: None
        if fault.kind == "duplicate":
            second = bed.second_device(name, SPARE)
            return lambda: end_second(fault, second)
        assert agent or name == SERVER
        if fault.kind == "kill agent":
            bed.kill_agent(name)
            return lambda: bed.device(name) and None
        if fault.kind == "kill coordinator":
            bed.kill_server()
            return lambda: bed.serve_until_listening() and None
        if fault.kind in ("kill trainer", "trainer crashes"):  # signal 9 counts as lack of memory
            number = signal.SIGKILL if fault.kind == "kill trainer" else signal.SIGSEGV
            each(trainers(agent.process.pid), number)
            return lambda: None
        running = bed.server if name == SERVER else agent
        process = psutil.Process(running.process.pid)
        stopped = trainers(process.pid) if "trainer" in fault.kind else [process]
        each(stopped, signal.SIGSTOP)
        return lambda: each(stopped, signal.SIGCONT)


def end_second(fault: Fault, second: object) -> None:
    """Whether the impostor went away by itself does not matter; its first words do."""
    second.process.kill()
    second.process.wait()


def trainers(pid: int) -> list[psutil.Process]:
    """Of an agent; none while it is starting one."""
    return psutil.Process(pid).children()


def each(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many random faults in one run, and its books.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=6.0, help="mean seconds between faults")
    parser.add_argument("--congestion", choices=CONGESTION, default=CONGESTION[0])
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--folder", type=Path, help="keep logs and checkpoints here")
    args = parser.parse_args(argv)
    if missing := what_is_missing():
        print(f"soak: {missing}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    faults = drawn(args.faults, args.seed, args.pause)
    begin = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with bed_of(
            folder, NUM_DEVICES, *FLAGS, congestion=args.congestion, spare=1, model=LARGE
        ) as bed:
            bed.start_all()
            bed.wait_round(1)
            Soak(bed).run(faults, report)
            bed.stop()
            lasted = time.monotonic() - begin
            ledger = read_ledger(bed)
            differences = replayed(bed, range(1, ledger.last_round + 1))
            stale = bed.rows("SELECT COUNT(*) FROM participations WHERE staleness > 0")[0][0]
    command = f"python -m tests.chaos.soak --faults {args.faults} --seed {args.seed}"
    rows = table(faults, ledger, differences, stale, lasted)
    if args.csv:
        write_table(args.csv, rows, command)
    csv.DictWriter(sys.stdout, list(rows[0])).writerows(rows)
    for line in ledger.problems:
        print("PROBLEM", line)
    wrong = {round: value for round, value in differences.items() if value >= TOLERANCE}
    print(f"{len(wrong)} rounds differ from what the books say: {wrong}")
    return int(bool(ledger.problems or wrong or any(fault.trouble for fault in faults)))


def table(
    faults: Sequence[Fault], ledger: Ledger, differences: dict[int, float], stale: int,
    lasted_s: float,
) -> list[dict[str, object]]:  # fmt: skip
    """A line for each kind of fault, one for the whole."""
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        ours = [fault for fault in faults if fault.kind == kind]
        after = [fault.next_round_s for fault in ours if fault.next_round_s >= 0]
        trouble = [line for fault in ours for line in fault.trouble]
        outcome = "; ".join(trouble) or f"{len(after)} followed by a committed round"
        longest = f"{max(after):.0f}" if after else ""
        rows.append(
            {"fault": kind, "times": len(ours), "outcome": outcome, "longest until it, s": longest}
        )
    lost = "; ".join(ledger.problems) or "nothing lost, nothing counted twice"
    outcome = (
        f"{ledger}; {stale} counted late; {lost}; model of {len(differences)} rounds within "
        f"{max(differences.values()):.1e}"
    )
    rows.append(
        {"fault": "all", "times": len(faults), "outcome": outcome,
         "longest until it, s": f"{lasted_s:.0f} in all"}
    )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
