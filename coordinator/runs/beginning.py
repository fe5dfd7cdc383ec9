"""What a run begins from: random weights, those of `--init FILE`, or its last committed round."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coordinator.aggregation.border import STATE, Border
from coordinator.methods.base import Method
from coordinator.runs.weight_file import weight_file
from coordinator.store.store import Store
from edge_sdk.errors import ConfigError, ShapeError, StoreError
from edge_sdk.models import original_names
from edge_sdk.protocol.tensors import Tensors

log = logging.getLogger(__name__)
NAMED = 3  # tensors that a line names of each kind


def check_init(init: str, method: Method) -> None:
    """Raise ConfigError now, before a run folder is made, if the run cannot begin from it."""
    if init:
        read_init(Path(init), method.current(), original_names(method.spec))


def load_state(store: Store, method: Method, border: Border | None = None) -> None:
    """Give the method, and the border, their state after the last committed round; the method
    before the first what `--init` names, of which the run folder keeps a copy. Raises
    ConfigError, StoreError."""
    state = store.load_checkpoint()
    if state is None:
        if store.config.init:
            method.begin_from(_kept_init(store, method))
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


def _kept_init(store: Store, method: Method) -> Tensors:
    path, model = store.folder / "init.safetensors", method.current()
    if not path.exists():  # a resumed run no longer needs the user's file
        found, told = read_init(Path(store.config.init), model, original_names(method.spec))
        log.log(logging.INFO if len(found) == len(model) else logging.WARNING, "%s", told)
        store.write_tensors(path, found)
    return read_init(path, model)[0]


def read_init(
    path: Path, model: Mapping[str, Tensor], original: Mapping[str, str] | None = None
) -> tuple[Tensors, str]:
    """The tensors of a file of weights that have a name and shape of the model's, as the model's
    dtypes, and one line that tells which of both have not. original: the other names of the
    model's, see original_names. Only those that fit are read into memory.

    Raises ConfigError: no such file; one of which nothing fits, or of another model, where no more
    tensors of the stages fit than have another shape (those of exits have, with other classes); one
    with a value that is not finite."""
    original = original or {}
    found: Tensors = {}
    reshaped: list[str] = []
    lacking: list[str] = []
    with weight_file(path) as file:
        places = {name: _place(name, original.get(name), file.shapes) for name in model}
        fitting = {}
        for name, place in places.items():
            wanted = tuple(model[name].shape)
            if place is None:
                lacking.append(name)
            elif file.shapes[place] != wanted:
                shown = name if place == name else f"{name} ({place} there)"
                reshaped.append(f"{shown} {file.shapes[place]} instead of {wanted}")
            else:
                fitting[name] = place
        unknown = [name for name in file.shapes if name not in places.values()]
        lists = {
            "of another shape": reshaped,
            "not in the file, so random": lacking,
            "not in the model, so left out": unknown,
        }
        rest = "".join(
            f"; {len(names)} {why}: {_some(names)}" for why, names in lists.items() if names
        )
        told = (
            f"--init {path}: {len(fitting)} of the model's {len(model)} tensors begin from it{rest}"
        )
        for why, names in lists.items():
            if len(names) > NAMED:
                log.debug("--init %s: %s: %s", path, why, ", ".join(names))
        if not fitting:
            raise ConfigError(f"{told}; give a file with the model's names and shapes")
        if (num_other := _num_of_stages(reshaped)) and num_other >= _num_of_stages(fitting):
            raise ConfigError(f"{told}; these are weights of another model: give its own")
        for name, place in fitting.items():
            found[name] = file.read(place).to(model[name].dtype)
            if found[name].is_floating_point() and not torch.isfinite(found[name]).all():
                raise ConfigError(
                    f"--init {path}: {place} holds NaN or infinite values; give another"
                )
    return found, told


def _place(name: str, original: str | None, held: Mapping[str, object]) -> str | None:
    """Under which name a tensor lies in a file, if it does."""
    return next((place for place in (name, original) if place in held), None)


def _num_of_stages(names: Iterable[str]) -> int:
    return sum(name.startswith("stages.") for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
