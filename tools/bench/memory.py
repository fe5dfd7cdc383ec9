"""What training and running a model takes on a device: memory, and CPU seconds to start.

    python -m tools.bench.memory [--models cnn,vgg] [--batches 8,32] [--runs 3] [--csv FILE]

In one run, by turns, each in fresh processes, one thread: `edge-sdk run` waiting for an absent
coordinator; real jobs in the product's training process, asked for as the agent does; a plain
torch.optim loop over the same model, batches and loss (its losses are compared); the model run by
edge_sdk.infer and by torch. A figure is the median of the runs, memory in MB of 1e6 bytes.

bound_mb, of a training process: resident memory after `import torch` alone, and what the job cannot
do without: parameters, gradients, Adam's two moments, the activations that autograd saves. Nothing
of it is measured on the process compared with it. start_cpu_s: until a job can be taken (trainer:
after a tiny job that loads kernels), the first step could begin (loop), or the first prediction is
made. count_cpu_s: what the trainer spends once per model on counting what each depth would take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil

from edge_sdk.agent.pipe import Estimate, Estimated, Inspected, Progress, Train, TrainerOptions
from edge_sdk.agent.trainer_process import TrainerProcess
from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import save_shard
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.messages import Fetch, Job, ModelSpec, Part, Plan, Segment, Update
from tools.bench.memory_programs import INPUTS, MODEL, SPEC, WEIGHTS, footprint
from tools.tables import made_by, print_table, write_csv

MODELS = {
    "cnn": ModelSpec(family="cnn", input_shape=(1, 28, 28), num_classes=10, exit=3),
    "vgg": ModelSpec(
        family="vgg",
        input_shape=(3, 32, 32),
        num_classes=100,
        exit=3,
        options={"channels": (64, 128, 256, 512)},
    ),
    "tiny": ModelSpec(
        family="cnn", input_shape=(1, 8, 8), num_classes=2, exit=2, options={"channels": (2, 3)}
    ),
}
STEPS, PREDICTIONS = 3, 50
LOSS_TOLERANCE = 0.02  # relative; float32 sums in another order, three Adam steps
COLUMNS = (
    *("process", "model", "exit", "batch", "rss_mb", "pss_mb", "uss_mb", "peak_mb"),
    *("bound_mb", "of_bound", "of_loop", "start_cpu_s", "count_cpu_s", "cpu_ms"),
)
DIGITS = {"start_cpu_s": 2, "count_cpu_s": 2, "of_bound": 3, "of_loop": 3, "cpu_ms": 3}
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", default="cnn,vgg", help=f"of {', '.join(MODELS)}; default cnn,vgg")
    add("--batches", default="8,32")
    add("--exits", default="1,3", help="depths to train; default 1,3")
    add("--runs", type=int, default=3, help="processes of each kind")
    add("--csv", type=Path)
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"--models {', '.join(unknown)}: known are {', '.join(MODELS)}")
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as name:
        rows += agent_rows(Path(name), args.runs)
        (torch_row,) = [middle([program("import torch") for _ in range(args.runs)])]
        rows.append({"process": "import torch", **torch_row})
        for model in names:
            for exit in map(int, args.exits.split(",")):
                for batch in map(int, args.batches.split(",")):
                    spec = msgspec.structs.replace(MODELS[model], exit=exit)
                    about = {"model": model, "exit": exit, "batch": batch}
                    found = training(spec, batch, Path(name), args.runs, torch_row["rss_mb"])
                    rows += [{**row, **about} for row in found]
                    print(f"{model}, exit {exit}, batch {batch} done", file=sys.stderr, flush=True)
            found = inference(MODELS[model], Path(name) / model, args.runs)
            rows += [{**row, "model": model, "exit": MODELS[model].exit} for row in found]
    rows = [tidy(row) for row in rows]
    print_table(rows, COLUMNS)
    if args.csv:
        flags = f"--models {args.models} --batches {args.batches} --runs {args.runs}"
        about = ("shared", f"torch {version('torch')}", "1 thread", "medians")
        write_csv(args.csv, rows, made_by(f"python -m tools.bench.memory {flags}", *about), COLUMNS)
    return 0


# -- the agent ----------------------------------------------------------------------------------


def agent_rows(folder: Path, runs: int) -> list[Figures]:
    for name in ("device", "server"):
        make_keys(folder, name)
    save_shard(folder / "idle.npz", examples(MODELS["cnn"], 64))
    found = [idle_agent(folder) for _ in range(runs)]
    labels = ("agent, waiting for its coordinator", "its trainer, before any job")
    return [
        {"process": label, **middle([run[number] for run in found])}
        for number, label in enumerate(labels)
    ]


def idle_agent(folder: Path) -> tuple[Figures, Figures]:
    """`edge-sdk run` once it waits for a coordinator that is not there, and its trainer."""
    command = [sys.executable, "-m", "edge_sdk.cli", "run", "--id", "bench", "--threads", "1"]
    command += ["--coordinator", f"tcp://127.0.0.1:{free_port()}"]
    command += ["--keys", str(folder), "--data", str(folder / "idle.npz")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        try:
            said = []
            for line in agent.stderr:
                said.append(line)
                if "waiting for it" in line:
                    trainer = trainer_of(agent.pid)
                    wait_idle(trainer)
                    return footing(agent.pid), footing(trainer)
            raise RuntimeError(f"the agent ended: {''.join(said)}")
        finally:
            agent.terminate()
            agent.stderr.read()


def footing(pid: int) -> Figures:
    times = psutil.Process(pid).cpu_times()
    return {**footprint(pid), "start_cpu_s": times.user + times.system}


def wait_idle(pid: int) -> None:
    """Until a trainer has read its data and computes nothing."""
    process, before = psutil.Process(pid), None
    while (now := process.cpu_times()[:2]) != before or "torch" not in libraries(pid):
        before = now
        time.sleep(1.0)


def libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def trainer_of(pid: int) -> int:
    """The training process that a process has started; for a moment it has no command line."""
    for _ in range(100):
        for child in psutil.Process(pid).children():
            if "edge_sdk.training" in child.cmdline():
                return int(child.pid)
        time.sleep(0.05)
    raise SystemExit(f"process {pid} has no training process")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# -- training -----------------------------------------------------------------------------------


def training(
    spec: ModelSpec, batch: int, folder: Path, runs: int, torch_mb: float
) -> list[Figures]:
    """The rows of the trainer and of the plain loop, for all stages up to the spec's exit."""
    plan = Plan(segments=(Segment(first=1, last=spec.exit),), epochs=1, batch_size=batch)
    data = folder / f"train-{batch}-{'x'.join(map(str, spec.input_shape))}.npz"
    save_shard(data, examples(spec, STEPS * batch))
    settings = [msgspec.json.encode(part).decode() for part in (spec, plan)]
    ours, plain = [], []
    for _ in range(runs):
        ours.append(trainer_job(spec, plan, data))
        plain.append(program("torch.optim loop", *settings, str(data)))
    for mine, theirs in zip(ours, plain, strict=True):
        check_same(mine.pop("losses"), theirs.pop("losses"))
        for at_its_end in ("rss_mb", "pss_mb", "uss_mb"):
            del theirs[at_its_end]  # the trainer's is of its rest before the job
    bound_mb = torch_mb + ours[0]["needed_mb"]
    loop = middle(plain)
    rows = []
    for process, found in (("trainer", middle(ours)), ("torch.optim loop", loop)):
        ratios = {
            "bound_mb": bound_mb,
            "of_bound": found["peak_mb"] / bound_mb,
            "of_loop": found["peak_mb"] / loop["peak_mb"],
        }
        rows.append({"process": process, **found, **ratios})
    return rows


