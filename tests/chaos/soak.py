"""One long run under random faults, then its books.

    python -m tests.chaos.soak --faults 200 --seed 1 --csv docs/results/soak.csv

Three devices train small rounds over bad links while faults are drawn from the seed: what, to whom,
for how long. They overlap, but for each target. At the end everything is mended, two rounds more
are waited for, and every update of the run is accounted for (ledger.py), every round done again.
Needs root and network namespaces.
"""

from __future__ import annotations

import argparse
import heapq
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tests.chaos.bed import FAULT_PATIENCE_S, Bed, bed_of
from tests.chaos.faults import DEVICES, KINDS, SERVER, Fault, Undo, drawn
from tests.chaos.ledger import TOLERANCE, Ledger, read_ledger, replayed
from tests.chaos.net import CONGESTION, what_is_missing
from tools.tables import kernel, made_by, write_csv

# A round closes without those who are late by ten seconds: their updates count in a later one.
FLAGS = ("--epochs", "2", "--quorum", "0.5", "--grace", "10")
LOOK_S = 0.1


class Soak:
    """Does the faults to a bed, each when it is due and its target is free. report: for a person,
    a line for each."""

    def __init__(self, bed: Bed, report: Callable[[str], None]) -> None:
        self._bed = bed
        self._report = report
        self._busy: set[str] = set()
        self._ends: list[tuple[float, int, Undo, Fault]] = []
        self._over: list[Fault] = []  # no round was committed since

    def run(self, faults: Sequence[Fault]) -> None:
        due = time.monotonic()
        for number, fault in enumerate(faults, 1):
            due = max(due + fault.pause_s, time.monotonic())
            while time.monotonic() < due or fault.holds & self._busy:
                self._look()
            self._begin(number, fault)
        while self._ends:
            self._look()
        self._bed.revive()
        goal, give_up = self._bed.last_round() + 2, time.monotonic() + FAULT_PATIENCE_S
        while self._bed.last_round() < goal and time.monotonic() < give_up:
            self._look()
        if self._bed.last_round() < goal:
            self._blame("no rounds after the last fault")

    def _begin(self, number: int, fault: Fault) -> None:
        fault.began, fault.round = time.monotonic(), self._bed.last_round()
        undo = KINDS[fault.kind].do(self._bed, fault)
        self._busy |= fault.holds
        heapq.heappush(self._ends, (fault.began + fault.lasts_s, number, undo, fault))
        self._report(
            f"fault {number}: {fault.kind}, {fault.target}, {fault.lasts_s:.0f} s; "
            f"round {fault.round}"
        )

    def _look(self) -> None:
        """End what is due, note rounds, start again who died by itself, wait a little."""
        while self._ends and self._ends[0][0] <= time.monotonic():
            _, _, undo, fault = heapq.heappop(self._ends)
            undo()
            self._busy -= fault.holds
            fault.round = self._bed.last_round()
            self._over.append(fault)
        last = self._bed.last_round()
        for fault in [fault for fault in self._over if last > fault.round]:
            fault.next_round_s = time.monotonic() - fault.began
            self._over.remove(fault)
        self._look_after_the_dead()
        time.sleep(LOOK_S)

    def _look_after_the_dead(self) -> None:
        """A process that ended without being killed is a finding."""
        bed = self._bed
        assert bed.server is not None
        for name in bed.links:
            if name not in self._busy and not bed.agents[name].is_alive:
                self._blame(f"agent {name} ended by itself: {bed.agents[name].text()[-200:]}")
                bed.device(name)
        if SERVER not in self._busy and not bed.server.is_alive:
            self._blame(f"the coordinator ended by itself: {bed.server.text()[-200:]}")
            bed.serve_until_listening()

    def _blame(self, trouble: str) -> None:
        """The fault that began last."""
        known = [fault for _, _, _, fault in self._ends] + self._over
        self._report(f"TROUBLE {trouble}")
        if known:
            max(known, key=lambda fault: fault.began).trouble.append(trouble)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many random faults in one run, and its books.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=5.0, help="mean seconds between faults")
    parser.add_argument("--congestion", choices=CONGESTION, default=CONGESTION[0])
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--folder", type=Path, help="keep logs and checkpoints here")
    args = parser.parse_args(argv)
    if missing := what_is_missing():
        print(f"soak: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return run(args, folder)


def run(args: argparse.Namespace, folder: Path) -> int:
    torch.set_num_threads(1)
    begin = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True)

    faults = drawn(args.faults, args.seed, args.pause)
    options = {"congestion": args.congestion, "spare": 1}
    with bed_of(folder, len(DEVICES), *FLAGS, **options) as bed:
        bed.start_all()
        bed.wait_round(1)
        soak = Soak(bed, report)
        soak.run(faults)
        bed.stop()
        lasted_s = time.monotonic() - begin
        ledger = read_ledger(bed)
        report(f"all is over: {ledger}")
        differences = replayed(bed, range(1, ledger.last_round + 1))
        ((late,),) = bed.rows("SELECT COUNT(*) FROM participations WHERE staleness > 0")
    rows = table(faults)
    rows.append(whole(faults, ledger, differences, late, lasted_s))
    if args.csv:
        command = f"python -m tests.chaos.soak --faults {args.faults} --seed {args.seed}"
        write_csv(args.csv, rows, made_by(f"{command} --congestion {args.congestion}", kernel()))
    for row in rows:
        print(*row.values(), sep=" | ")
    wrong = {round: value for round, value in differences.items() if value >= TOLERANCE}
    if wrong:
        print(f"rounds that differ from what the books say: {wrong}")
    return int(bool(ledger.problems or wrong or any(fault.trouble for fault in faults)))


def table(faults: Sequence[Fault]) -> list[dict[str, object]]:
    """A line for each kind of fault."""
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        ours = [fault for fault in faults if fault.kind == kind]
        after = [fault.next_round_s for fault in ours if fault.next_round_s is not None]
        trouble = "; ".join(line for fault in ours for line in fault.trouble)
        rows.append(
            {
                "fault": kind,
                "times": len(ours),
                "outcome": trouble or f"after {len(after)} of them the next round was committed",
                "longest_s": f"{max(after):.0f}" if after else "",
            }
        )
    return rows


def whole(
    faults: Sequence[Fault],
    ledger: Ledger,
    differences: Mapping[int, float],
    late: int,
    lasted_s: float,
) -> dict[str, object]:
    """The line for all of them: the books, and the model."""
    books = "; ".join(ledger.problems) or "nothing lost, nothing counted twice"
    outcome = (
        f"{ledger}; {late} counted in a later round; {books}; model of {len(differences)} rounds "
        f"within {max(differences.values()):.1e}"
    )
    return {
        "fault": "all",
        "times": len(faults),
        "outcome": outcome,
        "longest_s": f"{lasted_s:.0f}",
    }


if __name__ == "__main__":
    sys.exit(main())
