"""`hypemefed`: HypeMeFed (Shin et al. 2024, arXiv 2407.03086). Each client trains the prefix to its
exit; what it lacks is generated from what it has.

With `--paper` as published: factorised hypernetworks of absolute weights at rank 100, a plain mean,
the last model served (section 5). Without, what measured best (docs/results/accuracy.md), which
deviates: clients also train deeper stages by turns (rotation.py), a linear regression with memory
takes the place of the networks, exits teach each other while deep stages have few owners, clients
train by SGD with momentum where the paper has Adam, on logits that are shifted by their own label
counts, and the server has momentum and serves an average. Clients count alike, as in the published
code.
"""

from __future__ import annotations

from functools import partial

from coordinator.config import LOCAL, STEADY, RunConfig
from coordinator.generators.registry import make_generator
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation

BEST = {
    **STEADY,
    "rotation.mode": "add",
    "rotation.stages": 0,
    "generator.name": "update-regression",
    "distill.direction": "auto",
}
PAPER = {
    "optimizer": "adam",
    **LOCAL["adam"],
    "logit_adjustment": 0.0,
    "generator.name": "svd-mlp",
    "generator.rank": 100,
    "weighting": "equal",
    "rotation.mode": "off",
    "server.serve": "last",
    "server.momentum": 0.0,
    "server.lr": 1.0,
}


@register_method(
    "hypemefed",
    defaults=BEST,
    paper=PAPER,
    uses=("rotation", "generator", "server.damping"),
    on_device=OnDevice("depth", "M_e", "K_e, and K - K_e down and up by turns"),
)
def hypemefed(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit, deeper stages by turns, and a generator for the rest."""
    parts = config.model, config.generator, config.seed, device, config.frozen
    make = partial(make_generator, *parts)
    rule = rotation(config.rotation, config.seed, config.deadline_s)
    return DepthAveraging(config, rule, make)
