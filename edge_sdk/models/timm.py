"""`timm`: any model of timm (PyTorch Image Models) by its name, randomly initialised."""

from __future__ import annotations

from typing import Any

from torch import nn

from edge_sdk.helpers.imports import optional_module
from edge_sdk.models import register_family
from edge_sdk.models.packages import (
    PackageOptions,
    check_name,
    check_whole,
    image_axes,
    names_of,
    staged,
)
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class TimmOptions(PackageOptions, frozen=True):
    pass


def make(spec: ModelSpec, options: TimmOptions) -> nn.Module:
    """Raises ConfigError without the package, for an unknown name and for inputs but images."""
    timm: Any = optional_module("timm", "the family timm", "timm")
    check_name(options, "timm", timm.list_models())
    check_whole(spec, "timm")
    channels, height, width = image_axes(spec, "timm")
    about = timm.get_pretrained_cfg(options.model)
    is_fixed = about is not None and about.fixed_input_size
    size = {"img_size": (height, width)} if is_fixed else {}
    module: nn.Module = timm.create_model(
        options.model, pretrained=False, num_classes=spec.num_classes, in_chans=channels, **size
    )
    return module


def build(spec: ModelSpec, options: TimmOptions) -> StagedModel:
    return staged(spec, options, make)


register_family("timm", build, TimmOptions, names_of(build), makes_any=True)
