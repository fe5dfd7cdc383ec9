"""A run's state in a file, whole or not at all; and whether a run can go on from it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import replacing
from edge_sdk.protocol.tensors import Tensors

SAFETENSORS_DRAFT = ".tmp" + 6 * "[0-9A-Za-z]"


MOST = 1e15  # of a float32 number; beyond it sums of squares overflow and no loss is finite


def checkpoint_name(round: int) -> str:
    return f"round-{round:06d}.safetensors"


def sweep(folder: Path, kept: Iterable[str]) -> None:
    """Delete what a run that was killed left of checkpoints: drafts, and all but those `kept`."""
    kept = set(kept)
    for pattern in (SAFETENSORS_DRAFT, ".round-*.new", "round-*.safetensors"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                with suppress(OSError):
                    path.unlink()


def unsound(state: Mapping[str, Tensor]) -> str:
    """Why no run can go on from this state, "" if one can: a value that is not finite or beyond
    MOST, a negative variance. float64 holds norms and coefficients, which may be larger."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(end) for end in tensor.aminmax())
        most = sys.float_info.max if tensor.dtype == torch.float64 else MOST
        least = 0.0 if name.endswith("running_var") else -most
        if not least <= low <= high <= most:  # NaN is in no range
            return f"{name} reaches from {low:.3g} to {high:.3g}"
    return ""


def read_checkpoint(path: Path) -> Tensors:
    """Raises StoreError."""
    try:
        state: Tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"checkpoint {path} cannot be read: {error}") from error
    return state


def read_sound(path: Path) -> Tensors:
    """Raises StoreError, also for a state from which no run can go on."""
    state = read_checkpoint(path)
    if why := unsound(state):
        raise StoreError(f"checkpoint {path} is of no use: {why}")
    return state


def write_checkpoint(
    path: Path, state: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Whole or not at all, with the mode that the umask allows. safetensors from 0.8 puts a file of
    its own, with mode 0600, in the place of the one it is given: a run that is killed meanwhile
    leaves it, and another user, who exports the run, could not read it. Raises OSError."""
    for stale in path.parent.glob(SAFETENSORS_DRAFT):  # a run has one writer, this one
        with suppress(OSError):
            stale.unlink()
    with replacing(path) as draft:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft.name, about)
        with open(draft.name, "rb+") as saved:
            os.fchmod(saved.fileno(), stat.S_IMODE(os.fstat(draft.fileno()).st_mode))
            os.fsync(saved.fileno())
