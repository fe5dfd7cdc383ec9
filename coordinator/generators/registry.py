"""Generators by name: what the server puts where clients lack stages.

none               nothing: each tensor is the mean over its owners
svd-mlp            the paper's factorised hypernetworks; naive-mlp the same on flattened weights;
                   svd-mlp-residual on updates, with a gate (pairwise.py)
update-regression  linear, on updates, with memory (update_regression.py)
"""

from __future__ import annotations

import torch

from coordinator.config import GeneratorOptions
from coordinator.generators.base import Generator, generated_names
from coordinator.generators.pairwise import PairGenerator
from coordinator.generators.update_regression import UpdateRegression
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec


def make_generator(
    spec: ModelSpec, options: GeneratorOptions, seed: int, device: str | torch.device = "cpu"
) -> Generator | None:
    """None where nothing is to be generated: no generator, gain 0, or a model of one exit."""
    if options.name == "none" or options.gain == 0 or spec.exit == 1:
        return None
    names = generated_names(spec, options.generate)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build(spec).named_parameters()}
    if options.name == "update-regression":
        return UpdateRegression(shapes, names, options, seed, device)
    return PairGenerator({name: shapes[name] for name in names}, options, seed, device)
