"""Accuracy under harmful clients, by aggregation rule.

    python -m tools.bench.robust [--rounds 10] [--data digits] [--csv FILE]

Ten clients of groups 4, 3, 3, IID, the cnn with three exits; 0, 1 or 3 of them send their movement
(statistics of BatchNorm too) times -10: sign-flipped and ten times as long. The 3 are one of each
group, so stage 3 of owners-mean has 3 owners, one of them harmful; with stage-rotation everybody
trains every stage. The last global model's accuracy in %, exit 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate, Cohort
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.population import Population, emulated_clients
from coordinator.config import AggregationOptions, RotationOptions, RunConfig, ServerOptions
from coordinator.methods.registry import make_method
from coordinator.runs.evaluate import metric_per_exit
from edge_sdk.data.loading import DataSet, load_dataset
from edge_sdk.protocol.messages import ModelSpec
from tools.tables import made_by, write_csv

POPULATION = Population(clients=10, groups=(4, 3, 3), split="iid", alpha=1.0)
HARMFUL: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("client-010",),
    3: ("client-001", "client-005", "client-010"),
}
RULES = {
    "mean": AggregationOptions(),
    "mean --clip 1": AggregationOptions(clip=1.0),
    "mean --clip 2": AggregationOptions(clip=2.0),
    "trimmed-mean --trim 0.1": AggregationOptions(rule="trimmed-mean"),
    "trimmed-mean --trim 0.3": AggregationOptions(rule="trimmed-mean", trim=0.3),
    "median": AggregationOptions(rule="median"),
    "norm-bounded": AggregationOptions(rule="norm-bounded"),
}
METHODS = ("stage-rotation", "owners-mean")
SIGN_FLIP = -10.0


@dataclasses.dataclass(frozen=True)
class AttackedCohort:
    """A cohort some of whose clients send `factor` times the movement that they trained."""

    inner: Cohort
    harmful: Collection[str]
    factor: float

    def clients(self) -> Sequence[Client]:
        return self.inner.clients()

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        for result in self.inner.train(work, round, deadline_s):
            if not isinstance(result, ClientUpdate) or result.client.id not in self.harmful:
                yield result
                continue
            sent = work[result.client.id].tensors
            tensors = {
                name: sent[name] + self.factor * (tensor - sent[name])
                if tensor.is_floating_point()
                else tensor
                for name, tensor in result.tensors.items()
            }
            yield dataclasses.replace(result, tensors=tensors)


def accuracy(
    data: DataSet,
    method_name: str,
    options: AggregationOptions,
    harmful: Collection[str],
    *,
    rounds: int,
    factor: float = SIGN_FLIP,
) -> list[float]:
    """Of the last global model on the test set, exit 1 first."""
    train, rotates = data.train, method_name == "stage-rotation"
    config = RunConfig(
        method=method_name,
        model=ModelSpec(
            family="cnn", input_shape=train.input_shape, num_classes=train.num_classes, exit=3
        ),
        rounds=rounds,
        optimizer="adam",
        lr=1e-3,
        server=ServerOptions(serve="last"),
        aggregation=options,
        rotation=RotationOptions(mode="add" if rotates else "off", stages=0 if rotates else 1),
    )
    method = make_method(config)
    clients = emulated_clients(POPULATION, config, train)
    shards = {client.id: client.shard for client in clients}
    inner = InProcessCohort(shards, {client.id: client.exit for client in clients}, 3)
    cohort = AttackedCohort(inner, harmful, factor)
    for number in range(1, rounds + 1):
        work = {client.id: method.assign(client, number) for client in cohort.clients()}
        updates = (u for u in cohort.train(work, number, 0.0) if isinstance(u, ClientUpdate))
        method.aggregate(number, updates)
    return metric_per_exit(method.spec, method.current(), data.test)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--examples", type=int, help="default all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = load_dataset(args.data, 0, args.examples)
    rows: list[dict[str, object]] = []
    for method in METHODS:
        for rule, options in RULES.items():
            row: dict[str, object] = {"method": method, "rule": rule}
            for count, harmful in HARMFUL.items():
                found = accuracy(data, method, options, harmful, rounds=args.rounds)
                row[f"harmful_{count}"] = f"{100 * found[-1]:.1f}"
            rows.append(row)
            print("  ".join(map(str, row.values())), flush=True)
    if args.csv:
        command = " ".join(["python -m tools.bench.robust", *(argv or sys.argv[1:])])
        write_csv(args.csv, rows, made_by(command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
