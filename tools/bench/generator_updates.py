"""Clients' updates for tools/bench/generators.py: made by real training, kept in files.

In truth every participant trains the whole network, a few steps of Adam on data with classes to
learn, two of them at each client; a generator is shown its prefix only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from safetensors.torch import load, save_file
from torch import Tensor

from coordinator.aggregation.mean import OwnersMean
from coordinator.cohorts.base import BLANK, ArrivedUpdate, Client, ClientUpdate
from edge_sdk.data.examples import Examples
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.trainer import train

EXITS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
WIDE = {"channels": (64, 128, 256, 512)}


@dataclass(frozen=True)
class Case:
    """A network, and how many examples each client has in batches of how many."""

    family: str
    input_shape: tuple[int, ...]
    num_classes: int
    options: dict[str, object]
    num_examples: int = 32
    batch_size: int = 8

    def spec(self) -> ModelSpec:
        return ModelSpec(
            family=self.family,
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            exit=max(EXITS),
            options=self.options,
        )


MODELS = {
    "svhn": Case("vgg", (3, 32, 32), 10, {}, 48),
    "stl10": Case("vgg", (3, 96, 96), 10, WIDE, 12, 4),
    "unimib": Case("vgg", (3, 151), 8, {**WIDE, "fold": (18, 25)}),
    "resnet18": Case("resnet18", (3, 32, 32), 100, {}, 16, 4),
    "tiny": Case("cnn", (1, 8, 8), 3, {"channels": (4, 5, 6)}),
}


def make_updates(case: Case, folder: Path, rounds: int) -> None:
    """Per round: what was sent, and what each participant would return had it trained it all. The
    next global is the owners' mean."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    spec = case.spec()
    sent = initial_tensors(spec, 0)
    plan = Plan(
        segments=(Segment(first=1, last=spec.exit),), batch_size=case.batch_size, lr=5e-4, epochs=1
    )
    for number in range(1, rounds + 1):
        save_file(sent, folder / f"{number}-sent")
        mean = OwnersMean()
        for client, exit in enumerate(EXITS):
            data = examples(case, 100 * number + client)
            tensors = train(spec, plan, sent, data).tensors
            save_file(tensors, folder / f"{number}-{client}")
            mean.add_(prefix(tensors, exit), 1.0)
        sent = mean.result(sent)
    (folder / "done").touch()


def examples(case: Case, seed: int) -> Examples:
    """Noise around one mean image a class; nine in ten examples are of two classes."""
    means = np.random.default_rng(0).normal(size=(case.num_classes, *case.input_shape))
    rng = np.random.default_rng(seed)
    frequent = rng.choice(case.num_classes, 2, replace=False)
    labels = np.where(
        rng.random(case.num_examples) < 0.9,
        rng.choice(frequent, case.num_examples),
        rng.integers(case.num_classes, size=case.num_examples),
    )
    x = means[labels] + rng.normal(size=(case.num_examples, *case.input_shape))
    return Examples(x.astype(np.float32), labels.astype(np.int64), case.num_classes)


def prefix(tensors: Mapping[str, Tensor], exit: int) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if stage_of(name)[1] <= exit}


def read(path: Path) -> Tensors:
    return load(path.read_bytes())


@dataclass(frozen=True)
class Round:
    """sent: the global; mean: over the owners; lacking: the mean of what the others trained, which
    the generator must guess."""

    sent: Tensors
    mean: Tensors
    lacking: Tensors


def load_round(folder: Path, number: int) -> Round:
    sent = read(folder / f"{number}-sent")
    owners, lacking = OwnersMean(), OwnersMean()
    for client, exit in enumerate(EXITS):
        tensors = read(folder / f"{number}-{client}")
        held = prefix(tensors, exit)
        owners.add_(held, 1.0)
        lacking.add_({name: t for name, t in tensors.items() if name not in held}, 1.0)
    return Round(sent, owners.result(sent), lacking.result(sent))


def shown(folder: Path, number: int, client: int, exit: int) -> ClientUpdate:
    """What the generator sees of a participant: its prefix."""
    return as_update(f"{number}-{client}", exit, prefix(read(folder / f"{number}-{client}"), exit))


def as_update(name: str, exit: int, tensors: Tensors) -> ClientUpdate:
    segments = (Segment(first=1, last=exit),)
    who = Client(id=name, exit=exit)
    arrived = ArrivedUpdate(update=replace(BLANK, num_examples=1, num_steps=1), segments=segments)
    return ClientUpdate(who, arrived, tensors)
