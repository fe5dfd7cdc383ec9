"""How fast `edge-coordinator emulate` runs, against the bare training steps of the same jobs.

    python -m tools.bench.emulate --data path/to/fashion-mnist [--rounds 4] [--csv FILE]

The main table's setting: 50 clients, 17/17/16, 10 a round, 12,000 examples, 2 epochs, batch 32. The
bare loop takes the rounds' own jobs: the same model, segments and batches, with torch.optim.Adam
and nothing else, no checks, counts, aggregation or checkpoints. The same rounds run thrice in turn:
bare, emulated in 1 process, emulated in 2. Evaluation is left out: how often is a flag.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from coordinator.cohorts.base import Assignment, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.population import Population, emulated_clients
from coordinator.cohorts.sampling import sample
from coordinator.config import RotationOptions, RunConfig, ServerOptions
from coordinator.methods.registry import make_method
from coordinator.runs.emulating import emulated_cohort
from coordinator.runs.rounds import run_rounds
from coordinator.settings import checked
from coordinator.store.store import Store
from edge_sdk.data.loading import Examples, load_dataset
from edge_sdk.models import build
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec
from tools.tables import made_by, write_csv

CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--examples", type=int, default=12000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = load_dataset(args.data, 0, args.examples, 500).train
    population = Population(clients=50, groups=(17, 17, 16), split="dirichlet", alpha=0.5)
    config = checked(
        RunConfig(
            method="hypemefed",
            model=ModelSpec(
                family="cnn", input_shape=train.input_shape, num_classes=train.num_classes, exit=3
            ),
            rounds=args.rounds,
            participants=10,
            epochs=2,
            server=ServerOptions(momentum=0.5, lr=0.75),
            rotation=RotationOptions(mode="add", stages=0),
        )
    )
    bare_job(*first_job(config, population, train))  # loads what torch.optim imports
    bare_s = bare_rounds(config, population, train)
    rows = [row("bare steps", bare_s, bare_s, args.rounds, {})]
    for processes in (1, 2):
        taken_s, phases = emulated_rounds(config, population, train, processes)
        rows.append(row(f"emulate, {processes} process(es)", taken_s, bare_s, args.rounds, phases))
    for cells in rows:
        print("  ".join(f"{key} {value}" for key, value in cells.items()))
    if args.csv:
        note = made_by("python -m tools.bench.emulate")
        write_csv(args.csv, rows, note, columns=list(rows[-1]))
    return 0


def row(
    what: str, taken_s: float, bare_s: float, rounds: int, phases: Mapping[str, float]
) -> dict[str, object]:
    """phases: CPU seconds, summed over clients and processes."""
    parts = {f"{name}_s": f"{value / rounds:.3f}" for name, value in sorted(phases.items())}
    pace, share = f"{60 * rounds / taken_s:.1f}", f"{taken_s / bare_s:.2f}"
    return {"what": what, "rounds_per_min": pace, "of_bare": share, **parts}


def emulated_rounds(
    config: RunConfig, population: Population, train: Examples, processes: int
) -> tuple[float, dict[str, float]]:
    """Wall seconds of the rounds, workers already running, and the phases' seconds."""
    method, clients = make_method(config), emulated_clients(population, config, train)
    with (
        tempfile.TemporaryDirectory() as folder,
        emulated_cohort(population, config, clients, device=CPU, processes=processes) as cohort,
    ):
        warm = {c.id: method.assign(c, 1) for c in cohort.clients()[: 2 * processes]}
        for _ in cohort.train(warm, 1, 0.0):
            pass  # libraries are loaded, workers run
        store = Store.create(Path(folder) / "run", config, "emulate")
        try:
            start = time.monotonic()
            run_rounds(store, method, cohort, None)
            taken_s = time.monotonic() - start
            phases: dict[str, float] = {}
            for entry in store.history():
                for name, value in entry["seconds"].items():
                    phases[name] = phases.get(name, 0.0) + value
        finally:
            store.close()
    return taken_s, phases


def bare_rounds(config: RunConfig, population: Population, train: Examples) -> float:
    """Seconds that the training steps of the same rounds' jobs take in a plain loop."""
    method, clients = make_method(config), emulated_clients(population, config, train)
    total_s = 0.0
    with emulated_cohort(population, config, clients, device=CPU) as cohort:
        assert isinstance(cohort, InProcessCohort)
        for number in range(1, config.rounds + 1):
            chosen = sample(cohort.clients(), config.participants, seed=config.seed, round=number)
            work = {client.id: method.assign(client, number) for client in chosen}
            total_s += sum(bare_job(job, cohort.shards[name]) for name, job in work.items())
            results = cohort.train(work, number, 0.0)
            method.aggregate(number, (r for r in results if isinstance(r, ClientUpdate)))
    return total_s


def first_job(
    config: RunConfig, population: Population, train: Examples
) -> tuple[Assignment, Examples]:
    clients = emulated_clients(population, config, train)
    with emulated_cohort(population, config, clients, device=CPU) as cohort:
        client = cohort.clients()[0]
    return make_method(config).assign(client, 1), clients[0].shard


def bare_job(job: Assignment, shard: Examples) -> float:
    model = build(job.model)
    model.load(job.tensors)
    model.ready("cpu")
    x, y = torch.from_numpy(shard.x), torch.from_numpy(shard.y)
    start = time.monotonic()
    for segment in job.plan.segments:
        stages = model.stages[segment.first - 1 : segment.last]
        heads = model.exits[segment.first - 1 : segment.last]
        features = x
        if segment.first > 1:
            with torch.no_grad():
                frozen = nn.Sequential(*model.stages[: segment.first - 1]).eval()
                parts = [frozen(moved(part, "cpu")) for part in x.split(job.plan.batch_size)]
                features = torch.cat(parts)
        parameters = list(nn.ModuleList([stages, heads]).parameters())
        optimizer = torch.optim.Adam(parameters, lr=job.plan.lr)
        stages.train()
        for _ in range(job.plan.epochs):
            for batch in torch.randperm(len(y)).split(job.plan.batch_size):
                if len(batch) < 3:
                    continue
                out, loss = moved(features[batch], "cpu"), torch.zeros(())
                for stage, head in zip(stages, heads, strict=True):
                    out = stage(out)
                    loss = loss + functional.cross_entropy(head(out), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
