"""Is the choice of depth right under a real memory limit? Needs root and cgroup version 1.

    python -m tools.bench.choice --csv docs/results/choice.csv

For every model, batch size and limit a device without a link (the agent's chooser and its trainer
process) lives in a memory group of that limit. It chooses, and trains what it chose: the prefix and
every deeper stage it offers. Brute force, the same device told what to train, finds by bisection
the least of the limits under which a segment trains with the levers that need least. Libraries are
a private copy: the group pays for their pages as a board would.

A job trains if it ends within --patience seconds: under a limit that is a little too small the
kernel drops and reads library pages again and again instead of killing anybody.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from tools.bench.limited_device import Task
from tools.tables import made_by, write_csv

ROOT = Path(__file__).resolve().parents[2]
GROUPS = Path("/sys/fs/cgroup/memory")


def _model(family: str, side: int, **options: Any) -> ModelSpec:
    shape = (3, side, side)
    return ModelSpec(family=family, input_shape=shape, num_classes=10, exit=3, options=options)


MODELS = {
    "vgg": _model("vgg", 32, channels=(96, 192, 384, 768)),
    "cnn": _model("cnn", 96, channels=(64, 128, 256)),
    # not looked at while predictions were made
    "resnet18": _model("resnet18", 32),
    "cnn-112": _model("cnn", 112, channels=(48, 96, 192)),
}
SEGMENTS = ((1, 1), (1, 2), (1, 3), (2, 2), (3, 3))
MB = 10**6
Result = dict[str, Any]


class Bench:
    """folder: for the libraries, jobs and calibration, which all devices share."""

    def __init__(self, folder: Path, patience_s: float) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._numbers = itertools.count()
        self._site = folder / "site"
        if not self._site.exists():
            shutil.copytree(sysconfig.get_path("purelib"), self._site, symlinks=True)

    def prepare(self, model: str, batch_size: int) -> Task:
        """Data, initial tensors and plan of a job; in a process of its own, which imports torch."""
        folder = self._folder / f"{model}-{batch_size}"
        folder.mkdir(exist_ok=True)
        plan = Plan(
            segments=(Segment(first=1, last=3),), batch_size=batch_size, epochs=2, optimizer="adam"
        )
        task = Task(spec=MODELS[model], plan=plan, folder=str(folder))
        subprocess.run(
            [sys.executable, "-m", "tools.bench.limited_device", "prepare"],
            input=msgspec.json.encode(task),
            cwd=ROOT,
            check=True,
        )
        return task

    def run(self, task: Task, limit_mb: int | None) -> Result:
        """One device under a limit, None: without one. {"died": why} if it did."""
        group = GROUPS / f"edge-sdk-choice-{os.getpid()}-{next(self._numbers)}"
        group.mkdir()
        if limit_mb:
            (group / "memory.limit_in_bytes").write_text(str(limit_mb * MB))
        task = msgspec.structs.replace(
            task, patience_s=self._patience_s, calibration=str(self._folder / "calibration.json")
        )
        join = f'echo $$ > {group}/cgroup.procs && exec "$0" -m tools.bench.limited_device'
        try:
            done = subprocess.run(
                ["sh", "-c", join, sys.executable],
                input=msgspec.json.encode(task),
                cwd=ROOT,
                capture_output=True,
                check=False,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{self._site}:{ROOT}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                timeout=3 * self._patience_s,
            )
        except subprocess.TimeoutExpired:
            return {"died": "the device itself was stuck"}
        finally:
            remove(group)
        lines = done.stdout.decode().splitlines()
        if done.returncode or not lines:
            return {"died": done.stderr.decode().strip()[-200:] or f"status {done.returncode}"}
        found: Result = json.loads(lines[-1])
        return found


def remove(group: Path) -> None:
    for process in (group / "cgroup.procs").read_text().split():
        os.kill(int(process), 9)
    for _ in range(100):
        try:
            (group / "memory.force_empty").write_text("0")
            group.rmdir()
            return
        except OSError:
            threading.Event().wait(0.1)
    print(f"{group} could not be removed", file=sys.stderr)


def least_limit(bench: Bench, task: Task, segment: tuple[int, int], limits: Sequence[int]) -> int:
    """The least of the ascending limits under which the segment trains; 0: none."""
    low, high = 0, len(limits)
    told = msgspec.structs.replace(task, forced=[segment])
    while low < high:
        middle = (low + high) // 2
        if "died" in bench.run(told, limits[middle]):
            low = middle + 1
        else:
            high = middle
    return limits[low] if low < len(limits) else 0


def judged(
    bench: Bench, model: str, batch_size: int, limits: Sequence[int], jobs: int
) -> Iterator[Result]:
    """A row for each limit and segment."""
    task = bench.prepare(model, batch_size)
    first = bench.run(task, None)  # calibrates
    if "died" in first:
        raise SystemExit(f"{model} does not train without a limit: {first['died']}")
    with ThreadPoolExecutor(jobs) as pool:
        least = pool.map(lambda segment: least_limit(bench, task, segment, limits), SEGMENTS)
        chosen = list(pool.map(lambda limit: bench.run(task, limit), limits))
        truth = dict(zip(SEGMENTS, least, strict=True))
    for limit, found in zip(limits, chosen, strict=True):
        rows = {(row["first"], row["last"]): row for row in found.get("rows", [])}
        for segment in SEGMENTS:
            row = rows.get(segment, {})
            says = bool(row.get("is_feasible"))
            trains = bool(truth[segment]) and limit >= truth[segment]
            is_run = segment in {tuple(s) for s in found.get("trained", [])}
            yield {
                "model": model,
                "batch": batch_size,
                "limit_mb": limit,
                "segment": "-".join(map(str, segment)),
                "predicted_mb": _mb(row.get("peak_bytes")),
                "error_mb": _mb(row.get("error_bytes")),
                "micro_batch": row.get("micro_batch", ""),
                "recompute": row.get("recompute", ""),
                "chooser": says,
                "trains": trains,
                "agrees": says == trains,
                "run": is_run,
                "outcome": found.get("died", "trained") if is_run or not rows else "",
                "job_predicted_mb": _mb(found.get("predicted_bytes")) if is_run else "",
                "job_measured_mb": _mb(found.get("peak_bytes")) if is_run else "",
            }


def _mb(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / MB:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limits", default="250:535:15", help="MB, first:last:step")
    parser.add_argument("--models", default="vgg,cnn")
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--jobs", type=int, default=2, help="devices at once")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for a job")
    parser.add_argument("--folder", type=Path, help="keep libraries and jobs there")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").exists():
        raise SystemExit(f"needs root and the memory controller of cgroup version 1 at {GROUPS}")
    first, last, step = map(int, args.limits.split(":"))
    limits = range(first, last + 1, step)
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, args.patience)
        for model, batch in itertools.product(args.models.split(","), args.batches.split(",")):
            for row in judged(bench, model, int(batch), limits, args.jobs):
                rows.append(row)
                print(*row.values(), flush=True)
            if args.csv:
                command = shlex.join(["python", "-m", "tools.bench.choice", *sys.argv[1:]])
                write_csv(args.csv, rows, made_by(command))
    agree = sum(row["agrees"] for row in rows)
    bold = sum(row["chooser"] and not row["trains"] for row in rows)
    died = {
        (row["model"], row["batch"], row["limit_mb"])
        for row in rows
        if row["outcome"] not in ("", "trained")
    }
    print(f"{agree} of {len(rows)} decisions agree, {bold} too bold; {len(died)} devices died")
    print(*sorted(died), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
