"""Tensors in a file, whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS_DRAFT = ".tmp" + 6 * "[0-9A-Za-z]"


def checkpoint_name(round: int) -> str:
    return f"round-{round:06d}.safetensors"


def write_checkpoint(
    path: Path, state: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Whole or not at all. safetensors from 0.8 writes a file of its own in the same folder, with
    mode 0600: a killed run leaves it, and another user, who exports the run, could not read it."""
    draft = path.with_name(path.name + ".new")
    for stale in (draft, *path.parent.glob(SAFETENSORS_DRAFT)):  # a run has one writer, this one
        with suppress(OSError):
            stale.unlink()
    try:
        draft.touch()  # with the mode that the umask allows
        mode = stat.S_IMODE(draft.stat().st_mode)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, draft, about)
        with open(draft, "rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with suppress(OSError):  # after the rename there is none; a read-only disk keeps it
            draft.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
