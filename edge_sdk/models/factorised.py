"""Low-rank models: of a layer's weight two factors, whose product it is (FedHM, Yao et al. 2021,
arXiv 2111.14655).

A convolution of kernel (kh, kw) from I to O channels becomes one of (1, kw) to R channels and, over
its output, one of (kh, 1) to O; its weight as a matrix (O kh, I kw) is then of rank R at most.
R = max(1, round(rank O)). Of a series the first factor has the kernel and the second kernel 1; a
linear layer becomes two.

Factorised are the main weights of the stages after the first, of any family: plain convolutions
without groups and linear layers. What two factors would not make smaller stays whole, as do layers
with hooks, with a weight that others share, or inside a layer of torch's own.

A weight NAME.weight is NAME.v.weight, which takes the input, and NAME.u.weight; NAME.bias is
NAME.u.bias."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def factor_ranks(model: StagedModel, rank: float) -> dict[str, int]:
    """R of each weight that is factorised, by its name in the whole model; of none at rank 1."""
    main = set(model.main_weights)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    closed = {
        layer for parent in model.modules() if is_closed(parent) for layer in parent.children()
    }
    found = {}
    for path, layer in model.named_modules():
        name = f"{path}.weight"
        if name not in main or stage_of(name)[1] == 1 or not _is_plain(layer) or layer in closed:
            continue
        assert isinstance(layer.weight, Tensor)
        outputs, inputs, kh, kw = _kernel(layer.weight).shape
        kept = max(1, round(rank * outputs))
        is_smaller = rank < 1 and kept * (outputs * kh + inputs * kw) < layer.weight.numel()
        if is_smaller and uses[id(layer.weight)] == 1:
            found[name] = kept
    return found


def factorised(model: StagedModel, rank: float) -> StagedModel:
    """The model with factors in the place of its layers, drawn as torch draws such layers; `model`
    itself is used up. rank: above 0, at most 1, where it stays as it is, as it does with one stage.
    Raises ConfigError where no layer would become smaller."""
    if rank == 1 or len(model.stages) == 1:
        return model
    if not (ranks := factor_ranks(model, rank)):
        raise ConfigError(
            f"rank {rank:g}: two factors make none of its layers after stage 1 smaller, which are "
            "convolutions without groups and linear layers; take another rank or family"
        )
    pairs = {
        layer: _pair(layer, ranks[f"{path}.weight"])
        for path, layer in model.named_modules()
        if f"{path}.weight" in ranks
    }
    for parent in list(model.modules()):
        for child, layer in parent._modules.items():  # a layer may stand in several places
            if layer in pairs:
                parent._modules[child] = pairs[layer]
    main = [
        part
        for name in model.main_weights
        for part in (factor_names(name) if name in ranks else (name,))
    ]
    made = StagedModel(list(model.stages), list(model.exits), main_weights=main)
    made.cuts, made.whole_bytes, made.doubt = model.cuts, model.whole_bytes, model.doubt
    return made


def factor_names(name: str) -> tuple[str, str]:
    """Of a weight's factors v and u."""
    layer = name.removesuffix(".weight")
    return f"{layer}.v.weight", f"{layer}.u.weight"


def lowered(tensors: Mapping[str, Tensor], all_ranks: Sequence[Mapping[str, int]]) -> list[Tensors]:
    """The tensors of factorised models from those of the whole one, whose ranks factor_ranks tells:
    one decomposition of a weight serves them all. What stays whole is the same tensor in each."""
    made: list[Tensors] = [{} for _ in all_ranks]
    for name, tensor in tensors.items():
        most = max((ranks.get(name, 0) for ranks in all_ranks), default=0)
        v, u = split(tensor, most) if most else (tensor, tensor)
        layer = name.removesuffix(".bias")
        for ranks, held in zip(all_ranks, made, strict=True):
            if kept := ranks.get(name):
                one, other = factor_names(name)
                held |= {one: v[:kept].contiguous(), other: u[:, :kept].contiguous()}
            else:
                held[f"{layer}.u.bias" if f"{layer}.weight" in ranks else name] = tensor
    return made


