"""Small real things that several tests use: examples, specs, clients, updates."""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.cohorts.base import BLANK, ArrivedUpdate, Assignment, Client, ClientUpdate
from coordinator.config import (
    AggregationOptions,
    GeneratorOptions,
    RotationOptions,
    RunConfig,
    ServerOptions,
)
from coordinator.methods.registry import METHODS
from edge_sdk.data.loading import Examples
from edge_sdk.protocol.messages import ModelSpec, Segment
from edge_sdk.protocol.tensors import DTYPES, Tensors

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# Two public keys in Z85.
KEY_A, KEY_B = (
    b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID",
    b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6",
)
# What methods have of their own, made small; or cannot go without.
OWN: dict[str, dict[str, object]] = {
    "feddf": {"public": "digits", "public_examples": 24, "fusion_steps": 3, "fusion_batch": 8},
    "mh-pfedhn": {"embedding": 4, "hyper_hidden": 8, "chunk": 256, "hyper_lr": 0.01},
    "mh-pfedhngd": {"embedding": 4, "hyper_hidden": 8, "chunk": 256, "hyper_lr": 0.01},
    "pfedhn": {"embedding": 4, "hyper_hidden": 8},
}
ROBUST = ("trimmed-mean", "median", "norm-bounded")


def shared_data(part: str) -> str:
    """A real data set, or skip the test."""
    folder = SHARED_DATA / part
    if not folder.exists():
        pytest.skip(f"no data set {part} in {SHARED_DATA}")
    return str(folder)


def cnn(exit: int = 3, channels: tuple[int, ...] = (4, 5, 6)) -> ModelSpec:
    """A cnn for 1 x 8 x 8 and 3 classes, a few hundred parameters."""
    return ModelSpec(
        family="cnn",
        input_shape=(1, 8, 8),
        num_classes=3,
        exit=exit,
        options={"channels": channels},
    )


def examples(n: int = 24, seed: int = 0, shape: tuple[int, ...] = (1, 8, 8)) -> Examples:
    """Three classes that differ in their mean, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    y = np.arange(n, dtype=np.int64) % 3
    x = rng.normal(size=(n, *shape)).astype(np.float32)
    x += (y - 1.0).astype(np.float32).reshape(-1, *[1] * len(shape))
    return Examples(x=x, y=y, num_classes=3)


def config(method: str, **changes: object) -> RunConfig:
    """Small, and otherwise RunConfig's defaults, with those of the method's own that it may not go
    without: of local training. Of an unknown method all the same."""
    needs = METHODS[method].defaults if method in METHODS else {}
    settings: dict[str, object] = {path: v for path, v in needs.items() if "." not in path} | {
        "method": method,
        "model": cnn(),
        "rounds": 3,
        "epochs": 1,
        "batch_size": 8,
        "server": ServerOptions(),
        "generator": GeneratorOptions(
            name="svd-mlp" if method == "hypemefed" else "none", rank=4, hidden=8, epochs=3
        ),
        "rotation": RotationOptions(mode="add" if method == "stage-rotation" else "off"),
    }
    if method in OWN:
        settings["own"] = OWN[method]
    return RunConfig(**(settings | changes))  # type: ignore[arg-type]


def two_exits() -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """An mlp of features (2,) and two classes whose logits can be told by hand: with f = ReLU(x),
    exit 1 gives (ln 3 f0, 0), exit 2 (0, ln 4 (f0 + f1))."""
    spec = ModelSpec(
        family="mlp", input_shape=(2,), num_classes=2, exit=2, options={"widths": (2, 2)}
    )
    tensors = {}
    for stage in (0, 1):
        tensors[f"stages.{stage}.{1 - stage}.weight"] = torch.eye(2)
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1 - 1e-5),
        ):
            tensors[f"stages.{stage}.{2 - stage}.{name}"] = torch.full((2,), value)
        tensors[f"exits.{stage}.bias"] = torch.zeros(2)
    tensors["exits.0.weight"] = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    tensors["exits.1.weight"] = torch.tensor([[0.0, 0.0], [math.log(4), math.log(4)]])
    return spec, tensors


def client(name: str, exit: int, num_exits: int = 3) -> Client:
    return Client(id=name, exit=exit, stages=tuple(range(exit + 1, num_exits + 1)))


def answer(
    who: Client,
    job: Assignment,
    num_examples: int = 10,
    shift: float | None = None,
    num_steps: int = 4,
) -> ClientUpdate:
    """An update made without training: what was sent, or zero, moved by `shift` or by draws of
    (client, tensor), of a weight's values under a mask by those of the weight. Integers come back
    as they were sent."""
    moved = {}
    for spec in job.returns:
        old = job.tensors.get(spec.name)
        if old is None or tuple(old.shape) != spec.shape:
            old = torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])
        rng = torch.Generator().manual_seed(
            hash_of(f"{who.id} {spec.name.removeprefix('packed/')}")
        )
        step = 0.1 * torch.randn(old.shape, generator=rng)
        if shift is not None:
            step = torch.full(old.shape, shift)
        moved[spec.name] = old + step if old.is_floating_point() else old
    told = {"num_examples": num_examples, "num_steps": num_steps}
    return client_update(who, moved, job.plan.segments, model=job.model, **told)


def client_update(
    who: Client,
    tensors: Tensors,
    segments: tuple[Segment, ...],
    *,
    model: ModelSpec | None = None,
    bytes_down: int = 0,
    bytes_up: int = 0,
    staleness: int = 0,
    sent: Tensors | None = None,
    **told: Any,
) -> ClientUpdate:
    """An update as an emulated client returns it. told: fields of its message."""
    arrived = ArrivedUpdate(
        update=replace(BLANK, **told),
        segments=segments,
        model=model,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
    )
    return ClientUpdate(who, arrived, tensors, staleness, sent or {})


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def lay_out(root: Path, files: Mapping[str, object]) -> Path:
    """A made-up /proc and /sys."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def settle(path: Path) -> None:
    """As if nobody had written to the file for a second."""
    before = time.time_ns() - 10**9
    os.utime(path, ns=(before, before))


def rewrite(path: Path, text: str) -> None:
    """By hand, a second ago."""
    path.write_text(text)
    settle(path)


def one_line(text: str, program: str) -> str:
    """What a command said of an error: one line, its own name before it."""
    assert text.startswith(f"{program}: "), text
    assert text.count("\n") == 1, text
    return text


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def options_of(rule: str, trim: float = 0.1) -> AggregationOptions:
    return AggregationOptions(rule=rule, trim=trim)


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value]) for name, value in values.items()}
