"""Packages of models, for tests: skipped with the reason where one is not installed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

# torchvision of the public index is built for CUDA. Beside a torch for the CPU its library does not
# load, and its import fails as these operators, which its models do not use, are nowhere.
OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def _declared() -> torch.library.Library | None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(name + SIGNATURE)
        return library
    except ImportError:
        pass
    return None


def package_or_skip(name: str) -> Any:
    """The package, or a skipped test."""
    _declared()
    return pytest.importorskip(name, reason=f"{name} is not installed; pip install '.[{name}]'")
