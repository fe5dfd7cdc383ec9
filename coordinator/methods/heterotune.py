"""`heterotune`: adapters over pre-trained models of unequal size, a reconstruction of HeteroTune
(arXiv 2411.16796, versions of 2024 and 2025), of which only abstract and introduction are known to
us: devices hold frozen models of different size, adapters alone are trained and travel (DeMA, a
dense mixture of them: edge_sdk/models/adapters/dema.py), and the server brings update directions of
different models into harmony before it averages them (CMGA). All else is ours.

Each device trains the largest of --backbones that it can hold. Adapters and exits of one backbone
are averaged over its own clients. --share shared: adapters' inner tensors, which have one shape in
all of them, take one step in all; aligned: after those of two families that conflict have lost what
conflicts (aggregation/families.py). Both are experimental: in our measurements nothing was gained
by either (docs/adapters.md), so none is the default.

Deviations. Nothing is shared by default. A small family neither follows a large one nor stops it:
see family_weights there. With --holdout a family that is worse than its frozen start on what its
own clients set aside shares no longer, and is served as it was before (frozen_start.py). --adapt
none trains the models whole, each over its own clients."""

from __future__ import annotations

from typing import Annotated, Literal

from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.families import FamilyAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from edge_sdk.errors import ConfigError

SHARE = "what backbones have in common: nothing, adapters' insides, or those aligned (experimental)"
SHARING = ("dema", "pq-lora")
# Of the rates that we tried for adapters of small models, 1e-2 learned best, 1e-4 hardly at all.
LOCAL = {"optimizer": "adam", "lr": 1e-2, "momentum": 0.0}
DEFAULTS = LOCAL | {"server.serve": "last", "model.adapters.kind": "dema"}


class HeteroTune(Options, frozen=True, kw_only=True):
    share: Annotated[Literal["none", "shared", "aligned"], flag(SHARE)] = "none"


def check_heterotune(config: RunConfig) -> None:
    """Raise ConfigError for settings that backbones contradict, before any model is built."""
    if config.backbones and config.exit_weights:
        raise ConfigError("--exit-weights are for one model; leave them out with --backbones")
    if config.backbones and config.init:
        raise ConfigError("--init is for one model; say init = FILE in each table of --backbones")
    share = "none" if not isinstance(config.own, dict) else config.own.get("share", "none")
    adapters = config.model.adapters
    if share != "none" and (adapters is None or adapters.kind not in SHARING):
        kind = adapters.kind if adapters else "none"
        raise ConfigError(
            f"--share {share}: with --adapt {kind} no tensor has the same shape in all backbones; "
            f"give --adapt {' or '.join(SHARING)}, or leave --share out"
        )


@register_method(
    "heterotune",
    options=HeteroTune,
    defaults=DEFAULTS,
    uses=("backbones",),
    without=("distill", "aggregation.clip"),
    check=check_heterotune,
    on_device=OnDevice("the largest backbone", "M_i, less what is frozen", "adapters and exits"),
)
def heterotune(config: RunConfig, device: TorchDevice, options: HeteroTune) -> Method:
    """Adapters over backbones of unequal size, averaged for each of them (a reconstruction)."""
    return FamilyAveraging(config, options.share)