def trainer_job(spec: ModelSpec, plan: Plan, data: Path) -> Figures:
    """One job in a fresh training process. needed_mb: what the bound adds to torch's import."""
    import torch

    from edge_sdk.capacity.counting import autograd_bytes
    from edge_sdk.models import build
    from edge_sdk.models.staged import moved

    batch = moved(torch.zeros(plan.batch_size, *spec.input_shape), "cpu")
    saved_bytes = autograd_bytes(build(spec).ready("cpu"), plan, batch)
    done = one_job(spec, plan, data)
    copies = 1 + {"adam": 2, "sgd": 0}[plan.optimizer]  # the gradients and their moments
    needed = done.cost.download_bytes + copies * done.cost.gradient_bytes + saved_bytes
    return {
        "rss_mb": done.ready["rss_mb"],
        "peak_mb": done.peak_mb,
        "start_cpu_s": done.ready["start_cpu_s"],
        "count_cpu_s": done.count_cpu_s,
        "needed_mb": needed / 1e6,
        "losses": [result.loss for result in done.update.exits],
    }


class Done(NamedTuple):
    """A job that a training process has done. ready: its footing before; cost: as it predicted
    it; peak_mb: resident; count_cpu_s: of counting the costs."""

    ready: Figures
    cost: SegmentCost
    update: Update
    peak_mb: float
    count_cpu_s: float


