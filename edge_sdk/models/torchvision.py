"""`torchvision`: any classification model of torchvision by its name, randomly initialised.

Of images with other than 3 channels the first convolution takes as many. MobileNets and others that
have a width multiplier take the spec's width, rounded as they round."""

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

# What a model is told besides its number of classes, by how its name begins.
WIDTHS = ("mobilenet",)
AUXILIARY = ("googlenet", "inception")  # with further outputs in training


class TorchvisionOptions(PackageOptions, frozen=True):
    pass


def make(spec: ModelSpec, options: TorchvisionOptions) -> nn.Module:
    """Raises ConfigError without the package, for an unknown name and for inputs but images."""
    models: Any = optional_module("torchvision", "the family torchvision", "torchvision").models
    check_name(options, "torchvision", models.list_models(module=models))
    channels, height, width = image_axes(spec, "torchvision")
    name, more = options.model, dict[str, Any]()
    if name.startswith("vit_"):
        more["image_size"] = height
    if name.startswith("maxvit"):
        more["input_size"] = (height, width)
    if name.startswith(AUXILIARY):
        more |= {"aux_logits": False, "init_weights": True}
    if name.startswith(WIDTHS):
        more["width_mult"] = spec.width
    else:
        check_whole(spec, "torchvision")
    module: nn.Module = models.get_model(name, weights=None, num_classes=spec.num_classes, **more)
    _take_channels_(module, channels)
    return module


def _take_channels_(module: nn.Module, channels: int) -> None:
    """Put another first convolution into it where it is for other images."""
    layers = [each for each in module.named_modules() if isinstance(each[1], nn.Conv2d)]
    path, layer = layers[0] if layers else ("", None)
    if not isinstance(layer, nn.Conv2d) or layer.in_channels == channels:
        return
    parent, _, name = path.rpartition(".")
    first = nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        bias=layer.bias is not None,
    )
    setattr(module.get_submodule(parent), name, first)


def build(spec: ModelSpec, options: TorchvisionOptions) -> StagedModel:
    is_vit = options.model.startswith("vit_")
    return staged(spec, options, make, "class-token" if is_vit else "pool-linear")


register_family("torchvision", build, TorchvisionOptions, names_of(build), makes_any=True)