def raised(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """The tensors of the whole model from those of a factorised one. names: of the weights that may
    be factors there."""
    layers = {name.removesuffix(".weight") for name in names}
    made: Tensors = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        layer, _, factor = path.rpartition(".")
        if layer not in layers or factor not in ("u", "v"):
            made[name] = tensor
        elif kind == "bias":
            made[f"{layer}.bias"] = tensor
        elif factor == "u":
            made[f"{layer}.weight"] = merged(tensors[f"{layer}.v.weight"], tensor)
    return made


def split(weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The factors v (R, I, ...) and u (O, R, ...) of a weight (O, I, ...), R = `most`: of its
    matrix U S V' truncated, u = U sqrt(S) and v = sqrt(S) V'. Those of a smaller R are their first
    channels. The largest entry of each column of U is positive, so that they are one pair of many
    that give the same product."""
    outputs, inputs, kh, kw = _kernel(weight).shape
    matrix = _kernel(weight).permute(0, 2, 1, 3).reshape(outputs * kh, inputs * kw)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    left, right, root = left[:, :most], right[:most], sizes[:most].sqrt()  # (O kh, R), (R, I kw)
    root = root * left.gather(0, left.abs().argmax(0, keepdim=True))[0].sign()
    u = (left * root).reshape(outputs, kh, most).transpose(1, 2)  # (O, R, kh)
    v = (root[:, None] * right).reshape(most, inputs, kw)  # (R, I, kw)
    return _like(v[:, :, None], weight.ndim), _like(u[..., None], weight.ndim)


def merged(v: Tensor, u: Tensor) -> Tensor:
    """The weight (O, I, ...) of which v (R, I, ...) and u (O, R, ...) are the factors."""
    rows, columns = _kernel(u)[..., 0], _kernel(v)[:, :, 0]  # (O, R, kh), (R, I, kw)
    return _like(torch.einsum("ory,rix->oiyx", rows, columns), v.ndim)


def _kernel(weight: Tensor) -> Tensor:
    """As that of a convolution over images, (O, I, kh, kw)."""
    return weight.reshape(*weight.shape[:2], *[1] * (4 - weight.ndim), *weight.shape[2:])


def _like(kernel: Tensor, ndim: int) -> Tensor:
    """(O, I, kh, kw) with the last of its kernel's axes alone, or none."""
    return kernel.reshape(*kernel.shape[:2], *kernel.shape[6 - ndim :]).contiguous()


def _is_plain(layer: nn.Module) -> bool:
    """Whether it computes with its weight alone what its type says, and is trained."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return (
        isinstance(layer, LAYERS)
        and type(layer) in LAYERS
        and "forward" not in vars(layer)
        and getattr(layer, "groups", 1) == 1
        and not hooks
        and layer.weight.requires_grad
    )


def is_closed(parent: nn.Module) -> bool:
    """A layer of torch that is made of layers, such as those of transformers, reads the weights of
    its parts by itself."""
    return type(parent).__module__.startswith("torch.nn") and not isinstance(parent, CONTAINERS)


def _pair(layer: nn.Module, kept: int) -> nn.Sequential:
    """Two layers that compute what one of weights of rank `kept` does."""
    assert isinstance(layer, LAYERS)
    about: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        v: nn.Module = nn.Linear(layer.in_features, kept, bias=False, **about)
        u: nn.Module = nn.Linear(kept, layer.out_features, bias=has_bias, **about)
    else:
        kind = type(layer)
        along, across = _geometry(layer, is_first=True), _geometry(layer, is_first=False)
        v = kind(layer.in_channels, kept, bias=False, **along, **about)
        u = kind(kept, layer.out_channels, bias=has_bias, **across, **about)
    return nn.Sequential(OrderedDict(v=v, u=u)).train(layer.training)


def _geometry(layer: nn.Conv1d | nn.Conv2d, *, is_first: bool) -> dict[str, Any]:
    """The layer's kernel, stride, padding and dilation on its last axis (is_first) or on the axes
    before; on the others none."""
    axes = len(layer.kernel_size)
    taken = [(axis == axes - 1) == is_first for axis in range(axes)]

    def on(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(
            value if is_taken else other for value, is_taken in zip(values, taken, strict=True)
        )

    padding = layer.padding
    return {
        "kernel_size": on(layer.kernel_size, 1),
        "stride": on(layer.stride, 1),
        "padding": padding if isinstance(padding, str) else on(padding, 0),
        "dilation": on(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
    }