def one_job(spec: ModelSpec, plan: Plan, data: Path) -> Done:
    """All stages of the model, in a fresh training process."""
    from edge_sdk.models import initial_tensors
    from edge_sdk.protocol.tensors import Sender

    sender = Sender(initial_tensors(spec, 0))
    with trainer_process(data) as (trainer, pid):
        assert isinstance(heard(trainer), Inspected)
        ready = footing(pid)
        trainer.send(Estimate(model=spec, plan=plan))
        estimated = heard(trainer)
        assert isinstance(estimated, Estimated), estimated
        times = psutil.Process(pid).cpu_times()
        cost = next(c for c in estimated.costs if (c.first, c.last) == (1, spec.exit))
        job = Job(id="0" * 32, round=1, model=spec, plan=plan, tensors=sender.specs, deadline_s=0.0)
        trainer.send(Train(job=job, run="bench", cache_bytes=0))
        while isinstance(message := heard(trainer), Fetch):
            for index in range(message.first, message.first + message.count):
                trainer.send(Part(round=1, index=index), memoryview(sender.part(index)))
        assert isinstance(message, Update), message
        peak_mb = max(footprint(pid)["peak_mb"], ready["peak_mb"])
    return Done(ready, cost, message, peak_mb, times.children_user + times.children_system)


@contextlib.contextmanager
def trainer_process(data: Path) -> Iterator[tuple[TrainerProcess, int]]:
    trainer = TrainerProcess(TrainerOptions(data=str(data), threads=1, measure_compute=False))
    try:
        yield trainer, trainer_of(psutil.Process().pid)
    finally:
        trainer.end()


def heard(trainer: TrainerProcess) -> object:
    """The next message that is no sign of life, while what was sent is handed over."""
    while True:
        if trainer.has_unsent:
            select.select([trainer], [trainer], [])
            trainer.flush()
            if not trainer.is_readable():
                continue
        message = trainer.receive()[0]
        if not isinstance(message, Progress):
            return message


def check_same(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Raise RuntimeError unless both have trained the same."""
    pairs = list(zip(ours, theirs, strict=True))
    if not all(math.isclose(a, b, rel_tol=LOSS_TOLERANCE) for a, b in pairs):
        raise RuntimeError(f"trainer and loop differ: losses of each exit {pairs}")


def examples(spec: ModelSpec, count: int) -> Examples:
    x = np.random.default_rng(0).standard_normal((count, *spec.input_shape)).astype(np.float32)
    return Examples(x, np.arange(count) % spec.num_classes, spec.num_classes)


# -- inference ----------------------------------------------------------------------------------


def inference(spec: ModelSpec, folder: Path, runs: int) -> list[Figures]:
    """One model, untrained, by edge_sdk.infer and by torch, all stages. Labels are compared."""
    from safetensors.torch import save_file

    from edge_sdk.infer.export import export
    from edge_sdk.models import initial_tensors

    folder.mkdir()
    tensors = initial_tensors(spec, 0)
    export(spec, tensors, folder / MODEL)
    save_file(tensors, folder / WEIGHTS)
    (folder / SPEC).write_bytes(msgspec.json.encode(spec))
    np.save(folder / INPUTS, examples(spec, PREDICTIONS).x)
    kinds = ("numpy only", "edge_sdk.infer, onnxruntime", "torch")
    found: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind in kinds:
            found[kind].append(program(kind, str(folder)))
    labels = [run.pop("labels") for kind in kinds[1:] for run in found[kind]]
    if any(other != labels[0] for other in labels):
        raise RuntimeError("onnxruntime and torch give different labels")
    return [{"process": f"inference: {kind}", **middle(runs)} for kind, runs in found.items()]


# -- all ----------------------------------------------------------------------------------------


def program(*arguments: str) -> Figures:
    """Run one of memory_programs.py. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "tools.bench.memory_programs", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {ended.stderr.strip()}")
    found: Figures = json.loads(ended.stdout)
    return found


def middle(runs: Sequence[Mapping[str, float]]) -> Figures:
    """The median of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def tidy(row: Mapping[str, Any]) -> Figures:
    """Rounded, in the order of the columns; "" where a figure does not apply."""
    cells = {name: row.get(name, "") for name in COLUMNS}
    return {
        name: f"{cell:.{DIGITS.get(name, 1)}f}" if isinstance(cell, float) else cell
        for name, cell in cells.items()
    }


if __name__ == "__main__":
    sys.exit(main())
