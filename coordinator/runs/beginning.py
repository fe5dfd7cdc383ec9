"""What a run begins from: random weights, those of `--init FILE`, or its last committed round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from coordinator.aggregation.border import STATE, Border
from coordinator.config import RunConfig
from coordinator.methods.base import HasFamilies, Method
from coordinator.runs.weight_file import weight_file
from coordinator.store.store import Store
from edge_sdk.errors import ConfigError, ShapeError, StoreError
from edge_sdk.models import original_names
from edge_sdk.models.adapters.base import BASIS
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import ADAPTER
from edge_sdk.protocol.tensors import Tensors

log = logging.getLogger(__name__)
NAMED = 3  # tensors that a line names of each kind


class Init(NamedTuple):
    """Weights that a model begins from. what: how it is told; kept: its name in the run folder."""

    what: str
    path: Path
    kept: str
    spec: ModelSpec
    current: Tensors
    begin_from: Callable[[Tensors], None]


def inits(config: RunConfig, method: Method) -> Iterator[Init]:
    """Of the run's model, or of each backbone that has some."""
    if config.init:
        path = Path(config.init)
        held = method.spec, method.current(), method.begin_from
        yield Init(f"--init {path}", path, "init.safetensors", *held)
    families = method.families() if isinstance(method, HasFamilies) else {}
    for backbone in config.backbones:
        if backbone.init and isinstance(method, HasFamilies):
            name, path, family = backbone.name, Path(backbone.init), families[backbone.name]
            begin = partial(method.begin_family_from, name)
            what, kept = f"--backbones, {name}: init {path}", f"init-{name}.safetensors"
            yield Init(what, path, kept, family.spec, family.current, begin)


def check_init(config: RunConfig, method: Method) -> None:
    """Raise ConfigError now, before a run folder is made, if the run cannot begin from it."""
    for init in inits(config, method):
        read_init(init.path, init.current, original_names(init.spec), init.what)


def load_state(store: Store, method: Method, border: Border | None = None) -> None:
    """Give the method, and the border, their state after the last committed round; the method
    before the first what `--init` names, of which the run folder keeps a copy. Raises
    ConfigError, StoreError."""
    state = store.load_checkpoint()
    if state is None:
        for init in inits(store.config, method):
            init.begin_from(_kept_init(store, init))
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


def _kept_init(store: Store, init: Init) -> Tensors:
    path, model = store.folder / init.kept, init.current
    if not path.exists():  # a resumed run no longer needs the user's file
        found, told = read_init(init.path, model, original_names(init.spec), init.what)
        is_whole = all(name in found or _is_of_adapter(name) for name in model)
        log.log(logging.INFO if is_whole else logging.WARNING, "%s", told)
        store.write_tensors(path, found)
    return read_init(path, model)[0]


def read_init(
    path: Path,
    model: Mapping[str, Tensor],
    original: Mapping[str, str] | None = None,
    what: str = "",
) -> tuple[Tensors, str]:
    """The tensors of a file of weights that have a name and shape of the model's, as the model's
    dtypes, and one line that tells which of both have not. original: the other names of the
    model's, see original_names. what: how the file is told. Only tensors that fit are read into
    memory.

    Raises ConfigError: no such file; one of which nothing fits, or of another model, where no more
    tensors of the stages fit than have another shape (those of exits have, with other classes); one
    with a value that is not finite."""
    original, what = original or {}, what or f"--init {path}"
    found: Tensors = {}
    reshaped: list[str] = []
    lacking: list[str] = []
    with weight_file(path, what) as file:
        places = {name: _place(name, original.get(name), file.shapes) for name in model}
        places = {n: place for n, place in places.items() if place or not _is_of_adapter(n)}
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
        told = f"{what}: {len(fitting)} of the model's {len(places)} tensors begin from it{rest}"
        for why, names in lists.items():
            if len(names) > NAMED:
                log.debug("%s: %s: %s", what, why, ", ".join(names))
        if not fitting:
            raise ConfigError(f"{told}; give a file with the model's names and shapes")
        if (num_other := _num_of_stages(reshaped)) and num_other >= _num_of_stages(fitting):
            raise ConfigError(f"{told}; these are weights of another model: give its own")
        for name, place in fitting.items():
            found[name] = file.read(place).to(model[name].dtype)
            if found[name].is_floating_point() and not torch.isfinite(found[name]).all():
                raise ConfigError(f"{what}: {place} holds NaN or infinite values; give another")
    return found, told


def _place(name: str, original: str | None, held: Mapping[str, object]) -> str | None:
    """Under which name a tensor lies in a file, if it does."""
    return next((place for place in (name, original) if place in held), None)


def _is_of_adapter(name: str) -> bool:
    """Files of a backbone have none, and an adapter begins by changing nothing."""
    return not {ADAPTER, BASIS}.isdisjoint(name.split("."))


def _num_of_stages(names: Iterable[str]) -> int:
    return sum(name.startswith("stages.") for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
