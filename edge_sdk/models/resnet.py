"""`resnet18`: He et al. (2016) in the form usual for CIFAR: a 3x3 stem of stride 1 without a pool,
then four groups of basic blocks; from the second group on each halves its sides by stride 2.

Exits as in HypeMeFed's VGG: stem and groups 1 and 2 are stage 1, groups 3 and 4 are stages 2 and 3;
each exit averages over all positions and is linear. Three exits on 3 x 32 x 32 with 100 classes:
11,258,732 parameters, of which 38,600 are the two shallower exits.
Main weights: the 3x3 convolutions. The 1x1 shortcut convolutions are left out: they hold 1.5 % of
the weights, but as pairs of a generator they would cost two more networks each, and an error in
them reaches the block's output beside both of its 3x3 convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from msgspec import Meta
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import register_family
from edge_sdk.models.layers import batch_norm, conv_block, input_axes
from edge_sdk.models.options import FamilyOptions, Sizes, sizes, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec

CHANNELS = (64, 128, 256, 512)
BLOCKS = (2, 2, 2, 2)
# ResNet-152 has 36 in a group. Counting the costs of 4 x 50 takes 17 s on one core of a PC.
Blocks: TypeAlias = Annotated[int, Meta(ge=1, le=100)]


class Resnet18Options(FamilyOptions, frozen=True):
    channels: Annotated[Sizes, Meta(description="of each group (64, 128, 256, 512)")] = ()
    blocks: Annotated[
        tuple[Blocks, ...] | Blocks, Meta(description="of each group (2, 2, 2, 2)")
    ] = ()


class BasicBlock(nn.Module):
    """ReLU(BN(conv3(ReLU(BN(conv3(x))))) + shortcut(x)): (B, inputs, H, W) to
    (B, outputs, ceil(H / stride), ceil(W / stride)). The shortcut is the identity where the shape
    stays, else a 1x1 convolution and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            batch_norm(outputs, 2),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            batch_norm(outputs, 2),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), batch_norm(outputs, 2)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut's stride is taken here: a 1x1 convolution of stride 2, channels few and last,
        # corrupts the heap in its backward pass with AVX2 but no AVX-512 (oneDNN in torch 2.13).
        seen = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        out: Tensor = self.relu(self.residual(x) + self.shortcut(seen))
        return out


def build_resnet18(spec: ModelSpec, options: Resnet18Options) -> StagedModel:
    """Raises ConfigError for other inputs than (C, H, W) and for more than three exits."""
    input_axes(spec, 3)
    if spec.exit > 3:
        raise ConfigError(f"family 'resnet18' has at most 3 exits, got {spec.exit}; use 'cnn'")
    num_groups = spec.exit + 1
    channels = widths(spec, "channels", options.channels, CHANNELS, num_groups)[:num_groups]
    blocks = sizes(spec, "blocks", options.blocks, BLOCKS, num_groups)[:num_groups]
    stem = conv_block(spec.input_shape[0], channels[0], 2, bias=False)
    groups = [_group(channels[0], channels[0], blocks[0], stride=1)]
    for number in range(1, num_groups):
        groups.append(_group(channels[number - 1], channels[number], blocks[number], stride=2))
    stages = [nn.Sequential(*stem, *groups[0], *groups[1])]
    stages += [nn.Sequential(*group) for group in groups[2:]]
    exits = [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, spec.num_classes))
        for width in channels[1:]
    ]
    return StagedModel(stages, exits, main_weights=_convolutions(stages))


def _group(inputs: int, outputs: int, num_blocks: int, *, stride: int) -> list[nn.Module]:
    """Basic blocks; the first of them changes the shape."""
    first = BasicBlock(inputs, outputs, stride)
    return [first, *(BasicBlock(outputs, outputs, 1) for _ in range(num_blocks - 1))]


def _convolutions(stages: Sequence[nn.Module]) -> list[str]:
    """Names in the model of all convolutions but those of shortcuts."""
    return [
        f"stages.{number}.{name}"
        for number, stage in enumerate(stages)
        for name, weight in stage.named_parameters()
        if weight.ndim == 4 and ".shortcut." not in name
    ]


register_family("resnet18", build_resnet18, Resnet18Options)
