"""A model rewritten in layers that ONNX has, computing the same in eval mode.

BatchNorm is folded here, into the convolution or linear layer before it, not left to the exporter,
which folds behind convolutions only. An average pool to a size that does not divide its input, for
which ONNX has no node, becomes products with constant matrices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_sdk.models.adapters.attach import merge_
from edge_sdk.models.staged import StagedModel

FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


def plain_model(model: StagedModel, x: Tensor) -> StagedModel:
    """A copy that computes the same in eval mode, of layers that ONNX has: adapters merged,
    BatchNorm folded, pools replaced where they must be. x: (n, *input_shape), for the sizes that
    pools see."""
    plain = copy.deepcopy(model).eval()
    for layer, copied in zip(model.modules(), plain.modules(), strict=True):
        copied._forward_hooks = layer._forward_hooks.copy()  # the copy of a traced module has none
    merge_(plain)
    fold_batch_norms_(plain)
    _replace_pools_(plain, x)
    return plain


@torch.no_grad()
def fold_batch_norms_(model: nn.Module) -> None:
    """In every Sequential, make conv (or linear) and the BatchNorm right after it one layer:
    w' = w s, b' = (b - mean) s + beta, with s = gamma / sqrt(var + eps), in float64."""
    for chain in [module for module in model.modules() if type(module) is nn.Sequential]:
        layers = list(chain.named_children())
        for (_, before), (name, norm) in itertools.pairwise(layers):
            layer = _last(before)
            if not isinstance(layer, FOLDABLE) or not isinstance(norm, NORMS):
                continue
            if layer._forward_hooks or before._forward_hooks:
                continue  # what it gives is not its weight's alone
            if norm.running_mean is None or norm.running_var is None:
                continue  # it normalises by the batch, also in eval mode
            gamma = 1.0 if norm.weight is None else norm.weight.double()
            beta = 0.0 if norm.bias is None else norm.bias.double()
            bias = 0.0 if layer.bias is None else layer.bias.double()
            scale = gamma * (norm.running_var.double() + norm.eps).rsqrt()  # (outputs,)
            per_output = scale.reshape(-1, *[1] * (layer.weight.ndim - 1))  # (outputs, 1, ...)
            weight = layer.weight * per_output
            shift = (bias - norm.running_mean.double()) * scale + beta
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
            layer.bias = nn.Parameter(shift.float(), requires_grad=False)
            setattr(chain, name, nn.Identity())


def _last(layer: nn.Module) -> nn.Module:
    """The layer that gives the output: itself, or the last one of a Sequential."""
    while type(layer) is nn.Sequential and len(layer):
        layer = layer[-1]
    return layer


class AveragePool(nn.Module):
    """AdaptiveAvgPool for inputs of known sides: each axis a product with a constant matrix."""

    def __init__(self, sides: Sequence[int], bins: Sequence[int]) -> None:
        super().__init__()
        for axis, (side, count) in enumerate(zip(sides, bins, strict=True)):
            self.register_buffer(f"weights_{axis}", bin_weights(side, count))

    def forward(self, x: Tensor) -> Tensor:
        """(..., side) to (..., bins), or (..., height, width) to (..., bins, bins)."""
        first, *second = self.buffers()  # (side, bins) each
        if not second:
            return x @ first
        return first.T @ x @ second[0]


def bin_weights(side: int, count: int) -> Tensor:
    """(side, count): column i averages the inputs floor(i side / count) to
    ceil((i + 1) side / count) - 1, as AdaptiveAvgPool does."""
    weights = torch.zeros(side, count)
    for number in range(count):
        start, end = number * side // count, -(-(number + 1) * side // count)
        weights[start:end, number] = 1 / (end - start)
    return weights


@torch.no_grad()
def _replace_pools_(model: StagedModel, x: Tensor) -> None:
    seen: dict[nn.Module, tuple[int, ...]] = {}

    def look(pool: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[pool] = tuple(inputs[0].shape[2:])

    pools = [module for module in model.modules() if isinstance(module, POOLS)]
    handles = [pool.register_forward_pre_hook(look) for pool in pools]
    model(x)
    for handle in handles:
        handle.remove()
    for parent in list(model.modules()):
        for name, pool in parent.named_children():
            if not isinstance(pool, POOLS) or pool not in seen:
                continue
            sides, size = seen[pool], pool.output_size
            given = size if isinstance(size, tuple) else (size,) * len(sides)
            bins = [
                side if count is None else count for side, count in zip(sides, given, strict=True)
            ]
            if any(side % count for side, count in zip(sides, bins, strict=True)):
                setattr(parent, name, AveragePool(sides, bins))
