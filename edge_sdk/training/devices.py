"""The device that torch computes on, by its name."""

from __future__ import annotations

import torch

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import one_line


def usable_device(name: str) -> torch.device:
    """torch's device of this name, once it has held a tensor. Raises ConfigError."""
    if name.partition(":")[0] not in ("cpu", "cuda"):  # torch would list twenty others
        raise ConfigError(f"--device {name!r} is not supported; use cpu or cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name!r}: {one_line(str(error))}; use cpu or cuda") from error
    return device


def pick_device(name: str) -> torch.device:
    """torch's device of this name; "auto": CUDA where there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)
