"""Tensors in a file, whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from edge_sdk.helpers.files import replacing

SAFETENSORS_DRAFT = ".tmp" + 6 * "[0-9A-Za-z]"


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
