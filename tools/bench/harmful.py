"""Accuracy with one client of six that lies, with default settings and with what can be added.

    python -m tools.bench.harmful [--rounds 10] [--data digits] [--csv FILE]

Six clients of groups 2, 2, 2, IID; client-006, of exit 3, lies in every round. Whole rounds as
`emulate` runs them, so what is refused at the border counts as failed. The last global model's
accuracy in %, exit 3, and how many of its updates were refused; - where the run ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from msgspec.structs import replace
from torch import Tensor

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.population import Population, emulated_clients
from coordinator.config import AggregationOptions
from coordinator.methods.registry import make_config, make_method
from coordinator.runs.evaluate import metric_per_exit
from coordinator.runs.rounds import run_rounds
from coordinator.store.store import Store
from edge_sdk.data.loading import DataSet, load_dataset
from edge_sdk.protocol.messages import ModelSpec
from tools.tables import made_by, write_csv

POPULATION = Population(clients=6, groups=(2, 2, 2), split="iid", alpha=1.0)
LIAR = "client-006"
METHOD = "hypemefed"
MANY = 2**31 - 1
Lie = Callable[[str, Tensor, Tensor], Tensor]  # name, trained, sent -> what is returned


@dataclasses.dataclass(frozen=True)
class Attack:
    """lie: of every float tensor. examples: that it says it has; 0: what it has."""

    lie: Lie
    examples: int = 0


def times(factor: float) -> Lie:
    return lambda name, trained, sent: sent + factor * (trained - sent)


def weights_times(factor: float) -> Lie:
    return lambda name, trained, sent: (
        trained if "running" in name else times(factor)(name, trained, sent)
    )


def every(value: float) -> Lie:
    return lambda name, trained, sent: torch.full_like(trained, value)


def variance(value: float) -> Lie:
    return lambda name, trained, sent: (
        torch.full_like(trained, value) if name.endswith("running_var") else trained
    )


ATTACKS: Mapping[str, Attack] = {
    "every number 1e20": Attack(every(1e20)),
    "every number 3e38": Attack(every(3e38)),
    "variances -1": Attack(variance(-1.0)),
    "variances 1e20": Attack(variance(1e20)),
    "NaN": Attack(every(float("nan"))),
    "2^31 examples": Attack(times(1.0), MANY),
    "2^31 examples, movement times -1": Attack(times(-1.0), MANY),
    "movement times -1000": Attack(times(-1000.0)),
    "movement times -10": Attack(times(-10.0)),
    "movement times -3": Attack(times(-3.0)),
    "weights times -5, statistics honest": Attack(weights_times(-5.0)),
    "weights times -1, statistics honest": Attack(weights_times(-1.0)),
}
SETTINGS = {
    "default": AggregationOptions(),
    "--clip 1": AggregationOptions(clip=1.0),
    "median": AggregationOptions(rule="median"),
}


@dataclasses.dataclass(frozen=True)
class AttackedCohort:
    """Emulated clients, of whom LIAR attacks; attack None: it returns nothing."""

    inner: InProcessCohort
    attack: Attack | None

    def clients(self) -> Sequence[Client]:
        told = self.attack.examples if self.attack else 0
        return [
            dataclasses.replace(c, num_examples=told) if told and c.id == LIAR else c
            for c in self.inner.clients()
        ]

    def rest(self, tries: int) -> bool:
        return self.inner.rest(tries)

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        for result in self.inner.train(work, round, deadline_s):
            if not isinstance(result, ClientUpdate) or result.client.id != LIAR:
                yield result
            elif self.attack is None:
                yield Absence(result.client, result.segments, "failed", "gone", "is not here")
            else:
                yield attacked(result, work[LIAR].tensors, self.attack)


def attacked(update: ClientUpdate, sent: Mapping[str, Tensor], attack: Attack) -> ClientUpdate:
    tensors = {
        name: attack.lie(name, tensor, sent[name]) if tensor.is_floating_point() else tensor
        for name, tensor in update.tensors.items()
    }
    client, arrived = update.client, update.arrived
    if attack.examples:
        client = dataclasses.replace(client, num_examples=attack.examples)
        arrived = replace(arrived, update=replace(arrived.update, num_examples=attack.examples))
    return dataclasses.replace(update, client=client, arrived=arrived, tensors=tensors)


def accuracy(
    data: DataSet,
    options: AggregationOptions,
    rounds: int,
    attack: Attack | None,
    *,
    is_honest: bool,
) -> tuple[float, int]:
    """Of the last global model at exit 3, and how many updates were refused. is_honest: nobody
    lies. Raises what ends a run."""
    train = data.train
    model = ModelSpec(
        family="cnn", input_shape=train.input_shape, num_classes=train.num_classes, exit=3
    )
    config = make_config(METHOD, model, rounds=rounds, aggregation=options, epochs=2)
    method = make_method(config)
    clients = emulated_clients(POPULATION, config, train)
    shards = {client.id: client.shard for client in clients}
    inner = InProcessCohort(shards, {client.id: client.exit for client in clients}, 3)
    cohort = inner if is_honest else AttackedCohort(inner, attack)
    with TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "run", config, "emulate")
        reports: list[int] = []
        try:
            run_rounds(
                store, method, cohort, None, report=lambda r: reports.append(r.totals.failures)
            )
        finally:
            store.close()
    return metric_per_exit(method.spec, method.current(), data.test)[-1], sum(reports)


def cell(
    data: DataSet,
    options: AggregationOptions,
    rounds: int,
    attack: Attack | None,
    *,
    is_honest: bool,
) -> str:
    try:
        found, refused = accuracy(data, options, rounds, attack, is_honest=is_honest)
    except Exception as error:  # what ends a run is a result here
        print(f"ended: {type(error).__name__}: {error}", file=sys.stderr)
        return "-"
    return f"{100 * found:.1f} ({refused})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--examples", type=int, help="default all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    data = load_dataset(args.data, 0, args.examples)
    cases: dict[str, tuple[Attack | None, bool]] = {"nobody lies": (None, True)}
    cases |= {"it returns nothing": (None, False)}
    cases |= {name: (attack, False) for name, attack in ATTACKS.items()}
    rows: list[dict[str, object]] = []
    for name, (attack, is_honest) in cases.items():
        row: dict[str, object] = {"client 6": name}
        for setting, options in SETTINGS.items():
            row[setting] = cell(data, options, args.rounds, attack, is_honest=is_honest)
        rows.append(row)
        print("  ".join(map(str, row.values())), flush=True)
    if args.csv:
        command = " ".join(["python -m tools.bench.harmful", *(argv or sys.argv[1:])])
        write_csv(args.csv, rows, made_by(command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
