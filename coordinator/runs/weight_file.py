"""Files of weights that a run may begin from: safetensors, or a torch state dict. Names and shapes
are known before a tensor is read, so that a file of another model costs no memory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_sdk.errors import ConfigError
from edge_sdk.hardware.process_memory import is_for_memory
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.tensors import Tensors

PICKLE = b"\x80"  # how a state dict begins that is no archive, as torch wrote it before 1.6
WITHIN = ("state_dict", "model_state_dict", "model")  # where a checkpoint of a training has it
WRAPPERS = ("module.", "_orig_mod.")  # before all names: of DataParallel and torch.compile


class WeightFile(NamedTuple):
    """shapes: by name. read: one tensor of them, a copy in memory."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@contextmanager
def weight_file(path: Path, what: str) -> Iterator[WeightFile]:
    """The file, open within. what: how errors call it. Of a state dict only tensors are read,
    nothing in it is run. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            is_pickle = file.read(1) == PICKLE
        if is_pickle or zipfile.is_zipfile(path):
            yield _of_state_dict(path, what, is_archive=not is_pickle)
            return
        with safe_open(path, "pt") as found:
            shapes = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118 - it is no mapping
            yield WeightFile(shapes, lambda name: found.get_tensor(name).clone())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{what} cannot be read: {one_line(str(error))}; give a safetensors file, such "
            "as the model.safetensors of another run, or a torch state dict"
        ) from error


def _of_state_dict(path: Path, what: str, *, is_archive: bool) -> WeightFile:
    """is_archive: its tensors stay in the file until they are read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except OSError:
        raise
    except Exception as error:  # a damaged or foreign one raises anything
        if is_for_memory(error):
            raise
        raise ConfigError(
            f"{what} is no state dict of tensors alone, as torch.load(weights_only=True) "
            "takes it; write one with torch.save(model.state_dict(), FILE)"
        ) from error
    held = _tensors(content)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return WeightFile(shapes, lambda name: held[name].detach().clone())


def _tensors(content: Any) -> Tensors:
    """The tensors of a state dict, also of one that a checkpoint holds, by the module's own names.
    What else lies beside them, such as an epoch, is left out."""
    for key in WITHIN:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    entries = content.items() if isinstance(content, Mapping) else ()
    held = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    for wrapper in WRAPPERS:
        if held and all(name.startswith(wrapper) for name in held):
            held = {name.removeprefix(wrapper): tensor for name, tensor in held.items()}
    return held
