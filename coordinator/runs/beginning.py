"""What a run begins from: random weights, those of `--init FILE`, or its last committed round."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coordinator.aggregation.border import STATE, Border
from coordinator.methods.base import Method
from coordinator.store.store import Store
from edge_sdk.errors import ConfigError, ShapeError, StoreError
from edge_sdk.protocol.tensors import Tensors

log = logging.getLogger(__name__)
NAMED = 3  # tensors that a line names of each kind


def check_init(init: str, method: Method) -> None:
    """Raise ConfigError now, before a run folder is made, if the run cannot begin from it."""
    if init:
        read_init(Path(init), method.current())


def load_state(store: Store, method: Method, border: Border | None = None) -> None:
    """Give the method, and the border, their state after the last committed round; the method
    before the first what `--init` names, of which the run folder keeps a copy. Raises
    ConfigError, StoreError."""
    state = store.load_checkpoint()
    if state is None:
        if store.config.init:
            method.begin_from(_kept_init(store, method.current()))
        return
    held = {STATE: state.pop(STATE)} if STATE in state else {}
    try:
        method.load_state_dict(state)
        if border:
            border.load_state_dict(held)
    except ShapeError as error:
        raise StoreError(
            f"the checkpoint of round {store.next_round() - 1} in {store.folder} is not this "
            f"run's: {error}; put back the run's own file or start another --run-dir"
        ) from error


def _kept_init(store: Store, model: Tensors) -> Tensors:
    path = store.folder / "init.safetensors"
    if not path.exists():  # a resumed run no longer needs the user's file
        found, told = read_init(Path(store.config.init), model)
        log.log(logging.INFO if len(found) == len(model) else logging.WARNING, "%s", told)
        store.write_tensors(path, found)
    return read_init(path, model)[0]


def read_init(path: Path, model: Mapping[str, Tensor]) -> tuple[Tensors, str]:
    """The tensors of a safetensors file that have a name and shape of the model's, as the model's
    dtypes, and one line that tells which of both have not. Only those are read into memory. Raises
    ConfigError: no such file, none that fits, or one with a value that is not finite."""
    found: Tensors = {}
    reshaped, unknown = [], []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                shape = tuple(file.get_slice(name).get_shape())
                if name not in model:
                    unknown.append(name)
                elif shape != tuple(model[name].shape):
                    reshaped.append(f"{name} {shape} instead of {tuple(model[name].shape)}")
                else:
                    found[name] = file.get_tensor(name).to(model[name].dtype)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--init {path} cannot be read: {error}; give a safetensors file, such as the "
            "model.safetensors of another run"
        ) from error
    lacking = [name for name in model if name not in found]
    lists = {
        "of another shape": reshaped,
        "not in the file, so random": [n for n in lacking if all(n not in r for r in reshaped)],
        "not in the model, so left out": unknown,
    }
    rest = "".join(f"; {len(names)} {why}: {_some(names)}" for why, names in lists.items() if names)
    told = f"--init {path}: {len(found)} of the model's {len(model)} tensors begin from it{rest}"
    if not found:
        raise ConfigError(f"{told}; give a file with the model's names and shapes")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"--init {path}: {name} holds NaN or infinite values; give another")
    return {name: found[name] for name in model if name in found}, told


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
